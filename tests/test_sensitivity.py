"""Power scaling of a normal mean is known in closed form; and ArviZ's sensitivity."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from latentlab.diagnostics import psis, sensitivity


@pytest.fixture(scope="module")
def arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    if not arviz.__version__.startswith("0."):
        pytest.skip("ArviZ 1.x takes other data")
    return arviz


class Normal:
    """One observation y, noise of scale 1 and a prior N(0, scale): posteriors for any powers."""

    def __init__(self, y, prior_scale):
        self.y, self.prior_scale = y, prior_scale

    def posterior(self, prior=1.0, likelihood=1.0):
        precision = prior / self.prior_scale**2 + likelihood
        return stats.norm(likelihood * self.y / precision, precision**-0.5)

    def log_prior(self, z):
        return stats.norm(0, self.prior_scale).logpdf(z)

    def log_lik(self, z):
        return stats.norm(z, 1).logpdf(self.y)

    def distance(self, part, power, low, high):
        """By quadrature between the smallest and the largest draw."""
        z = np.linspace(low, high, 20_001)
        P, Q = self.posterior().cdf(z), self.posterior(**{part: power}).cdf(z)
        found = []
        for p, q in ((P, Q), (1 - P, 1 - Q)):
            m = (p + q) / 2
            excess = p * np.log2(p / m) + q * np.log2(q / m)
            found.append(math.sqrt(excess.sum() / (p + q).sum()))
        return max(found)

    def slope(self, part, low, high):
        both = sum(self.distance(part, power, low, high) for power in (1 / 1.01, 1.01))
        return both / (2 * math.log2(1.01))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("guide", [None, (0.1, 1.15)])
@pytest.mark.parametrize(("y", "scale"), [(0.5, 3.0), (4.0, 1.0), (1.0, 0.2)])
def test_normal_mean(y, scale, guide, seed):
    model, r = Normal(y, scale), np.random.default_rng(seed)
    exact = model.posterior()
    law, log_weights = exact, None
    if guide is not None:
        law = stats.norm(exact.mean() + guide[0] * exact.std(), guide[1] * exact.std())
    z = law.rvs(20_000, random_state=r)
    if guide is not None:
        log_weights = model.log_prior(z) + model.log_lik(z) - law.logpdf(z)
    found = sensitivity(z[:, None], model.log_prior(z), model.log_lik(z), log_weights)
    ends = z.min(), z.max()
    for part in ("prior", "likelihood"):
        gap = float(getattr(found, part)) - model.slope(part, *ends)
        assert abs(gap) < 5 * float(getattr(found, f"{part}_se")) + 0.003
        exact = [model.distance(part, power, *ends) for power in (0.8, 1.25)]
        np.testing.assert_allclose(getattr(found, f"{part}_distance")[:, 0], exact, atol=0.005)


def test_equals_arviz(arviz):
    """psens does with a likelihood what it does with a prior, which is hard to hand in."""
    from arviz.stats.stats import _cjs_dist

    r = np.random.default_rng(0)
    draws = {"a": r.normal(size=(1, 500)), "b": r.normal(size=(1, 500)) ** 2}
    parts = {
        "prior": draws["a"] ** 2 - draws["b"],
        "likelihood": -2 * draws["a"] + r.normal(size=500),
    }
    columns = np.stack([draws[name][0] for name in "ab"], 1)
    found = sensitivity(columns, parts["prior"][0], parts["likelihood"][0])
    for part, log_density in parts.items():
        idata = arviz.from_dict(posterior=draws, log_likelihood={"y": log_density})
        theirs = arviz.psens(idata, component="likelihood")
        ours = getattr(found, part)
        np.testing.assert_allclose(ours, [float(theirs[name]) for name in "ab"], atol=1e-10)
        for power, distances in zip((0.8, 1.25), getattr(found, f"{part}_distance"), strict=True):
            w = psis((power - 1) * log_density[0]).log_weights.exp().numpy()
            for x, distance in zip(columns.T, distances, strict=True):
                assert float(distance) == pytest.approx(
                    max(_cjs_dist(x, w), _cjs_dist(-x, w)), abs=1e-10
                )


def test_stated_errors_are_the_spread_over_repetitions():
    model, found = Normal(2.0, 1.0), []
    for seed in range(100):
        z = model.posterior().rvs(1000, random_state=np.random.default_rng(seed))
        found.append(sensitivity(z[:, None], model.log_prior(z), model.log_lik(z)))
    for part in ("prior", "likelihood"):
        spread = np.std([float(getattr(f, part)) for f in found])
        stated = np.mean([float(getattr(f, f"{part}_se")) for f in found])
        assert stated == pytest.approx(spread, rel=0.35)


def figures(seed=0, num_samples=4000):
    """A conflict, a figure that the data do not touch, one that the prior does not, a constant."""
    r = np.random.default_rng(seed)
    laws = [Normal(6.0, 1.0), Normal(0.0, 0.02), Normal(1.0, 50.0)]
    z = np.stack(
        [law.posterior().rvs(num_samples, random_state=r) for law in laws]
        + [np.full(num_samples, 0.3)],
        1,
    )
    log_prior = sum(law.log_prior(x) for law, x in zip(laws, z.T, strict=False))
    log_lik = sum(law.log_lik(x) for law, x in zip(laws, z.T, strict=False))
    return z, log_prior, log_lik


def test_diagnoses():
    found = sensitivity(*figures(), names=["both", "prior only", "data only", "constant"])
    assert found.diagnoses == ("prior-data conflict", "weak likelihood", "", "")
    assert float(found.prior[3]) == float(found.likelihood[3]) == float(found.prior_se[3]) == 0
    text = str(found)
    assert text.startswith("prior-data conflict: both (sensitivity to the prior 0.3")
    assert "; weak likelihood: prior only (sensitivity" in text
    z, log_prior, log_lik = figures()
    calm = sensitivity(z[:, 2:], log_prior, log_lik)
    assert str(calm).startswith("the prior hardly matters (sensitivity at most 0.0")
    assert calm.names == ("0", "1")


def test_a_flat_prior_and_other_units_change_nothing():
    z, log_prior, log_lik = figures(num_samples=1000)
    found = sensitivity(z, np.full(len(z), 3.0), log_lik)
    assert found.prior.abs().max() == 0
    assert found.prior_distance.abs().max() == 0
    one, other = (
        sensitivity(a, log_prior + b, log_lik - b) for a, b in ((z, 0), (7 - 1e3 * z, 50))
    )
    torch.testing.assert_close(one.prior, other.prior, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(one.likelihood, other.likelihood, rtol=1e-6, atol=1e-9)


def test_weights_that_cannot_be_trusted_are_told_of():
    z, log_prior, log_lik = figures()
    assert "do not trust" not in str(sensitivity(z, log_prior, log_lik, np.zeros(len(z))))
    heavy = 2 * np.random.default_rng(0).exponential(size=len(z))
    assert "do not trust this: k-hat" in str(sensitivity(z, log_prior, log_lik, heavy))
    assert "do not trust this: k-hat" in str(sensitivity(z, 9 * heavy, log_lik))


def test_plot_names_what_is_found():
    found = sensitivity(*figures(), names=["both", "prior only", "data only", "constant"])
    ax = found.plot()
    assert [text.get_text() for text in ax.texts] == ["both", "prior only"]
    assert found.plot(ax) is ax
    ax.figure.canvas.draw()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(100), np.zeros(100), np.zeros(100)), r"draws: expected shape \(S, F\)"),
        ((np.zeros((99, 1)), np.zeros(99), np.zeros(99)), r"at least 100 draws, got \(99, 1\)"),
        ((np.zeros((100, 1)), np.zeros(99), np.zeros(100)), r"log_prior: .* got \(99,\)"),
        ((np.zeros((100, 1)), np.zeros(100), np.zeros((100, 1))), r"log_lik: .* got \(100, 1\)"),
        ((np.zeros((100, 1)), np.zeros(100), np.full(100, -np.inf)), "log_lik: .* got 100"),
        ((np.full((100, 1), np.nan), np.zeros(100), np.zeros(100)), "draws: expected finite"),
        ((np.zeros((100, 1)), np.zeros(100), np.zeros(100), np.zeros(9)), "log_weights: expected"),
        (
            (np.zeros((100, 1)), np.zeros(100), np.zeros(100), None, ["a", "b"]),
            "names: expected 1 of",
        ),
    ],
)
def test_faults_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sensitivity(*arguments)
