"""A pair is looked at before its first step: every fault is named with its site.

The same look prepares the pair for a fit: its own copy, its sites, its number of batch dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor
from torch import Tensor, nn

from latentlab.guides import (
    Amortised,
    Flow,
    FullRank,
    Guide,
    LowRank,
    MeanField,
    Point,
    Structured,
)
from latentlab.inference import faults as find
from latentlab.inference import objectives, score
from latentlab.inference.arguments import as_arguments, tell_columns
from latentlab.inference.batches import chosen, follows_rows, num_rows, take
from latentlab.inference.copying import copy_pair
from latentlab.inference.devices import CPU
from latentlab.inference.faults import Fault
from latentlab.inference.many_rows import adds_up, are_many, parts
from latentlab.inference.modes import evaluation_mode
from latentlab.inference.pair import (
    Arguments,
    Pair,
    latent_of,
    latents_of,
    nesting_of,
    observed_of,
    plates_of,
)
from latentlab.inference.predictive import datum_plate
from latentlab.inference.units import scale
from latentlab.inference.values import is_discrete, is_scored
from latentlab.protocols import OffersGuide, ScalesToData, owner_of

__all__ = ["Fault", "PairReport", "accepts_size", "bind", "check_pair", "learn", "prepare"]

_GUIDES: dict[str, type[Guide]] = {
    "point": Point,
    "mean_field": MeanField,
    "low_rank": LowRank,
    "full_rank": FullRank,
    "structured": Structured,
    "amortised": Amortised,
    "flow": Flow,
}


_LARGE = 1_000  # rows, above which a pair that follows them is looked at on some of them
_MANY = 5_000  # rows, above which one without latents of rows is
_PRIMES = (499, 503, 509, 521, 523, 541)  # rows, of which no axis else has as many


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

    def expect_ok(self, what: str) -> None:
        """Raise a ``ValueError`` that says what cannot be done, and names each fatal fault."""
        if not self.ok:
            raise ValueError(f"{what}: " + "; ".join(str(f) for f in self.faults if f.fatal))

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
    whole: Any = None,  # noqa: ANN401
    device: torch.device | None = None,
    in_batches: bool = False,
) -> tuple[Pair, PairReport]:
    """The fit's own copy of the pair, run, and what was found on the way.

    Arguments:
        model: as for :func:`check_pair`.
        data: as for :func:`check_pair`.
        guide: as for :func:`check_pair`.
        whole: the data as they were given, where ``data`` are a part of them: what is told of
            rows is told of these.
        device: where the pair is to be; by default where the data are, else on the CPU.
        in_batches: whether it is to be fitted to some rows at a time, so that a row may be taken
            for what it is among all.

    Returns:
        The pair, ready for :mod:`latentlab.inference.objectives` where the report is ok.
    """
    _expect_program(model, "model")
    model, guide_function = copy_pair(model, _named_guide(guide))
    evaluation_mode(model, guide_function)
    arguments = as_arguments(data, model)
    device = device or next((tensor.device for tensor in arguments.tensors()), CPU)
    if device != CPU:
        model, guide_function = copy_pair(model, guide_function, device=device)
        arguments = arguments.map(lambda tensor: tensor.to(device))
        whole = None if whole is None else as_arguments(whole, model).map(lambda t: t.to(device))
    _expect_arguments(model, arguments)
    owner = owner_of(model)
    tell_columns(model, arguments.names)
    if isinstance(owner, ScalesToData):
        if not (arguments.args or arguments.kwargs):
            name = type(owner).__name__
            raise ValueError(f"data: {name} is fitted to rows, got none; give it a table of them")
        scale(owner, arguments, None if whole is None else as_arguments(whole, model))
    floating = [t.dtype for t in arguments.tensors() if t.is_floating_point()]
    dtype = floating[0] if floating else torch.get_default_dtype()
    pair = Pair(model, guide_function, arguments, dtype, device=device)
    wants_guide = isinstance(guide, str) and guide == "auto"
    found = _look_at_few(pair, wants_guide, in_batches and accepts_size(model))
    if found is None:
        faults, note = _look_at_all(pair, wants_guide)
    else:
        pair, faults, note = found
    notes = tuple(text for text in (note, score.note(pair)) if text)
    return pair, PairReport(tuple(faults), _describe(pair), notes)


def _expect_program(function: object, role: str) -> None:
    if isinstance(function, type):
        raise TypeError(f"{role}: got the class {function.__name__}; make one, with its arguments")
    if not callable(function):
        raise TypeError(f"{role}: expected a callable with pyro.sample, got {function!r}")


def _expect_arguments(model: Callable, data: Arguments) -> None:
    """Refuse data that the model cannot be called with, before a call that says so from within."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except ValueError:  # of a callable that tells none
        return
    try:
        given = signature.bind(*data.args, **data.kwargs).arguments
    except TypeError as error:
        wanted = ", ".join(signature.parameters) or "nothing"
        raise TypeError(
            f"data: the model takes {wanted}: {error}; several arguments are a tuple, or a dict "
            "with their names"
        ) from error
    size = given.get("size")
    if isinstance(size, Tensor) and size.numel() != 1:
        raise TypeError(
            f"data: size, the number of rows that x stands for, got shape {tuple(size.shape)}; "
            "weights of rows need a model that takes them"
        )


