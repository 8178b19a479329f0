"""What a preflight makes of the facts of nodes, which ranks reach a barrier, and how often nodes are replaced."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.runtime.huggingface.test_export import make_run
from trimaran.launchers.env.network import AddressError
from trimaran.launchers.env.rank_env import RankEnv
from trimaran.launchers.problems import problems_here
from trimaran.launchers.rendezvous.address_file import AddressFile
from trimaran.launchers.rendezvous.store import Rendezvous, join_rendezvous
from trimaran.launchers.slurm import gpu_check
from trimaran.launchers.slurm.gpu_check import GpuFacts, check_nccl_here, look_at_gpus, matrix_gflops
from trimaran.launchers.slurm.node_report import NodeFacts, NodeReport, refused_nodes
from trimaran.runtime.spec import LauncherSection, parse_spec

SOUND: dict[str, Any] = {"versions": {"torch": "2"}, "gflops": 100.0, "free_gib": 50.0, "clock_s": 0.0}
SECTION = LauncherSection(start_timeout_s=200.0)


def facts(**different: dict[str, Any]) -> list[NodeFacts]:
    """Three sound nodes, but for what is given."""
    return [NodeFacts(node, **(SOUND | different.get(node, {}))) for node in ("n1", "n2", "n3")]


def test_sound_nodes_are_used() -> None:
    assert refused_nodes(facts(), 1.0) == {}


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"gflops": 40.0}, "a matrix product at 40 GFLOP/s, where nodes usually make 100"),
        ({"free_gib": 0.4}, "0.4 GiB free in the run folder, slurm.preflight_min_free_gib is 1"),
        ({"clock_s": -9.0}, "its clock is -9 s off that of n1"),
        ({"versions": {"torch": "1"}}, "torch 1 where others have 2"),
        ({"versions": {}}, "torch missing where others have 2"),
        ({"problem": "ImportError: libcuda.so"}, "ImportError: libcuda.so"),
        ({"gpu_faults": "torch sees 7 of 8 GPUs"}, "torch sees 7 of 8 GPUs"),
        ({"gflops": 40.0, "of_gpus": [101.0, 40.0, 99.0]}, "a matrix product at 40 GFLOP/s on GPU 1, where nodes"),
    ],
)
def test_an_odd_node_is_refused_with_the_reason(odd: dict[str, Any], words: str) -> None:
    refused = refused_nodes(facts(n2=odd), 1.0)
    assert list(refused) == ["n2"]
    assert words in refused["n2"]


def test_of_two_nodes_only_a_clear_difference_counts() -> None:
    def pair(gflops: float) -> list[NodeFacts]:
        return facts(n2={"gflops": gflops})[:2]

    assert refused_nodes(pair(40.0), 1.0) == {}
    assert list(refused_nodes(pair(10.0), 1.0)) == ["n2"]


def test_attempts_count_until_the_run_gets_on(tmp_path: Path) -> None:
    first = NodeReport().after({"n1": "slow"}, 0)
    second = first.after({"n2": "lost"}, 0)
    assert (second.attempts, second.excluded) == (2, ["n1", "n2"])
    third = second.after({"n3": "lost"}, 40)
    assert (third.attempts, third.excluded) == (1, ["n1", "n2", "n3"])
    third.write(tmp_path)
    assert NodeReport.read(tmp_path) == third
    NodeReport.forget(tmp_path)
    assert NodeReport.read(tmp_path) == NodeReport()


def rank_env(rank: int) -> RankEnv:
    return RankEnv("slurm", rank, 3, rank, 3, f"n{rank + 1}", "7-1-0")


def come(rank: int, folder: Path) -> Rendezvous:
    return join_rendezvous(rank_env(rank), {}, SECTION, folder)


def test_those_who_do_not_come_are_named(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def attend(rank: int) -> list[int]:
        rendezvous = come(rank, tmp_path)
        both.wait()  # rank 0 counts from here on
        return rendezvous.barrier(3.0)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(attend, (0, 2))) == [[1], [1]]


def test_an_address_file_that_a_killed_start_left_is_not_believed(tmp_path: Path) -> None:
    """The port that it names is closed, then another program's, which answers in its own way; rank 0 comes later."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stale = {"address": "127.0.0.1", "port": stranger.getsockname()[1], "node": "n1", "nonce": "old"}
        address_file = tmp_path / ".meet-7-1-0.json"
        address_file.write_text(json.dumps(stale))

        def answer() -> None:
            while True:
                try:
                    connection, _ = stranger.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()

        def attend(rank: int) -> list[str]:
            if rank == 0:
                time.sleep(1.0)
            rendezvous = come(rank, tmp_path)
            texts = rendezvous.all_gather(f"rank {rank}")
            rendezvous.remove_address_file()
            rendezvous.close()
            return texts

        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(attend, range(3))) == [["rank 0", "rank 1", "rank 2"]] * 3
    assert not address_file.exists()


def test_rank_0_that_never_comes_is_told_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(
        AddressError,
        match=r"rank 1 on node n2 has not met rank 0 within 1 s: rank 0 has not left its address in .*meet-7-1-0",
    ):
        join_rendezvous(rank_env(1), {}, LauncherSection(start_timeout_s=1.0), tmp_path)


# --- GPUs, without any

