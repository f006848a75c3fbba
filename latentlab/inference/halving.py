r"""Starts of a climb by conjugate updates, of which the better half goes on after each round.

Every start takes a few steps at some of the rows; the better half takes twice as many, and so on
(successive halving), until two are left. These climb to their ends, still at some of the rows, and
say whether they agree; the better one goes on with all rows. The work that this takes grows with
the number of rows that tell the starts apart, not with all of them.

Letters: N rows, L latent numbers.

References:
    | Non-stochastic best arm identification and hyperparameter optimization
      (Jamieson and Talwalkar, 2016)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from latentlab.diagnostics import Estimate
from latentlab.guides import Draws, Guide
from latentlab.inference.batches import chosen, num_rows, take
from latentlab.inference.check import accepts_size
from latentlab.inference.minibatches import batches_of
from latentlab.inference.natural import NaturalClimb, sized
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.restarts import Place
from latentlab.inference.sandbox import stream
from latentlab.inference.settings import Settings
from latentlab.inference.stages import INTERRUPTED, FitDivergedError, State
from latentlab.inference.steps import Engine
from latentlab.objectives import ELBO
from latentlab.protocols import OffersUpdates, PlacesStarts, StartsFrom, Updates, owner_of

__all__ = ["Race", "climb_naturally", "natural_updates"]

_STARTS = 4
_FINALISTS = 2
_ROUND = 4  # steps of the first round
_FINAL = 60  # steps that a finalist takes at the most
_FEWEST_ROWS = 2_000  # that tell starts apart
_SHARE = 20  # of which part of the rows, where they are many
_ROWS_A_LATENT = 2
_WHY = "updates in closed form take no gradient of the pair"


def natural_updates(pair: Pair, settings: Settings) -> Updates | None:
    """The conjugate updates that a pair is climbed by; ``None`` where it is not.

    Arguments:
        pair: the pair, entered.
        settings: what was asked for.

    Raises:
        ValueError: if they were asked for, and there are none, or they cannot be taken.
    """
    guide = pair.guide
    needs_them = isinstance(guide, Guide) and guide.set_by_updates
    model, why = owner_of(pair.model), ""
    found = model.updates(guide) if isinstance(model, OffersUpdates) else None
    if found is None:
        name = type(guide).__name__ if isinstance(guide, Guide) else "this guide"
        why = f"the model offers no conjugate updates of {name}"
    elif settings.method in ("stages", "saa"):
        why = f'method is "{settings.method}", which follows gradients; leave it at "auto"'
    elif settings.backend in ("traced", "xla"):
        why = 'no compiled step is taken by it; leave backend at "auto"'
    elif not isinstance(settings.objective, ELBO):
        why = "it climbs the ELBO; leave objective at ELBO()"
    elif settings.lr is not None and settings.lr > 1:
        why = f"lr is the length of a step, at most 1, got {settings.lr:g}"
    if why and settings.method == "natural":
        raise ValueError(f'method: "natural" cannot climb this pair: {why}')
    if why and needs_them:
        raise ValueError(
            f"guide: {type(guide).__name__} is set by conjugate updates alone, and {why}"
        )
    return None if why else found


def climb_naturally(
    pair: Pair,
    updates: Updates,
    settings: Settings,
    batch_size: int | None,
    tick: Callable[[int, float], None],
    leave: Callable[[], bool],
) -> tuple[NaturalClimb, Race]:
    """Climb from several starts, and from the best of them to the end.

    Arguments:
        pair: the pair, entered.
        updates: what its model offers for its guide.
        settings: what was asked for.
        batch_size: rows per step; ``None`` for all.
        tick: called after every step.
        leave: asked after the starts whether to leave it at that.

    Returns:
        The climb that won, and the race that it won.
    """
    some = _some_rows(pair, settings.seed)
    engine = Engine(pair, settings.backend, 1, settings.max_steps, why=_WHY)
    can_place = _can_place(pair, updates)
    num = (settings.num_restarts or _STARTS) if can_place else 1
    race = Race([], some or pair.data)
    try:
        for start in range(num):
            seed = stream(settings.seed, "start", start)
            batch = batches_of(pair, batch_size, seed)
            how = (pair, updates, seed, settings.lr, settings.tol, settings.max_steps)
            race.enter(NaturalClimb(*how, batch, tick, engine, some), can_place)
        race.run()
        climb = race.best()
        if not leave():
            climb.until_converged()
    except KeyboardInterrupt:
        if not race.runners:
            raise
        climb = race.runners[0].climb if race.is_over else race.best()
        climb.stop_reason, climb.converged = INTERRUPTED, False
    return climb, race


@dataclass
class _Runner:
    """A start on its way."""

    climb: NaturalClimb
    state: State
    bound: float = -math.inf
    draws: Draws | None = None
    has_run: bool = False


@dataclass
class Race:
    """Starts that compete.

    Arguments:
        runners: those that are left.
        data: the rows that they compete at.
        given_up: how many are not left.
    """

    runners: list[_Runner]
    data: Arguments
    given_up: int = 0
    origin: State | None = None
    error: FitDivergedError | None = None
    is_over: bool = False

    def enter(self, climb: NaturalClimb, can_place: bool) -> None:
        """One more start; where a guide cannot be placed, it begins where it is."""
        self.origin = self.origin or climb.state()
        climb.restore(self.origin)
        if can_place:
            _place(climb, self.data)
        self.runners.append(_Runner(climb, climb.state()))

    @property
    def num_rows(self) -> int | None:
        """The number of rows, where they are not all."""
        some = self.runners[0].climb.some
        return None if some is None else num_rows(some)

    def run(self) -> None:
        """Rounds until few are left, and these to their ends."""
        steps = _ROUND
        while len(self.runners) > _FINALISTS:
            self._round(steps)
            left = max(_FINALISTS, len(self.runners) // 2)
            self.given_up += len(self.runners) - left
            del self.runners[left:]
            steps *= 2
        is_all = self.runners[0].climb.some is None
        if len(self.runners) > 1 or not is_all:  # one start with all rows is the climb itself
            self._round(_FINAL)
        self.is_over = True

    def _round(self, steps: int) -> None:
        """So many steps of each, the best first; one that diverges is the last."""
        for runner in self.runners:
            climb = runner.climb
            climb.restore(runner.state)
            try:
                runner.draws, elbo = climb.warm_up(steps)
                runner.bound = elbo.value
            except FitDivergedError as diverged:
                runner.bound, runner.draws, self.error = -math.inf, None, diverged
            runner.has_run = True
            runner.state = climb.state()
        self.runners.sort(key=lambda runner: -runner.bound)
        if self.error is not None and self.runners[0].bound == -math.inf:
            raise self.error

    def best(self) -> NaturalClimb:
        """The climb that got highest, the pair back in its state."""
        self.is_over = True
        first = max(self.runners, key=lambda runner: runner.bound)
        first.climb.restore(first.state)
        return first.climb

    def _known(self) -> list[_Runner]:
        """Those that have run: Ctrl-C may come before all have."""
        return [runner for runner in self.runners if runner.has_run]

    def bounds(self) -> list[Estimate]:
        """Of those that are left and have run."""
        return [Estimate(runner.bound, 0.0) for runner in self._known()]

    def places(self) -> list[Place]:
        """Of those that are left; of one that diverged none is known."""
        latents = self.runners[0].climb.pair.latents
        known = [r.draws.values if r.draws is not None else {} for r in self._known()]
        return [Place.of({z.name: v[z.name] for z in latents if v}) for v in known]


def _some_rows(pair: Pair, seed: int) -> Arguments | None:
    """So many rows as tell starts apart, to stand for all; ``None`` where these are not more."""
    total = num_rows(pair.data)
    if total is None or "size" in pair.data.kwargs or not accepts_size(pair.model):
        return None
    latents = sum(math.prod(z.shape) for z in pair.latents)
    count = max(_FEWEST_ROWS, _ROWS_A_LATENT * latents, total // _SHARE)
    if 2 * count > total:
        return None
    return sized(take(pair.data, chosen(count, total, stream(seed, "some rows"))), total)


def _can_place(pair: Pair, updates: Updates) -> bool:
    """Whether the pair knows more than one start."""
    if isinstance(updates, PlacesStarts):
        return True
    return isinstance(pair.guide, Guide) and isinstance(owner_of(pair.model), StartsFrom)


def _place(climb: NaturalClimb, data: Arguments) -> None:
    """Put a guide at a start: by its updates, or at starting values of the model."""
    pair, seed = climb.pair, stream(climb.seed, "place")
    if isinstance(climb.updates, PlacesStarts):
        climb.updates.place(seed, *data.args, **data.kwargs)
        return
    guide, model = pair.guide, owner_of(pair.model)
    if isinstance(guide, Guide) and isinstance(model, StartsFrom):
        values = model.starting_values(*data.args, seed=seed, **data.kwargs)
        zeros = guide.loc.detach().new_zeros(1, guide.num_latents)
        current = {name: value[0] for name, value in guide.unpack(zeros)[0].items()}
        current |= {
            name: value.reshape(current[name].shape).to(guide.loc)
            for name, value in values.items()
            if name in current
        }
        center = guide.pack({name: value[None] for name, value in current.items()})[0]
        guide.start(center, zeros[0] + 1.0)
