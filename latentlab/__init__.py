"""Fit latent-variable models written as Pyro pairs, and learn whether to believe the fit."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentlab import (
        data,
        diagnostics,
        distributions,
        flows,
        guides,
        models,
        nn,
        objectives,
        testing,
    )
    from latentlab.codes import fit_codes
    from latentlab.inference.appraise import compare
    from latentlab.inference.calibrate import Calibration, calibrate
    from latentlab.inference.chains import Chains
    from latentlab.inference.check import PairReport, check_pair
    from latentlab.inference.engine import FitDivergedError, fit
    from latentlab.inference.identities import check_posterior
    from latentlab.inference.nuts import nuts
    from latentlab.inference.posterior import Posterior
    from latentlab.inference.response import linear_response
    from latentlab.inference.select import select
    from latentlab.inference.verdict import Verdict
    from latentlab.loading import load
    from latentlab.models.ae import Autoencoder
    from latentlab.models.density import FlowDensity
    from latentlab.models.gmm import GaussianMixture
    from latentlab.models.hmm import HiddenMarkovModel
    from latentlab.models.ppca import FactorAnalysis, ProbabilisticPCA
    from latentlab.models.vae import VariationalAutoencoder
    from latentlab.plates import rows, sequences

__version__ = "0.1.0"

# Public name -> the module it lives in; imported when first asked for.
_HOMES = {
    "Autoencoder": "latentlab.models",
    "Calibration": "latentlab.inference.calibrate",
    "Chains": "latentlab.inference.chains",
    "FactorAnalysis": "latentlab.models",
    "FitDivergedError": "latentlab.inference.engine",
    "FlowDensity": "latentlab.models",
    "GaussianMixture": "latentlab.models",
    "HiddenMarkovModel": "latentlab.models",
    "PairReport": "latentlab.inference.check",
    "Posterior": "latentlab.inference.posterior",
    "ProbabilisticPCA": "latentlab.models",
    "VariationalAutoencoder": "latentlab.models",
    "Verdict": "latentlab.inference.verdict",
    "calibrate": "latentlab.inference.calibrate",
    "check_pair": "latentlab.inference.check",
    "check_posterior": "latentlab.inference.identities",
    "compare": "latentlab.inference.appraise",
    "fit": "latentlab.inference.engine",
    "fit_codes": "latentlab.codes",
    "linear_response": "latentlab.inference.response",
    "load": "latentlab.loading",
    "nuts": "latentlab.inference.nuts",
    "rows": "latentlab.plates",
    "select": "latentlab.inference.select",
    "sequences": "latentlab.plates",
}
_MODULES = (
    "data", "diagnostics", "distributions", "flows", "guides", "models", "nn", "objectives",
    "testing",
)  # fmt: skip

__all__ = [
    "Autoencoder",
    "Calibration",
    "Chains",
    "FactorAnalysis",
    "FitDivergedError",
    "FlowDensity",
    "GaussianMixture",
    "HiddenMarkovModel",
    "PairReport",
    "Posterior",
    "ProbabilisticPCA",
    "VariationalAutoencoder",
    "Verdict",
    "calibrate",
    "check_pair",
    "check_posterior",
    "compare",
    "data",
    "diagnostics",
    "distributions",
    "fit",
    "fit_codes",
    "flows",
    "guides",
    "linear_response",
    "load",
    "models",
    "nn",
    "nuts",
    "objectives",
    "rows",
    "select",
    "sequences",
    "testing",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"latentlab.{name}")
    raise AttributeError(f"module 'latentlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
