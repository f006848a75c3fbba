"""A flow is a bijection, knows its volume, draws what it scores, and leaves the process alone."""

import copy
import math
import pickle
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Independent, Normal
from torch.fx.experimental.proxy_tensor import make_fx

from latentlab import flows
from latentlab.flows import FlowDistribution, check_flow

KINDS = [kind for kind in flows.KINDS if kind != "maf"]  # it is the iaf under another name
MASKED = [kind for kind in KINDS if kind != "planar"]
SHAPES = [(kind, "sample") for kind in KINDS] + [(kind, "density") for kind in MASKED]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stirred(kind, num_features=3, seed=0, dtype=torch.float64, strength=0.1, **settings):
    """A flow away from the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = flows.make(kind, num_features, **settings).to(dtype)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(strength * torch.randn_like(parameter))
    return flow


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


# ---- laws of every kind -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "orientation"), SHAPES)
@pytest.mark.parametrize("affine", ["diagonal", "triangular", "none"])
def test_a_new_flow_is_the_identity(kind, orientation, affine):
    flow = flows.make(kind, 4, orientation=orientation, affine=affine).double()
    noise = normal(6, 4)
    for there in (flow.push, flow.pull):
        value, log_det = there(noise)
        torch.testing.assert_close(value, noise)
        torch.testing.assert_close(log_det, torch.zeros(6).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "orientation"), SHAPES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), num_features=st.integers(1, 5))
def test_pulling_undoes_pushing(kind, orientation, seed, num_features):
    flow = stirred(kind, num_features, seed, orientation=orientation)
    noise = normal(7, num_features, seed=seed)
    value, stretch = flow.push(noise)
    back, shrink = flow.pull(value.clone())
    torch.testing.assert_close(back, noise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shrink, -stretch, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "orientation"), SHAPES)
@pytest.mark.parametrize("affine", ["diagonal", "triangular"])
def test_log_det_is_that_of_the_jacobian(kind, orientation, affine):
    flow = stirred(kind, 3, orientation=orientation, affine=affine)
    for there in (flow.push, flow.pull):
        for x in normal(4, 3):
            jacobian = torch.autograd.functional.jacobian(lambda v, f=there: f(v)[0], x)
            torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], there(x)[1])


@pytest.mark.parametrize(("kind", "orientation"), SHAPES)
@pytest.mark.parametrize("num_features", [1, 2, 5])
def test_every_kind_passes_the_check(kind, orientation, num_features):
    found = check_flow(stirred(kind, num_features, orientation=orientation), num_samples=2000)
    assert found.ok, found
    assert found.round_trip < 1e-9
    assert found.khat < 0.7


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("orientation", ["sample", "density"])
@pytest.mark.parametrize("num_features", [1, 3])
def test_a_conditional_flow_is_one_for_every_context(kind, orientation, num_features):
    flow = stirred(kind, num_features, num_context=2, orientation=orientation, strength=0.2)
    contexts, noise = normal(4, 2, seed=1), normal(5, 1, num_features)
    value, log_det = flow.push(noise, contexts)
    assert value.shape == (5, 4, num_features)
    assert log_det.shape == (5, 4)
    for c, context in enumerate(contexts):
        alone, alone_det = flow.push(noise[:, 0], context)
        torch.testing.assert_close(value[:, c], alone)
        torch.testing.assert_close(log_det[:, c], alone_det)
    assert check_flow(flow, context=contexts[0], num_samples=1000).ok
    assert (value[:, 0] - value[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "orientation"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_keep_their_precision(kind, orientation, dtype):
    flow = stirred(kind, 3, dtype=dtype, orientation=orientation, strength=0.05)
    value, log_det = flow.push(normal(5, 3, dtype=dtype))
    noise, back_det = flow.pull(value.detach().clone())
    assert {t.dtype for t in (value, log_det, noise, back_det)} == {dtype}
    assert check_flow(flow).ok


@pytest.mark.parametrize(("kind", "orientation"), SHAPES)
def test_leading_axes_are_free(kind, orientation):
    flow = stirred(kind, 3, orientation=orientation)
    noise = normal(2, 4, 3)
    for there in (flow.push, flow.pull):
        together, log_det = there(noise)
        one, one_det = there(noise[1, 2])
        assert together.shape == (2, 4, 3)
        torch.testing.assert_close(together[1, 2], one)
        torch.testing.assert_close(log_det[1, 2], one_det)


@pytest.mark.parametrize(("kind", "orientation"), SHAPES)
def test_both_directions_are_traced(kind, orientation):
    flow = stirred(kind, 3, orientation=orientation)
    for there in (flow.push, flow.pull):
        graph = make_fx(partial(there, context=None))(normal(5, 3))
        other = normal(5, 3, seed=1)
        torch.testing.assert_close(graph(other), there(other))


@pytest.mark.parametrize(("kind", "orientation"), SHAPES)
def test_gradients_of_both_directions_agree(kind, orientation):
    """d value / d noise and d noise / d value are each other's inverses."""
    flow = stirred(kind, 3, orientation=orientation)
    noise = normal(3)
    value = flow.push(noise)[0].detach()
    forward = torch.autograd.functional.jacobian(lambda v: flow.push(v)[0], noise)
    backward = torch.autograd.functional.jacobian(lambda v: flow.pull(v)[0], value)
    torch.testing.assert_close(forward @ backward, torch.eye(3).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("kind", "orientation"), SHAPES)
