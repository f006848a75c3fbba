"""Sequences come in many forms, and are one thing in the end."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import latentlab as ll
from latentlab.data import Sequences, Table, as_sequences

RAGGED = [
    np.arange(6.0).reshape(3, 2),
    np.arange(2.0).reshape(1, 2),
    10 + np.arange(4.0).reshape(2, 2),
]


def same(a, b):
    return torch.equal(a.lengths, b.lengths) and torch.equal(
        a.x.nan_to_num(-1), b.x.nan_to_num(-1)
    )


def test_every_form_is_the_same_sequences():
    wanted = as_sequences(RAGGED)
    padded = torch.full((3, 3, 2), 7.0, dtype=torch.float64)
    for b, one in enumerate(RAGGED):
        padded[b, : len(one)] = torch.from_numpy(one)
    frame = pd.concat(
        pd.DataFrame(one, columns=["u", "v"]).assign(who="cab"[b], day=range(len(one)))
        for b, one in enumerate(RAGGED)
    )
    for other in (
        as_sequences([torch.from_numpy(one) for one in RAGGED]),
        as_sequences([one.tolist() for one in RAGGED]),
        as_sequences(np.concatenate(RAGGED), [3, 1, 2]),
        as_sequences(padded, torch.tensor([3, 1, 2])),
        as_sequences(wanted),
        as_sequences(frame, id="who", time="day"),
        as_sequences(pl.from_pandas(frame), id="who", time="day"),
        as_sequences([pd.DataFrame(one) for one in RAGGED]),
    ):
        assert same(wanted, other)
    assert wanted.lengths.tolist() == [3, 1, 2]
    assert wanted.x.isnan().sum() == 2 * 3
    assert [len(part) for part in wanted.split(wanted.x)] == [3, 1, 2]


def test_one_array_is_one_sequence():
    for data in ([1, 2, 3], np.arange(3), torch.arange(3.0), pd.Series([1.0, 2.0, 3.0])):
        assert as_sequences(data).x.shape == (1, 3, 1)
    assert as_sequences(np.zeros((4, 2))).x.shape == (1, 4, 2)
    assert as_sequences([np.zeros(4), np.zeros(2)]).x.shape == (2, 4, 1)


def test_time_orders_the_steps_within_an_id():
    frame = pd.DataFrame({"id": [2, 1, 2, 1], "t": [5, 3, 4, 9], "y": [0.0, 1.0, 2.0, 3.0]})
    found = as_sequences(frame, id="id", time="t")
    assert found.x[..., 0].tolist() == [[2.0, 0.0], [1.0, 3.0]]
    assert found.names == ("y",)
    table = Table(torch.tensor(frame.to_numpy()), ("id", "t", "y"))
    assert same(found, as_sequences(table, id="id", time="t"))


def test_a_time_that_is_there_twice_is_refused():
    frame = pd.DataFrame({"id": [1, 2, 1], "t": [5, 5, 5], "y": [0.0, 1.0, 2.0]})
    with pytest.raises(ValueError, match=r"time: expected each 't' once .* 5 again for id '1'"):
        as_sequences(frame, id="id", time="t")


@pytest.mark.parametrize(
    "times",
    [
        ["10", "9", "-1"],
        ["2026-02-01", "2026-01-31", "2025-12-31"],
        ["2026-01-01T10:00", "2026-01-01 09:30", "2026-01-01"],
        pd.to_datetime(["2026-02-01", "2026-01-31", "2025-12-31"]),
        [pd.Timestamp(2026, 2, 1), pd.Timestamp(2026, 1, 31), pd.Timestamp(2025, 12, 31)],
        pd.to_timedelta([3, 2, 1], unit="h"),
        pd.period_range("2026-01", periods=3, freq="M")[::-1],
        pd.Categorical(["late", "mid", "early"], ["early", "mid", "late"], ordered=True),
        [2.0, 1.5, -np.inf],
    ],
)
def test_steps_are_in_the_order_in_which_they_passed(times):
    frame = pd.DataFrame({"t": times, "y": [0.0, 1.0, 2.0]})
    assert as_sequences(frame, time="t").x[0, :, 0].tolist() == [2.0, 1.0, 0.0]


def test_text_that_is_no_time_is_refused():
    """Sorted as text, week 10 would come before week 2."""
    for times in (["week 2", "week 10"], ["1/2/2026", "2/1/2026"], ["1", "2026-01-31"]):
        frame = pd.DataFrame({"t": times, "y": [0.0, 1.0]})
        with pytest.raises(ValueError, match=r"time: expected numbers, or dates .* 't' of x, got"):
            as_sequences(frame, time="t")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 3))
def test_rows_and_padding_share_the_tensor(lengths, width):
    parts = [np.random.default_rng(n).normal(size=(n, width)) for n in lengths]
    found = as_sequences(parts)
    assert found.lengths.tolist() == lengths
    np.testing.assert_array_equal(found.rows().x.numpy(), np.concatenate(parts))
    assert found.x.isnan().sum() == width * (max(lengths) * len(lengths) - sum(lengths))


@pytest.mark.parametrize(
    ("data", "lengths", "message"),
    [
        (np.zeros((5, 2)), [2, 2], "sum to the 5 rows of x, got the sum 4"),
        (np.zeros((5, 2)), [5, 0], r"at least 1 step a sequence, got 0 at \[1\]"),
        (np.zeros((5, 2)), [6, -1], r"got -1 at \[1\]"),
        (np.zeros((5, 2)), [2.0, 3.0], "whole numbers"),
        (np.zeros((5, 2)), 5, "whole numbers"),
        (np.zeros((2, 5, 1)), [3], "expected 2, one a sequence, got 1"),
        (np.zeros((2, 5, 1)), [3, 6], r"at most the 5 steps of x, got 6 at \[1\]"),
        (RAGGED, [3, 1, 2], "expected none beside a list"),
        ([np.zeros((2, 2)), np.zeros((2, 3))], None, "same columns"),
        ([np.zeros((2, 2)), np.zeros((0, 2))], None, r"x\[1\] is empty"),
        ([], None, "empty"),
        ([np.zeros(3), np.array([0, np.inf])], None, r"x\[1\] has 1 inf"),
    ],
)
def test_what_is_no_sequences_is_named(data, lengths, message):
    with pytest.raises(ValueError, match=message):
        as_sequences(data, lengths)


@pytest.mark.parametrize("data", [["a", "b"], np.zeros(3, complex), [np.array(["1", "2"])]])
def test_what_is_no_number_is_refused(data):
    with pytest.raises(TypeError, match="real numbers"):
        as_sequences(data)


def test_numbers_of_other_kinds_are_numbers():
    for data in (np.array([1, None, 2], object), np.ma.masked_equal([1, 0, 2], 0)):
        assert as_sequences(data).x[0, :, 0].isnan().tolist() == [False, True, False]
    for data in (np.array([True, False]), np.array([1, 2], np.int8)):
        assert as_sequences(data).x.dtype == torch.float64
    with pytest.warns(UserWarning, match="coarse"):
        assert as_sequences(torch.zeros(3, dtype=torch.float16)).x.dtype == torch.float64


def test_a_sequence_of_one_step_is_one():
    assert as_sequences([np.zeros((1, 2))]).x.shape == (1, 1, 2)


def test_columns_are_matched_by_name():
    one = as_sequences([pd.DataFrame({"u": [1.0], "v": [2.0]})])
    other = as_sequences([pd.DataFrame({"v": [2.0], "u": [1.0]})], names=("u", "v"))
    assert same(one, other)
    with pytest.raises(ValueError, match="missing 'v'"):
        as_sequences([pd.DataFrame({"u": [2.0], "w": [1.0]})], names=("u", "v"))


def test_a_mixture_takes_no_sequences():
    mixture = ll.GaussianMixture(2, 1)
    for data in ([one.tolist() for one in RAGGED], np.zeros((2, 3, 2))):
        with pytest.raises((TypeError, ValueError)):
            ll.fit(mixture, data)


def test_shapes_have_to_agree():
    with pytest.raises(ValueError, match=r"expected shapes \(B, T, D\) and \(B,\)"):
        Sequences(torch.zeros(2, 3, 1), torch.tensor([3]))
