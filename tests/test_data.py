"""Tables: what goes in comes out, and every bad input gets its answer (rows of BAD_INPUTS)."""

import bz2
import copy
import gzip
import io
import json
import lzma
import pickle
import subprocess
import sys
import warnings
import zipfile
from decimal import Decimal
from functools import partial

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse, stats

from latentlab.data import Table, from_array, from_frame, load, simulate
from latentlab.data.checks import as_count, as_rows, as_seed, match_columns, warn_constant

NAN, INF = float("nan"), float("inf")
ROWS = np.array([[3.6, 79.0], [1.8, 54.0], [3.333, 74.0], [2.283, 62.0]])
NAMES = ("eruptions", "waiting")


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


def with_cell(row, column, value):
    x = ROWS.copy()
    x[row, column] = value
    return x


# ── Table ────────────────────────────────────────────────────────────────────────────────────


def test_a_table_knows_its_rows_names_and_missing_cells():
    table = from_array(with_cell(3, 1, NAN), NAMES)
    assert len(table) == 4
    assert table.names == NAMES
    assert table.missing.dtype == torch.bool
    assert table.missing.nonzero().tolist() == [[3, 1]]
    assert repr(table) == "Table(4 rows, 2 columns: 'eruptions', 'waiting'; 1 missing cell)"


def test_complete_rows_are_the_rows_without_a_missing_cell():
    table = from_array(with_cell(1, 0, NAN), NAMES)
    kept = table.complete_rows()
    np.testing.assert_array_equal(kept.x.numpy(), ROWS[[0, 2, 3]])
    assert kept.names == NAMES
    assert len(table) == 4


@given(st.data())
def test_select_permutes_and_drops_columns_by_name(data):
    names = data.draw(st.lists(st.text(min_size=1), min_size=1, max_size=6, unique=True))
    x = np.arange(3.0 * len(names)).reshape(3, -1)
    order = data.draw(st.permutations(range(len(names))))
    order = order[: data.draw(st.integers(1, len(names)))]
    chosen = from_array(x, names).select([names[i] for i in order])
    np.testing.assert_array_equal(chosen.x.numpy(), x[:, order])
    assert chosen.names == tuple(names[i] for i in order)


def test_select_lists_the_names_that_are_not_there():
    with pytest.raises(
        ValueError, match=r"no column 'a', 'b'; .* 'eruptions', 'waiting'"
    ) as error:
        from_array(ROWS, NAMES).select(["a", "waiting", "b"])
    one_line(error)


