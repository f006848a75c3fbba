r"""Some rows of the data, in the place of all of them.

Where all latents of a pair are local to the rows, and the guide computes those of a row from that
row, what a pair says of some rows is a sample of what it says of all N,

.. math:: \mathrm{ELBO} = \sum_n \mathrm{ELBO}_n
          \approx \frac{N}{M} \sum_{m=1}^M \mathrm{ELBO}_{n_m},

with the standard error of a mean over M rows. So is a pair judged whose data are too many to be
looked at again and again; and so are rows kept aside that it was not fitted to.

Letters: N rows, M of them, P particles.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from latentlab.diagnostics import Estimate
from latentlab.guides import Draws
from latentlab.inference import objectives, predictive
from latentlab.inference.batches import chosen, follows_rows, num_rows, take
from latentlab.inference.check import learn
from latentlab.inference.evaluation import particle_chunk
from latentlab.inference.pair import Arguments, Pair

__all__ = [
    "DRAWS_OF_ROWS",
    "RowTerms",
    "density_of_rows",
    "elbo_of_rows",
    "fewer",
    "looked_at",
    "looks_by_row",
    "on_rows",
    "over_rows",
    "row_terms",
]


_FEWEST, _MOST = 1_000, 50_000  # rows of large data that a figure rests on
_WORK = 2**32  # parameters times rows times draws that a figure may cost
DRAWS_OF_ROWS = 10
"""Draws for each of them, where the rows are the larger part of the error."""


class RowTerms(NamedTuple):
    """Of each draw and row: log p(x | z) and log q(z) - log p(z), shapes (P, M), in nats."""

    log_lik: Tensor
    kl: Tensor


def looks_by_row(pair: Pair) -> bool:
    """Whether figures of a pair rest on each row by itself: many rows, each with its latents."""
    return follows_rows(pair) and (num_rows(pair.data) or 0) > _FEWEST


def looked_at(pair: Pair, seed: int) -> Pair:
    """The pair at so many of its rows as a figure with ``DRAWS_OF_ROWS`` draws may rest on.

    Arguments:
        pair: a pair that follows its rows, entered.
        seed: of the choice.
    """
    size = sum(p.numel() for p in pair.parameters().values()) + 1
    numbers = sum(t.numel() for t in pair.data.tensors()) // (num_rows(pair.data) or 1) + 1
    count = _WORK // ((size + numbers) * DRAWS_OF_ROWS)
    return fewer(pair, max(_FEWEST, min(_MOST, count)), seed)


def on_rows(pair: Pair, data: Arguments) -> Pair:
    """The pair at other rows, its parameters shared; call it with the pair entered.

    Arguments:
        pair: a pair that follows its rows.
        data: the rows.
    """
    other = replace(pair, data=data)
    with torch.no_grad():
        learn(other)
    return other


def fewer(pair: Pair, count: int, seed: int) -> Pair:
    """The pair at ``count`` of its rows, as :func:`on_rows`; itself where it has no more."""
    total = num_rows(pair.data)
    if total is None or total <= count:
        return pair
    return on_rows(pair, take(pair.data, chosen(count, total, seed)))


def row_terms(pair: Pair, num_particles: int) -> RowTerms:
    """What each row adds to the ELBO, at new draws of the guide.

    Arguments:
        pair: a pair that follows its rows, entered.
        num_particles: number of draws P.
    """
    plate = predictive.datum_plate(pair)
    size = particle_chunk(pair, num_particles)
    parts = []
    for start in range(0, num_particles, size):
        num = min(size, num_particles - start)
        with objectives.particles(num, pair), objectives.Record({}) as q:
            if pair.latents:
                pair.data.call(pair.guide)
        draws = Draws(q.values, torch.zeros(num))
        log_p = objectives.site_log_probs(pair, draws)
        zero = torch.zeros(num, 1, device=next(iter(log_p.values())).device)

        def by_row(site: str, log_prob: Tensor, num: int = num) -> Tensor:
            return objectives.by_row(pair, site, log_prob, plate, num)

        log_lik = sum((by_row(s, log_p[s]) for s in pair.observed), zero)
        kl = sum((by_row(s, value) for s, value in q.log_prob.items()), zero)
        kl = kl - sum((by_row(z.name, log_p[z.name]) for z in pair.latents), 0)
        parts.append(RowTerms(log_lik, kl.expand_as(log_lik)))
    return RowTerms(*(torch.cat(terms) for terms in zip(*parts, strict=True)))


def density_of_rows(pair: Pair, data: Arguments, num_particles: int) -> Tensor:
    """Log importance weights (P, M) of each of some rows, whose mean is its density."""
    terms = row_terms(on_rows(pair, data), num_particles)
    return terms.log_lik - terms.kl


def elbo_of_rows(pair: Pair, total: int, num_particles: int) -> Estimate:
    """The ELBO in nats of ``total`` rows, from those that the pair is at, with its error.

    Arguments:
        pair: a pair that follows its rows, entered.
        total: number of rows N that its M rows stand for.
        num_particles: draws P for each row.
    """
    with torch.no_grad():
        terms = row_terms(pair, num_particles)
    return over_rows(terms.log_lik - terms.kl, total)


def over_rows(values: Tensor, total: int) -> Estimate:
    """The sum over ``total`` rows of a figure that is known, with noise, of some of them.

    Arguments:
        values: shape (P, M), P noisy values of each of M rows.
        total: number of rows N.
    """
    values = values.double()
    mean, num = values.mean(0), values.shape[1]
    noise = values.var(0).mean() / len(values) if len(values) > 1 else values.new_zeros(())
    # What the draws add is in the variance between rows, too. What the rows add to the error
    # shrinks with the share of them that was looked at.
    between = (mean.var() - noise).clamp_min(0.0) if num > 1 else values.new_zeros(())
    se = math.sqrt(float(between * (1 - num / total) + noise) / num)
    return Estimate(total * float(mean.mean()), total * se)
