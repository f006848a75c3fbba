"""Operations of a recorded graph: what JAX makes of each is what torch does, slopes included."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from latentlab.inference.program import Program
from latentlab.inference.xla import _arrays, read

jax = pytest.importorskip("jax")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


def by_jax(function, *tensors):
    """A function of tensors, recorded and run by JAX: its value, and the slopes of a sum of it."""
    with torch.no_grad():
        graph = make_fx(
            torch.func.functionalize(lambda *given: function(*given)), tracing_mode="real"
        )(*tensors)
    constants = []
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        constants.append(getattr(graph, node.target))
        with graph.graph.inserting_after(
            [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
        ):
            node.replace_all_uses_with(graph.graph.placeholder(f"constant_{len(constants)}"))
        graph.graph.erase_node(node)
    run = read(Program(graph, (), 0, (), ()))
    moving = [k for k, x in enumerate(tensors) if x.is_floating_point()]

    with jax.enable_x64(True):
        arrays = list(_arrays([*tensors, *constants]))

        def total(*floats):
            given = list(arrays)
            for k, x in zip(moving, floats, strict=True):
                given[k] = x
            value = run(*given)
            weight = jax.numpy.cos(jax.numpy.arange(value.size).reshape(value.shape))
            counts = jax.numpy.issubdtype(value.dtype, jax.numpy.floating)
            score = (weight * value).sum() if counts else 0.0 * sum(x.sum() for x in floats)
            return score, value

        places = tuple(range(len(moving)))
        both = jax.jit(jax.grad(total, argnums=places, has_aux=True))
        slopes, value = both(*(arrays[k] for k in moving))
        return np.asarray(value), [np.asarray(slope) for slope in slopes]


def expect_equal(function, *tensors):
    value, slopes = by_jax(function, *tensors)
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in tensors]
    expected = function(*leaves)
    # A view of torch counts in the dtype of its numbers, however it was made.
    assert value.shape == tuple(expected.shape)
    assert value.dtype == expected.detach().numpy().dtype
    tol = TOLERANCE.get(tensors[0].dtype, 1e-9)
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=tol, atol=tol)
    floats = [x for x in leaves if x.requires_grad]
    if not (floats and expected.requires_grad):
        return
    weight = torch.arange(expected.numel(), dtype=torch.float64).reshape(expected.shape).cos()
    found = torch.autograd.grad((weight.to(expected) * expected).sum(), floats, allow_unused=True)
    for slope, own, x in zip(slopes, found, floats, strict=True):
        own = torch.zeros_like(x) if own is None else own
        np.testing.assert_allclose(slope, own.numpy(), rtol=20 * tol, atol=20 * tol)


def positive(x):
    return x.abs() + 0.3


def share(x):
    return torch.sigmoid(x)


def matrix(x):
    """Something positive definite (..., 3, 3)."""
    a = x.flatten()[:9].repeat(3)[:9].reshape(3, 3)
    return a @ a.T + 2 * torch.eye(3, dtype=x.dtype)


POINTWISE = {
    **{name: getattr(torch, name) for name in "exp expm1 tanh sin cos sigmoid erf relu".split()},
    **{name: getattr(torch, name) for name in "floor round sign abs neg square isnan".split()},
    **{
        name: lambda x, name=name: getattr(torch, name)(positive(x))
        for name in "log log1p log2 sqrt rsqrt reciprocal lgamma digamma".split()
    },
    "polygamma": lambda x: torch.polygamma(1, positive(x)),
    "mvlgamma": lambda x: torch.mvlgamma(positive(x) + 2, 3),
    "erfinv": lambda x: torch.erfinv(torch.tanh(x)),
    "ndtri": lambda x: torch.special.ndtri(share(x)),
    "log_ndtr": torch.special.log_ndtr,
    "logit": lambda x: torch.logit(share(x)),
    "xlogy": lambda x: torch.xlogy(x, positive(x)),
    "xlog1py": lambda x: torch.special.xlog1py(x, positive(x)),
    "softplus": F.softplus,
    "softplus of a slope": lambda x: F.softplus(x, beta=2.0, threshold=1.0),
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7),
    "logsigmoid": F.logsigmoid,
    "power": lambda x: positive(x) ** 1.7,
    "whole power": lambda x: x**3,
    "power of a number": lambda x: 2.0**x,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: x.clamp_max(0.1),
    "where": lambda x: torch.where(x > 0, x, x * x),
    "masked_fill": lambda x: x.masked_fill(x > 0, 2.0),
    "nan_to_num": lambda x: torch.where(x > 0.5, math.nan, x).nan_to_num(nan=0.25),
    "logaddexp": lambda x: torch.logaddexp(x, 2 * x),
    "atan2": lambda x: torch.atan2(x, positive(x)),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "minimum": lambda x: torch.minimum(x, torch.ones_like(x)),
    "remainder": lambda x: torch.remainder(x, 0.7),
    "fmod": lambda x: torch.fmod(x, 0.7),
    "floor division": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "rsub": lambda x: 1 - x,
    "scaled sum": lambda x: torch.add(x, x, alpha=2) - torch.sub(x, x * x, alpha=3),
    "comparison": lambda x: ((x > 0) & ~(x >= 1) | (x != 0.5)).to(x.dtype) * x,
    "bernoulli": lambda x: F.binary_cross_entropy_with_logits(x, (x > 0).to(x), reduction="none"),
    "entropy": lambda x: torch.special.entr(positive(x)),
    "detached": lambda x: x * x.detach(),
    "cast": lambda x: x.double().float().to(x.dtype) * 0 + x,
}

SHAPED = {
    "sum": lambda x: x.sum(),
    "sum over an axis": lambda x: x.sum(-1),
    "sum kept": lambda x: x.sum(0, keepdim=True),
    "mean": lambda x: x.mean(-1),
    "prod": lambda x: x.prod(-1),
    "amax": lambda x: x.amax(-1, keepdim=True),
    "amin": lambda x: x.amin(0),
    "max of an axis": lambda x: x.max(-1).values,
    "logsumexp": lambda x: x.logsumexp(-1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(0),
    "var": lambda x: x.var(-1),
    "std": lambda x: x.std(-1, correction=0),
    "norm": lambda x: (x + 3).norm(dim=-1),
    "cumsum": lambda x: x.cumsum(-1),
    "cumprod": lambda x: x.cumprod(-1),
    "logcumsumexp": lambda x: x.logcumsumexp(-1),
    "sort": lambda x: x.sort(-1).values,
    "argmax": lambda x: x.argmax(-1),
    "all": lambda x: (x > -9).all(-1),
    "any": lambda x: (x > 9).any(),
    "flat": lambda x: x.flatten(),
    "view": lambda x: x.reshape(-1, x.shape[-1]),
    "transposed": lambda x: x.transpose(0, -1) * 2,
    "moved": lambda x: x.movedim(-1, 0),
    "expanded": lambda x: x.expand(3, *x.shape) * 2,
    "unsqueezed": lambda x: x.unsqueeze(-1).unsqueeze(0),
    "squeezed": lambda x: x.unsqueeze(0).squeeze(0) + x.unsqueeze(1).squeeze(),
    "joined": lambda x: torch.cat([x, 2 * x], -1),
    "joined to nothing": lambda x: torch.cat([x.new_zeros(0), x.flatten()]),
    "stacked": lambda x: torch.stack([x, x * x], 1),
    "taken apart": lambda x: sum(x.unbind(-1)),
    "split": lambda x: sum(part.sum() * k for k, part in enumerate(x.flatten().split(2))),
    "split in parts": lambda x: x.flatten().split([1, x.numel() - 1])[1],
    "flipped": lambda x: x.flip(-1),
    "rolled": lambda x: x.roll(1, -1),
    "repeated": lambda x: x.repeat(2, *[1] * (x.dim() - 1)),
    "padded": lambda x: F.pad(x, (1, 2), value=0.5),
    "cut": lambda x: F.pad(x, (-1, 1)),
    "sliced": lambda x: x[..., 1:] * x[..., :-1],
    "every second": lambda x: x[..., ::2],
    "selected": lambda x: x[..., -1],
    "one row": lambda x: x[0],
    "by index": lambda x: x[torch.tensor([0, 0, 1])],
    "by two indices": lambda x: x[torch.tensor([0, 1]), ..., torch.tensor([1, 0])],
    "index_select": lambda x: x.index_select(-1, torch.tensor([1, 0, 1])),
    "gathered": lambda x: x.gather(-1, (x > 0).long()),
    "a corner gathered": lambda x: x.gather(-1, torch.ones(1, *x.shape[1:]).long()[..., :1]),
    "scattered": lambda x: torch.zeros_like(x).scatter(-1, (x > 0).long(), 2.0) * x,
    "added in places": lambda x: torch.zeros_like(x).scatter_add(-1, (x > 0).long(), x),
    "put in places": lambda x: x.clone().index_put((torch.tensor([0]),), x[1:2], accumulate=True),
    "put by a mask": lambda x: x.masked_fill(x > 0, 0.0).index_put((x < -1,), x.new_tensor(7.0)),
    "written in a slice": lambda x: _written(x),
    "triangles": lambda x: x @ x.transpose(-1, -2).tril() + (x @ x.transpose(-1, -2)).triu(1),
    "diagonal": lambda x: (x @ x.transpose(-1, -2)).diagonal(dim1=-2, dim2=-1),
    "on a diagonal": lambda x: torch.diag_embed(x),
    "places in order": lambda x: x + torch.arange(x.shape[-1]) + torch.arange(0, x.shape[-1], 1.0),
    "full": lambda x: torch.full_like(x, 2.0) * x + x.new_full(x.shape, 3.0) + torch.ones(1),
    "product": lambda x: x @ x.transpose(-1, -2),
    "matrix times vector": lambda x: x @ x.flatten()[: x.shape[-1]],
    "outer sum": lambda x: torch.einsum("...i,...j->...ij", x, x),
}

MATRICES = {
    "cholesky": lambda x: torch.linalg.cholesky(matrix(x)),
    "cholesky_solve": lambda x: torch.cholesky_solve(x.flatten()[:3, None], _root(x)),
    "solve_triangular": lambda x: torch.linalg.solve_triangular(
        _root(x), x.flatten()[:3, None], upper=False
    ),
    "from the right": lambda x: torch.linalg.solve_triangular(
        _root(x), x.flatten()[None, :3], upper=False, left=False
    ),
    "many solved": lambda x: torch.linalg.solve_triangular(
        _root(x).expand(2, 3, 3), x.flatten()[:6].reshape(2, 3, 1), upper=False
    ),
    "slogdet": lambda x: torch.linalg.slogdet(matrix(x)).logabsdet,
    "inverse": lambda x: torch.linalg.inv(matrix(x)),
    "linear": lambda x: F.linear(x, x[0].reshape(-1, x.shape[-1]), None),
    "affine": lambda x: torch.addmm(x.new_ones(3, 3), matrix(x), matrix(x), beta=0.5, alpha=2),
    "a row times a matrix": lambda x: x.flatten()[None, :3] @ matrix(x),
    "batches": lambda x: torch.bmm(matrix(x).expand(2, 3, 3), matrix(x).expand(2, 3, 3)),
}


def _root(x):
    return torch.linalg.cholesky(matrix(x))


def _written(x):
    y = torch.zeros_like(x)
    y[..., 1:] = 2 * x[..., 1:]
    y[..., 0] = 3.0
    return y * x


def numbers(shape, dtype, seed):
    """Numbers away from the corners of the functions."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x + 0.05 * x.sign()).to(dtype)


dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**16)


ALL = POINTWISE | SHAPED
shapes = st.lists(st.integers(2, 4), min_size=2, max_size=3)


@pytest.mark.parametrize("name", ALL)
def test_a_function_of_an_array(name):
    expect_equal(ALL[name], numbers((2, 3), torch.float64, 0))


@pytest.mark.parametrize("name", MATRICES)
def test_a_function_of_matrices(name):
    expect_equal(MATRICES[name], numbers((3, 3), torch.float64, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@settings(max_examples=8)
@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_a_function_of_any_array(name, shape, dtype, seed):
    expect_equal(ALL[name], numbers(shape, dtype, seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", POINTWISE)
@settings(max_examples=4)
@given(shape=st.lists(st.integers(0, 3), max_size=1), dtype=dtypes, seed=seeds)
def test_a_function_of_a_number_or_of_none(name, shape, dtype, seed):
    expect_equal(POINTWISE[name], numbers(shape, dtype, seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRICES)
@settings(max_examples=8)
@given(dtype=dtypes, seed=seeds)
def test_a_function_of_any_matrices(name, dtype, seed):
    expect_equal(MATRICES[name], numbers((3, 3), dtype, seed))


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2])
@settings(max_examples=6)
@given(
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    more=st.integers(0, 1),
    dtype=dtypes,
    seed=seeds,
)
def test_a_convolution(transposed, dims, stride, padding, dilation, more, dtype, seed):
    x = numbers((2, 2, *(7,) * dims), dtype, seed)
    weight = numbers((2, 3, *(3,) * dims) if transposed else (3, 2, *(3,) * dims), dtype, seed + 1)
    bias = numbers((3,), dtype, seed + 2)
    kind = f"conv{'_transpose' * transposed}{dims}d"
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    if transposed:
        how["output_padding"] = min(more, max(stride, dilation) - 1)
    expect_equal(lambda x, w, b: getattr(F, kind)(x, w, b, **how), x, weight, bias)


@pytest.mark.slow
@settings(max_examples=6)
@given(
    K=st.integers(1, 3),
    T=st.integers(1, 5),
    batch=st.sampled_from([(), (2,), (2, 1), (3, 2)]),
    ragged=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_the_likelihood_of_a_chain(K, T, batch, ragged, dtype, seed):
    from latentlab.distributions import hmm

    initial = numbers((*batch[:1], *(1,) * len(batch[1:]), K), dtype, seed)
    transitions = numbers((K, K), dtype, seed + 1)
    seen = 3 * numbers((*batch, T, K), dtype, seed + 2)
    lengths = torch.arange(math.prod(batch)).reshape(batch) % T + 1 if ragged else None

    def log_prob(initial, transitions, seen):
        return hmm.log_prob(initial.softmax(-1), transitions.softmax(-1), seen, lengths=lengths)

    expect_equal(log_prob, initial, transitions, seen)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_of_images(transposed):
    x = numbers((2, 2, 5, 5), torch.float64, 0)
    weight, bias = numbers((2, 2, 3, 3), torch.float64, 1), numbers((2,), torch.float64, 2)
    function = F.conv_transpose2d if transposed else F.conv2d
    expect_equal(lambda x, w, b: function(x, w, b, stride=2, padding=1), x, weight, bias)


def test_a_chain_with_zeros_and_a_gap_of_900_nats():
    from latentlab.distributions import hmm

    transitions = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]).double()
    initial = torch.tensor([1.0, 0.0, 0.0]).double()
    seen = torch.tensor([[0.0, -900.0, -900], [-900.0, 0.0, 0.0], [-800.0, -800.0, -900]]).double()
    value, (slope,) = by_jax(lambda seen: hmm.log_prob(initial, transitions, seen), seen)
    leaf = seen.clone().requires_grad_()
    expected = hmm.log_prob(initial, transitions, leaf)
    (own,) = torch.autograd.grad(expected, leaf)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
    np.testing.assert_allclose(slope, own.numpy(), atol=1e-12)


LED_BACK = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": lambda x: F.softplus(x, beta=2.0, threshold=1.0),
    "elu": lambda x: F.elu(x, alpha=0.7),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7),
    "logsigmoid": F.logsigmoid,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(0),
    "slices": lambda x: torch.cat([x[..., 1:] ** 2, x[..., :-1].exp()], -1),
    "one of several": lambda x: x[1] ** 2 * x[0].exp(),
    "solve": lambda x: torch.linalg.solve(
        torch.stack([matrix(x), matrix(x + 1)]), x[:, None, :3].mT
    ),
    "solve for vectors": lambda x: torch.linalg.solve(matrix(x), x[0, :3]),
    "solve from the right": lambda x: torch.linalg.solve(matrix(x), x[:, :3], left=False),
}


@pytest.mark.parametrize("name", LED_BACK)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_slope_that_a_pair_takes_itself(name, dtype):
    def slope(x):
        value, pull_back = torch.func.vjp(LED_BACK[name], x)
        weight = torch.arange(value.numel(), dtype=x.dtype).reshape(value.shape).sin()
        return pull_back(weight)[0]

    expect_equal(slope, numbers((2, 5), dtype, 3))
    expect_equal(LED_BACK[name], numbers((2, 5), dtype, 3))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bernoulli_of_logits_near_and_far(reduction, dtype):
    x = torch.tensor([-90.0, -3.0, -0.1, 0.2, 4.0, 90.0], dtype=dtype)
    y = torch.tensor([0.0, 1.0, 0.3, 0.7, 1.0, 1.0], dtype=dtype)
    loss = F.binary_cross_entropy_with_logits
    expect_equal(lambda x, y: loss(x, y, reduction=reduction).reshape(-1), x, y)
    expect_equal(lambda x, y: loss(x, 1 - y, reduction=reduction).reshape(-1), x, y)
