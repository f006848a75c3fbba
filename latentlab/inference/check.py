"""A pair is looked at before its first step: every fault is named with its site.

The same look prepares the pair for a fit: its own copy, its sites, its number of batch dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor
from torch import Tensor, nn

from latentlab.data.table import Table
from latentlab.guides import FullRank, GaussianGuide, MeanField, Point
from latentlab.inference import faults as find
from latentlab.inference import objectives
from latentlab.inference.arguments import as_arguments
from latentlab.inference.copying import copy_pair
from latentlab.inference.faults import Fault
from latentlab.inference.pair import (
    Arguments,
    Pair,
    latent_of,
    latents_of,
    nesting_of,
    observed_of,
    plates_of,
)
from latentlab.protocols import OffersGuide, ScalesToData, owner_of

__all__ = ["Fault", "PairReport", "accepts_size", "check_pair", "prepare"]

_GUIDES: dict[str, type[GaussianGuide]] = {
    "point": Point,
    "mean_field": MeanField,
    "full_rank": FullRank,
}
_FULL_RANK_UP_TO = 200  # latent numbers, for a guide that the caller did not choose


@dataclass(frozen=True)
class PairReport:
    """What :func:`check_pair` found.

    Arguments:
        faults: what is wrong; a fatal one stops a fit before its first step.
        sites: the latents, with shape and support, as lines of text.
        notes: how the pair will be run.
    """

    faults: tuple[Fault, ...]
    sites: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether a fit may start."""
        return not any(fault.fatal for fault in self.faults)

    def __str__(self) -> str:
        head = "the pair can be fitted" if self.ok else "the pair cannot be fitted"
        lines = [("fault: " if f.fatal else "note: ") + str(f) for f in self.faults]
        return "\n".join([head, *lines, *(f"note: {n}" for n in self.notes), *self.sites])


def check_pair(model: Callable, data: Any = None, guide: Any = "auto") -> PairReport:  # noqa: ANN401
    """Look for faults of a model/guide pair without fitting it.

    Names, shapes, supports and plates of both are compared; latents that nothing depends on,
    sites without a density, and a model that observes nothing are found.

    Arguments:
        model: a callable with ``pyro.sample`` statements.
        data: what it is called with, as for :func:`latentlab.fit`.
        guide: a callable, a guide of ``latentlab.guides``, or a name such as ``"mean_field"``.

    Returns:
        A report; ``report.ok`` tells whether a fit may start, ``print(report)`` says why not.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("lok", dist.Normal(0.0, 1.0))
        >>> for fault in check_pair(model, torch.zeros(3), guide).faults:
        ...     print(fault)
        site 'loc': is in the model but not in the guide (the guide has 'lok'); add it to the guide
        site 'lok': is in the guide but not in the model; rename or remove it
    """
    return prepare(model, data, guide)[1]


def prepare(
    model: Callable,
    data: Any = None,  # noqa: ANN401
    guide: Any = "auto",  # noqa: ANN401
) -> tuple[Pair, PairReport]:
    """The fit's own copy of the pair, run, and what was found on the way.

    Arguments:
        model: as for :func:`check_pair`.
        data: as for :func:`check_pair`.
        guide: as for :func:`check_pair`.

    Returns:
        The pair, ready for :mod:`latentlab.inference.objectives` where the report is ok.
    """
    model, guide_function = copy_pair(model, _named_guide(guide))
    arguments = as_arguments(data, model)
    owner = owner_of(model)
    if isinstance(owner, ScalesToData):
        table = [Table(x, arguments.names) for x in arguments.args if arguments.names]
        owner.scale_to(*(table or arguments.args), **arguments.kwargs)  # names, for its warnings
    floating = [t.dtype for t in arguments.tensors() if t.is_floating_point()]
    dtype = floating[0] if floating else torch.get_default_dtype()
    pair = Pair(model, guide_function, arguments, dtype)
    faults = _look(pair, wants_guide=isinstance(guide, str) and guide == "auto")
    note = None
    if not any(fault.fatal for fault in faults):
        with pair.entered(seed=0):
            faults += find.unregistered(pair)
            faults += find.entangled(pair)
            if not any(fault.fatal for fault in faults):
                note = objectives.verify_vectorised(pair)
    return pair, PairReport(tuple(faults), _describe(pair), (note,) if note else ())


