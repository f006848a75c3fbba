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
# # Your own model
#
# Eighteen people are kept from sleeping enough for nine days, and each morning their reaction
# time is measured. It gets longer. By how much a day, for a person in general and for each of
# them? And how sure can we be?
#
# No ready-made model answers that, so we write one: a *hierarchical regression*, from scratch,
# in Pyro. The way is the same for every model of your own: write it, draw from it before it has
# seen data, check it, fit it, ask for the verdict, refine it, and use it. About 20 minutes to
# read, less than a minute to run.
#
# The rows are drawn here, from the figures that are published for such a study (Belenky et al.,
# 2003; estimates as in Bates et al., 2015), so that we know the truth: reaction times start at
# 251 ms and grow by 10.5 ms a day; people differ by 25 ms at the start and by 6 ms a day in how
# fast they slow down; a single measurement is off by 26 ms.

# %%
import pyro
import pyro.distributions as dist
import torch

import latentlab as ll

generator = torch.Generator().manual_seed(1)


def noise(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


num_people, num_days = 18, 10
start, slowing = 251 + 25 * noise(num_people), 10.5 + 6 * noise(num_people)
person = torch.arange(num_people).repeat_interleave(num_days)  # (N,)
day = torch.arange(num_days, dtype=torch.float64).repeat(num_people)
reaction = start[person] + slowing[person] * day + 26 * noise(len(day))

# %% [markdown]
# ## Write it
#
# A model is a function that draws, in order, everything that we do not know, and then the data:
# with `obs=` where they are known. `pyro.plate` says what is repeated independently: people, and
# rows. Write `[..., person]` and `loc[..., 0]`, with the dots: the engine can then run many draws
# at once. If it cannot, the fit says so, and is slower.


# %%
def model(day, person, reaction=None):
    loc = pyro.sample("loc", dist.Normal(torch.tensor([250.0, 0.0]), 100.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(torch.tensor([100.0, 100.0])).to_event(1))
    error = pyro.sample("error", dist.HalfNormal(100.0))

    with pyro.plate("people", num_people):
        start = pyro.sample("start", dist.Normal(loc[..., 0], spread[..., 0]))
        slowing = pyro.sample("slowing", dist.Normal(loc[..., 1], spread[..., 1]))

    mean = start[..., person] + slowing[..., person] * day
    with pyro.plate("rows", len(day)):
        return pyro.sample("reaction", dist.Normal(mean, error), obs=reaction)


# %% [markdown]
# ## Draw from it before it has seen data
#
# Called without `reaction`, the model invents a study. Are its studies like any that could
# happen?

# %%
pyro.set_rng_seed(0)
invented = torch.stack([model(day, person) for _ in range(500)])
share = (invented < 0).double().mean()
print(f"range of 90 %: {invented.quantile(0.05):.0f} to {invented.quantile(0.95):.0f} ms")
print(f"negative reaction times: {share:.0%}")

# %% [markdown]
# No: a third of its reaction times are below zero, and people who slow down by a second in nine
# days are nothing special to it. Nobody believes that. A prior need not be right, but what it
# thinks plausible should be possible: tens of milliseconds, not hundreds.


# %%
def model(day, person, reaction=None):
    loc = pyro.sample(
        "loc", dist.Normal(torch.tensor([250.0, 0.0]), torch.tensor([50.0, 15.0])).to_event(1)
    )
    spread = pyro.sample("spread", dist.HalfNormal(torch.tensor([40.0, 10.0])).to_event(1))
    error = pyro.sample("error", dist.HalfNormal(40.0))

    with pyro.plate("people", num_people):
        start = pyro.sample("start", dist.Normal(loc[..., 0], spread[..., 0]))
        slowing = pyro.sample("slowing", dist.Normal(loc[..., 1], spread[..., 1]))

    mean = start[..., person] + slowing[..., person] * day
    with pyro.plate("rows", len(day)):
        return pyro.sample("reaction", dist.Normal(mean, error), obs=reaction)


invented = torch.stack([model(day, person) for _ in range(500)])
share = (invented < 0).double().mean()
print(f"range of 90 %: {invented.quantile(0.05):.0f} to {invented.quantile(0.95):.0f} ms")
print(f"negative reaction times: {share:.1%}")

# %% [markdown]
# ## Check it
#
# `check_pair` runs the model once and lists what it found, before any time is spent on a fit.

# %%
data = {"day": day, "person": person, "reaction": reaction}
print(ll.check_pair(model, data))

# %% [markdown]
# What does it say of a mistake? A guide of our own with a site misspelt is a classic: Pyro would
# warn, fit something, and return it.


# %%
def misspelt(day, person, reaction=None):
    pyro.sample("local", dist.Normal(torch.zeros(2), 1.0).to_event(1))


for fault in ll.check_pair(model, data, misspelt).faults[:2]:
    print("-", fault)

# %% [markdown]
# ## Fit it, and ask for the verdict
#
# First the quick way: a guide that knows no correlations. (Where JAX is installed XLA takes the
# steps, which is four times as fast here; the answer is the same without.)

# %%
quick = ll.fit(model, data, guide="mean_field", seed=0)
print(quick.check())

# %% [markdown]
# The verdict tells why not, and what to try: the latents are correlated, and a guide without
# correlations is too narrow. So do what it says.

# %%
posterior = ll.fit(model, data, guide="full_rank", seed=0)
print(posterior.check())

# %%
posterior.summary().round(1).head(5)

# %% [markdown]
# ## Refine it
#
# The guide is a Gaussian on the real line, and a hierarchical model is not quite one: where
# `spread` is small, everyone's `start` must be close to `loc`. The usual cure is to write the
# model so that what is drawn does not depend on `spread`: each person's deviation *in units of
# the spread*. It is the same model, said differently.


# %%
def refined(day, person, reaction=None):
    loc = pyro.sample(
        "loc", dist.Normal(torch.tensor([250.0, 0.0]), torch.tensor([50.0, 15.0])).to_event(1)
    )
    spread = pyro.sample("spread", dist.HalfNormal(torch.tensor([40.0, 10.0])).to_event(1))
    error = pyro.sample("error", dist.HalfNormal(40.0))

    with pyro.plate("people", num_people):
        units = pyro.sample("units", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    start = loc[..., 0] + spread[..., 0] * units[..., 0]
    slowing = loc[..., 1] + spread[..., 1] * units[..., 1]

    mean = start[..., person] + slowing[..., person] * day
    with pyro.plate("rows", len(day)):
        return pyro.sample("reaction", dist.Normal(mean, error), obs=reaction)


other = ll.fit(refined, data, guide="full_rank", seed=0)
print(other.check())

# %% [markdown]
# Worse, not better. The two are one model, so that their ELBOs bound the same evidence, and the
# larger one belongs to the guide that is closer to the posterior:

# %%
for name, each in (("as it stands", posterior), ("refined", other)):
    print(f"{name}: ELBO {each.elbo} nats, verdict: {each.check().level}")
best = max((posterior, other), key=lambda each: each.elbo.value)

# %% [markdown]
# With ten measurements of each person the data say a lot about everyone, and then the first way
# of writing it is the better one; with few measurements it can be the other way round. There is
# no need to guess, or to remember a rule: the verdict says which fit to use.
#
# ## Use it
#
# Does the model produce studies like ours? Blue lines are new studies drawn from the fit.

# %%
best.plot("predictive")

# %% [markdown]
# How long will person 3 take on days 10 to 12, had the study gone on? `predict` takes the same
# arguments as the fit; `reaction` is what it answers.

# %%
later = {"day": torch.tensor([10.0, 11.0, 12.0]).double(), "person": torch.tensor([3, 3, 3])}
drawn = best.predict(4000, later)["reaction"]
truth = start[3] + slowing[3] * later["day"]
for d, values, mean in zip((10, 11, 12), drawn.T, truth, strict=True):
    low, high = values.quantile(0.05), values.quantile(0.95)
    print(f"day {d}: {values.mean():.0f} ms, 90 % between {low:.0f} and {high:.0f}", end="")
    print(f" (true mean {mean:.0f})")

# %% [markdown]
# And the question that we began with: how much slower does a person in general get each day?

# %%
slope = best.sample(4000)["loc"][:, 1]
low, high = slope.quantile(0.05), slope.quantile(0.95)
print(f"{slope.mean():.1f} ms a day, 90 % between {low:.1f} and {high:.1f} (truth 10.5)")

# %% [markdown]
# ## Keep it
#
# A posterior is stored without its data and without pickles: figures in a safe format, with a
# checksum. A model of your own is code, so give it back when you load.

# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    best.save(folder)
    chosen = model if best is posterior else refined
    again = ll.load(folder, model=chosen, data=data)
    print(again.check().level, torch.equal(again.sample(5)["loc"], best.sample(5)["loc"]))

# %% [markdown]
# ## What next
#
# - [Choose a model](../choose_a_model.md) says which guide suits which posterior.
# - [How far to trust a fit](../trust.md) explains each line of the verdict.
# - Laws that hold for every pair, to run in your own tests: `latentlab.testing.check_laws`.
#
# **Try it.** Let `start` and `slowing` be correlated between people (a `LKJCholesky` for their
# correlation). Does the ELBO say that the data ask for it? Keep three measurements of each
# person only: which way of writing the model does better now?
