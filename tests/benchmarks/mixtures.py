"""Mixtures against scikit-learn's: a step of expectation-maximisation, and a default fit.

The same rows on both sides, float64. A step is value, expected statistics and the M-step, from the
same components. Default fits differ in what they ask of themselves: scikit-learn stops where a
step gains less than 1e-3 nats *a row*, latentlab where less than tol squared over two, 4.5e-4
nats, are left to gain of *all* data; the height is that of rows that neither has seen.
"""

import statistics
import time

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

import latentlab as ll
from latentlab.inference.check import prepare
from latentlab.models import gmm_em

from . import Table, machine, take_turns

# Name -> covariance, rows, columns, components; asked of each is a quarter of scikit-learn's time.
CASES = {
    "full, 1e5 x 8, K = 20": ("full", 100_000, 8, 20),
    "full, 1e5 x 32, K = 50": ("full", 100_000, 32, 50),
    "diag, 3e5 x 2, K = 50": ("diag", 300_000, 2, 50),
}
ASKED = 4.0

# Name -> rows, columns, components, seeds, times as fast as is asked for.
FITS = {
    "fit, full, 1e4 x 2, K = 5": (10_000, 2, 5, 10, 1.0),
    "fit, full, 1e5 x 8, K = 20": (100_000, 8, 20, 10, 3.0),
    "fit, full, 5e4 x 32, K = 20": (50_000, 32, 20, 3, None),
    "fit, full, 3e5 x 2, K = 20": (300_000, 2, 20, 3, None),
}
HELD_OUT = 20_000


def problem(covariance, num_rows, num_features, num_components):
    """Rows, and scikit-learn's mixture after two steps on some of them."""
    r = np.random.default_rng(0)
    centres = 3 * r.normal(size=(num_components, num_features))
    x = centres[r.integers(num_components, size=num_rows)] + r.normal(
        size=(num_rows, num_features)
    )
    peer = GaussianMixture(num_components, covariance_type=covariance, tol=1e9, random_state=0)
    return x, peer.fit(x[:20_000])


def our_steps(x, peer):
    """A function that takes steps, and the log-likelihood of all rows."""
    K, D = peer.means_.shape
    model = ll.GaussianMixture(D, K, covariance=peer.covariance_type, prior="flat")
    pair, _ = prepare(model, torch.from_numpy(x), "point")
    rows, updates, model = pair.data.args[0], pair.model.updates(pair.guide), pair.model
    unit = model.unit.numpy()
    spreads = peer.covariances_ / (
        unit**2 if peer.covariances_.ndim == 2 else np.outer(unit, unit)
    )
    start = gmm_em.Point(
        torch.from_numpy(peer.weights_).log(),
        (torch.from_numpy(peer.means_) - model.center) / model.unit,
        torch.from_numpy(spreads),
    )
    value = updates._moments(start, rows, None, None).log_likelihood

    def steps(number):
        with pair.entered(seed=0), torch.no_grad():
            for _ in range(number):
                updates.maximise(updates.statistics(rows)[0])

    return steps, float(value)


def peer_steps(x, peer):
    """A function that takes steps of scikit-learn; it leaves the mixture as it was."""
    kept = {key: np.copy(value) for key, value in vars(peer).items() if key.endswith("_")}

    def steps(number):
        for _ in range(number):
            _, log_odds = peer._e_step(x)
            peer._m_step(x, log_odds)
            vars(peer).update(kept)

    return steps


def step_rows():
    """Time a step of every case."""
    for name, case in CASES.items():
        x, peer = problem(*case)
        expected = peer.score(x)
        steps, found = our_steps(x, peer)
        both = {"ours": steps, "peer": peer_steps(x, peer)}
        times = take_turns(both, turns=3, seconds=0.01)
        ratio = times["peer"].times(times["ours"]).median
        cells = [f"{1e3 * times[side].median:.0f} ms" for side in ("ours", "peer")]
        off = f"{abs(found / len(x) - expected):.0e} off"
        yield [name, *cells, f"{ratio:.1f}", f"{ASKED:.0f}", off]


def fit_rows():
    """Time default fits, one seed after the other, and compare their heights."""
    for name, (N, D, K, seeds, asked) in FITS.items():
        ratios, gaps, spent = [], [], []
        for seed in range(seeds):
            r = np.random.default_rng(seed)
            centres = 3 * r.normal(size=(K, D))
            x = centres[r.integers(K, size=N + HELD_OUT)] + r.normal(size=(N + HELD_OUT, D))
            begin = time.process_time()
            peer = GaussianMixture(K, random_state=seed).fit(x[:N])
            middle = time.process_time()
            model = ll.GaussianMixture(D, K, covariance="full", prior="flat")
            ours = ll.fit(model, x[:N], seed=seed, progress=False)
            end = time.process_time()
            spent.append((end - middle, middle - begin))
            ratios.append((middle - begin) / (end - middle))
            height = ours.log_prob(x[N:], num_samples=2).value / HELD_OUT
            gaps.append(height - peer.score(x[N:]))
        cells = [f"{statistics.median(side):.2f} s" for side in zip(*spent, strict=True)]
        ratio, gap = statistics.median(ratios), statistics.median(gaps)
        yield [name, *cells, f"{ratio:.2f}", str(asked or ""), f"{gap:+.4f} above"]


def run():
    """Time every case."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [*step_rows(), *fit_rows()]
    finally:
        torch.set_num_threads(threads)
    return Table(
        "Mixtures: a step of expectation-maximisation, and default fits",
        ["CPU time, one thread, float64, medians", *machine("torch", "scikit-learn")],
        ["case", "latentlab", "scikit-learn", "times as fast", "asked", "height, nats a row"],
        rows,
    )
