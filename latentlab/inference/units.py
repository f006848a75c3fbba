"""The units of a model's priors: taken from the data of a fit, or kept as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from latentlab.inference.arguments import with_names
from latentlab.inference.pair import Arguments
from latentlab.protocols import ScalesToData

__all__ = ["scale", "units_kept"]

_are_kept = ContextVar("_are_kept", default=False)


@contextmanager
def units_kept() -> Iterator[None]:
    """Within, priors that scale to data do not scale anew: another data set, the same priors."""
    token = _are_kept.set(True)
    try:
        yield
    finally:
        _are_kept.reset(token)


def scale(owner: ScalesToData, data: Arguments, whole: Arguments | None = None) -> None:
    """Take units from the data, in place.

    Arguments:
        owner: the fit's own copy of the model.
        data: the rows to be fitted.
        whole: the rows as they were given, of which warnings and refusals are.
    """
    if _are_kept.get():
        return
    parts = [data] if whole is None else [whole, data]
    for k, part in enumerate(parts):
        args, kwargs = with_names(part)  # for its warnings
        with warnings.catch_warnings():
            if k:
                warnings.simplefilter("ignore")
            owner.scale_to(*args, **kwargs)
