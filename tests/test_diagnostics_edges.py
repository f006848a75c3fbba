"""Units do not matter to diagnostics, at either end of what a double can hold."""

import math
import warnings

import numpy as np
import pytest
import torch

import latentlab.diagnostics as D

Z = np.random.default_rng(0).normal(size=(500, 2))
EDGES = [2.0**-990, 2.0**-600, 2.0**600, 2.0**990]  # powers of two, so that digits are the same


@pytest.mark.parametrize("factor", [1e300, 1e200, 1e160, 1e-160, 1e-300])
def test_scores_of_another_size_are_no_fit(factor):
    for found in (D.stein(Z, -Z * factor), D.stein(Z * factor, -Z)):
        assert not found.ok
        assert found.p_value < 1e-6
        assert "do not belong" in str(found)
        assert not math.isnan(found.largest)


@pytest.mark.parametrize("factor", EDGES)
def test_identities_hold_in_any_units(factor):
    plain, scaled = D.stein(Z, -Z), D.stein(Z * factor, -Z / factor)
    assert plain.ok
    assert scaled.largest == plain.largest
    assert torch.equal(scaled.spread, plain.spread)
    assert torch.equal(scaled.slope, plain.slope / factor)


def test_what_is_not_known_is_not_ok():
    nan = torch.full((2,), math.nan).double()
    found = D.Stein(("a", "b"), nan, nan, nan, nan, nan, nan, None, 1.0)
    assert not found.ok
    assert math.isnan(found.p_value)
    assert str(found).startswith("not known")
    mixed = D.Stein(("a", "b"), nan, nan, nan, *[torch.zeros(2).double()] * 3, None, 1.0)
    assert not mixed.ok  # wherever the NaN is


@pytest.mark.parametrize("factor", EDGES)
def test_errors_of_means_and_effective_sizes_are_those_of_any_units(factor):
    for kind in ("mean", "sd"):
        assert torch.equal(D.mcse(Z * factor, kind), D.mcse(Z, kind) * factor)
    for kind in ("bulk", "tail", "mean", "sd"):
        assert torch.equal(D.ess(Z * factor, kind), D.ess(Z, kind))
    for rank in (False, True):
        assert torch.equal(D.rhat(Z * factor, rank), D.rhat(Z, rank))
    plain, scaled = D.Estimate.from_draws(Z[:, 0]), D.Estimate.from_draws(Z[:, 0] * factor)
    assert scaled == D.Estimate(plain.value * factor, plain.se * factor)


def test_units_are_those_of_each_column():
    units = np.array([1e300, 1e-300])
    np.testing.assert_allclose(D.mcse(Z * units), D.mcse(Z).numpy() * units, rtol=1e-12)
    assert D.ess(np.full((8, 1), 5e-324)) == 8


def test_an_infinite_draw_has_no_error():
    x = Z.copy()
    x[3, 0] = np.inf
    assert D.mcse(x)[0].isnan()
    assert D.mcse(x)[1] == D.mcse(Z)[1]


@pytest.mark.parametrize("factor", EDGES)
def test_distances_are_those_of_any_units(factor):
    plain = D.sliced_wasserstein(Z, 2 * Z[::-1])
    scaled = D.sliced_wasserstein(Z * factor, 2 * factor * Z[::-1])
    assert scaled.value == D.Estimate(plain.value.value * factor, plain.value.se * factor)
    assert scaled.p_value == plain.p_value < 0.05
    for width in (None, 0.5):
        plain = D.mmd(Z, 2 * Z[::-1], width)
        scaled = D.mmd(Z * factor, 2 * factor * Z[::-1], width and width * factor)
        assert scaled.squared == plain.squared
        assert scaled.bandwidth == plain.bandwidth * factor
    assert D.c2st(Z * factor, 2 * factor * Z[::-1]) == D.c2st(Z, 2 * Z[::-1])
    assert str(D.compare_draws(Z * factor, 2 * factor * Z[::-1])) == str(
        D.compare_draws(Z, 2 * Z[::-1])
    )


def test_sets_in_different_units_are_far_apart():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert D.c2st(Z * 1e300, Z).p_value < 0.01
        assert D.sliced_wasserstein(Z * 1e300, Z).p_value < 0.05
        assert D.mmd(Z * 1e300, Z).p_value < 0.05
        with pytest.raises(ValueError, match="x: expected numbers within 1e\\+150 standard"):
            D.compare_draws(Z * 1e200, Z)
        found = D.compare_draws(Z * 1e-200, Z)
    assert found.log_ratio[0] == pytest.approx(-200 * math.log(10))


@pytest.mark.parametrize("factor", EDGES)
def test_weights_tell_errors_in_any_units(factor):
    log_w = 0.1 * Z[:, 0]
    plain, scaled = D.error_bounds(Z, log_w), D.error_bounds(Z * factor, log_w)
    assert torch.equal(scaled.mean, plain.mean)
    assert torch.equal(scaled.sd_se, plain.sd_se)
    assert scaled.wasserstein.value == plain.wasserstein.value * factor
    assert torch.isfinite(scaled.mean_se).all()
    errors = D.moment_errors(Z * factor, log_w)
    for field in ("shift", "shift_se", "ratio", "ratio_se"):
        assert torch.equal(getattr(errors, field), getattr(D.moment_errors(Z, log_w), field))


