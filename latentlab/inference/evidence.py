r"""The evidence on a posterior: every figure that the verdict rests on, with its error.

k-hat is taken over all latents at once first. Where that is good, all of them are; where it is
not, and some latents are local to the rows, the blocks tell which: the global latents with the
local ones integrated out,

.. math:: w_s = \frac{p(\theta_s)}{q(\theta_s)} \prod_n \frac{1}{M} \sum_m
          \frac{p(x_n, z_{nm} \mid \theta_s)}{q(z_{nm})},

and each datum's local latents on their own. A thousand latents that are each ten percent too
narrow are each fine, and together look hopeless.

Letters: S draws, N data, M inner draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro.poutine as poutine
import torch
from torch import Tensor

from latentlab.data.checks import as_count
from latentlab.diagnostics import (
    Estimate,
    KhatTable,
    MomentErrors,
    Psis,
    khat_per_column,
    kl_from_draws,
    moment_errors,
    psis,
)
from latentlab.guides import Draws, DrawsRows, Flow, FullRank, Guide
from latentlab.inference import objectives
from latentlab.inference.evaluation import chunks, particle_chunk
from latentlab.inference.figures import by_kind
from latentlab.inference.given import weighted
from latentlab.inference.unseen import unseen_values
from latentlab.protocols import Describes, owner_of

if TYPE_CHECKING:
    from latentlab.inference.held_out import HeldOut
    from latentlab.inference.posterior import Posterior
    from latentlab.inference.restarts import Restarts

__all__ = ["Block", "Evidence", "gather", "tail_khat"]

_DRAWS = 10_000
_FEWEST_DRAWS = 1_000
_ELEMENTS = 2**31  # numbers through the model for one k-hat
_DEEP = 80  # weights in a tail of which half still makes a tail
_EQUAL = 0.01  # nats by which weights may differ and count as equal
_RELIABLE = 0.7  # k-hat up to which weights are believed
_KEPT = 2**25  # numbers of draws in memory
_OUTER, _INNER = 1_000, 64


@dataclass(frozen=True)
class Block:
    """k-hat of a block of latents: one figure, or one for each datum."""

    name: str
    result: Psis | KhatTable

    @property
    def khat(self) -> float:
        """The figure, or the worst of them."""
        return float(self.result.khat if isinstance(self.result, Psis) else max(self.result.khat))

    @property
    def se(self) -> float:
        """Standard error of that figure."""
        if isinstance(self.result, Psis):
            return float(self.result.se)
        return float(self.result.se[int(torch.as_tensor(self.result.khat).argmax())])

    @property
    def share_bad(self) -> float | None:
        """Share of the data above 0.7; ``None`` for a single figure."""
        if isinstance(self.result, Psis):
            return None
        return len(self.result.bad) / len(self.result.khat)

    @property
    def is_surely_bad(self) -> bool:
        """Whether a datum is above 0.7 by more than its error."""
        lower = torch.as_tensor(self.result.khat - 2 * self.result.se)
        return bool((lower > _RELIABLE).any())


@dataclass(frozen=True)
class Moments:
    """What the importance weights say of the guide's means and standard deviations."""

    names: tuple[str, ...]
    errors: MomentErrors

    @property
    def shift(self) -> tuple[str, Estimate]:
        """The figure whose mean is off most, and by how many standard deviations."""
        f, shift = self.errors.worst_shift
        return self.names[f], shift

    @property
    def ratio(self) -> tuple[str, Estimate]:
        """The figure whose standard deviation is off most, and by what factor."""
        f, ratio = self.errors.worst_ratio
        return self.names[f], ratio


