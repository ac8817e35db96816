"""The pool's log and your own, as JSON lines by structlog."""

import logging
import os
import sys
from typing import Any

import structlog
import trio

from trio_workers import WorkerCrashed, open_python_pool

log = structlog.stdlib.get_logger("invoices")


def tidy(_logger: object, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    """Leave out what stands in fields of its own already, and a reason that is none."""
    worker = f"{event.get('pool')}[{event.get('slot')}] {event.get('pid')}: "
    event["event"] = str(event["event"]).removeprefix(worker)
    return {name: value for name, value in event.items() if (name, value) != ("reason", "")}


def configure_logging() -> None:
    everyone = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            *everyone,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            # For what comes from the standard library's logging, the pool's log among it. It belongs to no request, so
            # no context variables are merged into it.
            foreign_pre_chain=[*everyone, structlog.stdlib.ExtraAdder(["pool", "slot", "pid", "reason"])],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                tidy,
                structlog.processors.dict_tracebacks,
                structlog.processors.EventRenamer("message"),
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO)


def print_invoice(number: int) -> str:
    if number == 7:
        print("out of paper")
        os._exit(3)
    return f"invoice {number}"


async def main() -> None:
    async with open_python_pool(num_workers=1, name="printers") as pool:
        for number in (6, 7):
            with structlog.contextvars.bound_contextvars(invoice=number):
                try:
                    log.info("printed", result=await pool.run_sync(print_invoice, number))
                except WorkerCrashed as error:
                    log.error("lost", slot=error.slot, pid=error.pid, phase=error.phase, returncode=error.returncode)


if __name__ == "__main__":
    configure_logging()
    trio.run(main)
