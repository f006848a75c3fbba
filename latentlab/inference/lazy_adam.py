r"""Adam for numbers that only some steps are about.

A mini-batch of B of N rows says nothing about the latents of the others: their gradient is zero.
Plain Adam would move them all the same, by the momentum of the last batch they were in, some ten
steps along a gradient that nobody looks at any more, and would forget how large that gradient is.
Here a number with a zero gradient rests, with all that is remembered of it,

.. math::
    t &\leftarrow t + 1, \quad
    m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
    s \leftarrow \beta_2 s + (1 - \beta_2) g^2, \\
    \theta &\leftarrow \theta - \eta \,
        \frac{m / (1 - \beta_1^t)}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}
    \quad \text{where } g \ne 0,

and counts its own steps t.

References:
    | Adam: a method for stochastic optimization (Kingma and Ba, 2015)
    | Stochastic variational inference (Hoffman et al., 2013)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LazyAdam"]


class LazyAdam(torch.optim.Optimizer):
    """Adam where a number whose gradient is zero stays where it is.

    Arguments:
        params: as for ``torch.optim.Adam``.
        lr: rate.
        betas: how much is remembered of the gradient and its square.
        eps: as for ``torch.optim.Adam``.

    Example:
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> optimiser = LazyAdam([theta], lr=0.1)
        >>> theta.grad = torch.tensor([1.0, 0.0])
        >>> optimiser.step()
        >>> theta.detach()
        tensor([-0.1000,  0.0000])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step.

        Arguments:
            closure: not used; gradients are there already.
        """
        self.num_steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    self._move(parameter, parameter.grad, group)

    def often_moved(self) -> Tensor:
        """Which numbers, of all parameters in their order, at least half of the steps moved."""
        often = []
        for parameter in (p for group in self.param_groups for p in group["params"]):
            count = self.state[parameter].get("count", torch.zeros_like(parameter)).flatten()
            often.append(2 * count >= self.num_steps)
        return torch.cat(often)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state.update({k: torch.zeros_like(parameter) for k in ("count", "mean", "square")})
        count, mean, square = state["count"], state["mean"], state["square"]
        seen = gradient.ne(0).to(parameter.dtype)
        count.add_(seen)
        mean.add_(seen * (1 - first) * (gradient - mean))
        square.add_(seen * (1 - second) * (gradient * gradient - square))
        times = count.clamp_min(1)
        of_mean, of_square = (-torch.expm1(times * math.log(beta)) for beta in (first, second))
        step = mean / of_mean / ((square / of_square).sqrt() + group["eps"])
        parameter.sub_(group["lr"] * seen * step)
