r"""Distributions of rows whose cells are independent, and may be missing.

.. math:: \log p(x) = \sum_{d \,:\, x_d \text{ observed}} \log p_d(x_d)

A cell that is NaN is missing: its factor integrates to one and is left out, which is exact.

Letters: D cells of a row, whatever their shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import _sum_rightmost

from latentlab.distributions.quadratic import is_traced

__all__ = ["Cells", "FillsRows", "Parts", "exactly", "fill_of", "may_miss"]


def may_miss(x: Tensor) -> bool:
    """Whether cells may be NaN: true where they are, or where x cannot be looked at.

    A sum is the cheapest look; a step of training does not notice it.

    Arguments:
        x: any numbers.

    Example:
        >>> may_miss(torch.tensor([1.0, float("nan")])), may_miss(torch.ones(2))
        (True, False)
    """
    return is_traced() or bool(x.sum().isnan())


@runtime_checkable
class FillsRows(Protocol):
    """A distribution of a row that knows its missing cells given those that are there."""

    def given_rest(self, rows: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of missing cells given the others.

        For a batch shape (..., 1, K), the 1 for the rows. Letters: n rows, M missing cells.

        Arguments:
            rows: shape (n, D), NaN in the cells that are missing.
            gap: columns of these, the same for all rows, rising, shape (M,).

        Returns:
            Two tensors (..., n, K, M).
        """


