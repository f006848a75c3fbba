r"""The evidence lower bound, from tensors only.

.. math::
    \mathrm{ELBO} = \mathbb{E}_{q(z)} \left[ \log p(x, z) - \log q(z) \right] \le \log p(x)

One pass of the model takes P particles at once (in a leading batch dimension), where the model is
written so that this is right; that is verified once, against the same particles one by one.
Nothing here reads a value back from a tensor, so that a pair can be traced.

Letters: P particles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from latentlab.guides import Draws, Guide
from latentlab.inference.pair import Arguments, Pair

__all__ = [
    "by_row",
    "draw",
    "guide_log_probs",
    "log_joint",
    "log_joint_of_all",
    "log_q",
    "log_weights",
    "particles",
    "per_particle",
    "site_log_probs",
    "verify_vectorised",
]


Site = Any  # a Pyro message: its type allows for values that sites do not have


class Substitute(Messenger):
    """Put given values at the latent sites; keep the values of all sites.

    Arguments:
        values: site -> value; plates that draw their rows take them from here, too.
        enumerated: discrete sites that are to have all their values at once.
    """

    def __init__(self, values: Mapping[str, Tensor], enumerated: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.given, self.enumerated = values, enumerated
        self.values: dict[str, Tensor] = {}
        self.indices: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        name = msg["name"]
        if self.enumerated:  # a dimension for each label; pyro.markov would use one for several
            msg["infer"].pop("_markov_scope", None)
        if name in self.enumerated:
            msg["infer"] |= {"enumerate": "parallel", "num_samples": None}
        elif name in self.given and not msg["is_observed"]:
            # Handlers of enumeration have to see what is not enumerated, too.
            msg["value"], msg["done"] = self.given[name], not self.enumerated

    def _pyro_post_sample(self, msg: Site) -> None:
        if site_is_subsample(msg):
            drawn = msg["fn"].subsample_size
            if drawn is not None and drawn < msg["fn"].size:
                self.indices[msg["name"]] = msg["value"]
        elif not msg["is_observed"]:
            self.values[msg["name"]] = msg["value"]


class Record(Substitute):
    """Put given values at the latent sites; keep the log-densities of all sites, too."""

    def __init__(self, values: Mapping[str, Tensor], enumerated: tuple[str, ...] = ()) -> None:
        super().__init__(values, enumerated)
        self.log_prob: dict[str, Tensor] = {}
        self.factors: dict[str, _Factor] = {}
        self.labels: dict[str, int] = {}

    def _pyro_post_sample(self, msg: Site) -> None:
        super()._pyro_post_sample(msg)
        if site_is_subsample(msg):
            return
        name, scale, mask = msg["name"], msg["scale"], msg["mask"]
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        if not isinstance(log_prob, Tensor):  # pyro.deterministic scores a plain zero
            log_prob = torch.as_tensor(log_prob)
        if not self.enumerated:
            self.log_prob[name] = scale_and_mask(log_prob, scale, mask)
            return
        if name in self.enumerated:
            # The mask is for what depends on a label: the label itself sums to one as it is.
            self.labels[name], mask = msg["infer"]["_enumerate_dim"], None
        plates = frozenset(f.dim for f in msg["cond_indep_stack"] if f.vectorized)
        # The scale belongs outside of a sum over labels.
        self.factors[name] = _Factor(scale_and_mask(log_prob, 1.0, mask), plates, scale)


class _Factor(NamedTuple):
    """Log-density of a site, or of several with their labels summed out."""

    log_prob: Tensor
    plates: frozenset[int]  # their dimensions
    scale: float | Tensor

    def depends_on(self, dim: int) -> bool:
        """Whether it takes another value for each label of an enumerated dimension."""
        return self.log_prob.dim() >= -dim and self.log_prob.shape[dim] > 1


def particles(num_particles: int, pair: Pair) -> pyro.plate:
    """The plate of particles, to the left of all plates of the pair."""
    return pyro.plate("_particles", num_particles, dim=-1 - pair.nesting)


def draw(pair: Pair, num_particles: int, data: Arguments | None = None) -> Draws:
    """Draw all latents from the guide.

    Arguments:
        pair: the pair, entered.
        num_particles: number of draws P.
        data: what the guide is called with, by default the pair's own data.

    Returns:
        Values, shape (P, 1, ..., batch, event), and log q (P,).
    """
    if isinstance(pair.guide, Guide):
        return pair.guide.draw(num_particles, data or pair.data)
    data = data or pair.data
    if pair.vectorised:
        with particles(num_particles, pair), Record({}) as record:
            data.call(pair.guide)
        log_q = per_particle(record.log_prob, num_particles, pair.nesting)
        # A point may be a parameter itself, and would move with it.
        values = record.values | {name: record.values[name].clone() for name in pair.points}
        return Draws(values, log_q, record.indices)
    singles: list[Record] = []
    for _ in range(num_particles):
        with Record(singles[0].indices if singles else {}) as record:
            data.call(pair.guide)
        singles.append(record)
    values = {name: torch.stack([s.values[name] for s in singles]) for name in record.values}
    log_q = torch.stack([_total(s.log_prob) for s in singles])
    return Draws(values, log_q, singles[0].indices)


def log_q(pair: Pair, draws: Draws, data: Arguments | None = None) -> Tensor:
    """Log-density (P,) of the guide at draws of it, or of another guide of its shape."""
    if isinstance(pair.guide, Guide):
        return pair.guide.log_prob(draws.values, data or pair.data)
    kept = {name: value for name, value in draws.values.items() if name not in pair.points}
    return _score(pair, pair.guide, replace(draws, values=kept), data or pair.data)


def log_joint(pair: Pair, draws: Draws, data: Arguments | None = None) -> Tensor:
    """Log-density log p(x, z) of the model, shape (P,), discrete latents summed out.

    Arguments:
        pair: the pair, entered.
        draws: draws of the latents, as :func:`draw` returns them.
        data: the observations, by default the pair's own data.
    """
    if pair.in_parts and data is None and not torch.is_grad_enabled():
        return _added_up(pair, draws)
    return _score(pair, pair.model, draws, data or pair.data)


def log_joint_of_all(pair: Pair, draws: Draws) -> Tensor:
    """As :func:`log_joint` at the pair's own data, several processes looking at some rows each.

    Arguments:
        pair: as for :func:`log_joint`.
        draws: as for :func:`log_joint`, the same for all processes.
    """
    part = pair.ranks.part
    if part is None:
        return log_joint(pair, draws)
    return pair.ranks.mean(log_joint(pair, draws, part))


def _added_up(pair: Pair, draws: Draws) -> Tensor:
    """Log-density (P,) of the model, from some rows after the other."""
    from latentlab.inference.many_rows import parts

    plate, total = pair.rows_plate(), torch.zeros_like(draws.log_q, dtype=torch.float64)
    for k, part in enumerate(parts(pair.data)):
        found = _site_log_probs(pair, pair.model, draws, part)
        local = {n for n in found if plate in {name for name, _, _ in pair.plates[n]}}
        kept = {n: v for n, v in found.items() if n in local or not k}  # the others count once
        total += per_particle(kept, len(draws), pair.nesting)
    return total.to(draws.log_q.dtype)


def log_weights(pair: Pair, num_particles: int) -> Tensor:
    """Log importance weights log p(x, z) - log q(z) of P draws; their mean is the ELBO."""
    draws = draw(pair, num_particles)
    return log_joint_of_all(pair, draws) - draws.log_q


def site_log_probs(pair: Pair, draws: Draws, data: Arguments | None = None) -> dict[str, Tensor]:
    """Log-density of each site of the model, with its batch: (P or 1, ..., batch).

    A discrete latent that is summed out is summed out within its plate; its log-density and those
    of the sites that depend on it stand together under the name of the last of these. The others
    are absent, or zero where they are observed.

    Arguments:
        pair: as for :func:`log_joint`.
        draws: as for :func:`log_joint`.
        data: as for :func:`log_joint`.
    """
    return _site_log_probs(pair, pair.model, draws, data or pair.data)


def guide_log_probs(pair: Pair, draws: Draws, data: Arguments | None = None) -> dict[str, Tensor]:
    """Log-density of each site of a guide that is a function, as :func:`site_log_probs`."""
    kept = {name: value for name, value in draws.values.items() if name not in pair.points}
    found = _site_log_probs(pair, pair.guide, replace(draws, values=kept), data or pair.data)
    return {name: value for name, value in found.items() if name not in pair.points}


def by_row(pair: Pair, site: str, log_prob: Tensor, plate: str | None, num: int) -> Tensor:
    """Log-density of a site in the plate of the rows, for each of P draws and row: (P, M)."""
    dim = next(dim for name, _, dim in pair.plates[site] if name == plate)
    missing = pair.nesting + 1 - log_prob.dim()
    value = log_prob.reshape((1,) * max(missing, 0) + tuple(log_prob.shape))
    value = value.expand(num, *value.shape[1:]).movedim(dim, 1)
    return value.reshape(*value.shape[:2], -1).sum(-1)


def _score(pair: Pair, function: Callable, draws: Draws, data: Arguments) -> Tensor:
    """Log-density (P,) of the model or the guide."""
    if pair.vectorised:
        log_prob = _log_prob(pair, _run(pair, function, {**draws.values, **draws.indices}, data))
        return per_particle(log_prob, len(draws), pair.nesting)
    singles = _one_by_one(pair, function, draws, data)
    return torch.stack([_total(_log_prob(pair, single)) for single in singles])


def _site_log_probs(
    pair: Pair, function: Callable, draws: Draws, data: Arguments
) -> dict[str, Tensor]:
    """Log-density of each site of the model or the guide, (P or 1, ..., batch)."""
    if pair.vectorised:
        log_prob = _log_prob(pair, _run(pair, function, {**draws.values, **draws.indices}, data))
        return {name: _with_dims(value, 1 + pair.nesting) for name, value in log_prob.items()}
    singles = [_log_prob(pair, r) for r in _one_by_one(pair, function, draws, data)]
    return {
        name: torch.stack([_with_dims(single[name], pair.nesting) for single in singles])
        for name in singles[0]
    }


def _one_by_one(pair: Pair, function: Callable, draws: Draws, data: Arguments) -> Iterator[Record]:
    """A run for each particle, with its values in the shapes of one run."""
    for p in range(len(draws)):
        values = {
            name: _with_dims(value[p], len(pair.shapes.get(name, value.shape[1:])))
            for name, value in draws.values.items()
        }
        yield _run(pair, function, {**values, **draws.indices}, data)


def _run(pair: Pair, function: Callable, values: Mapping[str, Tensor], data: Arguments) -> Record:
    """A run of the model or the guide with given values, discrete latents enumerated."""
    if function is not pair.model or not pair.summed_out:
        with Record(values) as record:
            data.call(function)
        return record
    first_dim = -2 - pair.nesting
    with poutine.enum(first_available_dim=first_dim), Record(values, pair.summed_out) as record:
        data.call(function)
    return record


def _log_prob(pair: Pair, record: Record) -> dict[str, Tensor]:
    """Log-densities of the sites of a run, discrete latents summed out."""
    return _sum_out(record, pair) if record.enumerated else record.log_prob


def _sum_out(record: Record, pair: Pair) -> dict[str, Tensor]:
    """Sum the labels out one by one, those in the deepest plates first, children before parents.

    A factor that depends on a label is added up over the plates that the label does not live in,
    then all factors of the label are added, and the label is summed out in log space. What is left
    stands under the name of the last factor; an observed site that it stands for is zero.
    """
    factors, labels = dict(record.factors), dict(record.labels)
    plates = {label: factors[label].plates for label in labels}
    stands_for: dict[str, str] = {}
    for label in sorted(reversed(labels), key=lambda label: -len(plates[label])):
        dim = labels.pop(label)
        touched = [name for name, factor in factors.items() if factor.depends_on(dim)]
        if not touched:  # a single value, of probability one
            continue
        parts = [factors.pop(name) for name in touched]
        if not all(_equal(part.scale, parts[0].scale) for part in parts):
            raise ValueError(
                f"site {label!r} cannot be summed out: what depends on it is scaled differently "
                "(by a mini-batch or poutine.scale); put the site into the same plate, or fit "
                "the whole data"
            )
        for part in parts:
            _tell_entangled(label, part, plates, labels)
        first, *others = (_summed(part, part.plates - plates[label]) for part in parts)
        summed = sum(others, first).logsumexp(dim, keepdim=True)
        factors[touched[-1]] = _Factor(summed, plates[label], parts[0].scale)
        stands_for |= dict.fromkeys(touched[:-1], touched[-1])
    found = {
        name: scale_and_mask(_with_dims(factor.log_prob, 1 + pair.nesting), factor.scale)
        for name, factor in factors.items()
    }
    for name in pair.observed:
        last = name
        while last not in found and last in stands_for:
            last = stands_for[last]
        if last != name:
            found[name] = torch.zeros_like(found[last])
    return found


def _summed(factor: _Factor, plates: frozenset[int]) -> Tensor:
    """The log-density added up over some of its plates."""
    return factor.log_prob.sum(sorted(plates), keepdim=True) if plates else factor.log_prob


def _tell_entangled(
    label: str, factor: _Factor, plates: Mapping[str, frozenset[int]], others: Mapping[str, int]
) -> None:
    """A sum over one plate cannot pass labels that live in another one."""
    for other, dim in others.items():
        if factor.depends_on(dim) and plates[other] & factor.plates - plates[label]:
            first, second = sorted((label, other))
            raise ValueError(
                f"sites {first!r} and {second!r} cannot be summed out together: they live in "
                "different plates, and a site in both depends on the two; put them into one "
                "plate, or make one of them continuous"
            )


def _equal(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether two scales are equal; while a pair is traced, as far as can be told."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return a == b
    try:
        return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
    except RuntimeError:  # no value can be read; it was when the pair was checked
        return True


def per_particle(log_prob: Mapping[str, Tensor], num_particles: int, nesting: int) -> Tensor:
    """Add the sites' log-densities, each summed over its batch but not over particles: (P,)."""
    total: Tensor | None = None
    for value in log_prob.values():
        if value.dim() <= nesting:
            value = value.sum()
        elif value.dim() > 1:
            value = value.flatten(1).sum(-1)
        total = value if total is None else total + value
    return torch.zeros(num_particles) if total is None else total.expand(num_particles)


