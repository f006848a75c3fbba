r"""Networks for encoders and decoders, and masked ones whose outputs see earlier inputs only.

.. math::
    h_0 = x, \quad h_{i} = a(W_i h_{i-1} + b_i), \quad y = W_{m} h_{m-1} + b_m

*Conventions of autoencoders.* An encoder maps a batch (B, D) or (B, C, H, W) either to a pair
``(loc, scale)``, each (B, L), or to one tensor (B, 2 L) whose first half is ``loc`` and whose
second half gives ``scale`` by softplus. A decoder maps (B, L) to the numbers that the likelihood
asks for: (B, M D) for a table, (B, M C, H, W) for images, with M numbers a cell. Any ``nn.Module``
that does so will do.

Letters: B batch, D features, L latent, C channels, H height, W width, M numbers a cell.

Layers start with weights that keep the variance of what goes through them: with torch's smaller
ones a deep decoder begins by ignoring its latents, and may stay so for a long time.

References:
    | Delving deep into rectifiers (He, Zhang, Ren and Sun, 2015)
    | MADE: masked autoencoder for distribution estimation (Germain et al., 2015)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["MLP", "ConvDecoder", "ConvEncoder", "MaskedMLP"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class MLP(nn.Sequential):
    """A multilayer perceptron; with no hidden layer, a linear map.

    Arguments:
        in_dim: numbers that come in.
        hidden_dims: widths of the hidden layers.
        out_dim: numbers that go out.
        activation: ``"relu"``, ``"elu"``, ``"gelu"``, ``"silu"``, ``"softplus"`` or ``"tanh"``.

    Raises:
        ValueError: if a width is not an int of at least 1, or the activation is not known.

    Example:
        >>> MLP(784, (400,), 40)(torch.zeros(128, 784)).shape
        torch.Size([128, 40])
    """

    def __init__(
        self, in_dim: int, hidden_dims: Sequence[int], out_dim: int, activation: str = "relu"
    ) -> None:
        widths = [_width(in_dim, "in_dim"), *as_widths(hidden_dims, "hidden_dims")]
        layers: list[nn.Module] = []
        for width, wider in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(width, wider), _activation(activation)]
        super().__init__(*layers, nn.Linear(widths[-1], _width(out_dim, "out_dim")))
        _start(list(self), activation)


class ConvEncoder(nn.Module):
    """Images to the two halves of an encoding: each layer halves height and width.

    Arguments:
        shape: (C, H, W) of what comes in.
        latent_dim: L; 2 L numbers go out.
        channels: of the layers; an image of 8 by 8 has 2 by 2 places left after two of them.
        hidden_dim: width of the dense layer behind them.
        activation: as for :class:`MLP`.

    Raises:
        ValueError: if a size is not an int of at least 1, or the activation is not known.

    Example:
        >>> ConvEncoder((1, 28, 28), latent_dim=20)(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 40])
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent_dim: int,
        channels: Sequence[int] = (32, 64),
        hidden_dim: int = 256,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        depth, *size = _image_shape(shape)
        widths = [depth, *as_widths(channels, "channels")]
        layers: list[nn.Module] = []
        for width, wider in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), _activation(activation)]
            size = [math.ceil(length / 2) for length in size]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        _start(layers, activation, last=False)
        out_dim = 2 * _width(latent_dim, "latent_dim")
        self.head = MLP(widths[-1] * size[0] * size[1], (hidden_dim,), out_dim, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Encodings (B, 2 L) of images (B, C, H, W)."""
        return self.head(self.layers(x))


class ConvDecoder(nn.Module):
    """Latents to images: the mirror image of :class:`ConvEncoder`.

    Arguments:
        latent_dim: L numbers that come in.
        shape: (C, H, W) of what goes out, C times the likelihood's numbers a cell.
        channels: of the layers, from the last to the first.
        hidden_dim: width of the dense layer before them.
        activation: as for :class:`MLP`.

    Raises:
        ValueError: if a size is not an int of at least 1, or the activation is not known.

    Example:
        >>> ConvDecoder(20, (1, 28, 28))(torch.zeros(3, 20)).shape
        torch.Size([3, 1, 28, 28])
    """

    def __init__(
        self,
        latent_dim: int,
        shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        hidden_dim: int = 256,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        depth, *size = _image_shape(shape)
        widths = [depth, *as_widths(channels, "channels")]
        layers: list[nn.Module] = []
        for width, wider in zip(widths, widths[1:], strict=False):
            even = (1 - size[0] % 2, 1 - size[1] % 2)
            up = nn.ConvTranspose2d(wider, width, 3, 2, padding=1, output_padding=even)
            layers = [_activation(activation), up, *layers]
            size = [math.ceil(length / 2) for length in size]
        smallest = (widths[-1], *size)
        in_dim = _width(latent_dim, "latent_dim")
        self.head = MLP(in_dim, (hidden_dim,), math.prod(smallest), activation)
        self.layers = nn.Sequential(nn.Unflatten(-1, smallest), *layers)
        _start(layers, activation)

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, L)."""
        return self.layers(self.head(z))


class MaskedMLP(nn.Module):
    r"""An autoregressive network: outputs for feature d depend on features before d only.

    .. math:: y_d = f_d(x_1, \dots, x_{d-1}, c)

    The mask of a layer lets a unit see those of a lower *degree*: a feature has its place as its
    degree, and hidden units share the degrees evenly.

    Arguments:
        num_features: D.
        hidden_dims: widths of the hidden layers.
        num_outputs: numbers M that go out for each feature.
        num_context: numbers of the context c, which all outputs see.
        activation: as for :class:`MLP`.

    Raises:
        ValueError: if a size is out of range, or the activation is not known.

    Example:
        >>> net = MaskedMLP(3, (16,), num_outputs=2)
        >>> net(torch.zeros(5, 3)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        num_features: int,
        hidden_dims: Sequence[int],
        num_outputs: int = 1,
        num_context: int = 0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.num_features = _width(num_features, "num_features")
        self.num_outputs = _width(num_outputs, "num_outputs")
        self.num_context = _width(num_context, "num_context", least=0)
        place = torch.arange(self.num_features) + 1
        degrees = torch.cat([place, place.new_zeros(self.num_context)])
        layers: list[nn.Module] = []
        for width in as_widths(hidden_dims, "hidden_dims"):
            # Degree 0 sees the context only; degree D would be seen by no output.
            wider = torch.arange(width) % self.num_features
            layers += [_MaskedLinear(wider[:, None] >= degrees), _activation(activation)]
            degrees = wider
        out = place.repeat_interleave(self.num_outputs)
        self.layers = nn.Sequential(*layers, _MaskedLinear(out[:, None] > degrees))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Outputs (..., D, M) for features (..., D) and a context (..., num_context)."""
        inputs = x if context is None else torch.cat([x, context], -1)
        return self.layers(inputs).unflatten(-1, (self.num_features, self.num_outputs))


class _MaskedLinear(nn.Linear):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


def _start(layers: Sequence[nn.Module], activation: str, last: bool = True) -> None:
    """Weights that keep the variance: an activation that is zero on one side halves it.

    Arguments:
        layers: in order, activations included.
        activation: between them.
        last: whether no activation follows.
    """
    weighted = [m for m in layers if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    for layer in weighted:
        fan_in: float = layer.weight[0].numel()
        if isinstance(layer, nn.ConvTranspose2d):  # a stride of 2 reads every fourth place
            fan_in = layer.weight[:, 0].numel() / 4
        halved = activation != "tanh" and not (last and layer is weighted[-1])
        nn.init.normal_(layer.weight, 0.0, math.sqrt((2 if halved else 1) / fan_in))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        known = ", ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"activation: expected one of {known}, got {name!r}")
    return _ACTIVATIONS[name]()


def _width(value: int, name: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = type(value).__name__
        raise ValueError(f"{name} must be an int >= {least}, got {value!r} ({kind})")
    return value


def as_widths(values: Sequence[int], name: str = "hidden_dims") -> tuple[int, ...]:
    """Widths of the layers of a network, each an int of at least 1.

    Arguments:
        values: a list or tuple of them; empty for no layer.
        name: what messages call them.

    Raises:
        ValueError: if they are anything else.

    Example:
        >>> as_widths([64, 32])
        (64, 32)
        >>> as_widths(8)
        Traceback (most recent call last):
        ValueError: hidden_dims: expected a sequence of ints such as (256,), got 8
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name}: expected a sequence of ints such as (256,), got {values!r}")
    return tuple(_width(value, f"{name}[{i}]") for i, value in enumerate(values))


def _image_shape(shape: Sequence[int]) -> list[int]:
    if isinstance(shape, int) or len(shape) != 3:
        raise ValueError(f"shape: expected (channels, height, width), got {shape!r}")
    return [*as_widths(shape, "shape")]
