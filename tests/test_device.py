"""A fit runs where it is asked to, with all that it needs, and its steps wait for nothing."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample

import latentlab as ll
from latentlab.inference import steps
from latentlab.inference.batches import Batches
from latentlab.inference.check import prepare
from latentlab.inference.devices import as_device, moved
from latentlab.inference.modes import TrainingMode
from latentlab.inference.steps import Engine
from latentlab.inference.training import blind_step_of
from tests.pretend import THERE, elsewhere

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROW = X[:, 0]
PRIOR = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
UNITS = [torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)]


def normal(x=None, size=None):
    loc, scale = pyro.sample("loc", dist.Normal(0.0, 9.0)), pyro.sample("s", dist.HalfNormal(2.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc, scale), obs=x)


def normal_guide(x=None, size=None):
    loc = pyro.param("center", torch.tensor(0.0, dtype=torch.float64))
    scale = pyro.param("spread", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("loc", dist.Normal(loc, scale))
    pyro.sample("s", dist.LogNormal(torch.zeros(()), 0.3))


def with_constants(x=None, size=None):
    w = pyro.sample("w", PRIOR)
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal((w * UNITS[0]).sum(-1), 1.0), obs=x)


def local(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 9.0))
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        return pyro.sample("x", dist.Normal(z, 0.5), obs=x)


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.w = PyroSample(dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        self.unit = torch.ones(2, dtype=torch.float64)  # neither parameter nor buffer

    def forward(self, x=None, size=None):
        loc = ((x[:, :2] * self.unit) @ self.w[..., None])[..., 0]
        with ll.rows(x, size):
            return pyro.sample("y", dist.Normal(loc, 1.0), obs=x[:, 2])


def written_down(x=None, size=None):
    pyro.sample("loc", dist.Normal(x.mean(), 0.2))
    pyro.sample("s", dist.LogNormal(x.std().log(), 0.1))


def vae():
    return ll.VariationalAutoencoder(num_features=3, latent_dim=1, hidden_dims=(4,))


QUICK = {
    "mean_field": (lambda: normal, ROW, "mean_field", {}),
    "mini-batches": (lambda: normal, ROW, "full_rank", {"batch_size": 8}),
    "guide of one's own": (lambda: normal, ROW, normal_guide, {}),
    "constants": (lambda: with_constants, ROW, "point", {}),
    "rows": (lambda: local, ROW, "amortised", {"batch_size": 8}),
    "conjugate mixture": (
        lambda: ll.GaussianMixture(3, 2, covariance="full", prior="conjugate"),
        *(X, "auto", {"max_steps": 10}),
    ),
}
SLOW = {
    "rows kept aside": (lambda: normal, ROW, "low_rank", {"held_out": 0.2}),
    "autoguide": (lambda: normal, ROW, AutoNormal(normal), {}),
    "module": (Regression, X, "mean_field", {}),
    "bound": (lambda: normal, ROW, "mean_field", {"objective": ll.objectives.IWAE(num_samples=4)}),
    "rows, structured": (lambda: local, ROW, "structured", {"batch_size": 8}),
    "flow": (lambda: normal, ROW, "flow", {"max_steps": 700}),
    "vae": (vae, X, "auto", {"batch_size": 8}),
    "mixture": (lambda: ll.GaussianMixture(num_features=3, num_components=2), X, "auto", {}),
    "ppca": (lambda: ll.ProbabilisticPCA(num_features=3, latent_dim=1), X, "auto", {}),
    "chain": (
        lambda: ll.HiddenMarkovModel(num_states=2, num_features=1),
        ll.data.Sequences(X[:, 0].reshape(4, 10, 1), torch.tensor([10, 8, 10, 5])),
        *("auto", {}),
    ),
    "density": (lambda: ll.FlowDensity(num_features=3), X, "auto", {"batch_size": 8}),
}


def fitted(model, data, guide, **settings):
    settings = {"max_steps": 60, "num_restarts": 1, "progress": False, "device": THERE} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ll.fit(model, data, guide, **settings)


def uses(posterior, data, folder):
    """All that is asked of a posterior, from data that stay where they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior.summary(50)
        posterior.check(500)
        posterior.predict(3)
        posterior.log_prob(data, num_samples=20)
        posterior.to_arviz(10)
        posterior.save(folder)
        posterior.report(folder)


