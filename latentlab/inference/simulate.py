r"""Data that a model says: its latents drawn from the prior, and its observed sites given them.

.. math:: \theta_m \sim p(\theta), \qquad y_m \sim p(y \mid \theta_m)

Data that the model only reads, covariates, stay as they are.

Letters: M simulations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyro.poutine as poutine
import torch
from torch import Tensor

from latentlab.guides import Draws
from latentlab.inference import objectives, predictive
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.sandbox import manual_seed

__all__ = ["Simulations", "prior_draws", "simulate"]


@dataclass(frozen=True)
class Simulations:
    """M data sets and what they were drawn with.

    Arguments:
        truth: site -> value of each latent, shape (M, ...); labels that are summed out left out.
        observed: place among the tensors of the data -> that tensor of each simulation, (M, ...).
        data: the data that they are like.
    """

    truth: Mapping[str, Tensor]
    observed: Mapping[int, Tensor]
    data: Arguments

    def __len__(self) -> int:
        return len(next(iter(self.observed.values())))

    def __getitem__(self, m: int) -> Arguments:
        """The data of one simulation."""
        places = iter(range(len(self.data.tensors())))

        def replaced(tensor: Tensor) -> Tensor:
            k = next(places)
            return self.observed[k][m] if k in self.observed else tensor

        return self.data.map(replaced)


def simulate(
    pair: Pair, num_simulations: int, seed: int, latents: Mapping[str, Tensor] | None = None
) -> Simulations:
    """Draw data sets like those of a pair.

    Arguments:
        pair: the pair, entered.
        num_simulations: number M of data sets.
        seed: of all draws.
        latents: site -> values (M, ...) to draw the data with; by default draws of the prior.

    Raises:
        ValueError: if an observed site is not one of the tensors of the data, so that nobody can
            tell where its draws would go.
    """
    manual_seed(seed)
    places = _places(pair)
    if not places:
        raise ValueError("model: it observes nothing (pyro.sample(..., obs=)) to be simulated")
    with torch.no_grad():
        truth = prior_draws(pair, num_simulations) if latents is None else dict(latents)
        batches = {
            z.name: truth[z.name].reshape(
                num_simulations,
                *(1,) * (pair.nesting - len(z.batch_shape)),
                *z.shape,
            )
            for z in pair.latents
        }
        # Labels are drawn with the data: they belong to them.
        draws = Draws(batches, torch.zeros(num_simulations))
        drawn = predictive.replicate(replace(pair, summed_out=()), draws)
    found = {
        k: _as(drawn[site].reshape(num_simulations, *like.shape), like)
        for site, (k, like) in places.items()
    }
    return Simulations(truth, found, pair.data)


def _as(drawn: Tensor, like: Tensor) -> Tensor:
    """Draws in the type of the data; whole numbers may have been given for what is none."""
    whole = not like.is_floating_point() and bool((drawn == drawn.round()).all())
    return drawn.to(like.dtype) if whole or like.is_floating_point() else drawn


def prior_draws(pair: Pair, num_draws: int) -> dict[str, Tensor]:
    """Draws of the latents from the prior (S, ...), the observed sites left as they are.

    Arguments:
        pair: the pair, entered.
        num_draws: number of draws S.
    """
    with torch.no_grad():
        if pair.vectorised:
            with objectives.particles(num_draws, pair), objectives.Substitute({}) as record:
                pair.data.call(pair.model)
            found = record.values
            return {
                z.name: found[z.name].reshape(-1, *z.shape).expand(num_draws, *z.shape)
                for z in pair.latents
            }
        singles = []
        for _ in range(num_draws):
            with objectives.Substitute({}) as record:
                pair.data.call(pair.model)
            singles.append(record.values)
        return {z.name: torch.stack([s[z.name] for s in singles]) for z in pair.latents}


def _places(pair: Pair) -> dict[str, tuple[int, Tensor]]:
    """Observed site -> which tensor of the data holds its values, and that tensor."""
    tensors = pair.data.tensors()
    with torch.no_grad():
        nodes = poutine.trace(pair.model).get_trace(*pair.data.args, **pair.data.kwargs).nodes
    found: dict[str, tuple[int, Tensor]] = {}
    for site in pair.observed:
        if not bool((torch.as_tensor(nodes[site]["scale"]) == 1).all()):
            raise ValueError(
                f"data: rows of site {site!r} count more or less than once, and a row that is "
                "simulated once is no row twice; leave the weights out, or repeat the rows"
            )
        value = torch.as_tensor(nodes[site]["value"])
        for k, tensor in enumerate(tensors):
            if k in {place for place, _ in found.values()} or tensor.numel() != value.numel():
                continue
            same = value is tensor or torch.equal(
                value.reshape(-1).to(tensor.dtype), tensor.reshape(-1)
            )
            if same:
                found[site] = (k, tensor)
                break
        else:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "none"
            raise ValueError(
                f"data: site {site!r} observes values of shape {tuple(value.shape)} that are none "
                f"of the data's tensors ({shapes}), so that simulated ones cannot take their "
                "place; observe an argument of the model as it is, without missing cells"
            )
    return found
