"""A pair is looked at before its first step, and each fault is named with its site."""

import functools
import math
import random
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import autoguide as auto
from pyro.nn import PyroModule
from torch import nn

import latentlab as ll
from latentlab.guides import FullRank, MeanField
from latentlab.inference.check import accepts_size, check_pair, prepare

X = torch.randn(6, generator=torch.Generator().manual_seed(0))


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def guide(x):
    pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))


def guide_of(**sites):
    """A guide with each site drawn as is said."""

    def guide(*data):
        for name, distribution in ({"loc": NORMAL, "scale": POSITIVE} | sites).items():
            if distribution is not None:
                pyro.sample(name, distribution)

    return guide


NORMAL, POSITIVE = dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0)


def faults_of(model, data, guide="mean_field"):
    report = check_pair(model, data, guide)
    return [str(fault) for fault in report.faults], report


def only_fault(model, data, guide="mean_field", fatal=True):
    (text,), report = faults_of(model, data, guide)
    assert report.ok != fatal
    return text


# ---- pairs without a fault --------------------------------------------------------------------


class Halves(nn.Module):
    def model(self, x):
        return model(x)

    def guide(self, x):
        return guide(x)


class ModelModule(PyroModule):
    def forward(self, x):
        return model(x)


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (model, guide),
        (model, "mean_field"),
        (model, "full_rank"),
        (model, "point"),
        (model, "auto"),
        (model, MeanField()),
        (model, FullRank()),
        (model, auto.AutoNormal(model)),
        (model, auto.AutoMultivariateNormal(model)),
        (model, auto.AutoLowRankMultivariateNormal(model)),
        (model, auto.AutoDelta(model)),
        (Halves().model, Halves().guide),
        (ModelModule(), "mean_field"),
        (functools.partial(model), functools.partial(guide)),
        (poutine.scale(model, scale=0.5), poutine.scale(guide, scale=0.5)),
    ],
    ids=lambda half: getattr(half, "__name__", str(half).split("(")[0]),
)
def test_a_pair_without_fault_has_none_and_runs_all_particles_at_once(model, guide):
    report = check_pair(model, X, guide)
    assert report.ok
    assert report.faults == ()
    assert report.notes == ()
    assert str(report).startswith("the pair can be fitted")
    assert report.sites[0] == "latent loc: shape (), support Real()"
    assert report.sites[-1] == "observed x"


def test_a_conditioned_model_observes_what_it_is_conditioned_on():
    def unconditioned():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6):
            pyro.sample("x", dist.Normal(loc, 1.0))

    report = check_pair(pyro.condition(unconditioned, {"x": X}), None, "mean_field")
    assert report.ok
    assert report.sites == ("latent loc: shape (), support Real()", "observed x")


def test_a_discrete_latent_is_said_to_be_summed_out():
    def labelled(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with ll.rows(x):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(loc * z, 1.0), obs=x)

    report = check_pair(labelled, X)
    assert report.ok
    assert "latent z: discrete, summed out" in report.sites


def test_nothing_is_changed_by_a_look():
    own = FullRank()
    with pyro.get_param_store().scope():
        before = torch.get_rng_state()
        check_pair(model, X, own)
        assert torch.equal(torch.get_rng_state(), before)
        assert not pyro.get_param_store()
    assert own.latents == ()


def test_checking_is_part_of_fitting():
    with pytest.raises(ValueError, match="cannot be fitted: site 'scale': is in the model"):
        ll.fit(model, X, guide_of(scale=None), progress=False)


# ---- names ------------------------------------------------------------------------------------


def test_a_missing_site_is_named():
    assert only_fault(model, X, guide_of(scale=None)) == (
        "site 'scale': is in the model but not in the guide; add it to the guide"
    )


def test_an_extra_site_is_named():
    assert only_fault(model, X, guide_of(more=NORMAL)) == (
        "site 'more': is in the guide but not in the model; rename or remove it"
    )


def test_a_misspelt_site_is_named_in_both():
    faults, report = faults_of(model, X, guide_of(scale=None, sclae=POSITIVE))
    assert not report.ok
    assert faults == [
        "site 'scale': is in the model but not in the guide (the guide has 'sclae'); "
        "add it to the guide",
        "site 'sclae': is in the guide but not in the model; rename or remove it",
    ]


