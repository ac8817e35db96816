"""Traces of jobs: a span for each, and a span of the function's own in the worker, in one trace."""

import logging

import trio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

from trio_workers import open_python_pool
from trio_workers.tracing import traced


def set_up(where: str) -> None:
    """Have spans printed, one on a line; a real program has an exporter for OTLP here."""

    def show(span) -> str:
        return f"{where}: {span.name}, in the trace {span.context.trace_id:032x}\n"

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter(formatter=show)))
    trace.set_tracer_provider(provider)


def resize(picture: str) -> str:
    with trace.get_tracer("pictures").start_as_current_span(f"resize {picture}"):
        return f"{picture}, smaller"


async def main() -> None:
    set_up("program")
    # The initializer runs in the worker, which needs a provider of its own. What it prints goes to the pool's log.
    async with open_python_pool(1, initializer=set_up, initargs=("worker",)) as plain:
        pool = traced(plain)
        with trace.get_tracer("pictures").start_as_current_span("a request"):
            print(await pool.run_sync(resize, "mountain.jpg"))
    # The worker has sent what was left when it was stopped, by the SDK's own exit handler.
    trace.get_tracer_provider().shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    trio.run(main)