def test_parameters_can_be_learnt_from_either_direction(kind, orientation):
    """The score of a density has mean zero under its own draws, parameter by parameter."""
    flow = stirred(kind, 2, orientation=orientation, hidden_dims=(8,))
    q, scores = FlowDistribution(flow), []
    for seed in range(40):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            x = q.rsample((50,))
        slopes = torch.autograd.grad(q.log_prob(x).mean(), list(flow.parameters()))
        scores.append(torch.cat([slope.flatten() for slope in slopes]))
    scores = torch.stack(scores)
    z = scores.mean(0) / (scores.std(0) / len(scores) ** 0.5 + 1e-12)
    moving = scores.abs().amax(0) > 1e-8
    assert moving.any()
    assert (z[moving].abs() < 6).all()


# ---- orientation --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKED)
def test_orientation_says_which_direction_takes_one_pass(kind):
    calls = []
    num_features = 6
    for orientation in ("sample", "density"):
        flow = stirred(kind, num_features, orientation=orientation, num_transforms=1)
        flow.transforms[0].hyper.register_forward_hook(lambda *_: calls.append(1))
        cheap, dear = (flow.push, flow.pull)[:: 1 if orientation == "sample" else -1]
        calls.clear()
        cheap(normal(5, num_features))
        assert len(calls) == 1
        calls.clear()
        dear(normal(5, num_features))
        passes = 2 if kind in ("coupling_nsf", "realnvp") else num_features
        assert len(calls) == passes + 1  # and one for the volume


def test_iaf_and_maf_are_one_map():
    iaf, maf = stirred("iaf"), stirred("maf")
    torch.testing.assert_close(iaf.push(normal(5, 3)), maf.push(normal(5, 3)))


@pytest.mark.parametrize("kind", ["iaf", "nsf"])
def test_an_autoregressive_map_is_triangular(kind):
    flow = stirred(kind, 4, num_transforms=1)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.push(v)[0], normal(4))
    torch.testing.assert_close(jacobian, jacobian.tril())
    assert (jacobian.tril(-1).abs() > 0).sum() == 6


@pytest.mark.parametrize("kind", ["coupling_nsf", "realnvp"])
def test_coupled_features_all_meet(kind):
    flow = stirred(kind, 6, num_transforms=4)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.push(v)[0], normal(6))
    assert (jacobian.abs() > 0).all()


@pytest.mark.parametrize("kind", ["nsf", "coupling_nsf"])
def test_the_affine_map_carries_a_spline_to_where_the_data_are(kind):
    """Splines end at 5: location 100 and scale 30 have to be somebody else's work."""
    flow = stirred(kind, 2)
    with torch.no_grad():
        flow.loc.fill_(100.0)
        flow.log_scale.fill_(math.log(30.0))
    with torch.no_grad():
        inner, _ = stirred(kind, 2, affine="none").push(normal(100, 2))
        value, _ = flow.push(normal(100, 2))
    assert (inner.abs() < 5.5).all()
    assert float(value.mean()) == pytest.approx(100, abs=20)
    assert check_flow(flow).ok


