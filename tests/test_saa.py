"""A fit with fixed draws: exact where it can be, and never silently wrong."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll
from latentlab.inference import saa
from latentlab.inference.check import prepare
from latentlab.inference.saa import SaaClimb

ZERO = torch.zeros((), dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0, 30.0]).double()
COVARIANCE = torch.tensor([[1.0, 0.9, 1.0], [0.9, 2.0, -1.0], [1.0, -1.0, 400.0]]).double()
QUICK = {"num_restarts": 1, "progress": False}


def seen(x, z):
    """A datum that says next to nothing."""
    pyro.sample("x", dist.Normal(1e-3 * z, 1.0), obs=x)


def normal(x):
    z = pyro.sample("z", dist.MultivariateNormal(MEAN, COVARIANCE))
    pyro.sample("x", dist.Normal(z.sum(-1), 10.0), obs=x)


def skewed(x):
    """A gamma and a normal whose spread depends on it."""
    a = pyro.sample("a", dist.Gamma(ZERO + 4.0, 1.0))
    b = pyro.sample("b", dist.Normal(ZERO, a.sqrt()))
    seen(x, b)


def funnel(x):
    """Neal's."""
    a = pyro.sample("a", dist.Normal(ZERO, 3.0))
    with pyro.plate("nine", 9):
        b = pyro.sample("b", dist.Normal(ZERO, (a / 2).exp()))
        seen(x.expand(9), b)


def two_modes(x):
    """As high, eight standard deviations apart."""
    z = pyro.sample("z", dist.Normal(ZERO, 10.0))
    pyro.factor("modes", torch.logaddexp(-((z - 4) ** 2) / 2, -((z + 4) ** 2) / 2))
    seen(x, z)


def rows_of(x, size=None):
    loc = pyro.sample("loc", dist.Normal(ZERO, 10.0))
    with ll.rows(x, size):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def learns(x):
    scale = pyro.param("scale", torch.ones((), dtype=torch.float64))
    loc = pyro.sample("loc", dist.Normal(ZERO, 10.0))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, scale.exp()), obs=x)


def of_rows(x):
    with ll.rows(x):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.fixture(scope="module")
def bent():
    return ll.fit(skewed, ZERO, "mean_field", tol=0.01, seed=3, **QUICK)


# ---- what it finds ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_of_a_normal_target_is_exact(seed):
    prior = torch.linalg.inv(COVARIANCE)
    precision = prior + 0.01
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (prior @ MEAN)
    for guide, sd in (
        ("mean_field", precision.diagonal().rsqrt()),
        ("full_rank", covariance.diagonal().sqrt()),
    ):
        posterior = ll.fit(normal, ZERO, guide, seed=seed, **QUICK)
        assert posterior.method == "saa"
        assert posterior.converged
        with posterior.pair.entered(seed=0):
            shift = (posterior.guide.free_mean().detach() - mean) / sd
            assert float(shift.abs().max()) < 1e-6
            assert float((posterior.guide.free_sd().detach() / sd - 1).abs().max()) < 1e-6


def test_the_sampling_error_is_the_spread_over_seeds(monkeypatch):
    """What is said of one fit is what many show."""
    said, found = [], []
    judge = SaaClimb._judge
    monkeypatch.setattr(saa, "_FEWEST", 16)

    def judged(climb, draws):
        said.append(judge(climb, draws))
        return said[-1]

    monkeypatch.setattr(SaaClimb, "_judge", judged)
    for seed in range(20):
        posterior = ll.fit(skewed, ZERO, "mean_field", tol=10.0, seed=seed, **QUICK)
        with posterior.pair.entered(seed=0):
            guide = posterior.guide
            found.append(torch.stack([guide.free_mean(), guide.free_sd().log()]).detach())
    means, log_sds = torch.stack(found).unbind(1)
    unit = log_sds.mean(0).exp()
    spread = ((means / unit).var(0) + 2 * log_sds.var(0)).mean().sqrt()
    error = np.mean([each.error**2 for each in said]) ** 0.5
    assert error == pytest.approx(float(spread), rel=0.4)


