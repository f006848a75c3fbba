"""Fit latent-variable models written as Pyro pairs, and learn whether to believe the fit."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentlab import data, diagnostics, distributions, guides, models, testing
    from latentlab.inference.check import PairReport, check_pair
    from latentlab.inference.engine import FitDivergedError, fit
    from latentlab.inference.posterior import Posterior
    from latentlab.inference.verdict import Verdict
    from latentlab.loading import load
    from latentlab.models.gmm import GaussianMixture
    from latentlab.plates import rows

__version__ = "0.1.0"

# Public name -> the module it lives in; imported when first asked for.
_HOMES = {
    "FitDivergedError": "latentlab.inference.engine",
    "GaussianMixture": "latentlab.models.gmm",
    "PairReport": "latentlab.inference.check",
    "Posterior": "latentlab.inference.posterior",
    "Verdict": "latentlab.inference.verdict",
    "check_pair": "latentlab.inference.check",
    "fit": "latentlab.inference.engine",
    "load": "latentlab.loading",
    "rows": "latentlab.plates",
}
_MODULES = ("data", "diagnostics", "distributions", "guides", "models", "testing")

__all__ = [
    "FitDivergedError",
    "GaussianMixture",
    "PairReport",
    "Posterior",
    "Verdict",
    "check_pair",
    "data",
    "diagnostics",
    "distributions",
    "fit",
    "guides",
    "load",
    "models",
    "rows",
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
