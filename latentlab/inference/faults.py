"""What can be wrong with a pair, each fault named with its site.

Each function here looks at traces of the model and the guide for one kind of fault; they run
inside the pair's sandbox, where torch and Pyro check arguments.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoCallable, AutoDelta, AutoGuide, AutoGuideList, AutoNormal
from pyro.nn import PyroModule
from pyro.poutine import Trace
from pyro.poutine.util import site_is_factor
from torch import Tensor

from latentlab.inference import objectives
from latentlab.inference.pair import Pair, latents_of, modules_of, observed_of, plates_of
from latentlab.inference.values import all_inside, goes_beyond, is_discrete, is_same, name_of
from latentlab.protocols import Anneals, owner_of
from latentlab.supports import bijection

__all__ = [
    "Fault",
    "clashing_names",
    "cover_faults",
    "entangled",
    "half_observed",
    "model_faults",
    "moving_supports",
    "own_guide_faults",
    "pair_faults",
    "repeated",
    "score",
    "unregistered",
    "unsummable",
    "unsteady",
    "unused",
]


_LOOKS = 50  # draws of a site, to learn its values
_MOST_DIMS = 60  # torch has 64, some of which others need


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a pair: the site it is about, and what to do.

    Arguments:
        site: the site, or nothing where the fault is of the pair as a whole.
        message: what is wrong, and the way out.
        fatal: whether it stops a fit before its first step.
    """

    site: str
    message: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"site {self.site!r}: {self.message}" if self.site else self.message


# ---- log-densities ----------------------------------------------------------------------------


def score(trace: Trace) -> list[Fault]:
    """Compute the log-density of every site, in place, and say where that cannot be done."""
    faults = []
    for name, site in (latents_of(trace) | observed_of(trace)).items():
        site["log_prob"] = torch.zeros(())
        try:
            # A draw may leave its support by rounding, data may not.
            with pyro.validation_enabled(site["is_observed"]):
                log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        except Exception as error:
            faults.append(Fault(name, _outside(site) or _unscored(error)))
            continue
        scaled = scale_and_mask(log_prob, site["scale"], site["mask"])
        site["log_prob"] = torch.as_tensor(scaled)
        if site["log_prob"].isnan().any():
            way = "look at its scale, and at that of its parents"
            faults.append(Fault(name, f"its log-density is NaN at a draw from the prior; {way}"))
    return faults