# ---- the last push ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_of_the_value_just_pushed_is_remembered(kind):
    flow, noise = stirred(kind), normal(5, 3)
    value, log_det = flow.push(noise)
    back, back_det = flow.pull(value)
    assert back is noise
    assert torch.equal(back_det, -log_det)
    assert flow.pull(value.clone())[0] is not noise


def test_nothing_is_remembered_of_other_parameters():
    """A fused optimiser writes to parameters without counting it, and .data goes unnoticed too."""
    for change in ("fused", "plain", "data", "load"):
        flow = stirred("iaf")
        noise = normal(5, 3)
        value, _ = flow.push(noise)
        if change in ("fused", "plain"):
            value.square().sum().backward(retain_graph=True)
            torch.optim.Adam(flow.parameters(), lr=0.1, fused=change == "fused").step()
        elif change == "data":
            flow.loc.data.add_(0.1)
        else:
            flow.load_state_dict(stirred("iaf", seed=1).state_dict())
        back, log_det = flow.pull(value)
        expected = flow.pull(value.clone())
        torch.testing.assert_close((back, log_det), expected)
        assert (back - noise).abs().max() > 1e-3


def test_nothing_is_remembered_of_a_changed_value_or_another_context():
    flow, noise = stirred("iaf", num_context=2), normal(5, 3)
    context = normal(5, 2)
    with torch.no_grad():
        value, _ = flow.push(noise, context)
        assert flow.pull(value, context)[0] is noise
        assert flow.pull(value, context.clone())[0] is not noise
        value.add_(1.0)
        torch.testing.assert_close(flow.pull(value, context), flow.pull(value.clone(), context))
        value, _ = flow.push(noise, context)
        context.add_(1.0)
        assert flow.pull(value, context)[0] is not noise


def test_a_draw_without_a_gradient_is_scored_with_one():
    flow = stirred("iaf")
    with torch.no_grad():
        value, _ = flow.push(normal(5, 3))
    noise, log_det = flow.pull(value)
    found = torch.autograd.grad((noise.sum() + log_det.sum()), flow.loc)[0]
    again, again_det = flow.pull(value.clone())
    expected = torch.autograd.grad((again.sum() + again_det.sum()), flow.loc)[0]
    torch.testing.assert_close(found, expected)
    assert found.abs().min() > 0


def test_a_value_that_is_gone_is_forgotten():
    flow = stirred("iaf")
    flow.push(normal(5, 3))
    assert flow._last._entry is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_remembers_nothing_and_is_the_same_map(kind):
    flow = stirred(kind)
    value, _ = flow.push(normal(5, 3))
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(other.push(normal(5, 3))[0], value)
        assert other.pull(value)[0] is not normal(5, 3)
        torch.testing.assert_close(other.pull(value)[0], normal(5, 3), rtol=1e-6, atol=1e-6)


# ---- as a distribution --------------------------------------------------------------------------


def test_a_flow_at_the_identity_is_the_standard_normal():
    q = FlowDistribution(flows.make("nsf", 3).double())
    x = normal(5, 3)
    expected = Independent(Normal(torch.zeros(3).double(), 1.0), 1).log_prob(x)
    torch.testing.assert_close(q.log_prob(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_that_of_the_draws(kind):
    """E_q[p / q] = 1 for any density p, whose draws need none of q's."""
    q = FlowDistribution(stirred(kind, 2))
    torch.manual_seed(0)
    with torch.no_grad():
        x = q.rsample((20_000,))
        p = Independent(Normal(x.mean(0), 0.7 * x.std(0)), 1)
        ratio = (p.log_prob(x) - q.log_prob(x)).exp()
    se = ratio.std() / len(ratio) ** 0.5
    assert abs(ratio.mean() - 1) < 5 * se + 1e-3


def test_a_context_is_a_batch_of_distributions():
    flow = stirred("iaf", num_context=2)
    q = FlowDistribution(flow, normal(4, 2))
    assert q.batch_shape == (4,)
    assert q.event_shape == (3,)
    assert q.sample((7,)).shape == (7, 4, 3)
    wide = q.expand((6, 4))
    x = wide.rsample()
    assert x.shape == (6, 4, 3)
    torch.testing.assert_close(wide.log_prob(x.clone())[2], q.log_prob(x[2].clone()))


# ---- the check ----------------------------------------------------------------------------------


class Wrong(nn.Module):
    """An affine flow with one of four faults."""

    def __init__(self, fault=None):
        super().__init__()
        self.num_features, self.fault = 2, fault
        self.scale = nn.Parameter(torch.tensor([2.0, 0.5]).double())

    def push(self, noise, context=None):
        log_det = self.scale.log().sum().expand(noise.shape[:-1])
        return self.scale * noise, log_det + (0.1 if self.fault == "log_det" else 0.0)

    def pull(self, value, context=None):
        log_det = -self.scale.log().sum().expand(value.shape[:-1])
        shift = 0.01 if self.fault == "inverse" else 0.0
        log_det = log_det + (0.3 if self.fault == "density" else 0.0)
        return value / self.scale + shift, log_det


def test_a_right_flow_passes():
    assert check_flow(Wrong()).ok
    assert "as it should be" in str(check_flow(Wrong()))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("log_det", "log_det is not that of push"),
        ("inverse", "pull does not undo push"),
        ("density", "draws are scored by another density"),
        ("density", "integrates to 1.3"),
    ],
)
def test_a_wrong_flow_is_caught_and_told(fault, words):
    found = check_flow(Wrong(fault))
    assert not found.ok
    assert words in str(found)


