"""What the documentation shows runs, and every public name stands in it once."""

import functools
import importlib
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll
from latentlab.inference import engine

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# The examples of extend.md have tests of their own.
PAGES = [ROOT / "README.md", *(p for p in sorted(DOCS.glob("*.md")) if p.name != "extend.md")]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def mean_model(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def mean_guide(x=None, size=None):
    loc = pyro.param("center", torch.tensor(0.0, dtype=torch.float64))
    pyro.sample("loc", dist.Normal(loc, 0.2))


def given(page):
    """What a page takes as known, by name."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, generator=generator, dtype=torch.float64)
    counts = torch.poisson(torch.full((60,), 3.0), generator=generator).double()
    patients = pd.DataFrame(
        {
            "patient": ["a"] * 20 + ["b"] * 40,
            "day": [*range(20), *range(40)],
            "mood": x.numpy(),
        }
    )
    names = {
        "two_ideas.md": {"x": x, "held_out": x[:5], "my_guide": mean_guide},
        "guides.md": {"x": x, "model": mean_model},
        "several_machines.md": {"x": x},
        "choose_a_model.md": {
            "first": counts[:20],
            "second": counts[20:],
            "images": torch.rand(64, 1, 8, 8, generator=generator),
            "covariate": x,
            "y": 2 * x + counts,
        },
        "real_data.md": {"frame": patients, "counts": 1 + torch.ones(150)},
    }
    return names.get(page.name, {})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the file that the pages read; what they write stays in it."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(150, 2)) + rng.integers(3, size=150)[:, None] * [9.0, 20.0]
    table[::9, 1] = np.nan
    frame = pd.DataFrame(table, columns=["length", "mass"])
    frame.to_csv(tmp_path / "measurements.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, folder, monkeypatch, capsys):
    """Fits are cut short: that they end well is for other tests."""
    fit = engine.fit

    @functools.wraps(fit)
    def short(*args, **kwargs):
        return fit(*args, **kwargs | {"max_steps": 30, "num_restarts": 1})

    for module in ("inference.engine", "inference.select", "sklearn.mixture"):
        monkeypatch.setattr(f"latentlab.{module}.fit", short)
    warnings.filterwarnings("ignore", "the fit did not converge")
    names = given(page)
    for number, block in enumerate(PYTHON.findall(page.read_text())):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    capsys.readouterr()


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|mailto:)([^)]+)\)", page.read_text()):
            file, _, place = target.partition("#")
            found = page.parent / file if file else page
            assert found.exists(), f"{page.name}: {target}"
            titles = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert not place or place in anchors, f"{page.name}: {target}"


def test_pages_are_in_the_index():
    index = (DOCS / "index.md").read_text()
    listed = re.findall(r"^(\w+)$", index, re.MULTILINE)
    assert sorted(listed) == sorted(p.stem for p in DOCS.glob("*.md") if p.stem != "index")


# ---- the page of the API ----------------------------------------------------------------------

PUBLIC = (
    *("latentlab", "latentlab.data", "latentlab.data.simulate", "latentlab.data.checks"),
    *("latentlab.diagnostics", "latentlab.distributions", "latentlab.distributions.emissions"),
    *("latentlab.distributions.factors", "latentlab.distributions.hmm", "latentlab.flows"),
    *("latentlab.guides", "latentlab.models"),
    *("latentlab.nn", "latentlab.objectives", "latentlab.protocols", "latentlab.sklearn"),
    "latentlab.testing",
)
DIRECTIVE = re.compile(
    r"^\.\. auto(module|function|class|exception):: ([\w.]+)\n((?:   :.*\n)*)", re.MULTILINE
)


def named(path):
    """The object that a dotted name leads to."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def shown():
    """Everything that the page documents, as often as it does."""
    found = []
    for kind, path, options in DIRECTIVE.findall((DOCS / "api.md").read_text()):
        if kind != "module":
            found.append((path, named(path)))
        elif ":members:" in options:
            module = importlib.import_module(path)
            found += [(f"{path}.{name}", getattr(module, name)) for name in module.__all__]
    return found


def is_module(thing):
    return type(thing) is type(ll)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_on_the_page(name):
    module = importlib.import_module(name)
    things = [thing for _, thing in shown()]
    public = {n: getattr(module, n) for n in module.__all__}
    absent = [
        n
        for n, thing in public.items()
        if not is_module(thing) and id(thing) not in map(id, things)
    ]
    assert absent == []


def test_no_name_is_on_the_page_twice():
    things = [(path, id(thing)) for path, thing in shown() if not is_module(thing)]
    ids = [i for _, i in things]
    assert [path for path, i in things if ids.count(i) > 1] == []


def test_public_modules_of_the_package_are_on_the_page():
    paths = {path for _, path, _ in DIRECTIVE.findall((DOCS / "api.md").read_text())}
    modules = {f"latentlab.{name}" for name in ll.__all__ if is_module(getattr(ll, name))}
    assert modules <= {*PUBLIC}
    assert {name for name in PUBLIC if name not in ("latentlab", "latentlab.models")} <= paths
