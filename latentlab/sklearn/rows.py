"""Rows as scikit-learn's users bring them, and seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data
from torch import Tensor

from latentlab.data.checks import as_rows, as_seed, expect_spans
from latentlab.data.convert import as_table, column_names
from latentlab.data.table import Table

__all__ = ["check_variances", "read_rows", "seed_of"]

_NARROWEST = 1e-150  # the square of less is no float64


def read_rows(estimator: BaseEstimator, X: Any, *, reset: bool) -> Table:  # noqa: ANN401
    """Rows that pass the checks of scikit-learn, then ours, float64, NaN allowed.

    Arguments:
        estimator: takes the number and names of columns, or is asked for them.
        X: rows of any kind.
        reset: true in a fit, which needs two rows.

    Raises:
        ValueError: for rows that cannot be used; the message says where.
        TypeError: for text or sparse rows.
    """
    names, rows = column_names(X), X
    if names is not None:  # a frame, or a table with names
        import pandas as pd

        rows = as_table(X, names, argument="X")
        X = pd.DataFrame(rows.x.numpy(force=True), columns=getattr(X, "columns", names))
    elif isinstance(X, Table | Tensor):
        rows = as_table(X, argument="X")
        X = rows.x.numpy(force=True)
    # Numbers are for as_rows to check: it says where they are, and text of digits is none.
    validate_data(estimator, X, reset=reset, ensure_all_finite=False, ensure_min_samples=1 + reset)
    table = as_rows(rows, argument="X", min_rows=1 + reset, allow_missing=True)
    return Table(table.x.to("cpu", torch.float64), table.names)


def seed_of(random_state: Any) -> int:  # noqa: ANN401
    """The seed that a ``random_state`` of scikit-learn stands for."""
    if random_state is None or isinstance(random_state, np.random.RandomState):
        return int(check_random_state(random_state).randint(2**31 - 1))
    return as_seed(random_state, "random_state")


def check_variances(table: Table) -> None:
    """Refuse columns that vary, but too little for float64 to hold their variance."""
    expect_spans(table, _NARROWEST, argument="X")
