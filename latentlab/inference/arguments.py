"""Data as people have it, turned into the arguments that a pair is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentlab.data.checks import as_rows
from latentlab.data.load import load
from latentlab.data.table import Table
from latentlab.inference.pair import Arguments, modules_of
from latentlab.protocols import ToleratesMissing

__all__ = ["as_arguments"]


def as_arguments(data: Any, model: Callable) -> Arguments:  # noqa: ANN401
    """The arguments of ``model(*args, **kwargs)``.

    Arguments:
        data: a tensor, array, frame or ``Table`` (one argument), a tuple (several), a dict
            (keywords), or ``None`` (no data).
        model: the model; floating arrays take the dtype of its parameters, else float64.

    Returns:
        The arguments, tensors detached, with the names of the columns where there are some.

    Raises:
        ValueError: for infinite values, or NaN where the model does not know missing cells.
        TypeError: for strings, complex or sparse data.
    """
    if isinstance(data, Arguments):
        return data
    owner = getattr(model, "__self__", model)
    missing_ok = isinstance(owner, ToleratesMissing) and bool(owner.tolerates_missing)
    dtype = _module_dtype(model)
    if data is None:
        return Arguments()
    if isinstance(data, tuple):
        args = tuple(_convert(v, f"data[{i}]", dtype, missing_ok)[0] for i, v in enumerate(data))
        return Arguments(args)
    if isinstance(data, Mapping):
        kwargs = {str(k): _convert(v, str(k), dtype, missing_ok)[0] for k, v in data.items()}
        return Arguments(kwargs=kwargs)
    value, names = _convert(data, "x", dtype, missing_ok)
    return Arguments((value,), names=names)


def _convert(
    value: Any,  # noqa: ANN401
    argument: str,
    dtype: torch.dtype | None,
    missing_ok: bool,
) -> tuple[Any, tuple[str, ...] | None]:
    """One argument, and the names of its columns if it has names."""
    names = None
    if isinstance(value, Table):
        value, names = value.x, value.names
        value = value if dtype is None else value.to(dtype)
    elif hasattr(value, "columns") and hasattr(value, "shape"):  # a pandas or polars frame
        table = load(value)
        value, names = table.x if dtype is None else table.x.to(dtype), table.names
    elif _is_sparse(value) or isinstance(value, np.ndarray) and value.dtype.kind in "OSUcM":
        value = as_rows(value, argument=argument, min_rows=1, allow_missing=missing_ok).x
    elif isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value))  # a copy: memory maps and views stay theirs
        if value.is_floating_point() and value.dtype not in (torch.float16, torch.bfloat16):
            value = value.to(dtype or torch.float64)
    elif isinstance(value, str | bytes):
        raise TypeError(
            f"{argument}: expected numbers, got the {type(value).__name__} {value[:40]!r}; "
            "read a file with latentlab.data.load(path)"
        )
    if isinstance(value, Tensor):
        value = _check_tensor(value.detach(), argument, missing_ok)
    return value, names


def _check_tensor(value: Tensor, argument: str, missing_ok: bool) -> Tensor:
    if value.is_sparse or value.layout != torch.strided or value.is_complex():
        as_rows(value, argument=argument)  # raises with the way out
    if value.dim() and value.numel() == 0:
        raise ValueError(f"{argument}: expected data, got the empty shape {tuple(value.shape)}")
    if value.dtype in (torch.float16, torch.bfloat16):
        import warnings

        warnings.warn(
            f"{argument}: {value.dtype} is too coarse to fit with; converted to float32",
            stacklevel=2,
        )
        value = value.float()
    if not value.is_floating_point():
        return value
    for what, found in (("inf", torch.isinf(value)), ("NaN", torch.isnan(value))):
        if found.any() and not (what == "NaN" and missing_ok):
            first = found.nonzero()[0].tolist()
            way = "use a model that integrates missing cells out, or Table.complete_rows()"
            raise ValueError(
                f"{argument} has {int(found.sum())} {what} (first at {first}); "
                + (way if what == "NaN" else "replace them by numbers")
            )
    return value


def _is_sparse(value: Any) -> bool:  # noqa: ANN401
    return type(value).__module__.startswith("scipy.sparse")


def _module_dtype(model: Callable) -> torch.dtype | None:
    for module in modules_of(model):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return None
