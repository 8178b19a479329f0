"""Questions about topics that few authors' texts have, to measure from which coverage on texts speak of something."""

import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Final

# The word in braces is the topic: texts that have its words in a row may well speak of it.
_QUESTIONS: Final = MappingProxyType(
    {
        "en": (
            "How does {photosynthesis} work?", "What is the boiling point of {nitrogen}?",
            "Who invented the {telephone}?",
            "How do I install a {printer} driver on my machine?", "What is the capital city of {Australia}?",
            "Which {football} club won the league last year?", "How long does a flight from {Chicago} to Rome take?",
            "What is a good recipe for {lasagna}?", "How do {vaccines} protect the body from disease?",
            "Can you explain {inflation} and the price of bread?", "What does the {mitochondria} of a cell do?",
            "Why did the {dinosaurs} die?", "How many players are there in a {basketball} team?",
            "What is the best way to learn {programming}?", "How does a {microwave} heat food?",
            "Tell me about the history of {Brazil}.", "What is the difference between {Bitcoin} and gold?",
            "How far is {Jupiter's} moon Europa from the sun in {kilometres}?", "Who painted the {Guernica}?",
            "How do I change the tyre of a {motorcycle}?", "What are the symptoms of {diabetes}?",
            "When was the {United Nations} founded and by whom?", "How do {airplanes} stay in the air?",
            "What is the {GDP} of Japan?", "Which {vitamin} is in an orange?", "How does a {computer} keep time?",
            "What is the plot of {Star Wars}?", "How do you play {badminton}?", "What are {antibiotics} good for?",
            "Who was the first {astronaut} to walk on the moon?", "How is {plastic} made?",
            "What is the law of {thermodynamics} about heat?", "How do I reset the password of my {email}?",
            "How strong was the {earthquake} in Chile?", "What is a {neural} network?", "How do {solar} panels work?",
            "Which {smartphone} has the best camera?", "Where do {kangaroos} live?", "What is {Buddhism}?",
            "How many {calories} does an egg have?",
            # Of words that many texts have, each in a sense of its own.
            "What is a {hard drive}?", "How does a {light bulb} work?", "What is {dark matter}?",
            "How does a {heat pump} work?", "What is a {stem cell}?", "What is a {tax return}?",
            "How does a {power plant} make current?", "What is a {hedge fund}?", "How do I open a {bank account}?",
            "What does a {fire wall} do?", "What is a {time machine}?", "How does a {washing machine} work?",
            "What is the {middle class}?", "What is the {greenhouse effect}?", "Where is the next {gas station}?",
            "What is a {blood type}?", "How fast is a {sound wave}?", "What is a {pocket calculator}?",
            "How do I get a {driving licence}?", "What is a {false positive}?",
        ),
        "tr": (
            "{Fotosentez} nasıl çalışır?", "{Azotun} kaynama noktası kaçtır?", "{Bilgisayara} yazıcı nasıl kurulur?",
            "{Avustralya'nın} başkenti neresidir?", "Geçen yıl {futbol} liginde kim şampiyon oldu?",
            "Chicago'dan Roma'ya {uçuş} ne kadar sürer?", "İyi bir {lazanya} tarifi nedir?",
            "{Aşılar} bedeni hastalıktan nasıl korur?", "{Enflasyon} ekmeğin fiyatını nasıl etkiler?",
            "Hücrede {mitokondri} ne işe yarar?", "{Dinozorlar} neden öldü?",
            "Bir {basketbol} takımında kaç oyuncu var?",
            "{Programlama} en iyi nasıl öğrenilir?", "{Mikrodalga} yemeği nasıl ısıtır?", "{Brezilya} tarihini anlat.",
            "{Bitcoin} ile altın arasındaki fark nedir?", "{Jüpiter} güneşe ne kadar uzaktır?",
            "{Guernica} tablosunu kim yaptı?", "{Motosikletin} lastiği nasıl değişir?",
            "{Diyabetin} belirtileri nelerdir?",
            "{Birleşmiş} Milletler ne zaman kuruldu?", "{Uçaklar} havada nasıl durur?",
            "{Japonya'nın} milli geliri ne kadar?",
            "Portakalda hangi {vitamin} var?", "{Satranç} taşları nasıl dizilir?", "{Yıldız Savaşları} ne anlatır?",
            "{Badminton} nasıl oynanır?", "{Antibiyotikler} ne işe yarar?", "Ayda yürüyen ilk {astronot} kimdi?",
            "{Plastik} nasıl yapılır?", "{Termodinamiğin} yasaları ısı hakkında ne der?",
            "{E-posta} parolam nasıl sıfırlanır?",
            "{Şili'deki} deprem ne kadar güçlüydü?", "{Yapay} sinir ağı nedir?", "{Güneş paneli} nasıl çalışır?",
            "Hangi {telefonun} kamerası en iyi?", "{Kangurular} nerede yaşar?", "{Budizm} nedir?",
            "Bir yumurtada kaç {kalori} var?", "{Elektron} ile proton arasındaki fark nedir?",
            "{Sabit disk} nedir?", "{Isı pompası} nasıl çalışır?", "{Kök hücre} nedir?", "{Orta sınıf} ne demektir?",
            "{Kan grubu} nedir?", "{Ses dalgası} ne kadar hızlıdır?", "{Cep telefonu} nasıl şarj edilir?",
            "{Çamaşır makinesi} nasıl çalışır?", "{Güç kaynağı} ne işe yarar?", "{Ateş duvarı} bilgisayarda ne yapar?",
            "{Zaman makinesi} yapılabilir mi?", "{Karanlık madde} nedir?", "{Banka hesabı} nasıl açılır?",
            "{Sera etkisi} nedir?", "{Kara kutu} uçakta nerede durur?", "{Yeşil kart} nasıl alınır?",
            "{Dünya kupası} kaç yılda bir yapılır?", "{Sürücü belgesi} nasıl alınır?", "{Gelir vergisi} nasıl ödenir?",
            "{Deniz altı} nasıl dalar?",
        ),
    }
)  # fmt: skip
_TOPIC: Final = re.compile(r"\{([^}]*)\}")


def absent_questions(language: str, is_said: Callable[[str], bool]) -> list[str]:
    """Return the questions in the language of the texts whose topic these do not have; none in most languages.

    Args:
        language: ISO 639-1 code.
        is_said: whether the texts have some words in a row.
    """
    return [
        _TOPIC.sub(r"\1", question)
        for question in _QUESTIONS.get(language, ())
        if not any(is_said(topic) for topic in _TOPIC.findall(question))
    ]
