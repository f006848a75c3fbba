"""What is shown: the answer on standard output, all else on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid

from latentlab.cli.wording import as_options

if TYPE_CHECKING:
    import pandas as pd
    from rich.status import Status

    import latentlab as ll

__all__ = [
    "busy",
    "console",
    "show",
    "show_json",
    "show_line",
    "show_pairs",
    "show_summary",
    "show_verdict",
    "show_warning",
]

_STYLE = {"use": "bold green", "use with care": "bold yellow", "do not use": "bold red"}
_ROWS_SHOWN = 30


def show_json(value: dict[str, Any]) -> None:
    """One JSON object, a number that is not finite as null."""

    def finite(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    sys.stdout.write(json.dumps(finite(value), indent=2) + "\n")  # JSON has no NaN, but null


def console(*, stderr: bool = False) -> Console:
    """Texts are the user's own: nothing in them is taken for markup or coloured."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def busy(what: str) -> Status:
    """A spinner on a terminal, nothing elsewhere."""
    return console(stderr=True).status(what)


def show_line(message: str, code: int = 0) -> int:
    """A message as one line on standard error; returns the exit code."""
    sys.stderr.write(f"latentlab: {' '.join(message.split())}\n")
    return code


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:  # noqa: ANN401
    """A warning as one line on standard error."""
    show_line(as_options(f"warning: {message}"))


def show(text: str) -> None:
    """A line on standard output."""
    console().print(text, soft_wrap=True)


def show_verdict(verdict: ll.Verdict) -> None:
    """The level, the reasons and what to try."""
    console().print(verdict.level, style=_STYLE[verdict.level])
    grid = Grid.grid(padding=(0, 2))
    for word, lines in (("why", verdict.reasons), ("try", verdict.next_steps)):
        for line in lines:
            grid.add_row(f"  {word}", as_options(line))
    console().print(grid)
    show("")


def show_pairs(pairs: Mapping[str, str]) -> None:
    """Names and values in two columns."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        show(f"  {name:<{width}}  {value}")


def show_summary(summary: pd.DataFrame, file: str) -> None:
    """Mean, sd and 90 % interval of each number."""
    grid = Grid(box=None, padding=(0, 2), header_style="bold")
    for name in ("site", "index", "mean", "sd", "5 %", "95 %"):
        grid.add_column(name, justify="left" if name in ("site", "index") else "right")
    for row in summary.head(_ROWS_SHOWN).to_dict("records"):
        numbers = (_rounded(row[name], row["sd"]) for name in ("mean", "sd", "q05", "q95"))
        grid.add_row(row["site"], row["index"], *numbers)
    console().print(grid)
    if len(summary) > _ROWS_SHOWN:
        show(f"  ... and {len(summary) - _ROWS_SHOWN} more in {file}")
    show("")


def _rounded(value: float, sd: float) -> str:
    """To two digits of the standard deviation, however far from zero the value is."""
    if not (sd > 0 and value != 0 and math.isfinite(value)):
        return f"{value:.4g}"
    digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(sd)) + 2
    return f"{value:#.{min(max(digits, 2), 16)}g}".rstrip(".")
