"""Benchmarks: latentlab side by side with its peers, in one process, taking turns.

``python -m tests.benchmarks`` lists them, ``python -m tests.benchmarks NAME`` runs one, from the
root of the repository. A benchmark is a module here with a function ``run() -> Table``. They are
no tests: nothing here is collected.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

__all__ = ["Table", "Timing", "machine", "take_turns"]


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one figure for each turn."""

    seconds: Sequence[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    def times(self, other: Timing) -> Timing:
        """How many times as long as another one, turn by turn."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return Timing([mine / theirs for mine, theirs in pairs])


def take_turns(
    candidates: Mapping[str, Callable[[int], object]],
    *,
    turns: int = 15,
    seconds: float = 0.1,
) -> dict[str, Timing]:
    """Time several candidates in turn, so that a busy moment of the machine hits all of them.

    Arguments:
        candidates: name -> a function that does the work as many times as it is told.
        turns: how often each one is timed.
        seconds: how long it works in a turn, about.

    Returns:
        Name -> CPU seconds of this process for one piece of work.
    """
    calls, found = {}, {name: [] for name in candidates}
    for name, work in candidates.items():
        first = _seconds(work, 1)  # the first calls are slower
        tries = 10 if first < seconds else 1
        work(tries)
        calls[name] = max(1, round(seconds / _seconds(work, tries)))
    for _ in range(turns):
        for name, work in candidates.items():
            found[name].append(_seconds(work, calls[name]))
    return {name: Timing(values) for name, values in found.items()}


def _seconds(work: Callable[[int], object], calls: int) -> float:
    begin = time.process_time()
    work(calls)
    return (time.process_time() - begin) / calls


def machine(*packages: str) -> list[str]:
    """The processor, the system and the versions of packages, as lines of text."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":")[1].strip() if models else cpu
    python = f"Python {platform.python_version()}"
    return [
        f"{cpu}, {platform.system()} {platform.machine()}",
        ", ".join([python, *(f"{name} {version(name)}" for name in packages)]),
    ]


@dataclass(frozen=True)
class Table:
    """The outcome of a benchmark, as Markdown.

    Arguments:
        title: what was measured, in one line.
        notes: how, and on what machine.
        columns: their headings; the first is that of the cases.
        rows: cells as text.
    """

    title: str
    notes: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        cells = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        first, *others = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"# {self.title}", "", *notes, "", first, rule, *others, ""])
