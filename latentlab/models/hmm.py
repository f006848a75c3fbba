r"""Hidden Markov models.

.. math::
    \pi \sim \mathrm{Dirichlet}(\alpha), \quad
    A_k \sim \mathrm{Dirichlet}(\alpha + \kappa e_k), \quad \theta_k \sim p(\theta), \\
    z_1 \sim \pi, \quad z_{t+1} \sim A_{z_t}, \quad x_t \sim p(\cdot \mid \theta_{z_t})

What a state emits, :math:`p(x \mid \theta)` with its prior, is an emission, see
:mod:`latentlab.distributions.emissions`. The states :math:`z_t` are summed out, so that every
latent left is continuous and every guide applies.

Letters: B sequences, T steps of the longest, D features, K states, S draws.

References:
    | A tutorial on hidden Markov models (Rabiner, 1989)
    | Hidden Markov models for time series (Zucchini, MacDonald and Langrock, 2016)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import pyro
import pyro.poutine as poutine
import torch
from torch import Generator, Tensor, nn

from latentlab.data.checks import as_count, as_rows, warn_constant
from latentlab.data.sequences import Sequences, as_lengths, as_sequences
from latentlab.data.table import default_names
from latentlab.distributions import hmm
from latentlab.distributions.completion import Completed
from latentlab.distributions.emissions import (
    ChecksRows,
    Emission,
    LinksSites,
    MeasuresRows,
    emission_of,
)
from latentlab.distributions.markov import HiddenMarkov
from latentlab.guides import FullRank, Guide, MeanField, Point
from latentlab.models.gmm_units import mean_and_sd, warn_far
from latentlab.models.hmm_chain import Chain
from latentlab.models.hmm_missing import completed
from latentlab.models.hmm_remarks import remarks_on_states
from latentlab.models.hmm_residuals import residuals_of
from latentlab.models.hmm_starts import find_start
from latentlab.models.hmm_updates import conjugate_guide, expect_conjugate, updates_of
from latentlab.plates import sequences

__all__ = ["HiddenMarkovModel"]

_Data = Any  # sequences, or their lengths, of any form that is read
_Draws = Mapping[str, Tensor]

_CHUNK = 2**23  # elements of (S, B, T, K) held at a time
_CHOICES = {"prior": ("weak", "flat", "conjugate"), "initial": ("free", "stationary")}


class HiddenMarkovModel(nn.Module):
    r"""Sequences of rows whose distribution depends on a hidden state that moves as a chain.

    Sites: ``initial`` (K,), ``transitions`` (K, K) from row to column, those of the emission, and
    the observed ``x`` (B, T, D). Data are whatever :func:`latentlab.data.as_sequences` reads: a
    list of arrays, a padded tensor with lengths, one array. NaN cells count as missing.

    ===================  =====================================================
    ``emissions``        sites
    ===================  =====================================================
    "gaussian"           ``locs`` (K, D), ``scales`` (K, D)
    "gaussian_full"      and ``correlations`` (K, D (D - 1) / 2) if D > 1
    "poisson"            ``rates`` (K, D)
    "categorical"        ``probs`` (K, D, C)
    "bernoulli"          ``probs`` (K, D)
    a list               columns of several kinds, by name or by emission
    an object            its own, see :mod:`latentlab.distributions.emissions`
    ===================  =====================================================

    Arguments:
        num_states: number of states K.
        num_features: number of columns D, where ``emissions`` does not say.
        emissions: what a state emits.
        num_categories: number of codes C of categorical columns.
        initial: the law of the first state, ``"free"`` or the ``"stationary"`` one of the
            transitions, which then has no site.
        stickiness: :math:`\kappa`, added to the prior counts of staying in a state.
        left_right: whether the chain starts in state 0 and may only stay or go on to the next
            state. ``transitions`` then has shape (K - 1, 2), staying first, and there is no
            ``initial``.
        concentration: :math:`\alpha` of the Dirichlet priors.
        prior: ``"weak"``, or ``"flat"`` for none at all; the mode, ``guide="point"``, is then the
            maximum of the likelihood. ``"conjugate"`` priors, other ones for Gaussian columns
            only, bring a guide of their families, which is fitted without a gradient.

    Raises:
        ValueError: if a count is not an int of at least 1, or another argument is out of range.

    Example:
        >>> model = HiddenMarkovModel(num_states=2, emissions="poisson")
        >>> model(lengths=torch.tensor([7, 4])).shape             # a prior draw
        torch.Size([2, 7, 1])
    """

    num_steps: Tensor
    like: Tensor
    column_names: Sequence[str] | None = None  # a fit says them
    tolerates_missing = True

    def __init__(
        self,
        num_states: int,
        num_features: int = 1,
        emissions: str | Emission | Sequence[str | Emission] = "gaussian",
        *,
        num_categories: int | None = None,
        initial: Literal["free", "stationary"] = "free",
        stickiness: float = 0.0,
        left_right: bool = False,
        concentration: float = 1.0,
        prior: Literal["weak", "flat", "conjugate"] = "weak",
    ) -> None:
        super().__init__()
        self.num_states = as_count(num_states, "num_states")
        if num_categories is not None:
            num_categories = as_count(num_categories, "num_categories")
            kinds = emissions if isinstance(emissions, list | tuple) else [emissions]
            if "categorical" not in kinds:
                raise ValueError(
                    f"num_categories: is for categorical columns, got emissions={emissions!r}"
                )
        num_features, conjugate = as_count(num_features, "num_features"), prior == "conjugate"
        self.emission = emission_of(emissions, num_features, num_categories, conjugate)
        self.num_features = self.emission.num_features
        for name, value in (("initial", initial), ("prior", prior)):
            if value not in _CHOICES[name]:
                known = " or ".join(f'"{choice}"' for choice in _CHOICES[name])
                raise ValueError(f"{name}: expected {known}, got {value!r}")
        for name, number in (("stickiness", stickiness), ("concentration", concentration)):
            bad = not isinstance(number, int | float) or not 0 <= number < math.inf
            if bad or (name == "concentration" and number == 0):
                least = ">= 0" if name == "stickiness" else "> 0"
                raise ValueError(f"{name}: expected a finite number {least}, got {number!r}")
        if left_right and initial == "stationary":
            raise ValueError('initial: expected "free" with left_right, got "stationary"')
        self.initial, self.prior, self.left_right = initial, prior, bool(left_right)
        self.stickiness, self.concentration = float(stickiness), float(concentration)
        self.free_chain = Chain(
            self.num_states,
            is_stationary=initial == "stationary",
            left_right=self.left_right,
            concentration=self.concentration,
            stickiness=self.stickiness,
        )
        if prior == "conjugate":
            expect_conjugate(self)
        self.register_buffer("num_steps", torch.tensor(100))
        self.register_buffer("like", torch.zeros((), dtype=torch.float64), persistent=False)
        self._spec_emissions = emissions
        self.num_categories = num_categories

    @property
    def exchangeable(self) -> Mapping[str, int | tuple[int, ...]]:
        """Site -> the axis over the states, from the right; none where states are in order."""
        if self.left_right:
            return {}
        axes: dict[str, int | tuple[int, ...]] = {
            site: -1 - len(prior.event_shape) for site, prior in self.emission.sites().items()
        }
        axes["transitions"] = (-2, -1)
        return axes | ({"initial": -1} if self.free_chain.has_initial else {})

    @property
    def dims(self) -> Mapping[str, Sequence[str]]:
        """Site -> names of its axes."""
        named: dict[str, Sequence[str]] = {
            "initial": ("state",),
            "transitions": ("state", "move" if self.left_right else "next_state"),
            "x": ("sequence", "step", "feature"),
        }
        spans = getattr(self.emission, "spans", {})
        for site, prior in self.emission.sites().items():
            own = [f"{site}_{i}" for i in range(len(prior.event_shape))]
            first, end = spans.get(site, (0, self.num_features))
            if own and prior.event_shape[0] == end - first:
                own[0] = f"feature[{first}:{end}]" if site in spans else "feature"
            named[site] = ("state", *own)
        return named

    def arrange(
        self,
        x: Any = None,  # noqa: ANN401
        lengths: Any = None,  # noqa: ANN401
        size: int | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...] | None]:
        """Sequences of any form as the arguments of the model; see ``latentlab.data``."""
        kwargs: dict[str, Any] = {} if size is None else {"size": size}
        if x is None:
            return (), kwargs | ({} if lengths is None else {"lengths": as_lengths(lengths)}), None
        found = as_sequences(x, lengths, names=names)
        self._check_width(found.x)
        x = found.x.double()
        if isinstance(self.emission, ChecksRows):
            self.emission.check(x)
        unnamed = found.names == default_names(self.num_features)
        return (x, found.lengths), kwargs, None if unnamed else found.names

    def num_observations(self, x: Tensor, lengths: Tensor | None = None) -> int:
        """The number of steps of all sequences together, which the BIC goes by."""
        return x.shape[0] * x.shape[1] if lengths is None else int(lengths.sum())

    def forward(
        self,
        x: Tensor | None = None,
        lengths: Tensor | None = None,
        size: int | None = None,
    ) -> Tensor:
        """The model: all sequences (``x``), a mini-batch (``x``, ``size``) or a draw.

        Arguments:
            x: sequences, shape (B, T, D), NaN where a cell is missing or beyond the end.
            lengths: number of steps of each sequence, shape (B,); by default all have T.
            size: the number of sequences that x stands for, or that are drawn. A draw without
                ``lengths`` has as many steps as the longest sequence that was fitted, or 100.
        """
        if x is not None:
            self._check_width(x)
            num_steps = x.shape[1]
        else:
            num_steps = int(self.num_steps if lengths is None else lengths.max())
        latents = self._draw_latents()
        with sequences(x, lengths, size):
            return pyro.sample("x", self.likelihood(latents, num_steps, lengths), obs=x)

    def likelihood(
        self, latents: Mapping[str, Tensor], num_steps: int, lengths: Tensor | None = None
    ) -> HiddenMarkov:
        """The distribution of a sequence given the latents, states summed out.

        Arguments:
            latents: site -> value, or draws (S, ...) with ``initial`` (S, 1, K).
            num_steps: number of steps T.
            lengths: number of steps of each sequence, shape (B,).

        Returns:
            The distribution, batch shape (), (1,) or (S, 1), or with B for the 1.
        """
        initial, transitions = self.free_chain.full(latents, self.like)
        values = {}
        for site, prior in self.emission.sites().items():
            # K left its plate and became an axis of the emission: room for sequences and steps.
            place = -2 - len(prior.event_shape)
            values[site] = latents[site].unsqueeze(place).unsqueeze(place)
        emission = self.emission.distribution(**values)
        return HiddenMarkov(
            initial, transitions, emission, num_steps, lengths, validate_args=False
        )

    def default_guide(self) -> Guide:
        """A full-rank Gaussian, or a mean-field one for more than 400 numbers.

        With a flat prior a point; with conjugate ones their families, see
        :class:`latentlab.guides.Families`.
        """
        if self.prior == "flat":
            return Point()
        if self.prior == "conjugate":
            return conjugate_guide(self)
        K = self.num_states
        numbers = sum(math.prod(prior.event_shape) for prior in self.emission.sites().values())
        return FullRank() if K * (K + numbers) <= 400 else MeanField()

    def scale_to(
        self, x: Tensor | Sequences, lengths: Tensor | None = None, size: int | None = None
    ) -> HiddenMarkovModel:
        """Set the priors in the units of the data, in place; returns the model itself.

        Arguments:
            x: sequences, as for the model.
            lengths: as for the model.
            size: unused; as for the model.

        Raises:
            ValueError: if a column has no number, or there are fewer steps than states.
        """
        data = self._sequences(x, lengths)
        table = as_rows(data.rows(), min_rows=2, allow_missing=True)
        if len(table) < self.num_states:
            raise ValueError(
                f"num_states: expected at most the number of steps, got {self.num_states} states "
                f"for {len(table)} steps"
            )
        warn_constant(table)
        warn_far(table, mean_and_sd(table.x)[1])
        if isinstance(self.emission, MeasuresRows):
            self.emission.measure(table.x)
        self.num_steps = data.lengths.max().cpu()
        return self

    def starting_values(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        size: int | None = None,
        *,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """A start by expectation-maximisation, the best of several runs.

        Arguments:
            x: sequences, as for the model; about 20,000 steps of them are looked at.
            lengths: as for the model.
            size: unused; as for the model.
            seed: another seed, another start.

        Returns:
            A value for each latent, in the units of x.
        """
        data = self._sequences(x, lengths)
        generator = Generator(x.device).manual_seed(seed)
        return find_start(self.emission, self.free_chain, data.x, data.lengths, generator)

    def updates(self, guide: Any) -> Any:  # noqa: ANN401
        """Steps in closed form, see :mod:`latentlab.models.hmm_updates`; ``None`` without them."""
        return updates_of(self, guide)

    # ---- what a fit says -----------------------------------------------------------------------

    def smooth(self, x: _Data, draws: _Draws, lengths: _Data = None) -> Tensor:
        r"""Probability of each state at each step given the whole sequence, shape (B, T, K).

        .. math:: \mathbb{E}_q \, p(z_t = k \mid x_{1:T}, \theta)

        Arguments:
            x: sequences of any form that a fit takes.
            draws: site -> draws (S, ...), as ``Posterior.sample`` returns them; state k is the
                same one in each draw.
            lengths: number of steps of each sequence.
        """
        return self._average(hmm.smooth, draws, self._sequences(x, lengths))

    def filter(self, x: _Data, draws: _Draws, lengths: _Data = None) -> Tensor:
        """Probability of each state given the steps up to then, (B, T, K), as :meth:`smooth`."""
        return self._average(hmm.filter, draws, self._sequences(x, lengths))

    def predict_next(self, x: _Data, draws: _Draws, lengths: _Data = None) -> Tensor:
        """Probability of each state given the steps before, (B, T, K), as :meth:`smooth`."""
        return self._average(hmm.predict_next, draws, self._sequences(x, lengths))

    def decode(self, x: _Data, draws: _Draws, lengths: _Data = None) -> Tensor:
        """The likeliest path at the posterior mean, (B, T), -1 past the end, as :meth:`smooth`."""
        data = self._sequences(x, lengths)
        chain = self.chain(_mean(draws), data)
        args = (chain.initial, chain.transitions, chain.emitted(data.x), data.lengths)
        return hmm.decode(*args)[0][0]

    def log_prob(self, x: _Data, draws: _Draws, lengths: _Data = None) -> Tensor:
        """Log posterior predictive density of each sequence in nats, (B,), as :meth:`smooth`."""
        data = self._sequences(x, lengths)
        with torch.no_grad():
            parts = [chain.log_prob(data.x) for chain in self.chains(draws, data)]
        found = torch.cat(parts)
        return found.logsumexp(0) - math.log(len(found))

    def impute(self, x: _Data, draws: _Draws, lengths: _Data = None) -> Completed:
        """Mean and sd of missing cells given all that are there, (B, T, D), as :meth:`smooth`.

        Exact for each draw. Columns of codes cannot be filled, for they have no mean.
        """
        data = self._sequences(x, lengths)
        return completed(self.chains(draws, data), data)

    def residuals(self, x: _Data, draws: _Draws, lengths: _Data = None, seed: int = 0) -> Tensor:
        """One-step-ahead pseudo-residuals (B, T, D), standard normal where the model is right.

        See :func:`latentlab.models.hmm_residuals.residuals_of`; at the posterior mean.

        Arguments:
            x: as for :meth:`smooth`.
            draws: as for :meth:`smooth`.
            lengths: as for :meth:`smooth`.
            seed: of the numbers that discrete cells are randomised with.
        """
        data = self._sequences(x, lengths)
        return residuals_of(self.chain(_mean(draws), data), data.x, seed)

    def chain(self, draws: Mapping[str, Tensor], data: Sequences) -> HiddenMarkov:
        """The distributions of sequences at draws of the latents, batch shape (S, B).

        Arguments:
            draws: as for :meth:`smooth`.
            data: the sequences whose lengths count.
        """
        latents = {k: v.unsqueeze(1) if k == "initial" else v for k, v in draws.items()}
        return self.likelihood(latents, data.x.shape[1], data.lengths)

    def chains(self, draws: Mapping[str, Tensor], data: Sequences) -> Iterator[HiddenMarkov]:
        """As :meth:`chain`, so many draws at a time as memory holds."""
        step = max(1, _CHUNK // (data.x[..., 0].numel() * self.num_states))
        total = len(draws[next(iter(self.emission.sites()))])
        for start in range(0, total, step):
            yield self.chain({k: v[start : start + step] for k, v in draws.items()}, data)

    def label_rows(self, draws: _Draws, x: _Data, lengths: _Data = None) -> dict[str, Tensor]:
        """Columns for a table of all steps below each other: the path, and each state's odds."""
        data = self._sequences(x, lengths)
        probs = self.smooth(data, draws)[data.inside]
        columns = {"state": self.decode(data, draws)[data.inside]}
        return columns | {f"probability_{k}": probs[:, k] for k in range(self.num_states)}

    def remarks(self, draws: Mapping[str, Tensor], *data: Any) -> list[str]:  # noqa: ANN401
        """What the draws say about the number of states."""
        if not data:
            return []
        found = self._sequences(*data[:2])
        chain = self.chain(_mean(draws), found)
        return remarks_on_states(chain, found.x, found.lengths, self.left_right)

    def plot_fit(
        self,
        draws: Mapping[str, Tensor],
        names: Sequence[str],
        x: Tensor,
        lengths: Tensor | None = None,
    ) -> Any:  # noqa: ANN401
        """States over time, moves and stays with intervals, residuals."""
        from latentlab.models.hmm_pictures import picture_of

        return picture_of(self, draws, names, self._sequences(x, lengths))

    def spec(self) -> dict[str, Any]:
        """What builds this model again, where its emissions have names."""
        kinds = self._spec_emissions
        named = kinds if isinstance(kinds, list | tuple) else [kinds]
        if not all(isinstance(kind, str) for kind in named):
            return {"class": "a HiddenMarkovModel with emissions of your own", "arguments": {}}
        own = ("initial", "stickiness", "left_right", "concentration", "prior", "num_categories")
        arguments = {name: getattr(self, name) for name in ("num_states", "num_features", *own)}
        arguments["emissions"] = kinds if isinstance(kinds, str) else [*named]
        return {"class": "HiddenMarkovModel", "arguments": arguments}

    # ---- inside --------------------------------------------------------------------------------

    def _draw_latents(self) -> dict[str, Tensor]:
        """The latents from their prior."""
        free = poutine.mask(mask=False) if self.prior == "flat" else nullcontext()
        states = pyro.plate("states", self.num_states)
        with free:
            latents = self.free_chain.draw(self.like, states)
            with states:
                for site, prior in self.emission.sites().items():
                    if isinstance(self.emission, LinksSites):
                        prior = self.emission.given(site, latents)
                    latents[site] = pyro.sample(site, prior)
        return latents

    def _sequences(self, x: Any, lengths: Any = None) -> Sequences:  # noqa: ANN401
        if x is None:
            raise TypeError("x: expected sequences, got None")
        (x, lengths), _, names = self.arrange(x, lengths, names=self.column_names)
        return Sequences(x, lengths, names or ())

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.num_features:
            raise ValueError(
                f"x: expected shape (B, T, {self.num_features}) to match "
                f"num_features={self.num_features}, got {tuple(x.shape)}; several sequences of "
                "one column are a list of arrays"
            )

    def _average(
        self, kernel: Callable[..., Tensor], draws: Mapping[str, Tensor], data: Sequences
    ) -> Tensor:
        """Mean over draws of what a kernel says of (S, B) chains."""
        total, count = torch.zeros(()), 0
        with torch.no_grad():
            for chain in self.chains(draws, data):
                found = kernel(
                    chain.initial, chain.transitions, chain.emitted(data.x), data.lengths
                )
                total, count = total + found.sum(0), count + len(found)
        return total / count


def _mean(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of draws, as one draw."""
    return {site: value.double().mean(0, keepdim=True) for site, value in draws.items()}
