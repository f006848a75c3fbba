# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Autoencoders: plain or variational?
#
# A handwritten digit of 8 by 8 pixels is 64 numbers, but nobody thinks of 64 things when writing
# one. An *autoencoder* looks for a handful of numbers, the code, from which the image can be
# drawn again. A *variational* autoencoder does the same as a latent-variable model: codes have a
# prior, images a distribution, and what is learned is a posterior.
#
# Which one should you take, and with which loss? People have strong opinions. Here are five
# candidates on the same digits, with the same networks, and two questions to each: how well does
# it draw an image that it has seen the code of, and how good are images that it makes up? About
# 15 minutes to read, less than a minute to run.

# %%
import numpy as np
import torch
from sklearn.datasets import load_digits

import latentlab as ll
from latentlab.distributions import Gaussian
from latentlab.report.images import plot_images

pixels = torch.tensor(load_digits().data / 16)  # (1797, 64), from 0 (black) to 1 (white)
order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
train, test = pixels[order[:1400]], pixels[order[1400:]]


def pictures(rows):
    return rows.clamp(0, 1).reshape(-1, 1, 8, 8).numpy(force=True)


plot_images(pictures(train[:20]))

# %% [markdown]
# A folder of PNG files of your own becomes such a tensor by `ll.data.load_images("folder").x`.
#
# ## A linear one first
#
# The simplest autoencoder is linear: principal components. As a model, it has exact answers, and
# a likelihood that all others have to beat. Eight latents:

# %%
seen = train[:, train.std(0) > 0]  # a pixel that is always black has no scale
linear = ll.ProbabilisticPCA(num_features=seen.shape[1], latent_dim=8, prior="flat")
optimum = {site: value[None] for site, value in linear.scale_to(seen).optimum(seen).items()}
explained = linear.reconstruct(seen, optimum) - seen
share = 1 - explained.square().sum() / (seen - seen.mean(0)).square().sum()
print(f"8 principal components explain {float(share):.0%} of the variance of the pixels")

# %% [markdown]
# The maximum of the likelihood is in closed form here, so nothing had to be fitted. With the
# default prior, `ll.fit(ll.ProbabilisticPCA(...), x)` gives all of it with its uncertainty, and
# cells may be missing.
#
# ## Five candidates
#
# The networks are the same, one hidden layer of 128 to either side of eight latents. What differs
# is what an error costs, and whether there is a prior:
#
# - plain, with cross-entropy (BCE) or with squared error (MSE),
# - variational, with the likelihoods that belong to these: Bernoulli, and a normal one. Its scale
#   is either fixed to 1, which is what "squared error plus KL" in many programs comes to, or
#   learned, which is the default here.

# %%
networks = {"num_features": 64, "latent_dim": 8, "hidden_dims": (128,)}


def normal(scale):
    return Gaussian(scale=scale, units="table")  # one unit for all pixels


candidates = {
    "AE, BCE": ll.Autoencoder(loss="bce", held_out=0.0, **networks),
    "AE, MSE": ll.Autoencoder(loss="mse", held_out=0.0, **networks),
    "VAE, Bernoulli": ll.VariationalAutoencoder(likelihood="bernoulli", **networks),
    "VAE, sigma = 1": ll.VariationalAutoencoder(likelihood=normal(1.0), **networks),
    "VAE, sigma learned": ll.VariationalAutoencoder(likelihood=normal("shared"), **networks),
}
fitted = {
    name: ll.fit(model, train, batch_size=128, max_steps=1500, progress=False)
    for name, model in candidates.items()
}
decoders = {name: getattr(p.model, "__self__", p.model) for name, p in fitted.items()}

# %% [markdown]
# ## Two questions
#
# *How well is an image drawn again?* The cross-entropy of test images that were not fitted, given
# the reconstruction, clipped to [0.01, 0.99]; less is better. It is the very loss of two of the
# five, so they have an advantage here.
#
# *How good are images that are made up?* Draw a code, decode it, 2000 times. There are two places
# to draw codes from: the prior, N(0, I), or a mixture of ten Gaussians that is fitted to the codes
# of the training images. The distance between made-up and test images is the Fréchet distance,
# which compares means and covariances, on 20 principal axes.
#
# No number without its error: the first has the standard error over test images, the second the
# standard deviation over 20 bootstrap samples of both sets. (That is the error of *measuring* one
# fit. Another seed gives another fit; see the exercise.)

# %%
axes = torch.linalg.eigh(train.T.cov())[1].flip(1)[:, :20].numpy()
rng = np.random.default_rng(0)


def frechet(a, b):
    a, b = a @ axes, b @ axes
    A, B = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ B @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * cross)


