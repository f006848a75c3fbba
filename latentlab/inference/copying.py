"""A pair is copied with all it refers to; the originals stay as they are.

``copy.deepcopy`` leaves a function as it is, and with it the modules and the numbers that the
function refers to by name: a later fit of the same module, or another value of ``K`` in a
notebook, would change an earlier posterior. So a function is copied with its closure and, where it
stands in the file of the model or the guide, with the global names it uses. Tensors, frames and
other objects that hold no modules are shared with the originals.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from latentlab.inference.devices import move_attributes, move_module, moved
from latentlab.inference.sandbox import LOCK

__all__ = ["copy_pair", "modules_of"]

_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_CONTAINERS = (list, tuple, dict)


def copy_pair(
    model: Callable,
    guide: Callable,
    shared: Iterable[Tensor] = (),
    device: torch.device | None = None,
) -> tuple[Callable, Callable]:
    """Copies of both, sharing what the originals share; the originals stay as they are.

    Arguments:
        model: a function, a module, a bound method, another callable, or one of these in
            ``functools.partial`` or in a handler of Pyro, such as ``pyro.condition``.
        guide: likewise.
        shared: tensors that the copies hold as the originals do.
        device: where to put all tensors of the copies; ``None`` leaves them where they are.

    Returns:
        The copies.

    Example:
        >>> decoder = nn.Linear(1, 1)
        >>> def model():
        ...     return decoder
        >>> def guide():
        ...     return decoder
        >>> new_model, new_guide = copy_pair(model, guide)
        >>> new_model() is new_guide(), new_model() is decoder, model() is decoder
        (True, False, True)
    """
    with LOCK:
        copier = _Copier([*_roots(model), *_roots(guide)], device)
        copier.memo |= {id(tensor): tensor for tensor in shared}
        return copier(model), copier(guide)


def modules_of(function: Callable) -> Iterator[nn.Module]:
    """The modules that a callable is, belongs to, or refers to, each of them once.

    Arguments:
        function: as for :func:`copy_pair`.
    """
    return _modules(function, _scopes(_roots(function)), set())


def _roots(function: object, seen: tuple[int, ...] = ()) -> Iterator[object]:
    """The functions and objects that a pair consists of, out of their wrappers."""
    if id(function) in seen:
        return
    seen = (*seen, id(function))
    inner: Iterable[object] = ()
    if isinstance(function, types.MethodType):
        inner = (function.__self__,)
    elif isinstance(function, functools.partial):
        parts = (function.func, *function.args)
        inner = [part for part in parts if isinstance(part, (*_FUNCTIONS, nn.Module))]
    else:
        yield function
        if isinstance(function, AutoGuide) and function._model:
            inner = function._model
        elif not isinstance(function, types.FunctionType):
            attributes = _attributes(function).values()
            inner = [part for part in attributes if isinstance(part, _FUNCTIONS)]
    for part in inner:
        yield from _roots(part, seen)


def _scopes(roots: Iterable[object]) -> dict[int, dict[str, Any]]:
    """The global names of the files that a pair stands in."""
    scopes = [root.__globals__ for root in roots if isinstance(root, types.FunctionType)]
    return {id(scope): scope for scope in scopes if not _is_library(scope)}


def _is_library(scope: Mapping[str, Any]) -> bool:
    return str(scope.get("__name__", "")).split(".")[0] in ("pyro", "torch")


def _modules(
    value: object, scopes: Mapping[int, Mapping[str, Any]], seen: set[int]
) -> Iterator[nn.Module]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
        seen.update(map(id, value.modules()))
    for part in _parts(value, scopes):
        yield from _modules(part, scopes, seen)


def _parts(value: Any, scopes: Mapping[int, Mapping[str, Any]]) -> Iterable[object]:  # noqa: ANN401
    """What is copied with a value."""
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if _filled(c)]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*cells, *defaults, *_globals(value, scopes).values()]
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, _CONTAINERS):
        return value.values() if isinstance(value, dict) else value
    if isinstance(value, nn.Module):
        return [part for module in value.modules() for part in _attributes(module).values()]
    return _attributes(value).values()


def _attributes(value: object) -> dict[str, Any]:
    """Attributes that may hold modules; those of other objects are not followed."""
    if isinstance(value, type | types.ModuleType):
        return {}
    kinds = (*_FUNCTIONS, *_CONTAINERS, nn.Module)
    return {k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, kinds)}


def _graph_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Attributes that were computed with a gradient: ``deepcopy`` refuses them."""
    for value in vars(module).values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Tensor) and not item.is_leaf:
                yield item


