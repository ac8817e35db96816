"""A pool in the browser, for probes and for Prometheus; what it needs comes with the extra `status`.

This module needs nothing but the core, so that the names can be imported anywhere; the application and the server are
loaded when they are first asked for.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import trio

from ._watch import AnyPool, check_pool

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["serve_status", "status_app"]

NEEDED: Final = frozenset({"anyio", "h11", "hypercorn", "starlette"})


def status_app(pool: AnyPool, *, token: str | None = None, hosts: Iterable[str] = ()) -> "Starlette":
    """Make an ASGI application (of starlette) that shows a pool: serve it alone, or mount it in another one.

    It has a page at `/`, and `/status`, `/events`, `/health`, `/ready` and `/metrics`. It must run in the trio program
    that the pool runs in, and it may outlive the pool: `/ready` says then why no job would be accepted.

    It only looks, unless a `token` of at least 16 characters is given: whoever sends it may `POST /reset` and
    `POST /resize`. It answers under the loopback names and addresses, under the address that a connection came in on,
    and under the names of `hosts`; a request under another one, or from another site's page, is refused.

    Raise ModuleNotFoundError without the extra `status`; TypeError or ValueError for what can't be a token or a host.
    """
    check_pool(pool)
    try:
        from ._status_app import make_app
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    return make_app(pool, token, hosts)


async def serve_status(
    pool: AnyPool,
    bind: str = "127.0.0.1:0",
    *,
    token: str | None = None,
    hosts: Iterable[str] = (),
    public: bool = False,
    task_status: "trio.TaskStatus[list[str]]" = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `status_app` until it is cancelled: `(url,) = await nursery.start(serve_status, pool)`.

    `bind` is `host:port`, `[address]:port` for IPv6; port 0 takes a free one. What comes back from `nursery.start` is a
    list with the address that it is reached at, `http://127.0.0.1:8080`; with more than one where the host has several
    addresses. An address that can be reached from outside the machine is a ValueError, unless `public` is true: whoever
    reaches it sees the labels of the jobs and what workers died of, and there is no encryption.

    `token` and `hosts` are those of `status_app`; the host in `bind`, where it is a name, is one of the hosts. No
    signal is handled here. Raise OSError where it can't listen, ModuleNotFoundError without the extra `status`.
    Cancelling closes all connections at once, those of readers that read nothing too.
    """
    check_pool(pool)
    try:
        from ._status_server import find_host, serve_app
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    host, port = find_host(bind, public=public)
    # A name alone: an address is known as that of the connection, and `hosts` is not for "every address" (0.0.0.0).
    names = [host] if any(letter.isalpha() for letter in host) and ":" not in host else []
    app = status_app(pool, token=token, hosts=[*_list(hosts), *names])
    await serve_app(app, host, port, task_status)


def _list(hosts: Iterable[str]) -> list[str]:
    if isinstance(hosts, str):
        raise TypeError(f"hosts must be several names, as a list or a tuple: hosts=[{hosts!r}]")
    return list(hosts)


def _missing(error: ModuleNotFoundError) -> ModuleNotFoundError:
    name = (error.name or "").partition(".")[0]
    if name not in NEEDED:
        return error
    return ModuleNotFoundError(
        f"the status page needs {name}, which comes with: pip install 'trio_workers[status]'", name=name
    )