def _look_at_all(pair: Pair, wants_guide: bool) -> tuple[list[Fault], str | None]:
    """Learn the sites of a pair, in place; its faults, and why it runs one particle at a time."""
    faults = _look(pair, wants_guide)
    if any(fault.fatal for fault in faults):
        return faults, None
    with pair.entered(seed=0):
        faults += find.unregistered(pair)
        faults += find.entangled(pair)
        if any(fault.fatal for fault in faults):
            return faults, None
        note = objectives.verify_vectorised(pair)
        pair.scored = score.apart(pair)
        pair.baselines = {site: torch.zeros(2, dtype=pair.dtype) for site in pair.scored}
        return faults, note


def _look_at_few(
    pair: Pair, wants_guide: bool, in_batches: bool
) -> tuple[Pair, list[Fault], None] | None:
    """As :func:`_look_at_all`, at some rows of large data.

    A pair that follows its rows, or adds them up, or has global latents alone, has the same sites
    at all of them, where then only their log-densities are looked at.

    Returns:
        The pair and its faults; ``None`` where that will not do.
    """
    total = num_rows(pair.data)
    if total is None or total <= _LARGE:
        return None
    sizes = {size for tensor in pair.data.tensors() for size in tensor.shape[1:]}
    count = next(prime for prime in _PRIMES if prime not in sizes)
    store: Any = {"params": {}, "constraints": {}}
    few = replace(pair, data=take(pair.data, chosen(count, total, 0)), store=store)
    try:
        is_auto = isinstance(pair.guide, AutoGuide)  # made for its rows
        may_add_up = in_batches and are_many(pair.data) and not is_auto
        may_share = total > _MANY and not (is_auto or isinstance(few.guide, Amortised))
        if not (may_add_up or may_share or _may_follow(few, wants_guide)):
            return None
        faults, note = _look_at_all(few, wants_guide)
    except Exception:  # as of a guide with numbers for each row; a look at all tells
        return None
    if any(fault.fatal for fault in faults) or note is not None:
        return None
    follows = follows_rows(few)
    with few.entered(seed=0):
        few.in_parts = may_add_up and not follows and adds_up(few)
    if not (follows or few.in_parts or may_share and _is_global(few, count)):
        return None
    in_turn = parts(pair.data, None if few.in_parts else _LARGE)
    with few.entered(seed=0, validate=True):
        try:
            for part in in_turn if follows or few.in_parts else [pair.data]:
                if find.score(_run("model", few.model, part)):
                    return None  # named with its place among all rows
        except Exception:
            if follows or few.in_parts:
                raise
            return None
    _widen(few, count, total)
    few.data = pair.data
    return few, faults, None


def _is_global(pair: Pair, count: int) -> bool:
    """Whether no latent belongs to one of ``count`` rows, and all that is observed does."""
    plate = datum_plate(pair)
    if not isinstance(pair.guide, Guide) or pair.summed_out or plate is None or not pair.observed:
        return False
    of_latents = {p for z in pair.latents for p in z.plates}
    return all(
        (plate, count) in {(n, s) for n, s, _ in pair.plates[o]} for o in pair.observed
    ) and (
        plate not in {name for name, _, _ in of_latents}
        and not any(count in z.shape for z in pair.latents)
    )


def _may_follow(pair: Pair, wants_guide: bool) -> bool:
    """Whether the guide may compute the latents of each row from the row."""
    guide, owner = pair.guide, owner_of(pair.model)
    if wants_guide and isinstance(owner, OffersGuide):
        guide = owner.default_guide()
    elif wants_guide:  # a guide of ours has numbers for each row, unless it has none
        with pair.entered(seed=0):
            return not latents_of(_run("model", pair.model, pair.data))
    return not isinstance(guide, Guide | AutoGuide)


def _widen(pair: Pair, count: int, total: int) -> None:
    """Sites as they are at all rows, from those at ``count`` of them, in place."""
    plate = datum_plate(pair)

    def wider(plates: tuple[tuple[str, int, int], ...]) -> tuple[tuple[str, int, int], ...]:
        return tuple((name, total if name == plate else n, dim) for name, n, dim in plates)

    def at_all(shape: Iterable[int]) -> tuple[int, ...]:
        return tuple(total if size == count else size for size in shape)

    pair.latents = tuple(
        replace(z, batch_shape=at_all(z.batch_shape), plates=wider(z.plates)) for z in pair.latents
    )
    pair.plates = {site: wider(plates) for site, plates in pair.plates.items()}
    pair.shapes = {site: at_all(shape) for site, shape in pair.shapes.items()}