@dataclass(frozen=True)
class Evidence:
    """All figures; :func:`latentlab.inference.verdict.decide` reads them."""

    converged: bool
    stop_reason: str
    is_point: bool
    is_full_rank: bool
    blocks: tuple[Block, ...]
    moments: Moments | None
    elbo: Estimate
    recorded_elbo: Estimate
    other_data: bool
    restarts: Restarts
    kl: Mapping[str, Estimate]
    switched: Estimate | None
    remarks: tuple[str, ...]
    is_flow: bool = False
    has_latents: bool = True
    is_amortised: bool = False
    held_out: HeldOut | None = None
    ladder: tuple[str, ...] = ()
    unseen: Mapping[str, float] = field(default_factory=dict)

    def as_text(self) -> dict[str, str]:
        """Name -> figure with its error."""
        text = {"stop": self.stop_reason}
        text |= {f"rung {i}": rung for i, rung in enumerate(self.ladder, 1)}
        text |= {f"k-hat, {block.name}": str(block.result) for block in self.blocks}
        if self.moments is not None:
            text |= {"error of means": "at most {1} sd ({0})".format(*self.moments.shift)}
            text |= {"error of sds": "at most a factor {1} ({0})".format(*self.moments.ratio)}
        if self.held_out is not None:
            text |= self.held_out.as_text()
        text |= {"ELBO": f"{self.elbo} nats", "starts": str(self.restarts)}
        text |= {f"KL to prior, {site}": f"{kl} nats" for site, kl in self.kl.items()}
        for site, odds in self.unseen.items():
            text[f"never drawn, {site}"] = f"log odds {odds:.1f} at most"
        if self.switched is not None:
            text["draws with switched labels"] = str(self.switched)
        return text


