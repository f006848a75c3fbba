"""Where a fit runs: its data, parameters, constants and noise are on one device.

A model that says ``torch.zeros(3)`` or ``dist.Normal(0.0, 1.0)`` names no device; while a pair
runs, torch's default device is that of the pair, so that the model need not be written for it.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroSample
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint
from torch.overrides import TorchFunctionMode

__all__ = [
    "CPU",
    "as_device",
    "move_attributes",
    "move_module",
    "moved",
    "running_on",
    "seed_device",
]

CPU = torch.device("cpu")

_KINDS = ("cpu", "cuda")
_HOLD_TENSORS = (Distribution, TorchDistributionMixin, Transform, Constraint, PyroSample)


def as_device(device: Any) -> torch.device | None:  # noqa: ANN401
    """A device that is here, by its full name; ``None`` leaves it to the data.

    Arguments:
        device: a name such as ``"cuda"`` or ``"cuda:1"``, a ``torch.device`` or ``None``.

    Raises:
        ValueError: if it is not here.

    Example:
        >>> as_device("cpu")
        device(type='cpu')
    """
    if device is None:
        return None
    try:
        probe = torch.zeros(1, device=_of_this_process(torch.device(device)))
        if probe.device.type in _KINDS and not probe.to(CPU).any():
            return probe.device  # "cuda" and "cuda:0" are one device, and compare so
    except (RuntimeError, TypeError, AssertionError, NotImplementedError):
        pass  # torch has many ways to say that a device is not here
    here = ["'cpu'", *(f"'cuda:{k}'" for k in range(torch.cuda.device_count()))]
    raise ValueError(
        f"device: expected one that is here ({', '.join(here)}), got {str(device)!r}; leave it "
        "out to stay where the data are"
    )


def _of_this_process(device: torch.device) -> torch.device:
    """Of the GPUs of a machine the one that ``torchrun`` has in mind."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count()))


@contextmanager
def running_on(device: torch.device) -> Iterator[None]:
    """Make tensors there that name no device, and leave its noise as it was found.

    Arguments:
        device: the device.
    """
    if device == torch.get_default_device():
        yield
        return
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        with device, _Numbers():
            yield
    finally:
        if state is not None:
            torch.cuda.set_rng_state(state, device)


class _Numbers(TorchFunctionMode):
    """Make tensors of single numbers where they are to be: the host waits for one that is sent."""

    def __torch_function__(
        self,
        func: Callable,
        types: object,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and type(args[0]) in (bool, int, float):
            return torch.full((), args[0], **kwargs)
        return func(*args, **kwargs)


def seed_device(seed: int) -> None:
    """Seed the default device, where it is not the CPU.

    Arguments:
        seed: of its generator.
    """
    device = torch.get_default_device()
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def moved(value: Any, device: torch.device) -> Any:  # noqa: ANN401
    """A value with its tensors on a device: a tensor, a distribution, or a container of them.

    Arguments:
        value: what may hold tensors; other values are handed back.
        device: where to.

    Example:
        >>> moved([torch.zeros(2), "a"], torch.device("cpu"))
        [tensor([0., 0.]), 'a']
    """
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    if type(value) in (list, tuple):
        parts = [moved(part, device) for part in value]
        same = all(new is old for new, old in zip(parts, value, strict=True))
        return value if same else type(value)(parts)
    if type(value) in (dict, OrderedDict):
        found = type(value)((key, moved(part, device)) for key, part in value.items())
        return value if all(found[key] is value[key] for key in value) else found
    if not isinstance(value, _HOLD_TENSORS):
        return value
    attributes = {name: moved(part, device) for name, part in vars(value).items()}
    if all(attributes[name] is part for name, part in vars(value).items()):
        return value
    new = copy.copy(value)
    vars(new).update(attributes)
    return new


def move_module(module: nn.Module, device: torch.device) -> None:
    """Move a module in place: parameters, buffers, and tensors that are neither.

    Arguments:
        module: the module, a copy of its own.
        device: where to.
    """
    module.to(device)
    for part in module.modules():
        move_attributes(part, device)


def move_attributes(value: object, device: torch.device) -> None:
    """Move the tensors among the attributes of an object, in place.

    Arguments:
        value: the object, a copy of its own.
        device: where to.
    """
    known = ("_parameters", "_buffers", "_modules")
    for name, attribute in list(vars(value).items()):
        if name not in known or not isinstance(value, nn.Module):
            vars(value)[name] = moved(attribute, device)
