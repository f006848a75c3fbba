"""Several processes fit what one fits: the same gradient, the same answer, the same bytes."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import latentlab as ll
from latentlab.inference.bounds import Bound
from latentlab.inference.check import prepare
from latentlab.inference.ranks import ALONE, Ranks, is_first, joined
from latentlab.inference.shards import Shard, block_of, share_out
from latentlab.inference.training import objective
from tests.two_processes import X, model, slopes_of

W = 3
MOMENTS = (torch.mean, torch.std)


def regression(x=None, y=None, size=None):
    w, b = pyro.sample("w", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    with ll.rows(x, size):
        return pyro.sample("y", dist.Normal(w * x + b, 1.0), obs=y)


def mixture(x=None, size=None):
    weights = pyro.sample("w", dist.Dirichlet(torch.ones(2, dtype=torch.float64)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Categorical(weights))
        return pyro.sample("x", dist.Normal(locs[..., z] if z.dim() < 2 else locs[z], 1.0), obs=x)


def local(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 9.0))
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        return pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def written_guide(x=None, size=None):
    """The latents of a row from the row, without noise, which would be of other rows."""
    slope = pyro.param("slope", torch.tensor(0.3, dtype=torch.float64))
    loc = pyro.sample("loc", dist.Normal(slope, 0.1))
    with ll.rows(x, size):
        pyro.sample("z", dist.Delta(slope * x + 0 * loc))


def slopes(pair, data, num_particles=1):
    """The gradient of the objective at data, with the noise of one seed."""
    parameters = [*pair.parameters().values()]
    pyro.set_rng_seed(1)
    loss, elbo = objective(pair, num_particles, data, 0)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([elbo.detach()[None], *(g.flatten() for g in gradients)])


PAIRS = {
    "global": (model, X, "full_rank"),
    "two arguments": (regression, (X, 2 * X), "mean_field"),
    "autoguide": (regression, (X, 2 * X), AutoNormal(regression)),
    "enumerated": (mixture, X, "mean_field"),
    "rows": (local, X, written_guide),
    "ready-made": (ll.GaussianMixture(num_features=1, num_components=2), X[:, None], "auto"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_the_mean_of_the_gradients_is_that_of_one_process(case):
    """101 rows, of which three processes have 33, 34 and 34."""
    pair, report = prepare(*PAIRS[case])
    assert report.ok, report
    with pair.entered(seed=0):
        whole = slopes(pair, pair.data)
        shards = [Shard(replace(pair, ranks=Ranks(r, W)), None, 0)(0) for r in range(W)]
        assert [len(s.tensors()[0]) for s in shards] == [33, 34, 34]
        mean = torch.stack([slopes(pair, shard) for shard in shards]).mean(0)
    scale = whole.abs().max()
    torch.testing.assert_close(mean / scale, whole / scale, rtol=0, atol=1e-10)


def test_amortised_rows_count_as_often_as_they_stand_for():
    pair, _ = prepare(local, X, "amortised")
    shards = [Shard(replace(pair, ranks=Ranks(r, W)), None, 0)(0) for r in range(W)]
    counted = [pair.guide._part(shard).scale * len(shard.tensors()[0]) for shard in shards]
    assert counted == pytest.approx([33 * W, 34 * W, 34 * W])


def test_mini_batches_of_a_process_are_its_rows_and_stand_for_them():
    pair, _ = prepare(model, X, "mean_field")
    seen = []
    with pair.entered(seed=0):
        whole, steps = slopes(pair, pair.data), []
        for rank in range(W):
            batch = Shard(replace(pair, ranks=Ranks(rank, W)), 6, 0)
            epoch = len(block_of(len(X), rank, W)) // 2
            rows = torch.cat([batch.rows(step) for step in range(epoch)])
            assert {*rows.tolist()} <= {*block_of(len(X), rank, W)}
            seen += rows.tolist()
            steps.append(torch.stack([slopes(pair, batch(s)) for s in range(epoch)]).mean(0))
    assert len({*seen}) == len(seen) == 100  # of 33 rows one is left out of an epoch
    torch.testing.assert_close(torch.stack(steps).mean(0), whole, rtol=0.2, atol=0.2)
    even = X[:102].repeat(2)[:102]
    pair, _ = prepare(model, even, "mean_field")
    with pair.entered(seed=0):
        whole = slopes(pair, pair.data)
        batches = [Shard(replace(pair, ranks=Ranks(r, W)), 6, 0) for r in range(W)]
        steps = torch.stack([slopes(pair, b(s)) for b in batches for s in range(17)])
    torch.testing.assert_close(steps.mean(0), whole, rtol=1e-10, atol=1e-10)


def test_blocks_are_all_rows_and_copy_none():
    for total, size in ((10, 3), (101, 7), (4, 4)):
        blocks = [block_of(total, rank, size) for rank in range(size)]
        assert [row for block in blocks for row in block] == [*range(total)]
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    pair, _ = prepare(model, X, "mean_field")
    (part,) = Shard(replace(pair, ranks=Ranks(1, 2)), None, 0)(0).tensors()
    (whole,) = pair.data.tensors()
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert torch.equal(part, X[50:])


def no_size(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def guide_without_size(x):
    pyro.sample("loc", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))
    pyro.sample("s", dist.LogNormal(0.0, 1.0))


def no_rows():
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize(
    ("pair", "why"),
    [
        ((no_size, X), r"the model must accept size=.*rows\(x, size\)"),
        ((no_rows, None), "the data have no rows; start one process"),
        ((model, X[:3]), "the data have 3 rows, fewer than two for each; start one process"),
        ((local, X), 'numbers of its own for each row; take guide="amortised"'),
        ((model, X, guide_without_size), r"the guide must accept size=\.\.\., as the model does"),
        ((model, X, "mean_field", ll.objectives.IWAE(num_samples=4)), "IWAE weighs all data in"),
    ],
)
def test_a_pair_that_cannot_be_shared_is_refused(pair, why):
    model_, data, *rest = pair
    if model_ is model and rest[:1] == [guide_without_size]:
        data = {"x": X}
    found, report = prepare(model_, data, *(rest[:1] or ["auto"]))
    assert report.ok, report
    found.bound = Bound(rest[1], None) if rest[1:] else None
    with pytest.raises(ValueError, match=f"^2 processes cannot share this fit: .*{why}"):
        share_out(found, Ranks(0, 2), None)
    share_out(found, ALONE, None)


def test_one_process_is_none_too_many(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with joined(None) as ranks:
        assert not ranks
        assert ranks.same(2.5) == 2.5
        assert is_first()
    assert not torch.distributed.is_initialized()


# ---- two of them ------------------------------------------------------------------------------


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, and the folder that they wrote to."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("two_processes.py")
    how = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    how |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ll.__file__).parents[1])}
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(script), str(folder)],
            env={**os.environ, **how, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [run.communicate(timeout=240)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"found_{rank}.pt") for rank in range(2)], folder


def test_a_step_of_two_processes_is_that_of_one(two):
    (first, second), _ = two
    pair, _ = prepare(model, X, "full_rank")
    with pair.entered(seed=0):
        alone = slopes_of(pair, pair.data)
    assert torch.equal(first["step"], second["step"])
    torch.testing.assert_close(first["step"], alone, rtol=1e-10, atol=1e-10)


def test_what_one_process_finds_bad_is_bad_for_both(two):
    assert all(found["failed"].isnan() for found in two[0])


def test_an_evaluation_looks_at_the_rows_of_all(two):
    (first, second), _ = two
    pair, _ = prepare(model, X, "full_rank")
    with pair.entered(seed=0), torch.no_grad():
        pyro.set_rng_seed(4)
        draws = pair.guide.draw(64)
        values = {name: value.reshape(64, 1) for name, value in draws.values.items()}
        log_p = dist.Normal(0.0, 9.0).log_prob(values["loc"]) + dist.HalfNormal(2.0).log_prob(
            values["s"]
        )
        log_p = log_p[:, 0] + dist.Normal(values["loc"], values["s"]).log_prob(X).sum(1)
    expected = (log_p - draws.log_q).mean().item()
    assert first["elbo"].item() == second["elbo"].item() == pytest.approx(expected, rel=1e-6)


def test_processes_that_came_apart_are_brought_together_and_it_is_told(two):
    (first, second), _ = two
    assert torch.equal(first["aligned"], second["aligned"])
    assert first["differed"]
    assert second["differed"]
    assert "first was taken" in " ".join(Ranks(0, 2, differed=True).notes())


def test_what_is_of_other_rows_or_noise_by_design_is_averaged(two):
    """Running means of batches, and of the draws of a guide without a gradient."""
    for found in two[0]:
        assert found["means"].tolist() == [0.5, 0.5]
        assert not found["differed for means"]
        assert "less a baseline" in found["scored.notes"]
        assert "different kinds" not in found["scored.notes"]
    assert torch.equal(two[0][0]["scored"], two[0][1]["scored"])


def test_a_checkpoint_is_refused_before_any_folder_is_made(two):
    (first, second), folder = two
    assert first["refusal"] == second["refusal"]
    assert first["refusal"].startswith("checkpoint: a fit by several processes keeps none yet;")
    assert "save the posterior when it is done" in first["refusal"]
    assert not (folder / "kept").exists()


@pytest.mark.parametrize("name", ["fit", "batches"])
def test_a_fit_of_two_processes_ends_with_the_same_bytes(two, name):
    first, second = two[0]
    assert torch.equal(first[name], second[name])
    assert torch.equal(first[f"{name}.losses"], second[f"{name}.losses"])
    assert first["backend"].startswith("eager: 2 processes")
    assert first["rows"] == second["rows"] == len(X)


def test_a_fit_of_two_processes_answers_as_one(two):
    """Within what two fits of other noise differ by: a tenth of a standard deviation."""
    how = {"max_steps": 500, "num_restarts": 1, "guide": "mean_field", "progress": False}
    alone = ll.fit(model, X, backend="eager", **how)
    sites = alone.sample(1000)
    means, sds = (
        torch.stack([f(sites[z]) for z in ("loc", "s")]) for f in (torch.mean, torch.std)
    )
    found = two[0][0]["fit.moments"].reshape(2, 2)
    assert ((found[:, 0] - means) / sds).abs().max() < 0.1
    assert (found[:, 1] / sds).log().abs().max() < 0.1
    batches = two[0][0]["batches.moments"].reshape(2, 2)
    assert ((batches[:, 0] - means) / sds).abs().max() < 0.5


def test_updates_in_closed_form_are_those_of_all_rows(two):
    """Each process has the statistics of its rows: their mean is that of all."""
    first, second = two[0]
    assert torch.equal(first["natural"], second["natural"])
    x = torch.stack([X, X + 4]).reshape(-1, 1)
    alone = ll.fit(ll.GaussianMixture(1, 2, prior="flat"), x, max_steps=400, progress=False)
    assert alone.method == "natural"
    assert first["natural.elbo"].item() == pytest.approx(alone.elbo.value, abs=0.01)


def test_the_first_process_writes_the_files(two):
    folder = two[1]
    assert (folder / "of_0" / "model.safetensors").exists()
    assert not (folder / "of_1").exists()
    assert ll.load(folder / "of_0", model=model).params


def test_no_other_process_writes_a_page(monkeypatch, tmp_path):
    posterior = ll.fit(model, X, max_steps=1, num_restarts=1, progress=False)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert not is_first()
    assert posterior.report(tmp_path / "out") == tmp_path / "out" / "report.html"
    assert posterior.save(tmp_path / "out").parent == tmp_path / "out"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_torchrun_starts_them(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        + [f"--master_port={free_port()}", str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(ll.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = [torch.load(tmp_path / f"found_{rank}.pt") for rank in range(2)]
    assert torch.equal(found[0]["fit"], found[1]["fit"])
