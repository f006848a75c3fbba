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
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from latentlab.diagnostics import Estimate
from latentlab.guides import Draws, DrawsRows, Guide
from latentlab.inference import objectives
from latentlab.inference.bounds import draws_for, height_at
from latentlab.inference.lazy_adam import LazyAdam
from latentlab.inference.modes import TrainingMode
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.steps import Engine, Stepper
from latentlab.inference.trail import Trail
from latentlab.inference.training import SINGULAR
from latentlab.protocols import HasNetworks, owner_of

if TYPE_CHECKING:
    from latentlab.inference.batches import Batches

__all__ = ["INTERRUPTED", "Climb", "FitDivergedError", "State", "evaluate"]

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
_TOGETHER = 16  # particles where rows are added up
_NETWORK_UNIT = 0.05  # weights of networks move by so much where other parameters move by one


class FitDivergedError(RuntimeError):
    """The objective was not finite at some step, or its gradient ran off, three times in a row.

    Arguments:
        step: the step at which it happened, or the first of some that were taken in one call.
        site: the site whose log-density was not finite, or the parameter whose gradient ran off.
        value: the first bad log-density, or that gradient.
    """

    def __init__(self, step: int, site: str, value: float) -> None:
        self.step, self.site, self.value = step, site, value
        what = f"the log-density of site {site!r} is {value}"
        if math.isfinite(value):
            what = f"the gradient of parameter {site!r} is {value:.3g}, far above all before it"
        super().__init__(
            f"the fit diverged at step {step}: {what}; three smaller steps did not help. Look at "
            "the scale of that site's prior, or standardise the data"
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
        elbo = self.stage_elbos[-1] if self.stage_elbos else evaluate(self.pair, draws)
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
                    self.stage_elbos.append(evaluate(self.pair, best.draws))
                draws, elbo, rate = best.draws, best.elbo, rate / _FALL
                continue
            if not new_elbo.value <= best.elbo.value:
                best = _Reached(self.state(), new_draws, new_elbo)
            shift = self._shift(before, draws, new_draws)
            gained_nothing = self._gained_nothing(elbo, new_elbo)
            idle = idle + 1 if gained_nothing and not stationary else 0
            if stationary and shift < self.tol and gained_nothing:
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
        return {name: value.clone() for name, value in self._moving().items()}

    def restore(self, state: State) -> None:
        """Go back to a state, in place."""
        for name, value in self._moving().items():
            value.copy_(state[name])

    def _moving(self) -> State:
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
        good, failures, halved, stationary = self.state(), 0, 1.0, falling
        fewest = self._stage_steps()[0]
        stepper = self._stepper(optimiser, trail.every)
        k, checked = 0, 0
        while k < num_steps:
            ahead = range(k, min(k + stepper.size, num_steps))
            decays = [0.02 ** (i / num_steps) if falling else 1.0 for i in ahead]
            rates = [rate * halved * decay for decay in decays]
            try:
                elbos, path = stepper.take(self.num_steps, rates, failures)
            except (MemoryError, RuntimeError) as error:
                self.engine.take_fewer(error)
                stepper = self._stepper(optimiser, trail.every)
                continue
            taken = self._note(elbos)
            k += taken
            if taken < len(elbos):
                failures += 1
                if failures > _FAILURES:
                    raise FitDivergedError(self.num_steps, *self._first_bad_site())
                self.restore(good)
                optimiser, halved = self._adam(parameters, rate), halved / 2
                stepper = self._stepper(optimiser, trail.every)
                continue
            trail.follow(k, path)
            if k - checked >= _CHECK_EVERY:
                good, failures, checked = self.state(), 0, k
                if not falling and k >= fewest and trail.stationary(_often_moved(optimiser)):
                    stationary = True
                    break
        trail.go_to_average()
        return stationary

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
        elbo = evaluate(self.pair, draws)
        self.stage_elbos.append(elbo)
        return draws, elbo

    def _height(self, draws: Draws, elbo: Estimate) -> Estimate:
        """What is climbed, at draws with this ELBO."""
        if self.pair.bound is None:
            return elbo
        return height_at(self.pair, draws, particle_chunk(self.pair, len(draws)))

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


def evaluate(pair: Pair, draws: Draws) -> Estimate:
    """The ELBO at draws of the guide, with its standard error, in nats per data set.

    Arguments:
        pair: the pair, entered.
        draws: P draws of its guide.

    Returns:
        Mean and standard error of log p(x, z) - log q(z), NaN where a matrix is singular.
    """
    try:
        with torch.no_grad():
            weights = torch.cat(
                [
                    objectives.log_joint(pair, part) - part.log_q
                    for part in chunks(pair, draws, True)
                ]
            )
    except SINGULAR:
        return Estimate(math.nan, math.nan)
    return Estimate.from_draws(weights) if len(weights) > 1 else Estimate(float(weights[0]), 0.0)


def chunks(pair: Pair, draws: Draws, summed: bool = False) -> list[Draws]:
    """Draws in parts that go through the model at once; ``summed`` as for the size of these."""
    size = particle_chunk(pair, len(draws), summed=summed)
    return [draws[start : start + size] for start in range(0, len(draws), size)]


def particle_chunk(
    pair: Pair, num_particles: int, elements: int = 2**22, summed: bool = False
) -> int:
    """How many particles go through the model at once, so that memory stays bounded.

    Arguments:
        pair: the pair.
        num_particles: how many there are.
        elements: numbers that may go through it at once.
        summed: whether no more than log p(x, z) is asked for, which may be added up in parts.
    """
    if not pair.vectorised:
        return num_particles
    if pair.in_parts and summed:
        return min(num_particles, _TOGETHER)
    size = sum(t.numel() for t in pair.data.tensors()) + sum(
        math.prod(shape) for shape in pair.shapes.values()
    )
    return max(1, min(num_particles, elements // max(size, 1)))


def first_bad_site(pair: Pair, num_particles: int, data: Arguments) -> tuple[str, float]:
    """The first site whose log-density is not finite at new draws of the guide, and that value.

    Arguments:
        pair: the pair, entered.
        num_particles: how many draws.
        data: what it is called with.
    """
    try:
        with torch.no_grad():
            draws = objectives.draw(pair, num_particles, data)
            found = objectives.site_log_probs(pair, draws, data)
    except SINGULAR:
        return "the matrix that could not be factorised", math.nan
    return first_bad(found | {"the guide": draws.log_q})


def first_bad(log_probs: dict[str, Tensor]) -> tuple[str, float]:
    """The first site with a log-density that is not finite, and that value."""
    for name, value in log_probs.items():
        bad = value[~torch.isfinite(value)] if isinstance(value, Tensor) else value
        if isinstance(bad, Tensor) and bad.numel():
            return name, float(bad.flatten()[0])
    return "the parameters", math.nan
