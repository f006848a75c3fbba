"""Networks that behave otherwise in training: dropout and batch normalisation."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import latentlab as ll


class Seen(nn.Module):
    """Notes in which mode it was run."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return x


def nets(seed=0):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ELU())
    return encoder, nn.Sequential(nn.Linear(2, 8), Seen(), nn.Dropout(0.3), nn.Linear(8, 4))


def autoencoder():
    encoder, decoder = nets()
    encoder.append(nn.Linear(8, 4))
    return ll.VariationalAutoencoder(
        num_features=4, latent_dim=2, encoder=encoder, decoder=decoder
    )


@pytest.fixture(scope="module")
def x():
    torch.manual_seed(1)
    return torch.randn(120, 2) @ torch.randn(2, 4) + 0.3 * torch.randn(120, 4) + 2.0


@pytest.fixture(scope="module")
def fitted(x):
    model = autoencoder()
    posterior = ll.fit(model, x, batch_size=40, max_steps=90, progress=False)
    return model, posterior


def norm_of(model):
    return next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d))


def test_what_a_fit_leaves_is_a_function_of_each_row(fitted, x):
    model = fitted[1].model
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loc, _ = model.encode(x)
    assert not any(m.training for m in model.modules())
    torch.testing.assert_close(model.encode(x[:5])[0], loc[:5])
    torch.testing.assert_close(model.encode(x[:1])[0], loc[:1])  # one row has no variance
    torch.testing.assert_close(model.reconstruct(x), model.reconstruct(x))
    model.encode(x + 100)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_steps_are_in_training_mode_and_nothing_else_is(fitted):
    model, posterior = fitted
    (seen,) = (m for m in posterior.model.modules() if isinstance(m, Seen))
    training = [with_gradient for mode, with_gradient in seen.modes if mode]
    assert len(training) >= 90
    assert all(training)
    assert any(not mode for mode, _ in seen.modes)
    norm = norm_of(posterior.model)
    assert norm.running_mean.abs().max() > 0.05  # the rows have a mean of 2
    assert all(m.training for m in model.modules())  # the caller's own is left as it was
    assert not norm_of(model).running_mean.any()


def test_the_running_numbers_are_saved_and_learned_on(fitted, x, tmp_path):
    _, posterior = fitted
    posterior.save(tmp_path / "a.safetensors")
    loaded = ll.load(tmp_path / "a.safetensors", autoencoder(), data=x)
    torch.testing.assert_close(loaded.model.encode(x), posterior.model.encode(x))
    further = ll.fit(posterior.model, x, batch_size=40, max_steps=40, progress=False)
    before, after = (norm_of(p.model).running_mean for p in (posterior, further))
    assert not torch.equal(before, after)


def test_a_frozen_network_stays_as_it_is():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) + 3.0
    trunk = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout()).requires_grad_(False)
    head = nn.Linear(8, 1)

    def model(x, y):
        pyro.module("head", head)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(head(trunk(x)).squeeze(-1), scale), obs=y)

    posterior = ll.fit(model, (x, x.sum(1)), lambda x, y: None, max_steps=60, progress=False)
    cells = [c.cell_contents for c in posterior.model.__closure__]
    (twin,) = (c for c in cells if isinstance(c, nn.Sequential))
    assert not torch.equal(cells[cells.index(twin) - 1].weight, head.weight)
    assert torch.equal(twin[1].running_mean, trunk[1].running_mean)
    assert twin is not trunk
    assert trunk.training
    assert not twin.training
