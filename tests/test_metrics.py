"""Metrics: what a scrape says is what the pools and their observers counted, in whatever thread it comes."""

import json
import re
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from prometheus_client import CollectorRegistry, Metric, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from tests.support import ROOT, release, until
from tests.test_docs import table
from tests.test_public import python
from trio_workers import (
    Config,
    JobError,
    JobRecord,
    Payload,
    Pool,
    QueueFull,
    Worker,
    WorkerCrashed,
    WorkerEvent,
    metrics,
    open_pool,
    open_python_pool,
)
from trio_workers.child import Job
from trio_workers.metrics import OUTCOMES, REASONS, STATES, PoolCollector
from trio_workers.testing import Crash, MemoryFactory
from trio_workers.tracing import traced

STATIC: Final = ROOT / "docs" / "_static"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    """Read an exposition as Prometheus' own parser does: each sample by its name and labels, each of them once."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples
            samples[key] = sample.value
    return samples


def scrape(*collectors: PoolCollector) -> Samples:
    """Read collectors in this thread, by way of the text."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return parse(generate_latest(registry).decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    """One sample, by its name without the prefix."""
    return samples[f"trio_workers_{name}", frozenset(labels.items())]


def by(samples: Samples, name: str, label: str) -> dict[str, float]:
    """The samples of a metric that are not 0, by one label."""
    found = {dict(labels)[label]: figure for (its, labels), figure in samples.items() if its == f"trio_workers_{name}"}
    return {key: figure for key, figure in found.items() if figure}


async def answer(job: Job) -> bytes:
    """Do as the body says."""
    if job.body == b"crash":
        raise Crash(3)
    if job.body == b"fail":
        raise ValueError("no")
    if job.body == b"nap":
        await trio.sleep(2)
    if job.body == b"hang":
        await trio.sleep_forever()
    return job.body


def config(**more: object) -> Config:
    """Describe a pool inside this process."""
    return Config(**{"command": ["none"], "num_workers": 1, "factory": MemoryFactory(answer), **more})  # type: ignore[arg-type]


class Observers:
    """What a pool tells its observers, counted."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.created = 0
        self.waited = self.ran = 0.0
        self.with_worker = 0

    def see_job(self, record: JobRecord) -> None:
        """Count a job."""
        self.outcomes[record.outcome] += 1
        self.waited += (record.ended if record.started is None else record.started) - record.queued
        if record.started is not None:
            self.with_worker += 1
            self.ran += record.ended - record.started

    def see_worker(self, event: WorkerEvent, worker: Worker | None, context: object) -> None:
        """Count what happens to a worker."""
        self.created += event is WorkerEvent.CREATED
        if event is WorkerEvent.DESTRUCT:
            self.reasons[str(context)] += 1

    def check(self, samples: Samples) -> None:
        """All that was counted is in the metrics."""
        jobs = self.outcomes.total()
        assert by(samples, "jobs_total", "outcome") == self.outcomes
        assert by(samples, "worker_exits_total", "reason") == self.reasons
        assert by(samples, "worker_starts_total", "pool") == {"pool": self.created}
        assert value(samples, "job_wait_seconds_count", pool="pool") == jobs - self.outcomes["queue_full"]
        assert value(samples, "job_run_seconds_count", pool="pool") == self.with_worker
        assert value(samples, "job_wait_seconds_sum", pool="pool") == pytest.approx(self.waited)
        assert value(samples, "job_run_seconds_sum", pool="pool") == pytest.approx(self.ran)


async def a_thousand_jobs(pool: Pool, crash: bytes, fail: bytes, hang: bytes) -> Counter[str]:
    """Run a thousand jobs by ten callers; return what those saw."""
    seen: Counter[str] = Counter()

    async def run(numbers: Iterable[int]) -> None:
        for number in numbers:
            what = crash if number % 40 == 7 else fail if number % 10 == 3 else hang if number % 50 == 9 else b"say"
            with trio.CancelScope() as scope:
                if what == hang:
                    scope.deadline = trio.current_time() + 0.02  # while it waits, or while it runs
                try:
                    await pool.exec(Payload(what))
                    seen["replied"] += 1
                except JobError:
                    seen["failed"] += 1
                except WorkerCrashed:
                    seen["crashed"] += 1
            seen["cancelled"] += scope.cancelled_caught

    async with trio.open_nursery() as nursery:
        for first in range(10):
            nursery.start_soon(run, range(first, 1000, 10))
    return +seen


