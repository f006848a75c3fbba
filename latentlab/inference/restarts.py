r"""How far the starts of a fit agree, in height and in place.

A start i ends with a guide of means :math:`m_i` and standard deviations :math:`s_i`. It found the
best optimum b again if its ELBO is within a nat, and

.. math:: \max_f \frac{|m_{if} - m_{bf}|}{s_{bf}} \le 5

over all figures f, components that may swap their labels aligned first. One that is as high and
further away is another mode of the posterior, or a symmetry of the model: a guide covers one.

Where starts are many and cheap they compete (successive halving): after each round the better half
goes on, and only the last of them say anything about agreement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentlab.diagnostics import Estimate, align

__all__ = ["Place", "Restarts", "distances"]

_AS_HIGH = 1.0  # nats
_SAME_PLACE = 5.0  # standard deviations


@dataclass(frozen=True)
class Restarts:
    """How far the starts of a fit agree.

    Arguments:
        elbos: the ELBO that each start reached after its warm-up, in nats.
        apart: how far each start is from the best one, in standard deviations; empty if not known.
        given_up: further starts, that were behind after a few steps and left there.
        num_rows: of how many rows the figures are, scaled to all of them; ``None`` for all.
    """

    elbos: tuple[Estimate, ...]
    apart: tuple[float, ...] = ()
    given_up: int = 0
    num_rows: int | None = None

    @property
    def num_agreeing(self) -> int:
        """Starts within one nat, or three standard errors, of the best, and in the same place."""
        return sum(not far for far in self._as_high())

    @property
    def num_elsewhere(self) -> int:
        """Starts as high as the best, but in another place."""
        return sum(self._as_high())

    def _as_high(self) -> list[bool]:
        """For each start as high as the best, whether it is elsewhere."""
        best = max(self.elbos, key=lambda e: e.value, default=Estimate(0.0, 0.0))
        apart = self.apart or (0.0,) * len(self.elbos)
        return [
            distance > _SAME_PLACE
            for e, distance in zip(self.elbos, apart, strict=True)
            if best.value - e.value <= _AS_HIGH + 3 * math.hypot(best.se, e.se)
        ]

    def __str__(self) -> str:
        if len(self.elbos) < 2:
            return "one start: agreement of starts is not known"
        parts = [f"best optimum in {self.num_agreeing} of {len(self.elbos)} starts"]
        if self.given_up:
            parts[0] += f" that were left of {len(self.elbos) + self.given_up}"
        if self.num_rows is not None:
            parts[0] += f" (at {self.num_rows} rows)"
        if self.num_elsewhere:
            far = max(self.apart)
            parts.append(f"another as good, {far:.0f} sd away, in {self.num_elsewhere}")
        best = max(e.value for e in self.elbos)
        behind = sorted(best - e.value for e in self.elbos)[len(self._as_high()) :]
        worse = [gap for gap in behind if math.isfinite(gap)]
        if worse:
            parts.append(f"runner-up {worse[0]:.1f} nats worse")
        if diverged := len(behind) - len(worse):
            parts.append(f"{diverged} start{'s' * (diverged > 1)} diverged")
        return ", ".join(parts)


@dataclass(frozen=True)
class Place:
    """Where a start ended: mean and standard deviation of every site."""

    mean: Mapping[str, Tensor]
    sd: Mapping[str, Tensor]

    @classmethod
    def of(cls, draws: Mapping[str, Tensor]) -> Place:
        """The place of draws (P, ...)."""
        numbers = {k: v if v.is_floating_point() else v.double() for k, v in draws.items()}
        return cls(
            {site: value.mean(0) for site, value in numbers.items()},
            {site: value.std(0, correction=0) for site, value in numbers.items()},
        )


def distances(
    places: Sequence[Place], best: int, axes: Mapping[str, int | tuple[int, ...]]
) -> tuple[float, ...]:
    """How far each place is from the best, in standard deviations of the best.

    Arguments:
        places: where the starts ended.
        best: which of them is the best.
        axes: site -> axis from the right over exchangeable components.

    Returns:
        One distance a place; infinite where a mean is not a number.
    """
    home = places[best]
    means = {site: torch.stack([p.mean[site] for p in places]) for site in home.mean}
    swapping = {site: axis for site, axis in axes.items() if site in means}
    if swapping and all(means[site].isfinite().all() for site in swapping):
        reference = {site: home.mean[site] for site in swapping}
        chosen = {site: means[site] for site in swapping}
        means |= align(chosen, swapping, reference).draws
    far = torch.zeros(len(places), dtype=torch.float64, device="cpu")
    for site, mean in means.items():
        gap = (mean - home.mean[site]).abs().double()
        gap = torch.where(gap == 0, gap, gap / home.sd[site].double())
        gap = gap.reshape(len(places), -1).nan_to_num(nan=math.inf).amax(1)
        far = torch.maximum(far, gap.cpu())
    return tuple(far.tolist())
