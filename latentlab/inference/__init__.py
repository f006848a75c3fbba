"""From a pair and data to a posterior with a verdict."""

from latentlab.inference.check import PairReport, check_pair
from latentlab.inference.engine import FitDivergedError, fit
from latentlab.inference.posterior import Posterior
from latentlab.inference.verdict import Verdict

__all__ = ["FitDivergedError", "PairReport", "Posterior", "Verdict", "check_pair", "fit"]
