r"""``GaussianHMM``, ``PoissonHMM`` and ``CategoricalHMM`` with the names of hmmlearn.

Letters: N rows of all sequences below each other, D features, K states, C categories, S draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from latentlab import models
from latentlab.data.checks import as_count
from latentlab.data.sequences import Sequences, as_sequences
from latentlab.data.table import Table
from latentlab.diagnostics import align
from latentlab.distributions import hmm
from latentlab.distributions.emissions import ChecksRows
from latentlab.inference.engine import fit
from latentlab.seeds import seeded
from latentlab.sklearn.rows import check_variances, read_rows, seed_of, told_by

if TYPE_CHECKING:
    from latentlab.inference.verdict import Verdict

__all__ = ["CategoricalHMM", "GaussianHMM", "PoissonHMM"]

_SUMMARY_DRAWS = 2000  # behind means_ and its like
_MANY_CODES = 256  # more of them than rows are names, not codes
_NUM_DRAWS = 200  # behind a prediction: its error is then 7 % of a posterior sd


class _HMM(BaseEstimator):
    """What the three estimators share; each says what its states emit."""

    _verdict: Verdict | None
    _reference: dict[str, Tensor]  # posterior means of the latents; they number the states

    def __init__(
        self,
        n_components: int = 1,
        *,
        tol: float = 0.03,
        n_iter: int = 20_000,
        n_init: int = 2,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_components = n_components
        self.tol = tol
        self.n_iter = n_iter
        self.n_init = n_init
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, *, lengths: Any = None) -> _HMM:  # noqa: ANN401
        """Fit the posterior of the model.

        Arguments:
            X: rows of all sequences below each other, shape (N, D), or a list of arrays; NaN
                where a cell is missing.
            y: not used; it is where hmmlearn takes lengths, which are refused here.
            lengths: number of rows of each sequence, shape (B,); by default all are one.

        Returns:
            The estimator itself; after an error it is as it was before.

        Raises:
            ValueError: for arguments out of range, or rows that cannot be fitted.
            TypeError: for text or sparse rows.
        """
        with told_by(self):
            return self._fit(X, y, lengths)

    def fit_predict(self, X: Any, y: Any = None, *, lengths: Any = None) -> np.ndarray:  # noqa: ANN401
        """Fit, and return the path of states, shape (N,)."""
        return self.fit(X, y, lengths=lengths).predict(X, lengths)

    def predict(self, X: Any, lengths: Any = None) -> np.ndarray:  # noqa: ANN401
        """The likeliest path of states at the posterior mean, shape (N,).

        Arguments:
            X: rows, as for :meth:`fit`.
            lengths: number of rows of each sequence.
        """
        data = self._read(X, lengths)
        return self._model.decode(data, self._draws())[data.inside].numpy()

    def decode(self, X: Any, lengths: Any = None) -> tuple[float, np.ndarray]:  # noqa: ANN401
        """The likeliest path, and its log joint density with the rows, in nats.

        Arguments:
            X: rows, as for :meth:`fit`.
            lengths: number of rows of each sequence.
        """
        data = self._read(X, lengths)
        mean = {site: v.mean(0, keepdim=True) for site, v in self._draws().items()}
        chain = self._model.chain(mean, data)
        args = (chain.initial, chain.transitions, chain.emitted(data.x), data.lengths)
        paths, log_joint = hmm.decode(*args)
        return float(log_joint.sum()), paths[0][data.inside].numpy()

    def predict_proba(self, X: Any, lengths: Any = None) -> np.ndarray:  # noqa: ANN401
        """Probability of each state at each row given its sequence, shape (N, K).

        Arguments:
            X: rows, as for :meth:`fit`.
            lengths: number of rows of each sequence.
        """
        data = self._read(X, lengths)
        return self._model.smooth(data, self._draws())[data.inside].numpy()

    def score_samples(self, X: Any, lengths: Any = None) -> np.ndarray:  # noqa: ANN401
        r"""Log-density of each row given those before it, at the posterior mean, shape (N,).

        Of a sequence they sum to its log-likelihood. As in scikit-learn, and unlike hmmlearn,
        there is one number a row; probabilities of states are :meth:`predict_proba`.

        Arguments:
            X: rows, as for :meth:`fit`.
            lengths: number of rows of each sequence.
        """
        data = self._read(X, lengths)
        return self._ahead(data)[data.inside].numpy()

    def score(self, X: Any, y: Any = None, *, lengths: Any = None) -> float:  # noqa: ANN401
        """Log posterior predictive density of all sequences together, in nats.

        Arguments:
            X: rows, as for :meth:`fit`.
            y: not used.
            lengths: number of rows of each sequence.
        """
        data = self._read(X, lengths)
        _refuse_lengths(y, data)
        return float(self._model.log_prob(data, self._draws()).sum())

    def sample(
        self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A new sequence at one draw of the posterior.

        Arguments:
            n_samples: number of rows N.
            random_state: of the draws; by default that of the estimator.

        Returns:
            Rows, shape (N, D), and the state of each, shape (N,).
        """
        check_is_fitted(self, "posterior_")
        N = as_count(n_samples, "n_samples")
        seed = seed_of(self.random_state if random_state is None else random_state)
        draws = self._draws()
        s = seed % len(next(iter(draws.values())))
        empty = torch.full((1, N, self.n_features_in_), torch.nan, dtype=torch.float64)
        one = {site: value[s : s + 1] for site, value in draws.items()}
        with seeded(seed):
            chain = self._model.chain(one, Sequences(empty, torch.tensor([N])))
            rows, states = chain.sample_with_states()
        return rows[0, 0].double().numpy(), states[0, 0].numpy()

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

    def _emissions(self, data: Sequences) -> dict[str, Any]:
        """The arguments of the model that say what states emit."""
        raise TypeError(
            f"{type(self).__name__}: expected GaussianHMM, PoissonHMM or CategoricalHMM"
        )

    def _set_emissions(self, draws: Mapping[str, Tensor]) -> None:
        """Posterior means of what the states emit."""

    def _fit(self, X: Any, y: Any, lengths: Any) -> _HMM:  # noqa: ANN401
        K = as_count(self.n_components, "n_components")
        data = self._read(X, lengths, reset=True)
        _refuse_lengths(y, data)
        if int(data.lengths.sum()) < K:
            raise ValueError(
                f"n_components: expected at most the number of rows, got {K} states for "
                f"{int(data.lengths.sum())} rows"
            )
        model = models.HiddenMarkovModel(K, data.x.shape[2], **self._emissions(data))
        if isinstance(model.emission, ChecksRows):
            model.emission.check(data.rows().x, "X")
        posterior = fit(
            model,
            data,
            num_restarts=as_count(self.n_init, "n_init"),
            max_steps=as_count(self.n_iter, "n_iter"),
            tol=self.tol,
            seed=seed_of(self.random_state),
            progress=bool(self.verbose),
        )
        self.posterior_, self._verdict = posterior, None
        draws = align(posterior.sample(_SUMMARY_DRAWS), self._model.exchangeable).draws
        self._reference = {site: draws[site].mean(0) for site in self._model.exchangeable}
        self.startprob_ = draws["initial"].mean(0).numpy()
        self.transmat_ = draws["transitions"].mean(0).numpy()
        self._set_emissions(draws)
        self.converged_, self.n_iter_ = posterior.converged, len(posterior.losses)
        if not posterior.converged:
            why = f"the fit did not converge ({posterior.stop_reason})"
            text = f"{why}; raise n_iter, or see what verdict_ advises"
            warnings.warn(text, ConvergenceWarning, stacklevel=3)
        return self

    def _draws(self) -> Mapping[str, Tensor]:
        """Draws of the posterior, states numbered as in the attributes."""
        draws = self.posterior_.sample(_NUM_DRAWS)
        return align(draws, self._model.exchangeable, self._reference).draws

    @property
    def _model(self) -> models.HiddenMarkovModel:
        """The fit's own copy of the model, scaled to its rows."""
        return cast(models.HiddenMarkovModel, self.posterior_.model)

    def _ahead(self, data: Sequences) -> Tensor:
        """Log p(x_t | x_{1:t-1}) in nats, shape (B, T)."""
        mean = {site: v.mean(0, keepdim=True) for site, v in self._draws().items()}
        chain = self._model.chain(mean, data)
        seen = chain.emitted(data.x)
        before = hmm.predict_next(chain.initial, chain.transitions, seen, data.lengths)[0]
        return (before.log() + seen.reshape(-1, *seen.shape[-2:])).logsumexp(-1)

    def _read(self, X: Any, lengths: Any, reset: bool = False) -> Sequences:  # noqa: ANN401
        """Sequences that pass the checks of scikit-learn, then ours."""
        if not reset:
            check_is_fitted(self, "posterior_")
        if isinstance(X, Sequences) or _are_sequences(X):
            found = as_sequences(X, lengths, argument="X")
            lengths, X = found.lengths.tolist(), found.rows()
        table = read_rows(self, X, reset=reset)
        data = as_sequences(Table(table.x, table.names), lengths, argument="X")
        below = (table.x < 0).nonzero()
        if self.__sklearn_tags__().input_tags.positive_only and len(below):
            first = below[0].tolist()
            raise ValueError(
                f"X: Negative values in data passed to {type(self).__name__}; expected whole "
                f"numbers from 0 on, got {float(table.x[*first]):g} at {first}"
            )
        if not reset and isinstance(self._model.emission, ChecksRows):
            self._model.emission.check(data.rows().x, "X")
        return data


