"""The life of a worker, one task a worker, top to bottom: spawn, handshake, ready, its end, reap.

The task waits for one thing only, the end of the process. Booting is a task beside it, so that a process that dies
before it connects is noticed at once; stderr is drained in another from birth. All of it is shielded: what ends a
worker is always a signal, sent by `Pool` when the roster says so or by this task when a deadline has passed
(`Worker.kill_after`), and after SIGKILL the reap comes for certain.
"""

import logging
import os
import shutil
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

import attrs
import trio

from ._codec import Codec
from ._config import Argument, Config, available_cores, check_argv, check_env
from ._conversation import Event, Failed, Part, Refused, StopAsked
from ._errors import SpawnError, how_it_ended
from ._exchange import Ending, describe_end, judge
from ._factories import Spawner
from ._goridge import OLD_CONTROL, FrameError
from ._process import Launch
from ._relay import Line, LineEnded
from ._roster import Roster
from ._seats import GONE, STARTING, Actions, Job, Seat, TakeBack

GRACE: Final = 0.5
"""Seconds that a worker which closed its relay gets to end by itself. An exit follows the close of its descriptors
within milliseconds (the longest of 5,111 on two busy cores: 324), and without this true exit statuses would read
SIGKILL."""

HELD_UP: Final = 5.0
"""Seconds more for one that the kernel says is exiting, on a machine so busy that it has not come to its end. There is
a bound since a first thread that ends before the others looks the same."""

LONGEST_SHOWN: Final = 200
"""Characters of one argument that an error shows."""

T = TypeVar("T")

_log = logging.getLogger("trio_workers.supervision")


@attrs.define(eq=False)
class Source:
    """Where workers come from: what a roster's `Plan` stands for. `spawner` is there once the factory is open."""

    config: Config
    codec: Codec
    spawner: Spawner | None = None


