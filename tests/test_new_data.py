"""New rows after a fit: found by the names of their columns, and refused where a fit refuses."""

import math
from contextlib import nullcontext
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

import latentlab as ll

FEW = {"max_steps": 40, "num_restarts": 1, "progress": False}


def frame():
    rng = np.random.default_rng(0)
    return pd.DataFrame({"a": rng.normal(0, 1, 60), "b": rng.normal(100, 5, 60)})


FAMILIES = {
    "mixture": lambda: ll.GaussianMixture(2, 2),
    "ppca": lambda: ll.ProbabilisticPCA(2, 1),
    "factors": lambda: ll.FactorAnalysis(2, 1),
    "vae": lambda: ll.VariationalAutoencoder(num_features=2, latent_dim=1, hidden_dims=(4,)),
    "ae": lambda: ll.Autoencoder(num_features=2, latent_dim=1, hidden_dims=(4,)),
    "flow": lambda: ll.FlowDensity(2, kind="maf", hidden_dims=(4,)),
    "hmm": lambda: ll.HiddenMarkovModel(2, num_features=2),
}
ANSWERS = {
    "mixture": ("log_prob", "responsibilities", "impute"),
    "ppca": ("log_prob", "encode"),
    "factors": ("log_prob", "encode"),
    "vae": ("log_prob",),
    "ae": ("encode", "error"),
    "flow": ("log_prob",),
    "hmm": ("log_prob", "smooth", "filter", "decode"),
}


@cache
def fitted(family):
    return ll.fit(FAMILIES[family](), frame(), **FEW)


def ask(posterior, method, rows):
    """What a model of the fit answers, as one tensor."""
    draws = {} if posterior.pair.local_plate() or not posterior.pair.latents else None
    answer = getattr(posterior.model, method)
    found = answer(rows) if draws == {} else answer(rows, posterior.sample(3))
    if isinstance(found, tuple):
        found = found[0]
    return torch.as_tensor(getattr(found, "x", getattr(found, "log_prob", found)))


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestColumns:
    def test_a_models_own_methods_find_columns_by_name(self, family):
        rows = frame()
        for method in ANSWERS[family]:
            right = ask(fitted(family), method, rows)
            assert torch.equal(ask(fitted(family), method, rows[["b", "a"]]), right), method
            with pytest.raises(ValueError, match="missing 'a' and extra 'c'"):
                ask(fitted(family), method, rows.rename(columns={"a": "c"}))

    def test_so_do_those_of_a_loaded_one(self, family, tmp_path):
        fitted(family).save(tmp_path)
        again, rows = ll.load(tmp_path), frame()
        method = ANSWERS[family][0]
        right = ask(fitted(family), method, rows)
        assert torch.equal(ask(again, method, rows[["b", "a"]]), right)

    def test_a_fit_of_other_columns_forgets_the_old(self):
        rows = frame().rename(columns={"a": "c"})
        again = ll.fit(fitted("mixture").model, rows, **FEW)
        assert again.names == ("c", "b")

    def test_several_arguments_and_keywords(self, tmp_path):
        rows, weights = frame(), torch.ones(60)
        posterior = ll.fit(ll.GaussianMixture(2, 2), (rows, weights), **FEW)
        turned = rows[["b", "a"]]
        right = posterior.log_prob(rows, weights)
        assert posterior.log_prob(turned, weights) == right
        assert posterior.log_prob({"x": turned, "weights": weights}) == right
        posterior.save(tmp_path)
        again = ll.load(tmp_path, data=(turned, weights))
        assert torch.equal(again.log_weights(5), posterior.log_weights(5))
        with pytest.raises(ValueError, match="missing 'a' and extra 'c'"):
            posterior.log_prob(rows.rename(columns={"a": "c"}), weights)

    def test_sequences_of_an_hmm(self):
        posterior, rows = fitted("hmm"), frame()
        data = ll.data.as_sequences([rows[["b", "a"]], rows[["b", "a"]][:30]])
        draws = posterior.sample(3)
        right = posterior.model.smooth([rows, rows[:30]], draws)
        assert torch.equal(posterior.model.smooth(data, draws), right)


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestValues:
    def test_too_large(self, family):
        def refuses(factor):  # in float64, the square of 1e140 is a number
            return factor > 1e150 or family in ("vae", "ae")

        posterior, rows = fitted(family), frame().to_numpy()
        for factor in (1e140, 1e200):
            with pytest.raises(ValueError, match="unit") if refuses(factor) else nullcontext():
                assert math.isfinite(posterior.log_prob(rows * factor).value)

    @pytest.mark.parametrize(
        ("likelihood", "bad", "message"),
        [
            ("bernoulli", 255.0, r"expected \[0, 1\], got max 255; divide by 255"),
            ("bernoulli", -2.0, r"expected \[0, 1\]"),
            ("poisson", 3.5, r"expected counts .* got 3\.5 at"),
            ("poisson", -4.0, "expected counts .* got -4 at"),
        ],
    )
    def test_outside_of_the_likelihood(self, likelihood, bad, message):
        x = (torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) < 0.5).double()
        vae = ll.VariationalAutoencoder(
            num_features=3, latent_dim=1, hidden_dims=(4,), likelihood=likelihood
        )
        posterior = ll.fit(vae, x, **FEW)
        other = x.clone()
        other[3, 1] = bad
        with pytest.raises(ValueError, match=message):
            posterior.log_prob(other)
        assert posterior.predict(2, other)["x"].shape == (2, 40, 3)  # only their shape counts

    @pytest.mark.parametrize("bad", [-1.0, torch.nan])
    def test_weights(self, bad):
        rows, weights = frame(), torch.ones(60)
        posterior = fitted("mixture")
        weights[7] = bad
        with pytest.raises(ValueError, match="weights: expected finite numbers >= 0.* for row 7"):
            posterior.log_prob(rows, weights)

    @pytest.mark.parametrize("bad", [[-3, 5], [2.5], [0]])
    def test_lengths_of_new_sequences(self, bad):
        with pytest.raises(ValueError, match="lengths: expected"):
            fitted("hmm").predict(2, {"lengths": bad})
        assert fitted("hmm").predict(2, {"lengths": [3, 5]})["x"].shape == (2, 2, 5, 2)

    @pytest.mark.parametrize("kind", ["ppca", "factors", "mixture", "hmm"])
    def test_columns_too_narrow_for_their_type(self, kind):
        with pytest.raises(ValueError, match="column 'a' spans .* choose a smaller unit"):
            ll.fit(FAMILIES[kind](), frame() * 1e-310, **FEW)

    def test_numbers_that_the_models_type_cannot_hold(self):
        vae = ll.VariationalAutoencoder(
            num_features=2, latent_dim=1, hidden_dims=(4,), likelihood="bernoulli"
        )
        with pytest.raises(ValueError, match=r"x: expected numbers that float32 can hold, got 1e"):
            ll.fit(vae, np.full((20, 2), 1e140), **FEW)


def test_a_list_of_images_is_a_batch():
    x = (torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    vae = ll.VariationalAutoencoder(num_features=(1, 6, 6), latent_dim=1, hidden_dims=(4,))
    posterior = ll.fit(vae, list(x.numpy()), **FEW)
    assert posterior.predict(1)["x"].shape == (1, 20, 1, 6, 6)
    with pytest.raises(ValueError, match=r"equal length, got a ragged list, \(1, 3, 6\), "):
        ll.fit(vae, [x[0], x[0, :, :3]], **FEW)
