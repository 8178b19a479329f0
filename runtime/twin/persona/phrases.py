"""What a twin is told and asked, beside the author's own words. Data only."""

from dataclasses import dataclass
from typing import Final

from trimaran.runtime.twin.persona.words import words_in


@dataclass(frozen=True)
class Phrases:
    """Sentences of one language; {author}, {character}, {word}, {chapter} and {text} are filled in.

    Args:
        system_author, system_character: the system message of a twin.
        about: asks for what the author says of a word.
        chapter: asks for how a chapter begins.
        go_on: precedes a text that shall be continued.
        stop_words: words that no question is about.
    """

    system_author: str
    system_character: str
    about: tuple[str, ...]
    chapter: str
    go_on: str
    stop_words: frozenset[str]

    def system(self, author: str, character: str | None) -> str:
        """Return the system message."""
        return (self.system_author if character is None else self.system_character).format(
            author=author, character=character
        )


ENGLISH: Final = Phrases(
    "You imitate the author {author}, in the author's own words.",
    "You imitate {character}, as written by {author}.",
    ('What do you say of "{word}"?', 'What comes to your mind at the word "{word}"?', 'Speak to me of "{word}".'),
    'How does "{chapter}" begin?',
    "Go on:\n\n{text}",
    frozenset(
        words_in(
            "about above after again against almost alone also although always among another anything away "
            "back because been before behind being below best better between both came cannot come comes "
            "could does doing done down each else ever every everything find first five found four from gave "
            "give given gives goes going gone good great have having hear heard here herself himself into "
            "itself just keep kept knew know known last least leave left less like little long look looked "
            "made make makes many mean might mine more most much must myself near never next nothing once "
            "only other others ourselves over perhaps quite rather said same says seem seemed seen shall "
            "should since some something soon still such take taken tell than that thee their them "
            "themselves then there therefore these they thine thing things think this those thou though "
            "thought three through thus till together told took toward towards under until unto upon used "
            "very want well went were what whatever when where whether which while whom whose will with "
            "within without wish work would year years your yours yourself hath doth dost hast didst wilt "
            "shalt thyself whilst indeed really sure quite enough every even"
        )
    ),
)
TURKISH: Final = Phrases(
    "{author} adlı yazarı onun kendi sözleriyle taklit ediyorsun.",
    "{author} tarafından yazılan {character} adlı kişiyi taklit ediyorsun.",
    ("“{word}” için ne dersin?", "“{word}” sözü sana neyi hatırlatır?", "Bana “{word}” üzerine bir şey söyle."),
    "“{chapter}” nasıl başlar?",
    "Devam et:\n\n{text}",
    frozenset(
        words_in(
            "acaba ama ancak artık aslında ayrıca bana bazen bazı belki ben beni benim beri bile bilir bir "
            "biraz birçok biri birkaç birşey biz bize bizi bizim böyle böylece bu buna bunda bundan bunlar "
            "bunları bunların bunu bunun burada bütün çok çünkü daha dahi değil diğer diye dolayı edecek "
            "eden ederek edilen ediyor eğer elbette etmek etti ettiği fakat gene gibi göre hala halde hangi "
            "hatta hem henüz hep hepsi her herhangi herkes hiç hiçbir için içinde ile ilgili ise işte kadar "
            "karşı kendi kendine kendini kendisi kez kim kimse mısın midir nasıl neden nedenle nerede niye "
            "niçin nihayet olan olarak oldu olduğu olduğunu olmak olması olmayan olmaz olsa olsun olup olur "
            "oluyor onlar onları onların onu onun orada oysa öyle pek rağmen sadece sanki sana sende seni "
            "senin siz sizin sonra şey şeyi şeyler şimdi şöyle şu şuna şunu tarafından tüm üzere üzerinde "
            "vardı var veya yani yapmak yaptı yerine yine yoksa yüzünden zaten zaman dedi diyor vardı yoktu "
            "idi imiş geldi gitti verdi aldı baktı"
        )
    ),
)


def phrases_of(language: str) -> Phrases:
    """Return the phrases of a language, English where it is not Turkish."""
    return TURKISH if language == "tr" else ENGLISH
