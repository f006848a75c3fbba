"""k-hat finds the shape of a known tail, equals ArviZ, and never blames a perfect guide."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

from latentlab.diagnostics import KhatTable, Psis, khat_per_column, psis

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def psislw():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    if not arviz.__version__.startswith("0."):
        pytest.skip("psislw of ArviZ 1.x negates its input")
    return arviz.psislw


def rng_of(seed):
    return np.random.default_rng(seed)


def weights_of(kind, rng, num_samples):
    spread = rng.uniform(0.01, 3)
    return {
        "normal": lambda: spread * rng.normal(size=num_samples),
        "pareto": lambda: spread * rng.exponential(size=num_samples) - 1e4,
        "heavy": lambda: spread * rng.standard_t(3, size=num_samples),
        "bounded": lambda: -spread * rng.normal(size=num_samples) ** 2,
        "huge": lambda: 100 * spread * rng.normal(size=num_samples) + 1e6,
    }[kind]()


# ---- equal to ArviZ -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "pareto", "heavy", "bounded", "huge"])
@pytest.mark.parametrize("num_samples", [25, 26, 101, 1000, 4000])
def test_equals_arviz(psislw, kind, num_samples):
    for seed in range(10):
        log_weights = weights_of(kind, rng_of(seed), num_samples)
        smoothed, khat = psislw(log_weights.copy())
        result = psis(log_weights)
        np.testing.assert_allclose(result.khat, khat, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(result.log_weights, smoothed, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_zero", [1, 100, 850, 950])
def test_equals_arviz_with_weights_of_zero(psislw, num_zero):
    for seed in range(5):
        log_weights = rng_of(seed).normal(size=1000)
        log_weights[:num_zero] = -np.inf
        smoothed, khat = psislw(log_weights.copy())
        result = psis(log_weights)
        assert result.khat == pytest.approx(float(khat), abs=1e-10)
        np.testing.assert_allclose(result.log_weights.exp(), np.exp(smoothed), atol=1e-10)
        assert (result.log_weights[:num_zero] == -math.inf).all()


# ---- tails whose shape is known --------------------------------------------------------------


@pytest.mark.parametrize("k", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_exponential_guide_and_target_have_pareto_weights_of_exact_shape(k):
    r = rng_of(0)
    results = [psis(k * r.exponential(size=10_000)) for _ in range(100)]
    khats, se = np.array([result.khat for result in results]), results[0].se
    towards = (0.5 - k) * 10 / 310  # the prior's pull, ten observations against M = 300
    assert abs(khats.mean() - k - towards) < 5 * se / 10 + 0.01
    assert khats.std() == pytest.approx(np.mean([result.se for result in results]), rel=0.35)


@given(SEEDS, st.floats(0.05, 1.2))
def test_khat_is_within_its_error_for_any_seed(seed, k):
    result = psis(k * rng_of(seed).exponential(size=10_000))
    assert abs(result.khat - k) < 5.5 * result.se


@pytest.mark.parametrize("variance", [1.5, 2.0, 4.0])
def test_wide_target_of_a_standard_normal_guide(variance):
    z = rng_of(1).normal(size=1_000_000)
    result = psis(0.5 * z**2 - 0.5 * z**2 / variance)
    assert result.khat == pytest.approx(1 - 1 / variance, abs=4 * result.se + 0.05)


@pytest.mark.parametrize("correlation", [0.3, 0.6, -0.9])
def test_mean_field_guide_of_a_correlated_normal_has_the_correlation(correlation):
    """The optimum of a mean-field guide has the precision's diagonal."""
    precision = np.linalg.inv([[1, correlation], [correlation, 1]])
    own = np.diag(precision)
    z = rng_of(2).normal(size=(1_000_000, 2)) / np.sqrt(own)
    log_p, log_q = -0.5 * np.einsum("si,ij,sj->s", z, precision, z), -0.5 * (z**2 * own).sum(1)
    result = psis(log_p - log_q)
    assert result.khat == pytest.approx(abs(correlation), abs=4 * result.se + 0.05)


