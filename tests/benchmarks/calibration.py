"""A hundred refits for simulation-based calibration: as one, and one after the other."""

import time

import pyro
import pyro.distributions as dist
import torch

import latentlab as ll

from . import Table, machine
from .svi import cases

REFITS = 100
FEW = 5  # in turn, of which the others are reckoned


def normal(x):
    """Mean and scale of 50 numbers, as in the prototype."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def row_of(name, model, data):
    """Seconds of the refits as one, of those in turn, and the ratio."""
    begin = time.perf_counter()
    found = ll.calibrate(model, data, "mean_field", num_simulations=REFITS, progress=False)
    as_one = time.perf_counter() - begin
    begin = time.perf_counter()
    for seed in range(FEW):
        ll.fit(model, data, "mean_field", seed=seed, progress=False)
    each = (time.perf_counter() - begin) / FEW
    ratio = each * REFITS / as_one
    return [name, f"{as_one:.1f}", f"{each:.2f}", f"{ratio:.0f}", "30", found.how]


def run():
    """Seconds, everything included after import."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        schools, hierarchy = (
            cases()[k] for k in ("eight schools", "hierarchy, 50 groups, 1e3 rows")
        )
        rows = [
            row_of("mean and scale, 50 rows", normal, torch.zeros(50)),
            row_of("eight schools", schools.model, schools.data),
            row_of("hierarchy, 50 groups, 1e3 rows", hierarchy.model, hierarchy.data),
        ]
    finally:
        torch.set_num_threads(num_threads)
    return Table(
        "A hundred refits as one",
        [
            *machine("torch", "pyro-ppl", "jax"),
            f"mean-field guide, {REFITS} simulated data sets: simulated, fitted, drawn from and "
            "tested; compilation included",
            f"in turn: latentlab's own default fit, mean of {FEW}",
        ],
        ["model", "s as one", "s each in turn", "ratio of 100", "asked", "how"],
        rows,
    )
