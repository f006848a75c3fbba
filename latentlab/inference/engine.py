"""``fit``: one loop from a pair and data to a posterior."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoGuide

from latentlab.diagnostics import Estimate
from latentlab.guides import Flow, Guide
from latentlab.inference import objectives
from latentlab.inference.arguments import as_arguments
from latentlab.inference.batches import Batches, follows_rows, num_rows, split, take
from latentlab.inference.bounds import draws_for
from latentlab.inference.check import Fault, accepts_size, prepare
from latentlab.inference.checkpoint import fingerprint
from latentlab.inference.held_out import as_share, measure
from latentlab.inference.ladder import ladder_for
from latentlab.inference.networks import NETWORK_RATE, NetworkClimb, has_networks, is_judged_by_row
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.posterior import Posterior
from latentlab.inference.restarts import Place, Restarts, distances
from latentlab.inference.rows import DRAWS_OF_ROWS, elbo_of_rows, looked_at
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.settings import RATE, Settings, bound_of
from latentlab.inference.stages import (
    INTERRUPTED,
    Climb,
    FitDivergedError,
    State,
    particle_chunk,
)
from latentlab.inference.starts import Starts
from latentlab.inference.steps import Engine
from latentlab.objectives import ELBO, Objective
from latentlab.protocols import Exchangeable, HoldsOut, owner_of

__all__ = ["FitDivergedError", "fit"]

_log = logging.getLogger("latentlab")

_WARM_UP = 400  # steps from each start
_MANY_PARAMETERS = 100_000  # above, one start is what a fit can afford
_FLOW_PARTICLES = 32  # a flow has to see the tails that it bends
_CHEAP_ELEMENTS = 20_000  # below, eight particles cost about what one does, on one thread


def fit(
    model: Callable,
    data: Any = None,  # noqa: ANN401
    guide: Any = "auto",  # noqa: ANN401
    *,
    batch_size: int | None = None,
    num_restarts: int | None = None,
    num_particles: int | None = None,
    max_steps: int = 20_000,
    lr: float | None = None,
    tol: float = 0.03,
    held_out: float | None = None,
    seed: int = 0,
    backend: Literal["auto", "eager", "xla"] = "auto",
    objective: Objective = ELBO(),  # noqa: B008
    progress: bool | None = None,
) -> Posterior:
    r"""Fit a guide to the posterior of a model by stochastic variational inference.

    Maximises the evidence lower bound
    :math:`\mathbb{E}_{q(z)}[\log p(x, z) - \log q(z)]` from several starts, in averaged stages,
    until two stages agree; where the pair has networks, until the objective gains nothing more
    (see :mod:`latentlab.inference.networks`). A model without latents is fitted by maximum
    likelihood and needs no guide.

    The arguments are not changed, nor is any state of Pyro or torch.

    Arguments:
        model: a callable with ``pyro.sample`` statements; best ``model(x=None, size=None)``.
        data: a tensor, array, frame or ``Table`` (one argument), a tuple (``*args``) or a dict
            (``**kwargs``).
        guide: a callable with the model's signature, a guide of ``latentlab.guides``, or one of
            ``"auto"`` (the model's own; else the ladder: mean-field, then full-rank, then a flow,
            as far as k-hat asks for it), ``"point"`` (the mode: no spread, the quickest),
            ``"mean_field"`` (a normal with independent numbers: many latents),
            ``"low_rank"`` (a normal with a few shared directions: hundreds of correlated
            latents), ``"full_rank"`` (a normal with all correlations: up to some hundred),
            ``"structured"`` (all correlations of global latents; those of a row given them: many
            rows), ``"amortised"`` (a network computes the latents of a row from it: new rows and
            mini-batches), ``"flow"`` (a bent normal: tails and curves that no normal has).
        batch_size: rows per step; ``None`` takes all. The model must accept ``size``.
        num_restarts: starts; by default 4 for guides of ours, 1 for others and for large ones.
        num_particles: draws per step; by default 8 where they are cheap, else 1. For an
            objective of several draws, so many times those; by default once.
        max_steps: steps of the climb from each start.
        lr: rate of the first stage, in posterior standard deviations (for a guide of your own: in
            units of its parameters); by default 0.05, and where the pair has networks the best of
            0.002, 0.008 and 0.032 (0.002 where there are too few steps to try them).
        tol: stages agree below this shift, in posterior standard deviations; where the pair has
            networks, its square is the gain in nats, for each latent of a row, that is none.
        held_out: share of the rows that is kept aside and not fitted; ``posterior.held_out`` says
            how they fare, and a climb with networks ends where they get no better. By default
            what the model asks for, else 0.
        seed: same seed, same machine, same backend: same bytes.
        backend: what takes the steps: ``"eager"`` is Pyro as it is; ``"xla"`` is the pair written
            down once as a graph, compared with the pair, and compiled, which needs JAX;
            ``"auto"`` takes XLA where it can and where it pays. ``posterior.backend`` says which
            it was, and why.
        objective: what is climbed, one of :mod:`latentlab.objectives`: by default the ELBO,
            which is what is reported whatever is climbed.
        progress: a progress bar; by default where stderr is a terminal.

    Returns:
        The posterior: frozen, with its own copy of the pair.

    Raises:
        ValueError: for data, settings or a pair that cannot be fitted; each fault is named.
        FitDivergedError: if the objective stays non-finite.

    References:
        | Stochastic variational inference (Hoffman et al., 2013)
        | Robust, automated, and accurate black-box variational inference (Welandawe et al., 2022)

    Example:
        >>> import latentlab as ll
        >>> x = ll.data.simulate.eruptions(num_rows=100)
        >>> model = ll.GaussianMixture(num_features=2, num_components=2)
        >>> posterior = ll.fit(model, x, num_restarts=1, max_steps=300, progress=False)
        >>> posterior.sample(5)["locs"].shape
        torch.Size([5, 2, 2])
    """
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        return _fit(
            *(model, data, guide),
            Settings.checked(
                *(batch_size, num_restarts, num_particles, max_steps, lr, tol, seed, backend),
                objective,
            ),
            held_out,
            progress,
        )


def _fit(
    model: Callable,
    data: Any,  # noqa: ANN401
    guide: Any,  # noqa: ANN401
    settings: Settings,
    held_out: float | None,
    progress: bool | None,
) -> Posterior:
    begin, seed = time.perf_counter(), settings.seed
    fitted, held = _kept_aside(model, data, held_out, seed)
    try:
        pair, report = prepare(model, fitted, guide, None if held is None else data)
        if not report.ok:
            raise ValueError(_refusal(report.faults))
    except (TypeError, ValueError) as error:
        if held is None:
            raise
        prepare(model, data, guide)  # rows are counted as they were given
        text = f"of the rows that held_out= leaves to fit, {error}; or fit all, held_out=0"
        raise ValueError(text) from error
    for fault in report.faults:
        warnings.warn(str(fault), stacklevel=3)
    batch_size = _batch_size(pair, settings.batch_size)
    pair.bound = bound_of(pair, settings.objective)
    enter = pair.entered(stream(seed, "fit"))
    with _progress(progress, settings.max_steps) as tick, enter, _threads(pair, batch_size):
        climb, restarts, rungs = ladder_for(pair, guide, batch_size is not None).ascend(
            *(pair, seed),
            lambda leave: _climb(pair, settings, batch_size, tick, held, leave),
            lambda rung: _further(pair, settings, batch_size, tick, rung),
        )
        elbo = _final_elbo(pair, seed)
        manual_seed(stream(seed, "held out"))
        compared = None if held is None else measure(pair, held, seed)
    _log.info("fit ended: %s", climb.stop_reason)
    return Posterior(
        pair=pair,
        seed=seed,
        elbo=elbo,
        losses=torch.tensor(climb.losses, dtype=torch.float64),
        stage_starts=tuple(climb.stage_starts),
        stage_elbos=tuple(climb.stage_elbos),
        converged=climb.converged,
        stop_reason=climb.stop_reason,
        backend=str(climb.engine),
        restarts=restarts,
        notes=(*map(str, report.faults), *report.notes, *_other_than_the_elbo(pair)),
        seconds=time.perf_counter() - begin,
        fitted_to=fingerprint(pair.data),
        held_out_rows=compared,
        ladder=rungs,
    )


def _kept_aside(
    model: Callable,
    data: Any,  # noqa: ANN401
    held_out: float | None,
    seed: int,
) -> tuple[Any, Arguments | None]:
    """The data to fit, and those kept aside where some are."""
    owner = owner_of(model)
    if held_out is None and isinstance(owner, HoldsOut):
        share, data = as_share(owner.held_out), as_arguments(data, model)
        # What the model would like is no reason to refuse a handful of rows.
        few = round(share * (num_rows(data) or 0)) < 2
        share = 0.0 if few else share
    else:
        share = 0.0 if held_out is None else as_share(held_out)
    return split(as_arguments(data, model), share, seed) if share else (data, None)


def _other_than_the_elbo(pair: Pair) -> Iterator[str]:
    if pair.bound is not None:
        whose = "each row" if pair.bound.plate else "all data in one"
        yield f"climbed {pair.bound.objective}, with the weights of {whose}; the ELBO is reported"


def _refusal(faults: tuple[Fault, ...]) -> str:
    fatal = [str(fault) for fault in faults if fault.fatal]
    return "the pair cannot be fitted: " + "; ".join(fatal)


def _batch_size(pair: Pair, batch_size: int | None) -> int | None:
    """The size of a mini-batch that can be taken, or ``None`` for the whole data."""
    if batch_size is None:
        return None
    tensors = pair.data.tensors()
    if not tensors or any(t.dim() == 0 or len(t) != len(tensors[0]) for t in tensors):
        raise ValueError("batch_size: expected data whose tensors have one row for each datum")
    if not accepts_size(pair.model):
        raise ValueError(
            "batch_size: the model must accept size=..., the number of rows a batch stands for; "
            "write model(x=None, size=None) with rows(x, size)"
        )
    local = pair.local_plate()
    if isinstance(pair.guide, Guide | AutoGuide) and local and not _follows_rows(pair, local):
        raise ValueError(
            f"batch_size: latents are local to plate {local!r}, which this guide cannot follow "
            'through mini-batches; take guide="mean_field" or "structured", '
            "latentlab.guides.Amortised, or a guide of your own that computes them from the batch"
        )
    if batch_size > len(tensors[0]):
        warnings.warn(
            f"batch_size: {batch_size} is more than the {len(tensors[0])} rows; all are taken",
            stacklevel=4,
        )
        return None
    if batch_size == len(tensors[0]):
        return None
    _expect_scaled(pair, batch_size, len(tensors[0]))
    return batch_size


def _expect_scaled(pair: Pair, batch_size: int, total: int) -> None:
    """A mini-batch has to stand for all rows: the model says so with ``size``, or is refused."""
    part = take(pair.data, torch.arange(batch_size))
    scales = []
    with pair.entered(seed=0), torch.no_grad():
        for size in (batch_size, total):
            try:
                model = poutine.trace(pair.model)
                nodes = model.get_trace(*part.args, **{**part.kwargs, "size": size}).nodes
            except Exception as error:
                raise ValueError(
                    f"batch_size: the model does not run on {batch_size} of the {total} rows "
                    f"({' '.join(str(error).split())}); its plate must be rows(x, size)"
                ) from error
            scales.append({site: torch.as_tensor(nodes[site]["scale"]) for site in pair.observed})
    some, all_of_them = scales
    unscaled = [
        site
        for site in pair.observed
        if not torch.allclose(all_of_them[site] * batch_size, some[site] * total)
    ]
    plate = pair.rows_plate()
    of_rows = [s for s in unscaled if plate in {name for name, _, _ in pair.plates[s]}]
    # Without a plate of rows, sites that are scaled by hand are told from those of no row by that.
    if of_rows or (plate is None and len(unscaled) == len(pair.observed)):
        raise ValueError(
            f"batch_size: the model counts {batch_size} rows as {batch_size}, where they stand "
            f"for size={total} (site {unscaled[0]!r}); put its sites into rows(x, size), or in "
            "pyro.plate(name, size, subsample=x)"
        )


def _follows_rows(pair: Pair, local_plate: str) -> bool:
    """Whether a guide draws the latents of the rows of a mini-batch, and these alone."""
    # A flow is laid over a guide of another kind first.
    follows = isinstance(pair.guide, Guide) and pair.guide.follows_rows
    return follows and pair.rows_plate() == local_plate


def _batches(pair: Pair, batch_size: int | None, seed: int) -> Batches:
    is_known = isinstance(pair.guide, Guide | AutoGuide)
    if batch_size is not None and not is_known and not accepts_size(pair.guide):
        raise ValueError("batch_size: the guide must accept size=..., as the model does")
    return Batches(pair.data, batch_size, stream(seed, "batch"))


def _climb(
    pair: Pair,
    settings: Settings,
    batch_size: int | None,
    tick: Callable[[int, float], None],
    held: Arguments | None,
    leave: Callable[[], bool],
) -> tuple[Climb | NetworkClimb, Restarts]:
    """Warm up from every start, go on from the best until converged, unless it is left then."""
    num_restarts, num_particles = _affordable(pair, settings, batch_size)
    lr, tol, max_steps = _first_rate(pair, settings), settings.tol, settings.max_steps
    networks, finds_rate = has_networks(pair), settings.lr is None
    rate = 2 * lr if isinstance(pair.guide, Guide) and not networks else lr
    elbos: list[Estimate] = []
    places: list[Place] = []
    warm: list[tuple[float, Climb | NetworkClimb, State]] = []
    climb, origin, error = None, None, None
    engine = Engine(pair, settings.backend, num_particles, max_steps)
    try:
        for start in range(num_restarts):
            begin = stream(settings.seed, "start", start)
            batch = _batches(pair, batch_size, begin)
            how = (pair, begin, num_particles, lr, tol, max_steps, batch, tick)
            net = (held, batch_size, finds_rate)
            climb = NetworkClimb(*how, engine, *net) if networks else Climb(*how, engine)
            origin = origin or climb.state()
            climb.restore(origin)  # a guide of your own begins where you set it, each time
            try:
                Starts(_some_rows(pair, settings.seed), settings.seed).place(start)
                draws, elbo = climb.warm_up(_WARM_UP, rate)
                if math.isnan(elbo.value):
                    elbo = Estimate(-math.inf, 0.0)  # the worst; a NaN is neither
                warm.append((elbo.value, climb, climb.state()))
                values = draws.values
            except FitDivergedError as diverged:
                elbo, values, error = Estimate(-math.inf, 0.0), {}, diverged
            elbos.append(elbo)
            places.append(Place.of({z.name: values[z.name] for z in pair.latents if values}))
        if error is not None and not warm:
            raise error
        climb = _best(warm)
        warm.clear()
        if not leave():
            climb.until_converged()
    except KeyboardInterrupt:
        if climb is None:
            raise
        climb = _best(warm) if warm else climb
        climb.stop_reason = INTERRUPTED
    return climb, _agreement(pair, elbos, places)


def _further(
    pair: Pair,
    settings: Settings,
    batch_size: int | None,
    tick: Callable[[int, float], None],
    rung: int,
) -> Climb:
    """A climb that begins where another guide ended."""
    seed = stream(settings.seed, "rung", rung)
    num_particles = _affordable(pair, settings, batch_size)[1]
    if isinstance(pair.guide, Flow) and settings.num_particles is None and pair.vectorised:
        num_particles = draws_for(pair.bound, _FLOW_PARTICLES)
    lr, batch = _first_rate(pair, settings), _batches(pair, batch_size, seed)
    how = (pair, seed, num_particles, lr, settings.tol, settings.max_steps, batch, tick)
    return Climb(*how, Engine(pair, settings.backend, num_particles, settings.max_steps))


def _first_rate(pair: Pair, settings: Settings) -> float:
    """The rate that was asked for, or what suits the pair."""
    return settings.lr or (NETWORK_RATE if has_networks(pair) else RATE)


def _agreement(pair: Pair, elbos: list[Estimate], places: list[Place]) -> Restarts:
    """How far the starts agree; how far they are apart is known where a guide has a spread."""
    if not elbos or pair.is_point() or not all(place.mean for place in places):
        return Restarts(tuple(elbos))
    owner = owner_of(pair.model)
    axes = owner.exchangeable if isinstance(owner, Exchangeable) else {}
    best = max(range(len(elbos)), key=lambda i: elbos[i].value)
    return Restarts(tuple(elbos), distances(places, best, axes))


def _best(warm: list[tuple[float, Climb | NetworkClimb, State]]) -> Climb | NetworkClimb:
    """The climb that got highest, the pair back in its state."""
    _, climb, state = max(warm, key=lambda reached: reached[0])
    climb.restore(state)
    return climb


def _affordable(pair: Pair, settings: Settings, batch_size: int | None) -> tuple[int, int]:
    """Numbers of starts and of particles, where the caller did not say."""
    ours = isinstance(pair.guide, Guide)
    size = sum(p.numel() for p in pair.parameters().values())
    num_restarts = settings.num_restarts or (
        4 if ours and pair.latents and size < _MANY_PARAMETERS else 1
    )
    many = pair.vectorised and _numbers(pair, batch_size) <= _CHEAP_ELEMENTS
    num_particles = settings.num_particles or (8 if many else 1)
    if pair.is_point():
        num_particles = 1  # a point is drawn without noise
    if settings.objective.num_samples > 1:
        num_particles = settings.objective.num_samples * (settings.num_particles or 1)
    return num_restarts, num_particles


def _numbers(pair: Pair, batch_size: int | None) -> int:
    """Numbers that a step with one particle looks at."""
    rows = sum(t.numel() for t in pair.data.tensors())
    if batch_size is not None:
        rows = rows * batch_size // len(pair.data.tensors()[0])
    return rows + sum(p.numel() for p in pair.parameters().values())


@contextmanager
def _threads(pair: Pair, batch_size: int | None) -> Iterator[None]:
    """One thread where steps are small: on a busy machine they would wait for each other."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if _numbers(pair, batch_size) <= _CHEAP_ELEMENTS else before)
        yield
    finally:
        torch.set_num_threads(before)


def _some_rows(pair: Pair, seed: int) -> Pair:
    """The pair at so many rows as can be looked at again and again."""
    return looked_at(pair, seed) if follows_rows(pair) else pair


def _final_elbo(pair: Pair, seed: int) -> Estimate:
    manual_seed(stream(seed, "elbo"))
    if is_judged_by_row(pair):
        return elbo_of_rows(_some_rows(pair, seed), num_rows(pair.data) or 1, DRAWS_OF_ROWS)
    num_draws = 1 if pair.is_point() else 1000 if pair.vectorised else 100
    chunk = particle_chunk(pair, num_draws)  # draws of many rows are many numbers
    with torch.no_grad():
        parts = [
            objectives.log_weights(pair, min(chunk, num_draws - start))
            for start in range(0, num_draws, chunk)
        ]
    weights = torch.cat(parts)
    return Estimate.from_draws(weights) if num_draws > 1 else Estimate(float(weights[0]), 0.0)


@contextmanager
def _progress(wanted: bool | None, total: int) -> Iterator[Callable[[int, float], None]]:
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
