"""A fit that is killed at any moment goes on to the bytes of one that was not."""

import errno
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import latentlab as ll
from latentlab.diagnostics import Estimate
from latentlab.inference import climbs, guards, journal, manifest, networks, stages, steps
from latentlab.inference.checkpoint import numbers_of
from latentlab.inference.journal import Journal, Part, opened

pytestmark = pytest.mark.filterwarnings("ignore:the fit did not converge")

X = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PLANE = torch.randn(48, 2, generator=torch.Generator().manual_seed(1))


def skewed(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.StudentT(3.0, loc, scale), obs=x)


def local(x=None, size=None):
    """Latents of its own for each row, which only its batches move."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def counted(x=None, size=None):
    k = pyro.sample("k", dist.Poisson(3.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def guessed(x=None, size=None):
    """A guide that draws without a reparameterised gradient."""
    rate = pyro.param("rate", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("k", dist.Poisson(rate))


class Normalised(nn.Module):
    """A pair with batch normalisation, whose running means and counts move."""

    def __init__(self, momentum=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, momentum=momentum))
            self.head, self.decoder = nn.Linear(4, 2), nn.Linear(1, 2)

    def model(self, x=None, size=None):
        pyro.module("decoder", self.decoder)
        with ll.rows(x, size) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(len(rows), 1), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x=None, size=None):
        pyro.module("encoder", self.encoder)
        pyro.module("head", self.head)
        with ll.rows(x, size):
            loc, log_scale = self.head(self.encoder(x)).split(1, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def vae():
    model = ll.VariationalAutoencoder(latent_dim=1, num_features=2, hidden_dims=(3,))
    return model, PLANE, "auto"


def normalised():
    pair = Normalised()
    return pair.model, PLANE, pair.guide


QUICK = {
    **{"progress": False, "backend": "eager", "num_restarts": 1, "max_steps": 130},
    "method": "stages",
}
FITS = {
    "mean-field": (lambda: (skewed, X, "mean_field"), {"num_restarts": 2}),
    "batches": (lambda: (skewed, X, "full_rank"), {"batch_size": 10}),
    "latents of rows": (lambda: (local, X, "mean_field"), {"batch_size": 20}),
    "ladder": (lambda: (skewed, X, "auto"), {"max_steps": 90}),
    "fixed draws": (lambda: (skewed, X, "mean_field"), {"method": "auto", "max_steps": 2000}),
    "flow": (lambda: (skewed, X, "flow"), {"max_steps": 60}),
    "weights": (lambda: (skewed, X, "mean_field"), {"objective": ll.objectives.IWAE(2)}),
    "kept aside": (vae, {"batch_size": 16, "held_out": 0.2}),
    "rates": (vae, {"max_steps": 280}),
    "traced": (lambda: (skewed, X, "mean_field"), {"backend": "traced"}),
    "score function": (lambda: (counted, X + 2, guessed), {"num_particles": 1}),
    "natural": (
        lambda: (ll.GaussianMixture(2, 2, prior="flat"), PLANE, "auto"),
        {"method": "natural", "num_restarts": 2},
    ),
    "batch norm": (normalised, {"batch_size": 12, "lr": 0.01, "num_restarts": 2}),
}
QUICKEST = ("mean-field", "latents of rows", "ladder", "rates", "batch norm", "score function")
EVERY = [pytest.param(c, marks=() if c in QUICKEST else pytest.mark.slow) for c in FITS]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of ours catches it."""


