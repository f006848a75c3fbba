"""``FlowDensity`` with the interface of scikit-learn's ``KernelDensity``.

Letters: N rows, D features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from latentlab import models
from latentlab.data.checks import as_count, as_rows
from latentlab.inference.engine import fit
from latentlab.sklearn.rows import read_rows, seed_of, told_by

if TYPE_CHECKING:
    from latentlab.inference.verdict import Verdict

__all__ = ["FlowDensity"]


class FlowDensity(DensityMixin, BaseEstimator):
    r"""Density of a table by a flow, as a drop-in for ``sklearn.neighbors.KernelDensity``.

    A share of the rows is kept aside, and the fit ends where these get no more probable.

    Arguments:
        kind: of the flow, see :class:`latentlab.FlowDensity`.
        hidden_layer_sizes: widths of the hidden layers of its networks; by default two of 64, or
            of 2 D where that is more.
        n_transforms: maps in the chain.
        validation_fraction: share of the rows that is kept aside; 0 for none.
        batch_size: rows of a step; all where there are fewer.
        max_iter: optimisation steps at most.
        learning_rate_init: rate of the first stage.
        random_state: an int (the same fit each time), a ``numpy.random.RandomState``, or ``None``
            (a fresh one).
        verbose: from 1 on, a progress bar on stderr.

    Attributes:
        converged_: whether the fit converged; if not, there was a ``ConvergenceWarning``.
        n_iter_: steps taken.
        validation_score_: log-density of the rows kept aside, in nats per row; ``None`` if none
            were. ``posterior_.held_out`` has its error.
        n_features_in_: number of columns D.
        feature_names_in_: their names, where ``X`` has names, shape (D,).
        posterior_: the :class:`latentlab.Posterior`, in the units of ``X``.

    Example:
        >>> import latentlab as ll
        >>> from latentlab.sklearn import FlowDensity
        >>> x = ll.data.simulate.eruptions(num_rows=200).x
        >>> density = FlowDensity(kind="maf", hidden_layer_sizes=(16,), random_state=0).fit(x)
        >>> density.score_samples(x).shape
        (200,)
    """

    _verdict: Verdict | None

    def __init__(
        self,
        kind: str = "nsf",
        *,
        hidden_layer_sizes: Sequence[int] | None = None,
        n_transforms: int = 3,
        validation_fraction: float = 0.1,
        batch_size: int = 256,
        max_iter: int = 20_000,
        learning_rate_init: float = 0.002,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.kind = kind
        self.hidden_layer_sizes = hidden_layer_sizes
        self.n_transforms = n_transforms
        self.validation_fraction = validation_fraction
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.learning_rate_init = learning_rate_init
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> FlowDensity:  # noqa: ANN401
        """Fit the density.

        Arguments:
            X: rows, shape (N, D), without missing cells.
            y: not used.

        Returns:
            The estimator itself; after an error it is as it was before.

        Raises:
            ValueError: for arguments out of range, or rows that cannot be fitted.
            TypeError: for text or sparse rows.
        """
        with told_by(self):
            return self._fit(X)

    def score_samples(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """Log-density of each row in nats, shape (N,).

        Arguments:
            X: rows, shape (N, D), without missing cells.
        """
        check_is_fitted(self, "posterior_")
        table = as_rows(read_rows(self, X, reset=False), argument="X", min_rows=1)
        return self._model.log_prob(table).numpy(force=True)

    def score(self, X: Any, y: Any = None) -> float:  # noqa: ANN401
        """Log-density of all rows together in nats, as ``KernelDensity`` has it."""
        return float(self.score_samples(X).sum())

    def sample(
        self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None
    ) -> np.ndarray:
        """New rows, shape (N, D).

        Arguments:
            n_samples: number of rows N.
            random_state: of the draws; by default that of the estimator.
        """
        check_is_fitted(self, "posterior_")
        N = as_count(n_samples, "n_samples")
        state = self.random_state if random_state is None else random_state
        return self._model.sample(N, seed_of(state)).numpy(force=True)

    @property
    def verdict_(self) -> Verdict:
        """Whether to believe the fit, and what to try next; judged when first asked for."""
        check_is_fitted(self, "posterior_")
        if self._verdict is None:
            self._verdict = self.posterior_.check()
        return self._verdict

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = False
        return tags

    def _fit(self, X: Any) -> FlowDensity:  # noqa: ANN401
        table = as_rows(read_rows(self, X, reset=True), argument="X", min_rows=2)
        N, D = table.x.shape
        batch_size, seed = as_count(self.batch_size, "batch_size"), seed_of(self.random_state)
        model = models.FlowDensity(
            D,
            self.kind,  # type: ignore[arg-type]  # checked there
            hidden_dims=self.hidden_layer_sizes,
            num_transforms=self.n_transforms,
            held_out=self.validation_fraction,
            seed=seed,
        )
        posterior = fit(
            model,
            table,
            batch_size=batch_size if batch_size < N * (1 - model.held_out) else None,
            max_steps=as_count(self.max_iter, "max_iter"),
            lr=self.learning_rate_init,
            seed=seed,
            progress=bool(self.verbose),
        )
        self.posterior_, self._verdict = posterior, None
        self.converged_, self.n_iter_ = posterior.converged, len(posterior.losses)
        held = posterior.held_out
        self.validation_score_ = None if held is None else held.value
        if not posterior.converged:
            why = f"the fit did not converge ({posterior.stop_reason})"
            text = f"{why}; raise max_iter, or see what verdict_ advises"
            warnings.warn(text, ConvergenceWarning, stacklevel=3)
        return self

    @property
    def _model(self) -> models.FlowDensity:
        """The fit's own copy of the model, scaled to its rows."""
        return cast(models.FlowDensity, self.posterior_.model)