def _look(pair: Pair, wants_guide: bool) -> list[Fault]:
    """Run the model and the guide, learn their sites, find their faults."""
    faults = list(find.clashing_names(pair))
    with pair.entered(seed=0, validate=True):
        traces = [_run("model", pair.model, pair.data) for _ in range(2)]
        faults += find.unsteady(*traces)
        faults += find.model_faults(traces[0])
        faults += find.score(traces[0])
        faults += find.repeated(traces[0])
        if any(fault.fatal for fault in faults):
            return faults
        replayed = _run("model", poutine.replay(pair.model, trace=traces[0]), pair.data)
        find.score(replayed)
        faults += find.unrepeatable(traces[0], replayed)
        _learn_model(pair, traces[0])
        faults += find.unused(pair, traces[0])
        moving = list(find.moving_supports(pair, *traces))
        if wants_guide:
            pair.guide = _default_guide(pair)
        if isinstance(pair.guide, Guide | AutoGuide):
            faults += find.half_observed(traces[0])
        if isinstance(pair.guide, Guide):
            if lost := [*find.unsummable(pair, traces[0])]:
                return faults + lost
            if pair.latents or not _learns_by_itself(pair):
                faults += find.own_guide_faults(pair, traces[0])
            faults += moving
            if not any(fault.fatal for fault in faults):
                bind(pair, pair.guide)
            return faults
        guide_trace = _run("guide", pair.guide, pair.data)
        faults += find.score(guide_trace)
        _learn_guide(pair, traces[0], guide_trace)
        faults += find.cover_faults(pair, traces[0], guide_trace)
        faults += find.unsummable(pair, traces[0])
        faults += find.pair_faults(pair, traces[0], guide_trace, {f.site for f in moving})
        if isinstance(pair.guide, AutoGuide):
            faults += moving
    return faults


def _learns_by_itself(pair: Pair) -> bool:
    """Whether a guide of no site will do: the model, entered, has parameters of its own."""
    return isinstance(pair.guide, Point) and bool(list(pyro.get_param_store().named_parameters()))


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
    if isinstance(guide, type):
        _expect_program(guide, "guide")
    if not callable(guide):
        raise TypeError(
            f"guide: expected a callable, a guide of latentlab.guides or a name, got {guide!r}"
        )
    return guide


def _default_guide(pair: Pair) -> Guide:
    owner = owner_of(pair.model)
    if isinstance(owner, OffersGuide):
        return owner.default_guide()
    if not pair.latents:
        return Point()  # of no site: parameters of the model are all there is to fit
    return MeanField()  # the lowest rung of the ladder


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
    pair.latents = tuple(latent_of(n, s) for n, s in drawn.items() if not is_discrete(s))
    pair.summed_out = tuple(name for name, site in drawn.items() if is_discrete(site))
    pair.observed = tuple(n for n, s in observed_of(trace).items() if not site_is_factor(s))
    pair.nesting = nesting_of(trace)
    pair.plates |= _plates(trace)
    pair.shapes |= _shapes(trace)


def _learn_guide(pair: Pair, trace: Trace, guide_trace: Trace) -> None:
    drawn = latents_of(guide_trace)
    pair.summed_out = tuple(name for name in pair.summed_out if name not in drawn)
    covered = {n: s for n, s in latents_of(trace).items() if n not in pair.summed_out}
    pair.latents = tuple(latent_of(name, site) for name, site in covered.items())
    pair.scored = {name: () for name, site in drawn.items() if is_scored(site)}
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


def bind(pair: Pair, guide: Guide) -> None:
    """Lay a guide of ours out over the latents of a pair, in place.

    Arguments:
        pair: a pair whose model was looked at.
        guide: the guide.
    """
    if isinstance(guide, Amortised) and pair.data.tensors():
        guide.look_at(pair.data)
    guide.bind(
        pair.latents,
        max_plate_nesting=pair.nesting,
        dtype=pair.dtype,
        device=pair.device,
        local_plate=pair.local_plate(),
    )
    pair.noisy = not isinstance(guide, Point)
    if not pair.noisy:
        pair.points = tuple(latent.name for latent in pair.latents)


def learn(pair: Pair) -> None:
    """Learn the shapes of a pair's sites at the data it has, in place; call it entered.

    Arguments:
        pair: one that was looked at, with other rows of data.
    """
    trace = _run("model", pair.model, pair.data)
    pair.latents = tuple(latent_of(z.name, trace.nodes[z.name]) for z in pair.latents)
    pair.plates, pair.shapes = _plates(trace), _shapes(trace)
    if not isinstance(pair.guide, Guide):
        guide_trace = _run("guide", pair.guide, pair.data)
        pair.plates = _plates(guide_trace) | pair.plates
        pair.shapes = _shapes(guide_trace) | pair.shapes


def accepts_size(model: Callable) -> bool:
    """Whether the model takes ``size``, so that a mini-batch can stand for all rows."""
    function = model.forward if isinstance(model, nn.Module) else model
    return "size" in inspect.signature(function).parameters