def gather(posterior: Posterior, num_samples: int | None, seed: int | None) -> Evidence:
    """Measure everything the rules ask for.

    Arguments:
        posterior: a posterior with its data.
        num_samples: draws S behind each k-hat; by default 10,000, fewer for large data.
        seed: of the draws, by default the fit's.
    """
    from latentlab.inference.checkpoint import fingerprint

    pair = posterior.pair
    is_point = pair.is_point()
    size = sum(t.numel() for t in pair.data.tensors()) + 1
    affordable = max(_FEWEST_DRAWS, min(_DRAWS, _ELEMENTS // size // 100))
    if num_samples is None:
        num_samples = affordable if pair.vectorised else _FEWEST_DRAWS
    num_samples = as_count(num_samples, "num_samples", minimum=25)
    num_figures = sum(math.prod(z.shape) for z in pair.latents)
    keep = not is_point and num_samples * num_figures <= _KEPT
    draws, log_weights = weighted(posterior, 2 if is_point else num_samples, seed, keep)
    parts = _own_parts(posterior)
    blocks = () if is_point or parts else _blocks(posterior, log_weights, seed)
    owner = owner_of(pair.model)
    aligned = posterior._aligned(1000, seed) if pair.latents else None
    own: Iterable[str] = ()
    if isinstance(owner, Describes) and aligned is not None:
        own = owner.remarks(aligned.draws, *pair.data.args)
    return Evidence(
        converged=posterior.converged,
        stop_reason=posterior.stop_reason,
        is_point=is_point,
        is_full_rank=isinstance(pair.guide, FullRank),
        has_latents=bool(pair.latents or pair.summed_out),
        held_out=posterior.held_out_rows,
        is_flow=isinstance(pair.guide, Flow),
        ladder=tuple(map(str, posterior.ladder)),
        blocks=blocks,
        moments=_moments(draws, blocks, {z.name: z.support for z in pair.latents}),
        elbo=posterior.elbo if parts else Estimate.from_draws(log_weights),
        recorded_elbo=posterior.elbo,
        other_data=bool(posterior.fitted_to) and fingerprint(pair.data) != posterior.fitted_to,
        restarts=posterior.restarts,
        kl={} if is_point else _kl_to_prior(posterior, seed),
        switched=aligned.switched if aligned is not None and posterior._axes else None,
        remarks=(*parts, *own),
        unseen=_unseen(posterior, seed),
    )


def _unseen(posterior: Posterior, seed: int | None) -> dict[str, float]:
    if not any(latent.is_discrete for latent in posterior.pair.latents):
        return {}
    with posterior._entered("unseen", seed):
        return unseen_values(posterior.pair)


def _own_parts(posterior: Posterior) -> tuple[str, ...]:
    """Remarks on plates that look at other rows in each run: no weights are of all rows."""
    pair = posterior.pair
    with torch.no_grad(), posterior._entered("parts", None):
        nodes = poutine.trace(pair.model).get_trace(*pair.data.args, **pair.data.kwargs).nodes
    plates = {
        frame.name: (frame.size, frame.full_size)
        for site in pair.observed
        for frame in nodes[site]["cond_indep_stack"]
        if frame.full_size not in (None, frame.size)
    }
    return tuple(
        f"plate {name!r} looks at other {size} of {total} rows in each run, so that no k-hat "
        "speaks for all of them; write rows(x, size), and fit with batch_size="
        for name, (size, total) in plates.items()
    )


def _moments(
    draws: Mapping[str, Tensor], blocks: tuple[Block, ...], supports: Mapping[str, Any]
) -> Moments | None:
    """Errors of every figure, where one set of weights speaks for all latents and is reliable."""
    results = [block.result for block in blocks]
    if not draws or len(results) != 1 or not isinstance(results[0], Psis):
        return None
    if results[0].khat > _RELIABLE:
        return None
    names: list[str] = []
    parts: list[Tensor] = []
    for site, value in draws.items():
        labels = [
            f"{site}[{', '.join(map(str, index))}]" if index else site
            for index in np.ndindex(*value.shape[1:])
        ]
        labels, flat = by_kind(labels, value, supports[site])
        names, parts = [*names, *labels], [*parts, flat]
    flat = torch.cat(parts, -1)
    return Moments(tuple(names), moment_errors(flat, results[0].log_weights))


def _blocks(posterior: Posterior, log_weights: Tensor, seed: int | None) -> tuple[Block, ...]:
    bad = ~torch.isfinite(log_weights) & (log_weights != -math.inf)
    if bad.any() or (log_weights == -math.inf).all():
        return ()  # the rule on the ELBO names it
    joint = Block("all latents", tail_khat(log_weights))
    pair = posterior.pair
    splits = isinstance(pair.guide, DrawsRows) or not isinstance(pair.guide, Guide)
    local = pair.local_plate() is not None and pair.vectorised and not pair.summed_out
    if joint.khat <= _RELIABLE or not (splits and local):
        return (joint,)
    return _local_blocks(posterior, seed)


def tail_khat(log_weights: Tensor) -> Psis:
    """K-hat, from deeper in the tail where only that is one.

    Weights with a local maximum, as those of a skewed latent have, pile up at the edge of the tail
    and look like a heavy one. The k of a tail that is heavy stays the same further out.

    Arguments:
        log_weights: shape (S,).
    """
    found = psis(log_weights, tolerance=_EQUAL)
    if found.khat > _RELIABLE and found.tail_size >= _DEEP:
        deep = psis(log_weights, found.tail_size // 2)
        if found.khat - deep.khat > 3 * math.hypot(found.se, deep.se):
            return deep
    return found


def _local_blocks(posterior: Posterior, seed: int | None) -> tuple[Block, ...]:
    """Global latents with the local ones integrated out, and each datum on its own."""
    pair = posterior.pair
    plate = pair.local_plate()
    outer_weights = []
    chunk = max(1, particle_chunk(pair, _OUTER * _INNER) // _INNER)
    has_global = any(not pair.is_local(z.name) for z in pair.latents)
    with torch.no_grad(), posterior._entered("blocks", seed):
        # One draw of the global latents, many of the local ones: each datum's own k-hat.
        values, log_q = _nested(posterior, 1, _OUTER)
        local = _by_datum(posterior, values, log_q, plate)[1]
        blocks = [Block(f"each datum's latents ({plate})", khat_per_column(local, _EQUAL))]
        if has_global:
            for start in range(0, _OUTER, chunk):
                outer = min(chunk, _OUTER - start)
                values, log_q = _nested(posterior, outer, _INNER)
                rest, per_datum = _by_datum(posterior, values, log_q, plate)
                inner_means = per_datum.reshape(outer, _INNER, -1).logsumexp(1) - math.log(_INNER)
                outer_weights.append(rest.reshape(outer, _INNER)[:, 0] + inner_means.sum(-1))
            blocks.insert(
                0, Block("global latents", psis(torch.cat(outer_weights), tolerance=_EQUAL))
            )
    return tuple(blocks)


def _nested(
    posterior: Posterior, outer: int, inner: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``outer`` draws of the global latents, each with ``inner`` draws of the local ones."""
    pair = posterior.pair
    drawn = objectives.draw(pair, outer).values
    kept = {
        name: value.repeat_interleave(inner, 0)
        for name, value in drawn.items()
        if not pair.is_local(name) and isinstance(value, Tensor)
    }
    if isinstance(pair.guide, DrawsRows):
        values = pair.guide.draw_local(outer * inner, kept, pair.data).values
        return values, pair.guide.element_log_prob(values, pair.data)
    with objectives.particles(outer * inner, pair), objectives.Record(kept) as record:
        pair.data.call(pair.guide)
    return record.values, record.log_prob


def _by_datum(
    posterior: Posterior, values: dict[str, Tensor], log_q: dict[str, Tensor], plate: str | None
) -> tuple[Tensor, Tensor]:
    """Sum of log p - log q outside of the plate (S,), and for each of its elements (S, N)."""
    pair = posterior.pair
    num = len(next(iter(values.values())))
    log_p = objectives.site_log_probs(pair, Draws(values, torch.zeros(num)))
    rest, local = torch.zeros(num), torch.zeros(())
    for sign, parts in ((1.0, log_p), (-1.0, log_q)):
        for site, part in parts.items():
            dims = {name: dim for name, _, dim in pair.plates.get(site, ())}
            if part.dim() <= pair.nesting:  # the same for all draws
                part = part.reshape(*(1,) * (pair.nesting + 1 - part.dim()), *part.shape)
            part = part.expand(num, *part.shape[1:])
            if plate is None or plate not in dims:
                rest = rest + sign * part.flatten(1).sum(-1)
            else:
                moved = part.movedim(dims[plate], 1)
                local = local + sign * moved.reshape(*moved.shape[:2], -1).sum(-1)
    return rest, local


def _kl_to_prior(posterior: Posterior, seed: int | None) -> dict[str, Estimate]:
    """KL of each site from its prior given its parents, by draws of the guide, in nats."""
    pair = posterior.pair
    with torch.no_grad(), posterior._entered("kl", seed):
        draws = objectives.draw(pair, 1000 if pair.vectorised else 200)
        num = len(draws)
        parts = [(objectives.site_log_probs(pair, d), len(d)) for d in chunks(pair, draws)]
        if isinstance(pair.guide, Guide):
            log_q = pair.guide.site_log_prob(draws.values, pair.data)
        else:
            with (
                objectives.Record(
                    {k: v for k, v in draws.values.items() if k not in pair.points}
                ) as record,
                objectives.particles(num, pair),
            ):
                if not pair.vectorised:
                    return {}
                pair.data.call(pair.guide)
            log_q = record.log_prob
    found = {}
    for latent in pair.latents:
        free = math.prod(latent.free_shape)  # none in a simplex of one
        scored = latent.name in log_q and all(latent.name in p for p, _ in parts)
        if latent.name in pair.points or not scored or not free:
            continue
        prior = torch.cat([_total(p[latent.name], pair.nesting, size) for p, size in parts])
        own = _total(log_q[latent.name], pair.nesting, num)
        found[latent.name] = kl_from_draws(own, prior)
    return found


def _total(log_prob: Tensor, nesting: int, num: int) -> Tensor:
    if log_prob.dim() == 1 and len(log_prob) == num and nesting > 0:
        return log_prob
    if log_prob.dim() <= nesting:
        return log_prob.sum().expand(num)
    return log_prob.expand(num, *log_prob.shape[1:]).reshape(num, -1).sum(-1)
