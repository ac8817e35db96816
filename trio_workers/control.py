"""Look at a pool of another process, and turn it, over its control socket.

    from trio_workers.control import connect, find_sockets

    async with await connect(find_sockets()[0]) as client:
        print((await client.ask("status"))["status"]["busy"])
        await client.ask("resize 8")
        async for picture in client.watch():
            print(picture["status"]["jobs"])

The pool's side is `trio_workers.serve_control`.
"""

import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import trio

from ._control_place import find_sockets
from ._control_protocol import LONGEST_ANSWER, LineBuffer, LineTooLong, decode_answer, encode_request, is_picture
from ._control_server import serve_control as serve_control  # its name in the reference is trio_workers.serve_control
from ._socket_file import why_too_long

__all__ = ["ControlClient", "connect", "find_sockets"]

ANSWERS_WITHIN: Final = 10.0
"""Seconds in which a pool must have answered the first question. It takes it a millisecond; a process that is stopped,
or that blocks trio's loop, and a program that is none of ours, may take for ever."""

READ_SIZE: Final = 64 * 1024


async def connect(path: str | os.PathLike[str]) -> "ControlClient":
    """Connect to a pool's control socket: `async with await connect(path) as client`.

    Asks it for its status, so that it is known to be one. Raise `OSError`, with the path and in words:
    FileNotFoundError where there is nothing, ConnectionRefusedError where nobody listens any more, PermissionError
    where the pool is another user's or has too many connections, TimeoutError where it has not answered within 10 s,
    and others where it is no pool's socket. Cancelling leaves nothing behind.
    """
    text = os.fspath(path)
    await trio.lowlevel.checkpoint_if_cancelled()
    if (why := why_too_long(text)) is not None:
        raise OSError(errno.ENAMETOOLONG, why, text)
    try:
        if not stat.S_ISSOCK(os.stat(text).st_mode):
            raise OSError(errno.ENOTSOCK, "that is no socket", text)
        stream = await trio.open_unix_socket(text)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "there is no such socket; has the pool ended?", text) from None
    except ConnectionRefusedError:
        raise ConnectionRefusedError(
            errno.ECONNREFUSED, "nobody listens to that socket any more: its program has ended", text
        ) from None
    except PermissionError:
        raise PermissionError(errno.EACCES, "only the user who runs the pool, and root, may connect", text) from None
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno or 0), text) from None
    client = ControlClient._create(stream, text)  # pyright: ignore[reportPrivateUsage]
    try:
        with trio.move_on_after(ANSWERS_WITHIN) as patience:
            answer = await client.ask("status")
            if not answer["ok"]:
                raise PermissionError(errno.EACCES, str(answer.get("error", "refused")), text)
            if "status" not in answer:
                raise client._not_a_pool("its status has none")  # pyright: ignore[reportPrivateUsage]
        if patience.cancelled_caught:
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"no answer within {ANSWERS_WITHIN:g} s; its program may be stopped, too busy, or no pool's",
                text,
            )
    except BaseException:
        client.close()
        raise
    return client


