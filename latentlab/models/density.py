r"""The density of a table, by a flow.

.. math::
    x_n \sim f_\ast, \qquad
    \log f(x) = \log \mathcal{N}(g^{-1}(u); 0, I)
        + \log \left| \det \frac{\partial g^{-1}}{\partial u} \right| - \sum_d \log s_d,
    \quad u_d = \frac{x_d - m_d}{s_d}

Noise is pushed through an invertible network g, and put into the units of the columns, whose
median m and width s are taken from the data. There are no latents: the weights of g are fitted by
maximum likelihood, and follow the data too closely where nothing stops them. A tenth of the rows
is therefore kept aside, and the fit ends where these get no more probable.

Letters: N rows, D features, S draws.

Reference:
    | Neural spline flows (Durkan et al., 2019)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import TransformedDistribution
from pyro.distributions.transforms import AffineTransform
from torch import Tensor

from latentlab import flows
from latentlab.data.checks import as_count, as_seed, warn_constant
from latentlab.data.table import Table
from latentlab.flows import FlowDistribution
from latentlab.flows.kinds import Kind
from latentlab.models.gmm_units import mean_and_sd, warn_far
from latentlab.models.over_rows import OverRows
from latentlab.nn import as_widths
from latentlab.plates import rows
from latentlab.seeds import seeded

__all__ = ["FlowDensity"]

_FLOOR = 1e-6  # of a column's width, in its largest absolute value
_PLOTTED = 2_000  # rows or draws


class FlowDensity(OverRows):
    r"""A density estimate of a table, as a model without latents; it needs no guide.

    Site: the observed ``x``, shape (N, D), without missing cells. With many rows fit it with
    ``batch_size=256``.

    Arguments:
        num_features: number of columns D.
        kind: of the flow, ``"nsf"`` (bends most), ``"coupling_nsf"``, ``"maf"`` or ``"realnvp"``;
            see :func:`latentlab.flows.make`.
        hidden_dims: widths of the hidden layers of its networks; by default two of 64, or of 2 D
            where that is more.
        num_transforms: maps in the chain.
        num_bins: bins of the splines.
        held_out: share of the rows that a fit keeps aside to know when to stop; 0 for none.
        seed: of the first weights.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import latentlab as ll
        >>> x = ll.data.simulate.eruptions(num_rows=200)
        >>> density = ll.FlowDensity(num_features=2, kind="maf", hidden_dims=(16,))
        >>> posterior = ll.fit(density, x, max_steps=200, progress=False)
        >>> posterior.model.log_prob(x).shape
        torch.Size([200])
        >>> posterior.model.sample(3).shape
        torch.Size([3, 2])
    """

    tolerates_missing = False

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        num_features: int,
        kind: Kind = "nsf",
        *,
        hidden_dims: Sequence[int] | None = None,
        num_transforms: int = 3,
        num_bins: int = 8,
        held_out: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        D = as_count(num_features, "num_features")
        if kind == "planar":
            raise ValueError('kind: "planar" cannot score data; use "nsf" or "maf"')
        number = isinstance(held_out, int | float) and not isinstance(held_out, bool)
        if not number or not 0 <= held_out < 1:
            raise ValueError(
                f"held_out: expected a share in [0, 1), such as 0.1, got {held_out!r}"
            )
        self.num_features, self.kind, self.held_out = D, kind, float(held_out)
        self.event_shape = (D,)
        self.settings = {
            "hidden_dims": None if hidden_dims is None else [*as_widths(hidden_dims)],
            "num_transforms": num_transforms,
            "num_bins": num_bins,
        }
        with seeded(as_seed(seed)):
            flow = flows.make(kind, D, orientation="density", **self.settings)  # type: ignore[arg-type]
        self.flow: Any = flow.double()
        self.register_buffer("loc", torch.zeros(D, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(D, dtype=torch.float64))

    @property
    def dims(self) -> Mapping[str, Sequence[str]]:
        """Names of the axes of the sites."""
        return {"x": ("row", "feature")}

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The model: all rows (``x``), a mini-batch (``x``, ``size``) or new rows (``size``)."""
        pyro.module("density.flow", self.flow)
        with rows(x, size):
            return pyro.sample("x", self.distribution(), obs=x)

    def distribution(self) -> Any:  # noqa: ANN401
        """The distribution of a row, event shape (D,), in the units of the data."""
        flow = FlowDistribution(self.flow, like=self.loc)
        return TransformedDistribution(flow, [AffineTransform(self.loc, self.scale, event_dim=1)])

    def scale_to(self, x: Tensor | Table, size: int | None = None) -> FlowDensity:
        """Take the median and the width of each column from the data, in place.

        Arguments:
            x: rows, shape (N, D).
            size: unused; as for the model.

        Returns:
            The model itself.

        Raises:
            ValueError: if x has another number of columns, or a missing cell.
        """
        table = self._table(x, min_rows=2)
        warn_constant(table)
        cells = table.x.to(self.loc)
        warn_far(table, mean_and_sd(cells)[1])
        with torch.no_grad():
            loc = cells.median(0).values
            gap = (cells - loc).abs()
            unit = gap.amax(0).clamp_min(1e-300)  # the square of a tiny number is zero
            width = unit * (gap / unit).square().mean(0).sqrt()
            least = (_FLOOR * loc.abs()).clamp_min(1e-12)
            self.loc.copy_(loc)
            self.scale.copy_(torch.where(width > 0, width, least))
        return self

    def log_prob(self, x: Tensor | Table) -> Tensor:
        """Log-density (N,) in nats of each row, in the units of the data.

        Arguments:
            x: rows, shape (N, D).
        """
        with torch.no_grad():
            return self.distribution().log_prob(self._table(x, min_rows=1).x.to(self.loc))

    def sample(self, num_samples: int = 1, seed: int = 0) -> Tensor:
        """New rows, shape (S, D).

        Arguments:
            num_samples: number of rows S.
            seed: of the draws.
        """
        num_samples = as_count(num_samples, "num_samples")
        with torch.no_grad(), seeded(as_seed(seed)):
            return self.distribution().sample((num_samples,))

    def label_rows(self, draws: Mapping[str, Tensor], x: Tensor | Table) -> dict[str, Tensor]:
        """A column for a table of rows: the log-density of each, in nats."""
        return {"log_prob": self.log_prob(x)}

    def plot_fit(self, draws: Mapping[str, Tensor], names: Sequence[str], x: Tensor) -> Any:  # noqa: ANN401
        """The rows with the density, or with new rows, on the first two columns; axes."""
        from latentlab.report.density import plot_density

        cells = x[:: -(-len(x) // _PLOTTED)].to(self.loc)
        new = self.sample(min(len(cells), _PLOTTED))

        def density(points: Any) -> Any:  # noqa: ANN401
            return self.log_prob(torch.as_tensor(points)).exp().numpy(force=True)

        pictured = density if self.num_features <= 2 else None
        return plot_density(cells.numpy(force=True), new.numpy(force=True), names, pictured)

    def spec(self) -> dict[str, Any]:
        """What builds this model again; its buffers hold the units of the columns."""
        arguments = {"num_features": self.num_features, "kind": self.kind, **self.settings}
        return {
            "class": "FlowDensity",
            "arguments": {**arguments, "held_out": self.held_out},
        }
