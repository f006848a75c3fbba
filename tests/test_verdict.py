"""The verdict: every rule on evidence made by hand, and whole fits that are right or wrong."""

import copy
import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll
from latentlab.diagnostics import Estimate, KhatTable, MomentErrors, Psis
from latentlab.inference import verdict
from latentlab.inference.evidence import Block, Evidence, Moments
from latentlab.inference.restarts import Restarts


def khat(value, se=0.01):
    return Block("all latents", Psis(value, se, torch.zeros(100), 30))


def rows(*values):
    return Block("each datum's latents", KhatTable(torch.tensor(values), torch.zeros(len(values))))


def moments(shift=0.0, ratio=1.0, se=0.0):
    one = torch.tensor([1.0, 0.0]).double()
    fields = (shift * one, se * one, ratio**one, se * one)
    return Moments(("tau", "mu"), MomentErrors(*fields))


GOOD = Evidence(
    converged=True,
    stop_reason="stages agree",
    is_point=False,
    is_full_rank=False,
    blocks=(khat(0.2),),
    moments=moments(),
    elbo=Estimate(-100.0, 0.1),
    recorded_elbo=Estimate(-100.1, 0.1),
    other_data=False,
    restarts=Restarts((Estimate(-100.0, 0.1), Estimate(-100.1, 0.1))),
    kl={"mu": Estimate(3.0, 0.1)},
    switched=Estimate(0.0, 0.0),
    remarks=(),
)

CARE, BAD = "use with care", "do not use"
RULES = [
    ({}, "use", "k-hat"),
    ({"converged": False, "stop_reason": "max_steps"}, CARE, "did not converge"),
    ({"blocks": (khat(-math.inf),)}, "use", "exact"),
    ({"blocks": (khat(0.6),)}, CARE, "between 0.5 and 0.7"),
    ({"blocks": (khat(0.8),)}, BAD, "above 0.7"),
    ({"blocks": (khat(math.inf),)}, BAD, "above 0.7"),
    ({"blocks": (khat(0.2), rows(*[0.1] * 99, 0.9))}, CARE, "row 99"),
    ({"blocks": (khat(0.2), rows(*[0.1] * 90, *[0.9] * 10))}, BAD, "rows 90"),
    ({"blocks": (khat(0.2), rows(*[0.1] * 10))}, "use", "below 0.7"),
    ({"moments": moments(shift=0.05)}, "use", "k-hat"),
    ({"moments": moments(shift=-0.2)}, CARE, "mean of tau is off by -0.2"),
    ({"moments": moments(shift=0.2, se=0.15)}, "use", "k-hat"),
    ({"moments": moments(shift=0.15, se=0.08)}, "use", "k-hat"),
    ({"moments": moments(shift=0.5)}, BAD, "mean of tau"),
    ({"moments": moments(ratio=0.8)}, CARE, "sd of tau is 0.8"),
    ({"moments": moments(ratio=0.834, se=0.018)}, CARE, "sd of tau is 0.83"),
    ({"moments": moments(ratio=1.3)}, CARE, "sd of tau is 1.3"),
    ({"moments": moments(ratio=0.4)}, BAD, "sd of tau"),
    ({"moments": None}, "use", "k-hat"),
    ({"is_point": True, "blocks": (), "moments": None, "kl": {}}, CARE, "without uncertainty"),
    ({"recorded_elbo": Estimate(-90.0, 0.1)}, BAD, "parameters or data were changed"),
    ({"elbo": Estimate(math.nan, math.nan)}, BAD, "ELBO is nan"),
    ({"elbo": Estimate(-math.inf, math.nan)}, BAD, "ELBO is -inf"),
    ({"other_data": True}, BAD, "not the data"),
    (
        {"restarts": Restarts((Estimate(-100.0, 0.1), Estimate(-150.0, 0.1)))},
        CARE,
        "1 of 2 starts",
    ),
    ({"restarts": Restarts((Estimate(-100.0, 0.1),))}, "use", "k-hat"),
    ({"restarts": Restarts((Estimate(-9.0, 0.1),) * 3, (0.0, 1.0, 9.0))}, CARE, "9 sd away"),
    ({"restarts": Restarts((Estimate(-9.0, 0.1),) * 3, (0.0, 1.0, 2.0))}, "use", "k-hat"),
    (
        {"kl": {"mu": Estimate(3.0, 0.1), "nu": Estimate(0.001, 0.001)}},
        CARE,
        "'nu' has learnt nothing",
    ),
    ({"kl": {"nu": Estimate(0.001, 0.2)}}, "use", "k-hat"),
    ({"switched": Estimate(0.2, 0.01)}, CARE, "labels switch"),
    ({"switched": None}, "use", "k-hat"),
    ({"remarks": ("component 1 holds nothing",)}, CARE, "component 1 holds nothing"),
]


