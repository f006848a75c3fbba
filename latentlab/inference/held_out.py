r"""Rows that a pair was not fitted to, and what it says of them.

.. math::
    \ell_n = \log \frac{1}{S} \sum_s \frac{p(x_n, z_s)}{q(z_s \mid x_n)}
    \quad \text{or} \quad
    \log \frac{1}{S} \sum_s p(x_n \mid \theta_s), \quad \theta_s \sim q

the first where the latents of a row come from that row (without latents it is the log-density
itself), the second where they are shared by all rows.

Letters: N rows, S draws.

Reference:
    | Importance weighted autoencoders (Burda et al., 2016)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentlab.diagnostics import Estimate
from latentlab.inference import objectives, predictive
from latentlab.inference.batches import chosen, follows_rows, num_rows, take
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.rows import density_of_rows

__all__ = ["HeldOut", "as_share", "log_density_of_rows", "measure"]

_ROWS = 2_000  # looked at
_DRAWS = 100
_ELEMENTS = 2**32  # numbers of weights and rows that may meet


@dataclass(frozen=True)
class HeldOut:
    """How rows that were kept aside compare with those that were fitted, in nats per datum.

    Arguments:
        value: mean log-density of rows kept aside.
        training: of rows that were fitted.
        spread: standard deviation of the log-density from row to row, of those fitted.
    """

    value: Estimate
    training: Estimate
    spread: float

    @property
    def gap(self) -> Estimate:
        """How much lower the rows kept aside are; its error is that of two samples of rows."""
        se = math.hypot(self.value.se, self.training.se)
        return Estimate(self.training.value - self.value.value, se)

    def spec(self) -> list[float]:
        """The figures as JSON values."""
        figures = (self.value.value, self.value.se, self.training.value, self.training.se)
        return [*figures, self.spread]

    @classmethod
    def from_spec(cls, spec: list[float]) -> HeldOut:
        """What :meth:`spec` described."""
        return cls(Estimate(*spec[:2]), Estimate(*spec[2:4]), spec[4])

    def as_text(self) -> Mapping[str, str]:
        """Name -> figure with its error."""
        return {
            "held-out rows": f"{self.value} nats per datum",
            "fitted rows": f"{self.training} nats per datum, {self.gap} more",
        }


def as_share(value: float, argument: str = "held_out") -> float:
    """A share of rows in [0, 1), checked.

    Arguments:
        value: the share.
        argument: its name, for errors.

    Raises:
        ValueError: if it is none.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise ValueError(
            f"{argument}: expected a share of the rows in [0, 1), such as 0.1, got {value!r}"
        )
    return float(value)


def log_density_of_rows(pair: Pair, data: Arguments, num_draws: int = _DRAWS) -> Tensor:
    """Log-density (N,) in nats of each row of some data; call it with the pair entered.

    Arguments:
        pair: the pair, with the data that were fitted.
        data: rows, in the form of these.
        num_draws: draws S.
    """
    with torch.no_grad():
        if follows_rows(pair):
            log_weights = density_of_rows(pair, data, num_draws if pair.latents else 1)
        else:
            other = replace(pair, data=data)
            plate = predictive.datum_plate(pair)
            draws = objectives.draw(pair, 1 if pair.is_point() else num_draws)
            kept = predictive.shared(other, draws, plate)
            log_weights, _ = predictive.log_density(other, kept, plate)
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def measure(pair: Pair, held: Arguments, seed: int) -> HeldOut:
    """Compare rows kept aside with rows that were fitted, at most 2,000 of each.

    Arguments:
        pair: the pair, entered, with the data that were fitted.
        held: the rows kept aside.
        seed: of the choice of rows.
    """
    size = sum(p.numel() for p in pair.parameters().values()) + 1
    found = []
    for data in (held, pair.data):
        total = num_rows(data) or 1
        rows = chosen(_ROWS, total, seed)
        num_draws = max(10, min(_DRAWS, _ELEMENTS // (size * len(rows))))
        found.append(log_density_of_rows(pair, take(data, rows), num_draws).double())
    value, training = (Estimate.from_draws(rows) for rows in found)
    return HeldOut(value, training, float(found[1].std()))
