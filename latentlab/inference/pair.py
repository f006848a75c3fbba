"""A pair of its own: the model and guide copied together, run once, and known by its sites.

Letters: P particles; *nesting* is the number of batch dimensions (plates) of the model, so that
particles live at batch dimension ``-1 - nesting``.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from latentlab.guides import GaussianGuide, Latent
from latentlab.inference.sandbox import sandbox

__all__ = ["Arguments", "Pair", "copy_pair", "latents_of", "modules_of", "prototype"]


@dataclass(frozen=True)
class Arguments:
    """Data as the pair is called with it: ``model(*args, **kwargs)``."""

    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None

    def call(self, function: Callable) -> Any:  # noqa: ANN401
        """Call a model or guide with the data."""
        return function(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """The tensors among the data, in order."""
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """The same data with every tensor replaced."""

        def change(value: Any) -> Any:  # noqa: ANN401
            return function(value) if isinstance(value, Tensor) else value

        kwargs = {key: change(value) for key, value in self.kwargs.items()}
        return replace(self, args=tuple(map(change, self.args)), kwargs=kwargs)


@dataclass
class Pair:
    """A model, its guide and how they are called; the fit's own copy.

    Arguments:
        model: the model.
        guide: the guide, a callable or one of ``latentlab.guides``.
        data: what both are called with.
        dtype: torch's default dtype while they run.
        store: state of Pyro's parameter store.
        latents: the continuous sites a guide covers.
        summed_out: discrete sites that are enumerated and summed out.
        observed: observed sites.
        shapes: shape of one value of every site of the model and the guide.
        plates: name, size and dimension of the plates of every such site.
        points: sites of the guide that are point masses, functions of its other sites.
        noisy: whether the guide has a site that is not a point mass.
        nesting: number of batch dimensions of the model.
        vectorised: whether many particles may go through the model at once.
    """

    model: Callable
    guide: Callable
    data: Arguments
    dtype: torch.dtype
    store: dict[str, Any] = field(default_factory=lambda: {"params": {}, "constraints": {}})
    latents: tuple[Latent, ...] = ()
    summed_out: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    plates: dict[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict)
    points: tuple[str, ...] = ()
    noisy: bool = False
    nesting: int = 0
    vectorised: bool = False

    @contextmanager
    def entered(self, seed: int, validate: bool = False) -> Iterator[None]:
        """Run with this pair's parameters, dtype and a seed; leave no trace."""
        with sandbox(self.store, seed=seed, dtype=self.dtype, validate=validate):
            yield

    def is_point(self) -> bool:
        """Whether the guide has no noise: all its sites are point masses."""
        drawn = {z.name for z in self.latents} & set(self.points)
        return len(drawn) == len(self.latents) > 0 and not self.noisy

    def local_plate(self) -> str | None:
        """The plate that latents share with observed sites: each of its elements is a datum."""
        observed = {plate[0] for name in self.observed for plate in self.plates[name]}
        for latent in self.latents:
            for name, _, _ in latent.plates:
                if name in observed:
                    return name
        return None

    def is_local(self, site: str) -> bool:
        """Whether a site stands in the local plate."""
        return self.local_plate() in {plate[0] for plate in self.plates.get(site, ())}

    def parameters(self) -> dict[str, Tensor]:
        """Unconstrained leaf tensors to optimise, by name.

        Those of the parameter store (``pyro.param``, ``PyroModule``, ``pyro.module``), and those of
        a guide of ours, which does without the store.
        """
        found = dict(self.store["params"])
        if isinstance(self.guide, GaussianGuide):
            found |= {f"guide.{name}": value for name, value in self.guide.named_parameters()}
        return found


def prototype(function: Callable, data: Arguments) -> poutine.Trace:
    """One run of a model or guide, log-densities computed; call it inside :func:`sandbox`."""
    trace = poutine.trace(function).get_trace(*data.args, **data.kwargs)
    try:
        trace.compute_log_prob()
    except NotImplementedError:  # a guide's distribution without a density is found by the check
        pass
    return trace


def latents_of(trace: poutine.Trace) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The sites of a trace that are drawn: neither observed nor the indices of a mini-batch."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site):
            yield name, site


