"""The settings of a fit, each checked before any time is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from latentlab.data.checks import as_count, as_seed
from latentlab.inference.steps import Backend

__all__ = ["RATE", "Settings"]

RATE = 0.05
"""Rate of the first stage, in posterior standard deviations."""


@dataclass(frozen=True)
class Settings:
    """What :func:`latentlab.fit` was asked for; ``None`` leaves it to the pair.

    Arguments:
        batch_size: rows per step.
        num_restarts: starts.
        num_particles: draws per step.
        max_steps: steps of the climb from each start.
        lr: rate of the first stage.
        tol: shift below which stages agree.
        seed: of all noise.
        backend: what takes the steps.
    """

    batch_size: int | None
    num_restarts: int | None
    num_particles: int | None
    max_steps: int
    lr: float | None
    tol: float
    seed: int
    backend: Backend

    @classmethod
    def checked(
        cls,
        batch_size: int | None,
        num_restarts: int | None,
        num_particles: int | None,
        max_steps: int,
        lr: float | None,
        tol: float,
        seed: int,
        backend: str,
    ) -> Settings:
        """Settings in range, each fault named."""
        for name, value in (("lr", RATE if lr is None else lr), ("tol", tol)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value < 1e6):
                range_ = "< 1e6" if number and 1e6 <= value < math.inf else "> 0"
                raise ValueError(f"{name}: expected a number {range_}, got {value!r}")
        if seed is None:
            raise ValueError("seed: expected an int >= 0, got None")
        known = get_args(Backend)
        if str(backend) not in known:
            listed = ", ".join(f'"{name}"' for name in known)
            raise ValueError(f"backend: expected one of {listed}, got {backend!r}")
        return cls(
            _count(batch_size, "batch_size"),
            _count(num_restarts, "num_restarts"),
            _count(num_particles, "num_particles"),
            as_count(max_steps, "max_steps"),
            lr,
            tol,
            as_seed(seed),
            backend,  # type: ignore[arg-type]
        )


def _count(value: int | None, name: str) -> int | None:
    return None if value is None else as_count(value, name)
