"""Likelihoods are densities of what they say, whatever is missing, in whatever units."""

import itertools
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import softmax
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import softplus

from latentlab.distributions import (
    Bernoulli,
    Categorical,
    Columns,
    Gaussian,
    Likelihood,
    Poisson,
    likelihood_of,
)

SEEDS = st.integers(0, 2**32 - 1)
NAN = float("nan")


class Laplace(Likelihood):
    """One of a user's own."""

    per_cell = 2

    def cells(self, params):
        loc, raw_scale = self.split(params)
        return dist.Laplace(loc, softplus(raw_scale))


def mixed():
    return Columns(["gaussian", Categorical(3), "poisson", "gaussian", "bernoulli"])


FAMILIES = {
    "gaussian": Gaussian,
    "gaussian, a scale each": lambda: Gaussian("column"),
    "gaussian, fixed": lambda: Gaussian(0.7),
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "categorical": lambda: Categorical(4),
    "your own": Laplace,
}
WHOLE = {"bernoulli": 2, "poisson": 60, "categorical": 4}  # values that matter of each
GRID_ERROR = {"your own": 3e-5}  # a density with an edge
EVERY = pytest.mark.parametrize("name", FAMILIES)


def values_of(name, like):
    """A grid over the support, with the weight of each value in a sum or an integral."""
    if name in WHOLE:
        return torch.arange(WHOLE[name]).to(like), 1.0
    grid = torch.linspace(-60, 60, 24_001, dtype=like.dtype)
    return grid, 120 / 24_000


def draws(name, rng, shape):
    if name == "poisson":
        return torch.from_numpy(rng.poisson(3.0, size=shape).astype(float))
    if name in WHOLE:
        return torch.from_numpy(rng.integers(WHOLE[name], size=shape).astype(float))
    return torch.from_numpy(3 + 2 * rng.normal(size=shape))


def measured(name, rng, shape=(5,)):
    """A likelihood of rows of this shape, that has seen data, and numbers of a decoder for 3."""
    likelihood = FAMILIES[name]().bind(shape).double()
    likelihood.measure(draws(name, rng, (40, *shape)))
    first, *others = shape
    size = (3, likelihood.num_params(first), *others)
    return likelihood, torch.from_numpy(0.5 * rng.normal(size=size))


# ---- densities ----------------------------------------------------------------------------------


@EVERY
@given(SEEDS)
def test_each_cell_sums_to_one(name, seed):
    likelihood, params = measured(name, np.random.default_rng(seed), (1,))
    grid, width = values_of(name, params)
    total = likelihood.distribution(params).log_prob(grid[:, None, None]).exp().sum(0) * width
    np.testing.assert_allclose(total.detach(), 1.0, rtol=GRID_ERROR.get(name, 1e-9))


def test_a_row_of_several_kinds_sums_to_one():
    rng = np.random.default_rng(0)
    likelihood = Columns(["poisson", Categorical(3), "gaussian", "bernoulli"]).bind((4,)).double()
    params = torch.from_numpy(rng.normal(size=likelihood.num_params(4)))
    axes = [range(40), range(3), np.linspace(-9, 9, 181), range(2)]
    rows = torch.tensor(list(itertools.product(*axes))).double()
    total = likelihood.distribution(params).log_prob(rows).exp().sum() * 0.1
    assert total.item() == pytest.approx(1.0, abs=1e-6)


def test_cells_are_those_of_scipy():
    rng = np.random.default_rng(1)
    eta = rng.normal(size=(3, 4))
    counts = rng.poisson(2.0, size=(3, 4))

    def ours(likelihood, x):
        found = likelihood.bind((4,)).double().distribution(torch.tensor(eta))
        return found.log_prob(torch.tensor(x).double())

    expected = stats.poisson(np.exp(eta)).logpmf(counts).sum(1)
    np.testing.assert_allclose(ours(Poisson(), counts), expected, rtol=1e-12)
    expected = stats.bernoulli(1 / (1 + np.exp(-eta))).logpmf(counts % 2).sum(1)
    np.testing.assert_allclose(ours(Bernoulli(), counts % 2), expected, rtol=1e-12)
    expected = stats.norm(eta, 0.3).logpdf(counts).sum(1)
    np.testing.assert_allclose(ours(Gaussian(0.3), counts), expected, rtol=1e-12)


def test_the_numbers_of_a_category_lie_a_stride_apart():
    rng = np.random.default_rng(2)
    eta, codes = rng.normal(size=(3, 2, 4)), rng.integers(3, size=(2, 4))
    probs = softmax(eta, 0)
    expected = sum(np.log(probs[codes[c, d], c, d]) for c in range(2) for d in range(4))
    image = Categorical(3).bind((2, 2, 2)).double()
    params, x = torch.tensor(eta).reshape(6, 2, 2), torch.tensor(codes).reshape(2, 2, 2)
    assert image.distribution(params).log_prob(x.double()).item() == pytest.approx(expected)


