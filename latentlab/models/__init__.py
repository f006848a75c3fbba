"""Ready-made models, each a Pyro model that brings its own guide and starting values."""

from latentlab.models.gmm import GaussianMixture

__all__ = ["GaussianMixture"]
