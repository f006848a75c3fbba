"""``guide="auto"`` climbs as far as it is worth while, and says how it went."""

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll
from latentlab.guides import Flow, FullRank, LowRank, MeanField, Structured
from latentlab.inference import engine, ladder, stages
from latentlab.inference.ladder import Ladder

QUICK = {"num_restarts": 1, "max_steps": 1500, "progress": False}
SEEN = torch.tensor(0.5).double()
ZERO = torch.tensor(0.0).double()


def independent(x):
    a = pyro.sample("a", dist.Normal(ZERO + 1.0, 2.0))
    b = pyro.sample("b", dist.Normal(ZERO, 0.1))
    pyro.sample("x", dist.Normal(a, 1.0), obs=x)
    pyro.sample("y", dist.Normal(b, 1.0), obs=x)


def banana(x):
    a = pyro.sample("a", dist.Normal(ZERO, 1.0))
    b = pyro.sample("b", dist.Normal(a**2, 0.5))
    pyro.sample("x", dist.Normal(b, 3.0), obs=x)


def funnel(x):
    a = pyro.sample("a", dist.Normal(ZERO, 1.0))
    b = pyro.sample("b", dist.Normal(ZERO, a.exp()))
    pyro.sample("x", dist.Normal(b, 3.0), obs=x)


def heavy(x):
    """A tail that no Gaussian has; the parameter is one of the model's own."""
    loc = pyro.param("loc", lambda: torch.zeros((), dtype=torch.float64))
    z = pyro.sample("z", dist.StudentT(2.0, ZERO, 1.0))
    pyro.sample("x", dist.Normal(loc + 0.1 * z, 1.0), obs=x)


def regression(features, y):
    slopes = pyro.sample("slopes", dist.Normal(features.new_zeros(2), 5.0).to_event(1))
    with ll.rows(features):
        pyro.sample("y", dist.Normal((features * slopes).sum(-1), 0.7), obs=y)


def table():
    r = np.random.default_rng(0)
    features = r.normal(size=(40, 1)) + 0.3 * r.normal(size=(40, 2))
    return features, features @ [1.0, -0.2] + 0.7 * r.normal(size=40)


def log_evidence(scale):
    """Of a model of a, b given a, and x given b, by the sum over a grid."""
    a = torch.linspace(-7, 7, 1401).double()[:, None]
    b = torch.cat([-torch.logspace(4, -5, 3000), ZERO[None], torch.logspace(-5, 4, 3000)]).double()
    center, width = (a**2, ZERO + 0.5) if scale == "banana" else (ZERO, a.exp())
    log_joint = dist.Normal(ZERO, 1.0).log_prob(a) + dist.Normal(center, width).log_prob(b)
    log_joint = log_joint + dist.Normal(b, 3.0).log_prob(SEEN)
    inner = torch.trapezoid(log_joint.exp(), b, dim=-1)
    return float(torch.trapezoid(inner, a[:, 0]).log())


def names(posterior):
    return [rung.guide for rung in posterior.ladder]


def kept(posterior):
    """The rung that says it was kept; there is one."""
    (rung,) = (rung for rung in posterior.ladder if rung.why.startswith("kept"))
    return rung


# ---- how far it climbs --------------------------------------------------------------------------


def test_independent_latents_need_no_more_than_a_mean_field():
    posterior = ll.fit(independent, SEEN, **QUICK)
    assert names(posterior) == ["MeanField"]
    assert isinstance(posterior.guide, MeanField)
    assert posterior.converged


def test_correlated_latents_get_a_full_rank_that_reaches_the_evidence():
    features, y = table()
    data = {"features": torch.from_numpy(features), "y": torch.from_numpy(y)}
    posterior = ll.fit(regression, data, **QUICK)
    assert names(posterior) == ["MeanField", "FullRank"]
    assert isinstance(posterior.guide, FullRank)
    assert posterior.converged
    assert posterior.pair.vectorised
    *_, expected = oracles.linear_regression(features, y, 5.0, 0.7)
    assert posterior.elbo.value == pytest.approx(expected, abs=1e-6)
    lower, upper = posterior.ladder
    assert lower.elbo.value + 3 * lower.elbo.se < expected
    assert "went up" in lower.why
    assert upper.khat.value == -math.inf
    assert "weights exact" in str(upper)


@pytest.fixture(scope="module", params=["banana", pytest.param("funnel", marks=pytest.mark.slow)])
def bent(request):
    model = {"banana": banana, "funnel": funnel}[request.param]
    return request.param, model, ll.fit(model, SEEN, **QUICK)


