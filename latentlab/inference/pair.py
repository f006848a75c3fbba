"""A pair of its own: the model and guide of one fit, and what is known of their sites.

Letters: P particles; *nesting* is the number of batch dimensions (plates) of the model, so that
particles live at batch dimension ``-1 - nesting``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import Delta
from pyro.params.param_store import StateDict
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from latentlab.guides import Guide, Latent
from latentlab.inference.copying import copy_pair, modules_of
from latentlab.inference.devices import CPU
from latentlab.inference.journal import Journal
from latentlab.inference.ranks import ALONE, Ranks
from latentlab.inference.sandbox import sandbox

if TYPE_CHECKING:
    from latentlab.inference.bounds import Bound

__all__ = [
    "Arguments",
    "Pair",
    "copy_pair",
    "latent_of",
    "latents_of",
    "modules_of",
    "nesting_of",
    "observed_of",
    "plates_of",
]


@dataclass(frozen=True)
class Arguments:
    """Data as the pair is called with it: ``model(*args, **kwargs)``.

    Arguments:
        args: positional ones.
        kwargs: keyword ones.
        names: of the columns, where they have names.
        rows: of a mini-batch, which rows of all data they are, shape (B,).

    Example:
        >>> data = Arguments((torch.zeros(3),), {"size": 5})
        >>> data.call(lambda x, size: (len(x), size))
        (3, 5)
        >>> data.map(lambda x: x[:2]).args
        (tensor([0., 0.]),)
    """

    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    rows: Tensor | None = None

    def call(self, function: Callable) -> Any:  # noqa: ANN401
        """Call a model or guide with the data."""
        return function(*self.args, **self.kwargs)

    @property
    def stands_for(self) -> int | None:
        """How many rows those of a mini-batch stand for."""
        return self.kwargs.get("size")

    def tensors(self) -> list[Tensor]:
        """The tensors among the data, in order, those in lists and tuples included."""
        return [*_tensors((*self.args, *self.kwargs.values()))]

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """The same data with every tensor replaced."""

        def change(value: Any) -> Any:  # noqa: ANN401
            if isinstance(value, list | tuple):
                return [*map(change, value)] if isinstance(value, list) else (*map(change, value),)
            return function(value) if isinstance(value, Tensor) else value

        kwargs = {key: change(value) for key, value in self.kwargs.items()}
        return replace(self, args=tuple(map(change, self.args)), kwargs=kwargs)


def _tensors(values: list | tuple) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _empty_store() -> StateDict:
    return {"params": {}, "constraints": {}}


@dataclass
class Pair:
    """A model, its guide and how they are called; the fit's own copy.

    Arguments:
        model: the model.
        guide: the guide, a callable or one of ``latentlab.guides``.
        data: what both are called with.
        dtype: torch's default dtype while they run.
        store: state of Pyro's parameter store.
        latents: the sites a guide covers: all continuous ones, and discrete ones that a guide of
            the user's own draws.
        summed_out: discrete sites that are enumerated and summed out.
        observed: observed sites, those of ``pyro.factor`` aside: they cannot be drawn.
        shapes: shape of one value of every site of the model and the guide.
        plates: name, size and dimension of the plates of every such site.
        points: sites of the guide that are point masses, functions of its other sites.
        noisy: whether the guide has a site that is not a point mass.
        scored: sites of the guide whose draws do not move with its parameters, and the plates of
            each whose elements are independent, see :mod:`latentlab.inference.score`.
        baselines: what was seen at each of them, where a step has one draw.
        nesting: number of batch dimensions of the model.
        vectorised: whether many particles may go through the model at once.
        in_parts: whether log p is added up over some rows after the other, see
            :mod:`latentlab.inference.many_rows`.
        bound: what is climbed; ``None`` for the ELBO.
        journal: where the parts of the fit are kept, while it runs.
        device: where all of it is.
        ranks: the processes that fit it together.
    """

    model: Callable
    guide: Callable
    data: Arguments
    dtype: torch.dtype
    store: StateDict = field(default_factory=_empty_store)
    latents: tuple[Latent, ...] = ()
    summed_out: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    plates: dict[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict)
    points: tuple[str, ...] = ()
    noisy: bool = False
    scored: dict[str, tuple[str, ...]] = field(default_factory=dict)
    baselines: dict[str, Tensor] = field(default_factory=dict)
    nesting: int = 0
    vectorised: bool = False
    in_parts: bool = False
    bound: Bound | None = None
    journal: Journal = field(default_factory=Journal, repr=False, compare=False)
    device: torch.device = CPU
    ranks: Ranks = ALONE

    @contextmanager
    def entered(self, seed: int, validate: bool = False) -> Iterator[None]:
        """Run with this pair's parameters, dtype, device and a seed; leave no trace."""
        how = {"dtype": self.dtype, "validate": validate, "device": self.device}
        with sandbox(self.store, seed=seed, **how):  # type: ignore[arg-type]
            yield

    def is_point(self) -> bool:
        """Whether the guide has no noise: all its sites are point masses, or there are none."""
        drawn = {z.name for z in self.latents} & set(self.points)
        return len(drawn) == len(self.latents) and not self.noisy

    def rows_plate(self) -> str | None:
        """The plate of all observed sites that is over the first axis of the data."""
        stacks = [self.plates[site] for site in self.observed]
        lengths = {len(tensor) for tensor in self.data.tensors() if tensor.dim()}
        common = [p for p in stacks[0] if all(p in s for s in stacks)] if stacks else []
        over_rows = sorted((dim, name) for name, size, dim in common if size in lengths)
        return over_rows[0][1] if over_rows else None

    def local_plate(self) -> str | None:
        """The plate that latents share with observed sites: each of its elements is a datum.

        That of the rows of the data, where there is one.
        """
        rows = self.rows_plate()
        if rows is not None:
            stands = (plate[0] for latent in self.latents for plate in latent.plates)
            return rows if rows in stands else None
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
        """Unconstrained leaf tensors to optimise, each of them once, by name.

        Those of the parameter store (``pyro.param``, ``PyroModule``, ``pyro.module``), and those
        of a guide of ours, which does without the store.
        """
        found: dict[str, Tensor] = dict(self.store["params"])
        if isinstance(self.guide, Guide):
            found |= {f"guide.{name}": value for name, value in self.guide.named_parameters()}
        first = {id(value): name for name, value in reversed(found.items())}
        return {n: v for n, v in found.items() if v.requires_grad and first[id(v)] == n}


