"""Examples on disk, the rows they share, and their microbatches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimaran.models.batch import Microbatch
from trimaran.runtime.data.files import DataError
from trimaran.runtime.finetune.data.examples import Document, Example
from trimaran.runtime.finetune.data.loader import ExampleBatch, ExampleLoader
from trimaran.runtime.finetune.data.packing import one_a_row, pack
from trimaran.runtime.finetune.data.records import Origin
from trimaran.runtime.finetune.data.store import ExampleSet, write_split

SEQ, PADDING = 16, 7


def example(number: int, *lengths: int) -> Example:
    """Documents of `lengths` tokens: all numbers of a document are 100 * its number in the example + the example's."""
    documents = tuple(
        Document.of(
            [1000 * number + 100 * each + index for index in range(length)], [index % 3 for index in range(length)]
        )
        for each, length in enumerate(lengths)
    )
    return Example(documents, Origin("a.jsonl", number + 1), value=number / 4, fields=f'{{"answer": "ä{number}"}}')


def stored(folder: Path, examples: Sequence[Example]) -> ExampleSet:
    record = write_split(folder, "train", "uint16", examples, {"a.jsonl": 0})
    return ExampleSet(folder, "train", record, "uint16", ["a.jsonl"])


def same(one: Example, other: Example) -> bool:
    return (one.origin, one.value, one.fields) == (other.origin, other.value, other.fields) and all(
        np.array_equal(a.tokens, b.tokens) and np.array_equal(a.learned, b.learned)
        for a, b in zip(one.documents, other.documents, strict=True)
    )


def test_examples_come_back_from_disk(tmp_path: Path) -> None:
    examples = [example(0, 5), example(1, 4, 6), example(2, 1), example(3, 7, 2)]
    found = stored(tmp_path, examples)
    assert all(map(same, found, examples))
    assert found.example_lengths.tolist() == [5, 10, 1, 9]
    assert found.num_learned.tolist() == [sum(d.num_learned for d in each.documents) for each in examples]
    assert [list(found.documents_of(number)) for number in range(4)] == [[0], [1, 2], [3], [4, 5]]
    found.verify()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    found = stored(tmp_path, [example(0, 5)])
    path = tmp_path / "train-learned.bin"
    path.write_bytes(b"\1" * 5)
    with pytest.raises(DataError, match=r"train-learned\.bin differs from its manifest"):
        found.verify()
    path.write_bytes(b"\1" * 4)
    with pytest.raises(DataError, match=r"train-learned\.bin has 4 bytes where its manifest says 5"):
        ExampleSet(tmp_path, "train", found.record, "uint16", ["a.jsonl"])


@given(st.lists(st.integers(1, 20), max_size=60))
def test_rows_hold_every_example_once_and_few_rows_are_needed(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in row) for row in rows]
    assert max(sizes, default=0) <= 20
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 20) + 4 + sum(length > 10 for length in lengths)
    assert rows == sorted(rows)


def test_the_fullest_row_with_room_is_taken() -> None:
    assert pack([6, 3, 5, 4, 2], 10) == [(0, 3), (1, 2, 4)]
    assert pack([10, 1, 9], 10) == [(0,), (1, 2)]
    assert one_a_row(2) == [(0,), (1,)]
    with pytest.raises(ValueError, match="example 1 has 11 tokens, a row only 10"):
        pack([3, 11], 10)


def loader_of(
    examples: ExampleSet, packed: bool, micro: int = 1, dp: tuple[int, int] = (0, 1), **more: Any
) -> ExampleLoader:
    rows = pack(examples.example_lengths, SEQ) if packed else one_a_row(examples.num_examples)
    sizes = {"seq_len": SEQ, "global_batch_size": 4, "micro_batch_size": micro, "dp_rank": dp[0], "dp_size": dp[1]}
    return ExampleLoader(examples, rows, seed=3, padding_id=PADDING, **{**sizes, **more})


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> ExampleSet:
    lengths = [(5,), (4, 6), (2,), (7, 2), (16,), (3,), (8, 8), (9,), (4,), (1, 3)]
    return stored(tmp_path_factory.mktemp("examples"), [example(n, *each) for n, each in enumerate(lengths)])