def test_draws_are_added_until_the_answer_is_as_exact_as_asked(bent):
    rough = ll.fit(skewed, ZERO, "mean_field", tol=0.1, seed=3, **QUICK)
    sizes = [int(p.stop_reason.split()[3]) for p in (rough, bent)]
    assert sizes[0] == 128
    assert sizes[1] > 128
    assert "sampling error 0.00" in bent.stop_reason
    assert len(bent.stage_starts) == len(bent.stage_elbos)
    assert len(bent.losses) < 300
    assert -float(bent.losses[-1]) == pytest.approx(bent.elbo.value, abs=0.05)


def test_stages_find_the_same(bent):
    stages = ll.fit(skewed, ZERO, "mean_field", method="stages", seed=3, **QUICK)
    assert stages.method == "stages"
    mine, theirs = (p.summary(20_000) for p in (bent, stages))
    assert (abs(mine["mean"] - theirs["mean"]) < 0.05 * theirs["sd"]).all()
    assert (abs(np.log(mine["sd"] / theirs["sd"])) < 0.05).all()


def test_same_seed_same_bytes_and_nothing_else_moves(bent):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    again = ll.fit(skewed, ZERO, "mean_field", tol=0.01, seed=3, **QUICK)
    other = ll.fit(skewed, ZERO, "mean_field", tol=0.01, seed=4, **QUICK)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    for name, value in bent.params.items():
        assert torch.equal(value, again.params[name])
    assert not torch.equal(bent.guide.offset, other.guide.offset)


# ---- when it is taken ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "guide", "settings", "says"),
    [
        (rows_of, "mean_field", {"batch_size": 10}, "not at mini-batches"),
        (learns, "mean_field", {}, "parameters of its own to learn"),
        (of_rows, "mean_field", {}, "300 latents are too many"),
        (rows_of, "mean_field", {"objective": ll.objectives.IWAE(8)}, "climbs the ELBO only"),
        (rows_of, "mean_field", {"backend": "xla"}, "torch alone"),
    ],
)
def test_what_it_does_not_suit_is_refused_where_asked_for(model, guide, settings, says):
    with pytest.raises(ValueError, match=f'method: "saa" does not suit this pair: .*{says}'):
        ll.fit(model, torch.zeros(300).double(), guide, method="saa", **settings, **QUICK)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (rows_of, {"batch_size": 10}),
        (learns, {}),
        (of_rows, {}),
        (rows_of, {"lr": 0.1}),
        (rows_of, {"num_particles": 4}),
        (rows_of, {"guide": "point"}),
        (rows_of, {"guide": "flow"}),
    ],
)
def test_stages_are_taken_where_it_does_not_suit(model, settings):
    x = torch.zeros(300).double()
    settings = {"guide": "mean_field", "max_steps": 400, **settings}
    assert ll.fit(model, x, **settings, **QUICK).method == "stages"


def test_it_is_for_gaussian_guides_of_ours():
    x = torch.zeros(300).double()
    with pytest.raises(ValueError, match="no mean-field or full-rank Gaussian"):
        ll.fit(rows_of, x, "point", method="saa", **QUICK)
    posterior = ll.fit(rows_of, x, "mean_field", method="saa", num_particles=7, **QUICK)
    assert "optimum of 8 fixed draws" in posterior.stop_reason


# ---- never silently wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3))]
)
@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
@pytest.mark.parametrize("model", [funnel, two_modes])
def test_a_funnel_and_two_modes_are_not_to_be_used(model, guide, seed):
    posterior = ll.fit(model, ZERO, guide, seed=seed, progress=False)
    assert posterior.check().level != "use", str(posterior.check())


def test_draws_that_are_never_enough_are_said_and_stages_go_on(monkeypatch):
    monkeypatch.setattr(saa, "_MOST", 128)
    posterior = ll.fit(skewed, ZERO, "mean_field", tol=0.005, max_steps=1500, **QUICK)
    assert posterior.method == "stages"
    assert "with 128 fixed draws, a sampling error of 0." in posterior.stop_reason
    assert "then" in posterior.stop_reason
    assert len(posterior.stage_starts) == len(posterior.stage_elbos) > 2
    assert not str(posterior.backend).startswith("eager: fixed draws")


