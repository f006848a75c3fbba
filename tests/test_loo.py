"""Leave-one-out scores are those of refits, in closed form, and ArviZ's."""

import functools
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import MultivariateNormal, Normal

from latentlab.diagnostics import KhatTable, compare, loo, loo_pit
from latentlab.diagnostics.compare import stacking_weights
from tests.oracles import linear_regression

SEEDS = st.integers(0, 2**32 - 1)
PRIOR_SCALE, SCALE = 2.0, 1.5


@pytest.fixture(scope="module")
def arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    if not arviz.__version__.startswith("0."):
        pytest.skip("ArviZ 1.x takes other data")
    return arviz


def arviz_loo(arviz, log_lik):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return arviz.loo(
            arviz.from_dict(
                posterior={"z": np.zeros((1, len(log_lik)))},
                log_likelihood={"y": np.asarray(log_lik)[None]},
            ),
            pointwise=True,
            reff=1.0,
        )


@functools.cache
def regression(seed, N=40, D=3, used=None):
    return Regression(seed, N, D, used)


class Regression:
    """A linear regression with known noise: data, posterior, and rows left out, by refits."""

    def __init__(self, seed, N, D, used):
        r = np.random.default_rng(seed)
        features = r.normal(size=(N, D))
        y = features @ r.normal(size=D) + SCALE * r.normal(size=N)
        features = features[:, :used]
        self.features, self.y = torch.from_numpy(features), torch.from_numpy(y)
        loc, cov, _ = linear_regression(features, y, PRIOR_SCALE, SCALE)
        self.posterior = MultivariateNormal(torch.from_numpy(loc), torch.from_numpy(cov))
        self.exact, self.pit = np.zeros(N), np.zeros(N)
        for n in range(N):
            keep = np.arange(N) != n
            loc, cov, _ = linear_regression(features[keep], y[keep], PRIOR_SCALE, SCALE)
            scale = math.sqrt(SCALE**2 + features[n] @ cov @ features[n])
            prediction = stats.norm(features[n] @ loc, scale)
            self.exact[n], self.pit[n] = prediction.logpdf(y[n]), prediction.cdf(y[n])
        full = stats.norm(
            features @ self.posterior.loc.numpy(),
            np.sqrt(SCALE**2 + np.einsum("nd,de,ne->n", features, self._cov, features)),
        )
        self.gain = full.logpdf(y).sum() - self.exact.sum()

    @property
    def _cov(self):
        return self.posterior.covariance_matrix.numpy()

    def log_lik(self, z):
        return Normal(z @ self.features.T, SCALE).log_prob(self.y)

    def log_joint(self, z):
        return self.log_lik(z).sum(1) + Normal(0.0, PRIOR_SCALE).log_prob(z).sum(1)


def draw(law, num_samples, seed):
    """Draws of a normal law, by noise of their own generator."""
    noise = torch.randn(
        num_samples, len(law.loc), generator=torch.Generator().manual_seed(seed)
    ).double()
    return law.loc + noise @ law.scale_tril.T


# ---- scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_posterior_draws_score_as_refits_do(seed):
    model = regression(seed)
    found = loo(model.log_lik(draw(model.posterior, 4000, seed)))
    assert abs(found.elpd.value - model.exact.sum()) < 5 * found.mcse + 0.02
    assert abs(found.p_loo.value - model.gain) < 5 * found.mcse + 0.02
    np.testing.assert_allclose(found.pointwise, model.exact, atol=0.15)
    se = math.sqrt(len(model.y)) * model.exact.std()
    assert found.elpd.se == pytest.approx(se, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [0.85, 1.2])
