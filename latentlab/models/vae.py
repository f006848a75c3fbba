r"""Variational autoencoders.

.. math::
    z_n \sim p(z), \qquad x_n \sim p(x \mid \eta(z_n)), \qquad
    q(z_n \mid x_n) = \mathcal{N}(\mu(x_n), \mathrm{diag}\,\sigma^2(x_n))

:math:`\eta` is the decoder, whose numbers a likelihood turns into a distribution of the cells of a
row; :math:`(\mu, \sigma)` is the encoder, the guide's half. Both are learned together by the ELBO

.. math:: \sum_n \mathbb{E}_q \log p(x_n \mid z_n) - \mathrm{KL}(q(z_n \mid x_n) \,\|\, p(z)).

Cells that are NaN are missing: their factor is left out of the likelihood, which is exact; the
encoder reads zero, the column's mean, in their place and, if asked to, which cells they are.

Letters: N rows, B of them in a batch, D features, L latent dimensions, S draws.

References:
    | Auto-encoding variational Bayes (Kingma and Welling, 2014)
    | beta-VAE: learning basic visual concepts with a constrained variational framework
      (Higgins et al., 2017)
    | MIWAE: deep generative modelling and imputation of incomplete data sets
      (Mattei and Frellsen, 2019)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from latentlab.data.checks import as_count, as_seed
from latentlab.data.table import Table
from latentlab.diagnostics import Collapse, RowEvidence, collapse, row_evidence
from latentlab.distributions import Likelihood, likelihood_of
from latentlab.distributions.cells import may_miss
from latentlab.models import vae_nets as nets
from latentlab.models.over_rows import OverRows, as_latents, expect_cells, expect_codes
from latentlab.models.vae_parts import (
    Encoding,
    FlowPosterior,
    Imputation,
    MixturePrior,
    NormalPrior,
    flow_for,
    read,
    warn_of_columns,
)
from latentlab.models.vae_pictures import PLOTTED, Coded, plot_autoencoder
from latentlab.nn import as_widths
from latentlab.plates import rows
from latentlab.seeds import seeded

__all__ = ["VariationalAutoencoder"]

_CHUNK = 2**23  # numbers of (S, B, D) held at a time
_FEW_DRAWS = 200  # behind a figure of each row in a table
_NARROW = 1e-5  # of which the scale of an encoding is a tenth at least
_REMARK_ROWS = 2_000  # looked at for collapse


class VariationalAutoencoder(OverRows):
    r"""A variational autoencoder as a pair: the module is the model, its ``guide`` the guide.

    Sites: the local latent ``z`` (N, L) and the observed ``x``, (N, D) or (N, C, H, W). Fit it
    with ``ll.fit(vae, x, batch_size=128)``, or as in Pyro's tutorials with
    ``ll.fit(vae.model, x, vae.guide)``.

    Arguments:
        encoder: a network as :mod:`latentlab.nn` describes it; by default one is built.
        decoder: likewise.
        likelihood: ``"gaussian"`` (:math:`\sigma` learned), ``"bernoulli"``, ``"poisson"``, or a
            likelihood of :mod:`latentlab.distributions`, such as ``Categorical(5)``, or
            ``Columns(["gaussian", "poisson"])`` for a table with columns of several kinds.
        latent_dim: L.
        num_features: D of a table, or (C, H, W) of images, where a network is to be built: a
            multilayer perceptron, or for images of 12 by 12 pixels or more a convolutional one.
        hidden_dims: widths of the layers that are built, the decoder's in reverse.
        missing: whether the encoder reads, after the cells, a mask with a one for each observed
            one: (B, 2 D) numbers, or (B, 2 C, H, W). Cells may be missing in either case.
        posterior: ``"diagonal"``, or ``"flow"`` for an inverse autoregressive flow behind it.
        prior: ``"normal"``, or ``"mixture"`` for a learned one of Gaussians.
        num_components: of that mixture.
        beta: weight of the KL in training; the ELBO that is reported has weight one.
        warm_up: steps in which that weight grows from zero.
        free_bits: nats of KL that each latent dimension may use in training for free.
        seed: of the first weights of networks that are built.

    Raises:
        ValueError: if a network is neither given nor to be built, or an argument is out of range.

    Example:
        >>> import latentlab as ll
        >>> vae = ll.VariationalAutoencoder(num_features=2, latent_dim=1, hidden_dims=(8,))
        >>> vae(size=5).shape                                    # a prior draw
        torch.Size([5, 2])
        >>> x = ll.data.simulate.eruptions(num_rows=100).x
        >>> vae.scale_to(x).encode(x[:3])[0].shape
        torch.Size([3, 1])
        >>> pyro.clear_param_store()                             # a draw by hand leaves its mark
    """

    def __init__(
        self,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        likelihood: str | Likelihood = "gaussian",
        latent_dim: int = 2,
        *,
        num_features: int | Sequence[int] | None = None,
        hidden_dims: Sequence[int] = (256,),
        missing: bool = False,
        posterior: Literal["diagonal", "flow"] = "diagonal",
        prior: Literal["normal", "mixture"] = "normal",
        num_components: int = 10,
        beta: float = 1.0,
        warm_up: int = 0,
        free_bits: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        L = self.latent_dim = as_count(latent_dim, "latent_dim")
        _check_choice(posterior, "posterior", ("diagonal", "flow"))
        _check_choice(prior, "prior", ("normal", "mixture"))
        hidden_dims = as_widths(hidden_dims)
        self.beta, self.free_bits = _number(beta, "beta"), _number(free_bits, "free_bits")
        if not isinstance(missing, bool):
            raise TypeError(f"missing: expected True or False, got {missing!r}")
        num_components = as_count(num_components, "num_components")
        self.warm_up, self.missing = as_count(warm_up, "warm_up", minimum=0), missing
        self.likelihood = likelihood_of(likelihood)
        self._recipe: dict[str, Any] | None = None
        if encoder is None and decoder is None:
            self._recipe = {
                "hidden_dims": [*hidden_dims],
                "posterior": posterior,
                "prior": prior,
                "num_components": num_components,
            }
        plan = nets.Plan(self.likelihood, L, num_features, hidden_dims, self.missing)
        num_context = 2 * L if posterior == "flow" else 0
        with seeded(as_seed(seed)):
            built = nets.complete(plan, encoder, decoder, num_context)
            self.flow: Any = flow_for(L, built.num_context) if posterior == "flow" else None
            self.prior: NormalPrior | MixturePrior = NormalPrior(L)
            if prior == "mixture":
                self.prior = MixturePrior(L, num_components)
        self.encoder, self.decoder, self.event_shape = built[:3]

    @property
    def dims(self) -> Mapping[str, Sequence[str]]:
        """Names of the axes of the sites."""
        cell = ("feature",) if len(self.event_shape) == 1 else ("channel", "height", "width")
        return {"z": ("row", "latent"), "x": ("row", *cell)}

    # ---- the pair -----------------------------------------------------------------------------

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The model: all rows (``x``), a mini-batch (``x``, ``size``) or a draw (``size``)."""
        if x is not None:
            self._expect_shape(x)
        pyro.module("vae.prior", self.prior)
        pyro.module("vae.decoder", self.decoder)
        pyro.module("vae.likelihood", self.likelihood)
        with rows(x, size):
            z = pyro.sample("z", self._prior())
            return pyro.sample("x", self.distribution(z), obs=x)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The model, as a method that ``guide`` goes with: ``ll.fit(vae.model, x, vae.guide)``."""
        return self(x, size)

    def guide(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The guide: the encodings of all rows, or of a mini-batch."""
        if x is None:
            raise ValueError("x: expected rows to encode, got none; for prior draws run the model")
        self._expect_shape(x)
        pyro.module("vae.encoder", self.encoder)
        if self.flow is not None:
            pyro.module("vae.flow", self.flow)
        with rows(x, size):
            return pyro.sample("z", self._posterior(x))

    def default_guide(self) -> Any:  # noqa: ANN401
        """The guide that is learned together with the model."""
        return self.guide

    def kl_weight(self, step: int) -> float:
        """Weight of the KL in a step of training: it grows to ``beta`` while warming up."""
        return self.beta * min(1.0, step / self.warm_up) if self.warm_up else self.beta

    def scale_to(self, x: Tensor | Table, size: int | None = None) -> VariationalAutoencoder:
        """Check that the likelihood fits the data, and take its units from them, in place.

        Arguments:
            x: rows, shape (N, D) or (N, C, H, W), NaN where a cell is missing.
            size: unused; as for the model.

        Returns:
            The model itself.

        Raises:
            ValueError: if x has another shape, or cells that the likelihood cannot give.
        """
        cells = self._rows(x, min_rows=2)
        if len(self.event_shape) == 1:
            warn_of_columns(self._table(x, min_rows=2), self.likelihood)
        with torch.no_grad():
            self.likelihood.measure(cells)
        return self

    def distribution(self, z: Tensor) -> Any:  # noqa: ANN401
        """The distribution of rows given latents (..., L), in the units of the data."""
        return self.likelihood.distribution(self._params(z))

    def posterior(self, x: Tensor | Table) -> Any:  # noqa: ANN401
        """The guide's distribution of z for each row, batch shape (N,), event shape (L,)."""
        return self._posterior(self._rows(x))

    # ---- what a fitted one answers -------------------------------------------------------------

    def encode(self, x: Tensor | Table, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of each row, (N, L) each.

        Arguments:
            x: rows, shape (N, D) or (N, C, H, W), NaN where a cell is missing.
            seed: for a flow posterior, whose moments are taken from 200 draws.
        """
        x = self._rows(x)
        with torch.no_grad(), seeded(as_seed(seed)):
            draws = 1 if self.flow is None else _FEW_DRAWS
            parts = [self._moments(self._posterior(part)) for part in self._chunks(x, draws)]
        loc, scale = (torch.cat(moments) for moments in zip(*parts, strict=True))
        expect_codes((loc.isfinite() & scale.isfinite()).all(-1))
        return loc, scale

    def decode(self, z: Tensor) -> Tensor:
        """Mean of each cell given latents (..., L); the most probable code where there are codes.

        Arguments:
            z: latents, in units of their prior.

        Returns:
            Rows, shape (..., D) or (..., C, H, W), in the units of the data.
        """
        with torch.no_grad():
            z = as_latents(z, self.latent_dim)
            return self.likelihood.mean(expect_cells(self._params(z), z))

    def reconstruct(self, x: Tensor | Table) -> Tensor:
        """Rows decoded from the mean of their encodings, missing cells included.

        Arguments:
            x: rows, shape (N, D) or (N, C, H, W), NaN where a cell is missing.
        """
        return self.decode(self.encode(x)[0])

    def sample(self, num_samples: int, seed: int = 0) -> Tensor:
        """New rows, shape (S, D) or (S, C, H, W): latents from the prior, cells given these.

        Arguments:
            num_samples: S.
            seed: of the draws.
        """
        num_samples = as_count(num_samples, "num_samples")
        with torch.no_grad(), seeded(as_seed(seed)):
            return self.distribution(self._prior().expand([num_samples]).sample()).sample()

    def traverse(self, dim: int, values: Tensor, z: Tensor | None = None) -> Tensor:
        """Rows decoded along one latent dimension, shape (V, D) or (V, C, H, W).

        Arguments:
            dim: the dimension.
            values: its V values.
            z: all others, shape (L,); zero by default.
        """
        if not -self.latent_dim <= dim < self.latent_dim:
            raise ValueError(f"dim: expected one of {self.latent_dim} dimensions, got {dim}")
        steps = torch.atleast_1d(torch.as_tensor(values)).double()
        origin = steps.new_zeros(self.latent_dim)
        origin = origin if z is None else as_latents(z, self.latent_dim).to(steps)
        along = origin.repeat(len(steps), 1)
        along[:, as_count(dim % self.latent_dim, "dim", minimum=0)] = steps
        return self.decode(along)

    def log_prob(self, x: Tensor | Table, num_samples: int = 1000, seed: int = 0) -> RowEvidence:
        """Log-density of each row's observed cells by importance sampling, with its error.

        The encoder runs once, and the decoder once for all draws of many rows.

        Arguments:
            x: rows, shape (N, D) or (N, C, H, W), NaN where a cell is missing.
            num_samples: draws S for each row, at least 25.
            seed: of the draws.

        Returns:
            ``log_prob`` (N,) in nats, ``se`` (N,), and ``khat`` of each row.
        """
        return self._evidence(self._rows(x), as_count(num_samples, "num_samples", 25), seed)

    def impute(
        self, x: Tensor | Table, num_samples: int = 20, num_codes: int = 1000, seed: int = 0
    ) -> Imputation:
        """Draws of the missing cells given the observed ones, by importance resampling.

        Arguments:
            x: rows, shape (N, D) or (N, C, H, W), NaN where a cell is missing.
            num_samples: draws S.
            num_codes: latents of each row that these are chosen from; the more, the more exact.
            seed: of the draws.

        Returns:
            The draws, with what tells how good they are.
        """
        x, num_samples = self._rows(x), as_count(num_samples, "num_samples")
        self._narrow(x)
        num_codes = as_count(num_codes, "num_codes", 25)
        draws, means, weights = [], [], []
        with torch.no_grad(), seeded(as_seed(seed)):
            for part in self._chunks(x, max(num_codes, num_samples)):
                z, log_w = self._weighted(part, num_codes)
                chosen = dist.Categorical(logits=log_w.T).sample((num_samples,))  # (S, B)
                cells = self.distribution(_take(z, chosen)).sample()
                mean = self.likelihood.average(self._params(z), log_w.softmax(0))
                draws.append(torch.where(part.isnan(), cells.to(part), part))
                means.append(torch.where(part.isnan(), mean.to(part), part))
                weights.append(log_w)
        log_w = torch.cat(weights, 1).double()
        ess = (-torch.logsumexp(2 * log_w.log_softmax(0), 0)).exp()
        return Imputation(torch.cat(draws, 1), torch.cat(means), row_evidence(log_w), ess)

    def collapse(self, x: Tensor | Table) -> Collapse:
        """How much each latent dimension is used: active units, KL to a normal prior.

        Arguments:
            x: rows, shape (N, D) or (N, C, H, W), NaN where a cell is missing.
        """
        loc, scale = self.encode(x)
        comparable = self.flow is None and isinstance(self.prior, NormalPrior)
        return collapse(loc, scale if comparable else None)

    # ---- what it lends the engine --------------------------------------------------------------

    def label_rows(self, draws: Mapping[str, Tensor], x: Tensor | Table) -> dict[str, Tensor]:
        """Columns for a table of rows: the mean of each latent, the log-density and its error."""
        loc, _ = self.encode(x)
        evidence = self._evidence(self._rows(x), _FEW_DRAWS, 0)
        columns = {f"z_{j}": loc[:, j] for j in range(self.latent_dim)}
        return columns | {"log_prob": evidence.log_prob, "log_prob_se": evidence.se}

    def remarks(self, draws: Mapping[str, Tensor], *data: Any) -> list[str]:  # noqa: ANN401
        """What the encodings say of the number of latent dimensions."""
        x = data[0][:: -(-len(data[0]) // _REMARK_ROWS)]
        if len(x) < 2:
            return []
        found = self.collapse(x)
        if not found.inactive:
            return []
        if len(found.inactive) == self.latent_dim:
            return [
                f"{found}: the decoder models the rows without them, and codes mean nothing; "
                "warm the KL up (warm_up=...), give it free_bits, or make the decoder weaker"
            ]
        active = self.latent_dim - len(found.inactive)
        return [f"{found}: latent_dim={active} would do, or warm the KL up (warm_up=...)"]

    def plot_fit(self, draws: Mapping[str, Tensor], names: Sequence[str], x: Tensor) -> Any:  # noqa: ANN401
        """Reconstructions, rows made up, what each latent does, a map; a matplotlib figure."""
        some = self._rows(x)
        some = some[:: -(-len(some) // PLOTTED)]
        loc, scale = self.encode(some)
        with torch.no_grad(), seeded(0):
            prior = self._prior().expand([PLOTTED]).sample()
        normal = isinstance(self.prior, NormalPrior)
        rows = Coded(
            some, names, self.likelihood, self.decode, loc, scale if normal else None, prior
        )
        return plot_autoencoder(rows)

    def spec(self) -> dict[str, Any]:
        """What builds this model again, where its networks and its likelihood are ours."""
        likelihood = self.likelihood.spec()
        if self._recipe is None or likelihood is None:
            return {"class": "a VariationalAutoencoder with networks of your own", "arguments": {}}
        arguments = {
            "likelihood": likelihood,
            "latent_dim": self.latent_dim,
            "num_features": self._num_features(),
            "missing": self.missing,
            "beta": self.beta,
            "warm_up": self.warm_up,
            "free_bits": self.free_bits,
        }
        return {"class": "VariationalAutoencoder", "arguments": arguments | self._recipe}

    # ---- inside --------------------------------------------------------------------------------

    def _prior(self) -> Any:  # noqa: ANN401
        like = next(self.decoder.parameters(), torch.zeros(()))
        return self.prior.distribution(like)

    def _params(self, z: Tensor) -> Tensor:
        """The decoder's numbers for latents (..., L), in a batch such as it is written for."""
        flat = self.decoder(z.reshape(-1, self.latent_dim).to(nets.dtype_of(self.decoder)))
        return flat.reshape(*z.shape[:-1], *flat.shape[1:])

    def _posterior(self, x: Tensor) -> Any:  # noqa: ANN401
        encoding = self._encoding(x)
        if self.flow is not None:
            return FlowPosterior(encoding, self.flow)
        # What is not finite is told by the row of it, further out.
        return dist.Normal(encoding.loc, encoding.scale, validate_args=False).to_event(1)

    def _encoding(self, x: Tensor) -> Encoding:
        cells = self.likelihood.inputs(x).to(nets.dtype_of(self.encoder))
        if may_miss(cells):
            cells = torch.where(cells.isnan(), 0.0, cells)
        if self.missing:
            cells = torch.cat([cells, (~x.isnan()).to(cells.dtype)], 1)
        return read(self.encoder(cells), self.latent_dim)

    def _moments(self, q: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        if isinstance(q, FlowPosterior):
            draws = q.rsample((_FEW_DRAWS,))
            return draws.mean(0), draws.std(0)
        return q.mean, q.stddev

    def _weighted(self, x: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draws of the latents (S, B, L), and their log importance weights (S, B)."""
        q = self._posterior(x)
        z = q.rsample((num_samples,))
        log_p = self._prior().log_prob(z) + self.distribution(z).log_prob(x)
        return z, log_p - q.log_prob(z)

    def _evidence(self, x: Tensor, num_samples: int, seed: int) -> RowEvidence:
        narrow = self._narrow(x)
        with torch.no_grad(), seeded(as_seed(seed)):
            parts = [self._weighted(part, num_samples)[1] for part in self._chunks(x, num_samples)]
        log_w = torch.cat(parts, 1)
        expect_codes(log_w.isfinite().all(0))
        found = row_evidence(log_w)
        khat = torch.where(narrow.to(found.khat.khat.device), math.inf, found.khat.khat)
        return replace(found, khat=replace(found.khat, khat=khat))

    def _narrow(self, x: Tensor) -> Tensor:
        """Whether a row's encoding is as narrow as one can be, (N,); refuses what has none.

        All its draws are then the same, their weights, too, and what these say is worth nothing.
        """
        with torch.no_grad():
            found = [self._encoding(part) for part in self._chunks(x, 1)]
        loc = torch.cat([each.loc for each in found])
        scale = torch.cat([each.scale for each in found])
        expect_codes((loc.isfinite() & scale.isfinite()).all(-1))
        return (scale < _NARROW).any(-1)

    def _chunks(self, x: Tensor, num_samples: int) -> tuple[Tensor, ...]:
        return x.split(max(1, _CHUNK // (num_samples * math.prod(self.event_shape))))

    def _rows(self, x: Tensor | Table, min_rows: int = 1) -> Tensor:
        cells = super()._rows(x, min_rows)
        self.likelihood.check(cells)
        return cells

    def _num_features(self) -> int | list[int]:
        return self.event_shape[0] if len(self.event_shape) == 1 else list(self.event_shape)


def _take(z: Tensor, chosen: Tensor) -> Tensor:
    """Of codes (M, B, L) those chosen for each row, (S, B): (S, B, L)."""
    return z[chosen, torch.arange(z.shape[1], device=z.device)]


def _check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    if value not in choices:
        known = " or ".join(map(repr, choices))
        raise ValueError(f"{name}: expected {known}, got {value!r}")


def _number(value: float, name: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a number >= 0, got {value!r}")
    return float(value)