def _globals(
    function: types.FunctionType, scopes: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    scope = scopes.get(id(function.__globals__), {})
    return {name: scope[name] for name in sorted(_names(function.__code__)) if name in scope}


def _names(code: types.CodeType) -> set[str]:
    """The names that a function and the functions in it look up outside."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


class _Copier:
    """Copies a value with its parts; the same value twice gives the same copy.

    Arguments:
        roots: functions and objects to copy in any case; others only if they hold modules.
        device: where to put their tensors.
    """

    def __init__(self, roots: Iterable[object], device: torch.device | None = None) -> None:
        self.roots, self.device = list(roots), device
        self.old_scopes = _scopes(self.roots)
        # Only the names that are used are held, so that others can be freed.
        self.new_scopes = {
            key: {name: value for name, value in scope.items() if name.startswith("__")}
            for key, scope in self.old_scopes.items()
        }
        self.memo: dict[int, Any] = {}  # that of deepcopy, too
        self.copied: list[object] = []  # alive, so that none has the id of another

    def __call__(self, value: Any) -> Any:  # noqa: ANN401
        if id(value) not in self.memo:
            self.copied.append(value)
            self.memo[id(value)] = self._copy(value)
        return self.memo[id(value)]

    def _copy(self, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self(value.__self__))
        if isinstance(value, functools.partial):
            return self._partial(value)
        if type(value) is dict:
            return {key: self(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self, value))
        is_root = any(value is root for root in self.roots)
        if is_root or next(_modules(value, self.old_scopes, set()), None) is not None:
            return self._object(value)
        return value if self.device is None else moved(value, self.device)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells, scope = function.__closure__ or (), function.__globals__
        own_scope = self.new_scopes.get(id(scope))
        if own_scope is None and not cells:
            return function
        new_cells = tuple(types.CellType() for _ in cells)
        new = types.FunctionType(
            function.__code__,
            scope if own_scope is None else own_scope,
            function.__name__,
            closure=new_cells or None,
        )
        self.memo[id(function)] = new  # before its parts, which may refer to it
        for new_cell, cell in zip(new_cells, cells, strict=True):
            if _filled(cell):
                new_cell.cell_contents = self(cell.cell_contents)
        for name, value in _globals(function, self.old_scopes).items():
            self.new_scopes[id(scope)][name] = self(value)
        new.__defaults__ = self(function.__defaults__)
        new.__kwdefaults__ = self(function.__kwdefaults__)
        new.__qualname__, new.__annotations__ = function.__qualname__, function.__annotations__
        vars(new).update(vars(function))
        return new

    def _partial(self, value: functools.partial) -> functools.partial:
        if type(value) is not functools.partial:  # Pyro's handlers: a partial in a partial
            return type(value)(self(value.func))
        keywords = {key: self(item) for key, item in value.keywords.items()}
        return functools.partial(self(value.func), *map(self, value.args), **keywords)

    def _object(self, value: Any) -> Any:  # noqa: ANN401
        tops = _modules(value, self.old_scopes, set())
        parts = {id(part): part for top in tops for part in top.modules()}
        # Copying an AutoGuide takes its model away, from the original too: give it back.
        guides = [part for part in parts.values() if isinstance(part, AutoGuide)]
        kept = [(guide, guide._model, guide.master) for guide in guides]
        # What it saw of its model is only read, and holds tensors that cannot be copied.
        self.memo |= {id(guide.prototype_trace): guide.prototype_trace for guide in guides}
        for part in parts.values():  # what flows keep of their last run
            self.memo |= {id(tensor): tensor.detach() for tensor in _graph_tensors(part)}
        try:
            new = copy.deepcopy(value, self.memo)
        finally:
            for guide, its_model, master in kept:
                guide._model, guide.master = its_model, master
        for part in [value, *parts.values()]:
            twin = self.memo.get(id(part), part)
            if twin is not part:  # deepcopy left the functions in it as they are
                for name, attribute in _attributes(part).items():
                    if isinstance(attribute, _FUNCTIONS) or name == "_model":
                        vars(twin)[name] = self(attribute)
                if self.device is not None:
                    move = move_module if isinstance(twin, nn.Module) else move_attributes
                    move(twin, self.device)
        return new