# what the counters say


async def test_a_thousand_jobs_in_memory(autojump_clock: object) -> None:
    """After a thousand jobs with crashes, failures and cancels the counters equal what observers and callers saw."""
    told = Observers()
    async with open_pool(config(num_workers=4), observer=told.see_worker, job_observer=told.see_job) as pool:
        collector = PoolCollector(pool)
        seen = await a_thousand_jobs(pool, b"crash", b"fail", b"hang")
        await until(lambda: pool.statistics().idle == 4)  # one that never came up is told of by no event
    assert seen == told.outcomes
    assert (seen.total(), seen["crashed"], seen["failed"], seen["cancelled"]) == (1000, 25, 100, 20)
    told.check(scrape(collector))


@pytest.mark.limit(180)
async def test_a_thousand_jobs_of_processes() -> None:
    """The same, with real processes."""
    told = Observers()
    async with open_pool(release("one", num_workers=4), observer=told.see_worker, job_observer=told.see_job) as pool:
        collector = PoolCollector(pool)
        seen = await a_thousand_jobs(pool, b"exit 3", b"env NOT_THERE", b"hang")
        assert seen == told.outcomes
        assert (seen.total(), seen["crashed"], seen["failed"], seen["cancelled"]) == (1000, 25, 100, 20)
        await until(lambda: pool.statistics().idle == 4 == len(pool.workers))
        told.check(scrape(collector))
        if sys.platform == "linux":
            memory = by(scrape(collector), "worker_memory_bytes", "slot")
            assert set(memory) == {"0", "1", "2", "3"}
            assert min(memory.values()) > 1 << 20
    told.check(scrape(collector))


def double(number: int) -> int:
    """Be quick, so that many calls make one chunk; fail now and then."""
    if number % 100 == 42:
        raise ValueError(number)
    return 2 * number


async def test_each_call_of_a_map_counts() -> None:
    """Calls that go to a worker many at a time are counted one by one, failed ones apart."""
    told = Observers()
    async with open_python_pool(2, observer=told.see_worker, job_observer=told.see_job) as pool:
        collector = PoolCollector(pool)
        async with pool.map(double, range(1000), return_exceptions=True) as results:
            assert len([result async for result in results]) == 1000
        samples = scrape(collector)
    assert by(samples, "jobs_total", "outcome") == {"replied": 990, "failed": 10} == told.outcomes
    assert value(samples, "job_wait_seconds_count", pool="pool") == 1000


async def test_all_that_can_happen_is_there_from_the_beginning(autojump_clock: object) -> None:
    """Each outcome, reason and state has its sample before it has happened: `rate` sees no first step."""
    async with open_pool(config()) as pool:
        samples = scrape(PoolCollector(pool))
    assert {dict(labels)["outcome"] for name, labels in samples if name.endswith("jobs_total")} == set(OUTCOMES)
    assert {dict(labels)["reason"] for name, labels in samples if name.endswith("exits_total")} == set(REASONS)
    assert {dict(labels)["state"] for name, labels in samples if name.endswith("_workers")} == set(STATES)


@pytest.mark.parametrize(("listed", "column"), [(OUTCOMES, "outcome"), (REASONS, "reason")])
def test_lists_are_those_of_the_reference(listed: tuple[str, ...], column: str) -> None:
    """What may happen is what the reference says, which is what the code does."""
    assert listed == tuple(table("docs/reference.md", "The pool's statistics", column))


async def test_gauges(autojump_clock: object) -> None:
    """Workers by state, callers that wait, and for how long."""
    async with open_pool(config(num_workers=2)) as pool, trio.open_nursery() as nursery:
        collector = PoolCollector(pool)
        assert value(scrape(collector), "workers", pool="pool", state="idle") == 2
        async with pool.lease():
            for _ in range(3):
                nursery.start_soon(pool.exec, Payload(b"nap"))
            await until(lambda: pool.statistics().waiting == 2)
            await trio.sleep(1)
            samples = scrape(collector)
        assert by(samples, "workers", "state") == {"busy": 1, "leased": 1}
        assert value(samples, "workers_target", pool="pool") == 2
        assert value(samples, "jobs_waiting", pool="pool") == 2
        assert value(samples, "longest_wait_seconds", pool="pool") == pytest.approx(1, abs=0.5)


