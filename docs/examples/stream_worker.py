"""The worker of stream.py: it counts, one part of its reply after the other."""

from collections.abc import Iterator

from trio_workers.child import Job, serve


def count(job: Job) -> Iterator[bytes]:
    for number in range(1, int(job.body) + 1):
        yield b"%d" % number


serve(count)
