"""A step of expectation-maximisation, against scikit-learn's.

The same rows and the same components on both sides, float64. latentlab takes the log-likelihood
and its gradient in the natural parameters, which is the matrix of expected statistics that an
M-step turns into parameters; scikit-learn takes its E-step and its M-step.
"""

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from latentlab.distributions import NormalMixture

from . import Table, machine, take_turns

# Name -> covariance, rows, columns, components; asked of each is a quarter of scikit-learn's time.
CASES = {
    "full, 1e5 x 8, K = 20": ("full", 100_000, 8, 20),
    "full, 1e5 x 32, K = 50": ("full", 100_000, 32, 50),
    "diag, 3e5 x 2, K = 50": ("diag", 300_000, 2, 50),
}
ASKED = 4.0


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
    """A function that takes steps, and the log-likelihood of each row."""
    rows, spread = torch.from_numpy(x), torch.from_numpy(peer.covariances_)
    name = "scales" if peer.covariance_type == "diag" else "scale_trils"
    shape = spread.sqrt() if name == "scales" else torch.linalg.cholesky(spread)
    leaves = [torch.from_numpy(peer.weights_), torch.from_numpy(peer.means_), shape]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def log_prob():
        weights, locs, spread = leaves
        return NormalMixture(weights, locs, **{name: spread}, validate_args=False).log_prob(rows)

    def steps(number):
        for _ in range(number):
            torch.autograd.grad(log_prob().sum(), leaves)

    return steps, log_prob().detach().numpy()


def peer_steps(x, peer):
    """A function that takes steps of scikit-learn; it leaves the mixture as it was."""
    kept = {key: np.copy(value) for key, value in vars(peer).items() if key.endswith("_")}

    def steps(number):
        for _ in range(number):
            _, log_odds = peer._e_step(x)
            peer._m_step(x, log_odds)
            vars(peer).update(kept)

    return steps


def run():
    """Time every case."""
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, case in CASES.items():
            x, peer = problem(*case)
            expected = peer.score_samples(x)
            steps, found = our_steps(x, peer)
            both = {"ours": steps, "peer": peer_steps(x, peer)}
            times = take_turns(both, turns=5, seconds=0.01)
            ratio = times["peer"].times(times["ours"]).median
            cells = [f"{1e3 * times[side].median:.0f}" for side in ("ours", "peer")]
            off = f"{np.abs(found - expected).max():.0e}"
            rows.append([name, *cells, f"{ratio:.1f}", f"{ASKED:.0f}", off])
    finally:
        torch.set_num_threads(threads)
    return Table(
        "Mixtures: a step of expectation-maximisation, value and expected statistics",
        ["CPU time, one thread, float64, median of 5 turns", *machine("torch", "scikit-learn")],
        ["case", "ms", "scikit-learn, ms", "times as fast", "asked", "off by at most, nats a row"],
        rows,
    )