def test_bent_latents_get_a_flow_that_comes_near_the_evidence(bent):
    name, _, posterior = bent
    assert isinstance(posterior.guide, Flow)
    rungs = {rung.guide: rung for rung in posterior.ladder}
    flow = rungs["Flow"]
    assert kept(posterior) is flow
    expected = log_evidence(name)
    for other in ("MeanField", "FullRank"):
        gain = flow.elbo.value - rungs[other].elbo.value
        assert gain > 3 * math.hypot(flow.elbo.se, rungs[other].elbo.se)
        assert rungs[other].elbo.value + 3 * rungs[other].elbo.se < expected
    assert flow.elbo.value - 5 * flow.elbo.se < expected + 1e-4
    assert expected - flow.elbo.value < 0.05


def test_every_stage_has_its_elbo_and_a_picture(bent):
    _, _, posterior = bent
    assert len(posterior.stage_starts) == len(posterior.stage_elbos)
    posterior.plot("losses")


def test_the_ladder_is_saved_with_the_posterior(bent, tmp_path):
    _, model, posterior = bent
    posterior.save(tmp_path / "run")
    again = ll.load(tmp_path / "run", model=model, data=SEEN)
    assert again.ladder == posterior.ladder
    assert isinstance(again.guide, Flow)
    assert torch.equal(again.log_weights(50, seed=1), posterior.log_weights(50, seed=1))


def test_the_ladder_is_part_of_the_evidence_of_the_verdict(bent):
    *_, posterior = bent
    verdict = posterior.check()
    for number, rung in enumerate(posterior.ladder, 1):
        assert verdict.evidence[f"rung {number}"] == str(rung)


def test_one_latent_with_a_heavy_tail_is_bent_by_a_spline(monkeypatch):
    """With one latent an affine flow would be a Gaussian again, and full rank is mean-field."""

    def model(x):
        z = pyro.sample("z", dist.StudentT(1.5, ZERO, 1.0))
        pyro.sample("x", dist.Normal(0.1 * z, 1.0), obs=x)

    monkeypatch.setattr(ladder, "_ASKS", 0.0)  # the tail is heavy, but k-hat is noisy
    posterior = ll.fit(model, SEEN, **QUICK | {"max_steps": 500})
    assert names(posterior) == ["MeanField", "Flow"]
    assert isinstance(posterior.guide, Flow)
    assert posterior.guide.settings["kind"] == "nsf"


def test_many_latents_get_a_few_directions():
    num = 210
    r = torch.Generator().manual_seed(0)
    factor = 0.3 * torch.randn(num, 1, generator=r, dtype=torch.float64)
    own = 0.5 + torch.rand(num, generator=r, dtype=torch.float64)

    def model(x):
        prior = dist.LowRankMultivariateNormal(torch.zeros(num).double(), factor, own)
        z = pyro.sample("z", prior)
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    posterior = ll.fit(model, SEEN, **QUICK)
    assert names(posterior) == ["MeanField", "LowRank"]
    assert isinstance(posterior.guide, LowRank)
    variance = float(factor[0, 0] ** 2 + own[0]) + 1.0
    expected = float(dist.Normal(ZERO, variance**0.5).log_prob(SEEN))
    assert posterior.elbo.value == pytest.approx(expected, abs=0.05 + 5 * posterior.elbo.se)


def hierarchy(x=None, size=None):
    """z_n ~ N(m, 1), x_n ~ N(z_n, 1.2): the rows' own numbers hang on the global one."""
    loc = pyro.sample("loc", dist.Normal(ZERO, 10.0))
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        return pyro.sample("x", dist.Normal(z, 1.2), obs=x)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(240, None), (120, 40)])
def test_latents_of_many_rows_get_a_structured_guide_that_follows_batches(num_rows, batch_size):
    r = torch.Generator().manual_seed(1)
    x = 2.0 + (1 + 1.2**2) ** 0.5 * torch.randn(num_rows, generator=r, dtype=torch.float64)
    posterior = ll.fit(hierarchy, x, batch_size=batch_size, **QUICK)
    assert names(posterior) == ["MeanField", "Structured"]
    assert isinstance(posterior.guide, Structured)
    loc, sd, expected = oracles.conjugate_normal(x, 0.0, 10.0, (1 + 1.2**2) ** 0.5)
    assert posterior.guide.free_mean()[0].item() == pytest.approx(loc, abs=0.05 * sd)
    assert posterior.guide.free_sd()[0].item() == pytest.approx(sd, rel=0.05)
    assert posterior.elbo.value == pytest.approx(expected, abs=0.1)


def test_a_model_with_a_guide_of_its_own_climbs_no_ladder():
    x = ll.data.simulate.eruptions(num_rows=60)
    model = ll.GaussianMixture(num_features=2, num_components=1)
    assert ll.fit(model, x, **QUICK | {"max_steps": 300}).ladder == ()


# ---- and down again -----------------------------------------------------------------------------


def climb_to(monkeypatch, guide):
    """From now on that guide is above the first, and is tried whatever k-hat says."""
    monkeypatch.setattr(engine, "ladder_for", lambda *_: Ladder((guide,)))
    monkeypatch.setattr(ladder, "_ASKS", -1e9)


