"""fit: what it finds against closed forms, and what it leaves behind."""

import math
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll
from latentlab.diagnostics import Estimate
from latentlab.inference import check, engine, minibatches, objectives, stages, steps
from latentlab.inference.batches import Batches
from latentlab.inference.restarts import Place, Restarts, distances

QUICK = {"num_restarts": 1, "max_steps": 800, "progress": False}


def normal(x=None, size=None):
    """Known scale 1, prior N(0, 2): posterior N(m, v) with 1/v = 1/4 + N, m = v sum(x)."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def data(num_rows=40, seed=0, loc=1.0):
    generator = torch.Generator().manual_seed(seed)
    return loc + torch.randn(num_rows, generator=generator, dtype=torch.float64)


def exact(x):
    variance = 1 / (0.25 + len(x))
    return float(variance * x.sum()), math.sqrt(variance)


def digest(posterior):
    draws = posterior.sample(10)
    parts = [*posterior.params.values(), *draws.values(), posterior.losses]
    return b"".join(part.numpy(force=True).tobytes() for part in parts)


# What is found.


@pytest.mark.parametrize("guide", ["auto", "full_rank", "mean_field"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_posterior_of_a_normal_mean_is_exact(guide, seed):
    x = data(seed=seed)
    posterior = ll.fit(normal, x, guide, seed=seed, **QUICK)
    mean, sd = exact(x)
    guide = posterior.guide
    assert float(guide.free_mean().detach()) == pytest.approx(mean, abs=1e-4 * sd)
    assert float(guide.covariance().detach()) == pytest.approx(sd**2, rel=1e-3)
    assert posterior.converged


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("max_steps", [800, 1500])
def test_a_stage_that_falls_is_taken_back(seed, max_steps):
    """Whether the steps run out while it lies below or not, a climb ends at its best stage."""
    pair, _ = check.prepare(normal, data(), "full_rank")
    with pair.entered(seed):
        climb = stages.Climb(
            *(pair, seed, 1, 1e3, 0.03, max_steps),
            *(Batches(pair.data), lambda step, loss: None),
            steps.Engine(pair, "auto", 1, max_steps),
        )
        climb.warm_up(400, 0.1)
        climb.until_converged()
        end = stages.evaluate(pair, objectives.draw(pair, 256))
    best = max(climb.stage_elbos, key=lambda elbo: elbo.value)
    worst = min(elbo.value for elbo in climb.stage_elbos)
    assert not worst > best.value - 3
    assert end.value > best.value - 4 * math.hypot(best.se, end.se) - 0.3


@pytest.mark.parametrize("times", [1, 3])
def test_a_stage_that_stays_nan_is_taken_back_to_the_best_one(times, monkeypatch):
    """A later stage without a finite loss costs that stage, not the fit."""
    pair, _ = check.prepare(normal, data(), "full_rank")
    run, failed = stages.Climb._stage, []

    def stage(climb, num_steps, rate, falling=False):
        if not falling and len(failed) < times:
            failed.append(rate)
            with torch.no_grad():
                pair.guide.loc.fill_(math.nan)
            raise stages.FitDivergedError(climb.num_steps, "x", math.nan)
        return run(climb, num_steps, rate, falling)

    monkeypatch.setattr(stages.Climb, "_stage", stage)
    with pair.entered(0):
        climb = stages.Climb(
            *(pair, 0, 1, 1.0, 0.03, 3000),
            *(Batches(pair.data), lambda step, loss: None),
            steps.Engine(pair, "auto", 1, 3000),
        )
        climb.warm_up(400, 0.1)
        climb.until_converged()
    assert climb.stop_reason
    assert failed == [8.0**-k for k in range(times)]
    assert float(pair.guide.free_mean().detach()) == pytest.approx(exact(data())[0], abs=1e-2)


def test_the_last_elbo_is_measured_in_parts_that_fit_in_memory(monkeypatch):
    sizes, draw = [], objectives.draw
    monkeypatch.setattr(engine, "particle_chunk", lambda pair, num, summed: 300)
    pair, _ = check.prepare(normal, data(), "full_rank")

    def counted(pair, num_particles, data=None):
        sizes.append(num_particles)
        return draw(pair, num_particles, data)

    monkeypatch.setattr(objectives, "draw", counted)
    with pair.entered(0):
        engine._final_elbo(pair, 0)
    assert sizes == [300, 300, 300, 100]


@pytest.mark.parametrize("value", [-1.3, -5e5, -math.inf, math.nan])
@pytest.mark.parametrize("se", [0.0, 0.01, 1e6, math.nan])
def test_what_lies_far_below_the_best_has_fallen_whatever_its_error(value, se):
    best = stages._Reached({}, None, Estimate(-1.0, 0.02))
    assert best.is_above(Estimate(value, se), 0.03) == (value != -1.3 or se == 0.01 or se == 0.0)
    assert not best.is_above(Estimate(-1.05, se), 0.03)
    assert not best.is_above(Estimate(5.0, se), 0.03)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_units_do_not_matter(unit):
    """The same problem in other units is climbed in as many steps, to the same place."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0 * unit))
        scale = pyro.sample("scale", dist.LogNormal(math.log(unit), 1.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    fitted = ll.fit(model, unit * data(), num_restarts=1, max_steps=5000, progress=False)
    draws = fitted.sample(4000)
    assert float(draws["loc"].mean() / unit) == pytest.approx(float(data().mean()), abs=0.1)
    assert float(draws["scale"].mean() / unit) == pytest.approx(float(data().std()), abs=0.1)
    assert fitted.converged


def test_a_point_is_the_mode_of_the_joint_density():
    x = data()
    posterior = ll.fit(normal, x, "point", **QUICK)
    assert float(posterior.sample(1)["loc"]) == pytest.approx(exact(x)[0], abs=1e-3 * exact(x)[1])


def test_a_point_with_a_flat_prior_is_the_maximum_of_the_likelihood():
    """On the support itself, without the Jacobian: the scale of a normal divides by N."""

    def model(x):
        scale = pyro.sample("scale", dist.Uniform(0.01, 10.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    x = data(loc=0.0)
    posterior = ll.fit(model, x, "point", **QUICK)
    found = float(posterior.sample(1)["scale"])
    assert found == pytest.approx(float((x**2).mean().sqrt()), rel=1e-3)


def test_a_guide_of_your_own_is_fitted():
    def guide(x=None, size=None):
        loc = pyro.param("m", torch.zeros((), dtype=torch.float64))
        scale = pyro.param("s", torch.ones((), dtype=torch.float64), dist.constraints.positive)
        pyro.sample("loc", dist.Normal(loc, scale))

    x = data()
    posterior = ll.fit(normal, x, guide, max_steps=3000, progress=False)
    draws = posterior.sample(20_000)["loc"]
    mean, sd = exact(x)
    assert float(draws.mean()) == pytest.approx(mean, abs=0.1 * sd)
    assert float(draws.std()) == pytest.approx(sd, rel=0.1)
    assert posterior.check().level == "use"


def test_mini_batches_find_what_all_rows_say():
    x = data(num_rows=400)
    posterior = ll.fit(normal, x, batch_size=50, num_restarts=1, max_steps=3000, progress=False)
    mean, sd = exact(x)
    draws = posterior.sample(4000)["loc"]
    assert float(draws.mean()) == pytest.approx(mean, abs=0.3 * sd)
    assert float(draws.std()) == pytest.approx(sd, rel=0.3)


def test_parameters_of_the_model_are_learnt_too():
    """Type-II maximum likelihood: x ~ N(0, s^2 + 1) with z integrated out."""

    def model(x):
        scale = pyro.param("scale", torch.ones((), dtype=torch.float64), dist.constraints.positive)
        with ll.rows(x):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = 3 * data(num_rows=100, loc=0.0)
    posterior = ll.fit(model, x, "mean_field", num_restarts=1, max_steps=4000, progress=False)
    best = math.sqrt(float((x**2).mean()) - 1)
    assert float(posterior.params["scale"]) == pytest.approx(best, rel=0.05)


def test_the_elbo_has_an_error_and_bounds_the_evidence():
    x = data()
    covariance = torch.eye(len(x)).double() + 4.0
    zeros = torch.zeros(len(x)).double()
    evidence = float(torch.distributions.MultivariateNormal(zeros, covariance).log_prob(x))
    posterior = ll.fit(normal, x, **QUICK)
    assert posterior.elbo.value == pytest.approx(evidence, abs=1e-6)
    assert posterior.elbo.se < 1e-6


# What is left behind.


def state_of_the_process():
    store = pyro.get_param_store()
    return (
        torch.get_rng_state().numpy().tobytes(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.distributions.Distribution._validate_args,
        pyro.infer.util.is_validation_enabled(),
        sorted(store.keys()),
        [bytes(v.detach().numpy().tobytes()) for v in store.values()],
        len(pyro.poutine.runtime._PYRO_STACK),
    )


def test_a_fit_leaves_no_trace():
    with pyro.get_param_store().scope():
        pyro.param("mine", torch.ones(2))
        before = state_of_the_process()
        x = data()
        kept = x.clone()
        posterior = ll.fit(normal, x, **QUICK)
        for use in (
            lambda: posterior.sample(3),
            lambda: posterior.predict(3),
            lambda: posterior.log_prob(x),
            posterior.check,
            posterior.summary,
        ):
            use()
            assert state_of_the_process() == before
        assert torch.equal(x, kept)


def test_a_fit_that_fails_leaves_no_trace():
    def model(x):
        pyro.param("p", torch.zeros(()))
        raise RuntimeError("mine")

    before = state_of_the_process()
    with pytest.raises(RuntimeError, match="mine") as caught:
        ll.fit(model, data(), **QUICK)
    assert any("before step 1" in note for note in caught.value.__notes__)
    assert state_of_the_process() == before


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    x = ll.data.simulate.eruptions(num_rows=60)
    model = ll.GaussianMixture(2, 2)
    settings = {"num_restarts": 2, "max_steps": 300, "progress": False}
    first, again = (digest(ll.fit(model, x, seed=3, **settings)) for _ in range(2))
    assert first == again
    assert digest(ll.fit(model, x, seed=4, **settings)) != first


def guide_with_store(x=None, size=None):
    loc = pyro.param("m", torch.zeros((), dtype=torch.float64))
    pyro.sample("loc", dist.Normal(loc, 0.5))


def test_fits_in_two_threads_equal_the_same_fits_alone():
    tasks = [
        lambda: ll.fit(normal, data(seed=1), guide_with_store, max_steps=500, progress=False),
        lambda: ll.fit(
            normal, data(seed=2, loc=-5.0), guide_with_store, seed=1, max_steps=500, progress=False
        ),
        lambda: ll.fit(ll.GaussianMixture(1, 2), data()[:, None], **QUICK),
    ]
    alone = [digest(task()) for task in tasks]
    found = [b""] * len(tasks)

    def work(i):
        found[i] = digest(tasks[i]())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_an_older_posterior_stays_when_the_same_names_are_fitted_again():
    first = ll.fit(normal, data(seed=1), guide_with_store, max_steps=300, progress=False)
    kept = digest(first)
    second = ll.fit(
        normal, data(seed=2, loc=-5.0), guide_with_store, max_steps=300, progress=False
    )
    assert digest(first) == kept
    alone = ll.fit(normal, data(seed=2, loc=-5.0), guide_with_store, max_steps=300, progress=False)
    assert digest(second) == digest(alone)


# How it ends.


def test_steps_that_run_out_are_said():
    posterior = ll.fit(
        normal, data(), num_restarts=1, max_steps=100, method="stages", progress=False
    )
    assert not posterior.converged
    assert "max_steps" in posterior.stop_reason
    assert posterior.check().level == "use with care"


def test_row_43_an_interrupt_keeps_what_there_is(monkeypatch):
    note = stages.Climb._note

    def interrupted(self, elbos):
        if self.num_steps >= 450:
            raise KeyboardInterrupt
        return note(self, elbos)

    monkeypatch.setattr(stages.Climb, "_note", interrupted)
    posterior = ll.fit(normal, data(), num_restarts=1, method="stages", progress=False)
    assert posterior.stop_reason == "interrupted"
    assert not posterior.converged
    assert posterior.sample(5)["loc"].isfinite().all()
    assert posterior.check().level == "use with care"


def test_row_43_an_interrupt_during_a_later_start_keeps_the_best_so_far(monkeypatch):
    note, taken = stages.Climb._note, []

    def interrupted(self, elbos):
        taken.extend(elbos)
        if len(taken) >= 500:
            raise KeyboardInterrupt
        return note(self, elbos)

    monkeypatch.setattr(stages.Climb, "_note", interrupted)
    x = data()
    posterior = ll.fit(normal, x, num_restarts=3, method="stages", progress=False)
    assert posterior.stop_reason == "interrupted"
    assert float(posterior.guide.free_mean().detach()) == pytest.approx(
        exact(x)[0], abs=exact(x)[1]
    )


class Explosive(dist.Normal):
    """NaN from the given number of evaluations on."""

    calls, last = 0, 0

    def log_prob(self, value):
        type(self).calls += 1
        bad = type(self).calls > type(self).last
        return super().log_prob(value) * (math.nan if bad else 1.0)


def test_row_48_a_loss_that_stays_nan_ends_with_the_step_and_the_site():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with ll.rows(x):
            pyro.sample("x", Explosive(loc, 1.0), obs=x)

    Explosive.calls, Explosive.last = 0, 300
    with pytest.raises(ll.FitDivergedError, match="'x' is nan") as caught:
        ll.fit(model, data(), method="stages", backend="eager", **QUICK)
    assert 0 < caught.value.step < 600
    assert caught.value.site == "x"


class ExplodesOnce(dist.Normal):
    """NaN in a single evaluation."""

    calls, bad = 0, 0

    def log_prob(self, value):
        type(self).calls += 1
        return super().log_prob(value) * (math.nan if self.calls == self.bad else 1.0)


def test_row_48_a_loss_that_is_nan_once_is_got_over():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with ll.rows(x):
            pyro.sample("x", ExplodesOnce(loc, 1.0), obs=x)

    x = data()
    ExplodesOnce.calls, ExplodesOnce.bad = 0, 350
    posterior = ll.fit(model, x, method="stages", backend="eager", **QUICK)
    assert ExplodesOnce.calls > 350
    mean, sd = exact(x)
    assert float(posterior.guide.free_mean().detach()) == pytest.approx(mean, abs=0.1 * sd)


class SteepOnce(torch.autograd.Function):
    """The identity, whose gradient is NaN at one step."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        SteepOnce.calls += 1
        return grad * (math.nan if SteepOnce.calls in (300, 400) else 1.0)


def test_row_48_a_gradient_that_is_nan_once_is_got_over():
    def model(x):
        loc = SteepOnce.apply(pyro.sample("loc", dist.Normal(0.0, 2.0)))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = data()
    SteepOnce.calls = 0
    posterior = ll.fit(model, x, "mean_field", method="stages", backend="eager", **QUICK)
    mean, sd = exact(x)
    assert SteepOnce.calls > 400
    assert float(posterior.guide.free_mean().detach()) == pytest.approx(mean, abs=0.1 * sd)


def test_row_38_a_start_without_density_is_named():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with ll.rows(x):
            pyro.sample("x", dist.Uniform(loc, loc + 1e-3, validate_args=False), obs=x)

    with pytest.raises(
        ValueError, match="site 'x': its log-density is -inf at each of ten starts"
    ):
        ll.fit(model, data(), **QUICK)


def test_starts_that_agree_and_starts_that_do_not_are_counted():
    def at(*values):
        return Restarts(tuple(Estimate(v, 0.01) for v in values))

    assert (
        str(at(-10.0, -10.2, -13.4)) == "best optimum in 2 of 3 starts, runner-up 3.4 nats worse"
    )
    assert str(at(-10.0, -10.1)) == "best optimum in 2 of 2 starts"
    assert str(at(-10.0)) == "one start: agreement of starts is not known"
    assert "1 start diverged" in str(at(-10.0, -math.inf))


def test_a_start_that_diverges_does_not_end_the_fit(monkeypatch):
    warm_up, calls = stages.Climb.warm_up, []

    def sometimes(self, *args):
        calls.append(1)
        if len(calls) == 1:
            raise stages.FitDivergedError(7, "x", math.nan)
        return warm_up(self, *args)

    monkeypatch.setattr(stages.Climb, "warm_up", sometimes)
    posterior = ll.fit(normal, data(), num_restarts=2, max_steps=800, progress=False)
    assert posterior.converged
    assert len(posterior.restarts.elbos) == 2


def two_modes(tilt):
    """Data say only how large z is; its sign is a guess, tilted by the prior."""

    def model(x):
        z = pyro.sample("z", dist.Normal(tilt, 0.25))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(z.abs(), 1.0), obs=x)

    return model


@pytest.mark.slow
def test_the_better_of_two_modes_is_won_and_the_other_is_reported():
    x = data(num_rows=30, loc=4.0)
    posterior = ll.fit(two_modes(0.025), x, num_restarts=12, max_steps=700, progress=False)
    assert 0 < posterior.restarts.num_agreeing < 12
    assert "nats worse" in str(posterior.restarts)
    assert float(posterior.sample(100)["z"].mean()) > 0


def test_two_modes_of_equal_mass_are_not_taken_for_one():
    x = data(num_rows=30, loc=4.0)
    posterior = ll.fit(two_modes(0.0), x, num_restarts=12, max_steps=700, progress=False)
    assert posterior.restarts.num_elsewhere > 0
    found = posterior.check()
    assert found.level != "use"
    assert any("several modes" in reason for reason in found.reasons)


@pytest.mark.slow
def test_components_with_other_labels_are_the_same_place():
    x = ll.data.simulate.eruptions(num_rows=150)
    settings = {"num_restarts": 4, "max_steps": 500, "progress": False}
    posterior = ll.fit(ll.GaussianMixture(2, 2), x, **settings)
    assert posterior.restarts.num_elsewhere == 0


def test_distances_are_in_standard_deviations_of_the_best():
    ends = [(0.0, 1.0), (6.0, 2.0), (math.nan, 1.0)]
    places = [Place({"z": torch.tensor([m, 0.0])}, {"z": torch.tensor([s, s])}) for m, s in ends]
    assert distances(places, 1, {}) == (3.0, 0.0, math.inf)


def test_distances_do_not_see_labels():
    mean = torch.tensor([[0.0, 1.0], [5.0, 6.0], [9.0, 2.0]])
    sd = torch.ones_like(mean)
    order = [2, 0, 1]
    places = [Place({"locs": mean}, {"locs": sd}), Place({"locs": mean[order]}, {"locs": sd})]
    assert distances(places, 0, {"locs": -2}) == (0.0, 0.0)
    assert distances(places, 0, {})[1] > 5


def test_a_progress_bar_stays_off_where_there_is_no_terminal(capsys):
    ll.fit(normal, data(), num_restarts=1, max_steps=100)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_progress_bar_writes_to_stderr_only(capsys):
    ll.fit(normal, data(), num_restarts=1, max_steps=100, progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr: expected a number > 0, got 0.0"),
        ({"lr": math.nan}, "lr: expected"),
        ({"tol": -1}, "tol: expected"),
        ({"max_steps": 0}, "max_steps must be an int >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
        ({"num_restarts": 2.5}, "num_restarts must be an int >= 1, got 2.5"),
        ({"num_particles": True}, "num_particles must be"),
        ({"seed": -1}, "seed must be an int >= 0"),
        ({"seed": None}, "seed: expected an int >= 0, got None"),
        ({"guide": "flat"}, "guide: expected one of"),
    ],
)
def test_rows_39_and_40_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ll.fit(normal, data(), **settings)


def test_row_39_a_batch_of_more_rows_than_there_are_takes_all():
    with pytest.warns(UserWarning, match="batch_size: 100 is more than the 40 rows"):
        ll.fit(normal, data(), batch_size=100, num_restarts=1, max_steps=50, progress=False)


def test_a_batch_needs_a_model_that_knows_what_it_stands_for():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ValueError, match="must accept size"):
        ll.fit(model, data(), batch_size=10)


@pytest.mark.parametrize(
    ("size_of", "says"),
    [
        (lambda x, size: len(x), r"counts 10 rows as 10, where .*size=40 \(site 'x'\)"),
        (lambda x, size: 40, r"counts 10 rows as 10"),
        (lambda x, size: len(x) + 0 * int(x[39]), r"does not run on 10 of the 40 rows"),
    ],
)
def test_a_batch_that_does_not_stand_for_all_rows_is_refused(size_of, says):
    def model(x, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", size_of(x, size)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ValueError, match=f"^batch_size: the model {says}"):
        ll.fit(model, data(), batch_size=10)


def test_a_plate_that_draws_its_own_rows_cannot_be_judged_on_all():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("part", len(x), subsample_size=10) as rows:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])

    posterior = ll.fit(model, data(), "mean_field", num_restarts=1, max_steps=600, progress=False)
    verdict = posterior.check()
    assert verdict.level == "use with care"
    assert "plate 'part' looks at other 10 of 40 rows in each run" in str(verdict)
    assert "were changed" not in str(verdict)
    assert "k-hat," not in str(verdict)


def test_batches_visit_rows_by_seed_and_step_alone():
    pair, _ = engine.prepare(normal, data())
    one, two = minibatches.batches_of(pair, 10, seed=5), minibatches.batches_of(pair, 10, seed=5)
    for step in (7, 0, 3):
        assert torch.equal(one(step).args[0], two(step).args[0])
        assert one(step).kwargs["size"] == 40
    assert not torch.equal(one(0).args[0], one(1).args[0])
