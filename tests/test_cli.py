"""The command line: a file in, a verdict and its files out; one line for every bad input."""

import contextlib
import io
import json
import os
import pickle
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logsumexp

import latentlab as ll
from latentlab import cli
from latentlab.cli.show import _rounded
from latentlab.inference import checkpoint
from latentlab.inference.saa import SaaClimb
from latentlab.inference.stages import Climb

FAITHFUL = Path(__file__).parents[2] / "shared" / "data" / "classic" / "faithful.csv"
FILES = {"report.html", "posterior.nc", "summary.csv", "model.safetensors"}
SHORT = ("--components", 2, "--num-restarts", 1, "--max-steps", 400)
QUICK = ("--guide", "point", "--num-restarts", 1, "--max-steps", 100)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def run(*args):
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
    return Ended(ended.value.code or 0, out.getvalue(), err.getvalue())


def process(*args, **settings):
    """The command line in a process of its own."""
    command = [sys.executable, "-c", "from latentlab.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)


def refused(ended, *needles):
    """Bad input: code 2, one line that names the fault, nothing else."""
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("latentlab: ")
    assert ended.err.endswith("\n")
    assert ended.err.count("\n") == 1
    for needle in needles:
        assert needle in ended.err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eruptions in a file."""
    table = ll.data.simulate.eruptions(150)
    path = tmp_path_factory.mktemp("data") / "eruptions.csv"
    pd.DataFrame(table.x.numpy(), columns=table.names).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    """The folder of a fit, in a folder that was not there, and what the terminal said."""
    folder = tmp_path_factory.mktemp("fits") / "new" / "run"
    return folder, run("fit", "gmm", data, *SHORT, "--out", folder)


@pytest.fixture(scope="module")
def folder(fitted):
    return fitted[0]


@pytest.fixture(scope="module")
def again(data, tmp_path_factory):
    """The same fit for machines."""
    folder = tmp_path_factory.mktemp("again")
    return run("fit", "gmm", data, *SHORT, "--out", folder, "--json")


# ── help ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "command", ["", "fit", "fit gmm", "check", "predict", "sample", "demo"], ids=lambda c: c or "-"
)
def test_help_fits_on_a_screen_and_ends_with_an_example(command):
    ended = run(*command.split(), "--help")
    lines = ended.out.rstrip().splitlines()
    assert ended.code == 0
    assert ended.err == ""
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[-1].strip().startswith(f"Example: latentlab {command}".strip())


def test_the_command_alone_says_what_there_is():
    assert run() == run("--help")
    assert run("--version") == Ended(0, f"latentlab {ll.__version__}\n", "")


def test_help_loads_nothing_heavy():
    code = (
        "import sys, latentlab.cli\n"
        "heavy = {'torch', 'pyro', 'numpy', 'pandas', 'sklearn', 'matplotlib', 'arviz'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr == ""
    assert ended.returncode == 0


# ── fit ──────────────────────────────────────────────────────────────────────────────────────


def test_a_fit_writes_its_four_files_and_nothing_else(fitted):
    folder, ended = fitted
    assert {path.name for path in folder.iterdir()} == FILES
    assert ended.code == 0
    assert ended.err == ""


def test_the_verdict_comes_first_and_the_files_last(fitted):
    folder, ended = fitted
    lines = ended.out.splitlines()
    posterior = ll.load(folder)
    assert lines[0] == posterior.check().level
    assert " ".join(posterior.check().reasons[0].split()) in " ".join(ended.out.split())
    assert str(posterior.elbo) in ended.out
    assert [line.split()[-1] for line in lines[-4:]] == [
        str(folder / name)
        for name in ("report.html", "posterior.nc", "summary.csv", checkpoint.FILE)
    ]


def test_the_report_opens_with_the_verdict(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    level = ll.load(folder).check().level
    assert f"<title>{level}: " in text
    assert text.index(f"</span>{level}</span>") < text.index("<section")


def test_the_summary_is_that_of_the_posterior(folder):
    frame = pd.read_csv(folder / "summary.csv", dtype={"index": str})
    pd.testing.assert_frame_equal(frame, ll.load(folder).summary(), check_dtype=False)


def test_json_is_one_object_and_the_same_seed_the_same_numbers(again, folder):
    found = json.loads(again.out)
    assert again.code == 0
    assert again.err == ""
    posterior = ll.load(folder)
    assert found["verdict"] == posterior.check().level
    assert found["elbo"] == {"value": posterior.elbo.value, "se": posterior.elbo.se}
    assert found["seed"] == 0
    assert found["summary"] == posterior.summary().to_dict("records")
    assert set(map(Path, found["paths"].values())) == set(
        Path(found["paths"]["report"]).parent.iterdir()
    )


def test_columns_are_taken_in_the_order_they_are_named(tmp_path):
    """Names are what they are: commas in quotes, no markup, no emoji."""
    x = ll.data.simulate.eruptions(30).x.numpy()
    frame = pd.DataFrame({"[red]mass, g": x[:, 0], "kind": "a", ":smile:": x[:, 1]})
    frame.to_csv(tmp_path / "x.csv", index=False)
    columns = '":smile:","[red]mass, g"'
    words = ("--components", 1, "--columns", columns, "--seed", 7, *QUICK)
    ended = run("fit", "gmm", tmp_path / "x.csv", *words, "--out", tmp_path / "run")
    assert ended.code == 0
    posterior = ll.load(tmp_path / "run")
    assert posterior.names == (":smile:", "[red]mass, g")
    assert posterior.seed == 7
    locs = posterior.sample(1)["locs"][0, 0]
    np.testing.assert_allclose(locs, x.mean(0)[::-1], rtol=0.1)
    assert "0, [red]mass, g" in ended.out
    assert "0, :smile:" in ended.out

    frame.assign(kind=1).to_csv(tmp_path / "more.csv", index=False)
    words = ("predict", tmp_path / "run", tmp_path / "more.csv", "--out", tmp_path / "labels.csv")
    ended = run(*words)
    refused(ended, "more columns than were fitted")
    way = shlex.split(ended.err.partition("add ")[2])
    assert run(*words, *way).code == 0


@pytest.mark.filterwarnings("default")  # shown, not raised
def test_a_constant_column_is_warned_of_in_one_line(tmp_path):
    x = ll.data.simulate.eruptions(30).x.numpy()
    pd.DataFrame({"a": x[:, 0], "b": 7.0}).to_csv(tmp_path / "x.csv", index=False)
    words = ("--components", 2, *QUICK, "--out", tmp_path / "run")
    ended = run("fit", "gmm", tmp_path / "x.csv", *words)
    assert ended.code == 0
    assert ended.err.startswith("latentlab: warning: ")
    assert "constant column 'b'" in ended.err
    assert ended.err.count("\n") == 1
    assert np.isfinite(pd.read_csv(tmp_path / "run" / "summary.csv")[["mean", "sd"]]).all(
        axis=None
    )


def test_a_fit_not_to_be_used_ends_with_1_and_is_written(data, tmp_path, monkeypatch):
    verdict = ll.Verdict("do not use", ("k-hat 2.0",), ("more restarts",), {})
    monkeypatch.setattr(ll.Posterior, "check", lambda *_, **__: verdict)
    ended = run("fit", "gmm", data, "--components", 2, *QUICK, "--out", tmp_path / "run")
    assert ended.code == 1
    assert ended.out.splitlines()[:3] == [
        "do not use",
        "  why  k-hat 2.0    ",
        "  try  more restarts",
    ]
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_a_fit_that_diverges_ends_with_1_and_one_line(data, tmp_path, monkeypatch):
    error = ll.FitDivergedError(step=7, site="locs", value=float("nan"))

    def diverge(*_, **__):
        raise error

    monkeypatch.setattr("latentlab.inference.engine.fit", diverge)
    ended = run("fit", "gmm", data, "--components", 2, "--out", tmp_path / "run")
    assert ended == Ended(1, "", f"latentlab: {error}\n")
    assert list(tmp_path.iterdir()) == []


# ── the main job ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def maximum_likelihood():
    """Means and standard deviations of the likeliest diagonal mixture, short eruptions first."""
    from sklearn.mixture import GaussianMixture

    x = pd.read_csv(FAITHFUL)[["eruptions", "waiting"]].to_numpy()
    mixture = GaussianMixture(
        2,
        covariance_type="diag",
        tol=1e-10,
        reg_covar=0,
        max_iter=10_000,
        n_init=5,
        random_state=0,
    ).fit(x)
    order = mixture.means_[:, 0].argsort()
    return mixture.means_[order], mixture.covariances_[order] ** 0.5


@pytest.mark.skipif(
    not FAITHFUL.exists(), reason=f"needs {FAITHFUL.name}, not part of the project"
)
@pytest.mark.parametrize(("unit", "shift"), [(1, 0), (1e6, 1e9)], ids=["minutes", "units of 1e-6"])
def test_old_faithful_from_a_file_to_a_verdict(unit, shift, maximum_likelihood, tmp_path):
    """Maximum likelihood follows the units; so must the fit."""
    import arviz

    frame = pd.read_csv(FAITHFUL)
    frame[["eruptions", "waiting"]] = unit * frame[["eruptions", "waiting"]] + shift
    frame.to_csv(tmp_path / "faithful.csv", index=False)
    words = ("--components", 2, "--seed", 0, "--out", tmp_path / "run")
    ended = run("fit", "gmm", tmp_path / "faithful.csv", *words)
    level = ended.out.splitlines()[0]
    assert level in ("use", "use with care")
    assert (ended.code, ended.err) == (0, "")

    summary = pd.read_csv(tmp_path / "run" / "summary.csv").query("site == 'locs'")
    assert list(summary["index"]) == ["0, eruptions", "0, waiting", "1, eruptions", "1, waiting"]
    locs, sds = (summary[name].to_numpy().reshape(2, 2) for name in ("mean", "sd"))
    order = locs[:, 0].argsort()
    means, scales = maximum_likelihood
    error = abs(locs[order] - (unit * means + shift))
    assert (error < 0.1 * unit * scales).all()
    assert (error < 0.1 * sds[order]).all()  # not of the components, but of what is known of them

    posterior = ll.load(tmp_path / "run")
    assert posterior.check().level == level
    assert posterior.names == ("eruptions", "waiting")
    exported = arviz.from_netcdf(str(tmp_path / "run" / "posterior.nc"))
    draws = exported["posterior"]["locs"]
    assert list(draws["feature"].values) == ["eruptions", "waiting"]
    spread = draws.values.std((0, 1))
    assert (abs(draws.values.mean((0, 1)) - locs) < 0.2 * spread).all()  # 1000 draws: 6 se
    observed = exported["observed_data"]["x"].values
    np.testing.assert_array_equal(observed, frame[["eruptions", "waiting"]])
    assert exported["posterior_predictive"]["x"].shape[2:] == observed.shape
    assert f"<title>{level}: " in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_demo_needs_nothing_and_leaves_data_to_go_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run("demo")
    assert (ended.code, ended.err) == (0, "")
    folder = Path("latentlab-demo")
    assert {path.name for path in folder.iterdir()} == FILES | {"iris.csv"}
    assert ended.out.splitlines()[0] in ("use", "use with care")
    assert f"  {folder / 'report.html'}\n" in ended.out
    assert run("check", folder, "--data", folder / "iris.csv").code == 0


# ── check ────────────────────────────────────────────────────────────────────────────────────


def test_check_without_data_is_the_stored_verdict(folder):
    ended = run("check", folder)
    verdict = ll.load(folder).check()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[0] == verdict.level
    for name, figure in verdict.evidence.items():
        assert name in ended.out
        assert figure in ended.out
    assert "--data" in ended.out


def test_check_with_the_data_measures_anew(folder, data):
    """Other draws, other figures; the same seed as the fit, those that were stored."""
    stored = json.loads(run("check", folder, "--json").out)
    assert stored == json.loads(run("check", folder, "--data", data, "--json").out)
    other = json.loads(run("check", folder, "--data", data, "--seed", 1, "--json").out)
    assert other["evidence"]["ELBO"] != stored["evidence"]["ELBO"]


def test_check_with_other_data_says_do_not_use(folder, data, tmp_path):
    frame = pd.read_csv(data) + 1
    frame.to_csv(tmp_path / "other.csv", index=False)
    ended = run("check", folder, "--data", tmp_path / "other.csv")
    assert ended.code == 1
    assert ended.out.startswith("do not use\n")


# ── predict ──────────────────────────────────────────────────────────────────────────────────


def test_labels_are_bayes_rule_averaged_over_the_posterior(folder, data, tmp_path):
    assert run("predict", folder, data, "--out", tmp_path / "labels.csv").code == 0
    labels = pd.read_csv(tmp_path / "labels.csv")
    assert list(labels) == ["component", "probability_0", "probability_1", "log_prob"]
    x = pd.read_csv(data).to_numpy()
    posterior = ll.load(folder)
    draws = {site: draw.numpy() for site, draw in posterior.sample(1000).items()}
    floor = 1e-3 * x.std(0)
    scales = np.hypot(draws["scales"], floor)[:, None]
    density = stats.norm.logpdf(x[:, None], draws["locs"][:, None], scales).sum(-1)
    joint = np.log(draws["weights"])[:, None] + density  # (S, N, K)
    rows = logsumexp(joint, -1)
    probabilities = np.exp(joint - rows[..., None]).mean(0)
    np.testing.assert_allclose(
        labels[["probability_0", "probability_1"]], probabilities, atol=1e-9
    )
    np.testing.assert_allclose(labels["log_prob"], logsumexp(rows, 0) - np.log(1000), rtol=1e-9)
    np.testing.assert_array_equal(labels["component"], probabilities.argmax(1))


def test_components_are_numbered_as_in_the_summary(folder, data, tmp_path):
    run("predict", folder, data, "--out", tmp_path / "labels.csv")
    component = pd.read_csv(tmp_path / "labels.csv")["component"]
    summary = pd.read_csv(folder / "summary.csv").query("site == 'locs'")
    means = pd.read_csv(data).groupby(component).mean().to_numpy()
    np.testing.assert_allclose(means, summary["mean"].to_numpy().reshape(2, 2), rtol=0.05)


def test_rows_keep_their_order_and_columns_are_matched_by_name(folder, data, tmp_path):
    """CSV and Parquet say the same; missing cells and a first column of row names are no fault."""
    frame = pd.read_csv(data).assign(rownames=range(150)).sample(frac=1, random_state=0)
    frame = frame[["rownames", "waiting", "eruptions"]]
    frame.to_csv(tmp_path / "shuffled.csv", index=False)
    run("predict", folder, data, "--out", tmp_path / "labels.csv")
    ended = run(
        "predict", folder, tmp_path / "shuffled.csv", "--out", tmp_path / "x" / "l.parquet"
    )
    assert (ended.code, ended.err) == (0, "")
    assert "150 rows" in ended.out
    labels = pd.read_csv(tmp_path / "labels.csv")
    shuffled = pd.read_parquet(tmp_path / "x" / "l.parquet")
    expected = labels.iloc[frame["rownames"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(shuffled, expected, rtol=1e-9)
    frame.loc[frame.index[0], "waiting"] = np.nan
    frame.to_csv(tmp_path / "missing.csv", index=False)
    run("predict", folder, tmp_path / "missing.csv", "--out", tmp_path / "missing-labels.csv")
    changed = pd.read_csv(tmp_path / "missing-labels.csv") != expected.round(12)
    assert np.isfinite(pd.read_csv(tmp_path / "missing-labels.csv")).all(axis=None)
    assert changed.loc[0, "log_prob"]


def test_columns_that_were_not_fitted_are_chosen_away(folder, data, tmp_path):
    frame = pd.read_csv(data).assign(depth=1.0)
    frame.to_csv(tmp_path / "more.csv", index=False)
    out = tmp_path / "labels.csv"
    ended = run("predict", folder, tmp_path / "more.csv", "--out", out)
    refused(ended, "more.csv", "--columns eruptions,waiting")
    assert not out.exists()
    words = ("--columns", "eruptions,waiting")
    assert run("predict", folder, tmp_path / "more.csv", "--out", out, *words).code == 0
    frame.drop(columns="waiting").to_csv(tmp_path / "fewer.csv", index=False)
    refused(run("predict", folder, tmp_path / "fewer.csv", "--out", out), "missing 'waiting'")
    refused(run("check", folder, "--data", tmp_path / "fewer.csv"), "missing 'waiting'")


def test_predictions_of_a_fit_not_to_be_used_say_so(folder, data, tmp_path):
    posterior = ll.load(folder)
    recorded = {**posterior.recorded, "level": "do not use"}
    replace(posterior, recorded=recorded).save(tmp_path)
    for words in (
        ["predict", tmp_path, data, "--out", tmp_path / "x.csv"],
        ["sample", tmp_path, "-n1"],
    ):
        ended = run(*words)
        assert ended.code == 0
        assert ended.err.startswith('latentlab: warning: the verdict on this fit is "do not use"')
        assert ended.err.count("\n") == 1
    assert run("check", tmp_path).code == 1


# ── sample ───────────────────────────────────────────────────────────────────────────────────


def test_new_rows_are_drawn_from_the_posterior_predictive(folder, tmp_path):
    """Mean and variance by the laws of total expectation and variance, given posterior draws."""
    run("sample", folder, "-n", 20_000, "--seed", 5, "--out", tmp_path / "new.csv")
    rows = pd.read_csv(tmp_path / "new.csv")
    assert list(rows) == ["eruptions", "waiting"]
    assert len(rows) == 20_000
    draws = ll.load(folder).sample(4000, seed=6)
    weights, locs, scales = (draws[site].numpy() for site in ("weights", "locs", "scales"))
    mean = (weights[..., None] * locs).sum(1).mean(0)
    second = (weights[..., None] * (locs**2 + scales**2)).sum(1).mean(0)
    se = rows.std() / 20_000**0.5
    assert (abs(rows.mean() - mean) < 5 * se).all()
    fourth = ((rows - rows.mean()) ** 2).std() / 20_000**0.5
    assert (abs(rows.var() - (second - mean**2)) < 5 * fourth).all()
    assert not rows.duplicated().any()


def test_without_a_file_rows_are_printed_as_csv(folder):
    ended = run("sample", folder, "-n", 5)
    assert (ended.code, ended.err) == (0, "")
    rows = pd.read_csv(io.StringIO(ended.out))
    assert rows.shape == (5, 2)
    assert run("sample", folder, "-n", 5) == ended
    assert run("sample", folder, "-n", 5, "--seed", 1).out != ended.out


# ── bad input ────────────────────────────────────────────────────────────────────────────────

TEXTS = {
    "empty": ("", "empty"),
    "header only": ("a,b\n", "none"),
    "one row": ("a,b\n1,2\n", "1 row"),
    "no header": ("1,2\n3,4\n", "line 1 holds numbers"),
    "ragged": ("a,b\n1,2\n3,4,5\n", "line 3 has 3 cells"),
    "text": ("a,b\n1,2\n3,four\n", "column 'b' is not numeric ('four' in line 3"),
    "empty column": ("a,b\n1,\n3,\n5,\n", "column 'b' is all NaN"),
    "inf": ("a,b\n1,2\n3,inf\n5,6\n", "row 2, column 2"),
    "huge": ("a,b\n1,2\n3,1e200\n5,6\n", "row 2, column 2"),
    "fewer rows than components": ("a,b\n1,2\n3,4\n", "3 components for 2 rows"),
    "garbage": (bytes(range(256)) * 10, "x.csv"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_broken_file_is_named_in_one_line(name, tmp_path):
    content, needle = TEXTS[name]
    file = tmp_path / "x.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "new" / "run"
    refused(run("fit", "gmm", file, "--components", 3, "--out", out), needle)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["--components", "0"], "components"),
        (["--components", "-1"], "components"),
        (["--components", "2.5"], "'--components'"),
        (["--components", "x"], "'--components'"),
        (["--components"], "--components"),
        ([], "--components"),
        (["--components", "2", "--seed", "-1"], "'--seed'"),
        (["--components", "2", "--seed", "1.5"], "'--seed'"),
        (["--components", "2", "--seed", str(2**63)], "seed must be"),
        (["--components", "2", "--num-restarts", "0"], "'--num-restarts'"),
        (["--components", "2", "--max-steps", "0"], "'--max-steps'"),
        (["--components", "2", "--guide", "wide"], "mean_field"),
        (["--components", "2", "--columns", "waiting,depth"], "no column 'depth'"),
        (["--components", "2", "--columns", ""], "at least one"),
        (["--components", "2", "--colour"], "--colour"),
        (["--components", "2", "more"], "more"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_wrong_option_is_named_in_one_line(words, needle, data, tmp_path):
    refused(run("fit", "gmm", data, "--out", tmp_path / "run", *words), needle)
    assert list(tmp_path.iterdir()) == []


def test_a_fit_with_a_checkpoint_goes_on_and_refuses_another(data, tmp_path):
    fit = ("fit", "gmm", data, "--components", 2, *QUICK, "--out", tmp_path / "run")
    kept = ("--checkpoint", tmp_path / "kept")
    for _ in range(2):
        assert run(*fit, *kept).code in (0, 1)
    assert (tmp_path / "kept" / "manifest.json").exists()
    refused(run(*fit, *kept, "--seed", 3), "--checkpoint: ", "begun with seed=0", "has seed=3")
    refused(run(*fit, "--checkpoint", data), f"{data}: cannot be written")


def test_what_is_not_there_is_named(data, folder, tmp_path):
    fit = ["--components", 2, "--out", tmp_path / "run"]
    refused(run("fit", "gmm", tmp_path / "no.csv", *fit), "no.csv", "no such file")
    refused(run("fit", "gmm", tmp_path, *fit), "folder")
    refused(run("fit", "gmm", data, "--components", 2), "--out")
    refused(run("fit", "lda", data), "lda")
    refused(run("fit"), "command")
    refused(run("check", tmp_path / "no"), "no such file")
    refused(run("check", tmp_path), "model.safetensors")
    refused(run("check", folder, "--data", tmp_path / "no.csv"), "no such file")
    refused(run("predict", folder, tmp_path / "no.csv", "--out", tmp_path / "x.csv"), "no.csv")
    refused(run("predict", folder, data), "--out")
    refused(run("sample", folder), "-n")
    refused(run("sample", folder, "-n", 0), "-n")
    refused(run("sample", folder, "-n", 1, "--seed", -1), "--seed")
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_its_own_ends_with_2_and_one_line(tmp_path):
    ended = process("fit", "gmm", "no.csv", "--components", 2, "--out", "run", cwd=tmp_path)
    refused(Ended(ended.returncode, ended.stdout, ended.stderr), "no.csv: no such file")
    assert list(tmp_path.iterdir()) == []


class Trap:
    """Leaves a file behind where its pickle is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("command", ["check", "sample", "predict"])
@pytest.mark.parametrize("fault", ["truncated", "flipped", "pickle", "newer", "older", "empty"])
def test_a_damaged_model_is_refused_and_never_run(
    fault, command, folder, data, tmp_path, monkeypatch
):
    content = (folder / checkpoint.FILE).read_bytes()
    flipped = bytearray(content)
    flipped[-100] ^= 1
    trap = tmp_path / "sprung"
    spoilt = {
        "truncated": content[:-50],
        "flipped": bytes(flipped),
        "pickle": pickle.dumps(Trap(str(trap))),
        "empty": b"",
    }
    if fault in ("newer", "older"):
        posterior = ll.load(folder)
        monkeypatch.setattr(checkpoint, "_SCHEMA", 99 if fault == "newer" else 1)
        posterior.save(tmp_path)
        monkeypatch.undo()
    else:
        (tmp_path / checkpoint.FILE).write_bytes(spoilt[fault])
    words = {"check": [], "sample": ["-n", 1], "predict": [data, "--out", tmp_path / "labels.csv"]}
    words_of = fault if fault in ("newer", "older") else "damaged"
    refused(run(command, tmp_path, *words[command]), words_of)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.FILE]


