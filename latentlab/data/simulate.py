"""Data that are drawn, not measured: the truth behind them is known."""

from __future__ import annotations

import torch

from latentlab.data.checks import as_count, as_seed
from latentlab.data.table import Table

__all__ = ["eruptions"]


def eruptions(num_rows: int = 272, seed: int | None = 0) -> Table:
    r"""Simulated eruptions of a geyser like Old Faithful; none of the rows was ever observed.

    Short eruptions are followed by a short wait, long ones by a long wait,

    .. math::
        z_n \sim \mathrm{Categorical}(0.36, 0.64), \quad
        x_n \mid z_n = k \sim \mathcal{N}(\mu_k, \mathrm{diag} \, \sigma_k^2),

    with means (2.04, 54.5) and (4.29, 80.0) and standard deviations (0.27, 5.9) and (0.41, 6.0):
    the figures of a two-component mixture fitted to the 272 eruptions of the reference, rounded.

    Arguments:
        num_rows: the number of eruptions.
        seed: another seed, another table; ``None`` takes a fresh one. The global generator is
            neither used nor changed.

    Returns:
        A table with the columns ``eruptions``, how long one lasts, and ``waiting``, how long until
        the next, both in minutes.

    Raises:
        ValueError: if ``num_rows`` is not an int >= 1, or ``seed`` not an int >= 0.

    References:
        | A look at some data on the Old Faithful geyser (Azzalini and Bowman, 1990)

    Example:
        >>> eruptions()
        Table(272 rows, 2 columns: 'eruptions', 'waiting'; 0 missing cells)
    """
    num_rows = as_count(num_rows, "num_rows")
    seed = as_seed(seed)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    locs = torch.tensor([[2.04, 54.5], [4.29, 80.0]], dtype=torch.float64)
    scales = torch.tensor([[0.27, 5.9], [0.41, 6.0]], dtype=torch.float64)
    long = (torch.rand(num_rows, generator=generator, dtype=torch.float64) < 0.64).long()
    noise = torch.randn(num_rows, 2, generator=generator, dtype=torch.float64)
    return Table(locs[long] + scales[long] * noise, ("eruptions", "waiting"))
