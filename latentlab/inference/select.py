r"""``select``: one keyword of a model, several values, the same data held out from all of them.

The data are parted into folds; each fold f is scored by a fit to the others,

.. math:: \mathrm{held\ out} = \sum_f \sum_{n \in f} \log p(x_n \mid x_{\setminus f}), \qquad
          \mathrm{BIC} = -2 \, \log p(x \mid \hat\theta) + p \log N,

the second at the mode :math:`\hat\theta` of all data, with p free numbers. Every value sees the
same folds, so that scores are compared datum by datum, and the error of a difference is far
smaller than that of the scores themselves.

A *datum* is a row of the data, or a sequence where a list or a batch of them is given: an element
of the plate that all observed sites stand in.

Letters: N data, S draws.

References:
    | Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC
      (Vehtari, Gelman and Gabry, 2017)
    | Estimating the dimension of a model (Schwarz, 1978)
    | Classification and regression trees (Breiman, Friedman, Olshen and Stone, 1984)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentlab.data.checks import as_count, as_seed
from latentlab.diagnostics import Estimate, log_mean_exp
from latentlab.inference import predictive
from latentlab.inference.arguments import as_arguments
from latentlab.inference.check import prepare
from latentlab.inference.engine import fit
from latentlab.inference.given import density
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.posterior import Posterior
from latentlab.inference.sandbox import stream
from latentlab.protocols import CountsObservations, ReadsItsRows, owner_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Candidate", "Selection", "select"]

_FIT_SETTINGS = frozenset(inspect.signature(fit).parameters) - {"model", "data", "guide"}
_DRAWS = 1000  # behind a held-out score
_ELEMENTS = 2**25  # of (S, N) held at a time
_LEVELS = ("use", "use with care", "do not use")


@dataclass(frozen=True)
class Candidate:
    """One value of the keyword, and what was found.

    Arguments:
        value: the value.
        held_out: held-out log predictive density of all data in nats, larger is better; its error
            is that of N data as draws from their source, with the Monte Carlo error. ``None``
            where the data are one datum.
        difference: the same, less that of the best value, datum by datum.
        bic: Bayesian information criterion, smaller is better; its error likewise. ``None`` where
            each datum has latents of its own, so that their number is no constant.
        bic_difference: the same, less the smallest.
        num_numbers: free numbers p of the model.
        verdict: the worst level of the verdicts on the folds.
    """

    value: Any
    held_out: Estimate | None
    difference: Estimate | None
    bic: Estimate | None
    bic_difference: Estimate | None
    num_numbers: int
    verdict: str


@dataclass(frozen=True)
class Selection:
    """How several values of a keyword compare.

    ``best`` goes by the rule of one standard error: of the values in the order they were given,
    from simple to rich, the first one whose held-out score is within one standard error (of the
    difference) of the best score. Where nothing could be held out, it is the one of the smallest
    BIC.

    Arguments:
        name: the keyword.
        candidates: the values in the order they were given, each with its figures.
        num_data: number of data N.
        num_folds: number of folds.
    """

    name: str
    candidates: tuple[Candidate, ...]
    num_data: int
    num_folds: int

    @property
    def best(self) -> Any:  # noqa: ANN401
        """The value to take, by the rule of one standard error."""
        for candidate in self.candidates:
            gap = candidate.difference
            if gap is not None and gap.value >= -gap.se:
                return candidate.value
        return min(self.candidates, key=_bic_of).value

    @property
    def highest(self) -> Any:  # noqa: ANN401
        """The value of the best held-out score or, without one, of the smallest BIC."""
        scores = [c.held_out.value if c.held_out else -_bic_of(c) for c in self.candidates]
        return self.candidates[max(range(len(scores)), key=scores.__getitem__)].value

    def frame(self) -> pd.DataFrame:
        """A frame with a row for each value; an error stands beside each figure."""
        import pandas as pd

        rows = []
        for candidate in self.candidates:
            row: dict[str, Any] = {self.name: candidate.value}
            for column in ("held_out", "difference", "bic", "bic_difference"):
                figure = getattr(candidate, column) or Estimate(math.nan, math.nan)
                row |= {column: figure.value, f"{column}_se": figure.se}
            rows.append(row | {"numbers": candidate.num_numbers, "verdict": candidate.verdict})
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The differences to the best value, with their errors.

        Arguments:
            ax: where to draw; by default a new figure.

        Returns:
            The axes.
        """
        from latentlab.report.selection import plot_selection

        held_out = [c.difference for c in self.candidates]
        bic = [
            c.bic_difference and Estimate(-c.bic_difference.value / 2, c.bic_difference.se / 2)
            for c in self.candidates
        ]
        curves = {"held out": held_out, "-BIC / 2": bic}
        labels = [str(c.value) for c in self.candidates]
        drawn = {
            name: [(e.value, e.se) if e else (math.nan, math.nan) for e in found]
            for name, found in curves.items()
            if any(found)
        }
        best = [c.value for c in self.candidates].index(self.best)
        return plot_selection(self.name, labels, drawn, best, ax)

    def __str__(self) -> str:
        head = (self.name, "held out (nats)", "less the best", "BIC", "less the best", "verdict")
        cells = [
            tuple(
                "-" if v is None else str(v)
                for v in (c.value, c.held_out, c.difference, c.bic, c.bic_difference, c.verdict)
            )
            for c in self.candidates
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *cells)]
        if self.candidates[0].held_out is None:
            why = "the smallest BIC; nothing could be held out"
        else:
            why = (
                f"the first within one standard error of the best held-out score "
                f"({self.highest}), {self.num_folds} folds of {self.num_data} data"
            )
        return "\n".join([f"{self.name} = {self.best}: {why}", *lines])

    __repr__ = __str__