CASES = [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize("case", CASES)
def test_all_tensors_of_a_fit_follow(case, tmp_path):
    """One that is left on the CPU meets one that is elsewhere, which raises."""
    make, data, guide, settings = {**QUICK, **SLOW}[case]
    with elsewhere():
        posterior = fitted(make(), data, guide, **settings)
        held = {**posterior.params, **posterior.sample(2)}
        assert {value.device for value in held.values()} == {THERE}
        assert posterior.losses.device.type == "cpu"
        if case in SLOW or case == "mean_field":
            uses(posterior, data, tmp_path)
    if case == "mean_field":
        loaded = ll.load(tmp_path, model=normal)
        assert {value.device.type for value in loaded.params.values()} == {"cpu"}


def test_what_fit_was_given_stays_where_it_is():
    model = Regression()
    with elsewhere():
        fitted(model, X, "point")
        assert model.unit.device.type == X.device.type == "cpu"
        assert PRIOR.base_dist.loc.device.type == "cpu"
        assert torch.zeros(()).device == torch.get_default_device() == torch.device("cpu")


def asked(posterior):
    """What the verdict leaves open, from a posterior that is elsewhere."""
    assert math.isfinite(posterior.elbo_parts().elbo.value)
    assert posterior.sensitivity(200).names
    assert math.isfinite(posterior.loo(200).elpd.value)
    assert posterior.ppc(num_samples=20).names
    assert posterior.compare_draws({"loc": ROW}, 50).names == ("loc",)
    assert math.isfinite(posterior.sandwich(200).elbo.value)


def test_a_posterior_elsewhere_is_asked_like_others():
    with elsewhere():
        asked(fitted(normal, ROW, "mean_field"))


def responds(device):
    how = {"max_steps": 200, "device": device}
    found = ll.linear_response(fitted(normal, ROW, "mean_field", **how))
    assert found.sample(2)["loc"].device.type == device.type
    assert bool((found.summary(100)["sd"] > 0).all())


def test_means_respond_elsewhere():
    with elsewhere():
        responds(THERE)


def sampled(data):
    chains = ll.nuts(normal, data, num_samples=4, num_warmup=20, num_chains=2)
    assert chains.backend.startswith("pyro: it is on ")
    assert {value.device.type for value in chains.draws.values()} == {"cpu"}
    chains.summary()
    chains.check()
    chains.plot()
    with pytest.raises(ValueError, match='backend: "xla" cannot run this model: it is on '):
        ll.nuts(normal, data, backend="xla")


def test_a_sampler_follows_its_data_and_its_draws_come_back():
    with elsewhere():
        sampled(ROW.to(THERE))


def calibrated(data):
    found = ll.calibrate(
        normal, data, written_down, num_simulations=10, num_draws=9, progress=False
    )
    assert found.how.startswith("10 in turn: it is on ")
    found.plot()


def test_refits_follow_their_data():
    with elsewhere():
        calibrated(ROW.to(THERE))


def test_a_fit_follows_its_data():
    with elsewhere():
        posterior = fitted(normal, ROW.to(THERE), "mean_field", device=None)
        assert posterior.sample(2)["loc"].device == THERE


def test_the_device_does_not_change_the_answer():
    """Here both draw the same noise."""
    how = {"max_steps": 100, "method": "stages"}
    here = fitted(normal, ROW, "mean_field", device="cpu", backend="eager", **how)
    with elsewhere():
        there = fitted(normal, ROW, "mean_field", **how)
    torch.testing.assert_close(there.losses, here.losses, rtol=1e-9, atol=1e-9)


def stepper_of(pair, batch_size=None):
    optimiser = torch.optim.Adam([*pair.parameters().values()], lr=0.01, fused=True)
    engine = Engine(pair, "auto", 4, 20_000)
    batch = Batches(pair.data, batch_size, 0)
    return engine.stepper(optimiser, batch, 0, TrainingMode(pair), 2, 0), engine


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("guide", ["full_rank", normal_guide])
def test_no_step_waits(guide, batch_size):
    """A hundred steps are looked at once; the rows of an epoch are sent once."""
    with elsewhere() as waits:
        pair, report = prepare(normal, ROW, guide, device=THERE)
        assert report.ok, report
        with pair.entered(seed=0):
            stepper, engine = stepper_of(pair, batch_size)
            waits.clear()
            elbos, path = stepper.take(0, [0.01] * stepper.size, 0)
        assert len(elbos) == stepper.size == 100
        assert len(path) == 50
        epochs = 0 if batch_size is None else 20
        assert waits["read"] == 1
        assert waits["sent"] == epochs
        assert sum(waits.values()) == 1 + epochs
    assert "where the pair itself takes the steps" in engine.why


def test_a_step_that_leads_nowhere_is_told_of_later():
    """The loss is finite, and its slope is not: what was learned is lost, and said to be."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("f", (loc - loc.detach()).abs().sqrt().sum())
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with elsewhere():
        pair, _ = prepare(model, ROW[0], "mean_field", device=THERE)
        with pair.entered(seed=0):
            optimiser = torch.optim.Adam([*pair.parameters().values()], lr=0.01, fused=True)
            elbo = blind_step_of(pair, 4, pair.data, 0, optimiser)
            assert elbo.isnan()


@pytest.mark.parametrize(
    ("make", "data"),
    [(lambda: normal, ROW), pytest.param(vae, X, marks=pytest.mark.slow)],
)
def test_a_fit_goes_back_to_where_it_was_sound(make, data, monkeypatch):
    failed = []

    def fails_once(pair, num_particles, batch, step, optimiser):
        elbo = blind_step_of(pair, num_particles, batch, step, optimiser)
        if step == 130 and not failed:
            failed.append(step)
            for parameter in pair.parameters().values():
                parameter.data.fill_(torch.nan)
            return elbo * torch.nan
        return elbo

    monkeypatch.setattr(steps, "blind_step_of", fails_once)
    with elsewhere():
        posterior = fitted(make(), data, "mean_field" if data is ROW else "auto", max_steps=220)
        assert failed == [130]
        assert len(posterior.losses) == 220
        assert posterior.losses.isfinite().all()
        assert all(value.isfinite().all() for value in posterior.params.values())


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "nowhere", 3, 1.5, THERE, ()])
def test_a_device_that_is_not_here_is_refused(device):
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("it is here")
    with pytest.raises(ValueError, match=r"^device: expected one that is here \('cpu'.*, got "):
        ll.fit(normal, ROW, device=device)


def test_a_device_has_one_name():
    assert as_device("cpu") == as_device(torch.device("cpu")) == torch.device("cpu")
    assert as_device(None) is None


def test_what_holds_tensors_is_moved_and_all_else_is_left():
    with elsewhere():
        transformed = dist.TransformedDistribution(
            dist.Normal(torch.zeros(2), 1.0), [dist.transforms.AffineTransform(torch.ones(2), 1.0)]
        )
        value = {"a": [torch.zeros(2), "text"], "b": (transformed,), "c": dist.Normal}
        found = moved(value, THERE)
        assert found["a"][0].device == found["b"][0].base_dist.loc.device == THERE
        assert found["b"][0].transforms[0].loc.device == THERE
        assert found["c"] is dist.Normal
        assert transformed.base_dist.loc.device.type == value["a"][0].device.type == "cpu"
        assert moved(found, THERE) is found


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*QUICK, *SLOW])
def test_a_fit_on_a_gpu(case, tmp_path):
    make, data, guide, settings = {**QUICK, **SLOW}[case]
    state = torch.cuda.get_rng_state()
    posterior = fitted(make(), data, guide, **{**settings, "device": "cuda"})
    held = {**posterior.params, **posterior.sample(2)}
    assert {value.device.type for value in held.values()} == {"cuda"}
    uses(posterior, data, tmp_path)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.gpu
def test_all_else_on_a_gpu():
    there = torch.device("cuda")
    asked(fitted(normal, ROW, "mean_field", device="cuda"))
    responds(there)
    calibrated(ROW.to(there))
    sampled(ROW.to(there))


@pytest.mark.gpu
def test_no_step_waits_for_a_gpu():
    pair, _ = prepare(normal, ROW, "mean_field", device=torch.device("cuda:0"))
    with pair.entered(seed=0):
        stepper, _ = stepper_of(pair)
        stepper.take(0, [0.01] * stepper.size, 0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="sync"):  # the one look, at the end of all
                stepper.take(100, [0.01] * stepper.size, 0)
            for step in range(3):
                stepper._step(blind_step_of, step, 0.01, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
