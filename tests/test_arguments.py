"""Data come in as people have them, and reach the model as tensors of its own."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from scipy import sparse
from torch import nn

from latentlab.data import Table
from latentlab.inference.arguments import as_arguments
from latentlab.inference.pair import Arguments

ROWS = [[1.0, 2.0], [3.0, 4.0]]


def model(x=None, size=None):
    """No parameters, no knowledge of missing cells."""


class Network(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=dtype)

    def forward(self, x):
        return self.layer(x)

    def guide(self, x):
        return self.layer(x)


class Measured(nn.Module):
    """Knows missing cells, and measures its columns."""

    tolerates_missing = True

    def scale_to(self, x):
        return self

    def forward(self, x):
        return x


def only(data, model=model):
    (value,) = as_arguments(data, model).args
    return value


# ---- one argument, several, keywords ----------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        torch.tensor(ROWS, dtype=torch.float64),
        np.array(ROWS),
        np.array(ROWS, dtype=np.float32),
        np.array(ROWS, dtype=">f8"),
        np.array(ROWS, dtype=np.longdouble),
        np.array(ROWS, order="F"),
        np.array(ROWS, dtype=object),
        np.ma.array(ROWS),
        ROWS,
        pd.DataFrame(ROWS, columns=["a", "b"]),
        pl.DataFrame(ROWS, schema=["a", "b"], orient="row"),
        Table(torch.tensor(ROWS, dtype=torch.float64), ("a", "b")),
    ],
    ids=lambda data: f"{type(data).__name__} {getattr(data, 'dtype', '')}",
)
def test_rows_are_one_tensor_whatever_they_came_in(data):
    found = only(data)
    assert found.tolist() == ROWS
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    "data", [pd.Series([1.0, 2.0]), pl.Series([1.0, 2.0]), np.array([1, 2.0], dtype=object)]
)
def test_a_series_is_a_vector(data):
    assert torch.equal(only(data), torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_columns_keep_their_names():
    frame = pd.DataFrame({"rownames": ["x", "y"], "length": [1.0, 2.0], "mass": [3.0, 4.0]})
    assert as_arguments(frame, model).names == ("length", "mass")
    assert as_arguments(pl.from_pandas(frame[["mass"]]), model).names == ("mass",)
    assert as_arguments(Table(torch.ones(2, 1), ("mass",)), model).names == ("mass",)
    assert as_arguments(np.array(ROWS), model).names is None


def test_a_tuple_is_several_arguments_and_a_dict_is_keywords():
    several = as_arguments((np.arange(3), ROWS, None, 0.5, True), model)
    assert several.call(lambda *args: len(args)) == 5
    assert torch.equal(several.args[0], torch.arange(3))
    assert several.args[2:] == (None, 0.5, True)
    keywords = as_arguments({"x": ROWS, "size": 7}, model)
    assert keywords.args == ()
    assert keywords.kwargs["size"] == 7
    assert keywords.call(lambda x, size: (x.shape, size)) == ((2, 2), 7)


def test_no_data_are_no_arguments():
    assert as_arguments(None, model) == Arguments()


def test_arguments_stay_as_they_are():
    arguments = Arguments((1,))
    assert as_arguments(arguments, model) is arguments


@pytest.mark.parametrize("make", [torch.tensor, np.array, list])
def test_sequences_of_several_lengths_are_a_list(make):
    found = only([make([1.0, 2.0]), make([3.0])])
    assert [sequence.tolist() for sequence in found] == [[1, 2], [3]]


def test_sequences_of_one_length_are_a_list_if_they_are_arrays():
    assert len(only([np.zeros(3), np.ones(3)])) == 2
    assert only([[0.0] * 3, [1.0] * 3]).shape == (2, 3)


def test_tensors_in_lists_count_as_data():
    arguments = as_arguments(([torch.zeros(2), torch.ones(3)], torch.ones(1)), model)
    assert [len(tensor) for tensor in arguments.tensors()] == [2, 3, 1]
    doubled = arguments.map(lambda tensor: 2 * tensor)
    assert [float(tensor.sum()) for tensor in doubled.tensors()] == [0, 6, 2]
    assert [type(arg) for arg in doubled.args] == [list, torch.Tensor]


# ---- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["module", "method", "closure"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays_take_the_dtype_of_the_parameters(kind, dtype):
    network = Network(dtype)
    pair = {"module": network, "method": network.guide, "closure": lambda x: network(x)}
    for data in (np.array(ROWS), ROWS, pd.DataFrame(ROWS), Table(torch.tensor(ROWS), ("a", "b"))):
        assert only(data, pair[kind]).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.bool])
def test_tensors_keep_their_dtype(dtype):
    assert only(torch.ones(3, dtype=dtype)).dtype == dtype
    assert only(torch.ones(3, dtype=dtype), Network(torch.float64)).dtype == dtype


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (np.arange(3), torch.int64),
        (np.arange(3, dtype=np.int32), torch.int32),
        (np.arange(3, dtype=">i4"), torch.int32),
        (np.arange(3, dtype=np.uint8), torch.uint8),
        (np.arange(3, dtype=np.uint16), torch.int64),
        (np.arange(3, dtype=np.uint32), torch.int64),
        ([0, 1, 2], torch.int64),
        (np.array([False, True, True]), torch.bool),
    ],
)
def test_whole_numbers_and_truth_values_stay_so(data, dtype):
    """They may be categories or indices; a model that wants real numbers has them so."""
    found = only(data)
    assert found.dtype == dtype
    assert found.tolist() == list(data)


@pytest.mark.parametrize("data", [np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]])
def test_a_model_that_measures_its_columns_has_real_numbers(data):
    assert only(data, Measured()).dtype == torch.float64
    assert only(torch.tensor(data), Measured()).dtype == torch.float64


@pytest.mark.parametrize(
    "data",
    [
        np.ones(3, dtype=np.float16),
        torch.ones(3, dtype=torch.float16),
        torch.ones(3, dtype=torch.bfloat16),
    ],
)
def test_half_precision_is_converted_with_a_warning(data):
    for function, dtype in ((model, torch.float64), (Network(torch.float32), torch.float32)):
        message = rf"^x: torch\.b?float16 is coarse; converted to {dtype}"
        with pytest.warns(UserWarning, match=message) as caught:
            assert only(data, function).dtype == dtype
        assert len(caught) == 1


# ---- a copy -----------------------------------------------------------------------------------


def test_data_are_the_fits_own():
    """What happens to the original later does not reach the fit, nor the fit the original."""
    originals = [torch.zeros(2, 2), np.zeros((2, 2)), Table(torch.zeros(2, 2), ("a", "b"))]
    for original in originals:
        copied = only(original)
        (original.x if isinstance(original, Table) else original)[:] = 1
        assert copied.sum() == 0


def test_a_gradient_stays_outside():
    x = torch.ones(3, requires_grad=True)
    for given in (x, 2 * x):
        found = only(given)
        assert not found.requires_grad
        assert found.grad_fn is None
    assert x.requires_grad


# ---- missing and infinite ---------------------------------------------------------------------


def missing(make):
    return make([[1.0, 2.0], [3.0, 4.0], [5.0, float("nan")]])


@pytest.mark.parametrize("make", [torch.tensor, np.array, pd.DataFrame, list])
def test_missing_cells_are_refused_with_their_place_and_a_way_out(make):
    with pytest.raises(ValueError, match=r"^x has 1 NaN \(first at \[2, 1\]\).*complete_rows"):
        as_arguments(missing(make), model)


@pytest.mark.parametrize("make", [torch.tensor, np.array, pd.DataFrame, list])
def test_missing_cells_pass_where_the_model_knows_them(make):
    assert only(missing(make), Measured()).isnan().sum() == 1
    assert only(missing(make), Measured().forward).isnan().sum() == 1


@pytest.mark.parametrize(
    "data",
    [
        [1.0, None],
        np.array([1.0, None]),
        np.ma.array([1.0, 2.0], mask=[False, True]),
        np.ma.array([1, 2], mask=[False, True]),
        pd.Series([1, None], dtype="Int64"),
        pl.Series([1, None]),
    ],
)
def test_every_way_to_say_missing_is_understood(data):
    with pytest.raises(ValueError, match=r"^x has 1 NaN \(first at \[1\]\)"):
        as_arguments(data, model)
    assert only(data, Measured()).isnan().tolist() == [False, True]


def test_infinite_values_are_refused_in_any_case():
    for value in (float("inf"), -float("inf")):
        for function in (model, Measured()):
            with pytest.raises(ValueError, match=r"^x has 2 inf \(first at \[0, 1\]\); replace"):
                as_arguments(np.array([[1.0, value], [value, 2.0]]), function)


def test_messages_name_the_column_and_the_argument():
    frame = pd.DataFrame({"length": [1.0, 2.0], "mass": [3.0, np.nan]})
    with pytest.raises(ValueError, match=r"^x has 1 NaN \(first at \[1, 1\]\) in column 'mass'"):
        as_arguments(frame, model)
    with pytest.raises(ValueError, match=r"^data\[1\] has 1 NaN \(first at \[0\]\)"):
        as_arguments((ROWS, torch.tensor([np.nan])), model)
    with pytest.raises(ValueError, match=r"^targets has 1 inf"):
        as_arguments({"targets": torch.tensor([np.inf])}, model)
    with pytest.raises(ValueError, match=r"^x\[1\] has 1 NaN \(first at \[0\]\)"):
        as_arguments([torch.ones(2), torch.tensor([np.nan])], model)


# ---- what is no data --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("measurements.csv", TypeError, r"^x: .* the str 'measurements.csv'; .*data\.load"),
        (b"1,2", TypeError, "^x: .* the bytes"),
        (("measurements.csv",), TypeError, r"^data\[0\]: .* str"),
        (["a", "b"], TypeError, "^x: expected real numbers, got text"),
        ([1, "b"], TypeError, "^x: expected real numbers, got text"),
        (np.array(["1", "2"]), TypeError, "^x: expected real numbers, got text"),
        (np.array(["1", 2.0], dtype=object), ValueError, "^x: .*not numeric.*'1'"),
        (pd.Series(["1", "2"]), (TypeError, ValueError), "^x: "),
        (np.array([1j]), TypeError, r"^x: expected real numbers, .*complex128; take x\.real"),
        (torch.tensor([1j]), TypeError, r"^x: expected real numbers, .*complex64; take x\.real"),
        (np.array(["2020-01-01"], dtype="M8[D]"), TypeError, "^x: expected real .*, got dates"),
        (np.array([1], dtype="m8[D]"), TypeError, "^x: expected real numbers"),
        (sparse.eye_array(3).tocsr(), TypeError, r"^x: dense required.*x\.toarray\(\)"),
        (torch.eye(3).to_sparse(), TypeError, r"^x: dense required.*x\.to_dense\(\)"),
        (torch.zeros(0, 3), ValueError, r"^x: expected data, got the empty shape \(0, 3\)"),
        (np.zeros((3, 0)), ValueError, r"^x: expected data, got the empty shape \(3, 0\)"),
        ([], ValueError, r"^x: expected data, got the empty shape \(0,\)"),
    ],
)
def test_what_is_no_data_is_named_with_a_way_out(data, error, message):
    with pytest.raises(error, match=message):
        as_arguments(data, model)
