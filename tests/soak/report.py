"""The figures of storms: as tables for people, as JSON for the docs."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import attrs

from tests.soak.storm import Result

MIB = 1024 * 1024


def show(result: Result) -> str:
    """Say in one line what became of a storm."""
    broken = f"{len(result.complaints)} promises broken" if result.complaints else "nothing broken"
    return (
        f"{result.kind:<26} {result.jobs:>7,} jobs in {result.took:>5.1f} s, {result.rounds} rounds, "
        f"{result.exits.total():>5,} workers, memory {result.growth / MIB:>+6.1f} MiB, "
        f"{result.ahead:>6,} seen ahead: {broken}"
    )


def tables(results: Sequence[Result]) -> str:
    """Show how jobs ended, what they did, and what was done to the pools, over all kinds."""
    return "\n\n".join(
        _table(title, sum((getattr(result, field) for result in results), Counter[str]()))
        for title, field in (
            ("jobs by their ending", "endings"),
            ("jobs that began, by what they did", "deeds"),
            ("what was done from outside", "troubles"),
            ("workers, by the reason of their end", "exits"),
        )
    )


def as_json(results: Sequence[Result], minutes: float) -> str:
    """Return all figures as JSON."""
    figures: dict[str, Any] = {
        "minutes": minutes,
        "seed": results[0].seed if results else None,
        "jobs": sum(result.jobs for result in results),
        "broken": sum(len(result.complaints) for result in results),
        "kinds": {result.kind: attrs.asdict(result) for result in results},
    }
    return json.dumps(figures, indent=1, sort_keys=True)


def _table(title: str, figures: Counter[str]) -> str:
    rows = [f"  {name:<34} {count:>9,}" for name, count in sorted(figures.items())]
    return "\n".join([f"{title}:", *rows, f"  {'in all':<34} {figures.total():>9,}"])
