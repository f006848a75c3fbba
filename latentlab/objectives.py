r"""What a fit maximises: the evidence lower bound, and bounds that are tighter or less noisy.

.. math::
    L_{\alpha, K} = \mathbb{E}_{z_1, \dots, z_K \sim q}\,
        \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_k w_k^{1 - \alpha}, \qquad
    w_k = \frac{p(x, z_k)}{q(z_k)}

For :math:`\alpha \to 1` it is the ELBO, for :math:`\alpha = 0` the importance-weighted bound,
which for K draws lies between the ELBO and :math:`\log p(x)`. Where all latents are local to the
rows and the guide is a function of its row, as a VAE's is, every row has weights of its own and
the bound is the sum of theirs; elsewhere a draw has one weight for all data.

A bound is what is *climbed*. What is reported, judged and compared stays the ELBO.

References:
    | Importance weighted autoencoders (Burda et al., 2016)
    | Rényi divergence variational inference (Li and Turner, 2016)
    | Sticking the landing (Roeder et al., 2017)
    | Doubly reparameterized gradient estimators for Monte Carlo objectives (Tucker et al., 2019)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

__all__ = ["ELBO", "IWAE", "DReG", "Objective", "Renyi", "StickingTheLanding"]


@dataclass(frozen=True)
class Objective:
    """A bound and how its gradient is taken; the classes of this module say which."""

    alpha: ClassVar[float] = 1.0
    num_samples: ClassVar[int] = 1
    leaves_out_score: ClassVar[bool] = False


@dataclass(frozen=True)
class ELBO(Objective):
    """The evidence lower bound; KL in closed form where torch knows it.

    Example:
        >>> ELBO()
        ELBO()
    """


@dataclass(frozen=True)
class StickingTheLanding(Objective):
    r"""The ELBO, with a gradient that leaves out the score of q.

    The score :math:`\nabla_\phi \log q_\phi(z)` is zero on average; without it the gradient is
    zero draw by draw where q is the posterior. Guides of ours do so unasked.
    """

    leaves_out_score: ClassVar[bool] = True


@dataclass(frozen=True)
class IWAE(Objective):
    """The importance-weighted bound: for a model that is to be learnt rather than a posterior.

    Arguments:
        num_samples: draws K behind one weight; the bound rises with them, and so does its price.

    Raises:
        ValueError: for fewer than two.
    """

    num_samples: int = 8  # type: ignore[misc]
    alpha: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _expect_several(self.num_samples)


@dataclass(frozen=True)
class DReG(IWAE):
    """The importance-weighted bound, with a gradient of the guide that does not fade with K.

    Of K draws the plain gradient of a guide is less and less signal; here the score of q is left
    out, and the mean of the gradient stays the same.

    Arguments:
        num_samples: draws K behind one weight.
    """

    leaves_out_score: ClassVar[bool] = True


@dataclass(frozen=True)
class Renyi(Objective):
    r"""The variational Rényi bound.

    Arguments:
        alpha: below 1 the bound is above the ELBO and q covers more mass; above 1 it is below
            the ELBO, and q seeks modes the more.
        num_samples: draws K behind one weight.

    Raises:
        ValueError: for an ``alpha`` of 1, which is the ELBO, or that is not finite; for fewer
            draws than two.
    """

    alpha: float = 0.5  # type: ignore[misc]
    num_samples: int = 8  # type: ignore[misc]

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not (number and math.isfinite(self.alpha)) or self.alpha == 1:
            raise ValueError(
                f"alpha: expected a finite number other than 1 (which is the ELBO), "
                f"got {self.alpha!r}"
            )
        _expect_several(self.num_samples)


def _expect_several(num_samples: int) -> None:
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 2:
        raise ValueError(f"num_samples: expected an int >= 2, got {num_samples!r}")