@pytest.mark.parametrize(
    ("x", "names", "message"),
    [
        (ROWS, (), "tensor, got float64"),
        (torch.ones(2, 2, dtype=torch.int64), (), "torch.int64"),
        (torch.ones(3), (), r"shape \(N, D\), got shape \(3,\)"),
        (torch.ones(2, 2), ("a",), r"expected 2, one a column, got 1 \('a'\)"),
        (torch.ones(2, 2), ("a", "a"), "each name once, got 'a'"),
        (torch.ones(2, 2), "ab", "the str 'ab'"),
    ],
)
def test_a_table_refuses_what_is_no_table(x, names, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        Table(x, names)
    one_line(error)


def test_a_table_is_frozen_and_survives_copies_and_pickles():
    table = from_array(ROWS, NAMES)
    with pytest.raises(AttributeError):
        table.names = ("a", "b")
    for again in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert again.names == NAMES
        assert torch.equal(again.x, table.x)


def test_a_table_of_an_array_does_not_follow_the_array():
    x = ROWS.copy()
    table = from_array(x)
    x[:] = 0
    np.testing.assert_array_equal(table.x.numpy(), ROWS)


# ── as_rows: what is accepted ────────────────────────────────────────────────────────────────

DTYPES = [np.float64, np.float32, np.int8, np.uint8, np.int64, np.uint64, np.bool_, ">f8"]


@given(st.data())
def test_arrays_of_any_real_dtype_become_float64(data):
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6))
    bounds = {"min_value": -1e9, "max_value": 1e9} if dtype.kind == "f" else {}
    x = data.draw(hnp.arrays(dtype, shape, elements=bounds or None))
    table = as_rows(x[::-1])  # a view with negative strides
    assert table.x.dtype == torch.float64
    assert table.x.is_contiguous()
    np.testing.assert_array_equal(table.x.numpy(), x[::-1].astype(np.float64))
    assert table.names == tuple(f"x{i}" for i in range(shape[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int32, torch.bool])
def test_tensors_keep_float32_and_float64(dtype):
    x = torch.tensor(ROWS).to(dtype)
    table = as_rows(x)
    assert table.x.dtype == (dtype if dtype.is_floating_point else torch.float64)
    assert torch.equal(table.x, x.to(table.x.dtype))


@pytest.mark.parametrize(
    "x",
    [
        from_array(ROWS, NAMES),
        pd.DataFrame(ROWS, columns=list(NAMES)),
        pl.DataFrame(ROWS, schema=list(NAMES)),
    ],
    ids=["table", "pandas", "polars"],
)
def test_row_21_names_are_kept(x):
    table = as_rows(x)
    assert table.names == NAMES
    np.testing.assert_array_equal(table.x.numpy(), ROWS)


@pytest.mark.parametrize(
    "x",
    [
        np.array([[1.5, True], [2, np.float32(0.5)]], dtype=object),
        np.array([[Decimal("1.5"), 1], [2, 0.5]], dtype=object),
        [[1.5, 1], [2, 0.5]],
        [(1.5, 1.0), (2.0, 0.5)],
    ],
    ids=["object", "decimal", "lists", "tuples"],
)
def test_row_14_objects_that_are_numbers_are_accepted(x):
    assert as_rows(x).x.tolist() == [[1.5, 1.0], [2.0, 0.5]]


@pytest.mark.parametrize(
    "x",
    [ROWS.astype(np.float16), torch.tensor(ROWS).half(), torch.tensor(ROWS).bfloat16()],
    ids=["numpy", "half", "bfloat16"],
)
def test_row_17_half_precision_is_converted_with_one_warning(x):
    with pytest.warns(UserWarning, match="x: torch.b?float16 .* float64") as caught:
        table = as_rows(x)
    assert len(caught) == 1
    assert table.x.dtype == torch.float64
    assert torch.equal(table.x, torch.as_tensor(x).double())


def test_row_18_a_tensor_with_a_gradient_is_detached_and_left_as_it_was():
    x = torch.tensor(ROWS, requires_grad=True)
    assert not as_rows(x).x.requires_grad
    assert x.requires_grad


@pytest.mark.gpu
def test_row_19_a_tensor_stays_on_its_device():
    x = torch.tensor(ROWS, device="cuda")
    assert as_rows(x).x.device == x.device
    assert match_columns(x, NAMES).x.device == x.device
    with pytest.warns(UserWarning, match="'x0'"):
        warn_constant(Table(torch.tensor([[1.0, 2.0], [1.0, 3.0]], device="cuda")))


@pytest.mark.parametrize(
    "x",
    [
        pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": [1.5, 2.5]}),
        pd.DataFrame({"a": pd.array([True, None], dtype="boolean"), "b": [1.5, 2.5]}),
        pd.DataFrame({"a": [1, None], "b": [1.5, 2.5]}, dtype=object),
        pl.DataFrame({"a": [1, None], "b": [1.5, 2.5]}),
        pl.DataFrame({"a": [True, None], "b": [1.5, 2.5]}),
    ],
    ids=["Int64", "boolean", "object", "polars", "polars bool"],
)
def test_row_20_missing_cells_of_frames_are_known(x):
    table = as_rows(x, allow_missing=True)
    np.testing.assert_array_equal(table.x.numpy(), [[1, 1.5], [NAN, 2.5]])
    with pytest.raises(ValueError, match=r"x has 1 NaN \(first at \[1, 0\]\) in column 'a'"):
        as_rows(x)


def test_masked_cells_are_missing():
    x = np.ma.masked_greater(ROWS, 75)
    assert as_rows(x, allow_missing=True).missing.nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e148])