def select(
    model: Callable[..., Callable],
    data: Any,  # noqa: ANN401
    guide: Any = "auto",  # noqa: ANN401
    *,
    num_folds: int = 5,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    **arguments: Any,  # noqa: ANN401
) -> Selection:
    """Compare values of one keyword of a model by held-out score and BIC.

    Arguments:
        model: what makes a model from keywords: a class, or a function. A ``num_features`` that it
            asks for and is not given is the number of columns of the data.
        data: as for :func:`latentlab.fit`.
        guide: as for :func:`latentlab.fit`; the BIC always takes the mode.
        num_folds: number of parts that are held out in turn.
        seed: of the folds and the fits; the same seed, the same answer.
        settings: further arguments of ``fit``, such as ``{"max_steps": 3000}``.
        arguments: keywords of the model, exactly one of them with several values (a range, list
            or tuple), from simple to rich. If another one is a list, put it into ``model`` with
            ``functools.partial``.

    Returns:
        The scores, each with its error, and the value to take.

    Raises:
        ValueError: unless exactly one keyword has several values, if there are fewer data than
            folds, or for a model that has no density of new rows, such as an autoencoder.
        TypeError: if a setting of ``fit`` is given as a keyword of the model.

    Example:
        >>> import latentlab as ll
        >>> x = ll.data.simulate.eruptions(num_rows=60)
        >>> settings = {"num_restarts": 1, "max_steps": 300, "progress": False}
        >>> found = ll.select(ll.GaussianMixture, x, num_components=[1, 2], num_folds=2,
        ...                   settings=settings)
        >>> found.best
        2
    """
    name, values = _varied(arguments)
    num_folds, seed = as_count(num_folds, "num_folds", minimum=2), as_seed(seed)
    _refuse_settings(model, arguments)
    arguments |= _columns_of(model, data, arguments)
    makers = [lambda value=value: model(**{**arguments, name: value}) for value in values]
    read = as_arguments(data, makers[0]())
    owner = owner_of(makers[0]())
    if isinstance(owner, ReadsItsRows) and owner.reads_its_rows:
        raise ValueError(
            f"model: {type(owner).__name__} compares each row with what it makes of that row, and "
            "has no density of new rows; take a model with latents, or compare its errors on rows "
            "that were not fitted"
        )
    N, rows_are_data = _count(makers[0](), read, guide)
    if rows_are_data and N < num_folds:
        raise ValueError(f"num_folds: expected at most the {N} data, got {num_folds}")
    chosen = {"seed": seed, **(settings or {})}
    generator = torch.Generator().manual_seed(stream(seed, "folds"))
    order = torch.randperm(N, generator=generator)
    folds = [order[f::num_folds].sort().values for f in range(num_folds)] if rows_are_data else []
    found = [_score(make, read, guide, folds, N, chosen) for make in makers]
    return Selection(name, _compared(values, found), N, num_folds)