def test_draws_of_a_guide_score_the_posterior_by_their_weights(seed, width):
    """The guide is too narrow or too wide, and off."""
    model = regression(seed)
    law = model.posterior
    guide = MultivariateNormal(law.loc + 0.05, width**2 * law.covariance_matrix)
    z = draw(guide, 8000, seed)
    log_lik, log_weights = model.log_lik(z), model.log_joint(z) - guide.log_prob(z)
    found = loo(log_lik, log_weights + 1000)
    assert abs(found.elpd.value - model.exact.sum()) < 5 * found.mcse + 0.05
    assert abs(found.p_loo.value - model.gain) < 5 * found.mcse + 0.05
    plain = loo(log_lik)
    assert abs(plain.p_loo.value - model.gain) > 3 * abs(found.p_loo.value - model.gain)


def test_the_monte_carlo_error_is_the_spread_over_repetitions():
    """Rows share their draws: their errors do not simply add up."""
    model = regression(0, N=30, D=2)
    guide = MultivariateNormal(model.posterior.loc, 1.3 * model.posterior.covariance_matrix)
    for law in (model.posterior, guide):
        found = []
        for seed in range(100):
            z = draw(law, 1000, seed)
            log_weights = model.log_joint(z) - law.log_prob(z) if law is guide else None
            found.append(loo(model.log_lik(z), log_weights))
        spread = np.std([f.elpd.value for f in found])
        assert np.mean([f.mcse for f in found]) == pytest.approx(spread, rel=0.35)


@pytest.mark.parametrize("num_samples", [25, 101, 1000, 4000])
def test_equals_arviz(arviz, num_samples):
    for seed in range(3):
        log_lik = np.random.default_rng(seed).standard_t(3, size=(num_samples, 30))
        log_lik[:, :10] *= 0.1
        theirs, ours = arviz_loo(arviz, log_lik), loo(log_lik)
        assert ours.elpd.value == pytest.approx(theirs.elpd_loo, abs=1e-10)
        assert ours.elpd.se == pytest.approx(theirs.se, abs=1e-10)
        assert ours.p_loo.value == pytest.approx(theirs.p_loo, abs=1e-10)
        np.testing.assert_allclose(ours.pointwise, theirs.loo_i, rtol=0, atol=1e-10)
        np.testing.assert_allclose(ours.khat.khat, theirs.pareto_k, rtol=0, atol=1e-10)


def test_weights_that_are_equal_change_nothing():
    log_lik = regression(1).log_lik(draw(regression(1).posterior, 500, 0))
    plain, weighted = loo(log_lik), loo(log_lik, np.full(500, -7.0))
    torch.testing.assert_close(weighted.pointwise, plain.pointwise)
    assert weighted.p_loo.value == pytest.approx(plain.p_loo.value)
    assert weighted.mcse == pytest.approx(plain.mcse)


def test_blocks_of_rows_are_the_whole(monkeypatch):
    log_lik = torch.from_numpy(np.random.default_rng(0).normal(size=(100, 57)))
    log_weights = torch.from_numpy(np.random.default_rng(1).normal(size=100))
    whole = loo(log_lik, log_weights)
    parts = loo(iter(log_lik.split(13, 1)), log_weights)
    monkeypatch.setattr(sys.modules["latentlab.diagnostics.loo"], "_BATCH", 700)
    for other in (parts, loo(log_lik.numpy(), log_weights)):
        torch.testing.assert_close(other.pointwise, whole.pointwise)
        torch.testing.assert_close(other.khat.khat, whole.khat.khat)
        assert other.elpd == whole.elpd
        assert other.mcse == pytest.approx(whole.mcse)
    assert whole.num_samples == 100


def test_a_row_that_all_draws_score_alike_needs_no_weights():
    log_lik = np.random.default_rng(0).normal(size=(100, 3))
    log_lik[:, 1] = -2.5
    found = loo(log_lik)
    assert found.khat.khat[1] == -math.inf
    assert float(found.pointwise[1]) == pytest.approx(-2.5)
    assert math.isnan(loo(log_lik[:, :1]).elpd.se)


