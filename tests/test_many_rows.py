"""Rows that are too many to be looked at all at once, or that do not fit in memory."""

import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from benchmarks import memory
from pyro.infer.autoguide import AutoNormal

import latentlab as ll
from latentlab.inference import many_rows, objectives
from latentlab.inference.arguments import as_arguments
from latentlab.inference.batches import BatchRows
from latentlab.inference.check import prepare
from latentlab.inference.checkpoint import fingerprint

N, D = 3000, 3
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
QUICK = {"num_restarts": 1, "max_steps": 700, "progress": False, "backend": "eager"}


@pytest.fixture(autouse=True)
def many(monkeypatch):
    """Three thousand rows are many."""
    monkeypatch.setattr(many_rows, "_MANY", 5000)
    monkeypatch.setattr(many_rows, "_GLANCE", 1500)
    monkeypatch.setattr(many_rows, "_PART", 2000)


def normal(x, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0).expand([D]).to_event(1))
    with ll.rows(x, size):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def labelled(x, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal((loc + z).unsqueeze(-1), 1.0).to_event(1), obs=x)


def local(x, size=None):
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)


def centred(x, size=None):
    """Of a row it says what depends on all others."""
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with ll.rows(x, size):
        pyro.sample("x", dist.Normal(loc, 1.0).expand([D]).to_event(1), obs=x - x.mean(0))


# ---- in parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [normal, labelled])
def test_parts_of_the_rows_add_up_to_what_all_say(model):
    pair, _ = prepare(model, X, "mean_field", in_batches=True)
    assert pair.in_parts
    assert pair.shapes["x"] == tuple(X.shape)
    assert pair.plates["x"][0][1] == N
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 5)
        in_parts = objectives.log_joint(pair, draws)
        pair.in_parts = False
        at_once = objectives.log_joint(pair, draws)
    torch.testing.assert_close(in_parts, at_once, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize(
    ("model", "in_batches"), [(normal, False), (local, True), (centred, True)]
)
def test_what_is_no_sum_over_rows_is_looked_at_as_a_whole(model, in_batches):
    pair, report = prepare(model, X, "mean_field", in_batches=in_batches)
    assert report.ok
    assert not pair.in_parts


def test_some_rows_stand_for_all():
    pair, _ = prepare(normal, X, "mean_field", in_batches=True)
    some = many_rows.glance(pair, seed=0)
    assert len(some.data.args[0]) == 500
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 4)
        stands = objectives.site_log_probs(some, draws)["x"]
        rows = pair.data.args[0][some.data.rows]
        expected = dist.Normal(draws.values["loc"], 1.0).log_prob(rows).sum((-1, -2)) * N / 500
    torch.testing.assert_close(stands.flatten(1).sum(-1), expected.flatten())


def test_a_fit_in_parts_meets_the_closed_form(tmp_path):
    posterior = ll.fit(normal, X, "mean_field", batch_size=300, **QUICK)
    assert posterior.pair.in_parts
    loc = posterior.sample(1000)["loc"]
    sd = N**-0.5
    assert float(((loc.mean(0) - X.mean(0)) / sd).abs().max()) < 0.5
    assert float((loc.std(0) / sd).log().abs().max()) < 0.3
    again = ll.load(posterior.save(tmp_path), model=normal, data=X)
    assert torch.equal(again.log_weights(20), posterior.log_weights(20))
    exact = dist.Normal(X.mean(0), 1.0).log_prob(X).sum()
    assert abs(posterior.log_prob(X).value - float(exact)) < 5


