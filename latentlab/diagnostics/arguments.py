"""What all diagnostics do with what they are handed: numbers, names and options, or a clear no."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["labels", "precision", "strings", "to_tensor", "unit_of", "whole"]

_MOST_POWER = 1000  # of two, so that a unit and its inverse are normal numbers
_DOUBLE = float(np.finfo(np.float64).eps)


def to_tensor(values: ArrayLike | Tensor, name: str = "values") -> Tensor:
    """Numbers as a tensor on the CPU, without a gradient: float32, float64 or int64.

    Half precision becomes float32, and true and false are 1 and 0.

    Arguments:
        values: a dense tensor on any device, an array or a list, also of objects that are numbers.
            What a masked array hides is NaN.
        name: of the argument, for errors.

    Raises:
        TypeError: for text, complex numbers, sparse tensors, and what is no array of numbers.
    """
    tensor = values.detach() if isinstance(values, Tensor) else _from_array(values, name)
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got a sparse one; take .to_dense()")
    if tensor.is_complex():
        raise TypeError(f"{name}: expected real numbers, got complex ones ({tensor.dtype})")
    if not tensor.is_floating_point():
        return tensor.cpu().long()
    return tensor.cpu().float() if tensor.dtype.itemsize < 4 else tensor.cpu()


def _from_array(values: ArrayLike, name: str) -> Tensor:
    wrong = f"{name}: expected numbers in an array, a tensor or a list, got "
    if isinstance(values, np.ma.MaskedArray):
        values = np.ma.filled(values.astype(float), np.nan)
    try:
        array = np.array(values)
        if array.dtype == object and array.ndim:
            if any(isinstance(v, str | bytes | complex) for v in array.flat):
                raise TypeError("text or complex numbers among them")
            array = array.astype(float)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise TypeError(f"{wrong}{type(values).__name__} ({reason})") from None
    if array.dtype.kind not in "biufc":
        if array.dtype.kind in "US":
            raise TypeError(f"{wrong}text: {str(array.ravel()[:1].tolist())[:40]}")
        sparse = "; take .toarray()" if hasattr(values, "toarray") else ""
        raise TypeError(f"{wrong}{type(values).__name__}{sparse}")
    if array.dtype.kind in "fc":  # no extended precision, and bytes in the machine's order
        wide = "complex128" if array.dtype.kind == "c" else "float64"
        array = array.astype(wide if array.dtype.itemsize > 8 else array.dtype.newbyteorder("="))
    else:
        array = array.astype(np.int64)
    return torch.from_numpy(array)


def precision(values: ArrayLike | Tensor) -> float:
    """The relative precision that numbers came with, before any conversion: a dtype's eps."""
    dtype = getattr(values, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return torch.finfo(dtype).eps
    if isinstance(dtype, np.dtype) and dtype.kind == "f":
        return max(float(np.finfo(dtype).eps), _DOUBLE)
    return _DOUBLE


def unit_of(*parts: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """A power of two near the largest absolute value, to divide by before anything is squared.

    What is divided by it rounds to the same digits, so that units do not matter to results, at
    either end of what a double can hold. One where all are zero, or any is not finite.

    Arguments:
        parts: tensors in double precision that share the unit.
        dim: the axes to take the largest over, one unit for each index of the others; by default
            all. Of several tensors they are the same axes.
    """
    sizes = [part.abs().amax(() if dim is None else dim) for part in parts]
    largest = torch.stack(torch.broadcast_tensors(*sizes)).amax(0)
    largest = torch.where(largest.isfinite() & (largest > 0), largest, 0.5)
    power = torch.frexp(largest).exponent.double().clamp(-_MOST_POWER, _MOST_POWER)
    return torch.exp2(power)


def whole(value: object, name: str, least: int, most: int | None = None) -> int:
    """An option that counts.

    Arguments:
        value: what was handed in.
        name: of the argument, for errors.
        least: the smallest that is allowed.
        most: the largest, if there is one.

    Raises:
        TypeError: for what is no whole number.
        ValueError: for one out of range.
    """
    expected = f"at least {least}" if most is None else f"{least} to {most}"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, {expected}, got {value!r}") from None
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def labels(names: Iterable[str] | None, num: int, default: str, each: str) -> tuple[str, ...]:
    """Names of columns, ``default[0]``, ... without any.

    Arguments:
        names: what was handed in.
        num: how many there must be.
        default: what a column is called where it has no name.
        each: what a column is, for errors.

    Raises:
        TypeError: for what is no sequence of strings, such as a single string.
        ValueError: for another number of them.
    """
    if names is None:
        return tuple(f"{default}[{i}]" for i in range(num))
    found = strings(names, "names")
    if len(found) != num:
        raise ValueError(f"names: expected {num}, one for each {each}, got {len(found)}")
    return found


def strings(values: object, name: str) -> tuple[str, ...]:
    """Several strings, not one.

    Arguments:
        values: what was handed in.
        name: of the argument, for errors.

    Raises:
        TypeError: for a single string, or what is no collection of strings.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected several strings, as in a list, got {values!r}")
    several = tuple(values)
    for value in several:
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected strings, got {value!r} among them")
    return several
