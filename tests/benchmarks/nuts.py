"""Draws of the no-U-turn sampler: latentlab, NumPyro and Pyro."""

import time

import pyro.infer
import torch

import latentlab as ll

from . import Table, machine
from . import peers_svi as peers
from .svi import cases

TURNS = 3
WARMUP, DRAWS = 500, 1000
FEW = 100  # of Pyro's, after as many in its warm-up
NAMES = ("eight schools", "hierarchy, 50 groups, 1e3 rows")


def our_seconds(case, seed):
    """A chain of ours from nothing: looked at, recorded, compared, compiled, drawn."""
    from latentlab.inference import nuts

    nuts._chains.clear()
    begin = time.perf_counter()
    chains = ll.nuts(
        case.model, case.data, num_warmup=WARMUP, num_samples=DRAWS, num_chains=1, seed=seed
    )
    seconds = time.perf_counter() - begin
    return seconds, float(chains.summary()["ess_bulk"].min())


def their_seconds(case, seed):
    """A chain of NumPyro, compiled and drawn."""
    import jax
    from numpyro.diagnostics import effective_sample_size
    from numpyro.infer import MCMC, NUTS

    model = peers.models()[case.peer]
    begin = time.perf_counter()
    sampler = MCMC(
        NUTS(model, target_accept_prob=0.9),
        num_warmup=WARMUP,
        num_samples=DRAWS,
        progress_bar=False,
    )
    sampler.run(jax.random.PRNGKey(seed), *(x.numpy() for x in case.data))
    draws = jax.block_until_ready(sampler.get_samples(group_by_chain=True))
    seconds = time.perf_counter() - begin
    return seconds, min(float(effective_sample_size(v).min()) for v in draws.values())


def pyro_seconds(case):
    """A short chain of Pyro."""
    begin = time.perf_counter()
    kernel = pyro.infer.NUTS(case.model, target_accept_prob=0.9)
    options = {"num_samples": FEW, "warmup_steps": FEW, "disable_progbar": True}
    pyro.infer.MCMC(kernel, **options).run(*case.data)
    return time.perf_counter() - begin


def row_of(name):
    """Seconds of a chain for each of the three, and the ratios."""
    case, ours, theirs = cases()[name], [], []
    for seed in range(TURNS):
        ours.append(our_seconds(case, seed))
        theirs.append(their_seconds(case, seed))
    (mine, my_ess), (other, other_ess) = (sorted(x)[TURNS // 2] for x in (ours, theirs))
    slow = pyro_seconds(case)
    ratios = sorted(t / o for (o, _), (t, _) in zip(ours, theirs, strict=True))
    per_draw = slow / (2 * FEW) / (mine / (WARMUP + DRAWS))
    return [
        name,
        f"{mine:.1f}",
        f"{other:.1f}",
        f"{slow:.1f}",
        f"{ratios[TURNS // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{per_draw:.0f}",
        f"{my_ess:.0f}, {other_ess:.0f}",
    ]


def run():
    """Seconds of a chain, everything included after import."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row_of(name) for name in NAMES]
    finally:
        torch.set_num_threads(num_threads)
    return Table(
        "The no-U-turn sampler: latentlab, NumPyro and Pyro",
        [
            *machine("torch", "pyro-ppl", "jax", "blackjax", "numpyro"),
            f"one chain of {WARMUP} + {DRAWS} steps, acceptance 0.9, float32; median of {TURNS} "
            "turns, compilation included",
            f"Pyro: {FEW} + {FEW} steps; its ratio is by step",
        ],
        ["model", "s", "NumPyro s", "Pyro s", "NumPyro / ours", "Pyro / ours", "least ESS"],
        rows,
    )