def _unscored(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"its log-density cannot be computed ({type(error).__name__}: {first_line})"


def _outside(site: Mapping[str, Any]) -> str | None:
    """Where an observed value is outside of the support, if it is."""
    if not site["is_observed"]:
        return None
    if not isinstance(site["value"], Tensor):
        return f"is observed as a {type(site['value']).__name__}; hand the model arrays or tensors"
    try:
        inside = site["fn"].support.check(site["value"])
    except (NotImplementedError, RuntimeError):
        return None
    if inside.all():
        return None
    index = (~inside).nonzero()[0].tolist()
    event = site["value"].shape[site["value"].dim() - site["fn"].event_dim :]
    value = site["value"].expand(*inside.shape, *event)[tuple(index)].tolist()
    return (
        f"the value {value} observed at {index} is outside of the support "
        f"{name_of(site['fn'].support)}; correct the data, or take another distribution"
    )


# ---- the model --------------------------------------------------------------------------------


def model_faults(trace: Trace) -> Iterator[Fault]:
    """A model without data, and latents that cannot be summed out."""
    if not observed_of(trace):
        yield Fault(
            "", "the model observes nothing: its posterior is its prior; add obs= to a site", False
        )
    for name, site in latents_of(trace).items():
        if isinstance(site["fn"], Delta):
            yield Fault(name, "is a Delta, which has one value only; use pyro.deterministic")


def unsummable(pair: Pair, trace: Trace) -> Iterator[Fault]:
    """Discrete latents that are to be summed out, and cannot be."""
    for name in pair.summed_out:
        fn: Any = trace.nodes[name]["fn"]
        if not fn.has_enumerate_support:
            yield Fault(
                name,
                f"is discrete ({type(fn).__name__}) with no finite support, so it cannot be "
                "summed out; use a distribution with a finite support, or a continuous one, or "
                "write a guide that draws it",
            )


def repeated(trace: Trace) -> Iterator[Fault]:
    """Observed values that are counted more often than they were given."""
    for name, site in observed_of(trace).items():
        if site_is_factor(site) or not isinstance(site["value"], Tensor):
            continue
        fn, shape = site["fn"], tuple(torch.as_tensor(site["value"]).shape)
        given, expected = shape[: len(shape) - fn.event_dim], tuple(fn.shape())
        together = tuple(torch.broadcast_shapes(given, fn.batch_shape))
        if math.prod(together) > max(math.prod(given), math.prod(fn.batch_shape)):
            yield Fault(
                name,
                f"the value has shape {shape} and its distribution {expected}: every number "
                f"would be compared with every other, {together}; give obs the shape {expected}",
            )
            continue
        for plate, size, dim in plates_of(site):
            if size == 1 or len(given) >= -dim and given[dim] == size:
                continue
            single = math.prod(shape) == 1  # as of a zero that stands for all elements
            yield Fault(
                name,
                f"the value has shape {shape} and is counted {size} times, once for each element "
                f"of plate {plate!r}; give obs the shape {expected}",
                fatal=not single,
            )
            break


def half_observed(trace: Trace) -> Iterator[Fault]:
    """Latents that ``obs_mask=`` makes of missing cells: the model masks them, no guide does."""
    observed = observed_of(trace)
    for name in latents_of(trace):
        site = name.removesuffix("_unobserved")
        if site != name and f"{site}_observed" in observed:
            yield Fault(
                site,
                "its obs_mask= makes a latent whose density the model masks and this guide does "
                f"not, so that the ELBO has no bound; leave missing cells out with "
                f"pyro.sample({site!r}, fn.mask(mask), obs=x.nan_to_num())",
            )


def entangled(pair: Pair) -> Iterator[Fault]:
    """Labels that cannot be summed out exactly as the model has them."""
    if len(pair.summed_out) + pair.nesting > _MOST_DIMS:
        yield Fault(
            "",
            f"the model has {len(pair.summed_out)} discrete sites, each of which takes a "
            f"dimension of a tensor, and there are {_MOST_DIMS}; put them into a plate, or take "
            "a distribution that sums them out, such as pyro's DiscreteHMM",
        )
    elif pair.summed_out:
        try:
            with torch.no_grad():
                objectives.log_weights(pair, 1)
        except ValueError as error:
            yield Fault("", str(error))


def unsteady(trace: Trace, other: Trace) -> Iterator[Fault]:
    """Latents that are not the same in every run of the model."""
    first, second = latents_of(trace), latents_of(other)
    for name in sorted(set(first) ^ set(second)):
        yield Fault(
            name,
            "is drawn in some runs of the model and not in others, so no guide covers it; "
            "draw it in every run, and use it where it is needed",
        )
    for name in first:
        if name in second and first[name]["value"].shape != second[name]["value"].shape:
            shapes = tuple(first[name]["value"].shape), tuple(second[name]["value"].shape)
            yield Fault(
                name,
                f"has shape {shapes[0]} in one run of the model and {shapes[1]} in another; "
                "give it the largest shape in every run",
            )


def unrepeatable(trace: Trace, replayed: Trace) -> Iterator[Fault]:
    """Sites whose density is another with the same latents; both traces scored."""
    for name, site in replayed.nodes.items():
        before, now = trace.nodes.get(name, {}).get("log_prob"), site.get("log_prob")
        if before is None or now is None or before.shape != now.shape:
            continue
        if not torch.allclose(before, now, rtol=1e-4, atol=1e-6, equal_nan=True):
            yield Fault(
                name,
                "with the same latents its log-density is another in each run: the model draws "
                "numbers beside pyro.sample, of which the posterior knows nothing; make them "
                "latents, or draw them once before the fit",
                fatal=False,
            )
            return  # what depends on it differs too


def moving_supports(pair: Pair, trace: Trace, other: Trace) -> Iterator[Fault]:
    """Supports that depend on other latents, which a guide made from one run cannot follow."""
    first, second = latents_of(trace), latents_of(other)
    for latent in pair.latents:
        support = second[latent.name]["fn"].support
        if not is_same(first[latent.name]["fn"].support, support):
            yield Fault(
                latent.name,
                f"its support {name_of(support)} depends on other latents, which this guide "
                "cannot follow; draw a share of the range, as from Uniform(0, 1), and scale it",
            )


def unused(pair: Pair, trace: Trace) -> Iterator[Fault]:
    """Latents that no observed site and no other latent depends on, if there are data at all."""
    if not observed_of(trace):
        return
    leaves = {
        name: site["value"].detach().clone().requires_grad_()
        for name, site in latents_of(trace).items()
        if not is_discrete(site)
    }
    # Copies: a model may write into what it drew, where torch allows it for no leaf.
    copies = {name: leaf.clone() for name, leaf in leaves.items()}
    with torch.enable_grad(), objectives.Record(copies) as record:
        pair.data.call(pair.model)
    for name, leaf in leaves.items():
        if not _depends({k: v for k, v in record.log_prob.items() if k != name}, [leaf])[0]:
            yield Fault(name, "nothing depends on it: its posterior is its prior", fatal=False)


def _depends(log_prob: Mapping[str, Tensor], leaves: list[Tensor]) -> list[bool]:
    """Whether log-densities depend on each of some leaves."""
    parts = [value.sum() for value in log_prob.values() if value.requires_grad]
    if not parts:
        return [False] * len(leaves)
    total = torch.stack(parts).sum()
    gradients = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    return [gradient is not None for gradient in gradients]


# ---- the parameters ---------------------------------------------------------------------------


def clashing_names(pair: Pair) -> Iterator[Fault]:
    """Parameters of two modules that Pyro would make one, because they have one name."""
    modules = [
        [m for m in modules_of(function) if isinstance(m, PyroModule)]
        for function in (pair.model, pair.guide)
    ]
    for of_model in modules[0]:
        for of_guide in modules[1]:
            if of_model is of_guide or of_model._pyro_name != of_guide._pyro_name:
                continue
            ours, theirs = (dict(m.named_parameters()) for m in (of_model, of_guide))
            both = [n for n in ours if n in theirs and ours[n] is not theirs[n]]
            if both:
                yield Fault(
                    "",
                    f"parameter {both[0]!r} is in the model and in the guide, and Pyro takes the "
                    "two for one; give a module a name: super().__init__(name=...)",
                )


def unregistered(pair: Pair) -> Iterator[Fault]:
    """Parameters of modules that the pair uses and Pyro does not know of."""
    known = set(map(id, pair.parameters().values()))
    for function in (pair.model, pair.guide):
        found = {
            f"{type(module).__name__}.{name}": parameter
            for module in modules_of(function)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and id(parameter) not in known
        }
        if not found:
            continue
        with torch.enable_grad(), objectives.Record({}) as record:
            pair.data.call(function)
        used = _depends(record.log_prob, list(found.values()))
        for name in (name for name, is_used in zip(found, used, strict=True) if is_used):
            known.add(id(found[name]))
            yield Fault(
                "",
                f"parameter {name} is used but stays as it is; to have it learnt, call "
                "pyro.module(name, module) where it is used, or make its class a PyroModule",
                fatal=False,
            )


# ---- the guide --------------------------------------------------------------------------------


def own_guide_faults(pair: Pair, trace: Trace) -> Iterator[Fault]:
    """What keeps a guide of ours from covering the latents."""
    if not pair.latents:
        yield Fault("", "the model has no continuous latent for this guide to cover")
    for latent in pair.latents:
        try:
            bijection(latent.support)
        except ValueError:
            yield Fault(
                latent.name,
                f"has the support {name_of(latent.support)}, to which there is no map from the "
                "real line; write a guide for it",
            )
        if _subsampled(latents_of(trace)[latent.name]):
            yield Fault(latent.name, _UNALIGNED)


_UNALIGNED = (
    "is local to a plate that the model subsamples, which this guide cannot follow; "
    "write a guide that computes it from the mini-batch, or fit the whole data"
)


def cover_faults(pair: Pair, trace: Trace, guide_trace: Trace) -> Iterator[Fault]:
    """Sites that are in one of the two only."""
    in_model, in_guide = latents_of(trace), latents_of(guide_trace)
    own = [n for n, s in in_guide.items() if not (s["infer"] or {}).get("is_auxiliary")]
    extra = sorted(set(own) - set(in_model))
    for name in in_model:
        if name not in in_guide and name not in pair.summed_out:
            has = f" (the guide has {', '.join(map(repr, extra))})" if extra else ""
            yield Fault(name, f"is in the model but not in the guide{has}; add it to the guide")
    for name in extra:
        if name in trace.nodes:
            yield Fault(name, "is observed in the model; remove it from the guide")
        else:
            yield Fault(name, "is in the guide but not in the model; rename or remove it")


def pair_faults(
    pair: Pair, trace: Trace, guide_trace: Trace, moving: Collection[str] = ()
) -> Iterator[Fault]:
    """Sites that are in both but do not match; ``moving`` supports cannot be compared."""
    in_guide, observed = latents_of(guide_trace), observed_of(trace)
    data_plates = {name for site in observed.values() for name, _, _ in plates_of(site)}
    for name, site in latents_of(trace).items():
        if name in in_guide:
            yield from _site_faults(name, site, in_guide[name], data_plates)
            if name not in moving:
                yield from _support_faults(name, site, in_guide[name])
            if _subsampled(site) and not _follows(pair, trace, site):
                yield Fault(name, _UNALIGNED)
    owner = owner_of(pair.model)
    if pair.scored and isinstance(owner, Anneals) and owner.free_bits:
        yield Fault(
            next(iter(pair.scored)),
            "the guide draws it without a reparameterised gradient, for which there are no free "
            "bits; set free_bits=0",
        )


def _site_faults(
    name: str, site: Mapping[str, Any], guide_site: Mapping[str, Any], data_plates: set[str]
) -> Iterator[Fault]:
    expected, given = tuple(site["value"].shape), tuple(guide_site["value"].shape)
    fn, scales = guide_site["fn"], (site["scale"], guide_site["scale"])
    is_point = isinstance(fn, Delta)
    if expected != given:
        yield Fault(name, f"has shape {expected} in the model but {given} in the guide")
        return
    if is_point and is_discrete(site):
        yield Fault(name, "is discrete: leave it out of the guide to have it summed out")
        return
    missing = {p for p, _, _ in plates_of(site)} - {p for p, _, _ in plates_of(guide_site)}
    if not is_point and not is_same(*scales):
        yield Fault(
            name,
            f"has scale {scales[0]} in the model but {scales[1]} in the guide; put it in the same "
            "plates, with the same mini-batch, in both",
        )
    elif not is_point and missing & data_plates:
        names = ", ".join(sorted(missing & data_plates))
        yield Fault(
            name,
            f"is in plate {names} in the model but not in the guide; put it there",
            fatal=False,
        )


def _support_faults(
    name: str, site: Mapping[str, Any], guide_site: Mapping[str, Any]
) -> Iterator[Fault]:
    prior, fn = site["fn"], guide_site["fn"]
    if site["value"].shape != guide_site["value"].shape:
        return
    if is_discrete(site) and not isinstance(fn, Delta):
        yield from _values_faults(name, prior, fn)
        return
    try:
        inside = bool(prior.support.check(guide_site["value"].detach()).all())
        same = isinstance(fn, Delta) or is_same(fn.support, prior.support)
        guide_leaves = not same and goes_beyond(fn.support, prior.support, guide_site["value"])
        prior_leaves = not same and goes_beyond(prior.support, fn.support, guide_site["value"])
    except (NotImplementedError, ValueError):  # no support, or none with a known map
        return
    supports = name_of(prior.support), name_of(fn.support)
    if not inside or guide_leaves:
        what = "its value" if isinstance(fn, Delta) else f"its support {supports[1]}"
        yield Fault(
            name,
            f"the guide draws it outside of the prior's support {supports[0]} ({what}); "
            "transform the guide's distribution, or use one on that support",
        )
    elif prior_leaves:
        yield Fault(
            name,
            f"the guide's support {supports[1]} is only a part of the prior's {supports[0]}; "
            "the rest gets no mass",
            fatal=False,
        )


def _values_faults(name: str, prior: Any, fn: Any) -> Iterator[Fault]:  # noqa: ANN401
    """Values of a discrete site that one of the two has, and the other has not."""
    kinds = type(prior).__name__, type(fn).__name__
    if not all(all_inside(fn, prior) for _ in range(_LOOKS)):
        yield Fault(
            name,
            f"is discrete ({kinds[0]}), and the guide draws values from {kinds[1]} that it cannot "
            "have; use a distribution on the same values",
        )
    elif not all(all_inside(prior, fn) for _ in range(_LOOKS)):
        yield Fault(
            name,
            f"the guide's {kinds[1]} has only a part of the values of the prior's {kinds[0]}; the "
            "rest gets no mass",
            fatal=False,
        )


def _subsampled(site: Mapping[str, Any]) -> bool:
    return any(f.full_size not in (None, f.size) for f in site["cond_indep_stack"])


def _follows(pair: Pair, trace: Trace, site: Mapping[str, Any]) -> bool:
    """Whether the guide knows which rows a mini-batch of the model has."""
    modules = [part for top in modules_of(pair.guide) for part in top.modules()]
    auto = [m for m in modules if isinstance(m, AutoGuide)]
    if not isinstance(pair.guide, AutoGuide):
        return True  # a guide of the user's own is called with the mini-batch
    knows_plates = (AutoNormal, AutoDelta, AutoGuideList, AutoCallable)
    if not all(isinstance(m, knows_plates) for m in auto):
        return False
    nodes: Mapping[str, Any] = trace.nodes
    drawn = all(
        nodes[f.name]["fn"].subsample_size is not None
        for f in site["cond_indep_stack"]
        if f.full_size not in (None, f.size)
    )
    return drawn or pair.guide.create_plates is not None
