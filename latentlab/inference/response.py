r"""Linear-response covariance: how the means of a mean-field guide answer to the model.

A mean-field guide finds means, and standard deviations that are too small where latents are
correlated. Tilt the log density by :math:`t^\top u` and the optimum :math:`\phi^*` moves; were the
means of q those of the posterior, the rate at which they do so would be its covariance,

.. math:: \Sigma = \frac{\mathrm{d} m}{\mathrm{d} t}
          = \frac{\partial m}{\partial \phi} H^{-1} \frac{\partial m}{\partial \phi}^{\!\top},
          \qquad H = -\nabla^2_\phi F(\phi^*) .

For a Gaussian posterior it is exact; elsewhere it is as good as the means of q. F is the ELBO at
fixed draws, so that H is exact, too.

Letters: L latent numbers, K parameters.

References:
    | Covariances, robustness, and variational Bayes (Giordano, Broderick and Jordan, 2018)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from latentlab.data.checks import as_seed
from latentlab.guides import FullRank, MeanField
from latentlab.inference import objectives
from latentlab.inference.check import bind
from latentlab.inference.evaluation import evaluate
from latentlab.inference.fixed_draws import (
    FixedDraws,
    Product,
    conjugate_gradients,
    paired_noise,
)
from latentlab.inference.pair import Pair, copy_pair
from latentlab.inference.posterior import Posterior
from latentlab.inference.sandbox import manual_seed, stream

__all__ = ["curved_draws", "linear_response", "response_covariance"]

_DENSE = 2000  # parameters up to which the whole matrix is written down
_FEWEST, _PER_LATENT = 128, 4  # draws behind second derivatives, at least
_NUMBERS = 2**23  # that these look at
_MEASURED = 1000  # draws behind the ELBO
_NOTE = (
    "means by a mean-field guide; standard deviations and correlations by linear response, "
    "not by the ELBO that is reported"
)


def linear_response(posterior: Posterior, seed: int | None = None) -> Posterior:
    """The posterior with the correlations and standard deviations that a mean-field guide lacks.

    The means stay; the guide becomes a full-rank Gaussian with the linear-response covariance.
    It is a posterior like any other: ``summary`` has the corrected standard deviations, ``check``
    says how good they are, and ``notes`` and ``method`` say where they come from.

    Arguments:
        posterior: fitted with ``guide="mean_field"``, its data at hand.
        seed: of the draws, by default the fit's.

    Returns:
        Another posterior; the one given is not changed.

    Raises:
        ValueError: for another guide, or one that stands at no optimum.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import latentlab as ll
        >>> x = torch.randn(50, 1) + 0.3 * torch.randn(50, 2)
        >>> def model(x, y):
        ...     slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        ...     with ll.rows(x):
        ...         pyro.sample("y", dist.Normal((x * slopes).sum(-1), 1.0), obs=y)
        >>> narrow = ll.fit(model, (x, x.sum(-1)), "mean_field", progress=False)
        >>> wide = ll.linear_response(narrow)
        >>> bool((wide.summary()["sd"] > 1.5 * narrow.summary()["sd"]).all())
        True
    """
    if not isinstance(posterior.guide, MeanField):
        raise ValueError(
            'posterior: expected one fitted with guide="mean_field", which is to be corrected; '
            f"this one has a {type(posterior.guide).__name__}"
        )
    posterior._need_data("linear_response")
    chosen = posterior.seed if seed is None else as_seed(seed)
    model, guide = copy_pair(posterior.model, posterior.guide)
    pair = replace(posterior.pair, model=model, guide=guide)
    with pair.entered(stream(chosen, "linear response")):
        covariance = response_covariance(pair, stream(chosen, "response"))
        if covariance is None:
            raise ValueError(
                "posterior: its guide stands at no optimum, so that nothing is known of how it "
                "answers; fit it until it has converged"
            )
        mean, wide = posterior.guide.free_mean().detach(), FullRank()
        bind(pair, wide)
        wide.lay(mean, torch.linalg.inv(covariance).to(mean.device))
        pair.guide = wide
        manual_seed(stream(chosen, "elbo"))
        with torch.no_grad():
            elbo = evaluate(pair, objectives.draw(pair, _MEASURED if pair.vectorised else 100))
    return replace(
        posterior,
        pair=pair,
        elbo=elbo,
        method=f"{posterior.method}, linear response",
        notes=(*posterior.notes, _NOTE),
        ladder=(),
        recorded=None,
    )


def curved_draws(pair: Pair, num_latents: int) -> int:
    """How many draws second derivatives are taken at, an even number."""
    size = sum(t.numel() for t in pair.data.tensors()) + num_latents
    wanted = max(_FEWEST, _PER_LATENT * num_latents)
    return 2 * max(8, min(wanted, _NUMBERS // size) // 2)


def response_covariance(pair: Pair, seed: int, *, dense: bool | None = None) -> Tensor | None:
    """Covariance (L, L) of the latents on the real line, at the optimum of a mean-field guide.

    Arguments:
        pair: the pair, entered; its guide is a fitted ``MeanField``, whose frame is moved.
        seed: of the draws.
        dense: whether the matrix of second derivatives is written down; by default up to 2,000
            parameters. Beyond, L systems are solved by conjugate gradients.

    Returns:
        The covariance; ``None`` where the guide is at no optimum: H is not positive definite.
    """
    guide = pair.guide
    if not isinstance(guide, MeanField):
        raise TypeError(f"guide: expected a MeanField, got {type(guide).__name__}")
    guide.recentre()  # parameters in posterior standard deviations
    size = guide.num_latents
    draws = FixedDraws(pair, paired_noise(curved_draws(pair, size), size, seed))
    product, num = draws.curvature(), 2 * size
    dense = num <= _DENSE if dense is None else dense
    columns = _by_matrix(product, num, size) if dense else _one_by_one(product, num, size)
    if columns is None:
        return None
    frame = guide.frame.detach().double().cpu()
    covariance = (columns + columns.T) / 2 * frame[:, None] * frame
    return covariance if _is_positive(covariance) else None


def _by_matrix(product: Product, num: int, size: int) -> Tensor | None:
    eye = torch.eye(num, dtype=torch.float64, device="cpu")
    matrix = torch.stack([product(row) for row in eye])
    factor, fault = torch.linalg.cholesky_ex((matrix + matrix.T) / 2)
    return None if fault else torch.cholesky_solve(eye[:, :size], factor)[:size]


def _one_by_one(product: Product, num: int, size: int) -> Tensor | None:
    columns = []
    for row in torch.eye(num, dtype=torch.float64, device="cpu")[:size]:
        column = conjugate_gradients(product, row)
        if column is None:
            return None
        columns.append(column[:size])
    return torch.stack(columns)


def _is_positive(covariance: Tensor) -> bool:
    scale = covariance.diagonal().sqrt()
    return not torch.linalg.cholesky_ex(covariance / scale / scale[:, None])[1]
