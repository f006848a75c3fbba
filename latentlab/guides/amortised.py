r"""A guide that reads the latents of a row off the row.

.. math::
    g &= c_g + A_g (m_g + L_g \varepsilon_g), \\
    w_n &= c + a \odot (\mu_\phi(x_n) + \sigma_\phi(x_n) \odot \varepsilon_n)

A network with weights :math:`\phi` takes row :math:`x_n` of the data to mean and standard
deviation of its latents; the global ones are those of ``FullRank``. What it costs does not grow
with the number of rows, and a mini-batch moves all of it.

Letters: G global numbers, N rows, B of them, l numbers a row, F numbers of a row of data.

References:
    | Auto-encoding variational Bayes (Kingma and Welling, 2014)
    | Amortized inference in probabilistic reasoning (Gershman and Goodman, 2014)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentlab.data.checks import as_seed
from latentlab.guides.base import Guide
from latentlab.guides.hierarchy import Factors, Hierarchy
from latentlab.guides.layout import Data, Part
from latentlab.nn import MLP, as_widths
from latentlab.seeds import seeded

__all__ = ["Amortised"]

_MOST_LOG_SCALE = 8.0  # a network that has learnt nothing yet may say anything


class Amortised(Hierarchy):
    r"""Local latents by a network from the data of their row, global ones with all correlations.

    The mean it gives is a function of the row that all rows share: less than ``Structured`` can
    say, with no number of its own for any row.

    Arguments:
        encoder: takes the tensors of a batch of rows, each (B, ...), to (B, 2 l): means, then log
            standard deviations, of the latents of each row on the real line, in units that are
            set at the start. By default an :class:`latentlab.nn.MLP` of all their numbers, each
            standardised, NaN read as the mean.
        hidden_dims: widths of the hidden layers of that one.
        num_inputs: numbers of a row F; by default what the data have.
        seed: of its first weights.

    Raises:
        TypeError: if the encoder is not a module.

    Example:
        >>> from pyro.distributions import constraints
        >>> from latentlab.guides import Latent
        >>> z = Latent("z", (5,), (), constraints.real, (("rows", 5, -1),))
        >>> guide = Amortised(num_inputs=2).bind([z], max_plate_nesting=1, local_plate="rows")
        >>> guide.num_latents
        5
    """

    log_scale: nn.Parameter
    lower: nn.Parameter
    local_offset: Tensor
    local_frame: Tensor
    input_loc: Tensor
    input_scale: Tensor

    def __init__(
        self,
        encoder: nn.Module | None = None,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        num_inputs: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: expected a torch.nn.Module, got {encoder!r}")
        self._given = (encoder,)  # hidden from torch, which would store it twice
        self.hidden_dims, self.num_inputs = as_widths(hidden_dims), num_inputs
        self.seed = as_seed(seed)
        self._data: Data | None = None

    @property
    def given_encoder(self) -> nn.Module | None:
        """The encoder that was given; ``None`` for the guide's own."""
        return self._given[0]

    def look_at(self, data: Data) -> None:
        """Learn the number of inputs, their location and scale, and what to draw for, in place.

        Arguments:
            data: all rows; kept for draws for which none are given.
        """
        self._data = data
        x = _numbers(data)
        self.num_inputs = x.shape[1]
        loc = x.nanmean(0)
        sd = (x - loc).square().nanmean(0).sqrt()
        self._inputs = loc.nan_to_num(0.0), torch.where(sd > 0, sd, 1.0).nan_to_num(1.0)

    def _make_parameters(self, zeros: Tensor) -> None:
        outer, inner = self._whole.outer, self._whole.inner
        own, size = inner.shape[1], len(outer)
        if not own:
            raise ValueError(
                "Amortised: no latent is local to a plate over the rows of the data; take "
                "latentlab.guides.FullRank"
            )
        if self.num_inputs is None and self.given_encoder is None:
            raise ValueError("Amortised: expected num_inputs, or data to learn it from")
        few = zeros[:size]
        self.register_buffer("offset", few.clone())
        self.register_buffer("frame", torch.eye(size).to(zeros))
        self.register_buffer("local_offset", zeros.new_zeros(own))
        self.register_buffer("local_frame", zeros.new_ones(own))
        num_inputs = self.num_inputs or 0
        loc, scale = getattr(self, "_inputs", (torch.zeros(num_inputs), torch.ones(num_inputs)))
        self.register_buffer("input_loc", loc.to(zeros))
        self.register_buffer("input_scale", scale.to(zeros))
        self.loc = nn.Parameter(few.clone())
        self.log_scale = nn.Parameter(few.clone())
        self.lower = nn.Parameter(zeros.new_zeros(size, size))
        self.encoder = (self.given_encoder or self._own_encoder(2 * own)).to(zeros)

    def _own_encoder(self, num_outputs: int) -> nn.Module:
        with seeded(self.seed):
            return MLP(self.num_inputs or 0, self.hidden_dims, num_outputs)

    @property
    def num_latents(self) -> int:
        """Numbers in all, on the real line."""
        return self._whole.size

    def _factors(self, part: Part | None = None, data: Data | None = None) -> Factors:
        loc, log_scale = self._encode(data)
        num, own = loc.shape
        expected = len(self._whole.inner) if part is None else len(part.rows)
        if num != expected:
            raise ValueError(f"data: expected {expected} rows, as the guide has, got {num}")
        none = loc.new_zeros(num, own, len(self.loc))
        return Factors(
            offset_g=self.offset,
            frame_g=self.frame,
            loc_g=self.loc,
            tril_g=self.lower.tril(-1) + self.log_scale.exp().diag(),
            offset_n=self.local_offset.expand(num, own),
            frame_n=self.local_frame.diag().expand(num, own, own),
            frame_slope=none,
            loc_n=loc,
            tril_n=log_scale.exp().diag_embed(),
            slope_n=none,
        )

    def _encode(self, data: Data | None) -> tuple[Tensor, Tensor]:
        """Means and log standard deviations (B, l), in units of the frame."""
        data = data or self._data
        tensors = [] if data is None else data.tensors()
        if data is None or not tensors:
            raise ValueError(
                "Amortised: expected the data that its latents are read off, got none"
            )
        own = len(self.local_offset)
        if self.given_encoder is None:
            x = (_numbers(data).to(self.loc) - self.input_loc) / self.input_scale
            out = self.encoder(x.nan_to_num(0.0))
        else:
            out = self.encoder(*(t.to(self.loc) if t.is_floating_point() else t for t in tensors))
        if tuple(out.shape) != (len(tensors[0]), 2 * own):
            raise ValueError(
                f"encoder: expected an output of shape {(len(tensors[0]), 2 * own)}, two numbers "
                f"for each of the {own} numbers of a row, got {tuple(out.shape)}"
            )
        loc, log_scale = out.split(own, -1)
        return loc, _MOST_LOG_SCALE * torch.tanh(log_scale / _MOST_LOG_SCALE)

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`Guide.start`; the rows share one centre and the spread of all of them."""
        inner = center[self._whole.inner]  # (N, l)
        spread = (inner.var(0, correction=0) + unit[self._whole.inner].square().mean(0)).sqrt()
        self._place(center[self._whole.outer], unit[self._whole.outer].diag())
        self.local_offset.copy_(inner.mean(0))
        self.local_frame.copy_(spread)

    def lay(self, center: Tensor, precision: Tensor) -> None:
        """See :meth:`Guide.lay`; only the diagonal of the precision counts."""
        self.start(center, precision.diagonal().rsqrt())

    def start_from(self, guide: Guide) -> None:
        """See :meth:`Guide.start_from`; the network has yet to learn what it says of each row."""
        self.start(guide.free_mean().detach(), guide.free_sd().detach())

    def recentre(self) -> None:
        """Move the frame of the global latents to where they are, in place."""
        with torch.no_grad():
            center = self.offset + self.frame @ self.loc
            tril = self.lower.tril(-1) + self.log_scale.exp().diag()
            self._place(center, self.frame @ tril)

    def _place(self, center: Tensor, frame: Tensor) -> None:
        with torch.no_grad():
            self.offset.copy_(center)
            self.frame.copy_(frame)
            for parameter in (self.loc, self.log_scale, self.lower):
                parameter.zero_()

    def network_parameters(self) -> Iterator[Tensor]:
        """Weights of the encoder, which a fit moves by shorter steps than the rest."""
        return self.encoder.parameters()

    def spec(self) -> dict[str, Any]:
        """What builds this guide again, apart from its numbers and an encoder of your own."""
        arguments = {
            "hidden_dims": list(self.hidden_dims),
            "num_inputs": self.num_inputs,
            "seed": self.seed,
        }
        own = self.given_encoder is not None
        return super().spec() | {"arguments": arguments, "own_encoder": own}


def _numbers(data: Data) -> Tensor:
    """All numbers of each row of the data, shape (B, F)."""
    return torch.cat([t.reshape(len(t), -1).to(torch.float64) for t in data.tensors()], -1)