def test_a_flow_that_scores_what_it_does_not_draw_is_caught():
    """zuko's Gaussianisation flow, whose samples and scores disagree by nats."""
    flows.make("iaf", 2)  # zuko is imported by it, and leaves validation on
    from zuko.flows import GF

    class Gaussianisation(nn.Module):
        num_features = 2

        def __init__(self):
            super().__init__()
            self.flow = GF(2, transforms=3)

        def pull(self, value, context=None):
            return self.flow.transform(context).call_and_ladj(value)

        def push(self, noise, context=None):
            value = self.flow.transform(context).inv(noise)
            return value, -self.pull(value)[1]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = check_flow(Gaussianisation().double())
    assert not found.ok
    assert max(found.score, found.round_trip) > 0.01


def test_a_flow_that_gives_nan_is_caught():
    flow = stirred("iaf")
    with torch.no_grad():
        flow.loc[0] = math.nan
    assert not check_flow(flow).ok


# ---- planar -------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), strength=st.floats(0.1, 3.0))
def test_a_planar_flow_is_invertible_whatever_its_parameters(seed, strength):
    flow = stirred("planar", 3, seed, strength=strength)
    noise = normal(20, 3, seed=seed)
    value, _ = flow.push(noise)
    torch.testing.assert_close(flow.pull(value.clone())[0], noise, rtol=1e-6, atol=1e-6)


def test_a_planar_flow_bends_as_its_formula_says():
    flow = stirred("planar", 2, num_transforms=1)
    w, u, b = (part[0].detach() for part in (flow.weight, flow.shift, flow.bias))
    u_hat = u + ((math.log(1 + (math.e - 1) * math.exp(w @ u)) - 1) - w @ u) * w / (w @ w)
    x = normal(4, 2)
    expected = x + torch.tanh(x @ w + b)[:, None] * u_hat
    torch.testing.assert_close(flow.push(x)[0].detach(), expected)
    assert float(w @ u_hat) > -1


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "glow"}, 'kind: expected one of "iaf"'),
        ({"num_features": 0}, "num_features must be an int >= 1, got 0"),
        ({"num_features": 2.5}, "num_features must be an int >= 1, got 2.5"),
        ({"num_transforms": True}, "num_transforms must be an int >= 1"),
        ({"num_context": -1}, "num_context must be an int >= 0"),
        ({"hidden_dims": (64, 0)}, r"hidden_dims\[1\] must be an int >= 1"),
        ({"orientation": "backward"}, 'orientation: expected "sample" or "density"'),
        ({"affine": "full"}, 'affine: expected "diagonal"'),
        ({"kind": "nsf", "num_bins": 1}, "num_bins must be an int >= 2"),
        ({"kind": "planar", "num_context": 2}, '"planar" takes no context'),
        ({"kind": "planar", "orientation": "density"}, '"planar" takes no context'),
    ],
)
def test_settings_out_of_range_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        flows.make(**{"kind": "iaf", "num_features": 3} | settings)


