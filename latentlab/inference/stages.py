r"""How to climb: stages of stochastic ascent, each averaged, until two of them agree.

A stage runs Adam at a constant rate until its iterates are stationary (split R-hat below 1.1 for
95 % of them), and ends at their average: averaging removes the noise floor that more steps at the
same rate never pass. The next stage starts there at half the rate. The fit has converged when two
stages describe the same distribution,

.. math:: \frac{1}{L}\left[\mathrm{KL}(q_{k-1} \| q_k) + \mathrm{KL}(q_k \| q_{k-1})\right]
          < \mathrm{tol}^2,

whose left side is the squared shift per latent in posterior standard deviations, and the ELBO has
gained nothing beyond its error. A stage that falls far below the best one, or that ends without a
finite loss (three times at most), is taken back, and the climb goes on from there at a much lower
rate. A guide of ours is moved into its own frame before each stage, so that the rate, too, is in
posterior standard deviations.

Letters: L latent numbers, P particles.

References:
    | Robust, automated, and accurate black-box variational inference (Welandawe et al., 2022)
    | Averaging weights leads to wider optima (Izmailov et al., 2018)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from latentlab.diagnostics import Estimate
from latentlab.guides import Draws, DrawsRows, Flow, Guide
from latentlab.inference import objectives
from latentlab.inference.bounds import draws_for, height_at
from latentlab.inference.evaluation import evaluate, first_bad_site, particle_chunk
from latentlab.inference.journal import Part
from latentlab.inference.lazy_adam import LazyAdam
from latentlab.inference.modes import TrainingMode, standing
from latentlab.inference.pair import Pair
from latentlab.inference.replay import done, go_to
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.steps import Engine, Stepper, carry_on
from latentlab.inference.trail import Trail
from latentlab.protocols import HasNetworks, owner_of

if TYPE_CHECKING:
    from latentlab.inference.batches import Batches

__all__ = ["INTERRUPTED", "Climb", "FitDivergedError", "State"]

INTERRUPTED = "interrupted"
"""The stop reason of a climb that Ctrl-C ended."""

_CHECK_EVERY = 100  # steps
_STAGE_STEPS = (300, 3000)  # a stage is at least and at most that long
_EPOCHS = (5, 50)  # likewise, where each row has latents that only its batches move
_IDLE_STAGES = 3  # stages that neither settle nor rise, after which more would not help
_FALL = 8.0  # by which the rate is divided where a stage fell below the best one
_FALLEN = 4.0  # standard errors below, from which a stage has fallen
_AT_REST = 1e-5  # posterior standard deviations, from end to end
_FAILURES = 3  # steps without a finite loss, each tried again shorter and with new noise
_EVALUATION_DRAWS, _EVALUATION_GROUPS = 256, 16
_NETWORK_UNIT = 0.05  # weights of networks move by so much where other parameters move by one


class FitDivergedError(RuntimeError):
    """The objective was not finite at some step, or its gradient ran off, three times in a row.

    Arguments:
        step: the step at which it happened, or the first of some that were taken in one call.
        site: the site whose log-density was not finite, or the parameter whose gradient ran off.
        value: the first bad log-density, or that gradient.
        tried: what did not help.
    """

    def __init__(
        self, step: int, site: str, value: float, tried: str = "three smaller steps did not help"
    ) -> None:
        self.step, self.site, self.value = step, site, value
        what = f"the log-density of site {site!r} is {value}"
        if math.isfinite(value):
            what = f"the gradient of parameter {site!r} is {value:.3g}, far above all before it"
        super().__init__(
            f"the fit diverged at step {step}: {what}; {tried}. Look at the scale of that site's "
            "prior, or standardise the data"
        )


State = dict[str, Tensor]


@dataclass
class Climb:
    """A climb from one start: the pair is moved, the record is kept.

    Arguments:
        pair: the pair, entered.
        seed: all noise comes from (seed, step).
        num_particles: draws per step P.
        lr: rate of the first stage; posterior standard deviations for a guide of ours, units of
            the parameters for any other.
        tol: two stages agree below this shift, in posterior standard deviations.
        max_steps: steps in all.
        batch: the data of each step.
        tick: called after every step, for a progress bar.
        engine: what takes the steps.
    """

    pair: Pair
    seed: int
    num_particles: int
    lr: float
    tol: float
    max_steps: int
    batch: Batches
    tick: Callable[[int, float], None]
    engine: Engine
    losses: list[float] = field(default_factory=list)
    stage_starts: list[int] = field(default_factory=list)
    stage_elbos: list[Estimate] = field(default_factory=list)
    stop_reason: str = ""
    converged: bool = False
    method: ClassVar[str] = "stages"

    def __post_init__(self) -> None:
        self._mode = TrainingMode(self.pair)

    @property
    def num_steps(self) -> int:
        """Steps taken so far."""
        return len(self.losses)

    def warm_up(self, num_steps: int, rate: float) -> tuple[Draws, Estimate]:
        """Travel from a start to near an optimum, the rate falling from ``rate`` fifty-fold.

        Arguments:
            num_steps: length of the warm-up.
            rate: first rate, in units of the guide's frame.

        Returns:
            Draws of the guide then, and the ELBO reached.
        """
        num_steps = min(num_steps, self.max_steps - self.num_steps)
        self._stage(num_steps, rate, falling=True)
        return self._record()

    def until_converged(self) -> None:
        """Stages at falling rates until two agree or the steps run out."""
        self._climb()
        if not self.engine.still_holds(self.batch, self._mode, max(self.num_steps - 1, 0)):
            self._climb()  # on, as the pair is

    def _climb(self) -> None:
        draws = self._draw()
        elbo = self.stage_elbos[-1] if self.stage_elbos else self._evaluate(draws)
        elbo = self._height(draws, elbo)
        best = _Reached(self.state(), draws, elbo)
        rate, idle, diverged = self.lr, 0, 0
        if not self.pair.parameters():
            self.converged, self.stop_reason = True, "the pair has no parameters to fit"
            return
        while True:
            before = self.state()
            remaining, (fewest, most) = self.max_steps - self.num_steps, self._stage_steps()
            if remaining < fewest:
                self.stop_reason = f"max_steps: {self.num_steps} steps without agreement of stages"
                return
            if isinstance(self.pair.guide, Guide):
                self.pair.guide.recentre()
            try:
                stationary = self._stage(min(most, remaining), rate)
                new_draws, new_elbo = self._record()
                new_elbo, diverges = self._height(new_draws, new_elbo), False
                fell = best.is_above(new_elbo, self.tol)
            except FitDivergedError:
                diverged += 1
                if diverged > _FAILURES or not math.isfinite(best.elbo.value):
                    raise
                fell = diverges = True
            if fell:
                self.restore(best.state)
                if diverges:
                    self.stage_elbos.append(self._evaluate(best.draws))
                draws, elbo, rate = best.draws, best.elbo, rate / _FALL
                continue
            if not new_elbo.value <= best.elbo.value:
                best = _Reached(self.state(), new_draws, new_elbo)
            shift = self.pair.ranks.same(self._shift(before, draws, new_draws))
            gained_nothing = self._gained_nothing(elbo, new_elbo)
            idle = idle + 1 if gained_nothing and not stationary else 0
            # Affine part and bends of a flow drift along with one another for ever.
            settled = stationary or isinstance(self.pair.guide, Flow)
            if settled and shift < self.tol and gained_nothing:
                self.converged = True
                self.stop_reason = (
                    f"stages agree: the last moved by {shift:.3f} posterior sd (tol {self.tol:g})"
                )
                return
            if idle == _IDLE_STAGES:
                self.stop_reason = (
                    f"stalled: {idle} stages neither settled nor raised the ELBO; the last moved "
                    f"by {shift:.2f} posterior sd (tol {self.tol:g})"
                )
                return
            draws, elbo, rate = new_draws, new_elbo, rate / 2

    def state(self) -> State:
        """A copy of everything that moves: parameters, and the frame of a guide of ours."""
        return {name: value.clone() for name, value in self.moving().items()}

    def restore(self, state: State) -> None:
        """Go back to a state, in place."""
        for name, value in self.moving().items():
            value.copy_(state[name])

    def moving(self) -> State:
        """What moves itself."""
        frame: State = {}
        if isinstance(self.pair.guide, Guide):
            frame = {f"frame.{k}": v.detach() for k, v in self.pair.guide.named_buffers()}
        return self._mode.moving() | frame

    def _stage(self, num_steps: int, rate: float, falling: bool = False) -> bool:
        """Run up to ``num_steps``, end at the average of the later half; was it stationary?

        At a falling rate it ends at a fiftieth of it, without asking whether it was stationary.
        """
        parameters = list(self.pair.parameters().values())
        self.stage_starts.append(self.num_steps)
        if not parameters:  # a guide that was written down, not fitted
            return True
        optimiser = self._adam(parameters, rate)
        ours = isinstance(self.pair.guide, Guide) and self.pair.latents
        trail = Trail(parameters, num_steps, self._networks(), _AT_REST * bool(ours))
        stepper = self._stepper(optimiser, trail.every)
        first, how, journal = self.num_steps, (num_steps, rate, falling), self.pair.journal
        stands = standing(self.pair, self._mode)
        by = self.engine.used, self.engine.num_particles
        name = journal.name("stage", self.seed, first, *how, *by, stands)
        part = journal.find(name)
        if part is None:
            stationary = self._walk(name, optimiser, stepper, trail, *how)
            facts = {"stationary": stationary}
            journal.keep(name, lambda: self._part(first, facts))
            return stationary
        if self._redo(part):
            self._stepper(optimiser, trail.every)  # what takes the steps was found out anew, too
        return part.facts["stationary"]

    def _walk(
        self,
        name: str,
        optimiser: torch.optim.Optimizer,
        stepper: Stepper,
        trail: Trail,
        num_steps: int,
        rate: float,
        falling: bool,
    ) -> bool:
        """The steps of a stage, from where its last point is, if there is one."""
        journal, first, fewest = self.pair.journal, self.num_steps, self._stage_steps()[0]
        halved, stationary, failures = 1.0, falling, 0
        point = journal.point(name)
        if point is not None:
            if self._redo(point):
                stepper = self._stepper(optimiser, trail.every)
            stepper.recall(point.under("moments"))
            trail.points, halved = [*point.tensors["trail.points"]], point.facts["halved"]
        good, k = self.state(), self.num_steps - first
        checked = k
        while k < num_steps:
            ahead = range(k, min(k + stepper.size, num_steps))
            decays = [0.02 ** (i / num_steps) if falling else 1.0 for i in ahead]
            rates = [rate * halved * decay for decay in decays]
            try:
                elbos, path = stepper.take(self.num_steps, rates, failures)
            except (MemoryError, RuntimeError) as error:
                self.engine.take_fewer(error)
                stepper = carry_on(stepper, self._stepper(optimiser, trail.every))
                continue
            taken = self._note(elbos)
            k += taken
            if taken < len(elbos):
                failures += 1
                if failures > _FAILURES:
                    raise FitDivergedError(self.num_steps, *self._first_bad_site())
                self.restore(good)
                optimiser, halved = self._adam(trail.parameters, rate), halved / 2
                stepper = self._stepper(optimiser, trail.every)
                continue
            trail.follow(k, path)
            if k - checked >= _CHECK_EVERY:
                good, failures, checked = self.state(), 0, k
                if not falling and k >= fewest and self._settled(trail, optimiser):
                    stationary = True
                    break
                journal.mark(name, partial(self._point, first, halved, stepper, trail))
        trail.go_to_average()
        self.pair.ranks.align(self.moving())
        return stationary

    def _point(self, first: int, halved: float, stepper: Stepper, trail: Trail) -> Part:
        way = {"moments": stepper.memory(), "trail": {"points": torch.stack(trail.points)}}
        return self._part(first, {"halved": halved}, way)

    def _part(self, first: int, facts: dict, groups: dict[str, State] | None = None) -> Part:
        """What a stage did, or a part of it, since its first step."""
        facts = facts | {"engine": self.engine.facts(self.seed)}
        return done(self.pair, self.losses[first:], facts, groups)

    def _settled(self, trail: Trail, optimiser: torch.optim.Optimizer) -> bool:
        return bool(self.pair.ranks.same(trail.stationary(_often_moved(optimiser))))

    def _adam(self, parameters: list[Tensor], rate: float) -> torch.optim.Optimizer:
        # Adam steps by the sign of a gradient even if that is nothing but rounding. In the frame
        # of a guide of ours, where the curvature is about one, this eps makes small steps
        # Newton's.
        eps = rate if isinstance(self.pair.guide, Guide) and self.pair.latents else 1e-8
        networks = self._networks()
        own = [p for p in parameters if id(p) not in networks]
        weights = [p for p in parameters if id(p) in networks]
        groups = [
            {"params": own, "eps": eps, "unit": 1.0},
            {"params": weights, "eps": 1e-8, "unit": _NETWORK_UNIT},
        ]
        groups = [g for g in groups if g["params"]]
        if self._moves_rows():
            return LazyAdam(groups, lr=rate)
        return torch.optim.Adam(groups, lr=rate, fused=True)

    def _stage_steps(self) -> tuple[int, int]:
        """A stage is at least and at most that long; with latents of rows, some epochs."""
        fewest, most = _STAGE_STEPS
        if not self._moves_rows():
            return fewest, most
        total, size = (len(d.tensors()[0]) for d in (self.pair.data, self.batch(self.num_steps)))
        epoch = math.ceil(total / size)
        return max(fewest, _EPOCHS[0] * epoch), max(most, _EPOCHS[1] * epoch)

    def _moves_rows(self) -> bool:
        """Whether the guide has numbers of its own for each row, and a step sees some rows."""
        guide = self.pair.guide
        if not isinstance(guide, Guide) or isinstance(guide, HasNetworks):
            return False
        follows = guide.follows_rows and guide.layout.inner.numel() > 0
        return follows and self.batch.rows(self.num_steps) is not None

    def _networks(self) -> set[int]:
        """Which parameters are weights of networks in the guide, by identity."""
        guide = owner_of(self.pair.guide)
        if not isinstance(guide, HasNetworks):
            return set()
        return {id(parameter) for parameter in guide.network_parameters()}

    def _stepper(self, optimiser: torch.optim.Optimizer, every: int) -> Stepper:
        how = (self.batch, self.seed, self._mode, every, self.num_steps)
        return self.engine.stepper(optimiser, *how)

    def _note(self, elbos: list[float]) -> int:
        """Put steps on record, up to the first that is not finite; how many there were."""
        for count, value in enumerate(elbos):
            if not math.isfinite(value):
                return count
            self.losses.append(-value)
            self.tick(self.num_steps, -value)
        return len(elbos)

    def _redo(self, part: Part) -> bool:
        """Do what a stage did, without its steps; whether others are to be taken after it."""
        self._note([-loss for loss in go_to(self.pair, part)])
        return self.engine.recall(part.facts["engine"], self.seed)

    def _first_bad_site(self) -> tuple[str, float]:
        if steep := self.engine.gauge_of(self.seed).where:
            return steep
        manual_seed(stream(self.seed, "step", self.num_steps, 3))
        with self._mode:
            return first_bad_site(self.pair, self.num_particles, self.pair.data)

    def _draw(self) -> Draws:
        manual_seed(stream(self.seed, "evaluate", self.num_steps))
        with torch.no_grad():
            num = draws_for(self.pair.bound, _EVALUATION_DRAWS, _EVALUATION_GROUPS)
            return objectives.draw(self.pair, 1 if self.pair.is_point() else num).detached()

    def _record(self) -> tuple[Draws, Estimate]:
        draws = self._draw()
        elbo = self._evaluate(draws)
        self.stage_elbos.append(elbo)
        return draws, elbo

    def _height(self, draws: Draws, elbo: Estimate) -> Estimate:
        """What is climbed, at draws with this ELBO."""
        if self.pair.bound is None:
            return elbo
        name = self.pair.journal.name("height", self.state(), draws.values)
        chunk = particle_chunk(self.pair, len(draws))
        return self.pair.journal.estimate(name, lambda: height_at(self.pair, draws, chunk))

    def _evaluate(self, draws: Draws) -> Estimate:
        name = self.pair.journal.name("elbo", self.state(), draws.values)
        return self.pair.journal.estimate(name, lambda: evaluate(self.pair, draws))

    def _shift(self, before: State, old: Draws, new: Draws) -> float:
        """Root of the symmetrised KL per latent between this stage and the one before.

        With latents of rows, that of the global ones where it is larger: few among many.
        """
        num_latents = sum(math.prod(z.free_shape) for z in self.pair.latents)
        if self.pair.is_point():
            return 0.0  # a point has no spread to measure a shift in; the ELBO decides
        now = self.state()
        with torch.no_grad():
            forward = old.log_q - objectives.log_q(self.pair, old)
            ours = self._log_q_of_global(new) - self._log_q_of_global(old)
            self.restore(before)
            backward = new.log_q - objectives.log_q(self.pair, new)
            theirs = self._log_q_of_global(old) - self._log_q_of_global(new)
            self.restore(now)
        total, few = float(forward.mean() + backward.mean()), float((ours + theirs).mean())
        if not math.isfinite(total) or not math.isfinite(few):
            return math.inf
        guide = self.pair.guide
        num_global = len(guide.layout.outer) if isinstance(guide, Guide) else 0
        return math.sqrt(max(total / max(num_latents, 1), few / max(num_global, 1), 0.0))

    def _log_q_of_global(self, draws: Draws) -> Tensor:
        """Log-density (P,) of the global latents, where others are local to rows of batches."""
        guide, zero = self.pair.guide, torch.zeros(len(draws), dtype=self.pair.dtype)
        if not (self._moves_rows() and isinstance(guide, Guide) and isinstance(guide, DrawsRows)):
            return zero
        parts = guide.element_log_prob(draws.values, self.pair.data)
        whole = {site.latent.name for site in guide.layout.sites if not site.is_local}
        return sum((v.reshape(len(v), -1).sum(-1) for k, v in parts.items() if k in whole), zero)

    def _gained_nothing(self, old: Estimate, new: Estimate) -> bool:
        return new.value - old.value <= max(self.tol, 2 * math.hypot(old.se, new.se))


@dataclass(frozen=True)
class _Reached:
    """What a stage reached."""

    state: State
    draws: Draws
    elbo: Estimate

    def is_above(self, elbo: Estimate, tol: float) -> bool:
        """Whether another ELBO is below this one by more than errors can tell.

        The error of a guide that has left the posterior is as wild as the guide: no more of it
        counts than ten times the error here.
        """
        if not math.isfinite(self.elbo.value):
            return False
        least = max(self.elbo.se, tol)
        error = math.hypot(least, min(elbo.se, 10 * least) if elbo.se >= 0 else 10 * least)
        return not self.elbo.value - elbo.value <= _FALLEN * error


def _often_moved(optimiser: torch.optim.Optimizer) -> Tensor | None:
    """Which numbers most steps moved; ``None`` for all of them."""
    return optimiser.often_moved() if isinstance(optimiser, LazyAdam) else None
