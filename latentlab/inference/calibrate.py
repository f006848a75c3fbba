r"""Simulation-based calibration of a model with its guide.

.. math:: \theta_m \sim p(\theta), \quad y_m \sim p(y \mid \theta_m), \quad
          \theta_{m1}, \ldots, \theta_{mS} \sim q(\theta \mid y_m)

If every q is the posterior, each :math:`\theta_m` is a draw like the others, and its rank among
them is uniform. The refits go as one where the pair can be recorded (:mod:`.swarm`), else in turn.

Letters: M simulations, S draws of each, F quantities.

References:
    | Validating Bayesian inference algorithms with simulation-based calibration
      (Talts et al., 2018)
    | Posterior SBC: simulation-based calibration checking conditional on data
      (Säilynoja, Schmitt, Bürkner and Vehtari, 2025)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyro.poutine as poutine
import torch
from torch import Tensor

from latentlab.data.checks import as_count, as_seed
from latentlab.diagnostics import Contraction, Coverage, Sbc, contraction, coverage, sbc, sbc_ranks
from latentlab.guides import Draws, Flow, Guide
from latentlab.inference import objectives
from latentlab.inference.axes import labels_of
from latentlab.inference.batches import num_rows
from latentlab.inference.check import prepare
from latentlab.inference.checkpoint import fingerprint
from latentlab.inference.devices import CPU
from latentlab.inference.engine import fit
from latentlab.inference.networks import has_networks
from latentlab.inference.pair import Pair
from latentlab.inference.posterior import Posterior
from latentlab.inference.program import UntraceableError
from latentlab.inference.progress import progress_bar
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.settings import expect_one_of
from latentlab.inference.simulate import Simulations, simulate
from latentlab.inference.starts import Starts
from latentlab.inference.swarm import UNSETTLED, Swarm
from latentlab.inference.units import units_kept
from latentlab.inference.xla import has_jax
from latentlab.protocols import Exchangeable, OffersGuide, OffersUpdates, owner_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Calibration", "calibrate"]

Backend = Literal["auto", "eager", "xla"]

_LOG_LIK = "log-likelihood"
_FULL_RANK_UP_TO = 200
_PARTICLES = 8


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """What :func:`calibrate` found.

    Arguments:
        sbc: the test of the ranks of every latent number, and of the log-likelihood.
        coverage: how often central intervals held the truth.
        contraction: z-scores of the means, and how much narrower posteriors are than the prior.
        truth: what the data were simulated with, shape (M, F), the log-likelihood last.
        draws: of the posteriors, shape (M, S, F).
        how: whether refits went as one or in turn, and why.
        unsettled: share of the refits that had not come to rest.
        seconds: wall-clock time.
    """

    sbc: Sbc
    coverage: Coverage
    contraction: Contraction
    truth: Tensor
    draws: Tensor
    how: str
    unsettled: float
    seconds: float

    @property
    def ok(self) -> bool:
        """True where no quantity is off by more than chance, all of them taken together."""
        return self.sbc.ok

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the quantities, F of them."""
        return self.sbc.names

    def __str__(self) -> str:
        lines = [str(self.sbc), str(self.coverage), str(self.contraction), f"refits: {self.how}"]
        if self.unsettled:
            lines.append(
                f"{self.unsettled:.0%} of the refits had not come to rest: what is off may be the "
                "climb, not the guide"
            )
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self) -> Figure:
        """ECDF differences, coverage and contraction, side by side."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        self.sbc.plot(left)
        self.coverage.plot(middle)
        self.contraction.plot(right)
        return figure


def calibrate(
    model: Callable,
    data: Any = None,  # noqa: ANN401
    guide: Any = "auto",  # noqa: ANN401
    *,
    num_simulations: int = 100,
    num_draws: int = 99,
    around: Posterior | None = None,
    seed: int = 0,
    backend: Backend = "auto",
    progress: bool | None = None,
) -> Calibration:
    r"""Whether a guide's posteriors hold the truth as often as they say, by simulation.

    Data sets like the given ones are drawn from the model, each is fitted, and the rank of what it
    was drawn with is taken among draws of its posterior. How to read it: "calibrated" means no
    fault beyond chance at this number of simulations (100 find standard deviations 0.6 times
    right, 1000 those 0.85 times right); "too narrow" asks for a richer guide. The log-likelihood
    is among the quantities: a posterior that ignores its data is calibrated in everything else.

    Components that may swap labels are sorted, each of their numbers for itself: what is ranked
    does not depend on labels.

    Arguments:
        model: as for :func:`latentlab.fit`; all its unknowns have priors, and what it observes are
            arguments of it.
        data: data of the right shape, as for :func:`latentlab.fit`; what the model observes is
            replaced, covariates are kept, and priors that scale to data scale to these.
        guide: as for :func:`latentlab.fit`, but that ``"auto"`` is the model's own or, without
            one, ``"full_rank"`` up to 200 latents and ``"mean_field"`` beyond.
        num_simulations: number M of data sets.
        num_draws: draws S behind each rank; S + 1 a round number makes even ranks.
        around: a posterior of this model and these data: simulate from it instead of from the
            prior, and fit to its rows and the simulated ones together. Calibration where it
            matters, if the prior is wide. Needs data with one row for each datum.
        seed: of everything.
        backend: ``"xla"`` (all refits as one), ``"eager"`` (in turn), or ``"auto"``.
        progress: a progress bar; by default where stderr is a terminal.

    Returns:
        The tests, with ``str()`` and ``plot()``.

    Raises:
        ValueError: for a model that cannot be simulated, or settings out of range.

    Example:
        >>> import pyro, torch, latentlab as ll, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        ...     with ll.rows(x):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> found = ll.calibrate(model, torch.zeros(5), num_simulations=50, progress=False)
        >>> found.names
        ('loc', 'log-likelihood')
    """
    expect_one_of(get_args(Backend), backend, "backend")
    sizes = (
        as_count(num_simulations, "num_simulations", minimum=10),
        as_count(num_draws, "num_draws", minimum=9),
    )
    begin, seed = time.perf_counter(), as_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        pair = _looked_at(model, data, guide)
        axes = _sortable(pair)
        with pair.entered(stream(seed, "simulate")):
            latents = None if around is None else _latents(pair, around, sizes[0], seed)
            simulations = simulate(pair, sizes[0], stream(seed, "simulate"), latents)
        if around is not None:
            simulations = _beside(simulations)
            with units_kept():
                pair = _looked_at(pair.model, simulations[0], guide)
        with progress_bar(progress, sizes[0], "refits", every=1) as tick:
            refits = _Refits(pair, simulations, sizes[1], seed, axes)
            how = refits.run(guide, backend, tick)
    truth, draws = torch.stack(refits.truth), torch.stack(refits.draws)  # (M, F), (M, S, F)
    names = refits.names
    ranks = sbc_ranks(truth, draws, seed)
    return Calibration(
        sbc=sbc(ranks, sizes[1], names),
        coverage=coverage(ranks, sizes[1], names=names),
        contraction=contraction(truth, draws.mean(1), draws.std(1), truth.std(0), names),
        truth=truth,
        draws=draws,
        how=how,
        unsettled=refits.unsettled,
        seconds=time.perf_counter() - begin,
    )


def _latents(pair: Pair, around: Posterior, num: int, seed: int) -> dict[str, Tensor]:
    """Draws of a posterior of the same model and data."""
    if not isinstance(around, Posterior):
        raise TypeError(f"around: expected a Posterior, got {type(around).__name__}")
    theirs = {z.name: z.shape for z in around.pair.latents}
    if theirs != {z.name: z.shape for z in pair.latents}:
        raise ValueError(f"around: expected a posterior of this model, got one of {theirs}")
    if around.fitted_to != fingerprint(pair.data):
        raise ValueError("around: expected a posterior of these data, got one of others")
    return around.sample(num, seed)


def _looked_at(model: Callable, data: Any, guide: Any) -> Pair:  # noqa: ANN401
    """The pair to be refitted, on a guide with a spread."""
    pair, report = prepare(model, data, guide)
    report.expect_ok("the pair cannot be fitted")
    is_auto = isinstance(guide, str) and guide == "auto"
    if is_auto and not isinstance(owner_of(pair.model), OffersGuide):
        size = sum(math.prod(z.free_shape) for z in pair.latents)
        if size <= _FULL_RANK_UP_TO:
            return _looked_at(model, data, "full_rank")
    if not any(math.prod(z.free_shape) for z in pair.latents):
        raise ValueError("model: it has no continuous latents whose posteriors could be off")
    if pair.is_point():
        raise ValueError("guide: a point has no draws to rank; take one with a spread")
    own = [name for name in pair.store["params"] if name in _parameters_of_the_model(pair)]
    if own:
        raise ValueError(
            f"model: its parameter {own[0]!r} is optimised, so that no prior says what data to "
            "expect; give it a prior (pyro.sample)"
        )
    return pair


def _parameters_of_the_model(pair: Pair) -> set[str]:
    """Names of the parameters that the model itself asks for."""
    with pair.entered(seed=0), torch.no_grad(), poutine.trace(param_only=True) as tape:
        pair.data.call(pair.model)
    return {*tape.trace.nodes}


def _sortable(pair: Pair) -> Mapping[str, tuple[int, ...]]:
    """Site -> its axes, from the right, over components that may swap labels."""
    owner = owner_of(pair.model)
    axes = owner.exchangeable if isinstance(owner, Exchangeable) else {}
    return {site: (axis,) if isinstance(axis, int) else tuple(axis) for site, axis in axes.items()}


def _beside(simulations: Simulations) -> Simulations:
    """The rows that were observed with the simulated ones after them."""
    rows = num_rows(simulations.data)
    if rows is None:
        raise ValueError("around: expected data whose tensors have one row for each datum")
    tensors, M = simulations.data.tensors(), len(simulations)
    observed = {
        k: torch.cat([tensors[k].expand(M, *tensors[k].shape), drawn], 1)
        for k, drawn in simulations.observed.items()
    }
    return Simulations(
        simulations.truth, observed, simulations.data.map(lambda t: torch.cat([t, t]))
    )


class _Refits:
    """Posteriors of all simulations, by what is ranked.

    Arguments:
        pair: the pair, with data like those that were simulated.
        simulations: the data sets.
        num_draws: draws S of each posterior.
        seed: of the refits.
        axes: of components that are sorted.
    """

    def __init__(
        self,
        pair: Pair,
        simulations: Simulations,
        num_draws: int,
        seed: int,
        axes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.pair, self.simulations, self.num_draws = pair, simulations, num_draws
        self.seed, self.axes = seed, axes
        self.latents = [z for z in pair.latents if math.prod(z.free_shape)]  # not a weight of one
        self.truth: list[Tensor] = []  # (F,) each
        self.draws: list[Tensor] = []  # (S, F) each
        self.unsettled = 0.0

    @property
    def names(self) -> list[str]:
        """Names of the quantities, the log-likelihood last."""
        found = []
        for latent in self.latents:
            labels = labels_of(self.pair, latent.name, latent.shape)
            sorted_too = " in order" * (latent.name in self.axes)
            found += [
                f"{latent.name}{sorted_too}" + f"[{label}]" * bool(label) for label in labels
            ]
        return [*found, _LOG_LIK]

    def run(
        self,
        guide: Any,  # noqa: ANN401
        backend: Backend,
        tick: Callable[[int, float], None],
    ) -> str:
        """Fit all, and say how."""
        why = self._reason(backend)
        if not why:
            try:
                self._as_one(tick)
            except (UntraceableError, NotImplementedError) as error:
                why = str(error)
            else:
                return f"{len(self.simulations)} as one"
        if backend == "xla":
            raise ValueError(f'backend: "xla" cannot refit this pair: {why}')
        self._in_turn(guide, tick)
        return f"{len(self.simulations)} in turn: {why}"

    def _reason(self, backend: Backend) -> str:
        """Why refits cannot go as one, where that is known before."""
        guide, owner = self.pair.guide, owner_of(self.pair.model)
        if backend == "eager":
            return "asked for"
        if self.pair.device != CPU:
            return f"it is on {self.pair.device}, and XLA runs on the CPU here"
        if isinstance(owner, OffersUpdates) and owner.updates(guide) is not None:
            return "it is set by conjugate updates, which climb each from several starts"
        if not has_jax():
            return "JAX is not installed: pip install 'latentlab[xla]'"
        if isinstance(guide, Flow):
            return "a flow is laid over a normal guide first"
        if has_networks(self.pair):
            return "it has networks"
        if isinstance(guide, Guide) and not self.pair.vectorised:
            return "its particles go one by one"
        return ""

    def _as_one(self, tick: Callable[[int, float], None]) -> None:
        pair, M = replace(self.pair, data=self.simulations[0]), len(self.simulations)

        def told(share: float) -> None:
            tick(round(share * M), math.nan)

        with pair.entered(stream(self.seed, "refits")):
            if isinstance(pair.guide, Guide):
                Starts(pair, self.seed).spread_over_prior()
            particles = _PARTICLES if pair.vectorised else 1
            swarm = Swarm(pair, self.simulations, particles, self.seed, told)
            swarm.fit()
            for m in range(M):
                swarm.put(m)
                self._note(pair, m)
        self.unsettled = float((swarm.shifts > UNSETTLED).double().mean())

    def _in_turn(self, guide: Any, tick: Callable[[int, float], None]) -> None:  # noqa: ANN401
        """Fit one after the other, in the units of the data that were given."""
        own, model = self.pair.guide, self.pair.model
        is_auto = isinstance(guide, str) and guide == "auto"
        if is_auto and isinstance(own, Guide) and not isinstance(owner_of(model), OffersGuide):
            guide = type(own)()  # and no ladder
        unsettled = 0
        for m in range(len(self.simulations)):
            seed = stream(self.seed, "fit", m)
            with units_kept():
                posterior = fit(model, self.simulations[m], guide, seed=seed, progress=False)
            unsettled += not posterior.converged
            with posterior.pair.entered(0):
                self._note(posterior.pair, m)
            tick(m + 1, math.nan)
        self.unsettled = unsettled / len(self.simulations)

    def _note(self, pair: Pair, m: int) -> None:
        """Put the truth of a simulation, and draws of the posterior, on record."""
        pair = replace(pair, data=self.simulations[m])
        manual_seed(stream(self.seed, "draws", m))
        with torch.no_grad():
            drawn = objectives.draw(pair, self.num_draws)
            values = {z.name: drawn.values[z.name] for z in pair.latents}
            self.draws.append(self._quantities(pair, values))
            truth = {
                z.name: self.simulations.truth[z.name][m].reshape(
                    1, *(1,) * (pair.nesting - len(z.batch_shape)), *z.shape
                )
                for z in pair.latents
            }
            self.truth.append(self._quantities(pair, truth)[0])

    def _quantities(self, pair: Pair, values: Mapping[str, Tensor]) -> Tensor:
        """All that is ranked (P, F): latents, sorted where labels may swap, and log-likelihood."""
        num = len(next(iter(values.values())))
        found = []
        for latent in self.latents:
            value = values[latent.name].reshape(num, *latent.shape)
            if axes := self.axes.get(latent.name):
                value = _in_order(value, axes)
            found.append(value.reshape(num, -1).double())
        sites = objectives.site_log_probs(pair, Draws(dict(values), torch.zeros(num)))
        parts = {site: sites[site] for site in pair.observed if site in sites}
        log_lik = objectives.per_particle(parts, num, pair.nesting)
        return torch.cat([*found, log_lik[:, None].double()], 1)


def _in_order(value: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sorted over axes from the right, all of them taken together; the shape stays."""
    ends = list(range(-len(axes), 0))
    moved = value.movedim(axes, ends)
    flat = moved.flatten(-len(axes)).sort(-1).values
    return flat.reshape(moved.shape).movedim(ends, axes)
