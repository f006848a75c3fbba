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
_RIDGE = 1e-13  # of the largest squared change
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

    def forget(self) -> None:
        """Begin anew."""
        self.places.clear()
        self.ways.clear()

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
            gram = changed.T @ changed
            ridge = _RIDGE * gram.diagonal().max().clamp_min(1e-300)
            gram.diagonal().add_(ridge)
            shares = torch.linalg.solve(gram, changed.T @ self.ways[-1])
            leap = end - (moved + changed) @ shares
            end = leap if bool(leap.isfinite().all()) else end
        return _shaped(end, new)

    def rate(self) -> float:
        """Rate of the slowest direction of the last steps; zero where none is known."""
        if len(self.ways) < 2:
            return 0.0
        moved, changed = self._differences()
        gram = moved.T @ moved
        gram.diagonal().add_(_RIDGE * gram.diagonal().max().clamp_min(1e-300))
        along = torch.linalg.solve(gram, moved.T @ (moved + changed))
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