@pytest.fixture(scope="module", autouse=True)
def short():
    """Stages of few steps, each with points on its way; the middle of a fit comes soon."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


def shorten(monkeypatch):
    monkeypatch.setattr(climbs, "_WARM_UP", 40)
    monkeypatch.setattr(stages, "_CHECK_EVERY", 10)
    monkeypatch.setattr(stages, "_STAGE_STEPS", (30, 60))
    monkeypatch.setattr(stages, "_EPOCHS", (5, 10))
    monkeypatch.setattr(networks, "_STAGE", (20, 40))
    monkeypatch.setattr(networks, "_TRIED", 0.5)
    monkeypatch.setattr(journal, "_POINT_EVERY", 0.0)
    monkeypatch.setattr(journal, "_POINT_COST", 0)


def run(case, **changes):
    pair, settings = FITS[case]
    model, x, guide = pair()
    return ll.fit(model, x, guide, **{**QUICK, **settings, **changes})


def content(posterior):
    """All that a fit says, to the byte."""
    numbers = {k: v.detach().numpy().tobytes() for k, v in numbers_of(posterior.pair).items()}
    told = ("elbo", "stage_starts", "stage_elbos", "converged", "stop_reason", "restarts")
    more = ("method", "backend", "ladder", "held_out_rows", "notes", "fitted_to")
    words = {name: repr(getattr(posterior, name)) for name in (*told, *more)}
    return {**numbers, **words, "losses": posterior.losses.numpy().tobytes()}


@functools.cache
def expected(case):
    """What a fit says that was not killed, and keeps nothing."""
    return content(run(case))


def kill_while_writing(monkeypatch, generator, most):
    """Let each process live for a few writes, then kill it right after one or before it."""
    write, left = journal.write_atomically, []

    def write_or_die(file, what):
        if not left:
            left.append(int(torch.randint(1, most, (), generator=generator)))
        left[0] -= 1
        if left[0] > 0:
            return write(file, what)
        left.clear()
        if torch.rand((), generator=generator) < 0.5:
            write(file, what)
        raise Killed

    monkeypatch.setattr(journal, "write_atomically", write_or_die)


def until_done(fit, most=200):
    kills = 0
    while True:
        try:
            return fit(), kills
        except Killed:
            kills += 1
            assert kills < most


@pytest.mark.parametrize("case", EVERY)
def test_a_killed_fit_ends_at_the_bytes_of_one_that_was_not(case, monkeypatch, tmp_path):
    # Climbs without stages keep few parts.
    least, most = (1, 3) if case in ("natural", "fixed draws") else (2, 16)
    kill_while_writing(monkeypatch, torch.Generator().manual_seed(1), most)
    posterior, kills = until_done(lambda: run(case, checkpoint=tmp_path))
    assert kills >= least
    assert content(posterior) == expected(case)


def live_steps(monkeypatch, kill_at=None, kind=steps.Eager):
    """Count the steps that are taken, and die before one of them."""
    take, taken = kind.take, []

    def count(self, first, rates, attempt):
        if len(taken) == kill_at:
            raise Killed
        taken.append(first)
        return take(self, first, rates, attempt)

    monkeypatch.setattr(kind, "take", count)
    return taken


def run_out_once(monkeypatch, kind, at):
    """Have memory run out once, in a step from one on."""
    take, times = kind.take, []

    def take_or_run_out(self, first, *args):
        if first >= at and not times:
            times.append(first)
            raise MemoryError
        return take(self, first, *args)

    monkeypatch.setattr(kind, "take", take_or_run_out)


HALF = [
    pytest.param("mean-field", "eager", 45, 64),  # goes on from a point
    pytest.param("mean-field", "eager", 45, 115),  # from the stages after it
    pytest.param("rates", "eager", 90, 115),
    pytest.param("rates", "eager", 90, 270, marks=pytest.mark.slow),
    pytest.param("mean-field", "xla", 40, 3, marks=pytest.mark.slow),
    pytest.param("rates", "xla", 90, 7, marks=pytest.mark.slow),
    pytest.param("rates", "xla", 90, 10, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "backend", "at", "kill_at"), HALF)
def test_memory_that_ran_out_is_remembered(case, backend, at, kill_at, monkeypatch, tmp_path):
    """The memory of the machine that goes on would do for all particles."""
    if backend == "xla":
        pytest.importorskip("jax")
    kind = {"eager": steps.Eager, "xla": steps.Compiled}[backend]
    how = {"num_particles": 4, "num_restarts": 1, "backend": backend}
    with monkeypatch.context() as patch:
        run_out_once(patch, kind, at)
        first = content(run(case, **how))
    assert "num_particles=2 in the place of 4" in first["notes"]
    with monkeypatch.context() as patch:
        run_out_once(patch, kind, at)
        live_steps(patch, kill_at, kind)
        with pytest.raises(Killed):
            run(case, checkpoint=tmp_path, **how)
    assert content(run(case, checkpoint=tmp_path, **how)) == first
    assert content(run(case, checkpoint=tmp_path, **how)) == first


@pytest.mark.parametrize(
    ("case", "kill_at"), [("mean-field", 64), ("mean-field", 105), ("rates", 108)]
)
def test_a_resumed_fit_knows_the_gradients_before_it(case, kill_at, monkeypatch, tmp_path):
    """Far above all before it: those of the process that was killed count."""
    accepts, seen = guards.Gauge.accepts, []

    def spied(self, *args, **kwargs):
        seen.append(self.seen)
        return accepts(self, *args, **kwargs)

    monkeypatch.setattr(guards.Gauge, "accepts", spied)
    with monkeypatch.context() as patch:
        live_steps(patch, kill_at)
        with pytest.raises(Killed):
            run(case, checkpoint=tmp_path, num_restarts=1)
    before = [*seen]
    seen.clear()
    taken = live_steps(monkeypatch)
    run(case, checkpoint=tmp_path, num_restarts=1)
    assert seen[0] == before[taken[0]] > 0


@pytest.mark.parametrize("case", ["mean-field", "rates"])
def test_a_killed_fit_repeats_few_steps(case, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        taken = live_steps(patch, kill_at=105)
        with pytest.raises(Killed):
            run(case, checkpoint=tmp_path)
    more = live_steps(monkeypatch)
    content(run(case, checkpoint=tmp_path))
    assert taken[-1] - 9 <= more[0] <= taken[-1] + 1
    assert more.count(more[0]) == 1


def test_without_points_a_killed_fit_repeats_one_stage(monkeypatch, tmp_path):
    monkeypatch.setattr(journal, "_POINT_EVERY", 1e6)
    with monkeypatch.context() as patch:
        live_steps(patch, kill_at=105)
        with pytest.raises(Killed):
            run("mean-field", checkpoint=tmp_path)
    assert not (tmp_path / "point.safetensors").exists()
    taken = live_steps(monkeypatch)
    posterior = run("mean-field", checkpoint=tmp_path)
    assert taken[0] in posterior.stage_starts
    assert content(posterior) == expected("mean-field")


@pytest.mark.parametrize("case", ["mean-field", "rates"])
def test_a_finished_fit_takes_no_step_again(case, monkeypatch, finished):
    folder = finished(case)
    assert not list(folder.glob("point*"))
    taken = live_steps(monkeypatch)
    before, random_state = sorted(os.listdir(folder)), torch.get_rng_state()
    posterior = run(case, checkpoint=str(folder))
    assert content(posterior) == expected(case)
    assert taken == []
    assert sorted(os.listdir(folder)) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert posterior.pair.journal.folder is None  # nothing of it is left


def test_an_interrupted_fit_goes_on(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "Killed", KeyboardInterrupt)
        live_steps(patch, kill_at=105)
        assert run("mean-field", checkpoint=tmp_path).stop_reason == "interrupted"
    assert content(run("mean-field", checkpoint=tmp_path)) == expected("mean-field")


@pytest.mark.slow
def test_a_stage_that_diverged_diverges_again(monkeypatch, tmp_path):
    """A failure is taken back in the resumed fit as it was in the first."""

    def cliff(x=None, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        pyro.factor("wall", torch.where(loc > 1.2, -torch.inf, 0.0))
        with ll.rows(x, size):
            return pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def fit(**changes):
        return ll.fit(cliff, X + 0.6, "mean_field", lr=0.3, **QUICK, **changes)

    try:
        first = content(fit())
    except ll.FitDivergedError as error:
        first = str(error)
    kill_while_writing(monkeypatch, torch.Generator().manual_seed(2), most=8)
    try:
        found = content(until_done(lambda: fit(checkpoint=tmp_path))[0])
    except ll.FitDivergedError as error:
        found = str(error)
    assert found == first


# ---- damaged files ------------------------------------------------------------------------------


def truncate(file):
    file.write_bytes(file.read_bytes()[:-9])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def remove(file):
    file.unlink()


def parts(folder):
    return sorted(folder.glob("0*.safetensors"))


@pytest.fixture(scope="module")
def masters(tmp_path_factory):
    """Folders of finished fits."""

    @functools.cache
    def make(case):
        folder = tmp_path_factory.mktemp("finished")
        assert content(run(case, checkpoint=folder)) == expected(case)
        return folder

    return make


@pytest.fixture
def finished(masters, tmp_path):
    """A folder of a finished fit, to be damaged."""
    return lambda case: Path(shutil.copytree(masters(case), tmp_path / "copy"))


@pytest.mark.parametrize("case", ["mean-field", "rates"])
@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_newest_file_falls_back_to_the_one_before(case, damage, finished):
    folder = finished(case)
    for file in parts(folder)[-3:]:  # as if the fit had ended there
        file.unlink()
    damage(parts(folder)[-1])
    with pytest.warns(RuntimeWarning, match="is damaged.*goes on from before it"):
        assert content(run(case, checkpoint=folder)) == expected(case)


@pytest.mark.parametrize("case", ["mean-field", "rates"])
@pytest.mark.parametrize("damage", [flip, remove])
def test_an_older_file_that_is_damaged_costs_time_only(case, damage, finished):
    folder = finished(case)
    damage(parts(folder)[-11])
    with pytest.warns(RuntimeWarning, match="is damaged or not in its place"):
        assert content(run(case, checkpoint=folder)) == expected(case)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_point_falls_back_to_the_one_before(damage, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        live_steps(patch, kill_at=39)  # the first warm-up takes 40
        with pytest.raises(Killed):
            run("mean-field", checkpoint=tmp_path)
    damage(tmp_path / "point.safetensors")
    taken = live_steps(monkeypatch)
    with pytest.warns(RuntimeWarning, match="point.safetensors is damaged"):
        posterior = run("mean-field", checkpoint=tmp_path)
    assert taken[0] == 20  # the newest was after 30
    assert content(posterior) == expected("mean-field")


def test_files_of_others_stay(tmp_path):
    theirs = [".bashrc.0123abcd", "00001-mine.safetensors", "notes.txt"]
    for name in theirs:
        (tmp_path / name).write_text("mine")
    left = tmp_path / f".00000-{'0' * 32}.safetensors.0123abcd"
    left.write_text("half of a part")
    run("mean-field", checkpoint=tmp_path, max_steps=5)
    assert [(tmp_path / name).read_text() for name in theirs] == ["mine"] * 3
    assert not left.exists()


def test_moments_are_kept_of_the_newest_stages_only(masters):
    kept = [journal.unpacked(file.read_bytes())[0] for file in parts(masters("rates"))]
    chain = [tensors for tensors in kept if any(k.startswith("average.") for k in tensors)]
    full = [any(k.startswith("passing.") for k in tensors) for tensors in chain]
    assert len(chain) > 6
    assert full == [False] * (len(chain) - 2) + [True] * 2


# ---- another fit --------------------------------------------------------------------------------


def model_of(sd=10.0, extra=0.0):
    def model(x=None, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, sd))
        with ll.rows(x, size):
            return pyro.sample("x", dist.Normal(loc + extra, 1.0), obs=x)

    return model


def shorter(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


BASE = {
    **{"num_restarts": 1, "max_steps": 8, "progress": False, "backend": "eager"},
    "method": "stages",
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    ll.fit(model_of(), X, "mean_field", checkpoint=folder, **BASE)
    return folder


@pytest.mark.parametrize(
    ("changes", "old", "new"),
    [
        ({"seed": 1}, "seed=0", "seed=1"),
        ({"batch_size": 5}, "batch_size=None", "batch_size=5"),
        ({"num_restarts": 2}, "num_restarts=1", "num_restarts=2"),
        ({"num_particles": 2}, "num_particles=None", "num_particles=2"),
        ({"max_steps": 9}, "max_steps=8", "max_steps=9"),
        ({"lr": 0.01}, "lr=None", "lr=0.01"),
        ({"tol": 0.1}, "tol=0.03", "tol=0.1"),
        ({"method": "auto"}, "method='stages'", "method='auto'"),
        ({"backend": "auto"}, "backend='eager'", "backend='auto'"),
        ({"objective": ll.objectives.IWAE(2)}, r"objective=ELBO\(\)", r"objective=IWAE\("),
        ({"guide": "full_rank"}, "guide='mean_field' .*", "guide='full_rank'"),
        ({"model": model_of(sd=11.0)}, "model=model_of.<locals>.model", "model=model_of"),
        ({"model": model_of(extra=1.0)}, "model=model_of.<locals>.model", "model=model_of"),
        ({"model": shorter}, "model=model_of.<locals>.model", "model=shorter"),
        ({"data": X + 1e-9}, "data=", "data="),
        ({"held_out": 0.1}, "held_out=None", "held_out=0.1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_fit_is_refused_by_what_differs(begun, changes, old, new):
    given = {"model": model_of(), "data": X, "guide": "mean_field", **BASE, **changes}
    files = sorted(os.listdir(begun))
    pattern = f"checkpoint: {begun} was begun with .*{old}.*, and this call has .*{new}"
    with pytest.raises(ValueError, match=pattern) as error:
        ll.fit(checkpoint=begun, **given)
    assert str(error.value).endswith("; give the same, or another folder")
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(begun)) == files


def test_what_is_no_setting_may_differ(begun):
    ll.fit(model_of(), X.clone(), "mean_field", checkpoint=begun, **{**BASE, "progress": None})


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("torch.get_num_threads", "threads="),
        ("latentlab.inference.manifest.version", "torch=.*jax="),
    ],
)
def test_another_machine_is_refused_by_what_differs(begun, monkeypatch, place, says):
    """JAX that is gone would be found out by its steps, and they by their bytes."""
    monkeypatch.setattr(place, lambda *_: "77")
    with pytest.raises(ValueError, match=f"begun with .*{says}.*this call has .*{says}.*77"):
        ll.fit(model_of(), X, "mean_field", checkpoint=begun, **BASE)


def test_other_first_weights_are_refused(tmp_path):
    def fit(seed):
        pair = Normalised(momentum=0.1)
        nn.init.constant_(pair.decoder.weight, seed)
        how = {**BASE, "checkpoint": tmp_path}
        return ll.fit(pair.model, PLANE, pair.guide, **how)

    fit(0)
    fit(0)
    with pytest.raises(ValueError, match="begun with parameters=[0-9a-f]{12}, and this call"):
        fit(1)


def test_another_device_is_refused(begun, tmp_path):
    kept = json.loads((begun / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**kept, "device": "cuda:0"}))
    with pytest.raises(ValueError, match="begun with device=cuda:0, and this call has device=cpu"):
        ll.fit(model_of(), X, "mean_field", checkpoint=tmp_path, **BASE)


def test_a_damaged_manifest_is_named(begun, tmp_path):
    (tmp_path / "manifest.json").write_text((begun / "manifest.json").read_text()[:-3])
    with pytest.raises(ValueError, match=f"{tmp_path / 'manifest.json'} is damaged"):
        ll.fit(model_of(), X, "mean_field", checkpoint=tmp_path, **BASE)


# ---- what a function does -----------------------------------------------------------------------


def function(text, **names):
    space = dict(names)
    exec(textwrap.dedent(text), space)
    return space["f"]


SAME = "def f(x):\n    return helper(x) + 1\n"
HELP = "def f(x):\n    return 2 * x\n"


def test_a_function_is_told_by_what_it_does():
    helper = function(HELP)
    own = manifest.source_of(function(SAME, helper=helper))
    again = function("\n\n\n" + SAME, helper=function(HELP), unused=3)
    assert manifest.source_of(again) == own
    others = [
        function(SAME.replace("1", "2"), helper=helper),
        function(SAME, helper=function(HELP.replace("2", "3"))),
        function(SAME, helper=function(HELP.replace("*", "-"))),
        function(SAME.replace("(x):", "(x, y=1):"), helper=helper),
        function(SAME.replace("helper(x)", "helper"), helper=torch.ones(2)),
        function(SAME.replace("helper(x)", "helper"), helper=torch.zeros(2)),
        function(SAME.replace("helper(x)", "helper"), helper=torch.ones(2).numpy()),
        function(SAME.replace("helper(x)", "helper"), helper={"a": [1, (2.0, None)]}),
        function(SAME.replace("helper(x)", "helper"), helper={"a": [1, (2.5, None)]}),
        function(SAME.replace("helper(x)", "helper.pi"), helper=__import__("math")),
        function(SAME, helper=Normalised().forward),
        function(SAME, helper=dist.Normal(0.0, 1.0)),
        function(SAME, helper=dist.Normal(0.0, 2.0)),
    ]
    told = [own, *map(manifest.source_of, others)]
    assert len({*told}) == len(told)


def test_what_a_process_is_about_is_not_what_a_function_does():
    """Loggers, and the order of sets, which every process draws anew, tell nothing."""
    told = set()
    for names in ({0, 8}, {8, 0}):  # in either order
        log = logging.getLogger("latentlab.tests")
        logging.getLogger(f"latentlab.tests.{[*names][0]}")
        f = function("def f(x):\n    log.info(x)\n    return x in names", log=log, names=names)
        told.add(manifest.source_of(f))
    assert [*{0, 8}] != [*{8, 0}]
    assert len(told) == 1


# ---- the folder ---------------------------------------------------------------------------------


def test_a_folder_is_for_one_fit_at_a_time(begun):
    with opened(begun), pytest.raises(BlockingIOError, match=f"{begun} is in use by another fit"):
        ll.fit(model_of(), X, "mean_field", checkpoint=begun, **BASE)
    ll.fit(model_of(), X, "mean_field", checkpoint=begun, **BASE)


def test_a_place_that_cannot_be_written_to_is_named_before_any_work(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for place in (tmp_path / "taken", tmp_path / "taken" / "deeper", Path("/proc/nowhere")):
        with pytest.raises(OSError, match=f"{place}: cannot be written"):
            ll.fit(None, None, checkpoint=place)
    with pytest.raises(TypeError, match="checkpoint: expected a folder, got 3"):
        ll.fit(model_of(), X, checkpoint=3)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_to_be_read_only_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=f"{tmp_path}: cannot be written"):
        ll.fit(None, None, checkpoint=tmp_path)


@pytest.mark.parametrize("case", ["mean-field", "rates"])
def test_a_disk_that_fills_up_is_told_of_once(case, monkeypatch, tmp_path):
    write, count = journal.write_atomically, []

    def fill(file, what):
        count.append(file)
        if len(count) <= 6:
            return write(file, what)
        full = OSError(errno.ENOSPC, "No space left on device")
        raise OSError(f"{file}: no") from full

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        patch.setattr(journal, "write_atomically", fill)
        assert content(run(case, checkpoint=tmp_path)) == expected(case)
    told = [str(w.message) for w in told if w.category is RuntimeWarning]
    assert len(told) == 1
    assert len(count) == 7
    assert "cannot be written (No space left on device); the fit goes on" in told[0]
    assert content(run(case, checkpoint=tmp_path)) == expected(case)


# ---- a journal by itself ------------------------------------------------------------------------


def test_a_part_is_computed_once(tmp_path):
    runs = []

    def compute():
        runs.append(torch.rand(()))
        return Part({"a": torch.arange(3)}, {"b": [1, float("inf")]})

    for _ in range(2):
        kept = Journal(tmp_path)
        torch.manual_seed(0)
        part = kept.remember(kept.name("part", 1, {"x": torch.ones(2)}), compute)
        assert torch.equal(part.tensors["a"], torch.arange(3))
        assert part.facts == {"b": [1, float("inf")]}
        after = torch.rand(())
    assert len(runs) == 1
    torch.manual_seed(0)
    assert torch.rand(2)[1] == after  # as if the part had drawn


@pytest.mark.parametrize("value", [0.1, -0.0, 1e-310, float("inf"), float("nan")])
def test_an_estimate_comes_back_to_the_last_digit(tmp_path, value):
    for _ in range(2):
        kept = Journal(tmp_path)
        found = kept.estimate(kept.name("one"), lambda: Estimate(value, 1 / 3))
        assert repr(found) == repr(Estimate(value, 1 / 3))


def test_a_name_tells_all_apart_that_a_part_depends_on(tmp_path):
    kept, x = Journal(tmp_path), torch.ones(2)
    names = [
        kept.name("a", 1),
        kept.name("a", 2),
        kept.name("a", 1.0),
        kept.name("b", 1),
        kept.name("a", 1, x),
        kept.name("a", 1, x.double()),
        kept.name("a", 1, {"x": x}),
        kept.name("a", 1, {"y": x}),
        kept.name("a", 1, {"x": x + 1}),
    ]
    assert len({*names}) == len(names)
    assert kept.name("a", 1) == names[0]
    torch.rand(1)
    assert kept.name("a", 1) != names[0]
    assert Journal().name("a") == ""


# ---- a process that is killed -------------------------------------------------------------------

SCRIPT = """
import hashlib, os, random, signal, sys, time, warnings
import torch
sys.path.insert(0, "tests")
import test_journal as t
warnings.simplefilter("ignore")
t.shorten(t.pytest.MonkeyPatch())

