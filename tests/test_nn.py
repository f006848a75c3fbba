"""Networks have the shapes they promise, and masked ones see earlier inputs only."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from latentlab.nn import MLP, ConvDecoder, ConvEncoder, MaskedMLP

SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.integers(1, 30)
WIDTHS = st.lists(st.integers(1, 9), max_size=3)


@given(st.integers(1, 5), WIDTHS, st.integers(1, 5), st.sampled_from(["relu", "tanh", "softplus"]))
def test_a_perceptron_maps_rows_to_rows(in_dim, hidden_dims, out_dim, activation):
    net = MLP(in_dim, hidden_dims, out_dim, activation)
    assert net(torch.zeros(3, in_dim)).shape == (3, out_dim)
    assert len(net) == 2 * len(hidden_dims) + 1


def test_a_perceptron_without_hidden_layers_is_linear():
    net = MLP(3, (), 2).double()
    x, y = torch.randn(2, 5, 3).double()
    torch.testing.assert_close(net(x + y) + net(torch.zeros_like(x)), net(x) + net(y))


@given(LENGTHS, LENGTHS, st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_images_of_any_size_are_encoded_and_decoded(height, width, depth, channels):
    shape = (depth, height, width)
    z = ConvEncoder(shape, 3, channels, hidden_dim=5)(torch.zeros(2, *shape))
    assert z.shape == (2, 6)
    assert ConvDecoder(3, shape, channels, hidden_dim=5)(z[:, :3]).shape == (2, *shape)


@pytest.mark.parametrize("net", [MLP(400, (400, 400, 400), 400), ConvEncoder((4, 16, 16), 200)])
def test_what_goes_through_keeps_its_variance(net):
    shape = (500, 400) if isinstance(net, MLP) else (500, 4, 16, 16)
    out = net(torch.randn(shape))
    assert 0.4 < out.var().item() < 2.5  # torch's own start leaves 0.002 of a deep one


def test_a_decoder_keeps_the_variance_of_its_latents():
    out = ConvDecoder(20, (3, 28, 28))(torch.randn(500, 20))
    assert 0.2 < out[:, :, 4:-4, 4:-4].var().item() < 2.5


# ---- masked ones --------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 6), WIDTHS, st.integers(1, 3), st.integers(0, 2))
def test_an_output_depends_on_earlier_features_only(seed, D, hidden_dims, M, num_context):
    torch.manual_seed(seed)
    net = MaskedMLP(D, hidden_dims, M, num_context, activation="tanh").double()
    x, context = torch.randn(D).double(), torch.randn(num_context).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, context), x)  # (D, M, D)
    earlier = torch.ones(D, D).tril(-1).bool()[:, None].expand(D, M, D)
    assert (jacobian[~earlier] == 0).all()


@given(SEEDS, st.integers(2, 6), st.integers(1, 2))
def test_an_output_depends_on_all_earlier_features_and_the_context(seed, D, num_layers):
    torch.manual_seed(seed)
    net = MaskedMLP(D, (4 * D,) * num_layers, 2, num_context=1, activation="tanh").double()
    inputs = torch.randn(D + 1).double()
    jacobian = torch.autograd.functional.jacobian(lambda i: net(i[:D], i[D:]), inputs)
    earlier = torch.ones(D, D).tril(-1).bool()[:, None].expand(D, 2, D)
    assert (jacobian[:, :, :D][earlier] != 0).all()
    assert (jacobian[:, :, D] != 0).all()


def test_an_autoregressive_density_sums_to_one():
    net = MaskedMLP(4, (16, 16)).double()
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 4)
    log_prob = -torch.nn.functional.binary_cross_entropy_with_logits(
        net(x)[..., 0], x, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(log_prob.exp().sum().item(), 1.0)


# ---- faults, traces -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(0, (), 1), "in_dim must be an int >= 1, got 0"),
        (lambda: MLP(2.5, (), 1), r"in_dim must be an int >= 1, got 2.5 \(float\)"),
        (
            lambda: MLP(2, 8, 1),
            r"hidden_dims: expected a sequence of ints such as \(256,\), got 8",
        ),
        (lambda: MLP(2, (8, True), 1), r"hidden_dims\[1\] must be an int >= 1, got True"),
        (lambda: MLP(2, (8,), 1, "sine"), "activation: expected one of 'elu', .* got 'sine'"),
        (lambda: ConvEncoder((28, 28), 2), r"shape: expected \(channels, height, width\)"),
        (lambda: ConvDecoder(0, (1, 8, 8)), "latent_dim must be an int >= 1, got 0"),
        (lambda: MaskedMLP(3, (4,), num_context=-1), "num_context must be an int >= 0, got -1"),
    ],
)
def test_faults_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (MLP(3, (4,), 2), (5, 3)),
        (ConvEncoder((1, 8, 8), 2), (5, 1, 8, 8)),
        (ConvDecoder(2, (1, 8, 8)), (5, 2)),
        (MaskedMLP(3, (4,)), (5, 3)),
    ],
)
def test_networks_can_be_traced(net, shape):
    x = torch.randn(shape)
    torch.testing.assert_close(make_fx(net)(x)(x), net(x))
