"""What one of two processes does for tests/test_ranks.py: ``python two_processes.py FOLDER``."""

import sys
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import distributed

import latentlab as ll
from latentlab.inference.check import prepare
from latentlab.inference.evaluation import evaluate
from latentlab.inference.ranks import joined
from latentlab.inference.shards import Shard, share_out
from latentlab.inference.training import blind_step_of

X = torch.randn(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model(x=None, size=None):
    loc, scale = pyro.sample("loc", dist.Normal(0.0, 9.0)), pyro.sample("s", dist.HalfNormal(2.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc, scale), obs=x)


def counted(x=None, size=None):
    k = pyro.sample("k", dist.Poisson(3.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def guessed(x=None, size=None):
    """A guide without a reparameterised gradient, whose baselines are of a rank's own rows."""
    rate = pyro.param("rate", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("k", dist.Poisson(rate))


def slopes_of(pair, data):
    """The ELBO and the gradient of one step from where the pair is, and whether it is sound."""
    optimiser = torch.optim.SGD([*pair.parameters().values()], lr=0.0)
    pyro.set_rng_seed(3)
    elbo = blind_step_of(pair, 4, data, 0, optimiser)
    return torch.cat([elbo[None], *(p.grad.flatten() for p in pair.parameters().values())])


def shared_steps(ranks):
    """What a step, a step that fails on one process, and an evaluation come to."""
    pair, _ = prepare(model, X, "full_rank")
    share_out(pair, ranks, None)
    with pair.entered(seed=0):
        found = {"step": slopes_of(pair, Shard(pair, None, 0)(0))}
        pyro.set_rng_seed(4)
        found["elbo"] = torch.tensor(evaluate(pair, pair.guide.draw(64)).value)
        pair.guide.loc.data += ranks.rank
        ranks.align({"loc": pair.guide.loc.data})
        found["aligned"], found["differed"] = (
            pair.guide.loc.data.clone(),
            torch.tensor(ranks.differed),
        )
        ranks.differed = False
        means = {
            name: torch.tensor(float(ranks.rank))
            for name in ("buffer.0.running_mean", "baseline.z")
        }
        ranks.align(means)
        found["differed for means"] = torch.tensor(ranks.differed)
        bad = X.clone()
        bad[70] = torch.nan  # a row of the second process
        lost = replace(pair, data=pair.data.map(lambda x: bad))
        found["failed"] = slopes_of(lost, Shard(lost, None, 0)(0))[0]
        return found | {"means": torch.stack([*means.values()])}


def refusal(folder):
    """What a fit says that is to keep what it did."""
    try:
        ll.fit(model, X, checkpoint=folder)
    except ValueError as error:
        return str(error)


def main(folder):
    with joined(None) as ranks:
        found = shared_steps(ranks)
        rank = ranks.rank
        how = {"max_steps": 500, "num_restarts": 1, "guide": "mean_field"}
        found["refusal"] = refusal(folder / "kept")
        posterior = ll.fit(model, X, **how)
        assert distributed.is_initialized()  # the group was there, and stays
    assert not distributed.is_initialized()
    batches = ll.fit(model, X, batch_size=20, **how | {"max_steps": 300})
    assert not distributed.is_initialized()
    few = {"num_particles": 1, "max_steps": 40, "method": "stages"}
    scored = ll.fit(counted, X + 2, guessed, progress=False, **few)
    found |= {"scored": scored.params["rate"], "scored.notes": " ".join(scored.notes)}
    for name, fitted in (("fit", posterior), ("batches", batches)):
        params = torch.cat([p.flatten() for p in fitted.params.values()])
        sites = fitted.sample(1000)
        moments = [f(sites[z]) for z in ("loc", "s") for f in (torch.mean, torch.std)]
        found |= {
            name: params,
            f"{name}.moments": torch.stack(moments),
            f"{name}.losses": fitted.losses,
        }
    mixture = ll.GaussianMixture(1, 2, prior="flat")
    natural = ll.fit(mixture, torch.stack([X, X + 4]).reshape(-1, 1), max_steps=400)
    found["natural"] = torch.cat([p.flatten() for p in natural.params.values()])
    found["natural.elbo"] = torch.tensor(natural.elbo.value)
    posterior.save(folder / f"of_{rank}")
    found["rows"] = torch.tensor(len(posterior.pair.data.tensors()[0]))
    torch.save(found | {"backend": posterior.backend}, folder / f"found_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