case, backend, folder, longest, most = *sys.argv[1:4], float(sys.argv[4]), int(sys.argv[5])
def digest(**how):
    said = t.content(t.run(case, backend=backend, **how))
    return hashlib.sha256(repr(sorted(said.items())).encode()).hexdigest()

def child(work):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, work().encode())
        os._exit(0)
    os.close(write)
    return pid, read

kills = 0
while True:
    pid, read = child(lambda: digest(checkpoint=folder))
    time.sleep(random.uniform(0.0, longest if kills else longest / 20))  # some fits are short
    if kills < most:
        os.kill(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    found = os.read(read, 100).decode()
    if found:
        break
pid, read = child(digest)
sys.stdout.write(f"{kills} {found} {os.read(read, 100).decode()}")
"""


def killed_for_good(case, backend, folder, longest, most):
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, case, backend, str(folder), str(longest), str(most)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert answer.returncode == 0, answer.stderr
    kills, found, expected = answer.stdout.split()
    assert int(kills) > 0
    assert found == expected
    assert json.loads((folder / "manifest.json").read_text())["seed"] == "0"


def test_a_process_that_is_killed_goes_on(tmp_path):
    killed_for_good("mean-field", "eager", tmp_path, 1.0, 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", FITS)
def test_a_process_that_is_killed_goes_on_whatever_it_fits(case, tmp_path):
    backend = {**QUICK, **FITS[case][1]}["backend"]
    killed_for_good(case, backend, tmp_path, 3.0, 6)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mean-field", "ladder", "kept aside"])
def test_a_process_on_xla_that_is_killed_goes_on(case, tmp_path):
    pytest.importorskip("jax")
    killed_for_good(case, "xla", tmp_path, 8.0, 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mean-field", "batches", "rates"])
def test_compiled_steps_end_at_the_same_bytes(case, monkeypatch, tmp_path):
    pytest.importorskip("jax")
    first = content(run(case, backend="xla"))
    kill_while_writing(monkeypatch, torch.Generator().manual_seed(3), most=14)
    posterior, kills = until_done(lambda: run(case, backend="xla", checkpoint=tmp_path))
    assert kills > 1
    assert posterior.backend == "xla"
    assert content(posterior) == first


@pytest.mark.parametrize("content", ["[]", "{}", "null", "not json"])
def test_a_manifest_that_says_nothing_is_damaged(content, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json is damaged; choose another folder"):
        ll.fit(model_of(), X, "mean_field", checkpoint=tmp_path, **BASE)


@pytest.mark.parametrize("place", ["", " ", "a\0b"])
def test_a_folder_has_a_name(place):
    with pytest.raises(ValueError, match="checkpoint: expected a folder, got"):
        ll.fit(model_of(), X, "mean_field", checkpoint=place, **BASE)


def test_a_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ll.fit(model_of(), X, "mean_field", checkpoint="~/kept", **BASE)
    assert (tmp_path / "kept" / "manifest.json").is_file()


def test_a_part_in_the_place_of_another_is_damaged(tmp_path):
    first = ll.fit(model_of(), X, "mean_field", checkpoint=tmp_path, **BASE)
    parts = sorted(tmp_path.glob("0*.safetensors"))
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.warns(RuntimeWarning, match="is damaged or not in its place"):
        again = ll.fit(model_of(), X, "mean_field", checkpoint=tmp_path, **BASE)
    assert content(again) == content(first)