@pytest.mark.parametrize(("changes", "level", "words"), RULES)
def test_each_rule_has_its_level_and_says_why(changes, level, words):
    found = verdict.decide(dataclasses.replace(GOOD, **changes))
    assert found.level == level
    assert any(words in reason for reason in found.reasons)
    assert (level == "use") == (not found.next_steps) or "remarks" in changes


def test_the_level_is_the_worst_that_any_evidence_asks_for():
    found = verdict.decide(dataclasses.replace(GOOD, converged=False, other_data=True))
    assert found.level == BAD
    assert len(found.reasons) == 2


def test_the_text_starts_with_the_level_and_shows_every_figure():
    text = str(verdict.decide(GOOD))
    assert text.splitlines()[0] == "use"
    for figure in (
        "stages agree",
        "0.200 ± 0.010",
        "-100.00 ± 0.10",
        "2 of 2 starts",
        "3.00 ± 0.10",
    ):
        assert figure in text


def test_a_verdict_survives_json():
    import json

    found = verdict.decide(dataclasses.replace(GOOD, blocks=(khat(0.6),)))
    assert ll.Verdict.from_spec(json.loads(json.dumps(found.spec()))) == found


# Whole fits.


@pytest.fixture(scope="module")
def eruptions():
    x = ll.data.simulate.eruptions()
    return ll.fit(ll.GaussianMixture(2, 2), x, num_restarts=2, progress=False)


def altered(posterior, change):
    """A posterior whose guide was changed; the ELBO it recorded is that of the changed guide."""
    pair = copy.deepcopy(posterior.pair)
    with torch.no_grad():
        change(pair.guide)
    other = dataclasses.replace(posterior, pair=pair)
    return other, dataclasses.replace(other, elbo=Estimate.from_draws(other.log_weights(1000)))


def halve_sd(guide):
    guide.frame.mul_(0.5)


def remove_component(guide):
    """Both components at the place of the first."""
    latent = {site.latent.name: site.part for site in guide.layout.sites}
    for site in ("locs", "scales"):
        D = guide.offset[latent[site]].numel() // 2
        guide.offset[latent[site]] = guide.free_mean()[latent[site]][:D].repeat(2)
    guide.loc.zero_()


def test_a_good_fit_may_be_used(eruptions):
    found = eruptions.check()
    assert found.level in ("use", "use with care")
    assert all("k-hat" in reason for reason in found.reasons)


@pytest.mark.parametrize("change", [halve_sd, remove_component])
def test_a_guide_that_was_made_wrong_is_not_to_be_used(eruptions, change):
    tampered, recorded = altered(eruptions, change)
    assert tampered.check().level == BAD
    found = recorded.check()  # even where its record matches it
    assert found.level == BAD
    assert any("k-hat" in reason or "weights" in reason for reason in found.reasons)


def test_an_unaltered_copy_is_still_good(eruptions):
    _, copied = altered(eruptions, lambda guide: None)
    assert copied.check().level != BAD


def test_a_posterior_of_other_data_is_not_to_be_used(eruptions):
    pair = copy.copy(eruptions.pair)
    pair.data = pair.data.map(lambda x: x.flip(1))
    replaced = dataclasses.replace(eruptions, pair=pair)
    found = replaced.check()
    assert found.level == BAD
    assert any("not the data" in reason for reason in found.reasons)


