"""Every bad input gets its answer from the workflow: an error, or one warning and a usable fit.

The numbers are the rows of the list of bad inputs; what ``data.load`` says to them is in
``test_data.py``. An error names the argument, what was expected, what came and the way out, and
nothing is changed by it.
"""

import contextlib
import copy
import itertools
import math
import pickle
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import sparse

import latentlab as ll
from latentlab.data import Table

NAN, INF = float("nan"), float("inf")
X = ll.data.simulate.eruptions(60).x
TINY = {"num_restarts": 1, "max_steps": 300, "progress": False}


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    """Pyro's parameters, all generators, torch's settings and the data are as they were."""
    pyro.get_param_store().clear()
    pyro.param("mine", torch.tensor(1.0))
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), X.clone()
    settings = torch.get_default_dtype(), torch.distributions.Distribution._validate_args
    yield
    assert list(pyro.get_param_store()) == ["mine"]
    after = torch.get_rng_state(), np.random.get_state()[1], X
    assert all(map(np.array_equal, before, after))
    assert settings == (
        torch.get_default_dtype(),
        torch.distributions.Distribution._validate_args,
    )
    pyro.get_param_store().clear()


@pytest.fixture(scope="module")
def posterior():
    return fit(Table(X, ("eruptions", "waiting")))


def mixture(D=2, K=2):
    return ll.GaussianMixture(D, K)


def fit(x, model=None, **settings):
    return ll.fit(model or mixture(), x, **{**TINY, **settings})