def test_moments_of_what_is_not_finite_are_refused():
    with pytest.raises(ValueError, match="draws: expected finite"):
        D.moment_errors(np.full((30, 1), np.nan), np.zeros(30))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="log_weights: expected numbers"):
            D.moment_errors(Z, np.full(500, bad))


def ranks(rows=100):
    return np.random.default_rng(1).integers(0, 100, (rows, 2)).astype(float)


def test_ranks_that_are_none_do_not_cover():
    one = ranks()
    one[7, 1] = np.nan
    for bad, message in (
        (one, r"whole numbers 0 to num_draws=99, got nan at \[7, 1\]"),
        (one * np.nan, "got nan"),
        (np.full((20, 1), 0.5), "got 0.5"),
        (ranks(1), "at least 10 simulations, got 1"),
    ):
        with pytest.raises(ValueError, match=f"ranks: expected .*{message}"):
            D.coverage(bad, 99)


@pytest.mark.parametrize("factor", EDGES)
def test_credible_regions_hold_in_any_units(factor):
    rng = np.random.default_rng(2)
    truth, draws, at = rng.normal(size=(50, 2)), rng.normal(size=(50, 40, 2)), Z[:50]
    plain, scaled = D.tarp(truth, draws, at), D.tarp(*(factor * v for v in (truth, draws, at)))
    assert torch.equal(plain.coverage, scaled.coverage)


def test_draws_in_other_units_than_the_truth_do_not_cover():
    rng = np.random.default_rng(2)
    truth, draws, at = rng.normal(size=(50, 2)), rng.normal(size=(50, 40, 2)), Z[:50]
    with pytest.raises(ValueError, match="references: expected numbers within 1e\\+150"):
        D.tarp(truth / 1e300, draws, at)
    with pytest.raises(ValueError, match="draws: expected numbers within 1e\\+150"):
        D.tarp(truth, draws * 1e300, at)
    assert not D.tarp(truth * 1e300, draws, at).ok  # far from all draws: in no region
    for field in ("sd", "prior_sd"):
        widths = {"sd": np.ones((50, 2)), "prior_sd": np.ones(2)}
        widths[field] = widths[field] * 1e-200
        with pytest.raises(ValueError, match=f"^{field}: expected widths"):
            D.contraction(truth, truth + 1, **widths)


def test_infinite_rows_and_replicates_are_refused():
    log_lik = -(Z[:, :1] ** 2) * np.ones((1, 5))
    y, rep = np.zeros(5), np.random.default_rng(0).normal(size=(500, 5))
    for bad in (np.inf, -np.inf):
        with pytest.raises(ValueError, match="observed: expected finite numbers, got 5 infinite"):
            D.loo_pit(y + bad, rep, log_lik)
        with pytest.raises(ValueError, match="replicated: expected finite numbers"):
            D.loo_pit(y, rep + bad, log_lik)


def test_weight_on_one_draw_has_errors_that_are_not_known():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = D.sensitivity(Z, -(Z[:, 0] ** 2) * 1e12, -(Z[:, 1] ** 2))
    assert found.prior_se.isinf().all()
    assert found.likelihood_se.isfinite().all()
    assert "do not trust this" in str(found)


def test_statistics_far_out_are_told():
    rep = np.random.default_rng(3).normal(size=(100, 30)) * 1e200
    found = D.ppc(rep[0] + 1e201, rep, {"mean": torch.mean})
    assert not found.ok
    assert found.z[0] > 5


@pytest.mark.parametrize("factor", EDGES)
def test_replicates_are_compared_in_any_units(factor):
    y, *rep = np.random.default_rng(3).normal(size=(101, 30))
    plain = D.ppc(y, rep, ordered=True)
    scaled = D.ppc(y * factor, np.array(rep) * factor, ordered=True)
    assert scaled.p_value == plain.p_value
    assert torch.equal(scaled.p_values, plain.p_values)
    assert torch.equal(scaled.observed[:4], plain.observed[:4] * factor)
    assert torch.equal(scaled.z, plain.z)


def test_weight_on_one_draw_is_no_sign_that_moments_are_right():
    found = D.moment_errors(Z, Z[:, 0] * 1e300)
    assert found.ratio.isinf().all()
    assert found.shift.isinf().all()
    assert found.shift_se.isnan().all()


def test_scores_far_apart_are_not_as_good():
    rows = -((Z[:, :1] - np.linspace(-1, 1, 20)) ** 2) / 2
    far = np.linspace(1, 2, 20) * rows
    found = D.compare({"a": D.loo(far * 1e200), "b": D.loo(rows)})
    assert found.best == "b"
    assert math.isfinite(found.differences[1].se)
    assert not found.as_good


def test_encodings_that_are_not_numbers_are_no_collapse():
    for bad in (np.nan, np.inf, 1e200):
        with pytest.raises(ValueError, match="loc: expected finite numbers below 1e\\+150"):
            D.collapse(Z * bad)
        with pytest.raises(ValueError, match="loc: expected finite"):
            D.information(Z * bad, np.ones((500, 2)))
