"""Closed forms and brute force: what latentlab is compared with, and nothing of latentlab.

Letters: N rows, D features, K components.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import betaln, logsumexp


def conjugate_normal(x, prior_loc, prior_scale, scale):
    """Posterior mean and sd of a normal mean with known scale, and the log evidence.

    The evidence is the joint density of the rows, a correlated normal: it does not go through
    the posterior.

    >>> loc, sd, log_evidence = conjugate_normal([2.0], prior_loc=0.0, prior_scale=1.0, scale=1.0)
    >>> round(loc, 6), round(sd**2, 6)
    (1.0, 0.5)
    >>> bool(np.isclose(log_evidence, stats.norm(0, 2**0.5).logpdf(2.0)))
    True
    """
    x = np.asarray(x, dtype=float)
    precision = prior_scale**-2 + len(x) * scale**-2
    loc = (prior_loc * prior_scale**-2 + x.sum() * scale**-2) / precision
    cov = scale**2 * np.eye(len(x)) + prior_scale**2
    log_evidence = stats.multivariate_normal(np.full(len(x), prior_loc), cov).logpdf(x)
    return float(loc), float(precision**-0.5), float(log_evidence)


def linear_regression(features, y, prior_scale, scale):
    """Posterior mean and covariance of the coefficients, and the log evidence.

    >>> loc, cov, _ = linear_regression([[1.0], [1.0]], [1.0, 3.0], prior_scale=1e4, scale=1.0)
    >>> loc.round(6).tolist(), cov.round(6).tolist()
    ([2.0], [[0.5]])
    """
    features, y = np.asarray(features, dtype=float), np.asarray(y, dtype=float)
    N, D = features.shape
    cov = np.linalg.inv(np.eye(D) * prior_scale**-2 + features.T @ features * scale**-2)
    loc = cov @ features.T @ y * scale**-2
    marginal = scale**2 * np.eye(N) + prior_scale**2 * features @ features.T
    return loc, cov, float(stats.multivariate_normal(np.zeros(N), marginal).logpdf(y))


def mixture_log_likelihood(x, weights, locs, scales):
    """Log-likelihood of N rows under a diagonal Gaussian mixture: a sum over all K^N labellings.

    >>> value = mixture_log_likelihood([[0.0]], [0.5, 0.5], [[-1.0], [1.0]], [[1.0], [1.0]])
    >>> bool(np.isclose(value, stats.norm(1).logpdf(0)))
    True
    """
    x, weights, locs, scales = map(np.asarray, (x, weights, locs, scales))
    joint = np.log(weights) + stats.norm(locs, scales).logpdf(x[:, None, :]).sum(-1)  # (N, K)
    labellings = itertools.product(range(len(weights)), repeat=len(x))
    return float(logsumexp([joint[np.arange(len(x)), list(z)].sum() for z in labellings]))


def beta_bernoulli_evidence(x, a, b):
    """Log evidence of coin flips under a Beta(a, b) prior.

    >>> bool(np.isclose(np.exp(beta_bernoulli_evidence([1, 0], a=1, b=1)), 1 / 6))
    True
    """
    ones = float(np.sum(x))
    return float(betaln(a + ones, b + len(x) - ones) - betaln(a, b))


def mean_field_khat(covariance):
    """k-hat of the best mean-field guide of a normal target with this covariance.

    The guide has the diagonal of the precision; the tail of its weights has the shape
    1 - lambda_min(D^-1/2 Lambda D^-1/2), with two latents the correlation.

    >>> round(mean_field_khat([[1.0, -0.6], [-0.6, 1.0]]), 6)
    0.6
    """
    precision = np.linalg.inv(covariance)
    own = np.diag(precision) ** -0.5
    return float(1 - np.linalg.eigvalsh(own[:, None] * precision * own).min())


@dataclass(frozen=True)
class HiddenChain:
    """A hidden Markov chain by enumeration of its K^T paths: what each name says, as an array."""

    log_prob: float
    path_probs: np.ndarray
    filtered: np.ndarray
    predicted: np.ndarray
    forecast: np.ndarray
    smoothed: np.ndarray
    pairwise: np.ndarray
    best: np.ndarray
    best_log_joint: float


def hidden_chain(initial, transitions, log_likelihoods):
    """All that can be asked of a hidden Markov chain, summed over all paths.

    >>> chain = hidden_chain([0.5, 0.5], [[1.0, 0.0], [0.0, 1.0]], np.log([[0.9, 0.5]] * 2))
    >>> round(float(np.exp(chain.log_prob)), 6), chain.best.tolist()
    (0.53, [0, 0])
    """
    initial, transitions, seen = (
        np.asarray(getattr(x, "detach", lambda x=x: x)(), dtype=float)
        for x in (initial, transitions, log_likelihoods)
    )
    T, K = seen.shape
    with np.errstate(divide="ignore"):
        start, moves = np.log(initial), np.log(transitions)

    def weighed(num_steps, num_seen):
        """Paths of so many steps, and their log joint with so many observations."""
        paths = np.array(list(itertools.product(range(K), repeat=num_steps)))
        log_joint = start[paths[:, 0]] + moves[paths[:, :-1], paths[:, 1:]].sum(1)
        return paths, log_joint + seen[np.arange(num_seen), paths[:, :num_seen]].sum(1)

    def last(num_steps, num_seen):
        paths, log_joint = weighed(num_steps, num_seen)
        probs = np.exp(log_joint - logsumexp(log_joint))
        return np.bincount(paths[:, -1], weights=probs, minlength=K)

    paths, log_joint = weighed(T, T)
    probs = np.exp(log_joint - logsumexp(log_joint))
    is_state = np.eye(K)[paths]  # (K^T, T, K)
    return HiddenChain(
        log_prob=float(logsumexp(log_joint)),
        path_probs=probs,
        filtered=np.stack([last(t, t) for t in range(1, T + 1)]),
        predicted=np.stack([last(t, t - 1) for t in range(1, T + 1)]),
        forecast=last(T + 1, T),
        smoothed=np.einsum("n,ntk->tk", probs, is_state),
        pairwise=np.einsum("n,nti,ntj->tij", probs, is_state[:, :-1], is_state[:, 1:]),
        best=paths[log_joint.argmax()],
        best_log_joint=float(log_joint.max()),
    )
