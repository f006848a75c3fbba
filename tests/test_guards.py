"""What goes wrong in the middle of a fit: each is brought about at a step of its own."""

import importlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import latentlab as ll
from latentlab.inference import steps
from latentlab.inference.guards import is_out_of_memory
from latentlab.inference.starts import Starts

X = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
QUICK = {"num_restarts": 1, "max_steps": 700, "progress": False, "method": "stages"}


def normal(x, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with ll.rows(x, size):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def network_model(x, size=None):
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Encoder(nn.Module):
    """A guide whose weights are those of a network."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def guide(self, x, size=None):
        pyro.module("net", self.net)
        loc, log_scale = self.net(x.unsqueeze(-1)).unbind(-1)
        with ll.rows(x, size):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


PAIRS = {"climb": (normal, "mean_field"), "networks": (network_model, Encoder().guide)}


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def at_some_steps(monkeypatch, act, first, times=math.inf):
    """Have ``act`` say what the objective of some steps is, by torch."""
    objective, calls = steps.step_of.__globals__["objective"], []

    def acted(pair, num_particles, data, step, *rest):
        found = objective(pair, num_particles, data, step, *rest)
        if step >= first and len(calls) < times:
            calls.append(num_particles)
            return act(found, num_particles)
        return found

    monkeypatch.setitem(steps.step_of.__globals__, "objective", acted)
    return calls


def steep(found, num_particles):
    """The same value, with a gradient far above all others."""
    return found._replace(loss=found.loss + 1e30 * (found.loss - found.loss.detach()))


def nan(found, num_particles):
    return found._replace(loss=found.loss * math.nan, elbo=found.elbo * math.nan)


# ---- steps that lead nowhere ------------------------------------------------------------------


@pytest.mark.parametrize("act", [steep, nan])
def test_a_bad_step_is_tried_again_and_the_fit_goes_on(pair, act, monkeypatch):
    plain = ll.fit(pair[0], X, pair[1], backend="eager", **QUICK)
    calls = at_some_steps(monkeypatch, act, first=250, times=2)
    posterior = ll.fit(pair[0], X, pair[1], backend="eager", **QUICK)
    assert len(calls) == 2
    assert posterior.losses.isfinite().all()
    assert torch.equal(posterior.losses[:200], plain.losses[:200])
    assert not torch.equal(posterior.losses, plain.losses)
    assert abs(posterior.elbo.value - plain.elbo.value) < 0.5


def test_a_gradient_that_stays_steep_ends_with_the_step_and_the_parameter(pair, monkeypatch):
    at_some_steps(monkeypatch, steep, first=250)
    with pytest.raises(ll.FitDivergedError, match="far above all before it") as caught:
        ll.fit(pair[0], X, pair[1], backend="eager", **QUICK)
    assert 200 <= caught.value.step <= 250
    assert 1e10 < caught.value.value < math.inf
    assert f"the gradient of parameter {caught.value.site!r}" in str(caught.value)


def test_without_the_guard_the_optimiser_would_stand_still(monkeypatch):
    """What the guard is for: Adam remembers a steep gradient for ten thousand steps."""

    def moved():
        at_some_steps(monkeypatch, steep, first=2, times=1)
        how = {"max_steps": 400, "progress": False, "backend": "eager"}
        return float(ll.fit(normal, X, guide, **how).params["mean"]) + 5

    def guide(x):
        loc = pyro.param("mean", torch.tensor(-5.0))
        pyro.sample("loc", dist.Normal(loc, 0.2))

    assert moved() > 1.0
    monkeypatch.setattr("latentlab.inference.guards._FAR", math.inf)
    assert moved() < 0.6


def steep_above(x):
    """From one on, what is drawn has a gradient that no step was ever taken along."""
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    wild = 1e-3 * torch.sin(1e33 * loc)
    pyro.factor("wild", torch.where(loc > 1.0, wild, torch.zeros_like(wild)).sum())
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def walks_up(x):
    loc = pyro.param("start", torch.tensor(0.0))
    pyro.sample("loc", dist.Normal(loc, 0.05))


@pytest.mark.parametrize(("backend", "kind"), [("eager", steps.Eager), ("xla", steps.Compiled)])
def test_neither_backend_goes_through_a_wall(backend, kind, monkeypatch):
    take, failed = kind.take, []

    def spied(self, *args):
        elbos, path = take(self, *args)
        failed.append(all(map(math.isnan, elbos)))
        return elbos, path

    monkeypatch.setattr(kind, "take", spied)
    posterior = ll.fit(
        steep_above, X, walks_up, backend=backend, lr=0.01, max_steps=1200, progress=False
    )
    assert any(failed)
    assert not all(failed)
    assert posterior.losses.isfinite().all()
    assert not posterior.converged


def test_a_gradient_that_cannot_be_squared_is_no_step():
    def guide(x):
        start = pyro.param("start", torch.tensor(0.0))
        pyro.sample("loc", dist.Normal(1e25 * start, 0.05))

    with pytest.raises(ll.FitDivergedError, match="parameter 'start' is .*e[+]2"):
        ll.fit(normal, X.float(), guide, backend="eager", max_steps=100, progress=False)


# ---- memory -----------------------------------------------------------------------------------

OUT = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def too_many(monkeypatch, most, error=OUT[1], first=100):
    def act(found, num_particles):
        if num_particles > most:
            raise error
        return found

    return at_some_steps(monkeypatch, act, first)


@pytest.mark.parametrize("kind", [steps.Eager, steps.Compiled])
def test_what_adam_remembers_outlasts_the_particles(pair, kind, monkeypatch):
    take, met = kind.take, []

    def take_or_run_out(self, first, *args):
        if first >= 250 and len(met) < 2:
            met.append({k: v.clone() for k, v in self.memory().items()})
            if len(met) == 1:
                raise MemoryError
        return take(self, first, *args)

    monkeypatch.setattr(kind, "take", take_or_run_out)
    backend = {steps.Eager: "eager", steps.Compiled: "xla"}[kind]
    ll.fit(pair[0], X, pair[1], backend=backend, num_particles=2, **QUICK)
    before, after = met
    assert before.keys() == after.keys() != set()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(value.any() for value in before.values())


@pytest.mark.parametrize("error", OUT, ids=["cuda", "cpu", "python"])
def test_memory_that_runs_out_halves_the_particles(pair, error, monkeypatch):
    calls = too_many(monkeypatch, 2, error)
    posterior = ll.fit(pair[0], X, pair[1], backend="eager", num_particles=8, **QUICK)
    assert calls[:3] == [8, 4, 2]
    assert {*calls[3:]} == {2}
    assert posterior.losses.isfinite().all()
    told = [note for note in posterior.notes if "memory ran out" in note]
    assert told == [
        "memory ran out: num_particles=4 in the place of 8",
        "memory ran out: num_particles=2 in the place of 4",
    ]


def test_groups_of_a_bound_stay_whole(monkeypatch):
    calls = too_many(monkeypatch, 5)
    bound = ll.objectives.IWAE(num_samples=5)
    how = {**QUICK, "backend": "eager", "num_particles": 3}
    ll.fit(normal, X, "mean_field", objective=bound, **how)
    assert calls[0] == 15
    assert {*calls[1:]} == {5}


def test_a_single_particle_that_does_not_fit_says_what_to_do(pair, monkeypatch):
    too_many(monkeypatch, 0)
    with pytest.raises(MemoryError, match="num_particles=1 does not fit .*; give batch_size="):
        ll.fit(pair[0], X, pair[1], backend="eager", num_particles=2, **QUICK)


def test_xla_that_runs_out_is_recorded_anew_for_fewer(monkeypatch):
    run, sizes = steps.Compiled.take, []

    def take(self, first, rates, attempt):
        shape = self.steps.program.noise[0].shape
        sizes.append(shape[0])
        if shape[0] > 4:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return run(self, first, rates, attempt)

    monkeypatch.setattr(steps.Compiled, "take", take)
    how = {**QUICK, "max_steps": 2000, "num_particles": 8}
    posterior = ll.fit(normal, X, "mean_field", backend="xla", **how)
    assert posterior.backend == "xla"
    assert sizes[:2] == [8, 4]
    assert "memory ran out: num_particles=4 in the place of 8" in posterior.notes


def test_other_errors_are_raised_as_they_are(monkeypatch):
    def act(found, num_particles):
        raise RuntimeError("size mismatch")

    at_some_steps(monkeypatch, act, first=10)
    with pytest.raises(RuntimeError, match="^size mismatch$"):
        ll.fit(normal, X, backend="eager", **QUICK)
    assert not is_out_of_memory(ValueError("out of memory"))


# ---- the start --------------------------------------------------------------------------------


class Late(dist.Normal):
    """Without a density, or without a factor of a matrix, for a while."""

    left, error = 0, None

    def log_prob(self, value):
        if Late.left <= 0:
            return super().log_prob(value)
        Late.left -= 1
        if Late.error is not None:
            raise Late.error
        return super().log_prob(value) - math.inf


def late(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with ll.rows(x):
        pyro.sample("x", Late(loc, 1.0), obs=x)


def own(x):
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(pyro.param("mean", torch.tensor(1.0)), scale))


@pytest.mark.parametrize("error", [None, torch.linalg.LinAlgError("not positive definite")])
@pytest.mark.parametrize("guide", [own, "mean_field"])
def test_a_start_without_a_density_is_tried_again(guide, error, monkeypatch):
    place, tries = Starts._place, []

    def placed(self, start, attempt):
        tries.append(attempt)
        Late.left = 1 if attempt < 3 else 0
        return place(self, start, attempt)

    monkeypatch.setattr(Late, "error", error)
    monkeypatch.setattr(Starts, "_place", placed)
    posterior = ll.fit(late, X, guide, backend="eager", **QUICK)
    assert tries[0] == 0
    assert guide != own or tries == [0, 1, 2, 3]
    assert posterior.losses.isfinite().all()


@pytest.mark.parametrize("error", [None, torch.linalg.LinAlgError("not positive definite")])
def test_ten_starts_without_a_density_name_the_site(error, monkeypatch):
    place = Starts._place

    def placed(self, start, attempt):
        place(self, start, attempt)
        Late.left = 10**6

    monkeypatch.setattr(Late, "error", error)
    monkeypatch.setattr(Starts, "_place", placed)
    try:
        with pytest.raises(ValueError, match="is (-inf|nan) at each of ten starts"):
            ll.fit(late, X, own, backend="eager", **QUICK)
    finally:
        Late.left = 0


# ---- Ctrl-C -----------------------------------------------------------------------------------


def press_at(monkeypatch, place, after):
    """Press Ctrl-C at a call of a function of the engine."""
    module, name = place.rsplit(".", 1)
    module = importlib.import_module(f"latentlab.inference.{module}")
    function, calls = getattr(module, name), []

    def pressed(*args, **kwargs):
        calls.append(name)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, pressed)


PLACES = [
    ("steps.step_of", 50),  # in the warm-up
    ("steps.step_of", 450),  # in a stage
    ("stages.evaluate", 0),  # where a stage is judged
    ("stages.evaluate", 1),
    ("engine._final_elbo", 0),
    ("engine.measure", 0),
]


@pytest.mark.parametrize(("place", "after"), PLACES)
def test_an_interrupt_anywhere_keeps_what_there_is(place, after, monkeypatch):
    press_at(monkeypatch, place, after)
    posterior = ll.fit(normal, X, own, backend="eager", held_out=0.2, **QUICK)
    assert posterior.stop_reason == "interrupted"
    assert not posterior.converged
    assert all(value.isfinite().all() for value in posterior.params.values())
    assert posterior.sample(3)["loc"].isfinite().all()
    monkeypatch.undo()
    assert posterior.check().level != "use"


@pytest.mark.parametrize(("place", "after"), [("steps.step_of", 250), ("judge.row_terms", 1)])
def test_an_interrupt_of_a_climb_of_networks_keeps_what_there_is(place, after, monkeypatch):
    press_at(monkeypatch, place, after)
    model, guide = PAIRS["networks"]
    posterior = ll.fit(model, X, guide, backend="eager", **QUICK)
    assert posterior.stop_reason == "interrupted"
    assert posterior.sample(3)["z"].isfinite().all()
