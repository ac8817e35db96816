"""Who is at the other end of an accepted connection, by the kernel's word and not by what it says.

A worker is its process group: the process that we spawned leads it, and its number is pinned until we reap that
process. So a connection belongs to a worker if the process that made it (Unix: `SO_PEERCRED`), or one that has the
peer's socket open (TCP within this machine: the socket's inode in `/proc/net/tcp`, then `/proc/<pid>/fd`), is in the
worker's group: the spawned process itself, or what a shell wrapper started. A worker that leaves its group is nobody's.

A peer on another machine is nobody's. Where the kernel can't say (another system), a claim is all there is.
"""

import enum
import ipaddress
import os
import socket
from collections.abc import Collection

import trio

from . import _platform


class Verdict(enum.Enum):
    """What the kernel says of a connection that it gives to none of the groups in question."""

    STRANGER = "it belongs to no worker that is expected"
    UNKNOWN = "the kernel does not say whose it is"


async def group_of(
    connection: trio.socket.SocketType, groups: Collection[int], *, limiter: trio.CapacityLimiter
) -> int | Verdict:
    """Return which of these process groups has the other end of a connection, before a byte is exchanged with it.

    A group is named by its leader: a child of ours that is not reaped. Looking up a TCP connection takes a thread with
    a token of `limiter`, for a table that may be long. Raise `OSError` where the connection is gone already.
    """
    await trio.lowlevel.checkpoint()
    here = _platform.HERE
    if connection.family == socket.AF_UNIX:
        if not here.confirms_peers:
            return Verdict.UNKNOWN
        pid = here.peer_pid(connection)
        found = None if pid is None else claimed_group(pid, groups)
        return Verdict.STRANGER if found is None else found
    ours, theirs = connection.getsockname()[:2], connection.getpeername()[:2]
    if not here.confirms_peers:
        return Verdict.UNKNOWN
    return await trio.to_thread.run_sync(_tcp_group, ours, theirs, groups, limiter=limiter)


def _tcp_group(ours: tuple[str, int], theirs: tuple[str, int], groups: Collection[int]) -> int | Verdict:
    here = _platform.HERE
    inode = here.tcp_peer_inode(ours, theirs)
    if inode is None:
        return Verdict.STRANGER  # closed already, or of another machine, where no worker of ours runs
    for pid, group in here.group_members(groups):
        if here.has_socket(pid, inode):
            return group
    return Verdict.STRANGER


def claimed_group(pid: int, groups: Collection[int]) -> int | None:
    """Return which of these groups a pid belongs to, or None. `pid` may be anything that a worker has claimed."""
    if pid in groups:
        return pid  # the leader, even if it has ended
    try:
        group = os.getpgid(pid)
    except (ProcessLookupError, OverflowError, PermissionError):
        return None
    return group if group in groups else None


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine. `host` is a numeric address."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
