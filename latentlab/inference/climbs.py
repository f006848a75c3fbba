"""The climbs of a fit: from every start, and from the end of one guide on with the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from latentlab.diagnostics import Estimate
from latentlab.guides import Flow, Guide
from latentlab.inference.batches import Batches, follows_rows
from latentlab.inference.bounds import draws_for
from latentlab.inference.halving import climb_naturally, natural_updates
from latentlab.inference.ladder import AnyClimb
from latentlab.inference.many_rows import glance
from latentlab.inference.minibatches import batches_of
from latentlab.inference.networks import NETWORK_RATE, NetworkClimb, has_networks
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.ranks import ALONE
from latentlab.inference.restarts import Place, Restarts, distances
from latentlab.inference.rows import looked_at
from latentlab.inference.saa import SaaClimb, is_for
from latentlab.inference.sandbox import stream
from latentlab.inference.settings import RATE, Settings
from latentlab.inference.shards import Shard
from latentlab.inference.stages import INTERRUPTED, Climb, FitDivergedError, State
from latentlab.inference.starts import Starts
from latentlab.inference.steps import Engine
from latentlab.protocols import Exchangeable, owner_of

__all__ = ["Climbs", "few_threads", "some_rows"]

_WARM_UP = 400  # steps from each start
_MANY_PARAMETERS = 100_000  # above, one start is what a fit can afford
_FLOW_PARTICLES = 32  # a flow has to see the tails that it bends
_CHEAP_ELEMENTS = 20_000  # below, eight particles cost about what one does, on one thread


@dataclass(frozen=True)
class Climbs:
    """The climbs of one fit.

    Arguments:
        pair: the pair, entered.
        settings: what was asked for.
        batch_size: rows per step; ``None`` for all.
        tick: called after every step, for a progress bar.
        held: rows kept aside.
    """

    pair: Pair
    settings: Settings
    batch_size: int | None
    tick: Callable[[int, float], None]
    held: Arguments | None

    def first(self, leave: Callable[[], bool]) -> tuple[AnyClimb, Restarts]:
        """Warm up from every start; unless it is left then, go on from the best of them."""
        pair, settings, batch_size = self.pair, self.settings, self.batch_size
        updates = natural_updates(pair, settings)
        if updates is not None:
            natural, race = climb_naturally(pair, updates, settings, batch_size, self.tick, leave)
            agreement = _agreement(pair, race.bounds(), race.places())
            return natural, replace(agreement, given_up=race.given_up, num_rows=race.num_rows)
        num_restarts, num_particles = _affordable(pair, settings, batch_size)
        lr, tol, max_steps = _first_rate(pair, settings), settings.tol, settings.max_steps
        networks, finds_rate = has_networks(pair), settings.lr is None
        rate = 2 * lr if isinstance(pair.guide, Guide) and not networks else lr
        elbos: list[Estimate] = []
        places: list[Place] = []
        warm: list[tuple[float, AnyClimb, State]] = []
        climb: AnyClimb | None = None
        origin, error = None, None
        engine = Engine(pair, settings.backend, num_particles, max_steps)
        try:
            # In turn: a warm-up by XLA takes some ms, and to compile it for all at once, seconds.
            for start in range(num_restarts):
                begin = stream(settings.seed, "start", start)
                batch = _batches(pair, batch_size, begin)
                how = (pair, begin, num_particles, lr, tol, max_steps, batch, self.tick)
                net = (self.held, batch_size, finds_rate)
                climb = NetworkClimb(*how, engine, *net) if networks else self._climb(how, engine)
                origin = origin or climb.state()
                climb.restore(origin)  # a guide of your own begins where you set it, each time
                try:
                    looked = replace(some_rows(pair, settings.seed), ranks=ALONE)
                    Starts(looked, settings.seed).place(start)
                    pair.ranks.align(climb.moving())
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

    def further(self, rung: int) -> Climb | SaaClimb:
        """A climb that begins where another guide ended."""
        pair, settings, batch_size = self.pair, self.settings, self.batch_size
        seed = stream(settings.seed, "rung", rung)
        num_particles = _affordable(pair, settings, batch_size)[1]
        if isinstance(pair.guide, Flow) and settings.num_particles is None and pair.vectorised:
            num_particles = draws_for(pair.bound, _FLOW_PARTICLES)
        lr, batch = _first_rate(pair, settings), _batches(pair, batch_size, seed)
        how = (pair, seed, num_particles, lr, settings.tol, settings.max_steps, batch, self.tick)
        return self._climb(how, Engine(pair, settings.backend, num_particles, settings.max_steps))

    def _climb(self, how: tuple, engine: Engine) -> Climb | SaaClimb:
        """A climb of the pair as it is: with fixed draws where they suit it, else by stages."""
        pair, seed, num_particles, lr, tol, max_steps, batch, tick = how

        def stages() -> Climb:
            return Climb(pair, seed, num_particles, lr, tol, max_steps, batch, tick, engine)

        if not is_for(pair, self.settings, self.batch_size):
            return stages()
        asked = self.settings.num_particles
        return SaaClimb(pair, seed, tol, max_steps, tick, engine, stages, asked)


def _batches(pair: Pair, batch_size: int | None, seed: int) -> Batches:
    if pair.ranks:
        return Shard(pair, batch_size, stream(seed, "batch"))
    return batches_of(pair, batch_size, seed)


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


def _best(warm: list[tuple[float, AnyClimb, State]]) -> AnyClimb:
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
    # The draws of a step are each other's baseline.
    num_particles = settings.num_particles or (8 if many else 2 if pair.scored else 1)
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
def few_threads(pair: Pair, batch_size: int | None) -> Iterator[None]:
    """One thread where steps are small: on a busy machine they would wait for each other."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if _numbers(pair, batch_size) <= _CHEAP_ELEMENTS else before)
        yield
    finally:
        torch.set_num_threads(before)


def some_rows(pair: Pair, seed: int) -> Pair:
    """The pair at so many rows as can be looked at again and again."""
    return looked_at(pair, seed) if follows_rows(pair) else glance(pair, seed)
