r"""Autoencoders: a code for each row, and rows back from codes, without probabilities between.

.. math::
    z_n = e(x_n), \qquad x_n \sim p(x \mid d(z_n)), \qquad
    \max_{e, d} \; \sum_n \log p(x_n \mid d(e(x_n)))

With a normal p of one :math:`\sigma` for all cells this is the least mean squared error, with a
Bernoulli p the least cross-entropy. There is no prior of codes: a code says what a row is, and
nothing says which codes there are. To draw new rows, fit a mixture to the codes, see
:func:`latentlab.fit_codes`.

Letters: N rows, D features, L latent dimensions.

Reference:
    | Reducing the dimensionality of data with neural networks (Hinton and Salakhutdinov, 2006)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, nn

from latentlab.data.checks import as_count, as_seed, warn_constant
from latentlab.data.table import Table
from latentlab.distributions import Bernoulli, Gaussian, Likelihood
from latentlab.distributions.cells import may_miss
from latentlab.models import vae_nets as nets
from latentlab.models.gmm_units import mean_and_sd, warn_far
from latentlab.models.over_rows import OverRows, as_latents, expect_cells, expect_codes
from latentlab.models.vae_parts import read
from latentlab.models.vae_pictures import PLOTTED, Coded, plot_autoencoder
from latentlab.nn import as_widths
from latentlab.plates import rows
from latentlab.seeds import seeded

__all__ = ["Autoencoder"]

_LOSSES: dict[str, type[Gaussian] | type[Bernoulli]] = {"mse": Gaussian, "bce": Bernoulli}
_CHUNK = 2**23  # numbers of (B, D) held at a time


class Autoencoder(OverRows):
    r"""An autoencoder as a model without latents; it needs no guide.

    Site: the observed ``x``, (N, D) or (N, C, H, W). Cells that are NaN are missing: they are left
    out of the loss, and the encoder reads zero, the column's mean, in their place.

    Arguments:
        encoder: a network as :mod:`latentlab.nn` describes it, the same as for a
            :class:`latentlab.VariationalAutoencoder`; of its two halves the first is the code.
        decoder: likewise.
        loss: ``"mse"``, or ``"bce"`` for cells in [0, 1].
        latent_dim: L.
        num_features: D of a table, or (C, H, W) of images, where a network is to be built.
        hidden_dims: widths of the layers that are built, the decoder's in reverse.
        held_out: share of the rows that a fit keeps aside to know when to stop; 0 for none.
        seed: of the first weights of networks that are built.

    Raises:
        ValueError: if a network is neither given nor to be built, or an argument is out of range.

    Example:
        >>> import latentlab as ll
        >>> x = ll.data.simulate.eruptions(num_rows=100).x
        >>> ae = ll.Autoencoder(num_features=2, latent_dim=1, hidden_dims=(8,)).scale_to(x)
        >>> ae.encode(x).shape, ae.reconstruct(x).shape
        (torch.Size([100, 1]), torch.Size([100, 2]))
    """

    def __init__(
        self,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        loss: Literal["mse", "bce"] = "mse",
        latent_dim: int = 2,
        *,
        num_features: int | Sequence[int] | None = None,
        hidden_dims: Sequence[int] = (256,),
        held_out: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        L = self.latent_dim = as_count(latent_dim, "latent_dim")
        if loss not in _LOSSES:
            raise ValueError(f'loss: expected "mse" or "bce", got {loss!r}')
        number = isinstance(held_out, int | float) and not isinstance(held_out, bool)
        if not number or not 0 <= held_out < 1:
            raise ValueError(
                f"held_out: expected a share in [0, 1), such as 0.1, got {held_out!r}"
            )
        self.loss, self.held_out = loss, float(held_out)
        # A mean squared error weighs all cells alike: one unit for all of them.
        self.likelihood: Likelihood = Gaussian(units="table") if loss == "mse" else Bernoulli()
        hidden_dims = as_widths(hidden_dims)
        built_here = encoder is None and decoder is None
        self._recipe = {"hidden_dims": [*hidden_dims]} if built_here else None
        plan = nets.Plan(self.likelihood, L, num_features, hidden_dims, missing=False)
        with seeded(as_seed(seed)):
            built = nets.complete(plan, encoder, decoder, num_context=0)
        self.encoder, self.decoder, self.event_shape = built[:3]

    @property
    def dims(self) -> Mapping[str, Sequence[str]]:
        """Names of the axes of the sites."""
        cell = ("feature",) if len(self.event_shape) == 1 else ("channel", "height", "width")
        return {"x": ("row", *cell)}

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The model: all rows (``x``), or a mini-batch (``x``, ``size``)."""
        if x is None:
            raise ValueError(
                "x: expected rows, got none; an autoencoder has no distribution of codes to draw "
                "from: latentlab.fit_codes(posterior) fits one, or take a VariationalAutoencoder"
            )
        self._expect_shape(x)
        pyro.module("ae.encoder", self.encoder)
        pyro.module("ae.decoder", self.decoder)
        pyro.module("ae.likelihood", self.likelihood)
        with rows(x, size):
            row = self.likelihood.distribution(self._params(self._codes(x)))
            return pyro.sample("x", row, obs=x)

    @property
    def reads_its_rows(self) -> bool:
        """True: a row is compared with what its own code gives."""
        return True

    def scale_to(self, x: Tensor | Table, size: int | None = None) -> Autoencoder:
        """Check that the loss fits the data, and take its units from them, in place.

        Arguments:
            x: rows, shape (N, D) or (N, C, H, W), NaN where a cell is missing.
            size: unused; as for the model.

        Returns:
            The model itself.

        Raises:
            ValueError: if x has another shape, or values outside of [0, 1] with ``loss="bce"``.
        """
        cells = self._rows(x, min_rows=2)
        # A constant column does no harm: all cells have one unit. Rows that are all equal do.
        if len(self.event_shape) == 1:
            table = self._table(x, min_rows=2)
            if bool((cells == cells[:1]).all()):
                warn_constant(table)
            if self.loss == "mse":
                warn_far(table, mean_and_sd(cells)[1])
        with torch.no_grad():
            self.likelihood.measure(cells)
        return self

    # ---- what a fitted one answers -------------------------------------------------------------

    def encode(self, x: Tensor | Table) -> Tensor:
        """The code of each row, shape (N, L).

        Arguments:
            x: rows, shape (N, D) or (N, C, H, W), NaN where a cell is missing.
        """
        cells = self._rows(x, min_rows=1)
        step = max(1, _CHUNK // math.prod(self.event_shape))
        with torch.no_grad():
            codes = torch.cat([self._codes(part) for part in cells.split(step)])
        expect_codes(codes.isfinite().all(-1))
        return codes

    def decode(self, z: Tensor) -> Tensor:
        """Rows from codes, shape (..., D) or (..., C, H, W), in the units of the data.

        Arguments:
            z: codes, shape (..., L).
        """
        with torch.no_grad():
            z = as_latents(z, self.latent_dim)
            return self.likelihood.mean(expect_cells(self._params(z), z))

    def reconstruct(self, x: Tensor | Table) -> Tensor:
        """Rows decoded from their codes, missing cells included.

        Arguments:
            x: rows, shape (N, D) or (N, C, H, W), NaN where a cell is missing.
        """
        return self.decode(self.encode(x))

    def error(self, x: Tensor | Table) -> Tensor:
        """The loss of each row: squared error, or cross-entropy in nats, over its cells, (N,).

        Arguments:
            x: rows, shape (N, D) or (N, C, H, W), NaN where a cell is missing.
        """
        cells = self._rows(x, min_rows=1)
        with torch.no_grad():
            if self.loss == "bce":
                row = self.likelihood.distribution(self._params(self.encode(x)))
                return -row.log_prob(cells)
            return (self.reconstruct(x) - cells).square().nan_to_num(0.0).flatten(1).sum(-1)

    # ---- what it lends the engine --------------------------------------------------------------

    def label_rows(self, draws: Mapping[str, Tensor], x: Tensor | Table) -> dict[str, Tensor]:
        """Columns for a table of rows: the code, and the error of the reconstruction."""
        codes = self.encode(x)
        columns = {f"z_{j}": codes[:, j] for j in range(self.latent_dim)}
        return columns | {"error": self.error(x)}

    def plot_fit(self, draws: Mapping[str, Tensor], names: Sequence[str], x: Tensor) -> Any:  # noqa: ANN401
        """Reconstructions, what each number of the code does, a map; a matplotlib figure."""
        some = x[:: -(-len(x) // PLOTTED)]
        return plot_autoencoder(
            Coded(some, names, self.likelihood, self.decode, self.encode(some))
        )

    def spec(self) -> dict[str, Any]:
        """What builds this model again, where its networks are ours."""
        if self._recipe is None:
            return {"class": "an Autoencoder with networks of your own", "arguments": {}}
        shape = self.event_shape
        arguments = {
            "loss": self.loss,
            "latent_dim": self.latent_dim,
            "num_features": shape[0] if len(shape) == 1 else list(shape),
            "held_out": self.held_out,
        }
        return {"class": "Autoencoder", "arguments": arguments | self._recipe}

    # ---- inside --------------------------------------------------------------------------------

    def _codes(self, x: Tensor) -> Tensor:
        cells = self.likelihood.inputs(x).to(nets.dtype_of(self.encoder))
        if may_miss(cells):
            cells = torch.where(cells.isnan(), 0.0, cells)
        return read(self.encoder(cells), self.latent_dim).loc

    def _params(self, z: Tensor) -> Tensor:
        """The decoder's numbers for codes (..., L), in a batch such as it is written for."""
        flat = self.decoder(z.reshape(-1, self.latent_dim).to(nets.dtype_of(self.decoder)))
        return flat.reshape(*z.shape[:-1], *flat.shape[1:])

    def _rows(self, x: Tensor | Table, min_rows: int) -> Tensor:
        cells = super()._rows(x, min_rows)
        self.likelihood.check(cells)
        return cells
