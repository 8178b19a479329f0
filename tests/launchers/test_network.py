"""Which address other nodes are told, and what is said about one that does not do."""

import errno
import ipaddress
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.launchers.ports import free_ports
from tests.launchers.runs import make_workplace, trimaran
from trimaran.launchers.data.workers import WorkerOptions, local_workers
from trimaran.launchers.env import network as addresses
from trimaran.launchers.env.network import (
    AddressError,
    check_loopback,
    check_network,
    interface_address,
    interface_of,
    interfaces,
    reachable_address,
    wait_until_open,
)
from trimaran.launchers.local.launch import LocalRun, launch
from trimaran.launchers.local.node_agent import RUN, refuse_taken, store_at
from trimaran.launchers.rendezvous.store import connect_store, serve_store
from trimaran.runtime.spec import load_spec

NODE = {"SLURMD_NODENAME": "n7"}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A node as Debian sets it up: its own name is 127.0.1.1, Slurm's name for it unknown, one network but loopback."""
    names = {"gpu-box": ["127.0.1.1"]}
    known = {"lo": ipaddress.IPv4Interface("127.0.0.1/8"), "ib0": ipaddress.IPv4Interface("10.9.8.7/16")}
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-box")
    monkeypatch.setattr(addresses, "resolve_name", lambda name: names.get(name, []))
    monkeypatch.setattr(addresses, "interfaces", lambda: known)
    monkeypatch.setattr(addresses, "_default_route", lambda: None)
    return monkeypatch


def test_a_run_on_one_node_stays_on_loopback(host: pytest.MonkeyPatch) -> None:
    assert reachable_address(NODE, interface=None, one_node=True) == "127.0.0.1"


def test_slurms_own_address_stands_in_for_names_that_mean_nothing_or_loopback(host: pytest.MonkeyPatch) -> None:
    assert (
        reachable_address(NODE, interface=None, one_node=False, slurm_address_of={"n7": "10.9.8.7"}.get) == "10.9.8.7"
    )


def test_a_name_that_resolves_is_taken(host: pytest.MonkeyPatch) -> None:
    host.setattr(addresses, "resolve_name", lambda name: ["10.9.8.7"] if name == "n7" else [])
    assert reachable_address(NODE, interface=None, one_node=False, slurm_address_of=lambda node: None) == "10.9.8.7"


def test_the_default_route_is_the_last_resort(host: pytest.MonkeyPatch) -> None:
    host.setattr(addresses, "_default_route", lambda: "10.9.8.7")
    assert reachable_address({}, interface=None, one_node=False) == "10.9.8.7"


def test_no_address_for_the_others_is_told_with_the_interfaces(host: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        AddressError,
        match=r"n7, gpu-box resolve to 127\.0\.1\.1, and there is no default route; "
        r"set launcher.interface to one of lo, ib0",
    ):
        reachable_address(NODE, interface=None, one_node=False, slurm_address_of=lambda node: None)


def test_the_interface_of_the_spec_is_taken_or_refused_with_those_there_are(host: pytest.MonkeyPatch) -> None:
    assert reachable_address(NODE, interface="ib0", one_node=False) == "10.9.8.7"
    assert interface_of("10.9.8.7") == "ib0"
    assert interface_of("127.0.0.5") == "lo"
    with pytest.raises(
        AddressError, match=r"launcher.interface ib1 is none of this node's interfaces with an IPv4 address: lo, ib0"
    ):
        interface_address("ib1")


def test_interfaces_have_their_first_ipv4_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(family: int, text: str, netmask: str | None) -> SimpleNamespace:
        return SimpleNamespace(family=family, address=text, netmask=netmask)

    there = {
        "lo": [address(socket.AF_INET, "127.0.0.1", "255.0.0.0"), address(socket.AF_INET6, "::1", None)],
        "ib0": [
            address(socket.AF_INET, "10.9.8.7", "255.255.0.0"),
            address(socket.AF_INET, "10.9.9.9", "255.255.255.0"),
            address(socket.AF_PACKET, "00:00:00:00:00:01", None),
        ],
        "only6": [address(socket.AF_INET6, "fe80::1%only6", "ffff:ffff:ffff:ffff::")],
        "tun0": [address(socket.AF_INET, "172.16.0.2", None)],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: there)
    found = {name: str(each) for name, each in interfaces().items()}
    assert found == {"lo": "127.0.0.1/8", "ib0": "10.9.8.7/16", "tun0": "172.16.0.2/32"}
    assert interface_of("127.4.4.4") == "lo"


