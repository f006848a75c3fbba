r"""Anderson acceleration of a fixed-point iteration :math:`s \mapsto G(s)`.

.. math::
    f_t = G(s_t) - s_t, \qquad
    \gamma = \arg\min_\gamma \lVert f_t - \Delta F \gamma \rVert, \qquad
    s_{t+1} = G(s_t) - (\Delta S + \Delta F) \gamma

The last few steps say how :math:`f` changes with s, and a step to where it would vanish takes the
place of many short ones. They also say at which rate the slowest of their directions converges:
the largest eigenvalue of the change of G along them.

References:
    | Anderson acceleration for fixed-point iterations (Walker and Ni, 2011)
    | Damped Anderson acceleration with restarts and monotonicity control for accelerating EM and
      EM-like algorithms (Henderson and Varadhan, 2019)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Anderson"]

_MEMORY = 10  # steps
_RIDGE = 1e-12  # least damping, where changes have length one
_MOST = 1e6
_MORE, _LESS = 1e4, 10.0  # damping after a leap that led down, and after one that led up
_SLOWEST = 0.9999  # rate that is believed


@dataclass
class Anderson:
    """What the last steps of a fixed-point iteration say of the next one.

    Example:
        >>> memory, s = Anderson(), torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> rates = torch.tensor([0.99, 0.5], dtype=torch.float64)
        >>> for _ in range(4):
        ...     s = memory.propose({"s": s}, {"s": rates * s})["s"]
        >>> bool(s.abs().max() < 1e-9)
        True
    """

    places: list[Tensor] = field(default_factory=list)
    ways: list[Tensor] = field(default_factory=list)
    damping: float = _RIDGE

    def learn(self, led_up: bool) -> None:
        """Leap less far after a leap that led down, and further again after others.

        Arguments:
            led_up: whether the last one raised what is climbed.
        """
        further = max(self.damping / _LESS, _RIDGE)
        self.damping = further if led_up else min(self.damping * _MORE, _MOST)

    def propose(self, at: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where to go from a place.

        Arguments:
            at: the place s.
            new: where a plain step leads, G(s).

        Returns:
            The next place; where a plain step leads, if it is the first.
        """
        place, end = _flat(at), _flat(new)
        self.places, self.ways = self.places[-_MEMORY:], self.ways[-_MEMORY:]
        self.places.append(place)
        self.ways.append(end - place)
        if len(self.ways) > 1:
            moved, changed = self._differences()
            length = changed.norm(dim=0).clamp_min(1e-300)
            unit = changed / length
            gram = unit.T @ unit
            gram.diagonal().add_(self.damping)
            shares = torch.linalg.solve(gram, unit.T @ self.ways[-1]) / length
            leap = end - (moved + changed) @ shares
            end = leap if bool(leap.isfinite().all()) else end
        return _shaped(end, new)

    def rate(self) -> float:
        """Rate of the slowest direction of the last steps; zero where none is known."""
        if len(self.ways) < 2:
            return 0.0
        moved, changed = self._differences()
        length = moved.norm(dim=0).clamp_min(1e-300)
        unit = moved / length
        gram = unit.T @ unit
        gram.diagonal().add_(_RIDGE)
        along = torch.linalg.solve(gram, unit.T @ ((moved + changed) / length))
        if not along.isfinite().all():
            return _SLOWEST
        return min(float(torch.linalg.eigvals(along).abs().max()), _SLOWEST)

    def _differences(self) -> tuple[Tensor, Tensor]:
        """Changes of the places, and of the ways from there, shape (numbers, steps) each."""
        places, ways = torch.stack(self.places, -1), torch.stack(self.ways, -1)
        return places.diff(dim=-1), ways.diff(dim=-1)


def _flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()]).double()


def _shaped(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([value.numel() for value in like.values()])
    return {k: part.view_as(v).to(v) for part, (k, v) in zip(parts, like.items(), strict=True)}
