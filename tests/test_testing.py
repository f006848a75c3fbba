"""Each law holds for our pairs and for users' own, and is broken by a pair made to break it."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

import latentlab as ll
from latentlab.testing import (
    LAWS,
    LawBrokenError,
    a_batch_stands_for_all_rows,
    a_loaded_posterior_is_the_saved_one,
    a_prior_draw_has_the_shape_of_the_data,
    a_seed_fixes_every_byte,
    check_laws,
    every_parameter_gets_a_gradient,
    fit_leaves_no_trace,
)

X = torch.tensor([0.3, -1.2, 0.8, 2.1, 0.4, -0.5, 1.7, 0.9], dtype=torch.float64)


def normal_model(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def normal_guide(x=None, size=None):
    loc = pyro.param("guide_loc", torch.tensor(0.5))
    scale = pyro.param("guide_scale", torch.tensor(0.4), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(loc, scale))


class NormalModel(PyroModule):
    """The location is a latent, the scale a parameter to learn."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(1.0, dtype=torch.float64), constraints.positive)

    def forward(self, x=None, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with ll.rows(x, size):
            return pyro.sample("x", dist.Normal(loc, self.scale), obs=x)


class NormalGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.center = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.spread = PyroParam(torch.tensor(0.4, dtype=torch.float64), constraints.positive)

    def forward(self, x=None, size=None):
        pyro.sample("loc", dist.Normal(self.center, self.spread))


class Autoencoder:
    """A plain object with networks, as in Pyro's tutorials; its methods are the pair."""

    def __init__(self):
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(2, 2).double(), nn.Linear(1, 2).double()

    def model(self, x=None, size=None):
        pyro.module("decoder", self.decoder)
        with ll.rows(x, size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x=None, size=None):
        pyro.module("encoder", self.encoder)
        with ll.rows(x, size):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class AutoencoderModule(Autoencoder, nn.Module):
    def __init__(self):
        nn.Module.__init__(self)
        Autoencoder.__init__(self)


def regression(features, y=None, size=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    with ll.rows(features, size):
        return pyro.sample("y", dist.Normal(slope * features, 1.0), obs=y)


def coins(x=None, size=None):
    """A label a row, which is summed out."""
    probs = pyro.sample("probs", dist.Beta(2.0, 3.0))
    with ll.rows(x, size):
        label = pyro.sample("label", dist.Bernoulli(0.4))
        return pyro.sample("x", dist.Bernoulli(torch.where(label == 1, probs, 0.5)), obs=x)


def pairs():
    eruptions = ll.data.simulate.eruptions(num_rows=20)
    mixture = ll.GaussianMixture(num_features=2, num_components=2)
    for guide in ("auto", "mean_field", "full_rank", "point"):
        yield f"mixture, {guide}", mixture, eruptions, guide
    yield "function, auto", normal_model, X, "auto"
    yield "function, guide of ours", normal_model, X, ll.guides.MeanField()
    yield "function of covariates", regression, {"features": X, "y": 2 * X + 1}, "auto"
    yield "function with labels", coins, (X > 0).double(), "mean_field"
    yield "functions", normal_model, X.float(), normal_guide
    yield "modules", NormalModel(), X, NormalGuide()
    yield "module, array", NormalModel(), X.numpy(), "full_rank"
    for autoguide in (AutoNormal, AutoMultivariateNormal):
        yield f"function, {autoguide.__name__}", normal_model, X, autoguide(normal_model)
    for vae in (Autoencoder(), AutoencoderModule()):
        yield f"methods of {type(vae).__name__}", vae.model, X.reshape(4, 2), vae.guide


PAIRS = [pytest.param(*pair, id=name) for name, *pair in pairs()]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("model", "data", "guide"), PAIRS)
def test_law_holds(law, model, data, guide):
    assert law(model, data, guide).startswith("holds")


def test_all_laws_are_checked_at_once():
    found = check_laws(normal_model, X)
    assert list(found) == [law.__name__ for law in LAWS]
    assert found["a_prior_draw_has_the_shape_of_the_data"] == "holds: shapes x (8,)"


# ---- a law that says nothing about a pair says so -------------------------------------------


def of_data_only(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize(
    ("law", "model", "data", "reason"),
    [
        (a_prior_draw_has_the_shape_of_the_data, of_data_only, X, "no argument of the model has"),
        (a_batch_stands_for_all_rows, of_data_only, X, "the model does not take size"),
        (a_batch_stands_for_all_rows, normal_model, X[:1], "the data are not two rows or more"),
        (a_batch_stands_for_all_rows, regression, (X[:4], X[0]), "the data are not two rows"),
    ],
)
def test_law_does_not_apply(law, model, data, reason):
    assert law(model, data).startswith(f"does not apply: {reason}")


# ---- each law is broken by a pair made to break it ------------------------------------------


def broken(law, match, model, data=X, guide="auto"):
    with pytest.raises(LawBrokenError, match=match):
        law(model, data, guide)


def test_a_draw_of_another_shape_is_caught():
    def model(x=None, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with ll.rows(x, size and 2 * size if x is None else size):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    match = r"site 'x' has shape \(8,\) in the data, but \(16,\) in a prior draw"
    broken(a_prior_draw_has_the_shape_of_the_data, match, model)


def test_a_model_that_cannot_do_without_data_is_caught():
    def needs_data(x=None):
        of_data_only(x)

    def keeps_its_data(x=None):
        of_data_only(X)

    law = a_prior_draw_has_the_shape_of_the_data
    broken(law, r"without data the model raises TypeError", needs_data)
    broken(law, r"site 'x' is not drawn when the model gets no data", keeps_its_data)


def test_a_batch_that_stands_for_itself_is_caught():
    def model(x=None, size=None):
        of_data_only(x)

    def guide(x=None, size=None):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 1.0))

    def local(x=None, size=None):
        with ll.rows(x, size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    law = a_batch_stands_for_all_rows
    broken(law, "the model's log-density of 8 rows is .*, but the mean over 4 batches is", model)
    broken(law, "the guide's log-density of 8 rows is", local, guide=guide)


def test_a_prior_that_is_scaled_with_the_rows_is_caught():
    def model(x=None, size=None):
        scale = size / len(x) if x is not None and size else 1.0
        with pyro.poutine.scale(scale=scale):
            loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    broken(a_batch_stands_for_all_rows, "the model's log-density of 8 rows", model)


def test_rows_that_do_not_divide_are_left_out_of_both_sides():
    eleven = torch.cat([X, X[:3]])  # five batches of two
    assert a_batch_stands_for_all_rows(normal_model, eleven).startswith("holds")
    vae, data = Autoencoder(), torch.stack([eleven, -eleven], 1)
    found = a_batch_stands_for_all_rows(vae.model, data, vae.guide)
    assert found.startswith("holds for the model and the guide")


def test_an_unused_parameter_is_caught():
    def guide(x=None, size=None):
        pyro.param("forgotten", torch.tensor(0.0))
        normal_guide(x, size)

    match = "the loss does not depend on 'forgotten'"
    broken(every_parameter_gets_a_gradient, match, normal_model, X.float(), guide)


def test_a_gradient_that_is_not_finite_is_caught():
    def guide(x=None, size=None):
        power = pyro.param("power", torch.tensor(0.0, dtype=torch.float64))
        pyro.sample("loc", dist.Normal(torch.where(power > 0, power.sqrt(), 0.0), 1.0))

    match = "that of 'power' is not finite"
    broken(every_parameter_gets_a_gradient, match, normal_model, guide=guide)


def test_a_network_that_is_not_registered_is_caught():
    vae = AutoencoderModule()

    def guide(x=None, size=None):
        with ll.rows(x, size):
            loc, log_scale = vae.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    match = "parameter 'encoder.weight' of AutoencoderModule is not optimised"
    broken(every_parameter_gets_a_gradient, match, vae.model, X.reshape(4, 2), guide)
    vae.encoder.requires_grad_(False)
    assert every_parameter_gets_a_gradient(vae.model, X.reshape(4, 2), guide).startswith("holds")


def test_a_state_that_no_file_holds_is_caught():
    class Guide(NormalGuide):
        calls = 0

        def forward(self, x=None, size=None):
            self.calls += 1
            pyro.sample("loc", dist.Normal(self.center, self.spread + 0.01 * self.calls))

    match = "a loaded posterior is the saved one: draws, weights differ"
    broken(a_loaded_posterior_is_the_saved_one, match, NormalModel(), guide=Guide())


def test_noise_from_elsewhere_is_caught():
    def guide(x=None, size=None):
        loc = pyro.param("guide_loc", torch.tensor(0.5))
        pyro.sample("loc", dist.Normal(loc + random.random(), 1.0))

    match = "parameters, draws, weights differ"
    broken(a_seed_fixes_every_byte, match, normal_model, X.float(), guide)


def test_a_pair_that_seeds_torch_itself_is_caught():
    def guide(x=None, size=None):
        torch.manual_seed(0)
        normal_guide(x, size)

    broken(a_seed_fixes_every_byte, "seeds 0 and 1 give the same", normal_model, X.float(), guide)


def test_every_trace_is_caught():
    threads, seen, data = torch.get_num_threads(), torch.zeros(1), X.clone()

    def leaves(trace):
        def model(x=None, size=None):
            trace(x)
            return normal_model(x, size)

        return model

    traces = {
        "model, data": lambda x: data.add_(1.0),
        "the number of threads": lambda x: torch.set_num_threads(threads + 1),
        "Python's random generator": lambda x: random.random(),
        "NumPy's random generator": lambda x: np.random.normal(),
        "model": lambda x: seen.add_(1.0),
        "Pyro's settings": lambda x: pyro.settings.set(cholesky_relative_jitter=8.0),
    }
    jitter = pyro.settings.get("cholesky_relative_jitter")
    try:
        for what, trace in traces.items():
            broken(fit_leaves_no_trace, f"it changed {what}$", leaves(trace), data)
    finally:
        torch.set_num_threads(threads)
        pyro.settings.set(cholesky_relative_jitter=jitter)


def test_all_broken_laws_are_named():
    def model(x=None, size=None):
        random.random()
        of_data_only(x)

    with pytest.raises(LawBrokenError) as caught:
        check_laws(model, X)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "a prior draw has the shape of the data",
        "a batch stands for all rows",
        "fit leaves no trace",
    ]


def test_a_pair_that_cannot_be_fitted_breaks_no_law():
    with pytest.raises(ValueError, match="site 'loc': is in the model but not in the guide"):
        check_laws(normal_model, X, lambda x=None, size=None: None)
