"""ArviZ, 0.x and 1.x alike, gets the draws with the names of their axes and columns."""

import sys
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll
from latentlab.inference.exchange import from_groups

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ announces its own refactoring
    import arviz

NEW = not arviz.__version__.startswith("0.")
QUICK = {"num_restarts": 1, "max_steps": 420, "progress": False}


def groups_of(exchanged):
    return set(exchanged.children if NEW else exchanged.groups())


@pytest.fixture(scope="module")
def mixture():
    x = ll.data.simulate.eruptions(num_rows=60)
    return ll.fit(ll.GaussianMixture(2, 3), x, **QUICK)


@pytest.fixture(scope="module")
def exchanged(mixture):
    return mixture.to_arviz(num_samples=200)


def test_draws_replicates_and_data_are_three_groups(exchanged):
    assert groups_of(exchanged) == {"posterior", "posterior_predictive", "observed_data"}
    assert type(exchanged).__name__ == ("DataTree" if NEW else "InferenceData")


def test_axes_and_columns_have_their_names(exchanged, mixture):
    draws = exchanged["posterior"]
    dims = {name: draws[name].dims for name in draws.data_vars}
    assert dims == {
        "weights": ("chain", "draw", "component"),
        "locs": ("chain", "draw", "component", "feature"),
        "scales": ("chain", "draw", "component", "feature"),
    }
    assert dict(draws.sizes) == {"chain": 1, "draw": 200, "component": 3, "feature": 2}
    assert draws["feature"].values.tolist() == list(mixture.names)
    assert draws["component"].values.tolist() == [0, 1, 2]
    observed = exchanged["observed_data"]["x"]
    assert observed.dims == ("row", "feature")
    assert exchanged["posterior_predictive"]["x"].dims == ("chain", "draw", "row", "feature")


def test_the_numbers_are_those_of_the_posterior(exchanged, mixture):
    aligned = mixture._aligned(200).draws
    for name, value in aligned.items():
        assert np.array_equal(exchanged["posterior"][name].values[0], value.numpy())
    replicates = mixture.predict(200)["x"].numpy()
    assert np.array_equal(exchanged["posterior_predictive"]["x"].values[0], replicates)
    data = mixture.pair.data.args[0].numpy()
    assert np.array_equal(exchanged["observed_data"]["x"].values, data)
    column = exchanged["observed_data"]["x"].sel(feature=mixture.names[1])
    assert np.array_equal(column.values, data[:, 1])


def test_arviz_summarises_what_it_gets(exchanged, mixture):
    frame = arviz.summary(exchanged, var_names=["locs"], round_to="none")
    mean = mixture.summary(200).query("site == 'locs'")["mean"].to_numpy()
    assert frame["mean"].to_numpy().astype(float) == pytest.approx(mean)


def test_arviz_plots_what_it_gets(exchanged):
    plot = arviz.plot_dist if NEW else arviz.plot_posterior
    assert plot(exchanged, var_names=["weights"], backend="matplotlib") is not None
    import matplotlib.pyplot as plt

    plt.close("all")


def test_a_file_of_netcdf_holds_it_all(exchanged, tmp_path):
    file = str(tmp_path / "posterior.nc")
    exchanged.to_netcdf(file)
    again = arviz.from_netcdf(file)
    assert groups_of(again) == groups_of(exchanged)
    for group in groups_of(exchanged):
        for name in exchanged[group].data_vars:
            assert np.array_equal(again[group][name].values, exchanged[group][name].values)
            assert again[group][name].dims == exchanged[group][name].dims


def test_a_table_names_its_columns_in_a_model_of_ones_own_too():
    def model(x=None, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 9.0).expand([2]).to_event(1))
        with ll.rows(x, size):
            return pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    x = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 2)))
    exchanged = ll.fit(model, ll.data.Table(x, ("größe", "mass")), **QUICK).to_arviz(20)
    assert exchanged["observed_data"]["x_dim_1"].values.tolist() == ["größe", "mass"]
    assert exchanged["posterior_predictive"]["x_dim_1"].values.tolist() == ["größe", "mass"]
    assert exchanged["posterior"]["loc"].dims == ("chain", "draw", "loc_dim_0")
    assert exchanged["posterior"]["loc_dim_0"].values.tolist() == [0, 1]


@pytest.mark.slow
def test_discrete_latents_and_numbers_without_axes_go_along(tmp_path):
    def model(x=None, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 9.0))
        with ll.rows(x, size):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=loc.dtype)))
            return pyro.sample("x", dist.Normal(loc + 4 * z, 1.0), obs=x)

    x = np.random.default_rng(0).normal(size=8)
    posterior = ll.fit(model, x, **QUICK)
    exchanged = posterior.to_arviz(30)
    assert exchanged["posterior"]["loc"].dims == ("chain", "draw")
    assert exchanged["posterior"]["z"].shape == (1, 30, 8)
    posterior.save(tmp_path)
    without_data = ll.load(tmp_path, model).to_arviz(30)
    assert groups_of(without_data) == {"posterior"}
    assert list(without_data["posterior"].data_vars) == ["loc"]


def test_replicates_of_large_data_are_fewer(mixture, monkeypatch):
    from latentlab.inference import exchange

    monkeypatch.setattr(exchange, "_PREDICTIVE_ELEMENTS", 500)
    exchanged = mixture.to_arviz(50)
    assert exchanged["posterior"].sizes["draw"] == 50
    assert exchanged["posterior_predictive"].sizes["draw"] == 500 // 120


GROUPS = {"posterior": {"z": np.zeros((1, 5, 2))}, "observed_data": {"x": np.ones(3)}}


@pytest.mark.parametrize("form", ["0.x", "1.x"])
def test_each_arviz_is_called_in_its_own_form(form, monkeypatch):
    def old(posterior=None, *, observed_data=None, coords=None, dims=None, **kwargs):
        assert not kwargs
        return {"posterior": posterior, "observed_data": observed_data}, coords, dims

    def new(data, *, sample_dims=None, coords=None, dims=None):
        return data, coords, dims

    fake = types.SimpleNamespace(from_dict={"0.x": old, "1.x": new}[form])
    monkeypatch.setitem(sys.modules, "arviz", fake)
    found = from_groups(GROUPS, {"d": [0, 1]}, {"z": ["d"]})
    assert found == (GROUPS, {"d": [0, 1]}, {"z": ["d"]})
