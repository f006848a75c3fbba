r"""Estimators with the interface of scikit-learn, each a fit of latentlab underneath.

What a point estimate plugs in is here averaged over draws :math:`\theta_s` of the posterior,

.. math::
    \texttt{score\_samples}(x) = \log \frac{1}{S} \sum_s p(x \mid \theta_s), \quad
    \texttt{predict\_proba}(x)_k = \frac{1}{S} \sum_s p(z = k \mid x, \theta_s),

the same draws in every call, so that a fitted estimator always answers alike.

``X`` stands for rows of any kind: an array, a list, a pandas or polars frame, a tensor, or a
:class:`latentlab.data.Table`. Answers are NumPy arrays.

Letters: N rows, K components, S draws.
"""

from latentlab.sklearn.flow import FlowDensity
from latentlab.sklearn.hmm import CategoricalHMM, GaussianHMM, PoissonHMM
from latentlab.sklearn.mixture import GaussianMixture
from latentlab.sklearn.vae import PPCA, VAE

__all__ = [
    "CategoricalHMM",
    "FlowDensity",
    "GaussianHMM",
    "GaussianMixture",
    "PPCA",
    "PoissonHMM",
    "VAE",
]