class Supervision:
    """Lives the workers' lives for a pool."""

    def __init__(
        self, roster: Roster, carry_out: Callable[[Actions], None], failure: Callable[[Failed], Exception]
    ) -> None:
        self._roster = roster
        self._carry_out = carry_out
        self._failure = failure
        # Booting is mostly CPU time: more side by side than this only makes each one late.
        self._places = trio.Semaphore(2 * available_cores())

    @trio.lowlevel.enable_ki_protection
    async def supervise(self, seat: Seat) -> None:
        """Live one worker's life."""
        worker = seat.worker
        try:
            with trio.CancelScope(shield=True):
                with trio.CancelScope() as worker.boot_scope:
                    await self._places.acquire()
                if seat.state is STARTING:
                    worker.boot_scope = trio.CancelScope()
                    await self._live(seat)
                else:
                    if not worker.boot_scope.cancelled_caught:
                        self._places.release()
                    self._carry_out(self._roster.exited(seat, Ending(None)))
        except BaseException:
            # A bug, ours or a factory's, or an interrupt in a function of the user's: nobody must wait for this worker.
            await self._clear_away(seat)
            raise
        finally:
            worker.ended.set()

    async def _clear_away(self, seat: Seat) -> None:
        """End a worker whose life has failed, as far as that goes."""
        worker = seat.worker
        process = worker.process
        if seat.state is not GONE:
            self._carry_out(self._roster.kill(seat, "interrupted"))
        if process is not None:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait_exit()
        try:
            if process is not None:
                process.finish()  # what has failed once may fail again: a filter of the log, say
        finally:
            if worker.line is not None:
                worker.line.close()
            try:
                if process is not None:
                    process.reap()
            finally:
                if seat.state is not GONE:
                    self._carry_out(self._roster.exited(seat, Ending(None)))

    async def _live(self, seat: Seat) -> None:
        """Live the life of a worker that has a place to boot; give the place back when it has."""
        worker = seat.worker
        launch: Launch | None = None
        error: Exception | None = None
        try:
            launch = _describe_launch(_config(seat), seat.slot)
            with worker.boot_scope:  # a kill reaches a spawn that has not begun
                worker.process = await _spawner(seat).spawn(launch)
        except Exception as caught:
            error = caught
        finally:
            if worker.process is None:
                self._places.release()
        process = worker.process
        if process is None or launch is None:
            seat.fault = worker.failure = self._spawn_error(seat, launch, error, Ending(None))
            self._carry_out(self._roster.exited(seat, Ending(None)))
            return
        if seat.state is not STARTING:
            worker.kill_now()  # that was decided while the process came up
        async with trio.open_nursery() as tasks:
            tasks.start_soon(process.drain_stderr)
            tasks.start_soon(self._boot, seat, launch)
            await self._wait_for_end(seat)
            await self._wait_for_last_words(seat)
            self._end(seat, launch)
            tasks.cancel_scope.cancel()

    async def _wait_for_last_words(self, seat: Seat) -> None:
        """Give a relay over a stream the time to bring what the worker wrote before its end."""
        line = seat.worker.line
        if line is not None and seat.jobs:
            with trio.move_on_after(GRACE):
                await line.relay.wait_for_rest()

    @trio.lowlevel.enable_ki_protection
    async def _boot(self, seat: Seat, launch: Launch) -> None:
        """Connect and shake hands, within `boot_timeout` of the process's start."""
        worker = seat.worker
        process = worker.process
        assert process is not None
        error: Exception | None = None
        try:
            with trio.move_on_after(_config(seat).boot_timeout) as scope:
                line = await _spawner(seat).connect(process, launch)
                if seat.state is GONE:
                    line.close()  # the process ended in the same moment, and `_end` did not see this line
                    return
                worker.line = line
                if line.peer is None:
                    await line.shake_hands()
                if line.peer == os.getpid() != process.pid:
                    raise FrameError("the handshake came back as it was sent: the program echoes what it reads", b"")
            if scope.cancelled_caught:
                error = TimeoutError(f"no handshake came within boot_timeout ({_config(seat).boot_timeout:g} s)")
        except Exception as caught:  # also whatever a factory of the user's own may raise
            error = caught
        finally:
            self._places.release()
        if seat.state is GONE:
            return  # the process ended in the same moment, and what that means has been told
        if error is not None:
            seat.fault = error
            if isinstance(error, LineEnded | Refused):
                worker.kill_after(GRACE)
            else:
                worker.kill_now()
            return
        assert worker.line is not None
        if worker.line.peer != process.pid:
            _log.info("%s %d: the worker says that its pid is %d (a wrapper's child?)", launch.label, process.pid,
                      worker.line.peer, extra=extra(seat))  # fmt: skip
        self._carry_out(self._roster.ready(seat))

    async def _wait_for_end(self, seat: Seat) -> None:
        worker = seat.worker
        process = worker.process
        assert process is not None
        with worker.leash:
            await process.wait_exit()
            return
        if not seat.planned and process.is_exiting():
            with trio.move_on_after(HELD_UP):
                await process.wait_exit()
                return
        if process.peek() is not None:
            return  # in the same moment
        self._carry_out(self._roster.about_to_kill(seat))
        config = _config(seat)
        if seat.planned and config.destroy_timeout:
            _log.warning("%s[%d] %d: did not stop within destroy_timeout (%g s) and was killed", config.name,
                         seat.slot, process.pid, config.destroy_timeout, extra=extra(seat))  # fmt: skip
        worker.kill_now()
        await process.wait_exit()

    def _end(self, seat: Seat, launch: Launch) -> None:
        """Tell everybody who has to know how the process ended, and let go of everything; nothing is awaited."""
        worker = seat.worker
        process, line = worker.process, worker.line
        assert process is not None
        process.finish()
        answered: list[Job] = []
        unstarted: list[Job] = []
        if line is not None:
            line.ended = True
            if seat.ahead:
                # Twice: the first look may find answers, and for those the roster puts others into the line.
                self._carry_out([TakeBack(seat)])
                self._carry_out([TakeBack(seat)])
            line.finish()
            self._judge_jobs(seat, line, answered, unstarted)
            if line.fault is not None and seat.fault is None and seat.announced and not seat.planned:
                seat.fault = line.fault
        ending = Ending(process.peek(), process.stderr_tail)
        if not seat.announced:
            error = seat.fault if isinstance(seat.fault, Exception) else None
            if line is not None and isinstance(line.fault, Refused):
                error = line.fault  # said in its last moment
            seat.fault = worker.failure = self._spawn_error(seat, launch, error, ending)
        elif worker.killed or not seat.planned:
            worker.failure = describe_end(seat, ending)
        self._carry_out(self._roster.exited(seat, ending, answered, unstarted))
        if line is not None:
            line.close()
        process.reap()
        _log.debug("%s %d: %s", launch.label, process.pid, how_it_ended(ending.returncode), extra=extra(seat))

    def _judge_jobs(self, seat: Seat, line: Line, answered: list[Job], unstarted: list[Job]) -> None:
        """Find out what a dead worker did of the jobs it had, from what it left on the relay."""
        jobs = [*seat.jobs, *seat.ahead]
        judge(seat, line, dead=True)
        events = line.events.copy()
        if jobs:
            line.events.clear()
        if not seat.jobs and seat.cancelled is not None:
            _take_answer(events)  # to the job that it was killed for, and to none of those behind
        in_front = bool(seat.jobs)
        for job in jobs:
            taken = _take_answer(events)
            final = taken[-1] if taken and type(taken[-1]) is not Part else None
            if in_front and type(final) is not StopAsked:
                line.events.extend(taken)  # its own task takes them from there
            if type(final) is StopAsked:
                if in_front:
                    self._carry_out(self._roster.stop_requested(seat, job))
                else:
                    unstarted.append(job)
            elif final is not None:
                job.outcome = None if in_front else final
                answered.append(job)
            elif job.proof is False:
                unstarted.append(job)
            in_front = False

    def _spawn_error(self, seat: Seat, launch: Launch | None, error: Exception | None, ending: Ending) -> SpawnError:
        """Say why a worker never became ready: what was started, how far it came, what it said."""
        worker = seat.worker
        line = worker.line
        process = worker.process
        config = _config(seat)
        if process is None:
            phase = "spawn"
            if error is None:
                how = f"was not started ({seat.reason or 'closing'})"
            elif launch is None:
                how = f"could not be started, Config.command or Config.env failed: {type(error).__name__}: {error}"
            else:
                how = f"could not be started: {type(error).__name__}: {error}"
        else:
            phase = "handshake"
            if worker.killed:
                how = f"was killed before it was ready ({(seat.reason if seat.planned else _why(error)) or 'closing'})"
            else:
                how = f"{how_it_ended(ending.returncode)} before it was ready"
        if isinstance(error, Refused):
            return self._refusal(seat, how, error, ending)
        parts = [f"worker {'' if process is None else f'{process.pid} '}(slot {seat.slot}) {how}"]
        if launch is not None:
            parts.append(f"command: {_shown(launch.argv)}{_found(launch, process is None)}")
            if config.cwd is not None:
                parts.append(f"directory: {os.fsdecode(config.cwd)}")
        said = "" if line is None or seat.planned else line.first_bytes()
        if said:
            parts.append(f"first bytes on its stdout, where the handshake belongs: {said}")
        if not seat.planned and launch is not None:
            advice = _spawner(seat).advice(error) if process is not None else None
            parts.append(advice or _advice(error, process is not None, bool(said), config.protocol))
        spawn_error = SpawnError("; ".join(parts), pid=worker.pid, slot=seat.slot, returncode=ending.returncode,
                                 stderr=ending.stderr, phase=phase, started=False)  # fmt: skip
        spawn_error.__cause__ = error if process is None else None
        return spawn_error

    def _refusal(self, seat: Seat, how: str, error: Refused, ending: Ending) -> SpawnError:
        """Say what a Python child said of its own failure to become ready."""
        short, _, text = error.message.partition(b"\n\n")
        said = short.decode("utf-8", "replace")
        cause = self._failure(Failed(text, error.exception))
        spawn_error = SpawnError(
            f"worker {seat.worker.pid} (slot {seat.slot}) {how}: its initializer raised {said}",
            pid=seat.worker.pid, slot=seat.slot, returncode=ending.returncode, stderr=ending.stderr,
            phase="handshake", started=False,
        )  # fmt: skip
        spawn_error.__cause__ = cause
        return spawn_error


