"""The two networks of an autoencoder: built where they are not given, tried out where they are.

Letters: B rows, D features, L latent, C channels, H height, W width, M numbers a cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from latentlab.distributions import Likelihood
from latentlab.models.vae_parts import read
from latentlab.nn import MLP, ConvDecoder, ConvEncoder

__all__ = ["Networks", "Plan", "complete", "dtype_of", "row_shape"]

_CONVOLVED = 12  # pixels to a side, from which on images are convolved: fewer leave no room


class Plan(NamedTuple):
    """What the two networks have to fit.

    Arguments:
        likelihood: says how many numbers a cell needs; made room in for the rows.
        latent_dim: L.
        num_features: D, or (C, H, W); ``None`` where both networks are given.
        hidden_dims: widths of the layers that are built.
        missing: whether the encoder reads a mask behind the cells.
    """

    likelihood: Likelihood
    latent_dim: int
    num_features: int | Sequence[int] | None
    hidden_dims: tuple[int, ...]
    missing: bool


class Networks(NamedTuple):
    """Both of them, tried out.

    Arguments:
        encoder: takes rows.
        decoder: takes latents.
        event_shape: of a row, (D,) or (C, H, W).
        num_context: numbers the encoder gives beyond loc and scale.
    """

    encoder: nn.Module
    decoder: nn.Module
    event_shape: tuple[int, ...]
    num_context: int


def complete(
    plan: Plan, encoder: nn.Module | None, decoder: nn.Module | None, num_context: int
) -> Networks:
    """The networks given, and those built in the place of others.

    Arguments:
        plan: what they have to fit.
        encoder: the encoder, or ``None``.
        decoder: the decoder, or ``None``.
        num_context: numbers that an encoder built here gives beyond loc and scale.

    Raises:
        ValueError: if a network does not fit.
    """
    likelihood, L = plan.likelihood, plan.latent_dim
    shape = None if plan.num_features is None else row_shape(plan.num_features)
    if shape is None and (encoder is None or decoder is None):
        raise ValueError("num_features: expected the number of columns, to build networks for")
    if decoder is None:
        decoder = _build_decoder(L, shape or (), likelihood, plan.hidden_dims)
    event_shape = _event_shape(decoder, likelihood, L)
    if shape is not None and shape != event_shape:
        raise ValueError(
            f"decoder: expected rows of shape {shape} to match num_features, got {event_shape}"
        )
    likelihood.bind(event_shape)
    first, *others = event_shape
    in_shape = (likelihood.num_inputs(first) + plan.missing * first, *others)
    if encoder is None:
        encoder = _build_encoder(in_shape, 2 * L + num_context, plan.hidden_dims)
    encoding = read(_tried("encoder", encoder, in_shape), L)
    num_context = 0 if encoding.context is None else encoding.context.shape[-1]
    return Networks(encoder, decoder, event_shape, num_context)


def row_shape(num_features: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of a row: (D,) of a table, or (C, H, W).

    Arguments:
        num_features: D, or the three of them.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> row_shape(5), row_shape((1, 28, 28))
        ((5,), (1, 28, 28))
    """
    shape = tuple(num_features) if isinstance(num_features, Sequence) else (num_features,)
    ints = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape)
    if len(shape) not in (1, 3) or not ints:
        raise ValueError(
            "num_features: expected an int >= 1, or (channels, height, width) of images, got "
            f"{num_features!r}"
        )
    return shape


def _build_encoder(in_shape: Sequence[int], out_dim: int, hidden_dims: Sequence[int]) -> nn.Module:
    """A multilayer perceptron for tables and small images, a convolutional network for others."""
    if _is_wide(in_shape):
        return ConvEncoder(in_shape, out_dim // 2, hidden_dim=_dense(hidden_dims))
    dense = MLP(math.prod(in_shape), hidden_dims, out_dim)
    return dense if len(in_shape) == 1 else nn.Sequential(nn.Flatten(), dense)


def _build_decoder(
    latent_dim: int, event_shape: Sequence[int], likelihood: Likelihood, hidden_dims: Sequence[int]
) -> nn.Module:
    """The mirror image of an encoder."""
    first, *others = event_shape
    shape = (likelihood.num_params(first), *others)
    if _is_wide(shape):
        return ConvDecoder(latent_dim, shape, hidden_dim=_dense(hidden_dims))
    dense = MLP(latent_dim, tuple(hidden_dims)[::-1], math.prod(shape))
    return nn.Sequential(dense, nn.Unflatten(1, shape)) if others else dense


def _is_wide(shape: Sequence[int]) -> bool:
    """Whether rows are images with room for layers that halve them twice."""
    return len(shape) == 3 and min(shape[1:]) >= _CONVOLVED


def _event_shape(decoder: nn.Module, likelihood: Likelihood, latent_dim: int) -> tuple[int, ...]:
    """The shape of the rows that a decoder decodes to, found by decoding some."""
    first, *others = _tried("decoder", decoder, (latent_dim,)).shape[1:]
    if len(others) not in (0, 2):
        shape = (first, *others)
        raise ValueError(f"decoder: expected (B, M D) or (B, M C, H, W) out, got (B, *{shape})")
    return (likelihood.num_cells(first), *others)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The type of a network's parameters, torch's default one where it has none."""
    found = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(found, torch.get_default_dtype())


def _tried(role: str, net: nn.Module, shape: Sequence[int]) -> Any:  # noqa: ANN401
    """What a network makes of two rows of zeros, nothing changed."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"{role}: expected a torch.nn.Module, got {type(net).__name__}")
    device = next((p.device for p in net.parameters()), None)
    rows = torch.zeros((2, *shape), dtype=dtype_of(net), device=device)
    training = {module: module.training for module in net.modules()}
    net.eval()  # so that no running statistic moves
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return net(rows)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{role}: expected a network that takes shape (B, {', '.join(map(str, shape))}), "
            f"but on that it says {type(error).__name__}: {first}"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode


def _dense(hidden_dims: Sequence[int]) -> int:
    if len(hidden_dims) > 1:
        raise ValueError(
            "hidden_dims: expected one width, that of the dense layer behind the convolutions "
            f"that images get, got {list(hidden_dims)}; or give an encoder and a decoder"
        )
    return hidden_dims[0] if hidden_dims else 256
