r"""Steps of a hidden Markov model in closed form: the way of Baum and Welch to the mode.

.. math::
    \gamma_{tk} = p(z_t = k \mid x), \quad
    \xi_{ij} = \textstyle\sum_t p(z_t = i, z_{t+1} = j \mid x), \\
    \pi_k \propto \gamma_{1k}, \quad A_{ij} \propto \xi_{ij}, \quad
    \theta_k = \arg\max_\theta \textstyle\sum_t \gamma_{tk} \log p(x_t \mid \theta)

No step lowers the likelihood, and none needs a rate.

Letters: B sequences, T steps, D features, K states.

References:
    | A maximization technique in the statistical analysis of probabilistic functions of Markov
      chains (Baum et al., 1970)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentlab.distributions.emissions import MaximisesLikelihood, part_of
from latentlab.distributions.hmm_counts import expected_counts
from latentlab.distributions.markov import log_likelihoods, missing_steps
from latentlab.guides import Point

if TYPE_CHECKING:
    from latentlab.models.hmm import HiddenMarkovModel

__all__ = ["BaumWelch", "updates_of"]

_EMISSION = "emission."


def updates_of(model: HiddenMarkovModel, guide: Any) -> BaumWelch | None:  # noqa: ANN401
    """The steps that a model has for a guide.

    Arguments:
        model: a hidden Markov model, scaled to its data.
        guide: a guide, bound to its latents.

    Returns:
        ``None`` where there is no closed form: for other guides than a point, with a prior, for a
        stationary chain, and for emissions that are no :class:`MaximisesLikelihood`.
    """
    emission = model.emission
    is_closed = isinstance(emission, MaximisesLikelihood) and emission.has_maximum
    is_mode = isinstance(guide, Point) and model.prior == "flat"
    if not (is_closed and is_mode) or model.initial == "stationary":
        return None
    return BaumWelch(model, guide)


@dataclass(frozen=True)
class BaumWelch:
    """Steps of expectation-maximisation.

    Arguments:
        model: the model.
        guide: a point, which the steps move.
    """

    model: HiddenMarkovModel
    guide: Point

    @torch.no_grad()
    def statistics(
        self, x: Tensor, lengths: Tensor | None = None, size: int | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Expected counts of starts (K,) and moves (K, K), and sums of rows, at the guide.

        Arguments:
            x: sequences, shape (B, T, D), NaN where a cell is missing or beyond the end.
            lengths: number of steps of each sequence, shape (B,); by default all have T.
            size: the number of sequences that x stands for.

        Returns:
            The counts and sums of all sequences, and their log-likelihood in nats.
        """
        model, values = self.model, self._values()
        chain = model.likelihood(values, x.shape[1], lengths)
        seen = log_likelihoods(chain.emission, x)
        counts = expected_counts(chain.initial, chain.transitions, seen, lengths)
        sums = {"starts": counts.starts, "moves": counts.moves}
        missing = missing_steps(chain.emission, x)
        rows, weights = _seen_rows(x, counts.states, missing)
        found = model.emission.statistics(rows, weights)  # type: ignore[attr-defined]
        sums |= {_EMISSION + name: value for name, value in found.items()}
        scale = 1.0 if size is None else size / len(x)
        return {name: scale * value for name, value in sums.items()}, scale * counts.log_prob.sum()

    @torch.no_grad()
    def maximise(self, statistics: dict[str, Tensor]) -> None:
        """Move the point to the maximum that statistics lead to; what none were seen of stays.

        Arguments:
            statistics: as :meth:`statistics` returns them, or an average of such.
        """
        emission, guide, values = self.model.emission, self.guide, self._values()
        found = self.model._chain.maximise(statistics["starts"], statistics["moves"])
        found |= emission.maximise(part_of(statistics, _EMISSION))  # type: ignore[attr-defined]
        values |= {k: torch.where(v.isnan(), values[k], v) for k, v in found.items()}
        point = guide.pack({name: value[None] for name, value in values.items()})[0]
        guide.start(point, guide.free_sd())

    def _values(self) -> dict[str, Tensor]:
        """Site -> its value at the point."""
        values = self.guide.unpack(self.guide.free_mean().detach()[None])[0]
        return {z.name: values[z.name].reshape(z.shape) for z in self.guide.latents}


def _seen_rows(x: Tensor, states: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, D) that say something of their state, and the probabilities of states (N, K)."""
    if missing.any():
        return x[~missing], states[~missing]
    return x.flatten(0, -2), states.flatten(0, -2)
