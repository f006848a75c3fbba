"""Diagnostics: pure functions of arrays and callables, which know no model and no guide."""

from latentlab.diagnostics.collapse import Collapse, collapse, kl_per_dimension
from latentlab.diagnostics.estimate import Estimate, log_mean_exp
from latentlab.diagnostics.importance import RowEvidence, row_evidence
from latentlab.diagnostics.kl import kl, kl_from_draws
from latentlab.diagnostics.labels import Alignment, align
from latentlab.diagnostics.moments import MomentErrors, moment_errors
from latentlab.diagnostics.psis import KhatTable, Psis, khat_per_column, psis
from latentlab.diagnostics.rhat import rhat
from latentlab.diagnostics.stein import Stein, stein

__all__ = [
    "Alignment",
    "Collapse",
    "Estimate",
    "KhatTable",
    "MomentErrors",
    "Psis",
    "RowEvidence",
    "Stein",
    "align",
    "collapse",
    "khat_per_column",
    "kl",
    "kl_from_draws",
    "kl_per_dimension",
    "log_mean_exp",
    "moment_errors",
    "psis",
    "rhat",
    "row_evidence",
    "stein",
]
