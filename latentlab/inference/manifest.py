"""All that the result of a fit depends on, by name, in words short enough to be compared by eye.

Data, numbers and long descriptions are told by the head of their sha256. A function of the user's
is told by what it does, not by where it stands: its bytecode, its constants, the names it uses and
what they stand for, functions and classes among them followed, those of libraries by their name.
What cannot be seen from there is not in it: attributes that C code keeps, files, the network.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import json
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentlab.guides import Guide
from latentlab.inference.checkpoint import fingerprint, numbers_of
from latentlab.inference.files import digest_of_all, update
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.settings import Settings
from latentlab.protocols import Rebuildable

__all__ = ["manifest", "source_of"]

_PACKAGES = ("latentlab", "torch", "pyro-ppl", "jax", "numpy", "scipy")
_SHORT = 12  # digits of a sha256 that are shown
_LOOK_UP = ("LOAD_GLOBAL", "LOAD_NAME")
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis))


def manifest(
    pair: Pair,
    held: Arguments | None,
    given: tuple[Any, Any],
    settings: Settings,
    held_out: float | None,
) -> dict[str, str]:
    """What a fit is of, by name: settings, data, pair, device, versions, threads.

    Arguments:
        pair: the pair, looked at, its parameters where they begin.
        held: rows kept aside.
        given: model and guide as they were given.
        settings: of the fit.
        held_out: share of the rows that was asked for.
    """
    model, guide = given
    data = [fingerprint(part) for part in (pair.data, held) if part is not None]
    own_guide = pair.guide.spec() if isinstance(pair.guide, Guide) else None
    return {
        **{f.name: repr(getattr(settings, f.name)) for f in fields(settings)},
        "held_out": repr(held_out),
        "data": _short(*data),
        "model": f"{_name(model)} {_short(source_of(model))}",
        "guide": f"{_name(guide)} {_short(source_of(guide), json.dumps(own_guide, default=str))}",
        "parameters": _short(digest_of_all("", numbers_of(pair))),
        "device": str(pair.device),
        "dtype": str(pair.dtype).removeprefix("torch."),
        **{package: _version(package) for package in _PACKAGES},
        "threads": str(torch.get_num_threads()),
    }


def source_of(value: object) -> str:
    """A sha256 of what a function or an object does, as far as it can be seen from Python.

    Arguments:
        value: a function, a module of torch, a bound method, any object.

    Example:
        >>> source_of([1, None]) == source_of([1, None]) != source_of([2, None])
        True
    """
    digest = hashlib.sha256()
    seen: dict[int, int] = {}
    kept: list[object] = []  # alive, so that none has the id of another
    stack = [value]
    while stack:
        part = stack.pop()
        if isinstance(part, _PLAIN):
            digest.update(f"{type(part).__name__} {part!r};".encode())
            continue
        if id(part) in seen:
            digest.update(f"as {seen[id(part)]};".encode())
            continue
        seen[id(part)] = len(seen)
        kept.append(part)
        digest.update(f"{type(part).__name__};".encode())
        if isinstance(part, Tensor):
            update(digest, part)
        else:
            stack += reversed([*_parts(part)])
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[object]:  # noqa: ANN401
    """What a value is made of, the values of libraries by their name."""
    if isinstance(value, types.FunctionType):
        if _is_library(value.__module__):
            yield _name(value)
        else:
            yield from (value.__code__, value.__defaults__, value.__kwdefaults__)
            yield [_inside(cell) for cell in value.__closure__ or ()]
            names = sorted(_looked_up(value.__code__) & value.__globals__.keys())
            yield {name: value.__globals__[name] for name in names}
    elif isinstance(value, types.CodeType):
        yield from (value.co_code, value.co_names, value.co_varnames, value.co_consts)
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, Mapping):
        yield from (item for pair in value.items() for item in pair)
        yield len(value)
    elif isinstance(value, list | tuple):
        yield from (*value, len(value))
    elif isinstance(value, set | frozenset):
        yield from sorted(map(source_of, value))
    elif isinstance(value, type):
        yield _name(value)
        if not _is_library(value.__module__):
            yield from (value.__bases__, _defined(value))
    else:
        yield from _parts_of_object(value)


def _parts_of_object(value: Any) -> Iterator[object]:  # noqa: ANN401
    yield type(value)
    if isinstance(value, types.ModuleType):
        yield value.__name__
    elif isinstance(value, Rebuildable) and not isinstance(value, Guide):
        yield json.dumps(value.spec(), default=str, sort_keys=True)
    elif isinstance(value, nn.Module):  # their numbers are in the parameters of the pair
        hidden = ("training", "prototype_trace")
        own = {k: v for k, v in vars(value).items() if k[0] != "_" and k not in hidden}
        yield from (own, value.extra_repr(), dict(value.named_children()))
    elif callable(getattr(type(value), "__array__", None)):  # arrays and frames
        array = np.asarray(value)
        yield from (str(array.dtype), array.shape)
        yield array.ravel().tolist() if array.dtype == object else array.tobytes()
    elif not isinstance(getattr(value, "__dict__", None), dict):
        text = repr(value)
        yield getattr(value, "__qualname__", None) if " at 0x" in text else text
    elif type(value).__module__.partition(".")[0] not in sys.stdlib_module_names:
        yield dict(vars(value))


def _defined(cls: type) -> dict[str, object]:
    """The methods and constants of a class."""
    found = {}
    for name, value in vars(cls).items():
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, property):
            value = (value.fget, value.fset)
        if isinstance(value, functools.cached_property):
            value = value.func
        if isinstance(value, types.FunctionType) or not name.startswith("__"):
            found[name] = value
    return found


def _looked_up(code: types.CodeType) -> set[str]:
    """The names that a function, and the functions in it, look up outside of them."""
    own = {i.argval for i in dis.get_instructions(code) if i.opname in _LOOK_UP}
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return own.union(*map(_looked_up, inner))


def _inside(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


@functools.cache
def _is_library(module: str | None) -> bool:
    """Whether a module is of Python or was installed: its version tells what it does."""
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names or top in ("latentlab", "pyro", "torch"):
        return True
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _name(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, str):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _short(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_SHORT]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
