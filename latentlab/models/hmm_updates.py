r"""Steps of a hidden Markov model in closed form: to the mode, and to a posterior of families.

.. math::
    \gamma_{tk} = p(z_t = k \mid x), \quad
    \xi_{ij} = \textstyle\sum_t p(z_t = i, z_{t+1} = j \mid x), \\
    \pi_k \propto \gamma_{1k}, \quad A_{ij} \propto \xi_{ij}, \quad
    \theta_k = \arg\max_\theta \textstyle\sum_t \gamma_{tk} \log p(x_t \mid \theta)

is the step of Baum and Welch. That of variational Bayes has
:math:`\exp \mathbb{E}_q \log` of :math:`\pi`, A and :math:`p(x_t \mid \theta_k)` in the place of
these numbers, and adds the counts to those of the priors,

.. math:: q(\pi) = \mathrm{Dirichlet}(\alpha + \gamma_1), \quad
          q(A_i) = \mathrm{Dirichlet}(\alpha + \kappa e_i + \xi_i), \quad
          q(\theta_k) \propto p(\theta_k) \textstyle\prod_t p(x_t \mid \theta_k)^{\gamma_{tk}}

Neither ever lowers its bound, and neither needs a rate. Variational Bayes takes the states as
independent of the parameters, which makes it narrower than a guide with the states summed out;
its bound is below the ELBO of its guide, which has them summed out.

Letters: B sequences, T steps, D features, K states.

References:
    | A maximization technique in the statistical analysis of probabilistic functions of Markov
      chains (Baum et al., 1970)
    | Ensemble learning for hidden Markov models (MacKay, 1997)
    | Variational algorithms for approximate Bayesian inference (Beal, 2003), chapter 3
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentlab.distributions.emissions import (
    HasConjugatePrior,
    MaximisesLikelihood,
    part_of,
)
from latentlab.distributions.factors import Factor, Sites
from latentlab.distributions.hmm_counts import Counts, expected_counts
from latentlab.distributions.markov import log_likelihoods, missing_steps
from latentlab.guides import Families, Point
from latentlab.models.hmm_starts import find_start

if TYPE_CHECKING:
    from latentlab.models.hmm import HiddenMarkovModel

__all__ = ["BaumWelch", "VariationalBayes", "conjugate_guide", "expect_conjugate", "updates_of"]

_EMISSION = "emission."

Statistics = tuple[dict[str, Tensor], Tensor]


def updates_of(model: HiddenMarkovModel, guide: Any) -> BaumWelch | VariationalBayes | None:  # noqa: ANN401
    """The steps that a model has for a guide.

    Arguments:
        model: a hidden Markov model, scaled to its data.
        guide: a guide, bound to its latents.

    Returns:
        ``None`` where there is no closed form: for other guides than a point with a flat prior and
        families of conjugate ones, for a stationary chain, and for emissions that know no maximum.
    """
    emission = model.emission
    if model.initial == "stationary":
        return None
    if isinstance(guide, Families) and model.prior == "conjugate":
        return VariationalBayes(model, guide)
    is_mode = isinstance(guide, Point) and model.prior == "flat"
    if is_mode and isinstance(emission, MaximisesLikelihood) and emission.has_maximum:
        return BaumWelch(model, guide)
    return None


def expect_conjugate(model: HiddenMarkovModel) -> None:
    """Refuse conjugate priors of what has none.

    Arguments:
        model: a hidden Markov model.

    Raises:
        ValueError: for a stationary chain, and for emissions that are not conjugate.
    """
    if model.initial == "stationary":
        raise ValueError(
            'prior: expected "weak" or "flat" with initial="stationary", which leaves transitions '
            'without a conjugate prior, got "conjugate"'
        )
    if not (isinstance(model.emission, HasConjugatePrior) and model.emission.is_conjugate):
        raise ValueError(
            'prior: expected "weak" or "flat" for these emissions, got "conjugate", which needs '
            'columns that are "gaussian", "poisson", "categorical" or "bernoulli", or an emission '
            "of your own that is a HasConjugatePrior"
        )


def conjugate_guide(model: HiddenMarkovModel) -> Families:
    """The guide of the families of a model's conjugate priors.

    Arguments:
        model: one with ``prior="conjugate"``.
    """
    return Families({sites: type(factor) for sites, factor in _priors(model).items()})


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
    ) -> Statistics:
        """Expected counts of starts (K,) and moves (K, K), and sums of rows, at the guide.

        Arguments:
            x: sequences, shape (B, T, D), NaN where a cell is missing or beyond the end.
            lengths: number of steps of each sequence, shape (B,); by default all have T.
            size: the number of sequences that x stands for.

        Returns:
            The counts and sums of all sequences, and their log-likelihood in nats.
        """
        return _expected(self.model, self._values(), x, lengths, size)

    @torch.no_grad()
    def maximise(self, statistics: Mapping[str, Tensor]) -> None:
        """Move the point to the maximum that statistics lead to; what none were seen of stays.

        Arguments:
            statistics: as :meth:`statistics` returns them, or an average of such.
        """
        emission, values = self.model.emission, self._values()
        found = self.model.free_chain.maximise(statistics["starts"], statistics["moves"])
        found |= emission.maximise(part_of(statistics, _EMISSION))  # type: ignore[attr-defined]
        values |= {k: torch.where(v.isnan(), values[k], v) for k, v in found.items()}
        self._move(values)

    @torch.no_grad()
    def place(
        self, seed: int, x: Tensor, lengths: Tensor | None = None, size: int | None = None
    ) -> None:
        """Move the point to where a few steps from a seed lead.

        Arguments:
            seed: another seed, another start.
            x: as for :meth:`statistics`.
            lengths: as there.
            size: unused; as there.
        """
        self._move(_start(self.model, seed, x, lengths))

    def _move(self, values: Mapping[str, Tensor]) -> None:
        point = self.guide.pack({name: value[None] for name, value in values.items()})[0]
        self.guide.start(point, self.guide.free_sd())

    def _values(self) -> dict[str, Tensor]:
        """Site -> its value at the point."""
        values = self.guide.unpack(self.guide.free_mean().detach()[None])[0]
        return {z.name: values[z.name].reshape(z.shape) for z in self.guide.latents}


@dataclass(frozen=True)
class VariationalBayes:
    """Steps of variational Bayes.

    Arguments:
        model: the model, its priors conjugate.
        guide: of their families, which the steps move.
    """

    model: HiddenMarkovModel
    guide: Families

    @torch.no_grad()
    def statistics(
        self, x: Tensor, lengths: Tensor | None = None, size: int | None = None
    ) -> Statistics:
        """As :meth:`BaumWelch.statistics`, with the bound in the place of the log-likelihood."""
        found, priors, emission = self.guide.factors(), _priors(self.model), self.model.emission
        weights = {
            sites[0]: found[sites].expected_log().exp()  # type: ignore[attr-defined]
            for sites in self.model.free_chain.priors(self.model.like)
        }
        initial, moves = self.model.free_chain.full(weights, self.model.like)
        seen = emission.expected_log_prob(x, found)  # type: ignore[attr-defined]
        missing = x.isnan().all(-1)
        counts = expected_counts(initial, moves, seen, lengths)
        scale = 1.0 if size is None else size / len(x)
        divergence = sum(factor.kl(priors[sites]) for sites, factor in found.items())
        sums = _sums(self.model, x, counts, missing, scale)
        return sums, scale * counts.log_prob.sum() - divergence

    @torch.no_grad()
    def maximise(self, statistics: Mapping[str, Tensor]) -> None:
        """Put each factor where statistics lead, as :meth:`BaumWelch.maximise`."""
        chain = self.model.free_chain.posteriors(statistics["starts"], statistics["moves"])
        own = part_of(statistics, _EMISSION)
        self.guide.put(chain | self.model.emission.posteriors(own))  # type: ignore[attr-defined]

    @torch.no_grad()
    def place(
        self, seed: int, x: Tensor, lengths: Tensor | None = None, size: int | None = None
    ) -> None:
        """Put the factors where the start of :meth:`BaumWelch.place` leads."""
        values = _start(self.model, seed, x, lengths)
        self.maximise(_expected(self.model, values, x, lengths, size)[0])


def _start(
    model: HiddenMarkovModel, seed: int, x: Tensor, lengths: Tensor | None
) -> dict[str, Tensor]:
    """Site -> value of a start that a few steps from a seed led to."""
    many = torch.full_like(x[:, 0, 0], x.shape[1], dtype=torch.long)
    generator = torch.Generator(x.device).manual_seed(seed)
    how = (x, many if lengths is None else lengths, generator)
    return find_start(model.emission, model.free_chain, *how, is_quick=True)


def _expected(
    model: HiddenMarkovModel,
    values: Mapping[str, Tensor],
    x: Tensor,
    lengths: Tensor | None,
    size: int | None,
) -> Statistics:
    """The sums that values of the sites lead to, and their log-likelihood in nats."""
    chain = model.likelihood(values, x.shape[1], lengths)
    seen, missing = log_likelihoods(chain.emission, x), missing_steps(chain.emission, x)
    counts = expected_counts(chain.initial, chain.transitions, seen, lengths)
    scale = 1.0 if size is None else size / len(x)
    return _sums(model, x, counts, missing, scale), scale * counts.log_prob.sum()


def _priors(model: HiddenMarkovModel) -> dict[Sites, Factor]:
    """The priors of all sites, of one state where they are the same for each."""
    return model.free_chain.priors(model.like) | model.emission.priors()  # type: ignore[attr-defined]


def _sums(
    model: HiddenMarkovModel, x: Tensor, counts: Counts, missing: Tensor, scale: float
) -> dict[str, Tensor]:
    """All sums over sequences (B, T, D), as often as they stand for others."""
    if missing.any():
        rows, states = x[~missing], counts.states[~missing]
    else:
        rows, states = x.flatten(0, -2), counts.states.flatten(0, -2)
    found = model.emission.statistics(rows, states)  # type: ignore[attr-defined]
    sums = {"starts": counts.starts, "moves": counts.moves}
    sums |= {_EMISSION + name: value for name, value in found.items()}
    return {name: scale * value for name, value in sums.items()}
