"""To ArviZ: one shim for 0.23 (``InferenceData``) and 1.x (``DataTree``)."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

from latentlab.inference.axes import coords_of, dims_of

if TYPE_CHECKING:
    from latentlab.inference.posterior import Posterior

__all__ = ["from_groups", "to_arviz"]

_PREDICTIVE_ELEMENTS = 2**24  # numbers of the predictive group, at the most


def to_arviz(posterior: Posterior, num_samples: int, seed: int | None) -> Any:  # noqa: ANN401
    """Groups ``posterior``, and with data ``posterior_predictive`` and ``observed_data``.

    With data the group ``posterior`` holds the discrete latents, too.

    Arguments:
        posterior: the posterior.
        num_samples: number of draws, one chain.
        seed: of the draws.

    Returns:
        ``arviz.InferenceData``, or ``xarray.DataTree`` where ArviZ is 1.x.
    """
    draws = posterior._aligned(num_samples, seed, discrete=posterior.has_data).draws
    groups = {"posterior": {k: v.numpy(force=True)[None] for k, v in draws.items()}}
    shapes = {name: tuple(value.shape[1:]) for name, value in draws.items()}
    if posterior.has_data and posterior.pair.observed:
        size = sum(t.numel() for t in posterior.pair.data.tensors())
        num_predicted = max(1, min(num_samples, _PREDICTIVE_ELEMENTS // max(size, 1)))
        predicted = posterior.predict(num_predicted, seed=seed)
        groups["posterior_predictive"] = {
            k: v.numpy(force=True)[None] for k, v in predicted.items()
        }
        observed = posterior._observed()
        groups["observed_data"] = {k: v.numpy(force=True) for k, v in observed.items()}
        shapes |= {name: tuple(value.shape) for name, value in observed.items()}
    dims = {
        name: list(dims_of(posterior.pair, name, len(shape))) for name, shape in shapes.items()
    }
    coords: dict[str, list[str] | list[int]] = {}
    for name, shape in shapes.items():
        for dim, labels in zip(dims[name], coords_of(posterior.pair, name, shape), strict=True):
            numbered = labels == [str(i) for i in range(len(labels))]
            coords[dim] = list(range(len(labels))) if numbered else labels
    return from_groups(groups, coords, dims)


def from_groups(groups: dict, coords: dict, dims: dict) -> Any:  # noqa: ANN401
    """``arviz.from_dict`` in the form that the installed ArviZ takes.

    Arguments:
        groups: group -> variable -> array (chain, draw, ...), or (...) for observed data.
        coords: dimension -> labels.
        dims: variable -> names of its dimensions after chain and draw.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its own refactoring at import
        import arviz

        # 0.23 takes groups as keywords and would build nonsense from one nested dict.
        if "posterior" in inspect.signature(arviz.from_dict).parameters:
            return arviz.from_dict(**groups, coords=coords, dims=dims)
        return arviz.from_dict(groups, coords=coords, dims=dims)