@EVERY
def test_draws_have_the_mean_they_are_said_to_have(name):
    if name == "categorical":
        pytest.skip("codes have no mean; the most probable one is tested below")
    likelihood, params = measured(name, np.random.default_rng(3))
    torch.manual_seed(0)
    drawn = likelihood.distribution(params[0]).sample((20_000,))
    se = drawn.std(0) / 20_000**0.5
    assert ((drawn.mean(0) - likelihood.mean(params[0])).abs() < 5 * se).all()
    spread = likelihood.distribution(params[0]).variance.sqrt()
    torch.testing.assert_close(drawn.std(0), spread, rtol=0.1, atol=0.02)


def test_the_average_over_decodings_is_the_mean_and_for_codes_the_most_probable_one():
    """Two decodings, three to one: a code that both find likely beats the favourite of either."""
    kinds = Columns(["gaussian", Categorical(3)]).bind((2,))
    shares = np.array([[0.5, 0.0001, 0.4999], [0.0001, 0.6, 0.3999]])
    params = torch.cat([torch.tensor([[1.0], [5.0]]), torch.tensor(shares).log()], 1).double()
    weights = torch.tensor([0.75, 0.25]).double()
    found = kinds.average(params[:, None], weights[:, None])
    assert found.shape == (1, 2)
    assert found[0, 0].item() == pytest.approx(0.75 * 1 + 0.25 * 5)
    assert found[0, 1] == (weights.numpy() @ shares).argmax() == 2


def test_the_mean_of_codes_is_the_most_probable_one():
    likelihood = Categorical(3).bind((2,)).double()
    params = torch.tensor([0.0, 2.0, 1.0, 0.0, 2.0, 1.0]).double()  # (C, D), flat
    assert likelihood.mean(params).tolist() == [2.0, 0.0]


@EVERY
def test_zero_is_the_column_on_its_own(name):
    if name in ("categorical", "your own"):
        pytest.skip("it has no mean, or measures nothing")
    rng = np.random.default_rng(4)
    likelihood = FAMILIES[name]().bind((2,)).double()
    x = draws(name, rng, (20_000, 2))
    likelihood.measure(x)
    params = torch.zeros(likelihood.num_params(2)).double()
    torch.testing.assert_close(likelihood.mean(params), x.mean(0), rtol=1e-3, atol=1e-3)


def test_zero_gives_codes_their_frequencies():
    likelihood = Categorical(3).bind((1,)).double()
    likelihood.measure(torch.tensor([[0.0], [2.0], [2.0], [NAN]]))
    log_prob = likelihood.distribution(torch.zeros(3).double()).log_prob(
        torch.arange(3.0)[:, None]
    )
    np.testing.assert_allclose(log_prob.exp(), np.array([1.5, 0.5, 2.5]) / 4.5)


# ---- missing cells ------------------------------------------------------------------------------


@EVERY
@given(SEEDS, st.integers(0, 4))
def test_a_missing_cell_is_integrated_out(name, seed, d):
    rng = np.random.default_rng(seed)
    likelihood, params = measured(name, rng)
    x, row = draws(name, rng, (5,)), likelihood.distribution(params)
    grid, width = values_of(name, params)
    filled = x.repeat(len(grid), 1)
    filled[:, d] = grid
    expected = row.log_prob(filled[:, None]).exp().sum(0) * width
    x[d] = NAN
    found, tol = row.log_prob(x).exp().detach(), GRID_ERROR.get(name, 1e-9)
    np.testing.assert_allclose(found, expected.detach(), rtol=tol)


@EVERY
def test_a_row_that_is_all_missing_says_nothing(name):
    likelihood, params = measured(name, np.random.default_rng(5))
    params.requires_grad_()
    log_prob = likelihood.distribution(params).log_prob(torch.full((5,), NAN).double())
    assert log_prob.tolist() == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(log_prob.sum(), params, allow_unused=True)
    assert gradient is None or (gradient == 0).all()


@EVERY
def test_missing_cells_do_not_move_what_is_measured(name):
    rng = np.random.default_rng(6)
    x = draws(name, rng, (30, 5))
    one, other = (FAMILIES[name]().bind((5,)).double() for _ in range(2))
    one.measure(x)
    other.measure(torch.cat([x, torch.full((20, 5), NAN)]))
    for value, expected in zip(other.buffers(), one.buffers(), strict=True):
        torch.testing.assert_close(value, expected)


# ---- shapes -------------------------------------------------------------------------------------