def test_text_names_the_rows_that_carry_the_posterior():
    """One row far out, in a model that does not expect it."""
    y = torch.cat([torch.linspace(-1, 1, 20), torch.tensor([30.0])]).double()
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)).double()
    z = y.mean() + 21**-0.5 * noise
    found = loo(Normal(z, 1.0).log_prob(y))
    assert found.khat.bad.tolist() == [20]
    assert "row 20 of 21 is > 0.7" in str(found)
    assert "Monte Carlo error" in str(found)
    ax = found.plot()
    assert [text.get_text() for text in ax.texts] == ["20"]
    assert found.plot(ax) is ax
    ax.figure.canvas.draw()


@pytest.mark.parametrize(
    ("log_lik", "log_weights", "message"),
    [
        (np.zeros(30), None, r"log_lik: expected shape \(S, N\), got \(30,\)"),
        (np.zeros((30, 0)), None, r"log_lik: expected shape \(S, N\), got \(30, 0\)"),
        (np.zeros((24, 2)), None, "at least 25 draws, got 24"),
        (np.zeros((30, 2)), np.zeros(29), "expected as many draws in all, got 30, log_weights"),
        (np.zeros((30, 2)), np.full(30, np.nan), "log_weights has 30 NaN"),
        (np.full((30, 2), -np.inf), None, r"log_lik: expected finite numbers, got -inf at \[0, 0"),
        (iter(()), None, "at least one block"),
        (iter((np.zeros((30, 2)), np.zeros((31, 2)))), None, "got 31, others 30"),
        (iter((np.zeros((30, 2)), np.full((30, 2), np.nan))), None, r"got nan at \[0, 2\]"),
    ],
)
def test_faults_are_named(log_lik, log_weights, message):
    with pytest.raises(ValueError, match=message):
        loo(log_lik, log_weights)


@pytest.mark.slow
def test_many_rows_in_little_memory():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    r = np.random.default_rng(0)
    found = loo(torch.from_numpy(0.5 * r.normal(size=(1000, 1000))) for _ in range(100))
    assert len(found.pointwise) == 100_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


# ---- PIT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_pit_is_that_of_refits(seed):
    model = regression(seed)
    z = draw(model.posterior, 10_000, seed)
    noise = torch.randn(10_000, 40, generator=torch.Generator().manual_seed(seed)).double()
    found = loo_pit(model.y, z @ model.features.T + SCALE * noise, model.log_lik(z))
    np.testing.assert_allclose(found.pit, model.pit, atol=0.04)


def test_pit_equals_arviz(arviz):
    r = np.random.default_rng(0)
    y, replicated, log_lik = r.normal(size=20), r.normal(size=(400, 20)), r.normal(size=(400, 20))
    log_weights = arviz.psislw(-log_lik.T.copy())[0]
    expected = arviz.loo_pit(y=y, y_hat=replicated.T, log_weights=log_weights)
    np.testing.assert_allclose(loo_pit(y, replicated, log_lik).pit, expected, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [0.3, 2.0, 20.0])
def test_pits_of_counts_are_uniform_under_the_model(seed, rate):
    generator = torch.Generator().manual_seed(seed)
    log_lik = torch.zeros(1000, 400)  # the rate is known
    y = torch.poisson(torch.full((400,), rate), generator=generator)
    replicated = torch.poisson(torch.full((1000, 400), rate), generator=generator)
    found = loo_pit(y, replicated, log_lik, seed=seed)
    assert found.distance < 2 * found.band
    assert stats.kstest(found.pit, "uniform").statistic == pytest.approx(found.distance)
    assert found.khat.khat.max() == -math.inf


@pytest.mark.parametrize(
    ("loc", "scale", "fault"),
    [
        (0.5, 1.0, "predictions are too low"),
        (-0.5, 1.0, "predictions are too high"),
        (0.0, 2.0, "predictions are too narrow"),
        (0.0, 0.5, "predictions are too wide"),
    ],
)
def test_faults_of_predictions_are_told_apart(loc, scale, fault):
    generator = torch.Generator().manual_seed(0)
    y = loc + scale * torch.randn(300, generator=generator)
    replicated = torch.randn(2000, 300, generator=generator)
    found = loo_pit(y, replicated, torch.zeros(2000, 300))
    assert found.faults == (fault,)
    assert str(found).startswith(fault)
    ax = found.plot()
    assert ax.get_title() == fault
    assert found.plot(ax) is ax
    ax.figure.canvas.draw()


