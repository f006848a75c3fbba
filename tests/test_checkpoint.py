"""A file gives back the posterior to the byte, or one line that says what is wrong with it."""

import copy
import functools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import nn

import latentlab as ll
from latentlab.inference import files
from latentlab.inference.checkpoint import FILE, fingerprint, probe, write_atomically

QUICK = {"num_restarts": 1, "max_steps": 420, "progress": False}


@pytest.fixture(scope="module")
def eruptions():
    return ll.data.simulate.eruptions(num_rows=60)


@pytest.fixture(scope="module")
def mixture(eruptions):
    return ll.fit(ll.GaussianMixture(2, 2), eruptions, **QUICK)


@pytest.fixture(scope="module")
def stored(mixture, tmp_path_factory):
    return mixture.save(tmp_path_factory.mktemp("run"))


def normal(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


X = np.random.default_rng(0).normal(1.5, 1.0, 20)


def same(one, other):
    """Two posteriors have the same numbers, byte for byte."""
    for first, second in ((one.sample(5), other.sample(5)), (one.params, other.params)):
        assert list(first) == list(second)
        for name, value in first.items():
            assert value.dtype == second[name].dtype
            assert value.numpy().tobytes() == second[name].numpy().tobytes(), name
    assert one.losses.numpy().tobytes() == other.losses.numpy().tobytes()
    fields = ("elbo", "stage_starts", "stage_elbos", "converged", "stop_reason", "restarts")
    fields += ("notes", "seconds", "seed", "names", "method", "backend", "fitted_to")
    for field in fields:
        assert getattr(one, field) == getattr(other, field), field
    assert repr(one) == repr(other)


# ---- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_components", [1, 2])
@pytest.mark.parametrize("guide", ["auto", "mean_field", "point"])
def test_a_mixture_comes_back_to_the_byte(tmp_path, eruptions, dtype, num_components, guide):
    x = eruptions.x.to(dtype)
    settings = QUICK | {"max_steps": 20}
    posterior = ll.fit(ll.GaussianMixture(2, num_components), x, guide, **settings)
    assert posterior.save(tmp_path) == tmp_path / FILE
    again = ll.load(tmp_path)
    same(posterior, again)
    assert again.sample(2)["locs"].dtype == dtype
    with_data = ll.load(tmp_path, data=x)
    assert torch.equal(with_data.log_weights(5), posterior.log_weights(5))
    assert torch.equal(with_data.predict(3)["x"], posterior.predict(3)["x"])


def test_a_file_loads_without_the_data(mixture, stored, eruptions):
    again = ll.load(stored)
    assert not again.has_data
    assert again.check() == mixture.check()
    assert again.summary(100).equals(mixture.summary(100))
    new = eruptions.x[:4]
    assert torch.equal(again.predict(3, new)["x"], mixture.predict(3, new)["x"])
    assert again.log_prob(new) == mixture.log_prob(new)
    for ask in (again.predict, again.log_prob, again.log_weights):
        with pytest.raises(ValueError, match=r"loaded without its data; give it back .*data="):
            ask()


def test_with_its_data_the_verdict_is_measured_anew(mixture, stored, eruptions):
    again = ll.load(stored, data=eruptions)
    assert again.has_data
    assert again.recorded == mixture.check().spec()
    assert again.check() == mixture.check()
    assert again.check(num_samples=50) != mixture.check()
    same(mixture, again)


def test_columns_are_given_back_by_name(mixture, stored, eruptions):
    import pandas as pd

    frame = pd.DataFrame(eruptions.x.numpy(), columns=eruptions.names)
    again = ll.load(stored, data=frame[list(eruptions.names)[::-1]])
    assert torch.equal(again.log_weights(5), mixture.log_weights(5))
    with pytest.raises(ValueError, match="x: expected the columns"):
        ll.load(stored, data=frame.rename(columns={eruptions.names[0]: "other"}))


def test_other_data_are_found_out(stored, eruptions):
    verdict = ll.load(stored, data=eruptions.x + 3).check()
    assert verdict.level == "do not use"
    assert "these are not the data that were fitted" in verdict.reasons


def test_a_loaded_posterior_saves_the_same_bytes(stored, eruptions, tmp_path):
    for i, data in enumerate((None, eruptions)):
        again = ll.load(stored, data=data).save(tmp_path / str(i))
        assert again.read_bytes() == stored.read_bytes()


def test_the_file_its_folder_and_a_folder_with_other_files_load(mixture, stored, tmp_path):
    (tmp_path / FILE).write_bytes(stored.read_bytes())
    for name in ("report.html", "posterior.nc", "summary.csv"):
        (tmp_path / name).write_text("something else")
    for path in (tmp_path, str(tmp_path), tmp_path / FILE):
        same(mixture, ll.load(path))
    own = mixture.save(tmp_path / "deep" / "er" / "own.safetensors")
    assert own == tmp_path / "deep" / "er" / "own.safetensors"
    same(mixture, ll.load(own))


def test_another_process_draws_the_same(mixture, stored):
    code = (
        "import sys, latentlab as ll; p = ll.load(sys.argv[1]); "
        "print(p.sample(5)['locs'].numpy().tobytes().hex(), p.check().level)"
    )
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, stored], capture_output=True, text=True
    )
    assert found.stderr == ""
    drawn, level = found.stdout.strip().split(maxsplit=1)
    assert drawn == mixture.sample(5)["locs"].numpy().tobytes().hex()
    assert level == mixture.check().level


