"""Ready-made models, each a Pyro model that brings its own guide and starting values."""

from latentlab.models.ae import Autoencoder
from latentlab.models.density import FlowDensity
from latentlab.models.gmm import GaussianMixture
from latentlab.models.hmm import HiddenMarkovModel
from latentlab.models.ppca import FactorAnalysis, ProbabilisticPCA
from latentlab.models.vae import VariationalAutoencoder

__all__ = [
    "Autoencoder",
    "FactorAnalysis",
    "FlowDensity",
    "GaussianMixture",
    "HiddenMarkovModel",
    "ProbabilisticPCA",
    "VariationalAutoencoder",
]
