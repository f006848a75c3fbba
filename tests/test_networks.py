"""Pairs with networks: how they climb and stop, and how many rows are judged."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import latentlab as ll
from latentlab.inference import check, objectives
from latentlab.inference.batches import BatchRows, chosen, follows_rows, take
from latentlab.inference.check import prepare
from latentlab.inference.evaluation import evaluate
from latentlab.inference.judge import Mean
from latentlab.inference.networks import has_networks, is_judged_by_row
from latentlab.inference.rows import elbo_of_rows, fewer, over_rows
from latentlab.inference.stages import FitDivergedError

D, L = 4, 1


class LinearVAE(nn.Module):
    """A linear encoder and decoder; its optimum is that of probabilistic PCA."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Linear(D, L, dtype=torch.float64)
            self.decoder = nn.Linear(L, D, dtype=torch.float64)
        self.log_sd = nn.Parameter(torch.zeros(L, dtype=torch.float64))
        self.log_noise = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def model(self, x=None, size=None):
        pyro.module("linear", self)
        with ll.rows(x, size):
            z = pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))
            noise = self.log_noise.exp()
            return pyro.sample("x", dist.Normal(self.decoder(z), noise).to_event(1), obs=x)

    def guide(self, x=None, size=None):
        pyro.module("linear", self)
        with ll.rows(x, size):
            sd = self.log_sd.exp()
            return pyro.sample("z", dist.Normal(self.encoder(x), sd).to_event(1))