def test_one_cell_of_the_data_changed_is_noticed(eruptions):
    x = eruptions.pair.data.args[0].clone()
    x[17, 1] += 1e-6
    pair = copy.copy(eruptions.pair)
    pair.data = pair.data.map(lambda _: x)
    found = dataclasses.replace(eruptions, pair=pair).check()
    assert any("not the data" in reason for reason in found.reasons)


def correlated(correlation):
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)

    def model(zeros):
        pyro.sample("z", dist.MultivariateNormal(zeros, covariance))

    return model


@pytest.mark.filterwarnings("ignore:the model observes nothing")
@pytest.mark.filterwarnings("ignore:site 'z'. nothing depends on it")
@pytest.mark.parametrize(
    ("correlation", "guide", "levels"),
    [
        (0.95, "mean_field", {BAD}),
        (0.6, "mean_field", {CARE, BAD}),
        (0.95, "full_rank", {"use", CARE}),
    ],
)
def test_a_guide_without_correlations_is_found_out(correlation, guide, levels):
    zeros, settings = torch.zeros(2, dtype=torch.float64), {"num_restarts": 1, "progress": False}
    fitted = ll.fit(correlated(correlation), zeros, guide, **settings)
    found = fitted.check()
    assert found.level in levels
    # A model without data learns nothing, and the verdict says that of an exact guide, too.
    if guide == "full_rank":
        assert "exact" in found.evidence["k-hat, all latents"]


def test_a_site_that_the_data_say_nothing_about_is_named():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("spare", dist.Normal(0.0 * loc, 1.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.warns(UserWarning, match="'spare'"):
        fitted = ll.fit(model, torch.ones(20), num_restarts=1, progress=False)
    found = fitted.check()
    assert found.level == CARE
    assert any("'spare' has learnt nothing" in reason for reason in found.reasons)


def test_too_many_components_ask_for_care():
    x = ll.data.simulate.eruptions(num_rows=150)
    fitted = ll.fit(ll.GaussianMixture(2, 6), x, num_restarts=1, max_steps=700, progress=False)
    assert fitted.check().level != "use"


def test_a_thousand_local_latents_are_judged_one_by_one():
    """Each is ten percent too narrow: together hopeless, one by one fine."""
    N = 400
    x = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model(x):
        with ll.rows(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    fitted = ll.fit(model, x, guide="mean_field", num_restarts=1, progress=False)
    narrow, recorded = altered(fitted, lambda guide: guide.frame.mul_(0.9))
    joint = ll.diagnostics.psis(narrow.log_weights(10_000))
    assert joint.khat > 0.7
    found = recorded.check()
    assert "each datum's latents (rows)" in str(found)
    assert found.level != BAD


def test_a_perfect_guide_that_was_written_down_is_exact():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        precision = len(x) + 1
        pyro.sample("loc", dist.Normal(x.sum() / precision, precision**-0.5))

    x = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fitted = ll.fit(model, x, guide, progress=False)
    found = fitted.check()
    assert found.level == "use"
    assert "exact" in found.evidence["k-hat, all latents"]
    assert fitted.converged


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2))])
def test_a_skewed_posterior_that_is_fitted_well_is_not_refused(seed):
    """Its weights pile up at the edge of their tail, which is not a heavy one."""

    def model(x):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with ll.rows(x):
            pyro.sample("x", dist.Exponential(t.exp()), obs=x)

    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(20, dtype=torch.float64).exponential_(generator=generator)
    fitted = ll.fit(model, x, num_restarts=1, max_steps=2000, progress=False)
    assert float(fitted.log_weights(1000).std()) < 0.2
    assert fitted.check().level != BAD


def test_weights_of_zero_are_a_verdict_and_no_error():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with ll.rows(x):
            pyro.sample("x", dist.Uniform(loc - 9, loc + 9, validate_args=False), obs=x)

    x = torch.zeros(5, dtype=torch.float64)
    fitted = ll.fit(model, x, num_restarts=1, max_steps=300, progress=False)
    pair = copy.copy(fitted.pair)
    pair.data = pair.data.map(lambda x: x + 1e6)
    assert dataclasses.replace(fitted, pair=pair).check().level == BAD