def _total(log_prob: Mapping[str, Tensor]) -> Tensor:
    """Add the sites' log-densities, all summed: a scalar."""
    return sum((value.sum() for value in log_prob.values()), torch.zeros(()))


def _with_dims(value: Tensor, num_dims: int) -> Tensor:
    """With so many dimensions, those of size one to the left of them added or left out."""
    extra = value.dim() - num_dims
    return value.reshape((1,) * -extra + tuple(value.shape[max(extra, 0) :]))


def verify_vectorised(pair: Pair, num_particles: int = 3) -> str | None:
    """Whether P particles at once are P particles one by one; call it with the pair entered.

    Compared are the log-densities of all elements of all sites, at draws of the guide and of the
    prior, which are far apart also where the guide begins narrow.

    Arguments:
        pair: the pair; ``vectorised`` is set, in place.
        num_particles: how many draws of each are compared.

    Returns:
        ``None`` where it holds, else the reason why the pair runs one particle at a time.
    """
    with torch.no_grad():
        pair.vectorised = True
        try:
            drawn = draw(pair, num_particles)
            if drawn.log_q.shape != (num_particles,):
                raise ValueError("its draws do not tell the particles apart")
            draws = _with_prior(pair, drawn)
            together = _all_values(pair, draws, drawn)
        except Exception as error:
            pair.vectorised = False
            what = (str(error).splitlines() or [""])[0]
            return _slowly(f"{type(error).__name__}: {what}")
        pair.vectorised = False
        one_by_one = _all_values(pair, draws, drawn)
    for name, value in one_by_one.items():
        if not _agree(together[name], value):
            return _slowly(f"{name} comes out different")
    pair.vectorised = True
    return None


