"""The autoencoder: what it is fitted to, what it answers, and the mixture on its codes."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import latentlab as ll
from latentlab.nn import MLP


def plane(num=300, D=5, L=2, seed=0, noise=0.1):
    """Rows near a plane."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return (
        2
        + torch.randn(num, L, **draw) @ torch.randn(L, D, **draw)
        + noise * torch.randn(num, D, **draw)
    )


def linear(D=5, L=2):
    torch.manual_seed(0)
    return nn.Linear(D, 2 * L), nn.Linear(L, D)


def small(**arguments):
    return ll.Autoencoder(**{"num_features": 5, "hidden_dims": (16,), **arguments})


@pytest.fixture(scope="module")
def fitted():
    ae = ll.Autoencoder(*linear(), latent_dim=2, held_out=0.0)
    x = plane()
    return x, ll.fit(ae, x, lr=0.02, max_steps=4000, progress=False)


def test_a_linear_autoencoder_finds_the_principal_plane(fitted):
    x, posterior = fitted
    values = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / len(x))
    least = float(values[:3].sum())  # what no plane explains
    error = float(posterior.model.error(x).mean())
    assert least * (1 - 1e-6) <= error <= least * 1.02


def test_its_scale_is_the_root_of_the_mean_squared_error(fitted):
    x, posterior = fitted
    model = posterior.model
    scale = model.likelihood.scale.detach()
    error = float(model.error(x).mean()) / 5
    assert torch.allclose(scale, scale[0])
    assert float(scale[0]) == pytest.approx(math.sqrt(error), rel=0.03)
    assert posterior.elbo.value == pytest.approx(
        -0.5 * 300 * 5 * (math.log(2 * math.pi * error) + 1), rel=0.01
    )


def test_the_cross_entropy_is_that_of_the_shares():
    x = torch.rand(50, 5, generator=torch.Generator().manual_seed(0)).double()
    ae = small(loss="bce").scale_to(x)
    share = ae.reconstruct(x).double()
    assert ((share > 0) & (share < 1)).all()
    exact = -(x * share.log() + (1 - x) * (1 - share).log()).sum(1)
    assert torch.allclose(ae.error(x).double(), exact, atol=1e-4)


def test_a_fit_lowers_the_cross_entropy_of_rows_kept_aside():
    generator = torch.Generator().manual_seed(1)
    kind = torch.randint(2, (300, 1), generator=generator)
    probs = torch.where(kind == 1, 0.95, 0.05).expand(-1, 5)
    x = torch.bernoulli(probs, generator=generator).double()
    posterior = ll.fit(small(loss="bce", latent_dim=1), x, max_steps=800, progress=False)
    marginal = x.mean(0)
    entropy = -(marginal * marginal.log() + (1 - marginal) * (1 - marginal).log()).sum()
    assert posterior.held_out is not None
    assert -posterior.held_out.value < 0.7 * float(entropy)


def test_missing_cells_are_left_out_of_the_loss():
    x = plane(40)
    x[::3, 1] = torch.nan
    ae = small().scale_to(x)
    back = ae.reconstruct(x)
    expected = (back - x).square().nansum(1)
    assert torch.allclose(ae.error(x), expected.to(ae.error(x)))
    assert back.isfinite().all()
    posterior = ll.fit(ae, x, max_steps=100, progress=False)
    assert math.isfinite(posterior.elbo.value)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 7))
def test_shapes_go_there_and_back(D, L, N):
    ae = ll.Autoencoder(num_features=D, latent_dim=L, hidden_dims=(4,))
    x = torch.randn(N, D).double()
    assert ae.encode(x).shape == (N, L)
    assert ae.reconstruct(x).shape == (N, D)
    assert ae.decode(torch.randn(3, N, L)).shape == (3, N, D)
    order = torch.randperm(N)
    assert torch.allclose(ae.encode(x[order]), ae.encode(x)[order], atol=1e-5)


def test_images_have_convolutional_networks():
    x = torch.rand(20, 1, 12, 12)
    ae = ll.Autoencoder(num_features=(1, 12, 12), latent_dim=3, loss="bce", hidden_dims=(16,))
    posterior = ll.fit(ae, x, batch_size=10, max_steps=20, progress=False)
    assert posterior.model.encode(x).shape == (20, 3)
    assert posterior.model.reconstruct(x).shape == (20, 1, 12, 12)
    assert posterior.plot("fit").figure is not None


def test_the_same_networks_serve_both_autoencoders():
    torch.manual_seed(0)
    encoder, decoder = MLP(5, (16,), 4), MLP(2, (16,), 5)
    ae = ll.Autoencoder(encoder, decoder, latent_dim=2)
    vae = ll.VariationalAutoencoder(encoder, decoder, latent_dim=2)
    x = plane(30)
    ae.scale_to(x)
    vae.likelihood.origin, vae.likelihood.unit = ae.likelihood.origin, ae.likelihood.unit
    assert torch.allclose(ae.encode(x), vae.encode(x)[0])


def test_rows_are_labelled_with_codes_and_errors(fitted):
    x, posterior = fitted
    columns = posterior.model.label_rows({}, x)
    assert list(columns) == ["z_0", "z_1", "error"]
    assert torch.equal(columns["error"], posterior.model.error(x))
    assert posterior.plot("fit").figure is not None


