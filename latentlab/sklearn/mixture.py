"""``GaussianMixture`` with the interface of scikit-learn.

Letters: N rows, D features, K components, S draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from latentlab import models
from latentlab.data.checks import as_count
from latentlab.diagnostics import align
from latentlab.inference.engine import fit
from latentlab.models.gmm_units import as_counts
from latentlab.sklearn.rows import check_variances, read_rows, seed_of, told_by

if TYPE_CHECKING:
    from latentlab.inference.verdict import Verdict

__all__ = ["GaussianMixture"]

_SUMMARY_DRAWS = 4000  # behind means_ and its like, the draws of Posterior.summary
_NUM_DRAWS = 500  # behind a prediction: its error is then 4 % of a posterior sd
_ELEMENTS = 2**22  # of covariances held at a time
_TYPES = ("full", "tied", "diag", "spherical")
_STARTS = {"k-means++": "k-means++", "random_from_data": "random"}  # scikit-learn's name -> ours


class GaussianMixture(DensityMixin, BaseEstimator):
    r"""Drop-in for ``sklearn.mixture.GaussianMixture``, with a posterior.

    Arguments mean what they mean there, with the same defaults, or are not taken. Missing cells
    (NaN) are integrated out. ``posterior_`` holds the fit, with everything that a posterior can
    do, and ``verdict_`` says whether to believe it.

    Arguments:
        n_components: number of components K.
        covariance_type: the shape of covariances, ``"full"``, ``"tied"``, ``"diag"`` or
            ``"spherical"``.
        tol: the fit has converged when what is left to move is less than this, in posterior
            standard deviations.
        max_iter: evaluations of the objective, or steps, at most, from each start.
        n_init: starts; the best is kept, and the verdict says how far they agree.
        init_params: how starting means are chosen, ``"k-means++"`` or ``"random_from_data"``.
        random_state: an int (the same fit each time), a ``numpy.random.RandomState``, or ``None``
            (a fresh one).
        verbose: from 1 on, a progress bar on stderr.

    Attributes:
        weights_: posterior means of the weights, shape (K,).
        means_: posterior means of the components' means, shape (K, D), as in
            ``posterior_.summary()`` and numbered as there.
        covariances_: posterior means of the covariances, shape (K, D, D), or (D, D) if tied; of
            the variances, shape (K, D) or, if spherical, (K,).
        precisions_: the inverse of ``covariances_``, of the same shape.
        precisions_cholesky_: its upper Cholesky factors, or roots, of the same shape.
        converged_: whether the fit converged; if not, there was a ``ConvergenceWarning``.
        n_iter_: evaluations, or steps, of the start that won.
        lower_bound_: evidence lower bound in nats per row; ``posterior_.elbo`` has its error.
        lower_bounds_: the same at each step, from few draws, shape ``(n_iter_,)``.
        n_features_in_: number of columns D.
        feature_names_in_: their names, where ``X`` has names, shape (D,).
        posterior_: the :class:`latentlab.Posterior`, in the units of ``X``.

    Example:
        >>> import latentlab as ll
        >>> from latentlab.sklearn import GaussianMixture
        >>> x = ll.data.simulate.eruptions(num_rows=100).x
        >>> mixture = GaussianMixture(n_components=2, n_init=1, random_state=0).fit(x)
        >>> mixture.predict([[2.0, 54.0], [4.3, 80.0]]).tolist() in ([0, 1], [1, 0])
        True
        >>> mixture.verdict_.level in ("use", "use with care")
        True
    """

    _verdict: Verdict | None
    _reference: dict[str, Tensor]  # posterior means of the latents; they number the components

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float = 0.03,
        max_iter: int = 20_000,
        n_init: int = 4,
        init_params: str = "k-means++",
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self,
        X: Any,  # noqa: ANN401
        y: Any = None,  # noqa: ANN401
        sample_weight: Any = None,  # noqa: ANN401
    ) -> GaussianMixture:
        """Fit the posterior of the mixture.

        Arguments:
            X: rows, shape (N, D), NaN where a cell is missing.
            y: not used.
            sample_weight: how often each row counts, shape (N,); a weight of 2 is the row twice,
                one of 0 leaves it out.

        Returns:
            The estimator itself; after an error it is as it was before.

        Raises:
            ValueError: for arguments out of range, rows that cannot be fitted, or weights that are
                negative, not finite, all zero or not N.
            TypeError: for text or sparse rows.
        """
        with told_by(self):
            return self._fit(X, sample_weight)

    def fit_predict(
        self,
        X: Any,  # noqa: ANN401
        y: Any = None,  # noqa: ANN401
        sample_weight: Any = None,  # noqa: ANN401
    ) -> np.ndarray:
        """Fit, and return the most probable component of each row, shape (N,)."""
        return self.fit(X, y, sample_weight).predict(X)

    def predict(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """The most probable component of each row, shape (N,).

        Arguments:
            X: rows, shape (N, D), NaN where a cell is missing.
        """
        return self.predict_proba(X).argmax(1)

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """Probability of each component for each row, averaged over the posterior, shape (N, K).

        Arguments:
            X: rows, shape (N, D), NaN where a cell is missing.
        """
        x = self._new_rows(X)
        return self._model.responsibilities(x, self._draws()).numpy()

    def score_samples(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """Log posterior predictive density of each row in nats, shape (N,).

        Arguments:
            X: rows, shape (N, D), NaN where a cell is missing.
        """
        x = self._new_rows(X)
        return self._model.log_prob(x, self._draws()).numpy()

    def score(self, X: Any, y: Any = None) -> float:  # noqa: ANN401
        """Mean of :meth:`score_samples`, nats per row; ``posterior_.log_prob`` has its error."""
        return float(self.score_samples(X).mean())

    def bic(self, X: Any) -> float:  # noqa: ANN401
        """Bayesian information criterion from :meth:`score`, smaller is better."""
        log_prob = self.score_samples(X)
        return float(-2 * log_prob.sum() + self._num_free * np.log(len(log_prob)))

    def aic(self, X: Any) -> float:  # noqa: ANN401
        """Akaike's information criterion from :meth:`score`, smaller is better."""
        return float(-2 * self.score_samples(X).sum() + 2 * self._num_free)

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """New rows from the posterior predictive, in random order.

        Arguments:
            n_samples: number of rows N.

        Returns:
            Rows, shape (N, D), and the component that each came from, shape (N,).
        """
        check_is_fitted(self, "posterior_")
        N = as_count(n_samples, "n_samples")
        rng = np.random.default_rng(seed_of(self.random_state))
        draws = self._draws()
        weights, locs = draws["weights"].numpy(), draws["locs"].numpy()
        s = rng.integers(_NUM_DRAWS, size=N)
        ends = weights[s].cumsum(1)[:, :-1]  # of each component's share of [0, 1)
        labels = (ends < rng.random((N, 1))).sum(1)
        noise = rng.standard_normal((N, locs.shape[-1]))
        mixture = self._model.mixture(draws)
        if mixture.scale_trils is None:
            away = _of_rows(mixture.scales, s, labels) * noise
        else:
            away = (_of_rows(mixture.scale_trils, s, labels) @ noise[..., None])[..., 0]
        return locs[s, labels] + away, labels

    @property
    def verdict_(self) -> Verdict:
        """Whether to believe the fit, and what to try next; judged when first asked for."""
        check_is_fitted(self, "posterior_")
        if self._verdict is None:
            self._verdict = self.posterior_.check()
        return self._verdict

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _fit(self, X: Any, sample_weight: Any) -> GaussianMixture:  # noqa: ANN401
        model_arguments = self._model_arguments()
        table = read_rows(self, X, reset=True)
        N, D = table.x.shape
        if N < model_arguments["num_components"]:
            raise ValueError(
                f"n_components: expected at most the number of rows, got {self.n_components} "
                f"components for {N} rows"
            )
        check_variances(table)
        counts = _read_weights(sample_weight, N)
        posterior = fit(
            models.GaussianMixture(D, **model_arguments),
            table if counts is None else (table, counts),
            num_restarts=as_count(self.n_init, "n_init"),
            max_steps=as_count(self.max_iter, "max_iter"),
            tol=self.tol,
            seed=seed_of(self.random_state),
            progress=bool(self.verbose),
        )
        self.posterior_, self._verdict = posterior, None
        self._set_means()
        self.converged_, self.n_iter_ = posterior.converged, len(posterior.losses)
        total = N if counts is None else float(counts.sum())
        self.lower_bound_ = posterior.elbo.value / total
        self.lower_bounds_ = -posterior.losses.numpy() / total
        if not posterior.converged:
            why = f"the fit did not converge ({posterior.stop_reason})"
            text = f"{why}; raise max_iter, or see what verdict_ advises"
            warnings.warn(text, ConvergenceWarning, stacklevel=3)
        return self

    def _model_arguments(self) -> dict[str, Any]:
        """The arguments of the model, from those of the estimator."""
        if str(self.covariance_type) not in _TYPES:
            known = " or ".join(f'"{name}"' for name in _TYPES)
            raise ValueError(f"covariance_type: expected {known}, got {self.covariance_type!r}")
        if str(self.init_params) not in _STARTS:
            known = " or ".join(f'"{name}"' for name in _STARTS)
            raise ValueError(f"init_params: expected {known}, got {self.init_params!r}")
        num_components = as_count(self.n_components, "n_components")
        return {
            "num_components": num_components,
            "covariance": self.covariance_type,
            "init": _STARTS[self.init_params],
        }

    def _set_means(self) -> None:
        """Posterior means of what scikit-learn estimates; they number the components."""
        draws = align(self.posterior_.sample(_SUMMARY_DRAWS), self._model.exchangeable).draws
        self._reference = {site: draws[site].mean(0) for site in self._model.exchangeable}
        self.weights_ = draws["weights"].mean(0).numpy()
        self.means_ = draws["locs"].mean(0).numpy()
        self.covariances_ = self._covariances(draws)
        if self.covariance_type in ("diag", "spherical"):
            self.precisions_ = 1 / self.covariances_
            self.precisions_cholesky_ = np.sqrt(self.precisions_)
        else:
            lower = np.linalg.cholesky(self.covariances_)
            self.precisions_cholesky_ = np.linalg.inv(lower).swapaxes(-1, -2)
            upper = self.precisions_cholesky_
            self.precisions_ = upper @ upper.swapaxes(-1, -2)

    def _covariances(self, draws: Mapping[str, Tensor]) -> np.ndarray:
        """Posterior means of the covariances that rows are drawn with, floor included."""
        S, (K, D) = len(draws["weights"]), self.means_.shape
        total: Any = 0.0
        step = max(1, _ELEMENTS // (K * D * D))
        for start in range(0, S, step):
            part = {site: value[start : start + step] for site, value in draws.items()}
            mixture = self._model.mixture(part)
            if mixture.scale_trils is None:
                total = total + cast(Tensor, mixture.scales).square().sum((0, 1))
            else:
                total = total + (mixture.scale_trils @ mixture.scale_trils.mT).sum((0, 1))
        mean = (total / S).numpy()  # (K or 1, D or 1), or (K or 1, D, D)
        if self.covariance_type == "spherical":
            return mean[:, 0]
        if self.covariance_type in ("full", "tied") and D == 1:
            mean = mean.reshape(-1, 1, 1)
        return mean[0] if self.covariance_type == "tied" else mean

    def _draws(self) -> Mapping[str, Tensor]:
        """Draws of the posterior, components numbered as in ``means_``."""
        draws = self.posterior_.sample(_NUM_DRAWS)
        return align(draws, self._model.exchangeable, self._reference).draws

    @property
    def _model(self) -> models.GaussianMixture:
        """The fit's own copy of the model, scaled to its rows."""
        return cast(models.GaussianMixture, self.posterior_.model)

    @property
    def _num_free(self) -> int:
        """Free parameters of the mixture."""
        K, D = self.means_.shape
        half = D * (D + 1) // 2
        of_spread = {"full": K * half, "tied": half, "diag": K * D, "spherical": K}
        return K - 1 + K * D + of_spread[self.covariance_type]

    def _new_rows(self, X: Any) -> Tensor:  # noqa: ANN401
        check_is_fitted(self, "posterior_")
        return read_rows(self, X, reset=False).x


def _of_rows(spreads: Tensor | None, s: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each row the scales (D,) or the factor (D, D) of its draw and its component."""
    values = cast(Tensor, spreads).squeeze(1).numpy()  # (S, K or 1, ...)
    return values[s, labels if values.shape[1] > 1 else 0]


def _read_weights(sample_weight: Any, num_rows: int) -> Tensor | None:  # noqa: ANN401
    """Weights of rows, checked; ``None`` where all rows count once."""
    if sample_weight is None:
        return None
    try:
        weights = np.asarray(sample_weight, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"sample_weight: expected one number for each row, got {sample_weight!r}"
        ) from None
    if not weights.ndim:
        weights = np.full(num_rows, weights)
    return as_counts(torch.from_numpy(weights.copy()), num_rows, "sample_weight", "X")
