"""The worker of service.py: it answers with the release it is, after a moment's work."""

import os
import time

from trio_workers.child import Job, serve

RELEASE = os.environ["RELEASE"]
if RELEASE == "broken":
    raise SystemExit("no such model: large-3")


def answer(job: Job) -> bytes:
    time.sleep(0.02)
    if RELEASE == "crashing":
        os._exit(3)
    return RELEASE.encode()


serve(answer)