def normal_mean(x=None, size=None):
    """A model that does not know missing cells."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 100.0).to_event(1))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc, 10.0).to_event(1), obs=x)


def draws_are_finite(posterior):
    return all(value.isfinite().all() for value in posterior.sample(100).values())


def means(posterior):
    """Means of the components, in the order of their first column."""
    locs = posterior.sample(400)["locs"].double().mean(0)
    return locs[locs[:, 0].argsort()]


def with_cells(value, *cells):
    x = X.clone()
    for row, column in cells:
        x[row, column] = value
    return x


@contextlib.contextmanager
def one_warning(match):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert match in str(caught[0].message)


# ---- rows 1 to 17: errors before the first step -------------------------------------------------

REFUSED = {
    "1": (with_cells(NAN, (3, 1), (5, 0), (9, 1)), r"x has 3 NaN \(first at \[3, 1\]\)", True),
    "2": (with_cells(INF, (7, 0)), r"x has 1 inf \(first at \[7, 0\]\); replace", False),
    "2 minus": (with_cells(-INF, (7, 0)).numpy(), r"x has 1 inf \(first at \[7, 0\]\)", False),
    "2 named": (
        pd.DataFrame(with_cells(INF, (0, 1)).numpy(), columns=["eruptions", "waiting"]),
        r"x has 1 inf \(first at \[0, 1\]\) in column 'waiting'",
        False,
    ),
    "3": (X * torch.tensor([1.0, NAN]), "x: expected numbers, but column 'x1' is all NaN", False),
    "3 named": (
        Table(X * torch.tensor([1.0, NAN]), ("eruptions", "waiting")),
        "column 'waiting' is all NaN; leave it out",
        False,
    ),
    "6": (X[:1], r"x has 1 row: expected at least 2 rows", False),
    "7": (X[:2], "num_components: expected at most .*, got 3 components for 2 rows", False),
    "9": (X[:0], r"x: expected data, got the empty shape \(0, 2\)", False),
    "9 array": (np.ones((0, 2)), r"empty shape \(0, 2\)", False),
    "9 no columns": (X[:, :0], r"empty shape \(60, 0\)", False),
    "9 list": ([], r"x: expected data, got the empty shape \(0,\)", False),
    "10": (X[:, 0], r"x: .* \(N, D\), got shape \(60,\); x.reshape\(-1, 1\)", False),
    "10 series": (pd.Series([1.0, 2.0, 3.0]), r"got shape \(3,\); x.reshape\(-1, 1\)", False),
    "11": (X.reshape(6, 10, 2), r"got shape \(6, 10, 2\); .*a model of sequences", False),
    "12": ([[1.0, 2.0], [3.0]], "x: expected rows of equal length, got a ragged list", False),
    "12 tensors": ([X[:5], X[5:20]], "x: expected rows of equal length, got a ragged list", False),
    "13": (np.array([["1", "2"]] * 5), "x: expected real numbers, got text", False),
    "13 list": ([["1", "2"]] * 5, "x: expected real numbers, got text", False),
    "13 objects": (np.array([["1", "2"]] * 5, object), "is not numeric .*convert", False),
    "13 path": ("data.csv", r"x: expected numbers, got the str 'data.csv'; .*data.load", True),
    "15": (X.numpy() * 1j, "x: expected real numbers, got dtype complex128; take x.real", True),
    "15 tensor": (X * 1j, "x: expected real numbers, got dtype torch.complex128", True),
    "16": (sparse.csr_matrix(X.numpy()), "x: dense required, .*use x.toarray", True),
    "16 tensor": (X.to_sparse(), "x: dense required, .*use x.to_dense", True),
    "22": (X[:, :1], r"x: expected shape \(N, 2\) .* got \(60, 1\)", False),
    "23": (X * 1e200, r"x has 120 beyond 1e\+150 .*\[0, 0\]\); choose a larger", False),
    "23 float32": (X.float() * 1e18, r"beyond 1e\+15 \(torch.float32\)", False),
}


@pytest.mark.parametrize(("x", "message", "any_model"), REFUSED.values(), ids=REFUSED)
def test_rows_1_to_23_are_refused_before_the_first_step(x, message, any_model):
    """By any model where it is the data alone, else by the mixture that measures its columns."""
    before = copy.deepcopy(x)
    for call in (ll.fit, ll.check_pair):
        settings = TINY if call is ll.fit else {}
        with pytest.raises((TypeError, ValueError), match=message) as error:
            call(normal_mean if any_model else mixture(K=3), x, **settings)
        assert "\n" not in str(error.value)
    assert repr(x) == repr(before)


def test_rows_1_and_2_go_by_what_the_model_knows():
    with_gap = with_cells(NAN, (3, 1))
    assert "complete_rows" in str(pytest.raises(ValueError, fit, with_gap, normal_mean).value)
    assert draws_are_finite(fit(with_gap))
    with pytest.raises(ValueError, match="x has 1 inf"):
        fit(with_cells(INF, (3, 1)), normal_mean)


# ---- rows 4 and 5: constant columns -------------------------------------------------------------


def test_row_4_a_constant_column_is_named_in_one_warning_and_does_no_harm():
    constant = torch.cat([X, torch.full((60, 1), 7.5).double()], 1)
    with one_warning("constant column 'dose' does not tell rows apart"):
        posterior = fit(Table(constant, ("eruptions", "waiting", "dose")), mixture(3))
    assert draws_are_finite(posterior)
    assert math.isfinite(posterior.elbo.value)
    other, sd = means(fit(X)), posterior.sample(400)["locs"].std(0)[:, :2].amax(0)
    assert ((means(posterior)[:, :2] - other).abs() < sd).all()
    with one_warning("constant column 'x2'"):
        ll.check_pair(mixture(3), constant)


def test_row_5_equal_rows_are_said_and_counted_as_one_component():
    with one_warning("all 60 rows are equal, every column is constant ('x0', 'x1')"):
        posterior = fit(X[:1].expand(60, 2))
    assert draws_are_finite(posterior)
    reasons = " ".join(posterior.check(1000).reasons)
    assert "effective number of components 1." in reasons
    assert "try fewer components" in reasons


# ---- row 8: counts ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, 2.5, "3", True])
@pytest.mark.parametrize("name", ["num_restarts", "num_particles", "max_steps", "batch_size"])
def test_row_8_counts_of_a_fit_are_whole_and_positive(name, count):
    with pytest.raises(ValueError, match=rf"^{name} must be an int >= 1, got .* \(\w+\)"):
        fit(X, **{name: count})


@pytest.mark.parametrize("count", [0, -1, 2.5, "3", True])
@pytest.mark.parametrize("method", ["sample", "log_weights", "predict", "summary"])
def test_row_8_counts_of_draws_are_whole_and_positive(posterior, method, count):
    with pytest.raises(ValueError, match=r"num_samples must be an int >= [12], got "):
        getattr(posterior, method)(count)


# ---- rows 14 to 21: other forms of the same data ------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        X.numpy(),
        X.tolist(),
        X.numpy().astype(object),
        X.numpy()[::-1][::-1],
        pd.DataFrame(X.numpy(), columns=["a", "b"]),
        pl.DataFrame(X.numpy(), schema=["a", "b"]),
        Table(X),
        (X,),
        {"x": X},
        X.clone().requires_grad_(),
    ],
    ids=[
        "array",
        "list",
        "row 14 objects",
        "view",
        "pandas",
        "polars",
        "table",
        "tuple",
        "dict",
        "row 18 gradient",
    ],
)
def test_rows_14_18_and_21_all_forms_of_the_data_give_the_same_fit(form):
    one, other = fit(X, max_steps=20), fit(form, max_steps=20)
    assert torch.equal(one.losses, other.losses)
    assert torch.equal(one.sample(3)["locs"], other.sample(3)["locs"])
    if isinstance(form, torch.Tensor):
        assert form.requires_grad
        assert form.grad is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.int32])
def test_row_14_whole_numbers_and_truth_values_are_numbers(dtype):
    x = (X > X.mean(0)) if dtype == torch.bool else X.round()
    posterior = fit(x.to(dtype), max_steps=20)
    same = fit(x.double(), max_steps=20)
    assert torch.equal(posterior.losses, same.losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row_17_half_precision_is_converted_with_one_warning(dtype):
    with one_warning(f"x: {dtype} is coarse; converted to"):
        posterior = fit(X.to(dtype), max_steps=20)
    same = fit(X.to(dtype).to(posterior.pair.dtype), max_steps=20)
    assert torch.equal(posterior.losses, same.losses)


@pytest.mark.gpu
def test_row_19_data_on_another_device_are_answered_there():
    posterior = fit(X.cuda())
    assert all(value.is_cuda for value in posterior.sample(3).values())
    assert posterior.model.responsibilities(X.cuda(), posterior.sample(3)).is_cuda
    torch.testing.assert_close(means(posterior).cpu(), means(fit(X)), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["Int64", "object", "polars"])
def test_row_20_missing_cells_of_frames_are_integrated_out(kind):
    values = X.round().tolist()
    values[3][1] = values[8][0] = None
    frame = pd.DataFrame(values, columns=["a", "b"], dtype="object")
    if kind == "polars":
        frame = pl.DataFrame(values, schema=["a", "b"], orient="row")
    elif kind == "Int64":
        frame = frame.astype("Int64")
    expected = X.round()
    expected[3, 1] = expected[8, 0] = NAN
    posterior = fit(frame, max_steps=20)
    assert posterior.names == ("a", "b")
    assert torch.equal(posterior.losses, fit(expected, max_steps=20).losses)
    with pytest.raises(ValueError, match="x has 2 NaN .* in column 'b'"):
        fit(frame, normal_mean)


def test_row_21_columns_are_known_by_their_names(posterior):
    new = pd.DataFrame(X[:9].numpy(), columns=["eruptions", "waiting"])
    plain = posterior.log_prob(X[:9])
    permuted = new[["waiting", "eruptions"]]
    for frame in (new, permuted, pl.from_pandas(permuted)):
        assert posterior.log_prob(frame) == plain
    assert posterior.predict(5, new)["x"].shape == (5, 9, 2)
    index = posterior.summary(100).query("site == 'locs'")["index"]
    assert index.tolist() == ["0, eruptions", "0, waiting", "1, eruptions", "1, waiting"]


@pytest.mark.parametrize("method", ["log_prob", "predict"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["eruptions"], "missing 'waiting'"),
        (["eruptions", "waiting", "age"], "extra 'age'"),
        (["eruptions", "wait"], "missing 'waiting' and extra 'wait'"),
    ],
)
def test_row_21_missing_and_extra_columns_are_listed(posterior, method, names, message):
    frame = pd.DataFrame(np.ones((4, len(names))), columns=names)
    arguments = (frame,) if method == "log_prob" else (5, frame)
    with pytest.raises(ValueError, match=f"x: .*'eruptions', 'waiting', got {message};"):
        getattr(posterior, method)(*arguments)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("method", ["log_prob", "predict"])
def test_row_22_another_number_of_columns_gets_both_numbers(posterior, method, named):
    fitted = posterior if named else fit(X, max_steps=20)
    arguments = (X[:, :1],) if method == "log_prob" else (5, X[:, :1])
    with pytest.raises(ValueError, match=r"expected (2 columns|shape \(N, 2\)).* got .*1"):
        getattr(fitted, method)(*arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (with_cells(INF, (2, 1)), "x has 1 inf"),
        (X[:, 0], r"got shape \(60,\)|got \(60,\)"),
        ([["a", "b"]], "got text"),
        (X[:0], "empty"),
    ],
)
def test_new_data_are_checked_like_the_first(posterior, x, message):
    for arguments in ((x,), (5, x)):
        method = posterior.log_prob if len(arguments) == 1 else posterior.predict
        with pytest.raises((TypeError, ValueError), match=message):
            method(*arguments)


# ---- rows 23 to 26: scales and offsets ----------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "offset"),
    [(1e147, 0.0), (1.0, 1e12), (1e-200, 0.0), (1e-20, -1e-10)],
    ids=["row 23", "row 24", "row 25", "row 24 small"],
)
def test_rows_23_to_25_a_fit_is_right_in_any_unit(posterior, unit, offset):
    """The same rows in another unit have the same means, in that unit."""
    moved = fit(X * unit + offset)
    assert draws_are_finite(moved)
    sd = posterior.sample(400)["locs"].std(0).amax(0)
    found = torch.stack([(row - offset) / unit for row in means(moved)])
    assert ((found - means(posterior)).abs() < 0.2 * sd + 2e-4 * (offset == 1e12)).all()
    log_unit = X.numel() * math.log(unit)
    error = math.hypot(moved.elbo.se, posterior.elbo.se)
    assert abs(moved.elbo.value + log_unit - posterior.elbo.value) < 0.1 + 5 * error
    table = moved.summary(400)
    assert np.isfinite(table.drop(columns=["site", "index"]).to_numpy()).all()
    assert (table["sd"] > 0).all()


def test_row_24_float32_far_from_the_origin(posterior):
    """Rounded to 1/16, as float32 has it at a million: no more than that is lost."""
    moved = fit(X.float() * 10 + 1e6)
    assert draws_are_finite(moved)
    sd = 10 * posterior.sample(400)["locs"].std(0).amax(0)
    off = means(moved) - 1e6 - 10 * means(posterior)
    assert (off.abs() < 0.3 * sd + 0.07).all()


def test_row_26_one_outlier_is_named_and_the_fit_is_finite():
    x = X.clone()
    x[5, 0] += 1e8 * float(X[:, 0].std())
    with one_warning("row 5 of column 'eruptions'"):
        posterior = fit(Table(x, ("eruptions", "waiting")))
    assert draws_are_finite(posterior)
    assert math.isfinite(posterior.elbo.value)
    assert posterior.check(1000).level != "use"
    assert math.isfinite(posterior.log_prob(x).value)


# ---- rows 35 to 38: pairs -----------------------------------------------------------------------


def one_normal(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def guide_with(**sites):
    def guide(x):
        for name, fn in sites.items():
            pyro.sample(name, fn)

    return guide


LOC, SCALE = dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0)


@pytest.mark.parametrize(
    ("guide", "messages"),
    [
        (guide_with(loc=LOC), ["site 'scale'", "in the model but not in the guide"]),
        (
            guide_with(loc=LOC, scale=SCALE, tau=LOC),
            ["site 'tau'", "in the guide but not in the model"],
        ),
        (
            guide_with(loc=LOC.expand([3]).to_event(1), scale=SCALE),
            ["site 'loc'", "shape ()", "(3,)"],
        ),
        (guide_with(loc=LOC, scale=LOC), ["site 'scale'", "support"]),
        (guide_with(loc=LOC, scal=SCALE), ["site 'scale'", "'scal'"]),
    ],
    ids=["row 35 missing", "row 35 extra", "row 35 shape", "row 37 support", "row 35 misspelt"],
)
def test_rows_35_and_37_a_guide_that_does_not_match_is_named_before_step_1(guide, messages):
    x, calls = torch.randn(9, generator=torch.Generator().manual_seed(0)), itertools.count()

    def counting(x):
        next(calls)
        guide(x)

    report = ll.check_pair(one_normal, x, counting)
    looks = next(calls)
    assert not report.ok
    with pytest.raises(ValueError, match="the pair cannot be fitted: ") as error:
        fit(x, one_normal, guide=counting)
    for message in messages:
        assert message in str(error.value)
        assert message in str(report)
    assert next(calls) == 2 * looks + 1  # no step was made
    assert looks > 0


def test_row_36_a_model_that_observes_nothing_is_fitted_with_one_warning():
    with one_warning("observes nothing"):
        posterior = fit(None, lambda: pyro.sample("loc", dist.Normal(2.0, 3.0)))
    draws = posterior.sample(2000)["loc"]
    assert abs(draws.mean() - 2) < 5 * 3 / 2000**0.5
    assert draws.std().item() == pytest.approx(3, rel=0.1)


class Picky(torch.nn.Module):
    """A model whose first starts have no density."""

    def __init__(self, num_bad):
        super().__init__()
        self.num_bad, self.seeds = num_bad, []

    def starting_values(self, x, *, seed):
        self.seeds.append(seed)
        return {"loc": torch.tensor(-100.0 if len(self.seeds) <= self.num_bad else 0.5)}

    def forward(self, x):
        center = pyro.param("center", torch.tensor(0.0))  # with it, no start climbs to a mode
        loc = pyro.sample("loc", dist.Normal(center, 1.0))
        pyro.factor("possible", torch.where(loc < -50, -INF, 0.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_row_38_a_start_without_density_is_tried_ten_times_and_then_named():
    x = torch.tensor(1.0)
    posterior = fit(x, Picky(num_bad=9))
    assert len(set(posterior.model.seeds)) == 10
    assert (posterior.sample(1000)["loc"] > -5).all()
    with pytest.raises(ValueError, match="site 'possible': .* -inf at each of ten starts; look"):
        fit(x, Picky(num_bad=10))


# ---- rows 39, 40: settings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "lr: expected a number > 0, got 0"),
        ({"lr": -0.1}, "lr: expected a number > 0, got -0.1"),
        ({"lr": NAN}, "lr: expected a number > 0, got nan"),
        ({"lr": INF}, "lr: expected a number > 0, got inf"),
        ({"lr": "0.1"}, "lr: expected a number > 0, got '0.1'"),
        ({"tol": 0}, "tol: expected a number > 0, got 0"),
        ({"max_steps": 0}, "max_steps must be an int >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
    ],
    ids=str,
)
def test_row_39_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        fit(X, **settings)


def test_row_39_a_batch_of_more_rows_than_there_are_takes_all_with_one_warning():
    with one_warning("batch_size: 1000 is more than the 60 rows"):
        posterior = fit(X, max_steps=20, batch_size=1000)
    assert torch.equal(posterior.losses, fit(X, max_steps=20).losses)


@pytest.mark.parametrize("seed", [-1, 1.5, "a", True, None, 2**63])
def test_row_40_a_seed_is_a_whole_number_from_zero(seed, posterior):
    with pytest.raises(ValueError, match="^seed"):
        fit(X, seed=seed)
    if seed is not None:
        for method in (posterior.sample, posterior.log_weights, posterior.summary):
            with pytest.raises(ValueError, match="^seed"):
                method(10, seed=seed)


# ---- rows 42, 44: files -------------------------------------------------------------------------


def truncated(content):
    return content[:-20]


def flipped(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


class Trap:
    """Unpickling it would be seen."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def pickled(_):
    return pickle.dumps(Trap())


