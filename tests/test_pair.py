"""A fit owns its pair: the copy learns, the original stays, and what was shared is shared."""

import copy
import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import autoguide as auto
from pyro.infer import config_enumerate
from pyro.nn import PyroModule, PyroParam
from torch import nn

from latentlab import rows
from latentlab.inference import objectives
from latentlab.inference.check import prepare
from latentlab.inference.pair import Arguments, copy_pair, modules_of

X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
GLOBAL_NET = nn.Linear(1, 2)
GLOBAL_NUMBER = 1.0


class Autoencoder(nn.Module):
    """As in Pyro's tutorials: one object, two methods."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(2, 1), nn.Linear(1, 2)

    def model(self, x, size=None):
        pyro.module("decoder", self.decoder)
        with rows(x, size):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        pyro.module("encoder", self.encoder)
        with rows(x, size):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


class PlainAutoencoder:
    """The same without being a module itself."""

    def __init__(self):
        self.encoder, self.decoder = nn.Linear(2, 1), nn.Linear(1, 2)

    model, guide = Autoencoder.model, Autoencoder.guide


class Model(PyroModule):
    def __init__(self):
        super().__init__("model")
        self.decoder = PyroModule[nn.Linear](1, 2)

    def forward(self, x):
        with rows(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__("guide")
        self.encoder = PyroModule[nn.Linear](2, 1)
        self.scale = PyroParam(torch.tensor(0.5), constraints.positive)

    def forward(self, x):
        with rows(x):
            pyro.sample("z", dist.Normal(self.encoder(x), self.scale).to_event(1))


def as_functions():
    """A pair of closures over modules."""
    decoder, encoder = nn.Linear(1, 2), nn.Linear(2, 1)

    def model(x):
        pyro.module("decoder", decoder)
        with rows(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with rows(x):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    return model, guide


def as_methods():
    vae = Autoencoder()
    return vae.model, vae.guide


def as_methods_of_a_plain_object():
    vae = PlainAutoencoder()
    return vae.model, vae.guide


def as_modules():
    return Model(), Guide()


def in_partials():
    vae = Autoencoder()
    return functools.partial(Autoencoder.model, vae), functools.partial(vae.guide, size=None)


def in_handlers():
    """``poutine.scale`` and ``config_enumerate`` wrap what they are given."""
    model, guide = as_functions()
    return config_enumerate(poutine.scale(model, scale=1.0)), poutine.scale(guide, scale=1.0)


class WithCall:
    """An object that is called, and keeps its networks in a dict."""

    def __init__(self, function, **networks):
        self.function, self.networks = function, networks

    def __call__(self, x):
        return self.function(self.networks, x)


def as_objects():
    def model(networks, x):
        pyro.module("decoder", networks["decoder"])
        with rows(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(networks["decoder"](z), 1.0).to_event(1), obs=x)

    def guide(networks, x):
        pyro.module("encoder", networks["encoder"])
        with rows(x):
            pyro.sample("z", dist.Normal(networks["encoder"](x), 0.5).to_event(1))

    return WithCall(model, decoder=nn.Linear(1, 2)), WithCall(guide, encoder=nn.Linear(2, 1))


PAIRS = [
    as_functions,
    as_methods,
    as_methods_of_a_plain_object,
    as_modules,
    in_partials,
    in_handlers,
    as_objects,
]


def climb(pair, num_steps=20):
    """Some steps of Adam; returns the losses."""
    losses = []
    with pair.entered(0):
        optimiser = torch.optim.Adam(pair.parameters().values(), lr=0.05)
        for _ in range(num_steps):
            optimiser.zero_grad()
            draws = objectives.draw(pair, 1)
            loss = (draws.log_q - objectives.log_joint(pair, draws)).mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    return losses


def weights_of(pair, seed=3):
    with pair.entered(seed), torch.no_grad():
        return objectives.log_weights(pair, 5)


def state_of(*functions):
    return [
        (name, value.clone())
        for function in functions
        for module in modules_of(function)
        for name, value in module.state_dict().items()
    ]


@pytest.mark.parametrize("make", PAIRS)
def test_a_fit_learns_in_its_copy_and_leaves_the_original_alone(make):
    model, guide = make()
    before = state_of(model, guide)
    assert len(before) >= 4
    pair, report = prepare(model, X, guide)
    assert report.ok, report
    assert not report.faults
    assert len(pair.parameters()) >= 4
    losses = climb(pair)
    assert losses[-1] != losses[0]
    assert all(torch.equal(old, new) for (_, old), (_, new) in zip(
        before, state_of(model, guide), strict=True))  # fmt: skip
    assert not pyro.get_param_store()


@pytest.mark.parametrize("make", PAIRS)
def test_a_second_fit_of_the_same_objects_does_not_change_the_first(make):
    model, guide = make()
    first = prepare(model, X, guide)[0]
    climb(first)
    before = weights_of(first)
    second = prepare(model, 10 + X, guide)[0]
    climb(second)
    assert torch.equal(weights_of(first), before)
    assert not torch.equal(weights_of(second), before)


@pytest.mark.parametrize("make", PAIRS)
def test_a_fit_starts_from_the_original_each_time(make):
    model, guide = make()
    losses = [climb(prepare(model, X, guide)[0]) for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("make", [as_methods, as_methods_of_a_plain_object, in_partials])
def test_what_model_and_guide_share_they_share_in_the_copy(make):
    model, guide = copy_pair(*make())
    assert [id(m) for m in modules_of(model)] == [id(m) for m in modules_of(guide)]


def test_parameters_of_the_copy_are_those_that_it_computes_with():
    """Learnt numbers come back when the pair is entered again, whatever ran in between."""
    pair = prepare(Model(), X, Guide())[0]
    climb(pair)
    learnt = pair.guide.encoder.weight.detach().clone()
    climb(prepare(Model(), X, Guide())[0])
    with pair.entered(0):
        pair.guide(X)
        assert torch.equal(pair.guide.encoder.weight, learnt)
    assert pair.parameters()["guide.encoder.weight"] is pair.guide.encoder.weight


# ---- what a function refers to ----------------------------------------------------------------


def uses_globals(x):
    return GLOBAL_NET(x).sum() + GLOBAL_NUMBER + helper()


def helper():
    return GLOBAL_NUMBER + GLOBAL_NET.bias.sum()


def in_an_inner_function(x):
    return sum(layer(x).sum() for layer in (GLOBAL_NET,)) + (lambda: helper())()


def with_a_default(x, *, net=GLOBAL_NET):
    return net(x).sum()


def recursive(x, depth=2):
    return recursive(GLOBAL_NET(x)[..., :1], depth - 1) if depth else x.sum()


def in_a_list():
    nets, numbers = [GLOBAL_NET], {"of": [GLOBAL_NET.bias, (GLOBAL_NET,)]}
    return lambda x: nets[0](x).sum() + numbers["of"][1][0](x).sum()


def by_a_closure_of_a_closure():
    net = GLOBAL_NET

    def inner(x):
        return net(x).sum()

    return lambda x: inner(x)


REFERRING = [
    uses_globals,
    in_an_inner_function,
    with_a_default,
    recursive,
    in_a_list(),
    by_a_closure_of_a_closure(),
    functools.partial(with_a_default, net=GLOBAL_NET),
    GLOBAL_NET.forward,
    WithCall(lambda nets, x: nets["a"](x).sum(), a=GLOBAL_NET),
    WithCall(lambda nets, x: GLOBAL_NET(x).sum()),
    WithCall(functools.partial(lambda net, nets, x: net(x).sum(), GLOBAL_NET)),
    WithCall(lambda nets, x: GLOBAL_NET(x).sum()).__call__,
]


@pytest.mark.parametrize("function", REFERRING)
def test_modules_are_found_and_copied_wherever_a_function_refers_to_them(function):
    assert [module is GLOBAL_NET for module in modules_of(function)] == [True]
    copied, _ = copy_pair(function, function)
    (module,) = modules_of(copied)
    assert module is not GLOBAL_NET
    x = torch.ones(3, 1)
    before = copied(x)
    torch.testing.assert_close(before, function(x))
    with torch.no_grad():
        module.weight += 1
    assert not torch.equal(copied(x), before)
    torch.testing.assert_close(function(x), before)


def test_numbers_keep_their_values_of_the_time_of_the_fit(monkeypatch):
    """As K does, in a notebook that goes on."""
    cell = 1.0

    def model():
        return cell + GLOBAL_NUMBER + only_a_number()

    copied, _ = copy_pair(model, model)
    cell = 2.0
    monkeypatch.setitem(globals(), "GLOBAL_NUMBER", 10.0)
    assert model() == 2 + 10 + 10
    assert copied() == 1 + 1 + 1


def only_a_number():
    return GLOBAL_NUMBER


def test_lists_that_grow_later_do_not_grow_in_the_copy():
    sizes = [1]

    def model():
        return len(sizes)

    copied, _ = copy_pair(model, model)
    sizes.append(2)
    assert (model(), copied()) == (2, 1)


def test_large_things_and_libraries_are_shared():
    big, table = torch.zeros(3), {"x": torch.ones(2)}

    def model():
        return big, table["x"], rows, torch, pyro.sample

    assert all(a is b for a, b in zip(model(), copy_pair(model, model)[0](), strict=True))


def test_a_function_keeps_its_name_signature_and_attributes():
    net = nn.Linear(1, 1)

    def model(x, size=None, *, flag: bool = True):
        """What it says."""
        return net, x, size, flag

    model.note = "kept"
    copied, _ = copy_pair(model, model)
    assert copied.__name__ == "model"
    assert copied.__qualname__ == model.__qualname__
    assert copied.__module__ == model.__module__
    assert copied.__doc__ == "What it says."
    assert copied.__annotations__ == {"flag": bool}
    assert copied.note == "kept"
    assert copied(1)[1:] == (1, None, True)


def test_an_object_that_refers_to_itself_is_copied_once():
    net = nn.Linear(1, 1)
    looped = WithCall(lambda nets, x: net(x).sum())
    looped.again = looped.__call__
    copied, other = copy_pair(looped, looped.again)
    assert copied.again.__self__ is other.__self__ is copied is not looped
    assert next(modules_of(copied)) is not net


def test_a_copy_can_be_copied():
    first, _ = copy_pair(uses_globals, uses_globals)
    second, _ = copy_pair(first, first)
    modules = [next(iter(modules_of(f))) for f in (uses_globals, first, second)]
    assert len(set(map(id, modules))) == 3
    assert second(torch.ones(3, 1)) == uses_globals(torch.ones(3, 1))


# ---- Pyro's own guides ------------------------------------------------------------------------


def with_network():
    net = nn.Linear(1, 2)

    def model(x):
        width = pyro.param("width", torch.tensor(1.0), constraint=constraints.positive)
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(torch.zeros(1), width).to_event(1))
        with pyro.plate("pair", 2):
            pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with rows(x):
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    return model


AUTOGUIDES = [
    auto.AutoNormal,
    auto.AutoDiagonalNormal,
    auto.AutoMultivariateNormal,
    auto.AutoLowRankMultivariateNormal,
    auto.AutoDelta,
    auto.AutoStructured,
    functools.partial(auto.AutoIAFNormal, hidden_dim=[4], num_transforms=1),
]
IDS = [getattr(g, "func", g).__name__ for g in AUTOGUIDES]


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("kind", AUTOGUIDES, ids=IDS)
def test_an_autoguide_is_copied_with_its_model_and_keeps_its_own(kind, has_run):
    """Also one that was used before, which holds tensors that ``deepcopy`` refuses."""
    model = with_network()
    guide = kind(model)
    if has_run:
        with pyro.get_param_store().scope():
            guide(X)
    inner = poutine.messenger.unwrap
    new_model, new_guide = copy_pair(model, guide)
    assert inner(guide.model) is model
    assert inner(new_guide.model) is new_model is not model
    assert (guide.prototype_trace is not None) == has_run
    pair, report = prepare(model, X, guide)
    assert report.ok, report
    assert climb(pair, 3)
    assert inner(guide.model) is model


@pytest.mark.parametrize("kind", AUTOGUIDES, ids=IDS)
def test_a_second_fit_of_an_autoguide_does_not_change_the_first(kind):
    model = with_network()
    guide = kind(model)
    first, _ = prepare(model, X, guide)
    climb(first, 3)
    before = weights_of(first)
    climb(prepare(model, 10 + X, guide)[0], 3)
    assert torch.equal(weights_of(first), before)


def test_parts_of_a_list_of_autoguides_know_their_list():
    model = with_network()
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoNormal(poutine.block(model, expose=["z"])))
    guide.append(auto.AutoDelta(poutine.block(model, expose=["scale"])))
    _, copied = copy_pair(model, guide)
    for owner in (guide, copied):
        assert [part.master() is owner for part in owner] == [True, True]
    pair, report = prepare(model, X, guide)
    assert report.ok, report
    assert climb(pair, 3)


def test_an_autoguide_that_cannot_be_copied_is_given_its_model_back():
    model = with_network()
    guide = auto.AutoNormal(model)
    guide.hidden = (2 * i for i in range(3))  # a generator
    with pytest.raises(TypeError):
        copy_pair(model, guide)
    assert poutine.messenger.unwrap(guide.model) is model


# ---- the caller's tensors ---------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_a_tensor_that_a_parameter_starts_from_stays_as_it_is(lazy):
    """Pyro would take it as the parameter itself and move it."""
    start = torch.zeros(2)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc_loc", (lambda: start) if lazy else start)
        pyro.sample("loc", dist.Normal(loc, 1.0).to_event(1))

    first = prepare(model, 5 + X, guide)[0]
    climb(first)
    before = weights_of(first)
    climb(prepare(model, X, guide)[0])
    assert torch.equal(start, torch.zeros(2))
    assert not start.requires_grad
    assert torch.equal(weights_of(first), before)


# ---- what is known of a pair ------------------------------------------------------------------


def test_local_latents_are_those_in_a_plate_of_the_data():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("unrelated", 3):
            pyro.sample("other", dist.Normal(loc, 1.0))
        with rows(x, name="people"):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pair, _ = prepare(model, X[:, 0], "mean_field")
    assert pair.local_plate() == "people"
    assert [name for name in ("loc", "other", "z", "x") if pair.is_local(name)] == ["z", "x"]
    assert pair.nesting == 1
    assert pair.shapes == {"loc": (), "unrelated": (3,), "other": (3,), "people": (6,),
                           "z": (6,), "x": (6,)}  # fmt: skip
    assert not pair.is_point()


def test_a_parameter_with_two_names_is_optimised_once_and_a_frozen_one_not_at_all():
    net = nn.Linear(1, 2)
    net.eval().bias.requires_grad_(False)

    def model(x):
        for name in ("first", "second"):
            pyro.module(name, net)
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with rows(x):
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    pair, _ = prepare(model, X, "mean_field")
    assert set(pair.parameters()) == {"first$$$weight", "guide.loc", "guide.log_scale"}


def test_a_guide_without_noise_is_a_point():
    model = with_network()
    for guide, is_point in (
        ("point", True),
        (auto.AutoDelta(model), True),
        ("mean_field", False),
        (auto.AutoNormal(model), False),
        (auto.AutoMultivariateNormal(model), False),
    ):
        assert prepare(model, X, guide)[0].is_point() == is_point


def test_arguments_are_called_as_they_came():
    data = Arguments((1,), {"size": 2})
    assert data.call(lambda x, size: (x, size)) == (1, 2)
    assert copy.copy(data).tensors() == []
