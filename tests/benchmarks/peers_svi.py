"""The models of the ``svi`` benchmark in NumPyro, and steps of its SVI in one compiled loop."""

import importlib.util


def has_numpyro():
    return importlib.util.find_spec("numpyro") is not None


def models():
    """Name of a case -> the model of NumPyro, that of latentlab line by line."""
    import numpyro
    from jax import numpy as jnp
    from numpyro import distributions as dist

    def eight_schools(y, sigma):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", 8):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)

    def hierarchy(group, x, y):
        means = numpyro.sample("means", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        scales = numpyro.sample("scales", dist.HalfNormal(jnp.ones(2)).to_event(1))
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))
        with numpyro.plate("groups", 50):
            intercept = numpyro.sample("intercept", dist.Normal(means[0], scales[0]))
            slope = numpyro.sample("slope", dist.Normal(means[1], scales[1]))
        with numpyro.plate("rows", len(x)):
            loc = intercept[group] + slope[group] * x
            numpyro.sample("y", dist.Normal(loc, noise), obs=y)

    def logistic(x, y, size=None):
        weights = numpyro.sample("weights", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
        bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", size or len(x), subsample_size=len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ weights + bias), obs=y)

    return {"eight schools": eight_schools, "hierarchy": hierarchy, "logistic": logistic}


def guide_of(model, kind):
    from numpyro.infer import autoguide

    if kind == "iaf":
        return autoguide.AutoIAFNormal(model, num_flows=3, hidden_dims=[64, 64])
    return autoguide.AutoNormal(model)


def autoencoder(cells, hidden, latent):
    """The model and the guide of a variational autoencoder, in plain JAX."""
    import jax
    import numpyro
    from jax import numpy as jnp
    from numpyro import distributions as dist

    def dense(name, num_in, num_out):
        def first(key):
            return jax.random.normal(key, (num_in, num_out)) / num_in**0.5

        return numpyro.param(f"{name}.weight", first), numpyro.param(
            f"{name}.bias", jnp.zeros(num_out)
        )

    def model(x, size):
        (w1, b1), (w2, b2) = dense("d1", latent, hidden), dense("d2", hidden, cells)
        with numpyro.plate("rows", size, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent), 1.0).to_event(1))
            logits = jax.nn.softplus(z @ w1 + b1) @ w2 + b2
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x, size):
        w1, b1 = dense("e1", cells, hidden)
        (w2, b2), (w3, b3) = dense("e2", hidden, latent), dense("e3", hidden, latent)
        with numpyro.plate("rows", size, subsample_size=len(x)):
            h = jax.nn.softplus(x @ w1 + b1)
            q = dist.Normal(h @ w2 + b2, jnp.exp(h @ w3 + b3)).to_event(1)
            numpyro.sample("z", q)

    return model, guide


def steps(model, guide, data, batch_size=None, per_call=100):
    """A function that takes steps of NumPyro's SVI, so many of them in each compiled loop.

    Arguments:
        model: the model.
        guide: the guide.
        data: torch tensors; with a batch size their rows are drawn anew in each step.
        batch_size: rows of a step.
        per_call: steps of a loop.
    """
    import jax
    from numpyro import optim
    from numpyro.infer import SVI, Trace_ELBO

    arrays = tuple(jax.numpy.asarray(x.numpy()) for x in data)
    svi = SVI(model, guide, optim.Adam(0.01), Trace_ELBO())
    num_rows = len(arrays[0])

    def batch(arrays, key):
        if batch_size is None:
            return arrays
        rows = jax.random.randint(key, (batch_size,), 0, num_rows)
        return (*(x[rows] for x in arrays), num_rows)

    @jax.jit
    def call(state, arrays, key):
        def step(state, key):
            return svi.update(state, *batch(arrays, key))

        return jax.lax.scan(step, state, jax.random.split(key, per_call))

    key = jax.random.PRNGKey(0)
    state = [svi.init(key, *batch(arrays, key))]

    def run(number):
        for k in range(-(-number // per_call)):
            state[0], losses = call(state[0], arrays, jax.random.fold_in(key, k))
            losses.block_until_ready()

    return run