def _take_answer(events: deque[Event]) -> list[Event]:
    """Take the events of one job: parts, and then its end, where that has come."""
    taken: list[Event] = []
    while events:
        taken.append(events.popleft())
        if type(taken[-1]) is not Part:
            break
    return taken


def _describe_launch(config: Config, slot: int) -> Launch:
    argv = config.command
    if callable(argv):
        argv = call_user(argv, slot)
    added = config.env
    if callable(added):
        added = call_user(added, slot)
    env = {**os.environ, **check_env(added or {})}
    env["TRIO_WORKERS_SLOT"] = str(slot)
    env["TRIO_WORKERS_PROTOCOL"] = config.protocol
    return Launch(
        argv=check_argv(argv),
        env=env,
        cwd=config.cwd,
        slot=slot,
        label=f"{config.name}[{slot}]",
        protocol=config.protocol,
        max_frame_size=config.max_frame_size,
        boot_timeout=config.boot_timeout,
    )


def _config(seat: Seat) -> Config:
    source: Source = seat.plan.source
    return source.config


def _spawner(seat: Seat) -> Spawner:
    source: Source = seat.plan.source
    assert source.spawner is not None
    return source.spawner


def extra(seat: Seat) -> dict[str, object]:
    """What every log record about a worker carries."""
    return {"pool": _config(seat).name, "slot": seat.slot, "pid": seat.worker.pid, "reason": seat.reason}


