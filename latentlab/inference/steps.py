"""What takes the steps of a stage: torch one by one, or XLA many in a call.

A pair is recorded at the first step, the record is compiled, and compared with the pair. Where
that cannot be done torch runs the record, and where there is none the pair; the posterior says
why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from latentlab.inference.bounds import draws_for
from latentlab.inference.devices import CPU
from latentlab.inference.guards import Gauge, is_out_of_memory
from latentlab.inference.journal import Part
from latentlab.inference.modes import TrainingMode, standing
from latentlab.inference.optimiser import memory_of, recall_into
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.traced import Traced, differentiated
from latentlab.inference.training import blind_step_of, kl_weight, step_of

if TYPE_CHECKING:
    from latentlab.inference.batches import Batches
    from latentlab.inference.program import Program

__all__ = ["Backend", "Compiled", "Eager", "Engine", "Stepper", "Traced", "carry_on"]

Backend = Literal["auto", "eager", "traced", "xla"]

_STEPS = 100  # of a call, after which the place is looked at
_NUMBERS = 2**23  # of noise, or of places, in a call
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
    _trial: Compiled | Traced | None = None

    def __str__(self) -> str:
        return f"{self.used}: {self.why}" if self.why and self.backend != self.used else self.used

    def stepper(
        self,
        optimiser: torch.optim.Optimizer,
        batch: Batches,
        seed: int,
        mode: TrainingMode,
        every: int,
        step: int,
    ) -> Stepper:
        """What takes the steps of a stage: XLA, else the record, else the pair.

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
            return self._eager(optimiser, batch, seed, mode, every)
        how = (optimiser, batch, seed, mode, every)
        if not self._known:
            self._known, self.used = True, "eager"
            self.why = self._obstacle(mode) or self._record(*how, step)
            if self.why and self.backend in ("traced", "xla") and self.used != self.backend:
                raise ValueError(f'backend: "{self.backend}" cannot run this pair: {self.why}')
        if self.program is None:
            return self._eager(*how)
        return self._by_record(self.used, self.program, *how)

    def _by_record(
        self,
        used: str,
        program: Program,
        optimiser: torch.optim.Optimizer,
        batch: Batches,
        seed: int,
        mode: TrainingMode,
        every: int,
    ) -> Compiled | Traced:
        """Steps by a record, compiled or run by torch."""
        gauge = self.gauge_of(seed)
        if used == "xla":
            return Compiled(self.pair, optimiser, program, batch, seed, every, gauge)
        if isinstance(self._trial, Traced) and self._trial.program is program:
            graph = self._trial.graph
        else:
            graph = differentiated(program, self.pair, batch(0))
        return Traced(self.pair, optimiser, program, graph, batch, seed, gauge)

    def _eager(
        self,
        optimiser: torch.optim.Optimizer,
        batch: Batches,
        seed: int,
        mode: TrainingMode,
        every: int,
    ) -> Eager:
        gauge = self.gauge_of(seed)
        return Eager(self.pair, optimiser, self.num_particles, batch, seed, mode, every, gauge)

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
        self._take(fewer)

    def facts(self, seed: int) -> dict[str, Any]:
        """What a climb found out on its way and goes on with, JSON values.

        Arguments:
            seed: of the climb.
        """
        seen = self.gauge_of(seed).seen
        return {"num_particles": self.num_particles, "notes": [*self.notes], "seen": seen}

    def recall(self, facts: Mapping[str, Any], seed: int) -> bool:
        """Go on from what :meth:`facts` gave; whether steppers have to be made anew.

        Arguments:
            facts: of the same climb.
            seed: of the climb.
        """
        self.notes, self.gauge_of(seed).seen = [*facts["notes"]], facts["seen"]
        if facts["num_particles"] == self.num_particles:
            return False
        self._take(facts["num_particles"])
        return True

    def _take(self, num_particles: int) -> None:
        """So many particles from here on: what was recorded was recorded for others."""
        self.num_particles = num_particles
        self._known, self.program, self._trial = False, None, None

    def _obstacle(self, mode: TrainingMode) -> str:
        """Why the pair is run as it is, where that is known before it is recorded."""
        if self.backend == "eager":
            return "asked for"
        if self.pair.ranks:
            return f"{self.pair.ranks.size} processes take each step together"
        if self.pair.scored:
            sites = ", ".join(map(repr, self.pair.scored))
            return f"its guide draws {sites} without a reparameterised gradient"
        if self.backend == "auto" and self.max_steps < _FEWEST_STEPS:
            return f"a compilation is not worth {self.max_steps} steps"
        if len(mode.moving()) > len(self.pair.parameters()):
            return "it has batch normalisation, whose running means move"
        if self.pair.device != CPU:
            return f"it is on {self.pair.device}, where the pair itself takes the steps"
        return ""

    def _record(
        self,
        optimiser: torch.optim.Optimizer,
        batch: Batches,
        seed: int,
        mode: TrainingMode,
        every: int,
        step: int,
    ) -> str:
        """Record the pair, and go down from rung to rung; why it is not on the first."""
        from latentlab.inference.program import UntraceableError, record
        from latentlab.inference.xla import has_jax

        why = ""
        if self.backend == "traced":
            why = "asked for"
        elif not has_jax():
            why = "JAX is not installed: pip install 'latentlab[xla]'"
        try:
            with mode:
                program = record(self.pair, self.num_particles, batch(step), step)
        except UntraceableError as error:
            return str(error)
        for used in ("xla", "traced"):
            if used == "xla" and why or used == "traced" and self.backend == "xla":
                continue
            try:
                with mode:
                    trial = self._by_record(used, program, optimiser, batch, seed, mode, every)
                    self._compare(trial, batch, step)
            except (UntraceableError, NotImplementedError) as error:
                why = f"{why}; {error}" if why else str(error)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                why = "memory ran out when it was compiled"
            else:
                self.program, self.used, self._trial = program, used, trial
                return why
        return why

    def _compare(self, trial: Compiled | Traced, batch: Batches, step: int) -> None:
        """Compare the record with the pair, unless a journal knows how that ended."""
        from latentlab.inference.program import UntraceableError, verify

        program, steps = trial.program, range(step, step + 3)

        def run() -> Part:
            data = [batch(k) for k in steps]
            try:
                verify(self.pair, program, trial.slope, self.num_particles, data, step)
            except UntraceableError as error:
                return Part({}, {"why": str(error)})
            return Part({}, {"why": None})

        rows = [batch.rows(k) for k in steps]
        what = (
            type(trial).__name__,
            self.num_particles,
            step,
            program.code,
            rows,
            standing(self.pair),
        )
        why = self.pair.journal.remember(self.pair.journal.name("record", *what), run).facts["why"]
        if why is not None:
            raise UntraceableError(why)

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
            how = "XLA" if self.used == "xla" else "its record"
            self.program, self.used = None, "eager"
            self.why = f"at the end of a climb by {how} {error}"
            return False
        return True