# ---- pairs of one's own ----------------------------------------------------------------------


class Line(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 1)
        self.linear.weight = PyroSample(dist.Normal(torch.zeros(1, 1), 10.0).to_event(2))
        self.sigma = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x, y=None):
        mean = self.linear(x.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, self.sigma), obs=y)


class Coder(nn.Module):
    def __init__(self, amortised=True):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, 1), nn.Linear(1, 1)
        self.amortised = amortised

    def model(self, x=None, size=None):
        pyro.module("decoder", self.decoder)
        with ll.rows(x, size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = self.decoder(z.unsqueeze(-1)).squeeze(-1)
            return pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(self, x=None, size=None):
        pyro.module("encoder", self.encoder)
        seen = x if self.amortised else torch.zeros_like(x)
        with ll.rows(x, size):
            pyro.sample("z", dist.Normal(self.encoder(seen.unsqueeze(-1)).squeeze(-1), 0.7))


def normal_guide(x=None, size=None):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("loc", dist.Normal(pyro.param("at", torch.tensor(0.0)), scale))


def weighted(x, y=None, scale=1.0):
    w = pyro.sample("w", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(w * x, scale), obs=y)


def own_pairs():
    line, coder, net = Line(), Coder(amortised=False), nn.Linear(1, 1)
    x = torch.linspace(-1, 1, 12)
    pair = (x, 2 * x + 0.1)
    partial = functools.partial(weighted, scale=0.5)

    def closed(x, y=None):
        pyro.module("net", net)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            mean = net(x.unsqueeze(-1)).squeeze(-1) + w
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return {
        "function, guide of latentlab": (normal, "auto", X),
        "functions": (normal, normal_guide, X),
        "autoguide": (normal, AutoMultivariateNormal(normal), X),
        "module, guide of latentlab": (line, "mean_field", pair),
        "module, autoguide": (line, AutoNormal(line), pair),
        "bound methods": (coder.model, coder.guide, x),
        "partial": (partial, "full_rank", pair),
        "keywords": (weighted, "full_rank", {"x": x, "y": 2 * x, "scale": 0.5}),
        "closure over a module": (closed, "full_rank", pair),
    }


@pytest.mark.parametrize("name", own_pairs())
def test_a_pair_of_ones_own_comes_back_to_the_byte(name, tmp_path):
    model, guide, data = own_pairs()[name]
    posterior = ll.fit(model, data, guide, **QUICK)
    posterior.save(tmp_path)
    given = {} if isinstance(guide, str) else {"guide": guide}
    again = ll.load(tmp_path, model, **given)
    same(posterior, again)
    assert again.check() == posterior.check()
    with_data = ll.load(tmp_path, model, data=data, **given)
    assert torch.equal(with_data.log_weights(5), posterior.log_weights(5))
    same(posterior, with_data)
    for site, value in posterior.predict(2).items():
        assert torch.equal(with_data.predict(2)[site], value)


def test_a_module_of_both_halves_is_stored_once(tmp_path):
    line = Line()
    x = torch.linspace(-1, 1, 12)
    posterior = ll.fit(line, (x, 2 * x), AutoNormal(line), **QUICK)
    content = posterior.save(tmp_path / "one").read_bytes()
    names = {name for name in read_tensors(content) if name.endswith("linear.bias")}
    assert names == {"model.0.linear.bias", "store.linear.bias"}
    pickle.dumps(posterior)  # which takes the model from a guide of Pyro
    assert posterior.save(tmp_path / "two").read_bytes() == content


def test_loading_leaves_the_pair_that_is_handed_in_as_it_is(tmp_path):
    line = Line()
    guide = AutoNormal(line)
    x = torch.linspace(-1, 1, 12)
    posterior = ll.fit(line, (x, 2 * x), guide, **QUICK)
    posterior.save(tmp_path)
    before = copy.deepcopy(line.state_dict())
    ll.load(tmp_path, line, guide)
    for key, value in line.state_dict().items():
        assert torch.equal(value, before[key])
    assert guide.prototype_trace is None
    assert not dict(pyro.get_param_store().items())


def test_a_pair_of_ones_own_has_to_be_handed_in(tmp_path):
    posterior = ll.fit(normal, X, normal_guide, **QUICK)
    file = posterior.save(tmp_path)
    with pytest.raises(ValueError, match="holds a model of your own; load it with model="):
        ll.load(file)
    with pytest.raises(ValueError, match="holds a guide of your own; load it with guide="):
        ll.load(file, normal)


def test_a_guide_that_reads_the_data_needs_them(tmp_path):
    coder, x = Coder(), torch.linspace(-1, 1, 12)
    posterior = ll.fit(coder.model, x, coder.guide, **QUICK)
    posterior.save(tmp_path)
    without = ll.load(tmp_path, coder.model, coder.guide)
    with pytest.raises(ValueError, match="latents: this posterior was loaded without its data"):
        without.sample(3)
    same(posterior, ll.load(tmp_path, coder.model, coder.guide, data=x))


def test_discrete_latents_need_the_data(tmp_path):
    def model(x=None, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with ll.rows(x, size):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=loc.dtype)))
            return pyro.sample("x", dist.Normal(loc + z, 1.0), obs=x)

    posterior = ll.fit(model, X, **QUICK)
    posterior.save(tmp_path)
    again = ll.load(tmp_path, model)
    assert again.summary(50).equals(posterior.summary(50))
    assert again.predict(2, X[:3])["x"].shape == (2, 3)
    with pytest.raises(ValueError, match="discrete latents: this posterior was loaded without"):
        again.sample(3)
    same(posterior, ll.load(tmp_path, model, data=X))


