"""Marginal likelihoods: latent variables that can be summed out are summed out here."""

from latentlab.distributions.mixture import DiagonalGaussianMixture

__all__ = ["DiagonalGaussianMixture"]
