"""Is a worker program right? One check after the other, each on a process of its own.

A pool says that a worker is broken; this says what is broken about it. What it sees it judges by the
protocol alone: a worker may answer any of the jobs with a job error, and that is as good as a reply.

How a check knows that there was *one* answer: it ends the worker and reads its relay to the end. So no verdict hangs on
a guess of how long to wait for more; only "it does not answer" and "it does not leave" are judged by the clock.
"""

import functools
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal, TypeVar

import attrs
import trio

from . import _identity
from ._check_session import Answer, Place, Session, Wrong, listen, relay_of, run_session, show_tail
from ._config import Config, check_argv
from ._conversation import Failed, StopAsked
from ._diagnosis import sentence, show, speaks
from ._errors import how_it_ended
from ._goridge import PROTOCOLS

T = TypeVar("T")

Verdict = Literal["ok", "wrong", "note", "not tried"]

BIG: Final = 1024 * 1024
"""Bytes of the big body: several times what a pipe or a socket holds."""

OVER_A_PIPE: Final = 100_000
"""Bytes of the other big body: more than a pipe holds by default (65,536), so that reads and writes come out short."""

SLOW_START: Final = 2.0
"""Seconds to a handshake that are worth a note: each replacement takes as long."""

LONGEST_SPLIT: Final = 4096
"""Bytes of a body that is sent byte by byte: a second, where each is waited for."""

ADVICE: Final = {
    "empty body": "An empty body is a body like another: answer it. In PHP an empty string is false: "
    "compare with !== null.",
    "big bodies": "A large frame takes several reads, and an answer several writes: read until all of the bytes that "
    "the header announces are there, and write until all are gone.",
    "binary body": "A body is bytes: read and write in binary (no text mode, no encoding, no line ends), and report a "
    "body that the job can't take as a job error.",
    "payload in pieces": "One read does not get everything: it returns what has arrived. Read until there are as many "
    "bytes as the header announces.",
    "header in pieces": "One read does not get everything: it returns what has arrived. Read until there are as many "
    "bytes as a header has.",
}
"""What to mend where a probe finds a fault that the other jobs did not show."""

LATE: Final = "What was printed before, and lay in a buffer, comes out at the end too."

CONTEXT: Final = b"trio-workers-check-context"
BODY: Final = b"trio-workers check"


@attrs.frozen(kw_only=True)
class Finding:
    """What one check found.

    `verdict` is "ok", "wrong", "note" (no fault, but worth knowing) or "not tried". `found` says what was seen, `mend`
    what to do about it; it is empty where nothing is to be done.
    """

    name: str
    verdict: Verdict
    found: str = ""
    mend: str = ""


@attrs.frozen(kw_only=True)
class Report:
    """What all checks found, in the order in which they were made."""

    command: tuple[str, ...]
    protocol: str
    relay: str
    findings: tuple[Finding, ...]

    @property
    def right(self) -> bool:
        """Whether no check found anything wrong."""
        return all(finding.verdict != "wrong" for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)


async def check_worker(
    config: Config,
    *,
    jobs: Sequence[bytes] = (),
    expect: Sequence[bytes] = (),
    failing_job: bytes | None = None,
    big: int = BIG,
    tell: Callable[[Finding], object] = lambda finding: None,
) -> Report:
    """Start the worker program of a configuration some fifteen times, and report whether it is right.

    `jobs` are bodies that it is known to take; the first of them is the body of all probes that need one. `expect` are
    the replies to them, in the same order, as far as they are known. `failing_job` is a body that it answers with a job
    error. `big` is the size of the big body in bytes. `tell` is called with each finding as it is made.

    Of `config` these count: `command`, `env` and `cwd` (of slot 0), `protocol`, `factory` (a `PipeFactory` or a
    `SocketFactory`), `max_frame_size`, `boot_timeout` for the handshake, `destroy_timeout` for leaving, and
    `limits.exec_ttl` for an answer (5 seconds where that is None).

    Raise TypeError for another factory, ValueError for more `expect` than `jobs` or a `big` that no frame can hold, and
    `OSError` where an address can't be listened to. A program that can't be started is a finding. Can be cancelled; no
    process is left, however it ends.
    """
    relay = relay_of(config)
    if len(expect) > len(jobs):
        raise ValueError(f"more replies to expect ({len(expect)}) than jobs ({len(jobs)}); each belongs to a job")
    if not 0 < big <= config.max_frame_size - len(CONTEXT):
        raise ValueError(f"big must be from 1 to max_frame_size ({config.max_frame_size:,}) bytes, not {big:,}")
    argv = check_argv(config.command(0) if callable(config.command) else config.command)
    async with listen(config.factory) as place:
        checker = _Checker(config, relay, place, tuple(jobs), tuple(expect), failing_job, big, tell)
        await checker.run()
    return Report(
        command=tuple(os.fsdecode(argument) for argument in argv),
        protocol=config.protocol,
        relay=relay,
        findings=tuple(checker.findings),
    )