def test_an_observed_site_in_the_guide_is_named():
    fault = only_fault(model, X, guide_of(x=dist.Normal(torch.zeros(6), 1.0).to_event(1)))
    assert fault == "site 'x': is observed in the model; remove it from the guide"


def test_auxiliary_sites_are_no_fault():
    def with_noise(x):
        noise = pyro.sample("noise", NORMAL, infer={"is_auxiliary": True})
        pyro.sample("loc", dist.Delta(2 * noise, log_density=torch.tensor(-math.log(2))))
        pyro.sample("scale", POSITIVE)

    assert faults_of(model, X, with_noise)[0] == []


# ---- shapes, supports, gradients --------------------------------------------------------------


def test_another_shape_is_named_with_both():
    fault = only_fault(model, X, guide_of(loc=dist.Normal(torch.zeros(2), 1.0).to_event(1)))
    assert fault == "site 'loc': has shape () in the model but (2,) in the guide"


@pytest.mark.parametrize(
    "distribution",
    [
        dist.Normal(0.0, 1.0),
        dist.Normal(100.0, 1.0),  # whose draws are all positive
        dist.Delta(torch.tensor(-1.0)),
        dist.StudentT(3.0),
    ],
)
def test_a_guide_off_the_support_of_the_prior_is_named(distribution):
    fault = only_fault(model, X, guide_of(scale=distribution))
    assert fault.startswith("site 'scale': the guide draws it outside of the prior's support ")
    assert "GreaterThan(lower_bound=0.0)" in fault


@pytest.mark.parametrize(
    ("prior", "good", "bad"),
    [
        (dist.Beta(2.0, 2.0), dist.Uniform(0.0, 1.0), dist.HalfNormal(1.0)),
        (dist.HalfCauchy(1.0), dist.LogNormal(0.0, 1.0), dist.Normal(5.0, 0.1)),
        (
            dist.Dirichlet(torch.ones(3)),
            dist.TransformedDistribution(
                dist.Normal(torch.zeros(2), 1.0).to_event(1),
                dist.transforms.StickBreakingTransform(),
            ),
            dist.LogNormal(torch.zeros(3), 1.0).to_event(1),
        ),
        (dist.Uniform(-1.0, 1.0), dist.Uniform(-1.0, 1.0), dist.Uniform(-1.0, 1.01)),
    ],
)
def test_supports_are_compared_by_what_they_hold(prior, good, bad):
    def one_latent(x):
        z = pyro.sample("z", prior)
        with ll.rows(x):
            pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

    assert faults_of(one_latent, X, lambda x: pyro.sample("z", good))[0] == []
    fault = only_fault(one_latent, X, lambda x: pyro.sample("z", bad))
    assert "outside of the prior's support" in fault


def test_a_guide_on_a_part_of_the_support_is_noted():
    fault = only_fault(model, X, guide_of(loc=dist.Uniform(0.0, 1.0)), fatal=False)
    assert fault.startswith("site 'loc': the guide's support Interval")
    assert "only a part of the prior's Real;" in fault


def labelled(x):
    z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
    loc = pyro.sample("loc", dist.Normal(z.float(), 1.0))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize(
    ("distribution", "text"),
    [
        (dist.Delta(torch.tensor(1)), "is discrete: leave it out of the guide to have it summed"),
        (dist.Poisson(3.0), "draws values from Poisson that it cannot have"),
        (dist.Normal(0.0, 1.0), "draws values from Normal that it cannot have"),
    ],
)
def test_other_values_of_a_discrete_site_in_the_guide_are_named(distribution, text):
    fault = only_fault(labelled, X, guide_of(scale=None, z=distribution))
    assert fault.startswith("site 'z': ")
    assert text in fault


def test_a_discrete_guide_of_a_part_of_the_values_is_noted():
    half = guide_of(scale=None, z=dist.Categorical(torch.ones(2) / 2))
    fault = only_fault(labelled, X, half, fatal=False)
    assert fault.startswith("site 'z': the guide's Categorical has only a part of the values")