@pytest.mark.parametrize("damage", [truncated, flipped, pickled, lambda _: b""])
def test_row_42_a_damaged_file_is_refused_in_one_line(posterior, damage, tmp_path):
    file = posterior.save(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="is damaged") as error:
        ll.load(tmp_path)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_row_42_a_file_of_another_model_is_refused(posterior, tmp_path):
    posterior.save(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        ll.load(tmp_path, mixture(3, 4))
    assert "\n" not in str(error.value)


def test_row_44_a_place_that_cannot_be_written_to_is_named(posterior, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        posterior.save(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "in the way"


# ---- rows 47, 48: programs ----------------------------------------------------------------------


def test_row_47_control_flow_on_a_latent_runs_eagerly_and_is_said():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        scale = 1.0 if loc > 0 else 2.0
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    x = 3 + torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert any("one particle at a time" in note for note in ll.check_pair(model, x).notes)
    posterior = fit(x, model)
    assert posterior.backend.startswith("eager")
    assert any("one particle at a time" in note for note in posterior.notes)
    mean = x.sum() / (20 + 1 / 9)  # of the branch that holds nearly all of the mass
    assert abs(posterior.sample(500)["loc"].mean() - mean) < 0.3 / 20**0.5


def test_row_48_a_loss_that_stays_nan_names_step_site_and_value():
    calls = itertools.count()

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        pyro.factor("late", (NAN if next(calls) > 300 else 0.0) + 0 * loc)

    # A record of the model would not count its calls.
    how = {"max_steps": 2000, "backend": "eager", "method": "stages"}
    with pytest.raises(ll.FitDivergedError, match="at step .* site 'late' is nan; ") as error:
        fit(torch.tensor(1.0), model, guide="mean_field", **how)
    assert error.value.step > 0
    assert error.value.site == "late"
    assert math.isnan(error.value.value)


# ---- row 30: rows that are no probabilities -----------------------------------------------------

CHAIN = torch.tensor([0.5, 0.5]), torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.zeros(3, 2)
CHAIN_FUNCTIONS = ("log_prob", "filter", "smooth", "pairwise", "decode", "predict_next")


@pytest.mark.parametrize("name", [*CHAIN_FUNCTIONS, "sample_paths", "forecast"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.9, 0.9], "rows that sum to 1, got 1.8 in row 1"),
        ([0.0, 0.0], "rows that sum to 1, got 0 in row 1"),
        ([1.2, -0.2], "probabilities >= 0, got -0.2 in row 1"),
        ([NAN, 0.5], "in row 1"),
    ],
)
def test_transitions_that_are_no_probabilities(name, row, message):
    from latentlab.distributions import hmm

    initial, transitions, seen = CHAIN
    wrong = torch.stack([transitions[0], torch.tensor(row)])
    with pytest.raises(ValueError, match=f"transitions: expected .*{message}"):
        getattr(hmm, name)(initial, wrong, seen)
    with pytest.raises(ValueError, match="initial: expected .* in its row"):
        getattr(hmm, name)(torch.tensor([-0.5, 1.5]), transitions, seen)


def test_a_chain_of_rows_that_are_no_probabilities():
    from latentlab.distributions.markov import HiddenMarkov

    emission = dist.Normal(torch.tensor([[-1.0], [1.0]]), 1.0).to_event(1)
    transitions = torch.tensor([[0.9, 0.1], [0.9, 0.9]])
    with pytest.raises(ValueError, match="transitions: expected rows .*got 1.8 in row 1"):
        HiddenMarkov(CHAIN[0], transitions, emission, num_steps=3)


# ---- rows far from all that was fitted ----------------------------------------------------------


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def coded():
    x = torch.cat([normal(20, 2) - 3, normal(20, 2) + 3]).float()
    vae = ll.VariationalAutoencoder(num_features=2, latent_dim=1, hidden_dims=(4,))
    ae = ll.Autoencoder(num_features=2, latent_dim=1, hidden_dims=(4,))
    return [ll.fit(model, x, max_steps=400, progress=False).model for model in (vae, ae)]


@pytest.mark.parametrize("value", [1e40, 1e80])
@pytest.mark.parametrize("name", ["encode", "reconstruct", "log_prob", "impute", "error"])
def test_a_row_whose_code_is_not_finite_is_named(coded, name, value):
    x = torch.tensor([[1.0, 1.0], [value, 1.0]], dtype=torch.float64)
    x[0, 1] = NAN if name == "impute" else 1.0
    for model in [model for model in coded if hasattr(model, name)]:
        with pytest.raises(ValueError, match="x: row 1 lies so far"):
            getattr(model, name)(x)


@pytest.mark.parametrize(("raw", "trusted"), [(0.0, True), (-100.0, False)])
def test_weights_that_are_all_the_same_are_not_trusted(raw, trusted):
    """Far away an encoder is as narrow as can be, wherever the posterior is."""
    vae = ll.VariationalAutoencoder(num_features=2, latent_dim=1, hidden_dims=(4,))
    with torch.no_grad():
        vae.encoder[-1].weight[1], vae.encoder[-1].bias[1] = 0.0, raw
    khat = vae.log_prob(normal(5, 2).float()).khat
    assert khat.khat.isfinite().all() == trusted
    assert trusted or len(khat.bad) == 5


def test_latents_that_cannot_be_decoded_are_named(coded):
    for model in coded:
        with pytest.raises(ValueError, match="z: the decoder gives no finite numbers .* 1e\\+300"):
            model.decode(torch.tensor([[1e300]], dtype=torch.float64))


@pytest.mark.parametrize("value", [7.0, 1e6, 1e12])
def test_a_constant_column_leaves_a_sphere_to_the_others(value):
    x = torch.cat([normal(40, 1) - 4, normal(40, 1) + 4])
    x = torch.cat([x, torch.full((80, 1), value).double()], 1)
    with pytest.warns(UserWarning, match="constant column 'x1'"):
        posterior = fit(x, ll.GaussianMixture(2, 2, covariance="spherical"), max_steps=1500)
    locs = posterior.sample(200)["locs"].mean(0)
    order = locs[:, 0].argsort()
    assert locs[order, 0].tolist() == pytest.approx([-4, 4], abs=0.8)
    assert locs[:, 1].tolist() == pytest.approx([value, value], rel=1e-6, abs=2.0)


def test_an_outlier_beside_one_number_is_told():
    x = torch.cat([torch.zeros(35), normal(4), torch.tensor([1e12])])[:, None]
    with pytest.warns(UserWarning, match="row 39 of column 'x0' .* deviations of the others"):
        ll.GaussianMixture(1, 2).scale_to(x)


def vae_of_two(**settings):
    return ll.VariationalAutoencoder(num_features=2, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ll.VariationalAutoencoder(num_features=2, missing="no"),
            "missing: expected True",
        ),
        (
            lambda: ll.VariationalAutoencoder(num_features=2, num_components=0),
            "num_components must",
        ),
        (
            lambda: ll.HiddenMarkovModel(2, 1, num_categories=3),
            "num_categories: is for categorical",
        ),
        (lambda: fit(X, progress="no"), "progress: expected True, False or None"),
        (
            lambda: ll.fit(ll.HiddenMarkovModel(2, 2), {"y": X}),
            "data: HiddenMarkovModel takes x, leng",
        ),
    ],
)
def test_an_argument_that_would_be_ignored(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
