"""Token shards: written in pieces, read as one sequence, and never trusted when they changed."""

import json
import os
from pathlib import Path

import pytest

from trimaran.launchers.rendezvous.fingerprint import InconsistentRanksError, check_same_everywhere, facts_of_rank
from trimaran.runtime.data.files import DataError, new_folder
from trimaran.runtime.data.tokens.shards import ShardWriter, TokenShards, dtype_for, verify_shards
from trimaran.runtime.spec import load_spec


def write(folder: Path, tokens: list[int], dtype: str = "uint16", tokens_per_shard: int = 4) -> TokenShards:
    with ShardWriter(folder, "train", dtype, tokens_per_shard) as writer:
        for start in range(0, len(tokens), 3):
            writer.write(tokens[start : start + 3])
        return TokenShards(folder, "train", dtype, writer.close())


@pytest.mark.parametrize("count", [1, 4, 5, 11, 12])
def test_every_window_reads_the_same_tokens_across_file_borders(tmp_path: Path, count: int) -> None:
    tokens = list(range(100, 100 + count))
    shards = write(tmp_path, tokens)
    assert shards.num_tokens == count
    assert [info.tokens for info in shards.shards] == [4] * (count // 4) + ([count % 4] if count % 4 else [])
    for start in range(count + 1):
        for stop in range(start, count + 1):
            assert shards.read(start, stop - start).tolist() == tokens[start:stop]
    with pytest.raises(IndexError):
        shards.read(0, count + 1)


def test_an_empty_split_has_no_files(tmp_path: Path) -> None:
    shards = write(tmp_path, [])
    assert (shards.num_tokens, shards.shards, list(tmp_path.iterdir())) == (0, (), [])


def test_the_dtype_is_the_narrowest_that_holds_the_vocabulary(tmp_path: Path) -> None:
    assert (dtype_for(65536), dtype_for(65537)) == ("uint16", "uint32")
    assert write(tmp_path, [70_000], "uint32").read(0, 1).tolist() == [70_000]
    with pytest.raises(OverflowError):
        write(tmp_path, [70_000], "uint16")


def test_files_are_little_endian_on_every_machine(tmp_path: Path) -> None:
    write(tmp_path, [258])
    assert (tmp_path / "train-00000.bin").read_bytes() == b"\x02\x01"


def test_a_shard_of_another_size_is_refused_on_opening(tmp_path: Path) -> None:
    shards = write(tmp_path, [1, 2, 3, 4, 5])
    (tmp_path / "train-00001.bin").write_bytes(b"123")
    with pytest.raises(DataError, match=r"train-00001\.bin has 3 bytes where its manifest says 2; delete the folder"):
        TokenShards(tmp_path, "train", "uint16", shards.shards)
    (tmp_path / "train-00001.bin").unlink()
    with pytest.raises(DataError, match=r"cannot read .*train-00001\.bin: No such file.*delete the folder"):
        TokenShards(tmp_path, "train", "uint16", shards.shards)


def test_a_changed_shard_or_a_token_beyond_the_vocabulary_is_found_and_what_is_known_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write(tmp_path, [1, 2, 3, 9, 5])
    files = sorted(tmp_path.glob("*.bin"))
    verify_shards(tmp_path, [shards], 10)
    assert not (tmp_path / "checked.json").exists(), "files of this second may change again unseen"
    for file in files:
        os.utime(file, (1, 1))
    with pytest.raises(
        DataError, match=r"train-00000\.bin has the token 9, and its tokenizer only 9; delete the folder"
    ):
        verify_shards(tmp_path, [shards], 9)
    with monkeypatch.context() as patch:
        patch.setattr("trimaran.runtime.data.tokens.shards._sha256_and_largest", None)
        verify_shards(tmp_path, [shards], 10)
        with pytest.raises(DataError, match="has the token 9"):
            verify_shards(tmp_path, [shards], 9)
    files[0].write_bytes(files[0].read_bytes()[:-2] + b"\x08\0")
    with pytest.raises(DataError, match=r"train-00000\.bin has sha256 .* delete the folder"):
        verify_shards(tmp_path, [shards], 10)


def test_ranks_that_map_other_shards_under_the_same_manifest_are_listed(tmp_path: Path) -> None:
    spec, facts = load_spec("examples/gpt2-cpu.yaml"), []
    for node, tokens in (("a", range(9000)), ("b", range(9000)), ("c", range(1, 9001)), ("d", range(9000))):
        folder = tmp_path / node
        folder.mkdir()
        shards = write(folder, list(tokens), tokens_per_shard=4096)
        content = {"splits": {"train": {"shards": [{"file": shard.file} for shard in shards.shards]}}}
        (folder / "manifest.json").write_text(json.dumps(content))
        if node == "d":
            (folder / "train-00001.bin").unlink()
        facts.append(facts_of_rank(spec, folder, f"node {node}"))
    check_same_everywhere(facts[:2])
    with pytest.raises(
        InconsistentRanksError,
        match=r"data: \w{12} on ranks 0-1 \(node a\), \w{12} on rank 2 \(node c\), unreadable \(No such file",
    ):
        check_same_everywhere(facts)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with new_folder(tmp_path / "target") as folder:
            (folder / "half").touch()
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_builders_of_a_folder_wins(tmp_path: Path) -> None:
    with new_folder(tmp_path / "target") as second:
        (second / "file").write_text("second")
        with new_folder(tmp_path / "target") as first:
            (first / "file").write_text("first")
    assert (tmp_path / "target" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match=r"cannot write under .*file: Not a directory; point data\.cache_dir"),
        new_folder(tmp_path / "file" / "x"),
    ):
        pass
