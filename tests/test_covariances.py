"""Mixtures with covariances: exact to the last digits, with any cells missing, by any way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture as Peer
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.fx.experimental.proxy_tensor import make_fx

from latentlab.distributions import NormalMixture, mixture, quadratic

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 4)
NAN = float("nan")


def parameters(rng, K, D, batch=()):
    """Weights, locs and Cholesky factors of a mixture, float64."""
    weights = rng.dirichlet(np.full(K, 2.0), size=batch)
    locs = 3 * rng.normal(size=(*batch, K, D))
    trils = np.tril(rng.normal(size=(*batch, K, D, D)), -1)
    trils += rng.gamma(3.0, size=(*batch, K, D))[..., None] / 3 * np.eye(D)
    return tuple(map(torch.from_numpy, (weights, locs, trils)))


def of(weights, locs, trils, **settings):
    return NormalMixture(weights, locs, scale_trils=trils, **settings)


def brute_force(x, weights, locs, trils):
    """Log-joints (N, K), one row and label at a time, of the columns that are there."""
    x, weights, locs, trils = (np.asarray(v, float) for v in (x, weights, locs, trils))
    joint = np.tile(np.log(weights), (len(x), 1))
    for n, row in enumerate(x):
        seen = ~np.isnan(row)
        for k in range(len(weights)):
            if seen.any():
                covariance = (trils[k] @ trils[k].T)[np.ix_(seen, seen)]
                normal = stats.multivariate_normal(locs[k, seen], covariance)
                joint[n, k] += normal.logpdf(row[seen])
    return joint


def rows_of(rng, N, D, missing=0.0):
    x = 4 * rng.normal(size=(N, D))
    x[rng.random((N, D)) < missing] = NAN
    return torch.from_numpy(x)


def by_patterns(density, x):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "_CELLS", 0)
        return density.log_prob(x)


def row_by_row(density, x):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "_CELLS", math.inf)
        return density.log_prob(x)


def in_a_graph(density, x):
    graph = make_fx(lambda rows: density.log_prob(rows))(
        torch.zeros_like(x)
    )  # recorded on rows without a hole
    return graph(x)


def with_a_gradient(density, x):
    return density.log_prob(x.clone().requires_grad_()).detach()


WAYS = [by_patterns, row_by_row, in_a_graph, with_a_gradient]


# ---- equal to brute force -----------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=30)
@given(SEEDS, SIZES, SIZES, st.integers(1, 6), st.sampled_from([0.0, 0.3, 0.8]))
def test_labels_and_missing_cells_are_integrated_out(way, seed, K, D, N, missing):
    rng = np.random.default_rng(seed)
    given, x = parameters(rng, K, D), rows_of(rng, N, D, missing)
    expected = logsumexp(brute_force(x, *given), axis=1)
    found = way(of(*given, validate_args=False), x)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@given(SEEDS, SIZES, SIZES, st.floats(0, 0.5))
def test_responsibilities_are_bayes_rule(seed, K, D, missing):
    rng = np.random.default_rng(seed)
    given, x = parameters(rng, K, D), rows_of(rng, 5, D, missing)
    joint = brute_force(x, *given)
    bayes = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
    np.testing.assert_allclose(of(*given).responsibilities(x), bayes, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize(("N", "D", "K"), [(400, 3, 4), (300, 12, 3)])
def test_each_row_is_as_likely_as_in_scikit_learn(covariance, N, D, K):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)) @ rng.normal(size=(D, D)) + 5 * rng.integers(0, 3, size=(N, 1))
    peer = Peer(K, covariance_type=covariance, max_iter=8, tol=1e-1, random_state=0).fit(x)
    spread = torch.from_numpy(peer.covariances_)
    if covariance in ("full", "tied"):
        trils = torch.linalg.cholesky(spread)
        shape = {"scale_trils": trils if covariance == "full" else trils[None]}
    else:
        scales = spread.sqrt()
        shape = {"scales": scales if covariance == "diag" else scales[:, None]}
    density = NormalMixture(
        torch.from_numpy(peer.weights_), torch.from_numpy(peer.means_), **shape
    )
    found = density.log_prob(torch.from_numpy(x))
    np.testing.assert_allclose(found, peer.score_samples(x), rtol=0, atol=1e-8)
    odds = density.responsibilities(torch.from_numpy(x))
    np.testing.assert_allclose(odds, peer.predict_proba(x), rtol=0, atol=1e-8)


@given(SEEDS, SIZES, SIZES, st.floats(0, 0.5))
def test_draws_of_a_mixture_share_the_rows(seed, K, D, missing):
    rng = np.random.default_rng(seed)
    draws, x = parameters(rng, K, D, (3,)), rows_of(rng, 5, D, missing)
    density = of(*(v.unsqueeze(1) for v in draws))
    assert density.batch_shape == (3, 1)
    log_prob, joint = density.log_prob(x), density.component_log_prob(x)
    assert log_prob.shape == (3, 5)
    assert joint.shape == (3, 5, K)
    for s in range(3):
        alone = brute_force(x, *(v[s] for v in draws))
        np.testing.assert_allclose(joint[s], alone, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(log_prob[s], logsumexp(alone, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("weights", "locs", "trils", "x"),
    [
        ((2,), (2, 3), (2, 3, 3), (3,)),
        ((2,), (2, 3), (1, 3, 3), (5, 3)),
        ((2,), (4, 1, 2, 3), (1, 3, 3), (5, 3)),
        ((4, 1, 2), (2, 3), (4, 1, 2, 3, 3), (5, 3)),
        ((5, 2), (5, 2, 3), (5, 2, 3, 3), (5, 3)),
        ((5, 2), (2, 3), (5, 1, 3, 3), (4, 5, 3)),
        ((1, 2), (1, 2, 3), (1, 2, 3, 3), (5, 3)),
        ((2,), (2, 3), (2, 3, 3), (4, 5, 3)),
        ((6, 1, 1, 2), (6, 1, 1, 2, 3), (4, 1, 2, 3, 3), (4, 5, 3)),
    ],
)
def test_shapes_broadcast_as_those_of_torch(weights, locs, trils, x):
    rng = np.random.default_rng(0)
    w = torch.from_numpy(rng.dirichlet(np.ones(2), size=weights[:-1]))
    m, y = torch.from_numpy(rng.normal(size=locs)), torch.from_numpy(rng.normal(size=x))
    factor = torch.from_numpy(np.tril(rng.normal(size=trils), -1) + np.eye(3))
    batch = torch.broadcast_shapes(weights[:-1], locs[:-2], trils[:-3])
    full = w.expand(*batch, 2), m.expand(*batch, 2, 3), factor.expand(*batch, 2, 3, 3)
    torchs = MixtureSameFamily(
        Categorical(full[0]),
        MultivariateNormal(full[1], scale_tril=full[2], validate_args=False),
        validate_args=False,
    )
    ours = of(w, m, factor)
    assert ours.batch_shape == torchs.batch_shape
    torch.testing.assert_close(ours.log_prob(y), torchs.log_prob(y))
    torch.testing.assert_close(ours.mean, torchs.mean)
    torch.testing.assert_close(ours.variance, torchs.variance)
    assert ours.sample((7,)).shape == (7, *batch, 3)
    assert ours.expand((1, *batch)).log_prob(y).dim() == max(y.dim() - 1, len(batch) + 1)


# ---- rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("near", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_rows_near_a_line_lose_no_digits(near, shift):
    """Of x = mu + L z the density is that of z over the volume."""
    rng = np.random.default_rng(1)
    tril = torch.tensor([[1.0, 0.0], [1.0, near]], dtype=torch.float64)
    z = torch.from_numpy(rng.normal(size=(200, 2)))
    x = shift + z @ tril.T
    z = torch.linalg.solve_triangular(tril, (x - shift).T, upper=False).T  # as x holds it
    exact = -0.5 * z.square().sum(1) - np.log(near) - np.log(2 * np.pi)
    locs = torch.full((2, 2), shift, dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    found = of(weights, locs, tril.expand(2, 2, 2)).log_prob(x)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unit", [1e-200, 1e-30, 1e140])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_another_unit_shifts_the_log_density_by_the_jacobian(unit, missing):
    rng = np.random.default_rng(2)
    (weights, locs, trils), x = parameters(rng, 3, 2), rows_of(rng, 8, 2, missing)
    units = torch.tensor([unit, 3.0], dtype=torch.float64)
    base = of(weights, locs, trils).log_prob(x)
    moved = of(weights, units * locs, units[:, None] * trils).log_prob(units * x)
    jacobian = ((~x.isnan()) * units.log()).sum(1)
    torch.testing.assert_close(moved + jacobian, base, rtol=1e-9, atol=1e-9)


def test_float32_is_computed_in_float64():
    rng = np.random.default_rng(3)
    given = tuple(v.float() for v in parameters(rng, 3, 4))
    x = rows_of(rng, 30, 4, 0.2).float()
    found = of(*given).log_prob(x)
    assert found.dtype == torch.float32
    exact = of(*(v.double() for v in given)).log_prob(x.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-5)


@given(SEEDS)
def test_pieces_of_rows_are_all_the_rows(seed):
    rng = np.random.default_rng(seed)
    given = [v.requires_grad_() for v in parameters(rng, 2, 3)]
    x, slopes = rows_of(rng, 1000, 3), torch.from_numpy(rng.normal(size=1000))
    found = []
    for chunk in (quadratic._CHUNK, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quadratic, "_CHUNK", chunk)
            log_prob = of(*given).log_prob(x)
            found.append((log_prob, *torch.autograd.grad(log_prob @ slopes, given)))
    for whole, parted in zip(*found, strict=True):
        torch.testing.assert_close(whole, parted, rtol=1e-8, atol=1e-8)


# ---- gradients ----------------------------------------------------------------------------------


@given(SEEDS, SIZES, SIZES, st.floats(0, 0.5), st.booleans())
def test_gradients_are_those_of_a_plain_product(seed, K, D, missing, alike):
    """Whether the rows count alike, which takes the statistics of the way there, or not."""
    rng = np.random.default_rng(seed)
    weights, locs, trils = (v.requires_grad_() for v in parameters(rng, K, D))
    x = rows_of(rng, 6, D, missing)
    slopes = torch.ones(6).double() if alike else torch.from_numpy(rng.normal(size=6))
    expected = 0.0 * weights.sum()
    for row, slope in zip(x, slopes, strict=True):
        seen = ~row.isnan()
        covariance = (trils @ trils.mT)[:, seen][:, :, seen]
        joint = weights.log()
        if seen.any():
            joint = joint + MultivariateNormal(locs[:, seen], covariance).log_prob(row[seen])
        expected = expected + slope * joint.logsumexp(-1)
    log_prob = of(weights, locs, trils).log_prob(x)
    ours = log_prob.sum() if alike else log_prob @ slopes
    leaves = (weights, locs, trils)
    both = [torch.autograd.grad(v, leaves, materialize_grads=True) for v in (ours, expected)]
    for found, exact in zip(*both, strict=True):
        lower = (found, exact) if found.dim() < 3 else (found.tril(), exact.tril())
        torch.testing.assert_close(*lower, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_second_derivatives_are_those_of_the_first(missing):
    rng = np.random.default_rng(4)
    weights, locs, trils = parameters(rng, 2, 2)
    x = rows_of(rng, 5, 2, missing)

    def log_prob(locs, free):
        factor = free.tril(-1) + free.diagonal(dim1=-2, dim2=-1).exp().diag_embed()
        return of(weights, locs, factor).log_prob(x).sum()

    leaves = [v.requires_grad_() for v in (locs, 0.3 * trils)]
    assert torch.autograd.gradcheck(log_prob, leaves)
    assert torch.autograd.gradgradcheck(log_prob, leaves)


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("alike", [True, False])
def test_the_gradient_is_the_matrix_of_expected_statistics(products, alike):
    rng = np.random.default_rng(5)
    S, K, D, N = 2, 3, 2, 7
    y = torch.from_numpy(rng.normal(size=(D, N)))
    squares = [y[0] ** 2, y[0] * y[1], y[1] ** 2] if products else [*y**2]
    ones = [torch.ones(N)] * (1 if products else D + 1)
    phi = torch.stack([*squares, *y, *ones]).double()
    coefficients = torch.from_numpy(rng.normal(size=(S, K, len(phi)))).requires_grad_()
    g = torch.ones(S, N) if alike else torch.from_numpy(rng.normal(size=(S, N)))
    joint = (coefficients @ phi).detach()
    odds = joint.softmax(1)
    value = quadratic.log_sum_exp(coefficients, y, products)
    torch.testing.assert_close(value, joint.logsumexp(1))
    total = value.sum() if alike else (value * g).sum()
    (slope,) = torch.autograd.grad(total, coefficients)
    torch.testing.assert_close(slope, (g[:, None] * odds) @ phi.T)


def test_no_matrix_of_rows_by_components_is_kept():
    """What a backward pass holds on to grows with the rows by their cells alone."""
    rng = np.random.default_rng(6)
    K = 50
    given = [v.requires_grad_() for v in parameters(rng, K, 2)]
    x, held = rows_of(rng, 4000, 2), []

    def keep(tensor):
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        of(*given).log_prob(x).sum().backward()
    assert max(held) <= 2 * len(x)


# ---- a distribution like others -----------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2,), (2, 1)])
def test_draws_have_the_mean_and_covariance_of_the_mixture(batch):
    torch.manual_seed(0)
    S = 40_000
    density = of(*parameters(np.random.default_rng(7), 3, 2, batch))
    draws = density.sample((S,))
    assert draws.shape == (S, *batch, 2)
    away = draws - density.mean
    within = density.scale_trils @ density.scale_trils.mT
    apart = density.locs - density.mean.unsqueeze(-2)
    between = apart.unsqueeze(-1) * apart.unsqueeze(-2)
    covariance = (density.weights[..., None, None] * (within + between)).sum(-3)
    for values, exact in (
        (draws, density.mean),
        (away**2, density.variance),
        (away.unsqueeze(-1) * away.unsqueeze(-2), covariance),
    ):
        assert ((values.mean(0) - exact).abs() < 4.5 * values.std(0) / S**0.5).all()


def test_the_density_can_be_traced_and_differentiated_in_the_graph():
    rng = np.random.default_rng(8)
    leaves = [v[:, None].requires_grad_() for v in parameters(rng, 3, 2, (4,))]

    def value_and_slope(weights, locs, trils, x):
        density = of(weights, locs, trils, assume_missing=False, validate_args=False)
        log_prob = density.log_prob(x)
        return log_prob, *torch.autograd.grad(log_prob.sum(), (weights, locs, trils))

    x = rows_of(rng, 6, 2)
    graph = make_fx(value_and_slope)(*leaves, x)
    moved = [leaves[0], leaves[1] + 1, 2 * leaves[2]]
    for found, expected in zip(graph(*moved, 3 * x), value_and_slope(*moved, 3 * x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_graph_that_reckons_without_missing_cells_says_nan_where_there_are_some():
    rng = np.random.default_rng(9)
    density = of(*parameters(rng, 2, 2), assume_missing=False, validate_args=False)
    x = rows_of(rng, 4, 2)
    graph = make_fx(lambda rows: density.log_prob(rows))(x)
    x[1, 0] = NAN
    assert graph(x).isnan().tolist() == [False, True, False, False]
    assert density.log_prob(x).isfinite().all()  # looked at, it is integrated out


def test_mixtures_survive_vmap():
    rng = np.random.default_rng(10)
    draws, x = parameters(rng, 3, 2, (4,)), rows_of(rng, 6, 2, 0.2)

    def log_prob(weights, locs, trils):
        return of(weights, locs, trils, validate_args=False).log_prob(x)

    one_by_one = torch.stack([log_prob(*draw) for draw in zip(*draws, strict=True)])
    torch.testing.assert_close(torch.vmap(log_prob)(*draws), one_by_one)
    slope = torch.func.grad(lambda *draw: log_prob(*draw).sum(), argnums=1)
    by_hand = torch.stack([slope(*draw) for draw in zip(*draws, strict=True)])
    torch.testing.assert_close(torch.vmap(slope)(*draws), by_hand)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "scales, scale_trils: expected one of the two, got neither"),
        ({"scales": (2, 2), "scale_trils": (2, 2, 2)}, "expected one of the two, got both"),
        ({"scale_trils": (2, 2)}, "weights, locs, scale_trils: expected shapes .* got"),
        ({"scale_trils": (3, 2, 2)}, "weights, locs, scale_trils: expected shapes .* got"),
        ({"scale_trils": (2, 3, 3)}, "weights, locs, scale_trils: expected shapes .* got"),
    ],
)
def test_shapes_that_disagree_are_named(shapes, message):
    spread = {name: torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        NormalMixture(torch.ones(2) / 2, torch.zeros(2, 2), **spread)


def test_validation_names_a_factor_that_is_none():
    good = [v.float() for v in parameters(np.random.default_rng(11), 2, 2)]
    with pytest.raises(ValueError, match="parameter scale_trils "):
        of(good[0], good[1], -good[2], validate_args=True)
