"""One plate, three readings: all rows, a batch that stands for them, a prior draw."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from latentlab import rows


def model(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with rows(x, size):
        return pyro.sample("x", dist.Normal(loc, 2.0), obs=x)


def log_likelihood(x, size=None, loc=0.5):
    trace = poutine.trace(poutine.condition(model, {"loc": torch.tensor(loc)})).get_trace(x, size)
    return float(trace.log_prob_sum(lambda name, site: name == "x"))


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


# ---- whole, batch, draw -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 7])
def test_all_rows_count_once(size):
    x = numbers(7)
    expected = stats.norm(0.5, 2).logpdf(x.numpy()).sum()
    assert log_likelihood(x, size) == pytest.approx(expected, rel=1e-6)


@given(st.integers(1, 20), st.integers(0, 1000))
def test_a_row_of_a_batch_counts_for_n_over_b(num_given, num_others):
    x, size = numbers(num_given), num_given + num_others
    expected = size / num_given * stats.norm(0.5, 2).logpdf(x.numpy()).sum()
    assert log_likelihood(x, size) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 6, 12])
def test_a_batch_stands_for_the_whole_data_set(batch_size):
    x = numbers(12)
    parts = [log_likelihood(part, size=12) for part in x.split(batch_size)]
    assert np.mean(parts) == pytest.approx(log_likelihood(x), rel=1e-6)


def test_the_prior_is_not_scaled():
    conditioned = poutine.condition(model, {"loc": torch.tensor(0.5)})
    trace = poutine.trace(conditioned).get_trace(numbers(2), 100)
    prior = trace.log_prob_sum(lambda name, site: name == "loc")
    assert float(prior) == pytest.approx(stats.norm(0, 10).logpdf(0.5), rel=1e-6)


def test_a_prior_draw_has_as_many_rows_as_asked():
    assert model(size=5).shape == (5,)
    assert model(size=np.int64(3)).shape == (3,)
    draw = model(size=10_000)
    assert float(draw.std()) == pytest.approx(2, abs=5 * 2 / math.sqrt(2 * 10_000))


# ---- in company -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("dim", [-2, -1])
def test_rows_nest_in_other_plates(size, dim):
    x, other = numbers(4, 3), -3 - dim

    def nested(x=None, size=None):
        data = x if x is None or dim == -2 else x.T
        with rows(x, size, name="people", dim=dim), pyro.plate("columns", 3, dim=other):
            return pyro.sample("x", dist.Normal(0.0, 1.0), obs=data)

    trace = poutine.trace(nested).get_trace(x, size)
    frames = {f.name: (f.dim, f.size) for f in trace.nodes["x"]["cond_indep_stack"]}
    assert frames == {"columns": (other, 3), "people": (dim, 4)}
    expected = (size or 4) / 4 * stats.norm.logpdf(x.numpy()).sum()
    assert float(trace.log_prob_sum()) == pytest.approx(expected)
    assert nested(size=6).shape == ((6, 3) if dim == -2 else (3, 6))


def test_two_kinds_of_rows_have_names_of_their_own():
    def two(x, y):
        with rows(x, name="people"):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        with rows(y, name="visits"):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    trace = poutine.trace(two).get_trace(numbers(4), numbers(6))
    assert {n for n in trace.nodes if trace.nodes[n]["type"] == "sample"} == {
        "people",
        "x",
        "visits",
        "y",
    }


def test_rows_may_have_any_shape():
    def images(x=None, size=None):
        with rows(x, size):
            return pyro.sample("x", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2), obs=x)

    x = numbers(4, 2, 3)
    trace = poutine.trace(images).get_trace(x, 40)
    assert float(trace.log_prob_sum()) == pytest.approx(10 * stats.norm.logpdf(x.numpy()).sum())


# ---- faults are named -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "size", "message"),
    [
        (None, None, "expected the data x or a number of rows, got neither; .* size=..."),
        (numbers(3), 2, "size: expected at least the 3 rows of x, got 2"),
        (numbers(3), 2.5, r"size must be an int >= 1, got 2.5 \(float\)"),
        (None, 0, r"size must be an int >= 1, got 0 \(int\)"),
        (None, -1, r"size must be an int >= 1, got -1 \(int\)"),
        (None, True, r"size must be an int >= 1, got True \(bool\)"),
        (None, "3", r"size must be an int >= 1, got '3' \(str\)"),
        (torch.zeros(0, 2), None, r"x: expected at least one row, got shape \(0, 2\)"),
        (torch.tensor(1.0), None, r"x: expected at least one row, got shape \(\)"),
    ],
)
def test_faults_are_named(x, size, message):
    with pytest.raises(ValueError, match=message):
        rows(x, size)
