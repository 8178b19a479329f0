"""What a twin is asked for its report: about what its texts speak of, and about what they do not."""

from types import MappingProxyType
from typing import Final

_ABOUT: Final = MappingProxyType(
    {
        "en": ("What do you say of {}?", "Tell me more."),
        "tr": ("{} hakkında ne dersin?", "Biraz daha anlat."),
        "de": ("Was sagst du über {}?", "Erzähle mir mehr."),
        "fr": ("Que dis-tu de {} ?", "Dis-m'en davantage."),
    }
)
ABSENT: Final = MappingProxyType(
    {
        "en": (
            "How do I configure a TCP socket in Linux?", "What is quantum entanglement?",
            "How many bytes are in a kilobyte?", "Who won the world cup in 1998?",
            "How does the immune system fight a virus?", "What is the chemistry of soap?",
            "What is the exchange rate of the euro?", "How do I train a neural network on a graphics card?",
            "Which bus goes to the airport?", "What is a good exercise against back pain?",
            "What does DNA consist of?", "Who is the president of the United States?",
            "How do I cook rice in a pressure cooker?", "What does a carburettor do in an engine?",
            "When did the Berlin Wall come down?", "What is the tax rate in Sweden?",
            "How are hurricanes and cyclones named?", "How do I write a curriculum vitae?", "How do submarines dive?",
            "Which guitar strings are best for jazz?", "How large is the Pacific Ocean?",
            "Who directed the film Casablanca?", "How do you score a goal in hockey?",
            "What is the population of India?", "What is machine learning?",
            "How does a refrigerator keep food cold?", "What is a black hole?", "How does the stock market crash?",
            "How does a search engine find pages?", "What is a credit card?", "What is climate change?",
        ),
        "tr": (
            "Linux'ta TCP soketi nasıl kurulur?", "Kuantum dolanıklığı nedir?", "Avro kaç lira eder?",
            "1998 dünya kupasını kim kazandı?", "Bağışıklık sistemi virüsle nasıl savaşır?",
            "İsveç'te vergi oranı nedir?", "Ekran kartında yapay zekâ nasıl eğitilir?",
            "Havaalanına hangi otobüs gider?", "DNA neden oluşur?", "Amerika'nın başkanı kimdir?",
            "Düdüklü tencerede pirinç nasıl pişer?", "Karbüratör motorda ne yapar?",
            "Berlin Duvarı ne zaman yıkıldı?", "Kasırgalara isim nasıl verilir?", "Özgeçmiş nasıl yazılır?",
            "Caz için hangi gitar teli iyidir?", "Pasifik Okyanusu ne kadar büyüktür?",
            "Kazablanka filmini kim çekti?", "Hokeyde gol nasıl atılır?", "Hindistan'ın nüfusu kaçtır?",
            "Buzdolabı yemeği nasıl soğuk tutar?",
        ),
    }
)  # fmt: skip
"""By language of the texts; the threshold of silence is set on others (runtime/twin/retrieval/absent.py)."""


def questions_about(words: list[str], language: str) -> list[str]:
    """Return a question about each word, in English where no others are known."""
    about = _ABOUT.get(language, _ABOUT["en"])[0]
    return [about.format(word) for word in words]


def follow_up(language: str) -> str:
    """Return what a dialogue goes on with."""
    return _ABOUT.get(language, _ABOUT["en"])[1]
