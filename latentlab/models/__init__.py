"""Ready-made models, each a Pyro model that brings its own guide and starting values."""

from typing import TYPE_CHECKING, Any

import latentlab

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in __all__:  # imported when first asked for, one family without the others
        return getattr(latentlab, name)
    raise AttributeError(f"module 'latentlab.models' has no attribute {name!r}")
