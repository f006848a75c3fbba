"""Stand-ins for data that a file does not hold: their shapes and types, without their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentlab.inference.pair import Arguments

__all__ = ["described", "placeholder"]


def described(value: Any) -> Any:  # noqa: ANN401
    """An argument as JSON values: of a tensor its shape and type, not its values.

    Arguments:
        value: what a pair is called with.

    Example:
        >>> described([torch.zeros(2, 3), 5])
        {'list': [{'shape': [2, 3], 'dtype': 'float32'}, {'value': 5}]}
    """
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [described(item) for item in value]}
    return {"value": value if isinstance(value, int | float | str | bool) else None}


def placeholder(facts: Mapping[str, Any]) -> Arguments:
    """Data of the stored shapes without their values.

    Arguments:
        facts: ``args`` and ``kwargs``, each :func:`described`, and the ``names`` of the columns.

    Example:
        >>> facts = {"args": [{"shape": [2], "dtype": "float64"}], "kwargs": {}, "names": None}
        >>> placeholder(facts).args
        (tensor([0., 0.], dtype=torch.float64),)
    """

    def make(description: Mapping[str, Any]) -> Any:  # noqa: ANN401
        if "shape" in description:
            return torch.zeros(description["shape"], dtype=getattr(torch, description["dtype"]))
        if "list" in description:
            return [make(item) for item in description["list"]]
        if "tuple" in description:
            return tuple(make(item) for item in description["tuple"])
        return description["value"]

    names = tuple(facts["names"]) if facts["names"] else None
    kwargs = {name: make(value) for name, value in facts["kwargs"].items()}
    return Arguments(tuple(map(make, facts["args"])), kwargs, names)
