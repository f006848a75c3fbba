"""Diagnostics: pure functions of arrays and callables, which know no model and no guide.

All take tensors, arrays or lists of real numbers; anything else is a ``TypeError`` that names the
argument. Half precision is taken as float32, true and false as 1 and 0.
"""

from latentlab.diagnostics.calibration import Sbc, Tarp, holm, sbc, sbc_ranks, tarp
from latentlab.diagnostics.collapse import Collapse, collapse, kl_per_dimension
from latentlab.diagnostics.compare import Comparison, compare
from latentlab.diagnostics.comparison import DrawComparison, compare_draws
from latentlab.diagnostics.coverage import Contraction, Coverage, contraction, coverage
from latentlab.diagnostics.distances import (
    C2st,
    Mmd,
    SlicedWasserstein,
    c2st,
    mmd,
    sliced_wasserstein,
)
from latentlab.diagnostics.ecdf import Uniformity, uniformity
from latentlab.diagnostics.elbo_parts import ElboParts, elbo_parts
from latentlab.diagnostics.error_bounds import ErrorBounds, error_bounds
from latentlab.diagnostics.ess import ess, mcse
from latentlab.diagnostics.estimate import Estimate, log_mean_exp
from latentlab.diagnostics.importance import RowEvidence, row_evidence
from latentlab.diagnostics.information import (
    Information,
    information,
    information_from_densities,
)
from latentlab.diagnostics.kl import kl, kl_from_draws
from latentlab.diagnostics.labels import Alignment, align
from latentlab.diagnostics.loo import Loo, loo
from latentlab.diagnostics.loo_pit import LooPit, loo_pit
from latentlab.diagnostics.moments import MomentErrors, moment_errors
from latentlab.diagnostics.ppc import Pit, Ppc, Rootogram, pit, plot_densities, ppc, rootogram
from latentlab.diagnostics.psis import KhatTable, Psis, khat_per_column, psis
from latentlab.diagnostics.reliability import Reliability, reliability
from latentlab.diagnostics.rhat import rhat
from latentlab.diagnostics.sandwich import Sandwich, sandwich
from latentlab.diagnostics.sensitivity import Sensitivity, sensitivity
from latentlab.diagnostics.stein import Stein, stein

__all__ = [
    "Alignment",
    "C2st",
    "Collapse",
    "Comparison",
    "ElboParts",
    "ErrorBounds",
    "Contraction",
    "Coverage",
    "DrawComparison",
    "Estimate",
    "Information",
    "KhatTable",
    "Loo",
    "LooPit",
    "Mmd",
    "MomentErrors",
    "Pit",
    "Ppc",
    "Psis",
    "Reliability",
    "Rootogram",
    "RowEvidence",
    "Sandwich",
    "Sensitivity",
    "Sbc",
    "SlicedWasserstein",
    "Stein",
    "Tarp",
    "Uniformity",
    "align",
    "c2st",
    "collapse",
    "compare",
    "elbo_parts",
    "error_bounds",
    "ess",
    "compare_draws",
    "contraction",
    "coverage",
    "holm",
    "information",
    "information_from_densities",
    "khat_per_column",
    "kl",
    "kl_from_draws",
    "kl_per_dimension",
    "log_mean_exp",
    "loo",
    "loo_pit",
    "mcse",
    "mmd",
    "moment_errors",
    "pit",
    "plot_densities",
    "ppc",
    "psis",
    "reliability",
    "rhat",
    "rootogram",
    "row_evidence",
    "sandwich",
    "sensitivity",
    "sbc",
    "sbc_ranks",
    "sliced_wasserstein",
    "stein",
    "tarp",
    "uniformity",
]