def _are_sequences(X: Any) -> bool:  # noqa: ANN401
    """Whether X is a list or batch of sequences, not of rows."""
    if isinstance(X, np.ndarray | Tensor):
        return X.ndim == 3
    if not isinstance(X, list | tuple) or not X:
        return False
    arrays = all(isinstance(one, np.ndarray | Tensor) for one in X)
    if arrays and all(one.ndim == 1 for one in X):
        if len({len(one) for one in X}) > 1:
            return True
        raise ValueError(
            f"X: a list of {len(X)} arrays of shape {tuple(X[0].shape)} may be rows or sequences; "
            "give np.stack(X) for rows, [one.reshape(-1, 1) for one in X] for sequences"
        )
    return all(np.ndim(one) == 2 for one in X)


def _refuse_lengths(y: Any, data: Sequences) -> None:  # noqa: ANN401
    """What hmmlearn takes in the second place must not be lost without a word."""
    num_rows = int(data.lengths.sum())
    shape = np.shape(y)
    if y is not None and shape[:1] != (num_rows,):
        got = f"{shape[0]} values" if shape else repr(y)
        raise ValueError(
            f"y: expected nothing, or a label for each of the {num_rows} rows, got {got}; "
            "lengths are a keyword: fit(X, lengths=...)"
        )


