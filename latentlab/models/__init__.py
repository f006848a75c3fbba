"""Ready-made models, each a Pyro model that brings its own guide and starting values."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentlab.models.ae import Autoencoder
    from latentlab.models.density import FlowDensity
    from latentlab.models.gmm import GaussianMixture
    from latentlab.models.gmm_priors import Conjugate
    from latentlab.models.hmm import HiddenMarkovModel
    from latentlab.models.ppca import FactorAnalysis, ProbabilisticPCA
    from latentlab.models.vae import VariationalAutoencoder

# Model -> the module it lives in; imported when first asked for, one family without the others.
_HOMES = {
    "Autoencoder": "ae",
    "Conjugate": "gmm_priors",
    "FactorAnalysis": "ppca",
    "FlowDensity": "density",
    "GaussianMixture": "gmm",
    "HiddenMarkovModel": "hmm",
    "ProbabilisticPCA": "ppca",
    "VariationalAutoencoder": "vae",
}

__all__ = [
    "Autoencoder",
    "Conjugate",
    "FactorAnalysis",
    "FlowDensity",
    "GaussianMixture",
    "HiddenMarkovModel",
    "ProbabilisticPCA",
    "VariationalAutoencoder",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in _HOMES:
        return getattr(importlib.import_module(f"latentlab.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'latentlab.models' has no attribute {name!r}")