def latent_from_site(name: str, site: Mapping[str, Any]) -> Latent:
    """What a guide has to know of a site."""
    event_dim = site["fn"].event_dim
    shape = tuple(site["value"].shape)
    split = len(shape) - event_dim
    return Latent(name, shape[:split], shape[split:], site["fn"].support, plates_of(site))


def plates_of(site: Mapping[str, Any]) -> tuple[tuple[str, int, int], ...]:
    """Name, size and dimension of the plates a site stands in."""
    return tuple((f.name, f.size, f.dim) for f in site["cond_indep_stack"] if f.vectorized)


def nesting_of(*traces: poutine.Trace) -> int:
    """The number of batch dimensions that plates and log-densities use."""
    dims = [0]
    for trace in traces:
        for site in trace.nodes.values():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            dims += [-f.dim for f in site["cond_indep_stack"] if f.vectorized]
            if not isinstance(site["fn"], Delta):
                dims.append(len(site["fn"].batch_shape))
    return max(dims)


def modules_of(function: Callable) -> Iterator[nn.Module]:
    """The modules a callable is, belongs to, or refers to by name."""
    owner = getattr(function, "__self__", function)
    if isinstance(owner, nn.Module):
        yield owner
    elif inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        for value in (*variables.nonlocals.values(), *variables.globals.values()):
            if isinstance(value, nn.Module):
                yield value


def copy_pair(model: Callable, guide: Callable) -> tuple[Callable, Callable]:
    """Copies of both, sharing what the originals share; the originals stay as they are.

    Modules that a plain function refers to are copied with it, so that a later fit of the same
    module does not change an earlier posterior.

    Arguments:
        model: a function, a module, or a bound method.
        guide: likewise.

    Returns:
        The copies.
    """
    memo: dict[int, Any] = {}
    autoguides = [m for f in (model, guide) for top in modules_of(f) for m in top.modules()]
    autoguides = [m for m in autoguides if isinstance(m, AutoGuide)]
    # Copying an AutoGuide takes its model away, from the original too: give it back to both.
    kept = [(m, m._model, m.master) for m in autoguides]
    try:
        copies = _copy(model, memo), _copy(guide, memo)
    finally:
        for original, its_model, master in kept:
            original._model, original.master = its_model, master
    for original, its_model, master in kept:
        if id(original) in memo:
            memo[id(original)]._model = its_model and (_copy(its_model[0], memo),)
            if master is not None and id(master()) in memo:
                memo[id(original)]._update_master(_weak(memo[id(master())]))
    return copies


def _weak(module: nn.Module) -> Callable:
    import weakref

    return weakref.ref(module)


def _copy(function: Any, memo: dict[int, Any]) -> Any:  # noqa: ANN401
    """``deepcopy`` that also copies the modules a plain function refers to."""
    if id(function) in memo:
        return memo[id(function)]
    if not inspect.isfunction(function):
        return copy.deepcopy(function, memo)
    swaps: dict[int, Any] = {}
    cells = function.__closure__ or ()
    names = inspect.getclosurevars(function).globals
    memo[id(function)] = function  # a function that refers to itself
    for value in [*(c.cell_contents for c in cells if _filled(c)), *names.values()]:
        if isinstance(value, nn.Module) or inspect.isfunction(value) or _of_module(value):
            new = _copy(value, memo)
            if new is not value:
                swaps[id(value)] = new
    if not swaps:
        return function
    closure = tuple(
        types.CellType(swaps.get(id(c.cell_contents), c.cell_contents)) if _filled(c) else c
        for c in cells
    )
    scope = function.__globals__
    if any(id(value) in swaps for value in names.values()):
        scope = scope | {k: swaps[id(v)] for k, v in names.items() if id(v) in swaps}
    new = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, closure or None
    )
    new.__kwdefaults__, new.__dict__ = function.__kwdefaults__, dict(function.__dict__)
    memo[id(function)] = new
    return new


def _of_module(value: Any) -> bool:  # noqa: ANN401
    return inspect.ismethod(value) and isinstance(value.__self__, nn.Module)


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