def test_another_shape_is_seen():
    """Two values, where the model has a normal as far from its middle on average."""
    generator = torch.Generator().manual_seed(0)
    y = 1.6 * torch.randint(2, (300,), generator=generator) - 0.8
    found = loo_pit(y, torch.randn(2000, 300, generator=generator), torch.zeros(2000, 300))
    assert "another shape" in str(found)


def test_pit_in_blocks_is_the_whole():
    r = np.random.default_rng(0)
    y, replicated = r.poisson(2.0, size=30), torch.from_numpy(r.poisson(2.0, size=(200, 30)))
    log_lik = torch.from_numpy(r.normal(size=(200, 30)))
    whole = loo_pit(y, replicated, log_lik)
    parts = loo_pit(y, iter(replicated.split(7, 1)), iter(log_lik.split(7, 1)))
    torch.testing.assert_close(parts.pit, whole.pit)


def test_pit_says_what_does_not_fit():
    zeros = np.zeros((30, 4))
    with pytest.raises(ValueError, match=r"observed: .* got \(4, 1\)"):
        loo_pit(np.zeros((4, 1)), zeros, zeros)
    with pytest.raises(ValueError, match="1 NaN; leave missing rows out"):
        loo_pit([0.0, math.nan, 0.0, 0.0], zeros, zeros)
    with pytest.raises(ValueError, match=r"replicated: .* got \(30, 3\)"):
        loo_pit(np.zeros(4), zeros[:, :3], zeros)
    with pytest.raises(ValueError, match="replicated has 120 NaN"):
        loo_pit(np.zeros(4), zeros + np.nan, zeros)
    with pytest.raises(ValueError, match="observed: expected 4 rows as of log_lik, got 5"):
        loo_pit(np.zeros(5), zeros, zeros)
    with pytest.raises(ValueError, match="observed: expected 4 rows or more"):
        loo_pit(np.zeros(3), zeros, zeros)
    with pytest.raises(ValueError, match=r"log_lik, \(30, 2\), got \(30, 4\) after 0"):
        loo_pit(np.zeros(4), zeros, iter(torch.zeros(30, 4).split(2, 1)))
    with pytest.raises(ValueError, match=r"log_lik, \(30, 2\), got None after 2 rows"):
        loo_pit(np.zeros(4), zeros[:, :2], iter(torch.zeros(30, 4).split(2, 1)))
    with pytest.raises(ValueError, match=r"log_lik, None, got \(30, 2\) after 2 rows"):
        loo_pit(np.zeros(4), iter(torch.zeros(30, 4).split(2, 1)), zeros[:, :2])


# ---- comparison --------------------------------------------------------------------------------


def regressions(seed, *numbers):
    """Models that use the first D features of three."""
    found = {}
    for used in numbers:
        model = regression(seed, used=used)
        found[f"D={used}"] = loo(model.log_lik(draw(model.posterior, 4000, seed)))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_differences_are_those_of_refits(seed):
    found = compare(regressions(seed, 1, 2, 3))
    exact = {f"D={used}": regression(seed, used=used).exact for used in (1, 2, 3)}
    assert [found.scores[i].elpd.value for i in range(3)] == sorted(
        (s.elpd.value for s in found.scores), reverse=True
    )
    for name, score, gap in zip(found.names, found.scores, found.differences, strict=True):
        expected = exact[name] - exact[found.best]
        assert gap.value == pytest.approx(expected.sum(), abs=0.3)
        assert gap.se == pytest.approx(math.sqrt(40) * expected.std(), rel=0.1, abs=0.05)
        assert (name in found.as_good) == (name != found.best and -gap.value <= gap.se)
        assert score.elpd.value == pytest.approx(exact[name].sum(), abs=0.3)