# ---- of another pair -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "called"),
    [
        (ll.GaussianMixture(2, 3), "GaussianMixture(num_features=2, num_components=3"),
        (ll.GaussianMixture(5, 2), "GaussianMixture(num_features=5, num_components=2"),
        (normal, "not normal"),
        (ll.GaussianMixture, "not GaussianMixture; leave model= out"),
    ],
)
def test_another_model_is_named(stored, other, called):
    with pytest.raises(ValueError, match="was written for another model, Gaussian") as error:
        ll.load(stored, other)
    assert called in str(error.value)


def test_the_same_model_or_guide_may_be_handed_in(mixture, stored):
    same(mixture, ll.load(stored, ll.GaussianMixture(2, 2), ll.guides.FullRank()))
    with pytest.raises(ValueError, match="holds a guide of latentlab, FullRank, not MeanField"):
        ll.load(stored, guide=ll.guides.MeanField())


class Named(ll.GaussianMixture):
    """A mixture of one's own, which the file must not take for its base class."""


def test_a_subclass_is_a_model_of_ones_own(tmp_path, eruptions):
    posterior = ll.fit(Named(2, 1), eruptions, **QUICK | {"max_steps": 20})
    posterior.save(tmp_path)
    with pytest.raises(ValueError, match="holds a model of your own"):
        ll.load(tmp_path)
    assert type(ll.load(tmp_path, Named(2, 1)).model) is Named


def group_means(num_groups):
    def model(x=None, size=None):
        with pyro.plate("groups", num_groups):
            means = pyro.sample("means", dist.Normal(0.0, 1.0))
        with ll.rows(x, size):
            return pyro.sample("x", dist.Normal(means.mean(-1, keepdim=True), 1.0), obs=x)

    return model


def test_another_support_is_that_of_another_model(tmp_path):
    def spread(prior):
        def model(x):
            scale = pyro.sample("scale", prior)
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(0.0, 1.0 + scale**2), obs=x)

        return model

    posterior = ll.fit(spread(dist.Gamma(2.0, 1.0)), X, **QUICK)
    file = posterior.save(tmp_path)
    same(posterior, ll.load(file, spread(dist.Gamma(3.0, 1.0))))
    for data in (None, X):
        with pytest.raises(ValueError, match="another model: site 'scale' .* and real here"):
            ll.load(file, spread(dist.Normal(2.0, 1.0)), data=data)


