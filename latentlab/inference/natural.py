r"""How to climb where a model offers conjugate updates: steps along the natural gradient.

With expected statistics :math:`\hat s(q)` of all rows, and the guide :math:`q(s)` that statistics
lead to, a step of length :math:`\rho` is

.. math:: s_{t+1} = (1 - \rho) \, s_t + \rho \, \hat s(q(s_t)) .

Of length one it is expectation-maximisation where the guide is a point, and the conjugate update
of variational Bayes else; it never lowers the bound. Its gains :math:`g_t` fall like
:math:`r^t`, so that a small gain is not a short way to go. What is left to gain is

.. math:: g_t \, (r + r^2 + \dots) = g_t \, \frac{r}{1 - r}, \qquad r = g_t / g_{t-1},

and the climb has converged when that is less than :math:`\mathrm{tol}^2 / 2` nats of all data: by
the curvature of the bound no figure is then further off than tol posterior standard deviations.
After a few steps of length one, leaps take their place (:mod:`latentlab.inference.anderson`). One
that does not raise the bound is taken back; r is then the squared rate of the slowest direction
that they know of.

With mini-batches :math:`\rho_t` falls like :math:`t^{-0.6}`. After each epoch the bound of all
rows is taken, and with it their statistics, a batch at a time; when an epoch gains nothing more,
steps of length one lead to the end.

Letters: N rows, B rows of a batch.

References:
    | Stochastic variational inference (Hoffman et al., 2013)
    | On-line expectation-maximization algorithm for latent data models
      (Cappé and Moulines, 2009)
    | On the convergence of bound optimization algorithms (Salakhutdinov, Roweis and
      Ghahramani, 2003)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pyro
import torch
from torch import Tensor

from latentlab.diagnostics import Estimate
from latentlab.guides import Draws, Guide
from latentlab.inference import objectives
from latentlab.inference.anderson import Anderson
from latentlab.inference.batches import Batches, num_rows, take
from latentlab.inference.evaluation import first_bad_site
from latentlab.inference.guards import is_out_of_memory
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.stages import FitDivergedError, State
from latentlab.inference.steps import Engine
from latentlab.inference.training import SINGULAR
from latentlab.protocols import Updates

__all__ = ["NaturalClimb", "sized"]

_DECAY = 0.6  # power by which the steps of mini-batches get shorter
_FIRST = 0.6  # length of the first of them
_PLAIN = 3  # gains of plain steps, before leaps are taken
_ROUNDING = 64.0  # units in the last place of a bound that a sum over rows may be off by
_CANCELLED = 4096.0  # in double precision, where a component of one row has large terms
_DRAWS = 256  # that tell where a start ended
_NOT_SHORTER = "a conjugate update has no shorter step"


@dataclass
class NaturalClimb:
    """A climb from one start by conjugate updates; as ``Climb``, but without a gradient.

    Arguments:
        pair: the pair, entered.
        updates: what its model offers for its guide.
        seed: of the order of mini-batches.
        lr: length of a step, or of the first one with mini-batches; ``None`` for one.
        tol: what is left to gain is below half its square, in nats of all data.
        max_steps: steps in all.
        batch: the data of each step.
        tick: called after every step, for a progress bar.
        engine: what is told of the backend.
        some: the rows of the warm-up; ``None`` for all.
    """

    pair: Pair
    updates: Updates
    seed: int
    lr: float | None
    tol: float
    max_steps: int
    batch: Batches
    tick: Callable[[int, float], None]
    engine: Engine
    some: Arguments | None = None
    losses: list[float] = field(default_factory=list)
    stage_starts: list[int] = field(default_factory=list)
    stage_elbos: list[Estimate] = field(default_factory=list)
    stop_reason: str = ""
    converged: bool = False
    method: ClassVar[str] = "natural"
    _at: Mapping[str, Tensor] | None = None  # the statistics that the guide stands at
    _dtype: torch.dtype = torch.float64  # of the bound

    @property
    def num_steps(self) -> int:
        """Steps taken so far."""
        return len(self.losses)

    @property
    def bound(self) -> float:
        """The bound at the last step."""
        return -self.losses[-1] if self.losses else -math.inf

    def warm_up(self, num_steps: int, rate: float = 1.0) -> tuple[Draws, Estimate]:
        """So many steps of length one at most, at the rows of the warm-up.

        Arguments:
            num_steps: fewer are taken where nothing is left to gain.
            rate: unused; as for ``Climb``.

        Returns:
            Draws of the guide then, and the bound before the last step.
        """
        most = min(self.max_steps, self.num_steps + num_steps)
        self._rise(self.some or self.pair.data, 1.0, most, parts=None)
        self.stop_reason, self.converged, self._at = "", False, None
        return self.draws(), Estimate(self.bound, 0.0)

    def until_converged(self) -> None:
        """Steps until next to nothing is left to gain, or they run out."""
        if not self.pair.parameters() and not self.pair.latents:
            self.converged, self.stop_reason = True, "the pair has no parameters to fit"
            return
        parts = None if self.batch.rows(0) is None else self._parts()
        if parts is not None:
            self._epochs(parts)
        self._rise(self.pair.data, self.lr or 1.0 if parts is None else 1.0, self.max_steps, parts)
        self.pair.ranks.align(self._moving())

    def draws(self) -> Draws:
        """Draws of the guide as it is."""
        manual_seed(stream(self.seed, "evaluate", self.num_steps))
        with torch.no_grad():
            return objectives.draw(self.pair, 1 if self.pair.is_point() else _DRAWS).detached()

    def state(self) -> State:
        """A copy of everything that moves."""
        return {name: value.clone() for name, value in self._moving().items()}

    def restore(self, state: State) -> None:
        """Go back to a state, in place."""
        for name, value in self._moving().items():
            value.copy_(state[name])
        self._at = None

    def _moving(self) -> State:
        store = pyro.get_param_store().named_parameters()  # updates may have set other tensors
        found = {name: value.detach() for name, value in store}
        guide = self.pair.guide
        if isinstance(guide, Guide):
            found |= {f"guide.{k}": v.detach() for k, v in guide.named_parameters()}
            found |= {f"frame.{k}": v.detach() for k, v in guide.named_buffers()}
        return found

    def _rise(self, data: Arguments, rate: float, most: int, parts: list[Tensor] | None) -> None:
        """Steps with all rows until next to nothing is left to gain."""
        if self.losses and self.num_steps >= most:
            self.stop_reason = f"max_steps: {self.num_steps} steps"
            return
        self.stage_starts.append(self.num_steps)
        gains: list[float] = []
        memory, plain = Anderson(), None
        before = self.state()
        try:
            while True:
                found = self._unless_worse(data, parts, plain)
                if found is None and plain is not None:  # a leap that led down is taken back
                    self._note(self.bound)
                    memory.learn(led_up=False)
                    self._step(plain, 1.0)
                    plain = None
                    continue
                statistics, bound = found or self._expect(data, parts)
                if plain is not None:
                    memory.learn(led_up=True)
                if len(self.losses) > self.stage_starts[-1]:
                    gains.append(bound - self.bound)
                if gains and gains[-1] < -self._rounding(bound, self.pair.dtype):
                    self._fell(gains[-1], before)
                    break
                left = self._left(gains, bound, memory)
                self._note(bound)
                before, plain = self.state(), None
                if left <= self.tol**2 / 2:
                    self._step(statistics, rate)
                    self.converged, self.stop_reason = True, self._end(gains, left)
                    break
                if self.num_steps >= most:
                    self._step(statistics, rate)
                    self.stop_reason = f"max_steps: {self.num_steps} steps, {_still(left)}"
                    break
                if rate == 1.0 and self._at is not None and len(gains) >= _PLAIN:
                    plain = statistics
                    statistics = memory.propose(self._at, statistics)
                try:
                    self._step(statistics, rate)
                except FitDivergedError:
                    if plain is None:
                        raise
                    self._step(plain, 1.0)
        except KeyboardInterrupt:
            self.restore(before)
            raise
        self.stage_elbos.append(Estimate(self.bound, 0.0))

    def _unless_worse(
        self, data: Arguments, parts: list[Tensor] | None, plain: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Tensor], float] | None:
        """Statistics and the bound; after a leap only where it led up."""
        try:
            found = self._expect(data, parts)
        except FitDivergedError:
            if plain is None:
                raise
            return None
        return found if plain is None or found[1] >= self.bound else None

    def _left(self, gains: list[float], bound: float, memory: Anderson) -> float:
        """What is left to gain, by the gains so far and the slowest direction of the leaps."""
        if gains and gains[-1] <= self._rounding(bound, self._dtype):
            return 0.0
        if len(memory.ways) > 2:
            rate = memory.rate() ** 2  # of gains, which go by squares
            return max(gains[-2:]) * rate / (1 - rate)
        return _left(gains, 0.0)

    def _end(self, gains: list[float], left: float) -> str:
        return (
            f"the last step gained {max(gains[-1], 0.0):.1e} nats of all data, and {left:.1e} are "
            f"left to gain: less than {self.tol**2 / 2:.1e} (tol {self.tol:g} posterior sd)"
        )

    def _fell(self, gain: float, before: State) -> None:
        self.restore(before)
        self.converged = False
        self.stop_reason = (
            f"the bound fell by {-gain:.2g} nats at step {self.num_steps}, which a conjugate "
            "update cannot do: statistics() and maximise() of the model do not belong together"
        )

    @staticmethod
    def _rounding(bound: float, dtype: torch.dtype) -> float:
        eps = max(_ROUNDING * torch.finfo(dtype).eps, _CANCELLED * torch.finfo(torch.float64).eps)
        return eps * max(1.0, abs(bound))

    def _expect(
        self, data: Arguments, parts: list[Tensor] | None = None
    ) -> tuple[dict[str, Tensor], float]:
        """Expected statistics of all rows, at once or a part after the other, and the bound."""
        part = self.pair.ranks.part
        if parts is None and part is not None and data is self.pair.data:
            return self._expect_together(part)
        if parts is None:
            return self._expect_at_once(data)
        total, bound = num_rows(data) or 1, 0.0
        mean: dict[str, Tensor] = {}
        for rows in parts:
            found, value = self._expect_at_once(sized(take(data, rows), total))
            share = len(rows) / total
            bound += share * value
            mean = {k: share * s + mean.get(k, 0.0) for k, s in found.items()}
        return mean, bound

    def _expect_together(self, part: Arguments) -> tuple[dict[str, Tensor], float]:
        """Statistics of the rows of several processes: the mean of theirs, each for all rows."""
        ranks, lost = self.pair.ranks, None
        try:
            found, bound = self._expect_at_once(part)
        except FitDivergedError as error:  # all have to know
            found, bound, lost = {}, math.nan, error
        if math.isnan(float(ranks.mean(torch.tensor(bound, dtype=torch.float64)))):
            raise lost or self._diverged(f"the bound of another process is nan; {_NOT_SHORTER}")
        bound = float(ranks.mean(torch.tensor(bound, dtype=torch.float64)))
        return {name: ranks.mean(value) for name, value in found.items()}, bound

    def _expect_at_once(self, data: Arguments) -> tuple[dict[str, Tensor], float]:
        try:
            with torch.no_grad():
                statistics, bound = self.updates.statistics(*data.args, **data.kwargs)
        except SINGULAR as error:
            raise self._diverged(str(error)) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                "expected statistics of so many rows do not fit in memory "
                f"({(str(error).splitlines() or [''])[0]}); give batch_size= for some rows a step"
            ) from error
        value, self._dtype = float(bound), bound.dtype
        if not math.isfinite(value):
            raise self._diverged(f"the bound is {value}; {_NOT_SHORTER}")
        return statistics, value

    def _step(self, statistics: Mapping[str, Tensor], rate: float) -> None:
        """Move the guide towards where statistics lead."""
        if self._at is not None and rate < 1:
            mean = {k: torch.lerp(s, statistics[k], rate) for k, s in self._at.items()}
            statistics = mean
        self._at = statistics
        try:
            with torch.no_grad():
                self.updates.maximise(statistics)
        except SINGULAR as error:
            raise self._diverged(str(error)) from error

    def _diverged(self, why: str) -> FitDivergedError:
        manual_seed(stream(self.seed, "step", self.num_steps))
        site, value = first_bad_site(self.pair, 1, self.pair.data)
        return FitDivergedError(self.num_steps, site, value, why)

    def _note(self, bound: float) -> None:
        self.losses.append(-bound)
        self.tick(self.num_steps, -bound)

    # ---- mini-batches -------------------------------------------------------------------------

    def _epochs(self, parts: list[Tensor]) -> None:
        """Epochs of mini-batches at falling rates, until one gains nothing."""
        data, first = self.pair.data, self.lr or _FIRST
        statistics, best = self._expect(data, parts)
        self._at, num = statistics, 0
        before = self.state()
        try:
            while self.num_steps + len(parts) <= self.max_steps:
                self.stage_starts.append(self.num_steps)
                for _ in parts:
                    statistics, bound = self._expect_at_once(self.batch(self.num_steps))
                    self._note(bound)
                    self._step(statistics, first / (1 + num) ** _DECAY)
                    num += 1
                statistics, bound = self._expect(data, parts)
                self.stage_elbos.append(Estimate(bound, 0.0))
                if bound - best <= self.tol**2 / 2:
                    if bound < best:
                        self.restore(before)
                    return
                best, before = bound, self.state()
        except KeyboardInterrupt:
            self.restore(before)
            raise

    def _parts(self) -> list[Tensor]:
        """All rows in parts of the size of a batch."""
        rows, total = self.batch.rows(0), num_rows(self.pair.data) or 1
        return [*torch.arange(total).split(total if rows is None else len(rows))]


def sized(data: Arguments, total: int) -> Arguments:
    """Some rows, to stand for so many.

    Arguments:
        data: the rows.
        total: N.
    """
    return Arguments(data.args, {**data.kwargs, "size": total}, data.names)


def _left(gains: list[float], rounding: float) -> float:
    """What further steps of a climb will gain, by Aitken, from its gains so far."""
    if not gains:
        return math.inf
    if gains[-1] <= rounding:
        return 0.0
    ratios = [new / old for old, new in zip(gains[-3:], gains[-2:], strict=False) if old > 0]
    ratio = max(ratios, default=math.inf)
    return gains[-1] * ratio / (1 - ratio) if ratio < 1 else math.inf


def _still(left: float) -> str:
    if math.isinf(left):
        return "the gains not yet falling"
    return f"{left:.2g} nats of all data left to gain"
