"""A progress bar, where a terminal can show one."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]

_EVERY = 50  # steps between two looks at the bar


@contextmanager
def progress_bar(
    wanted: bool | None, total: int, what: str = "fit", every: int = _EVERY
) -> Iterator[Callable[[int, float], None]]:
    """A bar on a terminal, nothing elsewhere.

    Arguments:
        wanted: whether to show it; ``None`` where stderr is a terminal.
        total: steps in all.
        what: its title.
        every: steps between two looks at it.

    Returns:
        What tells it of a step and of the loss there, NaN for none.
    """
    if wanted not in (None, True, False):
        raise TypeError(f"progress: expected True, False or None, got {wanted!r}")
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda step, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}")
    columns = (TextColumn(what), BarColumn(), text, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def tick(step: int, loss: float) -> None:
            if step % every == 0:
                told = f"step {step}  ELBO {-loss:.1f}" if math.isfinite(loss) else f"{step}"
                bar.update(task, completed=step, description=told)

        yield tick