def test_an_optimum_that_fresh_draws_do_not_have_is_no_answer(monkeypatch):
    """Few draws and many numbers: the fixed objective has no bound, and says so."""
    posterior = ll.fit(
        normal, ZERO, "full_rank", method="saa", num_particles=4, max_steps=4000, **QUICK
    )
    draws = [int(word) for word in posterior.stop_reason.split() if word.isdigit()]
    assert draws[0] > 4
    assert posterior.check().level == "use"


def test_an_elbo_that_is_not_finite_is_left_to_stages(monkeypatch):
    monkeypatch.setattr(saa, "_slope", lambda draws: (float("nan"), torch.zeros(0)))
    posterior = ll.fit(skewed, ZERO, "mean_field", max_steps=1500, **QUICK)
    assert posterior.method == "stages"
    assert len(posterior.losses) > 100


@pytest.mark.parametrize("first", [1, 20])
def test_where_memory_ends_stages_go_on(monkeypatch, first):
    slope, calls = saa._slope, []

    def short(draws):
        calls.append(draws)
        if len(calls) >= first:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return slope(draws)

    monkeypatch.setattr(saa, "_slope", short)
    posterior = ll.fit(skewed, ZERO, "mean_field", tol=0.001, max_steps=1500, **QUICK)
    assert posterior.method == "stages"
    assert any("memory ran out with" in note for note in posterior.notes)


def test_other_errors_are_raised_as_they_are(monkeypatch):
    def broken(draws):
        raise RuntimeError("a fault of the model")

    monkeypatch.setattr(saa, "_slope", broken)
    with pytest.raises(RuntimeError, match="a fault of the model"):
        ll.fit(skewed, ZERO, "mean_field", **QUICK)


def test_what_was_asked_for_is_not_passed_over():
    for model, guide in (
        (ll.GaussianMixture(1, 1, prior="flat"), "auto"),
        (ll.GaussianMixture(1, 1, prior="conjugate"), "auto"),
        (skewed, "flow"),
    ):
        data = torch.randn(30, 1).double() if guide == "auto" else ZERO
        with pytest.raises(ValueError, match="saa"):
            ll.fit(model, data, guide, method="saa", **QUICK)
    with pytest.raises(ValueError, match="it has no rate; leave lr out"):
        ll.fit(skewed, ZERO, "mean_field", method="saa", lr=0.1, **QUICK)


def test_evaluations_that_run_out_are_said():
    posterior = ll.fit(skewed, ZERO, "mean_field", max_steps=3, **QUICK)
    assert not posterior.converged
    assert posterior.stop_reason == "max_steps: 3 evaluations did not do"
    assert posterior.check().level != "use"


def test_an_interrupt_keeps_the_best(monkeypatch):
    slope, seen, at = saa._slope, [], 8

    def interrupted(draws):
        if len(seen) == at:
            raise KeyboardInterrupt
        value, gradient = slope(draws)
        value -= 1000 * (len(seen) == at - 1)  # the last one before is a bad one
        seen.append((value, draws.guide.loc.detach().clone()))
        return value, gradient

    monkeypatch.setattr(saa, "_slope", interrupted)
    posterior = ll.fit(skewed, ZERO, "mean_field", tol=0.001, **QUICK)
    assert posterior.stop_reason == "interrupted"
    assert not posterior.converged
    assert any(torch.equal(posterior.params["guide.loc"], loc) for _, loc in seen[:-1])
    assert not torch.equal(posterior.params["guide.loc"], seen[-1][1])


def test_the_state_of_a_climb_can_be_gone_back_to():
    pair, _ = prepare(skewed, ZERO, "mean_field")
    with pair.entered(seed=0):
        climb = SaaClimb(pair, 0, 0.03, 100, lambda *_: None, _engine(pair), lambda: None)
        before = climb.state()
        climb.warm_up(50, 0.1)
        after = climb.state()
        climb.restore(before)
        assert all(torch.equal(v, climb.state()[k]) for k, v in before.items())
        assert any(not torch.equal(v, after[k]) for k, v in before.items())


def _engine(pair):
    from latentlab.inference.steps import Engine

    return Engine(pair, "auto", 1, 100)