def latents_of(trace: Trace) -> dict[str, Any]:
    """The sites of a trace that are drawn: neither observed nor the indices of a mini-batch."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def observed_of(trace: Trace) -> dict[str, Any]:
    """The observed sites of a trace, ``pyro.factor`` included, ``pyro.deterministic`` not."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not (site["infer"] or {}).get("_deterministic")
    }


def latent_of(name: str, site: Mapping[str, Any]) -> Latent:
    """What a guide has to know of a site."""
    shape = tuple(site["value"].shape)
    split = len(shape) - site["fn"].event_dim
    return Latent(name, shape[:split], shape[split:], site["fn"].support, plates_of(site))


def plates_of(site: Mapping[str, Any]) -> tuple[tuple[str, int, int], ...]:
    """Name, size and dimension of the plates a site stands in."""
    return tuple((f.name, f.size, f.dim) for f in site["cond_indep_stack"] if f.vectorized)


def nesting_of(*traces: Trace) -> int:
    """The number of batch dimensions that plates and log-densities of scored traces use."""
    dims = [0]
    for trace in traces:
        for site in (latents_of(trace) | observed_of(trace)).values():
            dims += [-dim for _, _, dim in plates_of(site)]
            if not isinstance(site["fn"], Delta):
                dims.append(site["log_prob"].dim())
    return max(dims)
