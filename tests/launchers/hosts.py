"""Two hosts in one: network namespaces with a cable between them, each with an address and a loopback of its own.

It takes root and iproute2.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """Where a command runs when `prefix` stands before it, and its address."""

    prefix: tuple[str, ...]
    address: str


def why_not() -> str | None:
    """Why namespaces can't be made here, None where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    return None if shutil.which("ip") else "not installed (apt-get install iproute2): ip"


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """The hosts while the block runs."""
    names = [f"trimaran-{os.getpid()}-{index}" for index in range(2)]
    cable = [f"tri{os.getpid() % 100000}{end}" for end in "ab"]
    addresses = ["10.213.7.1", "10.213.7.2"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", "name", cable[1], "netns", names[1])
        for name, end, address in zip(names, cable, addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            for device in (end, "lo"):
                _ip("-n", name, "link", "set", device, "up")
        yield [Host(("ip", "netns", "exec", name), address) for name, address in zip(names, addresses, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
