r"""What the states of a chain say of a row: emissions.

.. math:: x_t \mid z_t = k \; \sim \; p(\,\cdot \mid \theta_k), \qquad \theta_k \sim p(\theta)

==============================  ===========================================================
emission                        a row in state k
==============================  ===========================================================
:class:`GaussianEmission`       :math:`\mathcal{N}(\mu_k, \Sigma_k)`, diagonal or full
:class:`PoissonEmission`        counts with rates :math:`\lambda_{kd}`
:class:`CategoricalEmission`    codes c with probabilities :math:`p_{kdc}`
:class:`BernoulliEmission`      zeros and ones with probabilities :math:`p_{kd}`
:class:`ProductEmission`        columns of several kinds side by side
==============================  ===========================================================

One of your own is any object with :class:`Emission`'s three names: how many columns, the prior
of a state's numbers, and the distribution of a row given them. What it knows besides it may lend:
:class:`MeasuresRows`, :class:`ChecksRows`, :class:`EstimatesStates`, and for steps of
expectation-maximisation :class:`MaximisesLikelihood`; with a conjugate prior
:class:`HasConjugatePrior`, and where it draws one site given another :class:`LinksSites`.

Cells that are NaN are missing. The emissions here integrate them out exactly; of others, a step
with a missing cell is left out as a whole.

Letters: N rows, D features, K states, C categories.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from latentlab.distributions.cells import Parts
from latentlab.distributions.emission_conjugate import NormalGammaEmission
from latentlab.distributions.emission_kinds import (
    BernoulliEmission,
    CategoricalEmission,
    GaussianEmission,
    PoissonEmission,
)
from latentlab.distributions.factors import Factor, Sites

__all__ = [
    "BernoulliEmission",
    "CategoricalEmission",
    "ChecksRows",
    "Emission",
    "EstimatesStates",
    "GaussianEmission",
    "HasConjugatePrior",
    "LinksSites",
    "MaximisesLikelihood",
    "MeasuresRows",
    "NormalGammaEmission",
    "PoissonEmission",
    "ProductEmission",
    "emission_of",
]

_KINDS = ("gaussian", "gaussian_full", "poisson", "categorical", "bernoulli")


@runtime_checkable
class Emission(Protocol):
    """What a state says of a row of D numbers: all that a model of states has to know.

    Example:
        >>> import pyro.distributions as dist
        >>> from latentlab.distributions import Cells
        >>> class Lengths:
        ...     num_features = 1
        ...     def sites(self):
        ...         return {"rates": dist.Gamma(2.0, 2.0).expand([1]).to_event(1)}
        ...     def distribution(self, rates):
        ...         return Cells(dist.Exponential(rates), event_dim=1, fill=1.0)
        >>> isinstance(Lengths(), Emission)
        True
    """

    num_features: int

    def sites(self) -> Mapping[str, Any]:
        """Site -> the prior of its value in one state, batch shape ()."""

    @property
    def distribution(self) -> Callable[..., Any]:
        """A method: values of the sites, by name, to the distribution of a row, event shape (D,).

        Its batch shape is that of the values: ``(..., K)`` for values ``(..., K, *event)``.
        """


@runtime_checkable
class MeasuresRows(Protocol):
    """An emission whose priors are set in the units of the data."""

    def measure(self, x: Tensor) -> None:
        """Set the units from rows (N, D), NaN where a cell is missing, in place."""


@runtime_checkable
class ChecksRows(Protocol):
    """An emission that not all numbers can come from."""

    def check(self, x: Tensor, argument: str = "x") -> None:
        """Raise ``ValueError`` where observed cells of (..., D) cannot come from it."""


@runtime_checkable
class EstimatesStates(Protocol):
    """An emission that knows the values that fit weighted rows best."""

    def estimate(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Site -> values (K, ...) for rows (N, D) that weigh (N, K) in each state."""


