"""The settings of a fit, each checked before any time is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from latentlab.data.checks import as_count, as_seed
from latentlab.inference import objectives, predictive
from latentlab.inference.batches import follows_rows
from latentlab.inference.bounds import Bound
from latentlab.inference.pair import Pair
from latentlab.inference.steps import Backend
from latentlab.objectives import ELBO, Objective
from latentlab.protocols import Anneals, owner_of

__all__ = ["RATE", "Method", "Settings", "bound_of", "expect_one_of"]

Method = Literal["auto", "stages", "saa", "natural"]

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
        objective: what is climbed.
        method: how it is climbed.
    """

    batch_size: int | None
    num_restarts: int | None
    num_particles: int | None
    max_steps: int
    lr: float | None
    tol: float
    seed: int
    backend: Backend
    objective: Objective
    method: Method

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
        objective: Any,  # noqa: ANN401
        method: str,
    ) -> Settings:
        """Settings in range, each fault named."""
        for name, value in (("lr", RATE if lr is None else lr), ("tol", tol)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value < 1e6):
                range_ = "< 1e6" if number and 1e6 <= value < math.inf else "> 0"
                raise ValueError(f"{name}: expected a number {range_}, got {value!r}")
        if seed is None:
            raise ValueError("seed: expected an int >= 0, got None")
        expect_one_of(get_args(Backend), backend, "backend")
        expect_one_of(get_args(Method), method, "method")
        if not isinstance(objective, Objective) or type(objective) is Objective:
            raise ValueError(
                "objective: expected one of latentlab.objectives, as ELBO() or "
                f"IWAE(num_samples=8), got {objective!r}"
            )
        return cls(
            _count(batch_size, "batch_size"),
            _count(num_restarts, "num_restarts"),
            _count(num_particles, "num_particles"),
            as_count(max_steps, "max_steps"),
            lr,
            tol,
            as_seed(seed),
            backend,  # type: ignore[arg-type]
            objective,
            method,  # type: ignore[arg-type]
        )


def expect_one_of(known: tuple[str, ...], value: Any, name: str) -> None:  # noqa: ANN401
    """Refuse a word that is none of those that are known.

    Arguments:
        known: the words.
        value: what was given.
        name: of the argument.

    Raises:
        ValueError: listing the words.
    """
    if str(value) not in known:
        listed = ", ".join(f'"{choice}"' for choice in known)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


def _count(value: int | None, name: str) -> int | None:
    return None if value is None else as_count(value, name)


def bound_of(pair: Pair, objective: Objective) -> Bound | None:
    """The bound that a pair is to climb; ``None`` for the ELBO, which has a way of its own.

    Arguments:
        pair: the pair, looked at.
        objective: what was asked for.

    Raises:
        ValueError: if it has no meaning for the pair.
    """
    if isinstance(objective, ELBO):
        return None
    name = type(objective).__name__
    if pair.is_point():
        raise ValueError(
            f"objective: {name} weighs draws of a guide, and this pair's is a point: all of them "
            "are the same; take a guide with a spread, or ELBO()"
        )
    if pair.scored:
        raise ValueError(
            f"objective: {name} needs draws that move with the guide, and site "
            f"{next(iter(pair.scored))!r} has no reparameterised gradient; take ELBO(), or leave "
            "a discrete site out of the guide to have it summed out"
        )
    owner = owner_of(pair.model)
    if isinstance(owner, Anneals) and owner.free_bits:
        raise ValueError(
            f"objective: {name} knows of no free bits; set free_bits=0, or take ELBO()"
        )
    with pair.entered(seed=0), torch.no_grad():
        draws = objectives.draw(pair, 1)
        if draws.indices:
            raise ValueError(
                f"objective: {name} needs all rows, or fit(..., batch_size=); this pair draws "
                "mini-batches itself"
            )
        plate = predictive.datum_plate(pair) if follows_rows(pair) else None
        sites = {*objectives.site_log_probs(pair, draws), *draws.values} - {*pair.points}
    if plate is not None and any(
        plate not in {name for name, _, _ in pair.plates.get(site, ())} for site in sites
    ):
        plate = None  # a factor of all data
    return Bound(objective, plate)
