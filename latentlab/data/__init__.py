"""Data: rows of numbers with named columns, from files, frames and arrays."""

from latentlab.data import checks, simulate
from latentlab.data.convert import from_array, from_frame
from latentlab.data.images import Images, load_images
from latentlab.data.load import load
from latentlab.data.sequences import Sequences, as_sequences
from latentlab.data.table import Table

__all__ = [
    "Images",
    "Sequences",
    "Table",
    "as_sequences",
    "checks",
    "from_array",
    "from_frame",
    "load",
    "load_images",
    "simulate",
]
