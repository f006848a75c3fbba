r"""A sequence under a hidden Markov chain, its states summed out.

.. math::
    p(x_{1:T}) = \sum_{z_1, \dots, z_T} \pi_{z_1} \, p(x_1 \mid z_1)
        \prod_{t=2}^T A_{z_{t-1} z_t} \, p(x_t \mid z_t)

A step whose cells are all NaN is missing and tells nothing; of a step with some missing cells, the
others count where the emission can do without them. Steps beyond the length of a sequence do not
exist; draws hold NaN there.

Letters: B sequences, T steps, D features, K states, S draws.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from latentlab.distributions import hmm
from latentlab.distributions.cells import Cells, Parts
from latentlab.distributions.normal_row import NormalRow
from latentlab.distributions.stochastic import expect_probabilities

__all__ = ["HiddenMarkov", "log_likelihoods", "missing_steps"]


class _RealOrMissing(constraints.Constraint):
    """Finite numbers, and NaN for a missing cell or one beyond the end."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        return ~torch.isinf(value).flatten(-2).any(-1)


class HiddenMarkov(TorchDistribution):
    r"""Distribution of a sequence of rows, shape (T, D), whose states form a Markov chain.

    Arguments:
        initial: probabilities of the first state, shape (..., K).
        transitions: probabilities from row i to column j, shape (..., K, K).
        emission: distribution of a row in each state, event shape (D,), batch shape
            (..., T or 1, K), or (K,) where all sequences have the same.
        num_steps: number of steps T.
        lengths: number of steps of each sequence, shape (...,); T by default.
        validate_args: as in ``torch.distributions``.

    Raises:
        ValueError: if the shapes do not agree in K, or a row is no probabilities.

    Example:
        >>> import torch
        >>> from pyro.distributions import Normal
        >>> emission = Normal(torch.tensor([[-1.0], [1.0]]), 1.0).to_event(1)
        >>> initial, stay = torch.tensor([0.5, 0.5]), torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        >>> chain = HiddenMarkov(initial, stay, emission, num_steps=2)
        >>> chain.log_prob(torch.tensor([[-1.0], [torch.nan]]))  # log of a half N(0) + N(2)
        tensor(-1.4852)
        >>> chain.sample((5,)).shape
        torch.Size([5, 2, 1])
    """

    arg_constraints = {
        "initial": constraints.simplex,
        "transitions": constraints.independent(constraints.simplex, 1),
    }
    support = _RealOrMissing()
    initial: Tensor
    transitions: Tensor

    def __init__(
        self,
        initial: Tensor,
        transitions: Tensor,
        emission: Any,  # noqa: ANN401
        num_steps: int,
        lengths: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        K = initial.shape[-1]
        if transitions.shape[-2:] != (K, K) or emission.batch_shape[-1:] != (K,):
            raise ValueError(
                f"transitions, emission: expected shapes (..., {K}, {K}) and (..., {K}) to match "
                f"initial, got {tuple(transitions.shape)} and {tuple(emission.batch_shape)}"
            )
        if validate_args is not False:
            expect_probabilities(initial, "initial")
            expect_probabilities(transitions, "transitions")
        self.initial, self.transitions, self.emission = initial, transitions, emission
        self.num_steps, self.lengths = num_steps, lengths
        batch = torch.broadcast_shapes(
            initial.shape[:-1],
            transitions.shape[:-2],
            emission.batch_shape[:-2],
            () if lengths is None else lengths.shape,
        )
        event = Size((num_steps, *emission.event_shape))
        super().__init__(batch, event, validate_args=validate_args)

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: Any = None,  # noqa: ANN401
    ) -> HiddenMarkov:
        """The same chain with a larger batch shape; parameters are not copied."""
        if torch.broadcast_shapes(self.batch_shape, batch_shape) != Size(batch_shape):
            raise ValueError(
                f"batch_shape: expected a shape that {tuple(self.batch_shape)} expands to, "
                f"got {tuple(batch_shape)}"
            )
        new = self._get_checked_instance(HiddenMarkov, _instance)
        new.initial, new.transitions, new.emission = self.initial, self.transitions, self.emission
        new.num_steps, new.lengths = self.num_steps, self.lengths
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of sequences (..., T, D) in nats, shape of the batch.

        Arguments:
            value: sequences, NaN where a cell is missing or beyond the end.
        """
        if self._validate_args:
            self._validate_sample(value)
        found = hmm.log_prob(self.initial, self.transitions, self.emitted(value), self.lengths)
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-2])
        return found.expand(shape)

    def emitted(self, value: Tensor) -> Tensor:
        """Log-likelihood of each step in each state, shape (..., T, K), 0 where it is missing.

        Arguments:
            value: sequences, shape (..., T, D).
        """
        return log_likelihoods(self.emission, value)

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch, T, D)``, NaN beyond the end of a sequence."""
        return self.sample_with_states(sample_shape)[0]

    def sample_with_states(
        self, sample_shape: Size | list[int] | tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Draws as :meth:`sample`, and their states, shape ``(*sample_shape, *batch, T)``."""
        with torch.no_grad():
            shape = Size(sample_shape) + self.batch_shape
            states = self.sample_states(sample_shape)
            K = self.initial.shape[-1]
            rows = self.emission.expand((*shape, self.num_steps, K)).sample()  # (..., T, K, D)
            index = states[..., None, None].expand(*states.shape, 1, rows.shape[-1])
            rows = rows.gather(-2, index).squeeze(-2)
            if self.lengths is not None:
                rows = torch.where(self._inside(rows.device).unsqueeze(-1), rows, torch.nan)
            return rows, states

    def sample_states(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws of the states, shape ``(*sample_shape, *batch, T)``."""
        shape = Size(sample_shape) + self.batch_shape
        T, K = self.num_steps, self.initial.shape[-1]
        with torch.no_grad():
            ends = self.transitions.cumsum(-1).expand(*shape, K, K)
            first = self.initial.cumsum(-1).expand(*shape, K)
            noise = torch.rand(*shape, T, dtype=ends.dtype, device=ends.device)
            begin = _inverted(first, noise[..., :1])
            # A step's noise says where it leads from each state; T maps are composed by doubling.
            maps = _inverted(ends, noise[..., None, 1:].expand(*shape, K, T - 1)).mT
            span = 1
            while span < T - 1:
                later = maps[..., span:, :].gather(-1, maps[..., :-span, :])
                maps = torch.cat([maps[..., :span, :], later], -2)
                span *= 2
            index = begin.unsqueeze(-1).expand(*shape, T - 1, 1)
            return torch.cat([begin, maps.gather(-1, index).squeeze(-1)], -1)

    def _inside(self, device: torch.device) -> Tensor:
        lengths = torch.as_tensor(self.lengths, device=device)
        return torch.arange(self.num_steps, device=device) < lengths.unsqueeze(-1)


def log_likelihoods(emission: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    """Log-likelihood of each step in each state, 0 where it is missing.

    Arguments:
        emission: distribution of a row in each state, event shape (D,), batch shape
            (..., T or 1, K), or (K,) where all sequences have the same.
        x: sequences, shape (..., T, D), NaN where a cell is missing.

    Returns:
        Nats, shape (..., T, K).
    """
    nan, missing = x.isnan(), missing_steps(emission, x)
    # In the place of a missing step stands a row that could be: no gradient is lost to a NaN.
    seen = torch.where(nan, -torch.inf, x).flatten(0, -2).amax(0)
    seen = torch.where(seen.isinf(), 0.0, seen)
    x = torch.where(missing.unsqueeze(-1), seen, x)
    return torch.where(missing.unsqueeze(-1), 0.0, emission.log_prob(x.unsqueeze(-2)))


def missing_steps(emission: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    """Which steps (...,) of sequences (..., D) say nothing of their state.

    Arguments:
        emission: as for :func:`log_likelihoods`.
        x: as there.
    """
    reads_cells = isinstance(emission, Cells | Parts | NormalRow)
    return x.isnan().all(-1) if reads_cells else x.isnan().any(-1)


def _inverted(ends: Tensor, noise: Tensor) -> Tensor:
    """Draws in [0, K) by inverting cumulative probabilities, (..., K), at noise (..., T).

    Whatever the rounding: the last end is one, a state of probability 0 is skipped.
    """
    points = (noise * ends[..., -1:]).contiguous()
    return torch.searchsorted(ends.contiguous(), points, right=True).clamp_max(ends.shape[-1] - 1)
