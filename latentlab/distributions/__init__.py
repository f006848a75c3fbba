"""Marginal likelihoods: latent variables that can be summed out are summed out here."""

from latentlab.distributions.cells import Cells, Parts
from latentlab.distributions.columns import Columns, likelihood_of
from latentlab.distributions.mixture import NormalMixture
from latentlab.distributions.observation import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    Poisson,
)

__all__ = [
    "Bernoulli",
    "Categorical",
    "Cells",
    "Columns",
    "Gaussian",
    "Likelihood",
    "NormalMixture",
    "Parts",
    "Poisson",
    "likelihood_of",
]