@dataclass(frozen=True)
class _Scores:
    """Scores of one value; each datum's own, in nats, shape (N,), once."""

    held_out: Tensor | None
    monte_carlo_se: float
    bic: Tensor | None  # parted evenly where it counts numbers
    counts: Tensor  # how often each datum counts
    num_numbers: int
    verdict: str


def _varied(arguments: Mapping[str, Any]) -> tuple[str, list]:
    """The keyword with several values, and these."""
    several = {k: [*v] for k, v in arguments.items() if isinstance(v, range | list | tuple)}
    if len(several) != 1:
        came = " and ".join(several) or "none"
        raise ValueError(
            f"select: expected exactly one keyword with several values, such as "
            f"num_components=range(1, 7), got {came}; put others into the model with "
            "functools.partial"
        )
    ((name, values),) = several.items()
    if not values or any(value in values[:i] for i, value in enumerate(values)):
        raise ValueError(f"{name}: expected different values, at least one, got {values}")
    return name, values


def _refuse_settings(model: Callable[..., Callable], arguments: Mapping[str, Any]) -> None:
    """Name the place of what belongs to ``fit``, not to the model."""
    own = inspect.signature(model).parameters
    lost = [name for name in arguments if name not in own and name in _FIT_SETTINGS]
    if lost and not any(p.kind is p.VAR_KEYWORD for p in own.values()):
        raise TypeError(
            f"{lost[0]}: is an argument of fit, not of the model; give it as "
            f"settings={{{lost[0]!r}: ...}}"
        )


def _columns_of(
    model: Callable[..., Callable],
    data: Any,  # noqa: ANN401
    arguments: Mapping[str, Any],
) -> dict[str, int]:
    """``num_features``, where the model asks for it and it is not given."""
    asked = inspect.signature(model).parameters.get("num_features")
    if "num_features" in arguments or asked is None or asked.default not in (asked.empty, None):
        return {}
    tensors = as_arguments(data, _reads_anything).tensors()
    if not tensors or tensors[0].dim() < 2:
        raise ValueError("num_features: expected the number of columns, which these data have not")
    return {"num_features": tensors[0].shape[-1]}


class _ReadsAnything:
    """Stands for a model that is not made yet: what it does not understand, it will say."""

    tolerates_missing = True

    def __call__(self) -> None:
        """Nothing: only asked how it reads."""


_reads_anything = _ReadsAnything()


def _count(model: Callable, data: Arguments, guide: Any) -> tuple[int, bool]:  # noqa: ANN401
    """The number of data, and whether they may be parted."""
    pair, report = prepare(model, data, guide)
    report.expect_ok("the pair cannot be fitted")
    N = next((len(v) for v in (*data.args, *data.kwargs.values()) if _has_rows(v)), 1)
    plate = predictive.datum_plate(pair)
    sizes = {
        size for site in pair.observed for name, size, _ in pair.plates[site] if name == plate
    }
    return N, sizes == {N} and N > 1


def _has_rows(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, list) or isinstance(value, Tensor) and value.dim() > 0


def _part(data: Arguments, rows: Tensor, num_data: int) -> Arguments:
    """Some of the data, of all arguments that have one part for each."""

    def taken(value: Any) -> Any:  # noqa: ANN401
        if not _has_rows(value) or len(value) != num_data:
            return value
        if isinstance(value, list):
            return [value[n] for n in rows.tolist()]
        return value[rows.to(value.device)]

    kwargs = {key: taken(value) for key, value in data.kwargs.items()}
    return Arguments(tuple(map(taken, data.args)), kwargs, data.names)