def test_values_and_contexts_of_other_shapes_are_named():
    flow = flows.make("iaf", 3)
    with pytest.raises(ValueError, match=r"noise: expected shape \(\.\.\., 3\).*got \(5, 2\)"):
        flow.push(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"value: expected shape \(\.\.\., 3\)"):
        flow.pull(torch.zeros(()))
    with pytest.raises(ValueError, match="context: expected none"):
        flow.push(torch.zeros(5, 3), torch.zeros(5, 2))
    conditional = flows.make("iaf", 3, num_context=2)
    with pytest.raises(ValueError, match="context: expected one"):
        conditional.push(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"context: expected shape \(\.\.\., 2\), got \(5, 1\)"):
        conditional.push(torch.zeros(5, 3), torch.zeros(5, 1))
    with pytest.raises(ValueError, match=r"value: expected shape"):
        flows.make("planar", 3).pull(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="planar flow takes none"):
        flows.make("planar", 3).push(torch.zeros(5, 3), torch.zeros(5, 2))


# ---- the rest of the process --------------------------------------------------------------------

SCRIPT = """
import threading, torch
from torch.distributions import Distribution, Normal
from torch.distributions.transforms import _InverseTransform
import pyro, pyro.distributions as dist
from latentlab import flows

before = dict(vars(Distribution)), _InverseTransform.__name__
def work():
    flow = flows.make("nsf", 2)
    assert flows.check_flow(flow).ok
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert (dict(vars(Distribution)), _InverseTransform.__name__) == before
for make in (Normal, dist.Normal):
    try:
        make(0.0, torch.tensor(-1.0))
    except ValueError:
        continue
    raise SystemExit("a negative scale went through")
import zuko  # whoever uses it on his own finds it as it wants to be
zuko.flows.NSF(2)().log_prob(zuko.flows.NSF(2)().sample())
print("fine")
"""


def test_validation_of_distributions_stays_as_it_was(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.stdout.strip() == "fine", ended.stderr[-2000:]


def test_flows_of_several_threads_do_not_meet():
    """Each thread pulls what it pushed, of one flow: another thread's push is not taken for it."""
    flow, faults = stirred("iaf"), []

    def work(seed):
        noise = normal(4, 3, seed=seed)
        for _ in range(20):
            value, _ = flow.push(noise)
            if not torch.allclose(flow.pull(value)[0], noise):
                faults.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


@pytest.mark.parametrize("kind", ["maf", "nsf"])
def test_a_masked_network_lets_each_feature_see_all_before_it(kind):
    """Of each map the Jacobian is a full triangle, or a dependence could not be learned."""
    D = 12
    for wide in (None, (D,)):
        flow = stirred(kind, D, hidden_dims=wide, num_transforms=1, affine="none")
        noise = torch.randn(D, dtype=torch.float64)
        slopes = torch.autograd.functional.jacobian(lambda n, f=flow: f.push(n)[0], noise)
        assert int((slopes != 0).sum()) == D * (D + 1) // 2
    with pytest.raises(
        ValueError, match=r"^hidden_dims: .*at least num_features=12, got \[64, 11\]"
    ):
        flows.make(kind, D, hidden_dims=(64, 11))


class Loses:
    """A flow that gives the log-determinant of each number, or loses a column."""

    num_features = 2

    def __init__(self, way):
        self.way = way

    def push(self, noise, context=None):
        if self.way == "numbers":
            return noise, torch.zeros_like(noise)
        return (noise if self.way == "pull" else noise[..., :1]), torch.zeros(len(noise))

    def pull(self, value, context=None):
        return value


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (3, "got int; without num_features, push, pull"),
        (torch.nn.Linear(2, 2), "got Linear; without num_features, push, pull"),
        (Loses, "got the class Loses; make one of it"),
        (Loses("numbers"), r"flow.push: .* got \(100, 2\) and \(100, 2\)"),
        (Loses("columns"), r"flow.push: .* got \(100, 1\) and \(100,\)"),
        (Loses("pull"), r"flow.pull: expected a value and a log-determinant"),
    ],
)
def test_what_is_no_flow_is_told(flow, message):
    with pytest.raises(ValueError, match=message):
        check_flow(flow, num_samples=100)
