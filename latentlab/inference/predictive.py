r"""What a pair says of data, given draws of its latents.

A *datum* is a row: an element of the plate over the first axis of the data. Latents in that plate
are local: new data have their own, drawn anew from the model,

.. math:: p(x^*_n \mid x) \approx \frac{1}{S} \sum_s p(x^*_n \mid \theta_s, z_s), \quad
          \theta_s \sim q, \; z_s \sim p(z \mid \theta_s),

while global latents, :math:`\theta`, are those of the fit.

Letters: S draws, N data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer import infer_discrete
from torch import Tensor

from latentlab.data.checks import match_columns
from latentlab.data.convert import column_names
from latentlab.diagnostics import Estimate, log_mean_exp
from latentlab.guides import Draws
from latentlab.inference import objectives
from latentlab.inference.arguments import as_arguments, cast, with_names
from latentlab.inference.evaluation import chunks
from latentlab.inference.pair import Arguments, Pair
from latentlab.protocols import ArrangesData, ChecksData, owner_of

__all__ = [
    "as_fitted",
    "datum_plate",
    "draw_labels",
    "is_local",
    "log_density",
    "mean_density",
    "replicate",
    "shared",
]


def as_fitted(data: Any, pair: Pair, *, check: bool = False) -> Arguments:  # noqa: ANN401
    """Data in the form that the pair was fitted to: columns by name, numbers of its dtype.

    Arguments:
        data: as for :func:`latentlab.fit`.
        pair: the pair.
        check: whether to ask the model if it has a density of them.

    Raises:
        ValueError: for missing or extra columns, which the message lists, and for data that the
            model refuses.
    """
    names, owner = pair.data.names, owner_of(pair.model)
    if names and not isinstance(owner, ArrangesData):
        data = _matched(data, names)
    arguments = as_arguments(data, pair.model, names).map(lambda t: t.to(pair.device))
    if check and isinstance(owner, ChecksData) and arguments.tensors():
        args, kwargs = with_names(arguments)
        owner.check_data(*args, **kwargs)
    return arguments.map(lambda t: cast(t, pair.dtype) if t.is_floating_point() else t)


def _matched(data: Any, names: Sequence[str]) -> Any:  # noqa: ANN401
    """Data whose first argument has these columns; what is no table of them is for others."""
    if data is None or isinstance(data, Arguments):
        return data
    if isinstance(data, tuple):
        return (_matched(data[0], names), *data[1:]) if data else data
    if isinstance(data, Mapping):
        first = next(iter(data.values()), None)
        if column_names(first) is None:  # as of ``{"size": 5}``
            return data
        return {**data, next(iter(data)): match_columns(first, names)}
    return match_columns(data, names)


def datum_plate(pair: Pair) -> str | None:
    """The plate whose elements are the data; ``None`` where the data are one datum.

    Of the plates that all observed sites stand in, the one over the first axis of the data; if
    there is none, that of the local latents, or else the outermost.
    """
    if found := pair.rows_plate() or pair.local_plate():
        return found
    stacks = [pair.plates[site] for site in pair.observed]
    common = (plate for plate in stacks[0] if all(plate in s for s in stacks)) if stacks else ()
    return next((name for name, _, _ in common), None)


def is_local(pair: Pair, site: str, plate: str | None) -> bool:
    """Whether each datum, an element of the plate, has its own value of a site."""
    return plate in {name for name, _, _ in pair.plates.get(site, ())}


def draw_labels(pair: Pair, draws: Draws) -> dict[str, Tensor]:
    """Discrete latents from their exact conditional, given the data and the continuous ones.

    Arguments:
        pair: the pair, entered, with its data.
        draws: draws of the continuous latents.

    Returns:
        Site -> values (S, 1, ..., batch), to go through the model again.
    """
    if pair.vectorised:
        parts = [_labels(pair, part.values, len(part)) for part in chunks(pair, draws)]
    else:
        parts = [_labels(pair, _single(pair, draws, s), None) for s in range(len(draws))]
    return {name: torch.cat([part[name] for part in parts]) for name in pair.summed_out}


def shared(pair: Pair, draws: Draws, plate: str | None) -> Draws:
    """Draws of the global latents that have the same shape in the data of ``pair``.

    Arguments:
        pair: the pair, entered, with new data.
        draws: draws of all latents, for the data that were fitted.
        plate: that of the data, see :func:`datum_plate`.

    Raises:
        ValueError: if the model does not observe there what it observed in the fit.
    """
    with objectives.Substitute({}) as record, poutine.uncondition():
        pair.data.call(pair.model)
    if absent := [site for site in pair.observed if site not in record.values]:
        raise ValueError(
            f"data: the model observed {', '.join(map(repr, absent))} in the fit, but not here; "
            "give data of the structure that was fitted"
        )
    kept = {
        name: value
        for name, value in draws.values.items()
        if name in record.values
        and tuple(record.values[name].shape) == pair.shapes[name]
        and not is_local(pair, name, plate)
    }
    return replace(draws, values=kept)


def replicate(pair: Pair, draws: Draws) -> dict[str, Tensor]:
    """Observed sites drawn anew, given latents; latents not given are drawn, too.

    Arguments:
        pair: the pair, entered; the values of its observed sites do not count.
        draws: draws of the latents.

    Returns:
        Site -> new draws (S, ...).
    """
    if pair.vectorised:
        parts = [_replicates(pair, part.values, len(part)) for part in chunks(pair, draws)]
    else:
        parts = [_replicates(pair, _single(pair, draws, s), None) for s in range(len(draws))]
    return {name: torch.cat([part[name] for part in parts]) for name in pair.observed}


def log_density(pair: Pair, draws: Draws, plate: str | None) -> tuple[Tensor, Tensor | None]:
    """Log-density of each datum at each draw (S, N); N is 1 where the data are one datum.

    Of a datum that counts w times it is that of the datum once: the log of a mean over draws of
    its w-th power is not w times that log.

    Arguments:
        pair: the pair, entered, with the data.
        draws: draws of the latents; those not given are drawn from the model.
        plate: that of the data, see :func:`datum_plate`.

    Returns:
        The log-densities, and how often each datum counts, shape (N,), ``None`` where all count
        once.
    """
    found = torch.cat([_log_density(pair, part, plate) for part in chunks(pair, draws)])
    counts = _counts(pair, draws, plate)
    if counts is None or len(counts) != found.shape[1]:
        return found, None
    return torch.where(counts > 0, found / torch.where(counts > 0, counts, 1.0), 0.0), counts


def mean_density(found: Tensor, counts: Tensor | None = None) -> Estimate:
    """Log predictive density of all data, from :func:`log_density`; each of them must have one."""
    if bool((lost := found.isnan().any(0)).any()):
        n = int(lost.nonzero()[0])
        raise ValueError(
            f"log_prob: the log-density of datum {n} is nan: its numbers are too far from those "
            "of the fit to be computed with; look at it, and at its units"
        )
    return log_mean_exp(found, counts=counts)


def _counts(pair: Pair, draws: Draws, plate: str | None) -> Tensor | None:
    """How often the model counts each datum (N,), where all its observed sites agree on that."""
    with objectives.Substitute(_single(pair, draws, 0)):
        nodes = poutine.trace(pair.model).get_trace(*pair.data.args, **pair.data.kwargs).nodes
    found = []
    for site in pair.observed:
        dims = {name: dim for name, _, dim in pair.plates[site]}
        scale = nodes[site]["scale"]
        if plate not in dims or not isinstance(scale, Tensor):
            return None
        dim = dims[plate]
        if scale.dim() < -dim or scale.numel() != scale.shape[dim]:
            return None
        found.append(scale.reshape(-1))
    agree = found and all(torch.equal(one, found[0]) for one in found)
    return found[0].double() if agree and bool((found[0] != 1).any()) else None


def _log_density(pair: Pair, draws: Draws, plate: str | None) -> Tensor:
    if pair.vectorised:  # latents that are not given need a draw for every particle
        with objectives.particles(len(draws), pair):
            found = objectives.site_log_probs(pair, draws)
    else:
        found = objectives.site_log_probs(pair, draws)
    num_samples = len(draws)
    by_datum: list[Tensor] = []
    others: list[Tensor] = []
    for site in pair.observed:
        if site not in found:  # summed out together with another one
            continue
        value = found[site]
        value = value.reshape((1,) * (pair.nesting + 1 - value.dim()) + tuple(value.shape))
        value = value.expand(num_samples, *value.shape[1:])
        dims = {name: dim for name, _, dim in pair.plates[site]}
        if plate in dims:
            value = value.movedim(dims[plate], 1)
            by_datum.append(value.reshape(*value.shape[:2], -1).sum(-1))
        else:
            others.append(value.reshape(num_samples, -1).sum(-1, keepdim=True))
    columns = [sum(parts[1:], parts[0]) for parts in (by_datum, others) if parts]
    return torch.cat(columns, 1) if columns else torch.zeros(num_samples, 1)


def _single(pair: Pair, draws: Draws, s: int) -> dict[str, Tensor]:
    """The values of one draw, without the dimensions that only many need."""
    return {
        name: value[s].reshape(pair.shapes.get(name, value.shape[1:]))
        for name, value in draws.values.items()
    }


def _replicates(
    pair: Pair, values: Mapping[str, Tensor], num_samples: int | None
) -> dict[str, Tensor]:
    """One pass of the model, for many draws at once or, without their number, for one."""
    with _batch_of(pair, num_samples), objectives.Substitute(values) as record:
        with poutine.uncondition():
            pair.data.call(pair.model)
    drawn = {}
    for name in pair.observed:
        value = record.values[name]
        shape = value.shape[value.dim() - len(pair.shapes[name]) :]
        drawn[name] = value.reshape(num_samples or 1, *shape)
    return drawn


def _labels(
    pair: Pair, values: Mapping[str, Tensor], num_samples: int | None
) -> dict[str, Tensor]:
    """As :func:`_replicates`, for the discrete latents given the data."""

    def labelled() -> None:
        with _batch_of(pair, num_samples), objectives.Substitute(values, pair.summed_out):
            pair.data.call(pair.model)

    first_dim = -1 - pair.nesting - (num_samples is not None)
    sampled = infer_discrete(labelled, first_available_dim=first_dim, temperature=1)
    trace = poutine.trace(sampled).get_trace()
    found = {name: trace.nodes[name]["value"] for name in pair.summed_out}
    if num_samples is None:
        return {name: value[None] for name, value in found.items()}
    return {name: value.expand(num_samples, *value.shape[1:]) for name, value in found.items()}


def _batch_of(pair: Pair, num_samples: int | None) -> AbstractContextManager:
    return objectives.particles(num_samples, pair) if num_samples else nullcontext()