def _score(
    make: Callable[[], Callable],
    data: Arguments,
    guide: Any,  # noqa: ANN401
    folds: Sequence[Tensor],
    num_data: int,
    settings: Mapping[str, Any],
) -> _Scores:
    """The scores of one model, made anew for each fit."""
    held_out, squares, levels = torch.zeros(num_data, dtype=torch.float64), 0.0, [0]
    counts = torch.ones(num_data, dtype=torch.float64)
    for fold in folds:
        rest = torch.ones(num_data, dtype=torch.bool)
        rest[fold] = False
        posterior = fit(make(), _part(data, rest.nonzero()[:, 0], num_data), guide, **settings)
        levels.append(_LEVELS.index(posterior.check().level))
        by_datum, counted = _log_density(posterior, _part(data, fold, num_data), _DRAWS)
        held_out[fold] = by_datum.logsumexp(0) - math.log(len(by_datum))
        counts[fold] = counted
        squares += log_mean_exp(by_datum, counts=counted).se ** 2
    pair, _ = prepare(make(), data, "point")
    bic: Tensor | None = None
    if pair.local_plate() is None:
        mode = fit(make(), data, "point", **settings)
        pair = mode.pair
        found, counts = _log_density(mode, data, 1)
        penalty = _free_numbers(pair) * math.log(_num_observations(mode, counts, num_data))
        bic = -2 * found[0] + penalty / float(counts.sum())
    num_numbers = _free_numbers(pair)
    verdict = _LEVELS[max(levels)] if folds else "-"
    scores = held_out if folds else None
    return _Scores(scores, math.sqrt(squares), bic, counts, num_numbers, verdict)


def _num_observations(posterior: Posterior, counts: Tensor, num_data: int) -> float:
    """What the BIC goes by: data, each as often as it counts, or what these are made of."""
    owner = owner_of(posterior.model)
    if isinstance(owner, CountsObservations):
        return owner.num_observations(*posterior.pair.data.args)
    return float(counts.sum()) if len(counts) == num_data else num_data


def _free_numbers(pair: Pair) -> int:
    """Numbers of the latents and parameters of the model that are free to move."""
    latents = sum(math.prod(z.free_shape) for z in pair.latents)
    parameters = (v for k, v in pair.parameters().items() if not k.startswith("guide."))
    return latents + sum(v.numel() for v in parameters)


def _log_density(posterior: Posterior, data: Arguments, num_samples: int) -> tuple[Tensor, Tensor]:
    """Log-density (S, N) of each datum at each draw, and how often it counts (N,), float64."""
    num_data = max((len(t) for t in data.tensors() if t.dim()), default=1)
    num_samples = max(2, min(num_samples, _ELEMENTS // num_data)) if num_samples > 1 else 1
    with torch.no_grad(), posterior._entered("select", None):
        found, counts = density(posterior, data, num_samples)
        once = torch.ones(found.shape[1], dtype=torch.float64, device=found.device)
        return found.double(), once if counts is None else counts


def _compared(values: Sequence, found: Sequence[_Scores]) -> tuple[Candidate, ...]:
    """The figures of each value, and their differences to the best ones."""
    held, bics = [s.held_out for s in found], [s.bic for s in found]
    counts = [s.counts for s in found]
    scores, losses = [*map(_sum_of, held, counts)], [*map(_sum_of, bics, counts)]
    top, low = scores.index(max(scores)), losses.index(min(losses))
    return tuple(
        Candidate(
            value,
            _total(held[i], s.counts, s.monte_carlo_se),
            _gap(held, i, top, s.counts, math.hypot(s.monte_carlo_se, found[top].monte_carlo_se)),
            _total(bics[i], s.counts),
            _gap(bics, i, low, s.counts),
            s.num_numbers,
            s.verdict,
        )
        for i, (value, s) in enumerate(zip(values, found, strict=True))
    )


def _total(
    by_datum: Tensor | None, counts: Tensor, monte_carlo_se: float = 0.0
) -> Estimate | None:
    """The sum over the data as draws from their source; of one datum the error is not known.

    A datum that counts twice is two of them.
    """
    if by_datum is None:
        return None
    total = float(counts.sum())
    mean = (counts * by_datum).sum() / total
    variance = (counts * (by_datum - mean) ** 2).sum() / (total - 1) if total > 1 else math.nan
    return Estimate(float(mean) * total, math.hypot(math.sqrt(total * variance), monte_carlo_se))


def _gap(
    by_datum: Sequence[Tensor | None],
    i: int,
    best: int,
    counts: Tensor,
    monte_carlo_se: float = 0.0,
) -> Estimate | None:
    """The difference to the best one, datum by datum."""
    mine, theirs = by_datum[i], by_datum[best]
    if mine is None or theirs is None:
        return None
    return Estimate(0.0, 0.0) if i == best else _total(mine - theirs, counts, monte_carlo_se)


def _sum_of(by_datum: Tensor | None, counts: Tensor) -> float:
    return 0.0 if by_datum is None else float((counts * by_datum).sum())


def _bic_of(candidate: Candidate) -> float:
    return candidate.bic.value if candidate.bic else math.inf
