"""Large buffers through shared memory: whatever goes in comes out, nobody sees another's, and nothing is left.

The functions that run in workers are in `python_arena_jobs.py`.
"""

# ruff: noqa: ASYNC240 - tests may block for a moment

import contextlib
import errno
import gc
import itertools
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tests import python_arena_jobs as jobs
from tests.test_cost import JOBS, count
from tests.test_faults import runs, stopped, until
from tests.test_parent import wait
from trio_workers import (
    Limits,
    PythonPool,
    RelayError,
    Worker,
    WorkerCrashed,
    _interpreter,
    _platform,
    open_python_pool,
)
from trio_workers._arena import (
    ALIGNED,
    AT_ONCE,
    IN_ARENA,
    KEPT_COUNT,
    KEPT_FROM,
    KEPT_JOBS,
    SLICE,
    SMALLEST,
    TAKEN,
    Arena,
    Drawing,
    Filling,
    Kept,
    behind,
)
from trio_workers._call_line import CallLine, CallRelay
from trio_workers._calls import CALL, FROM_CHILD, OUT_OF_BAND, RESULT, Decoder, buffers_of, encode, excused, placed
from trio_workers._goridge import FrameError
from trio_workers._relay import READ_SIZE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create and /proc")

MIB: Final = 1 << 20
ROOT: Final = Path(__file__).parent.parent
SIZES: Final = (
    *(size + more for size in (OUT_OF_BAND, READ_SIZE, IN_ARENA - TAKEN, IN_ARENA, SMALLEST) for more in (-1, 0, 1)),
    SLICE - 1,
    SLICE,
    SLICE + 1,
    3 * SLICE + 5,
)
"""Around each size at which something else is done."""


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes of which no slice equals another at the wrong place."""
    block = bytes((seed + 7 * number + number // 251) % 256 for number in range(4099))
    return (block * (size // len(block) + 1))[:size]


@contextlib.contextmanager
def arenas() -> Iterator[tuple[Arena, Arena]]:
    """Both sides of an arena, in one process."""
    fd = _platform.HERE.shared_file()
    one, other = Arena(fd), Arena(os.dup(fd))
    try:
        yield one, other
    finally:
        one.close()
        other.close()


def table_of(buffers: Sequence[bytes | bytearray]) -> list[int]:
    return [2 * len(buffer) + isinstance(buffer, bytes) for buffer in buffers]


def views(buffers: Sequence[bytes | bytearray]) -> list[memoryview]:
    return [memoryview(buffer) for buffer in buffers]


def send_through(ours: Arena, theirs: Arena, buffers: Sequence[bytes | bytearray], kept: Kept) -> list[Any]:
    assert Filling(ours, views(buffers)).go_on()
    drawing = Drawing(theirs, table_of(buffers), kept)
    assert drawing.go_on()
    return drawing.buffers


# --- the arena itself -----------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 70_000), st.booleans()), min_size=1, max_size=6),
    st.sampled_from([1000, 4096, 65536, AT_ONCE]),
    st.sampled_from([1000, 4096, 65536, AT_ONCE]),
)
def test_whatever_goes_in_comes_out(sizes: list[tuple[int, bool]], written: int, read: int) -> None:
    """Buffers come out as what they were, in whatever slices they are written and read, each aligned."""
    buffers = [(bytearray if writable else bytes)(pattern(size, at)) for at, (size, writable) in enumerate(sizes)]
    with arenas() as (ours, theirs):
        filling = Filling(ours, views(buffers))
        while not filling.go_on(written):
            pass
        drawing = Drawing(theirs, table_of(buffers), Kept())
        while not drawing.go_on(read):
            pass
        assert drawing.buffers == buffers
        assert [type(buffer) for buffer in drawing.buffers] == [type(buffer) for buffer in buffers]
        at = TAKEN
        for buffer in buffers:
            assert at % ALIGNED == 0
            with theirs.view(at, len(buffer)) as view:
                assert view == buffer
            at = behind(at, len(buffer))


def test_it_grows_by_doubling() -> None:
    """The file has a power of two of bytes, its memory only what was needed; what is smaller leaves it as it is."""
    with arenas() as (ours, theirs):
        for size, expected in ((IN_ARENA, SMALLEST), (MIB, 2 * MIB), (5 * MIB, 8 * MIB), (IN_ARENA, 8 * MIB)):
            data = pattern(size, size)
            assert send_through(ours, theirs, [data], Kept()) == [data]
            status = os.fstat(ours._fd)
            assert status.st_size == expected
            assert status.st_blocks * 512 <= 5 * MIB + 64 * 1024
        assert ours.used == theirs.used == TAKEN + 5 * MIB


def test_it_can_not_be_made_smaller() -> None:
    """Who maps it is never killed by SIGBUS for what another does to the file."""
    with arenas() as (ours, theirs):
        send_through(ours, theirs, [bytes(IN_ARENA)], Kept())
        with pytest.raises(PermissionError):
            os.ftruncate(theirs._fd, 0)


def test_what_was_given_back_comes_again() -> None:
    """`give_back` returns all but a page to the system, keeps what was noted, and what comes next has memory again."""
    with arenas() as (ours, theirs):
        assert theirs.free
        send_through(theirs, ours, [bytes(5 * MIB)], Kept())
        theirs.sent += 1
        assert not theirs.free
        ours.note_taken()
        assert theirs.free
        ours.give_back()
        assert os.fstat(ours._fd).st_blocks * 512 <= os.sysconf("SC_PAGE_SIZE")
        assert ours.used == 0
        assert theirs.free
        for one, other in ((theirs, ours), (ours, theirs)):
            data = pattern(3 * MIB)
            assert send_through(one, other, [data], Kept()) == [data]
            assert os.fstat(ours._fd).st_blocks * 512 >= 3 * MIB


def test_a_descriptor_that_became_another_file(tmp_path: Path) -> None:
    """Where a job closed the arena's descriptor and has its own file under that number, that one is left alone."""
    with arenas() as (ours, theirs):
        send_through(ours, theirs, [bytes(IN_ARENA)], Kept())
        with (tmp_path / "file").open("wb") as file:
            os.dup2(file.fileno(), theirs._fd)
            with pytest.raises(OSError, match="closed the arena's descriptor") as error:
                Filling(theirs, [memoryview(bytes(5 * MIB))]).go_on()
        assert error.value.errno == errno.EBADF
        assert (tmp_path / "file").stat().st_size == 0


