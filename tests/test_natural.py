"""Climbs by conjugate updates: what a model offers is climbed, and every end is told as it is."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll
from latentlab.inference.natural import _left
from latentlab.protocols import OffersUpdates, PlacesStarts, Updates

F64 = torch.float64
LOG_2PI = math.log(2 * math.pi)


class NormalMean(pyro.nn.PyroModule):
    """A normal of known variance with a standard normal prior on its mean, and its update."""

    def forward(self, x=None, size=None):
        loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
        with ll.rows(x, size):
            return pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def updates(self, guide):
        return Mean()


class Mean:
    def statistics(self, x, size=None):
        scale = 1.0 if size is None else size / len(x)
        center, precision = pyro.param("center"), pyro.param("precision")
        spread = 1 / precision
        log_lik = scale * -0.5 * (LOG_2PI + (x - center) ** 2 + spread).sum()
        kl = 0.5 * (spread + center**2 - 1 - spread.log())
        number = torch.tensor(scale * len(x), dtype=x.dtype)
        return {"sum": scale * x.sum(), "number": number}, log_lik - kl

    def maximise(self, statistics):
        store, precision = pyro.get_param_store(), 1 + statistics["number"]
        store["precision"], store["center"] = precision, statistics["sum"] / precision


def guide(x=None, size=None):
    center = pyro.param("center", torch.tensor(0.0, dtype=F64))
    precision = pyro.param(
        "precision", torch.tensor(1.0, dtype=F64), constraint=dist.constraints.positive
    )
    pyro.sample("loc", dist.Normal(center, precision**-0.5))


@pytest.fixture(scope="module")
def x():
    generator = torch.Generator().manual_seed(3)
    return 2 + torch.randn(60, generator=generator, dtype=F64)


@pytest.fixture(scope="module")
def exact(x):
    return ll.fit(NormalMean(), x, guide, progress=False)


def log_evidence(x):
    n = len(x)
    quadratic = x.square().sum() - x.sum() ** 2 / (1 + n)
    return float(-0.5 * (n * LOG_2PI + math.log(1 + n) + quadratic))


def fitted(updates, x, **settings):
    """A fit of the normal mean with other updates."""

    class Model(NormalMean):
        def updates(self, guide):
            return updates

    return ll.fit(Model(), x, guide, progress=False, **settings)


class TestTheProtocol:
    def test_is_asked_for_by_structure(self):
        assert isinstance(NormalMean(), OffersUpdates)
        assert isinstance(Mean(), Updates)
        assert not isinstance(Mean(), PlacesStarts)

    def test_an_exact_update_takes_one_step_and_every_weight_is_the_evidence(self, exact, x):
        assert exact.method == "natural"
        assert exact.converged
        weights = exact.log_weights(50)
        assert float(weights.std()) < 1e-9
        assert float(weights.mean()) == pytest.approx(log_evidence(x), abs=1e-9)
        assert float(-exact.losses[1]) == pytest.approx(log_evidence(x), abs=1e-9)
        assert float(exact.params["center"]) == pytest.approx(float(x.sum()) / 61, abs=1e-12)
        assert len(exact.losses) == 3  # the step, that it gained, that another gains nothing

    def test_all_that_follows_a_fit_works(self, exact, tmp_path):
        assert exact.check().level == "use"
        assert exact.sample(3)["loc"].shape == (3,)
        again = ll.load(exact.save(tmp_path), NormalMean(), guide)
        assert again.method == "natural"
        assert (again.sample(5)["loc"] == exact.sample(5)["loc"]).all()

    def test_the_arguments_and_pyros_store_are_left_alone(self, exact):
        assert "center" not in pyro.get_param_store()

    def test_stages_are_taken_where_they_are_asked_for(self, x):
        posterior = ll.fit(
            NormalMean(), x, guide, method="stages", max_steps=50, num_restarts=1, progress=False
        )
        assert posterior.method == "stages"

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"backend": "xla"}, "compiled"),
            ({"objective": ll.objectives.IWAE(2)}, "ELBO"),
            ({"lr": 1.5}, "at most 1"),
        ],
    )
    def test_settings_that_it_cannot_follow_are_refused_by_name(self, x, settings, told):
        with pytest.raises(ValueError, match=f"natural.*{told}"):
            ll.fit(NormalMean(), x, guide, method="natural", progress=False, **settings)

    def test_a_pair_that_offers_none_is_refused(self, x):
        def model(x):
            loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

        with pytest.raises(ValueError, match="offers no conjugate updates of MeanField"):
            ll.fit(model, x, method="natural", progress=False)


class TestTheEnd:
    def test_what_is_left_to_gain_is_extrapolated(self):
        gains = [0.9**t for t in range(30)]
        assert _left(gains, 0.0) == pytest.approx(sum(0.9**t for t in range(30, 600)), rel=1e-6)
        assert _left([1.0], 0.0) == math.inf
        assert _left([1e-3, 2e-3], 0.0) == math.inf  # a plateau that is being left
        assert _left([1.0, 1e-12], 1e-9) == 0.0

    def test_a_slow_climb_goes_on_until_it_is_there(self, x):
        class Slow(Mean):
            def statistics(self, x, size=None):
                found, bound = super().statistics(x, size)
                here = pyro.param("center").detach() * (1 + len(x))
                return found | {"sum": torch.lerp(here, found["sum"], 0.02)}, bound

        posterior = fitted(Slow(), x)
        assert posterior.converged
        assert len(posterior.losses) < 20  # by leaps; without them some 200
        off = log_evidence(x) + float(posterior.losses[-1])
        assert -1e-9 < off < 2 * 0.03**2 / 2
        assert "left to gain" in posterior.stop_reason

    def test_steps_that_run_out_say_what_is_left(self, x):
        posterior = fitted(Mean(), x, max_steps=1)
        assert not posterior.converged
        assert posterior.stop_reason.startswith("max_steps: 1 steps")

    def test_a_bound_that_falls_is_told_as_a_defect(self, x):
        class Wrong(Mean):
            def maximise(self, statistics):
                super().maximise({"sum": -statistics["sum"], "number": statistics["number"]})

        posterior = fitted(Wrong(), x)
        assert not posterior.converged
        assert "fell by" in posterior.stop_reason
        assert float(posterior.params["center"]) == 0.0  # before the step
        assert posterior.check().level != "use"

    def test_a_nan_is_named(self, x):
        class Broken(Mean):
            def maximise(self, statistics):
                pyro.get_param_store()["center"] = math.nan * statistics["sum"]

        with pytest.raises(ll.FitDivergedError, match="site 'loc' is nan; the bound is nan"):
            fitted(Broken(), x)

    def test_ctrl_c_keeps_the_last_whole_step(self, x):
        class Stopped(Mean):
            steps = 0

            def maximise(self, statistics):
                Stopped.steps += 1
                if Stopped.steps == 2:
                    pyro.get_param_store()["center"] = torch.tensor(99.0, dtype=F64)
                    raise KeyboardInterrupt
                super().maximise(statistics)

        posterior = fitted(Stopped(), x)
        assert posterior.stop_reason == "interrupted"
        assert not posterior.converged
        assert float(posterior.params["center"]) == pytest.approx(float(x.sum()) / 61)


class TestShorterSteps:
    def test_lr_is_the_share_of_new_statistics(self, x):
        seen = []

        class Told(Mean):
            def maximise(self, statistics):
                seen.append(float(statistics["sum"]))
                super().maximise(statistics)

            def statistics(self, x, size=None):
                found, bound = super().statistics(x, size)
                rises = torch.tensor(float(len(seen)), dtype=F64)
                return found | {"sum": found["sum"] + pyro.param("center").detach()}, rises

        fitted(Told(), x, lr=0.25, max_steps=3)
        by_hand, total = [], float(x.sum())
        center = 0.0
        for step in range(3):
            new = total + center
            by_hand.append(new if not step else 0.75 * by_hand[-1] + 0.25 * new)
            center = by_hand[-1] / 61
        assert seen == pytest.approx(by_hand, rel=1e-12)

    def test_mini_batches_average_as_stochastic_variational_inference_does(self, x):
        seen, batches = [], []

        class Told(Mean):
            def statistics(self, x, size=None):
                if size is not None:
                    batches.append(float(x.sum()) * size / len(x))
                return super().statistics(x, size)

            def maximise(self, statistics):
                seen.append(float(statistics["sum"]))
                super().maximise(statistics)

        posterior = fitted(Told(), x, batch_size=15, lr=0.5)
        assert posterior.converged
        first, steps = batches[:4], batches[4:8]  # a pass over all rows, then an epoch
        expected = sum(first) / 4
        for t, batch in enumerate(steps):
            rho = 0.5 * (1 + t) ** -0.6
            expected = (1 - rho) * expected + rho * batch
            assert seen[t] == pytest.approx(expected, rel=1e-12)

    def test_mini_batches_end_where_all_rows_do(self, x, exact):
        posterior = ll.fit(
            NormalMean(), x, guide, batch_size=16, progress=False
        )  # 60 = 3 x 16 + 12
        assert posterior.elbo.value == pytest.approx(exact.elbo.value, abs=1e-9)


class TwoModes(pyro.nn.PyroModule):
    """A parameter whose likelihood has a low hill near -3 and a high one near 3."""

    def forward(self, x=None, size=None):
        at = pyro.param("at", torch.tensor(0.0, dtype=F64))
        with ll.rows(x, size):
            return pyro.sample("x", dist.Normal(height(at), 1.0), obs=x)

    def updates(self, guide):
        return Hills()


def height(at):
    return (-((at - 3) ** 2)).exp() + 0.5 * (-((at + 3) ** 2)).exp()


class Hills:
    places = (-3.2, -2.9, -3.1, -2.8, 2.7, -3.3, 3.2, -2.7)

    def __init__(self):
        self.starts = 0

    def statistics(self, x, size=None):
        scale = 1.0 if size is None else size / len(x)
        at = pyro.param("at").detach()
        bound = -0.5 * scale * (LOG_2PI + (x - height(at)) ** 2).sum()
        return {"to": torch.where(at > 0, 3.0, -3.0).to(at)}, bound

    def maximise(self, statistics):
        at = pyro.param("at")
        with torch.no_grad():
            at += 0.5 * (statistics["to"] - at)

    def place(self, seed, x, size=None):
        with torch.no_grad():
            pyro.param("at").fill_(self.places[self.starts])
        self.starts += 1


class TestStarts:
    def test_the_best_start_wins_and_the_agreement_is_told(self):
        x = torch.ones(50, dtype=F64)
        posterior = ll.fit(TwoModes(), x, num_restarts=8, progress=False)
        assert float(posterior.params["at"]) == pytest.approx(3.0, abs=1e-2)
        restarts = posterior.restarts
        assert len(restarts.elbos) == 2
        assert restarts.given_up == 6
        assert "starts that were left of 8" in str(restarts)

    def test_many_rows_are_not_all_looked_at_by_the_starts(self):
        x = torch.ones(50_000, dtype=F64)
        posterior = ll.fit(TwoModes(), x, num_restarts=8, progress=False)
        assert posterior.restarts.num_rows == 2500
        assert "at 2500 rows" in str(posterior.restarts)
        assert posterior.converged

    def test_a_guide_that_cannot_be_placed_has_one_start(self, exact):
        assert str(exact.restarts) == "one start: agreement of starts is not known"

    def test_the_agreement_is_stored(self, tmp_path):
        posterior = ll.fit(TwoModes(), torch.ones(50, dtype=F64), progress=False)
        again = ll.load(posterior.save(tmp_path), TwoModes())
        assert again.restarts == posterior.restarts


def test_steps_are_no_more_than_asked_for(x):
    rows = torch.stack([x, x + 1, x - 3], -1)
    for most in (1, 3, 7):
        model = ll.GaussianMixture(3, 2, covariance="full", prior="flat")
        assert len(ll.fit(model, rows, max_steps=most, progress=False).losses) <= most + 1


def test_starts_that_never_ran_are_not_said_to_have_diverged(x, monkeypatch):
    from latentlab.inference import natural

    expect, calls = natural.NaturalClimb._expect, []

    def pressed(climb, *rest):
        calls.append(climb)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return expect(climb, *rest)

    monkeypatch.setattr(natural.NaturalClimb, "_expect", pressed)
    model = ll.GaussianMixture(1, 2, prior="flat")
    posterior = ll.fit(model, x[:, None], progress=False)
    assert posterior.stop_reason == "interrupted"
    assert "diverged" not in str(posterior.restarts)


def test_memory_that_ends_names_the_way_out(x):
    class Huge(Mean):
        def statistics(self, x, size=None):
            raise RuntimeError("can't allocate memory")

    with pytest.raises(MemoryError, match="give batch_size= for some rows a step"):
        fitted(Huge(), x)
