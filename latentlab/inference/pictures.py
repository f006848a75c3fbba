"""Pictures and the report of a posterior, from the plain plots of ``latentlab.report``."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentlab.protocols import DrawsFit

if TYPE_CHECKING:
    import pandas as pd

    from latentlab.inference.posterior import Posterior
    from latentlab.inference.verdict import Verdict
    from latentlab.report import Section

__all__ = ["draw_picture", "write_report"]

_REPLICATES = 50  # posterior predictive data sets in the report


def draw_picture(posterior: Posterior, kind: str) -> Any:  # noqa: ANN401
    """One picture; see :meth:`latentlab.Posterior.plot`."""
    kinds = {
        "fit": _fit,
        "losses": _losses,
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
    from latentlab.report import Page, write

    verdict, summary = posterior.check(), posterior.summary()
    sections = [*_data_section(posterior), _latents_section(posterior, summary)]
    sections += [_climb_section(posterior), _trust_section(posterior, verdict)]
    if posterior.has_data and _tables(posterior):
        sections.append(_predictive_section(posterior))
    model = type(getattr(posterior.model, "__self__", posterior.model)).__name__
    name = getattr(posterior.model, "__name__", model)
    page = Page(
        title=f"{name}: a fit and its verdict",
        level=verdict.level,
        headline=str(posterior.restarts),
        reasons=verdict.reasons,
        next_steps=verdict.next_steps,
        facts=_facts(posterior, name),
        sections=tuple(sections),
    )
    return write(page, Path(path))


def _fit(posterior: Posterior) -> Any:  # noqa: ANN401
    posterior._need_data("plot")
    return posterior._draw_fit()


def _losses(posterior: Posterior) -> Any:  # noqa: ANN401
    from latentlab.report.plots import plot_losses

    return plot_losses(
        posterior.losses.numpy(),
        posterior.stage_starts,
        [e.value for e in posterior.stage_elbos[-len(posterior.stage_starts) :]],
        stop_reason=posterior.stop_reason,
    )


def _intervals(posterior: Posterior) -> Any:  # noqa: ANN401
    from latentlab.report.canvas import new_figure

    groups = list(posterior.summary().groupby("site", sort=False))
    rows = [max(len(group), 2) for _, group in groups]
    figure = new_figure(6, 0.3 * sum(rows) + 1.2 * len(rows))
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=rows)[:, 0]
    for ax, (site, group) in zip(axes, groups, strict=True):
        _forest(group, ax).set_title(str(site))
    return figure


def _forest(group: pd.DataFrame, ax: Any = None) -> Any:  # noqa: ANN401
    from latentlab.report.plots import plot_intervals

    labels = [label or "value" for label in group["index"]]
    mean, low, high = (group[c].to_numpy() for c in ("mean", "q05", "q95"))
    return plot_intervals(labels, mean, low, high, ax)


def _khat(posterior: Posterior) -> Any:  # noqa: ANN401
    from latentlab.inference.evidence import gather
    from latentlab.report.plots import plot_khat

    posterior._need_data("plot")
    blocks = gather(posterior, None, None).blocks
    if not blocks:
        raise ValueError('kind: a point estimate has no k-hat; try "fit" or "losses"')
    return plot_khat(
        [b.name for b in blocks],
        np.array([b.khat for b in blocks]),
        np.array([b.se for b in blocks]),
    )


def _predictive(posterior: Posterior) -> Any:  # noqa: ANN401
    from latentlab.report.plots import plot_predictive

    posterior._need_data("plot")
    tables = _tables(posterior)
    if not tables:
        raise ValueError('kind: no observed site is a table of rows; try "intervals"')
    name, observed = next(iter(tables.items()))
    replicates = posterior.predict(_REPLICATES)[name].numpy(force=True)
    replicates = replicates.reshape(len(replicates), len(observed), -1)
    coords = posterior._coords(name, observed.shape)[1:2]
    names = coords[0] if coords else [name]
    if len(names) != replicates.shape[-1]:
        names = [f"{name}[{i}]" for i in range(replicates.shape[-1])]
    return plot_predictive(observed.reshape(len(observed), -1), replicates, names)


def _tables(posterior: Posterior) -> dict[str, np.ndarray]:
    """Observed sites with rows, as arrays (N, ...)."""
    if not posterior.has_data:
        return {}
    observed = posterior._observed()
    tables = {k: v for k, v in observed.items() if v.dim() and v.is_floating_point()}
    return {k: v.numpy(force=True) for k, v in tables.items()}


def _data_section(posterior: Posterior) -> list[Section]:
    from latentlab.report import Section

    owner = getattr(posterior.model, "__self__", posterior.model)
    if not posterior.has_data or not isinstance(owner, DrawsFit):
        return []
    text = "The data with the fit drawn on them, at the posterior mean."
    return [Section("Data and fit", text, figures=(_figure(_fit(posterior)),))]


def _latents_section(posterior: Posterior, summary: pd.DataFrame) -> Section:
    from latentlab.report import Section

    small = len(summary) <= 100
    groups = list(summary.groupby("site", sort=False)) if small else []
    return Section(
        "Latents",
        "Posterior mean and 90 % interval of every number, in the units of the data.",
        figures=tuple(_figure(_titled(_forest(group), str(site))) for site, group in groups),
        table=summary.head(500),
        note="mcse is the Monte Carlo standard error of the mean"
        + ("" if len(summary) <= 500 else f"; the first 500 of {len(summary)} rows are shown"),
    )


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
    figures: tuple[Any, ...] = ()
    if posterior.has_data and any(name.startswith("k-hat") for name in verdict.evidence):
        figures = (_figure(_khat(posterior)),)
    return Section(
        "How far to trust it",
        "k-hat below 0.5 is good, above 0.7 the guide misses parts of the posterior.",
        figures=figures,
        table=table,
    )


def _predictive_section(posterior: Posterior) -> Section:
    from latentlab.report import Section

    return Section(
        "Posterior predictive check",
        "The distribution of each column, against that of data drawn from the fit: where the "
        "data leave the band, the model does not describe them.",
        figures=(_figure(_predictive(posterior)),),
    )


def _facts(posterior: Posterior, name: str) -> dict[str, str]:
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("latentlab", "torch", "pyro-ppl")]
    guide = getattr(posterior.guide, "__name__", type(posterior.guide).__name__)
    shapes = ", ".join("x".join(map(str, t.shape)) for t in posterior.pair.data.tensors())
    facts = {"model": name, "guide": guide, "data": shapes}
    facts |= {"columns": ", ".join(posterior.names)} if posterior.names else {}
    return facts | {
        "ELBO": f"{posterior.elbo} nats",
        "steps": str(len(posterior.losses)),
        "method": f"{posterior.method}, backend {posterior.backend}",
        "seconds": f"{posterior.seconds:.1f}",
        "seed": str(posterior.seed),
        "versions": ", ".join(versions),
        **({"notes": "; ".join(posterior.notes)} if posterior.notes else {}),
    }


def _titled(ax: Any, title: str) -> Any:  # noqa: ANN401
    ax.set_title(title)
    return ax


def _figure(picture: Any) -> Any:  # noqa: ANN401
    return getattr(picture, "figure", None) or picture