class Eager:
    """By torch: on the CPU a step at a time, elsewhere many before one looks where they led.

    Arguments:
        pair: the pair, whose parameters are moved.
        optimiser: what moves them.
        num_particles: draws per step P.
        batch: the data of each step.
        seed: all noise comes from (seed, step).
        mode: in which the networks of the pair take a step.
        every: steps between two places that are remembered.
        gauge: of the climb; steps that are not looked at do without it.
    """

    def __init__(
        self,
        pair: Pair,
        optimiser: torch.optim.Optimizer,
        num_particles: int,
        batch: Batches,
        seed: int,
        mode: TrainingMode,
        every: int,
        gauge: Gauge,
    ) -> None:
        self.gauge = gauge
        self.pair, self.optimiser, self.num_particles = pair, optimiser, num_particles
        self.batch, self.seed, self.mode, self.every = batch, pair.ranks.seed(seed), mode, every
        size = sum(value.numel() for value in mode.moving().values())
        places = max(1, min(math.ceil(_STEPS / every), _NUMBERS // max(size, 1)))
        self.size = 1 if pair.device == CPU else every * places

    def take(self, first: int, rates: Sequence[float], attempt: int) -> tuple[list[float], Tensor]:
        """See :meth:`Compiled.take`."""
        if self.size == 1:
            (rate,) = rates
            step_here = blind_step_of if self.pair.ranks else partial(step_of, gauge=self.gauge)
            return [float(self._step(step_here, first, rate, attempt))], torch.empty(0)
        every = self.every if len(rates) % self.every == 0 else len(rates)
        elbos, path = [], []
        for k, rate in enumerate(rates):
            elbos.append(self._step(blind_step_of, first + k, rate, attempt))
            if (k + 1) % every == 0:
                path.append(torch.cat([p.flatten() for p in self.mode.moving().values()]))
        return torch.stack(elbos).tolist(), torch.stack(path)

    def _step(self, take: Callable, step: int, rate: float, attempt: int) -> Any:  # noqa: ANN401
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group.get("unit", 1.0)
        manual_seed(stream(self.seed, "step", step, attempt))
        with self.mode:
            return take(self.pair, self.num_particles, self.batch(step), step, self.optimiser)

    def memory(self) -> dict[str, Tensor]:
        """What the optimiser remembers of the steps so far, by name."""
        return memory_of(self.optimiser)

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`memory` gave."""
        recall_into(self.optimiser, memory)


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
        self.program = program
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

    def memory(self) -> dict[str, Tensor]:
        """What Adam remembers of the steps so far, by name."""
        return self.steps.memory()

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`memory` gave."""
        self.steps.recall(memory)

    def slope(self, noise: Sequence[Tensor], data: Arguments) -> tuple[float, list[Tensor]]:
        """The ELBO and the gradient of the loss for some noise and data, where the pair is now."""
        return self.steps.slope(noise, self.size, self.every, data.rows)


Stepper = Eager | Traced | Compiled


def carry_on(old: Stepper, new: Stepper) -> Stepper:
    """A new stepper, with what the one before remembers of the gradients.

    Arguments:
        old: the one before; XLA and torch do not read each other's memory.
        new: what takes its place, for the same parameters.
    """
    if isinstance(old, Compiled) == isinstance(new, Compiled):
        new.recall(old.memory())
    return new
