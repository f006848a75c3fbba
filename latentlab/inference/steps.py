"""What takes the steps of a stage: torch one by one, or XLA many in a call.

A pair is recorded at the first step, compared with the record, and compiled; where that cannot be
done torch takes the steps, and the posterior says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from latentlab.inference.bounds import draws_for
from latentlab.inference.guards import Gauge, is_out_of_memory
from latentlab.inference.modes import TrainingMode
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.training import kl_weight, step_of

if TYPE_CHECKING:
    from latentlab.inference.batches import Batches
    from latentlab.inference.program import Program

__all__ = ["Backend", "Engine", "Eager", "Compiled", "Stepper"]

Backend = Literal["auto", "eager", "xla"]

_STEPS = 100  # of a call, after which the place is looked at
_NUMBERS = 2**23  # of noise in a call
_FEWEST_STEPS = 2000  # for which a compilation is worth its seconds


@dataclass
class Engine:
    """How the steps of a pair are taken; found out at the first of them, and kept.

    Arguments:
        pair: the pair.
        backend: what was asked for.
        num_particles: draws per step P.
        max_steps: of the climb; a compilation is not worth a few.
    """

    pair: Pair
    backend: Backend
    num_particles: int
    max_steps: int
    used: str = "eager"
    why: str = ""
    program: Program | None = field(default=None, repr=False)
    notes: list[str] = field(default_factory=list)
    _gauges: dict[int, Gauge] = field(default_factory=dict)
    _known: bool = False
    _trial: Compiled | None = None

    def __str__(self) -> str:
        return f"{self.used}: {self.why}" if self.why and self.backend != "eager" else self.used

    def stepper(
        self,
        optimiser: torch.optim.Optimizer,
        batch: Batches,
        seed: int,
        mode: TrainingMode,
        every: int,
        step: int,
    ) -> Stepper:
        """What takes the steps of a stage, by XLA where the pair can be compiled.

        Arguments:
            optimiser: Adam, new.
            batch: the data of each step.
            seed: all noise comes from (seed, step).
            mode: in which the networks of the pair take a step.
            every: steps between two places that are remembered.
            step: number of the first step.
        """
        if type(optimiser) is not torch.optim.Adam:
            self.why = "each row has latents of its own, which only its batches move"
            return self._eager(optimiser, batch, seed, mode)
        if not self._known:
            self._known = True
            self.why = self._reason(optimiser, batch, mode, every, step) or ""
            self.used = "eager" if self.why else "xla"
            if self.why and self.backend == "xla":
                raise ValueError(f'backend: "xla" cannot run this pair: {self.why}')
        if self.program is None:
            return self._eager(optimiser, batch, seed, mode)
        return Compiled(
            self.pair, optimiser, self.program, batch, seed, every, self.gauge_of(seed)
        )

    def _eager(
        self, optimiser: torch.optim.Optimizer, batch: Batches, seed: int, mode: TrainingMode
    ) -> Eager:
        gauge = self.gauge_of(seed)
        return Eager(self.pair, optimiser, self.num_particles, batch, seed, mode, gauge)

    def gauge_of(self, seed: int) -> Gauge:
        """The gauge of the climb with this seed."""
        return self._gauges.setdefault(seed, Gauge.of(self.pair.dtype))

    def take_fewer(self, error: BaseException) -> None:
        """Half the particles from here on, where memory ran out.

        Arguments:
            error: what was raised.

        Raises:
            MemoryError: if there are no fewer; the message says what to do.
            BaseException: the error, if it is another one.
        """
        if not is_out_of_memory(error):
            raise error
        whole = draws_for(self.pair.bound, 1)
        fewer = whole * (self.num_particles // whole // 2)
        if not fewer:
            raise MemoryError(
                f"a step with num_particles={self.num_particles} does not fit in memory "
                f"({(str(error).splitlines() or [''])[0]}); give batch_size= for some rows a step"
            ) from error
        before = self.num_particles
        self.notes.append(f"memory ran out: num_particles={fewer} in the place of {before}")
        self.num_particles, self._known, self.program, self._trial = fewer, False, None, None

    def _reason(
        self,
        optimiser: torch.optim.Optimizer,
        batch: Batches,
        mode: TrainingMode,
        every: int,
        step: int,
    ) -> str | None:
        """Record the pair; or why it is run as it is."""
        from latentlab.inference.xla import has_jax

        if self.backend == "eager":
            return "asked for"
        if self.pair.scored:
            sites = ", ".join(map(repr, self.pair.scored))
            return f"its guide draws {sites} without a reparameterised gradient"
        if not has_jax():
            return "JAX is not installed: pip install 'latentlab[xla]'"
        if self.backend == "auto" and self.max_steps < _FEWEST_STEPS:
            return f"a compilation is not worth {self.max_steps} steps"
        if len(mode.moving()) > len(self.pair.parameters()):
            return "it has batch normalisation, whose running means move"
        if any(t.device.type != "cpu" for t in self.pair.data.tensors()):
            return "its data are not on the CPU"
        from latentlab.inference.program import UntraceableError, record

        try:
            with mode:
                program = record(self.pair, self.num_particles, batch(step), step)
                self._trial = Compiled(self.pair, optimiser, program, batch, 0, every)
                self._compare(self._trial, batch, step)
        except (UntraceableError, NotImplementedError) as error:
            return str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return "memory ran out when it was compiled"
        self.program = program
        return None

    def _compare(self, trial: Compiled, batch: Batches, step: int) -> None:
        from latentlab.inference.program import verify

        data = [batch(step + k) for k in range(3)]
        verify(self.pair, trial.steps.program, trial.slope, self.num_particles, data, step)

    def still_holds(self, batch: Batches, mode: TrainingMode, step: int) -> bool:
        """Whether the record is what the pair does, where the climb ended; else it is dropped.

        Arguments:
            batch: the data of each step.
            mode: in which the networks of the pair take a step.
            step: number of the last step.
        """
        if self.program is None or self._trial is None:
            return True
        from latentlab.inference.program import UntraceableError

        try:
            with mode:
                self._compare(self._trial, batch, step)
        except UntraceableError as error:
            self.program, self.used = None, "eager"
            self.why = f"at the end of a climb by XLA {error}"
            return False
        return True


@dataclass
class Eager:
    """A step at a time, by torch."""

    pair: Pair
    optimiser: torch.optim.Optimizer
    num_particles: int
    batch: Batches
    seed: int
    mode: TrainingMode
    gauge: Gauge
    size: int = 1

    def take(self, first: int, rates: Sequence[float], attempt: int) -> tuple[list[float], Tensor]:
        """See :meth:`Compiled.take`."""
        (rate,) = rates
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group.get("unit", 1.0)
        manual_seed(stream(self.seed, "step", first, attempt))
        with self.mode:
            how = (self.batch(first), first, self.optimiser, self.gauge)
            value = step_of(self.pair, self.num_particles, *how)
        return [value], torch.empty(0)


class Compiled:
    """Many steps in a call, by XLA.

    Arguments:
        pair: the pair, whose parameters are moved.
        optimiser: whose groups tell the rates of the parameters; it takes no step itself.
        program: of a step.
        batch: the data of each step.
        seed: all noise comes from (seed, step).
        every: steps between two places that are remembered.
        gauge: of the climb, if it is one.
    """

    def __init__(
        self,
        pair: Pair,
        optimiser: torch.optim.Optimizer,
        program: Program,
        batch: Batches,
        seed: int,
        every: int,
        gauge: Gauge | None = None,
    ) -> None:
        from latentlab.inference.program import inputs, moving
        from latentlab.inference.xla import Steps

        self.pair, self.batch, self.seed, self.every = pair, batch, seed, every
        self.gauge = gauge or Gauge.of(pair.dtype)
        numbers = sum(math.prod(noise.shape) for noise in program.noise)
        size = max(1, min(_STEPS, _NUMBERS // max(numbers, 1)))
        self.size = every * math.ceil(size / every)
        self.batched = batch.rows(0) is not None
        state = moving(pair)
        of = {id(p): group for group in optimiser.param_groups for p in group["params"]}
        groups = [of[id(p)] for p in pair.parameters().values()]
        self.steps = Steps(
            program,
            [*state.values()],
            inputs(pair.data),
            [float(group.get("unit", 1.0)) for group in groups],
            [float(group["eps"]) for group in groups],
            self.batched,
        )

    def take(self, first: int, rates: Sequence[float], attempt: int) -> tuple[list[float], Tensor]:
        """Take some steps.

        Arguments:
            first: number of the first of them.
            rates: of each of them.
            attempt: how often steps from here have failed.

        Returns:
            The ELBO at each step, NaN or infinite from the one on that failed, all of them NaN
            where one of several steps had a gradient far above all others; and the places of
            all parameters after every ``every`` steps, or after all of a number that is no
            multiple of it.
        """
        rows, steps = None, range(first, first + len(rates))
        if self.batched:
            taken = (self.batch.rows(k) for k in steps)
            rows = torch.stack([r for r in taken if r is not None])
        generator = torch.Generator().manual_seed(stream(self.seed, "steps", first, attempt))
        program, weights = self.steps.program, [1.0] * len(rates)
        if program.anneals:
            weights = [kl_weight(self.pair, k) for k in steps]
        noise = program.draw(generator, weights)
        every = self.every if len(rates) % self.every == 0 else len(rates)
        elbos, path = self.steps.run(noise, rates, every, rows)
        name, slope = self.steps.steepest()
        if all(map(math.isfinite, elbos)) and not self.gauge.accepts(name, slope, elbos[-1]):
            return [math.nan] * len(elbos), path[:0]
        return elbos, path

    def slope(self, noise: Sequence[Tensor], data: Arguments) -> tuple[float, list[Tensor]]:
        """The ELBO and the gradient of the loss for some noise and data, where the pair is now."""
        return self.steps.slope(noise, self.size, self.every, data.rows)


Stepper = Eager | Compiled