def test_rows_24_and_25_far_and_small_numbers_are_left_alone(scale):
    x = ROWS * scale + (1e12 if scale == 1 else 0)
    np.testing.assert_array_equal(as_rows(x).x.numpy(), x)


def test_new_rows_may_lack_a_column_where_missing_cells_may_be():
    assert as_rows([[NAN, 1.0]], min_rows=1, allow_missing=True).missing.tolist() == [
        [True, False]
    ]
    assert len(as_rows(np.ones((0, 2)), min_rows=0)) == 0


# ── as_rows: what is refused ─────────────────────────────────────────────────────────────────

REFUSED = {
    "1 NaN": (with_cell(3, 1, NAN), r"x has 1 NaN \(first at \[3, 1\]\); .*complete_rows"),
    "1 some NaN": (np.where(ROWS < 3, NAN, ROWS), r"x has 2 NaN \(first at \[1, 0\]\)"),
    "2 inf": (with_cell(2, 0, INF), r"x has 1 inf \(first at \[2, 0\]\); replace"),
    "2 -inf": (torch.tensor(with_cell(0, 1, -INF)), r"x has 1 inf \(first at \[0, 1\]\)"),
    "2 named": (
        pd.DataFrame(with_cell(0, 1, INF), columns=list(NAMES)),
        r"\[0, 1\]\) in column 'waiting'",
    ),
    "3": (ROWS * [1, NAN], "x: .* column 'x1' is all NaN; leave it out"),
    "6": (ROWS[:1], r"x has 1 row: expected at least 2 rows"),
    "9 no rows": (ROWS[:0], r"x is empty \(shape \(0, 2\)\): expected at least 2 rows"),
    "9 no columns": (ROWS[:, :0], r"x is empty \(shape \(4, 0\)\)"),
    "9 list": ([], r"x is empty \(shape \(0,\)\)"),
    "9 frame": (pd.DataFrame(), r"x is empty \(shape \(0, 0\)\)"),
    "10": (ROWS[:, 0], r"expected rows, shape \(N, D\), got shape \(4,\); x.reshape\(-1, 1\)"),
    "10 series": (pd.Series([1.0, 2.0]), r"got shape \(2,\)"),
    "11": (np.ones((2, 3, 4)), r"got shape \(2, 3, 4\); .*model of sequences"),
    "12": ([[1.0, 2.0], [3.0]], "x: expected rows of equal length, got a ragged list"),
    "13 text": ([["a", "b"]], "x: expected real numbers, got text"),
    "13 digits": (np.array([["1", "2"]] * 2, dtype=object), "x: column 'x0' is not numeric"),
    "13 frame": (pd.DataFrame({"a": ["1", "2"]}), r"x: column 'a' is not numeric \('1' in row 0"),
    "13 dates": (np.array([["2020-01-01"]], dtype="M8[D]"), "x: .* got dates"),
    "13 huge int": (np.array([[1, 2], [10**400, 2]], dtype=object), "column 'x0' is not numeric"),
    "15": (ROWS * 1j, r"x: expected real numbers, got dtype complex128; take x.real"),
    "15 tensor": (torch.tensor(ROWS * 1j), "got dtype torch.complex128"),
    "15 frame": (pd.DataFrame({"a": [1j, 2j]}), "x: column 'a' is not numeric"),
    "16": (sparse.csr_matrix(ROWS), "x: dense required, got a sparse csr_matrix; use x.toarray"),
    "16 array": (sparse.coo_array(ROWS), "x: dense required"),
    "16 tensor": (torch.tensor(ROWS).to_sparse(), "x: dense required.*to_dense"),
    "23": (with_cell(0, 0, 1e200), r"x has 1 beyond 1e\+150 .*\[0, 0\]"),
    "23 float32": (torch.tensor(ROWS).float() * 1e18, r"beyond 1e\+15 \(torch.float32\)"),
    "path": ("data.csv", r"x: .* got 'data.csv' \(str\); latentlab.data.load reads files"),
    "None": (None, r"got None \(NoneType\)"),
}


