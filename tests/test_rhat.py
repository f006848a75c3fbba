"""Split R-hat is the textbook's, and ArviZ's; that of ranks, too."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentlab.diagnostics import rhat


@pytest.fixture(scope="module")
def arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    if not arviz.__version__.startswith("0."):
        pytest.skip("ArviZ 1.x takes other arrays")
    return arviz


@pytest.mark.parametrize("num_samples", [4, 5, 100, 1001])
@pytest.mark.parametrize("num_chains", [2, 4])
def test_equals_arviz(arviz, num_chains, num_samples):
    r = np.random.default_rng(0)
    x = r.normal(size=(num_chains, num_samples, 5)).cumsum(1) + r.normal(size=(num_chains, 1, 5))
    expected = [arviz.rhat(x[:, :, p], method="split") for p in range(5)]
    np.testing.assert_allclose(rhat(x), expected, rtol=1e-12)


@pytest.mark.parametrize("num_samples", [8, 101])
def test_one_chain_is_compared_with_itself(arviz, num_samples):
    x = np.random.default_rng(1).normal(size=(num_samples, 3)).cumsum(0)
    half = num_samples // 2
    halves = np.stack([x[:half], x[-half:]])
    expected = [arviz.rhat(halves[:, :, p], method="identity") for p in range(3)]
    np.testing.assert_allclose(rhat(torch.from_numpy(x)), expected, rtol=1e-12)
    np.testing.assert_allclose(rhat(x[None]), expected, rtol=1e-12)


@pytest.mark.parametrize("num_samples", [4, 5, 100, 1001])
@pytest.mark.parametrize("num_chains", [2, 4])
def test_that_of_ranks_equals_arviz(arviz, num_chains, num_samples):
    r = np.random.default_rng(0)
    x = r.standard_cauchy(size=(num_chains, num_samples, 8))
    x[0, :, 1] *= 10  # one chain is wider
    x[0, :, 2] += 1
    x[:, :, 3] = x[:, :, 3].cumsum(1)
    x[:, :, 4] = np.round(x[:, :, 4])  # ties
    expected = [arviz.rhat(x[:, :, p], method="rank") for p in range(8)]
    np.testing.assert_allclose(rhat(x, rank=True), expected, rtol=1e-10)


@given(st.integers(0, 2**32 - 1))
def test_ranks_see_a_spread_that_differs_and_bear_heavy_tails(seed):
    r = np.random.default_rng(seed)
    x = torch.from_numpy(r.normal(size=(4, 500, 1)))
    x[0] *= 4
    assert float(rhat(x)) < 1.02
    assert float(rhat(x, rank=True)) > 1.1
    heavy = torch.from_numpy(r.standard_cauchy(size=(4, 500, 1)))
    assert float(rhat(heavy, rank=True)) < 1.03
    heavy[0] += 5
    assert float(rhat(heavy, rank=True)) > 1.1


def test_by_hand():
    """Halves (0, 2) and (1, 3): W = 2, B = 1/2, so R-hat^2 = 1/2 + 1/4."""
    assert float(rhat([[0.0], [2.0], [1.0], [3.0]])) == pytest.approx(math.sqrt(0.75))


@given(st.integers(0, 2**32 - 1), st.floats(-100, 100), st.floats(0.01, 100))
def test_units_and_the_order_of_chains_do_not_matter(seed, shift, scale):
    x = np.random.default_rng(seed).normal(size=(3, 20, 2))
    np.testing.assert_allclose(rhat(shift + scale * x[::-1]), rhat(x), rtol=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_noise_has_forgotten_and_a_trend_has_not(seed):
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 1000, 1)))
    assert float(rhat(x)) < 1.02
    assert float(rhat(x + torch.linspace(0, 3, 1000)[:, None])) > 1.2
    assert float(rhat(x + torch.arange(4.0)[:, None, None])) > 1.3


@pytest.mark.parametrize("rank", [False, True])
def test_columns_that_do_not_move(rank):
    x = np.random.default_rng(0).normal(size=(10, 4))
    x[:, 1] = 0.1
    x[:5, 2], x[5:, 2] = 1.0, 2.0
    x[3, 3] = np.nan
    result = rhat(x, rank)
    assert result[1] == 1
    assert result[2] == math.inf
    assert result[3].isnan()
    assert result[0] == rhat(x[:, :1], rank)[0]


@pytest.mark.parametrize("shape", [(10,), (3, 2), (2, 3, 1), (1, 1, 10, 2), (0, 10, 2)])
def test_faults_are_named(shape):
    with pytest.raises(ValueError, match=r"expected shape \(S, P\) or \(C, S, P\)"):
        rhat(np.zeros(shape))