class Rejecting(dist.Normal):
    has_rsample = False


@pytest.mark.parametrize(
    ("which", "given", "name"),
    [
        (model, guide_of(loc=Rejecting(0.0, 1.0)), "loc"),
        (labelled, guide_of(scale=None, z=dist.Categorical(torch.ones(3) / 3)), "z"),
    ],
)
def test_how_a_guide_without_a_reparameterised_gradient_is_fitted_is_told(which, given, name):
    report = check_pair(which, X, given)
    assert report.faults == ()
    (note,) = report.notes
    assert note.startswith(f"site {name!r}: drawn by the guide without a reparameterised gradient")


def test_a_latent_without_finite_support_cannot_be_summed_out():
    def counted(x):
        n = pyro.sample("n", dist.Poisson(3.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(n, 1.0), obs=x)

    fault = only_fault(counted, X)
    assert fault.startswith("site 'n': is discrete (Poisson) with no finite support")


def test_more_labels_than_a_tensor_has_dimensions_are_refused():
    def chain(x):
        rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
        for t in range(70):
            z = pyro.sample(f"z{t}", dist.Bernoulli(rate))
            pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[0])

    fault = only_fault(chain, X)
    assert fault.startswith("the model has 70 discrete sites, each of which takes a dimension")


# ---- plates and mini-batches ------------------------------------------------------------------


def local(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("components", 2):
        pyro.sample("shift", dist.Normal(loc, 1.0))
    with ll.rows(x):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_plate_of_the_data_that_the_guide_lacks_is_noted():
    def without_plates(x):
        pyro.sample("loc", NORMAL)
        pyro.sample("shift", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    faults, report = faults_of(local, X, without_plates)
    assert report.ok
    assert "site 'z': is in plate rows in the model but not in the guide; put it there" in faults


def subsampled(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x[index])


def subsampled_by_hand(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x), subsample=torch.tensor([0, 4])) as index:
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x[index])


UNALIGNED = "site 'z': is local to a plate that the model subsamples, which this guide cannot"
CONTINUOUS = [auto.AutoMultivariateNormal, auto.AutoDiagonalNormal, auto.AutoStructured]


@pytest.mark.parametrize("model", [subsampled, subsampled_by_hand])
@pytest.mark.parametrize("kind", ["mean_field", "full_rank", "point", *CONTINUOUS])
def test_local_latents_of_a_mini_batch_are_refused_where_rows_would_be_mixed_up(model, kind):
    guide = kind if isinstance(kind, str) else kind(model)
    assert only_fault(model, X, guide).startswith(UNALIGNED)


@pytest.mark.parametrize("kind", [auto.AutoNormal, auto.AutoDelta])
def test_an_autoguide_that_does_not_know_the_rows_is_refused(kind):
    assert only_fault(subsampled_by_hand, X, kind(subsampled_by_hand)).startswith(UNALIGNED)

    def plates(x):
        return pyro.plate("rows", len(x), subsample=torch.tensor([0, 4]))

    aligned = kind(subsampled_by_hand, create_plates=plates)
    assert faults_of(subsampled_by_hand, X, aligned)[0] == []
    assert faults_of(subsampled, X, kind(subsampled))[0] == []


def test_an_autoguide_that_knows_the_rows_learns_each_of_them():
    """The refused ones end at a correlation of about zero with the truth."""
    from latentlab.inference import objectives

    x = 10 * X
    pair, _ = prepare(subsampled, x, auto.AutoNormal(subsampled))
    with pair.entered(0):
        optimiser = torch.optim.Adam(pair.parameters().values(), lr=0.2)
        for _ in range(300):
            optimiser.zero_grad()
            draws = objectives.draw(pair, 4)
            (draws.log_q - objectives.log_joint(pair, draws)).mean().backward()
            optimiser.step()
    learnt = pair.guide.median()["z"]
    assert torch.corrcoef(torch.stack([learnt, x]))[0, 1] > 0.95