@trio.lowlevel.disable_ki_protection
def call_user(function: Callable[..., T], *args: object) -> T:
    """Call a function of the user's, who may press Ctrl-C to leave it."""
    return function(*args)


def _why(error: Exception | None) -> str:
    if error is None:
        return ""
    if isinstance(error, FrameError):
        return error.reason  # the bytes are shown beside it
    return "it closed its relay" if isinstance(error, LineEnded) else str(error)


def _shown(argv: tuple[Argument, ...]) -> str:
    # An argument may be a whole program.
    return repr(
        [text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..." for text in map(os.fsdecode, argv)]
    )


def _found(launch: Launch, not_started: bool) -> str:
    program = os.fsdecode(launch.argv[0])
    path = shutil.which(program, path=launch.env.get("PATH"))
    if path is None:
        missing = (
            "does not exist, or is not executable"
            if os.path.dirname(program)
            else "is not to be found on PATH, or not executable"
        )
        return f" ({program!r} {missing})" if not_started else ""
    return f" (found as {path})" if path != program else ""


def _advice(error: Exception | None, ran: bool, said: bool, protocol: str) -> str:
    if not ran:
        return "check that the program exists, is executable, and that the directory does"
    if isinstance(error, FrameError) and error.received:
        spoken = {0x13: "goridge-3", OLD_CONTROL: "goridge-1 or goridge-2"}.get(error.received[0])
        if spoken is not None and protocol not in spoken:
            return f"these bytes are a handshake in {spoken}, but Config.protocol is {protocol!r}"
    if said:
        return (
            "a worker must write nothing to stdout but its relay's frames; let it write to stderr, or print after serve"
        )
    if isinstance(error, TimeoutError):
        return (
            f"does the program speak {protocol} (Config.protocol) on the relay that RR_RELAY names? "
            "If it only needs longer, raise boot_timeout"
        )
    return (
        f"run the command by hand to see why it ends; it should wait for a handshake in {protocol}, "
        "the dialect that Config.protocol names"
    )