@pytest.mark.parametrize(("x", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_rows_are_refused_by_name_place_and_way_out(x, message):
    before = copy.deepcopy(x)
    with pytest.raises((TypeError, ValueError), match=message) as error:
        as_rows(x)
    assert one_line(error).startswith("x")
    assert repr(x) == repr(before)
    with pytest.raises((TypeError, ValueError), match=r"^data\[0\]"):
        as_rows(x, argument="data[0]")


@pytest.mark.parametrize("key", ["2 inf", "3", "23"])
def test_missing_cells_excuse_no_other_fault(key):
    x, message = REFUSED[key]
    with pytest.raises(ValueError, match=message):
        as_rows(x, allow_missing=True)


def test_a_frame_with_text_says_which_columns_are_numeric():
    frame = pd.DataFrame({"a": [1, 2], "s": [None, "x y"], "b": [1, 2]})
    for x in (frame, pl.from_pandas(frame)):
        with pytest.raises(ValueError, match=r"'s' is not numeric \('x y' in row 1.*\['a', 'b'\]"):
            as_rows(x)


def test_a_name_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match="x: expected each name once, got 'a'"):
        as_rows(pd.DataFrame(ROWS, columns=["a", "a"]))


# ── constant columns ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (ROWS * [1, 0], "x: constant column 'x1' does not tell"),
        (np.c_[ROWS, [1e12, NAN, 1e12, 1e12]], "x: constant column 'x2' "),
        (ROWS * 0 + 3, r"x: all 4 rows are equal, .*\('x0', 'x1'\)"),
    ],
    ids=["row 4", "row 4 with a missing cell", "row 5"],
)
def test_rows_4_and_5_constant_columns_are_named_in_one_warning(x, message):
    with pytest.warns(UserWarning, match=message) as caught:
        warn_constant(from_array(x))
    assert len(caught) == 1


@pytest.mark.parametrize("x", [ROWS, ROWS[:1], ROWS[:0], ROWS + 1e12], ids=str)
def test_columns_that_vary_are_no_cause_for_a_warning(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_constant(from_array(x))


# ── counts and seeds ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "value", [0, -1, 2.5, "3", True, None, 3.0, np.int64(0), np.ones(3)], ids=str
)
def test_row_8_a_count_is_an_int_that_is_large_enough(value):
    with pytest.raises(ValueError, match=r"^num_components must be an int >= 1, got ") as error:
        as_count(value, "num_components")
    one_line(error)


def test_row_8_has_its_wording():
    with pytest.raises(ValueError, match=".") as error:
        as_count(2.5, "num_components")
    assert str(error.value) == "num_components must be an int >= 1, got 2.5 (float)"


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_a_count_becomes_a_plain_int(value):
    count = as_count(value, "num_components", minimum=3)
    assert type(count) is int
    assert count == 3


@pytest.mark.parametrize("value", [-1, 1.0, "1", True, 2**63])
def test_row_40_a_seed_is_an_int_that_generators_take(value):
    with pytest.raises(ValueError, match=r"^seed must be an int >= 0") as error:
        as_seed(value)
    one_line(error)


def test_good_seeds_are_kept():
    assert [as_seed(value) for value in (0, np.int32(7), 2**63 - 1, None)] == [
        0,
        7,
        2**63 - 1,
        None,
    ]
    torch.Generator().manual_seed(as_seed(2**63 - 1))


