#!/usr/bin/env python3
"""A worker in Python. It speaks the three dialects: see `trio_workers.child` for where it finds its relay.

It takes a job's body as an instruction, which is what the tests need of a worker.
"""

import itertools
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator

from trio_workers.child import STOP_REQUEST, Job, Reply, serve


def handle(job: Job) -> bytes | Reply | Iterator[Reply]:
    """Answer one job. Whatever is raised becomes a job error: the job failed, the worker is fine."""
    body, context = job.body, job.context
    if context == b"echo":
        return Reply(body, context)
    word, space, text = body.partition(b" ")
    match word + b" *" if space else word:
        case b"upper *":
            return Reply(text.upper(), context)
        case b"fail":
            raise RuntimeError("told to fail")
        case b"fail *":
            raise RuntimeError(text.decode())
        case b"stop":
            return STOP_REQUEST  # "replace me": the job counts as not run, another worker gets it
        case b"pid":
            return Reply(b"%d" % os.getpid(), context)
        case b"slot":
            return Reply(os.environ.get("TRIO_WORKERS_SLOT", "").encode(), context)
        case b"exit *":
            os._exit(int(text))
        case b"kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case b"print":
            print("hello from print")  # does no harm: it goes to stderr
            return Reply(b"printed", context)
        case b"stderr *":
            print(text.decode(errors="backslashreplace"), file=sys.stderr, flush=True)
            return Reply(b"ok", context)
        case b"sleep *":
            time.sleep(float(text))
            return Reply(b"slept", context)
        case b"stream *":
            return parts(range(int(text)), context)
        case b"streamforever":
            return parts(itertools.count(), context)
        case b"streamfail *":
            return parts(range(int(text)), context, "told to fail")
        case _:
            pass
    return Reply(body, context)


def parts(numbers: Iterable[int], context: bytes, failure: str | None = None) -> Iterator[Reply]:
    """Stream one part for each number; each is on its way before the next one is made."""
    for number in numbers:
        yield Reply(b"part %d" % number, context)
    if failure is not None:
        raise RuntimeError(failure)


if __name__ == "__main__":
    serve(handle)