def documents_in(batch: Microbatch) -> list[tuple[list[int], list[int], list[int], int, float]]:
    """Tokens, labels and positions of each document, its number, and the value of its example."""
    assert isinstance(batch, ExampleBatch)
    flat = [each.flatten() for each in (batch.tokens, batch.labels, batch.positions) if each is not None]
    return [
        (*(each[start:end].tolist() for each in flat), number)
        for (start, end), number in zip(batch.spans.tolist(), batch.document_numbers.tolist(), strict=True)
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_has_every_document_once(examples: ExampleSet, packed: bool) -> None:
    loader = loader_of(examples, packed, global_batch_size=1)
    assert loader.num_samples == (5 if packed else examples.num_examples)
    seen = []
    for sample in range(loader.num_samples):
        (batch,) = loader.microbatches(sample)
        for tokens, labels, positions, number in documents_in(batch):
            document = examples.document(number)
            assert tokens == document.tokens.tolist()
            assert positions == list(range(len(tokens)))
            learned = zip(document.tokens[1:].tolist(), document.learned[1:].tolist(), strict=True)
            assert labels == [token if is_learned else -100 for token, is_learned in learned] + [-100]
            seen.append(number)
    assert sorted(seen) == list(range(examples.num_documents))


def test_what_no_document_covers_is_padding_apart(examples: ExampleSet) -> None:
    (batch,) = loader_of(examples, True, micro=4).microbatches(0)
    assert isinstance(batch, ExampleBatch)
    assert batch.documents is not None
    covered = torch.zeros(4 * SEQ, dtype=torch.bool)
    for start, end in batch.spans.tolist():
        covered[start:end] = True
    assert batch.tokens.flatten()[~covered].unique().tolist() == [PADDING]
    assert batch.labels.flatten()[~covered].unique().tolist() == [-100]
    starts = batch.documents.starts.tolist()
    assert {*batch.spans[:, 0].tolist(), *range(0, 4 * SEQ, SEQ)} <= {*starts}
    assert starts[-1] == 4 * SEQ
    assert batch.documents.longest == np.diff(starts).max()


def test_rows_of_a_global_batch_are_as_long_as_its_longest_needs_on_every_rank(examples: ExampleSet) -> None:
    longest = [int(examples.example_lengths[start : start + 2].max()) for start in range(0, 10, 2)]
    assert longest == [10, 9, 16, 16, 4]
    for rank in range(2):
        loader = loader_of(examples, False, 1, (rank, 2), global_batch_size=2, shuffle=False, row_multiple=4)
        lengths = [loader.microbatches(start)[0].tokens.shape[1] for start in range(0, 10, 2)]
        assert lengths == [12, 12, 16, 16, 4]
    whole = loader_of(examples, False, 1, global_batch_size=1, shuffle=False, row_multiple=32)
    assert whole.microbatches(2)[0].tokens.shape == (1, SEQ), "never longer than seq_len"
    over = loader_of(examples, False, 2, global_batch_size=2, shuffle=False, repeats=False, row_multiple=4)
    assert over.microbatches(10)[0].tokens.shape == (2, 4), "rows without examples are padding"


@pytest.mark.parametrize("packed", [True, False])
def test_no_layout_changes_the_global_batch_or_its_number_of_losses(examples: ExampleSet, packed: bool) -> None:
    for consumed in (0, 4, 8):  # the second or third crosses an epoch
        (whole,) = loader_of(examples, packed, micro=4).microbatches(consumed)
        assert isinstance(whole, ExampleBatch)
        for micro, dp in ((1, 1), (2, 2), (1, 4)):
            loaders = [loader_of(examples, packed, micro, (rank, dp)) for rank in range(dp)]
            batches = [batch for loader in loaders for batch in loader.microbatches(consumed)]
            assert [batch.first_sample for batch in batches] == list(range(consumed, consumed + 4, micro))
            found = torch.cat([batch.labels for batch in batches])
            assert torch.equal(found, whole.labels)
            assert [each for batch in batches for each in documents_in(batch)] == documents_in(whole)
            values = [value for batch in batches for value in batch.values.tolist()]  # type: ignore[attr-defined]
            assert values == whole.values.tolist()
            for loader in loaders:
                assert loader.num_losses(consumed) == int((whole.labels != -100).sum())
                assert loader.num_losses(consumed, "examples") == len(whole.values)
                assert loader.num_tokens(consumed) == int((whole.spans[:, 1] - whole.spans[:, 0]).sum())
            assert whole.tokens_per_loss == loaders[0].num_losses(consumed) / len(whole.values)


def test_held_out_rows_are_not_repeated(examples: ExampleSet) -> None:
    loader = loader_of(examples, True, shuffle=False, repeats=False)
    total = sum(loader.num_losses(consumed) for consumed in (0, 4))
    assert total == int(examples.num_learned.sum())
    last = loader.microbatches(4)
    assert [len(batch.labels.unique()) > 1 for batch in last] == [True, False, False, False]
    assert loader.num_losses(4) == sum(int((batch.labels != -100).sum()) for batch in last)


def test_long_examples_are_dropped_or_cut() -> None:
    long = Example((Document.of(range(10), [0, 0, 0, 1, 1, 0, 0, 0, 0, 1]),), Origin("a", 1))
    assert long.fitted(9, "drop") is None
    right, left = long.fitted(5, "right"), long.fitted(5, "left")
    assert right is not None
    assert left is not None
    assert right.documents[0].tokens.tolist() == [0, 1, 2, 3, 4]
    assert left.documents[0].tokens.tolist() == [5, 6, 7, 8, 9]
    assert left.documents[0].learned.tolist() == [False] * 4 + [True]
    assert long.fitted(3, "right") is None  # nothing would be learned
    assert long.fitted(10, "drop") is long


def test_of_a_pair_the_longer_answer_is_cut() -> None:
    pair = Example((Document.of(range(12), [1] * 12), Document.of(range(4), [1] * 4)), Origin("a", 1), value=0.5)
    cut = pair.fitted(10, "right")
    assert cut is not None
    assert [len(document.tokens) for document in cut.documents] == [6, 4]
    assert cut.value == 0.5