# the checks


_Check = Callable[[Session], Awaitable[Finding]]


class _Checker:
    """All checks of one program, in their order."""

    def __init__(
        self,
        config: Config,
        relay: str,
        place: Place | None,
        jobs: tuple[bytes, ...],
        expect: tuple[bytes, ...],
        failing_job: bytes | None,
        big: int,
        tell: Callable[[Finding], object],
    ) -> None:
        self.findings: list[Finding] = []
        self._config = config
        self._relay = relay
        self._place = place
        self._jobs = jobs
        self._expect = expect
        self._failing_job = failing_job
        self._big = big
        self._tell = tell
        self._limiter = trio.CapacityLimiter(1)
        self._body = jobs[0] if jobs else BODY
        self._leaves_by: Literal["stop", "end", "kill"] = "kill"  # until a check has found how it leaves
        self._echo = False  # whether it answers with the body it got
        self._first: Answer | None = None
        self._stray: Wrong | None = None  # what was seen on stdout that is no frame
        self._stderr = ""

    async def run(self) -> None:
        handshake = await self._check_start()
        if not handshake:
            return
        answers = await self._check_jobs()
        await self._check_stop(answers)
        await self._check_end(answers)
        probes: dict[str, _Check] = {
            "several jobs": self._several,
            "context": self._context,
            "empty body": self._empty,
            "big bodies": self._big_bodies,
            "binary body": self._binary,
            "payload in pieces": self._payload_in_pieces,
            "header in pieces": self._header_in_pieces,
        }
        if self._failing_job is not None:
            probes["job error"] = self._job_error
        why = "" if answers else "It does not answer jobs as it should: mend that first."
        for name, check in probes.items():
            if why:
                self._add(name, "not tried", why)
            elif not await self._probe(name, check) and name == "several jobs":
                why = "Mend `several jobs` first."
        if self._failing_job is None:
            self._add("job error", "not tried", "Name a job that it reports as failed: --failing-job TEXT.")
        if self._stderr:
            self._add(
                "stderr",
                "note",
                f"It writes to stderr without being asked: {show_tail(self._stderr)}",
                "That is allowed: it goes to the log, each line as a warning.",
            )
        else:
            self._add("stderr", "ok", "Silent.")

    def _add(self, name: str, verdict: Verdict, found: str, mend: str = "") -> None:
        finding = Finding(name=name, verdict=verdict, found=found, mend=mend)
        self.findings.append(finding)
        self._tell(finding)

    def _skip(self, why: str, *names: str) -> None:
        for name in names:
            if name == "stdout" and self._stray is not None:
                self._add(name, "wrong", self._stray.found, self._stray.mend)
            else:
                self._add(name, "not tried", why)

    # a process for each

    async def _run(self, check: Callable[[Session], Awaitable[T]], protocol: str | None = None) -> T:
        """Start a process and run a check on it. Raise `Wrong` or `OSError`; the process is gone afterwards."""
        return await run_session(self._config, protocol or self._config.protocol, self._place, self._limiter, check)

    async def _probe(self, name: str, check: _Check) -> bool:
        """Run a check on a process that has shaken hands, and note what it found; return whether that was right."""

        async def shaken(session: Session) -> Finding:
            await session.shake_hands()
            finding = await check(session)
            await self._settle(session)
            return finding

        try:
            finding = await self._run(shaken)
        except (Wrong, OSError) as error:
            finding = _finding(name, error)
            if isinstance(error, Wrong) and error.cause != "stray" and name in ADVICE:
                finding = attrs.evolve(finding, mend=ADVICE[name])
        self._add(name, finding.verdict, finding.found, finding.mend)
        return finding.verdict != "wrong"

    async def _settle(self, session: Session) -> None:
        """End the worker, and raise where it had more answers than jobs. What it prints is another check's business."""
        await session.leave(by=self._leaves_by)
        if session.fault is not None and session.diagnose().kind != "stray":
            session.judge()

    # start and handshake

    async def _check_start(self) -> bool:
        claimed = pid = 0
        known = False
        seconds = 0.0

        async def start(session: Session) -> None:
            nonlocal claimed, pid, known, seconds
            began = trio.current_time()
            pid = session.process.pid
            claimed = await session.shake_hands()
            seconds = trio.current_time() - began
            known = _identity.claimed_group(claimed, {pid}) is not None

        wrong: Wrong | OSError | None = None
        try:
            await self._run(start)
        except (Wrong, OSError) as error:
            wrong = error
        others = ("job", "stop", "stdout", "end of relay", "several jobs", "context", "empty body", "big bodies",
                  "binary body", "payload in pieces", "header in pieces", "job error", "stderr")  # fmt: skip
        if isinstance(wrong, OSError):
            finding = _finding("start", wrong)
            self._add("start", "wrong", finding.found, finding.mend)
            self._skip("It does not start.", "handshake", *others)
            return False
        if wrong is not None:
            spoken = await self._try_other_dialects(wrong)
            if spoken is None and wrong.cause == "died":
                self._add("start", "wrong", wrong.found, wrong.mend)
                self._skip("It does not start.", "handshake", *others)
                return False
            self._add("start", "ok", "It starts.")
            if spoken is not None:
                diagnosis = speaks(spoken)
                wrong = Wrong("dialect", f"{diagnosis.found[:-1]}, not {self._config.protocol}.", diagnosis.mend)
            self._add("handshake", "wrong", wrong.found, wrong.mend)
            if wrong.cause == "stray":
                self._stray = wrong
            self._skip("Mend the handshake first.", *others)
            return False
        if seconds > SLOW_START:
            self._add(
                "start",
                "note",
                f"It took {seconds:.1f} s to its handshake.",
                "Each replacement takes as long. A pool starts it ahead, but `Config.boot_timeout` must be longer.",
            )
        else:
            self._add("start", "ok", f"Ready after {seconds:.2f} s.")
        if known:
            whose = "its own" if claimed == pid else "of its process group"
            self._add("handshake", "ok", f"In {self._config.protocol}; the pid it says, {claimed}, is {whose}.")
            return True
        found = f"It says that it is pid {claimed}; it is {pid}."
        if self._place is None:
            self._add(
                "handshake",
                "note",
                found,
                "Send the pid of the worker's own process. Over pipes a pool only logs that, since a worker behind ssh "
                "or in a container can't know; over a socket it refuses.",
            )
            return True
        self._add("handshake", "wrong", found, "Send the pid of the worker's own process: getpid(), not a constant.")
        self._skip("Over a socket a pool refuses a worker with another pid.", *others)
        return False

    async def _try_other_dialects(self, wrong: Wrong) -> str | None:
        """Return the dialect in which it does shake hands."""
        if wrong.cause in ("stray", "unconnected", "deaf", "buffered", "handshake"):
            return None  # the dialect is not what is the matter

        async def start(session: Session) -> None:
            await session.shake_hands()

        for protocol in PROTOCOLS:
            if protocol == self._config.protocol:
                continue
            try:
                await self._run(start, protocol)
            except (Wrong, OSError):
                continue
            return protocol
        return None

    # jobs

    async def _check_jobs(self) -> bool:
        """Check the jobs that were named, or a job of our own, each on a fresh process."""
        first = True
        for number, body in enumerate(self._jobs or (BODY,)):
            name = "job" if len(self._jobs) < 2 else f"job {number + 1}"
            if not first and self._first is None:
                self._add(name, "not tried", "Mend the first job first.")
                continue

            async def ask(session: Session, name: str = name, number: int = number, body: bytes = body) -> Finding:
                answer = await session.ask(body)
                if number == 0:
                    replies = [answer.body]
                    try:  # once more: what it wrote behind the first answer stands before the second
                        replies.append((await session.ask(body)).body)
                    except Wrong as wrong:
                        if wrong.cause in ("stray", "size", "frame", "checksum", "dialect"):
                            raise Wrong(wrong.cause, f"After an answer: {wrong.found}", wrong.mend) from None
                    self._first = answer
                    self._echo = all(reply is not None and reply.lower() == body.lower() for reply in replies)
                said = f"{show(body)}: {answer}."
                if number < len(self._expect) and answer.body != self._expect[number]:
                    return Finding(
                        name=name, verdict="wrong", found=said, mend=f"Expected {show(self._expect[number])}."
                    )
                if isinstance(answer.end, Failed) and self._jobs:
                    return Finding(
                        name=name,
                        verdict="note",
                        found=said,
                        mend="A job error is a right answer; with a job that it takes, the probes say more.",
                    )
                return Finding(name=name, verdict="ok", found=said)

            await self._probe_only(name, ask)
            first = False
        return self._first is not None

    async def _probe_only(self, name: str, check: _Check) -> None:
        """Run a check on a process that has shaken hands, and note what it found; the process is killed after it."""

        async def shaken(session: Session) -> Finding:
            await session.shake_hands()
            return await check(session)

        try:
            finding = await self._run(shaken)
        except (Wrong, OSError) as error:
            if isinstance(error, Wrong) and error.cause == "stray":
                self._stray = error
            finding = _finding(name, error)
        self._add(name, finding.verdict, finding.found, finding.mend)

    async def _check_stop(self, answers: bool) -> None:
        """Check how it leaves on the stop frame, and that it wrote frames alone until then."""
        died = False

        async def stop(session: Session, jobs: int) -> Finding:
            nonlocal died
            await session.shake_hands()
            try:
                for _ in range(jobs):
                    await session.ask(self._body)
            except Wrong as wrong:
                if wrong.cause != "answers":  # those don't keep it from leaving
                    died = True
                    return Finding(name="stop", verdict="not tried", found=wrong.found)
            began = trio.current_time()
            status = await session.leave(by="stop")
            seconds = trio.current_time() - began
            self._stderr = session.process.stderr_tail
            if status is not None:
                self._leaves_by = "stop"
            if session.fault is not None and (found := session.diagnose()).kind == "stray":
                self._stray = Wrong("stray", f"As it ended: {found.found}", f"{found.mend} {LATE}")
            if status is None:
                answered = ""
                if session.fault is not None and session.diagnose().kind == "answers":
                    answered = " It answered it like a job."
                return Finding(
                    name="stop",
                    verdict="wrong",
                    found=f"It ignored the stop frame: {session.leave_within:g} s later it still ran.{answered}",
                    mend='On the control frame {"stop":true} leave the loop and exit with status 0. A pool kills it '
                    "after `Config.destroy_timeout`.",
                )
            if status != 0:
                said = f" Its last words on stderr: {show_tail(self._stderr)}" if self._stderr else ""
                return Finding(
                    name="stop",
                    verdict="wrong",
                    found=f"On the stop frame it {how_it_ended(status)}.{said}",
                    mend="Leave the loop and exit with status 0: another status is taken for a fault.",
                )
            return Finding(name="stop", verdict="ok", found=f"It ended by itself in {seconds:.2f} s, with status 0.")

        try:
            finding = await self._run(functools.partial(stop, jobs=2 if answers else 0))
            if died:
                finding = await self._run(functools.partial(stop, jobs=0))
        except (Wrong, OSError) as error:
            finding = _finding("stop", error)
        self._add("stop", finding.verdict, finding.found, finding.mend)
        if self._stray is not None:
            self._add("stdout", "wrong", self._stray.found, self._stray.mend)
        elif answers:
            self._add("stdout", "ok", "Frames alone, from the handshake to the end.")
        else:
            self._add("stdout", "not tried", "Mend the answers to jobs first.")

    async def _check_end(self, answers: bool) -> None:
        async def end(session: Session) -> Finding:
            await session.shake_hands()
            if answers:
                await session.ask(self._body)
            began = trio.current_time()
            status = await session.leave(by="end")
            if status is not None and self._leaves_by == "kill":
                self._leaves_by = "end"
            seconds = trio.current_time() - began
            if status is None:
                return Finding(
                    name="end of relay",
                    verdict="wrong",
                    found=f"It ran on for {session.leave_within:g} s after the end of its relay.",
                    mend="A read that returns nothing is the end: leave the loop and exit. Or it outlives its pool, "
                    "and may spin.",
                )
            if status != 0:
                return Finding(
                    name="end of relay",
                    verdict="note",
                    found=f"It {how_it_ended(status)} at the end of its relay.",
                    mend="Better exit with status 0: the end of the relay is one way to be told to leave.",
                )
            return Finding(name="end of relay", verdict="ok", found=f"It ended by itself in {seconds:.2f} s.")

        try:
            finding = await self._run(end)
        except (Wrong, OSError) as error:
            finding = _finding("end of relay", error)
        self._add("end of relay", finding.verdict, finding.found, finding.mend)

    # probes

    async def _several(self, session: Session) -> Finding:
        name = "several jobs"
        bodies = [self._body, BODY + b" two", BODY + b" three", self._body]
        answers: list[Answer] = []
        for number, body in enumerate(bodies):
            try:
                answers.append(await session.ask(body))
            except Wrong as wrong:
                if wrong.cause in ("died", "closed") and number:
                    raise Wrong(
                        "died",
                        wrong.found.replace("the job", f"job {number + 1}"),
                        "After an answer read the next job: the loop ends on the stop frame or the end of the relay. "
                        '(To be replaced, answer with an empty body and the context {"stop":true}.)',
                    ) from None
                raise
            if isinstance(answers[-1].end, StopAsked):
                return Finding(name=name, verdict="ok", found=f"It asked to be replaced at job {number + 1}.")
        if self._echo:
            for number, (body, answer) in enumerate(zip(bodies, answers, strict=True)):
                others = {other.lower() for other in bodies} - {body.lower()}
                if answer.body is not None and answer.body.lower() in others:
                    return Finding(
                        name=name,
                        verdict="wrong",
                        found=f"Job {number + 1} was {show(body)}, and its answer {show(answer.body)}.",
                        mend="Each job gets its own answer, in the order of the jobs, and nothing of one may be left "
                        "for the next.",
                    )
        return Finding(name=name, verdict="ok", found=f"{len(bodies)} jobs, {len(answers)} answers.")

    async def _context(self, session: Session) -> Finding:
        name = "context"
        first = await session.ask(self._body, CONTEXT)
        second = await session.ask(self._body)
        plain = second.body if second.body is not None else b""
        if first.body is not None and not first.context and (CONTEXT + plain).lower() == first.body.lower():
            return Finding(
                name=name,
                verdict="wrong",
                found=f"The context stands in front of the body that came back: {show(first.body)}.",
                mend="A job is context and body: in goridge-3 the header's option says how long the context is, in the "
                "older dialects it is a frame of its own.",
            )
        if CONTEXT in second.context or (CONTEXT in plain and self._echo):
            return Finding(
                name=name,
                verdict="wrong",
                found=f"A job without context came back with that of the job before: {show(second.context or plain)}.",
                mend="Forget the context with its job.",
            )
        if isinstance(first.end, Failed):
            came = f"The answer is a {first}."
        elif first.context == CONTEXT:
            came = "It came back as it was."
        elif first.context:
            came = f"Another came back: {show(first.context)}."
        else:
            came = "None came back, which is as good."
        return Finding(name=name, verdict="ok", found=came)

    async def _empty(self, session: Session) -> Finding:
        name = "empty body"
        old = self._config.protocol != "goridge-3"
        try:
            with_context = await session.ask(b"", CONTEXT)
        except Wrong as wrong:
            if old and wrong.cause == "died" and session.process.peek() == 0:
                return Finding(
                    name=name,
                    verdict="note",
                    found="It exited with status 0 on an empty body, as PHP's usual loop does.",
                    mend="`while ($body = $worker->receive($context))` ends on '' and on '0': compare with !== null, "
                    "or never send such bodies.",
                )
            raise
        if isinstance(with_context.end, StopAsked):
            return Finding(name=name, verdict="ok", found="It asked to be replaced.")
        try:
            await session.ask(b"")
        except Wrong as wrong:
            if wrong.cause == "died" and session.process.peek() == 0:
                return Finding(
                    name=name,
                    verdict="note",
                    found=f"With a context: {with_context}. Without one it exited with status 0, as RoadRunner's PHP "
                    "workers do.",
                    mend="Don't send jobs that are empty in both, or go on with the next job.",
                )
            raise
        return Finding(name=name, verdict="ok", found=f"{sentence(str(with_context))}.")

    async def _big_bodies(self, session: Session) -> Finding:
        name = "big bodies"
        said: list[str] = []
        for size in (OVER_A_PIPE, self._big):
            if size > self._config.max_frame_size:
                continue
            body = (b"".join(b"%08d" % number for number in range(size // 8 + 1)))[:size]
            try:
                answer = await session.ask(body)
            except Wrong as wrong:
                raise Wrong(wrong.cause, f"With a body of {size:,} bytes: {wrong.found}", wrong.mend) from None
            cut = answer.body is not None and 1024 < len(answer.body) < size and body.startswith(answer.body)
            if cut or (self._echo and not self._jobs and answer.body is not None and answer.body != body):
                return Finding(
                    name=name,
                    verdict="wrong",
                    found=f"Of {size:,} bytes came back {len(answer.body or b''):,}, and not the same.",
                    mend=ADVICE[name],
                )
            kind = "an error" if isinstance(answer.end, Failed) else f"{len(answer.body or b''):,} bytes"
            said.append(f"{size:,} bytes: {kind}")
        await self._once_more(session, "the big bodies")
        return Finding(name=name, verdict="ok", found=f"{'; '.join(said)} came back.")

    async def _binary(self, session: Session) -> Finding:
        body = bytes(range(256)) + b"\r\n\0\xff"
        try:
            answer = await session.ask(body)
        except Wrong as wrong:
            raise Wrong(wrong.cause, f"With a body of all 256 bytes: {wrong.found}", wrong.mend) from None
        got = answer.body
        if got is not None and got != body:
            for mangled, how in _manglings(body):
                if mangled != body and got.lower() == mangled.lower():
                    return Finding(
                        name="binary body",
                        verdict="wrong",
                        found=f"{len(body)} bytes came back as {len(got)}: {how}.",
                        mend=ADVICE["binary body"],
                    )
        await self._once_more(session, "binary bytes")
        return Finding(name="binary body", verdict="ok", found=_kind(answer))

    async def _payload_in_pieces(self, session: Session) -> Finding:
        answer = await self._in_pieces(session, "payload")
        return Finding(name="payload in pieces", verdict="ok", found=_kind(answer))

    async def _header_in_pieces(self, session: Session) -> Finding:
        name = "header in pieces"
        try:
            answer = await self._in_pieces(session, "header")
        except Wrong as wrong:
            if self._relay not in ("pipes", "socketpair"):
                raise
            return Finding(
                name=name,
                verdict="note",
                found=wrong.found,
                mend="Over pipes a pool writes each header in one piece, so this does no harm (PHP's goridge needs "
                "it so). Over a socket the worker must read until all of a header is there.",
            )
        return Finding(name=name, verdict="ok", found=_kind(answer))

    async def _in_pieces(self, session: Session, which: Literal["header", "payload"]) -> Answer:
        body = self._body if len(self._body) <= LONGEST_SPLIT else BODY
        try:
            answer = await session.ask(body, CONTEXT, split=which)
            if (
                self._echo
                and body is self._body
                and answer.body is not None
                and not answer.body.lower().endswith(body.lower())
            ):
                raise Wrong("short", f"The answer to {show(body)} was {show(answer.body)}.", "")
            await self._once_more(session, f"a {which} in pieces")
        except Wrong as wrong:
            raise Wrong(wrong.cause, f"With the {which} byte by byte: {wrong.found}", "") from None
        return answer

    async def _once_more(self, session: Session, after: str) -> None:
        """Ask for a small job: what a worker has left unread of the one before stands in its way."""
        try:
            answer = await session.ask(self._body)
        except Wrong as wrong:
            raise Wrong(wrong.cause, f"The job after {after}: {wrong.found}", wrong.mend) from None
        if self._echo and answer.body is not None and answer.body.lower() != self._body.lower():
            raise Wrong(
                "short",
                f"The job after {after} was {show(self._body)}, and its answer {show(answer.body)}.",
                "Read until there are as many bytes as the frame has, and answer once.",
            )

    async def _job_error(self, session: Session) -> Finding:
        name = "job error"
        assert self._failing_job is not None
        answer = await session.ask(self._failing_job)
        if not isinstance(answer.end, Failed):
            return Finding(
                name=name,
                verdict="wrong",
                found=f"{show(self._failing_job)}: {answer}.",
                mend="An error frame was expected: in goridge-3 the flag 0x40 and no option, in the older dialects the "
                "flags 0x1c and no second frame.",
            )
        try:
            await session.ask(self._body)
        except Wrong as wrong:
            raise Wrong(
                wrong.cause,
                f"After the job error: {wrong.found}",
                "A job error is an answer like another: go on with the next job, and write no reply behind it.",
            ) from None
        return Finding(name=name, verdict="ok", found=f"{show(self._failing_job)}: {answer}; it serves on.")


def _manglings(body: bytes) -> list[tuple[bytes, str]]:
    """Return what becomes of bytes that are taken for text, and how."""
    text = body.decode("utf-8", "replace")
    return [
        (text.encode(), "what is no UTF-8 was replaced"),
        (text.encode("ascii", "replace"), "what is no ASCII was replaced"),
        (body.decode("utf-8", "ignore").encode(), "what is no UTF-8 was left out"),
        (body.decode("latin-1").encode(), "each byte was taken for a character, and written as UTF-8"),
        (body.replace(b"\r\n", b"\n"), "line ends were changed"),
        (body.replace(b"\r\n", b"\n").replace(b"\r", b"\n"), "line ends were changed"),
        (body.replace(b"\n", b"\r\n"), "line ends were changed"),
        (body.strip(), "it was stripped"),
        (body.replace(b"\0", b""), "the NUL bytes are missing"),
        (body.partition(b"\0")[0], "it ends at the NUL byte"),
    ]


def _kind(answer: Answer) -> str:
    if isinstance(answer.end, Failed):
        return "Answered with a job error."
    return "It asked to be replaced." if isinstance(answer.end, StopAsked) else "Answered."


def _finding(name: str, error: Wrong | OSError) -> Finding:
    if isinstance(error, Wrong):
        return Finding(name=name, verdict="wrong", found=error.found, mend=error.mend)
    where = f": {error.filename}" if error.filename else ""
    return Finding(
        name=name,
        verdict="wrong",
        found=f"It can't be started ({error.strerror or error}{where}).",
        mend="Is the program installed and on PATH, executable, and the directory (--cwd) there?",
    )
