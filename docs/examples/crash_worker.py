"""The worker of crash.py: it divides, fails where it can't, and dies when told to."""

import os
import sys

from trio_workers.child import Job, serve


def divide(job: Job) -> bytes:
    if job.body == b"die":
        print("out of paper", file=sys.stderr)
        os._exit(3)
    return b"%d" % (12 // int(job.body))


serve(divide)