# ── columns at prediction ────────────────────────────────────────────────────────────────────

PERMUTED = pd.DataFrame(ROWS[:, ::-1], columns=list(NAMES[::-1]))


@pytest.mark.parametrize(
    "x",
    [
        PERMUTED,
        pl.from_pandas(PERMUTED),
        from_frame(PERMUTED),
        ROWS,
        torch.tensor(ROWS),
        from_array(ROWS),
        PERMUTED.assign(rownames="r").loc[:, ["rownames", *NAMES]],
    ],
    ids=["pandas", "polars", "table", "array", "tensor", "unnamed table", "rownames"],
)
def test_row_21_columns_are_put_in_the_order_of_the_fit(x):
    for table in (match_columns(x, NAMES), as_rows(x, names=NAMES)):
        assert table.names == NAMES
        np.testing.assert_array_equal(table.x.numpy(), ROWS)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (PERMUTED[["waiting"]], "got missing 'eruptions';"),
        (PERMUTED.assign(site="north", age=1), "got extra 'site', 'age';"),
        (PERMUTED.rename(columns={"waiting": "wait"}), "got missing 'waiting' and extra 'wait';"),
    ],
    ids=["missing", "extra", "both"],
)
def test_row_21_missing_and_extra_columns_are_listed(frame, message):
    for x in (frame, pl.from_pandas(frame)):
        with pytest.raises(ValueError, match=f"^x: .*'eruptions', 'waiting', {message}") as error:
            match_columns(x, NAMES)
        one_line(error)


@pytest.mark.parametrize("x", [np.ones((5, 3)), torch.ones(5, 3), from_array(np.ones((5, 3)))])
def test_row_22_another_number_of_columns_gets_both_numbers(x):
    with pytest.raises(ValueError, match=r"expected 2 columns \('eruptions', .* got 3"):
        match_columns(x, NAMES)


def test_a_fit_to_an_array_takes_a_frame_of_as_many_columns():
    assert match_columns(PERMUTED, ("x0", "x1")).names == ("x0", "x1")
    with pytest.raises(ValueError, match="expected 3 columns .* got 2"):
        match_columns(PERMUTED, ("x0", "x1", "x2"))


# ── load: files ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write


def wide_range(seed=0):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((50, 3)) * 10.0 ** generator.integers(-290, 290, (50, 3))
    x[generator.random((50, 3)) < 0.1] = NAN
    x[:, 2] = np.arange(50)
    return x


def as_text(x, separator):
    lines = (separator.join("" if np.isnan(v) else repr(float(v)) for v in row) for row in x)
    return "\n".join([separator.join("abc"), *lines]) + "\n"


def as_json(x):
    rows = ({k: None if np.isnan(v) else v for k, v in zip("abc", row, strict=True)} for row in x)
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_csv(path, x):
    path.write_text(as_text(x, ","))


def zipped(text):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.csv", text)
    return stream.getvalue()


