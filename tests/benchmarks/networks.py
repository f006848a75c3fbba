"""The variational autoencoder of the benchmarks, 784-400-20 as in Pyro's tutorial."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import softplus

import latentlab as ll

CELLS, HIDDEN, LATENT = 784, 400, 20


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(CELLS, HIDDEN)
        self.loc, self.log_scale = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)

    def forward(self, x):
        h = softplus(self.hidden(x))
        return self.loc(h), self.log_scale(h).exp()


class Decoder(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(LATENT, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, CELLS))


class VAE(nn.Module):
    """Pyro's tutorial, with ``rows``."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def model(self, x=None, size=None):
        pyro.module("decoder", self.decoder)
        with ll.rows(x, size):
            prior = dist.Normal(torch.zeros(LATENT), torch.ones(LATENT)).to_event(1)
            logits = self.decoder(pyro.sample("z", prior))
            return pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x=None, size=None):
        pyro.module("encoder", self.encoder)
        with ll.rows(x, size):
            return pyro.sample("z", dist.Normal(*self.encoder(x)).to_event(1))