def test_a_flow_that_gains_nothing_is_left(monkeypatch):
    """With one latent an affine flow is a Gaussian again, whatever the tails of the target."""
    plain = ll.fit(heavy, SEEN, "mean_field", **QUICK)
    climb_to(monkeypatch, Flow("iaf", hidden_dims=(8,)))
    posterior = ll.fit(heavy, SEEN, "mean_field", **QUICK)
    assert names(posterior) == ["MeanField", "Flow"]
    assert "went back down" in posterior.ladder[1].why
    assert kept(posterior).guide == "MeanField"
    # The fit went on as if nothing had been tried, the model's own parameter with it.
    assert torch.equal(posterior.params["loc"], plain.params["loc"])
    assert torch.equal(posterior.log_weights(50, seed=1), plain.log_weights(50, seed=1))
    assert posterior.stop_reason == plain.stop_reason
    assert posterior.elbo == plain.elbo


def test_a_rung_that_is_worse_is_left_with_the_models_own_parameters(monkeypatch):
    def model(features, y):
        log_scale = pyro.param("log_scale", lambda: torch.zeros((), dtype=torch.float64))
        slopes = pyro.sample("slopes", dist.Laplace(features.new_zeros(2), 5.0).to_event(1))
        with ll.rows(features):
            scale = log_scale.exp()
            pyro.sample("y", dist.Normal((features * slopes).sum(-1), scale), obs=y)

    features, y = map(torch.from_numpy, table())
    data = {"features": features, "y": y}
    plain = ll.fit(model, data, "full_rank", **QUICK)
    climb_to(monkeypatch, MeanField())
    posterior = ll.fit(model, data, "full_rank", **QUICK)
    assert names(posterior) == ["FullRank", "MeanField"]
    assert isinstance(posterior.guide, FullRank)
    assert torch.equal(posterior.params["log_scale"], plain.params["log_scale"])
    assert torch.equal(posterior.guide.covariance(), plain.guide.covariance())


def test_a_rung_that_diverges_is_left(monkeypatch):
    class Wild(FullRank):
        def _draw_free(self, num_particles):
            u, log_q = super()._draw_free(num_particles)
            return u * math.nan, log_q

    climb_to(monkeypatch, Wild())
    posterior = ll.fit(heavy, SEEN, "mean_field", **QUICK)
    assert kept(posterior).guide == "MeanField"
    assert torch.isfinite(posterior.log_weights(50)).all()


# ---- Ctrl-C -------------------------------------------------------------------------------------


def press_ctrl_c(monkeypatch, on, where):
    """Interrupt the climb of a guide of some class: past its 30th step, or when it is measured."""
    if where == "climb":
        note = stages.Climb._note

        def wrapped(self, elbos):
            if type(self.pair.guide) is on and self.num_steps >= 30:
                raise KeyboardInterrupt
            return note(self, elbos)

        monkeypatch.setattr(stages.Climb, "_note", wrapped)
        return
    measure, left = ladder._measure, [where]

    def interrupted(pair, *args):
        if type(pair.guide) is on:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return measure(pair, *args)

    monkeypatch.setattr(ladder, "_measure", interrupted)


@pytest.mark.parametrize(
    ("on", "where", "stands_on"),
    [
        (MeanField, "climb", MeanField),
        (MeanField, 0, MeanField),
        (MeanField, 1, MeanField),
        (FullRank, "climb", None),
        (FullRank, 0, MeanField),
        (Flow, "climb", None),
        pytest.param(Flow, 0, None, marks=pytest.mark.slow),
    ],
)
def test_interrupted_at_any_rung_there_is_a_posterior(monkeypatch, tmp_path, on, where, stands_on):
    press_ctrl_c(monkeypatch, on, where)
    posterior = ll.fit(banana, SEEN, method="stages", **QUICK | {"max_steps": 700})
    assert posterior.stop_reason == "interrupted"
    assert not posterior.converged
    assert stands_on is None or type(posterior.guide) is stands_on
    assert torch.isfinite(posterior.log_weights(100)).all()
    assert posterior.check().level != "use"
    posterior.save(tmp_path / "run")
    assert ll.load(tmp_path / "run", model=banana).ladder == posterior.ladder


@pytest.mark.slow
def test_interrupted_when_it_is_back_down_there_is_a_posterior(monkeypatch):
    climb_to(monkeypatch, Flow("iaf", hidden_dims=(8,)))
    note = stages.Climb._note

    def wrapped(self, elbos):
        if type(self.pair.guide) is MeanField and self.num_steps >= 450:
            raise KeyboardInterrupt
        return note(self, elbos)

    monkeypatch.setattr(stages.Climb, "_note", wrapped)
    posterior = ll.fit(heavy, SEEN, "mean_field", method="stages", **QUICK)
    assert posterior.stop_reason == "interrupted"
    assert isinstance(posterior.guide, MeanField)
    assert kept(posterior).why == "kept: interrupted"
