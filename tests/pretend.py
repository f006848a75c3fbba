"""A device that is not here: its tensors say so, and refuse to meet those of the CPU.

Within :func:`elsewhere` the device ``"meta"`` computes: each of its tensors holds one of the CPU.
As with a GPU, an operation on tensors of both is an error, but for numbers without a dimension;
and each time that a value is read back, or sent there, the host would have to wait: these are
counted.
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

THERE = torch.device("meta")
_MOVES = ("_to_copy", "copy_")


class There(torch.Tensor):
    """A tensor elsewhere."""

    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            raw.stride(),
            raw.storage_offset(),
            dtype=raw.dtype,
            device=THERE,
        )

    def __init__(self, raw):
        self.raw = raw

    def __repr__(self):
        return f"There({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, Counter())


def run(func, args, kwargs, waits):
    """Take an operation to where its tensors are."""
    given, _ = tree_flatten((args, kwargs))
    there = [x for x in given if isinstance(x, There)]
    here = [x for x in given if isinstance(x, torch.Tensor) and not isinstance(x, There)]
    name = func.overloadpacket.__name__
    asked = kwargs.get("device")
    to_there = THERE.type == asked.type if asked is not None else bool(there)
    if name == "_local_scalar_dense" and there:
        waits[name] += 1
        to_there = False
    elif name in _MOVES and (there or to_there):
        source = args[-1] if name == "copy_" else args[0]
        target = args[0] if name == "copy_" else None
        to_there = isinstance(target, There) if target is not None else to_there
        if isinstance(source, There) != to_there and source.numel():
            waits["read" if isinstance(source, There) else "sent"] += 1
    elif name in ("index", "index_put", "index_put_") and there:
        waits["sent"] += any(x.numel() for x in here)
    elif there and any(x.dim() for x in here):
        shapes = [tuple(x.shape) for x in here]
        raise RuntimeError(f"{func}: tensors of two devices, on the CPU {shapes}")
    elif kwargs.get("generator") is not None and to_there != _Noise.is_asked:
        raise RuntimeError(f"{func}: a generator of the CPU, for a tensor elsewhere")
    elif name in ("nonzero", "equal", "masked_select") and there:
        waits[name] += 1
    places = {id(x.raw): x for x in there}
    down = {"device": torch.device("cpu")} if asked is not None else {}

    def lower(x):
        return x.raw if isinstance(x, There) else x

    found = func(*tree_map(lower, args), **(tree_map(lower, kwargs) | down))
    if name == "_to_copy" and any(found is lower(x) for x in there + here):
        found = found.clone()

    def lift(x):
        if not isinstance(x, torch.Tensor):
            return x
        return places.get(id(x)) if id(x) in places else There(x) if to_there else x

    return tree_map(lift, found)


class _Noise(torch.Generator):
    """A generator elsewhere."""

    is_asked = False  # whether one of them is at work

    def __new__(cls, device="cpu"):
        is_there = torch.device(device).type == THERE.type
        return super().__new__(cls) if is_there else _GENERATOR(device)


_GENERATOR = torch.Generator


class _Elsewhere(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, self.waits)


class _Made(TorchFunctionMode):
    """Numbers of Python become tensors of the CPU, and are sent."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.numpy, torch.Tensor.tolist) and isinstance(args[0], There):
            if func is torch.Tensor.numpy and not kwargs.get("force"):
                raise TypeError("a tensor elsewhere is no array")
            return func(args[0].detach().cpu())
        if "generator" in kwargs:
            with patch.object(_Noise, "is_asked", isinstance(kwargs["generator"], _Noise)):
                return func(*args, **kwargs)
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None:
            if torch.device(device).type == THERE.type:
                requires_grad = kwargs.pop("requires_grad", False)
                made = func(*args, **kwargs | {"device": getattr(args[0], "device", "cpu")})
                made = made.to(THERE)
                return made.requires_grad_() if requires_grad else made
        return func(*args, **kwargs)


@contextmanager
def elsewhere():
    """Let the device compute; yields how often the host had to wait, by why."""
    fused = "torch.optim.optimizer._get_fused_kernels_supported_devices"
    with ExitStack() as stack:
        stack.enter_context(patch(fused, lambda: ["cpu", THERE.type]))
        stack.enter_context(patch("latentlab.inference.devices._KINDS", ("cpu", THERE.type)))
        for name, module in [*sys.modules.items()]:
            if name.startswith(("torch", "latentlab")) and "Generator" in vars(module):
                if vars(module)["Generator"] is _GENERATOR:
                    stack.enter_context(patch.object(module, "Generator", _Noise))
        stack.enter_context(_Made())
        mode = stack.enter_context(_Elsewhere())
        yield mode.waits
