"""Metrics of a pool for Prometheus, served by a thread; at the end the program scrapes itself."""

import os
import urllib.request

import trio
from prometheus_client import CollectorRegistry, start_http_server

from trio_workers import WorkerCrashed, open_python_pool
from trio_workers.metrics import PoolCollector


def divide(number: int) -> float:
    return 12 / number


async def work(pool) -> None:
    async with pool.map(divide, range(5), return_exceptions=True) as quotients:
        print([quotient if isinstance(quotient, float) else repr(quotient) async for quotient in quotients])
    try:
        await pool.run_sync(os._exit, 3)
    except WorkerCrashed as error:
        print(type(error).__name__)


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        return response.read().decode()


async def main() -> None:
    async with open_python_pool(2, name="divisions") as pool:
        registry = CollectorRegistry()
        registry.register(PoolCollector(pool))
        # Port 0 is any that is free; yours is the one that Prometheus knows.
        server, thread = start_http_server(0, "127.0.0.1", registry)
        try:
            await work(pool)
            text = await trio.to_thread.run_sync(scrape, server.server_port)
        finally:
            server.shutdown()
            server.server_close()
            await trio.to_thread.run_sync(thread.join)
    shown = ("trio_workers_jobs_total", "trio_workers_workers_target", "trio_workers_job_wait_seconds_count")
    for line in text.splitlines():
        if line.startswith(shown) and not line.endswith(" 0.0"):
            print(line)


if __name__ == "__main__":
    trio.run(main)