@EVERY
@given(SEEDS, st.sampled_from([(4,), (2, 3, 2)]))
def test_shapes_are_those_of_rows(name, seed, shape):
    rng = np.random.default_rng(seed)
    likelihood, params = measured(name, rng, shape)
    row = likelihood.distribution(params)
    assert (row.batch_shape, row.event_shape) == ((3,), shape)
    assert likelihood.mean(params).shape == (3, *shape)
    x = draws(name, rng, (3, *shape))
    assert row.sample((2,)).shape == (2, 3, *shape)
    assert row.support.check(row.sample((2,))).all()
    assert row.support.check(x).shape == (3,)
    larger = row.expand((7, 3))
    torch.testing.assert_close(larger.log_prob(x), row.log_prob(x).expand(7, 3))
    assert larger.sample().shape == (7, 3, *shape)
    first, *others = shape
    inputs = likelihood.inputs(torch.cat([x, torch.full_like(x, NAN)]))
    assert inputs.shape == (6, likelihood.num_inputs(first), *others)
    assert not inputs[:3].isnan().any()
    assert inputs[3:].isnan().all()
    assert likelihood.num_cells(likelihood.num_params(first)) == first


@given(SEEDS)
def test_particles_are_rows_one_by_one(seed):
    rng = np.random.default_rng(seed)
    likelihood = mixed().bind((5,)).double()
    params = torch.from_numpy(rng.normal(size=(4, 3, likelihood.num_params(5))))
    x = likelihood.distribution(params[0]).sample()
    together = likelihood.distribution(params).log_prob(x)
    singles = [likelihood.distribution(params[s]).log_prob(x) for s in range(4)]
    torch.testing.assert_close(together, torch.stack(singles))


@given(SEEDS, st.permutations(range(5)))
def test_the_order_of_columns_does_not_matter(seed, order):
    rng = np.random.default_rng(seed)
    kinds = ["gaussian", Poisson(), Categorical(3), "gaussian", Bernoulli()]
    one = Columns(kinds).bind((5,)).double()
    other = Columns([kinds[d] for d in order]).bind((5,)).double()
    x = torch.from_numpy(np.stack([rng.integers(2, size=9) for _ in range(5)], 1).astype(float))
    x[0, 2] = NAN
    for likelihood, rows in ((one, x), (other, x[:, list(order)])):
        likelihood.measure(rows)
    zero = torch.zeros(9, one.num_params(5)).double()
    found = other.distribution(zero).log_prob(x[:, list(order)])
    torch.testing.assert_close(found, one.distribution(zero).log_prob(x))
    torch.testing.assert_close(other.mean(zero), one.mean(zero)[:, list(order)])
    assert other.inputs(x[:, list(order)]).shape == (9, 7)


@EVERY
def test_likelihoods_can_be_traced(name):
    rng = np.random.default_rng(7)
    likelihood, params = measured(name, rng)
    x = draws(name, rng, (3, 5))
    x[0, 0] = NAN

    def log_prob(params, x):
        return likelihood.distribution(params).log_prob(x)

    flags = {"validate_distributions_pyro": False, "validate_distributions_torch": False}
    with pyro.settings.context(**flags):
        torch.testing.assert_close(make_fx(log_prob)(params, x)(params, x), log_prob(params, x))


@pytest.mark.parametrize(
    "make",
    [Bernoulli, Poisson, lambda: Gaussian("column", "table"), lambda: Categorical(3), mixed],
)
def test_a_likelihood_is_built_again_from_its_description(make):
    likelihood = make().bind((5,))
    again = likelihood_of(likelihood.spec()).bind((5,))
    assert again.spec() == likelihood.spec()
    again.load_state_dict(likelihood.state_dict())
    params = torch.randn(2, likelihood.num_params(5))
    x = likelihood.distribution(params).sample()
    torch.testing.assert_close(
        again.distribution(params).log_prob(x), likelihood.distribution(params).log_prob(x)
    )
    assert Laplace().spec() is None
    assert Columns([Laplace(), "poisson"]).spec() is None


# ---- units --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "offset"), [(1e-200, 0.0), (1e150, 0.0), (1e3, 1e12), (5, -7)])
@pytest.mark.parametrize("units", ["column", "table"])
def test_a_gaussian_has_the_units_of_its_columns(scale, offset, units):
    torch.manual_seed(0)
    y = torch.randn(50, 3).double()
    one, other = (Gaussian(units=units).bind((3,)).double() for _ in range(2))
    one.measure(y)
    other.measure(y * scale + offset)
    params = torch.randn(50, 3).double()
    expected = one.distribution(params).log_prob(y) - 3 * np.log(scale)
    found = other.distribution(params).log_prob(y * scale + offset)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.inputs(y * scale + offset), one.inputs(y), rtol=0, atol=1e-5)


