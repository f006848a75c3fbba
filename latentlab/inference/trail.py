"""Where the parameters of a stage have been, and whether they have stopped drifting."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentlab.diagnostics import rhat

__all__ = ["Trail"]

_SNAPSHOT_EVERY = 2  # steps
_TRAIL_NUMBERS = 2**25


class Trail:
    """Where the parameters of a stage have been; thinned, so that large nets fit in memory."""

    def __init__(
        self, parameters: list[Tensor], num_steps: int, restless: set[int], at_rest: float
    ) -> None:
        self.parameters, self.at_rest = parameters, at_rest
        # Weights of networks have directions that change nothing, and drift along them for ever.
        settling = [torch.full((p.numel(),), id(p) not in restless) for p in parameters]
        self.settling = torch.cat(settling).nonzero().squeeze(-1)
        self.size = sum(p.numel() for p in parameters)
        self.every = max(_SNAPSHOT_EVERY, math.ceil(self.size * num_steps / _TRAIL_NUMBERS))
        self.points: list[Tensor] = []

    def follow(self, step: int, path: Tensor) -> None:
        """Keep the places of a path, or take a snapshot, if it is time to."""
        if len(path):
            self.points.extend(path[:, : self.size])
        elif step % self.every == 0:
            self.points.append(torch.cat([p.detach().flatten() for p in self.parameters]))

    def stationary(self, moved: Tensor | None = None) -> bool:
        """Whether the later half of the trail has stopped drifting.

        Numbers that few steps ``moved`` are left out: how far a stage takes them tells of them.
        """
        settling = self.settling if moved is None else self.settling[moved[self.settling]]
        later = [point[settling] for point in self.points[len(self.points) // 2 :]]
        if len(later) < 4:
            return False
        if not len(settling):
            return True
        path = torch.stack(later)
        # Where the gradient is zero draw by draw, what is left to drift is rounding.
        still = path.amax(0) - path.amin(0) <= self.at_rest
        settled = (rhat(path) < 1.1).to(still.device)
        return bool((settled | still).double().mean() >= 0.95)

    def go_to_average(self) -> None:
        """Put the parameters at the average of the later half."""
        if not self.points:
            return
        flat = torch.stack(self.points[len(self.points) // 2 :]).mean(0)
        sizes = [p.numel() for p in self.parameters]
        with torch.no_grad():
            for parameter, part in zip(self.parameters, flat.split(sizes), strict=True):
                parameter.copy_(part.view_as(parameter))
