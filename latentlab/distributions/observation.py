r"""What a decoder's numbers say of a row: observation families for tables and images.

A decoder gives M numbers :math:`\eta` for each cell; a likelihood turns them into a distribution
of the row whose cells are independent, and leaves out those that are missing:

.. math:: \log p(x \mid \eta) = \sum_{d \,:\, x_d \text{ observed}} \log p(x_d \mid \eta_d)

==================  ===  ============================================================
likelihood           M   a cell given :math:`\eta`
==================  ===  ============================================================
:class:`Gaussian`    1   :math:`\mathcal{N}(o + u \eta, (u \sigma)^2)`
:class:`Bernoulli`   1   one with log-odds :math:`b + \eta`
:class:`Poisson`     1   a count with rate :math:`e^{b + \eta}`
:class:`Categorical` C   code c with probability proportional to :math:`e^{b_c + \eta_c}`
==================  ===  ============================================================

The numbers o, u and b are measured on the data: :math:`\eta = 0` is the column on its own, and a
network works in the units of nothing. A likelihood is a module: what it learns (a Gaussian's
:math:`\sigma`) is trained with the decoder.

Layout: (..., M D) for a table and (..., M C, H, W) for images, the M numbers of a cell one stride
of the first axis apart.

Letters: N rows, D columns, M numbers a cell, C categories or channels, H height, W width.

References:
    | Simple and effective VAE training with calibrated decoders (Rybkin et al., 2021)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from latentlab.distributions.cells import Cells, exactly

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "Poisson"]

_FLOOR = 1e-3  # of a standard deviation, in units of the data's
_BYTE = 255  # the white of images that are not in [0, 1] yet
_ROUNDING = 1e-4  # by which a share may leave [0, 1]


class Likelihood(nn.Module):
    """What all likelihoods share; one of your own says what a cell is, and no more.

    Write ``cells``, and ``per_cell`` where a cell needs other than one number.

    Example:
        >>> from torch.nn.functional import softplus
        >>> class Laplace(Likelihood):
        ...     per_cell = 2
        ...     def cells(self, params):
        ...         loc, raw_scale = self.split(params)
        ...         return dist.Laplace(loc, softplus(raw_scale))
        >>> laplace = Laplace().bind((3,))
        >>> laplace.distribution(torch.zeros(5, laplace.num_params(3))).log_prob(torch.ones(3))
        tensor([-5.3080, -5.3080, -5.3080, -5.3080, -5.3080])
    """

    per_cell: int = 1
    event_shape: tuple[int, ...] = ()

    def cells(self, params: Tensor) -> Any:  # noqa: ANN401
        """Distribution of the single cells, batch shape ``(..., *event)``.

        Arguments:
            params: the decoder's numbers, (..., M D) or (..., M C, H, W).
        """
        raise TypeError(
            f"{type(self).__name__}: expected a method cells(params) that returns a distribution"
        )

    def num_params(self, num_features: int) -> int:
        """Numbers that a decoder gives for a row of so many columns (or channels)."""
        return self.per_cell * num_features

    def num_cells(self, num_params: int) -> int:
        """Columns (or channels) that so many numbers of a decoder are for."""
        if num_params % self.per_cell:
            raise ValueError(
                f"decoder: expected a multiple of {self.per_cell} numbers, for {self}, "
                f"got {num_params}"
            )
        return num_params // self.per_cell

    def num_inputs(self, num_features: int) -> int:
        """Numbers that an encoder reads of a row of so many columns (or channels)."""
        return num_features

    def spec(self) -> dict[str, Any] | None:
        """What builds this likelihood again, of JSON values; ``None`` for one of your own."""
        return None

    def bind(self, event_shape: Sequence[int]) -> Likelihood:
        """Make room for rows of this shape, (D,) or (C, H, W); returns itself."""
        self.event_shape = tuple(event_shape)
        return self

    def measure(self, x: Tensor) -> None:
        """Learn units and base rates from data ``(N, *event)``, NaN where missing, in place."""

    def check(self, x: Tensor, argument: str = "x") -> None:
        """Raise where observed cells cannot come from this likelihood."""

    def inputs(self, x: Tensor) -> Tensor:
        """What an encoder reads of rows ``(N, *event)``; NaN stays NaN."""
        return x

    def distribution(self, params: Tensor) -> Any:  # noqa: ANN401
        """The distribution of rows, event shape ``event_shape``.

        Arguments:
            params: the decoder's numbers, (..., M D) or (..., M C, H, W).
        """
        return Cells(self.cells(params), self.event_dim, dtype=params.dtype)

    def mean(self, params: Tensor) -> Tensor:
        """Mean of each cell, shape ``(..., *event)``, in the units of the data."""
        return self.distribution(params).mean

    def average(self, params: Tensor, weights: Tensor) -> Tensor:
        """Mean of each cell where the decoder's numbers are one of several, ``(..., *event)``.

        Arguments:
            params: several of them along the first axis, (S, ..., M D) or (S, ..., M C, H, W).
            weights: their probabilities, (S, ...).
        """
        return _weighted(self.mean(params), weights)

    def split(self, params: Tensor) -> tuple[Tensor, ...]:
        """The M numbers of each cell: M tensors of shape ``(..., *event)``."""
        return params.chunk(self.per_cell, -self.event_dim)

    @property
    def event_dim(self) -> int:
        """Number of dimensions of a row: 1 in a table, 3 in images."""
        return max(len(self.event_shape), 1)


class Gaussian(Likelihood):
    r"""Real cells, :math:`x_d \sim \mathcal{N}(o_d + u_d \eta_d, (u_d \sigma_d)^2)`.

    :math:`\sigma` is learned by default: fixed to one, as where a mean squared error is minimised,
    it decides how much of the data the latents may explain, and mostly wrongly.

    Arguments:
        scale: ``"shared"`` for one learned :math:`\sigma`, ``"column"`` for one a column (or
            pixel), or a number, fixed, in the units of the data.
        units: ``"column"`` for an origin and a unit for each column, its mean and standard
            deviation; ``"table"`` for the columns' means, and one unit for all; ``"none"`` for
            zero and one. By default ``"column"`` for tables and ``"table"`` for images.

    Raises:
        ValueError: if an argument is out of range.
    """

    raw_scale: Tensor
    origin: Tensor
    unit: Tensor

    def __init__(self, scale: str | float = "shared", units: str | None = None) -> None:
        super().__init__()
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not (number and 0 < float(scale) < math.inf) and scale not in ("shared", "column"):
            raise ValueError(f'scale: expected "shared", "column" or a number > 0, got {scale!r}')
        if units not in (None, "column", "table", "none"):
            raise ValueError(f'units: expected "column", "table" or "none", got {units!r}')
        self.fixed, self.units = float(scale) if number else None, units
        self.per_column = scale == "column"
        self.bind(())

    def bind(self, event_shape: Sequence[int]) -> Gaussian:
        """Make room for rows of this shape; the scales start at one unit."""
        super().bind(event_shape)
        self.register_buffer("origin", torch.zeros(self.event_shape, dtype=torch.float64))
        self.register_buffer("unit", torch.ones(self.event_shape, dtype=torch.float64))
        if self.fixed is None:
            shape = self.event_shape if self.per_column else ()
            self.raw_scale = nn.Parameter(torch.zeros(shape))
        return self

    def spec(self) -> dict[str, Any]:
        """What builds this likelihood again."""
        scale = self.fixed or ("column" if self.per_column else "shared")
        return {"class": "Gaussian", "arguments": {"scale": scale, "units": self.units}}

    @property
    def has_column_units(self) -> bool:
        """Whether each column has a unit of its own."""
        return (self.units or ("column" if len(self.event_shape) == 1 else "table")) == "column"

    @property
    def scale(self) -> Tensor:
        """Standard deviation of each cell in the units of the data, shape ``event_shape``."""
        return (self._own_scale() * self.unit).expand(self.event_shape)

    def cells(self, params: Tensor) -> dist.Normal:
        """Normal cells in their own units."""
        return dist.Normal(params, self._own_scale().to(params.dtype))

    def distribution(self, params: Tensor) -> Cells:
        """The distribution of rows, in the units of the data."""
        cells, dtype = self.cells(params), params.dtype
        return Cells(cells, self.event_dim, origin=self.origin, unit=self.unit, dtype=dtype)

    def measure(self, x: Tensor) -> None:
        """Origin and unit of each column, in place."""
        if self.units == "none":
            return
        by_column = self.has_column_units
        origin = x.nanmean(0)
        away = x - origin
        size = away.abs().nan_to_num(0.0)
        size = size.amax(0) if by_column else size.amax().expand(self.event_shape)
        size = torch.where(size > 0, size, 1.0)
        square = (away / size).square()
        mean = square.nanmean(0) if by_column else square.nanmean()
        unit = size * mean.sqrt()
        # A constant column has the scale of its size, one if it is zero.
        other = torch.where(origin == 0, 1.0, origin.abs())
        rounding = 8 * torch.finfo(x.dtype).eps * origin.abs()
        self.origin = origin
        self.unit = torch.where(unit > rounding, unit, other)

    def inputs(self, x: Tensor) -> Tensor:
        """Rows in units of the columns."""
        return (x - self.origin) / self.unit

    def _own_scale(self) -> Tensor:
        if self.fixed is not None:
            return self.fixed / self.unit
        return ((2 * self.raw_scale).exp() + _FLOOR**2).sqrt()


class Bernoulli(Likelihood):
    r"""Cells that are 0 or 1, or shares between them, such as grey values.

    .. math:: \log p(x_d) = x_d \log \pi_d + (1 - x_d) \log (1 - \pi_d),
              \quad \pi_d = \mathrm{logistic}(b_d + \eta_d)

    For a share this is the expected log-probability of a pixel that is drawn to be 1 with
    probability x; it is a probability for 0 and 1 only.
    """

    base: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bind(())

    def bind(self, event_shape: Sequence[int]) -> Bernoulli:
        """Make room for rows of this shape."""
        super().bind(event_shape)
        self.register_buffer("base", torch.zeros(self.event_shape))
        return self

    def spec(self) -> dict[str, Any]:
        """What builds this likelihood again."""
        return {"class": "Bernoulli", "arguments": {}}

    def cells(self, params: Tensor) -> dist.Bernoulli:
        """Bernoulli cells."""
        return _Share(logits=params + self.base.to(params.dtype))

    def measure(self, x: Tensor) -> None:
        """Log-odds of each column, in place."""
        count = (~x.isnan()).sum(0)
        ones = x.clamp(0, 1).nansum(0)
        self.base = torch.log((ones + 0.5) / (count - ones + 0.5)).to(self.base.dtype)

    def check(self, x: Tensor, argument: str = "x") -> None:
        """Raise for values outside of [0, 1], warn of those outside by rounding only."""
        low, high = _range(x)
        if low < -_ROUNDING or high > 1 + _ROUNDING:
            what, worst = ("max", high) if high > 1 + _ROUNDING else ("min", low)
            way = f"divide by {high:g}" if low >= 0 else "take the Gaussian likelihood"
            whole = bool((x == x.floor())[~x.isnan()].all())
            if low >= 0 and high <= _BYTE and whole:  # dark images are bytes, too
                way = "divide by 255, x / 255.0, where these are bytes of images; "
                way += f"by {high:g} or take the Poisson likelihood where they are counts"
            raise ValueError(f"{argument}: expected [0, 1], got {what} {worst:g}; {way}")
        if low < 0 or high > 1:
            warnings.warn(
                f"{argument}: values from {low:.9g} to {high:.9g} are clamped to [0, 1]",
                stacklevel=3,
            )


class _Share(dist.Bernoulli):
    """A Bernoulli that scores shares, too."""

    support = constraints.interval(-_ROUNDING, 1 + _ROUNDING)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value, logits = torch.broadcast_tensors(value.clamp(0, 1), self.logits)
        loss = nn.functional.binary_cross_entropy_with_logits
        return -loss(logits, value.to(logits.dtype), reduction="none")


class Poisson(Likelihood):
    r"""Counts, :math:`x_d \sim \mathrm{Poisson}(e^{b_d + \eta_d})`."""

    base: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bind(())

    def bind(self, event_shape: Sequence[int]) -> Poisson:
        """Make room for rows of this shape."""
        super().bind(event_shape)
        self.register_buffer("base", torch.zeros(self.event_shape))
        return self

    def spec(self) -> dict[str, Any]:
        """What builds this likelihood again."""
        return {"class": "Poisson", "arguments": {}}

    def cells(self, params: Tensor) -> dist.Poisson:
        """Poisson cells."""
        return dist.Poisson((params + self.base.to(params.dtype)).exp())

    def measure(self, x: Tensor) -> None:
        """Log rate of each column, in place."""
        count = (~x.isnan()).sum(0)
        self.base = torch.log((x.nansum(0) + 0.5) / (count + 0.5)).to(self.base.dtype)

    def check(self, x: Tensor, argument: str = "x") -> None:
        """Raise for what is no count."""
        _check_whole(x, argument, math.inf, "counts (0, 1, 2, ...)")

    def inputs(self, x: Tensor) -> Tensor:
        """Logarithms of the counts and one, about that of the mean."""
        return x.log1p() - self.base.exp().log1p()


class Categorical(Likelihood):
    r"""Codes 0, ..., C - 1, :math:`\Pr(x_d = c) \propto e^{b_{cd} + \eta_{cd}}`.

    Arguments:
        num_categories: C, the same for all columns.

    Raises:
        ValueError: if there are not at least two.
    """

    base: Tensor

    def __init__(self, num_categories: int) -> None:
        super().__init__()
        count = isinstance(num_categories, int) and not isinstance(num_categories, bool)
        if not count or num_categories < 2:
            kind = type(num_categories).__name__
            raise ValueError(
                f"num_categories must be an int >= 2, got {num_categories!r} ({kind})"
            )
        self.num_categories = self.per_cell = num_categories
        self.bind(())

    def spec(self) -> dict[str, Any]:
        """What builds this likelihood again."""
        arguments = {"num_categories": self.num_categories}
        return {"class": "Categorical", "arguments": arguments}

    def num_inputs(self, num_features: int) -> int:
        """A number for each category of each column."""
        return self.num_categories * num_features

    def bind(self, event_shape: Sequence[int]) -> Categorical:
        """Make room for rows of this shape."""
        super().bind(event_shape)
        self.register_buffer("base", torch.zeros(self.num_categories, *self.event_shape))
        return self

    def cells(self, params: Tensor) -> dist.Categorical:
        """Categorical cells."""
        event_dim = self.event_dim
        logits = params.unflatten(-event_dim, (self.num_categories, -1))
        logits = logits + self.base.to(params.dtype)
        return dist.Categorical(logits=logits.movedim(-1 - event_dim, -1))

    def measure(self, x: Tensor) -> None:
        """Log frequencies in each column, in place."""
        codes = torch.arange(self.num_categories).reshape(-1, *(1,) * x.dim()).to(x)
        counts = (x == codes).sum(1).to(self.base.dtype) + 0.5  # (C, *event)
        self.base = torch.log(counts / counts.sum(0))

    def check(self, x: Tensor, argument: str = "x") -> None:
        """Raise for what is no code of a category."""
        C = self.num_categories
        _check_whole(x, argument, C - 1, f"codes 0 to {C - 1} (num_categories={C})")

    def inputs(self, x: Tensor) -> Tensor:
        """One for the category, zero for the others, laid out as the decoder's numbers are."""
        event_dim = self.event_dim
        x = x.unsqueeze(-event_dim - 1)
        shape = (self.num_categories, *(1,) * event_dim)
        hot = (x == torch.arange(self.num_categories, device=x.device).reshape(shape)).to(x.dtype)
        return torch.where(x.isnan(), x, hot).flatten(-event_dim - 1, -event_dim)

    def mean(self, params: Tensor) -> Tensor:
        """The most probable code of each cell, as a floating number."""
        return self.cells(params).logits.argmax(-1).to(params.dtype)

    def average(self, params: Tensor, weights: Tensor) -> Tensor:
        """The most probable code of each cell, as a floating number: codes have no mean."""
        return _weighted(self.cells(params).probs, weights).argmax(-1).to(params.dtype)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of values (S, ..., *rest) by weights (S, ...), one value after another."""
    weights = weights.reshape(*weights.shape, *(1,) * (values.dim() - weights.dim()))
    return (weights.to(values.dtype) * values).sum(0)


def _range(x: Tensor) -> tuple[float, float]:
    return float(x.nan_to_num(nan=math.inf).min()), float(x.nan_to_num(nan=-math.inf).max())


def _check_whole(x: Tensor, argument: str, most: float, expected: str) -> None:
    bad = (x < 0) | (x > most) | (x != x.floor()) & ~x.isnan()
    if bad.any():
        first = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{argument}: expected {expected}, got {exactly(float(x[tuple(first)]))} at {first} "
            f"({int(bad.sum())} such cells); correct or recode them, or put NaN for missing ones"
        )