# ── nothing half-written ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_fit(monkeypatch):
    """A fit that begins fails the test."""

    def begun(*_, **__):
        pytest.fail("the fit began")

    monkeypatch.setattr("latentlab.inference.engine.fit", begun)


@pytest.mark.usefixtures("no_fit")
def test_a_place_that_cannot_be_written_to_is_found_before_the_fit(data, folder, tmp_path):
    for place in (data, data / "run"):
        refused(run("fit", "gmm", data, "--components", 2, "--out", place), str(place))
        refused(run("demo", "--out", place), str(place))
    for place in (data / "labels.csv", tmp_path / "labels.txt", tmp_path / "labels"):
        parent = str(data if place.parent == data else place)
        refused(run("predict", folder, data, "--out", place), parent)
        refused(run("sample", folder, "-n", 1, "--out", place), parent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_fit")
def test_a_read_only_folder_is_found_before_the_fit(data, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write anywhere")
    refused(run("fit", "gmm", data, "--components", 2, "--out", tmp_path / "run"), "Permission")
    tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


def test_predictions_do_not_overwrite_their_data(folder, data):
    before = data.read_bytes()
    refused(run("predict", folder, data, "--out", data), "holds the data")
    assert data.read_bytes() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_while_it_is_written_leaves_the_old_results(error, data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ll.Posterior, "to_arviz", fail)  # after the report, before the model
    for name in FILES:
        (tmp_path / name).write_text("old")
    ended = run("fit", "gmm", data, "--components", 2, *QUICK, "--out", tmp_path)
    if isinstance(error, KeyboardInterrupt):
        assert ended == Ended(130, "", "")
    else:
        refused(ended, "No space left on device")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(FILES, "old")


@pytest.mark.parametrize("method", ["warm_up", "until_converged"])
def test_ctrl_c_ends_the_climb_and_keeps_what_it_reached(method, data, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for climb in (Climb, SaaClimb):
        monkeypatch.setattr(climb, method, interrupt)
    ended = run("fit", "gmm", data, *SHORT, "--out", tmp_path / "run")
    assert (ended.code, ended.err) == (130, "")
    assert "interrupted" in ended.out
    posterior = ll.load(tmp_path / "run")
    assert not posterior.converged
    assert all(torch.isfinite(draws).all() for draws in posterior.sample(10).values())
    assert run("check", tmp_path / "run").code in (0, 1)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────


@given(st.floats(-1e12, 1e12), st.floats(-12, 12))
def test_numbers_are_shown_to_a_twentieth_of_their_sd(value, size):
    sd = 10.0**size
    shown = float(_rounded(value, sd))
    assert abs(shown - value) <= 0.0501 * sd + 1e-15 * abs(value)


def test_numbers_without_a_spread_are_shown_to_four_digits():
    assert _rounded(123456.0, 0.0) == "1.235e+05"
    assert _rounded(float("nan"), 1.0) == "nan"
    assert _rounded(80.0, 0.5) == "80.00"
