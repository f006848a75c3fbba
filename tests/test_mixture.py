"""The labels of a mixture are summed out exactly: brute force over labels agrees everywhere.

Of covariances, :mod:`tests.test_covariances` speaks.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import mixture_log_likelihood
from scipy import stats
from scipy.special import logsumexp
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.fx.experimental.proxy_tensor import make_fx

from latentlab.distributions import NormalMixture

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 5)
NAN = float("nan")


def parameters(rng, K, D, batch=()):
    """Weights, locs and scales of a mixture, float64."""
    weights = rng.dirichlet(np.full(K, 2.0), size=batch)
    locs = 3 * rng.normal(size=(*batch, K, D))
    return tuple(map(torch.from_numpy, (weights, locs, rng.gamma(3.0, size=(*batch, K, D)) / 3)))


def brute_force(x, weights, locs, scales):
    """Log-joints (N, K) of one mixture, one label and one cell at a time; NaN cells left out."""
    x, weights, locs, scales = (np.asarray(v, float) for v in (x, weights, locs, scales))
    cells = stats.norm(locs, scales).logpdf(x[:, None, :])
    return np.log(weights) + np.where(np.isnan(cells), 0.0, cells).sum(-1)


# ---- equal to brute force -----------------------------------------------------------------------


@given(SEEDS, SIZES, SIZES, st.integers(1, 6))
def test_labels_are_summed_out(seed, K, D, N):
    rng = np.random.default_rng(seed)
    mixture, x = parameters(rng, K, D), 4 * rng.normal(size=(N, D))
    log_prob = NormalMixture(*mixture).log_prob(torch.from_numpy(x))
    expected = logsumexp(brute_force(x, *mixture), axis=1)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-12, atol=1e-12)
    if K**N <= 1000:
        total = mixture_log_likelihood(x, *mixture)
        assert log_prob.sum().item() == pytest.approx(total, rel=1e-12)


@given(SEEDS, SIZES, SIZES)
def test_equals_the_mixture_of_torch(seed, K, D):
    rng = np.random.default_rng(seed)
    weights, locs, scales = parameters(rng, K, D, (4,))
    torchs = MixtureSameFamily(Categorical(weights), Independent(Normal(locs, scales), 1))
    ours = NormalMixture(weights, locs, scales)
    x = torch.from_numpy(rng.normal(size=(7, 4, D)))
    torch.testing.assert_close(ours.log_prob(x), torchs.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.mean, torchs.mean)
    torch.testing.assert_close(ours.variance, torchs.variance)


@given(SEEDS, SIZES, SIZES, st.integers(1, 6), st.booleans())
def test_draws_of_a_mixture_share_the_rows(seed, K, D, N, per_draw):
    """Parameters (S, 1, ...) against rows (N, D), or against rows of their own (S, N, D)."""
    rng = np.random.default_rng(seed)
    S = 3
    draws = parameters(rng, K, D, (S,))
    x = rng.normal(size=(S, N, D) if per_draw else (N, D))
    mixture = NormalMixture(*(v.unsqueeze(1) for v in draws))
    assert mixture.batch_shape == (S, 1)
    log_prob = mixture.log_prob(torch.from_numpy(x))
    assert log_prob.shape == (S, N)
    for s in range(S):
        alone = brute_force(x[s] if per_draw else x, *(v[s] for v in draws))
        np.testing.assert_allclose(log_prob[s], logsumexp(alone, axis=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("weights", "locs", "scales", "x"),
    [
        ((2,), (2, 3), (2, 3), (3,)),
        ((2,), (2, 3), (2, 3), (5, 3)),
        ((2,), (4, 1, 2, 3), (2, 3), (5, 3)),
        ((2,), (2, 3), (4, 1, 2, 3), (5, 3)),
        ((4, 1, 2), (2, 3), (2, 3), (5, 3)),
        ((5, 2), (5, 2, 3), (5, 2, 3), (5, 3)),
        ((5, 2), (2, 3), (5, 2, 3), (4, 5, 3)),
        ((4, 1, 2), (4, 1, 2, 3), (4, 1, 2, 3), (3,)),
        ((1, 2), (1, 2, 3), (1, 2, 3), (5, 3)),
        ((6, 1, 1, 2), (6, 1, 1, 2, 3), (4, 1, 2, 3), (4, 5, 3)),
    ],
)
def test_shapes_broadcast_as_those_of_torch(weights, locs, scales, x):
    rng = np.random.default_rng(0)
    w = torch.from_numpy(rng.dirichlet(np.ones(2), size=weights[:-1]))
    m, s = torch.from_numpy(rng.normal(size=locs)), torch.from_numpy(rng.gamma(3.0, size=scales))
    y = torch.from_numpy(rng.normal(size=x))
    batch = torch.broadcast_shapes(weights[:-1], locs[:-2], scales[:-2])
    full = w.expand(*batch, 2), m.expand(*batch, 2, 3), s.expand(*batch, 2, 3)
    torchs = MixtureSameFamily(Categorical(full[0]), Independent(Normal(*full[1:]), 1))
    ours = NormalMixture(w, m, s)
    assert ours.batch_shape == torchs.batch_shape
    torch.testing.assert_close(ours.log_prob(y), torchs.log_prob(y))
    torch.testing.assert_close(ours.mean, torchs.mean)
    torch.testing.assert_close(ours.variance, torchs.variance)
    assert ours.sample((7,)).shape == (7, *batch, 3)


# ---- missing cells ------------------------------------------------------------------------------


@given(SEEDS, SIZES, SIZES)
def test_a_missing_cell_is_integrated_out(seed, K, D):
    rng = np.random.default_rng(seed)
    mixture, x = parameters(rng, K, D), rng.normal(size=(8, D))
    x[rng.random(x.shape) < 0.4] = NAN
    log_prob = NormalMixture(*mixture).log_prob(torch.from_numpy(x))
    np.testing.assert_allclose(
        log_prob, logsumexp(brute_force(x, *mixture), axis=1), rtol=1e-12, atol=1e-12
    )
    for row, value in zip(x, log_prob, strict=True):  # the mixture of the columns that are there
        seen = ~np.isnan(row)
        if seen.any():
            weights, locs, scales = mixture
            margin = NormalMixture(weights, locs[:, seen], scales[:, seen])
            assert margin.log_prob(torch.from_numpy(row[seen])).item() == pytest.approx(value)


def test_the_integral_over_a_missing_cell_is_the_density_of_the_rest():
    mixture = NormalMixture(*parameters(np.random.default_rng(0), 3, 2))
    grid = torch.linspace(-40, 40, 20_001, dtype=torch.float64)
    rows = torch.stack([torch.full_like(grid, 0.7), grid], -1)
    integral = mixture.log_prob(rows).exp().sum() * (grid[1] - grid[0])
    without = mixture.log_prob(torch.tensor([0.7, NAN], dtype=torch.float64))
    assert integral.log().item() == pytest.approx(without.item(), abs=1e-10)


@given(SEEDS, SIZES, SIZES)
def test_a_row_without_a_cell_has_log_density_zero(seed, K, D):
    mixture = NormalMixture(*parameters(np.random.default_rng(seed), K, D))
    row = torch.full((D,), NAN, dtype=torch.float64)
    assert mixture.log_prob(row).item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(mixture.responsibilities(row), mixture.weights)


# ---- symmetries ---------------------------------------------------------------------------------


@given(SEEDS, SIZES, SIZES)
def test_the_order_of_components_columns_and_rows_is_of_no_account(seed, K, D):
    rng = np.random.default_rng(seed)
    weights, locs, scales = parameters(rng, K, D)
    x = torch.from_numpy(rng.normal(size=(6, D)))
    k, d, n = (torch.from_numpy(rng.permutation(size)) for size in (K, D, 6))
    one = NormalMixture(weights, locs, scales)
    other = NormalMixture(weights[k], locs[k][:, d], scales[k][:, d])
    torch.testing.assert_close(one.log_prob(x)[n], other.log_prob(x[n][:, d]))
    torch.testing.assert_close(
        one.responsibilities(x)[n][:, k], other.responsibilities(x[n][:, d])
    )


@given(SEEDS, st.integers(-200, 145), st.floats(-1e12, 1e12))
def test_another_unit_and_origin_shift_the_log_density_by_the_jacobian(seed, exponent, shift):
    rng = np.random.default_rng(seed)
    (weights, locs, scales), unit = parameters(rng, 3, 2), 10.0**exponent
    x = torch.from_numpy(rng.normal(size=(5, 2)))
    base = NormalMixture(weights, locs, scales).log_prob(x)
    rescaled = NormalMixture(weights, unit * locs, unit * scales).log_prob(unit * x)
    torch.testing.assert_close(rescaled + 2 * np.log(unit), base, rtol=1e-10, atol=1e-10)
    # Rounding of the data themselves is all that is lost far from the origin.
    far, near = (x + shift), (locs + shift)
    moved = NormalMixture(weights, near, scales).log_prob(far)
    exact = logsumexp(brute_force(far - shift, weights, near - shift, scales), axis=1)
    np.testing.assert_allclose(moved, exact, rtol=1e-6, atol=1e-6)


# ---- rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 1e6, -3e7])
def test_float32_loses_nothing_to_the_origin(shift):
    """Equal to brute force in float64 at the numbers that float32 stores."""
    rng = np.random.default_rng(1)
    weights, locs, scales = (v.float() for v in parameters(rng, 4, 3))
    locs, scales = 10 * locs + shift, 10 * scales
    x = torch.from_numpy(30 * rng.normal(size=(200, 3)) + shift).float()
    log_prob = NormalMixture(weights, locs, scales).log_prob(x)
    assert log_prob.dtype == torch.float32
    np.testing.assert_allclose(
        log_prob, logsumexp(brute_force(x, weights, locs, scales), axis=1), rtol=1e-6, atol=1e-4
    )


@pytest.mark.parametrize("apart", [1e2, 1e4, 1e6])
def test_rounding_grows_with_the_square_of_the_distance_in_scales(apart):
    locs = torch.tensor([[0.0], [2 * apart]], dtype=torch.float64)
    weights, scales = torch.full((2,), 0.5).double(), torch.ones(2, 1).double()
    x = torch.cat([locs[k] + torch.linspace(-3, 3, 101, dtype=torch.float64) for k in (0, 1)])
    log_prob = NormalMixture(weights, locs, scales).log_prob(x[:, None])
    exact = logsumexp(brute_force(x[:, None], weights, locs, scales), axis=1)
    assert np.abs(log_prob.numpy() - exact).max() < 4e-16 * apart**2 + 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [1e2, 1e8, 1e12])
def test_row_26_an_extreme_outlier_is_finite_and_has_a_finite_gradient(dtype, distance):
    leaves = [v.to(dtype).requires_grad_() for v in parameters(np.random.default_rng(2), 3, 2)]
    x = torch.tensor([[0.0, 0.0], [distance, 0.0], [-distance, distance]], dtype=dtype)
    log_prob = NormalMixture(*leaves).log_prob(x)
    assert log_prob.isfinite().all()
    assert log_prob[1] < -1e3
    log_prob.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


# ---- gradients ----------------------------------------------------------------------------------


@given(SEEDS, SIZES, SIZES)
def test_gradients_are_those_of_brute_force(seed, K, D):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(6, D)))
    x[torch.from_numpy(rng.random((6, D)) < 0.3)] = NAN
    weights, locs, scales = (v.requires_grad_() for v in parameters(rng, K, D))
    cells = Normal(locs, scales).log_prob(x.nan_to_num(0.0)[:, None])
    joint = weights.log() + torch.where(x[:, None].isnan(), 0.0, cells).sum(-1)
    slopes = torch.from_numpy(rng.normal(size=6))
    expected = torch.autograd.grad(joint.logsumexp(-1) @ slopes, (weights, locs, scales))
    ours = NormalMixture(weights, locs, scales).log_prob(x)
    for found, exact in zip(
        torch.autograd.grad(ours @ slopes, (weights, locs, scales)), expected, strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def test_second_derivatives_are_those_of_the_first():
    rng = np.random.default_rng(3)
    weights, locs, scales = parameters(rng, 2, 2)
    x = torch.from_numpy(rng.normal(size=(5, 2)))

    def log_prob(locs, log_scales):
        return NormalMixture(weights, locs, log_scales.exp()).log_prob(x).sum()

    leaves = [v.requires_grad_() for v in (locs, scales.log())]
    assert torch.autograd.gradcheck(log_prob, leaves)
    assert torch.autograd.gradgradcheck(log_prob, leaves)


def test_a_missing_cell_has_no_gradient():
    x = torch.tensor([[0.5, NAN]], dtype=torch.float64, requires_grad=True)
    mixture = NormalMixture(*parameters(np.random.default_rng(4), 2, 2))
    (slope,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    assert slope[0, 0] != 0
    assert slope[0, 1] == 0


# ---- labels and draws ---------------------------------------------------------------------------


@given(SEEDS, SIZES, SIZES)
def test_responsibilities_are_bayes_rule(seed, K, D):
    rng = np.random.default_rng(seed)
    mixture, x = parameters(rng, K, D), rng.normal(size=(6, D))
    x[0, 0] = NAN
    found = NormalMixture(*mixture).responsibilities(torch.from_numpy(x))
    joint = brute_force(x, *mixture)
    bayes = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
    np.testing.assert_allclose(found, bayes, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-14)


def test_draws_have_the_mean_and_variance_of_the_mixture():
    torch.manual_seed(0)
    S = 40_000
    mixture = NormalMixture(*parameters(np.random.default_rng(5), 3, 2, (2,)))
    draws = mixture.sample((S,))
    assert draws.shape == (S, 2, 2)
    squares = (draws - mixture.mean) ** 2
    for values, exact in ((draws, mixture.mean), (squares, mixture.variance)):
        assert ((values.mean(0) - exact).abs() < 4.5 * values.std(0) / S**0.5).all()


def test_draws_come_from_their_density():
    torch.manual_seed(1)
    weights, locs, scales = parameters(np.random.default_rng(6), 3, 1)
    draws = NormalMixture(weights, locs, scales).sample((5000,))[:, 0]

    def cdf(x):
        return stats.norm(locs[:, 0], scales[:, 0]).cdf(x[:, None]) @ weights.numpy()

    assert stats.kstest(draws.numpy(), cdf).pvalue > 1e-3


def test_a_mixture_of_one_is_a_normal():
    locs, scales = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]])
    mixture, normal = NormalMixture(torch.ones(1), locs, scales), Normal(locs, scales)
    x = torch.randn(10, 2)
    torch.testing.assert_close(mixture.log_prob(x), normal.log_prob(x).sum(-1))
    torch.testing.assert_close(mixture.mean, locs[0])
    torch.testing.assert_close(mixture.variance, scales[0] ** 2)


def test_a_component_of_weight_zero_is_not_there():
    weights = torch.tensor([1.0, 0.0])
    locs, scales = torch.tensor([[0.0], [5.0]]), torch.ones(2, 1)
    mixture, x = NormalMixture(weights, locs, scales), torch.tensor([[5.0]])
    torch.testing.assert_close(mixture.log_prob(x), Normal(0.0, 1.0).log_prob(x)[:, 0])
    assert mixture.responsibilities(x).tolist() == [[1.0, 0.0]]


# ---- a distribution like others -----------------------------------------------------------------


def test_expanding_repeats_the_density_and_draws_independently():
    rng = np.random.default_rng(7)
    mixture = NormalMixture(*(v[:, None] for v in parameters(rng, 2, 3, (2,))))
    large = mixture.expand((4, 2, 5))
    assert isinstance(large, NormalMixture)
    assert (large.batch_shape, large.event_shape) == ((4, 2, 5), (3,))
    assert large.locs is mixture.locs
    x = torch.from_numpy(rng.normal(size=(5, 3)))
    torch.testing.assert_close(large.log_prob(x), mixture.log_prob(x).expand(4, 2, 5))
    torch.testing.assert_close(large.mean, mixture.mean.expand(4, 2, 5, 3))
    assert len(large.sample().reshape(-1, 3).unique(dim=0)) == 40
    with pytest.raises(ValueError, match=r"batch_shape: expected .* \(2, 1\) .* got \(2,\)"):
        mixture.expand((2,))
    one_row = NormalMixture(*parameters(rng, 2, 3)).expand((6,))
    assert one_row.log_prob(x[0]).shape == (6,)


def test_the_dtype_is_the_wider_of_parameters_and_rows():
    weights, locs, scales = parameters(np.random.default_rng(8), 2, 2)
    x = torch.zeros(3, 2)
    single = NormalMixture(weights.float(), locs.float(), scales.float())
    assert single.log_prob(x).dtype == torch.float32
    assert single.log_prob(x.double()).dtype == torch.float64
    assert NormalMixture(weights, locs, scales).log_prob(x).dtype == torch.float64


@pytest.mark.parametrize(
    ("weights", "locs", "scales"),
    [((3,), (2, 1), (2, 1)), ((2,), (2, 1), (2, 2)), ((2,), (3, 1), (2, 1)), ((2,), (2,), (2,))],
)
def test_shapes_that_disagree_are_named(weights, locs, scales):
    with pytest.raises(ValueError, match="weights, locs, scales: expected shapes .* got"):
        NormalMixture(torch.ones(weights), torch.zeros(locs), torch.ones(scales))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", [0.5, 0.4]),
        ("weights", [1.5, -0.5]),
        ("scales", [[1.0], [0.0]]),
        ("scales", [[1.0], [-1.0]]),
        ("locs", [[NAN], [0.0]]),
    ],
)
def test_validation_names_the_argument_out_of_its_support(name, value):
    good = {"weights": [0.5, 0.5], "locs": [[0.0], [1.0]], "scales": [[1.0], [1.0]]}
    arguments = {key: torch.tensor(number) for key, number in (good | {name: value}).items()}
    with pytest.raises(ValueError, match=f"parameter {name} "):
        NormalMixture(**arguments, validate_args=True)
    NormalMixture(**arguments, validate_args=False)


def test_validation_takes_missing_cells_and_refuses_infinite_ones():
    mixture = NormalMixture(*parameters(np.random.default_rng(9), 2, 2), validate_args=True)
    assert mixture.log_prob(torch.tensor([[NAN, 1.0]]).double()).isfinite().all()
    for wrong in (torch.tensor([[torch.inf, 1.0]]), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match=r"support|dimension|size"):
            mixture.log_prob(wrong.double())
    assert mixture.expand((4,))._validate_args


def test_the_density_can_be_traced_and_reads_no_value():
    """A graph recorded on one set of rows is right on another, missing cells and all."""
    rng = np.random.default_rng(10)
    draws = [v[:, None] for v in parameters(rng, 3, 2, (4,))]

    def value_and_slope(weights, locs, scales, x):
        log_prob = NormalMixture(weights, locs, scales, validate_args=False).log_prob(x)
        return log_prob, *torch.autograd.grad(log_prob.sum(), (weights, locs, scales))

    x = torch.from_numpy(rng.normal(size=(6, 2)))
    leaves = [v.requires_grad_() for v in draws]
    graph = make_fx(value_and_slope)(*leaves, x)
    other = torch.where(torch.from_numpy(rng.random((6, 2)) < 0.3), NAN, 3 * x)
    moved = [leaves[0], leaves[1] + 1, 2 * leaves[2]]
    for found, expected in zip(graph(*moved, other), value_and_slope(*moved, other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_mixtures_survive_vmap():
    rng = np.random.default_rng(11)
    draws, x = parameters(rng, 3, 2, (4,)), torch.from_numpy(rng.normal(size=(6, 2)))

    def log_prob(weights, locs, scales):
        return NormalMixture(weights, locs, scales, validate_args=False).log_prob(x)

    one_by_one = torch.stack([log_prob(*draw) for draw in zip(*draws, strict=True)])
    torch.testing.assert_close(torch.vmap(log_prob)(*draws), one_by_one)
