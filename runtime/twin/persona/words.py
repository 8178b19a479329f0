"""The words by which English and Turkish texts say who speaks. Data only."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

UPPER: Final = "A-ZÀ-ÖØ-ÞĞİŞŒ"
LOWER: Final = "a-zß-öø-ÿğışœ"
LETTER: Final = f"{UPPER}{LOWER}"


def words_in(text: str) -> tuple[str, ...]:
    """Return the words of a text."""
    return tuple(text.split())


MALE_TITLES: Final = frozenset(
    words_in("mr sir lord king prince duke earl count father brother uncle bey efendi ağa paşa amca abi dayı")
)
FEMALE_TITLES: Final = frozenset(
    words_in("mrs miss ms lady queen princess madam madame mother sister aunt hanım teyze abla hala nine")
)
TITLES: Final = (
    MALE_TITLES
    | FEMALE_TITLES
    | frozenset(words_in("dr doctor professor captain colonel major general st saint usta hoca the of"))
)
BEFORE_NAMES: Final = words_in(
    "Mr Mrs Ms Miss Sir Lord Lady King Queen Prince Princess Duke Earl Count Madam Madame Dr Doctor "
    "Professor Captain Colonel Major General Uncle Aunt Father Mother Brother Sister Saint St"
)
AFTER_NAMES: Final = words_in("Bey Hanım Efendi Ağa Paşa Usta Hoca Teyze Amca Abla Abi Dayı Hala Nine")


@dataclass(frozen=True)
class Speech:
    """How a language attributes what is said.

    Args:
        says, thinks: verbs in the forms of narration.
        pronouns: -> "m", "f", or "" for either.
        starters: capitalised words that begin sentences and are no names.
    """

    says: frozenset[str]
    thinks: frozenset[str]
    pronouns: MappingProxyType[str, str]
    starters: frozenset[str]


ENGLISH: Final = Speech(
    frozenset(
        words_in(
            "said says saith replied answered asked cried returned exclaimed added continued observed "
            "remarked whispered shouted murmured muttered repeated called resumed rejoined inquired enquired "
            "declared began responded interrupted sighed screamed demanded pleaded interposed retorted "
            "growled sobbed roared ejaculated protested suggested urged begged announced groaned gasped "
            "laughed snapped persisted pursued quoth grumbled yelled admitted agreed explained insisted "
            "warned commanded stammered faltered hissed panted concluded proceeded chimed assented snarled "
            "chuckled"
        )
    ),
    frozenset(["thought", "reflected", "mused"]),
    MappingProxyType({"he": "m", "she": "f"}),
    frozenset(
        words_in(
            "the a an and but then so yet for nor or if when while as at in on to of this that these those "
            "it its there here what who why how where which his her my your our their he she they we i you "
            "not no yes oh ah well now after before again once still never ever such all some one two every "
            "each with from by is was had has do did upon only even just both mr mrs miss sir lady lord dr "
            "god"
        )
    ),
)
TURKISH: Final = Speech(
    frozenset(
        words_in(
            "dedi der diyor sordu soruyor bağırdı haykırdı fısıldadı mırıldandı söylendi söyledi ekledi "
            "yanıtladı cevapladı seslendi inledi homurdandı atıldı karşılık_verdi cevap_verdi yanıt_verdi "
            "tekrarladı sürdürdü açıkladı itiraz_etti kekeledi gürledi buyurdu demişti diyordu sormuştu "
            "diyerek_güldü güldü yalvardı çıkıştı devam_etti söze_başladı emretti onayladı bağırıyordu "
            "soruverdi deyiverdi deyince"
        )
    ),
    frozenset(["düşündü", "içinden_geçirdi", "düşünüyordu", "aklından_geçirdi"]),
    MappingProxyType({"o": ""}),
    frozenset(
        words_in(
            "sonra ama fakat o bu şu ve bir hemen birden o_zaman ne niçin neden nasıl evet hayır yok var "
            "artık şimdi bunun onun bana sana ona biz siz onlar ben sen çünkü eğer belki demek işte haydi "
            "hadi peki pek çok daha en kim nereye nerede orada burada yine gene sonunda ardından akşam sabah "
            "gece derken ya aman ah oh adam kadın çocuk kız oğlan herkes kimse ikisi biri öteki beriki"
        )
    ),
)


def speech_of(language: str) -> Speech:
    """Return the words of a language, English where it is not Turkish."""
    return TURKISH if language == "tr" else ENGLISH