SMI = """#!/bin/sh
echo "GPU-aa-0, 0, No"
echo "GPU-aa-1, 3, Yes"
echo "GPU-aa-2, [N/A], [N/A]"
"""


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Three GPUs: a sound one, one with errors, and one whose memory is in use."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="H100", uuid=f"aa-{index}")
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**36 if index < 2 else 2**34, 2**36))
    monkeypatch.setattr(gpu_check, "matrix_gflops", lambda device: 50_000.0 + device.index)
    return monkeypatch


def test_every_gpu_of_a_node_is_looked_at(gpus: pytest.MonkeyPatch) -> None:
    facts = look_at_gpus()
    assert facts[0] == GpuFacts(0, "H100", 50_000.0, 64.0, 64.0, 0, False)
    assert facts[0].faults() == []
    assert [(each.gflops, each.ecc_errors) for each in facts[1:]] == [(50_001.0, 3), (50_002.0, None)]
    assert facts[1].faults() == [
        "GPU 1 (H100): 3 uncorrected memory errors (ECC)",
        "GPU 1 (H100): memory waits for a reset to be taken out of use (retired_pages.pending)",
    ]
    assert facts[2].faults() == ["GPU 2 (H100): 16.0 of 64.0 GiB are free: another process uses it"]


def test_a_gpu_that_can_not_compute_is_named(gpus: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> float:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nlong advice")

    gpus.setattr(gpu_check, "matrix_gflops", fail)
    gpus.setenv("PATH", "/nowhere")
    assert look_at_gpus()[1].faults() == ["GPU 1 (H100): RuntimeError: CUDA error: uncorrectable ECC error encountered"]


def test_a_product_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matrix_gflops(torch.device("cpu")) > 0
    real = torch.Tensor.__matmul__

    def flip(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = real(left, right)
        if left.dtype == torch.float32:
            product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", flip)
    with pytest.raises(ArithmeticError, match="a matrix product is wrong in 1 of 1024 rows"):
        matrix_gflops(torch.device("cpu"))


@pytest.mark.parametrize(("sums", "words"), [([3.0, 3.0, 3.0], ""), ([3.0, 0.0, 3.0], "the sum is wrong on GPU 1")])
def test_nccl_between_the_gpus_of_a_node_is_checked(gpus: pytest.MonkeyPatch, sums: list[float], words: str) -> None:
    full = torch.full
    gpus.setattr(torch, "full", lambda shape, value, device: full(shape, value))

    def all_reduce(buffers: list[torch.Tensor]) -> None:
        for buffer, total in zip(buffers, sums, strict=True):
            buffer.fill_(total)

    gpus.setattr(torch.cuda.nccl, "all_reduce", all_reduce)
    assert words in check_nccl_here() if words else check_nccl_here() == ""


# --- meeting by a file on a network file system


def test_what_can_not_be_read_right_now_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file, half of one, one that the server has replaced (ESTALE), then rank 0's."""
    address_file = AddressFile(tmp_path, "7-1-0")
    assert address_file.read() == {}
    for text in ("", '{"address": "127.0', "[]", "7"):
        address_file.path.write_text(text)
        assert address_file.read() == {}
    real, stale = Path.read_text, iter(range(3))

    def read_text(path: Path, encoding: str) -> str:
        if next(stale, None) is not None:
            raise OSError(116, "Stale file handle")
        return real(path, encoding=encoding)

    monkeypatch.setattr(Path, "read_text", read_text)
    address_file.path.write_text('{"address": "a')
    with ThreadPoolExecutor(3) as pool:
        ranks = [pool.submit(come, rank, tmp_path) for rank in (1, 2)]
        time.sleep(0.2)
        ranks.append(pool.submit(come, 0, tmp_path))
        met = [each.result() for each in ranks]
    assert [each.rank_env.rank for each in met] == [1, 2, 0]


def test_rank_0_is_waited_for_while_it_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports torch for longer than the ranks wait without a sign."""
    monkeypatch.setattr("trimaran.launchers.rendezvous.address_file._SIGN_S", 0.1)
    section, announced = LauncherSection(start_timeout_s=3.0), AddressFile(tmp_path, "7-1-0")
    announced.announce()
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(join_rendezvous, rank_env(rank), {}, section, tmp_path) for rank in (1, 2)]
        time.sleep(3.5)
        assert not any(each.done() for each in others)
        first = join_rendezvous(rank_env(0), {}, SECTION, tmp_path, announced=announced)
        assert [each.result().rank_env.rank for each in others] == [1, 2]
    first.remove_address_file()
    assert not announced.path.exists()


def test_check_tells_first_that_the_folder_holds_another_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    spec = parse_spec(
        {
            "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2},
            "data": {"source": [str(tmp_path / "nothing.txt")], "cache_dir": str(tmp_path / "cache")},
            "optimizer": {"lr": 1e-3},
            "train": {
                "num_steps": 1,
                "global_batch_size": 1,
                "micro_batch_size": 1,
                "seq_len": 8,
                "output_dir": str(run),
            },
            "launcher": {"device": "cpu"},
        }
    )
    found = problems_here(spec, "local")
    assert "holds weights alone" in found[0]
    assert sum("holds weights alone" in each for each in found) == 1
    assert any("nothing.txt" in each for each in found[1:])
