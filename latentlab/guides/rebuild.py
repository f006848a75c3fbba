"""A guide built again from plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from latentlab.guides.amortised import Amortised
from latentlab.guides.base import Guide
from latentlab.guides.families import Families
from latentlab.guides.flow import Flow
from latentlab.guides.gaussian import FullRank, MeanField, Point
from latentlab.guides.low_rank import LowRank
from latentlab.guides.normal_wishart import NormalWishart
from latentlab.guides.structured import Structured
from latentlab.supports import Latent

__all__ = ["guide_from_spec"]

_KINDS = (
    *(Point, MeanField, LowRank, FullRank, Structured, Amortised, Flow),
    *(Families, NormalWishart),
)


def guide_from_spec(
    spec: Mapping[str, Any], dtype: torch.dtype, encoder: nn.Module | None = None
) -> Guide:
    """The guide that ``spec()`` described, with its parameters still to be loaded.

    Arguments:
        spec: what ``spec()`` returned.
        dtype: of the parameters.
        encoder: that of an ``Amortised`` guide, where it is one of your own.

    Returns:
        The bound guide.

    Raises:
        ValueError: if the class is not one of latentlab.guides, or its encoder is not given.
    """
    known = {guide.__name__: guide for guide in _KINDS}
    if spec["class"] not in known:
        raise ValueError(f"guide: expected one of {sorted(known)}, got {spec['class']!r}")
    latents = [Latent.from_spec(latent) for latent in spec["latents"]]
    arguments = dict(spec.get("arguments", {}))
    if spec.get("own_encoder"):
        if encoder is None:
            raise ValueError(
                "guide: holds an encoder of your own; load it with guide=Amortised(encoder)"
            )
        arguments["encoder"] = encoder
    return known[spec["class"]](**arguments).bind(
        latents,
        max_plate_nesting=spec["max_plate_nesting"],
        dtype=dtype,
        local_plate=spec.get("local_plate"),
    )
