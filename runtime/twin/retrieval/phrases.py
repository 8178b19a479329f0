"""What the twin is told and says in its own name, in the language of the question."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from trimaran.runtime.twin.languages import detect

_SURE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Phrases:
    """Sentences of one language.

    Args:
        instruction: to answer from the numbered passages alone and to cite them.
        passages, question: the headings in a prompt.
        silent: the answer where the texts have nothing on a question.
        not_verbatim: stands behind a quote that is in no passage.
    """

    instruction: str
    passages: str
    question: str
    silent: str
    not_verbatim: str


_PHRASES: Final = MappingProxyType(
    {
        "en": Phrases(
            "Answer from the numbered passages below and from nothing else. Behind each sentence put the number of the"
            " passage that it rests on, as [1]. Quote only what stands there word for word. If the passages do not"
            " answer the question, say that the texts are silent on it.",
            "Passages:", "Question:", "The texts are silent on this: I found nothing in them that speaks of it.",
            "(not in these words in the passages)",
        ),
        "tr": Phrases(
            "Yalnızca aşağıdaki numaralı pasajlara dayanarak cevap ver. Her cümlenin arkasına dayandığı pasajın"
            " numarasını [1] biçiminde yaz. Yalnızca orada kelimesi kelimesine duranı alıntıla. Pasajlar soruyu"
            " cevaplamıyorsa metinlerin bu konuda sustuğunu söyle.",
            "Pasajlar:", "Soru:", "Metinler bu konuda susuyor: içlerinde bundan söz eden bir yer bulamadım.",
            "(pasajlarda bu sözlerle geçmiyor)",
        ),
        "de": Phrases(
            "Antworte allein aus den nummerierten Stellen unten. Setze hinter jeden Satz die Nummer der Stelle, auf der"
            " er beruht, als [1]. Zitiere nur, was dort wörtlich steht. Beantworten die Stellen die Frage nicht, so"
            " sage, dass die Texte dazu schweigen.",
            "Stellen:", "Frage:", "Die Texte schweigen dazu: Ich habe darin nichts gefunden, was davon spricht.",
            "(so nicht in den Stellen)",
        ),
        "fr": Phrases(
            "Réponds uniquement d'après les passages numérotés ci-dessous. Après chaque phrase, mets le numéro du"
            " passage sur lequel elle repose, ainsi : [1]. Ne cite que ce qui s'y trouve mot pour mot. Si les passages"
            " ne répondent pas à la question, dis que les textes n'en parlent pas.",
            "Passages :", "Question :", "Les textes se taisent là-dessus : je n'y ai rien trouvé qui en parle.",
            "(pas en ces termes dans les passages)",
        ),
        "es": Phrases(
            "Responde solo a partir de los pasajes numerados de abajo. Detrás de cada frase pon el número del pasaje en"
            " que se apoya, así: [1]. Cita solo lo que está allí palabra por palabra. Si los pasajes no responden a la"
            " pregunta, di que los textos callan sobre ello.",
            "Pasajes:", "Pregunta:", "Los textos callan sobre esto: no encontré en ellos nada que hable de ello.",
            "(no con estas palabras en los pasajes)",
        ),
        "it": Phrases(
            "Rispondi soltanto in base ai passi numerati qui sotto. Dopo ogni frase metti il numero del passo su cui si"
            " fonda, così: [1]. Cita solo ciò che vi si trova parola per parola. Se i passi non rispondono alla"
            " domanda, di' che i testi tacciono.",
            "Passi:", "Domanda:", "I testi tacciono su questo: non vi ho trovato nulla che ne parli.",
            "(non con queste parole nei passi)",
        ),
        "pt": Phrases(
            "Responde apenas a partir das passagens numeradas abaixo. Depois de cada frase põe o número da passagem em"
            " que ela se apoia, assim: [1]. Cita apenas o que lá está palavra por palavra. Se as passagens não"
            " responderem à pergunta, diz que os textos se calam sobre isso.",
            "Passagens:", "Pergunta:", "Os textos calam-se sobre isto: não encontrei neles nada que fale disso.",
            "(não com estas palavras nas passagens)",
        ),
        "nl": Phrases(
            "Antwoord alleen uit de genummerde passages hieronder. Zet achter elke zin het nummer van de passage waarop"
            " hij berust, als [1]. Citeer alleen wat daar woordelijk staat. Geven de passages geen antwoord op de"
            " vraag, zeg dan dat de teksten erover zwijgen.",
            "Passages:", "Vraag:", "De teksten zwijgen hierover: ik heb er niets in gevonden dat ervan spreekt.",
            "(niet met deze woorden in de passages)",
        ),
        "ru": Phrases(
            "Отвечай только по пронумерованным отрывкам ниже. После каждого предложения ставь номер отрывка, на который"
            " оно опирается, в виде [1]. Цитируй только то, что стоит там дословно. Если отрывки не отвечают на вопрос,"
            " скажи, что тексты об этом молчат.",
            "Отрывки:", "Вопрос:", "Тексты об этом молчат: я не нашёл в них ничего, что говорило бы об этом.",
            "(не этими словами в отрывках)",
        ),
    }
)  # fmt: skip


def language_of_question(question: str, texts: str) -> str:
    """Return the language to answer in: the question's where it can be told and is known here, else that of the texts.

    Args:
        texts: ISO 639-1 code of the texts' language.
    """
    language, score = detect(question)
    return language if score >= _SURE and language in _PHRASES else texts


def phrases_of(language: str) -> Phrases:
    """Return the sentences of a language, those of English for one that is not known here."""
    return _PHRASES.get(language, _PHRASES["en"])


def silent_answer(question: str, texts: str) -> str:
    """Return the sentence that the texts are silent, in the language of the question.

    Args:
        texts: ISO 639-1 code of the texts' language.
    """
    return phrases_of(language_of_question(question, texts)).silent