def test_a_saved_one_answers_alike(tmp_path):
    x = plane(60)
    posterior = ll.fit(small(), x, max_steps=50, progress=False)
    posterior.save(tmp_path)
    again = ll.load(tmp_path)
    assert torch.equal(again.model.encode(x), posterior.model.encode(x))


def test_all_rows_are_known_again_though_a_share_of_them_was_kept_aside(tmp_path):
    x = plane(60)
    ae = ll.Autoencoder(num_features=5, latent_dim=2, hidden_dims=(8,), held_out=0.2)
    posterior = ll.fit(ae, x, max_steps=100, seed=3, progress=False)
    assert posterior.held_out is not None
    folder = posterior.save(tmp_path / "ae")
    again = ll.load(folder, data=x)
    assert torch.equal(again.pair.data.args[0], posterior.pair.data.args[0])
    assert not any("not the data" in reason for reason in again.check().reasons)
    other = ll.load(folder, data=x + 1)
    assert len(other.pair.data.args[0]) == len(x)
    assert any("not the data" in reason for reason in other.check().reasons)


def test_codes_without_a_prior_have_a_map_without_one(fitted):
    x, posterior = fitted
    figure = posterior.plot("fit")
    last = figure.axes[-1]
    assert len(last.lines) == 1
    assert "prior" not in last.get_title(loc="left")
    labels = [ax.get_label() for ax in figure.axes]
    assert any("change of each column" in label for label in labels)


def test_one_with_networks_of_your_own_is_loaded_into_them(fitted, tmp_path):
    x, posterior = fitted
    posterior.save(tmp_path)
    again = ll.load(tmp_path, model=ll.Autoencoder(*linear(), latent_dim=2, held_out=0.0))
    assert torch.equal(again.model.encode(x), posterior.model.encode(x))


def test_the_caller_keeps_its_networks():
    ae = small()
    before = {k: v.clone() for k, v in ae.state_dict().items()}
    ll.fit(ae, plane(40), max_steps=20, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in ae.state_dict().items())


# ---- the mixture on the codes ------------------------------------------------------------------


def test_rows_from_the_mixture_on_the_codes_look_like_the_rows(fitted):
    x, posterior = fitted
    mixture = ll.fit_codes(posterior, 1, max_steps=300)
    new = mixture.sample(4000)
    back = posterior.model.reconstruct(x)
    assert mixture.sample_codes(7).shape == (7, 2)
    sd = back.std(0)
    assert ((new.mean(0) - back.mean(0)).abs() < 5 * sd / math.sqrt(300)).all()
    assert torch.allclose(
        new.T.cov(), back.T.cov(), atol=5 * float(sd.max()) ** 2 / math.sqrt(300)
    )
    assert torch.equal(mixture.sample(5), mixture.sample(5))
    assert not torch.equal(mixture.sample(5), mixture.sample(5, seed=1))


def test_a_variational_one_takes_a_mixture_on_its_codes_too():
    torch.manual_seed(0)
    vae = ll.VariationalAutoencoder(num_features=5, hidden_dims=(8,), latent_dim=2)
    posterior = ll.fit(vae, plane(80), max_steps=50, progress=False)
    assert ll.fit_codes(posterior, 2, max_steps=50).sample(3).shape == (3, 5)


def test_a_mixture_on_other_codes_is_refused():
    x = ll.data.simulate.eruptions(num_rows=50)
    posterior = ll.fit(ll.GaussianMixture(2, 1), x, num_restarts=1, max_steps=20, progress=False)
    with pytest.raises(TypeError, match="got one of GaussianMixture"):
        ll.fit_codes(posterior)


def test_a_mixture_on_codes_needs_the_rows(tmp_path):
    posterior = ll.fit(small(), plane(40), max_steps=20, progress=False)
    posterior.save(tmp_path)
    with pytest.raises(ValueError, match=r"ll\.load\(path, data=x\)"):
        ll.fit_codes(ll.load(tmp_path))


# ---- bad inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"loss": "mae"}, 'loss: expected "mse" or "bce"'),
        ({"latent_dim": 0}, "latent_dim must be an int >= 1"),
        ({"held_out": 1}, r"held_out: expected a share in \[0, 1\)"),
        ({"num_features": 2.5}, "num_features"),
        ({"num_features": None}, "num_features: expected the number of columns"),
        ({"hidden_dims": (0,)}, "hidden_dims"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises((ValueError, TypeError), match=says):
        small(**arguments)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (255 * torch.ones(5, 5), "max 255; divide by 255, x"),
        (torch.zeros(5, 4), r"expected shape \(N, 5\)"),
        (torch.full((5, 5), torch.inf), "inf"),
        (torch.zeros(1, 5), "1 row"),
    ],
)
def test_bad_rows_are_named(x, says):
    with pytest.raises(ValueError, match=says):
        ll.fit(small(loss="bce"), x.double(), progress=False)


def test_rows_that_are_all_equal_are_told():
    with pytest.warns(UserWarning, match="all 20 rows are equal"):
        posterior = ll.fit(small(), torch.ones(20, 5).double(), max_steps=20, progress=False)
    assert math.isfinite(posterior.elbo.value)


def test_a_constant_column_does_no_harm():
    x = plane(60)
    x[:, 2] = 7.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = ll.fit(small(), x, max_steps=50, progress=False)
    assert np.isfinite(posterior.model.reconstruct(x).numpy()).all()


def test_there_is_nothing_to_draw_from_without_codes():
    with pytest.raises(ValueError, match="fit_codes"):
        small()(size=5)