def data(num=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    load = torch.tensor([[1.0, -0.5, 2.0, 0.3]], dtype=torch.float64)
    z = torch.randn(num, L, generator=generator, dtype=torch.float64)
    noise = torch.randn(num, D, generator=generator, dtype=torch.float64)
    return z @ load + 0.5 * noise


@given(st.integers(1, 40), st.integers(0, 99))
def test_the_average_counts_the_step_t_as_the_product_of_t_and_the_two_after_it(num_steps, seed):
    taken = torch.randn(num_steps, 2, dtype=torch.float64, generator=torch.manual_seed(seed))
    t = torch.arange(1.0, num_steps + 1, dtype=torch.float64)[:, None]
    shares = t * (t + 1) * (t + 2)
    mean = Mean()
    for weights in taken:
        mean.add([weights])
    expected = (shares * taken).sum(0) / shares.sum()
    torch.testing.assert_close(mean.state({"w": weights})["w"], expected)


def ppca(x):
    """Largest log-likelihood of probabilistic PCA with one factor, and its KL for each row."""
    size = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    noise = size[L:].mean()
    total = D * math.log(2 * math.pi) + size[:L].log().sum() + (D - L) * noise.log() + D
    return float(-len(x) / 2 * total), float(0.5 * (size[0] / noise).log())


@pytest.fixture(scope="module")
def fitted():
    vae = LinearVAE()
    return ll.fit(vae.model, data(), vae.guide, batch_size=100, lr=0.01, progress=False)


# ---- the climb ---------------------------------------------------------------------------------


def test_a_linear_vae_reaches_the_optimum_of_ppca(fitted):
    best, kl = ppca(data())
    assert fitted.converged
    assert "gained nothing more at three rates" in fitted.stop_reason
    assert fitted.elbo.value <= best + 4 * fitted.elbo.se
    assert fitted.elbo.value == pytest.approx(best, abs=0.02 * len(data()) + 4 * fitted.elbo.se)
    verdict = fitted.check()
    assert verdict.level == "use", verdict
    assert "each datum's latents" in verdict.reasons[0]
    measured = fitted._evidence().kl["z"]
    assert measured.value / len(data()) == pytest.approx(kl, abs=0.1)


def test_a_climb_that_ran_out_of_steps_says_so():
    vae = LinearVAE()
    posterior = ll.fit(vae.model, data(), vae.guide, batch_size=100, max_steps=250, progress=False)
    assert not posterior.converged
    assert posterior.stop_reason == "max_steps: 250 steps, still rising"
    assert len(posterior.losses) == 250
    assert len(posterior.stage_elbos) == len(posterior.stage_starts)
    assert posterior.check().level == "use with care"


class Warm(LinearVAE):
    """The linear VAE, its KL warmed up."""

    free_bits = 0.0

    def __init__(self, beta=1.0, warm_up=600):
        super().__init__()
        self.beta, self.warm_up = beta, warm_up

    def kl_weight(self, step):
        return self.beta * min(1.0, step / self.warm_up)


def test_a_warm_up_ends_at_the_same_optimum(fitted):
    vae = Warm()
    how = {"batch_size": 100, "lr": 0.01, "progress": False}
    posterior = ll.fit(vae.model, data(), vae.guide, **how)
    assert posterior.converged
    assert len(posterior.losses) > 600  # none is taken for converged while it warms up
    assert posterior.elbo.value == pytest.approx(fitted.elbo.value, abs=0.02 * len(data()))


@pytest.mark.slow
def test_a_climb_goes_on_while_the_weight_still_moves():
    vae = Warm(warm_up=2_500)
    how = {"batch_size": 100, "lr": 0.01, "max_steps": 2_600, "progress": False}
    posterior = ll.fit(vae.model, data(), vae.guide, **how)
    assert len(posterior.losses) >= 2_500


@pytest.mark.slow
def test_a_larger_weight_spends_less_on_the_latents(fitted):
    vae = Warm(beta=3.0, warm_up=300)
    how = {"batch_size": 100, "lr": 0.01, "progress": False}
    posterior = ll.fit(vae.model, data(), vae.guide, **how)
    spent, plain = (p._evidence().kl["z"].value for p in (posterior, fitted))
    assert posterior.converged
    assert 0.1 * plain < spent < 0.9 * plain
    assert posterior.elbo.value < fitted.elbo.value


def test_the_same_seed_gives_the_same_bytes():
    vae = LinearVAE()
    how = {"batch_size": 100, "max_steps": 220, "progress": False}
    first, again = (ll.fit(vae.model, data(), vae.guide, seed=3, **how) for _ in range(2))
    other = ll.fit(vae.model, data(), vae.guide, seed=4, **how)
    assert torch.equal(first.losses, again.losses)
    for name, value in first.params.items():
        assert torch.equal(value, again.params[name])
    assert not torch.equal(first.losses, other.losses)


def test_networks_are_matrices_of_registered_modules():
    vae = LinearVAE()
    assert has_networks(prepare(vae.model, data(20), vae.guide)[0])
    assert not has_networks(prepare(ll.GaussianMixture(4, 2), data(20))[0])


@pytest.mark.parametrize("lr", [None, 0.002])
def test_weights_move_slowly_unless_told(lr):
    vae = LinearVAE()
    how = {"batch_size": 100, "max_steps": 30, "progress": False}
    default = ll.fit(vae.model, data(), vae.guide, **how)
    told = ll.fit(vae.model, data(), vae.guide, lr=lr, **how)
    fast = ll.fit(vae.model, data(), vae.guide, lr=0.05, **how)
    assert torch.equal(default.losses, told.losses)
    assert not torch.equal(default.losses, fast.losses)


def test_a_loss_that_stays_bad_is_told_with_its_site():
    class Broken(LinearVAE):
        def model(self, x=None, size=None):
            pyro.module("linear", self)
            with ll.rows(x, size):
                z = pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))
                wide = torch.where(self.log_noise < -0.01, torch.nan, 1.0)
                pyro.sample("x", dist.Normal(self.decoder(z), wide).to_event(1), obs=x)
                pyro.factor("shrink", -1e3 * self.log_noise)

    vae = Broken()
    with pytest.raises(FitDivergedError, match="'x'"):
        ll.fit(vae.model, data(50), vae.guide, lr=0.05, max_steps=400, progress=False)


