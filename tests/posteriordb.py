"""Six models of posteriordb written as Pyro programs, with the reference posteriors.

The data and the summaries of 10,000 reference draws are not part of the project.

Reference:
    | posteriordb: testing, benchmarking and developing Bayesian inference algorithms
      (Magnusson et al., 2025)
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "shared" / "data" / "posteriordb"


class OrderedNormal(dist.TorchDistribution):
    """Independent normals, given that they are in ascending order; density up to a constant."""

    arg_constraints = {}
    support = constraints.ordered_vector

    def __init__(self, loc, scale):
        self.base = dist.Normal(torch.tensor(loc), torch.tensor(scale)).to_event(1)
        super().__init__(event_shape=self.base.event_shape)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(OrderedNormal, _instance)
        new.base = self.base.expand(batch_shape)
        dist.TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        return new

    def sample(self, sample_shape=()):
        return self.base.sample(sample_shape).sort(-1).values

    def log_prob(self, value):
        return self.base.log_prob(value)


class HiddenChain(dist.TorchDistribution):
    """A hidden chain with normal emissions of scale 1; each first state counts one."""

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(self, transitions, locs, length):
        self.transitions, self.locs = transitions, locs
        super().__init__(
            torch.broadcast_shapes(transitions.shape[:-2], locs.shape[:-1]), (length,)
        )

    def log_prob(self, value):
        emitted = dist.Normal(self.locs[..., None, :], 1.0).log_prob(value[..., None])
        alpha = emitted[..., 0, :]
        for t in range(1, value.shape[-1]):
            moved = alpha[..., None] + self.transitions.log()
            alpha = moved.logsumexp(-2) + emitted[..., t, :]
        return alpha.logsumexp(-1)

    def sample(self, sample_shape=()):
        return torch.zeros(self._extended_shape(sample_shape))


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def kidscore(x, y):
    prior = dist.Normal(0.0, 1e4).expand([x.shape[1]]).to_event(1)  # flat in Stan
    beta = pyro.sample("beta", prior)
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((beta * x).sum(-1), sigma), obs=y)


def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def autoregression(past, y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([past.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("steps", len(y)):
        pyro.sample("y", dist.Normal(alpha + past @ beta, sigma), obs=y)


def two_normals(y):
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    mu = pyro.sample("mu", OrderedNormal([0.0, 0.0], [2.0, 2.0]))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(1 - theta)).long()
        pyro.sample("y", dist.Normal(Vindex(mu)[..., z], Vindex(sigma)[..., z]), obs=y)


def hidden_chain(y):
    rows = dist.Dirichlet(torch.ones(2))
    theta1, theta2 = pyro.sample("theta1", rows), pyro.sample("theta2", rows)
    mu = pyro.sample("mu", OrderedNormal([3.0, 10.0], [1.0, 1.0]))
    pyro.sample("y", HiddenChain(torch.stack([theta1, theta2], -2), mu, len(y)), obs=y)


@dataclass(frozen=True)
class Case:
    """A model, its data, and how its latents make the parameters of the reference, in order."""

    model: Callable
    data: tuple[Tensor, ...]
    parameters: Callable[[Mapping[str, Tensor]], list[Tensor]]
    mean: np.ndarray
    sd: np.ndarray


def _schools(z):
    theta = z["mu"][:, None] + z["tau"][:, None] * z["z"]
    return [theta, z["mu"], z["tau"]]


def _sites(*names):
    return lambda draws: [draws[name] for name in names]


_CASES = {
    "eight_schools-eight_schools_noncentered": (
        eight_schools,
        lambda d: (d["y"], d["sigma"]),
        _schools,
    ),
    "kidiq-kidscore_interaction": (
        kidscore,
        lambda d: (
            torch.stack(
                [
                    torch.ones_like(d["mom_iq"]),
                    d["mom_hs"],
                    d["mom_iq"],
                    d["mom_hs"] * d["mom_iq"],
                ],
                -1,
            ),
            d["kid_score"],
        ),
        _sites("beta", "sigma"),
    ),
    "low_dim_gauss_mix-low_dim_gauss_mix": (
        two_normals,
        lambda d: (d["y"],),
        _sites("mu", "sigma", "theta"),
    ),
    "hmm_example-hmm_example": (
        hidden_chain,
        lambda d: (d["y"],),
        _sites("theta1", "theta2", "mu"),
    ),
    "arK-arK": (
        autoregression,
        lambda d: (d["y"].unfold(0, 5, 1)[:-1].flip(-1), d["y"][5:]),
        _sites("alpha", "beta", "sigma"),
    ),
    "sblri-blr": (regression, lambda d: (d["X"], d["y"]), _sites("beta", "sigma")),
}
NAMES = tuple(_CASES)


def case(name: str) -> Case:
    """One of ``NAMES`` with its data and reference."""
    model, arrange, parameters = _CASES[name]
    reference = json.loads((FOLDER / "summaries" / f"{name}.json").read_text())
    raw = json.loads((FOLDER / "data" / f"{reference['data']}.json").read_text())
    tensors = {
        key: torch.tensor(value, dtype=torch.float64)
        for key, value in raw.items()
        if isinstance(value, list)
    }
    mean, sd = np.array(reference["mean"]), np.array(reference["sd"])
    return Case(model, arrange(tensors), parameters, mean, sd)


def errors(draws: Mapping[str, Tensor], one: Case) -> tuple[float, float, float]:
    """Largest error of a mean in reference sds, smallest and largest ratio of sds."""
    flat = [v.reshape(len(v), -1) for v in one.parameters(draws)]
    found = torch.cat(flat, -1).double().numpy()
    ratio = found.std(0) / one.sd
    return float(np.abs((found.mean(0) - one.mean) / one.sd).max()), ratio.min(), ratio.max()