WRITERS = {
    "x.csv": write_csv,
    "X.CSV": write_csv,
    "x.tsv": lambda path, x: path.write_text(as_text(x, "\t")),
    "x.csv.gz": lambda path, x: path.write_bytes(gzip.compress(as_text(x, ",").encode())),
    "x.csv.bz2": lambda path, x: path.write_bytes(bz2.compress(as_text(x, ",").encode())),
    "x.csv.xz": lambda path, x: path.write_bytes(lzma.compress(as_text(x, ",").encode())),
    "x.csv.zip": lambda path, x: path.write_bytes(zipped(as_text(x, ","))),
    "x.jsonl": lambda path, x: path.write_text(as_json(x)),
    "x.ndjson": lambda path, x: path.write_text(as_json(x)),
    "x.jsonl.gz": lambda path, x: path.write_bytes(gzip.compress(as_json(x).encode())),
    "x.parquet": lambda path, x: pl.DataFrame(x, schema=list("abc")).write_parquet(path),
    "x.npy": lambda path, x: np.save(path, x),
    "x.npz": lambda path, x: np.savez(path, anything=x),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_back_what_was_written(name, tmp_path):
    x = wide_range()
    WRITERS[name](tmp_path / name, x)
    for path in (tmp_path / name, str(tmp_path / name)):
        table = load(path)
        np.testing.assert_allclose(table.x.numpy(), x, rtol=1e-14)
        assert table.x.dtype == torch.float64
        assert table.names == (("x0", "x1", "x2") if name.startswith("x.np") else tuple("abc"))
    columns = [2, 0] if name.startswith("x.np") else ["c", "a"]
    np.testing.assert_allclose(load(path, columns).x.numpy(), x[:, [2, 0]], rtol=1e-14)


@pytest.mark.parametrize(
    ("source", "columns", "names"),
    [
        (ROWS, [1, "x0"], ("x1", "x0")),
        (torch.tensor(ROWS), 1, ("x1",)),
        (PERMUTED, "eruptions", ("eruptions",)),
        (pl.from_pandas(PERMUTED), ["eruptions", "waiting"], NAMES),
        (from_frame(PERMUTED), NAMES, NAMES),
        (pd.DataFrame(ROWS), [1], ("1",)),
        (pd.DataFrame({"rownames": [1], "a": [2]}), None, ("a",)),
        (pd.DataFrame({"rownames": [1], "a": [2]}), ["rownames"], ("rownames",)),
        (pd.DataFrame({"rownames": [1]}), None, ("rownames",)),
    ],
)
def test_load_takes_what_is_in_memory_and_chooses_columns(source, columns, names):
    assert load(source, columns).names == names


@pytest.mark.parametrize(
    "content",
    ['"","b","c"\n"r1",2,3\n"r2",NA,\n', "rownames,b,c\nr1,2,3\nr2,,NaN\n", ",b,c\n0,2,3\n1,,\n"],
    ids=["write.csv", "Rdatasets", "to_csv"],
)
def test_row_names_are_left_out_unless_chosen(file, content):
    table = load(file("r.csv", content))
    assert table.names == ("b", "c")
    np.testing.assert_array_equal(table.x.numpy(), [[2, 3], [NAN, NAN]])


def test_a_chosen_column_of_row_names_is_read(file):
    name = file("r.csv", "rownames,b\n1,2\n2,3\n")
    assert load(name, ["b", "rownames"]).x.tolist() == [[2, 1], [3, 2]]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("\ufeffa,b\r\n1,2\r\n", [[1, 2]]),
        ("a,b\n\n1,2\n  \n3,4\n", [[1, 2], [3, 4]]),
        ("a,b\n1,2,\n3,4,\n", [[1, 2], [3, 4]]),
        ("b,a\n,2,\n3,4,\n", [[NAN, 2], [3, 4]]),
        ("a,b\n3,,\n3,4,\n", [[3, NAN], [3, 4]]),
        ("a,b\nTrue,1\nFalse,2\n", [[1, 1], [0, 2]]),
        ('a,b\n"1",2e3\n', [[1, 2000]]),
        ("a,b\n1,123456789012345678901234567890\n", [[1, 1.2345678901234568e29]]),
    ],
    ids=[
        "BOM and CRLF",
        "blank lines",
        "last comma",
        "and a gap",
        "or two",
        "bool",
        "quoted",
        "large int",
    ],
)
def test_csv_as_people_have_it(file, content, rows):
    np.testing.assert_array_equal(load(file("a.csv", content)).x.numpy(), rows)


def test_text_columns_that_are_not_chosen_do_no_harm(file):
    assert load(file("a.csv", "s,a\nx,1\ny,2\n"), columns=["a"]).x.tolist() == [[1], [2]]


