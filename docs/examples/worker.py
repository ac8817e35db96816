"""The smallest worker: it answers with what it got, in capitals."""

from trio_workers.child import serve

serve(lambda job: job.body.upper())
