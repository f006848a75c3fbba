"""A step of a flow guide, against the same flow in zuko and in Pyro.

Five affine autoregressive maps with two hidden layers of 64, 21 latents, 1024 draws, a standard
normal target with a log-density that costs nothing: draw, score the draws, differentiate, take a
step of Adam. All of them draw in one pass: zuko's by the inverse of its flow.
"""

import pyro
import torch
from pyro.distributions import transforms
from torch import nn
from torch.distributions import constraints

from latentlab import flows
from latentlab.guides import Flow, Latent

from . import Table, machine, take_turns

D, DRAWS, MAPS, HIDDEN, ASKED = 21, 1024, 5, (64, 64), 1.3


def steps_of(draw, parameters):
    """A function that takes steps."""
    optimiser = torch.optim.Adam(list(parameters), lr=1e-3, fused=True)

    def steps(number):
        for _ in range(number):
            optimiser.zero_grad(set_to_none=True)
            value, log_q = draw()
            (log_q + 0.5 * value.square().sum(-1)).mean().backward()
            optimiser.step()

    return steps


def ours(kind):
    vector = constraints.independent(constraints.real, 1)
    guide = Flow(kind, num_transforms=MAPS, hidden_dims=HIDDEN)
    guide.bind([Latent("z", (), (D,), vector)], max_plate_nesting=0, dtype=torch.float32)

    def draw():
        draws = guide.draw(DRAWS)
        return draws.values["z"], draws.log_q

    return steps_of(draw, guide.parameters())


def zukos(kind):
    flows.make(kind, 2)  # imports zuko without a trace
    import zuko

    make = {"iaf": zuko.flows.MAF, "nsf": zuko.flows.NSF}[kind]
    forward = make(D, transforms=MAPS, hidden_features=HIDDEN)
    flow = zuko.flows.Flow(forward.transform.inv, forward.base)
    return steps_of(lambda: flow().rsample_and_log_prob((DRAWS,)), flow.parameters())


def pyros(kind):
    make = {"iaf": transforms.affine_autoregressive, "nsf": transforms.spline_autoregressive}[kind]
    maps = [t for _ in range(MAPS) for t in (make(D, list(HIDDEN)), transforms.permute(D))]
    base = pyro.distributions.Normal(torch.zeros(D), torch.ones(D)).to_event(1)
    modules = nn.ModuleList([m for m in maps if isinstance(m, nn.Module)])

    def draw():
        q = pyro.distributions.TransformedDistribution(base, maps)
        value = q.rsample((DRAWS,))
        return value, q.log_prob(value)

    return steps_of(draw, modules.parameters())


def run():
    """Milliseconds a step, and how many times as long as the faster of the peers."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for kind in ("iaf", "nsf"):
            torch.manual_seed(0)
            candidates = {"ours": ours(kind), "zuko": zukos(kind), "Pyro": pyros(kind)}
            with pyro.validation_enabled(False):
                found = take_turns(candidates, turns=9, seconds=0.3)
            times = [f"{1e3 * found[name].median:.1f}" for name in candidates]
            best = min(found["zuko"], found["Pyro"], key=lambda timing: timing.median)
            ratio = found["ours"].times(best)
            spread = f"{ratio.median:.2f} ({min(ratio.seconds):.2f} to {max(ratio.seconds):.2f})"
            rows.append([kind, *times, spread, f"<= {ASKED}" if kind == "iaf" else ""])
    finally:
        torch.set_num_threads(num_threads)
    return Table(
        f"A step of a flow guide: {D} latents, {DRAWS} draws",
        [
            *machine("torch", "pyro-ppl", "zuko"),
            f"{MAPS} maps, hidden layers {HIDDEN}, float32, 1 thread; median CPU time of 9 turns",
            "ours has a mean, a triangular scale and a frame besides the maps, and ELU for ReLU",
            "with so many draws our gradient leaves the score of q in, as those of the peers do",
        ],
        ["flow", "latentlab, ms", "zuko, inverse", "Pyro", "ours / best", "asked"],
        rows,
    )
