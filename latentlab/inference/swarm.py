r"""Many fits of one pair at once: to simulated data sets, each with parameters of its own.

The step of a fit, recorded once as a pure function of parameters, data and noise, is mapped over M
data sets, and compiled: M fits cost little more than one. They climb together, by the same rates,
in stages that end at the average of their later half.

Letters: M data sets, n steps of a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from latentlab.guides import Guide
from latentlab.inference.modes import TrainingMode
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.program import Program, inputs, moving, record, verify
from latentlab.inference.sandbox import stream
from latentlab.inference.simulate import Simulations
from latentlab.inference.starts import Starts
from latentlab.inference.xla import BETAS, adam, read, to_jax, to_torch
from latentlab.protocols import StartsFrom, owner_of

__all__ = ["UNSETTLED", "Swarm"]

_NUMBERS = 2**23  # of noise in a call
_CALL = 100  # steps
_COMPARED = 3  # data sets at which the record is compared with the pair
_WARM_UP, _STAGE = 500, 300  # steps
_FIRST, _LAST = 0.3, 0.006  # rates of the warm-up, in units of the frame
_RATES = (0.1, 0.05, 0.025, 0.0125)  # of the stages
UNSETTLED = 0.1
"""Posterior standard deviations by which the last stage of a fit that is at rest may move."""

Array = Any


@dataclass
class Swarm:
    """Fits of a pair to simulated data.

    Arguments:
        pair: the pair, entered; it serves as a model of each of them.
        simulations: the data sets.
        num_particles: draws per step P.
        seed: of all noise.
        tick: called after every call, with the share of the work that is done.
        shifts: how far each fit moved in the last stage, in posterior standard deviations, (M,).
    """

    pair: Pair
    simulations: Simulations
    num_particles: int
    seed: int
    tick: Callable[[float], None]
    shifts: Tensor = field(default_factory=lambda: torch.zeros(0))

    def fit(self) -> None:
        """Fit all of them.

        Raises:
            UntraceableError: if the pair cannot be recorded.
        """
        pair, M = self.pair, len(self.simulations)
        self._state = [x.detach().expand(M, *x.shape).clone() for x in moving(pair).values()]
        self.shifts = torch.zeros(M)
        if not pair.parameters():  # a guide that was written down, not fitted
            return
        if isinstance(owner_of(pair.model), StartsFrom):
            self._place_each()
        self._prepare()
        fall = [_FIRST * (_LAST / _FIRST) ** (k / _WARM_UP) for k in range(_WARM_UP)]
        stages = [fall, *([rate] * _STAGE for rate in _RATES)]
        total, done = sum(map(len, stages)), 0
        for k, rates in enumerate(stages):
            before = self._places()
            self._stage(rates, stream(self.seed, "swarm", k), done, total)
            done += len(rates)
            self.shifts = self._moved(before)
            self._recentre()
            if k > 1 and bool((self.shifts < UNSETTLED).double().mean() > 0.95):
                break
        self.tick(1.0)

    def put(self, m: int) -> None:
        """Put the pair at the m-th fit, in place."""
        with torch.no_grad():
            for tensor, values in zip(moving(self.pair).values(), self._state, strict=True):
                tensor.copy_(values[m])

    def _place_each(self) -> None:
        """Begin where the model knows good places: another one for each data set."""
        for m in range(len(self.simulations)):
            own = replace(self.pair, data=self.simulations[m])
            Starts(own, self.seed).place(0)
            self._take(m)

    def _take(self, m: int) -> None:
        for tensor, values in zip(moving(self.pair).values(), self._state, strict=True):
            values[m] = tensor.detach()

    def _prepare(self) -> None:
        """Record the step, compile it for all data sets, and compare it with the pair."""
        pair, M = self.pair, len(self.simulations)
        self._program = program = record(pair, self.num_particles, pair.data)
        numbers = M * sum(math.prod(noise.shape) for noise in program.noise)
        self._size = max(1, min(_CALL, _NUMBERS // max(numbers, 1)))
        observed = self.simulations.observed
        self._data = [observed.get(k, tensor) for k, tensor in enumerate(inputs(pair.data))]
        axes = tuple(0 if k in observed else None for k in range(len(self._data)))
        self._steps = _built(program, axes)
        some = [self.simulations[m] for m in range(min(_COMPARED, M))]
        with TrainingMode(pair):
            verify(pair, program, self._slope, self.num_particles, some)

    def _slope(self, tape: Sequence[Tensor], data: Arguments) -> tuple[float, list[Tensor]]:
        """ELBO and gradient for one tape where the pair is, by the compiled steps themselves.

        At a rate of zero all steps are the same, and Adam's mean of their slopes is the slope.
        """
        n, M = self._size, len(self.simulations)
        own = data.tensors()
        m = next(
            m
            for m in range(M)
            if all(torch.equal(own[k], x[m]) for k, x in self.simulations.observed.items())
        )
        state = [x.detach().expand(M, *x.shape).contiguous() for x in moving(self.pair).values()]
        noise = [z.expand(n, M, *z.shape).contiguous() for z in tape]
        carry, elbos = self._run(self._begin(state), state, noise, [0.0] * n, [0.0] * n)
        kept = 1 - BETAS[0] ** n
        return float(elbos[0][m]), [to_torch(x)[m] / kept for x in carry[1]]

    def _begin(self, state: Sequence[Tensor]) -> Array:
        """What steps carry: parameters, Adam's moments, the sum of parameters, and an age."""
        learned = state[: self._program.num_learned]
        zeros = to_jax([torch.zeros_like(x) for x in learned])
        age = to_jax([torch.zeros((), dtype=torch.int32)])[0]
        return to_jax([x.clone() for x in learned]), zeros, zeros, zeros, age

    def _run(
        self,
        carry: Array,
        state: Sequence[Tensor],
        noise: Sequence[Tensor],
        rates: Sequence[float],
        counts: Sequence[float],
    ) -> tuple[Array, Array]:
        """Some steps of all fits; how much each of them counts in the average."""
        import jax

        with jax.enable_x64(True):
            frame = to_jax([x.contiguous() for x in state[self._program.num_learned :]])
            held = frame, to_jax(self._data), to_jax(self._program.constants)
            plan = [torch.tensor([*x], dtype=self.pair.dtype) for x in (rates, counts)]
            return self._steps(carry, held, (to_jax(noise), *to_jax(plan)))

    def _stage(self, rates: Sequence[float], seed: int, done: int, total: int) -> None:
        """Steps at some rates; all fits end at the average of the later half."""
        program, M, size = self._program, len(self.simulations), self._size
        generator = torch.Generator().manual_seed(seed)
        carry, later = self._begin(self._state), len(rates) // 2
        for first in range(0, len(rates), size):
            part = [*rates[first : first + size]]
            counts = [float(first + k >= later) for k in range(len(part))]
            # Of one length, so that one program does for all; the rest counts for nothing.
            part, counts = (x + [0.0] * (size - len(x)) for x in (part, counts))
            tapes = program.draw(generator, [1.0] * (size * M))
            noise = [z.reshape(size, M, *z.shape[1:]) for z in tapes]
            carry, _ = self._run(carry, self._state, noise, part, counts)
            self.tick((done + first) / total)
        for k, array in enumerate(carry[3]):
            self._state[k] = to_torch(array).clone() / (len(rates) - later)

    def _places(self) -> list[tuple[Tensor, Tensor]]:
        """Means and standard deviations on the real line, where a guide of ours tells them."""
        guide, found = self.pair.guide, []
        if not isinstance(guide, Guide):
            return []
        for m in range(len(self.simulations)):
            self.put(m)
            found.append((guide.free_mean().detach().clone(), guide.free_sd().detach().clone()))
        return found

    def _moved(self, before: list[tuple[Tensor, Tensor]]) -> Tensor:
        """How far each fit has moved, in standard deviations; zero where it cannot be told."""
        shifts = [
            torch.maximum(((new - old) / sd).abs(), (sd / wide).log().abs()).amax()
            if len(new)
            else torch.zeros(())
            for (old, wide), (new, sd) in zip(before, self._places(), strict=True)
        ]
        return torch.stack(shifts) if shifts else torch.zeros(len(self.simulations))

    def _recentre(self) -> None:
        """Move every guide into its own frame."""
        if isinstance(self.pair.guide, Guide):
            for m in range(len(self.simulations)):
                self.put(m)
                self.pair.guide.recentre()
                self._take(m)


