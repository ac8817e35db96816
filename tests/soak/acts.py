"""What a job may do to the process it runs in, whatever kind of worker that is."""

import os
import time

TYPE_CHECKING = False  # to import it takes longer than all else here
if TYPE_CHECKING:
    from tests.soak.ledger import Ledger

BEAT = 0.05
"""Seconds between two beats: how exactly the ledger shows when a long job came to its end."""

FLOOD = 256 * 1024
"""Bytes to stderr: four times what a pipe holds, so that a job hangs where nobody drains it."""


FAT = 192 * 1024 * 1024
"""Bytes: more than any other job needs, and not more than a small machine has for a few of them."""


def leave_no_core_files() -> None:
    """Let a crash write nothing to the disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def spend(ledger: "Ledger", id_: int, seconds: float) -> None:
    """Take some time, and show that the job still runs."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(BEAT, left))
        if left > BEAT:
            ledger.note("beat", id_)


def hang(ledger: "Ledger", id_: int) -> None:
    """Never come back."""
    spend(ledger, id_, float("inf"))


def grow_fat(ledger: "Ledger", id_: int) -> None:
    """Take a lot of memory, really, and never give it back."""
    taken = b"x" * FAT
    hang(ledger, id_)
    del taken


def turn_deaf() -> None:
    """Ignore every signal that can be ignored."""
    import signal

    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):  # the C library keeps those two to itself
            signal.signal(number, signal.SIG_IGN)


def end_the_process(do: str, how: str) -> None:
    """Exit, crash or be killed."""
    import signal

    if do == "exit":
        os._exit(int(how))
    elif do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "pointer":
        import ctypes

        ctypes.string_at(0)
    else:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)  # a signal that one sends oneself may take a moment


def flood_stderr() -> None:
    """Write more to stderr than a pipe holds: lines, a line without end, and what is no text."""
    data = b"a line of a flood\n" * 1000
    while len(data) < FLOOD:
        data += bytes(range(11, 256)) * 100
    while data:
        data = data[os.write(2, data) :]


def leave_a_child() -> None:
    """Leave a process behind that holds every descriptor open and never ends by itself."""
    if os.fork() == 0:
        while True:
            time.sleep(60)
