"""Hidden Markov chains against sums over all paths, plain loops, and hmmlearn."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from latentlab.distributions import hmm, hmm_xla

K, T = 3, 6


@pytest.fixture(params=["torch", "xla"], autouse=False)
def kernel(request, monkeypatch):
    """Each of the two kernels for all shapes."""
    if request.param == "xla":
        pytest.importorskip("jax")
    chosen = request.param == "xla"
    monkeypatch.setattr(hmm_xla, "is_worthwhile", lambda layout, x: chosen)
    return request.param


def chain(seed, *, num_states=K, steps=T, batch=(), own=(), sparse=False, dtype=torch.float64):
    """Probabilities and log-likelihoods at random; parameters have the batch shape ``own``."""
    r = np.random.default_rng(seed)
    initial = r.dirichlet(np.ones(num_states), size=own)
    transitions = r.dirichlet(np.ones(num_states), size=(*own, num_states))
    if sparse:
        initial, transitions = np.eye(num_states)[0] * np.ones((*own, 1)), np.triu(transitions)
        transitions = transitions / transitions.sum(-1, keepdims=True)
    seen = 2 * r.normal(size=(*batch, steps, num_states)) - 1
    return [torch.as_tensor(x, dtype=dtype) for x in (initial, transitions, seen)]


def plain_log_prob(initial, transitions, log_likelihoods):
    """The recursion in logarithms, step by step, with torch's own derivatives; one chain."""
    now = initial.log() + log_likelihoods[0]
    for seen in log_likelihoods[1:]:
        now = (now[:, None] + transitions.log()).logsumexp(0) + seen
    return now.logsumexp(0)