@pytest.mark.parametrize("variance", [0.4, 0.8])
def test_ess_of_a_narrow_normal_target(variance):
    """E[w]^2 / E[w^2] = sqrt(v (2 - v)) for a target N(0, v) and a guide N(0, 1)."""
    z = rng_of(3).normal(size=200_000)
    result = psis(0.5 * z**2 - 0.5 * z**2 / variance)
    expected = math.sqrt(variance * (2 - variance))
    assert result.ess / 200_000 == pytest.approx(expected, rel=0.01)


# ---- the best fit must not look like the worst -------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_rows", [10, 1000, 100_000])
def test_exact_posterior_is_exact(dtype, num_rows):
    """Every weight is the evidence, up to the rounding of a sum over the rows."""
    torch.manual_seed(0)
    x = (3 + 1.3 * torch.randn(num_rows, dtype=torch.float64)).to(dtype)
    precision = 0.01 + num_rows
    loc = (x.double().sum() / precision).to(dtype)
    guide = Normal(loc, torch.tensor(precision**-0.5, dtype=dtype))
    log_weights = []
    for z in guide.sample((200,)):
        prior = Normal(torch.zeros((), dtype=dtype), 10.0).log_prob(z)
        rows = Normal(z, torch.ones((), dtype=dtype)).log_prob(x).sum()
        log_weights.append(prior + rows - guide.log_prob(z))
    result = psis(torch.stack(log_weights))
    assert result.exact
    assert result.level == "exact"
    assert result.khat == -math.inf
    assert result.se == 0
    assert result.ess == pytest.approx(200, rel=0.3 if dtype == torch.float32 else 1e-6)
    assert "exact" in str(result)
    assert "nan" not in str(result)


@given(SEEDS, st.floats(-1e6, 1e6))
def test_sums_that_cancel_are_still_exact(seed, constant):
    terms = rng_of(seed).normal(size=1000) * 1e6
    assert psis((constant + terms) - terms).exact


@given(SEEDS, st.sampled_from([np.float64, np.float32]), st.floats(-1e6, 1e6))
def test_some_units_in_the_last_place_are_no_spread(seed, dtype, constant):
    noise = rng_of(seed).integers(-4, 5, size=1000)
    constant = dtype(constant)
    assert psis(constant + np.spacing(constant) * noise.astype(dtype)).exact


@pytest.mark.parametrize("level", [0.0, -1e3, 1e3])
def test_a_true_spread_is_not_rounding(level):
    result = psis(level + 1e-4 * rng_of(0).uniform(size=1000))
    assert not result.exact
    assert math.isfinite(result.khat)
    assert not psis((level + 0.3 * rng_of(0).uniform(size=1000)).astype(np.float32)).exact


@pytest.mark.parametrize("other", [0.1, 0.5, -1.0, -np.inf])
@pytest.mark.parametrize("num_other", [2, 100, 500, 997])
def test_two_weights_of_similar_size_are_not_bad(other, num_other):
    """A discrete latent: nearly all of the tail is tied."""
    if other == -np.inf and num_other == 997:
        pytest.skip("three draws carry all")
    log_weights = np.zeros(1000)
    log_weights[:num_other] = other
    result = psis(log_weights)
    assert result.level == "good"
    assert result.se > 0
    np.testing.assert_allclose(
        result.log_weights.exp(), np.exp(log_weights) / np.exp(log_weights).sum()
    )


def test_few_draws_that_carry_all_the_weight_are_bad():
    log_weights = np.zeros(1000)
    log_weights[3] = 50.0
    assert psis(log_weights).level == "bad"
    assert psis(np.where(np.arange(1000) < 3, 0.0, -np.inf)).khat == math.inf
    assert str(psis(1e4 * rng_of(0).normal(size=1000))) == "k-hat inf (bad: above 0.7)"