def test_lines_are_those_of_the_file_where_cells_hold_newlines(file):
    name = file("a.csv", 'note,a\n"one\ntwo",1\n\nthree,x\n')
    with pytest.raises(ValueError, match=r"column 'a' is not numeric \('x' in line 5"):
        load(name, columns="a")


def test_a_numeric_header_may_be_chosen(file):
    assert load(file("a.csv", "2019,2020\n1,2\n"), ["2020"]).x.tolist() == [[2]]


BROKEN = {
    "empty": ("a.csv", "", "a.csv: .* empty file"),
    "blank": ("a.csv", "\n\n", "a.csv: not readable as CSV"),
    "header only": ("a.csv", "a,b\n", "a.csv: expected rows of numbers, got none"),
    "no header": ("a.csv", "1,2\n3,4\n", r"line 1 holds numbers \('1', '2'\).*columns="),
    "no header, equal": ("a.csv", "1.5,1.5\n3,4\n", "line 1 holds numbers"),
    "no header, BOM": ("a.csv", "\ufeff1,2\n3,4\n", "line 1 holds numbers"),
    "garbage": ("a.csv", bytes(range(128, 256)) * 9, "a.csv: not readable as CSV: 'utf-8'"),
    "zeros": ("a.csv", b"\0\1\2" * 40, "a.csv: .*line 1 is not text"),
    "long line": ("a.csv", "a,b\n1,2\n3,4,5\n", "line 3 has 3 cells, the header 2"),
    "long lines": ("a.csv", "a,b\n1,2,3\n4,5,6\n", "line 2 has 3 cells, the header 2"),
    "hidden cell": ("a.csv", "a,b\n1,2,\n3,4,5\n", "line 3 has 3 cells, the header 2"),
    "stray comma": ("a.csv", "a,b\n1,2\n3,4,\n", "a.csv: not readable .*line 3"),
    "twice": ("a.csv", "a,b,a\n1,2,3\n", "line 1: expected each name once, got 'a'"),
    "short line": ("a.csv", "a,b\n1,2\n\n3\n5,6\n", "line 4 has 1 cell, the header 2"),
    "open quote": ("a.csv", 'a,b\n1,"2\n3,4\n', "a.csv: not readable .*row 1"),
    "text": (
        "a.csv",
        "a,s,b\n1,2,3\n\n4,setosa,6\n",
        r"^a.csv: column 's' is not numeric \('setosa' in line 4, .*columns=\['a', 'b'\]",
    ),
    "late text": (
        "a.csv",
        "a,s\n" + "1,2\n" * 300_000 + "1,x\n",
        r"column 's' is not numeric \('x' in line 300002",
    ),
    "mark": ("a.csv", "a,b\n1,2\n3,?\n", r"column 'b' .*\('\?' in line 3.*empty or NA"),
    "semicolons": ("a.csv", "a;b\n1;2\n", "separated by ';', not by ','.*sep=';'"),
    "tsv": ("a.tsv", "a\tb\n1\t2\n3\n", "a.tsv: not readable as TSV: line 3 has 1 cell"),
    "gz": ("a.csv.gz", gzip.compress(b"a,b\n1,2\n3,x\n"), "column 'b' .*'x' in line 3"),
    "zip": ("a.csv.zip", zipped("a,b\n1,2\n3,x\n"), "column 'b' .*'x' in line 3"),
    "no gz": ("a.csv.gz", b"a,b\n1,2\n", "a.csv.gz: not readable"),
    "cut gz": ("a.csv.gz", gzip.compress(b"a,b\n1,2\n")[:-9], "a.csv.gz: not readable"),
    "no zip": ("a.csv.zip", b"PK", "a.csv.zip: not readable"),
    "json": ("a.jsonl", '{"a": 1}\n\n{"a":\n', "a.jsonl: .*line 3 is no JSON"),
    "json text": ("a.jsonl", '{"a": 1}\n\n{"a": "1"}\n', r"column 'a' .*'1' in line 3"),
    "json nested": ("a.jsonl", '{"a": {"b": 1}}\n', "column 'a' is not numeric"),
    "json blank": ("a.jsonl", "\n", "a.jsonl: expected rows of numbers, got none"),
    "parquet": ("a.parquet", b"PAR1", "a.parquet: not readable as PARQUET"),
    "npy": ("a.npy", b"\x93NUMPY\1\0", "a.npy: not readable as NPY"),
    "npz": ("a.npz", b"PK\3\4", "a.npz: not readable as NPZ"),
    "ending": ("a.xls", b"x", r"a.xls: expected a name that ends in '.csv', .*pandas"),
    "array.gz": ("a.npy.gz", b"x", "a.npy.gz: expected a name that ends in"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_row_46_broken_files_are_refused_by_file_line_and_column(file, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        load(file(name, content))
    assert one_line(error).startswith(f"{name}: ")


def test_row_46_a_missing_file_and_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^nope.csv: no such file"):
        load("nope.csv")
    with pytest.raises(ValueError, match=r"^folder.csv: expected a file, got a folder"):
        load("folder.csv")


def test_row_46_absent_columns_are_listed(file):
    with pytest.raises(ValueError, match=r"^a.csv: no column 'z'; expected some of 'a', 'b'"):
        load(file("a.csv", "a,b\n1,2\n"), columns=["z", "a"])


def test_pickles_are_never_loaded(tmp_path):
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "o.npz", np.array([{}], dtype=object))
    (tmp_path / "p.npy").write_bytes(pickle.dumps([[1.0]]))
    for name in ("o.npy", "o.npz", "p.npy"):
        with pytest.raises(ValueError, match="pickled objects, which are never loaded"):
            load(tmp_path / name)


def test_an_archive_holds_one_array(tmp_path):
    np.savez(tmp_path / "two.npz", a=ROWS, b=ROWS)
    with pytest.raises(ValueError, match=r"exactly one array, got 'a', 'b'"):
        load(tmp_path / "two.npz")


def test_parquet_without_its_package_says_what_to_install(file, monkeypatch):
    for package in ("pyarrow", "fastparquet"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"a.parquet: .*latentlab\[parquet\]") as error:
        load(file("a.parquet", b"PAR1"))
    one_line(error)


def test_data_needs_no_frames_until_it_meets_one():
    code = "import sys, latentlab.data; print({'pandas', 'polars', 'sklearn'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# ── simulate ─────────────────────────────────────────────────────────────────────────────────


def test_eruptions_are_drawn_from_their_mixture():
    x = simulate.eruptions(1_000_000, seed=1).x.numpy()
    weights, locs = np.array([0.36, 0.64]), np.array([[2.04, 54.5], [4.29, 80.0]])
    scales = np.array([[0.27, 5.9], [0.41, 6.0]])
    for d in range(2):
        by_column = partial(mixture_cdf, weights=weights, locs=locs[:, d], scales=scales[:, d])
        assert stats.kstest(x[:, d], by_column).pvalue > 0.01
    between = weights.prod() * (locs[1] - locs[0]).prod()  # within a component, none
    assert np.cov(x.T)[0, 1] == pytest.approx(between, rel=0.01)


def mixture_cdf(x, weights, locs, scales):
    return sum(w * stats.norm.cdf(x, m, s) for w, m, s in zip(weights, locs, scales, strict=True))


def test_eruptions_repeat_by_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (simulate.eruptions(seed=seed).x for seed in (3, 3, 4))
    assert first.shape == (272, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(simulate.eruptions(seed=None).x, simulate.eruptions(seed=None).x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("arguments", [{"num_rows": 0}, {"num_rows": 2.5}, {"seed": -1}])
def test_eruptions_check_their_arguments(arguments):
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be an int >= "):
        simulate.eruptions(**arguments)