def _slowly(what: str) -> str:
    return (
        f"one particle at a time: with several, {what}; right, but slower: a model that lets its "
        "latents have dimensions in front (w[..., 0], (x * w).sum(-1)) runs all at once"
    )


def _all_values(pair: Pair, draws: Draws, drawn: Draws) -> dict[str, Tensor]:
    """Everything that a step computes, by a name for it."""
    model = _site_log_probs(pair, pair.model, draws, pair.data)
    found = {f"the model's site {name!r}": value for name, value in model.items()}
    if isinstance(pair.guide, Guide):
        return found
    kept = {name: value for name, value in drawn.values.items() if name not in pair.points}
    noise = replace(drawn, values=kept)
    guide = _site_log_probs(pair, pair.guide, noise, pair.data)
    found |= {f"the guide's site {name!r}": value for name, value in guide.items()}
    points = drawn.values
    if not pair.vectorised:
        singles = [r.values for r in _one_by_one(pair, pair.guide, noise, pair.data)]
        points = {name: torch.stack([single[name] for single in singles]) for name in pair.points}
    return found | {
        f"the guide's point {name!r}": points[name].reshape(len(drawn), -1) for name in pair.points
    }


def _with_prior(pair: Pair, drawn: Draws) -> Draws:
    """Draws of the guide, then as many of the prior, of the model's latents."""
    indices, priors = drawn.indices, []
    for _ in range(len(drawn)):
        with Substitute(indices) as record:
            pair.data.call(pair.model)
        indices = indices or record.indices
        priors.append(record.values)
    values, ours = {}, isinstance(pair.guide, Guide)
    for latent in pair.latents:
        num_dims = pair.nesting + len(latent.event_shape)
        prior = torch.stack([_with_dims(draw[latent.name], num_dims) for draw in priors])
        # A guide of ours is not placed yet: its standard normal is nowhere, in the data's units.
        values[latent.name] = prior if ours else torch.cat([drawn.values[latent.name], prior])
    return Draws(values, torch.zeros(len(drawn) if ours else 2 * len(drawn)), indices)


def _agree(together: Tensor, one_by_one: Tensor) -> bool:
    """Whether values are equal up to the order of sums, and of a shape that adds up equally."""
    num = len(one_by_one)
    if together.shape[1:] != one_by_one.shape[1:] or len(together) not in (1, num):
        return False
    tol = 1e-8 if one_by_one.dtype == torch.float64 else 1e-3
    together = together.expand_as(one_by_one)
    return torch.allclose(together, one_by_one, rtol=tol, atol=tol, equal_nan=True)
