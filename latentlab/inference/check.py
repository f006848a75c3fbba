"""A pair is looked at before its first step: every fault is named with its site.

The same look prepares the pair for a fit: its own copy, its sites, its number of batch dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions import Delta
from torch import Tensor, nn

from latentlab.guides import FullRank, GaussianGuide, MeanField, Point
from latentlab.inference import objectives
from latentlab.inference.arguments import as_arguments
from latentlab.inference.pair import (
    Arguments,
    Pair,
    copy_pair,
    latent_from_site,
    latents_of,
    nesting_of,
    plates_of,
    prototype,
)
from latentlab.protocols import OffersGuide, ScalesToData

__all__ = ["Fault", "PairReport", "check_pair", "prepare"]

_GUIDES = {"point": Point, "mean_field": MeanField, "full_rank": FullRank}


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a pair: the site it is about, and what to do."""

    site: str
    message: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"site {self.site!r}: {self.message}" if self.site else self.message


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
    """The fit's own copy of the pair, run once, and what was found on the way."""
    guide_function = _named_guide(guide)
    model, guide_function = copy_pair(model, guide_function)
    arguments = as_arguments(data, model)
    owner = getattr(model, "__self__", model)
    if isinstance(owner, ScalesToData):
        arguments.call(owner.scale_to)
    floating = [t.dtype for t in arguments.tensors() if t.is_floating_point()]
    dtype = floating[0] if floating else torch.get_default_dtype()
    pair = Pair(model, guide_function, arguments, dtype)
    notes = []
    with pair.entered(seed=0, validate=True):
        trace = _run("model", model, arguments)
        _learn_model(pair, trace)
        faults = list(_model_faults(pair, trace))
        if isinstance(guide, str) and guide == "auto":
            pair.guide = _default_guide(owner, pair)
        if isinstance(pair.guide, GaussianGuide):
            _bind(pair, arguments)
            faults += _own_guide_faults(pair, trace)
            if any(fault.fatal for fault in faults):
                return pair, _report(pair, faults, notes)
        else:
            guide_trace = _run("guide", pair.guide, arguments)
            _learn_guide(pair, trace, guide_trace)
            faults += _guide_faults(pair, trace, guide_trace)
        if not any(fault.fatal for fault in faults):
            note = objectives.verify_vectorised(pair)
            notes += [note] if note else []
    with pair.entered(seed=0):  # the store now holds every parameter of the pair
        return pair, _report(pair, faults, notes)


def _report(pair: Pair, faults: list[Fault], notes: list[str]) -> PairReport:
    sites = [f"latent {z.name}: shape {z.shape}, support {z.support}" for z in pair.latents]
    sites += [f"latent {name}: discrete, summed out" for name in pair.summed_out]
    sites += [f"observed {name}" for name in pair.observed]
    return PairReport(tuple(faults), tuple(sites), tuple(notes))


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


def _default_guide(owner: Any, pair: Pair) -> GaussianGuide:  # noqa: ANN401
    if isinstance(owner, OffersGuide):
        return owner.default_guide()
    numbers = sum(torch.Size(latent.free_shape).numel() for latent in pair.latents)
    return FullRank() if numbers <= 200 else MeanField()


def _run(role: str, function: Callable, data: Arguments) -> poutine.Trace:
    try:
        return prototype(function, data)
    except Exception as error:
        shapes = [tuple(t.shape) for t in data.tensors()]
        error.add_note(f"raised by the {role} before step 1, on tensors of shapes {shapes}")
        raise


def _learn_model(pair: Pair, trace: poutine.Trace) -> None:
    continuous, discrete = [], []
    for name, site in latents_of(trace):
        if site["fn"].support.is_discrete:
            discrete.append(name)
        else:
            continuous.append(latent_from_site(name, site))
    pair.latents, pair.summed_out = tuple(continuous), tuple(discrete)
    pair.observed = tuple(
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site["infer"].get("_deterministic")
    )
    pair.plates |= _plates_of_sites(trace)
    pair.nesting = nesting_of(trace)
    pair.shapes |= _shapes(trace)


def _shapes(trace: poutine.Trace) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(site["value"].shape)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and isinstance(site["value"], Tensor)
    }


def _plates_of_sites(trace: poutine.Trace) -> dict[str, tuple[tuple[str, int, int], ...]]:
    return {n: plates_of(site) for n, site in trace.nodes.items() if site["type"] == "sample"}


