"""Every posterior can be drawn and reported, and what cannot be drawn says why."""

import re
import sys

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import latentlab as ll
from latentlab.inference import evidence
from tests.test_report import Reader

QUICK = {"num_restarts": 1, "max_steps": 420, "progress": False}
NAMES = ("length (cm)", "mass")


def scalars(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.HalfNormal(5.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc, scale), obs=x)


def vectors(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(loc + z.unsqueeze(-1), 1.0).to_event(1), obs=x)


def two_sites(x, counts=None, y=None):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("counts", dist.Poisson(rate), obs=counts)
        pyro.sample("y", dist.Normal(rate * x, 1.0), obs=y)


def one_number(x=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def fitted(kind):
    r = np.random.default_rng(0)
    table = ll.data.Table(torch.from_numpy(r.normal(3, 2, (60, 2))), NAMES)
    pairs = {
        "mixture": (ll.GaussianMixture(2, 2), table, "auto"),
        "scalars": (scalars, r.normal(3, 2, 40), "auto"),
        "vectors": (vectors, table, "mean_field"),
        "point": (ll.GaussianMixture(2, 1), table, "point"),
        "two sites": (two_sites, (r.normal(size=30), r.poisson(2, 30), r.normal(size=30)), "auto"),
        "one number": (one_number, torch.tensor(0.3), "auto"),
    }
    model, data, guide = pairs[kind]
    return ll.fit(model, data, guide, **QUICK)


@pytest.fixture(scope="module")
def posteriors(tmp_path_factory):
    kinds = ("mixture", "scalars", "vectors", "point", "two sites", "one number")
    found = {kind: fitted(kind) for kind in kinds}
    folder = tmp_path_factory.mktemp("run")
    found["mixture"].save(folder)
    return found | {"loaded": ll.load(folder)}


@pytest.fixture(scope="module")
def pages(posteriors, tmp_path_factory):
    """The report of each of them; no warning may come from drawing it."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    before = dict(matplotlib.rcParams)
    for kind, posterior in posteriors.items():
        file = posterior.report(folder / kind)
        assert file == folder / kind / "report.html"
        found[kind] = file.read_text(encoding="utf-8")
    assert dict(matplotlib.rcParams) == before
    return found


# ---- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fit", "losses", "intervals", "khat", "predictive"])
def test_every_kind_of_picture_of_a_mixture_can_be_drawn(posteriors, kind):
    picture = posteriors["mixture"].plot(kind)
    assert isinstance(picture, Axes | Figure)
    figure = picture.get_figure() if isinstance(picture, Axes) else picture
    figure.canvas.draw()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
    assert figure._repr_svg_().startswith("<svg")  # a notebook shows it


def test_the_fit_is_what_is_drawn_by_default(posteriors):
    ax = posteriors["mixture"].plot()
    assert (ax.get_xlabel(), ax.get_ylabel()) == NAMES


def test_intervals_are_those_of_the_summary_one_axis_for_each_column(posteriors):
    posterior = posteriors["mixture"]
    summary = posterior.summary().set_index(["site", "index"])
    axes = posterior.plot("intervals").axes
    titles = [ax.get_title("left") for ax in axes]
    sites = ["locs", "scales"]
    assert titles == ["weights", *(f"{site}, {name}" for site in sites for name in NAMES)]
    for ax, title in zip(axes[1:], titles[1:], strict=True):
        site, name = title.split(", ")
        expected = summary.loc[[(site, f"{k}, {name}") for k in (0, 1)]]
        assert np.allclose(ax.lines[0].get_xdata(), expected["mean"])
        segments = np.array(ax.collections[0].get_segments())[:, :, 0]
        assert np.allclose(segments, expected[["q05", "q95"]])
        assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1"]


def test_numbers_without_axes_and_long_sites_have_their_intervals(posteriors):
    axes = posteriors["scalars"].plot("intervals").axes
    assert [ax.get_title("left") for ax in axes] == ["loc", "scale"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["value"]
    axes = posteriors["vectors"].plot("intervals").axes
    assert [ax.get_title("left") for ax in axes] == ["loc", "z (the first 20 of 60)"]


def test_replicates_are_compared_column_by_column(posteriors):
    def labels(kind):
        return [ax.get_xlabel() for ax in posteriors[kind].plot("predictive").axes]

    assert labels("mixture") == labels("vectors") == list(NAMES)
    assert labels("scalars") == ["x"]
    assert labels("two sites") == ["counts", "y"]


def test_the_climb_shows_each_stage_and_the_stop(posteriors):
    posterior = posteriors["mixture"]
    ax = posterior.plot("losses")
    starts = [line.get_xdata()[0] for line in ax.lines if line.get_label() == "_stage"]
    assert starts == list(posterior.stage_starts)
    ends = next(line for line in ax.lines if "ELBO" in line.get_label())
    assert np.allclose(ends.get_ydata(), [-elbo.value for elbo in posterior.stage_elbos])
    assert ax.get_title("left").replace("\n", " ") == f"stopped: {posterior.stop_reason}"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("mixture", "fits", 'kind: expected one of "fit", "losses".*, got \'fits\''),
        ("mixture", None, "kind: expected one of .*, got None"),
        ("scalars", "fit", 'kind: this model draws no "fit"; try "predictive"'),
        ("point", "khat", "kind: a point estimate has no k-hat"),
        ("one number", "predictive", 'kind: this model observes no rows; try "intervals"'),
        ("loaded", "fit", r"plot: .* loaded without its data; .*load\(path, data=...\)"),
        ("loaded", "khat", "plot: .* loaded without its data"),
        ("loaded", "predictive", "plot: .* loaded without its data"),
    ],
)
def test_what_cannot_be_drawn_says_why(posteriors, name, kind, message):
    with pytest.raises(ValueError, match=message):
        posteriors[name].plot(kind)


def test_a_posterior_without_data_still_draws_its_draws_and_its_climb(posteriors):
    for kind in ("intervals", "losses"):
        posteriors["loaded"].plot(kind)


# ---- the report ------------------------------------------------------------------------------

SECTIONS = {
    "mixture": ["Data and fit", "Latents", "The climb", "How far to trust it", "Posterior predi"],
    "scalars": ["Latents", "The climb", "How far to trust it", "Posterior predictive check"],
    "vectors": ["Latents", "The climb", "How far to trust it", "Posterior predictive check"],
    "point": ["Data and fit", "Latents", "The climb", "How far to trust it", "Posterior predict"],
    "two sites": ["Latents", "The climb", "How far to trust it", "Posterior predictive check"],
    "one number": ["Latents", "The climb", "How far to trust it"],
    "loaded": ["Latents", "The climb", "How far to trust it"],
}


@pytest.mark.parametrize("kind", SECTIONS)
def test_the_report_has_the_verdict_first_and_then_what_it_rests_on(posteriors, pages, kind):
    text, verdict_ = pages[kind], posteriors[kind].check()
    said = Reader(text).text
    assert said[1] == verdict_.level
    for reason in (*verdict_.reasons, *verdict_.next_steps):
        assert reason in said
    headings = re.findall(r'<h2 id="section-\d+">([^<]*)</h2>', text)
    for heading, expected in zip(headings, SECTIONS[kind], strict=True):
        assert heading.startswith(expected)
    assert said.index(headings[0]) < said.index("How it went")


def test_the_report_needs_nothing_else(pages):
    for text in pages.values():
        without_namespaces = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//\w|@import|<link|<script|src=", without_namespaces)


def test_the_same_posterior_gives_the_same_report(posteriors, pages, tmp_path):
    file = posteriors["one number"].report(tmp_path / "own.html")
    assert file == tmp_path / "own.html"
    assert file.read_text(encoding="utf-8") == pages["one number"]


def test_the_report_names_model_guide_columns_and_settings(pages):
    said = Reader(pages["mixture"]).text
    for name, fact in [
        ("model", "GaussianMixture"),
        ("guide", "FullRank"),
        ("data", "60x2"),
        ("columns", "length (cm), mass"),
        ("seed", "0"),
    ]:
        assert said[said.index(name, said.index("How it went")) + 1] == fact
    assert "60x2 (not at hand)" in Reader(pages["loaded"]).text
    point = "Point estimate of every number, in the units of the data."
    assert point in Reader(pages["point"]).text


def test_long_tables_are_cut_and_say_so(posteriors, tmp_path, monkeypatch):
    from latentlab.inference import pictures

    monkeypatch.setattr(pictures, "_TABLE_ROWS", 7)
    text = posteriors["vectors"].report(tmp_path).read_text(encoding="utf-8")
    latents = text.split("Latents</h2>")[1].split("</section>")[0]
    assert latents.count("<tr>") == 8
    assert "the first 7 of 62 rows are shown" in latents


def test_numbers_are_written_to_three_digits_of_their_sd(posteriors, pages):
    table = pages["scalars"].split("Latents</h2>")[1].split("</table")[0]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", table)
    row = posteriors["scalars"].summary().iloc[0]
    assert cells[:2] == ["loc", ""]
    places = len(cells[2].partition(".")[2])
    assert 0.095 <= float(row["sd"]) * 10 ** (places - 3) < 1.0
    assert float(cells[2]) == pytest.approx(float(row["mean"]), abs=0.51 * 10**-places)
    assert float(cells[3]) == pytest.approx(float(row["sd"]), rel=0.01)


class Owner(nn.Module):
    def model(self, x=None, size=None):
        return scalars(x, size)


@pytest.mark.parametrize(
    ("model", "name"), [(Owner().model, "Owner.model"), (lambda x=None, size=None: scalars(x), "")]
)
def test_a_model_is_called_by_its_name(model, name, tmp_path):
    x = np.random.default_rng(1).normal(size=20)
    file = ll.fit(model, x, **QUICK).report(tmp_path)
    title = re.search("<title>[^:]*: (.*): a fit and its verdict</title>", file.read_text())[1]
    assert title == (name or "&lt;lambda&gt;")


def test_report_and_file_ask_for_one_verdict(tmp_path, monkeypatch):
    posterior, calls, gather = fitted("one number"), [], evidence.gather
    monkeypatch.setattr(evidence, "gather", lambda *args: calls.append(args) or gather(*args))
    posterior.check()
    posterior.report(tmp_path)
    posterior.save(tmp_path)
    assert len(calls) == 1


def test_a_place_that_cannot_be_written_to_is_named(posteriors, tmp_path):
    (tmp_path / "taken").write_text("a file")
    for place in (tmp_path / "taken", tmp_path / "taken" / "report.html", "/proc/nowhere"):
        with pytest.raises(OSError, match=r"(taken|nowhere): cannot be written"):
            posteriors["scalars"].report(place)
