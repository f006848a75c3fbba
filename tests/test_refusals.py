"""Arguments that no model can use are refused at once, in the words of who took them."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll
import latentlab.sklearn as ls

ROWS = np.random.default_rng(0).normal(size=(80, 2))
CODES = np.random.default_rng(1).integers(0, 3, (80, 1)).astype(float)
COUNTS = np.random.default_rng(2).poisson(3, (80, 3)).astype(float)
BRIEF = {"max_steps": 20, "num_restarts": 1}


def with_cell(rows, value):
    rows = rows.copy()
    rows[4, 0] = value
    return rows


def vae(**settings):
    return ll.VariationalAutoencoder(num_features=3, latent_dim=2, hidden_dims=(4,), **settings)


ESTIMATORS = {
    "too many codes": (ls.CategoricalHMM(2), with_cell(CODES, 1e12), "n_features="),
    "a code between two": (ls.CategoricalHMM(2), with_cell(CODES, 1.5), r"got 1.5 at \[4, 0\]"),
    "a negative code": (ls.CategoricalHMM(2), CODES - 1, "from 0 on"),
    "more codes than told": (ls.CategoricalHMM(2, n_features=2), CODES, "n_features="),
    "a count beside a whole one": (ls.PoissonHMM(2), CODES + 3e-7, "got .*0000003"),
    "no rate": (ls.VAE(1, learning_rate_init=0), ROWS, "learning_rate_init: .* > 0, got 0"),
    "a negative share": (ls.VAE(1, validation_fraction=-0.1), ROWS, "validation_fraction: "),
    "a share of text": (ls.VAE(1, validation_fraction="a"), ROWS, "validation_fraction: .*'a'"),
    "one width": (ls.VAE(1, hidden_layer_sizes=8), ROWS, "hidden_layer_sizes: .*got 8"),
    "no widths": (ls.VAE(1, hidden_layer_sizes=None), ROWS, "hidden_layer_sizes: .*got None"),
    "one width of a flow": (ls.FlowDensity(hidden_layer_sizes=8), ROWS, "hidden_layer_sizes: "),
    "a share of a flow": (ls.FlowDensity(validation_fraction="a"), ROWS, "validation_fraction: "),
    "no shares": (ls.VAE(1, likelihood="bernoulli"), ROWS, "take the Gaussian likelihood"),
    "ragged rows": (ls.PPCA(1), [ROWS[:30], ROWS[:50]], "need a model of sequences"),
    "an unhashable shape": (ls.GaussianMixture(2, covariance_type=["full"]), ROWS, r"\['full'\]"),
    "unhashable starts": (ls.GaussianMixture(2, init_params=["k"]), ROWS, "init_params: "),
    "an unhashable shape of states": (ls.GaussianHMM(2, covariance_type=[]), ROWS, r"got \[\]"),
}


@pytest.mark.parametrize("case", ESTIMATORS)
def test_an_estimator_speaks_of_its_own_arguments(case):
    estimator, rows, message = ESTIMATORS[case]
    before = estimator.get_params()
    with pytest.raises(ValueError, match=message):
        estimator.fit(rows)
    assert estimator.get_params() == before
    assert not hasattr(estimator, "posterior_")


@pytest.mark.parametrize("second", [3, [3], [[1], [2]]])
def test_lengths_in_the_second_place_are_not_lost(second):
    with pytest.raises(ValueError, match="lengths are a keyword"):
        ls.GaussianHMM(2).fit(ROWS, second)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("given", [np.stack([ROWS[:20]] * 3), (ROWS[:20], ROWS[:20], ROWS[:20])])
def test_sequences_of_one_length_may_be_an_array_or_a_tuple(given):
    settings = {"n_iter": 20, "n_init": 1, "random_state": 0}
    found = ls.GaussianHMM(2, **settings).fit(given)
    expected = ls.GaussianHMM(2, **settings).fit(np.concatenate([ROWS[:20]] * 3), lengths=[20] * 3)
    np.testing.assert_array_equal(found.means_, expected.means_)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_codes_with_a_gradient_are_numbers_all_the_same():
    fitted = ls.PPCA(1, max_iter=20).fit(ROWS)
    code = torch.ones(2, 1, requires_grad=True)
    assert fitted.inverse_transform(code).shape == (2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vae(likelihood="gaussian").traverse(9, [0.0]), "axis|dim"),
        (lambda: ll.VariationalAutoencoder(num_features=3, hidden_dims=8), "hidden_dims: .*got 8"),
        (
            lambda: ll.VariationalAutoencoder(num_features=(1, 28, 28), hidden_dims=(8, 5)),
            "hidden_dims",
        ),
        (lambda: ll.guides.Flow(hidden_dims=5), "hidden_dims: .*got 5"),
        (lambda: ll.guides.Flow(num_bins=0), "num_bins"),
        (lambda: ll.guides.Amortised(seed=-1), "seed"),
    ],
)
def test_arguments_of_networks(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("codes", [[0.0, 0.0], np.zeros((4, 2)).tolist()])
def test_lists_are_codes_too(codes):
    assert vae().decode(codes).shape[-1] == 3


@pytest.mark.parametrize("codes", [np.zeros((4, 3)), None, np.full((4, 2), np.nan), "codes"])
def test_what_is_no_code_is_not_decoded(codes):
    with pytest.raises((ValueError, TypeError), match="z"):
        vae().decode(codes)


@pytest.mark.parametrize("other", [3, None, "posterior"])
def test_codes_are_those_of_a_fit(other):
    with pytest.raises(TypeError, match="posterior"):
        ll.fit_codes(other)


@pytest.mark.parametrize(
    ("likelihood", "rows", "message"),
    [
        ("poisson", with_cell(COUNTS, 1e5), "interquartile"),
        ("bernoulli", np.ones((30, 3)), "constant|one value|varies"),
    ],
)
def test_columns_that_spoil_a_fit_are_told_of(likelihood, rows, message):
    with pytest.warns(UserWarning, match=message):
        ll.fit(vae(likelihood=likelihood), rows, **BRIEF)


def shares(x=None):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(1)))
    with pyro.plate("rows", 80):
        pyro.sample("x", dist.Normal(w[..., 0:1].squeeze(-1), 1.0), obs=x)


@pytest.mark.parametrize("guide", ["mean_field", "full_rank", "auto"])
def test_a_latent_of_one_value_is_known(guide):
    posterior = ll.fit(shares, ROWS[:, 0], guide, **BRIEF)
    assert (posterior.sample(5)["w"] == 1).all()
    expected = torch.distributions.Normal(1.0, 1.0).log_prob(torch.as_tensor(ROWS[:, 0])).sum()
    assert posterior.elbo.value == pytest.approx(float(expected), rel=1e-6)


def test_a_set_is_no_data():
    with pytest.raises(ValueError, match="observed as a set"):
        ll.fit(shares, {1.0, 2.0}, **BRIEF)


def test_a_column_that_was_kept_aside_whole_is_named_with_its_share():
    settings = {"num_features": 2, "latent_dim": 1, "hidden_dims": (4,), "likelihood": "bernoulli"}
    model = ll.VariationalAutoencoder(**settings)
    refused = 0
    for n in range(20):  # whichever rows the seed chooses
        rows = np.stack([ROWS[:, 0] > 0, np.where(np.arange(80) == n, 1.0, np.nan)], 1)
        try:
            ll.fit(model, rows, max_steps=1, held_out=0.5)
        except ValueError as error:
            refused += "held_out=" in str(error)
    assert refused > 0


def mean_of(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "data", "guide", "message"),
    [
        (None, ROWS, "auto", "model: expected a callable with pyro.sample, got None"),
        ("gmm", ROWS, "auto", "model: expected a callable with pyro.sample, got 'gmm'"),
        (ll.GaussianMixture, ROWS, "auto", "model: got the class GaussianMixture; make one"),
        (mean_of, ROWS[:, 0], ll.guides.MeanField, "guide: got the class MeanField; make one"),
        (mean_of, ROWS[:, 0], 3, "guide: expected a callable, .* got 3"),
        (mean_of, None, "auto", "data: the model takes x: missing a required argument: 'x'"),
        (mean_of, {"y": ROWS[:, 0]}, "auto", "data: the model takes x: .*dict with their names"),
        (ll.GaussianMixture(2, 2), {"y": ROWS}, "auto", "data: the model takes x, weights, size"),
        (ll.ProbabilisticPCA(2, 1), (ROWS, np.ones(80)), "auto", "weights of rows need a model"),
        (vae(), (COUNTS, np.ones(80)), "auto", "weights of rows need a model"),
    ],
)
def test_a_fit_of_what_cannot_be_called(model, data, guide, message):
    with pytest.raises(TypeError, match=message):
        ll.fit(model, data, guide, **BRIEF)


def test_a_latent_of_one_point_is_no_latent():
    def with_delta(x):
        loc = pyro.sample("loc", dist.Delta(torch.tensor(1.0)))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'loc': is a Delta.* use pyro.deterministic"):
        ll.fit(with_delta, ROWS[:, 0], **BRIEF)


@pytest.mark.parametrize(
    ("model", "rows"), [(mean_of, ROWS[:, 0]), (ll.ProbabilisticPCA(2, 1), ROWS), (vae(), COUNTS)]
)
def test_a_check_needs_draws(model, rows):
    posterior = ll.fit(model, rows, **BRIEF)
    for few in (0, 24, 2.5):
        with pytest.raises(ValueError, match="num_samples must be an int >= 25"):
            posterior.check(num_samples=few)
