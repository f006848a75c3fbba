"""Models without latents: maximum likelihood, rows kept aside, and the flow that fits a table."""

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import latentlab as ll
from latentlab.inference.batches import split
from latentlab.inference.held_out import HeldOut
from latentlab.inference.pair import Arguments
from latentlab.protocols import HoldsOut

QUICK = {"kind": "maf", "hidden_dims": (16,), "num_transforms": 1}


def normal(x=None, size=None):
    loc = pyro.param("loc", torch.zeros(()))
    scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc, scale), obs=x)


def numbers(num=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(num, generator=generator, dtype=torch.float64)


def gaussian(num=600, seed=0):
    """Rows of a bivariate Gaussian with correlation 0.8, and their true log-density."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num, 2, generator=generator, dtype=torch.float64)
    tril = torch.tensor([[2.0, 0.0], [0.8 * 5, 0.6 * 5]], dtype=torch.float64)
    true = torch.distributions.MultivariateNormal(torch.tensor([1.0, -30.0]), scale_tril=tril)
    x = noise @ tril.T + true.loc
    return x, true.log_prob(x)


@pytest.fixture(scope="module")
def fitted():
    density = ll.FlowDensity(2, **QUICK)
    return ll.fit(density, gaussian()[0], lr=0.01, max_steps=2_500, progress=False)


# ---- models without latents --------------------------------------------------------------------


def test_a_model_without_latents_is_fitted_by_maximum_likelihood():
    x = numbers()
    posterior = ll.fit(normal, x, progress=False)
    assert posterior.converged
    assert float(posterior.params["loc"]) == pytest.approx(float(x.mean()), abs=1e-2)
    scale = float(x.std(correction=0))
    assert float(posterior.params["scale"]) == pytest.approx(scale, rel=1e-2)
    best = -len(x) * (math.log(scale) + 0.5 * math.log(2 * math.pi) + 0.5)
    assert posterior.elbo.value == pytest.approx(best, abs=0.02)
    assert posterior.elbo.se == 0.0


def test_without_rows_kept_aside_it_asks_for_care():
    verdict = ll.fit(normal, numbers(), progress=False).check()
    assert verdict.level == "use with care"
    assert "no latents" in verdict.reasons[0]
    assert verdict.next_steps == ("fit with held_out=0.1",)


def test_with_them_it_may_be_used():
    posterior = ll.fit(normal, numbers(), held_out=0.2, progress=False)
    verdict = posterior.check()
    assert verdict.level == "use", verdict
    assert "rows kept aside" in verdict.reasons[0]
    assert "held-out rows" in verdict.evidence


def test_it_has_nothing_to_sample_and_everything_to_predict(tmp_path):
    posterior = ll.fit(normal, numbers(), held_out=0.2, progress=False)
    assert posterior.sample(3) == {}
    assert posterior.summary().empty
    assert posterior.predict(5)["x"].shape == (5, 160)
    new = numbers(50, seed=9)
    loc, scale = posterior.params["loc"], posterior.params["scale"]
    expected = float(dist.Normal(loc, scale).log_prob(new).sum())
    assert posterior.log_prob(new).value == pytest.approx(expected)
    posterior.save(tmp_path)
    again = ll.load(tmp_path, model=normal)
    assert again.held_out_rows == posterior.held_out_rows
    assert again.check() == posterior.check()
    assert torch.equal(again.params["loc"], loc)


def test_a_model_with_neither_latents_nor_parameters_is_refused():
    def nothing(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="no continuous latent"):
        ll.fit(nothing, numbers(), progress=False)


# ---- rows kept aside ---------------------------------------------------------------------------


def test_rows_kept_aside_are_not_fitted():
    data = Arguments((torch.arange(50.0), torch.arange(50.0) * 2))
    fitted, held = split(data, 0.2, seed=1)
    both = torch.cat([fitted.args[0], held.args[0]])
    assert both.sort().values.tolist() == list(range(50))
    assert len(held.args[0]) == 10
    assert torch.equal(held.args[1], 2 * held.args[0])
    assert torch.equal(split(data, 0.2, seed=1)[1].args[0], held.args[0])
    assert not torch.equal(split(data, 0.2, seed=2)[1].args[0], held.args[0])


def test_the_held_out_density_of_a_conjugate_normal_is_its_predictive():
    x = numbers(100)

    def model(x=None, size=None):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(()), 10.0))
        with ll.rows(x, size):
            return pyro.sample("x", dist.Normal(loc, 2.0), obs=x)

    posterior = ll.fit(model, x, held_out=0.3, num_restarts=1, progress=False)
    fitted = posterior.pair.data.args[0]
    assert len(fitted) == 70
    held = torch.tensor([v for v in x.tolist() if v not in set(fitted.tolist())])
    var = 1 / (0.01 + 70 / 4)
    predictive = dist.Normal(var * fitted.sum() / 4, (var + 4) ** 0.5)
    exact = predictive.log_prob(held.double())
    assert posterior.held_out.value == pytest.approx(float(exact.mean()), abs=0.02)
    assert posterior.held_out.se == pytest.approx(float(exact.std()) / 30**0.5, rel=0.1)
    assert posterior.check().level in ("use", "use with care")


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, math.nan, math.inf, True, "0.1", (0.1,)])
def test_a_share_that_is_none_is_named(share):
    with pytest.raises(ValueError, match=r"held_out: expected a share of the rows in \[0, 1\)"):
        ll.fit(normal, numbers(), held_out=share, progress=False)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_share_that_leaves_no_rows_is_refused(share):
    with pytest.raises(ValueError, match="at least 2 rows on either side"):
        ll.fit(normal, numbers(), held_out=share, progress=False)


def test_data_without_rows_have_none_to_keep_aside():
    with pytest.raises(ValueError, match="one row for each datum"):
        ll.fit(normal, torch.tensor(1.0), held_out=0.2, progress=False)


def test_the_gap_has_the_error_of_two_samples():
    found = HeldOut(ll.diagnostics.Estimate(-2.0, 0.3), ll.diagnostics.Estimate(-1.5, 0.4), 1.0)
    assert (found.gap.value, found.gap.se) == pytest.approx((0.5, 0.5))
    assert HeldOut.from_spec(found.spec()) == found


# ---- the flow ----------------------------------------------------------------------------------


def test_a_flow_fits_a_gaussian_to_its_true_density(fitted):
    new, true = gaussian(2_000, seed=1)
    found = fitted.model.log_prob(new)
    assert float((true - found).mean()) < 0.05
    assert fitted.check().level != "do not use"


def test_its_density_integrates_to_one(fitted):
    first, second = torch.linspace(-14, 16, 300), torch.linspace(-70, 10, 300)
    grid = torch.cartesian_prod(first, second)
    cell = float((first[1] - first[0]) * (second[1] - second[0]))
    assert float(fitted.model.log_prob(grid).exp().sum()) * cell == pytest.approx(1.0, abs=0.01)


def test_its_samples_come_from_its_density(fitted):
    x = fitted.model.sample(20_000, seed=1)
    assert torch.equal(x, fitted.model.sample(20_000, seed=1))
    own, data = fitted.model.log_prob(x), gaussian(20_000, seed=2)[1]
    assert float(own.mean()) == pytest.approx(float(data.mean()), abs=0.1)
    assert x.mean(0).tolist() == pytest.approx([1.0, -30.0], abs=0.6)


def test_a_tenth_of_the_rows_is_kept_aside_unless_told(fitted):
    assert isinstance(ll.FlowDensity(2), HoldsOut)
    assert len(fitted.pair.data.args[0]) == 540
    assert fitted.held_out.value == pytest.approx(float(gaussian()[1].mean()), abs=0.3)
    how = {"max_steps": 5, "progress": False}
    told = ll.fit(ll.FlowDensity(2, **QUICK), gaussian()[0], held_out=0.0, **how)
    assert told.held_out is None
    assert len(told.pair.data.args[0]) == 600
    few = ll.fit(ll.FlowDensity(2, **QUICK), gaussian(12)[0], **how)
    assert few.held_out is None


def test_the_fit_ends_before_it_follows_its_rows_too_closely():
    x, _ = gaussian(40)
    new, _ = gaussian(2_000, seed=3)
    how = {"lr": 0.03, "max_steps": 1_000, "progress": False}
    arguments = {"kind": "nsf", "hidden_dims": (32,), "num_transforms": 1}
    stopped = ll.fit(ll.FlowDensity(2, **arguments), x, held_out=0.25, **how)
    running = ll.fit(ll.FlowDensity(2, **arguments), x, held_out=0.0, **how)
    gained = stopped.model.log_prob(new).mean() - running.model.log_prob(new).mean()
    assert float(gained) > 0
    assert "rows kept aside" in stopped.stop_reason or "max_steps" in stopped.stop_reason


@pytest.mark.parametrize(
    ("offset", "unit"), [(1e12, 1.0), (0.0, 1e140), (0.0, 1e-200), (5.0, 1e3)]
)
def test_units_do_not_matter(offset, unit):
    x, _ = gaussian(100)
    how = {"max_steps": 60, "lr": 0.01, "progress": False}
    plain = ll.fit(ll.FlowDensity(2, **QUICK), x, **how)
    moved = ll.fit(ll.FlowDensity(2, **QUICK), offset + unit * x, **how)
    found = moved.model.log_prob(offset + unit * x) + 2 * math.log(unit)
    assert found.isfinite().all()
    assert found.numpy() == pytest.approx(plain.model.log_prob(x).numpy(), abs=2e-2)


def test_numbers_beyond_float64s_squares_are_refused():
    with pytest.raises(ValueError, match="choose a larger unit"):
        ll.fit(ll.FlowDensity(2, **QUICK), 1e200 * gaussian(20)[0], progress=False)


def test_a_fit_is_the_same_each_time_and_leaves_the_generator_alone():
    x, _ = gaussian(50)
    before = torch.get_rng_state()
    how = {"max_steps": 10, "progress": False}
    first, again = (ll.fit(ll.FlowDensity(2, **QUICK), x, **how) for _ in range(2))
    assert torch.equal(first.model.log_prob(x), again.model.log_prob(x))
    first.model.sample(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_column_is_enough():
    x = numbers(300)[:, None]
    posterior = ll.fit(ll.FlowDensity(1, **QUICK), x, lr=0.01, max_steps=600, progress=False)
    true = dist.Normal(3.0, 2.0).log_prob(x[:, 0])
    assert float(posterior.model.log_prob(x).mean()) == pytest.approx(float(true.mean()), abs=0.1)
    posterior.plot("fit")


def test_it_is_stored_and_labels_rows(fitted, tmp_path):
    x, _ = gaussian(30)
    fitted.save(tmp_path)
    again = ll.load(tmp_path)
    assert torch.equal(again.model.log_prob(x), fitted.model.log_prob(x))
    assert again.held_out_rows == fitted.held_out_rows
    labels = fitted.model.label_rows({}, x)
    assert torch.equal(labels["log_prob"], fitted.model.log_prob(x))


def test_it_draws_itself_and_reports(fitted, tmp_path):
    ax = fitted.plot("fit")
    assert ax.get_label() == "data with contours of the density"
    fitted.plot("losses")
    page = fitted.report(tmp_path).read_text()
    assert "rows kept aside" in page
    wide = torch.cat([gaussian(60)[0]] * 2, 1)
    wide[:, 2:] += torch.randn(60, 2, dtype=torch.float64)
    posterior = ll.fit(ll.FlowDensity(4, **QUICK), wide, max_steps=20, progress=False)
    assert "new rows" in posterior.plot("fit").get_label()


def test_float32_rows_are_welcome():
    x = gaussian(100)[0].float()
    posterior = ll.fit(ll.FlowDensity(2, **QUICK), x, max_steps=20, progress=False)
    assert posterior.model.log_prob(x).isfinite().all()
    assert posterior.losses.isfinite().all()


def test_one_outlier_leaves_it_finite():
    x, _ = gaussian(100)
    x[7, 0] = 1e8
    with pytest.warns(UserWarning, match="row 7 of column 'x0'"):
        posterior = ll.fit(ll.FlowDensity(2, **QUICK), x, max_steps=50, progress=False)
    assert posterior.losses.isfinite().all()
    assert posterior.model.log_prob(x).isfinite().all()


def test_a_constant_column_is_told_and_finite():
    x, _ = gaussian(60)
    x[:, 1] = 4.0
    with pytest.warns(UserWarning, match="constant|all values"):
        posterior = ll.fit(ll.FlowDensity(2, **QUICK), x, max_steps=20, progress=False)
    assert posterior.losses.isfinite().all()


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.full((5, 2), math.nan), "NaN"),
        (torch.tensor([[1.0, math.inf], [2.0, 3.0]]), "inf"),
        (torch.zeros(5), "x"),
        (torch.zeros(5, 3), r"expected shape \(N, 2\)"),
        (torch.zeros(1, 2), "x"),
        (np.array([["a", "b"]]), "x"),
    ],
)
def test_bad_rows_are_named(x, says):
    with pytest.raises((ValueError, TypeError), match=says):
        ll.fit(ll.FlowDensity(2, **QUICK), x, max_steps=5, progress=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_features": 0}, "num_features"),
        ({"num_features": 2.5}, "num_features"),
        ({"num_features": 2, "kind": "spline"}, "kind"),
        ({"num_features": 2, "kind": "planar"}, "cannot score"),
        ({"num_features": 2, "held_out": 1.0}, "held_out"),
        ({"num_features": 2, "num_transforms": 0}, "num_transforms"),
        ({"num_features": 2, "num_bins": 1}, "num_bins"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        ll.FlowDensity(**arguments)


@pytest.mark.parametrize("row", [0, 7, 23, 41, 59])
def test_a_fault_is_told_of_the_rows_as_they_were_given(row):
    x = torch.randn(60, 2, dtype=torch.float64)
    x[row, 1] = torch.nan
    with pytest.raises(ValueError, match=rf"x has 1 NaN \(first at \[{row}, 1\]\)"):
        ll.fit(ll.FlowDensity(num_features=2), x, progress=False, max_steps=5)
    with pytest.raises(ValueError, match=r"num_features=3, got \(60, 2\)"):
        ll.fit(ll.FlowDensity(num_features=3), x.nan_to_num(), progress=False, max_steps=5)


SPLIT = {
    "flow": lambda: ll.FlowDensity(num_features=2),
    "autoencoder": lambda: ll.Autoencoder(num_features=2, latent_dim=1, hidden_dims=(4,)),
}


@pytest.mark.parametrize("row", [0, 7, 23, 41, 59])
@pytest.mark.parametrize("name", SPLIT)
def test_a_far_row_is_named_as_it_was_given(name, row):
    x = torch.randn(60, 2, dtype=torch.float64)
    x[row, 1] = 1e8
    with pytest.warns(UserWarning, match=rf"row {row} of column 'x1' \(1e\+08\)") as caught:
        ll.fit(SPLIT[name](), x, progress=False, max_steps=5)
    assert len(caught) == 1


@pytest.mark.parametrize("name", SPLIT)
def test_rows_that_do_not_differ_are_counted_as_they_were_given(name):
    with pytest.warns(UserWarning, match="all 60 rows are equal"):
        ll.fit(SPLIT[name](), torch.ones(60, 2).double(), progress=False, max_steps=5)


def test_a_constant_column_is_told():
    x = torch.randn(60, 2, dtype=torch.float64)
    x[:, 0] = 2.5
    with pytest.warns(UserWarning, match="constant column 'x0'") as caught:
        ll.fit(ll.FlowDensity(num_features=2), x, progress=False, max_steps=5)
    assert len(caught) == 1


@pytest.mark.parametrize("name", SPLIT)
def test_what_is_fitted_to_rows_asks_for_them(name):
    kind = type(SPLIT[name]()).__name__
    with pytest.raises(ValueError, match=f"data: {kind} is fitted to rows, got none; give it"):
        ll.fit(SPLIT[name](), None, progress=False)
    frame = pd.DataFrame({"a": np.arange(9.0), "b": ["q"] * 9})
    with pytest.raises((TypeError, ValueError), match=r"^x: .*'b' is not numeric"):
        ll.fit(SPLIT[name](), frame, progress=False)