@runtime_checkable
class MaximisesLikelihood(Protocol):
    """An emission whose likelihood has its maximum in closed form, from sums over rows.

    The sums of several batches may be added, or averaged.

    Example:
        >>> class Lengths:
        ...     has_maximum = True
        ...     def statistics(self, x, weights):
        ...         return {"held": weights.sum(0), "total": weights.mT @ x[:, 0]}
        ...     def maximise(self, statistics):
        ...         return {"rates": (statistics["held"] / statistics["total"])[:, None]}
        >>> isinstance(Lengths(), MaximisesLikelihood)
        True
    """

    @property
    def has_maximum(self) -> bool:
        """Whether it has for the rows that were measured: missing cells may be in the way."""

    def statistics(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Sums (K, ...) over rows (N, D) that weigh (N, K) in each state.

        Cells that are NaN are missing; of an emission other than :class:`Cells` and its like,
        there is none.
        """

    def maximise(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Site -> values (K, ...) of the greatest likelihood, NaN where nothing was seen."""


@runtime_checkable
class LinksSites(Protocol):
    """An emission with a site that is drawn given another one of the same state."""

    def given(self, site: str, values: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
        """The prior of a site given values ``(..., K, *event)`` of those before it."""


@runtime_checkable
class HasConjugatePrior(Protocol):
    """An emission whose posterior is of the family of its prior, once the states are known."""

    @property
    def is_conjugate(self) -> bool:
        """Whether it is: of several kinds of columns, all have to be."""

    def priors(self) -> dict[Sites, Factor]:
        """Sites -> prior of their values in one state."""

    def statistics(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """As :meth:`MaximisesLikelihood.statistics`."""

    def posteriors(self, statistics: Mapping[str, Tensor]) -> dict[Sites, Factor]:
        """Sites -> posterior of their values in all K states."""

    def expected_log_prob(self, x: Tensor, found: Mapping[Sites, Factor]) -> Tensor:
        """Expected log-density (..., K) of rows (..., D) in each state under factors of theirs."""


class ProductEmission(nn.Module):
    """Columns of several kinds, independent within a state.

    A site that several parts have gets the number of its part: ``probs_0``, ``probs_2``.

    Arguments:
        parts: emissions, each over the next columns of a row.
    """

    def __init__(self, parts: Sequence[Emission]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.num_features = sum(part.num_features for part in parts)
        for g, part in enumerate(parts):
            if isinstance(part, nn.Module):
                self.add_module(f"part_{g}", part)
        count = Counter(site for part in parts for site in part.sites())
        self.names = tuple(
            {site: f"{site}_{g}" if count[site] > 1 else site for site in part.sites()}
            for g, part in enumerate(parts)
        )
        order = torch.arange(self.num_features)
        self.register_buffer("order", order, persistent=False)

    def sites(self) -> Mapping[str, Any]:
        """Priors of all parts."""
        return {
            names[site]: prior
            for part, names in zip(self.parts, self.names, strict=True)
            for site, prior in part.sites().items()
        }

    @property
    def spans(self) -> Mapping[str, tuple[int, int]]:
        """Site -> the first of the columns that it is about, and the one after the last."""
        ends = list(accumulate(part.num_features for part in self.parts))
        return {
            site: (end - part.num_features, end)
            for end, part, names in zip(ends, self.parts, self.names, strict=True)
            for site in names.values()
        }

    def distribution(self, **values: Tensor) -> Any:  # noqa: ANN401
        """Rows in each state.

        Arguments:
            values: those of the sites, by name.
        """
        rows = [
            part.distribution(**{site: values[name] for site, name in names.items()})
            for part, names in zip(self.parts, self.names, strict=True)
        ]
        return Parts(rows, self.get_buffer("order"))

    def check(self, x: Tensor, argument: str = "x") -> None:
        """Raise for cells that their part cannot emit."""
        for part, columns in self._pieces(x):
            if isinstance(part, ChecksRows):
                part.check(columns, argument)

    def measure(self, x: Tensor) -> None:
        """Set the units of all parts, in place."""
        for part, columns in self._pieces(x):
            if isinstance(part, MeasuresRows):
                part.measure(columns)

    def estimate(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Values of those parts that know how."""
        found: dict[str, Tensor] = {}
        for (part, columns), names in zip(self._pieces(x), self.names, strict=True):
            if isinstance(part, EstimatesStates):
                values = part.estimate(columns, weights)
                found |= {names[site]: value for site, value in values.items()}
        return found

    @property
    def has_maximum(self) -> bool:
        """Whether all parts have theirs."""
        return all(isinstance(p, MaximisesLikelihood) and p.has_maximum for p in self.parts)

    def statistics(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """The sums of all parts."""
        return {
            f"{g}.{name}": value
            for g, (part, columns) in enumerate(self._pieces(x))
            for name, value in part.statistics(columns, weights).items()  # type: ignore[attr-defined]
        }

    def maximise(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of all parts."""
        found: dict[str, Tensor] = {}
        for g, (part, names) in enumerate(zip(self.parts, self.names, strict=True)):
            own = part_of(statistics, f"{g}.")
            values = part.maximise(own)  # type: ignore[attr-defined]
            found |= {names[site]: value for site, value in values.items()}
        return found

    def given(self, site: str, values: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
        """The prior of a site, as its part says."""
        part, names = next(p for p in self._named() if site in p[1].values())
        own = {s: values[name] for s, name in names.items() if name in values}
        inner = next(s for s, name in names.items() if name == site)
        return part.given(inner, own) if isinstance(part, LinksSites) else part.sites()[inner]

    @property
    def is_conjugate(self) -> bool:
        """Whether all parts are."""
        return all(isinstance(p, HasConjugatePrior) and p.is_conjugate for p in self.parts)

    def priors(self) -> dict[Sites, Factor]:
        """Those of all parts."""
        found: dict[Sites, Factor] = {}
        for part, names in self._named():
            found |= {tuple(names[s] for s in sites): f for sites, f in part.priors().items()}
        return found

    def posteriors(self, statistics: Mapping[str, Tensor]) -> dict[Sites, Factor]:
        """Those of all parts."""
        found: dict[Sites, Factor] = {}
        for g, (part, names) in enumerate(self._named()):
            own = part.posteriors(part_of(statistics, f"{g}."))
            found |= {tuple(names[s] for s in sites): f for sites, f in own.items()}
        return found

    def expected_log_prob(self, x: Tensor, found: Mapping[Sites, Factor]) -> Tensor:
        """The sum of those of all parts."""
        total: Any = 0.0
        for (part, names), (_, columns) in zip(self._named(), self._pieces(x), strict=True):
            own = {s: found[tuple(names[site] for site in s)] for s in part.priors()}
            total = total + part.expected_log_prob(columns, own)
        return total

    def _named(self) -> list[tuple[Any, dict[str, str]]]:
        return list(zip(self.parts, self.names, strict=True))

    def _pieces(self, x: Tensor) -> list[tuple[Emission, Tensor]]:
        widths = [part.num_features for part in self.parts]
        return list(zip(self.parts, x.split(widths, -1), strict=True))


def part_of(statistics: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The sums whose names begin so, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in statistics.items() if k.startswith(prefix)}


def emission_of(
    kind: str | Emission | Sequence[str | Emission],
    num_features: int = 1,
    num_categories: int | None = None,
    conjugate: bool = False,
) -> Emission:
    """The emission of a name, or of a name for each column.

    Arguments:
        kind: ``"gaussian"``, ``"gaussian_full"``, ``"poisson"``, ``"categorical"``,
            ``"bernoulli"``, an emission, or a list of these: names stand for one column each,
            and neighbours of one name share an emission.
        num_features: number of columns D, where ``kind`` is a name.
        num_categories: number of codes of categorical columns.
        conjugate: whether priors have to be conjugate, as those of correlations never are.

    Raises:
        ValueError: for another name, or categories whose number is not given.
        TypeError: for an object that is no :class:`Emission`.

    Example:
        >>> emission_of(["gaussian", "gaussian", "poisson"]).num_features
        3
    """
    if isinstance(kind, str):
        if kind not in _KINDS:
            known = ", ".join(f'"{name}"' for name in _KINDS)
            raise ValueError(f"emissions: expected one of {known} or an Emission, got {kind!r}")
        if kind == "categorical":
            if num_categories is None:
                raise ValueError(
                    "num_categories: expected the number of codes of categorical columns, got None"
                )
            return CategoricalEmission(num_features, num_categories)
        if kind == "gaussian" and conjugate:
            return NormalGammaEmission(num_features)
        if kind.startswith("gaussian"):
            return GaussianEmission(num_features, "full" if kind.endswith("full") else "diag")
        if kind == "poisson":
            return PoissonEmission(num_features)
        return BernoulliEmission(num_features)
    if isinstance(kind, list | tuple) and kind:
        groups: list[list[Any]] = []
        for one in kind:
            if groups and isinstance(one, str) and groups[-1][0] == one:
                groups[-1][1] += 1
            else:
                groups.append([one, 1])
        return ProductEmission(
            [emission_of(one, num, num_categories, conjugate) for one, num in groups]
        )
    if isinstance(kind, Emission):
        return kind
    raise TypeError(
        "emissions: expected a name, an object with num_features, sites() and distribution(), or "
        f"a list of these, got {kind!r}"
    )