def _built(program: Program, axes: tuple[int | None, ...]) -> Callable:
    """Steps of Adam for all data sets; a fit whose slope is not finite stays where it is."""
    import jax
    from jax import numpy as jnp

    graph = read(program)

    def loss(
        learned: Array, frame: Array, data: Array, constants: Array, noise: Array
    ) -> tuple[Array, Array]:
        return graph(*learned, *frame, *data, *constants, *noise)

    slope_of = jax.vmap(jax.grad(loss, has_aux=True), in_axes=(0, 0, axes, None, 0))

    def call(carry: Array, held: Array, plan: Array) -> Array:
        frame, data, constants = held

        def step(carry: Array, now: Array) -> Array:
            learned, first, second, total, t = carry
            noise, rate, counts = now
            slopes, elbo = slope_of(learned, frame, data, constants, noise)
            t = t + 1
            age = t.astype(rate.dtype)
            wear = [1 - beta**age for beta in BETAS]
            moved, firsts, seconds, totals = [], [], [], []
            for p, m, v, s, g in zip(learned, first, second, total, slopes, strict=True):
                flat = jnp.isfinite(g).reshape(len(g), -1).all(1)
                g = jnp.where(flat.reshape(-1, *[1] * (g.ndim - 1)), g, 0)
                # The eps of a fit: small slopes make small steps, in the guide's own frame.
                p, m, v = adam(p, m, v, g, wear, rate, jnp.maximum(rate, 1e-30))
                firsts.append(m)
                seconds.append(v)
                moved.append(p)
                totals.append((s + counts * p).astype(p.dtype))
            return (tuple(moved), tuple(firsts), tuple(seconds), tuple(totals), t), elbo

        return jax.lax.scan(step, carry, plan)

    return jax.jit(call)