def test_another_number_of_groups_is_found_by_its_sites(tmp_path):
    posterior = ll.fit(group_means(3), X, **QUICK)
    file = posterior.save(tmp_path)
    same(posterior, ll.load(file, group_means(3)))
    message = r"another model: site 'means' has shape \(3,\) in the file, and shape \(4,\) here"
    with pytest.raises(ValueError, match=message):
        ll.load(file, group_means(4))
    with pytest.raises(ValueError, match="site 'means' has shape .* and no such site here"):
        ll.load(file, normal)


def test_a_model_that_does_not_run_on_such_data_is_named(tmp_path):
    file = ll.fit(normal, X, **QUICK).save(tmp_path)

    def wide(x=None, size=None):
        pyro.sample("loc", dist.Normal(0.0, 1.0))
        return x @ torch.ones(3)

    with pytest.raises(ValueError, match=r"this model does not run on data of shapes \[\(20,\)\]"):
        ll.load(file, wide)


def test_a_network_of_another_width_is_named(tmp_path):
    def pair(width):
        net = nn.Sequential(nn.Linear(1, width), nn.Linear(width, 1))

        def model(x=None, size=None):
            pyro.module("net", net)
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            with ll.rows(x, size):
                mean = net(torch.ones(1)) + loc
                return pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

        return model

    x = torch.from_numpy(X).float()
    file = ll.fit(pair(4), x, **QUICK).save(tmp_path)
    ll.load(file, pair(4))
    with pytest.raises(ValueError, match="was written for another model: .*size mismatch"):
        ll.load(file, pair(5))


# ---- damaged ---------------------------------------------------------------------------------


def refused(content, folder, match="is damaged"):
    """Loading such a file says in one line what is wrong."""
    file = folder / FILE
    file.write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        ll.load(file)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


@pytest.fixture(scope="module")
def content(stored):
    return stored.read_bytes()


def test_a_truncated_file_is_refused(content, tmp_path):
    header = 8 + int.from_bytes(content[:8], "little")
    for size in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) - 1):
        refused(content[:size], tmp_path)
    refused(content + b"\0", tmp_path)


def test_a_flipped_bit_is_found_wherever_it_is(content, tmp_path):
    header = 8 + int.from_bytes(content[:8], "little")
    picked = np.random.default_rng(0)
    places = [0, 1, 7, 8, header - 1, header, len(content) - 1]
    places += picked.integers(8, header, 60).tolist()
    places += picked.integers(header, len(content), 60).tolist()
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(picked.integers(8))
        refused(bytes(flipped), tmp_path)


def test_what_is_not_ours_is_refused(tmp_path):
    tensors = {"a": torch.zeros(3)}
    for other in (
        b"",
        np.random.default_rng(0).bytes(5000),
        b"{}",
        pickle.dumps({"a": 1}),
        tensor_bytes(tensors),
        tensor_bytes(tensors, metadata={"format": "pt"}),
        tensor_bytes(tensors, metadata={"latentlab": "{}"}),
        tensor_bytes(tensors, metadata={"latentlab": "0" * 64 + " {}"}),
        b"\xff" * 8 + b"{}",
        b"[" * 100_000,
    ):
        refused(other, tmp_path)


class Trap:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_is_never_run(writer, tmp_path):
    victim = str(tmp_path / "was run")
    if writer == "pickle":
        malicious = pickle.dumps(Trap(victim))
    else:
        torch.save(Trap(victim), tmp_path / "trap")
        malicious = (tmp_path / "trap").read_bytes()
    refused(malicious, tmp_path)
    assert not Path(victim).exists()
    pickle.loads(pickle.dumps(Trap(victim)))  # the trap does work
    assert Path(victim).exists()


def rewritten(content, change_facts=None, change_tensors=None, sealed=False):
    """The file with other facts or tensors; its sha256 as it was, or, sealed, made to fit."""
    length = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + length])["__metadata__"]["latentlab"]
    digest, text = entry.split(" ", 1)
    facts, tensors = json.loads(text), read_tensors(content)
    (change_facts or len)(facts)
    (change_tensors or len)(tensors)
    text = json.dumps(facts)
    digest = files.digest_of_all(text, tensors) if sealed else digest
    return tensor_bytes(tensors, metadata={"latentlab": f"{digest} {text}"})


