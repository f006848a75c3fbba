r"""How to climb a Gaussian guide: with fixed draws, by L-BFGS (sample average approximation).

With its noise fixed the ELBO is a plain function :math:`F_\varepsilon(\phi)`, whose optimum
:math:`\hat\phi` a quasi-Newton method finds in some dozen evaluations: no rate, no noise floor.
What is left is the error of the draws. Fresh ones :math:`\varepsilon'` would have found
:math:`\hat\phi + \delta`,

.. math:: \delta = H^{-1} \nabla F_{\varepsilon'}(\hat\phi), \qquad H = -\nabla^2 F(\hat\phi),

by conjugate gradients from exact products with H; half the mean square of several such shifts is
the squared sampling error. The shift of a latent is the root of the symmetrised KL of its
marginal, :math:`\delta_m^2 + 2 \delta_{\log s}^2`, that of all the root of their mean. Draws are
added until it is below tol. The climb has converged when, besides, the ELBO of fresh draws agrees
with that of the fixed ones. Where it does not, as in a funnel, whose ELBO at fixed draws may have
no bound, or where H is not positive definite, more draws are taken, and if these do not help,
averaged stages (:class:`Climb`).

This is for guides of few parameters: K of them are not told from much fewer than K / L draws.

Letters: S draws, L latent numbers, K parameters of the guide.

References:
    | Black box variational inference with a deterministic objective (Giordano et al., 2024)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from latentlab.diagnostics import Estimate
from latentlab.guides import Draws, FullRank, MeanField
from latentlab.inference import objectives
from latentlab.inference.evaluation import evaluate
from latentlab.inference.fixed_draws import (
    FixedDraws,
    Product,
    conjugate_gradients,
    paired_noise,
)
from latentlab.inference.guards import is_out_of_memory
from latentlab.inference.pair import Pair
from latentlab.inference.response import curved_draws
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.settings import Settings
from latentlab.inference.stages import Climb, State
from latentlab.inference.steps import Engine
from latentlab.inference.training import SINGULAR
from latentlab.protocols import Anneals, owner_of

__all__ = ["SaaClimb", "expect_suits", "is_for"]

_FEWEST, _PER_LATENT = 128, 4  # draws to begin with, at least
_MOST = 2**13  # draws
_NUMBERS = 2**30  # that an evaluation may look at, where the method is left to us
_LATENTS = 200  # of a full-rank guide, or where each row has its own
_FRESH = 4  # sets of draws that the answer is compared with
_GROWTH = 2, 16  # factors by which draws are added, at least and at most
_EVALUATIONS = 500  # of one ascent
_ROUGH, _FINE = 3e-2, 1e-4  # slopes, in nats per posterior sd, at which an ascent ends
_POLISH = 5  # Newton steps after it
_EXACT, _ABOUT, _PRODUCTS = 1e-4, 3e-2, 200  # of the residual of a step; products at most
_APART = 4.0  # standard errors beyond which two ELBOs do not agree
_RECORDED = 256  # draws behind the ELBO of an ascent


def is_for(pair: Pair, settings: Settings, batch_size: int | None) -> bool:
    """Whether a pair is climbed with fixed draws.

    Arguments:
        pair: the pair, looked at.
        settings: of the fit.
        batch_size: rows per step; ``None`` for all.
    """
    if settings.method not in ("auto", "saa") or _obstacle(pair, batch_size):
        return False
    # A rate, a number of particles and a compiler are settings of the other way to climb.
    size = sum(t.numel() for t in pair.data.tensors()) * _FEWEST
    asked = settings.lr or settings.num_particles or settings.backend in ("traced", "xla")
    return settings.method == "saa" or not asked and size <= _NUMBERS


def expect_suits(pair: Pair, settings: Settings, batch_size: int | None) -> None:
    """Refuse ``method="saa"`` where it has no meaning.

    Arguments:
        pair: the pair, looked at.
        settings: of the fit.
        batch_size: rows per step; ``None`` for all.

    Raises:
        ValueError: with the reason.
    """
    why = _obstacle(pair, batch_size)
    if settings.lr is not None:
        why = why or "it has no rate; leave lr out"
    if settings.backend in ("traced", "xla"):
        why = why or 'torch alone takes its steps; take backend="auto"'
    if settings.method == "saa" and why:
        raise ValueError(
            f'method: "saa" does not suit this pair: {why}; take "stages", or "auto" for what does'
        )


def _obstacle(pair: Pair, batch_size: int | None) -> str:
    """Why a pair cannot be climbed with fixed draws; empty where it can."""
    guide = pair.guide
    if not isinstance(guide, MeanField | FullRank):
        return "its guide is no mean-field or full-rank Gaussian of latentlab"
    if not guide.num_latents:
        return "it has no latents"
    if pair.bound is not None:
        return "it climbs the ELBO only"
    if pair.ranks:
        return "several processes fit it together"
    if pair.device.type != "cpu":
        return "each of its evaluations would wait for the device"
    if pair.in_parts:
        return "its rows are too many to be looked at together"
    if batch_size is not None:
        return "it looks at all rows at once, not at mini-batches"
    if pair.store["params"]:
        return "the model has parameters of its own to learn"
    if isinstance(owner_of(pair.model), Anneals):
        return "the weight of its KL changes from step to step"
    if not pair.vectorised:
        return "its draws go through the model one at a time"
    is_local = pair.local_plate() is not None
    if guide.num_latents > _LATENTS and (is_local or isinstance(guide, FullRank)):
        return f"{guide.num_latents} latents are too many for so few draws"
    return ""


@dataclass(frozen=True)
class _Judgement:
    """What fresh draws say of the optimum at fixed ones."""

    error: float  # of the answer, posterior standard deviations
    gap: Estimate  # ELBO of the fixed draws less that of fresh ones
    left: float  # shift to the optimum itself

    def fault(self, tol: float, num_latents: int) -> str:
        """Why this is no answer; empty where it is."""
        if not math.isfinite(self.left):
            return "the optimum is none: its curvature has both signs"
        if not self.gap.value <= _APART * self.gap.se + num_latents * tol**2:
            return f"fresh draws have an ELBO lower by {self.gap} nats"
        if self.left > tol:
            return f"the ascent ended {self.left:.3f} posterior sd before the optimum"
        return "" if self.error < tol else f"a sampling error of {self.error:.3f} posterior sd"


@dataclass
class SaaClimb:
    """A climb from one start with fixed draws; as :class:`Climb`, but it needs no rate.

    Arguments:
        pair: the pair, entered; its guide is a ``MeanField`` or ``FullRank``.
        seed: of all noise.
        tol: the sampling error of the answer, in posterior standard deviations.
        max_steps: evaluations of the objective in all.
        tick: called after every evaluation, for a progress bar.
        engine: what takes the steps of stages, if it comes to that.
        stages: makes the climb by stages that is fallen back on.
        num_draws: draws S to begin with; by default 128, and four for each latent.
    """

    pair: Pair
    seed: int
    tol: float
    max_steps: int
    tick: Callable[[int, float], None]
    engine: Engine
    stages: Callable[[], Climb]
    num_draws: int | None = None
    losses: list[float] = field(default_factory=list)
    stage_starts: list[int] = field(default_factory=list)
    stage_elbos: list[Estimate] = field(default_factory=list)
    stop_reason: str = ""
    converged: bool = False
    method: str = "saa"
    _fallen_back: Climb | None = None

    def __post_init__(self) -> None:
        fewest = max(_FEWEST, _PER_LATENT * self._guide.num_latents)
        self._size = 2 * ((self.num_draws or fewest) + 1 >> 1)
        how = self.engine  # of stages; what climbs until then is torch
        self.engine = Engine(self.pair, how.backend, how.num_particles, how.max_steps)
        self.engine.why = "fixed draws are climbed by torch"

    @property
    def num_steps(self) -> int:
        """Evaluations of the objective so far."""
        return len(self.losses)

    @property
    def _guide(self) -> MeanField | FullRank:
        guide = self.pair.guide
        if not isinstance(guide, MeanField | FullRank):
            raise TypeError(f"guide: expected a Gaussian of ours, got {type(guide).__name__}")
        return guide

    def warm_up(self, num_steps: int, rate: float) -> tuple[Draws, Estimate]:
        """Ascend roughly from a start.

        Arguments:
            num_steps: evaluations at most.
            rate: of stages, should they be fallen back on.

        Returns:
            Draws of the guide then, and the ELBO reached.
        """
        try:
            if self._ascend(self._fixed(self._size), _ROUGH, num_steps):
                return self._record()
        except (MemoryError, RuntimeError) as error:
            self._note_memory(error)
        return self._by_stages().warm_up(num_steps, rate)

    def until_converged(self) -> None:
        """Ascend with more and more draws until they are enough."""
        if self._fallen_back is not None:
            return self._go_by_stages("")
        try:
            return self._until_enough()
        except (MemoryError, RuntimeError) as error:
            return self._go_by_stages(self._note_memory(error))

    def _note_memory(self, error: BaseException) -> str:
        """That memory ran out, for the stop reason and the notes; other errors are raised."""
        if not is_out_of_memory(error):
            raise error
        why = f"memory ran out with {self._size} fixed draws"
        self.engine.notes.append(f"{why}: went on by stages")
        return why

    def _until_enough(self) -> None:
        while True:
            if self.num_steps >= self.max_steps:
                self.stop_reason = f"max_steps: {self.num_steps} evaluations did not do"
                return None
            draws = self._fixed(self._size)
            if not self._ascend(draws, _FINE, _EVALUATIONS):
                return self._go_by_stages("the ELBO is not finite")
            judged = self._judge(draws)
            self._record()
            fault = judged.fault(self.tol, self._guide.num_latents)
            if not fault:
                self.converged = True
                self.stop_reason = (
                    f"the optimum of {self._size} fixed draws: sampling error "
                    f"{judged.error:.3f} posterior sd (tol {self.tol:g}), fresh draws agree"
                )
                return None
            if self._size >= self._most():
                return self._go_by_stages(f"with {self._size} fixed draws, {fault}")
            wanted = 1.2 * (judged.error / self.tol) ** 2
            fewest, most = _GROWTH
            growth = min(max(wanted, fewest), most) if math.isfinite(wanted) else fewest
            self._size = min(2 * math.ceil(self._size * growth / 2), self._most())

    def state(self) -> State:
        """A copy of everything that moves: parameters, and the frame."""
        return {name: value.clone() for name, value in self.moving().items()}

    def moving(self) -> State:
        """What moves itself."""
        return dict(self._guide.state_dict())

    def restore(self, state: State) -> None:
        """Go back to a state, in place."""
        self._guide.load_state_dict(state)

    def _most(self) -> int:
        size = sum(t.numel() for t in self.pair.data.tensors()) + self._guide.num_latents
        return max(self._size, min(_MOST, 2 * (_NUMBERS // size // 2)))

    def _fixed(self, num_draws: int, fresh: int = 0) -> FixedDraws:
        purpose = ("fresh draws", fresh) if fresh else ("fixed draws", 0)
        seed = stream(self.seed, *purpose)
        return FixedDraws(self.pair, paired_noise(num_draws, self._guide.num_latents, seed))

    def _ascend(self, draws: FixedDraws, slope: float, most: int) -> bool:
        """Go to the optimum of fixed draws; whether there was an ELBO to climb."""
        from scipy.optimize import minimize

        self._guide.recentre()
        self.stage_starts.append(self.num_steps)
        best, best_at, first = math.inf, torch.zeros(0), self.num_steps

        def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal best, best_at
            at = torch.from_numpy(x.copy())
            draws.set(at)
            value, gradient = _slope(draws)
            if not math.isfinite(value) or not gradient.isfinite().all():
                # Far away, so that the line search comes back.
                return 1e3 * (1 + abs(best)) + best, np.zeros_like(x)
            self.losses.append(-value)
            self.tick(self.num_steps, -value)
            if -value < best:
                best, best_at = -value, at
            return -value, -gradient.numpy()

        most = max(1, min(most, self.max_steps - self.num_steps))
        options = {"maxfun": most, "maxiter": most, "gtol": slope, "ftol": 0.0, "maxcor": 20}
        start = np.zeros(sum(p.numel() for p in draws.parameters))
        if not math.isfinite(_slope(draws)[0]):
            self.stage_starts.pop()
            return False
        try:
            minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
        finally:  # an interrupt keeps the best
            if len(best_at):
                draws.set(best_at)
        return self.num_steps > first

    def _judge(self, draws: FixedDraws) -> _Judgement:
        """Compare with fresh draws where the guide is, after Newton's last steps."""
        self._guide.recentre()
        num = len(draws.eps)
        some = FixedDraws(self.pair, draws.eps[: curved_draws(self.pair, draws.eps.shape[1])])
        product = some.curvature()
        left = self._polish(draws, product)
        values = [draws.values()]
        shifts = []
        for k in range(_FRESH):
            fresh = self._fixed(num, k + 1)
            terms, slope = fresh.slope()
            values.append(terms)
            shifts.append(self._shift(_solved(product, slope, _ABOUT)))
        pairs = torch.stack(values).double().reshape(_FRESH + 1, num // 2, 2).mean(-1)
        gap = float(pairs[0].mean() - pairs[1:].mean())
        se = float(pairs.std(correction=1)) * math.sqrt((1 + 1 / _FRESH) / (num // 2))
        square = sum(shift**2 for shift in shifts) / _FRESH / 2
        return _Judgement(math.sqrt(square), Estimate(gap, se), left)

    def _polish(self, draws: FixedDraws, product: Product) -> float:
        """Newton steps from near the optimum, for as long as they help; the shift that is left.

        The slope knows the optimum to more digits than the ELBO, which is a large sum.
        """
        at = torch.zeros(sum(p.numel() for p in draws.parameters), dtype=torch.float64)
        step = _solved(product, draws.slope()[1], _EXACT)
        left = self._shift(step)
        for _ in range(_POLISH):
            if step is None or not 1e-9 < left < 1:
                break
            draws.set(at + step)
            again = _solved(product, draws.slope()[1], _EXACT)
            if not self._shift(again) < left:
                draws.set(at)
                break
            at, step, left = at + step, again, self._shift(again)
        return left

    def _shift(self, step: Tensor | None) -> float:
        """Root mean square over latents of how far a step from the guide's frame moves them.

        That of a latent is the root of the symmetrised KL of its marginal.
        """
        if step is None:
            return math.inf
        guide, size = self._guide, self._guide.num_latents
        mean, log_sd, rest = step[:size], step[size : 2 * size], step[2 * size :]
        if isinstance(guide, FullRank):
            frame = guide.frame.detach().double().cpu()
            rows = frame / frame.norm(dim=-1, keepdim=True)
            change = rest.reshape(size, size).tril(-1) + log_sd.diag()
            mean, log_sd = rows @ mean, ((rows @ change) * rows).sum(-1)
        return float((mean.square() + 2 * log_sd.square()).mean().sqrt())

    def _record(self) -> tuple[Draws, Estimate]:
        manual_seed(stream(self.seed, "evaluate", self.num_steps))
        with torch.no_grad():
            draws = objectives.draw(self.pair, _RECORDED).detached()
        elbo = evaluate(self.pair, draws)
        self.stage_elbos.append(elbo)
        return draws, elbo

    def _by_stages(self) -> Climb:
        """The climb by stages that goes on from here, on the same record."""
        climb = self.stages()
        climb.losses, climb.stage_starts = self.losses, self.stage_starts
        climb.stage_elbos, self.method = self.stage_elbos, climb.method
        climb.engine.notes += self.engine.notes
        self.engine, self._fallen_back = climb.engine, climb
        return climb

    def _go_by_stages(self, why: str) -> None:
        climb = self._fallen_back or self._by_stages()
        try:
            climb.until_converged()
        finally:
            self.converged = climb.converged
            self.stop_reason = f"{why}; then {climb.stop_reason}" if why else climb.stop_reason


def _slope(draws: FixedDraws) -> tuple[float, Tensor]:
    try:
        terms, gradient = draws.slope()
    except SINGULAR:  # a matrix that is singular here may not be a step before
        return math.nan, torch.zeros(0)
    return float(terms.double().mean()), gradient


def _solved(product: Product, slope: Tensor, tol: float) -> Tensor | None:
    """The step that leads to where the slope is zero."""
    if not slope.isfinite().all():
        return None
    return conjugate_gradients(product, slope, tol=tol, max_steps=_PRODUCTS)
