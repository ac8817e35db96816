"""The storm: pools of every kind under jobs that do all that a job can do, and under whatever else may happen.

`python -m tests.soak --minutes 3 --seed 17` runs it, `nox -s soak -- 3 17` does so in an environment of its own, and
`tests/test_soak.py` is the little of it that runs with the tests.

Many callers hand in jobs at once: replies, failures, crashes of every sort, hanging, garbage, floods. They cancel some
before, during and at the end. In some kinds crowds of them have jobs that take microseconds, so that jobs lie ahead of
their turn. Meanwhile workers are killed and stopped from outside, and the pool is resized and reset.
Workers and callers write what happens to a *ledger*; at the end the ledger tells whether every promise was kept.

| module | what it is |
|---|---|
| `ledger.py` | the append-only file, as workers and callers write it |
| `instructions.py` | what a job is told to do and what it answers, as both sides know it |
| `acts.py` | what a job does to the process that it runs in |
| `worker.py` | the command worker, in every dialect |
| `jobs.py` | the same for Python functions |
| `plan.py` | which jobs there are, and how each may end |
| `kinds.py` | which kinds of pool there are, and what is drawn of each |
| `targets.py` | one face for pools of commands and of functions |
| `callers.py` | those who hand in jobs |
| `trouble.py` | what happens to a pool from outside |
| `audit.py` | reading the ledger |
| `host.py` | processes, descriptors, memory |
| `storm.py` | a storm over one kind of pool, round by round |
| `report.py` | the figures, as tables and as JSON |

The first five are imported by workers, which must start fast: standard library only, and little of that.
"""