def test_it_takes_no_number_of_a_standard_stream() -> None:
    """Where 0, 1 or 2 is closed, none of the descriptors that a mapping needs goes there."""
    program = """
        import os, sys
        from trio_workers import _platform
        from trio_workers._arena import Arena, Filling
        os.close(0), os.close(1)
        arena = Arena(_platform.HERE.shared_file())
        Filling(arena, [memoryview(bytes(300_000))]).go_on()
        found = [number for number in range(100) if os.path.exists(f"/proc/self/fd/{number}")]
        os.write(2, repr([number for number in found if number < 3]).encode())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stderr == "[2]"


def test_where_it_can_not_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no room to map it reads it by system calls; who would write gets the error."""

    def refuse(fd: int, size: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with arenas() as (ours, theirs):
        buffers = [pattern(MIB), bytearray(pattern(5 * MIB, 1))]
        assert Filling(ours, views(buffers)).go_on()
        monkeypatch.setattr("trio_workers._arena._map", refuse)
        drawing = Drawing(theirs, table_of(buffers), Kept())
        while not drawing.go_on(SLICE):
            pass
        assert drawing.buffers == buffers
        with pytest.raises(OSError, match="memory"):
            Filling(theirs, views(buffers)).go_on()


# --- memory that is kept --------------------------------------------------------------------------------------------


def hold_view(memory: bytearray) -> object:
    return memoryview(memory)[5:6]


def hold_array(memory: bytearray) -> object:
    numpy = pytest.importorskip("numpy")
    return numpy.frombuffer(memory, dtype="u1")[100:200].reshape(10, 10)


def hold_in_closure(memory: bytearray) -> object:
    return lambda: memory


HOLDS: Final[dict[str, Callable[[bytearray], object]]] = {
    "itself": lambda memory: memory,
    "a list": lambda memory: [memory],
    "a view": hold_view,
    "an array": hold_array,
    "an iterator": iter,
    "a buffer": pickle.PickleBuffer,
    "a closure": hold_in_closure,
}


@pytest.mark.parametrize("way", HOLDS)
def test_memory_that_is_held(way: str) -> None:
    """Memory is used again when nobody holds it, and as long as anybody does in whatever way it is not."""
    kept = Kept()
    kept.note(bytearray(KEPT_FROM))
    holder = HOLDS[way](kept._held[0])
    assert kept.take(KEPT_FROM) is None
    assert kept.sizes == [KEPT_FROM]
    del holder
    gc.collect()
    assert kept.take(KEPT_FROM + 1) is None
    memory = kept.take(KEPT_FROM)
    assert memory is not None
    assert not kept
    kept.note(memory)
    assert kept.take(KEPT_FROM) is None  # for we hold it


def test_how_much_is_kept() -> None:
    """Neither small memory nor more than is allowed; the oldest goes first; after many jobs, nothing."""
    kept = Kept(10 * KEPT_FROM)
    kept.note(bytearray(KEPT_FROM - 1))
    kept.note(bytearray(10 * KEPT_FROM + 1))
    assert not kept
    for number in range(KEPT_COUNT + 2):
        kept.note(bytearray(KEPT_FROM + number))
    assert kept.sizes == [KEPT_FROM + number for number in range(2, KEPT_COUNT + 2)]
    kept.note(bytearray(8 * KEPT_FROM))
    assert kept.sizes == [KEPT_FROM + KEPT_COUNT + 1, 8 * KEPT_FROM]
    for _ in range(KEPT_JOBS):
        kept.grow_older()
    assert kept
    kept.grow_older()
    assert not kept
    kept.keep_nothing()
    kept.note(bytearray(KEPT_FROM))
    assert not kept


def test_kept_memory_has_no_trace_of_what_was_there() -> None:
    """What is used again is written over from its first byte to its last, at once or in slices."""
    with arenas() as (ours, theirs):
        kept = Kept()
        for number in range(6):
            data = bytearray([number]) * (SLICE + 1000)
            assert Filling(ours, [memoryview(data)]).go_on()
            drawing = Drawing(theirs, table_of([data]), kept)
            while not drawing.go_on(AT_ONCE if number % 2 else SLICE):
                pass
            assert drawing.buffers == [data]
            del drawing
            assert kept.sizes == [SLICE + 1000]  # always the same


# --- the message ----------------------------------------------------------------------------------------------------


def test_message_with_its_buffers_in_the_arena() -> None:
    """Its table says how large they are and of which kind; the buffers do not follow; the next message does."""
    buffers = [pattern(IN_ARENA), bytearray(pattern(40_000, 1))]
    pieces = encode(RESULT, 7, b"body", views(buffers))
    assert buffers_of(pieces) == pieces[1:]
    data = b"".join(placed(pieces))
    assert data.hex(" ", 1).startswith("9d 77 54 0a 11 01 00 00 07 00 00 00")
    assert len(data) == 28 + 2 * 8 + 4
    following = b"".join(encode(RESULT, 8, b"next", [memoryview(b"x" * 10)]))
    with arenas() as (ours, theirs):
        for most, cut in itertools.product((AT_ONCE, 100_000), (len(data) + 20, 5, 30)):
            assert Filling(ours, views(buffers)).go_on()
            decoder = Decoder(FROM_CHILD, 1 << 20, theirs, Kept(), most)
            decoder.receive((data + following)[:cut])
            first = decoder.next_message()
            decoder.receive((data + following)[cut:])
            turns = 0
            while first is None:
                assert decoder.pending
                assert decoder.drawing
                turns += 1
                first = decoder.next_message()
            assert turns == (0 if cut > len(data) and most == AT_ONCE else 1 if most == AT_ONCE else turns)
            assert (first.id, first.body, first.buffers) == (7, b"body", buffers)
            second = decoder.next_message()
            assert second is not None
            assert (second.id, second.body, second.buffers) == (8, b"next", [b"x" * 10])
            assert not decoder.pending


def test_bytes_on_the_page() -> None:
    """The page of the wire shows what is really sent."""
    page = (ROOT / "docs" / "wire.md").read_text()
    (block,) = re.findall(r"^```text\n(pool    call 7, 1 MiB.*?)^```$", page, re.M | re.S)
    shown = [bytes.fromhex("".join(re.split(r"  +", line, maxsplit=2)[2].rstrip("…"))) for line in block.splitlines()]
    call = encode(CALL, 7, b"fa", [memoryview(bytes(MIB))], split=1)
    result = encode(RESULT, 7, b"r", [memoryview(bytearray(MIB))])
    sent = [b"".join(placed(call)), b"".join(placed(result)), bytes(excused(result, errno.ENOSPC)[0])]
    assert shown == sent


def test_buffers_of_messages_that_have_none() -> None:
    """A body that is a piece of its own is no buffer."""
    assert not buffers_of(encode(RESULT, 7, bytes(10)))
    assert not buffers_of(encode(RESULT, 7, bytes(1_000_000)))


def test_excuse() -> None:
    """Who does without the arena says why, in a message that is whole in all else."""
    data = b"".join(excused(encode(RESULT, 7, b"body", [memoryview(b"x" * 9)]), errno.ENOSPC))
    decoder = Decoder(FROM_CHILD, 100)
    assert decoder.take_whole(data) is None
    decoder.receive(data)
    message = decoder.next_message()
    assert message is not None
    assert (message.body, message.buffers, decoder.excuse) == (b"body", [b"x" * 9], errno.ENOSPC)


def word(*bytes_: int, count: int = 1, sizes: Sequence[int] = (200_001,)) -> bytes:
    """A message with these bytes behind its kind, and a body of one byte."""
    head = b"\x9d\x77\x54\x0a" + bytes([RESULT, *bytes_]) + (7).to_bytes(4, "little") + bytes(4)
    head += count.to_bytes(4, "little") + (1).to_bytes(8, "little")
    return head + b"".join(size.to_bytes(8, "little") for size in sizes) + b"."


LIES: Final = {
    "a place that there is not": (word(2, 0, 0), "don't fit together"),
    "in the arena, but none of them": (word(1, 0, 0, count=0, sizes=()), "don't fit together"),
    "the last byte of the four": (word(0, 0, 1), "don't fit together"),
    "beyond the arena": (word(1, 0, 0, sizes=(2 * MIB,)), "the arena has no"),
    "beyond the memory": (word(1, 0, 0, sizes=(2 * (MIB - 100),)), "the arena has no"),
    "beyond the limit": (word(1, 0, 0, sizes=(20 * MIB,)), "max_frame_size"),
    "far beyond all": (word(1, 0, 0, sizes=(2**64 - 1,)), "max_frame_size"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_the_arena(lie: str) -> None:
    """Nothing is believed of an arena that has not the memory for it, and nothing is allocated before."""
    data, reason = LIES[lie]
    with arenas() as (ours, theirs):
        assert Filling(ours, [memoryview(bytes(IN_ARENA))]).go_on()
        decoder = Decoder(FROM_CHILD, 10 * MIB, theirs)
        decoder.receive(data)
        with pytest.raises(FrameError, match=reason):
            decoder.next_message()


def test_no_arena_to_look_into() -> None:
    """Where there is no arena nothing can lie in it."""
    decoder = Decoder(FROM_CHILD, 10 * MIB)
    decoder.receive(word(1, 0, 0))
    with pytest.raises(FrameError, match="there is no arena"):
        decoder.next_message()


# --- through a pool -------------------------------------------------------------------------------------------------


def line_of(worker: Worker) -> CallLine:
    assert isinstance(worker.line, CallLine)
    return worker.line


def uses(pool: PythonPool) -> int:
    return sum(line_of(worker).arena_uses for worker in pool.workers)


@contextlib.asynccontextmanager
async def one_worker(**parameters: Any) -> AsyncIterator[PythonPool]:
    """A pool of one worker, which must be the same one at the end, and fit for work; and nothing is left of it."""
    before = jobs.descriptors()
    async with open_python_pool(1, **{"boot_timeout": 30.0, **parameters}) as pool:
        (worker,) = pool.workers
        yield pool
        assert await pool.run_sync(abs, -1) == 1
        assert pool.workers == (worker,)
        assert pool.statistics().starts == 1
    assert jobs.descriptors() == before
    assert "memfd:trio_workers" not in Path("/proc/self/maps").read_text()


KINDS: Final[dict[str, Callable[[bytes], Any]]] = {
    "bytes": lambda data: data,
    "bytes, wrapped": pickle.PickleBuffer,
    "bytearray": lambda data: pickle.PickleBuffer(bytearray(data)),
    "bytearray, read-only": lambda data: pickle.PickleBuffer(memoryview(bytearray(data)).toreadonly()),
}


@pytest.mark.limit(120)
@pytest.mark.parametrize("kind", KINDS)
async def test_all_sizes_there_and_back(kind: str) -> None:
    """Content, type and the right to write are those of the socket, whatever the size; small ones go by the socket."""
    expected = bytearray if kind == "bytearray" else bytes
    async with one_worker() as pool:
        for size in SIZES:
            data = pattern(size, size)
            before = uses(pool)
            name, read_only, count_, first, last = await pool.run_sync(jobs.describe, KINDS[kind](data))
            if size >= OUT_OF_BAND:
                assert (name, read_only) == (expected.__name__, expected is bytes)
            assert (count_, first, last) == (size, data[:16], data[-16:])
            assert (uses(pool) > before) == (size >= IN_ARENA)
            result = await pool.run_sync(jobs.echo, KINDS[kind](data))
            assert result == data
            assert type(result) is expected


async def test_arrays_there_and_back() -> None:
    """Arrays of numpy keep their type, shape and flags, and can be written to where they could."""
    numpy = pytest.importorskip("numpy")
    async with one_worker() as pool:
        for shape in ((200, 200), (1000, 1000), (3, 500, 500)):
            for order in "CF":
                array = numpy.arange(numpy.prod(shape), dtype="f8").reshape(shape, order=order)
                array.flags.writeable = order == "C"
                result = await pool.run_sync(jobs.echo, array)
                assert result.dtype == array.dtype
                assert numpy.array_equal(result, array)
                assert result.flags.writeable == array.flags.writeable
                assert result.flags.f_contiguous == array.flags.f_contiguous


async def test_several_buffers_that_are_large_together() -> None:
    """What counts is all of a message: ten of 32 KiB go through the arena, and so do thousands."""
    async with one_worker() as pool:
        for number, size in ((7, OUT_OF_BAND), (10, OUT_OF_BAND), (3000, OUT_OF_BAND + 1), (20, MIB)):
            data = [(bytes if at % 2 else bytearray)(pattern(size, at)) for at in range(number)]
            before = uses(pool)
            result = await pool.run_sync(jobs.echo, [pickle.PickleBuffer(one) for one in data])
            assert result == data
            assert list(map(type, result)) == list(map(type, data))
            assert (uses(pool) > before) == (number > 7)


async def test_large_and_small_in_turn() -> None:
    """Growing, shrinking and growing again: each job gets its own."""
    async with one_worker() as pool:
        for size in (IN_ARENA, 9 * MIB, 100, 2 * MIB, 40_000, 33 * MIB, IN_ARENA, 5 * MIB):
            data = pattern(size, size % 251)
            assert await pool.run_sync(jobs.echo, data) == data
            assert await pool.run_sync(jobs.filled, size % 251, size) == bytes([size % 251]) * size


@pytest.mark.parametrize("read_slowly", [False, True])
async def test_parts_of_streams(read_slowly: bool) -> None:
    """A part takes the arena where the one before it was taken, else the socket: the caller sees no difference."""
    sizes = [MIB, 100, IN_ARENA, 2 * MIB, 5 * MIB, 50_000] * 5
    async with one_worker() as pool, pool.stream(jobs.parts, sizes) as parts:
        number = 0
        async for at, writable, read_only in parts:
            assert at == number
            assert writable == read_only == bytes([number % 251]) * sizes[number]
            assert (type(writable), type(read_only)) == (bytearray, bytes)
            if read_slowly and not number % 5:
                await trio.sleep(0.02)
            number += 1
        assert number == len(sizes)


async def test_stream_that_is_left() -> None:
    """A stream of large parts that is left early is read to its end behind its caller; the worker stays."""
    async with one_worker() as pool:
        for _ in range(5):
            async with pool.stream(jobs.parts, [2 * MIB] * 50) as parts:
                async for at, *_ in parts:
                    if at == 2:
                        break
            assert await pool.run_sync(jobs.echo, pattern(MIB)) == pattern(MIB)


async def test_error_with_a_buffer() -> None:
    """An exception has its large argument, as without the arena."""
    async with one_worker() as pool:
        data = pattern(2 * MIB)
        with pytest.raises(ValueError, match="with a buffer") as error:
            await pool.run_sync(jobs.fail_with, data)
        assert error.value.args == ("with a buffer", data)


async def test_passes_of_a_large_call() -> None:
    """Speed: a call of 1 MiB there and back takes one pass of the run loop, as one of a byte does."""
    async with one_worker() as pool:
        data = bytes(MIB)
        await pool.run_sync(jobs.echo, data)
        await trio.testing.wait_all_tasks_blocked()
        counter = await count(lambda: pool.run_sync(jobs.echo, data))
        assert counter.passes == JOBS
        assert counter.spawned == 0


async def test_other_tasks_get_their_turn() -> None:
    """A call of many slices does not hold the run loop for all of them, in either direction."""
    async with one_worker() as pool:
        data = bytes(16 * SLICE)
        turns = 0

        async def take_turns() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += line_of(pool.workers[0])._filling is not None or line_of(pool.workers[0])._calls.drawing

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_turns)
            await pool.run_sync(jobs.describe, data)
            assert turns >= 10
            turns = 0
            await pool.run_sync(jobs.filled, 1, 16 * SLICE)
            assert turns >= 10
            nursery.cancel_scope.cancel()


# --- nobody sees another's ------------------------------------------------------------------------------------------


async def test_what_a_worker_keeps() -> None:
    """Arguments that a function keeps, whole or by a view, are what they were after any number of other jobs."""
    async with one_worker() as pool:
        numpy = pytest.importorskip("numpy")
        for number in range(12):
            size = (2 + number % 3) * MIB
            value: Any = bytes([number]) * size
            if number % 4 == 1:
                value = numpy.full(size, number, dtype="u1")
            elif number % 4 == 2:
                value = pickle.PickleBuffer(bytearray(value))
            keep = jobs.keep_view if number % 4 == 3 else jobs.keep
            assert await pool.run_sync(keep, value) == number + 1
            # The same sizes again, dropped at once: their memory is used for what follows.
            for other in (200, 201):
                await pool.run_sync(jobs.describe, pickle.PickleBuffer(bytearray([other]) * size))
        found = await pool.run_sync(jobs.what_is_kept)
        assert [(low, high) for low, high, _ in found] == [(number, number) for number in range(12)]


async def test_what_a_caller_keeps() -> None:
    """Results that are kept are what they were after any number of other jobs, and each is its own memory."""
    async with one_worker() as pool:
        kept = [await pool.run_sync(jobs.filled, number, 3 * MIB) for number in range(6)]
        held = memoryview(await pool.run_sync(jobs.filled, 77, 3 * MIB))[5:10]
        for number in range(100, 106):
            assert await pool.run_sync(jobs.filled, number, 3 * MIB) == bytes([number]) * 3 * MIB
        assert kept == [bytes([number]) * 3 * MIB for number in range(6)]
        assert held == bytes([77]) * 5
        kept[0][:3] = b"abc"
        assert kept[1][:3] == b"\1\1\1"


async def test_memory_is_used_again() -> None:
    """An argument that is dropped makes room for the next of its size; one that is kept does not."""
    async with one_worker() as pool:
        size = 5 * MIB
        first = await pool.run_sync(jobs.address, pickle.PickleBuffer(bytearray(size)))
        second = await pool.run_sync(jobs.address, pickle.PickleBuffer(bytearray(size)))
        assert first == second
        assert await pool.run_sync(jobs.kept_sizes) == [size]
        for _ in range(KEPT_JOBS + 1):
            await pool.run_sync(abs, -1)
        assert await pool.run_sync(jobs.kept_sizes) == []


async def test_workers_keep_nothing_under_a_limit_of_memory() -> None:
    """Where a limit bounds a worker's memory, it keeps none of its jobs', and the arena does not count."""
    limits = Limits(max_memory=1024 * MIB)
    async with one_worker(limits=limits) as pool:
        await pool.run_sync(jobs.describe, pickle.PickleBuffer(bytearray(40 * MIB)))
        assert await pool.run_sync(jobs.kept_sizes) == []
        (worker,) = pool.workers
        assert worker.pid is not None
        resident = _platform.HERE.resident_memory(worker.pid)
        counted = worker.resident_memory()
        assert resident is not None
        assert counted is not None
        assert 40 * MIB <= resident - counted <= 41 * MIB
        assert counted < 40 * MIB


# --- ends -----------------------------------------------------------------------------------------------------------


async def healed(pool: PythonPool, *gone: Worker) -> None:
    """There is a worker, none of these, and it does what is large as well as what is small."""
    await until(lambda: pool.statistics().idle == 1 and not set(gone) & set(pool.workers))
    data = pattern(3 * MIB)
    assert await pool.run_sync(jobs.echo, data) == data
    assert await pool.run_sync(abs, -1) == 1


@contextlib.asynccontextmanager
async def mortal() -> AsyncIterator[PythonPool]:
    """A pool of one worker that may die; nothing is left of it."""
    before = jobs.descriptors()
    async with open_python_pool(1, boot_timeout=30.0) as pool:
        yield pool
    assert jobs.descriptors() == before
    assert "memfd:trio_workers" not in Path("/proc/self/maps").read_text()


async def filling(pool: PythonPool) -> None:
    """Wait until a job is on its way into the arena, and has not arrived."""
    with trio.fail_after(30):
        while line_of(pool.workers[0])._filling is None:
            await trio.lowlevel.checkpoint()


@pytest.mark.faults
async def test_cancel_while_the_arena_is_filled(tmp_path: Path) -> None:
    """The job never began; its worker goes, and the arena with it."""
    note = tmp_path / "note"
    async with mortal() as pool:
        (worker,) = pool.workers
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run_sync, jobs.note_size, str(note), bytes(16 * SLICE))
            await filling(pool)
            nursery.cancel_scope.cancel()
        await healed(pool, worker)
        assert not note.exists()


@pytest.mark.faults
async def test_crash_while_the_arena_is_filled(tmp_path: Path) -> None:
    """The job never began: its replacement runs it, through an arena of its own."""
    note = tmp_path / "note"
    data = pattern(16 * SLICE)
    async with mortal() as pool:
        (worker,) = pool.workers
        sizes: list[int] = []

        async def call() -> None:
            sizes.append(await pool.run_sync(jobs.note_size, str(note), data))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await filling(pool)
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
        assert sizes == [len(data)]
        assert note.read_text().split() == [str(pool.workers[0].pid)]
        await healed(pool, worker)


@pytest.mark.faults
async def test_crash_before_the_arena_is_read(tmp_path: Path) -> None:
    """A job that lies there whole, and whose message was not read, never began: its replacement runs it."""
    note = tmp_path / "note"
    async with mortal() as pool:
        (worker,) = pool.workers
        assert worker.pid is not None
        pid = worker.pid
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: stopped(pid))
        sizes: list[int] = []

        async def call() -> None:
            sizes.append(await pool.run_sync(jobs.note_size, str(note), bytes(2 * MIB)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            assert line_of(worker).whole
            os.kill(pid, signal.SIGKILL)
        assert sizes == [2 * MIB]
        assert note.read_text().split() == [str(pool.workers[0].pid)]
        await healed(pool, worker)


async def answered(worker: Worker, note: Path) -> None:
    """Let the answer of `give` come in, with nobody to read it."""
    await until(note.exists)
    note.with_name("go").touch()
    wait(line_of(worker).relay.has_input)  # blocks: the caller's task must not get its turn


@pytest.mark.faults
async def test_worker_that_dies_after_its_answer(tmp_path: Path) -> None:
    """An answer that lies in the arena whole is the caller's, although its worker is dead."""
    note, go = tmp_path / "note", tmp_path / "go"
    async with mortal() as pool:
        (worker,) = pool.workers
        results: list[bytes] = []

        async def call() -> None:
            results.append(await pool.run_sync(jobs.give, 5 * SLICE, str(note), str(go)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await answered(worker, note)
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            wait(lambda: not runs(worker.pid or 0))
        assert results == [bytes([9]) * 5 * SLICE]
        await healed(pool, worker)


@pytest.mark.faults
async def test_cancel_when_the_answer_is_there(tmp_path: Path) -> None:
    """An answer of a slice or less that lies there whole keeps its worker; one in the middle of its slices does not."""
    for size, stays in ((SLICE // 2, True), (16 * SLICE, False)):
        note, go = tmp_path / f"note{size}", tmp_path / "go"
        go.unlink(missing_ok=True)
        async with mortal() as pool:
            (worker,) = pool.workers
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.run_sync, jobs.give, size, str(note), str(go))
                await answered(worker, note)
                nursery.cancel_scope.cancel()
            assert (worker in pool.workers and pool.statistics().idle == 1) == stays
            await healed(pool, *(() if stays else (worker,)))


@pytest.mark.faults
@pytest.mark.limit(120)
async def test_ends_at_any_moment() -> None:
    """Wherever cancels and kills strike, callers that are left get their own, and nothing is left."""
    async with mortal() as pool:
        for passes in range(40):
            kill = passes % 2
            async with trio.open_nursery() as nursery:

                async def call(passes: int = passes) -> None:
                    data = pattern(4 * SLICE, passes)
                    with contextlib.suppress(WorkerCrashed):
                        assert await pool.run_sync(jobs.echo, pickle.PickleBuffer(bytearray(data))) == data

                nursery.start_soon(call)
                for _ in range(passes):
                    await trio.lowlevel.checkpoint()
                if kill and pool.workers and pool.workers[0].pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pool.workers[0].pid, signal.SIGKILL)
                else:
                    nursery.cancel_scope.cancel()
        await healed(pool)


@pytest.mark.faults
async def test_pool_that_is_left_while_an_arena_is_filled() -> None:
    """Nothing hangs and nothing is left where the block is left by an error in the middle of a large job."""
    before = jobs.descriptors()
    async with trio.open_nursery() as nursery:
        with pytest.raises(ZeroDivisionError):
            async with open_python_pool(1, boot_timeout=30.0) as pool:

                async def call() -> None:
                    with pytest.raises(trio.ClosedResourceError):
                        await pool.run_sync(jobs.echo, bytes(16 * SLICE))

                nursery.start_soon(call)
                await filling(pool)
                raise ZeroDivisionError
    assert jobs.descriptors() == before
    assert "memfd:trio_workers" not in Path("/proc/self/maps").read_text()


@pytest.mark.faults
@pytest.mark.parametrize("job", [jobs.lie, jobs.grow_without_memory])
async def test_worker_that_lies(job: Callable[[int], None]) -> None:
    """A worker that points to what is not there breaks the protocol, and costs its own job alone."""
    async with mortal() as pool:
        (worker,) = pool.workers
        assert await pool.run_sync(jobs.echo, bytes(MIB)) == bytes(MIB)
        with pytest.raises(RelayError, match="the arena has no"):
            await pool.run_sync(job, 64 * MIB)
        await healed(pool, worker)


# --- where there is none --------------------------------------------------------------------------------------------


def complaints(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.name == "trio_workers.pool" and record.levelno > 10]


async def check_by_socket(pool: PythonPool) -> None:
    for size in (IN_ARENA, 3 * MIB, 9 * MIB):
        data = pattern(size)
        assert await pool.run_sync(jobs.echo, data) == data
        assert await pool.run_sync(jobs.filled, 5, size) == bytes([5]) * size
        assert await pool.run_sync(jobs.echo, [pickle.PickleBuffer(data)] * 2) == [data, data]


class Without(_platform.Linux):
    """A system that has no files in memory, for whatever reason."""

    def __init__(self, error: OSError) -> None:
        self._error = error

    def shared_file(self) -> int:
        raise self._error


@pytest.mark.parametrize(("number", "level"), [(errno.ENOSYS, "INFO"), (errno.EMFILE, "WARNING")])
async def test_no_file_in_memory(
    number: int, level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a memfd large buffers take the socket, and the pool says so once."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(_platform, "HERE", Without(OSError(number, "injected")))
    async with open_python_pool(2, boot_timeout=30.0) as pool:
        await check_by_socket(pool)
        assert uses(pool) == 0
    (said,) = complaints(caplog)
    assert said == (
        f"pool: no shared memory for large buffers ({os.strerror(number)}): they take the socket, which is slower"
    )
    (record,) = [record for record in caplog.records if record.name == "trio_workers.pool"]
    assert record.levelname == level


def test_python_without_memfd_create(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that was built without it has none."""
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="memfd_create") as error:
        _platform.Linux().shared_file()
    assert error.value.errno == errno.ENOSYS
    with pytest.raises(OSError, match="no files in memory") as error:
        _platform.Portable().shared_file()
    assert error.value.errno == errno.ENOSYS


def test_kernel_that_does_not_know_the_newest_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older kernel is asked again, with the flags it knows."""
    asked: list[int] = []
    create = os.memfd_create

    def memfd_create(name: str, flags: int) -> int:
        asked.append(flags)
        if len(asked) == 1:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", memfd_create)
    fd = _platform.Linux().shared_file()
    assert fd > 2
    os.close(fd)
    assert asked == [asked[1] | 8, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM, errno.EMFILE])
async def test_no_memory_here(number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where the pool can't have the memory, what it sends takes the socket; answers still come by the arena."""

    def refuse(fd: int, offset: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    async with one_worker() as pool:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
        await check_by_socket(pool)
        monkeypatch.undo()
        assert uses(pool) > 0
        await check_by_socket(pool)
    (said,) = complaints(caplog)
    assert f"({os.strerror(number)})" in said


async def test_reason_that_there_is_not(caplog: pytest.LogCaptureFixture) -> None:
    """What a worker says is a byte of its own: where it is no errno it is shown all the same, once."""
    async with one_worker() as pool:
        spawner = pool._core._spawners[0][1]
        assert isinstance(spawner, _interpreter._PythonSpawner)
        for _ in range(2):
            spawner._complain("pool", " in a worker", 255)
    (said,) = complaints(caplog)
    assert "in a worker (Unknown error 255)" in said


async def test_memory_that_ends_in_the_middle(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that was half in the arena when the memory ended goes by the socket, whole."""
    allocate = os.posix_fallocate

    def refuse(fd: int, offset: int, size: int) -> None:
        if offset + size > 9 * MIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(fd, offset, size)

    async with one_worker() as pool:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
        data = pattern(20 * MIB)
        assert await pool.run_sync(jobs.describe, data) == ("bytes", True, len(data), data[:16], data[-16:])
        assert await pool.run_sync(jobs.echo, data) == data
    assert len(complaints(caplog)) == 1


@pytest.mark.parametrize(
    ("initializer", "initargs", "number"),
    [
        (jobs.refuse_to_allocate, (), errno.ENOSPC),
        (jobs.refuse_to_map, (), errno.ENOMEM),
        (jobs.limit_files, (100_000,), errno.EFBIG),
    ],
)
async def test_no_memory_in_the_worker(
    initializer: Callable[..., None], initargs: tuple[int, ...], number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a worker can't have the memory, its answers take the socket, and the pool says so once."""
    async with one_worker(initializer=initializer, initargs=initargs) as pool:
        assert await pool.run_sync(jobs.filled, 5, 3 * MIB) == bytes([5]) * 3 * MIB
        await check_by_socket(pool)
    (said,) = complaints(caplog)
    assert f"buffers in a worker ({os.strerror(number)})" in said


LIMITED: Final = """
import logging, resource, sys
import trio
from tests import python_arena_jobs as jobs
from trio_workers import open_python_pool

async def main():
    async with open_python_pool(1, boot_timeout=30) as pool:
        await pool.run_sync(abs, -1)
        limit = getattr(resource, sys.argv[1])
        before = resource.getrlimit(limit)
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        # Room for a large value and its copy, and not for an arena of 128 MiB beside the first.
        resource.setrlimit(limit, (1_000_000 if sys.argv[1] == "RLIMIT_FSIZE" else used + 160 * 2**20, before[1]))
        for size in (300_000, 65 * 2**20):
            data = b"x" * size
            assert await pool.run_sync(jobs.echo, data) == data
        resource.setrlimit(limit, before)

logging.basicConfig(format="%(message)s")
trio.run(main)
"""


@pytest.mark.parametrize(("limit", "number"), [("RLIMIT_FSIZE", errno.EFBIG), ("RLIMIT_AS", errno.ENOMEM)])
def test_limits_of_the_process(limit: str, number: int) -> None:
    """A limit to files or to addresses that the arena would pass is no error of the caller's."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIMITED, limit],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (said,) = done.stderr.splitlines()
    assert os.strerror(number) in said


# --- what is given back, and what is left ----------------------------------------------------------------------------


async def test_memory_comes_back_when_it_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An arena that one giant needed is empty again after a while, and so is what the pool kept; all works on."""
    monkeypatch.setattr(_interpreter, "KEPT_FOR", 0.05)
    async with one_worker() as pool:
        data = pattern(20 * MIB)
        line = line_of(pool.workers[0])
        arena, kept = line._arena, line._calls._decoder._kept
        spawner = pool._core._spawners[0][1]
        assert isinstance(spawner, _interpreter._PythonSpawner)
        assert arena is not None

        def is_given_back() -> bool:
            small = os.fstat(arena._fd).st_blocks * 512 <= os.sysconf("SC_PAGE_SIZE")
            return small and not kept and spawner._tidying is None

        for _ in range(2):
            # The job looks: after it, the memory may be back before the caller has its answer.
            echoed, size = await pool.run_sync(jobs.allocated, pickle.PickleBuffer(bytearray(data)))
            assert echoed == data
            assert size >= 20 * MIB
            await until(is_given_back)


async def test_memory_comes_back_from_a_busy_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker that is at work whenever one looks gives its arena back before its next job."""
    async with one_worker() as pool:
        monkeypatch.setattr(_interpreter, "KEPT_FOR", 0.2)
        assert len(await pool.run_sync(jobs.echo, bytes(20 * MIB))) == 20 * MIB
        line = line_of(pool.workers[0])
        assert line._arena is not None
        line._overdue = False
        note, go = tmp_path / "note", tmp_path / "go"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run_sync, jobs.give, MIB, str(note), str(go))
            await until(note.exists)
            assert line.shared_memory >= 20 * MIB
            await until(lambda: line._overdue)
            assert line.shared_memory >= 20 * MIB  # not under a job
            go.touch()
        await pool.run_sync(abs, -1)
        assert not line._overdue
        assert line.shared_memory == 0


async def test_descriptors_of_a_worker() -> None:
    """However often the arena grew: one for the file, one for its mapping, none of 0, 1 and 2."""
    async with one_worker() as pool:
        for size in (IN_ARENA, 2 * MIB, 5 * MIB, 20 * MIB):
            assert len(await pool.run_sync(jobs.echo, bytes(size))) == size
        numbers = await pool.run_sync(jobs.numbers_of_the_arena)
        assert len(numbers) == 2
        assert min(numbers) > 2


async def test_program_of_a_job_inherits_no_arena() -> None:
    """A program that a job starts has neither the file nor the mapping, before and after it was used."""
    async with one_worker() as pool:
        for value in (None, bytes(5 * MIB)):
            found = await pool.run_sync(jobs.descriptors_of_program, value)
            assert found
            assert not [link for link in found if "memfd" in link]


async def test_job_that_closes_the_standard_streams() -> None:
    """The arena's mapping does not move in where a job closed 0, 1 and 2 before its large answer."""
    async with one_worker() as pool:
        assert await pool.run_sync(jobs.close_standard_streams, 5 * MIB) == bytes([7]) * 5 * MIB
        assert min(await pool.run_sync(jobs.numbers_of_the_arena)) > 2
        assert await pool.run_sync(jobs.echo, bytes(9 * MIB)) == bytes(9 * MIB)


async def test_job_can_not_shrink_the_arena() -> None:
    """A job that tries gets an error, and the pool its next answers."""
    async with one_worker() as pool:
        await pool.run_sync(jobs.echo, bytes(MIB))
        assert await pool.run_sync(jobs.shrink) == errno.EPERM
        assert await pool.run_sync(jobs.echo, bytes(MIB)) == bytes(MIB)


async def test_relay_that_is_closed_closes_its_arena() -> None:
    """A worker that never came to serve leaves no arena either."""
    one, other = __import__("socket").socketpair()
    arena = Arena(_platform.HERE.shared_file())
    relay = CallRelay(one.detach(), arena, lambda where, number: None)
    assert Filling(arena, [memoryview(bytes(IN_ARENA))]).go_on()
    relay.close()
    relay.close()
    assert arena._fd == -1
    assert arena._map is None
    other.close()


@pytest.mark.slow
@pytest.mark.limit(180)
async def test_memory_is_flat() -> None:
    """Thousands of large jobs leave neither process larger than a few hundred did, beyond a tenth."""
    async with one_worker() as pool:

        async def run(jobs_: int) -> tuple[int, int]:
            data = bytes(MIB)
            for _ in range(jobs_):
                assert len(await pool.run_sync(jobs.echo, data)) == MIB
            ours, theirs = os.getpid(), pool.workers[0].pid
            assert theirs is not None
            return _platform.HERE.resident_memory(ours) or 0, _platform.HERE.resident_memory(theirs) or 0

        before = await run(500)
        after = await run(3000)
        for early, late in zip(before, after, strict=True):
            assert late < early * 1.1 + MIB