def distance(made_up, real):
    made_up, real = made_up.double().numpy(force=True), real.numpy()

    def again(rows):
        return rows[rng.integers(len(rows), size=len(rows))]

    spread = np.std([frechet(again(made_up), again(real)) for _ in range(20)])
    return ll.diagnostics.Estimate(frechet(made_up, real), float(spread))


def cross_entropy(model):
    drawn = model.reconstruct(test).double().clamp(0.01, 0.99)
    loss = -(test * drawn.log() + (1 - test) * (1 - drawn).log()).sum(1)
    return ll.diagnostics.Estimate(float(loss.mean()), float(loss.std() / len(loss) ** 0.5))


codes = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1))
mixtures = {name: ll.fit_codes(p, num_components=10, max_steps=100) for name, p in fitted.items()}

print(f"{'':20}{'cross-entropy':>16}{'N(0, I)':>18}{'mixture':>18}")
for name, model in decoders.items():
    prior = distance(model.decode(codes), test)
    mixture = distance(mixtures[name].sample(2000), test)
    print(f"{name:20}{cross_entropy(model)!s:>16}{prior!s:>18}{mixture!s:>18}")
print(f"{'training images':54}{distance(train, test)!s:>18}")

# %% [markdown]
# The last line is the floor: real images against real images.
#
# ## Reading it honestly
#
# **Drawing again.** Plain autoencoders are as good as the best variational one, or a little
# better: they have nothing else to do. That is no argument against the prior, which costs little
# where the scale is learned.
#
# **Fixing sigma to 1 is a mistake.** Pixels vary by about 0.3, so a noise of 1 says that they are
# all noise. The fit believes it, and uses no latent at all:

# %%
print(decoders["VAE, sigma = 1"].collapse(train))
print(decoders["VAE, sigma learned"].collapse(train))
print(fitted["VAE, sigma = 1"].check())

# %% [markdown]
# A variational autoencoder whose images are a grey blur has this disease as a rule, and no larger
# network cures it. Learn sigma.
#
# **Making up.** From N(0, I) a plain autoencoder makes up nonsense: it was never told where codes
# should lie. Variational ones are far better. But that is not the whole story: with a mixture on
# its codes, a plain autoencoder makes up better images than a variational one does from its prior.
# What was missing was not the KL, but any model of the codes. The learned-sigma one gains from a
# mixture, too: its codes do not fill N(0, I) evenly.
#
# The Bernoulli likelihood is at home with pixels that are black or white. Grey ones it takes for
# uncertain, so it needs less of the code, leaves some latents unused, and makes up images that
# vary too little. A mixture on its codes does not repair that: the information is not there.
#
# See for yourself. Made up from N(0, I) by the plain autoencoder:

# %%
plot_images(pictures(decoders["AE, MSE"].decode(codes[:20])))

# %% [markdown]
# By the same one, from the mixture on its codes:

# %%
plot_images(pictures(mixtures["AE, MSE"].sample(20)))

# %% [markdown]
# By the variational one with a learned sigma, from N(0, I):

# %%
plot_images(pictures(decoders["VAE, sigma learned"].decode(codes[:20])))

# %% [markdown]
# ## What only the variational one can do
#
# It is a model of the images, so it has a likelihood, with an error, and can be compared with any
# other model of the same pixels:

# %%
best = decoders["VAE, sigma learned"]
density = best.log_prob(test[:200], num_samples=500)
row = density.log_prob
print(f"{float(row.mean()):.1f} ± {float(row.std() / len(row) ** 0.5):.1f} nats per test image")

# %% [markdown]
# And it says what it does not know. Lose the lower half of some images; below are what is left,
# and three draws of the whole:

# %%
half = test[:10].clone()
half[:, 32:] = torch.nan
filled = best.impute(half, num_samples=3).draws
shown = torch.cat([half.nan_to_num(0.5), filled.flatten(0, 1)])
plot_images(pictures(shown), names=("half", "draw", "draw", "draw"))

# %% [markdown]
# ## What to take
#
# - Codes as features, or images drawn again: a plain autoencoder will do, and is the simplest.
# - New images: either kind, with a mixture on the codes.
# - A likelihood, missing cells, an honest "I do not know": a variational one, with sigma learned.
# - Few rows, or an answer that has to be exact: `ll.ProbabilisticPCA` or `ll.FactorAnalysis`.
#
# These are 1400 small images, networks of one layer and 1500 steps; none of the fits has
# converged, as their verdicts say. The order of the rows is what carries over, not the figures.
#
# ## What next
#
# - Your own table: `from latentlab.sklearn import PPCA, VAE` for pipelines of scikit-learn.
# - [How far to trust a fit](../trust.md) explains each line of the verdict.
#
# **Try it.** Change the seed of the networks, and see how far each row of the table moves: is a
# difference that you believed in still there? Give the VAE `prior="mixture"`: does it need the
# mixture on its codes any more?
