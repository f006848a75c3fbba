"""The command line of each family: it writes what the library says, and refuses in one line."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_cli import refused, run

import latentlab as ll
from latentlab.data import Table
from latentlab.distributions import NormalMixture
from latentlab.distributions.completion import completed

SHORT = ("--num-restarts", 1, "--max-steps", 200)


def written(path, frame):
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def counts(home):
    """Two sequences, their steps out of order."""
    rng = np.random.default_rng(0)
    busy = np.arange(80) // 8 % 2
    frame = pd.DataFrame({"who": np.arange(80) % 2, "day": np.arange(80) // 2})
    frame["count"] = rng.poisson(np.where(busy, 12, 2))
    frame.loc[7, "count"] = np.nan
    return written(home / "counts.csv", frame.sample(frac=1, random_state=1))


@pytest.fixture(scope="module")
def hmm(home, counts):
    words = ("--states", 2, "--emission", "poisson", "--id", "who", "--time", "day")
    ended = run("fit", "hmm", counts, *words, "--guide", "mean_field", *SHORT, "--out", home / "h")
    assert ended.code in (0, 1), ended.err
    return home / "h"


@pytest.fixture(scope="module")
def table(home):
    rng = np.random.default_rng(0)
    z = rng.standard_normal(60)
    z[3] = 2.5
    frame = pd.DataFrame({"a": z, "b": 2 * z + 0.1 * rng.standard_normal(60), "c": -z})
    frame["c"] += 0.3 * rng.standard_normal(60)
    frame.loc[3, "b"] = np.nan
    return written(home / "table.csv", frame)


@pytest.fixture(scope="module")
def vae(home, table):
    words = ("--latent", 1, "--max-steps", 150, "--out", home / "v")
    ended = run("fit", "vae", table, *words)
    assert ended.code in (0, 1), ended.err
    return home / "v"


@pytest.fixture(scope="module")
def pictures(home):
    image = pytest.importorskip("PIL.Image")
    folder = home / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        cells = np.zeros((8, 8), dtype=np.uint8)
        cells[i % 2 * 4 : i % 2 * 4 + 4] = 200 + rng.integers(0, 50)
        image.fromarray(cells).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def picture_vae(home, pictures):
    ended = run("fit", "vae", pictures, "--latent", 1, "--max-steps", 40, "--out", home / "p")
    assert ended.code in (0, 1), ended.err
    return home / "p"


@pytest.fixture(scope="module")
def flow(home, table):
    rows = written(home / "rows.csv", pd.read_csv(table)[["a", "c"]])
    ended = run("fit", "flow", rows, "--kind", "realnvp", "--max-steps", 60, "--out", home / "f")
    assert ended.code in (0, 1), ended.err
    return home / "f", rows, ended.out


@pytest.fixture(scope="module")
def mixture(home, table):
    words = ("--components", 1, "--covariance", "full", *SHORT, "--out", home / "g")
    ended = run("fit", "gmm", table, *words)
    assert ended.code in (0, 1), ended.err
    return home / "g"


# ── missing cells of a mixture ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tilted", [False, True])
def test_missing_cells_are_expected_where_the_density_integrates_to(tilted):
    g = torch.Generator().manual_seed(0)
    S, K, D = 2, 3, 2
    weights = torch.rand(S, 1, K, generator=g).double().softmax(-1)
    locs = 2 * torch.randn(S, 1, K, D, generator=g).double()
    tril = torch.rand(S, 1, K, D, D, generator=g).double().tril() + torch.eye(D).double()
    given = {"scale_trils": tril} if tilted else {"scales": tril.diagonal(dim1=-2, dim2=-1)}
    x = torch.tensor([[0.5, torch.nan], [torch.nan, -1.0], [0.2, 0.3]]).double()
    mean, sd = completed(NormalMixture(weights, locs, **given), x)
    grid = torch.linspace(-30, 30, 60_001).double()
    for n, d in ((0, 1), (1, 0)):
        full = x[n].repeat(len(grid), 1)
        full[:, d] = grid
        first = second = 0.0
        for s in range(S):
            part = {name: value[s] for name, value in given.items()}
            density = NormalMixture(weights[s], locs[s], **part).log_prob(full).softmax(0)
            first = first + (density * grid).sum() / S
            second = second + (density * grid.square()).sum() / S
        torch.testing.assert_close(mean[n, d], first, atol=1e-6, rtol=0)
        torch.testing.assert_close(sd[n, d], (second - first**2).sqrt(), atol=1e-6, rtol=0)
    assert torch.equal(mean[2], x[2])
    assert not sd[2].any()


def test_a_row_without_a_single_cell_is_expected_at_the_mean():
    weights, locs = torch.full((1, 1, 2), 0.5), torch.tensor([[[[0.0, 0.0], [2.0, 4.0]]]])
    mixture = NormalMixture(weights, locs, scale_trils=torch.eye(2).expand(1, 1, 2, 2, 2))
    mean, sd = completed(mixture, torch.full((1, 2), torch.nan))
    torch.testing.assert_close(mean, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(sd, torch.tensor([[2.0, 5.0]]).sqrt())


def test_impute_fills_a_gap_by_regression_and_leaves_the_rest(mixture, table, tmp_path):
    assert run("impute", mixture, table, "--out", tmp_path / "x.csv").code == 0
    before, after = pd.read_csv(table), pd.read_csv(tmp_path / "x.csv")
    pd.testing.assert_frame_equal(before[before.notna()].fillna(after), after)
    assert after.loc[3, "b"] == pytest.approx(2 * before.loc[3, "a"], abs=0.3)


# ── codes ────────────────────────────────────────────────────────────────────────────────────


def test_codes_need_the_folder_alone_and_are_those_of_the_library(vae, table, tmp_path):
    new = written(tmp_path / "new.csv", pd.read_csv(table)[["c", "a", "b"]][:5])
    assert run("encode", vae, new, "--out", tmp_path / "z.csv").code == 0
    found = pd.read_csv(tmp_path / "z.csv")
    x = ll.data.load(table).x[:5]
    mean, sd = ll.load(vae).model.encode(x)
    np.testing.assert_allclose(found["z_0"], mean[:, 0].numpy(), rtol=1e-5)
    np.testing.assert_allclose(found["z_0_sd"], sd[:, 0].numpy(), rtol=1e-5)


def test_reconstructions_are_decoded_codes(vae, table, tmp_path):
    assert run("reconstruct", vae, table, "--out", tmp_path / "x.csv").code == 0
    found = pd.read_csv(tmp_path / "x.csv")
    expected = ll.load(vae).model.reconstruct(ll.data.load(table).x)
    np.testing.assert_allclose(found[["a", "b", "c"]], expected.numpy(), rtol=1e-5)


def test_a_vae_fills_gaps_and_leaves_the_rest(vae, table, tmp_path):
    assert run("impute", vae, table, "--out", tmp_path / "x.csv").code == 0
    before, after = pd.read_csv(table), pd.read_csv(tmp_path / "x.csv")
    assert after.notna().all(axis=None)
    pd.testing.assert_frame_equal(before[before.notna()].fillna(after), after)


def test_rows_without_a_gap_are_as_they_were(vae, table, tmp_path):
    full = pd.read_csv(table).dropna()
    data = written(tmp_path / "full.csv", full)
    assert run("impute", vae, data, "--out", tmp_path / "x.csv").code == 0
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "x.csv"), pd.read_csv(data))


def test_columns_of_several_kinds_are_filled_with_what_they_can_be(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"size": rng.normal(size=40), "count": rng.poisson(3.0, 40)})
    frame["kind"] = rng.integers(3, size=40)
    frame.loc[:5, "kind"] = np.nan
    data = written(tmp_path / "mixed.csv", frame)
    kinds = ("--likelihood", "gaussian,poisson,categorical:3")
    words = ("--latent", 1, "--max-steps", 40, *kinds, "--out", tmp_path / "v")
    assert run("fit", "vae", data, *words).code in (0, 1)
    assert run("impute", tmp_path / "v", data, "--out", tmp_path / "x.csv").code == 0
    filled = pd.read_csv(tmp_path / "x.csv")
    assert set(filled["kind"]) <= {0, 1, 2}
    pd.testing.assert_frame_equal(filled[6:], frame[6:], check_dtype=False)


def test_the_seed_decides_where_networks_start(table, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ("--latent", 1, "--max-steps", 1, "--seed", seed, "--out", tmp_path / name)
        assert run("fit", "vae", table, *words).code in (0, 1)
    weights = [next(ll.load(tmp_path / n).model.encoder.parameters()) for n in "abc"]
    assert (weights[0] == weights[1]).all()
    assert (weights[0] - weights[2]).abs().max() > 0.1


def test_codes_of_linear_models_too(table, tmp_path):
    model = ll.ProbabilisticPCA(3, 1)
    posterior = ll.fit(model, ll.data.load(table), num_restarts=1, max_steps=100, progress=False)
    posterior.save(tmp_path / "run")
    assert run("encode", tmp_path / "run", table, "--out", tmp_path / "z.csv").code == 0
    found = pd.read_csv(tmp_path / "z.csv")
    assert abs(np.corrcoef(found["z_0"], pd.read_csv(table)["a"])[0, 1]) > 0.9


def test_a_vae_without_its_data_does_what_needs_no_fitted_rows(vae, table, tmp_path):
    without, own = ll.load(vae), Table(ll.data.load(table).x, ("a", "b", "c"))
    assert without.reads_data
    for action in (without.sample, without.log_weights, without.summary):
        with pytest.raises(ValueError, match="loaded without its data; give it back"):
            action()
    again = ll.load(vae, data=own)
    assert not again.reads_data
    # Rows that it is given it can replicate: these are the data themselves.
    for new, old in zip(without.predict(4, own).values(), again.predict(4).values(), strict=True):
        assert torch.equal(new, old)
    assert without.predict(4, own.x[:5])["x"].shape == (4, 5, 3)
    ended = run("check", vae, "--json")
    assert json.loads(ended.out)["summary"] is None


def test_new_rows_of_a_vae_are_a_table(vae, tmp_path):
    assert run("sample", vae, "-n", 7, "--out", tmp_path / "new.csv").code == 0
    assert pd.read_csv(tmp_path / "new.csv").shape == (7, 3)


# ── images ───────────────────────────────────────────────────────────────────────────────────


def test_images_are_encoded_reconstructed_and_drawn(picture_vae, pictures, tmp_path):
    assert run("encode", picture_vae, pictures, "--out", tmp_path / "z.csv").code == 0
    found = pd.read_csv(tmp_path / "z.csv")
    assert list(found["file"]) == sorted(path.name for path in pictures.iterdir())
    place = tmp_path / "x.npz"
    assert run("reconstruct", picture_vae, pictures, "--out", place).code == 0
    expected = ll.load(picture_vae).model.reconstruct(ll.data.load_images(pictures).x)
    np.testing.assert_allclose(np.load(place)["x"], expected.numpy(), rtol=1e-5)
    assert run("reconstruct", picture_vae, pictures, "--out", tmp_path / "png").code == 0
    again = ll.data.load_images(tmp_path / "png")
    np.testing.assert_allclose(again.x, expected, atol=0.51 / 255)
    assert run("sample", picture_vae, "-n", 3, "--out", tmp_path / "new").code == 0
    assert ll.data.load_images(tmp_path / "new").x.shape == (3, 1, 8, 8)


def test_images_that_do_not_fit_are_refused(picture_vae, pictures, tmp_path):
    image = pytest.importorskip("PIL.Image")
    small = tmp_path / "small"
    small.mkdir()
    out = tmp_path / "z.csv"
    refused(run("encode", picture_vae, small, "--out", out), "expected PNG files")
    image.new("L", (4, 4)).save(small / "a.png")
    refused(run("encode", picture_vae, small, "--out", out), "8x8", "4x4")
    words = ("--latent", 1, "--out", tmp_path / "run")
    image.new("L", (5, 4)).save(small / "b.png")
    refused(run("fit", "vae", small, *words), "b.png", "4 x 5")
    refused(run("sample", picture_vae, "-n", 2), "--out")
    refused(run("reconstruct", picture_vae, pictures, "--out", pictures), "holds the data")
    refused(run("impute", picture_vae, pictures, "--out", out), "images")
    assert {path.name for path in tmp_path.iterdir()} == {"small"}


# ── sequences ────────────────────────────────────────────────────────────────────────────────


def test_states_stand_beside_the_steps_they_belong_to(hmm, counts, tmp_path):
    words = ("--id", "who", "--time", "day", "--out", tmp_path / "s.csv")
    assert run("predict", hmm, counts, *words).code == 0
    data, found = pd.read_csv(counts), pd.read_csv(tmp_path / "s.csv")
    pd.testing.assert_frame_equal(found[["who", "day"]], data[["who", "day"]])
    posterior = ll.load(hmm)
    for who in (0, 1):
        x = data[data["who"] == who].sort_values("day")["count"].to_numpy()
        draws = posterior._aligned(1000).draws
        probs = posterior.model.smooth(x, draws)[0].numpy()
        mine = found[found["who"] == who].sort_values("day")
        np.testing.assert_allclose(mine[["probability_0", "probability_1"]], probs, rtol=1e-6)


def test_a_missing_count_is_expected_from_its_neighbours(hmm, counts, tmp_path):
    words = ("--id", "who", "--time", "day", "--out", tmp_path / "x.csv")
    assert run("impute", hmm, counts, *words).code == 0
    before, after = pd.read_csv(counts), pd.read_csv(tmp_path / "x.csv")[["who", "day", "count"]]
    gap = before["count"].isna()
    pd.testing.assert_frame_equal(before[~gap], after[~gap], check_dtype=False)
    posterior = ll.load(hmm)
    draws = posterior._aligned(1000).draws
    who = before.loc[gap, "who"].item()
    one = before[before["who"] == who].sort_values("day")
    at = int(one["count"].isna().to_numpy().argmax())
    expected = 0.0
    for s in range(0, 1000, 10):
        single = {k: v[s : s + 1] for k, v in draws.items()}
        odds = posterior.model.smooth(one["count"].to_numpy(), single)[0, at]
        expected += float(odds @ single["rates"][0, :, 0]) / 100
    assert after.loc[gap, "count"].item() == pytest.approx(expected, rel=0.1)


@pytest.fixture(scope="module")
def patients(home, counts):
    """The same sequences, told apart by text that no number holds, and ordered by dates."""
    frame = pd.read_csv(counts)
    dates = pd.to_datetime("2025-12-20") + pd.to_timedelta(frame["day"], unit="D")
    frame["day"] = dates.dt.strftime("%Y-%m-%d")
    frame["who"] = frame["who"].map({0: "7", 1: "07"})
    return written(home / "patients.csv", frame)


def test_codes_of_categories_are_not_filled_in(tmp_path):
    frame = pd.DataFrame({"kind": [0, 1, 1, 0, 1, 0] * 3})
    file = written(tmp_path / "codes.csv", frame)
    words = ("--states", 1, "--emission", "categorical", "--categories", 2, *SHORT)
    assert run("fit", "hmm", file, *words, "--out", tmp_path / "h").code in (0, 1)
    frame = frame.astype(float)
    frame.loc[4, "kind"] = np.nan
    gaps = written(tmp_path / "gaps.csv", frame)
    ended = run("impute", tmp_path / "h", gaps, "--out", tmp_path / "x.csv")
    refused(ended, "'kind' misses cells", "predict the states")
    assert not (tmp_path / "x.csv").exists()


def test_a_number_of_codes_is_asked_for_by_its_option(tmp_path):
    file = written(tmp_path / "codes.csv", pd.DataFrame({"kind": [0, 1, 1]}))
    words = ("--states", 1, "--emission", "categorical", "--out", tmp_path / "h")
    refused(run("fit", "hmm", file, *words), "--categories")


def test_ids_may_be_text_and_times_dates(hmm, counts, patients, tmp_path):
    words = ("--id", "who", "--time", "day")
    size = ("--states", 2, "--emission", "poisson", "--guide", "mean_field", *SHORT)
    ended = run("fit", "hmm", patients, *size, *words, "--out", tmp_path / "h")
    assert ended.code in (0, 1), ended.err
    summaries = [pd.read_csv(folder / "summary.csv") for folder in (hmm, tmp_path / "h")]
    pd.testing.assert_frame_equal(*summaries)
    for command in ("predict", "impute"):
        for data, name in ((counts, "n.csv"), (patients, "t.csv")):
            out = ("--out", tmp_path / name)
            assert run(command, hmm, data, *words, *out).code == 0
        numbers, texts = (pd.read_csv(tmp_path / name, dtype=str) for name in ("n.csv", "t.csv"))
        given = pd.read_csv(patients, dtype=str)
        pd.testing.assert_frame_equal(texts[["who", "day"]], given[["who", "day"]])
        rest = [name for name in texts.columns if name not in ("who", "day")]
        pd.testing.assert_frame_equal(texts[rest], numbers[rest])


def test_whole_numbers_of_ids_stay_whole(hmm, tmp_path):
    frame = pd.DataFrame({"who": [1.0, 2.0, 1.0], "count": [3.0, 4.0, 5.0]})
    frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    words = ("--id", "who", "--out", tmp_path / "s.csv")
    assert run("predict", hmm, tmp_path / "rows.jsonl", *words).code == 0
    assert (tmp_path / "s.csv").read_text().splitlines()[1].startswith("1,")


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        ("who,day,count\na,week 2,3\na,week 10,4\n", ("'week 2'", "dates such as", "'day'")),
        ("who,day,count\na,1,3\n,2,4\n", ("'who'", "line 3")),
        ("who,day,count\na,1,3\na,,4\n", ("'day'", "line 3")),
        ("who,day,count\na,1,3\na,2,four\n", ("'count'", "'four'", "line 3")),
        ("who,day,count\na,1,3\na,1.0,4\n", ("'day'", "once", "'a'")),
        ("who,day\na,1\na,2\n", ("no column besides 'who', 'day'",)),
        ("who,day,count\n", ("expected", "is empty")),
        ("who,count\na,1\n", ("no column 'day'", "'who', 'count'")),
    ],
)
def test_keys_that_tell_no_steps_apart_are_named(text, needles, hmm, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    words = ("--id", "who", "--time", "day", "--out", tmp_path / "o.csv")
    refused(run("predict", hmm, file, *words), *needles)
    fit = ("fit", "hmm", file, "--states", 1, *words[:-1], tmp_path / "h")
    refused(run(*fit), *needles)
    assert not (tmp_path / "h").exists()


def test_new_sequences_have_a_line_for_each_step(hmm, tmp_path):
    words = ("-n", 3, "--steps", 5, "--out", tmp_path / "new.csv")
    assert run("sample", hmm, *words).code == 0
    found = pd.read_csv(tmp_path / "new.csv")
    assert list(found.columns) == ["sequence", "step", "state", "count"]
    assert found["step"].tolist() == [*range(5)] * 3
    means = ll.load(hmm)._aligned(1000).draws["rates"].mean(0)[:, 0]
    assert run("sample", hmm, "-n", 200, "--steps", 5, "--out", tmp_path / "many.csv").code == 0
    many = pd.read_csv(tmp_path / "many.csv").groupby("state")["count"].agg(["mean", "sem"])
    assert (abs(many["mean"] - means.numpy()) < 6 * many["sem"] + 0.3).all()


def test_columns_of_sequences_that_are_not_there_are_named(hmm, counts, tmp_path):
    out = tmp_path / "s.csv"
    refused(run("predict", hmm, counts, "--id", "whom", "--out", out), "whom")
    refused(run("predict", hmm, counts, "--out", out), "--columns count")
    assert not out.exists()


# ── flow and select ──────────────────────────────────────────────────────────────────────────


def test_a_density_shows_its_figure_with_an_error_and_no_empty_table(flow):
    line = next(line for line in flow[2].splitlines() if line.startswith("  held out"))
    assert "±" in line
    assert "nats per row" in line
    assert "site" not in flow[2]


def test_densities_of_rows_and_new_rows(flow, tmp_path):
    folder, rows, _ = flow
    assert run("predict", folder, rows, "--out", tmp_path / "d.csv").code == 0
    found = pd.read_csv(tmp_path / "d.csv")["log_prob"]
    expected = ll.load(folder).model.log_prob(ll.data.load(rows).x)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-8)
    assert run("sample", folder, "-n", 4, "--out", tmp_path / "new.csv").code == 0
    assert list(pd.read_csv(tmp_path / "new.csv").columns) == ["a", "c"]
    refused(run("impute", folder, rows, "--out", tmp_path / "x.csv"), "FlowDensity")
    refused(run("encode", folder, rows, "--out", tmp_path / "x.csv"), "no latents")


def test_select_recommends_what_the_library_does(table, tmp_path):
    words = ("--components", "1:2", "--num-folds", 2, "--num-restarts", 1, "--max-steps", 60)
    ended = run("select", table, *words, "--json", "--out", tmp_path / "s.csv")
    assert ended.code == 0
    found = json.loads(ended.out)
    settings = {"num_restarts": 1, "max_steps": 60, "progress": False}
    kwargs = {"num_components": [1, 2], "covariance": "diag", "num_folds": 2, "seed": 0}
    expected = ll.select(ll.GaussianMixture, ll.data.load(table), settings=settings, **kwargs)
    assert found["recommended"] == expected.best
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "s.csv"), expected.frame())
    assert [row["bic"] for row in found["candidates"]] == list(expected.frame()["bic"])


@pytest.mark.parametrize("numbers", ["0:3", "3:1", "a:b", "1:", ":3", "1:2:3", "-1:2", "2.5"])
def test_a_range_that_is_none_is_refused(numbers, table):
    refused(run("select", table, f"--components={numbers}"), "--components", numbers)


# ── bad rows ─────────────────────────────────────────────────────────────────────────────────

HMM = ("hmm", "--states", 2)
VAE = ("vae", "--latent", 1)


@pytest.mark.parametrize(
    ("words", "text", "needles"),
    [
        ((*HMM, "--emission", "poisson"), "n\n1\n-2\n3\n", ("counts", "-2")),
        ((*HMM, "--emission", "poisson"), "n\n1\n2.5\n3\n", ("counts", "2.5")),
        ((*HMM, "--emission", "bernoulli"), "n\n1\n2\n0\n", ("zeros and ones", "2")),
        (
            (*HMM, "--emission", "categorical", "--categories", 3),
            "n\n1\n3\n0\n",
            ("codes from 0 to 2", "3"),
        ),
        ((*HMM, "--emission", "no"), "n\n1\n3\n", ("no",)),
        ((*HMM, "--id", "who"), "n\n1\n2\n", ("who",)),
        ((*HMM, "--time", "t"), "n,t\n1,1\n2,1\n", ("time", "again")),
        (HMM, "n\n1\n", ("has 1 row", "at least 2 rows")),
        (("hmm", "--states", 4), "n\n1\n2\n", ("--states", "4 states")),
        ((*VAE, "--likelihood", "bernoulli"), "n\n0.5\n255\n", ("[0, 1]", "255")),
        ((*VAE, "--likelihood", "poisson"), "n\n1\n-3\n", ("-3",)),
        ((*VAE, "--likelihood", "none"), "n\n1\n3\n", ("none",)),
        ((*VAE, "--likelihood", "categorical"), "n\n1\n0\n", ("categorical:3", "--likelihood")),
        ((*VAE, "--likelihood", "categorical:2"), "n\n1\n2\n", ("codes 0 to 1", "2")),
        ((*VAE, "--likelihood", "poisson,poisson"), "n\n1\n2\n", ("columns", "2")),
        (VAE, "n\n1\n", ("has 1 row", "at least 2 rows")),
        (VAE, "n,m\n1,\n2,\n", ("m",)),
        (("flow",), "n\n1\n\n3\n2,2\n", ("line",)),
        (("flow",), "n,m\n1,\n2,3\n4,5\n", ("missing",)),
        (("flow",), "n\n1\n", ("has 1 row", "at least 2 rows")),
        (("flow", "--kind", "no"), "n\n1\n2\n3\n", ("kind",)),
    ],
    ids=str,
)
def test_rows_that_a_family_cannot_take_get_one_line(words, text, needles, tmp_path):
    data = tmp_path / "bad.csv"
    data.write_text(text, encoding="utf-8")
    ended = run("fit", words[0], data, *words[1:], "--out", tmp_path / "run")
    refused(ended, *needles)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.csv"]


def test_a_folder_without_images_is_no_data(tmp_path):
    refused(run("fit", *VAE[:1], tmp_path, *VAE[1:], "--out", tmp_path / "run"), "PNG", "nothing")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["encode", "reconstruct", "impute", "predict"])
def test_other_columns_are_refused_by_every_command(command, vae, tmp_path):
    data = tmp_path / "other.csv"
    data.write_text("a,b,d\n1,2,3\n", encoding="utf-8")
    refused(run(command, vae, data, "--out", tmp_path / "x.csv"), "c", "d")
    refused(run(command, vae, data, "--out", data))
    assert Path(data).read_text(encoding="utf-8").startswith("a,b,d")


@pytest.mark.parametrize("command", ["encode", "reconstruct", "impute", "select"])
def test_help_of_new_commands_fits_on_a_screen(command):
    ended = run(command, "--help")
    lines = ended.out.rstrip().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[-1].strip().startswith(f"Example: latentlab {command}")


def test_an_unknown_demo_is_refused(tmp_path):
    refused(run("demo", "lda", "--out", tmp_path / "d"), "lda", "gmm, hmm, vae, flow")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "file"), [("hmm", "counts.csv"), ("vae", "digits"), ("flow", "moons.csv")]
)
def test_each_demo_leaves_its_data_to_go_on_with(model, file, tmp_path):
    assert run("demo", model, "--out", tmp_path / "d").code in (0, 1)
    out = tmp_path / "x.csv"
    assert run("predict", tmp_path / "d", tmp_path / "d" / file, "--out", out).code == 0
    data = tmp_path / "d" / file
    count = len(list(data.iterdir())) if data.is_dir() else len(pd.read_csv(data))
    assert len(pd.read_csv(out)) == count