def close(found, expected, tolerance=1e-10):
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ---- all paths -------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True], ids=["any move", "left to right"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("kernel")
def test_a_chain_is_the_sum_over_all_paths(seed, sparse):
    initial, transitions, seen = chain(seed, batch=(4,), sparse=sparse)
    seen[1, 2], seen[2, 0], seen[3, -1] = 0.0, 0.0, 0.0  # missing observations
    lengths = torch.tensor([6, 5, 6, 1])
    seen[1, 5:], seen[3, 1:] = torch.nan, 1e300  # whatever stands behind the end
    arguments = (initial, transitions, seen, lengths)
    paths, log_joint = hmm.decode(*arguments)
    for b, length in enumerate(lengths.tolist()):
        found = oracles.hidden_chain(initial, transitions, seen[b, :length])
        close(hmm.log_prob(*arguments)[b], found.log_prob)
        close(hmm.filter(*arguments)[b, :length], found.filtered)
        close(hmm.predict_next(*arguments)[b, :length], found.predicted)
        close(hmm.forecast(*arguments)[b], found.forecast)
        close(hmm.smooth(*arguments)[b, :length], found.smoothed)
        close(hmm.pairwise(*arguments)[b, : length - 1], found.pairwise)
        assert paths[b, :length].tolist() == found.best.tolist()
        close(log_joint[b], found.best_log_joint)


@pytest.mark.usefixtures("kernel")
def test_what_does_not_exist_has_probability_zero_and_state_minus_one():
    initial, transitions, seen = chain(0, batch=(2,))
    arguments = (initial, transitions, seen, torch.tensor([2, 6]))
    for function in (hmm.filter, hmm.smooth, hmm.predict_next):
        assert (function(*arguments)[0, 2:] == 0).all()
        assert (function(*arguments)[1] > 0).all()
    assert (hmm.pairwise(*arguments)[0, 1:] == 0).all()
    assert (hmm.decode(*arguments)[0][0, 2:] == -1).all()
    assert (hmm.sample_paths(*arguments, num_samples=3)[:, 0, 2:] == -1).all()
    assert (hmm.sample_paths(*arguments, num_samples=3)[:, 1] >= 0).all()


@pytest.mark.parametrize("sparse", [False, True], ids=["any move", "left to right"])
def test_sampled_paths_have_the_posterior_frequencies(sparse):
    S, steps = 40_000, 4
    initial, transitions, seen = chain(1, steps=steps, batch=(2,), sparse=sparse)
    lengths = torch.tensor([steps, steps - 1])
    generator = torch.Generator().manual_seed(3)
    paths = hmm.sample_paths(initial, transitions, seen, lengths, S, generator)
    assert paths.shape == (S, 2, steps)
    for b, length in enumerate(lengths.tolist()):
        expected = oracles.hidden_chain(initial, transitions, seen[b, :length]).path_probs
        codes = (paths[:, b, :length] * K ** torch.arange(length - 1, -1, -1)).sum(-1)
        counts = np.bincount(codes, minlength=K**length)
        assert (counts[expected == 0] == 0).all()
        likely = expected * S > 5
        chi2 = ((counts - S * expected)[likely] ** 2 / (S * expected)[likely]).sum()
        freedom = likely.sum() - 1
        assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_a_generator_repeats_its_paths():
    arrays = chain(0, batch=(3,))
    draws = [
        hmm.sample_paths(*arrays, num_samples=5, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert torch.equal(*draws)


# ---- derivatives -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("kernel")
def test_derivatives_are_those_of_a_plain_loop(seed):
    arrays = [x.requires_grad_() for x in chain(seed, steps=30, batch=(5,))]
    weights = torch.linspace(-1.0, 2.0, 5, dtype=torch.float64)
    lengths = torch.tensor([30, 1, 2, 17, 29])
    found = torch.autograd.grad((weights * hmm.log_prob(*arrays, lengths)).sum(), arrays)
    initial, transitions, seen = arrays
    total = sum(
        w * plain_log_prob(initial, transitions, x[:n])
        for w, x, n in zip(weights, seen, lengths, strict=True)
    )
    for mine, theirs in zip(found, torch.autograd.grad(total, arrays), strict=True):
        close(mine, theirs, 1e-8)


@pytest.mark.usefixtures("kernel")
def test_first_and_second_derivatives_pass_gradcheck():
    arrays = [x.requires_grad_() for x in chain(4, steps=3, batch=(2,))]
    lengths = torch.tensor([3, 2])
    assert torch.autograd.gradcheck(hmm.log_prob, (*arrays, lengths))
    assert torch.autograd.gradgradcheck(hmm.log_prob, (*arrays, lengths))


@pytest.mark.parametrize("steps", [8, 1])
def test_a_hessian_is_that_of_a_plain_loop(steps):
    _, transitions, seen = chain(5, steps=steps)

    def loss(function, logits):
        moves = (transitions.log() + logits[1:]).softmax(-1)
        return function(logits[0].softmax(-1), moves, seen * logits[1].exp())

    at = torch.linspace(-0.5, 0.5, K * (K + 1), dtype=torch.float64).reshape(K + 1, K)
    hessian = torch.autograd.functional.hessian
    close(
        hessian(lambda v: loss(hmm.log_prob, v), at),
        hessian(lambda v: loss(plain_log_prob, v), at),
    )


@pytest.mark.usefixtures("kernel")
def test_smoothing_is_the_derivative_in_the_log_likelihoods():
    initial, transitions, seen = chain(6, batch=(3,))
    seen.requires_grad_()
    (slope,) = torch.autograd.grad(hmm.log_prob(initial, transitions, seen).sum(), seen)
    close(slope, hmm.smooth(initial, transitions, seen))


# ---- shapes ----------------------------------------------------------------------------------

SHAPES = [  # of initial, transitions, log-likelihoods and lengths, without K and T
    ((), (), (), None),
    ((), (), (4,), (4,)),
    ((2, 1), (2, 1), (4,), (4,)),
    ((2, 1), (2, 1), (2, 4), None),
    ((), (4,), (4,), None),
    ((2, 1), (4,), (2, 4), (4,)),
    ((3, 1, 1), (3, 1, 1), (3, 2, 4), (4,)),
    ((3, 1, 4), (1, 2, 1), (4,), (2, 1)),
    ((5,), (), (), None),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.usefixtures("kernel")
def test_batches_are_single_chains_side_by_side(shapes):
    r = np.random.default_rng(0)
    own = [() if shape is None else shape for shape in shapes]
    initial = torch.tensor(r.dirichlet(np.ones(K), size=own[0])).requires_grad_()
    transitions = torch.tensor(r.dirichlet(np.ones(K), size=(*own[1], K))).requires_grad_()
    seen = torch.tensor(r.normal(size=(*own[2], T, K))).requires_grad_()
    lengths = None if shapes[3] is None else torch.tensor(r.integers(1, T + 1, size=own[3]))
    batch = torch.broadcast_shapes(*own)
    found = hmm.log_prob(initial, transitions, seen, lengths)
    assert found.shape == batch
    weights = torch.tensor(r.normal(size=batch))
    slopes = torch.autograd.grad((found * weights).sum(), (initial, transitions, seen))

    steps = torch.tensor(T) if lengths is None else lengths
    singles = [
        x.expand((*batch, *x.shape[x.dim() - tail :])).reshape((-1, *x.shape[x.dim() - tail :]))
        for x, tail in zip((initial, transitions, seen, steps), (1, 2, 2, 0), strict=True)
    ]
    expected = torch.stack(
        [plain_log_prob(p, a, x[:n]) for p, a, x, n in zip(*singles, strict=True)]
    )
    close(found, expected.reshape(batch))
    total = (expected.reshape(batch) * weights).sum()
    for mine, theirs in zip(
        slopes, torch.autograd.grad(total, (initial, transitions, seen)), strict=True
    ):
        assert mine.shape == theirs.shape
        close(mine, theirs, 1e-8)

    arguments = [x if x is None else x.detach() for x in (initial, transitions, seen, lengths)]
    one = [x.detach() for x in singles[:3]]
    for name in ("filter", "smooth", "pairwise", "predict_next", "forecast"):
        function = getattr(hmm, name)
        alone = [function(*x, n) for *x, n in zip(*one, singles[3], strict=True)]
        together = function(*arguments)
        close(together, torch.stack(alone).reshape(together.shape))
        assert together.shape[: len(batch)] == batch
    alone = [hmm.decode(*x, n) for *x, n in zip(*one, singles[3], strict=True)]
    paths, log_joint = hmm.decode(*arguments)
    assert torch.equal(paths, torch.stack([path for path, _ in alone]).reshape(*batch, T))
    close(log_joint, torch.stack([value for _, value in alone]).reshape(batch))
    assert hmm.sample_paths(*arguments, num_samples=2).shape == (2, *batch, T)


@given(
    seed=st.integers(0, 10**6),
    num_states=st.integers(1, 5),
    steps=st.integers(1, 9),
    num_chains=st.integers(1, 4),
    sparse=st.booleans(),
)
def test_laws_of_probability_hold(seed, num_states, steps, num_chains, sparse):
    arrays = chain(seed, num_states=num_states, steps=steps, batch=(num_chains,), sparse=sparse)
    for function in (hmm.filter, hmm.smooth, hmm.predict_next, hmm.forecast):
        total = function(*arrays).sum(-1)
        close(total, torch.ones_like(total))
    pairs, smoothed = hmm.pairwise(*arrays), hmm.smooth(*arrays)
    close(pairs.sum(-1), smoothed[:, :-1])
    close(pairs.sum(-2), smoothed[:, 1:])
    close(hmm.filter(*arrays)[:, -1], smoothed[:, -1])
    assert (hmm.decode(*arrays)[1] <= hmm.log_prob(*arrays) + 1e-9).all()


@given(seed=st.integers(0, 10**6), order=st.permutations(range(4)))
def test_the_names_of_states_do_not_matter(seed, order):
    initial, transitions, seen = chain(seed, num_states=4, batch=(2,))
    renamed = initial[order], transitions[order][:, order], seen[..., order]
    close(hmm.log_prob(*renamed), hmm.log_prob(initial, transitions, seen))
    close(hmm.smooth(*renamed), hmm.smooth(initial, transitions, seen)[..., order])
    paths = torch.tensor(order)[hmm.decode(*renamed)[0]]
    assert torch.equal(paths, hmm.decode(initial, transitions, seen)[0])


@given(seed=st.integers(0, 10**6), length=st.integers(1, 8))
def test_a_missing_end_is_no_end(seed, length):
    initial, transitions, seen = chain(seed, steps=8)
    seen[length:] = 0.0
    close(
        hmm.log_prob(initial, transitions, seen),
        hmm.log_prob(initial, transitions, seen, torch.tensor(length)),
    )
    close(
        hmm.predict_next(initial, transitions, seen)[-1],
        hmm.filter(initial, transitions, seen)[length - 1]
        @ torch.linalg.matrix_power(transitions, 8 - length)
        if length < 8
        else hmm.predict_next(initial, transitions, seen)[-1],
    )


# ---- numbers at their limits -----------------------------------------------------------------


@pytest.mark.usefixtures("kernel")
def test_a_path_that_fell_behind_by_900_nats_is_not_lost():
    """State 0 can be left and not re-entered; what ends in state 0 never left it."""
    initial = torch.tensor([0.5, 0.5], dtype=torch.float64)
    transitions = torch.tensor([[0.9, 0.1], [0.0, 1.0]], dtype=torch.float64)
    seen = torch.zeros(5, 2, dtype=torch.float64)
    seen[1, 0], seen[3:, 1] = -900.0, -700.0
    expected = oracles.hidden_chain(initial, transitions, seen)
    close(hmm.log_prob(initial, transitions, seen), expected.log_prob)
    close(hmm.smooth(initial, transitions, seen), expected.smoothed)
    close(hmm.filter(initial, transitions, seen), expected.filtered)
    close(hmm.pairwise(initial, transitions, seen), expected.pairwise)
    close(hmm.decode(initial, transitions, seen)[0], expected.best)
    paths = hmm.sample_paths(initial, transitions, seen, num_samples=20)
    assert (paths == torch.as_tensor(expected.best)).all()


@pytest.mark.usefixtures("kernel")
def test_gaps_and_outliers_in_some_chains_of_a_left_right_batch():
    initial, transitions, seen = chain(2, num_states=3, steps=6, batch=(4,), sparse=True)
    seen[1, 2] = torch.tensor([0.0, -900.0, -900.0])
    seen[1, 3] = torch.tensor([-900.0, 0.0, -900.0])
    seen[2, 4] -= 800.0
    seen[3, 1:4, 0], seen[3, 5, 1:] = -450.0, -1800.0
    logits = torch.where(transitions > 0, transitions, 1.0).log().requires_grad_()
    seen.requires_grad_()
    allowed = transitions > 0

    def total(function):
        moves = torch.where(allowed, logits, -torch.inf).softmax(-1)
        return function(initial, moves, seen)

    found = total(hmm.log_prob)
    for b in range(4):
        close(found[b], oracles.hidden_chain(initial, transitions, seen[b]).log_prob)
        expected = oracles.hidden_chain(initial, transitions, seen[b].detach())
        close(hmm.smooth(initial, transitions, seen)[b], expected.smoothed)
    slopes = torch.autograd.grad(found.sum(), (logits, seen))
    for x in slopes:
        assert torch.isfinite(x).all()
    close(slopes[1], hmm.smooth(initial, transitions, seen))
    counts = hmm.pairwise(initial, transitions, seen).sum((0, 1))
    # The slope in logits of a row: expected moves less what their number makes expected.
    close(slopes[0], counts - counts.sum(-1, keepdim=True) * transitions, 1e-8)


@pytest.mark.usefixtures("kernel")
def test_a_ragged_batch_with_lost_paths_has_the_weighted_slopes_of_each_chain():
    initial = torch.tensor([0.5, 0.5], dtype=torch.float64)
    transitions = torch.tensor([[0.9, 0.1], [0.0, 1.0]], dtype=torch.float64)
    seen = torch.zeros(3, 7, 2, dtype=torch.float64)
    seen[:2, 1, 0], seen[:2, 3:5, 1] = -900.0, -700.0
    seen[:2, 5:] = torch.tensor([3.0, -50.0])  # behind the end of one of them
    lengths, weights = torch.tensor([5, 7, 6]), torch.tensor([2.0, -3.0, 0.5]).double()
    arrays = [x.requires_grad_() for x in (initial, transitions, seen)]
    value = hmm.log_prob(*arrays, lengths)
    by_initial, by_moves, by_seen = torch.autograd.grad((weights * value).sum(), arrays)
    starts, counts = torch.zeros(2).double(), torch.zeros(2, 2).double()
    for b, length in enumerate(lengths.tolist()):
        expected = oracles.hidden_chain(initial, transitions, seen[b, :length])
        close(value[b], expected.log_prob)
        close(by_seen[b, :length], weights[b] * torch.tensor(expected.smoothed))
        assert (by_seen[b, length:] == 0).all()
        starts += weights[b] * torch.tensor(expected.smoothed[0])
        counts += weights[b] * torch.tensor(expected.pairwise.sum(0))
    close(by_initial * initial, starts)
    close(by_moves * transitions, counts)
    smoothed = hmm.smooth(*(x.detach() for x in arrays), lengths)
    assert (smoothed[0, 5:] == 0).all()


@pytest.mark.usefixtures("kernel")
def test_a_first_state_that_explains_nothing_is_still_the_first():
    initial = torch.tensor([1.0, 0.0], dtype=torch.float64)
    transitions = torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    seen = torch.zeros(3, 2, dtype=torch.float64)
    seen[0, 0] = -300.0
    close(hmm.log_prob(initial, transitions, seen), -300.0)


@pytest.mark.usefixtures("kernel")
def test_a_state_that_is_never_reached_does_not_overflow():
    """It would have explained everything 60 nats better, at each of 50 steps."""
    initial = torch.tensor([1.0, 0.0], dtype=torch.float64)
    seen = torch.tensor([[-60.0, 0.0]], dtype=torch.float64).repeat(50, 1)
    arrays = [x.requires_grad_() for x in (initial, torch.eye(2).double(), seen)]
    value = hmm.log_prob(*arrays)
    close(value, -3000.0)
    slopes = torch.autograd.grad(value, arrays)
    assert all(torch.isfinite(x).all() for x in slopes)
    close(slopes[2], torch.tensor([[1.0, 0.0]]).repeat(50, 1))


@pytest.mark.parametrize("sparse", [False, True], ids=["any move", "left to right"])
@pytest.mark.usefixtures("kernel")
def test_chains_that_end_early_need_no_logarithms(sparse):
    arrays = chain(0, steps=9, batch=(3,), sparse=sparse)
    _, _, sums = torch.ops.latentlab.hmm_forward(*arrays, torch.tensor([9, 4, 1]), True)
    assert (sums > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("kernel")
def test_an_outlier_is_finite_in_a_chain_of_any_move(dtype):
    initial, transitions, seen = chain(3, batch=(2,), dtype=dtype)
    seen[0, 2] = torch.tensor([-800.0, -1700.0, -2600.0])
    seen.requires_grad_()
    found = hmm.log_prob(initial, transitions, seen)
    expected = oracles.hidden_chain(initial, transitions, seen[0].detach())
    close(found[0], expected.log_prob, 1e-10 if dtype == torch.float64 else 1e-5)
    (slope,) = torch.autograd.grad(found.sum(), seen)
    close(slope[0], expected.smoothed, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.usefixtures("kernel")
def test_the_impossible_has_log_likelihood_minus_infinity_and_no_slope():
    initial, transitions, seen = chain(0, batch=(4,), sparse=True)
    seen[1, 3] = -torch.inf  # no state emits this
    seen[2, 0, 0] = -torch.inf  # the only first state does not emit this
    arrays = [x.requires_grad_() for x in (initial, transitions, seen)]
    found = hmm.log_prob(*arrays)
    assert torch.isfinite(found).tolist() == [True, False, False, True]
    assert (found[1:3] == -torch.inf).all()
    slopes = torch.autograd.grad(found[[0, 3]].sum() + found[[1, 2]].sum(), arrays)
    assert all(torch.isfinite(x).all() for x in slopes)
    assert (slopes[2][1:3] == 0).all()
    arrays = [x.detach() for x in arrays]
    for function in (hmm.filter, hmm.smooth, hmm.pairwise, hmm.predict_next):
        assert torch.isfinite(function(*arrays)).all()
    paths, log_joint = hmm.decode(*arrays)
    assert (paths[1:3] == -1).all()
    assert (log_joint[1:3] == -torch.inf).all()
    assert (paths[[0, 3]] >= 0).all()


def test_an_observation_that_some_states_cannot_emit_rules_them_out():
    initial, transitions, seen = chain(1)
    seen[2, [0, 2]] = -torch.inf
    expected = oracles.hidden_chain(initial, transitions, seen)
    close(hmm.log_prob(initial, transitions, seen), expected.log_prob)
    close(hmm.smooth(initial, transitions, seen), expected.smoothed)
    assert (hmm.smooth(initial, transitions, seen)[2, [0, 2]] == 0).all()


def test_numbers_that_are_none_stay_so():
    initial, transitions, seen = chain(1, batch=(2,))
    seen[0, 2, 1] = torch.nan
    assert hmm.log_prob(initial, transitions, seen).isnan().tolist() == [True, False]


@pytest.mark.parametrize("sparse", [False, True], ids=["any move", "left to right"])
@pytest.mark.usefixtures("kernel")
def test_single_precision_is_near_double(sparse):
    arrays = chain(7, num_states=5, steps=200, batch=(3,), sparse=sparse)
    for x in arrays:
        x.requires_grad_()
    expected = hmm.log_prob(*arrays)
    found = hmm.log_prob(*(x.float() for x in arrays))
    assert found.dtype == torch.float32
    close(found, expected, 1e-5)
    (mine,) = torch.autograd.grad(found.sum(), arrays[2])
    (theirs,) = torch.autograd.grad(expected.sum(), arrays[2])
    close(mine, theirs, 1e-3)


@pytest.mark.slow
def test_a_million_steps_neither_vanish_nor_recurse():
    initial, transitions, _ = chain(0)
    seen = torch.full((1_000_000, K), -2.0, dtype=torch.float64).requires_grad_()
    found = hmm.log_prob(initial, transitions, seen)
    close(found, -2e6)
    (slope,) = torch.autograd.grad(found, seen)
    close(slope.sum(-1), torch.ones(1_000_000))


def test_a_long_chain_does_not_vanish():
    initial, transitions, _ = chain(0)
    seen = torch.full((20_000, K), -2.0, dtype=torch.float64).requires_grad_()
    found = hmm.log_prob(initial, transitions, seen)
    close(found, -4e4)
    (slope,) = torch.autograd.grad(found, seen)
    close(slope.sum(-1), torch.ones(20_000))


# ---- one operation ---------------------------------------------------------------------------


def test_a_recorded_graph_holds_one_operation_each_way():
    arrays = chain(0, steps=40, batch=(3,))
    lengths = torch.tensor([40, 7, 1])

    def value_and_slopes(initial, transitions, seen):
        inputs = [x.requires_grad_() for x in (initial, transitions, seen)]
        value = hmm.log_prob(*inputs, lengths).sum()
        return value, *torch.autograd.grad(value, inputs)

    graph = make_fx(value_and_slopes)(*arrays)
    ops = [str(node.target) for node in graph.graph.nodes if "hmm" in str(node.target)]
    assert ops == ["latentlab.hmm_forward.default", "latentlab.hmm_backward.default"]
    assert len(graph.graph.nodes) < 40
    others = chain(1, steps=40, batch=(3,))
    for mine, theirs in zip(graph(*others), value_and_slopes(*others), strict=True):
        close(mine, theirs.detach())


def test_the_operations_are_what_torch_asks_of_them():
    initial, transitions, seen = chain(0, batch=(2,), own=(3, 1))
    arrays = [x.requires_grad_() for x in (initial, transitions, seen)]
    for lengths in (None, torch.tensor([6, 2])):
        torch.library.opcheck(
            torch.ops.latentlab.hmm_forward.default, (*arrays, lengths, True),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )  # fmt: skip


def test_vmap_is_a_loop():
    initial, transitions, seen = (x.requires_grad_() for x in chain(0, batch=(2,), own=(4,)))
    lengths = torch.tensor([6, 3])

    def total(initial, transitions):
        return hmm.log_prob(initial, transitions, seen, lengths).sum()

    mapped = torch.vmap(total)(initial, transitions)
    looped = torch.stack([total(*each) for each in zip(initial, transitions, strict=True)])
    close(mapped, looped)
    inputs = (initial, transitions, seen)
    slopes = [torch.autograd.grad(x.square().sum(), inputs) for x in (mapped, looped)]
    for mine, theirs in zip(*slopes, strict=True):
        close(mine, theirs)
    over_chains = torch.vmap(lambda x, n: hmm.log_prob(initial[0], transitions[0], x, n))
    close(over_chains(seen, lengths), hmm.log_prob(initial[0], transitions[0], seen, lengths))


def test_derivatives_can_be_mapped():
    """Rows of a Jacobian at once, as ``is_grads_batched`` takes them."""
    arrays = [x.requires_grad_() for x in chain(0, batch=(3,))]
    value = hmm.log_prob(*arrays)
    rows = torch.autograd.grad(value, arrays, torch.eye(3).double(), is_grads_batched=True)
    for b in range(3):
        expected = torch.autograd.grad(hmm.log_prob(*arrays)[b], arrays)
        for mine, theirs in zip(rows, expected, strict=True):
            close(mine[b], theirs)


def test_a_graph_recorded_without_slopes_has_them_when_run():
    arrays = chain(0, steps=40, batch=(3,))
    graph = make_fx(lambda *x: hmm.log_prob(*x))(*arrays)
    arrays = [x.requires_grad_() for x in arrays]
    found = torch.autograd.grad(graph(*arrays).sum(), arrays)
    expected = torch.autograd.grad(hmm.log_prob(*arrays).sum(), arrays)
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@pytest.mark.parametrize("own", [(), (2, 1)], ids=["shared", "draws"])
@pytest.mark.parametrize("num_chains", [20, 600])  # XLA multiplies small matrices by hand
def test_both_kernels_agree(monkeypatch, num_chains, own, ragged):
    pytest.importorskip("jax")
    arrays = [x.requires_grad_() for x in chain(9, steps=50, batch=(num_chains,), own=own)]
    lengths = 31 + torch.arange(num_chains) % 20 if ragged else None
    found = []
    for chosen in (False, True):
        monkeypatch.setattr(hmm_xla, "is_worthwhile", lambda layout, x, chosen=chosen: chosen)
        value = hmm.log_prob(*arrays, lengths)
        found.append((value, *torch.autograd.grad(value.sum(), arrays)))
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs, 1e-11)


def test_jax_keeps_its_configuration():
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    arrays = chain(0, steps=300, batch=(40,))
    hmm.log_prob(*arrays)
    assert jax.config.jax_enable_x64 == before
    assert jax.numpy.ones(1).dtype == jax.numpy.float32 or before


# ---- peers -----------------------------------------------------------------------------------


def test_equal_to_hmmlearn():
    _hmmc = pytest.importorskip("hmmlearn._hmmc")
    initial, transitions, seen = (x.numpy() for x in chain(8, steps=60, batch=(5,)))
    for b in range(5):
        value, forward = _hmmc.forward_log(initial, transitions, seen[b])
        posterior = forward + _hmmc.backward_log(initial, transitions, seen[b]) - value
        arrays = [torch.tensor(x) for x in (initial, transitions, seen[b])]
        close(hmm.log_prob(*arrays), value, 1e-9)
        close(hmm.smooth(*arrays), np.exp(posterior), 1e-9)
        log_joint, path = _hmmc.viterbi(initial, transitions, seen[b])
        found, value = hmm.decode(*arrays)
        assert found.tolist() == list(path)
        close(value, log_joint, 1e-9)


# ---- bad inputs ------------------------------------------------------------------------------

BAD = [
    (lambda p, a, x: (p.tolist(), a, x), TypeError, "initial: expected a tensor, got list"),
    (lambda p, a, x: (p, a.long(), x), TypeError, "transitions: expected float32 or float64"),
    (lambda p, a, x: (p, a, x.half()), TypeError, "log_likelihoods: .* got torch.float16"),
    (lambda p, a, x: (p, a[:2], x), ValueError, r"got \(3,\), \(2, 3\), \(6, 3\)"),
    (lambda p, a, x: (p, a, x[0]), ValueError, "log_likelihoods: expected shapes"),
    (lambda p, a, x: (p, a, x[:0]), ValueError, "T >= 1"),
    (lambda p, a, x: (p.expand(2, 3), a, x.expand(4, 6, 3)), ValueError, "that broadcast"),
    (lambda p, a, x: (p, a, x, 3), TypeError, "lengths: expected a tensor or None"),
    (lambda p, a, x: (p, a, x, torch.tensor(3.0)), TypeError, "lengths: expected whole numbers"),
]


@pytest.mark.parametrize(("change", "kind", "words"), BAD)
@pytest.mark.parametrize("name", ["log_prob", "smooth", "decode", "sample_paths"])
def test_bad_arrays_are_named(name, change, kind, words):
    with pytest.raises(kind, match=words):
        getattr(hmm, name)(*change(*chain(0)))


@pytest.mark.parametrize("num_samples", [0, -1, 2.5, True])
def test_a_bad_number_of_paths_is_named(num_samples):
    with pytest.raises(ValueError, match="num_samples: expected an int >= 1"):
        hmm.sample_paths(*chain(0), num_samples=num_samples)
