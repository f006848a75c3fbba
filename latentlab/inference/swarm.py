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
from latentlab.inference.pair import Pair
from latentlab.inference.program import Program, inputs, moving, record, verify
from latentlab.inference.sandbox import stream
from latentlab.inference.simulate import Simulations
from latentlab.inference.starts import Starts
from latentlab.inference.xla import read, to_jax
from latentlab.protocols import StartsFrom, owner_of

__all__ = ["UNSETTLED", "Swarm"]

_NUMBERS = 2**23  # of noise in a call
_CALL = 100  # steps
_WARM_UP, _STAGE = 800, 400  # steps
_FIRST, _LAST = 0.3, 0.006  # rates of the warm-up, in units of the frame
_RATES = (0.1, 0.05, 0.025, 0.0125)  # of the stages
UNSETTLED = 0.1
"""Posterior standard deviations by which the last stage of a fit that is at rest may move."""
_BETAS = (0.9, 0.999)

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
        self._program = self._recorded()
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

    def _recorded(self) -> Program:
        """The step as a program, compared with the pair as for any fit."""
        from latentlab.inference.batches import Batches
        from latentlab.inference.modes import TrainingMode
        from latentlab.inference.steps import Compiled

        pair = self.pair
        program = record(pair, self.num_particles, pair.data)
        optimiser = torch.optim.Adam([*pair.parameters().values()], lr=1.0)
        trial = Compiled(pair, optimiser, program, Batches(pair.data), 0, 1)
        with TrainingMode(pair):
            verify(pair, program, trial.slope, self.num_particles, [pair.data])
        return program

    def _stage(self, rates: Sequence[float], seed: int, done: int, total: int) -> None:
        """Steps at some rates; all fits end at the average of the later half."""
        import jax

        program, M = self._program, len(self.simulations)
        generator = torch.Generator().manual_seed(seed)
        numbers = M * sum(math.prod(noise.shape) for noise in program.noise)
        size = max(1, min(_CALL, _NUMBERS // max(numbers, 1)))
        num = program.num_learned
        data = [
            self.simulations.observed.get(k, tensor)
            for k, tensor in enumerate(inputs(self.pair.data))
        ]
        axes = tuple(0 if k in self.simulations.observed else None for k in range(len(data)))
        function = _built(program, axes)
        with jax.enable_x64(True):
            held = (
                to_jax([x.contiguous() for x in self._state[num:]]),
                to_jax(data),
                to_jax(program.constants),
            )
            learned = to_jax([x.clone() for x in self._state[:num]])
            zeros = to_jax([torch.zeros_like(x) for x in self._state[:num]])
            age = to_jax([torch.zeros((), dtype=torch.int32)])[0]
            carry: Array = (learned, zeros, zeros, zeros, age)
            for first in range(0, len(rates), size):
                part = rates[first : first + size]
                noise = program.draw(generator, [1.0] * (len(part) * M))
                tapes = to_jax([z.reshape(len(part), M, *z.shape[1:]) for z in noise])
                counts = [float(k >= len(rates) // 2) for k in range(first, first + len(part))]
                plan = to_jax([torch.tensor(x, dtype=self.pair.dtype) for x in (part, counts)])
                carry = function(carry, held, (tapes, *plan))
                self.tick((done + first) / total)
            averaged = len(rates) - len(rates) // 2
            for k, array in enumerate(carry[3]):
                self._state[k] = torch.utils.dlpack.from_dlpack(array).clone() / averaged

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

    def loss(learned: Array, frame: Array, data: Array, constants: Array, noise: Array) -> Array:
        return graph(*learned, *frame, *data, *constants, *noise)[0]

    slope_of = jax.vmap(jax.grad(loss), in_axes=(0, 0, axes, None, 0))

    def call(carry: Array, held: Array, plan: Array) -> Array:
        frame, data, constants = held

        def step(carry: Array, now: Array) -> Array:
            learned, first, second, total, t = carry
            noise, rate, counts = now
            slopes = slope_of(learned, frame, data, constants, noise)
            t = t + 1
            age = t.astype(rate.dtype)
            wear = [1 - beta**age for beta in _BETAS]
            moved, firsts, seconds, totals = [], [], [], []
            for p, m, v, s, g in zip(learned, first, second, total, slopes, strict=True):
                flat = jnp.isfinite(g).reshape(len(g), -1).all(1)
                g = jnp.where(flat.reshape(-1, *[1] * (g.ndim - 1)), g, 0)
                m = m + (1 - _BETAS[0]) * (g - m)
                v = _BETAS[1] * v + (1 - _BETAS[1]) * g * g
                # The eps of a fit: small slopes make small steps, in the guide's own frame.
                size = jnp.sqrt(v / wear[1]) + rate
                p = (p - rate / wear[0] * m / size).astype(p.dtype)
                firsts.append(m)
                seconds.append(v)
                moved.append(p)
                totals.append((s + counts * p).astype(p.dtype))
            return (tuple(moved), tuple(firsts), tuple(seconds), tuple(totals), t), None

        return jax.lax.scan(step, carry, plan)[0]

    return jax.jit(call)
