r"""The ELBO of a Gaussian guide at fixed draws: a function of its parameters without noise.

.. math:: F(\phi) = \frac{1}{S} \sum_s \log p(x, T(u_s)) + \log |T'(u_s)|
          + \log |\mathrm{d}u / \mathrm{d}\varepsilon| + \frac{L}{2} \log 2 \pi e, \quad
          u_s = c + A\,(m + \Lambda \varepsilon_s)

The noise :math:`\varepsilon_s` comes in pairs of opposite sign, and is turned and stretched so
that its second moments are those of the standard normal, too (S > 2 L; else the diagonal ones
only): what a quadratic log density makes of it is exact, for any draws. Its derivatives in
:math:`\phi` are exact, the second ones as products with a vector.

Letters: S draws, L latent numbers, K parameters of the guide.

References:
    | Black box variational inference with a deterministic objective (Giordano et al., 2024)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from latentlab.guides import FullRank, MeanField
from latentlab.inference.density import log_density
from latentlab.inference.evaluation import particle_chunk
from latentlab.inference.pair import Pair

__all__ = ["FixedDraws", "Product", "conjugate_gradients", "paired_noise"]

Product = Callable[[Tensor], Tensor]
"""The product of a symmetric matrix with a vector."""


def paired_noise(num_draws: int, num_latents: int, seed: int) -> Tensor:
    """Standard normal draws (S, L) in pairs of opposite sign, their second moments exact.

    Arguments:
        num_draws: number of draws S, even.
        num_latents: numbers of a draw L.
        seed: of the draws.

    Example:
        >>> eps = paired_noise(8, 2, seed=0)
        >>> bool((eps[::2] == -eps[1::2]).all()), (eps.T @ eps / 8).round(decimals=6).abs().trace()
        (True, tensor(2., dtype=torch.float64))
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = num_draws // 2, num_latents
    half = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    if len(half) > num_latents:
        size, axes = torch.linalg.eigh(half.T @ half / len(half))
        half = half @ (axes * size.rsqrt()) @ axes.T
    else:
        half = half / half.square().mean(0).sqrt()
    return torch.stack([half, -half], 1).flatten(0, 1)


class FixedDraws:
    """The ELBO at fixed draws, as a function of the guide's parameters.

    Arguments:
        pair: the pair, entered; its guide is a Gaussian of ours.
        eps: the noise (S, L).
    """

    def __init__(self, pair: Pair, eps: Tensor) -> None:
        guide = pair.guide
        if not isinstance(guide, MeanField | FullRank):
            raise TypeError(f"guide: expected a MeanField or FullRank, got {type(guide).__name__}")
        self.pair, self.guide = pair, guide
        self.eps = eps.to(guide.loc)
        self.parameters = [*guide.parameters()]

    def set(self, flat: Tensor) -> None:
        """Put the guide's parameters at a flat vector (K,), in place."""
        with torch.no_grad():
            parts = flat.split([p.numel() for p in self.parameters])
            for parameter, part in zip(self.parameters, parts, strict=True):
                parameter.copy_(part.reshape(parameter.shape))

    def values(self) -> Tensor:
        """The terms (S,) whose mean is the ELBO, without a gradient."""
        chunk = particle_chunk(self.pair, len(self.eps))
        with torch.no_grad():
            return torch.cat([self._terms(eps) for eps in self.eps.split(chunk)])

    def slope(self) -> tuple[Tensor, Tensor]:
        """The terms (S,) whose mean is the ELBO, and the gradient (K,) of that mean."""
        terms, total = [], torch.zeros((), dtype=torch.float64, device="cpu")
        for eps in self.eps.split(particle_chunk(self.pair, len(self.eps))):
            part = self._terms(eps)
            total = total + _flat(torch.autograd.grad(part.sum(), self.parameters))
            terms.append(part.detach())
        return torch.cat(terms), total / len(self.eps)

    def curvature(self) -> Product:
        """Products with the matrix of negative second derivatives (K, K) where the guide is."""
        slopes = []
        for eps in self.eps.split(particle_chunk(self.pair, len(self.eps))):
            loss = -self._terms(eps).sum() / len(self.eps)
            found = torch.autograd.grad(loss, self.parameters, create_graph=True)
            slopes.append(torch.cat([part.flatten() for part in found]))

        def product(vector: Tensor) -> Tensor:
            parts = [
                torch.autograd.grad(s, self.parameters, vector.to(s), retain_graph=True)
                for s in slopes
            ]
            return torch.stack([_flat(part) for part in parts]).sum(0)

        return product

    def _terms(self, eps: Tensor) -> Tensor:
        u, log_det = self.guide.push(eps)
        entropy = log_det + 0.5 * u.shape[-1] * (1 + math.log(2 * math.pi))
        return log_density(self.pair, self.guide, u) + entropy


def _flat(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.detach().flatten() for part in parts]).double().cpu()


def conjugate_gradients(
    product: Product, target: Tensor, *, tol: float = 1e-8, max_steps: int = 1000
) -> Tensor | None:
    """Solve H x = b for a positive definite matrix that is known by its products.

    Arguments:
        product: v -> H v.
        target: b, shape (K,).
        tol: the residual, relative to b, at which it ends.
        max_steps: products at most.

    Returns:
        The solution x (K,); ``None`` where H is found not to be positive definite.

    Example:
        >>> conjugate_gradients(lambda v: 2 * v, torch.ones(3))
        tensor([0.5000, 0.5000, 0.5000])
    """
    x, residual = torch.zeros_like(target), target.clone()
    direction, size = residual.clone(), float(residual @ residual)
    goal = tol**2 * size
    for _ in range(max_steps):
        if size <= goal:
            break
        bent = product(direction)
        curvature = float(direction @ bent)
        if not curvature > 0:  # a NaN is not, either
            return None
        x = x + size / curvature * direction
        residual = residual - size / curvature * bent
        before, size = size, float(residual @ residual)
        direction = residual + size / before * direction
    return x
