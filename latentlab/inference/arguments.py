"""Data as people have it, turned into the arguments that a pair is called with."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentlab.data.checks import as_rows
from latentlab.data.convert import as_table
from latentlab.data.sequences import Sequences
from latentlab.data.table import Table
from latentlab.inference.pair import Arguments, modules_of
from latentlab.protocols import (
    ArrangesData,
    KnowsColumns,
    ScalesToData,
    ToleratesMissing,
    owner_of,
)

__all__ = ["as_arguments", "cast", "tell_columns", "with_names"]

_AS_THEY_LIE = ("f4", "f8", "i8", "i4", "u1", "b1")  # numbers in a file that torch computes with
_LOOK = 2**20  # numbers that are looked at at once
_SHARED = 2**25  # numbers of a tensor, above which there is no memory for a copy
_COARSE = (torch.float16, torch.bfloat16)


def as_arguments(
    data: Any,  # noqa: ANN401
    model: Callable,
    names: Sequence[str] | None = None,
) -> Arguments:
    """The arguments of ``model(*args, **kwargs)``.

    Tensors keep their dtype, arrays of whole numbers and of truth values stay so, all other
    numbers take the dtype of the model's parameters, or float64 where it has none. A list is an
    array if it holds numbers in rows of one length, else a list of such arrays. What is not data,
    such as a plain number in a tuple, is handed on as it is.

    Arguments:
        data: a tensor, array, list, frame or ``Table`` (one argument), a tuple (several), a dict
            (keywords), or ``None`` (no data).
        model: the model that is to be called.
        names: the columns that there must be, for a model that arranges its data itself.

    Returns:
        The arguments, copied, without a gradient, and the names of the columns where the first
        of them has some. Arrays and tensors that lie in a file (``numpy.memmap``,
        ``torch.from_file(..., shared=True)``) are read from there, as they are, and not copied;
        nor are tensors of more than 2^25 numbers. That such data were changed after a fit is
        found by their sha256.

    Raises:
        ValueError: for infinite values, NaN where the model does not know missing cells, no data.
        TypeError: for text, complex or sparse data.

    Example:
        >>> as_arguments(([1, 2], 0.5), print).args
        (tensor([1, 2]), 0.5)
        >>> as_arguments({"x": [1.0, float("nan")]}, print)
        Traceback (most recent call last):
        ValueError: x has 1 NaN (first at [1]); drop those rows with latentlab.data.load(x)...
    """
    if isinstance(data, Arguments):
        return data
    owner = owner_of(model)
    reader = _Reader(
        _dtype_of(model), isinstance(owner, ToleratesMissing) and bool(owner.tolerates_missing)
    )
    if data is None:
        return Arguments()
    if isinstance(owner, ArrangesData):
        given = data if isinstance(data, tuple) else () if isinstance(data, Mapping) else (data,)
        named = {str(k): v for k, v in data.items()} if isinstance(data, Mapping) else {}
        try:
            inspect.signature(owner.arrange).bind(*given, names=names, **named)
        except TypeError as error:
            raise TypeError(
                f"data: {type(owner).__name__} takes {_parameters_of(owner)}: {error}; several "
                "arguments are a tuple, or a dict with their names"
            ) from None
        args, kwargs, columns = owner.arrange(*given, names=names, **named)
        read = tuple(reader.read(v, f"data[{i}]") for i, v in enumerate(args))
        return Arguments(read, {k: reader.read(v, k) for k, v in kwargs.items()}, columns)
    if isinstance(data, tuple):
        args = tuple(reader.read(v, f"data[{i}]") for i, v in enumerate(data))
        return Arguments(args, names=_names_of(data))
    if isinstance(data, Mapping):
        kwargs = {str(k): reader.read(v, str(k)) for k, v in data.items()}
        return Arguments(kwargs=kwargs, names=_names_of([*data.values()]))
    data = as_table(data, argument="x") if _is_frame(data) else data
    value = reader.read(data, "x")
    if isinstance(owner, ScalesToData) and isinstance(value, list):
        value = _stacked(value)
    if isinstance(owner, ScalesToData) and isinstance(value, Tensor):
        # A model that measures its columns takes them for real numbers, whatever they came in.
        value = value if value.is_floating_point() else value.to(reader.dtype or torch.float64)
    return Arguments((value,), names=data.names if isinstance(data, Table) else None)


def _parameters_of(owner: ArrangesData) -> str:
    names = [name for name in inspect.signature(owner.arrange).parameters if name != "names"]
    return ", ".join(names)


def tell_columns(model: Callable, names: Sequence[str] | None) -> None:
    """Tell a model that wants to know what the columns of its data are called."""
    owner = owner_of(model)
    if isinstance(owner, KnowsColumns):
        owner.column_names = names


def with_names(arguments: Arguments) -> tuple[list, dict[str, Any]]:
    """The arguments, the first of them a table, or sequences, where its columns have names."""
    args, kwargs = [*arguments.args], dict(arguments.kwargs)
    if arguments.names and args and args[0].dim() == 2:
        args[0] = Table(args[0], arguments.names)
    elif arguments.names and len(args) == 2 and args[0].dim() == 3:
        args = [Sequences(args[0], args[1], arguments.names)]
    elif arguments.names and not args:
        first = next(iter(kwargs))
        kwargs[first] = Table(kwargs[first], arguments.names)
    return args, kwargs


def cast(value: Tensor, dtype: torch.dtype, argument: str = "x") -> Tensor:
    """Numbers in another type, which must be able to hold them."""
    found = value.to(dtype)
    if found.dtype != value.dtype and bool((found.isinf() & ~value.isinf()).any()):
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{argument}: expected numbers that {kind} can hold, got "
            f"{float(value.abs().max()):g}; choose a larger unit"
        )
    return found


@dataclass(frozen=True)
class _Reader:
    """Reads single arguments.

    Arguments:
        dtype: of the model's parameters, where it has some.
        missing_ok: whether NaN may stand for a missing cell.
    """

    dtype: torch.dtype | None
    missing_ok: bool

    def read(self, value: Any, argument: str) -> Any:  # noqa: ANN401
        """The value as a checked tensor, or list of them, where it holds data."""
        if isinstance(value, str | bytes):
            raise TypeError(
                f"{argument}: expected numbers, got the {type(value).__name__} {value[:40]!r}; "
                "read a file with latentlab.data.load(path)"
            )
        if isinstance(value, list):
            return self._list(value, argument)
        if isinstance(value, Tensor):
            return self._tensor(value, argument)
        if isinstance(value, Table) or _is_frame(value):
            table = as_table(value, argument=argument)
            return self._tensor(table.x, argument, table.names, self.dtype)
        if type(value).__module__.startswith("scipy.sparse"):
            as_rows(value, argument=argument)  # raises with the way out
        if _is_array(value):
            mapped = self._mapped(value)
            if mapped is not None:
                self._check_finite(mapped, argument, ())
                return mapped
            return self._array(np.ma.asarray(value), argument)
        if isinstance(value, Iterator) or type(value).__module__.startswith("torch.utils.data"):
            raise TypeError(
                f"{argument}: expected data that can be looked at again and again, got a "
                f"{type(value).__name__}; data larger than memory are written to a file once, as "
                "with numpy.lib.format.open_memmap, and given as "
                'numpy.load(path, mmap_mode="r"), with batch_size='
            )
        return value

    def _mapped(self, value: Any) -> Tensor | None:  # noqa: ANN401
        """An array that lies in a file, as it lies there, if the model can compute with it."""
        if not isinstance(value, np.memmap) or value.dtype.str[1:] not in _AS_THEY_LIE:
            return None
        with warnings.catch_warnings():  # that it is not to be written to, which nobody does
            warnings.simplefilter("ignore")
            try:
                found = torch.from_numpy(value)
            except (TypeError, ValueError):  # of another byte order, or read backwards
                return None
        fits = self.dtype is None or not found.is_floating_point() or found.dtype == self.dtype
        return found if fits and found.is_contiguous() and found.numel() else None

    def _list(self, values: list, argument: str) -> Tensor | list:
        """An array of rows of one length; else a list, as of sequences."""
        if not any(_is_array(v) or isinstance(v, Table) for v in values):
            try:
                return self._array(np.ma.asarray(values), argument)
            except ValueError as error:
                if "inhomogeneous" not in str(error):
                    raise
        return [self.read(v, f"{argument}[{i}]") for i, v in enumerate(values)]

    def _array(self, array: np.ma.MaskedArray, argument: str) -> Tensor:
        values = array.data
        if array.mask.any():
            values = np.where(array.mask, np.nan, values.astype(np.float64))
        if values.dtype.kind == "O":  # numbers, and None or NA for missing ones
            column = as_table(values.reshape(-1, 1), argument=argument)
            values = column.x.numpy().reshape(values.shape)
        elif values.dtype.kind not in "biuf":
            as_rows(values, argument=argument)  # raises with the way out
        tensor = torch.from_numpy(np.array(values, dtype=_torch_dtype(values.dtype), order="C"))
        return self._tensor(tensor, argument, dtype=self.dtype, is_own=True)

    def _tensor(
        self,
        value: Tensor,
        argument: str,
        names: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        is_own: bool = False,
    ) -> Tensor:
        """A copy without a gradient, after a look at it."""
        if value.layout != torch.strided or value.is_nested or value.is_complex():
            as_rows(value, argument=argument)  # raises with the way out
        if value.dim() and value.numel() == 0:
            shape = tuple(value.shape)
            raise ValueError(f"{argument}: expected data, got the empty shape {shape}; give rows")
        if value.dtype in _COARSE:
            dtype = self.dtype or torch.float64
            warnings.warn(
                f"{argument}: {value.dtype} is coarse; converted to {dtype}", stacklevel=2
            )
            value = value.to(dtype)
        self._check_finite(value, argument, names)
        if dtype is not None and value.is_floating_point():
            value = cast(value, dtype, argument)
        is_mapped = value.device.type == "cpu" and value.untyped_storage().filename is not None
        shared = is_own or is_mapped or value.numel() > _SHARED
        return value.detach() if shared else value.detach().clone()

    def _check_finite(self, value: Tensor, argument: str, names: Sequence[str]) -> None:
        if not value.is_floating_point() or _all_finite(value):
            return
        faults = [("inf", torch.isinf(value), "replace it by a number")]
        if not self.missing_ok:
            way = (
                "drop those rows with latentlab.data.load(x).complete_rows(), "
                "or take a model that integrates missing cells out"
            )
            faults.append(("NaN", torch.isnan(value), way))
        for what, found, way in faults:
            if found.any():
                first = found.nonzero()[0].tolist()
                column = f" in column {names[first[1]]!r}" if names else ""
                count = f"{argument} has {int(found.sum())} {what} (first at {first}){column}"
                raise ValueError(f"{count}; {way}")


def _all_finite(value: Tensor) -> bool:
    """Whether all numbers are, some rows after the other: a mask of all of them is large."""
    if value.dim() < 2:
        return all(bool(torch.isfinite(part).all()) for part in value.reshape(-1).split(_LOOK))
    rows = max(1, _LOOK // max(1, value[:1].numel()))
    return all(bool(torch.isfinite(part).all()) for part in value.split(rows))


def _stacked(rows: list) -> Tensor:
    """A list of arrays of one shape, as of images, for a model that takes rows."""
    shapes = {tuple(row.shape) for row in rows if isinstance(row, Tensor)}
    if len(shapes) == 1 and all(isinstance(row, Tensor) for row in rows):
        return torch.stack(rows)
    listed = ", ".join(map(str, sorted(shapes)))
    raise ValueError(
        f"x: expected rows of equal length, got a ragged list, {listed}; "
        "sequences of several lengths need a model of sequences"
    )


def _names_of(values: Sequence[Any]) -> tuple[str, ...] | None:
    """The names of the columns, where the first of several arguments is a table."""
    first = values[0] if values else None
    table = as_table(first) if _is_frame(first) else first
    return table.names if isinstance(table, Table) else None


def _torch_dtype(dtype: np.dtype) -> Any:  # noqa: ANN401
    """The nearest type of number that torch computes with."""
    if dtype.kind == "f":
        return np.float16 if dtype == np.float16 else np.float64
    return np.int64 if dtype.kind == "u" and dtype != np.uint8 else dtype.newbyteorder("=")


def _is_frame(value: object) -> bool:
    return hasattr(value, "columns") and hasattr(value, "shape")


def _is_array(value: object) -> bool:
    """An array of any library, or a series; a single number of NumPy is a number."""
    return hasattr(value, "__array__") and not isinstance(value, np.generic)


def _dtype_of(model: Callable) -> torch.dtype | None:
    """The widest type of its numbers: one that keeps the data's units in double wants them so."""
    for module in modules_of(model):
        numbers = (*module.parameters(), *module.buffers())
        found = [n.dtype for n in numbers if n.is_floating_point()]
        if any(p.is_floating_point() for p in module.parameters()):
            return max(found, key=lambda dtype: torch.finfo(dtype).bits)
    return None
