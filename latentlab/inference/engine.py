"""``fit``: one loop from a pair and data to a posterior."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from latentlab.diagnostics import Estimate
from latentlab.inference import objectives
from latentlab.inference.arguments import as_arguments
from latentlab.inference.batches import num_rows, split
from latentlab.inference.check import prepare
from latentlab.inference.checkpoint import fingerprint
from latentlab.inference.climbs import Climbs, few_threads, some_rows
from latentlab.inference.devices import as_device
from latentlab.inference.evaluation import particle_chunk
from latentlab.inference.held_out import HeldOut, as_share, measure
from latentlab.inference.journal import Journal, Part, opened
from latentlab.inference.ladder import AnyClimb, ladder_for
from latentlab.inference.manifest import manifest
from latentlab.inference.minibatches import aligned_batch_size
from latentlab.inference.modes import standing
from latentlab.inference.networks import is_judged_by_row
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.posterior import Posterior
from latentlab.inference.progress import progress_bar
from latentlab.inference.ranks import ALONE, Ranks, joined
from latentlab.inference.rows import DRAWS_OF_ROWS, elbo_of_rows
from latentlab.inference.saa import expect_suits
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.settings import Settings, bound_of
from latentlab.inference.shards import share_out
from latentlab.inference.stages import INTERRUPTED, FitDivergedError
from latentlab.objectives import ELBO, Objective
from latentlab.protocols import HoldsOut, owner_of

__all__ = ["FitDivergedError", "fit"]

_log = logging.getLogger("latentlab")


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
    backend: Literal["auto", "eager", "traced", "xla"] = "auto",
    objective: Objective = ELBO(),  # noqa: B008
    method: Literal["auto", "stages", "saa", "natural"] = "auto",
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Posterior:
    r"""Fit a guide to the posterior of a model by stochastic variational inference.

    Maximises the evidence lower bound
    :math:`\mathbb{E}_{q(z)}[\log p(x, z) - \log q(z)]` from several starts: with fixed draws until
    these are enough, or in averaged stages until two of them agree; where the pair has networks,
    until the objective gains nothing more (see :mod:`latentlab.inference.networks`). A model
    without latents is fitted by maximum likelihood and needs no guide.

    Started several times, as by ``torchrun``, it is one fit: each process takes a part of the
    rows, and all return the same posterior.

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
        batch_size: rows per step, those of all processes; ``None`` takes all. The model must
            accept ``size``.
        num_restarts: starts; by default 4 for guides of ours, 1 for others and for large ones.
        num_particles: draws per step; by default 8 where they are cheap, else 1. For an
            objective of several draws, so many times those; by default once. With fixed draws,
            how many to begin with; updates in closed form have none.
        max_steps: steps of the climb from each start; with fixed draws, evaluations.
        lr: rate of the first stage, in posterior standard deviations (for a guide of your own: in
            units of its parameters); by default 0.05, and where the pair has networks the best of
            0.002, 0.008 and 0.032 (0.002 where there are too few steps to try them). Of updates
            in closed form it is the length, at most 1.
        tol: stages agree below this shift, in posterior standard deviations, and fixed draws are
            enough below this sampling error; where the pair has networks, its square is the gain
            in nats, for each latent of a row, that is none; half its square, in nats of all data,
            is what updates in closed form may leave.
        held_out: share of the rows that is kept aside and not fitted; ``posterior.held_out`` says
            how they fare, and a climb with networks ends where they get no better. By default
            what the model asks for, else 0.
        seed: same seed, same machine, same backend: same bytes.
        backend: what takes the steps: ``"eager"`` is Pyro as it is; ``"traced"`` is the pair
            written down once as a graph, which torch runs, and ``"xla"`` the same compiled, which
            needs JAX; both are compared with the pair. ``"auto"`` takes XLA where it can and where
            it pays, else the graph, else the pair. ``posterior.backend`` says which it was, and
            why.
        objective: what is climbed, one of :mod:`latentlab.objectives`: by default the ELBO,
            which is what is reported whatever is climbed.
        method: how it is climbed: ``"saa"`` (L-BFGS with fixed draws: Gaussian guides of ours over
            global latents), ``"natural"`` (conjugate updates, where the model offers them for the
            guide: expectation-maximisation for a point; see :mod:`latentlab.inference.natural`),
            ``"stages"`` (averaged stages of Adam), or ``"auto"`` for what suits the pair.
            ``posterior.method`` says which it was.
        progress: a progress bar; by default where stderr is a terminal.
        checkpoint: a folder, made if missing, where what was done so far is kept: after a kill,
            at any moment, the same call goes on from there, to the same bytes. Another model,
            other data or another setting is refused, and so is any folder for several processes.
        device: where the fit runs and the posterior lives, such as ``"cuda"``; by default where
            the data are. The model need not be written for it; what is shown, exported or saved
            comes from there by itself.

    Returns:
        The posterior: frozen, with its own copy of the pair.

    Raises:
        ValueError: for data, settings or a pair that cannot be fitted, and for a checkpoint of
            another fit; each fault is named.
        OSError: for a checkpoint that cannot be written to, or that another process uses.
        FitDivergedError: if the objective stays non-finite, or its gradient far above all before.
        MemoryError: if a step with a single particle does not fit; with several, half are taken.

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
    settings = Settings.checked(
        *(batch_size, num_restarts, num_particles, max_steps, lr, tol, seed, backend),
        *(objective, method),
    )
    where = as_device(device)
    modes = torch.inference_mode(False), torch.enable_grad()  # whatever the caller is in
    with modes[0], modes[1], joined(where) as ranks:
        if ranks and checkpoint is not None:
            raise ValueError(
                "checkpoint: a fit by several processes keeps none yet; leave it out, or save the "
                "posterior when it is done"
            )
        progress = progress if ranks.rank == 0 else False
        with opened(checkpoint) as journal:
            return _fit(model, data, guide, settings, held_out, progress, journal, where, ranks)