def test_another_scale_in_the_guide_is_named():
    def unscaled(x):
        pyro.sample("loc", NORMAL)
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    fault = only_fault(subsampled, X, unscaled)
    assert fault.startswith("site 'z': has scale 3.0 in the model but 1.0 in the guide")


# ---- the model --------------------------------------------------------------------------------


def test_a_model_without_data_is_noted():
    def prior(x):
        pyro.sample("loc", NORMAL)

    faults, report = faults_of(prior, X)
    assert report.ok
    assert any("observes nothing" in fault for fault in faults)


def test_a_factor_is_an_observation():
    def with_factor(x):
        loc = pyro.sample("loc", NORMAL)
        pyro.factor("likelihood", -((x - loc) ** 2).sum(-1, keepdim=True).sum())

    assert faults_of(with_factor, X)[0] == []


@pytest.mark.parametrize("draw", [torch.randn, lambda n: torch.tensor([random.random()] * n)])
def test_numbers_drawn_beside_pyro_are_noted(draw):
    def with_noise(x):
        loc = pyro.sample("loc", NORMAL)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc + draw(len(x)), 1.0), obs=x)

    fault = only_fault(with_noise, X, fatal=False)
    assert fault.startswith("site 'x': with the same latents its log-density is another")


def test_an_unused_latent_is_noted():
    def with_idle(x):
        model(x)
        pyro.sample("idle", NORMAL)

    fault = only_fault(with_idle, X, fatal=False)
    assert fault == "site 'idle': nothing depends on it: its posterior is its prior"