@given(SEEDS, st.floats(1.0, 5.0), st.integers(25, 300))
def test_khat_is_never_nan(seed, power, num_samples):
    result = psis(10**power * rng_of(seed).normal(size=num_samples))
    assert not math.isnan(result.khat)
    assert not result.log_weights.isnan().any()
    assert not math.isnan(psis(np.round(rng_of(seed).normal(size=num_samples))).khat)


@pytest.mark.parametrize("size", range(5, 140))
def test_ties_within_the_tail_have_a_khat(size):
    """A grid point of the fit is zero for some sizes of a tail of equal weights."""
    log_weights = np.zeros(3000)
    log_weights[:size] = 1.0
    assert psis(log_weights).level == "good"


# ---- laws ------------------------------------------------------------------------------------


@given(SEEDS, st.floats(-1e4, 1e4), st.floats(0.05, 3))
def test_a_constant_factor_and_the_order_change_nothing(seed, constant, spread):
    r = rng_of(seed)
    log_weights, order = spread * r.normal(size=200), r.permutation(200)
    one, other = psis(log_weights), psis(log_weights[order] + constant)
    assert other.khat == pytest.approx(one.khat, abs=1e-6)
    np.testing.assert_allclose(other.log_weights, one.log_weights[order], atol=1e-6)


@given(SEEDS, st.floats(0.05, 30))
def test_smoothed_weights_sum_to_one_and_keep_their_order(seed, spread):
    log_weights = spread * rng_of(seed).normal(size=200)
    result = psis(log_weights)
    assert float(result.log_weights.exp().sum()) == pytest.approx(1)
    assert (np.diff(result.log_weights.numpy()[np.argsort(log_weights)]) >= 0).all()
    assert 1 <= result.ess + 1e-9
    assert result.ess <= 200


def test_what_comes_back_has_the_dtype_that_came_in():
    log_weights = torch.randn(100, requires_grad=True)
    before = log_weights.detach().clone()
    result = psis(log_weights)
    assert result.log_weights.dtype == torch.float32
    assert not result.log_weights.requires_grad
    assert torch.equal(log_weights, before)
    assert psis(list(range(100))).log_weights.dtype == torch.float64
    assert psis(np.broadcast_to(np.arange(100.0)[::-1], (100,))).num_samples == 100
    assert result.tail_size == 20


@pytest.mark.parametrize(
    ("khat", "level", "text"),
    [
        (0.42, "good", "k-hat 0.42 ± 0.07 (good: below 0.5)"),
        (0.5, "good", "k-hat 0.50 ± 0.07 (good: below 0.5)"),
        (0.62, "ok", "k-hat 0.62 ± 0.07 (ok: between 0.5 and 0.7)"),
        (0.71, "bad", "k-hat 0.71 ± 0.07 (bad: above 0.7)"),
        (math.inf, "bad", "k-hat inf (bad: above 0.7)"),
        (-math.inf, "exact", "k-hat exact: all weights are equal up to rounding"),
    ],
)
def test_text_says_how_to_read(khat, level, text):
    result = Psis(khat, 0.07, torch.zeros(100), 20)
    assert result.level == level
    assert str(result) == text


@pytest.mark.parametrize(
    ("log_weights", "message"),
    [
        (np.zeros(24), "at least 25 draws, got 24"),
        (np.zeros((30, 2)), r"expected shape \(S,\), got \(30, 2\)"),
        (np.array([0.0] * 28 + [np.nan] * 2), r"has 2 NaN \(first at \[28\]\)"),
        (np.array([0.0, np.inf] * 20), r"has 20 \+inf \(first at \[1\]\)"),
        (np.full(30, -np.inf), "all are -inf"),
    ],
)
def test_faults_are_named(log_weights, message):
    with pytest.raises(ValueError, match=message):
        psis(log_weights)


# ---- many columns -----------------------------------------------------------------------------


