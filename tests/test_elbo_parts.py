"""The parts of the ELBO of a hierarchy of normals are known, and add up."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from latentlab.diagnostics import Estimate, elbo_parts


def hierarchy(seed, num_samples=4000, N=5):
    """loc ~ N(0, 2); z_n ~ N(loc, 1); x_n ~ N(z_n, 0.5); y ~ N(loc, 1): mean-field guide."""
    generator = torch.Generator().manual_seed(seed)

    def draw(law, *shape):
        return law.loc + law.scale * torch.randn(shape, generator=generator).double()

    x, y = torch.linspace(-1, 2, N).double(), torch.tensor(0.7).double()
    q_loc, q_z = Normal(torch.tensor(0.4).double(), 0.5), Normal(0.8 * x, 0.45)
    loc, z = draw(q_loc, num_samples), draw(q_z, num_samples, N)
    log_p = {
        "loc": Normal(0.0, 2.0).log_prob(loc),
        "z": Normal(loc[:, None], 1.0).log_prob(z).sum(1),
        "x": Normal(z, 0.5).log_prob(x).sum(1),
        "y": Normal(loc, 1.0).log_prob(y),
    }
    log_q = {"loc": q_loc.log_prob(loc), "z": q_z.log_prob(z).sum(1)}
    variance = q_loc.scale**2
    exact = {
        "loc": float(kl_divergence(q_loc, Normal(torch.tensor(0.0).double(), 2.0))),
        "z": float((kl_divergence(q_z, Normal(q_loc.loc, 1.0)) + variance / 2).sum()),
        "x": float((Normal(q_z.loc, 0.5).log_prob(x) - 0.5 * (0.45 / 0.5) ** 2).sum()),
        "y": float(Normal(q_loc.loc, 1.0).log_prob(y) - variance / 2),
    }
    return log_p, log_q, exact


PLATES = {"z": "rows", "x": "rows"}


@given(st.integers(0, 10**6))
def test_parts_are_closed_forms_and_add_up(seed):
    log_p, log_q, exact = hierarchy(seed)
    found = elbo_parts(log_p, log_q, ["x", "y"], PLATES)
    assert list(found.log_likelihood) == ["x", "y"]
    assert list(found.kl) == ["loc", "z"]
    for site, part in {**found.log_likelihood, **found.kl}.items():
        assert abs(part.value - exact[site]) < 6 * part.se
    whole = Estimate.from_draws(sum(log_p.values()) - sum(log_q.values()))
    parts = sum(e.value for e in found.log_likelihood.values())
    assert found.elbo.value == parts - sum(e.value for e in found.kl.values())
    assert found.elbo.value == pytest.approx(whole.value, rel=1e-12)
    assert found.elbo.se == pytest.approx(whole.se, rel=1e-9)
    rows = Estimate.from_draws(log_p["x"] + log_p["z"] - log_q["z"])
    assert list(found.plates) == ["rows"]
    assert found.plates["rows"].value == pytest.approx(rows.value)
    assert found.plates["rows"].se == pytest.approx(rows.se)


def test_an_exact_guide_has_parts_that_vary_and_a_sum_that_does_not():
    z = torch.randn(500, generator=torch.Generator().manual_seed(0)).double()
    log_q = Normal(1.0, math.sqrt(0.5)).log_prob(z)
    log_p = {"z": Normal(0.0, 1.0).log_prob(z), "x": Normal(z, 1.0).log_prob(torch.tensor(2.0))}
    found = elbo_parts(log_p, {"z": log_q}, {"x"})
    evidence = float(Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(2.0)))
    assert found.elbo.value == pytest.approx(evidence, abs=1e-6)
    assert found.elbo.se < 1e-6 < found.kl["z"].se


def test_sites_of_the_guide_alone_and_latents_that_are_not_used():
    r = np.random.default_rng(0)
    noise = r.normal(size=(3, 400))
    log_p = {"x": noise[0], "idle": noise[1], "used": noise[1]}
    log_q = {"idle": noise[1], "used": noise[1] + 3, "base": noise[2]}
    found = elbo_parts(log_p, log_q, ["x"])
    assert found.kl["base"].value == pytest.approx(noise[2].mean())
    assert found.elbo.value == pytest.approx(noise[0].mean() - 3 - noise[2].mean())
    assert "idle" in found.unused
    assert "used" not in found.unused
    assert found.plates == {}


def test_a_density_of_zero_is_told():
    log_p, log_q, _ = hierarchy(0, 100)
    log_p["y"][3] = -math.inf
    found = elbo_parts(log_p, log_q, ["x", "y"])
    assert found.log_likelihood["y"].value == found.elbo.value == -math.inf


def test_text_is_a_table_and_the_plot_has_a_bar_for_each_site():
    log_p, log_q, _ = hierarchy(0)
    found = elbo_parts(log_p, log_q, ["x", "y"], PLATES)
    lines = [line.split() for line in str(found).splitlines()]
    assert [line[0] for line in lines] == ["ELBO", *["log-likelihood"] * 2, *["KL"] * 2, "in"]
    assert [line[1] for line in lines[1:5]] == ["x", "y", "loc", "z"]
    assert all("±" in line for line in lines)
    ax = found.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["x", "y", "loc", "z"]
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(found.elbo.value)
    assert found.plot(ax) is ax
    ax.figure.canvas.draw()


@pytest.mark.parametrize(
    ("log_p", "log_q", "observed", "message"),
    [
        ({}, {}, [], "log_p: expected .* at least one site"),
        ({"x": [0, 0]}, {}, ["y"], r"observed: expected sites of log_p, got \['y'\]"),
        ({"x": [0, 0]}, {"x": [0, 0]}, ["x"], r"log_q: \['x'\] are observed"),
        ({"x": [0, 0]}, {}, [], r"log_q: expected all latents of log_p, got none of \['x'\]"),
        ({"x": [0, 0]}, {"z": [0, 0, 0]}, ["x"], r"as many draws of all sites, got \[2, 3\]"),
        ({"x": [0]}, {}, ["x"], r"log_p\['x'\]: expected shape \(S,\) .* got \(1,\)"),
        ({"x": [0, 0]}, {"z": [[0], [0]]}, ["x"], r"log_q\['z'\]: .* got \(2, 1\)"),
        ({"x": [0, math.nan]}, {}, ["x"], r"log_p\['x'\] has 1 NaN"),
    ],
)
def test_faults_are_named(log_p, log_q, observed, message):
    with pytest.raises(ValueError, match=message):
        elbo_parts(log_p, log_q, observed)
