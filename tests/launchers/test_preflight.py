"""What a preflight makes of the facts of nodes, which ranks reach a barrier, and how often nodes are replaced."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trimaran.launchers.env.rank_env import RankEnv
from trimaran.launchers.rendezvous.network import AddressError
from trimaran.launchers.rendezvous.store import Rendezvous, join_rendezvous
from trimaran.launchers.slurm.node_report import NodeFacts, NodeReport, refused_nodes
from trimaran.runtime.spec import LauncherSection

SOUND: dict[str, Any] = {"versions": {"torch": "2"}, "gflops": 100.0, "free_gib": 50.0, "clock_s": 0.0}
SECTION = LauncherSection(start_timeout_s=20.0)


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
    def attend(rank: int) -> list[int]:
        return come(rank, tmp_path).barrier(1.0)

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