def _learn_guide(pair: Pair, trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    drawn = dict(latents_of(guide_trace))
    pair.summed_out = tuple(name for name in pair.summed_out if name not in drawn)
    pair.nesting = nesting_of(trace, guide_trace)
    pair.points = tuple(name for name, site in drawn.items() if isinstance(site["fn"], Delta))
    pair.noisy = len(pair.points) < len(drawn)
    pair.shapes = _shapes(guide_trace) | pair.shapes
    pair.plates = _plates_of_sites(guide_trace) | pair.plates


def _bind(pair: Pair, data: Arguments) -> None:
    assert isinstance(pair.guide, GaussianGuide)
    device = next((t.device for t in data.tensors()), None)
    pair.guide.bind(pair.latents, max_plate_nesting=pair.nesting, dtype=pair.dtype, device=device)
    pair.noisy = not isinstance(pair.guide, Point)
    if not pair.noisy:
        pair.points = tuple(latent.name for latent in pair.latents)


def _model_faults(pair: Pair, trace: poutine.Trace) -> Iterator[Fault]:
    if not pair.observed:
        yield Fault(
            "", "the model observes nothing: its posterior is its prior; add obs= to a site", False
        )
    for name in pair.summed_out:
        if not trace.nodes[name]["fn"].has_enumerate_support:
            yield Fault(name, "is discrete with no finite support, so it cannot be summed out")
    for name, site in trace.nodes.items():
        log_prob = site.get("log_prob")
        if site["type"] == "sample" and isinstance(log_prob, Tensor) and log_prob.isnan().any():
            yield Fault(name, "its log-density is NaN at a draw from the prior; look at its scale")
    yield from _unused(pair, trace)


def _unused(pair: Pair, trace: poutine.Trace) -> Iterator[Fault]:
    """Latents that no observed site and no other latent depends on."""
    leaves = {
        latent.name: trace.nodes[latent.name]["value"].detach().clone().requires_grad_()
        for latent in pair.latents
    }
    with torch.enable_grad(), objectives.Record(leaves) as record:
        pair.data.call(pair.model)
    for name, leaf in leaves.items():
        others = [v.sum() for k, v in record.log_prob.items() if k != name and v.requires_grad]
        used = others and torch.autograd.grad(
            sum(others), leaf, retain_graph=True, allow_unused=True
        )[0] is not None
        if not used:
            yield Fault(name, "nothing depends on it: its posterior is its prior", fatal=False)


def _own_guide_faults(pair: Pair, trace: poutine.Trace) -> Iterator[Fault]:
    if not pair.latents:
        yield Fault("", "the model has no continuous latent for this guide to cover")
    for latent in pair.latents:
        if _subsampled(trace.nodes[latent.name]):
            yield Fault(
                latent.name,
                "is local to a plate that the model subsamples, which this guide cannot follow; "
                "write a guide that computes it from the mini-batch, or fit the whole data",
            )


def _subsampled(site: Any) -> bool:  # noqa: ANN401
    frames = [frame for frame in site["cond_indep_stack"] if frame.full_size is not None]
    return any(frame.full_size != frame.size for frame in frames)


def _guide_faults(
    pair: Pair, trace: poutine.Trace, guide_trace: poutine.Trace
) -> Iterator[Fault]:
    model_sites, guide_sites = dict(latents_of(trace)), dict(latents_of(guide_trace))
    own = {n for n, s in guide_sites.items() if not s["infer"].get("is_auxiliary")}
    extra = sorted(own - set(model_sites))
    for name in model_sites:
        if name not in guide_sites and name not in pair.summed_out:
            has = f" (the guide has {', '.join(map(repr, extra))})" if extra else ""
            yield Fault(name, f"is in the model but not in the guide{has}; add it to the guide")
    for name in extra:
        if name in trace.nodes:
            yield Fault(name, "is in the guide but observed in the model; remove it from the guide")
        else:
            yield Fault(name, "is in the guide but not in the model; rename or remove it")
    for name in sorted(own & set(model_sites), key=list(model_sites).index):
        yield from _site_faults(name, model_sites[name], guide_sites[name])


def _site_faults(name: str, model_site: Any, guide_site: Any) -> Iterator[Fault]:  # noqa: ANN401
    expected, given = tuple(model_site["value"].shape), tuple(guide_site["value"].shape)
    if expected != given:
        yield Fault(name, f"has shape {expected} in the model but {given} in the guide")
        return
    fn = guide_site["fn"]
    if not fn.has_rsample and not isinstance(fn, Delta):
        yield Fault(
            name,
            f"the guide draws it from {type(fn).__name__}, which has no reparameterised gradient; "
            "leave a discrete latent out of the guide to have it summed out",
        )
    support = model_site["fn"].support
    with torch.no_grad():
        values = [guide_site["value"]]
        if not isinstance(fn, Delta):
            values += [fn.sample() for _ in range(100)]
        outside = [v for v in values if not bool(support.check(v).all())]
    if outside:
        yield Fault(
            name,
            f"the guide's support {_name(fn.support)} leaves the prior's support {_name(support)}; "
            "transform the guide's distribution, or use one on that support",
        )
    missing = _plates(model_site) - _plates(guide_site)
    if missing and not isinstance(fn, Delta):
        names = ", ".join(sorted(missing))
        yield Fault(
            name, f"is in plate {names} in the model but not in the guide; put it there", fatal=False
        )


def _plates(site: Any) -> set[str]:  # noqa: ANN401
    return {frame.name for frame in site["cond_indep_stack"]}


def _name(support: Any) -> str:  # noqa: ANN401
    return str(support).removesuffix("()")


def accepts_size(model: Callable) -> bool:
    """Whether the model takes ``size``, so that a mini-batch can stand for all rows."""
    function = model.forward if isinstance(model, nn.Module) else model
    return "size" in inspect.signature(function).parameters