def _fit(
    model: Callable,
    data: Any,  # noqa: ANN401
    guide: Any,  # noqa: ANN401
    settings: Settings,
    held_out: float | None,
    progress: bool | None,
    journal: Journal,
    device: torch.device | None,
    ranks: Ranks,
) -> Posterior:
    begin, seed = time.perf_counter(), settings.seed
    fitted, held = _kept_aside(model, data, held_out, seed)
    try:
        whole, in_batches = None if held is None else data, settings.batch_size is not None
        pair, report = prepare(model, fitted, guide, whole, device, in_batches)
        report.expect_ok("the pair cannot be fitted")
    except (TypeError, ValueError) as error:
        if held is None:
            raise
        prepare(model, data, guide)  # rows are counted as they were given
        text = f"of the rows that held_out= leaves to fit, {error}; or fit all, held_out=0"
        raise ValueError(text) from error
    for fault in report.faults if ranks.rank == 0 else ():
        warnings.warn(str(fault), stacklevel=3)
    held = None if held is None else held.map(lambda tensor: tensor.to(pair.device))
    batch_size = aligned_batch_size(pair, settings.batch_size)
    pair.bound = bound_of(pair, settings.objective)
    expect_suits(pair, settings, batch_size)
    share_out(pair, ranks, settings.batch_size)
    if journal.folder is not None:
        journal.begin(manifest(pair, held, (model, guide), settings, held_out))
    pair.journal = journal
    enter = pair.entered(stream(seed, "fit"))
    with progress_bar(progress, settings.max_steps) as tick, enter, few_threads(pair, batch_size):
        climbs = Climbs(pair, settings, batch_size, tick, held)
        ladder = ladder_for(pair, guide, batch_size is not None)
        climb, restarts, rungs = ladder.ascend(pair, seed, climbs.first, climbs.further)
        elbo, compared = _figures(pair, climb, held, seed)
    pair.journal = Journal()
    pair.ranks = ALONE  # what is asked of a posterior is asked of each by itself
    if ranks.rank == 0:
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
        method=climb.method,
        backend=str(climb.engine),
        restarts=restarts,
        notes=(
            *(*map(str, report.faults), *report.notes),
            *(*climb.engine.notes, *_other_notes(pair, ranks)),
        ),
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


def _other_notes(pair: Pair, ranks: Ranks) -> Iterator[str]:
    if pair.bound is not None:
        whose = "each row" if pair.bound.plate else "all data in one"
        yield f"climbed {pair.bound.objective}, with the weights of {whose}; the ELBO is reported"
    yield from ranks.notes()


def _figures(
    pair: Pair, climb: AnyClimb, held: Arguments | None, seed: int
) -> tuple[Estimate, HeldOut | None]:
    """The ELBO, and how rows kept aside fare; Ctrl-C leaves what the climb knows of them."""
    elbo = climb.stage_elbos[-1] if climb.stage_elbos else Estimate(math.nan, math.nan)
    try:
        elbo = _final_elbo(pair, seed)
        return elbo, None if held is None else _compared(pair, held, seed)
    except KeyboardInterrupt:
        climb.stop_reason, climb.converged = INTERRUPTED, False
        return elbo, None


def _compared(pair: Pair, held: Arguments, seed: int) -> HeldOut:
    def run() -> Part:
        manual_seed(stream(seed, "held out"))
        return Part({}, {"rows": measure(pair, held, seed).spec()})

    name = pair.journal.name("held out", standing(pair))
    return HeldOut.from_spec(pair.journal.remember(name, run).facts["rows"])


def _final_elbo(pair: Pair, seed: int) -> Estimate:
    name = pair.journal.name("final elbo", standing(pair))
    return pair.journal.estimate(name, lambda: _measured_elbo(pair, seed))


def _measured_elbo(pair: Pair, seed: int) -> Estimate:
    manual_seed(stream(seed, "elbo"))
    if is_judged_by_row(pair):
        return elbo_of_rows(some_rows(pair, seed), num_rows(pair.data) or 1, DRAWS_OF_ROWS)
    num_draws = 1 if pair.is_point() else 1000 if pair.vectorised else 100
    chunk = particle_chunk(pair, num_draws, summed=True)  # draws of many rows are many numbers
    with torch.no_grad():
        parts = [
            objectives.log_weights(pair, min(chunk, num_draws - start))
            for start in range(0, num_draws, chunk)
        ]
    weights = torch.cat(parts)
    return Estimate.from_draws(weights) if num_draws > 1 else Estimate(float(weights[0]), 0.0)
