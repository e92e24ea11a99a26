"""Which interface messages of this machine take."""

import os
import socket
import struct
from collections.abc import Iterator
from fcntl import ioctl
from ipaddress import ip_address
from pathlib import Path

from clapping_ds.doctor.visit import Finding, Visit, fail, skip, sum_up, warn


def check_network(visit: Visit) -> Finding:
    """Which interface messages take."""
    address, names = visit.launch.address, dict(_list_interfaces())
    if address is None:
        return skip("one rank: there is no MASTER_ADDR to find a way to")
    local = _find_local_address(address, visit.launch.port)
    chosen, gloo = os.environ.get("GLOO_SOCKET_IFNAME"), _find_gloo_address()
    interface = names.get(local, "an unknown interface")
    by_gloo = f"{chosen} (GLOO_SOCKET_IFNAME)" if chosen else f"{names.get(gloo, gloo)} (of the host's name)"
    text = (
        f"the way to {address} is {interface} ({local}); gloo takes {by_gloo}; "
        f"NCCL_SOCKET_IFNAME {os.environ.get('NCCL_SOCKET_IFNAME') or 'is not set'}"
    )
    present = {name for _, name in socket.if_nameindex()}
    unknown = [name for name in (chosen or "").split(",") if name and name not in present]
    problems = []
    if unknown:
        problems.append(fail(f"no interface {', '.join(unknown)}", f"there are {', '.join(sorted(present))}"))
    if len(set(visit.hosts)) > 1:
        problems += _find_loopback(local, names.get(gloo) if chosen is None else chosen, gloo, interface)
    return sum_up(text, problems)


def _find_loopback(local: str, gloo_name: str | None, gloo: str, interface: str) -> Iterator[Finding]:
    """What cannot reach another host."""
    if ip_address(local).is_loopback:
        yield warn("several hosts, and MASTER_ADDR leads to this one", "give an address that all can reach")
    if gloo_name == "lo" or (gloo_name is None and ip_address(gloo).is_loopback):
        yield warn(
            "several hosts, and gloo takes this one's loopback",
            f"set GLOO_SOCKET_IFNAME={interface}, or let the host's name lead to its address",
        )


def _find_local_address(address: str, port: int) -> str:
    """From which messages to an address are sent. None is sent for that."""
    family, *_, target = socket.getaddrinfo(address, port or 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def _find_gloo_address() -> str:
    """Without GLOO_SOCKET_IFNAME gloo takes the first address of the host's name that is its own, else
    loopback."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, kind, _, _, target in found:
        try:
            with socket.socket(family, kind) as probe:
                probe.bind(target)
                return str(target[0])
        except OSError:
            continue
    return "127.0.0.1"


def _list_interfaces() -> Iterator[tuple[str, str]]:
    """(address, interface) of this machine, as Linux tells them."""
    get_address = 0x8915  # SIOCGIFADDR: takes and gives a struct ifreq
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                told = ioctl(asked.fileno(), get_address, struct.pack("256s", name.encode()[:15]))
                yield socket.inet_ntoa(told[20:24]), name
            except OSError:
                continue  # it has no IPv4 address
    listed = Path("/proc/net/if_inet6")
    for line in listed.read_text().splitlines() if listed.exists() else []:
        digits, *_, name = line.split()
        yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)), name
