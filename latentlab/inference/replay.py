"""What a stage of a climb did, put into its journal and done again without its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentlab.inference.journal import Part
from latentlab.inference.modes import TrainingMode, standing
from latentlab.inference.pair import Pair

__all__ = ["done", "go_to"]


def done(
    pair: Pair,
    losses: Sequence[float],
    facts: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Tensor]] | None = None,
    prefix: str = "",
) -> Part:
    """What a stage did, to be kept: where the pair stands now, and the losses of its steps.

    Arguments:
        pair: the pair, entered.
        losses: of the steps of the stage.
        facts: what else there is to say, JSON values.
        groups: further tensors, each group under its prefix.
        prefix: of where the pair stands, such as ``"passing."``.
    """
    steps = {"losses": torch.tensor(losses, dtype=torch.float64)}
    others = TrainingMode(pair).others()
    stands = {name: value for name, value in standing(pair).items() if name not in others}
    # No climb puts the others back: where they are is asked for in any case.
    own = {f"{prefix}stands": stands, "others": others, "steps": steps}
    return Part.of(facts, {**own, **(groups or {})})


def go_to(pair: Pair, part: Part) -> list[float]:
    """Put a pair where a stage put it, in place, and return the losses of its steps.

    Arguments:
        pair: the pair, entered; left as it is where the part does not say.
        part: what :func:`done` gave.
    """
    found = part.under("stands") or part.under("passing.stands")
    found |= part.under("others")
    for name, value in standing(pair).items():
        if name in found:
            value.copy_(found[name])
    return part.tensors["steps.losses"].tolist()