async def test_a_closed_pool(autojump_clock: object) -> None:
    """It keeps its counters, and its gauges are 0, until it is removed."""
    async with open_pool(config(num_workers=2)) as pool:
        collector = PoolCollector(pool)
        await pool.exec(Payload(b"one"))
    samples = scrape(collector)
    assert by(samples, "jobs_total", "outcome") == {"replied": 1}
    assert by(samples, "worker_exits_total", "reason") == {"closing": 2}
    assert by(samples, "workers", "state") == {}
    for gauge in ("workers_target", "jobs_waiting", "longest_wait_seconds"):
        assert value(samples, gauge, pool="pool") == 0
    collector.remove(pool)
    assert scrape(collector) == {}


async def test_a_job_that_found_the_queue_full_has_not_waited(autojump_clock: object) -> None:
    """It is counted, and is no wait of 0 seconds, which would make the others look short."""
    async with open_pool(config(max_queue=0)) as pool, trio.open_nursery() as nursery:
        collector = PoolCollector(pool)
        nursery.start_soon(pool.exec, Payload(b"nap"))
        await until(lambda: pool.statistics().busy == 1)
        with pytest.raises(QueueFull):
            await pool.exec(Payload(b"nap"))
        await until(lambda: pool.statistics().busy == 0)
        samples = scrape(collector)
    assert by(samples, "jobs_total", "outcome") == {"replied": 1, "queue_full": 1}
    assert value(samples, "job_wait_seconds_count", pool="pool") == 1