def test_a_latent_that_only_another_latent_depends_on_is_used():
    def with_parent(x):
        parent = pyro.sample("parent", NORMAL)
        loc = pyro.sample("loc", dist.Normal(parent, 1.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    assert faults_of(with_parent, X)[0] == []


def test_a_model_may_write_into_what_it_drew():
    def writes(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        w[..., 0] = 0.0
        with ll.rows(x):
            pyro.sample("x", dist.Normal(w.sum(-1), 1.0), obs=x)

    report = check_pair(writes, X, lambda x: pyro.sample(
        "w", dist.Normal(torch.zeros(2), 1.0).to_event(1)))  # fmt: skip
    assert report.ok


def test_a_density_that_is_no_number_is_named():
    class Broken(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) * math.nan

    def broken(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with ll.rows(x):
            pyro.sample("x", Broken(loc, 1.0), obs=x)

    fault = only_fault(broken, X)
    assert fault.startswith("site 'x': its log-density is NaN at a draw from the prior")


@pytest.mark.parametrize(
    ("distribution", "data", "message"),
    [
        (dist.Poisson(1.0), [0.0, 2.0, -1.0], r"the value -1.0 observed at \[2\] is outside"),
        (dist.Poisson(1.0), [0.0, 2.5, 1.0], r"the value 2.5 observed at \[1\] is outside"),
        (dist.Bernoulli(0.5), [0.0, 1.0, 255.0], r"the value 255.0 observed at \[2\] is outside"),
        (dist.Categorical(torch.ones(3)), [0, 3, 1], r"the value 3 observed at \[1\] is outside"),
        (dist.Gamma(1.0, 1.0), [1.0, 2.0, -3.0], r"the value -3.0 observed at \[2\] is outside"),
        (
            dist.Dirichlet(torch.ones(2)),
            [[0.5, 0.5], [0.5, 0.6]],
            r"the value \[0.5, 0.60*\d*\] observed at \[1\] is outside of the support Simplex",
        ),
    ],
)
def test_data_off_the_support_are_named_with_value_and_place(distribution, data, message):
    x = torch.tensor(data)

    def observing(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("use", -(loc**2))
        with ll.rows(x):
            pyro.sample("x", distribution, obs=x)

    report = check_pair(observing, x)
    assert not report.ok
    (fault,) = report.faults
    assert fault.site == "x"
    assert re.match(message, fault.message)


def test_a_distribution_that_is_told_not_to_check_does_not():
    """Pyro's own autoencoder observes grey levels this way."""

    def grey(x):
        logit = pyro.sample("logit", dist.Normal(0.0, 1.0))
        with ll.rows(x):
            pyro.sample("x", dist.Bernoulli(logits=logit, validate_args=False), obs=x)

    assert faults_of(grey, torch.rand(5))[0] == []


def test_data_of_another_shape_are_named_with_the_site():
    def three(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    fault = only_fault(three, X)
    assert fault.startswith("site 'x': its log-density cannot be computed (ValueError: ")


def test_a_site_that_is_drawn_only_sometimes_is_named():
    runs = []

    def sometimes(x):
        runs.append(None)
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        if len(runs) % 2:
            loc = loc + pyro.sample("more", dist.Normal(0.0, 1.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    assert only_fault(sometimes, X).startswith("site 'more': is drawn in some runs of the model")


def test_a_site_that_changes_its_shape_is_named():
    runs = []

    def growing(x):
        runs.append(None)
        loc = pyro.sample("loc", dist.Normal(torch.zeros(len(runs)), 1.0).to_event(1))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc.sum(), 1.0), obs=x)

    assert only_fault(growing, X).startswith("site 'loc': has shape (1,) in one run of the model")


@pytest.mark.parametrize("own", ["mean_field", auto.AutoNormal])
def test_a_support_that_depends_on_a_latent_is_refused_unless_the_guide_is_the_users(own):
    def dependent(x):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        share = pyro.sample("share", dist.Uniform(torch.zeros(()), top))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(share, 1.0), obs=x)

    def follows(x):
        top = pyro.sample("top", POSITIVE)
        pyro.sample("share", dist.Uniform(torch.zeros(()), top))

    fault = only_fault(dependent, X, own if isinstance(own, str) else own(dependent))
    assert fault.startswith("site 'share': its support Interval(")
    assert "depends on other latents" in fault
    assert faults_of(dependent, X, follows)[0] == []


def test_a_support_without_a_map_from_the_real_line_is_named():
    class Peculiar(constraints.Constraint):
        def check(self, value):
            return torch.ones_like(value, dtype=torch.bool)

    class Odd(dist.Normal):
        support = Peculiar()

    def odd(x):
        loc = pyro.sample("loc", Odd(0.0, 1.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    assert "to which there is no map" in only_fault(odd, X)
    assert faults_of(odd, X, lambda x: pyro.sample("loc", Odd(0.0, 1.0)))[0] == []


def test_a_model_without_a_continuous_latent_has_nothing_for_a_guide():
    def fixed(x):
        with ll.rows(x):
            pyro.sample("x", NORMAL, obs=x)

    assert only_fault(fixed, X) == "the model has no continuous latent for this guide to cover"


@pytest.mark.parametrize("role", ["model", "guide"])
def test_an_error_inside_is_passed_on_with_the_shapes_it_came_from(role):
    def fails(x):
        raise ZeroDivisionError("in my own code")

    pair = {"model": model, "guide": guide} | {role: fails}
    with pytest.raises(ZeroDivisionError, match="in my own code") as caught:
        check_pair(pair["model"], X, pair["guide"])
    assert caught.value.__notes__ == [
        f"raised by the {role} before step 1, on tensors of shapes [(6,)]"
    ]


def test_impossible_arguments_of_a_distribution_are_found_before_step_one():
    def impossible(x):
        pyro.sample("loc", dist.Normal(0.0, -1.0))

    with pytest.raises(ValueError, match="scale"):
        check_pair(impossible, X)


# ---- parameters -------------------------------------------------------------------------------


def test_a_parameter_that_pyro_does_not_know_is_noted():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(1, 1), nn.Linear(1, 1)

        def model(self, x):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            with ll.rows(x):
                pyro.sample("x", dist.Normal(self.used(z)[..., 0], 1.0), obs=x)

    faults, report = faults_of(Forgetful().model, X)
    assert report.ok
    assert [fault.split(" is used")[0] for fault in faults] == [
        "parameter Forgetful.used.weight",
        "parameter Forgetful.used.bias",
    ]
    assert all("pyro.module" in fault for fault in faults)


def test_two_modules_with_one_name_of_a_parameter_are_refused():
    class Half(PyroModule):
        def __init__(self, name):
            super().__init__(name)
            self.shift = nn.Parameter(torch.tensor(0.0))

    class ShiftedModel(Half):
        def forward(self, x):
            loc = pyro.sample("loc", dist.Normal(self.shift, 1.0))
            with ll.rows(x):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    class ShiftedGuide(Half):
        def forward(self, x):
            pyro.sample("loc", dist.Normal(self.shift, 1.0))

    fault = only_fault(ShiftedModel(""), X, ShiftedGuide(""))
    assert fault.startswith("parameter 'shift' is in the model and in the guide")
    assert faults_of(ShiftedModel("model"), X, ShiftedGuide("guide"))[0] == []


# ---- what is asked for ------------------------------------------------------------------------


def test_a_guide_that_is_none_is_named():
    with pytest.raises(ValueError, match='guide: expected one of "auto", "point".* got .magic.'):
        check_pair(model, X, "magic")
    with pytest.raises(TypeError, match="guide: expected a callable.* got 3"):
        check_pair(model, X, 3)


def test_the_default_guide_is_the_models_own_or_the_lowest_rung():
    mixture = ll.GaussianMixture(num_features=1, num_components=2)
    assert isinstance(prepare(model, X)[0].guide, MeanField)
    assert isinstance(prepare(mixture, X[:, None])[0].guide, type(mixture.default_guide()))


def test_a_model_accepts_size_if_it_says_so():
    def sized(x=None, size=None):
        """Takes both."""

    assert accepts_size(sized)
    assert accepts_size(functools.partial(sized, size=3))
    assert accepts_size(poutine.scale(sized, scale=2.0))
    assert accepts_size(ll.GaussianMixture(num_features=1, num_components=1))
    assert not accepts_size(model)
    assert not accepts_size(poutine.scale(model, scale=2.0))


def test_a_report_reads_as_text():
    assert str(check_pair(model, X, guide_of(scale=None))).splitlines()[:2] == [
        "the pair cannot be fitted",
        "fault: site 'scale': is in the model but not in the guide; add it to the guide",
    ]


# ---- values and plates ------------------------------------------------------------------------


def row_values(shape, event=False):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("r", 6):
            fn = dist.Normal(loc, 1.0)
            pyro.sample("x", fn.expand([6]).to_event(1) if event else fn, obs=x)

    return model, torch.zeros(shape)


@pytest.mark.parametrize(
    ("shape", "event", "says"),
    [
        ((6, 1), False, r"^site 'x': the value has shape \(6, 1\) .* \(6,\): .* \(6, 6\)"),
        ((6,), True, r"^site 'x': the value has shape \(6,\) and is counted 6 times"),
    ],
)
def test_values_counted_more_often_than_given_are_refused(shape, event, says):
    model, x = row_values(shape, event)
    fault = only_fault(model, x)
    assert re.search(says, fault)
    assert "give obs the shape" in fault


def test_one_number_for_all_elements_is_told():
    """As the zero of a trick with zeros; one row given for all would be a mistake."""
    model, x = row_values((1,))
    assert "is counted 6 times" in only_fault(model, x, fatal=False)


@pytest.mark.parametrize("kind", ["mean_field", auto.AutoNormal])
def test_a_mask_of_observations_is_refused(kind):
    def model(x, mask):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("r", 6):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x, obs_mask=mask)

    guide = kind if isinstance(kind, str) else kind(model)
    mask = torch.arange(6) < 4
    assert "pyro.sample('x', fn.mask(mask), obs=x.nan_to_num())" in " ".join(
        faults_of(model, (torch.zeros(6), mask), guide)[0]
    )


def test_masked_cells_as_the_refusal_says_are_left_out():
    def model(x, mask):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("r", 6):
            pyro.sample("x", dist.Normal(loc, 1.0).mask(mask), obs=x.nan_to_num())

    x = torch.tensor([1.0, 2.0, 3.0, 2.0, 5.0, 5.0])
    posterior = ll.fit(
        model, (x, torch.arange(6) < 4), "full_rank", max_steps=1500, progress=False
    )
    assert float(posterior.guide.free_mean().detach()) == pytest.approx(8 / 5, abs=1e-3)
