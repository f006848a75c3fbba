"""A variational autoencoder at a known optimum gives the known figures, and finds it."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logsumexp
from torch import nn
from torch.nn.functional import softplus

import latentlab as ll
from latentlab import protocols
from latentlab.distributions import Categorical, Columns, Gaussian, Likelihood
from latentlab.inference import objectives
from latentlab.inference.check import prepare
from latentlab.models.vae_parts import Encoding, FlowPosterior, read
from latentlab.nn import ConvDecoder, ConvEncoder

SEEDS = st.integers(0, 2**32 - 1)
NAN = float("nan")
MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist" / "mnist20k.npz"


def fit(model, x, *guide, max_steps=400, **settings):
    return ll.fit(model, x, *guide, max_steps=max_steps, progress=False, **settings)


def inverse_softplus(y):
    return torch.log(torch.expm1(y))


# ---- probabilistic PCA: what a linear one is at its optimum -------------------------------------


def rows_of(eigenvalues, num_rows=200, seed=0):
    """Rows whose covariance has just these eigenvalues, and mean (1, 2, ...)."""
    rng = np.random.default_rng(seed)
    D = len(eigenvalues)
    y = rng.normal(size=(num_rows, D))
    y = np.linalg.qr(y - y.mean(0))[0] * math.sqrt(num_rows)
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0]
    return torch.from_numpy(y * np.sqrt(eigenvalues) @ turn.T + np.arange(1, D + 1))


def optimum(x, latent_dim):
    """Loadings, noise variance and eigenvalues of probabilistic PCA by maximum likelihood."""
    eigenvalues, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    eigenvalues, vectors = eigenvalues[::-1], vectors[:, ::-1]
    noise = eigenvalues[latent_dim:].mean()
    loading = vectors[:, :latent_dim] * np.sqrt(np.maximum(eigenvalues[:latent_dim] - noise, 0))
    return loading, noise, eigenvalues


def linear_vae(x, latent_dim, **settings):
    likelihood = Gaussian(units="table")
    settings = {"hidden_dims": (), "num_features": x.shape[1], **settings}
    return ll.VariationalAutoencoder(
        likelihood=likelihood, latent_dim=latent_dim, **settings
    ).double()


def at_optimum(x, latent_dim):
    """The linear autoencoder with the optimal decoder and its exact posterior for an encoder."""
    vae = linear_vae(x, latent_dim).scale_to(x)
    loading, noise, _ = optimum(x, latent_dim)
    unit = vae.likelihood.unit[0].item()
    loading, noise = loading / unit, noise / unit**2
    precision = 1 + (loading**2).sum(0) / noise  # diagonal: the loadings are orthogonal
    (encoder,), (decoder,) = vae.encoder, vae.decoder
    with torch.no_grad():
        encoder.weight.zero_()
        encoder.weight[:latent_dim] = torch.from_numpy((loading / noise / precision).T)
        encoder.bias.zero_()
        encoder.bias[latent_dim:] = inverse_softplus(torch.from_numpy(precision**-0.5) - 1e-6)
        decoder.weight.copy_(torch.from_numpy(loading.copy()))
        decoder.bias.zero_()
        vae.likelihood.raw_scale.fill_(0.5 * math.log(noise - 1e-6))
    return vae


EIGENVALUES = st.lists(st.floats(0.2, 9.0), min_size=3, max_size=5)


@given(SEEDS, EIGENVALUES, st.integers(1, 2))
def test_under_the_exact_posterior_every_weight_is_the_evidence(seed, eigenvalues, latent_dim):
    x = rows_of(eigenvalues, 30, seed)
    loading, noise, _ = optimum(x, latent_dim)
    covariance = loading @ loading.T + noise * np.eye(len(eigenvalues))
    expected = stats.multivariate_normal(x.mean(0).numpy(), covariance).logpdf(x.numpy())
    found = at_optimum(x, latent_dim).log_prob(x, num_samples=50)
    np.testing.assert_allclose(found.log_prob, expected, atol=1e-8)
    assert (found.se < 1e-8).all()


@given(SEEDS, EIGENVALUES, st.integers(1, 2))
def test_kl_and_active_units_are_the_closed_form(seed, eigenvalues, latent_dim):
    x = rows_of(eigenvalues, 30, seed)
    _, noise, eigenvalues = optimum(x, latent_dim)
    kept = eigenvalues[:latent_dim]
    found = at_optimum(x, latent_dim).collapse(x)
    np.testing.assert_allclose(found.kl, np.log(kept / noise) / 2, atol=1e-8)
    np.testing.assert_allclose(found.variance, (1 - noise / kept) * 30 / 29, atol=1e-8)
    if (abs(kept / noise - 1.01) > 0.02).all():
        assert found.active.sum().item() == (kept > noise).sum()


def test_a_linear_one_is_fitted_to_the_optimum_of_pca():
    x = rows_of([9.0, 4.0, 0.3, 0.3, 0.3, 0.3], 300)
    _, noise, eigenvalues = optimum(x, 2)
    D = 6
    exact = -0.5 * (D * math.log(2 * math.pi * math.e) + np.log(eigenvalues[:2]).sum())
    exact -= 0.5 * (D - 2) * math.log(noise)
    torch.manual_seed(0)
    posterior = fit(linear_vae(x, 3), x, batch_size=100, lr=2e-2, max_steps=2500)
    assert posterior.pair.vectorised
    assert exact - 0.05 < posterior.elbo.value / 300 < exact + 0.01
    found = posterior.model.collapse(x)
    assert found.active.sum() >= 2
    assert sorted(found.kl.tolist())[0] < 0.1  # the third dimension has nothing to explain
    assert posterior.model.likelihood.scale[0].item() == pytest.approx(noise**0.5, rel=0.05)


def mnist_columns():
    images = np.load(MNIST)["train_images"][:2000].reshape(-1, 14, 2, 14, 2).mean((2, 4))
    x = torch.from_numpy(images.reshape(-1, 196) / 255.0)
    x = x - x.mean(0)
    return x / x.std(correction=0)


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.exists(), reason="the images are not here")
def test_mnist_is_within_a_tenth_of_a_nat_of_pca_by_a_loop_of_torch():
    x = mnist_columns()
    best = at_optimum(x, 8).log_prob(x, num_samples=30)
    assert best.mean.value == pytest.approx(-222.669, abs=1e-3)
    torch.manual_seed(0)
    vae = linear_vae(x, 8).scale_to(x)
    train(vae, x, num_steps=5000)
    assert -222.669 - 0.1 < mean_elbo(vae, x) < -222.669 + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.skipif(not MNIST.exists(), reason="the images are not here")
def test_mnist_is_within_a_tenth_of_a_nat_of_pca_by_fit_as_it_comes(seed):
    x = mnist_columns()
    torch.manual_seed(seed)
    posterior = ll.fit(linear_vae(x, 8), x, batch_size=256, seed=seed, progress=False)
    assert posterior.converged
    assert -222.669 - 0.1 < mean_elbo(posterior.model, x) < -222.669 + 0.01


def train(vae, x, num_steps, lr=1e-2, batch_size=256):
    """Ascend the ELBO by Adam, the rate falling to zero in the last fifth."""
    optimiser = torch.optim.Adam(vae.parameters(), lr)
    for step in range(num_steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, 5 * (1 - step / num_steps))
        batch = x[torch.randint(len(x), (batch_size,))]
        optimiser.zero_grad()
        (-elbo(vae, batch).mean()).backward()
        optimiser.step()


def elbo(vae, x):
    q = vae.posterior(x)
    prior = dist.Normal(torch.zeros(vae.latent_dim).double(), 1.0).to_event(1)
    kl = torch.distributions.kl_divergence(q, prior.expand(q.batch_shape))
    return vae.distribution(q.rsample()).log_prob(x) - kl


def mean_elbo(vae, x):
    with torch.no_grad():
        return np.mean([elbo(vae, x).mean().item() for _ in range(50)])


# ---- evidence and imputation of a bent one: quadrature over its one latent ----------------------


def small(likelihood="gaussian", D=3, seed=0, **settings):
    settings = {"num_features": D, "latent_dim": 1, "hidden_dims": (8,), "seed": seed, **settings}
    return ll.VariationalAutoencoder(likelihood=likelihood, **settings).double()


def mixed_rows(N, seed=0):
    rng = np.random.default_rng(seed)
    x = np.stack([3 + rng.normal(size=N), rng.poisson(2.0, N), rng.integers(3, size=N)], 1)
    x[rng.random((N, 3)) < 0.3] = NAN
    x[0], x[1] = [3.0, 2.0, 1.0], NAN
    return torch.from_numpy(x)


def mixed(**settings):
    return small(Columns(["gaussian", "poisson", Categorical(3)]), **settings)


@pytest.mark.parametrize("settings", [{}, {"missing": True}, {"prior": "mixture"}])
def test_evidence_is_the_integral_over_the_latent(settings):
    x = mixed_rows(20)
    vae = mixed(**settings).scale_to(x)
    grid = torch.linspace(-12, 12, 4001).double()[:, None]
    with torch.no_grad():
        joint = vae._prior().log_prob(grid)[:, None] + vae.distribution(grid[:, None]).log_prob(x)
    exact = logsumexp(joint.numpy(), 0) + math.log(24 / 4000)
    found = vae.log_prob(x, num_samples=4000)
    z = (found.log_prob.numpy() - exact) / np.maximum(found.se.numpy(), 1e-6)
    good = found.khat.khat.numpy() < 0.6
    assert good.sum() >= 10
    assert (abs(z[good]) < 5).all()
    # Nothing is observed: zero.
    assert found.log_prob[1] == pytest.approx(exact[1], abs=0.05 + 5 * float(found.se[1]))
    assert exact[1] == pytest.approx(0.0, abs=1e-6)


def test_missing_cells_are_drawn_from_their_conditional():
    x = rows_of([6.0, 3.0, 0.5, 0.4], 200)
    loading, noise, _ = optimum(x, 2)
    covariance = loading @ loading.T + noise * np.eye(4)
    vae, mean = at_optimum(x, 2), x.mean(0).numpy()
    with torch.no_grad():  # an encoder that reads zero for a missing cell is too sure: the prior
        vae.encoder[0].weight.zero_()
        vae.encoder[0].bias[2:] = inverse_softplus(torch.tensor(1.0))
    y = x[:30].clone()
    y[:, [1, 3]] = NAN
    found = vae.impute(y, num_samples=2000, num_codes=4000)
    torch.testing.assert_close(found.draws[:, :, [0, 2]], y[:, [0, 2]].expand(2000, 30, 2))
    gain = covariance[np.ix_([1, 3], [0, 2])] @ np.linalg.inv(covariance[np.ix_([0, 2], [0, 2])])
    expected = mean[[1, 3]] + (y[:, [0, 2]].numpy() - mean[[0, 2]]) @ gain.T
    left = covariance[np.ix_([1, 3], [1, 3])] - gain @ covariance[np.ix_([0, 2], [1, 3])]
    sd = np.sqrt(np.diag(left))
    se = sd * np.sqrt(1 / 2000 + 1 / found.ess.numpy()[:, None])
    good = found.evidence.khat.khat.numpy() < 0.5
    assert good.sum() >= 15
    assert (abs(found.mean[:, [1, 3]].numpy() - expected) / se)[good].max() < 5
    np.testing.assert_allclose(np.median(found.sd[:, [1, 3]][good], 0), sd, rtol=0.15)
    marginal = stats.multivariate_normal(mean[[0, 2]], covariance[np.ix_([0, 2], [0, 2])])
    exact = marginal.logpdf(y[:, [0, 2]].numpy())
    z = (found.evidence.log_prob.numpy() - exact) / np.maximum(found.evidence.se.numpy(), 1e-9)
    assert abs(z[good]).max() < 5


# ---- the pair -----------------------------------------------------------------------------------


def variants():
    """Every kind of pair, with rows for it."""
    torch.manual_seed(0)
    counts = torch.poisson(torch.full((12, 3), 2.0))
    images = torch.rand(12, 1, 12, 12)
    conv = {"num_features": (1, 12, 12), "hidden_dims": (6,), "latent_dim": 2}
    table = {"num_features": 3, "hidden_dims": (6,), "latent_dim": 2}
    return {
        "gaussian": (table, torch.randn(12, 3)),
        "poisson": ({"likelihood": "poisson", **table}, counts),
        "missing": ({"missing": True, **table}, torch.randn(12, 3).where(counts > 1, NAN)),
        "columns": (
            {"likelihood": Columns(["gaussian", "poisson", Categorical(3)]), **table},
            mixed_rows(12).float(),
        ),
        "mixture": ({"prior": "mixture", "num_components": 3, **table}, torch.randn(12, 3)),
        "flow": ({"posterior": "flow", **table}, torch.randn(12, 3)),
        "images": ({"likelihood": "bernoulli", **conv}, images),
        "images, missing": (
            {"likelihood": Gaussian(), "missing": True, **conv},
            images.where(images > 0.2, NAN),
        ),
        "images, codes": ({"likelihood": Categorical(3), **conv}, (3 * images).floor()),
    }


VARIANTS = variants()


def made(name, double=True):
    settings, x = VARIANTS[name]
    torch.manual_seed(1)
    vae = ll.VariationalAutoencoder(**settings)
    return (vae.double(), x.double()) if double else (vae, x)


EVERY = pytest.mark.parametrize("name", VARIANTS)


@EVERY
@pytest.mark.parametrize("double", [True, False])
def test_many_particles_are_particles_one_by_one(name, double):
    vae, x = made(name, double)
    pair, report = prepare(vae, x)
    assert report.ok, str(report)
    assert report.faults == report.notes == ()
    assert pair.vectorised
    with pair.entered(seed=0):
        weights = objectives.log_weights(pair, 4)
    assert weights.shape == (4,)
    assert weights.isfinite().all()


@EVERY
def test_a_batch_stands_for_the_whole_data_set(name):
    vae, x = made(name)
    vae.scale_to(x)
    z = torch.randn(12, 2).double()

    def log_joint(rows, size=None):
        model = poutine.condition(vae.model, {"z": z[rows]})
        with pyro.settings.context(validate_poutine=False):
            return poutine.trace(model).get_trace(x[rows], size).log_prob_sum().item()

    whole = log_joint(slice(None))
    parts = [log_joint(slice(i, i + 4), 12) for i in (0, 4, 8)]
    assert np.mean(parts) == pytest.approx(whole, rel=1e-9)


@EVERY
def test_a_prior_draw_has_the_shape_of_rows(name):
    vae, x = made(name)
    assert vae(size=5).shape == (5, *x.shape[1:])
    drawn = vae.sample(5)
    assert drawn.shape == (5, *x.shape[1:])
    vae.likelihood.check(drawn)


@EVERY
def test_a_fit_leaves_the_model_alone_and_its_posterior_is_whole(name, tmp_path):
    vae, x = made(name)
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    posterior = fit(vae, x, max_steps=20, lr=1e-2)
    for key, value in vae.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert posterior.model is posterior.guide.__self__ is not vae
    moved = posterior.model.state_dict()
    assert any(not torch.equal(moved[k], before[k]) for k in before if "decoder" in k)
    assert any(not torch.equal(moved[k], before[k]) for k in before if "encoder" in k)
    assert posterior.sample(3)["z"].shape == (3, 12, 2)
    assert posterior.predict(2)["x"].shape == (2, *x.shape)
    assert math.isfinite(posterior.elbo.value)
    if name in ("images", "images, codes"):
        return  # one of them is enough to store
    posterior.save(tmp_path)
    again = ll.load(tmp_path, data=x)
    torch.testing.assert_close(again.model.encode(x), posterior.model.encode(x), rtol=0, atol=0)
    torch.testing.assert_close(again.sample(2)["z"], posterior.sample(2)["z"], rtol=0, atol=0)


def test_bound_methods_are_the_same_pair():
    x = torch.randn(40, 3)
    vae, settings = small(D=3), {"max_steps": 30, "batch_size": 10}
    fits = [fit(vae, x, **settings), fit(vae.model, x, vae.guide, **settings)]
    torch.testing.assert_close(fits[0].losses, fits[1].losses, rtol=0, atol=0)
    assert fits[1].model.__self__ is fits[1].guide.__self__


def test_networks_of_your_own_will_do():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.loc, self.scale = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            h = self.body(x).tanh()
            return self.loc(h), softplus(self.scale(h))

    vae = ll.VariationalAutoencoder(Encoder(), nn.Linear(2, 3), latent_dim=2)
    posterior = fit(vae, torch.randn(30, 3), max_steps=30)
    assert {name.split("$")[0] for name in posterior.params} >= {"vae.encoder", "vae.decoder"}
    loc, scale = posterior.model.encode(torch.randn(4, 3))
    assert loc.shape == scale.shape == (4, 2)
    assert protocols.Rebuildable  # the file cannot build your networks, and says so
    assert vae.spec()["class"] != "VariationalAutoencoder"


def test_convolutions_of_your_own_will_do():
    nets = ConvEncoder((1, 8, 8), 2, (4,), 8), ConvDecoder(2, (1, 8, 8), (4,), 8)
    vae = ll.VariationalAutoencoder(*nets, "bernoulli", 2)
    x = torch.rand(20, 1, 8, 8)
    posterior = fit(vae, x, max_steps=20, batch_size=10)
    assert posterior.pair.vectorised
    assert posterior.model.reconstruct(x).shape == x.shape


def test_a_likelihood_of_your_own_is_fitted():
    class Laplace(Likelihood):
        per_cell = 2

        def cells(self, params):
            loc, raw_scale = self.split(params)
            return dist.Laplace(loc, softplus(raw_scale) + 1e-3)

    x = torch.randn(40, 3)
    x[0, 0] = NAN
    posterior = fit(small(Laplace()), x, max_steps=300, lr=1e-2)
    start = small(Laplace()).log_prob(x, 200).mean
    assert posterior.model.log_prob(x, 200).mean.value > start.value + 0.1


def test_single_precision_stays_so():
    vae, x = made("gaussian", double=False)
    posterior = fit(vae, x, max_steps=20)
    assert posterior.sample(2)["z"].dtype == torch.float32
    mixed_types = fit(vae, x.double() + 1e9, max_steps=20)  # networks in single, data in double
    assert mixed_types.sample(2)["z"].dtype == torch.float32
    assert (mixed_types.model.reconstruct(x.double() + 1e9) - 1e9).abs().max() < 50


# ---- posteriors and priors ----------------------------------------------------------------------


def test_a_flow_posterior_scores_its_draws_and_has_their_share_of_any_box():
    vae, x = made("flow")
    with torch.no_grad():
        for parameter in vae.flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        q = vae._posterior(x[:2])
        z = q.rsample((50,))
        fresh = FlowPosterior(q.encoding, vae.flow)
        torch.testing.assert_close(fresh.log_prob(z.clone()), q.log_prob(z))
        draws = q.rsample((20_000,))
        low, high = draws.quantile(torch.tensor([0.1, 0.9]).double(), 0)  # (2, L) each
        share = ((draws > low) & (draws < high)).all(-1).double().mean(0)
        steps = (torch.arange(200).double() + 0.5) / 200
        grid = low + torch.cartesian_prod(steps, steps)[:, None] * (high - low)
        inside = fresh.log_prob(grid).exp().mean(0) * (high - low).prod(-1)
        # The box is that of these very draws: what it holds is known to twice its usual error.
        error = 2 * (share * (1 - share) / 20_000).sqrt()
        assert (((inside - share) / error).abs() < 4).all()
        larger = fresh.expand([3, 2])
        assert larger.rsample().shape == (3, 2, 2)


def test_a_flow_posterior_is_no_worse_than_the_diagonal_it_starts_from():
    torch.manual_seed(0)
    angle = torch.rand(200, 1) * 2 * math.pi
    x = torch.cat([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(200, 2)
    posterior = fit(
        small(D=2, latent_dim=2, posterior="flow", hidden_dims=(16,)), x, batch_size=50, lr=1e-2
    )
    moved = [v for k, v in posterior.params.items() if k.startswith("vae.flow")]
    assert moved
    assert any((v != 0).any() for v in moved)


def test_a_mixture_prior_is_learned():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(100, 2) - 8, torch.randn(100, 2) + 8])
    vae = small(D=2, prior="mixture", num_components=2)
    posterior = fit(vae, x, batch_size=50, lr=2e-2, max_steps=600)
    start, end = vae.scale_to(x), posterior.model
    assert (start.prior.locs - end.prior.locs).abs().max() > 0.05
    assert end.log_prob(x, 200).mean.value > start.log_prob(x, 200).mean.value + 1


def test_an_encoding_is_read_from_a_pair_a_triple_or_one_tensor():
    whole = torch.randn(5, 7)
    loc, scale, context = read(whole, 2)
    torch.testing.assert_close(loc, whole[:, :2])
    torch.testing.assert_close(scale, softplus(whole[:, 2:4]) + 1e-6)
    torch.testing.assert_close(context, whole[:, 4:])
    assert read((loc, scale), 2) == Encoding(loc, scale)
    assert read([loc, scale, context], 2).context is context
    assert read(whole[:, :4], 2).context is None


# ---- annealing ----------------------------------------------------------------------------------


def test_a_warm_up_that_does_not_end_is_named():
    posterior = ll.fit(small(warm_up=10_000), torch.randn(40, 3).double(), max_steps=250)
    assert not posterior.converged
    assert "the KL still counted 0.025 and rising" in posterior.stop_reason


def test_warming_up_ends_at_beta():
    vae = small(beta=4.0, warm_up=100, free_bits=0.5)
    assert isinstance(vae, protocols.Anneals)
    weights = [vae.kl_weight(step) for step in (0, 50, 100, 10_000)]
    assert weights == [0.0, 2.0, 4.0, 4.0]
    assert vae.free_bits == 0.5
    assert small().kl_weight(0) == 1.0


# ---- what is said of a fit ----------------------------------------------------------------------


def collapsed(num_dims):
    """A decoder and an encoder that ignore so many of three dimensions."""
    vae, x = small(D=4, latent_dim=3, hidden_dims=()), torch.randn(100, 4).double()
    with torch.no_grad():
        vae.encoder[0].weight[:num_dims] = vae.encoder[0].weight[3 : 3 + num_dims] = 0.0
        vae.encoder[0].bias[:num_dims] = 0.0
        vae.encoder[0].bias[3 : 3 + num_dims] = inverse_softplus(torch.tensor(1 - 1e-6))
        vae.decoder[0].weight[:, :num_dims] = 0.0
    return vae.scale_to(x), x


def test_collapse_is_a_remark():
    assert collapsed(0)[0].remarks({}, collapsed(0)[1]) == []
    vae, x = collapsed(1)
    (remark,) = vae.remarks({}, x)
    assert "1 of 3 latent dimensions is inactive (z[0]): latent_dim=2 would do" in remark
    vae, x = collapsed(3)
    (remark,) = vae.remarks({}, x)
    assert "posterior collapse: none of the 3 latent dimensions is used" in remark
    assert "codes mean nothing" in remark
    assert vae.collapse(x).total_kl.value == pytest.approx(0.0, abs=1e-6)


def test_rows_are_labelled_with_codes_and_densities():
    x = rows_of([5.0, 2.0, 0.5], 40)
    vae = at_optimum(x, 2)
    columns = vae.label_rows({}, x)
    assert list(columns) == ["z_0", "z_1", "log_prob", "log_prob_se"]
    torch.testing.assert_close(columns["z_1"], vae.encode(x)[0][:, 1])
    assert (columns["log_prob_se"] < 1e-6).all()


@EVERY
def test_answers_have_the_shapes_of_rows_and_can_be_repeated(name):
    vae, x = made(name)
    vae.scale_to(x)
    before = torch.get_rng_state()
    loc, scale = vae.encode(x)
    assert loc.shape == scale.shape == (12, 2)
    assert (scale > 0).all()
    assert vae.decode(loc).shape == vae.reconstruct(x).shape == x.shape
    assert vae.decode(loc.expand(3, 12, 2)).shape == (3, *x.shape)
    assert vae.traverse(1, torch.linspace(-2, 2, 7).double()).shape == (7, *x.shape[1:])
    filled = vae.impute(x, num_samples=3, num_codes=30)
    assert filled.draws.shape == (3, *x.shape)
    assert not filled.draws.isnan().any()
    assert filled.ess.shape == (12,)
    evidence = vae.log_prob(x, num_samples=30)
    assert evidence.log_prob.shape == evidence.se.shape == (12,)
    torch.testing.assert_close(vae.log_prob(x, num_samples=30).log_prob, evidence.log_prob)
    assert (vae.log_prob(x, num_samples=30, seed=1).log_prob != evidence.log_prob).any()
    torch.testing.assert_close(vae.sample(4), vae.sample(4), rtol=0, atol=0)
    vae.plot_fit({}, ["a", "b", "c"], x)
    assert vae.posterior(x).batch_shape == (12,)
    assert not evidence.log_prob.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_the_picture_of_images_shows_all_that_an_autoencoder_does():
    vae, x = made("images")
    vae.scale_to(x)
    labels = [ax.get_label() for ax in vae.plot_fit({}, [], x).axes]
    for what in ("reconstructions", "made up", "walks along", "KL of each", "map of"):
        assert any(what in label for label in labels), what


def test_the_picture_of_a_table_compares_what_has_a_size():
    """Cells that are codes have no correlation, and no change along a latent."""
    vae, x = mixed(), mixed_rows(40)
    axes = {ax.get_label(): ax for ax in vae.scale_to(x).plot_fit({}, list("abc"), x).axes}
    named = axes["correlation of each column with its reconstruction"].get_yticklabels()
    assert [label.get_text() for label in named] == ["a", "b"]
    effects = axes["change of each column along each latent dimension"].images[0].get_array()
    assert effects.mask.tolist() == [[False, False, True]]
    with torch.no_grad():
        ends = vae.decode(torch.tensor([[-2.0], [2.0]]).double())
    change = (ends[1] - ends[0])[:2].numpy() / np.nanstd(x[:, :2].numpy(), 0)
    np.testing.assert_allclose(effects[0, :2], change, rtol=1e-6)


def test_small_images_have_perceptrons_and_others_convolutions():
    for size, convolves in ((8, False), (12, True)):
        vae = ll.VariationalAutoencoder(num_features=(1, size, size), hidden_dims=(4,))
        layers = [*vae.encoder.modules(), *vae.decoder.modules()]
        assert convolves is any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in layers)
        assert vae.sample(3).shape == (3, 1, size, size)


def test_rows_in_pieces_are_rows_at_once(monkeypatch):
    vae, x = made("columns")
    vae.scale_to(x)
    loc, scale = vae.encode(x)
    monkeypatch.setattr(ll.models.vae, "_CHUNK", 1)
    torch.testing.assert_close(vae.encode(x), (loc, scale))
    assert vae.log_prob(x, num_samples=25).log_prob.shape == (12,)
    assert vae.impute(x, 2, 25).draws.shape == (2, 12, 3)


@EVERY
def test_a_model_is_built_again_from_its_description(name):
    vae, x = made(name)
    vae.scale_to(x)
    spec = json.loads(json.dumps(vae.spec()))
    again = ll.VariationalAutoencoder(**spec["arguments"]).double()
    again.load_state_dict(vae.state_dict())
    assert again.spec() == vae.spec()
    torch.testing.assert_close(again.encode(x), vae.encode(x))
    torch.testing.assert_close(again.sample(3), vae.sample(3))


# ---- bad inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likelihood", "x", "message"),
    [
        (
            "bernoulli",
            torch.randint(0, 256, (9, 3), dtype=torch.uint8),
            r"expected \[0, 1\], got max",
        ),
        ("poisson", torch.full((9, 3), -1.0), "expected counts"),
        (Categorical(3), torch.full((9, 3), 3.0), r"codes 0 to 2 \(num_categories=3\), got 3"),
        ("gaussian", torch.zeros(9, 4), r"x: expected shape \(N, 3\) .* got \(9, 4\)"),
        ("gaussian", torch.zeros(1, 3), "at least 2 rows"),
        ("gaussian", torch.full((9, 3), math.inf), "x has 27 inf"),
        ("gaussian", torch.tensor([[1.0, NAN, 2.0]] * 3), "'x1' is all NaN"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_the_first_step(likelihood, x, message):
    with pytest.raises(ValueError, match=message):
        fit(small(likelihood), x)


def test_a_constant_column_is_named():
    x = torch.randn(20, 3)
    x[:, 1] = 4.0
    with pytest.warns(UserWarning, match="constant column 'x1'"):
        posterior = fit(small(), x, max_steps=20)
    assert math.isfinite(posterior.elbo.value)


@pytest.mark.parametrize(("scale", "offset"), [(1e-200, 0.0), (1e140, 0.0), (1.0, 1e12)])
def test_units_do_not_matter(scale, offset):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    one = fit(small(), x, max_steps=20)
    other = fit(small(), x * scale + offset, max_steps=20)
    expected = one.elbo.value - 150 * math.log(scale)
    assert other.elbo.value == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("scale", "offset"), [(1e-200, 0.0), (1e140, 0.0), (1.0, 1e12)])
@pytest.mark.parametrize("kind", [np.array, pd.DataFrame, ll.data.Table])
def test_numbers_of_an_array_or_a_frame_are_no_coarser_than_those_of_a_tensor(kind, scale, offset):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double() * scale + offset
    model = ll.VariationalAutoencoder(num_features=3, latent_dim=1, hidden_dims=(8,))  # float32
    came = x if kind is ll.data.Table else x.numpy()
    expected = fit(model, x, max_steps=20).elbo.value
    assert fit(model, kind(came), max_steps=20).elbo.value == pytest.approx(expected, abs=1e-3)


def test_a_far_value_is_named_and_the_fit_is_finite():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    x[4, 1] = 1e8
    for model in (small(), small(likelihood=Columns(["poisson", "gaussian", "gaussian"]))):
        x[:, 0] = torch.arange(50) % 5
        with pytest.warns(UserWarning, match="row 4 of column 'x1'"):
            posterior = fit(model, x, max_steps=20)
        assert math.isfinite(posterior.elbo.value)


def test_a_missing_code_is_the_most_probable_one_and_no_mean_of_codes():
    code = 2 * (torch.arange(60) % 2).double()
    x = torch.stack([code, code, code], 1)
    vae = small(likelihood=Columns([Categorical(3)] * 2 + ["gaussian"])).scale_to(x)
    with torch.no_grad():  # which code is probable depends on the latent
        vae.decoder[-1].weight.mul_(20)
    found = vae.impute(torch.full_like(x, NAN), num_samples=2, num_codes=200)
    assert set(found.mean[:, :2].flatten().tolist()) <= {0.0, 1.0, 2.0}


def test_the_mean_of_a_missing_cell_is_that_of_its_draws():
    x = mixed_rows(20)
    x[:, 0] = NAN
    vae = mixed().scale_to(mixed_rows(20))
    found = vae.impute(x, num_samples=4000, num_codes=4000)
    z = (found.draws.mean(0) - found.mean)[:, 0] / (found.sd[:, 0] * (2 / found.ess) ** 0.5)
    assert z[found.ess > 400].abs().max() < 5
    seen = ~x.isnan()
    torch.testing.assert_close(found.mean[seen], x[seen])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ll.VariationalAutoencoder(), ValueError, "num_features: expected the number"),
        (lambda: small(latent_dim=0), ValueError, "latent_dim must be an int >= 1, got 0"),
        (lambda: small(D=0), ValueError, "num_features: expected an int >= 1"),
        (lambda: small(D=(8, 8)), ValueError, r"num_features: expected .*\(8, 8\)"),
        (lambda: small(posterior="full"), ValueError, "posterior: expected 'diagonal' or 'flow'"),
        (lambda: small(prior="vamp"), ValueError, "prior: expected 'normal' or 'mixture'"),
        (lambda: small(beta=-1.0), ValueError, "beta: expected a number >= 0, got -1.0"),
        (lambda: small(free_bits=NAN), ValueError, "free_bits: expected a number >= 0"),
        (lambda: small(warm_up=-5), ValueError, "warm_up must be an int >= 0"),
        (lambda: small("normal"), ValueError, "likelihood: expected 'gaussian'"),
        (
            lambda: small(decoder=nn.Linear(1, 4)),
            ValueError,
            r"decoder: expected rows of shape \(3,",
        ),
        (lambda: small(decoder=nn.Linear(2, 3)), ValueError, r"decoder: .* takes shape \(B, 1\)"),
        (lambda: small(encoder=nn.Linear(3, 1)), ValueError, r"encoder: expected \(loc, scale\)"),
        (lambda: small(encoder=nn.Linear(5, 2)), ValueError, r"encoder: .* takes shape \(B, 3\)"),
        (lambda: small(encoder=abs), TypeError, "encoder: expected a torch.nn.Module"),
        (lambda: small(prior="mixture", num_components=0), ValueError, "num_components must be"),
        (lambda: small().guide(), ValueError, "x: expected rows to encode"),
        (lambda: small().encode(torch.zeros(2, 5)), ValueError, r"x: expected shape \(N, 3\)"),
        (
            lambda: small().log_prob(torch.zeros(2, 3), 5),
            ValueError,
            "num_samples must be .* >= 25",
        ),
        (lambda: small().traverse(3, torch.zeros(1)), ValueError, "dim: expected one of 1"),
        (lambda: small().sample(2, seed=-1), ValueError, "seed"),
    ],
)
def test_faults_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("bad", [torch.zeros(4, 1, 8, 9), torch.full((4, 1, 12, 12), math.inf)])
def test_images_that_do_not_fit_are_refused(bad):
    vae, _ = made("images")
    message = r"expected shape \(N, 1, 12, 12\)|x has 576 inf \(first at \[0, 0, 0, 0\]\)"
    with pytest.raises(ValueError, match=message):
        vae.encode(bad)


def test_trying_a_network_out_changes_nothing():
    nets = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(2, 3)
    state = torch.get_rng_state()
    ll.VariationalAutoencoder(*nets, "gaussian", 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert nets[0][1].num_batches_tracked == 0
    assert nets[0].training


@pytest.mark.parametrize(
    "family",
    [
        ll.VariationalAutoencoder,
        partial(ll.VariationalAutoencoder, prior="mixture", posterior="flow"),
        ll.Autoencoder,
        ll.FlowDensity,
    ],
)
def test_first_weights_are_those_of_the_seed_and_take_no_one_elses_numbers(family):
    def weights(seed):
        return torch.cat([p.flatten() for p in family(num_features=3, seed=seed).parameters()])

    state = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))
    with pytest.raises(ValueError, match="seed"):
        weights(-1)
