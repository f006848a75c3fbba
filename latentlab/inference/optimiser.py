"""What an optimiser remembers, as tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from latentlab.inference.lazy_adam import LazyAdam

__all__ = ["memory_of", "recall_into"]


def memory_of(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of the steps so far, by name."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    found = {
        f"{k}.{name}": torch.as_tensor(value).clone()
        for k, parameter in enumerate(parameters)
        for name, value in optimiser.state.get(parameter, {}).items()
    }
    if isinstance(optimiser, LazyAdam):
        found["num_steps"] = torch.tensor(optimiser.num_steps)
    return found


def recall_into(optimiser: torch.optim.Optimizer, memory: Mapping[str, Tensor]) -> None:
    """Go on from what :func:`memory_of` gave, in place."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for key, value in memory.items():
        if key == "num_steps" and isinstance(optimiser, LazyAdam):
            optimiser.num_steps = int(value)
        else:
            k, name = key.split(".")
            optimiser.state[parameters[int(k)]][name] = value.clone()
