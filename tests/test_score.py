"""Guides whose draws do not move with their parameters, against sums over all values."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch.distributions import constraints

import latentlab as ll
from latentlab.inference import score, training
from latentlab.inference.check import prepare
from latentlab.inference.pair import Arguments
from latentlab.inference.sandbox import manual_seed, sandbox
from tests import oracles

X = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
PRIOR = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
SHARE = torch.tensor(0.4, dtype=torch.float64)


def model(x, size=None):
    """A label of all rows, and a truth value of each."""
    k = pyro.sample("k", dist.Categorical(PRIOR))
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Bernoulli(SHARE))
        pyro.sample("x", dist.Normal(k + 1.5 * z, 1.0), obs=x)


def guide(x, size=None):
    logits = pyro.param("k_logits", torch.tensor([0.1, -0.2, 0.3]).double())
    slope = pyro.param("slope", torch.tensor(0.4).double())
    k = pyro.sample("k", dist.Categorical(logits=logits))
    with ll.rows(x, size):
        pyro.sample("z", dist.Bernoulli(logits=slope * x + 0.3 * k))


def exact_gradient(coupling=0.0):
    """Of the ELBO, as a sum over all labels and truth values."""
    logits = torch.tensor([0.1, -0.2, 0.3]).double().requires_grad_()
    slope = torch.tensor(0.4).double().requires_grad_()
    elbo = torch.zeros(())
    for k in range(3):
        q = dist.Bernoulli(logits=slope * X + 0.3 * k)
        for bits in itertools.product([0.0, 1.0], repeat=len(X)):
            z = torch.tensor(bits).double()
            log_q = logits.log_softmax(0)[k] + q.log_prob(z).sum()
            log_p = PRIOR[k].log() + dist.Bernoulli(SHARE).log_prob(z).sum()
            mean = k + 1.5 * z + coupling * z.flip(-1)
            log_p = log_p + dist.Normal(mean, 1.0).log_prob(X).sum()
            elbo = elbo + log_q.exp() * (log_p - log_q)
    return flat(torch.autograd.grad(elbo, [logits, slope])), elbo.detach()


def flat(parts):
    return torch.cat([part.flatten() for part in parts])


def gradients(pair, num_particles, num_repeats, data=None, seed=0):
    """Of the ELBO at so many steps, (R, parameters), and the ELBO at each."""
    found, elbos = [], []
    with pair.entered(0):
        parameters = [*pair.parameters().values()]
        for repeat in range(num_repeats):
            manual_seed(1000 * seed + repeat)
            batch = pair.data if data is None else data[repeat % len(data)]
            loss, elbo = training.objective(pair, num_particles, batch, 0)
            found.append(-flat(torch.autograd.grad(loss, parameters)))
            elbos.append(elbo)
    return torch.stack(found), torch.stack(elbos)


def off_by(found, exact):
    """The largest error of a mean, in standard errors."""
    se = found.std(0) / math.sqrt(len(found))
    return float(((found.mean(0) - exact).abs() / se).max())


@pytest.fixture(scope="module")
def pair():
    pair, report = prepare(model, X, guide)
    assert report.ok
    return pair


# ---- the gradient -----------------------------------------------------------------------------


@pytest.mark.parametrize(("num_particles", "num_repeats"), [(2, 200), (32, 60)])
def test_the_gradient_is_that_of_a_sum_over_all_values(pair, num_particles, num_repeats):
    exact, elbo = exact_gradient()
    found, elbos = gradients(pair, num_particles, num_repeats)
    assert pair.scored == {"k": (), "z": ("rows",)}
    assert off_by(found, exact) < 5
    assert off_by(elbos[:, None], elbo) < 5


def test_a_single_draw_is_compared_with_past_steps(pair):
    exact, _ = exact_gradient()
    for past in pair.baselines.values():
        past.zero_()
    found, _ = gradients(pair, 1, 300)
    assert off_by(found, exact) < 5
    seen = pair.baselines["k"][0] / pair.baselines["k"][1]
    assert abs(float(seen) - float(exact_gradient()[1])) < 5


@pytest.mark.parametrize(("num_particles", "most"), [(1, (0.6, 0.95)), (8, (0.5, 0.5))])
def test_the_baseline_takes_most_of_the_noise(pair, num_particles, most, monkeypatch):
    less, _ = gradients(pair, num_particles, 200)
    monkeypatch.setattr(score, "_baseline", lambda pair, site, cost: torch.zeros(()))
    more, _ = gradients(pair, num_particles, 200)
    ratio = less.var(0) / more.var(0)  # of the label's, then of the truth values
    assert ratio[:3].max() < most[0]
    assert ratio[3] < most[1]


def test_elements_of_a_plate_take_the_noise_of_their_own_only(pair, monkeypatch):
    apart, _ = gradients(pair, 8, 200)
    monkeypatch.setattr(pair, "scored", {"k": (), "z": ()})
    together, _ = gradients(pair, 8, 200)
    assert off_by(together, exact_gradient()[0]) < 5
    assert apart[:, -1].var() < 0.8 * together[:, -1].var()


def test_elements_that_look_at_each_other_are_not_taken_apart():
    def coupled(x, size=None):
        k = pyro.sample("k", dist.Categorical(PRIOR))
        with ll.rows(x, size):
            z = pyro.sample("z", dist.Bernoulli(SHARE))
            mean = k + 1.5 * z + 0.8 * z.flip(-1)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    pair, _ = prepare(coupled, X, guide)
    assert pair.scored == {"k": (), "z": ()}
    found, _ = gradients(pair, 32, 60)
    assert off_by(found, exact_gradient(coupling=0.8)[0]) < 5


def test_a_batch_stands_for_all_rows(pair):
    rows = [torch.tensor(pick) for pick in itertools.combinations(range(len(X)), 2)]
    batches = [Arguments((X[pick],), {"size": len(X)}, rows=pick) for pick in rows]
    found, elbos = gradients(pair, 32, 20 * len(rows), batches)
    exact, elbo = exact_gradient()
    assert off_by(found, exact) < 5
    assert off_by(elbos[:, None], elbo) < 5


def mixed_model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(SHARE))
        pyro.sample("x", dist.Normal(loc + 1.5 * z, 1.0), obs=x)


def mixed_guide(x):
    mean = pyro.param("mean", torch.tensor(0.3).double())
    logits = pyro.param("logits", torch.zeros(len(X)).double())
    loc = pyro.sample("loc", dist.Normal(mean, 0.5))
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=logits + loc))


def one_by_one(x):
    """As ``mixed_model``, but it takes one particle at a time."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    loc = loc if loc.dim() == 0 else loc.reshape(-1)[0]
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(SHARE))
        pyro.sample("x", dist.Normal(loc + 1.5 * z, 1.0), obs=x)


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceGraph_ELBO])
def test_the_gradient_is_that_of_pyro_on_average(kind):
    pair, _ = prepare(mixed_model, X, mixed_guide)
    found, _ = gradients(pair, 32, 60)
    elbo = kind(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    with sandbox({"params": {}, "constraints": {}}, seed=0, dtype=torch.float64):
        theirs = []
        for _ in range(60):
            pyro.get_param_store().clear()
            elbo.loss_and_grads(mixed_model, mixed_guide, X)
            parameters = [p for _, p in pyro.get_param_store().named_parameters()]
            theirs.append(-flat([p.grad for p in parameters]))
    theirs = torch.stack(theirs)
    se = (found.var(0) / len(found) + theirs.var(0) / len(theirs)).sqrt()
    assert float(((found.mean(0) - theirs.mean(0)).abs() / se).max()) < 5


def test_particles_one_by_one_have_the_same_gradient():
    pair, report = prepare(one_by_one, X, mixed_guide)
    assert not pair.vectorised
    assert pair.scored == {"z": ("rows",)}
    found, _ = gradients(pair, 4, 60)
    theirs, _ = gradients(prepare(mixed_model, X, mixed_guide)[0], 32, 60, seed=1)
    se = (found.var(0) / len(found) + theirs.var(0) / len(theirs)).sqrt()
    assert float(((found.mean(0) - theirs.mean(0)).abs() / se).max()) < 5


# ---- the fit ----------------------------------------------------------------------------------


def labels(x=None, size=None):
    """Each row of one of three kinds, whose densities are known."""
    with ll.rows(x, size):
        k = pyro.sample("k", dist.Categorical(PRIOR))
        pyro.sample("x", dist.Normal(1.5 * k, 1.0), obs=x)


def own_labels(x=None, size=None):
    logits = pyro.param("logits", torch.zeros(len(X), 3).double())
    with ll.rows(x, size):
        pyro.sample("k", dist.Categorical(logits=logits))


def conditional():
    joint = PRIOR.log() + dist.Normal(1.5 * torch.arange(3), 1.0).log_prob(X[:, None])
    return joint.softmax(-1), joint.logsumexp(-1).sum()


@pytest.fixture(scope="module")
def fitted():
    return ll.fit(labels, X, own_labels, max_steps=1500, progress=False)


def test_the_exact_posterior_is_found_and_every_weight_is_the_evidence(fitted):
    shares, evidence = conditional()
    log_weights = fitted.log_weights(500)
    assert abs(float(fitted.elbo.value) - float(evidence)) < 0.02
    assert float(log_weights.std()) < 0.2
    logits = fitted.params["logits"]
    assert float((logits.softmax(-1) - shares).abs().max()) < 0.03
    assert fitted.backend.startswith("eager: its guide draws 'k' without a reparam")
    assert any("less a baseline" in note for note in fitted.notes)


def test_draws_and_their_summary_say_how_often_each_kind_is(fitted):
    shares, _ = conditional()
    draws = fitted.sample(2000)["k"]
    assert draws.dtype == torch.long
    assert draws.shape == (2000, len(X))
    summary = fitted.summary(2000)
    assert summary["index"].tolist()[:3] == ["0 = 0", "0 = 1", "0 = 2"]
    often = summary["mean"].to_numpy().reshape(len(X), 3)
    np.testing.assert_allclose(often.sum(1), 1.0, atol=1e-9)
    np.testing.assert_allclose(often, shares, atol=0.06)


def test_what_comes_after_a_fit_knows_labels(fitted, tmp_path):
    verdict = fitted.check()
    assert "not use" not in verdict.level
    assert fitted.predict(5)["x"].shape == (5, len(X))
    assert math.isfinite(fitted.log_prob(X).value)
    assert fitted.to_arviz(10).posterior["k"].shape == (1, 10, len(X))
    again = ll.load(fitted.save(tmp_path), model=labels, guide=own_labels, data=X)
    assert torch.equal(again.sample(20)["k"], fitted.sample(20)["k"])
    assert torch.equal(again.log_weights(20), fitted.log_weights(20))
    assert again.summary(50).equals(fitted.summary(50))


class Rejecting(dist.Normal):
    """A normal distribution of which no gradient is known."""

    has_rsample = False


def test_a_continuous_site_without_a_gradient_meets_the_closed_form():
    def normal(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def rejecting(x):
        mean = pyro.param("mean", torch.zeros(()))
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("loc", Rejecting(mean, sd))

    posterior = ll.fit(normal, X, rejecting, max_steps=1500, progress=False)
    loc, sd, evidence = oracles.conjugate_normal(X.numpy(), 0.0, 2.0, 1.0)
    assert abs(float(posterior.params["mean"]) - loc) < 0.1 * sd
    assert abs(math.log(float(posterior.params["sd"]) / sd)) < 0.1
    assert abs(posterior.elbo.value - evidence) < 0.02
    assert posterior.pair.scored == {"loc": ()}


def test_same_seed_same_bytes_with_a_single_draw():
    def again():
        how = {"num_particles": 1, "max_steps": 200, "progress": False, "seed": 3}
        return ll.fit(labels, X, own_labels, **how)

    one, two = again(), again()
    assert torch.equal(one.losses, two.losses)
    assert torch.equal(one.params["logits"], two.params["logits"])


def test_other_bounds_are_refused():
    with pytest.raises(ValueError, match="objective: IWAE needs draws that move with the guide"):
        ll.fit(labels, X, own_labels, objective=ll.objectives.IWAE(4), progress=False)


def test_xla_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="its guide draws 'k' without a reparameterised"):
        ll.fit(labels, X, own_labels, backend="xla", progress=False)


def test_a_count_without_end_is_fitted_where_the_guide_draws_it():
    def counted(x):
        n = pyro.sample("n", dist.Poisson(3.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(n, 2.0), obs=x)

    def guide(x):
        rate = pyro.param("rate", torch.tensor(3.0), constraint=constraints.positive)
        pyro.sample("n", dist.Poisson(rate))

    posterior = ll.fit(counted, X, guide, max_steps=300, progress=False)
    row = posterior.summary(500).iloc[0]
    assert row["index"] == ""
    assert 0.0 < row["mean"] < 3.0
