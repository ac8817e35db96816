"""The worker of lease.py: it keeps a sum from job to job, so who uses it wants it alone."""

from trio_workers.child import Job, serve

total = 0


def add(job: Job) -> bytes:
    global total
    total = 0 if job.body == b"reset" else total + int(job.body)
    return b"%d" % total


serve(add)
