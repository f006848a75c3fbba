"""Replicates pass predictive checks at the nominal rate; what the model lacks is named."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentlab.diagnostics import pit, plot_densities, ppc, rootogram

SEEDS = st.integers(0, 2**32 - 1)


def rng_of(seed):
    return np.random.default_rng(seed)


def overdispersed(rng, num, mean=3.0):
    return rng.negative_binomial(2, 2 / (2 + mean), size=num)


# ---- statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "poisson"])
def test_data_of_the_model_pass_at_the_nominal_rate(kind):
    rng, p, single = rng_of(0), [], []
    for _ in range(300):
        both = rng.normal(size=(100, 40)) if kind == "normal" else rng.poisson(2, size=(100, 40))
        found = ppc(both[0], both[1:], ordered=True)
        p.append(found.p_value.value)
        single.append(found.p_values[1])  # of the sd
    for level in (0.05, 0.5):
        share = np.mean(np.array(p) <= level + 1e-9)
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 300)
    assert abs(np.mean(single) - 0.5) < 4 * math.sqrt(1 / 12 / 300)


@settings(max_examples=20)
@given(SEEDS)
def test_overdispersed_counts_are_caught(seed):
    rng = rng_of(seed)
    found = ppc(overdispersed(rng, 300), rng.poisson(3, size=(200, 300)))
    assert not found.ok
    assert "sd too high" in str(found)
    assert found.names == ("mean", "sd", "min", "max", "zeros")
    assert found.z[1] > 3
    assert found.p_value.value == pytest.approx(1 / 201)


def test_statistics_are_those_of_numpy():
    rng = rng_of(0)
    y, rep = rng.poisson(2, (30, 2)).astype(float), rng.poisson(2, (40, 30, 2))
    found = ppc(y, rep, ordered=True)
    assert found.names[:2] == ("mean [0]", "mean [1]")
    lag = [np.corrcoef(y[1:, d], y[:-1, d])[0, 1] for d in (0, 1)]
    exact = [*y.mean(0), *y.std(0, ddof=1), *y.min(0), *y.max(0), *(y == 0).mean(0)]
    np.testing.assert_allclose(found.observed[:10], exact)
    np.testing.assert_allclose(found.observed[10:], lag, atol=0.1)
    np.testing.assert_allclose(found.replicated[7, :2], rep[7].mean(0))
    larger = (rep.mean(1) > y.mean(0)).mean(0) + 0.5 * (rep.mean(1) == y.mean(0)).mean(0)
    np.testing.assert_allclose(found.p_values[:2], larger)


def test_the_joint_distance_is_that_of_mahalanobis():
    from scipy.spatial.distance import mahalanobis

    rng = rng_of(1)
    y, rep = rng.normal(size=20), rng.normal(size=(50, 20))
    found = ppc(y, rep)
    rows = np.vstack([found.observed, found.replicated])
    precision = np.linalg.inv(np.cov(rows.T, bias=True))
    exact = [mahalanobis(row, rows.mean(0), precision) for row in rows]
    assert found.distance == pytest.approx(exact[0])
    assert found.p_value.value == pytest.approx(np.mean(np.array(exact) >= exact[0]))


def test_what_no_statistic_sees_alone_is_seen_together():
    rng = rng_of(0)
    both = {"a": lambda x: x[:, 0].mean(), "b": lambda x: x[:, 1].mean()}
    common = rng.normal(size=(200, 1, 1))
    rep = common + 0.1 * rng.normal(size=(200, 30, 2))
    found = ppc(rep[0] * [0, 0] + [1.0, -1.0] + 0.1 * rng.normal(size=(30, 2)), rep, both)
    assert not found.ok
    assert str(found).endswith("no single statistic, but how they go together")


def test_statistics_of_ones_own_and_sequences():
    rng = rng_of(0)
    walk = rng.normal(size=100).cumsum()
    found = ppc(walk, walk.std() * rng.normal(size=(99, 100)), {"max": torch.max}, ordered=True)
    assert found.names == ("max", "lag 1")
    assert "lag 1 too high" in str(found)
    assert ppc(np.ones(10), np.ones((20, 10)), {"max": torch.max}).p_value.value == 1.0
    odd = ppc(np.ones(10), np.zeros((20, 10)), {"max": torch.max})
    assert odd.z.tolist() == [math.inf]
    assert odd.p_value.value == pytest.approx(1 / 21)


# ---- probability integral transform ----------------------------------------------------------


def test_right_predictions_of_counts_are_uniform_at_the_nominal_rate():
    rng, wrong = rng_of(0), 0
    for seed in range(200):
        rate = rng.gamma(2, size=50)
        wrong += not pit(rng.poisson(rate), rng.poisson(rate, size=(19, 50)), seed).ok
    assert wrong / 200 < 0.05 + 4 * math.sqrt(0.0475 / 200)


def test_wrong_predictions_are_named():
    rng = rng_of(0)
    rep = rng.normal(size=(100, 500))
    assert "too narrow" in str(pit(2 * rng.normal(size=500), rep))
    assert "too wide" in str(pit(0.5 * rng.normal(size=500), rep))
    assert "biased low" in str(pit(1 + rng.normal(size=500), rep))
    assert "too narrow" in str(pit(overdispersed(rng, 500), rng.poisson(3, size=(100, 500))))
    found = pit(rng.normal(size=(20, 2)), rng.normal(size=(9, 20, 2)))
    assert found.values.shape == (40,)
    assert found.num_replicates == 9


# ---- pictures ---------------------------------------------------------------------------------


def test_frequencies_are_counted():
    rep = np.tile([0, 1, 1, 3], (20, 1))
    found = rootogram([0, 0, 1, 2], rep)
    assert found.counts.tolist() == [0, 1, 2, 3]
    assert found.observed.tolist() == [2, 1, 1, 0]
    assert found.expected.tolist() == found.lower.tolist() == found.upper.tolist() == [1, 2, 0, 1]
    assert found.outside == [0, 1, 2, 3]
    rng = rng_of(0)
    many = rootogram(rng.poisson(3, 1000), rng.poisson(3, size=(400, 1000)))
    assert len(many.outside) <= 4
    assert 0 in rootogram(overdispersed(rng, 1000), rng.poisson(3, size=(400, 1000))).outside


def test_plots_are_drawn():
    rng = rng_of(0)
    y, rep = rng.poisson(3, 50), rng.poisson(3, size=(60, 50))
    assert "all together" in ppc(y, rep).plot().get_title()
    assert pit(y, rep).plot().get_xlabel() == "probability integral transform"
    assert rootogram(y, rep).plot().get_xlabel() == "count"
    ax = plot_densities(y, rep)
    assert plot_densities(np.ones(5), np.ones((3, 5)), ax) is ax


ONES = np.ones(20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ppc(np.ones(1), np.ones((20, 1))), r"observed: expected shape \(N,\) or \(N, D"),
        (lambda: ppc(ONES, np.ones((19, 20))), r"shape \(R, 20\) with R at least 20, got \(19"),
        (lambda: ppc(ONES, np.ones((20, 21))), "replicated: expected shape"),
        (lambda: ppc(ONES * np.nan, np.ones((20, 20))), r"observed: expected finite .* at \[0\]"),
        (lambda: ppc(ONES, np.full((20, 20), np.inf)), "replicated: expected finite"),
        (lambda: ppc(ONES, np.ones((20, 20)), {}), "statistics: expected at least one, got none"),
        (
            lambda: ppc(ONES, np.ones((20, 20)), {"f": lambda y: float("nan")}),
            "statistics: 'f' is not finite",
        ),
        (
            lambda: ppc(np.ones((20, 3)), np.ones((20, 20, 3))),
            "at least 30 data sets for 15 statistics, got 20",
        ),
        (lambda: rootogram(ONES, np.full((20, 20), 0.5)), "replicated: .* from 0, got 0.5"),
        (lambda: rootogram(-ONES, np.ones((20, 20))), "observed: .* from 0, got -1"),
        (lambda: rootogram(np.ones((20, 1)), np.ones((20, 20, 1))), r"expected shape \(N,\)"),
        (lambda: pit(ONES[:9], np.ones((5, 9))), "at least 10"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
