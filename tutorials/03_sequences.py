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
# # Are there quiet and busy decades of earthquakes?
#
# Some years have many large earthquakes, some have few. If they came at random, at one rate, the
# counts would follow a Poisson distribution. Do they? Or does the earth change between regimes,
# each with its own rate, that last for years?
#
# The regime of a year is *latent*: never observed, and probably that of the year before. That is
# a hidden Markov model. This tutorial takes about 15 minutes to read and two to run.

# %%
import numpy as np
import torch

import latentlab as ll

# Earthquakes of magnitude 7 and above in each year from 1900 to 2006, worldwide.
# Source: U.S. Geological Survey, as printed in Zucchini and MacDonald, Hidden Markov Models for
# Time Series (2009).
# fmt: off
counts = np.array([
    13, 14, 8, 10, 16, 26, 32, 27, 18, 32, 36, 24, 22, 23, 22, 18, 25, 21, 21, 14,
    8, 11, 14, 23, 18, 17, 19, 20, 22, 19, 13, 26, 13, 14, 22, 24, 21, 22, 26, 21,
    23, 24, 27, 41, 31, 27, 35, 26, 28, 36, 39, 21, 17, 22, 17, 19, 15, 34, 10, 15,
    22, 18, 15, 20, 15, 22, 19, 16, 30, 27, 29, 23, 20, 16, 21, 21, 25, 16, 18, 15,
    18, 14, 10, 15, 8, 15, 6, 11, 8, 7, 18, 16, 13, 12, 13, 20, 15, 16, 12, 18,
    15, 16, 13, 15, 16, 11, 11,
])
# fmt: on
print(f"mean {counts.mean():.1f}, variance {counts.var(ddof=1):.1f}")

# %% [markdown]
# The variance of a Poisson distribution is its mean. Here it is more than twice that: one rate is
# not the whole story.
#
# ## One regime, to see it fail
#
# A hidden Markov model with one state is a plain Poisson distribution.

# %%
one = ll.fit(ll.HiddenMarkovModel(1, emissions="poisson"), counts, seed=0, num_restarts=1)
one.plot("predictive")

# %% [markdown]
# Blue lines are new data sets drawn from the fit. The grey line, the data, is flatter than them:
# there are more quiet years and more busy years than one rate can explain. The order of the years
# tells still more. Each *pseudo-residual* says where a count stands in the forecast that the
# model made for that year from the years before; if the model is right they are independent
# standard normal numbers: their standard deviation is 1, and no year knows of the one before, up
# to an error of about 0.1.


# %%
def residuals(posterior):
    return posterior.model.residuals(counts, posterior.sample(1000))[0, :, 0]


def describe(posterior):
    r = residuals(posterior)
    lag = float(np.corrcoef(r[1:], r[:-1])[0, 1])
    return f"sd {float(r.std()):.2f}, correlation with the year before {lag:.2f}"


print(describe(one))

# %% [markdown]
# Their spread is too large, and a busy year is followed by a busy one.
#
# ## Two regimes

# %%
two = ll.fit(ll.HiddenMarkovModel(2, emissions="poisson"), counts, seed=0, num_restarts=2)
print(two.check())

# %%
two.summary().round(3)

# %% [markdown]
# One regime has about 15 earthquakes a year, the other about 26. Each row of `transitions` holds
# the probabilities of the next year's regime. Who stays with probability 0.9 stays for ten years
# on average. Below, dots are years in the colour of their most probable regime; the lower panel
# has the probability itself.

# %%
two.plot("fit").figure

# %%
print(describe(two))

# %% [markdown]
# Much better: the spread is right, and less than half of the correlation is left. Not all of it
# is gone, so keep that in mind. How long does a regime last? From the draws of the posterior, with
# an interval:

# %%
draws = two.sample(2000)
stay = draws["transitions"].diagonal(dim1=1, dim2=2)
for k in range(2):
    low, middle, high = (1 / (1 - stay[:, k])).quantile(
        torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    )
    rate = draws["rates"][:, k].mean()
    print(
        f"state {k} ({rate:.0f} a year) lasts {middle:.0f} years (90 %: {low:.0f} to {high:.0f})"
    )

# %% [markdown]
# ## Three? Four?
#
# More states always fit the years better that they were fitted to. The honest comparison hides
# years: every third year is set to missing, the model is fitted to the others, and then asked how
# probable the hidden counts were. Missing steps are no obstacle: what is not known is summed out,
#
# $$\log p(x_\text{hidden} \mid x_\text{seen}) = \log p(x) - \log p(x_\text{seen}).$$


# %%
def score(num_states, fold):
    seen = counts.astype(float)
    seen[np.arange(len(counts)) % 3 == fold] = np.nan
    model = ll.HiddenMarkovModel(num_states, emissions="poisson")
    posterior = ll.fit(model, seen, seed=0, num_restarts=1, max_steps=50)  # brief will do here
    draws = posterior.sample(500)
    # The average over draws is one of ratios: p(hidden | seen) = E p(all) / p(seen).
    total = torch.cat([c.log_prob(all_years.x) for c in posterior.model.chains(draws, all_years)])
    known = ll.data.as_sequences(seen)
    part = torch.cat([c.log_prob(known.x) for c in posterior.model.chains(draws, known)])
    return float((total - part).logsumexp(0) - np.log(500))


all_years = ll.data.as_sequences(counts)
scores = {K: np.array([score(K, fold) for fold in range(3)]) for K in (1, 2, 3, 4)}
for K, nats in scores.items():
    difference = nats - scores[2]
    estimate = ll.diagnostics.Estimate(difference.sum(), difference.std(ddof=1) * 3**0.5)
    print(f"K={K}: {estimate} nats against K=2")

# %% [markdown]
# One regime is worse by far more than its error, and three are better than two by far more, too.
# The fourth adds nothing.

# %%
three = ll.fit(ll.HiddenMarkovModel(3, emissions="poisson"), counts, seed=0, num_restarts=2)
print(three.check())

# %%
three.plot("fit").figure

# %%
print(describe(three))

# %% [markdown]
# The third regime stands between the quiet and the busy one, and what was left of the correlation
# is gone within its error. Quiet, middling and busy it is: a description of the years, that is,
# and not yet a cause. A rate that drifts slowly would look much the same.
#
# ## Using it
#
# Is it a busy time now? The probability of each regime in the last year given all years up to
# then, and a forecast: years to come are steps that are missing.

# %%
model, draws = three.model, three.sample(2000)
print(f"rates: {draws['rates'].mean(0)[:, 0].numpy().round(0)}")
print(f"2006: {model.filter(counts, draws)[0, -1].numpy().round(2)}")
future = np.append(counts.astype(float), [np.nan] * 3)
print("2007 to 2009:")
print(model.smooth(future, draws)[0, -3:].numpy().round(2))

# %% [markdown]
# Several sequences are a list of arrays, `ll.fit(model, [a, b, c])`, or a table with a column that
# tells them apart: `ll.data.as_sequences(frame, id="station", time="year")`. Other data have other
# emissions: `emissions="gaussian"`, `"categorical"`, a list such as `["gaussian", "poisson"]` for
# columns of several kinds, or one of your own.
#
# **Try it.** Set ten years in a row to NaN and fit again: what does the model say of them? Give
# the model `stickiness=20`: how do the dwell times change, and do you believe that prior?
