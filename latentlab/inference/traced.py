"""Steps by the record of a pair, run by torch: no compiler, and no Python of the pair.

The record of the loss is differentiated once, into a second one that holds loss and slopes; a step
runs its operations one after the other, which costs about half of what running the pair does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentlab.inference.guards import Gauge
from latentlab.inference.optimiser import memory_of, recall_into
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.program import Program, UntraceableError, inputs, moving
from latentlab.inference.sandbox import stream
from latentlab.inference.training import SINGULAR, kl_weight

if TYPE_CHECKING:
    from latentlab.inference.batches import Batches

__all__ = ["Traced", "differentiated"]


def differentiated(program: Program, pair: Pair, data: Arguments) -> torch.fx.GraphModule:
    """The record of a step with its slopes: to the slopes of all parameters, loss and ELBO.

    Arguments:
        program: of the loss.
        pair: the pair, entered.
        data: of a step.

    Raises:
        UntraceableError: if an operation has no slope that can be written down.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    num = program.num_learned
    noise = [z[0] for z in program.draw(torch.Generator().manual_seed(0), [1.0])]
    given = [*moving(pair).values(), *inputs(data), *program.constants, *noise]

    def both(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            learned = [x.detach().requires_grad_() for x in tensors[:num]]
            loss, elbo = program.graph(*learned, *tensors[num:])
            slopes = torch.autograd.grad(loss, learned, allow_unused=True)
        found = zip(slopes, learned, strict=True)
        made = [torch.zeros_like(x) if slope is None else slope for slope, x in found]
        return (*(x.detach() for x in (*made, loss, elbo)),)

    try:
        graph = make_fx(both, _allow_non_fake_inputs=True)(*(x.detach() for x in given))
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise UntraceableError(f"its slopes: {type(error).__name__}: {first_line}") from error
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


class Traced:
    """A step at a time, by the record.

    Arguments:
        pair: the pair, whose parameters are moved.
        optimiser: what moves them.
        program: of a step.
        graph: the same with its slopes.
        batch: the data of each step.
        seed: all noise comes from (seed, step).
        gauge: of the climb.
    """

    size = 1

    def __init__(
        self,
        pair: Pair,
        optimiser: torch.optim.Optimizer,
        program: Program,
        graph: torch.fx.GraphModule,
        batch: Batches,
        seed: int,
        gauge: Gauge,
    ) -> None:
        self.pair, self.optimiser, self.program, self.graph = pair, optimiser, program, graph
        self.batch, self.seed, self.gauge = batch, seed, gauge
        self._state = [*moving(pair).values()]
        self._names = [*pair.parameters()]

    def take(self, first: int, rates: Sequence[float], attempt: int) -> tuple[list[float], Tensor]:
        """See :meth:`latentlab.inference.steps.Compiled.take`."""
        (rate,) = rates
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group.get("unit", 1.0)
        generator = torch.Generator().manual_seed(stream(self.seed, "steps", first, attempt))
        noise = [z[0] for z in self.program.draw(generator, [kl_weight(self.pair, first)])]
        try:
            slopes, elbo = self._run(noise, self.batch(first))
        except SINGULAR:
            return [math.nan], torch.empty(0)
        if not math.isfinite(elbo):
            return [elbo], torch.empty(0)
        sizes = torch.stack([*torch._foreach_norm(slopes, math.inf)]).tolist()
        found = [math.inf if math.isnan(size) else size for size in sizes]  # no maximum finds NaN
        steepest, name = max(zip(found, self._names, strict=True))
        if not self.gauge.accepts(name, steepest, elbo):
            return [math.nan], torch.empty(0)
        for parameter, slope in zip(self._state, slopes, strict=False):
            parameter.grad = slope
        self.optimiser.step()
        return [elbo], torch.empty(0)

    def memory(self) -> dict[str, Tensor]:
        """What the optimiser remembers of the steps so far, by name."""
        return memory_of(self.optimiser)

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`memory` gave."""
        recall_into(self.optimiser, memory)

    def slope(self, noise: Sequence[Tensor], data: Arguments) -> tuple[float, list[Tensor]]:
        """The ELBO and the gradient of the loss for some noise and data, where the pair is now."""
        slopes, elbo = self._run(noise, data)
        return elbo, slopes

    def _run(self, noise: Sequence[Tensor], data: Arguments) -> tuple[list[Tensor], float]:
        with torch.no_grad():
            given: Any = (*inputs(data), *self.program.constants, *noise)
            *slopes, _, elbo = self.graph(*(x.detach() for x in self._state), *given)
        return slopes, float(elbo)
