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
# # How many kinds of eruption does Old Faithful have?
#
# The geyser Old Faithful in Yellowstone erupts about every hour. An eruption lasts between one
# and a half and five minutes, and the wait for the next one between forty minutes and an hour
# and a half. Is that one kind of eruption with a lot of variation, or are there several kinds?
#
# That is a question about *latent* variables: the kind of an eruption is never observed, only
# its length and the wait that follows. A mixture model says how such data come about, a fit
# tells what the data say about it, and a verdict tells whether to believe the fit. This
# tutorial takes about 15 minutes to read and less than a minute to run.

# %%
import torch

import latentlab as ll

x = ll.data.simulate.eruptions()
x

# %% [markdown]
# These 272 rows are drawn from the figures that were published for the real geyser, so that we
# know the truth behind them and can compare at the end. With a file of your own, this line
# would be `x = ll.data.load("faithful.csv")`: names are kept, units are left alone, and empty
# cells are known to be missing.
#
# ## One kind of eruption
#
# The simplest answer first: one component, which is one normal distribution for each column.

# %%
one = ll.fit(ll.GaussianMixture(num_features=2, num_components=1), x, seed=0)
print(one.check())

# %% [markdown]
# The verdict is about the *fit*: how close the guide, a Gaussian over means and scales, is to
# the posterior of this model. It is close. But a good fit of a wrong model is still wrong, so
# look at what the model would have produced. Blue lines are new data sets drawn from the fit,
# the grey line is the data.

# %%
one.plot("predictive")

# %% [markdown]
# Real eruptions avoid the middle; one normal distribution puts most of its mass there. One kind
# of eruption does not describe them.
#
# ## Two kinds

# %%
two = ll.fit(ll.GaussianMixture(num_features=2, num_components=2), x, seed=0)
print(two.check())

# %%
two.plot("fit").figure

# %%
two.plot("predictive")

# %% [markdown]
# Now new data look like the data. What did we learn about the two kinds? Every figure stands
# with its posterior standard deviation, in minutes, as the data are; `mcse` is the error of the
# mean that comes from drawing a finite number of draws.

# %%
two.summary().round(3)

# %% [markdown]
# One kind lasts about two minutes and is followed by a wait of about 54, the other lasts about
# 4.3 minutes and is followed by 80. The truth behind these rows is 2.04, 54.5, 4.29 and 80.0,
# with 36 % of short ones.
#
# ## Three or four?
#
# More components always fit the rows better that they were fitted to. The honest comparison is
# on rows that were held out: the log predictive density, row by row, and its difference between
# models with the standard error of that difference.

# %%
generator = torch.Generator().manual_seed(0)
order = torch.randperm(len(x), generator=generator)
train, test = x.x[order[:200]], x.x[order[200:]]


def scores(num_components):
    model = ll.GaussianMixture(num_features=2, num_components=num_components)
    # A comparison can be brief.
    posterior = ll.fit(model, train, seed=0, max_steps=3000)
    draws = posterior.sample(2000)
    return posterior, posterior.model.log_prob(test, draws)  # nats, one for each row


fitted = {K: scores(K) for K in (1, 2, 3, 4)}
reference = fitted[2][1]
for K, (posterior, score) in fitted.items():
    difference = score - reference
    total = ll.diagnostics.Estimate(
        float(difference.sum()), float(difference.std() * len(difference) ** 0.5)
    )
    print(f"K={K}: {total} nats against K=2; verdict: {posterior.check().level}")

# %% [markdown]
# One component is worse by far more than its error. Three and four are no better than two: the
# differences are of the size of their errors, and the verdict already asks for care, because
# the spare components either hold hardly any rows or sit on top of others, so that their labels
# are confused:

# %%
for reason in fitted[4][0].check().reasons:
    print("-", reason)

# %% [markdown]
# Two kinds of eruption it is.
#
# ## Using it
#
# What kind was an eruption of 3.1 minutes with a wait of 66? The responsibilities are the
# probability of each kind, with the uncertainty about means and scales averaged over.

# %%
draws = two.sample(2000)
new = torch.tensor([[3.1, 66.0], [2.0, 50.0]], dtype=torch.float64)
two.model.responsibilities(new, draws)

# %% [markdown]
# A missing cell is no obstacle: what is not known is integrated out, exactly. From the length
# alone:

# %%
new[:, 1] = float("nan")
two.model.responsibilities(new, draws)

# %% [markdown]
# And from a posterior you can draw new data, export it, write it down as a page, or save it and
# load it again without the data:
#
# ```python
# two.predict(1000)["x"]        # 1000 new data sets of 272 rows
# two.to_arviz()                # ArviZ
# two.report("run")             # run/report.html
# two.save("run")               # run/model.safetensors
# ll.load("run")
# ```
#
# ## When to worry
#
# Spoil the fit on purpose: make the guide half as wide as it should be, as a too simple
# approximation would.

# %%
import copy
import dataclasses

pair = copy.deepcopy(two.pair)
pair.guide.frame.mul_(0.5)
narrow = dataclasses.replace(two, pair=pair)
print(narrow.check())

# %% [markdown]
# The importance weights show that the posterior reaches further than the guide, and the ELBO is
# not the one that was recorded. Every posterior of latentlab can be asked this question,
# whichever model it came from.
#
# ## What next
#
# - Your own table: `latentlab fit gmm DATA.csv --components 2 --out run/`, or `ll.data.load`
#   and the lines above.
# - [Choose a model](../choose_a_model.md), and write your own: any Pyro program is fitted the
#   same way.
# - [How far to trust a fit](../trust.md) explains each line of the verdict.
#
# **Try it.** Fit `ll.data.simulate.eruptions(num_rows=30)`. How wide are the intervals of the
# means now, and does the verdict change? Set a fifth of the cells to NaN and fit again.
