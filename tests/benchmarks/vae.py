"""A training step of a variational autoencoder: latentlab and a plain loop in torch."""

import itertools

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from latentlab.inference.batches import Batches, BatchRows
from latentlab.inference.check import prepare
from latentlab.inference.networks import NetworkClimb
from latentlab.inference.steps import Engine

from . import Table, machine, take_turns
from .networks import CELLS, VAE
from .svi import spread

ROWS, BATCH = 6_000, 128


def plain_steps(x):
    """So many steps of the loop that one would write by hand."""
    vae = VAE()
    optimiser = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
    rows, done = BatchRows(len(x), BATCH, 0), itertools.count()

    def run(calls):
        for _ in range(calls):
            batch = x.index_select(0, rows(next(done)))
            loc, scale = vae.encoder(batch)
            z = loc + scale * torch.randn_like(scale)
            bce = binary_cross_entropy_with_logits(vae.decoder(z), batch, reduction="sum")
            kl = 0.5 * (loc**2 + scale**2 - 1).sum() - scale.log().sum()
            loss = (bce + kl) / BATCH
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            loss.item()

    return run


def our_steps(x):
    """So many steps of a stage of the climb that ``fit`` makes."""
    vae = VAE()
    pair, report = prepare(vae.model, x, vae.guide)
    if not report.ok:
        raise RuntimeError(str(report))
    batch = Batches(pair.data, BATCH)
    engine = Engine(pair, "eager", num_particles=1, max_steps=10**6)
    how = (pair, 0, 1, 1e-3, 0.03, 10**6, batch, lambda *_: None, engine)
    climb = NetworkClimb(*how, batch_size=BATCH)
    steps = climb._at(1e-3)

    def run(calls):
        with pair.entered(0):
            climb._stage(steps, calls)

    return run


def data():
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(ROWS, CELLS, generator=generator) < 0.2).float()


def run():
    """Milliseconds a step, and how many times as long as by hand."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = data()
        steps = {"ours": our_steps(x), "by hand": plain_steps(x)}
        found = take_turns(steps, turns=9, seconds=1.0)
    finally:
        torch.set_num_threads(num_threads)
    times = [f"{1e3 * found[name].median:.2f}" for name in ("ours", "by hand")]
    ratio = spread(found["ours"].times(found["by hand"]))
    return Table(
        "A training step of a variational autoencoder: latentlab and a plain loop in torch",
        [
            *machine("torch", "pyro-ppl", "numpy"),
            "784-400-20 as in Pyro's tutorial, batch 128, float32, 1 thread; median CPU time of 9 "
            "turns of a second",
            "by hand: the same networks, closed-form KL and fused Adam, nothing of Pyro",
            "ratio: median of the turns, and from the least to the largest",
        ],
        ["ms a step", "latentlab", "by hand", "times as long", "asked"],
        [["VAE 784-400-20", *times, ratio, "<= 1.3"]],
    )
