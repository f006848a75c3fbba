"""A step of stochastic variational inference, eager, against Pyro's.

The same model, a mean-field guide and one particle on both sides. latentlab takes the step of
``fit``, Pyro that of its tutorials: ``SVI(model, AutoNormal(model), Adam, Trace_ELBO()).step``,
with ``TraceEnum_ELBO`` where a discrete latent is summed out.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal

from latentlab.inference.check import prepare
from latentlab.inference.modes import TrainingMode
from latentlab.inference.steps import Engine

from . import Table, Timing, machine, take_turns

ASKED = {"eight schools": 1.8, "enumerated mixture": 1.8}  # times as fast as Pyro


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


def logistic(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    logits = (weights @ x.T).squeeze(-2) if weights.dim() > 1 else weights @ x.T
    with pyro.plate("rows", len(x)):
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


def cases():
    """Name -> model, data, whether Pyro has to enumerate."""
    r = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=r)

    effects = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    errors = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    group, x = torch.randint(50, (1000,), generator=r), normal(1000)
    y = normal(50)[group] + (1 + 0.3 * normal(50))[group] * x + 0.5 * normal(1000)
    features = normal(1000, 50)
    answers = (normal(1000) < features @ normal(50)).float()
    centers = torch.tensor([[-3.0, 0], [0, 3], [3, 0]])
    points = centers[torch.randint(3, (1000,), generator=r)] + normal(1000, 2)
    return {
        "eight schools": (eight_schools, (effects, errors), False),
        "hierarchy, 50 groups, 1e3 rows": (hierarchy, (group, x, y), False),
        "logistic, 1e3 x 50": (logistic, (features, answers), False),
        "enumerated mixture": (mixture, (points,), True),
    }


def our_steps(model, data):
    """A function that takes steps as ``fit`` does."""
    pair, report = prepare(model, data, "mean_field")
    assert report.ok, report
    engine = Engine(pair, "eager", num_particles=1, max_steps=10**9)
    optimiser = torch.optim.Adam(pair.parameters().values(), lr=0.01, fused=True)
    how = (lambda step: pair.data, 0, TrainingMode(pair), 1, 0)
    stepper, taken = engine.stepper(optimiser, *how), []

    def steps(number):
        with pair.entered(seed=0):
            for _ in range(number):
                taken.extend(stepper.take(len(taken), [0.01], 0)[0])

    return steps


def pyro_steps(model, data, enumerates, validates):
    """A function that takes steps as Pyro's tutorials do."""
    guide = AutoNormal(poutine.block(model, hide=["label"]))
    elbo = TraceEnum_ELBO(max_plate_nesting=1) if enumerates else Trace_ELBO()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    store = {"params": {}, "constraints": {}}

    def steps(number):
        with pyro.get_param_store().scope(store), pyro.validation_enabled(validates):
            for _ in range(number):
                svi.step(*data)

    return steps


def run():
    """Microseconds a step, and how many times as fast latentlab is."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for name, (model, data, enumerates) in cases().items():
            found = take_turns(
                {
                    "ours": our_steps(model, data),
                    "Pyro": pyro_steps(model, data, enumerates, validates=True),
                    "unchecked": pyro_steps(model, data, enumerates, validates=False),
                }
            )
            times = [f"{1e6 * found[key].median:.0f}" for key in ("ours", "Pyro", "unchecked")]
            ratios = [found[key].times(found["ours"]) for key in ("Pyro", "unchecked")]
            asked = f">= {ASKED[name]}" if name in ASKED else ""
            rows.append([name, *times, spread(ratios[0]), asked, spread(ratios[1])])
    finally:
        torch.set_num_threads(num_threads)
    return Table(
        "A step of variational inference: latentlab (eager) and Pyro",
        [
            *machine("torch", "pyro-ppl", "numpy"),
            "mean-field guide, 1 particle, float32, 1 thread; median CPU time of 15 turns",
            "Pyro as in its tutorials, its validation on, and once more with it off; latentlab "
            "checks a pair before the first step and then no more",
            "ratios: median of the turns, and from the least to the largest",
        ],
        [
            "us a step", "latentlab", "Pyro", "Pyro, no validation",
            "times as fast", "asked", "the same, no validation",
        ],
        rows,
    )  # fmt: skip


def spread(ratio: Timing) -> str:
    return f"{ratio.median:.2f} ({min(ratio.seconds):.2f} to {max(ratio.seconds):.2f})"
