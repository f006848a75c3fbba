"""Flows by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from latentlab.data.checks import as_count
from latentlab.flows.masked import Affine, MaskedFlow, Orientation
from latentlab.flows.planar import Planar
from latentlab.nn import as_widths

__all__ = ["KINDS", "Kind", "make"]

Kind = Literal["iaf", "maf", "nsf", "coupling_nsf", "realnvp", "planar"]

KINDS: tuple[Kind, ...] = get_args(Kind)


def make(
    kind: Kind,
    num_features: int,
    *,
    num_context: int = 0,
    orientation: Orientation = "sample",
    hidden_dims: Sequence[int] | None = None,
    num_transforms: int = 3,
    num_bins: int = 8,
    affine: Affine = "diagonal",
) -> MaskedFlow | Planar:
    r"""A flow by the name of its kind, at the identity.

    ====================  =========================================================================
    kind                  map
    ====================  =========================================================================
    ``"iaf"`` ``"maf"``   affine, feature by feature; the same map under both names
    ``"nsf"``             splines, feature by feature: bends most, costs most
    ``"coupling_nsf"``    splines, half of the features given the other half
    ``"realnvp"``         affine, half of the features given the other half
    ``"planar"``          a bend along one direction, to learn from; no context, draws only
    ====================  =========================================================================

    Arguments:
        kind: see the table.
        num_features: D.
        num_context: numbers C of a context that the map depends on.
        orientation: the direction that takes one pass: ``"sample"`` (``push``, for guides) or
            ``"density"`` (``pull``, for data).
        hidden_dims: widths of the hidden layers of each network, at least D where features follow
            each other one by one; by default two of 64, or of 2 D where that is more.
        num_transforms: maps in the chain.
        num_bins: bins of the splines, over :math:`[-5, 5]`.
        affine: last on the side of the values, ``"diagonal"``, ``"triangular"`` or ``"none"``.

    Returns:
        A module with ``push`` and ``pull``.

    Raises:
        ValueError: for an unknown kind or a setting that is out of range.

    Example:
        >>> import torch
        >>> flow = make("nsf", 3, num_context=2)
        >>> value, log_det = flow.push(torch.zeros(5, 3), torch.zeros(5, 2))
        >>> value.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    if kind not in KINDS:
        known = ", ".join(f'"{name}"' for name in KINDS)
        raise ValueError(f"kind: expected one of {known}, got {kind!r}")
    if orientation not in get_args(Orientation):
        raise ValueError(f'orientation: expected "sample" or "density", got {orientation!r}')
    if affine not in get_args(Affine):
        raise ValueError(f'affine: expected "diagonal", "triangular" or "none", got {affine!r}')
    num_features = as_count(num_features, "num_features")
    num_transforms = as_count(num_transforms, "num_transforms")
    num_context = as_count(num_context, "num_context", minimum=0)
    if kind == "planar":
        if num_context or orientation != "sample":
            raise ValueError(
                'kind: "planar" takes no context and orientation="sample" only; use another kind'
            )
        return Planar(num_features, num_transforms)
    if hidden_dims is None:
        hidden_dims = 2 * (max(64, 2 * num_features),)
    settings: dict[str, Any] = {"num_bins": 0}
    if kind in ("nsf", "coupling_nsf"):
        settings["num_bins"] = as_count(num_bins, "num_bins", minimum=2)
    return MaskedFlow(
        num_features,
        num_context=num_context,
        orientation=orientation,
        hidden_dims=as_widths(hidden_dims),
        num_transforms=num_transforms,
        coupling=kind in ("coupling_nsf", "realnvp"),
        affine=affine,
        **settings,
    )