def test_the_sha256_covers_facts_and_tensors(content, tmp_path):
    assert rewritten(content) == rewritten(content, sealed=True) == content
    changes = (
        {"change_facts": lambda facts: facts.update(converged=not facts["converged"])},
        {"change_facts": lambda facts: facts["verdict"].update(level="do not use")},
        {"change_tensors": lambda tensors: tensors["guide.0.offset"].add_(1e-9)},
        {"change_tensors": lambda tensors: tensors.update(more=torch.zeros(1))},
        {"change_tensors": lambda tensors: tensors.pop("losses")},
        {"change_tensors": lambda t: t.update(losses=t["losses"].view(torch.int64))},
    )
    for change in changes:
        refused(rewritten(content, **change), tmp_path, "its sha256 does not match")


def test_a_newer_schema_is_said_to_be_newer(content, tmp_path):
    newer = rewritten(content, lambda facts: facts.update(schema=3), sealed=True)
    refused(newer, tmp_path, r"written by a newer latentlab \(schema 3, .*update latentlab")


def test_an_older_schema_whose_numbers_mean_something_else_is_refused(content, tmp_path):
    older = rewritten(content, lambda facts: facts.update(schema=1), sealed=True)
    refused(older, tmp_path, r"written by an older latentlab \(schema 1, .*fit again")


def test_a_model_that_this_version_does_not_know_is_named(content, tmp_path):
    unknown = rewritten(content, lambda facts: facts["model"].update({"class": "os"}), sealed=True)
    (tmp_path / FILE).write_bytes(unknown)
    with pytest.raises(ValueError, match="model 'os': not known to this version"):
        ll.load(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{FILE}: no such file; save a posterior there"):
        ll.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        ll.load(tmp_path / "nowhere")


# ---- all of it or nothing --------------------------------------------------------------------


@pytest.mark.parametrize("blow", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["replace", "fsync"])
def test_a_blow_leaves_the_old_file(mixture, stored, tmp_path, monkeypatch, blow, at):
    file = tmp_path / FILE
    file.write_bytes(stored.read_bytes())

    def fail(*_):
        raise blow

    monkeypatch.setattr(*{"replace": (Path, "replace"), "fsync": (os, "fsync")}[at], fail)
    with pytest.raises(type(blow)) as error:
        copy.deepcopy(mixture).save(tmp_path)
    if isinstance(blow, OSError):
        assert f"{file}: cannot be written (No space left on device)" in str(error.value)
    assert file.read_bytes() == stored.read_bytes()
    assert os.listdir(tmp_path) == [FILE]


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path):
    file = tmp_path / "a"
    for text in (b"old", b"new"):
        write_atomically(file, text)
        assert file.read_bytes() == text
    assert os.listdir(tmp_path) == ["a"]


def test_a_place_that_cannot_be_written_to_is_named(mixture, tmp_path):
    (tmp_path / "taken").write_text("a file")
    for place in (tmp_path / "taken", tmp_path / "taken" / "deeper", Path("/proc/nowhere")):
        with pytest.raises(OSError, match=f"{place}.*: cannot be written") as error:
            mixture.save(place)
        assert "\n" not in str(error.value)
        with pytest.raises(OSError, match=f"{place}: cannot be written"):
            probe(place)
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_probe_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    assert probe(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert os.listdir(tmp_path / "a" / "b") == []


# ---- the fingerprint of data -----------------------------------------------------------------


def test_data_have_the_same_fingerprint_only_if_they_are_the_same():
    from latentlab.inference.pair import Arguments

    x = torch.arange(6.0)
    others = [
        Arguments((x,)),
        Arguments((x + 1e-6,)),
        Arguments((x.double(),)),
        Arguments((x.reshape(2, 3),)),
        Arguments((x, 2)),
        Arguments((x,), {"size": 2}),
        Arguments((x,), {"size": 3}),
        Arguments(kwargs={"x": x}),
        Arguments((x[:3], x[3:])),
        Arguments(([x[:3], x[3:]],)),
        Arguments(((x[:3], x[3:]),)),
        Arguments(([x[:3], [x[3:]]],)),
        Arguments((torch.tensor([True, False]),)),
        Arguments((torch.tensor(3.0),)),
        Arguments((torch.full((3,), torch.nan),)),
    ]
    assert len({fingerprint(data) for data in others}) == len(others)
    assert [fingerprint(data) for data in others] == [
        fingerprint(data.map(lambda t: t.clone())) for data in others
    ]
    assert fingerprint(Arguments((x.reshape(2, 3).T,))) == fingerprint(
        Arguments((x.reshape(2, 3).T.contiguous(),))
    )
