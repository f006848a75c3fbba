"""Principal components and factor analysis, against closed forms, brute force and scikit-learn."""

import copy
import math
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.decomposition import FactorAnalysis as TheirFactorAnalysis
from torch.distributions import MultivariateNormal
from torch.fx.experimental.proxy_tensor import make_fx

import latentlab as ll
from latentlab.distributions.chi import Chi
from latentlab.distributions.low_rank import LowRankNormal
from latentlab.models.ppca_optimum import Optimum, find_optimum

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist" / "mnist20k.npz"
MODELS = (ll.ProbabilisticPCA, ll.FactorAnalysis)


def rows_of(num=300, D=6, L=2, seed=0, noise=None):
    """Rows of L clear factors, each of several columns."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    scales = torch.linspace(0.4, 0.8, D).double() if noise is None else noise
    column = torch.arange(D)
    factor = 0.3 * torch.sin(1.0 + torch.outer(column, torch.arange(1, L + 1))).double()
    factor[column, column % L] += torch.linspace(1.0, 1.5, D).double()
    z = torch.randn(num, L, **draw)
    return 5 + 3 * (z @ factor.T + scales * torch.randn(num, D, **draw))


def holes(x, share=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lost = torch.rand(x.shape, generator=generator) < share
    lost[:, 0] &= ~lost.all(1)
    return torch.where(lost, torch.nan, x)


def best(model, x):
    """The optimum, as one draw."""
    return {site: value[None] for site, value in model.scale_to(x).optimum(x).items()}


def some_draws(model, num, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        traces = [poutine.trace(model).get_trace(size=2) for _ in range(num)]
    sites = [site for site in model.dims if site != "x"]
    return {k: torch.stack([t.nodes[k]["value"] for t in traces]).double() for k in sites}


def brute(row, s=0):
    """Mean and covariance of a row at one draw, from the definition."""
    W, psi = row.factor[s, 0], row.variances[s, 0]
    covariance = row.unit[:, None] * (W @ W.T + psi.diag()) * row.unit
    return row.origin + row.unit * row.loc[s, 0], covariance


# ---- the distribution of a row -----------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.data())
def test_missing_cells_are_integrated_out(D, data):
    L = data.draw(st.integers(1, D - 1))
    seed = data.draw(st.integers(0, 10_000))
    batch = data.draw(st.sampled_from([(), (3, 1), (4,), (3, 4)]))
    g = torch.Generator().manual_seed(seed)
    loc = torch.randn(*batch, D, generator=g, dtype=torch.float64)
    factor = torch.randn(*batch, D, L, generator=g, dtype=torch.float64)
    psi = 0.1 + torch.rand(*batch, D, generator=g, dtype=torch.float64)
    x = holes(torch.randn(4, D, generator=g, dtype=torch.float64), 0.4, seed)
    found = LowRankNormal(loc, factor, psi).log_prob(x)
    covariance = factor @ factor.mT + psi.diag_embed()
    locs, full = loc.expand(*found.shape, D), covariance.expand(*found.shape, D, D)
    for i in np.ndindex(*found.shape):
        there = ~x[i[-1]].isnan()
        expected = 0.0
        if there.any():
            part = full[i][there][:, there]
            expected = MultivariateNormal(locs[i][there], part).log_prob(x[i[-1]][there])
        assert abs(float(found[i] - expected)) < 1e-10


def test_units_and_origin_are_those_of_the_cells():
    x, unit, origin = rows_of(5, 3), torch.tensor([1.0, 10.0, 0.1]).double(), torch.ones(3) * 5.0
    loc, factor, psi = torch.zeros(3).double(), torch.ones(3, 1).double(), torch.ones(3).double()
    row = LowRankNormal(loc, factor, psi, origin.double(), unit)
    covariance = unit[:, None] * (factor @ factor.T + psi.diag()) * unit
    exact = MultivariateNormal(origin.double(), covariance)
    assert torch.allclose(row.log_prob(x), exact.log_prob(x), atol=1e-10)
    assert torch.allclose(row.variance, exact.variance)
    assert torch.allclose(row.mean, exact.mean)


def test_noise_that_is_almost_nothing_loses_no_digits():
    W = torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64)
    psi = torch.full((3,), 1e-12, dtype=torch.float64)
    x = (W * 3.0).T + 1e-6 * torch.tensor([[1.0, -1.0, 0.5]]).double()
    # Along the axis and across it the row is independent: exact in one dimension each.
    axis = (W / W.norm()).squeeze(1)
    along, rest = x @ axis, x - (x @ axis)[:, None] * axis
    wide = float(W.square().sum()) + 1e-12
    exact = stats.norm(0, math.sqrt(wide)).logpdf(float(along))
    exact += -0.5 * float(rest.square().sum()) / 1e-12 - math.log(2 * math.pi * 1e-12)
    found = float(LowRankNormal(torch.zeros(3).double(), W, psi).log_prob(x))
    assert found == pytest.approx(exact, rel=1e-6)


def test_draws_have_the_moments_of_the_distribution():
    g = torch.Generator().manual_seed(1)
    factor, psi = (
        torch.randn(4, 2, generator=g).double(),
        torch.rand(4, generator=g).double() + 0.1,
    )
    row = LowRankNormal(torch.arange(4).double(), factor, psi)
    torch.manual_seed(0)
    x = row.sample((40_000,))
    covariance = factor @ factor.T + psi.diag()
    se = (covariance.diagonal() / len(x)).sqrt()
    assert ((x.mean(0) - row.loc).abs() < 5 * se).all()
    spread = covariance.diagonal()
    error = (spread[:, None] * spread + covariance**2).div(len(x)).sqrt()
    assert ((x.T.cov() - covariance).abs() < 5 * error).all()


@pytest.mark.parametrize("df", [1.0, 2.0, 7.0])
def test_chi_is_the_length_of_a_normal_vector(df):
    chi = Chi(torch.tensor(df).double(), torch.tensor(2.0).double())
    theirs, at = stats.chi(df, scale=2.0), torch.linspace(0.1, 8.0, 20).double()
    assert np.allclose(chi.log_prob(at), theirs.logpdf(at), atol=1e-10)
    assert float(chi.mean) == pytest.approx(theirs.mean())
    assert float(chi.variance) == pytest.approx(theirs.var())
    torch.manual_seed(0)
    draws = chi.sample((2000,)).numpy()
    assert stats.kstest(draws, theirs.cdf).pvalue > 1e-4


# ---- the pair ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cls", MODELS)
def test_the_triangle_leaves_the_prior_of_the_covariance_as_it_was(cls):
    model = cls(4, 2)
    draws = some_draws(model, 2500)
    W = model.factor(draws["pivots"], draws["loadings"])
    # W W^T of free normal loadings is Wishart: mean L I, variances L (1 + [i = j]).
    outer = W @ W.mT
    variance = 2.0 * (torch.ones(4, 4) + torch.eye(4)).double()
    assert ((outer.mean(0) - 2 * torch.eye(4)).abs() < 5 * (variance / 2500).sqrt()).all()
    assert torch.allclose(outer.var(0), variance, rtol=0.3)


@pytest.mark.parametrize("cls", MODELS)
def test_the_model_can_be_traced(cls):
    x = holes(rows_of(20))
    model = cls(6, 2).scale_to(x)
    draws = {site: v[0] for site, v in best(model, x).items()}

    def density(x, *values):
        latents = dict(zip(draws, values, strict=True))
        with pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(model, latents)).get_trace(x)
            return trace.log_prob_sum()

    graph = make_fx(density)(x, *draws.values())
    other = holes(rows_of(20, seed=5), seed=5)
    moved = [1.1 * value for value in draws.values()]
    assert float(graph(other, *moved)) == pytest.approx(float(density(other, *moved)), rel=1e-10)


@pytest.mark.parametrize("cls", MODELS)
def test_a_batch_stands_for_all_rows(cls):
    x = rows_of(40)
    model = cls(6, 2).scale_to(x)
    values = {site: v[0] for site, v in best(model, x).items()}

    def of_rows(x, size=None):
        trace = poutine.trace(poutine.condition(model, values)).get_trace(x, size=size)
        return float(trace.nodes["x"]["scale"] * trace.nodes["x"]["fn"].log_prob(x).sum())

    halves = [of_rows(x[:20], 40), of_rows(x[20:], 40)]
    assert np.mean(halves) == pytest.approx(of_rows(x))


@pytest.mark.parametrize("cls", MODELS)
def test_under_the_exact_posterior_every_importance_weight_is_the_evidence(cls):
    x = holes(rows_of(15))
    model = cls(6, 2)
    row = model.distribution(best(model, x))
    mean, precision = row.codes(x)
    codes = MultivariateNormal(mean[0], precision_matrix=precision[0])
    evidence = row.log_prob(x)[0]
    there = ~x.isnan()
    torch.manual_seed(0)
    for _ in range(20):
        z = codes.sample()
        y = row.loc[0] + z @ row.factor[0, 0].T
        cells = dist.Normal(row.origin + row.unit * y, row.unit * row.variances[0, 0].sqrt())
        joint = (there * cells.log_prob(x.nan_to_num(0.0))).sum(-1) + dist.Normal(
            0.0, 1.0
        ).log_prob(z).sum(-1)
        assert torch.allclose(joint - codes.log_prob(z), evidence, atol=1e-9)


# ---- the optimum -------------------------------------------------------------------------------


def test_the_optimum_of_principal_components_is_scikit_learns():
    x = rows_of()
    model = ll.ProbabilisticPCA(6, 2, prior="flat")
    score = float(model.log_prob(x, best(model, x)).mean())
    # scikit-learn divides by N - 1; the maximum is where it is N.
    S = np.cov(x.T.numpy(), bias=True)
    values = np.linalg.eigvalsh(S)[::-1]
    exact = np.log(values[:2]).sum() + 4 * math.log(values[2:].mean()) + 6
    exact = -0.5 * (exact + 6 * math.log(2 * math.pi))
    assert score == pytest.approx(exact, abs=1e-10)
    assert 0 <= score - PCA(2).fit(x.numpy()).score(x.numpy()) < 1e-3


def test_the_optimum_of_factor_analysis_is_scikit_learns():
    x = rows_of()
    model = ll.FactorAnalysis(6, 2, prior="flat")
    score = float(model.log_prob(x, best(model, x)).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = TheirFactorAnalysis(2, tol=1e-10, max_iter=5000, svd_method="lapack")
        expected = theirs.fit(x.numpy()).score(x.numpy())
    assert score == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_the_climb_for_missing_cells_finds_the_closed_form_where_none_is_missing(shared):
    y = (rows_of() - 5) / 3
    closed = find_optimum(y, 2, shared=shared, least=1e-6)
    extra = torch.cat([y, torch.full((1, 6), torch.nan).double()])  # says nothing, but is missing
    climbed = find_optimum(extra, 2, shared=shared, least=1e-6)
    of = [float(LowRankNormal(*found).log_prob(y).mean()) for found in (closed, climbed)]
    assert of[1] == pytest.approx(of[0], abs=1e-8)
    assert torch.allclose(climbed.variances, closed.variances, rtol=1e-3)


@pytest.mark.parametrize("shared", [True, False])
def test_the_optimum_with_missing_cells_is_a_maximum(shared):
    y = holes((rows_of() - 5) / 3, 0.2)
    found = find_optimum(y, 2, shared=shared, least=1e-6)
    top = float(LowRankNormal(*found).log_prob(y).mean())
    torch.manual_seed(0)
    for _ in range(20):
        loc = found.loc + 0.05 * torch.randn(6).double()
        factor = found.factor + 0.05 * torch.randn(6, 2).double()
        width = (0.05 * torch.randn(1 if shared else 6)).exp().double()
        near = Optimum(loc, factor, found.variances * width)
        assert float(LowRankNormal(*near).log_prob(y).mean()) < top


@pytest.mark.skipif(not MNIST.exists(), reason="the MNIST digits are not there")
def test_the_optimum_of_digits_is_the_published_one():
    images = np.load(MNIST)["train_images"][:2000].reshape(-1, 14, 2, 14, 2).mean((2, 4))
    x = torch.tensor(images.reshape(-1, 196) / 255.0)
    x = (x - x.mean(0)) / (x - x.mean(0)).std()
    model = ll.ProbabilisticPCA(196, 8, prior="flat")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant pixels
        draws = best(model, x)
    assert float(model.log_prob(x, draws).mean()) == pytest.approx(-222.669, abs=2e-3)


@pytest.mark.parametrize("cls", MODELS)
def test_a_point_with_a_flat_prior_is_the_optimum(cls):
    x = rows_of(100, 4, 1)
    model = cls(4, 1, prior="flat")
    posterior = ll.fit(model, x, "point", num_restarts=1, max_steps=1500, progress=False)
    assert posterior.pair.vectorised
    exact = float(model.log_prob(x, best(model, x)).sum())
    assert posterior.elbo.value == pytest.approx(exact, abs=1e-6 * len(x))
    draws = posterior.sample(1)
    reached = float(posterior.model.log_prob(x, draws).mean())
    assert reached == pytest.approx(exact / len(x), abs=1e-6)


# ---- the Bayesian fit --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    x = rows_of(200, 4, 1, noise=0.5)
    model = ll.ProbabilisticPCA(4, 1)
    return x, ll.fit(model, x, num_restarts=1, progress=False)


@pytest.mark.slow
def test_the_default_fit_is_to_be_used(fitted):
    _, posterior = fitted
    assert posterior.pair.vectorised
    assert posterior.converged
    assert posterior.check().level == "use", posterior.check()


def test_the_posterior_lies_about_the_optimum_and_is_as_wide_as_theory_says(fitted):
    x, posterior = fitted
    draws = posterior.sample(2000)
    exact = best(ll.ProbabilisticPCA(4, 1), x)
    loc, scale = draws["loc"], draws["scale"]
    assert torch.allclose(loc.std(0), x.std(0) / math.sqrt(200), rtol=0.15)
    width = float(exact["scale"]) / math.sqrt(2 * 200 * 3)
    assert float(scale.std()) == pytest.approx(width, rel=0.15)
    assert abs(float(scale.mean() - exact["scale"])) < 1.0 * width


def test_a_saved_fit_answers_alike(fitted, tmp_path):
    x, posterior = fitted
    posterior.save(tmp_path)
    again = ll.load(tmp_path)
    draws = posterior.sample(50)
    assert torch.equal(again.model.log_prob(x, draws), posterior.model.log_prob(x, draws))
    assert torch.equal(again.sample(50)["loadings"], draws["loadings"])


def test_rows_are_labelled_with_codes(fitted):
    x, posterior = fitted
    columns = posterior.model.label_rows(posterior.sample(50), x)
    assert list(columns) == ["z_0", "log_prob"]
    assert all(len(column) == 200 for column in columns.values())


def test_the_fit_is_drawn_and_summed_up(fitted):
    _, posterior = fitted
    assert posterior.plot("fit").figure is not None
    assert {"loc", "pivots", "loadings", "scale"} <= set(posterior.summary().reset_index().site)


# ---- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("missing", [False, True])
def test_codes_are_bayes_rule(cls, missing):
    x = holes(rows_of(12)) if missing else rows_of(12)
    model = cls(6, 2).scale_to(x)
    draws = {k: v[None] for k, v in model.optimum(x).items()}
    mean, covariance = model.encode(x, draws)
    W = model.loadings(draws)[0]
    loc, full = brute(model.distribution(draws))
    sites = model.factor(draws["pivots"], draws["loadings"])[0]
    assert torch.allclose(W @ W.T, sites @ sites.T)
    for n in range(len(x)):
        there = ~x[n].isnan()
        gain = W[there].T @ torch.linalg.inv(full[there][:, there])
        assert torch.allclose(mean[n], gain @ (x[n] - loc)[there], atol=1e-9)
        assert torch.allclose(covariance[n], torch.eye(2) - gain @ W[there], atol=1e-9)


@pytest.mark.parametrize("cls", MODELS)
def test_loadings_are_orthogonal_axes_the_longest_first(cls):
    x = rows_of()
    model = cls(6, 2)
    draws = best(model, x)
    row = model.distribution(draws)
    whitened = model.loadings(draws)[0] / (row.unit * row.variances[0, 0].sqrt())[:, None]
    gram = whitened.T @ whitened
    assert abs(float(gram[0, 1])) < 1e-8 * float(gram[0, 0])
    assert gram[0, 0] > gram[1, 1]


def test_a_rotation_of_the_sites_changes_no_answer():
    """Other pivots are another rotation of the same W."""
    x = holes(rows_of(50))
    model = ll.FactorAnalysis(6, 2)
    draws = best(model, x)
    other = copy.deepcopy(model)
    other.order = model.order.flip(0)
    other.rank = other.order.argsort()
    turned = {site: value[None] for site, value in other.optimum(x).items()}
    assert not torch.allclose(turned["loadings"], draws["loadings"])
    assert torch.allclose(model.log_prob(x, draws), other.log_prob(x, turned), atol=1e-6)
    assert torch.allclose(model.encode(x, draws).mean, other.encode(x, turned).mean, atol=1e-4)


@pytest.mark.parametrize("cls", MODELS)
def test_missing_cells_are_imputed_by_the_conditional_normal(cls):
    x = holes(rows_of(12))
    model = cls(6, 2)
    draws = best(model, x)
    mean, sd = model.impute(x, draws)
    loc, full = brute(model.distribution(draws))
    for n in range(len(x)):
        o = ~x[n].isnan()
        gain = full[~o][:, o] @ torch.linalg.inv(full[o][:, o])
        expected = loc[~o] + gain @ (x[n] - loc)[o]
        rest = full[~o][:, ~o] - gain @ full[o][:, ~o]
        assert torch.allclose(mean[n][~o], expected, atol=1e-9)
        assert torch.allclose(sd[n][~o], rest.diagonal().sqrt(), atol=1e-7)
        assert torch.equal(mean[n][o], x[n][o])
        assert (sd[n][o] == 0).all()


@pytest.mark.parametrize("cls", MODELS)
def test_over_draws_moments_add_up(cls):
    x = holes(rows_of(8))
    model = cls(6, 2).scale_to(x)
    one = {k: v[None] for k, v in model.optimum(x).items()}
    two = {k: torch.cat([v, 1.1 * v]) for k, v in one.items()}
    single = [{k: v[s : s + 1] for k, v in two.items()} for s in range(2)]
    both, parts = model.impute(x, two), [model.impute(x, draw) for draw in single]
    means = torch.stack([part.mean for part in parts])
    variance = torch.stack([part.sd**2 for part in parts]).mean(0) + means.var(0, correction=0)
    assert torch.allclose(both.mean, means.mean(0))
    assert torch.allclose(both.sd**2, variance, atol=1e-9)
    exact = torch.stack([model.log_prob(x, draw) for draw in single]).logsumexp(0) - math.log(2)
    assert torch.allclose(model.log_prob(x, two), exact)
    assert torch.allclose(
        model.reconstruct(x, two),
        torch.stack([model.reconstruct(x, draw) for draw in single]).mean(0),
    )


def test_there_and_back_is_the_reconstruction():
    x = rows_of(20)
    model = ll.ProbabilisticPCA(6, 2)
    draws = best(model, x)
    back = model.decode(model.encode(x, draws).mean, draws)
    assert torch.allclose(back, model.reconstruct(x, draws), atol=1e-9)


def test_many_draws_are_taken_a_few_at_a_time(monkeypatch):
    x = holes(rows_of(9))
    model = ll.FactorAnalysis(6, 2).scale_to(x)
    draws = some_draws(model, 7)
    whole = model.encode(x, draws).covariance, model.log_prob(x, draws)
    monkeypatch.setattr("latentlab.models.ppca._CHUNK", 2 * 9 * 6)
    assert torch.allclose(model.encode(x, draws).covariance, whole[0])
    assert torch.allclose(model.log_prob(x, draws), whole[1])


# ---- remarks -----------------------------------------------------------------------------------


def test_a_latent_that_explains_nothing_is_told():
    x = rows_of(400, 6, 1, noise=0.5)
    model = ll.ProbabilisticPCA(6, 3)
    assert "latent_dim=1 would do" in model.remarks(best(model, x), x)[0]
    right = ll.ProbabilisticPCA(6, 1)
    assert right.remarks(best(right, x), x) == []


def test_a_heywood_case_is_told():
    x = rows_of(200, 5, 1)
    x[:, 4] = 2 * x[:, 3]
    model = ll.FactorAnalysis(5, 1)
    said = model.remarks(best(model, x), x)
    assert any("Heywood" in line and "3, 4" in line for line in said)


# ---- bad inputs and extremes -------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, 1), "num_features must be an int >= 1, got 0"),
        ((3, 2.5), r"latent_dim must be an int >= 1, got 2.5 \(float\)"),
        ((3, True), "latent_dim must be"),
        ((3, 3), "latent_dim: expected less than num_features=3, got 3"),
    ],
)
def test_bad_sizes_are_named(cls, arguments, says):
    with pytest.raises(ValueError, match=says):
        cls(*arguments)


def test_an_unknown_prior_is_named():
    with pytest.raises(ValueError, match='prior: expected "weak" or "flat"'):
        ll.FactorAnalysis(3, 1, prior="none")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda x: x[:, :2], r"expected shape \(N, 4\) to match num_features=4, got \(30, 2\)"),
        (lambda x: x[:1], "1 row"),
        (lambda x: x[0], "expected rows"),
        (lambda x: x.index_fill(1, torch.tensor([1]), torch.nan), "all NaN"),
        (lambda x: x.index_fill(0, torch.tensor([1]), torch.inf), "inf"),
        (lambda x: x.index_fill(0, torch.tensor([1]), 1e200), "larger unit"),
    ],
)
def test_bad_rows_are_named(spoil, says):
    with pytest.raises(ValueError, match=says):
        ll.fit(ll.ProbabilisticPCA(4, 1), spoil(rows_of(30, 4)), progress=False)


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1e-200), (1e12, 1e4), (0.0, 1e100), (-7, 1)])
def test_units_change_the_log_density_by_their_logarithm_only(cls, offset, scale):
    x = rows_of(50, 4, 1)
    other = offset + scale * x
    plain, moved = cls(4, 1), cls(4, 1)
    first = plain.log_prob(x, best(plain, x)).sum()
    second = moved.log_prob(other, best(moved, other)).sum()
    rounding = 1e-4 if offset == 1e12 else 1e-8
    assert float(second) == pytest.approx(float(first) - 200 * math.log(scale), rel=rounding)


@pytest.mark.parametrize("cls", MODELS)
def test_a_constant_column_is_told_and_the_fit_stays_finite(cls):
    x = rows_of(40, 4, 1)
    x[:, 2] = 3.0
    with pytest.warns(UserWarning, match="constant column 'x2'"):
        posterior = ll.fit(cls(4, 1), x, num_restarts=1, max_steps=100, progress=False)
    assert math.isfinite(posterior.elbo.value)
    assert all(v.isfinite().all() for v in posterior.sample(20).values())


@pytest.mark.parametrize("cls", MODELS)
def test_rows_that_are_all_equal_are_told_and_the_fit_stays_finite(cls):
    x = torch.ones(20, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="all 20 rows are equal"):
        posterior = ll.fit(cls(3, 1), x, num_restarts=1, max_steps=50, progress=False)
    assert math.isfinite(posterior.elbo.value)


def test_float32_rows_are_fitted():
    x = rows_of(50, 4, 1).float()
    posterior = ll.fit(ll.FactorAnalysis(4, 1), x, num_restarts=1, max_steps=50, progress=False)
    assert math.isfinite(posterior.elbo.value)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 1000))
def test_permuted_columns_are_permuted_answers(order, seed):
    x = rows_of(60, 5, 2, seed=seed)
    plain, moved = ll.ProbabilisticPCA(5, 2), ll.ProbabilisticPCA(5, 2)
    first, second = plain.scale_to(x), moved.scale_to(x[:, order])
    one = {k: v[None] for k, v in first.optimum(x).items()}
    two = {k: v[None] for k, v in second.optimum(x[:, order]).items()}
    assert torch.allclose(first.log_prob(x, one), second.log_prob(x[:, order], two), atol=1e-8)
    assert torch.allclose(
        first.reconstruct(x, one)[:, order], second.reconstruct(x[:, order], two), atol=1e-7
    )


def test_a_draw_from_the_prior_has_its_shape():
    assert ll.FactorAnalysis(4, 2)(size=7).shape == (7, 4)
    with pyro.plate("particles", 3, dim=-2):
        assert ll.ProbabilisticPCA(4, 2)(size=7).shape == (3, 7, 4)
