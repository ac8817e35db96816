"""Log records of jobs, with their level, logger and time, in the log of the pool's program."""

import json
import logging
import sys

import trio

from trio_workers import open_python_pool

LONGEST_LINE = 4096  # bytes: the pool cuts what is longer
MARK = "job_logging"


# In the workers: each record is one line of JSON on stderr.


class LineFormatter(logging.Formatter):
    """One line a record, in ASCII and short enough to arrive whole: the middle of what is too long is left out."""

    def format(self, record: logging.LogRecord) -> str:
        text = shown = super().format(record)  # with the traceback, if there is one
        while len(line := encode(record, shown)) > LONGEST_LINE:
            half = len(shown) * LONGEST_LINE // (len(line) + 200) // 2
            shown = f"{text[:half]} [...] {text[-half:]}"
        return line


def encode(record: logging.LogRecord, text: str) -> str:
    return json.dumps({MARK: [record.levelno, record.name[-200:], record.created, text]})


def log_to_the_pool(level: int) -> None:
    """The initializer of the pool."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(handlers=[handler], level=level, force=True)


# In the pool's program: such a line becomes a record again; every other one stays what it is.


class JobRecords(logging.Filter):
    """For the logger `trio_workers.worker`: a job's record goes on to the logger it was made for, and by its level."""

    def filter(self, record: logging.LogRecord) -> bool:
        fields = {name: getattr(record, name, None) for name in ("pool", "slot", "pid")}
        line = record.getMessage().removeprefix("{pool}[{slot}] {pid}: ".format_map(fields))
        if not line.startswith(f'{{"{MARK}": ['):
            return True
        try:
            ((level, name, created, text),) = json.loads(line).values()
            logger = logging.getLogger(name)
            made = logger.makeRecord(name, int(level), "", 0, "%s", (text,), None)
            made.created, made.msecs = float(created), float(created) % 1 * 1000
        except Exception:  # a job may print what only looks like one
            return True
        vars(made).update(fields)
        if logger.isEnabledFor(made.levelno):
            logger.handle(made)
        return False


log = logging.getLogger("invoices")


def print_invoice(number: int) -> float:
    log.debug("the printer is warm")
    log.info("invoice %d", number)
    print("a line by print")
    try:
        return 1 / (7 - number)
    except ZeroDivisionError:
        log.exception("no ink for invoice %d", number)
        return 0.0


async def main() -> None:
    async with open_python_pool(
        num_workers=1, name="printers", initializer=log_to_the_pool, initargs=(logging.DEBUG,)
    ) as pool:
        await pool.run_sync(print_invoice, 7)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="%(levelname)-7s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("trio_workers.worker").addFilter(JobRecords())
    trio.run(main)