def test_comparison_equals_arviz(arviz):
    for seed in range(3):
        r = np.random.default_rng(seed)
        base = r.normal(size=(400, 30))
        log_liks = {name: base + shift * r.normal(size=30) for name, shift in (("a", 1), ("b", 3))}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = arviz.compare({name: arviz_loo(arviz, x) for name, x in log_liks.items()})
        found = compare({name: loo(x) for name, x in log_liks.items()})
        assert list(found.names) == list(theirs.index)
        frame = found.frame()
        for ours, name in (
            *(("elpd", "elpd_loo"), ("elpd_se", "se"), ("difference_se", "dse")),
            ("p_loo", "p_loo"),
        ):
            np.testing.assert_allclose(frame[ours], theirs[name], atol=1e-10)
        np.testing.assert_allclose(-frame["difference"], theirs["elpd_diff"], atol=1e-10)
        np.testing.assert_allclose(frame["weight"], theirs["weight"].astype(float), atol=1e-3)


@given(SEEDS, st.integers(2, 5))
def test_stacking_weights_are_best(seed, num_models):
    """Karush-Kuhn-Tucker: no model's score rises faster with its weight than that of the used."""
    r = np.random.default_rng(seed)
    scores = torch.from_numpy(r.normal(size=(50, num_models)) * r.uniform(0.1, 3) - 1000)
    weights = stacking_weights(scores)
    assert float(weights.sum()) == pytest.approx(1)
    mixed = (scores + weights.log()).logsumexp(1, keepdim=True)
    slopes = (scores - mixed).exp().mean(0)
    assert (slopes < 1 + 1e-4).all()
    assert ((slopes - 1).abs() < 1e-4)[weights > 1e-3].all()


def test_a_mixture_of_experts_shares_its_weights():
    """Each model predicts half of the rows well."""
    scores = torch.zeros(100, 2).double()
    scores[:50, 0] = scores[50:, 1] = -5.0
    torch.testing.assert_close(stacking_weights(scores), torch.full((2,), 0.5).double())
    torch.testing.assert_close(
        stacking_weights(scores - torch.tensor([0.0, 50.0])), torch.tensor([1.0, 0.0]).double()
    )


def test_text_says_who_is_as_good_and_whom_not_to_trust():
    log_lik = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 30)))
    good = loo(0.1 * log_lik)
    same = loo(0.1 * log_lik + 0.001 * log_lik.flip(1))
    worse = loo(0.1 * log_lik - 1.0 + 0.1 * log_lik.flip(0))
    bad = KhatTable(torch.full((30,), 0.9), torch.full((30,), 0.1))
    worse = type(worse)(**{**vars(worse), "khat": bad})
    found = compare({"worse": worse, "good": good, "same": same})
    assert found.names[2] == "worse"
    assert len(found.as_good) == 1
    lines = str(found).splitlines()
    assert lines[0].split() == ["elpd", "difference", "weight"]
    assert lines[4] == f"{found.names[1]} is as good as {found.best} within 1 se"
    assert lines[5] == "do not trust worse: k-hat above 0.7 in 30 of 30 rows"
    assert found.unreliable == ("worse",)
    assert str(compare({"good": good, "worse": worse})).splitlines()[3] == "good is best"
    ax = found.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == list(found.names)
    assert found.plot(ax) is ax
    ax.figure.canvas.draw()


def test_what_cannot_be_compared_is_named():
    one, other = (loo(np.random.default_rng(0).normal(size=(30, n))) for n in (5, 6))
    with pytest.raises(ValueError, match=r"at least two models, got \['a'\]"):
        compare({"a": one})
    with pytest.raises(ValueError, match="same rows for all models, got numbers {'a': 5, 'b': 6}"):
        compare({"a": one, "b": other})
