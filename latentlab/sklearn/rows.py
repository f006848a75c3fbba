"""Rows as scikit-learn's users bring them, and seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
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

__all__ = ["check_variances", "read_rows", "seed_of", "told_by"]

# What a model or a fit says -> what the estimators call it.
_WORDS = {
    "x": "X",
    "lr": "learning_rate_init",
    "held_out": "validation_fraction",
    "hidden_dims": "hidden_layer_sizes",
    "num_categories": "n_features",
}
_WORD = re.compile(rf"(?<![\w.'\"])({'|'.join(_WORDS)})(?=[:=\[]| must | has )")
_NARROWEST = 1e-150  # the square of less is no float64


@contextmanager
def told_by(estimator: BaseEstimator) -> Iterator[None]:
    """After an error the estimator is as it was, and the error names the estimator's arguments."""
    before = dict(estimator.__dict__)
    try:
        yield
    except BaseException as error:
        estimator.__dict__ = before
        told = _WORD.sub(lambda word: _WORDS[word[1]], str(error))
        if type(error) in (TypeError, ValueError) and told != str(error):
            raise type(error)(told) from error
        raise


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
    elif isinstance(X, list | tuple) and any(isinstance(row, np.ndarray | Tensor) for row in X):
        rows = as_table(X, argument="X")  # says of ragged rows that they are
    if isinstance(X, np.ndarray) and np.iscomplexobj(X):
        # The first words are those that scikit-learn's own checks look for.
        raise ValueError("Complex data not supported: X: expected real numbers; take X.real")
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