def test_a_matrix_that_cannot_be_factorised_is_tried_again():
    calls = []

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        calls.append(None)
        if torch.is_grad_enabled() and len(calls) % 50 == 0:
            torch.linalg.cholesky(torch.zeros(2, 2) - torch.eye(2))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    posterior = ll.fit(
        model, data(30)[:, :2], guide="mean_field", num_restarts=1, max_steps=700, progress=False
    )
    assert posterior.losses.isfinite().all()


# ---- batches -----------------------------------------------------------------------------------


@given(total=st.integers(2, 60), size=st.integers(1, 20), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_each_row_comes_once_in_an_epoch(total, size, seed):
    size = min(size, total)
    rows = BatchRows(total, size, seed)
    epoch = torch.cat([rows(step) for step in range(total // size)])
    assert len(epoch.unique()) == len(epoch) == total // size * size
    assert int(epoch.min()) >= 0
    assert int(epoch.max()) < total


def test_each_epoch_has_an_order_of_its_own():
    rows = BatchRows(20, 10, 0)
    first, second = (torch.cat([rows(2 * k), rows(2 * k + 1)]) for k in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


@given(steps=st.lists(st.integers(0, 40), min_size=1, max_size=10), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_the_rows_of_a_step_depend_on_seed_and_step_alone(steps, seed):
    rows = BatchRows(23, 5, seed)
    for step in steps:
        assert torch.equal(rows(step), BatchRows(23, 5, seed)(step))


# ---- many rows ---------------------------------------------------------------------------------


def test_some_rows_stand_for_all_within_the_error(fitted):
    x = data(4_000, seed=5)
    vae = fitted.model.__self__
    pair, _ = prepare(vae.model, x, vae.guide)
    with pair.entered(0), torch.no_grad():
        exact = evaluate(pair, objectives.draw(pair, 200))
        apart = []
        for seed in range(20):
            some = fewer(pair, 400, seed)
            found = elbo_of_rows(some, len(x), 10)
            apart.append((found.value - exact.value) / found.se)
    spread = float(torch.tensor(apart).square().mean())
    assert 0.3 < spread < 2.5  # chi-squared with 20 degrees, over 20: within four of its sd


def test_all_rows_leave_the_noise_of_the_draws_only():
    generator = torch.Generator().manual_seed(0)
    rows = 5 * torch.randn(50, generator=generator, dtype=torch.float64)
    found = over_rows(rows.expand(4, 50), 50)
    assert found.value == pytest.approx(float(rows.sum()))
    assert found.se == pytest.approx(0.0, abs=1e-9)
    half = over_rows(rows[:25].expand(4, 25), 50)
    assert half.se == pytest.approx(50 * float(rows[:25].std()) * math.sqrt(0.5 / 25), rel=1e-6)


def test_a_look_at_some_rows_finds_the_sites_of_all(monkeypatch):
    vae, x = LinearVAE(), data(1_200)
    few, report = prepare(vae.model, x, vae.guide)
    monkeypatch.setattr(check, "_LARGE", 10_000)
    every, other = prepare(vae.model, x, vae.guide)
    assert [z.spec() for z in few.latents] == [z.spec() for z in every.latents]
    assert few.plates == every.plates
    assert few.shapes == every.shapes
    assert (few.nesting, few.vectorised, few.points) == (every.nesting, True, every.points)
    assert report == other
    assert torch.equal(few.data.args[0], x)
    assert is_judged_by_row(few)


def test_a_bad_value_among_many_rows_is_named():
    class Coins(LinearVAE):
        def model(self, x=None, size=None):
            pyro.module("linear", self)
            with ll.rows(x, size):
                z = pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))
                logits = self.decoder(z)
                return pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    vae, x = Coins(), (data(3_000) > 0).double()
    x[2_500, 1] = 2.0
    with pytest.raises(ValueError, match=r"observed at \[2500, 1\]|observed at \[2500\]"):
        ll.fit(vae.model, x, vae.guide, batch_size=100, progress=False)


def test_a_guide_with_numbers_for_each_row_does_not_follow_other_rows():
    x = data(1_200)

    def model(x=None, size=None):
        with ll.rows(x, size):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            return pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    def guide(x=None, size=None):
        loc = pyro.param("loc", torch.zeros(1_200))
        with ll.rows(x, size):
            return pyro.sample("z", dist.Normal(loc, 0.5))

    ours, _ = prepare(model, x, "mean_field")
    assert not follows_rows(ours)
    pair, report = prepare(model, x, guide)
    assert report.ok
    assert pair.shapes["z"] == (1_200,)


def test_large_data_are_fitted_and_judged_by_some_rows(fitted):
    vae = LinearVAE()
    x = data(3_000)
    posterior = ll.fit(
        vae.model, x, vae.guide, batch_size=100, lr=0.01, max_steps=2_000, progress=False
    )
    best, _ = ppca(x)
    assert posterior.elbo.value == pytest.approx(best, abs=0.1 * len(x))
    blocks = posterior._evidence().blocks
    assert [len(block.result.khat) for block in blocks] == [1_000]
    assert posterior.pair.shapes["z"] == (3_000, 1)
    assert posterior.sample(2)["z"].shape == (2, 3_000, 1)


def test_the_khat_of_a_row_is_that_of_normal_weights(fitted):
    narrow = copy.deepcopy(fitted)
    vae = narrow.model.__self__
    with torch.no_grad():  # exactly as wide as the posterior of a row, then 0.4 times that
        load, noise = vae.decoder.weight[:, 0], vae.log_noise.exp()
        exact = (1 + (load / noise).square().sum()).rsqrt()
        vae.log_sd.copy_((0.4 * exact).log())
        vae.encoder.weight.copy_((exact**2 * load / noise**2)[None])
        vae.encoder.bias.copy_(-(exact**2) * (load * vae.decoder.bias).sum()[None] / noise**2)
    khat = narrow._evidence(4_000).blocks[0].result.khat
    assert float(khat.mean()) == pytest.approx(1 - 0.4**2, abs=0.1)
    assert narrow.check().level == "do not use"


def test_rows_are_chosen_by_a_seed():
    assert torch.equal(chosen(5, 100, 1), chosen(5, 100, 1))
    assert not torch.equal(chosen(5, 100, 1), chosen(5, 100, 2))
    assert chosen(200, 100, 1).tolist() == list(range(100))
    assert len(chosen(50, 100, 1).unique()) == 50
    pair, _ = prepare(ll.GaussianMixture(4, 2), data(20))
    assert take(pair.data, torch.tensor([3, 1])).args[0].shape == (2, 4)


def test_tampering_with_a_large_fit_is_seen(fitted):
    changed = copy.deepcopy(fitted)
    with torch.no_grad():
        changed.model.__self__.decoder.weight.mul_(3.0)
    assert changed.check().level == "do not use"


def test_the_best_start_is_gone_back_to_with_the_frame_of_its_guide():
    """Beside a network a guide of ours has a frame, which every start puts elsewhere."""
    x = torch.linspace(-2, 2, 40)[:, None]
    y = x.square().squeeze(-1) + 0.1 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def model(x, y=None):
        pyro.module("network", network)
        offset = pyro.sample("offset", dist.Normal(0.0, 50.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(network(x).squeeze(-1) + offset, scale), obs=y)

    how = {"num_restarts": 3, "max_steps": 400, "backend": "eager", "progress": False}
    posterior = ll.fit(model, (x, y), "mean_field", **how)
    best = max(posterior.restarts.elbos, key=lambda e: e.value)
    worst = min(posterior.restarts.elbos, key=lambda e: e.value)
    assert worst.value < best.value - 100  # starts differ
    assert posterior.elbo.value > best.value - 6 * (best.se + posterior.elbo.se)
