"""Every diagnostic takes numbers in whatever they come in, and names what is none."""

import warnings

import numpy as np
import pytest
import torch
from scipy import sparse

import latentlab.diagnostics as D
from latentlab.diagnostics.arguments import to_tensor, unit_of

Z = np.random.default_rng(0).normal(size=(60, 2))
ROWS = np.random.default_rng(1).integers(0, 20, (60, 2))
CUBE = np.random.default_rng(2).normal(size=(60, 40, 2))
MANY = np.random.default_rng(3).normal(size=(120, 60))
LOGS = -(MANY[:, 0] ** 2)
S100 = np.random.default_rng(4).normal(size=(120, 2))
P = np.full(60, 0.5)

# Each argument that holds numbers, with a call that takes it in last.
ARGUMENTS = {
    "stein draws": lambda v: D.stein(v, S100),
    "stein scores": lambda v: D.stein(S100, v),
    "coverage ranks": lambda v: D.coverage(v, 99),
    "coverage levels": lambda v: D.coverage(ROWS, 99, v),
    "contraction truth": lambda v: D.contraction(v, Z, Z**2, [1, 1]),
    "contraction mean": lambda v: D.contraction(Z, v, Z**2, [1, 1]),
    "contraction sd": lambda v: D.contraction(Z, Z, v, [1, 1]),
    "contraction prior_sd": lambda v: D.contraction(Z, Z, Z**2, v),
    "sbc ranks": lambda v: D.sbc(v, 99),
    "sbc_ranks truth": lambda v: D.sbc_ranks(v, CUBE),
    "sbc_ranks draws": lambda v: D.sbc_ranks(Z, v),
    "tarp truth": lambda v: D.tarp(v, CUBE, Z),
    "tarp draws": lambda v: D.tarp(Z, v, Z),
    "tarp references": lambda v: D.tarp(Z, CUBE, v),
    "holm p_values": D.holm,
    "uniformity values": D.uniformity,
    "collapse loc": D.collapse,
    "collapse scale": lambda v: D.collapse(Z, v if v is not None else "none"),
    "compare_draws x": lambda v: D.compare_draws(v, Z),
    "compare_draws reference": lambda v: D.compare_draws(Z, v),
    "sliced_wasserstein x": lambda v: D.sliced_wasserstein(v, Z),
    "mmd y": lambda v: D.mmd(Z, v),
    "c2st x": lambda v: D.c2st(v, Z),
    "error_bounds draws": lambda v: D.error_bounds(v, LOGS),
    "error_bounds log_weights": lambda v: D.error_bounds(S100, v),
    "moment_errors draws": lambda v: D.moment_errors(v, LOGS),
    "moment_errors log_weights": lambda v: D.moment_errors(S100, v),
    "ess x": D.ess,
    "mcse x": D.mcse,
    "rhat x": D.rhat,
    "kl_from_draws log_p": lambda v: D.kl_from_draws(v, LOGS),
    "kl_from_draws log_q": lambda v: D.kl_from_draws(LOGS, v),
    "information loc": lambda v: D.information(v, Z**2),
    "information scale": lambda v: D.information(Z, v),
    "information_from_densities log_q": lambda v: D.information_from_densities(v, P),
    "information_from_densities log_prior": lambda v: D.information_from_densities(Z @ Z.T, v),
    "loo log_lik": D.loo,
    "loo log_weights": lambda v: D.loo(MANY, v if v is not None else "none"),
    "loo_pit observed": lambda v: D.loo_pit(v, MANY, MANY),
    "loo_pit replicated": lambda v: D.loo_pit(P, v, MANY),
    "loo_pit log_lik": lambda v: D.loo_pit(P, MANY, v),
    "pit observed": lambda v: D.pit(v, MANY),
    "pit replicated": lambda v: D.pit(P, v),
    "ppc observed": lambda v: D.ppc(v, MANY),
    "ppc replicated": lambda v: D.ppc(P, v),
    "plot_densities observed": lambda v: D.plot_densities(v, MANY),
    "rootogram replicated": lambda v: D.rootogram(P, v),
    "psis log_weights": D.psis,
    "khat_per_column log_weights": D.khat_per_column,
    "row_evidence log_weights": D.row_evidence,
    "sandwich log_weights": D.sandwich,
    "log_mean_exp log_values": D.log_mean_exp,
    "reliability probabilities": lambda v: D.reliability(v, P),
    "reliability outcomes": lambda v: D.reliability(P, v),
    "sensitivity draws": lambda v: D.sensitivity(v, LOGS, LOGS),
    "sensitivity log_prior": lambda v: D.sensitivity(S100, v, LOGS),
    "sensitivity log_lik": lambda v: D.sensitivity(S100, LOGS, v),
    "elbo_parts log_p": lambda v: D.elbo_parts({"x": v}, {}, ["x"]),
}
ITERATORS = {"loo log_lik", "loo_pit log_lik", "loo_pit replicated"}  # which take blocks

