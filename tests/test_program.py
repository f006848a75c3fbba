"""A pair written down as a graph: what it does, or refused; and fits by XLA are those by Pyro."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch.distributions import constraints

import latentlab as ll
from latentlab.inference import check, program, steps, training
from latentlab.inference.batches import Batches
from latentlab.inference.modes import TrainingMode

jax = pytest.importorskip("jax")

ROWS = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
LABELS = (ROWS[:, 0] > 1).double()
BRIEF = {"num_restarts": 1, "max_steps": 700, "progress": False}
BY_XLA = BRIEF | {"backend": "xla"}


def mean_of(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, scale).expand([1]).to_event(1), obs=x[:, :1])


def logistic(x, y, size=None):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with ll.rows(x, size):
        logits = (x * weights[..., None, :]).sum(-1)
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def clusters(x):
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 5.0))
    with ll.rows(x):
        label = pyro.sample("label", dist.Categorical(shares), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(pyro.ops.indexing.Vindex(locs)[..., label], 1.0), obs=x[:, 0])


def own_guide(x):
    loc = pyro.param("own_loc", torch.tensor(0.0))
    sd = pyro.param("own_sd", torch.tensor(0.3), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(loc, sd))
    pyro.sample("scale", dist.LogNormal(pyro.param("other", torch.tensor(0.1)), 0.2))


def learnt(x):
    loc = pyro.param("loc", torch.zeros(2, dtype=torch.float64))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def vae(**settings):
    return ll.VariationalAutoencoder(num_features=2, latent_dim=1, hidden_dims=(4,), **settings)


def with_dropout():
    """In one network half of the units are away, in the other whole numbers of a batch are."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(
        torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)
    )
    decoder = torch.nn.Sequential(
        torch.nn.Linear(1, 8), torch.nn.ELU(), torch.nn.AlphaDropout(0.2), torch.nn.Linear(8, 2)
    )
    return ll.VariationalAutoencoder(encoder, decoder, latent_dim=1, num_features=2)


def flow():
    torch.manual_seed(0)
    return ll.FlowDensity(2, kind="maf", hidden_dims=(4,))


PAIRS = {
    **{
        f"normal, {guide}": (mean_of, ROWS, guide)
        for guide in ("point", "mean_field", "low_rank", "full_rank", "flow")
    },
    "normal, a written guide": (mean_of, ROWS, own_guide),
    "normal, AutoNormal": (mean_of, ROWS, autoguide.AutoNormal(mean_of)),
    "normal, AutoMultivariateNormal": (
        mean_of,
        ROWS,
        autoguide.AutoMultivariateNormal(mean_of),
    ),
    "regression": (logistic, (ROWS, LABELS), "full_rank"),
    "summed out": (clusters, ROWS, "mean_field"),
    "no latents": (learnt, ROWS, "auto"),
    "mixture": (ll.GaussianMixture(2, 2), ROWS, "full_rank"),
    "mixture with gaps": (
        ll.GaussianMixture(2, 2),
        ROWS.masked_fill(torch.eye(2, dtype=torch.bool).repeat(20, 1), float("nan")),
        "mean_field",
    ),
    "principal components": (ll.ProbabilisticPCA(2, 1), ROWS, "mean_field"),
    "mixture, flow": (ll.GaussianMixture(2, 2), ROWS, "flow"),
    "chain": (ll.HiddenMarkovModel(2, 2), ROWS[:12], "mean_field"),
    "autoencoder": (vae(), ROWS, "auto"),
    "autoencoder that warms up": (vae(warm_up=500, free_bits=0.01), ROWS, "auto"),
    "autoencoder with dropout": (with_dropout(), ROWS, "auto"),
    "flow density": (flow(), ROWS, "auto"),
}


