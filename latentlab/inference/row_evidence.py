r"""The evidence on a pair whose latents, if it has any, are all local to the rows.

Every figure is then a sum or a share over rows, each judged on its own: of large data some, chosen
by the fit's seed, stand for all. Their k-hats need many draws of every row, and rest on fewer rows
still where the networks are large.

Letters: N rows, M of them, S draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentlab.data.checks import as_count
from latentlab.diagnostics import Estimate, khat_per_column
from latentlab.inference import objectives
from latentlab.inference.batches import num_rows
from latentlab.inference.evidence import Block, Evidence
from latentlab.inference.pair import Pair
from latentlab.inference.rows import (
    DRAWS_OF_ROWS,
    elbo_of_rows,
    fewer,
    looked_at,
    over_rows,
    row_terms,
)
from latentlab.protocols import Describes, owner_of

if TYPE_CHECKING:
    from latentlab.inference.posterior import Posterior

__all__ = ["gather_by_row"]

_DRAWS = 1_000  # behind a k-hat
_FEWEST_ROWS, _MOST_ROWS = 50, 1_000
_WORK = 2**36  # weights of networks times draws times rows


def gather_by_row(posterior: Posterior, num_samples: int | None, seed: int | None) -> Evidence:
    """Measure everything the rules of the verdict ask for; see :func:`evidence.gather`.

    Arguments:
        posterior: a posterior with its data, whose pair is judged by row.
        num_samples: draws S behind each k-hat; by default 1,000.
        seed: of the draws, by default the fit's.
    """
    from latentlab.inference.checkpoint import fingerprint

    pair = posterior.pair
    total = num_rows(pair.data) or 1
    num_samples = as_count(
        _DRAWS if num_samples is None else num_samples, "num_samples", minimum=25
    )
    with torch.no_grad(), posterior._entered("rows", seed):
        some = looked_at(pair, posterior.seed)
        elbo = elbo_of_rows(some, total, DRAWS_OF_ROWS)
        kl: dict[str, Estimate] = {}
        blocks: tuple[Block, ...] = ()
        draws: dict[str, Tensor] = {}
        if pair.latents:
            names = ", ".join(z.name for z in pair.latents)
            kl = {names: over_rows(row_terms(some, DRAWS_OF_ROWS).kl, total)}
            blocks = _blocks(pair, num_samples, posterior.seed)
            values = objectives.draw(some, DRAWS_OF_ROWS).values
            draws = {z.name: values[z.name].reshape(-1, *z.shape) for z in some.latents}
    owner = owner_of(pair.model)
    return Evidence(
        converged=posterior.converged,
        stop_reason=posterior.stop_reason,
        is_point=pair.is_point(),
        is_full_rank=False,
        blocks=blocks,
        moments=None,  # of thousands of figures some are off by chance
        elbo=elbo,
        recorded_elbo=posterior.elbo,
        other_data=bool(posterior.fitted_to) and fingerprint(pair.data) != posterior.fitted_to,
        restarts=posterior.restarts,
        kl=kl,
        switched=None,
        remarks=tuple(owner.remarks(draws, *some.data.args, **some.data.kwargs))
        if isinstance(owner, Describes)
        else (),
        has_latents=bool(pair.latents),
        is_amortised=True,
        held_out=posterior.held_out_rows,
    )


def _blocks(pair: Pair, num_samples: int, seed: int) -> tuple[Block, ...]:
    size = sum(p.numel() for p in pair.parameters().values()) + 1
    count = max(_FEWEST_ROWS, min(_MOST_ROWS, _WORK // (num_samples * size)))
    some = fewer(pair, count, seed)
    terms = row_terms(some, num_samples)
    log_weights = terms.log_lik - terms.kl
    if not log_weights.isfinite().all():
        return ()  # the rule on the ELBO names it
    shown = num_rows(some.data) or 1
    name = f"each datum's latents ({shown} rows)"
    return (Block(name, khat_per_column(log_weights)),)
