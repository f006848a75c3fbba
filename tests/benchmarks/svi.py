"""A step of stochastic variational inference: latentlab, NumPyro and Pyro.

The same model, a mean-field guide and one particle on all sides. latentlab takes the step of
``fit``, Pyro that of its tutorials: ``SVI(model, AutoNormal(model), Adam, Trace_ELBO()).step``,
with ``TraceEnum_ELBO`` where a discrete latent is summed out.
"""

from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal

import latentlab as ll
from latentlab.inference.batches import Batches
from latentlab.inference.check import prepare
from latentlab.inference.modes import TrainingMode
from latentlab.inference.steps import Engine

from . import Table, Timing, machine, take_turns
from . import peers_svi as peers
from .networks import CELLS, HIDDEN, LATENT, VAE

LOOP = 100  # steps of a call
EVERY = 5  # steps between two places that a climb averages


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def hierarchy(group, x, y):
    """Intercepts and slopes of 50 groups."""
    means = pyro.sample("means", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scales = pyro.sample("scales", dist.HalfNormal(torch.ones(2)).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("groups", 50):
        intercept = pyro.sample("intercept", dist.Normal(means[..., 0], scales[..., 0]))
        slope = pyro.sample("slope", dist.Normal(means[..., 1], scales[..., 1]))
    with pyro.plate("rows", len(x)):
        loc = intercept[..., group] + slope[..., group] * x
        pyro.sample("y", dist.Normal(loc, noise), obs=y)


def logistic(x, y, size=None):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    logits = (weights @ x.T).squeeze(-2) if weights.dim() > 1 else weights @ x.T
    with ll.rows(x, size):
        pyro.sample("y", dist.Bernoulli(logits=logits + bias), obs=y)


@config_enumerate
def mixture(x):
    """Three Gaussians in two dimensions, their labels summed out by enumeration."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        scales = pyro.sample("scales", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        label = pyro.sample("label", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[label], scales[label]).to_event(1), obs=x)


class Case(NamedTuple):
    """A pair to take steps of.

    Arguments:
        model: the model.
        data: what it is called with.
        guide: ours, by name or as it is.
        peer: the model of NumPyro, by name.
        asked: how many times as fast as NumPyro XLA has to be.
        of_pyro: how many times as fast as Pyro an eager step has to be; none for no comparison.
        enumerates: whether Pyro has to enumerate.
        batch_size: rows of a step.
    """

    model: Callable
    data: tuple
    guide: object = "mean_field"
    peer: str | None = None
    asked: float | None = None
    of_pyro: float | None = None
    enumerates: bool = False
    batch_size: int | None = None


def cases():
    """Name -> what steps are taken of."""
    r = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=r)

    def table(num_rows):
        features = normal(num_rows, 50)
        return features, (normal(num_rows) < features @ normal(50)).float()

    schools = (
        torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),
        torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]),
    )
    group, x = torch.randint(50, (1000,), generator=r), normal(1000)
    y = normal(50)[group] + (1 + 0.3 * normal(50))[group] * x + 0.5 * normal(1000)
    centers = torch.tensor([[-3.0, 0], [0, 3], [3, 0]])
    points = centers[torch.randint(3, (1000,), generator=r)] + normal(1000, 2)
    few, many = table(1000), table(100_000)
    iaf = ll.guides.Flow("iaf", hidden_dims=(64, 64))
    pixels = (torch.rand(6000, CELLS, generator=r) < 0.2).float()
    net = VAE()
    return {
        "eight schools": Case(eight_schools, schools, peer="eight schools", asked=2, of_pyro=1.8),
        "hierarchy, 50 groups, 1e3 rows": Case(
            hierarchy, (group, x, y), peer="hierarchy", asked=1.5, of_pyro=0
        ),
        "logistic, 1e3 x 50": Case(logistic, few, peer="logistic", asked=1, of_pyro=0),
        "logistic, 1e5 x 50": Case(logistic, many, peer="logistic", asked=0.95),
        "logistic, 256 of 1e5 rows": Case(
            logistic, many, peer="logistic", asked=1, batch_size=256
        ),
        "eight schools, IAF guide": Case(
            eight_schools, schools, iaf, peer="eight schools", asked=0.9
        ),
        "VAE 784-400-20": Case(net.model, (pixels,), net.guide, "VAE", 0.9, batch_size=128),
        "enumerated mixture": Case(mixture, (points,), of_pyro=1.8, enumerates=True),
    }


def our_steps(case, backend="eager"):
    """A function that takes steps as ``fit`` does."""
    pair, report = prepare(case.model, case.data, case.guide)
    assert report.ok, report
    batch = Batches(pair.data, case.batch_size)
    engine = Engine(pair, backend, num_particles=1, max_steps=10**9)
    optimiser = torch.optim.Adam(pair.parameters().values(), lr=0.01, fused=True)
    with pair.entered(seed=0):
        stepper = engine.stepper(optimiser, batch, 0, TrainingMode(pair), EVERY, 0)
    taken = []

    def steps(number):
        with pair.entered(seed=0):
            for _ in range(-(-number // stepper.size)):
                taken.extend(stepper.take(len(taken), [0.01] * stepper.size, 0)[0])

    return steps


def their_steps(case):
    """A function that takes steps as NumPyro does, in one compiled loop."""
    if case.peer == "VAE":
        model, guide = peers.autoencoder(CELLS, HIDDEN, LATENT)
    else:
        model = peers.models()[case.peer]
        guide = peers.guide_of(model, "mean_field" if case.guide == "mean_field" else "iaf")
    return peers.steps(model, guide, case.data, case.batch_size)


def pyro_steps(case, validates):
    """A function that takes steps as Pyro's tutorials do."""
    guide = AutoNormal(poutine.block(case.model, hide=["label"]))
    elbo = TraceEnum_ELBO(max_plate_nesting=1) if case.enumerates else Trace_ELBO()
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    store = {"params": {}, "constraints": {}}

    def steps(number):
        with pyro.get_param_store().scope(store), pyro.validation_enabled(validates):
            for _ in range(number):
                svi.step(*case.data)

    return steps


def run():
    """Microseconds a step, and how many times as fast latentlab is."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row_of(name, case) for name, case in cases().items()]
    finally:
        torch.set_num_threads(num_threads)
    packages = ["torch", "pyro-ppl", "numpy", "jax"] + ["numpyro"] * peers.has_numpyro()
    return Table(
        "A step of variational inference: latentlab, NumPyro and Pyro",
        [
            *machine(*packages),
            "mean-field guide but where said, 1 particle, float32, 1 thread; median CPU time of "
            "15 turns",
            'XLA: fit\'s steps with backend="xla", 100 in a call, their noise and rows included; '
            "NumPyro: SVI.update in a compiled loop of 100",
            "eager: fit's steps by torch; Pyro as in its tutorials, its validation on and off; "
            "traced: the record of a pair, run by torch",
            "ratios: median of the turns, and from the least to the largest",
        ],
        [
            "us a step", "XLA", "NumPyro", "times as fast", "asked",
            "eager", "Pyro", "times as fast", "asked", "no validation, times as fast",
            "traced", "of Pyro, times as fast", "asked",
        ],
        rows,
    )  # fmt: skip


def by_loops(steps):
    """What takes loops of steps, as XLA does."""
    return lambda number: steps(number * LOOP)


def row_of(name, case):
    """A row of the table."""
    candidates = {"xla": our_steps(case, "xla")}
    if case.peer and peers.has_numpyro():
        candidates["numpyro"] = their_steps(case)
    loops = take_turns({key: by_loops(steps) for key, steps in candidates.items()}, seconds=0.3)
    found = {key: Timing([s / LOOP for s in loop.seconds]) for key, loop in loops.items()}
    if case.of_pyro is not None:
        found |= take_turns(
            {
                "eager": our_steps(case),
                "traced": our_steps(case, "traced"),
                "pyro": pyro_steps(case, validates=True),
                "unchecked": pyro_steps(case, validates=False),
            }
        )

    def time(key):
        return f"{1e6 * found[key].median:.1f}" if key in found else ""

    def ratio(theirs, ours):
        return spread(found[theirs].times(found[ours])) if theirs in found else ""

    asked = f">= {case.asked}" if case.asked else ""
    of_pyro = f">= {case.of_pyro}" if case.of_pyro else ""
    fast = [time("xla"), time("numpyro"), ratio("numpyro", "xla"), asked]
    slow = [time("eager"), time("pyro"), ratio("pyro", "eager"), of_pyro]
    traced = [time("traced"), ratio("pyro", "traced"), ">= 2" if "traced" in found else ""]
    return [name, *fast, *slow, ratio("unchecked", "eager"), *traced]


def spread(ratio: Timing) -> str:
    return f"{ratio.median:.2f} ({min(ratio.seconds):.2f} to {max(ratio.seconds):.2f})"