def test_a_machine_that_does_not_reach_itself_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = r"^this machine does not reach itself at 127\.0\.0\.1 \(Network is unreachable\).*bring its loopback"
    check_loopback()
    make_workplace(tmp_path)
    spec, before = load_spec(tmp_path / "spec.yaml", []), sorted(tmp_path.iterdir())
    options = WorkerOptions(1, 1.0, None)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    monkeypatch.setattr(socket, "create_connection", unreachable)
    for start in (
        lambda: check_network(spec.launcher.interface),
        lambda: local_workers(options),
        lambda: launch(LocalRun(spec, tmp_path / "task.json", tmp_path / "logs")),
    ):
        with pytest.raises(AddressError, match=words):
            start()
    assert sorted(tmp_path.iterdir()) == before


def test_an_interface_that_is_not_there_is_told_before_the_data_is_prepared(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, data={"clean": {}})
    for command in ("prepare", "train"):
        refused = trimaran(tmp_path, command, "spec.yaml", "--set", "launcher.interface=no0")
        assert refused.code == 2
        assert refused.last_line.startswith("error: launcher.interface no0 is none of this node's interfaces with an")
    assert not (tmp_path / "cache").exists()
    assert not workplace.run.exists()


def test_a_name_that_does_not_resolve_is_told_in_time() -> None:
    """Within the second that the message tells, where nothing keeps this process: pytest's time-out bounds it here."""
    with pytest.raises(
        AddressError,
        match=r"the store at no-such-host.invalid:29400 did not answer within 1 s "
        r"\(the name no-such-host.invalid does not",
    ):
        wait_until_open("no-such-host.invalid", 29400, 1.0, "the store")


def test_a_port_where_nothing_listens_is_told_with_its_address() -> None:
    with pytest.raises(
        AddressError,
        match=r"the store at localhost:1 did not answer within 1 s \(127.0.0.1 port 1: Connection refused\)",
    ):
        wait_until_open("localhost", 1, 1.0, "the store")


def test_a_store_listens_at_one_address_and_not_on_a_port_that_is_taken() -> None:
    store = serve_store("127.0.0.1", 0)
    mine = [
        each.laddr for each in psutil.Process(os.getpid()).net_connections("inet") if each.status == psutil.CONN_LISTEN
    ]
    assert [address.ip for address in mine if address.port == store.port] == ["127.0.0.1"]
    store.set("word", "kept")
    assert connect_store("127.0.0.1", store.port, 100.0, "the store").get("word") == b"kept"
    with pytest.raises(
        AddressError,
        match=f"this node can't listen at 127.0.0.1:{store.port}: Address already in use; see launcher.interface",
    ):
        serve_store("127.0.0.1", store.port)


def test_a_port_of_another_program_is_told_in_time() -> None:
    """One that accepts and never answers, and one that answers something else."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        words = rf"127.0.0.1:{port} \(launcher.rendezvous\) is taken by something that is no run of trimaran; choose"
        with pytest.raises(AddressError, match=words):
            connect_store("127.0.0.1", port, 1.0, "the store of the nodes (launcher.rendezvous)")
        with pytest.raises(AddressError, match=words):  # of this node, by the failed bind
            store_at("127.0.0.1", port, 1.0)
        with pytest.raises(AddressError, match=words):  # before torch is imported
            refuse_taken("127.0.0.1", port, 1.0)
    refuse_taken("127.0.0.1", port, 1.0)  # nothing listens there
    refuse_taken("127.0.0.1", serve_store("127.0.0.1", 0).port, 1.0)


def test_a_store_of_another_program_is_told() -> None:
    store = serve_store("127.0.0.1", 0)
    with pytest.raises(AddressError, match=rf"127.0.0.1:{store.port} .* is the store of another program than trimaran"):
        store_at("127.0.0.1", store.port, 1.0)


def test_nodes_meet_at_one_store_and_share_a_name() -> None:
    port = free_ports(1)
    first = store_at("127.0.0.1", port, 100.0)
    second = store_at("127.0.0.1", port, 100.0)
    assert second.get(RUN) == first.get(RUN) != b""