WRONG = {
    "text": lambda: "abc",
    "texts": lambda: ["a", "b"],
    "none": lambda: None,
    "dict": lambda: {"a": 1.0},
    "generator": lambda: (v for v in (1.0, 2.0)),
    "complex": lambda: Z.astype(complex),
    "complex tensor": lambda: torch.tensor(Z.astype(complex)),
    "sparse": lambda: sparse.csr_matrix(Z),
    "sparse tensor": lambda: torch.tensor(Z).to_sparse(),
    "ragged": lambda: [[1.0], [1.0, 2.0]],
    "object of text": lambda: np.array([[1.0, "2"]], dtype=object),
    "dates": lambda: np.array(["2020-01-01"], dtype="datetime64[D]"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_what_is_no_numbers_is_named(argument, kind):
    if kind == "generator" and argument in ITERATORS:
        pytest.skip("an iterator over blocks")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError) as caught:
            ARGUMENTS[argument](WRONG[kind]())
    text = str(caught.value)
    assert text.startswith((argument.split()[1], f"{argument.split()[1]}['x']"))
    assert "expected" in text
    assert "\n" not in text
    assert "got" in text


def test_numbers_come_in_many_forms():
    plain = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for same in (
        plain.bool(),
        plain.half(),
        plain.bfloat16(),
        plain.to(torch.uint8),
        plain.requires_grad_(),
        np.array(plain.tolist(), dtype=object),
        np.array(plain.tolist(), dtype=">f8"),
        np.array(plain.tolist(), dtype=np.longdouble),
        np.array(plain.tolist(), dtype=np.uint16),
        plain.bool().numpy(),
        [[True, False], [False, True]],
        ((1, 0), (0, 1)),
    ):
        found = to_tensor(same)
        assert torch.equal(found.double(), plain.detach().double())
        assert found.dtype in (torch.float32, torch.float64, torch.int64)
    masked = np.ma.masked_array([1, 2], [False, True])
    assert to_tensor(masked).isnan().tolist() == [False, True]


def test_half_precision_and_counts_are_taken():
    p = np.random.default_rng(0).dirichlet(np.ones(5), 60)
    y = np.random.default_rng(1).integers(0, 5, 60)
    whole = D.reliability(p, y)
    for rough in (torch.tensor(p).half(), torch.tensor(p).bfloat16(), p.astype(np.float16)):
        assert D.reliability(rough, y).brier.value == pytest.approx(whole.brier.value, abs=0.01)
    with pytest.raises(ValueError, match="rows of sum 1"):
        D.reliability(p * 1.01, y)
    for dtype in (torch.half, torch.bfloat16, torch.float32):
        rows = torch.tensor(MANY).to(dtype)
        assert D.loo(rows).pointwise[0] == pytest.approx(float(D.loo(rows.double()).pointwise[0]))


def test_whole_numbers_are_not_cut_short():
    rows = np.random.default_rng(0).integers(-3, 0, (120, 4))
    for same in (rows, rows.astype(np.int8), torch.tensor(rows)):
        found, exact = D.loo(same), D.loo(rows.astype(float))
        assert torch.allclose(found.pointwise, exact.pointwise)
        assert found.p_loo.value == pytest.approx(exact.p_loo.value)
    yes = rows < -1
    assert torch.equal(D.loo(yes).pointwise, D.loo(yes.astype(float)).pointwise)
    y = np.ones(4, bool)
    assert torch.equal(D.loo_pit(y, yes, rows).pit, D.loo_pit(y * 1.0, yes * 1.0, rows * 1.0).pit)


def test_a_unit_is_a_power_of_two_that_leaves_no_square_out_of_range():
    for value in (5e-324, 1e-300, 3.0, 1e300, 1.7e308):
        unit = float(unit_of(torch.tensor([value], dtype=torch.float64)))
        assert np.frexp(unit)[0] == 0.5
        assert 0 < (value / unit) ** 2 < np.inf
    assert unit_of(torch.zeros(3).double()) == 1
    assert unit_of(torch.tensor([1e300, np.inf], dtype=torch.float64)) == 1
    assert unit_of(torch.zeros(4, 0).double(), dim=0).shape == (0,)
    both = unit_of(torch.tensor([[1.0, 6.0]]).double(), torch.tensor([[9.0, 3.0]]).double(), dim=0)
    assert both.tolist() == [16, 8]


SCORE = D.loo(MANY)
STUDENT, NORMAL = torch.distributions.StudentT(5.0), torch.distributions.Normal(0.0, 1.0)
LOG_P = {"x": LOGS}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: D.c2st(Z, Z, num_folds=2.5), TypeError, "num_folds: expected a whole .* got 2.5"),
        (lambda: D.c2st(Z, Z, num_folds="a"), TypeError, "num_folds: .* got 'a'"),
        (lambda: D.c2st(Z, Z, seed=-1), ValueError, "seed: expected 0 to 4294967295, got -1"),
        (lambda: D.mmd(Z, Z, seed=-1), ValueError, "seed: expected at least 0, got -1"),
        (lambda: D.mmd(Z, Z, seed=None), TypeError, "seed: expected a whole number"),
        (lambda: D.sliced_wasserstein(Z, Z, seed=0.5), TypeError, "seed: expected a whole number"),
        (lambda: D.mmd(Z, Z, bandwidth="a"), ValueError, "bandwidth: expected a positive .* 'a'"),
        (lambda: D.mmd(Z, Z, num_permutations=1.5), TypeError, "num_permutations: expected a"),
        (lambda: D.sliced_wasserstein(Z, Z, 1.5), TypeError, "num_projections: expected a whole"),
        (lambda: D.coverage(ROWS, 99, levels=0.9), ValueError, r"levels: .* as in \[0.9\]"),
        (lambda: D.coverage(ROWS, 99.5), TypeError, "num_draws: expected a whole number"),
        (lambda: D.sbc(ROWS, "a"), TypeError, "num_draws: expected a whole number"),
        (lambda: D.sbc(ROWS, 99, names="ab"), TypeError, "names: expected several strings"),
        (lambda: D.sbc(ROWS, 99, names=[1, 2]), TypeError, "names: expected strings, got 1"),
        (lambda: D.coverage(ROWS, 99, names="ab"), TypeError, "names: expected several strings"),
        (lambda: D.stein(S100, S100, names="ab"), TypeError, "names: expected several strings"),
        (lambda: D.compare_draws(Z, Z, names=3), TypeError, "names: expected several strings"),
        (
            lambda: D.sensitivity(S100, LOGS, LOGS, names="ab"),
            TypeError,
            "names: expected several",
        ),
        (lambda: D.sandwich(LOGS, order="a"), ValueError, "order: expected a number .* got 'a'"),
        (lambda: D.compare([SCORE, SCORE]), TypeError, "scores: expected name -> .* got list"),
        (lambda: D.compare(None), TypeError, "scores: expected name -> .* got NoneType"),
        (lambda: D.compare({"a": 1, "b": SCORE}), TypeError, r"scores\['a'\]: .* got int"),
        (lambda: D.elbo_parts(None, {}, ["x"]), TypeError, "log_p: expected site -> .* NoneType"),
        (lambda: D.elbo_parts(LOG_P, [LOGS], ["x"]), TypeError, "log_q: expected site -> .* list"),
        (lambda: D.elbo_parts(LOG_P, {}, "x"), TypeError, "observed: expected several .* got 'x'"),
        (lambda: D.elbo_parts(LOG_P, {}, None), TypeError, "observed: expected several strings"),
        (lambda: D.elbo_parts(LOG_P, {}, ["x"], "rows"), TypeError, "plates: expected site -> "),
        (lambda: D.ppc(P, MANY, ["mean"]), TypeError, "statistics: expected name -> .* got list"),
        (lambda: D.ppc(P, MANY, {"a": "mean"}), TypeError, r"statistics\['a'\]: .* got 'mean'"),
        (lambda: D.ppc(P, MANY, {"a": lambda y: y}), ValueError, r"statistics\['a'\]: .*\(60,\)"),
        (lambda: D.ppc(P, MANY, {"a": lambda y: None}), TypeError, r"statistics\['a'\]: expected"),
        (lambda: D.rootogram([0, 1e12], np.ones((20, 2))), ValueError, "expected counts up to"),
        (lambda: D.reliability(P, P > 0, seed=-1), ValueError, "seed: expected at least 0"),
        (lambda: D.information(Z, Z**2, num_samples=20.5), TypeError, "num_samples: expected a"),
        (lambda: D.collapse(Z, threshold="a"), ValueError, "threshold: expected .* got 'a'"),
        (lambda: D.kl(STUDENT, NORMAL, num_samples=1.5), TypeError, "num_samples: expected a"),
        (lambda: D.kl(STUDENT, NORMAL, num_samples=1), ValueError, "num_samples: .* at least 2"),
        (lambda: D.kl(STUDENT, NORMAL, seed=-1), ValueError, "seed: expected at least 0"),
        (lambda: D.kl_from_draws(1.0, 2.0), ValueError, "values: expected shape"),
    ],
)
def test_options_are_checked(call, error, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("factor", [1e-290, 1e290])
def test_densities_are_drawn_in_any_units(factor):
    plain, scaled = D.plot_densities(P, MANY), D.plot_densities(MANY[0] * factor, MANY * factor)
    assert len(scaled.lines) == len(plain.lines)
    x, y = (torch.tensor(v) for v in scaled.lines[0].get_data())
    assert float(torch.trapezoid(y * factor, x / factor)) == pytest.approx(1, abs=0.05)


def test_statistics_may_be_numbers_of_any_kind():
    kinds = {"tensor": torch.mean, "float": lambda y: float(y.sum()), "bool": lambda y: y[0] > 0}
    assert D.ppc(MANY[0], MANY, kinds).names == ("tensor", "float", "bool")


def test_a_large_count_has_its_bar():
    found = D.rootogram([0, 100_000], np.ones((20, 2)))
    assert len(found.counts) == 100_001