def engine_of(model, data, guide, backend="auto", num_particles=2):
    """The engine of a pair, after its first step was asked for; and the pair."""
    pair, report = check.prepare(model, data, guide)
    assert report.ok, str(report)
    engine = steps.Engine(pair, backend, num_particles, 10_000)
    with pair.entered(0):
        parameters = [*pair.parameters().values()]
        optimiser = torch.optim.Adam(parameters, lr=0.01)
        stepper = engine.stepper(*(optimiser, Batches(pair.data), 0, TrainingMode(pair), 2, 0))
    return engine, stepper, pair


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pair_is_written_down_and_compiled(name):
    model, data, guide = PAIRS[name]
    num_particles = 1 if guide == "point" or name == "flow density" else 2
    engine, stepper, _ = engine_of(model, data, guide, num_particles=num_particles)
    assert engine.why == ""
    assert str(engine) == "xla"
    assert isinstance(stepper, steps.Compiled)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pair_is_written_down_and_run_by_torch(name):
    """The record with its slopes is compared with the pair, as the compiled one is."""
    model, data, guide = PAIRS[name]
    num_particles = 1 if guide == "point" or name == "flow density" else 2
    engine, stepper, _ = engine_of(model, data, guide, "traced", num_particles)
    assert str(engine) == "traced"
    assert isinstance(stepper, steps.Traced)


@pytest.mark.parametrize(
    "name",
    [
        *("normal, mean_field", "mixture", "summed out"),
        *("autoencoder", "autoencoder that warms up", "autoencoder with dropout"),
    ],
)
def test_the_steps_are_those_of_adam(name):
    """On the same noise, torch's own Adam on Pyro's own ELBO ends at the same parameters."""
    model, data, guide = PAIRS[name]
    engine, stepper, pair = engine_of(model, data, guide)
    with pair.entered(0):
        parameters = [*pair.parameters().values()]
        before = [p.detach().clone() for p in parameters]
        rates = [0.02 * 0.9**k for k in range(10)]
        elbos, path = stepper.take(100, rates, 0)
        ends = [p.detach().clone() for p in parameters]
        for p, start in zip(parameters, before, strict=True):
            p.data.copy_(start)
        generator = torch.Generator().manual_seed(steps.stream(0, "steps", 100, 0))
        weights = [training.kl_weight(pair, k) for k in range(100, 110)]
        assert (weights[-1] < 1) == ("warms up" in name)
        tapes = engine.program.draw(generator, weights)
        kinds = [what.kind for what in engine.program.noise]
        tapes = [tape for tape, kind in zip(tapes, kinds, strict=True) if kind != "weight"]
        optimiser = torch.optim.Adam(parameters, lr=0.01)
        for k, rate in enumerate(rates):
            optimiser.zero_grad()
            with TrainingMode(pair), program._Tape([tape[k] for tape in tapes]):
                loss, elbo = training.objective(pair, 2, pair.data, 100 + k)
                loss.backward()
            assert elbos[k] == pytest.approx(float(elbo), rel=1e-5)
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
    tol = 1e-4 if any(p.dtype == torch.float32 for p in parameters) else 1e-9
    for p, end in zip(parameters, ends, strict=True):
        torch.testing.assert_close(p.detach(), end, rtol=tol, atol=tol)
    assert path.shape == (5, sum(p.numel() for p in parameters))
    torch.testing.assert_close(path[-1], torch.cat([end.flatten() for end in ends]))


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_a_record_that_is_not_what_the_pair_does_is_noticed(dtype, off):
    engine, _, pair = engine_of(mean_of, ROWS.to(dtype), "mean_field")
    wrong = [c + off if c.is_floating_point() else c for c in engine.program.constants]
    spoilt = replace(engine.program, constants=tuple(wrong))
    with pair.entered(0):
        optimiser = torch.optim.Adam([*pair.parameters().values()], lr=0.01)
        trial = steps.Compiled(pair, optimiser, spoilt, Batches(pair.data), 0, 2)
        with pytest.raises(program.UntraceableError, match="differs by"):
            program.verify(pair, spoilt, trial.slope, 2, [pair.data])