class ControlClient:
    """A connection to the control socket of a pool. You get one from `connect`."""

    _stream: trio.SocketStream
    _path: str
    _lines: LineBuffer
    _turn: trio.Lock
    _watch: "_Watch | None"
    """Whose pictures the pool sends."""
    _step: trio.CancelScope
    """Around the wait for a picture: who asks ends it, to have the turn."""
    _asking: int
    """Tasks that ask and have not had the turn: a wait for a picture that begins now would not be ended by them."""

    def __init__(self) -> None:
        raise TypeError("ControlClient has no public constructor; use trio_workers.control.connect")

    @classmethod
    def _create(cls, stream: trio.SocketStream, path: str) -> "ControlClient":
        self = object.__new__(cls)
        self._stream = stream
        self._path = path
        self._lines = LineBuffer(LONGEST_ANSWER)
        self._turn = trio.Lock()
        self._watch = None
        self._step = trio.CancelScope()
        self._asking = 0
        return self

    def __repr__(self) -> str:
        return f"<ControlClient of {self._path}>"

    @property
    def path(self) -> Path:
        """The socket's path."""
        return Path(self._path)

    async def __aenter__(self) -> "ControlClient":
        await trio.lowlevel.checkpoint()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close the connection. A change that was asked for goes on. Twice is harmless."""
        self._stream.socket.close()

    async def ask(self, request: str | Mapping[str, object]) -> dict[str, Any]:
        """Send a request, and return its answer: `"status"`, `"workers"`, `"reset"`, `"resize 3"`, or the same as JSON.

        The answer has `ok`. Where that is False nothing was done, or it failed, and `error` says why. `reset` and
        `resize` are answered when the change is done, and can take as long as the longest job; tasks that ask over one
        client wait for each other.

        Raise ConnectionResetError where the connection ends instead, `OSError` for what is no answer,
        `trio.ClosedResourceError` where the client is closed, ValueError for a request that is no line. Cancelling
        closes the client, once the request is sent, for the answer would be taken for that of the next one; the change
        goes on.
        """
        line = encode_request(request)
        if line.split() == [b"watch"] or (isinstance(request, Mapping) and request.get("do") == "watch"):
            raise ValueError("watch has many answers; use client.watch()")
        self._step.cancel()
        self._asking += 1
        try:
            await self._turn.acquire()
        finally:
            self._asking -= 1
        try:
            watched, self._watch = self._watch is not None, None
            await self._send(line)
            while True:
                answer = await self._receive()
                if not (watched and is_picture(answer)):
                    return answer
        except BaseException:
            self.close()
            raise
        finally:
            self._turn.release()

    def watch(self) -> AsyncIterator[dict[str, Any]]:
        """Look on: `async for picture in client.watch()`, with `picture["status"]` and `picture["workers"]`.

        The first comes at once, the next ones when something has changed, at most 20 a second; who is slow gets the
        newest, not all. Ends when the connection does. It may be left and gone on with, and cancelling a step loses
        nothing. Other tasks may `ask` meanwhile: pictures come again when they have their answer. To look on while a
        `reset` is under way, have another client.
        """
        return _Watch(self)

    async def _next_picture(self, watch: "_Watch") -> dict[str, Any] | None:
        """Return the next picture, or None where somebody wants to ask: then begin again, after that."""
        async with self._turn:
            if self._asking:
                return None
            with trio.CancelScope() as self._step:
                if self._watch is not watch:
                    self._watch = watch
                    try:
                        await self._send(b"watch\n")
                    except BaseException:
                        self._watch = None
                        raise
                answer = await self._receive()
                if not is_picture(answer):
                    raise self._not_a_pool("a picture has a status and workers")
                return answer
        return None

    async def _send(self, line: bytes) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # it may have said why; if not, reading tells
            await self._stream.send_all(line)

    async def _receive(self) -> dict[str, Any]:
        while (answer := await self._receive_any()).get("unasked"):
            pass  # we were slow to ask, and so were told the status
        return answer

    async def _receive_any(self) -> dict[str, Any]:
        while True:
            try:
                line = self._lines.next_line()
            except LineTooLong:
                raise self._not_a_pool("its answer has no end") from None
            if line is not None:
                break
            try:
                data = await self._stream.receive_some(READ_SIZE)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise ConnectionResetError(
                    errno.ECONNRESET, "the pool's side has closed the connection; has its program ended?", self._path
                )
            self._lines.receive(bytes(data))
        try:
            return decode_answer(line)
        except ValueError as error:
            raise self._not_a_pool(str(error)) from None

    def _not_a_pool(self, why: str) -> OSError:
        return OSError(errno.EPROTO, f"that is no pool's control socket: {why}", self._path)


class _Watch:
    """The pictures of one `ControlClient.watch`."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client

    def __aiter__(self) -> "_Watch":
        return self

    async def __anext__(self) -> dict[str, Any]:
        try:
            while (picture := await self._client._next_picture(self)) is None:  # pyright: ignore[reportPrivateUsage]
                pass  # somebody asked, and had the answer
        except ConnectionResetError:
            raise StopAsyncIteration from None
        return picture