def test_a_fault_of_a_row_is_named_by_its_place_among_all():
    spoilt = X.abs().clone()
    spoilt[2345, 1] = -1.0

    def positive(x, size=None):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with ll.rows(x, size):
            pyro.sample("x", dist.Exponential(rate).expand([D]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"observed at \[2345"):
        ll.fit(positive, spoilt, "mean_field", batch_size=300, **QUICK)


# ---- data in a file ---------------------------------------------------------------------------


def mapped(folder, values):
    path = folder / "x.npy"
    np.save(path, values)
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_an_array_in_a_file_is_not_copied(dtype, tmp_path):
    values = np.arange(12).reshape(6, 2).astype(dtype)
    x = mapped(tmp_path, values)
    (found,) = as_arguments(x, normal).args
    assert np.shares_memory(found.numpy(), x)
    assert found.numpy().dtype == dtype
    assert fingerprint(as_arguments(x, normal)) == fingerprint(
        as_arguments(torch.from_numpy(values), normal)
    )


def test_a_tensor_in_a_file_is_not_copied(tmp_path):
    np.arange(8.0).tofile(tmp_path / "x.bin")
    x = torch.from_file(str(tmp_path / "x.bin"), shared=True, size=8, dtype=torch.float64)
    (found,) = as_arguments(x, normal).args
    assert found.data_ptr() == x.data_ptr()
    assert as_arguments(x.clone(), normal).args[0].data_ptr() != x.data_ptr()


def test_numbers_that_the_model_does_not_compute_with_are_copied(tmp_path):
    double = torch.nn.Linear(2, 2).double()
    x = mapped(tmp_path, np.ones((6, 2), np.float32))
    (found,) = as_arguments(x, double).args
    assert found.dtype == torch.float64
    big = mapped(tmp_path, np.ones((6, 2), ">f4"))
    assert as_arguments(big, normal).args[0].dtype == torch.float64


def test_what_is_no_number_is_found_in_a_file_too(tmp_path):
    values = np.zeros((50, 3))
    values[41, 2] = np.nan
    with pytest.raises(ValueError, match=r"x has 1 NaN \(first at \[41, 2\]\)"):
        as_arguments(mapped(tmp_path, values), normal)


def test_a_fit_to_a_file_is_the_fit_to_its_numbers(tmp_path):
    x = mapped(tmp_path, X.numpy())
    how = {**QUICK, "batch_size": 300, "max_steps": 420}
    one, two = (ll.fit(normal, data, "mean_field", **how) for data in (x, X))
    assert torch.equal(one.losses, two.losses)
    assert one.fitted_to == two.fitted_to
    assert np.shares_memory(one.pair.data.args[0].numpy(), x)


@pytest.mark.parametrize(
    "data",
    [
        (row for row in X),
        iter([X]),
        torch.utils.data.DataLoader(X, batch_size=10),
        (X, iter([X])),
    ],
)
def test_what_can_be_read_once_or_by_batches_only_is_refused_with_a_way_out(data):
    with pytest.raises(TypeError, match=r"again and again.* numpy.load\(path, mmap_mode="):
        ll.fit(normal, data, **QUICK)


# ---- batches ----------------------------------------------------------------------------------


def test_each_row_is_as_likely_where_the_last_batch_is_left_out():
    total, size, epochs = 7, 3, 3000
    rows = BatchRows(total, size, seed=0)
    taken = torch.cat([rows(step) for step in range(epochs * (total // size))])
    counts = torch.bincount(taken, minlength=total).double()
    assert int(counts.sum()) == epochs * 6
    share, se = 6 / 7, (6 / 7 * 1 / 7 / epochs) ** 0.5
    assert float((counts / epochs - share).abs().max()) < 5 * se
    for epoch in range(20):  # none of them twice
        assert len({*torch.cat([rows(2 * epoch), rows(2 * epoch + 1)]).tolist()}) == 6


def test_pyros_guides_of_local_latents_are_refused():
    with pytest.raises(ValueError, match="latents are local to plate 'rows', which this guide"):
        ll.fit(local, X, AutoNormal(local), batch_size=300, **QUICK)


# ---- memory -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", ["tensor", "mapped"])
def test_a_million_rows_stay_below_the_data_and_300_megabytes(case):
    assert memory.measure(case).beyond < memory.LIMIT
