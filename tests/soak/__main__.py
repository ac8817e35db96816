"""The command: `python -m tests.soak --minutes 3 --seed 17 [--only KIND] [--json FILE]`."""

import argparse
import random
import sys
from pathlib import Path

import trio

from tests.soak import report
from tests.soak.kinds import KINDS
from tests.soak.storm import Result, run_storm


def main() -> None:
    """Run storms over all kinds, or one, and exit with 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Pools of every kind in a storm.")
    parser.add_argument("--minutes", type=float, default=1.0, help="for all kinds together")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind; may be given several times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    chosen = arguments.only or KINDS
    seconds = 60 * arguments.minutes / len(chosen)
    print(f"seed {arguments.seed}, {seconds:.1f} s for each of {len(chosen)} kinds", flush=True)
    results: list[Result] = []
    for kind in chosen:
        results.append(trio.run(run_storm, kind, arguments.seed, seconds))
        print(report.show(results[-1]), flush=True)
        for complaint in results[-1].complaints:
            print(f"  ! {complaint}", flush=True)
    print(f"\n{report.tables(results)}")
    if arguments.json is not None:
        arguments.json.write_text(report.as_json(results, arguments.minutes), encoding="utf-8")
    if any(result.complaints for result in results):
        sys.exit(f"\nnot all promises were kept; again: python -m tests.soak --seed {arguments.seed} --minutes ...")


if __name__ == "__main__":
    main()