async def test_two_workers_in_one_slot(autojump_clock: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one replaces the other there is one sample for the slot, of the memory of both."""
    monkeypatch.setattr(metrics, "memory_of", lambda worker: 100)
    ready = trio.Event()

    async def boot(slot: int) -> None:
        if len(pool_of) and slot == 0:
            await ready.wait()

    pool_of: list[Pool] = []
    async with open_pool(config(factory=MemoryFactory(answer, boot=boot))) as pool, trio.open_nursery() as nursery:
        collector = PoolCollector(pool)
        pool_of.append(pool)
        assert by(scrape(collector), "worker_memory_bytes", "slot") == {"0": 100}
        nursery.start_soon(pool.reset)
        await until(lambda: len(pool.workers) == 2)
        assert by(scrape(collector), "worker_memory_bytes", "slot") == {"0": 200}
        ready.set()


# which pools


async def test_several_pools(autojump_clock: object) -> None:
    """Pools come and go, each under the name that it had when it came."""
    async with open_pool(config(name="one")) as one, open_pool(config(name="two")) as two:
        collector = PoolCollector(one)
        collector.add(two)
        assert repr(collector) == "<PoolCollector: 'one', 'two'>"
        await one.reset(config(name="renamed"))
        await two.exec(Payload(b"ok"))
        samples = scrape(collector)
        assert value(samples, "jobs_total", pool="one", outcome="replied") == 0
        assert value(samples, "jobs_total", pool="two", outcome="replied") == 1
        collector.remove(one)
        assert by(scrape(collector), "workers_target", "pool") == {"two": 1}
        with pytest.raises(ValueError, match="is not in this collector"):
            collector.remove(one)
        collector.add(one)
        assert by(scrape(collector), "workers_target", "pool") == {"two": 1, "renamed": 1}


async def test_names_must_differ(autojump_clock: object) -> None:
    """Two pools of one name could not be told apart; the error says what to do, and the first stays."""
    async with open_pool(config()) as one, open_pool(config()) as two:
        with pytest.raises(ValueError, match=r"another pool in this collector is called 'pool' too, .*Config\.name"):
            PoolCollector(one, two)
        assert one._core.exchange.tell is None  # nobody has the collector that could not be made
        collector = PoolCollector(one)
        with pytest.raises(ValueError, match="the pool 'pool' is in this collector already"):
            collector.add(one)
        with pytest.raises(ValueError, match="is called 'pool' too"):
            collector.add(two)
        assert two._core.exchange.tell is None
        assert by(scrape(collector), "workers_target", "pool") == {"pool": 1}


async def test_one_that_is_traced_is_the_same_pool(autojump_clock: object) -> None:
    """It is added once and removed once, by either of its names."""
    async with open_pool(config()) as pool:
        collector = PoolCollector(pool)
        with pytest.raises(ValueError, match="the pool 'pool' is in this collector already"):
            collector.add(traced(pool))
        collector.remove(traced(pool))
        assert pool._core.exchange.tell is None
        with pytest.raises(ValueError, match="is not in this collector"):
            collector.remove(pool)
        with pytest.raises(TypeError, match="must be a Pool or a PythonPool, not NoneType"):
            collector.remove(None)  # type: ignore[arg-type]


async def test_one_registry_takes_one_collector(autojump_clock: object) -> None:
    """A second one is refused at once, also where neither has a pool yet."""
    registry = CollectorRegistry()
    registry.register(PoolCollector())
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(PoolCollector())
    names = {family.name for family in PoolCollector().describe()}
    assert names == {family.name for family in PoolCollector().collect()}
    assert "trio_workers_jobs" in names


async def test_jobs_cost_nothing_more_when_nobody_counts(autojump_clock: object) -> None:
    """The durations of jobs are kept as long as one collector has the pool, once for all of them."""
    async with open_pool(config()) as pool:
        assert pool._core.exchange.tell is None
        first, second = PoolCollector(pool), PoolCollector(pool)
        await pool.exec(Payload(b"ok"))
        first.remove(pool)
        await pool.exec(Payload(b"ok"))
        assert value(scrape(second), "job_run_seconds_count", pool="pool") == 2
        second.remove(pool)
        assert pool._core.exchange.tell is None


async def test_what_is_no_pool() -> None:
    """It is named."""
    with pytest.raises(TypeError, match="pool must be a Pool or a PythonPool, not str"):
        PoolCollector("pool")  # type: ignore[arg-type]


# in other threads


def read_over_http(port: int) -> Samples:
    """Scrape as Prometheus does."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        return parse(response.read().decode())


def check_histograms(samples: Samples) -> None:
    """Buckets rise, and the last of them is the count."""
    for name in ("job_wait_seconds", "job_run_seconds"):
        buckets = {
            float(dict(labels)["le"]): figure
            for (its, labels), figure in samples.items()
            if its == f"trio_workers_{name}_bucket"
        }
        counts = [buckets[bound] for bound in sorted(buckets)]
        assert counts == sorted(counts)
        assert counts[-1] == value(samples, f"{name}_count", pool="pool")


async def test_scrapes_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """While jobs end, scrapes by a thread's server are each of one moment, and none sees less than the one before."""
    monkeypatch.setattr(metrics, "PATIENCE", 30.0)
    async with open_python_pool(2) as pool:
        registry = CollectorRegistry()
        registry.register(PoolCollector(pool))
        server, thread = start_http_server(0, "127.0.0.1", registry)
        try:
            async with trio.open_nursery() as nursery:

                async def work() -> None:
                    while True:
                        await pool.run_sync(abs, -1)

                for _ in range(4):
                    nursery.start_soon(work)
                last = 0.0
                for _ in range(20):
                    samples = await trio.to_thread.run_sync(read_over_http, server.server_port)
                    check_histograms(samples)
                    replied = value(samples, "jobs_total", pool="pool", outcome="replied")
                    assert replied == value(samples, "job_run_seconds_count", pool="pool") >= last
                    last = replied
                nursery.cancel_scope.cancel()
        finally:
            server.shutdown()
            server.server_close()
            await trio.to_thread.run_sync(thread.join)


def test_a_scrape_after_the_run() -> None:
    """When trio.run is over, what the pool was last is told, in any thread."""

    async def main() -> PoolCollector:
        async with open_pool(config()) as pool:
            collector = PoolCollector(pool)
            await pool.exec(Payload(b"ok"))
        return collector

    collector = trio.run(main)
    results: list[Samples] = [scrape(collector)]
    thread = threading.Thread(target=lambda: results.append(scrape(collector)))
    thread.start()
    thread.join()
    assert results[0] == results[1]
    assert by(results[1], "jobs_total", "outcome") == {"replied": 1}


async def test_trio_that_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape does not wait for ever for a thread that does not answer, and says whose it is."""
    monkeypatch.setattr(metrics, "PATIENCE", 0.01)
    errors: list[BaseException] = []
    async with open_pool(config()) as pool:
        collector = PoolCollector(pool)

        def attempt() -> None:
            try:
                collector.collect()
            except TimeoutError as error:
                errors.append(error)

        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()  # as a program should not: nothing else runs in trio meanwhile
        await trio.lowlevel.checkpoint()
    (error,) = errors
    assert "the trio thread of the pool 'pool' has not answered for 0.01 s" in str(error)


async def test_an_error_while_reading_is_the_scrapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes out of the scrape, and the run goes on."""

    def fail(worker: Worker) -> int:
        raise OSError("no /proc here")

    async with open_pool(config()) as pool:
        collector = PoolCollector(pool)
        monkeypatch.setattr(metrics, "memory_of", fail)
        with pytest.raises(OSError, match="no /proc here"):
            await trio.to_thread.run_sync(collector.collect)
        await pool.exec(Payload(b"ok"))


def test_a_pool_is_added_in_its_own_thread() -> None:
    """Outside trio the pool's run can't be known."""
    kept: list[Pool] = []

    async def main() -> None:
        async with open_pool(config()) as pool:
            kept.append(pool)

    trio.run(main)
    with pytest.raises(RuntimeError, match="in its own trio thread"):
        PoolCollector(*kept)


# what goes with it


def test_missing_extra() -> None:
    """Without prometheus-client one sentence names the extra."""
    said = python(
        "import sys; sys.modules['prometheus_client'] = None\n"
        "try: import trio_workers.metrics\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert said == (
        "trio_workers.metrics needs prometheus-client, which comes with: pip install 'trio_workers[metrics]'\n"
    )


def sample_names() -> set[str]:
    """Every name that an exposition has."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    families: Iterator[Metric] = iter(PoolCollector().describe())
    return {family.name + suffix for family in families for suffix in suffixes.get(family.type, ("",))}


def names_in(text: str) -> set[str]:
    """Each name of a metric of ours in a text."""
    return set(re.findall(r"\btrio_workers_\w+", text))


def expressions(panels: list[dict[str, Any]]) -> list[str]:
    """What the panels of the dashboard ask for."""
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_dashboard() -> None:
    """It is JSON with what Grafana needs, asks for metrics that exist, by a data source and pools that are chosen."""
    text = (STATIC / "grafana-dashboard.json").read_text(encoding="utf-8")
    dashboard = json.loads(text)
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= set(dashboard)
    assert {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]} == {
        "datasource": "datasource",
        "pool": "query",
    }
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == 8
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["title"] and panel["description"]
        assert all('pool=~"$pool"' in expression for expression in expressions([panel]))
    shown = names_in("\n".join(expressions(panels)))
    assert shown <= sample_names()
    # All that there is is shown, but for sums and counts.
    assert {name for name in sample_names() if not name.endswith(("_sum", "_count"))} == shown
    for quantile in ("0.5", "0.99"):
        assert text.count(f"histogram_quantile({quantile}, ") == 2


def test_alert_rules() -> None:
    """Each has a name of its own, a severity and a summary, and asks for metrics, outcomes and reasons that exist."""
    text = (STATIC / "alerts.yml").read_text(encoding="utf-8")
    assert "\t" not in text
    rules = re.split(r"^      - alert: ", text, flags=re.MULTILINE)[1:]
    names = [rule.splitlines()[0] for rule in rules]
    assert len(set(names)) == len(names) >= 6
    for rule in rules:
        assert re.search(r"^        expr: (\||\S)", rule, re.MULTILINE)
        assert re.search(r"^          severity: (warning|critical)$", rule, re.MULTILINE)
        assert re.search(r'^          summary: "[^"\n]*\{\{ \$labels\.pool \}\}[^"\n]*"$', rule, re.MULTILINE)
        assert rule.count("(") == rule.count(")")
    used = names_in(text)
    assert used <= sample_names()
    for label, known in (("outcome", OUTCOMES), ("reason", REASONS), ("state", STATES)):
        for values in re.findall(rf'\b{label}=~?"([^"]+)"', text):
            assert set(values.split("|")) <= set(known)


def test_the_page_names_each_metric() -> None:
    """The docs have each metric in their table, and no other."""
    page = Path(ROOT, "docs", "metrics.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(trio_workers_\w+)` \|", page, re.MULTILINE))
    ends = {"counter": "_total"}
    assert listed == {family.name + ends.get(family.type, "") for family in PoolCollector().describe()}


async def test_memory_is_not_asked_of_those_that_are_gone(autojump_clock: object) -> None:
    """A worker inside this process has no memory of its own, and no sample."""
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        collector = PoolCollector(pool)
        nursery.start_soon(partial(pool.exec, Payload(b"nap")))
        await until(lambda: pool.statistics().busy == 1)
        assert by(scrape(collector), "worker_memory_bytes", "slot") == {}
