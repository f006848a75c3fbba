"""Pictures and the report of a posterior, from the plain plots of ``latentlab.report``.

Letters: S draws, N rows, D columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from latentlab.inference.axes import coords_of, dims_of
from latentlab.inference.batches import follows_rows
from latentlab.inference.networks import has_networks
from latentlab.protocols import DrawsFit, owner_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from latentlab.inference.posterior import Posterior
    from latentlab.inference.verdict import Verdict
    from latentlab.report import Section

__all__ = ["draw_picture", "write_report"]

_REPLICATES = 50  # posterior predictive data sets, at the most
_ELEMENTS = 2**25  # numbers in all of them
_PANELS, _LINES = 12, 20  # of intervals: sites or columns, and numbers in each
_TABLE_ROWS = 200
_LISTED = 20_000  # latent numbers that a table and pictures may come from
_DRAWN = 2**25  # numbers drawn for the picture of a fit


def draw_picture(posterior: Posterior, kind: str) -> Axes | Figure:
    """One picture; see :meth:`latentlab.Posterior.plot`."""
    kinds: dict[str, Callable[[Posterior], Axes | Figure]] = {
        "fit": _fit,
        "losses": lambda posterior: _losses(posterior, posterior.stop_reason),
        "intervals": _intervals,
        "khat": _khat,
        "predictive": _predictive,
    }
    if kind not in kinds:
        known = ", ".join(f'"{name}"' for name in kinds)
        raise ValueError(f"kind: expected one of {known}, got {kind!r}")
    return kinds[kind](posterior)


def write_report(posterior: Posterior, path: str | Path) -> Path:
    """The page; see :meth:`latentlab.Posterior.report`."""
    from latentlab.inference.checkpoint import probe
    from latentlab.inference.ranks import is_first
    from latentlab.report import Page, write

    path = Path(path)
    file = path if path.suffix == ".html" else path / "report.html"
    if not is_first():
        return file
    probe(file.parent)
    verdict, name = posterior.check(), _name(posterior.model)
    sections = (
        *_data_section(posterior),
        *_latents_section(posterior),
        _climb_section(posterior),
        _trust_section(posterior, verdict),
        *_predictive_section(posterior),
    )
    page = Page(
        title=f"{name}: a fit and its verdict",
        level=verdict.level,
        headline=str(posterior.restarts),
        reasons=verdict.reasons,
        next_steps=verdict.next_steps,
        facts=_facts(posterior, name),
        sections=sections,
    )
    return write(page, file)


# ---- pictures --------------------------------------------------------------------------------


def _fit(posterior: Posterior) -> Axes | Figure:
    posterior._need_data("plot")
    owner, tables = owner_of(posterior.model), posterior.pair.data.tensors()
    if not isinstance(owner, DrawsFit) or not tables:
        raise ValueError('kind: this model draws no "fit"; try "predictive" or "intervals"')
    x = tables[0]
    names = posterior.names or tuple(f"x{i}" for i in range(x.shape[-1]))
    data = posterior.pair.data
    numbers = sum(math.prod(z.shape) for z in posterior.pair.latents)
    num_draws = min(500, max(2, _DRAWN // max(numbers, 1)))
    return owner.plot_fit(posterior._aligned(num_draws).draws, names, *data.args, **data.kwargs)


def _losses(posterior: Posterior, stop_reason: str | None = None) -> Axes:
    from latentlab.report.plots import plot_losses

    elbos = [elbo.value for elbo in posterior.stage_elbos]
    starts = posterior.stage_starts
    pair = posterior.pair
    held_out = posterior.held_out is not None and has_networks(pair) and follows_rows(pair)
    return plot_losses(
        posterior.losses.numpy(), starts, elbos, stop_reason=stop_reason, held_out=held_out
    )


def _intervals(posterior: Posterior) -> Figure:
    from latentlab.report.canvas import WIDTH, new_figure

    panels = list(itertools.islice(_panels(posterior), _PANELS))
    rows = [max(len(panel.labels), 2) for panel in panels]
    figure = new_figure(WIDTH, 0.24 * sum(rows) + 0.85 * len(rows))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=rows)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        panel.draw(ax)
    return figure


@dataclass(frozen=True)
class _Panel:
    """Numbers of one site that can stand on one axis."""

    title: str
    labels: list[str]
    rows: pd.DataFrame

    def draw(self, ax: Axes | None = None) -> Axes:
        from latentlab.report.canvas import note, short
        from latentlab.report.plots import plot_intervals

        columns = [self.rows[name].to_numpy() for name in ("mean", "q05", "q95")]
        mean, lower, upper = (column[:_LINES] for column in columns)
        ax = plot_intervals(self.labels[:_LINES], mean, lower, upper, ax)
        more = f" (the first {_LINES} of {len(self.rows)})" if len(self.rows) > _LINES else ""
        return note(ax, [short(self.title, 40) + more])


def _panels(posterior: Posterior) -> Iterator[_Panel]:
    """Sites one by one; columns of the data apart, for each has units of its own."""
    summary = posterior.summary()
    for latent in posterior.pair.latents:
        rows = summary[summary["site"] == latent.name]
        coords = coords_of(posterior.pair, latent.name, latent.shape)
        by_column = coords and posterior.names is not None and coords[-1] == [*posterior.names]
        if not by_column or len(coords[-1]) > _PANELS:
            yield _Panel(latent.name, [label or "value" for label in rows["index"]], rows)
            continue
        labels = [", ".join(parts) or "value" for parts in itertools.product(*coords[:-1])]
        for d, column in enumerate(coords[-1]):
            yield _Panel(f"{latent.name}, {column}", labels, rows.iloc[d :: len(coords[-1])])


def _khat(posterior: Posterior) -> Axes:
    from latentlab.report.plots import plot_khat

    posterior._need_data("plot")
    blocks = posterior._evidence().blocks
    if not blocks:
        raise ValueError('kind: a point estimate has no k-hat; try "fit" or "losses"')
    khat, se = np.array([[block.khat, block.se] for block in blocks]).T
    return plot_khat([block.name for block in blocks], khat, se)


def _predictive(posterior: Posterior) -> Figure:
    from latentlab.report.plots import plot_predictive

    posterior._need_data("plot")
    names, observed = _columns(posterior)
    if not names:
        raise ValueError('kind: this model observes no rows; try "intervals"')
    num_samples = max(1, min(_REPLICATES, _ELEMENTS // observed.size))
    drawn = posterior.predict(num_samples)
    replicates = [
        drawn[site].numpy(force=True).reshape(num_samples, len(observed), -1)
        for site in _sites_with_rows(posterior)
    ]
    return plot_predictive(observed, np.concatenate(replicates, -1), names)


def _sites_with_rows(posterior: Posterior) -> dict[str, np.ndarray]:
    """Observed sites, as arrays (N, ...) with as many rows as the first of them has."""
    observed = {k: v.numpy(force=True) for k, v in posterior._observed().items() if v.dim()}
    N = len(next(iter(observed.values()), ()))
    return {site: value for site, value in observed.items() if len(value) == N}


def _columns(posterior: Posterior) -> tuple[list[str], np.ndarray]:
    """Names (D,) and values (N, D) of all observed sites side by side."""
    names, parts = [], []
    for site, value in _sites_with_rows(posterior).items():
        folded = _is_of_steps(posterior, site, value.ndim)  # sequences: each step is a row
        coords = coords_of(posterior.pair, site, tuple(value.shape))[-1 if folded else 1 :]
        labels = [", ".join(parts) for parts in itertools.product(*coords)]
        named = len(coords) == 1 and labels == [*(posterior.names or ())]
        names += labels if named else [f"{site}[{label}]" if label else site for label in labels]
        parts.append(value.reshape(-1 if folded else len(value), math.prod(map(len, coords))))
    return names, np.concatenate(parts, -1) if parts else np.zeros((0, 0))


def _is_of_steps(posterior: Posterior, site: str, num_axes: int) -> bool:
    """Whether a site is sequences of rows (B, T, D)."""
    return num_axes == 3 and dims_of(posterior.pair, site, 3)[1:] == ("step", "feature")


# ---- sections of the report ------------------------------------------------------------------


def _data_section(posterior: Posterior) -> list[Section]:
    from latentlab.report import Section

    can_draw = isinstance(owner_of(posterior.model), DrawsFit) and posterior.pair.data.tensors()
    if not can_draw or not posterior.has_data:
        return []
    text = "The data with the fit drawn on them, at the posterior mean."
    return [Section("Data and fit", text, figures=(_figure(_fit(posterior)),))]


def _latents_section(posterior: Posterior) -> list[Section]:
    from latentlab.report import Section

    if not posterior.pair.latents:
        return []
    numbers = sum(math.prod(z.shape) for z in posterior.pair.latents)
    if numbers > _LISTED:
        text = f"There are {numbers} of them, too many to be listed; summary() has them all."
        return [Section("Latents", text)]
    summary, panels = posterior.summary(), list(_panels(posterior))
    figures = tuple(_figure(panel.draw()) for panel in panels[:_PANELS])
    notes = ["mcse is the Monte Carlo standard error of the mean"]
    if len(panels) > _PANELS:
        notes.append(f"the first {_PANELS} of {len(panels)} pictures are shown")
    if len(summary) > _TABLE_ROWS:
        notes.append(f"the first {_TABLE_ROWS} of {len(summary)} rows are shown")
    what = "Posterior mean and 90 % interval"
    what = "Point estimate" if posterior.pair.is_point() else what
    text = f"{what} of every number, in the units of the data."
    note = "; ".join(notes) + "."
    return [Section("Latents", text, figures=figures, table=_rounded(summary), note=note)]


def _rounded(summary: pd.DataFrame) -> pd.DataFrame:
    """Its first rows as text, each number to three digits of its standard deviation."""
    from latentlab.report.canvas import rounded

    rows = summary.head(_TABLE_ROWS)
    text = rows.astype(object)
    for name in rows.columns[2:]:
        widths = rows["mcse" if name == "mcse" else "sd"]
        text[name] = [rounded(*pair) for pair in zip(rows[name], widths, strict=True)]
    return text


def _climb_section(posterior: Posterior) -> Section:
    from latentlab.report import Section

    how = "Converged" if posterior.converged else "Did not converge"
    return Section(
        "The climb",
        f"{how}: {posterior.stop_reason}. {str(posterior.restarts).capitalize()}.",
        figures=(_figure(_losses(posterior)),),
        note="The loss is the negative ELBO in nats, at draws of the guide; lines start stages.",
    )


def _trust_section(posterior: Posterior, verdict: Verdict) -> Section:
    import pandas as pd

    from latentlab.report import Section

    table = pd.DataFrame(verdict.evidence.items(), columns=["evidence", "figure"])
    text, figures = "The figures that the verdict rests on.", []
    if any(name.startswith("k-hat") for name in verdict.evidence):
        text += " k-hat below 0.5 is good; above 0.7 the guide misses parts of the posterior."
        figures = [_figure(_khat(posterior))] if posterior.has_data else []
    return Section("How far to trust it", text, figures=tuple(figures), table=table)


def _predictive_section(posterior: Posterior) -> list[Section]:
    from latentlab.report import Section

    if not posterior.has_data or not _sites_with_rows(posterior):
        return []
    text = (
        "The distribution of each column, against that of data drawn from the fit: where the "
        "data leave the band, the model does not describe them."
    )
    return [Section("Posterior predictive check", text, figures=(_predictive(posterior),))]


def _facts(posterior: Posterior, name: str) -> dict[str, str]:
    import importlib.metadata

    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("latentlab", "torch", "pyro-ppl")]
    shapes = ", ".join("x".join(map(str, t.shape)) for t in posterior.pair.data.tensors())
    facts = {"model": name, "guide": _name(posterior.guide)}
    if shapes:
        facts["data"] = shapes + ("" if posterior.has_data else " (not at hand)")
    if posterior.names:
        facts["columns"] = ", ".join(posterior.names)
    facts |= {
        "ELBO": f"{posterior.elbo} nats",
        "steps": str(len(posterior.losses)),
        "method": f"{posterior.method}, backend {posterior.backend}",
        "seconds": f"{posterior.seconds:.1f}",
        "seed": str(posterior.seed),
        "versions": ", ".join(versions),
    }
    return facts | ({"notes": "; ".join(posterior.notes)} if posterior.notes else {})


def _name(function: Callable) -> str:
    """What a reader calls a model or guide: a function's name, or that of its class."""
    function = getattr(function, "func", function)  # of functools.partial
    name = getattr(function, "__name__", type(function).__name__)
    owner = getattr(function, "__self__", None)
    return name if owner is None else f"{type(owner).__name__}.{name}"


def _figure(picture: Axes | Figure) -> Figure:
    from matplotlib.figure import Figure

    return picture if isinstance(picture, Figure) else cast("Figure", picture.get_figure())
