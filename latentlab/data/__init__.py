"""Data: rows of numbers with named columns, from files, frames and arrays."""

from latentlab.data import checks, simulate
from latentlab.data.convert import from_array, from_frame
from latentlab.data.load import load
from latentlab.data.table import Table

__all__ = ["Table", "checks", "from_array", "from_frame", "load", "simulate"]