def _look(pair: Pair, wants_guide: bool) -> list[Fault]:
    """Run the model and the guide, learn their sites, find their faults."""
    faults = list(find.clashing_names(pair))
    with pair.entered(seed=0, validate=True):
        traces = [_run("model", pair.model, pair.data) for _ in range(2)]
        faults += find.unsteady(*traces)
        faults += find.model_faults(traces[0])
        faults += find.score(traces[0])
        if any(fault.fatal for fault in faults):
            return faults
        _learn_model(pair, traces[0])
        faults += find.unused(pair, traces[0])
        moving = list(find.moving_supports(pair, *traces))
        if wants_guide:
            pair.guide = _default_guide(pair)
        if isinstance(pair.guide, GaussianGuide):
            faults += [*find.own_guide_faults(pair, traces[0]), *moving]
            if not any(fault.fatal for fault in faults):
                _bind(pair, pair.guide)
            return faults
        guide_trace = _run("guide", pair.guide, pair.data)
        faults += find.score(guide_trace)
        _learn_guide(pair, traces[0], guide_trace)
        faults += find.cover_faults(pair, traces[0], guide_trace)
        faults += find.pair_faults(pair, traces[0], guide_trace, {f.site for f in moving})
        if isinstance(pair.guide, AutoGuide):
            faults += moving
    return faults


def _describe(pair: Pair) -> tuple[str, ...]:
    sites = [f"latent {z.name}: shape {z.shape}, support {z.support}" for z in pair.latents]
    sites += [f"latent {name}: discrete, summed out" for name in pair.summed_out]
    return (*sites, *(f"observed {name}" for name in pair.observed))


def _named_guide(guide: Any) -> Any:  # noqa: ANN401
    if isinstance(guide, str):
        if guide != "auto" and guide not in _GUIDES:
            known = ", ".join(f'"{name}"' for name in ("auto", *_GUIDES))
            raise ValueError(f"guide: expected one of {known}, or a callable, got {guide!r}")
        return _GUIDES.get(guide, Point)()
    if not callable(guide):
        raise TypeError(
            f"guide: expected a callable, a guide of latentlab.guides or a name, got {guide!r}"
        )
    return guide


def _default_guide(pair: Pair) -> GaussianGuide:
    owner = owner_of(pair.model)
    if isinstance(owner, OffersGuide):
        return owner.default_guide()
    numbers = sum(torch.Size(latent.free_shape).numel() for latent in pair.latents)
    return FullRank() if numbers <= _FULL_RANK_UP_TO else MeanField()


class _OwnParameters(Messenger):
    """Start parameters at copies of the tensors given for them, which stay the user's."""

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        name, *start = msg["args"]
        if start and isinstance(start[0], Tensor) and not isinstance(start[0], nn.Parameter):
            msg["args"] = (name, start[0].detach().clone())
        elif start and not isinstance(start[0], Tensor):
            msg["args"] = (name, lambda: start[0]().detach().clone())


def _run(role: str, function: Callable, data: Arguments) -> Trace:
    try:
        with _OwnParameters():
            return poutine.trace(function).get_trace(*data.args, **data.kwargs)
    except Exception as error:
        shapes = [tuple(t.shape) for t in data.tensors()]
        error.add_note(f"raised by the {role} before step 1, on tensors of shapes {shapes}")
        raise


def _learn_model(pair: Pair, trace: Trace) -> None:
    drawn = latents_of(trace)
    pair.latents = tuple(latent_of(n, s) for n, s in drawn.items() if not find.is_discrete(s))
    pair.summed_out = tuple(name for name, site in drawn.items() if find.is_discrete(site))
    pair.observed = tuple(n for n, s in observed_of(trace).items() if not site_is_factor(s))
    pair.nesting = nesting_of(trace)
    pair.plates |= _plates(trace)
    pair.shapes |= _shapes(trace)


def _learn_guide(pair: Pair, trace: Trace, guide_trace: Trace) -> None:
    drawn = latents_of(guide_trace)
    pair.summed_out = tuple(name for name in pair.summed_out if name not in drawn)
    pair.nesting = nesting_of(trace, guide_trace)
    pair.points = tuple(name for name, site in drawn.items() if isinstance(site["fn"], Delta))
    pair.noisy = len(pair.points) < len(drawn)
    pair.shapes = _shapes(guide_trace) | pair.shapes
    pair.plates = _plates(guide_trace) | pair.plates


def _shapes(trace: Trace) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(site["value"].shape)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and isinstance(site["value"], Tensor)
    }


def _plates(trace: Trace) -> dict[str, tuple[tuple[str, int, int], ...]]:
    return {n: plates_of(site) for n, site in trace.nodes.items() if site["type"] == "sample"}


def _bind(pair: Pair, guide: GaussianGuide) -> None:
    device = next((t.device for t in pair.data.tensors()), None)
    guide.bind(pair.latents, max_plate_nesting=pair.nesting, dtype=pair.dtype, device=device)
    pair.noisy = not isinstance(guide, Point)
    if not pair.noisy:
        pair.points = tuple(latent.name for latent in pair.latents)


def accepts_size(model: Callable) -> bool:
    """Whether the model takes ``size``, so that a mini-batch can stand for all rows."""
    function = model.forward if isinstance(model, nn.Module) else model
    return "size" in inspect.signature(function).parameters