def fill_of(row: Any, rows: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """What ``row.given_rest`` says; without it, what a row is that misses all of its cells.

    Arguments:
        row: a distribution of a row, batch shape (..., 1, K).
        rows: as for :class:`FillsRows`.
        gap: as for :class:`FillsRows`.

    Raises:
        ValueError: if some cells are there, and the distribution does not know of the others.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> row = Independent(Normal(torch.zeros(1, 3, 2), 1.0), 1)
        >>> mean, sd = fill_of(row, torch.full((5, 2), torch.nan), torch.arange(2))
        >>> mean.shape
        torch.Size([5, 3, 2])
    """
    if isinstance(row, FillsRows):
        return row.given_rest(rows, gap)
    if len(gap) < rows.shape[-1]:
        raise ValueError(
            f"x: cells that are missing beside others: a {type(row).__name__} does not say what "
            "they are given the others; give it a method given_rest(rows, gap), or emit "
            "latentlab.distributions.Cells or NormalRow"
        )
    return _for_rows(row.mean, len(rows)), _for_rows(row.stddev, len(rows))


def _for_rows(values: Tensor, num_rows: int) -> Tensor:
    """(..., 1, K, M) as (..., n, K, M)."""
    return values.expand(*values.shape[:-3], num_rows, *values.shape[-2:])


class _OrMissing(constraints.Constraint):
    """What a constraint on cells allows, and NaN for a missing cell."""

    def __init__(self, cell: Any, event_dim: int) -> None:  # noqa: ANN401
        self.cell, self._event_dim = cell, event_dim

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return self._event_dim

    def check(self, value: Tensor) -> Tensor:
        fine = self.cell.check(value) | value.isnan()
        return fine.flatten(-self._event_dim).all(-1)

    def __repr__(self) -> str:
        return f"{self.cell} or NaN"


class Cells(TorchDistribution):
    r"""Independent cells; those that are NaN are missing and integrated out.

    Cells may have a unit and an origin of their own, :math:`x_d = o_d + u_d y_d` with y from
    ``base``. The origin is taken off first, so that data far from zero lose no digits.

    Arguments:
        base: distribution of the single cells, batch shape ``(*batch, *event)``.
        event_dim: number of dimensions of a row: 1 in a table, 3 in images.
        origin: o, shape ``event`` or less; for real cells only.
        unit: u, shape ``event`` or less, positive.
        fill: a number inside of the support of ``base``, put in the place of NaN and left out of
            the sum.
        dtype: of the log-density; also that which cells are turned to, their origin taken off.
        validate_args: as in ``torch.distributions``.

    Example:
        >>> from pyro.distributions import Normal
        >>> row = Cells(Normal(torch.zeros(2), 1.0), event_dim=1)
        >>> row.log_prob(torch.tensor([[0.0, 0.0], [0.0, float("nan")]]))
        tensor([-1.8379, -0.9189])
    """

    arg_constraints = {}

    def __init__(
        self,
        base: TorchDistribution,
        event_dim: int,
        *,
        origin: Tensor | None = None,
        unit: Tensor | None = None,
        fill: float = 0.0,
        dtype: torch.dtype | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.base, self.origin, self.unit = base, origin, unit
        self.fill, self.dtype = fill, dtype
        split = len(base.batch_shape) - event_dim
        batch_shape, event_shape = base.batch_shape[:split], base.batch_shape[split:]
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the cells, and NaN."""
        return _OrMissing(self.base.support, len(self.event_shape))

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: Any = None,  # noqa: ANN401
    ) -> Cells:
        """The same rows with a larger batch shape."""
        new = self._get_checked_instance(Cells, _instance)
        new.base = self.base.expand(Size(batch_shape) + self.event_shape)
        new.origin, new.unit, new.fill, new.dtype = self.origin, self.unit, self.fill, self.dtype
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of rows in nats, shape of the batch."""
        if self._validate_args:
            self._validate_sample(value)
        if self.origin is not None:
            value = value - self.origin
        if self.unit is not None:
            value = value / self.unit
        if self.dtype is not None:
            value = value.to(self.dtype)
        missing = value.isnan() if may_miss(value) else None
        cells = self.base.log_prob(
            value if missing is None else torch.where(missing, self.fill, value)
        )
        if self.unit is not None:
            cells = cells - self.unit.log().to(cells.dtype)
        if missing is not None:
            cells = torch.where(missing, 0.0, cells)
        return _sum_rightmost(cells, len(self.event_shape))

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch, *event)``; codes are floating numbers, too."""
        with torch.no_grad():
            value = self._placed(self.base.sample(Size(sample_shape)))
        return value if value.is_floating_point() else value.to(torch.get_default_dtype())

    @property
    def mean(self) -> Tensor:
        """Mean of each cell."""
        return self._placed(self.base.mean)

    @property
    def variance(self) -> Tensor:
        """Variance of each cell."""
        return self.stddev.square()

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of each cell."""
        return self.base.variance.sqrt() * (1.0 if self.unit is None else self.unit)

    def given_rest(self, rows: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of missing cells, of tables; the others say nothing of them.

        Arguments:
            rows: as for :class:`FillsRows`.
            gap: as for :class:`FillsRows`.
        """
        mean, sd = self.mean[..., gap], self.stddev[..., gap]
        return _for_rows(mean, len(rows)), _for_rows(sd, len(rows))

    def _placed(self, value: Tensor) -> Tensor:
        value = value if self.unit is None else value * self.unit
        return value if self.origin is None else value + self.origin


class Parts(TorchDistribution):
    """Rows put together from columns of several kinds.

    Arguments:
        parts: distributions over some of the columns each, of one batch shape, event (D_g,).
        order: place of each column in the parts put side by side, shape (D,).
        validate_args: as in ``torch.distributions``.

    Example:
        >>> from pyro.distributions import Normal, Poisson
        >>> parts = [Cells(Normal(torch.zeros(1), 1.0), 1), Cells(Poisson(torch.ones(1)), 1)]
        >>> row = Parts(parts, torch.tensor([1, 0]))              # counts first
        >>> row.log_prob(torch.tensor([0.0, float("nan")]))
        tensor(-1.)
    """

    arg_constraints = {}

    def __init__(
        self, parts: Sequence[Cells], order: Tensor, validate_args: bool | None = None
    ) -> None:
        self.parts, self.order = tuple(parts), order
        super().__init__(parts[0].batch_shape, order.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The supports of the parts."""
        sizes = [part.event_shape[0] for part in self.parts]
        return _InParts([part.support for part in self.parts], sizes, self.order.argsort())

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: Any = None,  # noqa: ANN401
    ) -> Parts:
        """The same rows with a larger batch shape."""
        new = self._get_checked_instance(Parts, _instance)
        new.parts = tuple(part.expand(batch_shape) for part in self.parts)
        new.order = self.order
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of rows in nats, shape of the batch."""
        if self._validate_args:
            self._validate_sample(value)
        beside = value.index_select(-1, self.order.argsort())
        pieces = beside.split([part.event_shape[0] for part in self.parts], -1)
        first, *others = (p.log_prob(v) for p, v in zip(self.parts, pieces, strict=True))
        return sum(others, first)

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch, D)``."""
        return self._put_together([part.sample(sample_shape) for part in self.parts])

    @property
    def mean(self) -> Tensor:
        """Mean of each cell."""
        return self._put_together([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:
        """Variance of each cell."""
        return self._put_together([part.variance for part in self.parts])

    def given_rest(self, rows: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of missing cells given the others of their part.

        Arguments:
            rows: as for :class:`FillsRows`.
            gap: as for :class:`FillsRows`.
        """
        means, sds, places = [], [], []
        sizes = [part.event_shape[0] for part in self.parts]
        for part, columns in zip(self.parts, self.order.argsort().split(sizes), strict=True):
            own = torch.isin(columns, gap).nonzero()[:, 0]
            if len(own):
                mean, sd = fill_of(part, rows[:, columns], own)
                means.append(mean)
                sds.append(sd)
                places.append(columns[own])
        order = torch.cat(places).argsort()
        return torch.cat(means, -1)[..., order], torch.cat(sds, -1)[..., order]

    def _put_together(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces, -1).index_select(-1, self.order)


class _InParts(constraints.Constraint):
    event_dim = 1

    def __init__(
        self, supports: list[constraints.Constraint], sizes: list[int], beside: Tensor
    ) -> None:
        self.supports, self.sizes, self.beside = supports, sizes, beside

    def check(self, value: Tensor) -> Tensor:
        pieces = value.index_select(-1, self.beside).split(self.sizes, -1)
        fine = [s.check(piece) for s, piece in zip(self.supports, pieces, strict=True)]
        return torch.stack(fine).all(0)


def exactly(value: float) -> str:
    """A number for a message: short, but for one that this would round."""
    short = f"{value:g}"
    return short if float(short) == value or value != value else repr(value)