def test_each_column_is_a_psis_of_its_own():
    r = rng_of(0)
    columns = np.stack(
        [
            *(
                weights_of(kind, r, 500)
                for kind in ("normal", "pareto", "heavy", "bounded", "huge")
            ),
            np.round(r.normal(size=500)),
            np.where(r.uniform(size=500) < 0.5, 0.0, -np.inf),
            np.where(np.arange(500) < 2, 0.0, -np.inf),
            np.full(500, -1130.0),
            1e4 * r.normal(size=500),
        ],
        axis=1,
    )
    table = khat_per_column(columns)
    alone = [psis(column) for column in columns.T]
    np.testing.assert_allclose(table.khat, [result.khat for result in alone], rtol=1e-12)
    np.testing.assert_allclose(table.se, [result.se for result in alone], rtol=1e-12)
    assert table.bad.tolist() == [i for i, result in enumerate(alone) if result.khat > 0.7]


def test_many_columns_are_fitted_in_parts():
    columns = rng_of(0).normal(size=(1000, 3000))
    khat = khat_per_column(columns).khat
    for n in (0, 1234, 2999):
        assert float(khat[n]) == pytest.approx(psis(columns[:, n]).khat, abs=1e-12)


@pytest.mark.parametrize(
    ("khat", "text"),
    [
        ([-math.inf, -math.inf], "all 2 exact"),
        ([0.1, 0.31, -math.inf], "all 3 below 0.7 (worst 0.31 ± 0.09 at row 1)"),
        ([0.1, 0.9], "row 1 of 2 is > 0.7 (0.90 ± 0.09)"),
        ([0.9, 0.1, math.inf], "rows 0, 2 of 3 are > 0.7 (worst inf at row 2)"),
        (
            [0.8] * 12,
            "rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more of 12 are > 0.7 "
            "(worst 0.80 ± 0.09 at row 0)",
        ),
    ],
)
def test_table_names_its_rows(khat, text):
    khat = torch.tensor(khat)
    table = KhatTable(khat, torch.full_like(khat, 0.09))
    assert str(table) == text


def test_table_names_the_column_at_fault():
    columns = np.zeros((30, 3))
    columns[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"has 1 NaN \(first at \[4, 1\]\)"):
        khat_per_column(columns)
    columns[:, 1] = -np.inf
    with pytest.raises(ValueError, match="all are -inf in column 1"):
        khat_per_column(columns)
    with pytest.raises(ValueError, match=r"expected shape \(S, N\), got \(30, 0\)"):
        khat_per_column(np.zeros((30, 0)))


# ---- plots ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "log_weights",
    [np.zeros(100), np.where(np.arange(100) < 60, 0.0, -np.inf), np.linspace(0, 3, 100)],
)
def test_plot_shows_the_weights_by_rank(log_weights):
    result = psis(log_weights)
    ax = result.plot()
    ranks, heights = ax.lines[0].get_data()
    assert heights.sum() == pytest.approx(1)
    assert (np.diff(heights) <= 0).all()
    assert result.plot(ax) is ax
    ax.figure.canvas.draw()


def test_plot_of_a_table_shows_every_column():
    khat = torch.tensor([0.1, -math.inf, 0.9, math.inf, 0.3])
    ax = KhatTable(khat, torch.full((5,), 0.1)).plot()
    rows, heights = ax.lines[0].get_data()
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert np.isfinite(heights).all()
    assert sorted(text.get_text() for text in ax.texts) == ["2", "3"]
    ax.figure.canvas.draw()


def test_weights_within_the_tolerance_count_as_constant():
    log_weights = 0.002 * torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    log_weights[0] = 0.012  # one far out: a tail, of no consequence
    assert not psis(log_weights).exact
    assert not psis(log_weights, tolerance=0.01).exact
    found = psis(log_weights, tolerance=0.03)
    assert found.exact
    assert str(found) == "k-hat exact: all weights are equal within 0.02"
    torch.testing.assert_close(found.log_weights.diff(), log_weights.diff())
    table = khat_per_column(torch.stack([log_weights, 100 * log_weights], -1), tolerance=0.03)
    assert table.khat[0] == -math.inf
    assert table.khat[1].isfinite()
