"""Diagnostics: pure functions of arrays and callables, which know no model and no guide."""

from latentlab.diagnostics.estimate import Estimate, log_mean_exp
from latentlab.diagnostics.kl import kl, kl_from_draws
from latentlab.diagnostics.labels import Alignment, align
from latentlab.diagnostics.moments import MomentErrors, moment_errors
from latentlab.diagnostics.psis import KhatTable, Psis, khat_per_column, psis
from latentlab.diagnostics.rhat import rhat

__all__ = [
    "Alignment",
    "Estimate",
    "KhatTable",
    "MomentErrors",
    "Psis",
    "align",
    "khat_per_column",
    "kl",
    "kl_from_draws",
    "log_mean_exp",
    "moment_errors",
    "psis",
    "rhat",
]