def test_digits_far_from_zero_are_kept_in_single_precision():
    likelihood = Gaussian().bind((1,))
    x = 1e12 + torch.randn(100, 1).double() * 1e3
    likelihood.measure(x)
    log_prob = likelihood.distribution(torch.zeros(100, 1)).log_prob(x)
    assert log_prob.dtype == torch.float32
    expected = stats.norm(x.mean().item(), x.std(correction=0).item()).logpdf(x).sum(1)
    np.testing.assert_allclose(log_prob.detach(), expected, rtol=1e-4)


def test_a_constant_column_has_a_unit():
    likelihood = Gaussian().bind((2,)).double()
    likelihood.measure(torch.tensor([[0.0, -5.0], [0.0, -5.0]]).double())
    assert likelihood.unit.tolist() == [1.0, 5.0]


def test_a_fixed_scale_is_in_the_units_of_the_data():
    x = torch.tensor([[0.0], [10.0]]).double()
    likelihood = Gaussian(2.0).bind((1,)).double()
    likelihood.measure(x)
    assert likelihood.scale.item() == pytest.approx(2.0)
    expected = stats.norm(5.0, 2.0).logpdf(x)[:, 0]
    np.testing.assert_allclose(
        likelihood.distribution(torch.zeros(2, 1).double()).log_prob(x), expected
    )


# ---- bad inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likelihood", "x", "message"),
    [
        (Bernoulli(), [0.0, 255.0], r"x: expected \[0, 1\], got max 255; divide by 255"),
        (Bernoulli(), [-0.5, 1.0], r"x: expected \[0, 1\], got min -0.5; take the Gaussian"),
        (Poisson(), [1.0, -2.0], r"x: expected counts .* got -2 at \[1, 0\]"),
        (Poisson(), [1.0, 2.5], r"x: expected counts .* got 2.5 at \[1, 0\]"),
        (Categorical(3), [0.0, 3.0], r"codes 0 to 2 \(num_categories=3\), got 3 at \[1, 0\]"),
        (Categorical(3), [0.0, 0.5], r"codes 0 to 2 .* got 0.5"),
        (Columns(["poisson"]), [0.0, -1.0], r"x\[:, 0\]: expected counts .* got -1 at \[1\]"),
    ],
)
def test_cells_that_cannot_be_are_refused(likelihood, x, message):
    cells = torch.tensor(x)[:, None]
    with pytest.raises(ValueError, match=message):
        likelihood.check(cells)
    cells[1] = NAN
    likelihood.check(cells if x[0] >= 0 else cells.abs())


@pytest.mark.parametrize(
    ("most", "way"),
    [
        (254.0, "x / 255.0"),
        (2.0, "by 2 or take the Poisson"),
        (100.0, "x / 255.0"),
        (2.5, "divide by 2.5"),
    ],
)
def test_bytes_are_told_from_other_numbers(most, way):
    with pytest.raises(ValueError, match=way):
        Bernoulli().bind((2,)).check(torch.tensor([[0.0, most]]))


def test_a_share_beyond_one_by_rounding_is_clamped():
    x = torch.tensor([[1.0000001], [0.0]])
    with pytest.warns(UserWarning, match="clamped"):
        Bernoulli().check(x)
    row = Bernoulli().bind((1,)).distribution(torch.tensor([[3.0]]))
    assert row.log_prob(x)[0] == row.log_prob(torch.ones(1, 1))[0]
    assert row.support.check(x).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Bernoulli().check(torch.tensor([[1.0], [0.0], [0.3]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical(1), "num_categories must be an int >= 2, got 1"),
        (lambda: Categorical(2.5), "num_categories must be an int >= 2, got 2.5"),
        (lambda: Gaussian(0.0), "scale: expected"),
        (lambda: Gaussian(True), "scale: expected"),
        (lambda: Gaussian("learned"), "scale: expected .* got 'learned'"),
        (lambda: Gaussian(units="row"), "units: expected"),
        (lambda: Columns([]), "kinds: expected one for each column"),
        (lambda: Columns("poisson"), "kinds: expected one for each column"),
        (lambda: Columns([mixed()]), "got Columns in Columns"),
        (lambda: Columns(["poisson"]).bind((2,)), "for each of the 2 columns, got 1"),
        (lambda: Columns(["poisson"]).bind((1, 2, 2)), "expected a table"),
        (lambda: mixed().num_cells(5), "expected 7 numbers for these 5 columns, got 5"),
        (lambda: Categorical(3).num_cells(7), "expected a multiple of 3 numbers"),
        (lambda: likelihood_of("normal"), "likelihood: expected 'gaussian'"),
    ],
)
def test_faults_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_likelihood_of_your_own_has_to_say_what_a_cell_is():
    with pytest.raises(TypeError, match=r"expected a method cells\(params\)"):
        Likelihood().bind((1,)).distribution(torch.zeros(1))
