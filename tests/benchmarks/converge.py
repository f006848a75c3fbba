"""Fits to convergence, all included after import: latentlab and NumPyro against NUTS.

latentlab fits by its defaults, and as it is told. NumPyro takes 20,000 steps of Adam at 1e-2 with
``AutoNormal``, in the one compiled loop of ``SVI.run``. Each fit has a process of its own, whose
CPU time counts from when everything is imported. The errors are those of 20,000 draws, against a
long chain of NumPyro's NUTS: of the means in posterior standard deviations, of the standard
deviations as the logarithm of a ratio.
"""

import json
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

import latentlab as ll

from . import Table, machine
from . import peers_svi as peers
from .svi import cases

CASES = {"eight schools": "eight schools", "logistic, 1e3 x 50": "logistic"}  # name -> peer
OURS = {
    "default": lambda case, seed: _fit(case, seed, "auto"),
    "full_rank": lambda case, seed: _fit(case, seed, "full_rank"),
    "mean_field": lambda case, seed: _fit(case, seed, "mean_field"),
    "mean_field, linear response": lambda case, seed: ll.linear_response(
        _fit(case, seed, "mean_field")
    ),
}
PEER = "NumPyro AutoNormal"
SEEDS = range(3)
STEPS = 20_000
DRAWS = 20_000
NUTS = 1_000, 20_000  # draws to warm up, and to keep


def _fit(case, seed, guide):
    return ll.fit(case.model, case.data, guide, seed=seed, progress=False)


def moments(draws):
    """Mean and sd of each number; of positive sites those of the logarithm, too, apart."""
    found = {}
    for site, value in draws.items():
        value = np.asarray(value, dtype=float)
        value = value.reshape(len(value), -1)
        found[site] = value.mean(0).tolist(), value.std(0).tolist()
        if (value > 0).all():
            found[f"log {site}"] = np.log(value).mean(0).tolist(), np.log(value).std(0).tolist()
    return found


def ours(name, how, seed):
    """CPU seconds, wall-clock seconds, moments and the verdict of a fit of ours."""
    case = cases()[name]
    torch.set_num_threads(1)
    begin = time.process_time(), time.perf_counter()
    posterior = OURS[how](case, seed)
    end = time.process_time(), time.perf_counter()
    found = moments(posterior.sample(DRAWS))
    how_far = f"{type(posterior.guide).__name__}, {posterior.method.split(',')[0]}"
    return end[0] - begin[0], end[1] - begin[1], found, f"{posterior.check().level} ({how_far})"


def theirs(name, how, seed):
    """The same of NumPyro, which gives no verdict."""
    import jax
    from numpyro import optim
    from numpyro.infer import SVI, Trace_ELBO

    model, data = peers.models()[CASES[name]], cases()[name].data
    begin = time.process_time(), time.perf_counter()
    arrays = [jax.numpy.asarray(x.numpy()) for x in data]
    guide = peers.guide_of(model, "mean_field")
    svi = SVI(model, guide, optim.Adam(0.01), Trace_ELBO())
    key = jax.random.PRNGKey(seed)
    run = svi.run(key, STEPS, *arrays, progress_bar=False)
    jax.block_until_ready(run.params)
    end = time.process_time(), time.perf_counter()
    draws = guide.sample_posterior(key, run.params, *arrays, sample_shape=(DRAWS,))
    return end[0] - begin[0], end[1] - begin[1], moments(draws), ""


def reference(name):
    """Moments of a long chain of NumPyro's NUTS."""
    import jax
    from numpyro.infer import MCMC
    from numpyro.infer import NUTS as Nuts

    arrays = [jax.numpy.asarray(x.numpy()) for x in cases()[name].data]
    kernel = Nuts(peers.models()[CASES[name]], target_accept_prob=0.9)
    chain = MCMC(kernel, num_warmup=NUTS[0], num_samples=NUTS[1], progress_bar=False)
    chain.run(jax.random.PRNGKey(1), *arrays)
    return moments(chain.get_samples())


def errors(found, truth, logarithm):
    """Mean and largest error of the means, and of the standard deviations."""
    means, sds = [], []
    for site in truth:
        is_log = site.startswith("log ")
        if is_log != (logarithm and (is_log or f"log {site}" in truth)):
            continue
        (mean, sd), (true_mean, true_sd) = map(np.asarray, (found[site], truth[site]))
        means += (np.abs(mean - true_mean) / true_sd).tolist()
        sds += np.abs(np.log(sd / true_sd)).tolist()
    return np.mean(means), np.max(means), np.mean(sds), np.max(sds)


def apart(*job):
    """Do a job in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", __name__, *map(str, job)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def run():
    """Time to a posterior, and how good it is."""
    rows = []
    candidates = [*OURS, *[PEER] * peers.has_numpyro()]
    for name in CASES:
        truth = reference(name)
        found = {how: [] for how in candidates}
        for seed in SEEDS:  # in turns, so that a busy moment hits all of them
            for how in candidates:
                found[how].append(apart(name, how, seed))
        for how, fits in found.items():
            rows.append(row_of(name, how, fits, found.get(PEER), truth))
    return Table(
        "Fits to convergence: latentlab and NumPyro",
        [
            *machine(*["torch", "pyro-ppl", "numpy", "jax"], *["numpyro"] * peers.has_numpyro()),
            f"CPU seconds of a process after its imports, compilation included, 1 thread; medians "
            f"of {len(SEEDS)} seeds",
            f"{PEER}: Adam 1e-2 x {STEPS:,}; asked of the default: at most half its time",
            "errors: mean over all latents (largest), in the units of the model; of positive "
            "latents on the logarithm, behind the stroke",
        ],
        ["case", "fit", "CPU s", "of NumPyro's", "error of means", "of sds", "verdict"],
        rows,
    )


def row_of(name, how, fits, peer, truth):
    """A row of the table."""
    seconds = statistics.median(fit[0] for fit in fits)
    ratio = ""
    if peer is not None:
        ratio = f"{statistics.median(f[0] / p[0] for f, p in zip(fits, peer, strict=True)):.2f}"
    plain, logs = (
        np.median([errors(fit[2], truth, logarithm) for fit in fits], 0)
        for logarithm in (False, True)
    )

    def text(k):
        first, second = (f"{e[k]:.3f} ({e[k + 1]:.3f})" for e in (plain, logs))
        return first if first == second else f"{first} / {second}"

    verdicts = ", ".join(dict.fromkeys(fit[3] for fit in fits))
    return [name, how, f"{seconds:.2f}", ratio, text(0), text(2), verdicts]


if __name__ == "__main__":
    _, what, who, number = sys.argv
    print(json.dumps((theirs if who == PEER else ours)(what, who, int(number))))
