"""Diagnostics: pure functions of arrays and callables, which know no model and no guide."""

from latentlab.diagnostics.collapse import Collapse, collapse, kl_per_dimension
from latentlab.diagnostics.compare import Comparison, compare
from latentlab.diagnostics.elbo_parts import ElboParts, elbo_parts
from latentlab.diagnostics.error_bounds import ErrorBounds, error_bounds
from latentlab.diagnostics.ess import ess, mcse
from latentlab.diagnostics.estimate import Estimate, log_mean_exp
from latentlab.diagnostics.importance import RowEvidence, row_evidence
from latentlab.diagnostics.kl import kl, kl_from_draws
from latentlab.diagnostics.labels import Alignment, align
from latentlab.diagnostics.loo import Loo, loo
from latentlab.diagnostics.loo_pit import LooPit, loo_pit
from latentlab.diagnostics.moments import MomentErrors, moment_errors
from latentlab.diagnostics.psis import KhatTable, Psis, khat_per_column, psis
from latentlab.diagnostics.rhat import rhat
from latentlab.diagnostics.sandwich import Sandwich, sandwich
from latentlab.diagnostics.sensitivity import Sensitivity, sensitivity

__all__ = [
    "Alignment",
    "Collapse",
    "Comparison",
    "ElboParts",
    "ErrorBounds",
    "Estimate",
    "KhatTable",
    "Loo",
    "LooPit",
    "MomentErrors",
    "Psis",
    "RowEvidence",
    "Sandwich",
    "Sensitivity",
    "align",
    "collapse",
    "compare",
    "elbo_parts",
    "error_bounds",
    "ess",
    "khat_per_column",
    "kl",
    "kl_from_draws",
    "kl_per_dimension",
    "log_mean_exp",
    "loo",
    "loo_pit",
    "mcse",
    "moment_errors",
    "psis",
    "rhat",
    "row_evidence",
    "sandwich",
    "sensitivity",
]
