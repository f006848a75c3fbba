r"""Which latent dimensions an encoder uses.

.. math::
    \mathrm{KL}_j = \mathbb{E}_x \, \mathrm{KL}(q(z_j \mid x) \,\|\, \mathcal{N}(0, 1)), \qquad
    A_j = \mathrm{Var}_x \, \mathbb{E}_q[z_j \mid x]

A dimension that the decoder ignores costs nothing and tells nothing: its encodings are the prior,
whatever the row, so that both figures are zero. For a linear decoder with Gaussian noise, where
the optimum is known (:math:`\lambda_j` the eigenvalues of the data's covariance),

.. math:: \mathrm{KL}_j = \tfrac12 \log (\lambda_j / \sigma^2), \qquad
          A_j = 1 - \sigma^2 / \lambda_j,

and the dimensions with :math:`\lambda_j > \sigma^2` are the active ones.

Letters: N rows, L latent dimensions.

References:
    | Importance weighted autoencoders (Burda, Grosse and Salakhutdinov, 2016)
    | Don't blame the ELBO! A linear VAE perspective on posterior collapse (Lucas et al., 2019)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor
from latentlab.diagnostics.estimate import Estimate

__all__ = ["Collapse", "collapse", "kl_per_dimension"]

_THRESHOLD = 0.01
_SHOWN = 8  # dimensions by number
_MOST = 1e150  # whose square a double can hold


@dataclass(frozen=True, eq=False)
class Collapse:
    """Result of :func:`collapse`.

    Arguments:
        variance: variance of the posterior means over rows, shape (L,); at most about 1.
        variance_se: their standard errors, shape (L,).
        kl: KL to the standard normal in nats, shape (L,); ``None`` where scales are not known.
        kl_se: their standard errors, shape (L,).
        threshold: variance above which a dimension is active.
    """

    variance: Tensor
    variance_se: Tensor
    kl: Tensor | None
    kl_se: Tensor | None
    threshold: float

    @property
    def active(self) -> Tensor:
        """True where a dimension is used, shape (L,)."""
        return self.variance > self.threshold

    @property
    def inactive(self) -> list[int]:
        """The dimensions that are not used."""
        return (~self.active).nonzero()[:, 0].tolist()

    @property
    def total_kl(self) -> Estimate | None:
        """KL of all dimensions together, in nats per row, where scales are known."""
        if self.kl is None or self.kl_se is None:
            return None
        # Dimensions share their rows: their errors may add up, and no more than that.
        return Estimate(float(self.kl.sum()), float(self.kl_se.sum()))

    def __str__(self) -> str:
        unused, num = self.inactive, len(self.variance)
        if len(unused) == num:
            return f"posterior collapse: none of the {num} latent dimensions is used"
        if not unused:
            return f"all {num} latent dimensions are active"
        more = ", ..." if len(unused) > _SHOWN else ""
        which = ", ".join(f"z[{j}]" for j in unused[:_SHOWN])
        be = "is" if len(unused) == 1 else "are"
        return f"{len(unused)} of {num} latent dimensions {be} inactive ({which}{more})"


def collapse(
    loc: ArrayLike | Tensor,
    scale: ArrayLike | Tensor | None = None,
    threshold: float = _THRESHOLD,
) -> Collapse:
    """Measure how much each latent dimension is used.

    How to read it: a few inactive dimensions are room to spare, and mean that fewer would do. If
    all are inactive, the decoder models the data without the latents, and the encoder is of no
    use: warm the KL up, give it free bits, or make the decoder weaker.

    Arguments:
        loc: posterior means of the rows, shape (N, L), N at least 2.
        scale: posterior standard deviations, shape (N, L), where the encodings are normal.
        threshold: variance of the means above which a dimension is active.

    Returns:
        The figures with their errors.

    Raises:
        ValueError: for other shapes, or a scale that is not positive.

    Example:
        >>> loc = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        >>> print(collapse(loc, torch.tensor([[0.1, 1.0], [0.1, 1.0]])))
        1 of 2 latent dimensions is inactive (z[1])
    """
    loc = _matrix(loc, "loc")
    if not (isinstance(threshold, Real) and threshold >= 0):
        raise ValueError(f"threshold: expected a number from 0, got {threshold!r}")
    N = len(loc)
    square = (loc - loc.mean(0)) ** 2
    variance = square.mean(0) * N / (N - 1)
    variance_se = square.std(0) / math.sqrt(N)
    if scale is None:
        return Collapse(variance, variance_se, None, None, threshold)
    kl = kl_per_dimension(loc, scale)
    return Collapse(variance, variance_se, kl.mean(0), kl.std(0) / math.sqrt(N), threshold)


def kl_per_dimension(loc: ArrayLike | Tensor, scale: ArrayLike | Tensor) -> Tensor:
    r"""KL of normal encodings to the standard normal, for each row and dimension.

    .. math:: \mathrm{KL}_{nj} = \tfrac12 (\mu_{nj}^2 + \sigma_{nj}^2 - 1) - \log \sigma_{nj}

    Arguments:
        loc: posterior means, shape (N, L).
        scale: posterior standard deviations, shape (N, L).

    Returns:
        In nats, shape (N, L).

    Raises:
        ValueError: for other shapes, or a scale that is not positive.

    Example:
        >>> kl_per_dimension([[0.0, 1.0], [0.0, 2.0]], torch.ones(2, 2))
        tensor([[0.0000, 0.5000],
                [0.0000, 2.0000]], dtype=torch.float64)
    """
    loc, scale = _matrix(loc, "loc"), _matrix(scale, "scale")
    if loc.shape != scale.shape:
        raise ValueError(
            f"scale: expected the shape of loc, {tuple(loc.shape)}, got {tuple(scale.shape)}"
        )
    if not (scale > 0).all():
        raise ValueError(f"scale: expected positive numbers, got {float(scale.min()):g}")
    # expm1 keeps the digits of a dimension that is hardly used.
    log = scale.log()
    return 0.5 * (loc**2 + torch.expm1(2 * log)) - log


def _matrix(values: ArrayLike | Tensor, argument: str) -> Tensor:
    matrix = to_tensor(values, argument).double()
    if matrix.dim() != 2 or len(matrix) < 2:
        raise ValueError(
            f"{argument}: expected shape (N, L) with at least 2 rows, got {tuple(matrix.shape)}"
        )
    if not (matrix.abs() < _MOST).all():
        where = (~(matrix.abs() < _MOST)).nonzero()[0].tolist()
        raise ValueError(
            f"{argument}: expected finite numbers below {_MOST:g}, not so first at {where}"
        )
    return matrix
