"""Latents given the fit, at data that are its own or new ones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentlab.data.checks import as_count
from latentlab.guides import Draws
from latentlab.inference import objectives, predictive
from latentlab.inference.batches import follows_rows
from latentlab.inference.evaluation import particle_chunk
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.rows import density_of_rows

if TYPE_CHECKING:
    from latentlab.inference.posterior import Posterior

__all__ = ["density", "given", "sampled", "weighted"]


def given(
    posterior: Posterior, num_samples: int, arguments: Arguments, own: bool | None = None
) -> tuple[Pair, Draws]:
    """The pair at some data, and draws of the latents that these share with the fit; call entered.

    Arguments:
        posterior: the posterior.
        num_samples: number of draws.
        arguments: the data.
        own: whether these are the data that were fitted; found out where it is not said.
    """
    if own is None:
        from latentlab.inference.checkpoint import fingerprint

        same = arguments is posterior.pair.data
        own = same or fingerprint(arguments) == posterior.fitted_to
    plate = posterior._plate
    pair = replace(posterior.pair, data=arguments) if own else posterior.pair
    if posterior.reads_data and not own:  # draws given placeholders: none of them may be kept
        names = [z.name for z in pair.latents]
        if not all(predictive.is_local(pair, name, plate) for name in names):
            posterior._need_data("latents")
    draws = objectives.draw(pair, num_samples)
    local = (z for z in pair.summed_out if predictive.is_local(pair, z, plate))
    anew = () if own else tuple(local)
    if len(anew) < len(pair.summed_out):
        if not own:
            posterior._need_data("discrete latents")
        fitted = replace(pair, data=arguments) if own else pair
        labels = predictive.draw_labels(fitted, draws)
        draws = replace(draws, values=draws.values | labels)
    pair = replace(pair, data=arguments, summed_out=anew)
    return pair, draws if own else predictive.shared(pair, draws, plate)


def density(
    posterior: Posterior, arguments: Arguments, num_samples: int
) -> tuple[Tensor, Tensor | None]:
    """Log-density of each datum at each draw, see ``predictive.log_density``; call entered.

    Arguments:
        posterior: the posterior.
        arguments: the data.
        num_samples: number of draws.
    """
    if posterior.pair.latents and follows_rows(posterior.pair):
        return density_of_rows(posterior.pair, arguments, num_samples), None
    pair, draws = given(posterior, num_samples, arguments, own=False)
    return predictive.log_density(pair, draws, posterior._plate)


def sampled(
    posterior: Posterior, num_samples: int, seed: int | None, discrete: bool = True
) -> dict[str, Tensor]:
    """Draws of the continuous latents, and of the discrete ones if asked for, each (S, ...).

    Arguments:
        posterior: the posterior.
        num_samples: number of draws S.
        seed: by default the fit's.
        discrete: whether those that are summed out are drawn, too.
    """
    num_samples, pair = as_count(num_samples, "num_samples"), posterior.pair
    if posterior.reads_data:
        posterior._need_data("latents")
    names = [z.name for z in pair.latents]
    with torch.no_grad(), posterior._entered("sample", seed):
        draws = objectives.draw(pair, num_samples)
        values = dict(draws.values)
        if discrete and pair.summed_out:
            posterior._need_data("discrete latents")
            values |= predictive.draw_labels(pair, draws)
            names += pair.summed_out
    shapes = pair.shapes
    return {name: values[name].reshape(num_samples, *shapes[name]).clone() for name in names}


def weighted(
    posterior: Posterior, num_samples: int, seed: int | None, keep: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Draws of the continuous latents, site -> (S, ...), if kept; their log weights (S,).

    Arguments:
        posterior: the posterior.
        num_samples: number of draws S.
        seed: by default the fit's.
        keep: whether the draws are kept.
    """
    posterior._need_data("log_weights")
    pair, num_samples = posterior.pair, as_count(num_samples, "num_samples")
    chunk = particle_chunk(pair, num_samples, summed=True)
    shapes = {z.name: z.shape for z in pair.latents if keep}
    values: dict[str, list[Tensor]] = {name: [] for name in shapes}
    weights = []
    with torch.no_grad(), posterior._entered("log_weights", seed):
        for start in range(0, num_samples, chunk):
            draws = objectives.draw(pair, min(chunk, num_samples - start))
            weights.append(objectives.log_joint(pair, draws) - draws.log_q)
            for name, parts in values.items():
                parts.append(draws.values[name])
    kept = {k: torch.cat(v).reshape(num_samples, *shapes[k]) for k, v in values.items()}
    return kept, torch.cat(weights)