class GaussianHMM(_HMM):
    r"""Hidden Markov model whose states emit normal rows, with the names of hmmlearn.

    ``posterior_`` holds the fit, with everything that a posterior can do, and ``verdict_`` says
    whether to believe it.

    Arguments:
        n_components: number of states K.
        covariance_type: the shape of covariances, ``"diag"`` or ``"full"``.
        tol: the fit has converged when its last stage moved the posterior by less than this, in
            posterior standard deviations.
        n_iter: optimisation steps at most, from each start.
        n_init: starts; the best is kept, and the verdict says how far they agree.
        random_state: an int (the same fit each time), a ``numpy.random.RandomState``, or ``None``
            (a fresh one).
        verbose: a progress bar on stderr.

    Attributes:
        startprob_: posterior means of the first state's probabilities, shape (K,).
        transmat_: those of the transitions, shape (K, K).
        means_: those of the means, shape (K, D).
        covars_: those of the covariances, shape (K, D, D).
        converged_: whether the fit converged; if not, there was a ``ConvergenceWarning``.
        n_iter_: steps of the start that won.
        n_features_in_: number of columns D.
        posterior_: the :class:`latentlab.Posterior`.
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "diag",
        tol: float = 0.03,
        n_iter: int = 20_000,
        n_init: int = 2,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            n_components,
            tol=tol,
            n_iter=n_iter,
            n_init=n_init,
            random_state=random_state,
            verbose=verbose,
        )
        self.covariance_type = covariance_type

    def _emissions(self, data: Sequences) -> dict[str, Any]:
        names = {"diag": "gaussian", "full": "gaussian_full"}
        if str(self.covariance_type) not in names:
            known = " or ".join(f'"{name}"' for name in names)
            raise ValueError(f"covariance_type: expected {known}, got {self.covariance_type!r}")
        check_variances(data.rows())
        return {"emissions": names[self.covariance_type]}

    def _set_emissions(self, draws: Mapping[str, Tensor]) -> None:
        sites = self._model.emission.sites()
        rows = self._model.emission.distribution(**{site: draws[site] for site in sites})
        self.means_ = draws["locs"].mean(0).numpy()
        tril = getattr(rows, "scale_tril", None)
        full = rows.variance.diag_embed() if tril is None else tril @ tril.mT
        self.covars_ = full.mean(0).numpy()


class PoissonHMM(_HMM):
    """Hidden Markov model whose states emit counts, with the names of hmmlearn.

    Arguments:
        n_components: number of states K.
        tol: as for :class:`GaussianHMM`.
        n_iter: as for :class:`GaussianHMM`.
        n_init: as for :class:`GaussianHMM`.
        random_state: as for :class:`GaussianHMM`.
        verbose: as for :class:`GaussianHMM`.

    Attributes:
        lambdas_: posterior means of the rates, shape (K, D); the others are those of
            :class:`GaussianHMM`.
    """

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = True
        tags.input_tags.categorical = True  # scikit-learn's only word for whole numbers
        return tags

    def _emissions(self, data: Sequences) -> dict[str, Any]:
        return {"emissions": "poisson"}

    def _set_emissions(self, draws: Mapping[str, Tensor]) -> None:
        self.lambdas_ = draws["rates"].mean(0).numpy()


class CategoricalHMM(_HMM):
    """Hidden Markov model whose states emit codes 0, 1, ..., with the names of hmmlearn.

    Arguments:
        n_components: number of states K.
        n_features: number of codes C; by default one more than the largest in the fit.
        tol: as for :class:`GaussianHMM`.
        n_iter: as for :class:`GaussianHMM`.
        n_init: as for :class:`GaussianHMM`.
        random_state: as for :class:`GaussianHMM`.
        verbose: as for :class:`GaussianHMM`.

    Attributes:
        emissionprob_: posterior means of the probabilities, shape (K, C), or (K, D, C) of several
            columns; the others are those of :class:`GaussianHMM`.
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        n_features: int | None = None,
        tol: float = 0.03,
        n_iter: int = 20_000,
        n_init: int = 2,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            n_components,
            tol=tol,
            n_iter=n_iter,
            n_init=n_init,
            random_state=random_state,
            verbose=verbose,
        )
        self.n_features = n_features

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = True
        tags.input_tags.categorical = True
        return tags

    def _emissions(self, data: Sequences) -> dict[str, Any]:
        if self.n_features is not None:
            num = as_count(self.n_features, "n_features")
        else:
            num = max(int(data.x.nan_to_num(0.0).max()) + 1, 1)
            total = int(data.lengths.sum())
            if num > max(total, _MANY_CODES):
                raise ValueError(
                    f"X: expected codes 0, 1, ..., but the largest of {total} rows is {num - 1}; "
                    "number those that occur from 0 on, or say how many there are, n_features="
                )
        return {"emissions": "categorical", "num_categories": num}

    def _set_emissions(self, draws: Mapping[str, Tensor]) -> None:
        probs = draws["probs"].mean(0).numpy()
        self.emissionprob_ = probs[:, 0] if probs.shape[1] == 1 else probs
