"""The pictures of a fit and the page that shows them: arrays and plain records in, pages out."""

from latentlab.report.page import Page, Section, render, write
from latentlab.report.plots import (
    plot_intervals,
    plot_khat,
    plot_losses,
    plot_mixture,
    plot_predictive,
)
from latentlab.report.svg import figure_svg

__all__ = [
    "Page",
    "Section",
    "figure_svg",
    "plot_intervals",
    "plot_khat",
    "plot_losses",
    "plot_mixture",
    "plot_predictive",
    "render",
    "write",
]