class Straight(torch.autograd.Function):
    """Rounded, with the slope of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def with_own_slope(x):
    loc = Straight.apply(pyro.sample("loc", dist.Normal(0.0, 10.0)))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[:, 0])


def that_looks(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    if float(loc.mean()) > 0:
        loc = loc * 1.0
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[:, 0])


def with_chance(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0)) + 1e-3 * random.random()
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[:, 0])


def gamma_guide(x):
    pyro.sample("loc", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))
    shape = pyro.param("b", torch.tensor(2.0), constraint=constraints.positive)
    pyro.sample("scale", dist.Gamma(shape, 1.0))


@pytest.mark.parametrize(
    ("model", "guide", "why"),
    [
        (with_own_slope, "mean_field", "autograd.Function"),
        (that_looks, "mean_field", "value out of a tracing tensor"),
        (with_chance, "mean_field", "does not do the same twice"),
        (mean_of, gamma_guide, "standard_gamma"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_written_down_is_run_as_it_is(model, guide, why):
    engine, stepper, _ = engine_of(model, ROWS, guide)
    assert isinstance(stepper, steps.Eager)
    assert why in engine.why
    assert str(engine).startswith("eager: ")
    with pytest.raises(ValueError, match='backend: "xla" cannot run this pair: '):
        engine_of(model, ROWS, guide, "xla")


def test_without_jax_the_record_takes_the_steps(monkeypatch):
    monkeypatch.setattr("latentlab.inference.xla.has_jax", lambda: False)
    how = BRIEF | {"max_steps": 2000, "method": "stages"}
    posterior = ll.fit(mean_of, ROWS, "mean_field", backend="auto", **how)
    assert posterior.backend == "traced: JAX is not installed: pip install 'latentlab[xla]'"


def test_without_a_lowering_it_is_one_rung_down(monkeypatch):
    from latentlab.inference import xla

    table = {name: f for name, f in xla.lowerings().items() if name != "mul.Tensor"}
    monkeypatch.setattr(xla, "lowerings", lambda: table)
    monkeypatch.setattr(xla, "_compilations", {})
    engine, stepper, _ = engine_of(mean_of, ROWS, "mean_field")
    assert str(engine) == "traced: the operation aten.mul.Tensor has no lowering"
    assert isinstance(stepper, steps.Traced)
    with pytest.raises(ValueError, match="mul.Tensor has no lowering"):
        engine_of(mean_of, ROWS, "mean_field", "xla")


def test_a_record_without_slopes_is_not_run(monkeypatch):
    """Both rungs are compared with the pair: a record that is wrong is one that is not taken."""
    from latentlab.inference import traced

    real = traced.differentiated

    def wrong(*args):
        graph = real(*args)
        return lambda *tensors: tuple(2 * x for x in graph(*tensors))

    monkeypatch.setattr(steps, "differentiated", wrong)
    monkeypatch.setattr("latentlab.inference.xla.has_jax", lambda: False)
    engine, stepper, _ = engine_of(mean_of, ROWS, "mean_field")
    assert isinstance(stepper, steps.Eager)
    assert "JAX is not installed" in engine.why
    assert "differs by" in engine.why


def test_few_steps_are_not_worth_a_compilation():
    how = BRIEF | {"max_steps": 50}
    posterior = ll.fit(mean_of, ROWS, "mean_field", backend="auto", **how)
    assert posterior.backend == "eager: a compilation is not worth 50 steps"
    assert ll.fit(mean_of, ROWS, "mean_field", backend="xla", **how).backend == "xla"


def test_the_backend_is_asked_for_by_name():
    with pytest.raises(
        ValueError, match='backend: expected one of "auto", "eager", "traced", "xla"'
    ):
        ll.fit(mean_of, ROWS, backend="numpyro", **BRIEF)


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_all_backends_find_the_same_posterior(guide):
    backends = ("eager", "traced", "xla")
    fits = {b: ll.fit(mean_of, ROWS, guide, seed=0, backend=b, **BRIEF) for b in backends}
    assert {b: p.backend for b, p in fits.items()} == {b: b for b in backends}
    one, *others = (p.sample(4000) for p in fits.values())
    for other in others:
        for site in ("loc", "scale"):
            sd = one[site].std()
            assert abs(one[site].mean() - other[site].mean()) < 0.15 * sd
            assert abs((other[site].std() / sd).log()) < 0.15


def test_mini_batches_are_taken_where_the_data_are():
    how = {"batch_size": 10, "seed": 0, **BRIEF}
    fits = [
        ll.fit(logistic, (ROWS, LABELS), "full_rank", backend=b, **how) for b in ("eager", "xla")
    ]
    assert fits[1].backend == "xla"
    means = [p.sample(4000)["weights"].mean(0) for p in fits]
    sd = fits[0].sample(4000)["weights"].std(0)
    assert ((means[0] - means[1]).abs() < 0.3 * sd).all()


def test_the_same_seed_gives_the_same_bytes_and_the_file_says_how(tmp_path):
    fits = [ll.fit(mean_of, ROWS, "mean_field", seed=s, **BY_XLA) for s in (3, 3, 4)]
    states = [torch.cat([v.flatten() for v in p.params.values()]) for p in fits]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    fits[0].save(tmp_path)
    assert ll.load(tmp_path, model=mean_of).backend == "xla"


def test_nothing_of_jax_and_torch_is_changed():
    before = jax.config.jax_enable_x64, torch.get_num_threads(), torch.get_default_dtype()
    state, other = torch.get_rng_state(), np.random.get_state()[1].copy()
    ll.fit(mean_of, ROWS, "mean_field", **BY_XLA)
    after = jax.config.jax_enable_x64, torch.get_num_threads(), torch.get_default_dtype()
    assert after == before
    assert torch.equal(state, torch.get_rng_state())
    assert (np.random.get_state()[1] == other).all()


def test_a_pair_that_changes_after_it_was_written_down_is_noticed():
    held = SimpleNamespace(scale=1.0)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, held.scale), obs=x[:, 0])

    engine, _, pair = engine_of(model, ROWS, "mean_field")
    mode = TrainingMode(pair)
    with pair.entered(0):
        assert engine.still_holds(Batches(pair.data), mode, 0)
        held.scale = 2.0
        assert not engine.still_holds(Batches(pair.data), mode, 0)
    assert str(engine).startswith("eager: at the end of a climb by XLA its loss differs by")


@pytest.mark.slow
def test_an_amortised_guide_takes_mini_batches_too():
    def local(x, size=None):
        with ll.rows(x, size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    guide = ll.guides.Amortised(hidden_dims=(4,), seed=0)
    posterior = ll.fit(local, ROWS, guide, batch_size=10, **BRIEF | {"backend": "auto"})
    found = posterior.sample(200)["z"].mean(0)
    again = ll.fit(local, ROWS, guide, batch_size=10, **BY_XLA)
    assert torch.corrcoef(torch.stack([found, again.sample(200)["z"].mean(0)]))[0, 1] > 0.98


class Remembers(torch.nn.Module):
    """A model that keeps what it computed of its latent, as a cache would."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        self.seen.append(2 * loc)
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[:, 0])


def test_what_a_model_remembers_is_no_tensor_of_the_record():
    engine, _, pair = engine_of(Remembers(), ROWS, "full_rank")
    assert str(engine) == "xla"
    assert pair.model.seen
    for tensor in pair.model.seen:
        assert not torch._is_functional_tensor(tensor)
        assert tensor.isfinite().all()


@pytest.mark.slow
def test_another_process_finds_what_was_compiled(tmp_path):
    code = (
        "import torch, latentlab as ll; x = torch.arange(40.0).reshape(20, 2).double();"
        "ll.fit(ll.GaussianMixture(2, 1), x, num_restarts=1, max_steps=100, backend='xla')"
    )
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    kept = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | settings)
        kept.append(sorted(path.name for path in tmp_path.glob("*-cache")))
    assert kept[0]
    assert kept[1] == kept[0]
