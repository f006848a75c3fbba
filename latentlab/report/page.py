"""One self-contained page about a fit: the verdict first, then what stands behind it."""

from __future__ import annotations

import contextlib
import importlib.resources
import itertools
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentlab.report.canvas import four_digits
from latentlab.report.svg import figure_svg

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Page", "Section", "render", "write"]

_LOOKS = {  # level -> class of the badge, its sign
    "use": ("good", "✓"),
    "use with care": ("care", "!"),
    "do not use": ("bad", "✕"),
}
_NUMBER = re.compile(r"[-+−]?(\d[\d,.]*(e[-+]?\d+)?|inf|nan)( ?± ?\d\S*)?( ?%)?", re.IGNORECASE)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Arguments:
        title: its heading.
        text: what is seen, and how to read it.
        figures: matplotlib figures, or texts of SVGs that you trust.
        table: a frame; numbers are written with four significant digits.
        note: small print below.
    """

    title: str
    text: str = ""
    figures: tuple[Figure | str, ...] = ()
    table: pd.DataFrame | None = None
    note: str = ""


@dataclass(frozen=True)
class Page:
    """What a page says.

    Arguments:
        title: what was fitted.
        level: the verdict: ``"use"``, ``"use with care"`` or ``"do not use"``.
        headline: the verdict's first sentence.
        reasons: why.
        next_steps: what to try.
        facts: how it went: model, guide, data, steps, seconds, seed, versions.
        sections: the parts, in order.
    """

    title: str
    level: str
    headline: str
    reasons: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    sections: tuple[Section, ...] = ()


def render(page: Page) -> str:
    """The page as HTML that needs nothing else: the same page gives the same text.

    Arguments:
        page: what it says.

    Raises:
        ValueError: if the level is not one of the three.

    Example:
        >>> page = Page("a mixture", "use", "the guide is exact")
        >>> "<title>use: a mixture</title>" in render(page)
        True
    """
    from jinja2 import Environment, StrictUndefined

    if page.level not in _LOOKS:
        known = ", ".join(f'"{level}"' for level in _LOOKS)
        raise ValueError(f"level: expected one of {known}, got {page.level!r}")
    look, sign = _LOOKS[page.level]
    source = importlib.resources.files("latentlab.report").joinpath("page.html.j2")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(source.read_text(encoding="utf-8"))
    numbers = itertools.count(1)
    sections = [_shown(section, numbers) for section in page.sections]
    text = template.render(page=page, look=look, sign=sign, sections=sections)
    # Names with half a character (lone surrogates) come from files read with a wrong encoding.
    return text.encode("utf-8", "replace").decode("utf-8")


def write(page: Page, path: str | Path) -> Path:
    """Write the page: all of it, or nothing.

    Arguments:
        page: what it says.
        path: a file, or a folder that gets ``report.html``.

    Returns:
        The file.

    Raises:
        FileNotFoundError: if the folder does not exist.
        OSError: if it cannot be written to.
    """
    path = Path(path)
    file = path / "report.html" if path.is_dir() else path
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file}: there is no folder {file.parent}; create it first")
    text = render(page)
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        os.replace(draft, file)
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(
            f"{file}: cannot be written ({reason}); choose a folder that you may write to"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
    return file


def _shown(section: Section, numbers: Iterator[int]) -> dict[str, Any]:
    """A section as the template shows it: figures as SVG, cells as text."""
    from markupsafe import Markup

    figures = [
        Markup(figure_svg(figure, section.title, f"figure-{next(numbers)}-"))
        for figure in section.figures
    ]
    columns = [] if section.table is None else _columns(section.table)
    rows = list(zip(*(cells for _, _, cells in columns), strict=True))
    return {"section": section, "figures": figures, "columns": columns, "rows": rows}


def _columns(table: pd.DataFrame) -> list[tuple[str, bool, list[str]]]:
    """Name, whether it holds numbers, and the cells of each column; an index with labels first."""
    numbered = list(table.index) == list(range(len(table))) and table.index.name is None
    if not numbered:
        single = table.index.nlevels == 1
        table = table.reset_index(names=(table.index.name or "") if single else None)
    columns = []
    for place, name in enumerate(table.columns):
        column = table.iloc[:, place]
        missing = column.isna()
        cells = ["–" if no else _cell(value) for value, no in zip(column, missing, strict=True)]
        written = [cell for cell in cells if cell not in ("", "–")]
        numeric = bool(written) and all(_NUMBER.fullmatch(cell) for cell in written)
        columns.append((str(name), numeric, cells))
    return columns


def _cell(value: object) -> str:
    if isinstance(value, Real) and not isinstance(value, Integral):
        return four_digits(float(value))
    return str(value)
