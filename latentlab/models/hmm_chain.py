r"""The chain of a hidden Markov model: its free numbers, their prior, and the chain they make.

.. math::
    \pi \sim \mathrm{Dirichlet}(\alpha), \quad A_k \sim \mathrm{Dirichlet}(\alpha + \kappa e_k)

Only moves that there may be are free: of a chain from left to right, each state but the last one
has two, to stay or to go on.

Letters: K states, S draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from latentlab.distributions.factors import Dirichlet, Factor, Sites

__all__ = ["Chain", "stationary"]


@dataclass(frozen=True)
class Chain:
    r"""Which chains there may be.

    Arguments:
        num_states: number of states K.
        is_stationary: whether the first state follows the stationary law of the transitions.
        left_right: whether the chain starts in state 0 and only stays or goes on.
        concentration: :math:`\alpha`.
        stickiness: :math:`\kappa`.
    """

    num_states: int
    is_stationary: bool = False
    left_right: bool = False
    concentration: float = 1.0
    stickiness: float = 0.0

    @property
    def has_initial(self) -> bool:
        """Whether the law of the first state is free."""
        return not (self.is_stationary or self.left_right)

    def draw(self, like: Tensor, states: pyro.plate) -> dict[str, Tensor]:
        """The sites ``initial`` and ``transitions``, from their prior.

        Arguments:
            like: a tensor of the dtype and device.
            states: the plate of the states.
        """
        K, latents = self.num_states, {}
        alpha = like.new_full((K,), self.concentration)
        if self.has_initial:
            latents["initial"] = pyro.sample("initial", dist.Dirichlet(alpha))
        if not self.left_right:
            counts = alpha + self.stickiness * torch.eye(K, dtype=like.dtype, device=like.device)
            with states:
                latents["transitions"] = pyro.sample("transitions", dist.Dirichlet(counts))
        elif K > 1:
            counts = like.new_tensor([self.concentration + self.stickiness, self.concentration])
            with pyro.plate("moves", K - 1):
                latents["transitions"] = pyro.sample("transitions", dist.Dirichlet(counts))
        return latents

    def full(self, latents: Mapping[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """The chain that values of its sites make.

        Arguments:
            latents: site -> value, or draws (S, ...) with ``initial`` (S, 1, K).
            like: a tensor of the dtype and device.

        Returns:
            Initial law (..., K) and transitions (..., K, K), with room for sequences: (S, 1, K)
            and (S, 1, K, K).
        """
        moves = latents.get("transitions", like.new_ones(1, 1))
        if self.left_right and self.num_states > 1:
            stay, move = moves.unbind(-1)
            end = torch.ones_like(stay[..., :1])
            moves = torch.cat([stay, end], -1).diag_embed() + move.diag_embed(1)
        moves = moves.unsqueeze(-3) if moves.dim() > 2 else moves
        if self.has_initial:
            return latents["initial"], moves
        return (self._at_the_left(like) if self.left_right else stationary(moves)), moves

    def allowed(self, device: torch.device) -> Tensor:
        """Which moves there may be, shape (K, K), bool."""
        ones = torch.ones(self.num_states, self.num_states, dtype=torch.bool, device=device)
        return ones.triu() & ones.tril(1) if self.left_right else ones

    def first(self, mean: Tensor, moves: Tensor) -> Tensor:
        """The likeliest law (..., K) of the first state.

        Arguments:
            mean: how often sequences start in each state, shape (..., K), sums to one.
            moves: transitions, shape (..., K, K).
        """
        if self.left_right:
            return self._at_the_left(mean).expand_as(mean)
        return stationary(moves) if self.is_stationary else mean

    def free(self, initial: Tensor, moves: Tensor) -> dict[str, Tensor]:
        """The values of the sites that make a chain; the inverse of :meth:`full`."""
        if self.left_right:
            stay = moves.diagonal()[:-1]
            return {"transitions": torch.stack([stay, 1 - stay], -1)} if len(stay) else {}
        return {"transitions": moves} | ({"initial": initial} if self.has_initial else {})

    def maximise(self, starts: Tensor, moves: Tensor) -> dict[str, Tensor]:
        """The likeliest values of the sites, where the chain is not stationary.

        Arguments:
            starts: how many sequences start in each state, shape (K,).
            moves: how often one goes from row to column, shape (K, K).

        Returns:
            Site -> value, NaN for a state that is never left.
        """
        return self.free(starts / starts.sum(), moves / moves.sum(-1, keepdim=True))

    def priors(self, like: Tensor) -> dict[Sites, Factor]:
        """The priors of the sites, Dirichlet families.

        Arguments:
            like: a tensor of the dtype and device.
        """
        K = self.num_states
        alpha = like.new_full((K,), self.concentration)
        found: dict[Sites, Factor] = {("initial",): Dirichlet(alpha)} if self.has_initial else {}
        if self.left_right:
            alpha = like.new_tensor([self.concentration + self.stickiness, self.concentration])
            return {("transitions",): Dirichlet(alpha.expand(K - 1, 2))} if K > 1 else {}
        eye = torch.eye(K, dtype=like.dtype, device=like.device)
        return found | {("transitions",): Dirichlet(alpha + self.stickiness * eye)}

    def posteriors(self, starts: Tensor, moves: Tensor) -> dict[Sites, Factor]:
        """Those of the sites once the moves were seen; arguments as for :meth:`maximise`."""
        seen = {"initial": starts, "transitions": moves}
        if self.left_right:
            stays = moves.diagonal()[:-1]
            seen["transitions"] = torch.stack([stays, moves.diagonal(1)], -1)
        priors = self.priors(starts).items()
        return {s: Dirichlet(prior.concentration + seen[s[0]]) for s, prior in priors}  # type: ignore[attr-defined]

    def _at_the_left(self, like: Tensor) -> Tensor:
        place = torch.zeros((), dtype=torch.long, device=like.device)
        return one_hot(place, self.num_states).to(like.dtype)


def stationary(transitions: Tensor) -> Tensor:
    """The law (..., K) that transitions (..., K, K) leave as it is.

    Example:
        >>> stationary(torch.tensor([[0.9, 0.1], [0.3, 0.7]]))
        tensor([0.7500, 0.2500])
    """
    K = transitions.shape[-1]
    eye = torch.eye(K, dtype=transitions.dtype, device=transitions.device)
    ones = torch.ones_like(transitions[..., 0])
    return torch.linalg.solve((eye - transitions + 1).mT, ones)
