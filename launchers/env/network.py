"""Network addresses: the one at which other nodes reach this one, its interface, and whether an address answers.

Imports no torch.
"""

import ipaddress
import re
import secrets
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping

_RETRY_S = 0.1
_ANSWER_S = 3.0
LOOPBACK = "127.0.0.1"
"""Where the processes of a run meet that has this machine alone."""
_HELLO = struct.pack("=BIB", 0, 0x3C85F7CE, 13)  # VALIDATE, its magic number, and PING, as torch's TCPStoreBackend.hpp


class AddressError(ValueError):
    """A name does not resolve, an interface has no address, or an address does not answer; the message names it."""


def interfaces() -> dict[str, ipaddress.IPv4Interface]:
    """Return interface name -> IPv4 address and network, the first of each interface of this host that has one."""
    import psutil  # 15 ms, which only runs of several nodes need

    return {
        name: ipaddress.IPv4Interface(f"{each.address}/{each.netmask or 32}")
        for name, addresses in psutil.net_if_addrs().items()
        for each in reversed(addresses)  # the first is written last
        if each.family == socket.AF_INET
    }


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has `address`, None where there is none.

    A loopback address belongs to the interface whose network contains it.
    """
    wanted = ipaddress.ip_address(address)
    known = interfaces()
    exact = [name for name, each in known.items() if each.ip == wanted]
    within = [name for name, each in known.items() if wanted.is_loopback and wanted in each.network]
    return next(iter(exact + within), None)


def interface_address(name: str) -> str:
    """Return the IPv4 address of an interface.

    Raises:
        AddressError: there is none of that name, or it has no address.
    """
    known = interfaces()
    if name not in known:
        raise AddressError(
            f"launcher.interface {name} is none of this node's interfaces with an IPv4 address: "
            f"{', '.join(known) or 'it has none'}"
        )
    return str(known[name].ip)


def check_network(interface: str | None) -> None:
    """Raise AddressError where processes of this machine do not reach each other, or it has no such interface."""
    if interface is not None:
        interface_address(interface)
    check_loopback()


def check_loopback() -> None:
    """Raise AddressError where processes of this machine do not reach each other."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_ANSWER_S).close()
    except OSError as error:
        raise AddressError(
            f"this machine does not reach itself at {LOOPBACK} ({error.strerror or error}), where the processes of a "
            "run meet; bring its loopback interface up, as by `ip link set lo up`"
        ) from error


def resolve_name(name: str) -> list[str]:
    """Return the IPv4 addresses of a host name, none where it does not resolve."""
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def slurm_address(node: str) -> str | None:
    """Return the address by which Slurm reaches a node (NodeAddr), None without Slurm.

    Slurm may know it even where the node's name does not resolve.
    """
    try:
        shown = subprocess.run(
            ["scontrol", "show", "node", node, "--oneliner"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    addresses = resolve_name(found[1]) if found else []
    return addresses[0] if addresses else None


def reachable_address(
    environment: Mapping[str, str],
    *,
    interface: str | None,
    one_node: bool,
    slurm_address_of: Callable[[str], str | None] = slurm_address,
) -> str:
    """Return the address at which the other ranks reach this process.

    Args:
        environment: for the node's name under Slurm.
        interface: the one to use, such as ib0; None finds one.
        one_node: whether all ranks are on this node; loopback is used then, so that nothing is open to the network.

    Raises:
        AddressError: the interface does not exist or has no address, or there are several nodes and only loopback
            addresses were found.
    """
    if interface is not None:
        return interface_address(interface)
    node = environment.get("SLURMD_NODENAME")
    if one_node:
        return LOOPBACK
    names = [each for each in (node, socket.gethostname()) if each]
    resolved = [address for name in names for address in resolve_name(name)]
    # Debian gives a host's own name to 127.0.1.1, which means another host on each node.
    outward = [
        address for address in resolved if not ipaddress.ip_address(address).is_loopback and interface_of(address)
    ]
    # Slurm's own address is right even if it is a loopback address: then all nodes are this host.
    candidates = [*outward[:1], slurm_address_of(node) if node else None, _default_route()]
    found = next((address for address in candidates if address is not None), None)
    if found is None:
        raise AddressError(
            f"no address of this node that others could reach: {', '.join(names)} resolve to "
            f"{', '.join(resolved) or 'nothing'}, and there is no default route; set "
            f"launcher.interface to one of {', '.join(interfaces())}"
        )
    return found


def _default_route() -> str | None:
    """This host's address on the interface of its default route; nothing is sent to learn it."""
    try:
        return address_towards("192.0.2.1")  # reserved for documentation (RFC 5737)
    except AddressError:
        return None


def own_address(interface: str | None, peer: str) -> str:
    """Return this host's address on `interface`, or without one the address from which it reaches `peer`.

    Raises:
        AddressError: the interface has no address, or there is no route to the peer.
    """
    return interface_address(interface) if interface else address_towards(peer)


def address_towards(address: str) -> str:
    """Return which of this host's addresses is used to reach `address`; nothing is sent.

    Raises:
        AddressError: there is no route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise AddressError(f"no route from this node to {address}: {error.strerror}") from error
        return str(probe.getsockname()[0])


def wait_until_open(host: str, port: int, timeout_s: float, what: str) -> str:
    """Wait until something listens at host:port; return the host's address.

    Args:
        timeout_s: the longest wait, in seconds.
        what: the name of what is expected there, for the message.

    Raises:
        AddressError: the name does not resolve, or nothing answered in time; the message has the address.
    """
    deadline = time.monotonic() + timeout_s
    problem = ""
    while True:
        addresses = resolve_name(host)
        if addresses:
            try:
                socket.create_connection(
                    (addresses[0], port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))
                ).close()
                return addresses[0]
            except OSError as error:
                problem = f"{addresses[0]} port {port}: {error.strerror or error}"
        else:
            problem = f"the name {host} does not resolve on {socket.gethostname()}"
        if time.monotonic() > deadline:
            raise AddressError(f"{what} at {host}:{port} did not answer within {timeout_s:.0f} s ({problem})")
        time.sleep(_RETRY_S)


def wait_for_store(host: str, address: str, port: int, deadline: float, what: str) -> None:
    """Wait until a store of torch answers at address:port, which is that of `host`.

    torch's own client would wait for an answer without a time limit.

    Args:
        deadline: in `time.monotonic`'s seconds; there is one try at least.
        what: the store's name in the message of the error.

    Raises:
        AddressError: what listens there is no store.
    """
    while not _is_store(address, port, max(_RETRY_S, min(_ANSWER_S, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            raise AddressError(
                f"{host}:{port} ({what.partition('(')[2].rstrip(')') or what}) is taken by something that is no run of "
                "trimaran; choose another port"
            )
        time.sleep(_RETRY_S)


def _is_store(address: str, port: int, timeout_s: float) -> bool:
    nonce, answer = secrets.token_bytes(4), b""
    try:
        with socket.create_connection((address, port), timeout=timeout_s) as connection:
            connection.sendall(_HELLO + nonce)
            while len(answer) < len(nonce) and (part := connection.recv(len(nonce) - len(answer))):
                answer += part
    except OSError:
        return False
    return answer == nonce
