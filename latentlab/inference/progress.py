"""A progress bar, where a terminal can show one."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(wanted: bool | None, total: int) -> Iterator[Callable[[int, float], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if wanted not in (None, True, False):
        raise TypeError(f"progress: expected True, False or None, got {wanted!r}")
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda step, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}")
    columns = (TextColumn("fit"), BarColumn(), text, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def tick(step: int, loss: float) -> None:
            if step % 50 == 0 and math.isfinite(loss):
                bar.update(task, completed=step, description=f"step {step}  ELBO {-loss:.1f}")

        yield tick
