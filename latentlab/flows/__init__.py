"""Invertible maps from noise to values, their densities, and a check that they are what they say.

Every map has ``push(noise, context) -> (value, log_det)`` and ``pull``, its inverse.
"""

from latentlab.flows.checks import FlowCheck, check_flow
from latentlab.flows.density import FlowDistribution
from latentlab.flows.kinds import KINDS, make
from latentlab.flows.masked import MaskedFlow
from latentlab.flows.planar import Planar

__all__ = ["KINDS", "FlowCheck", "FlowDistribution", "MaskedFlow", "Planar", "check_flow", "make"]
