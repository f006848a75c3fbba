"""``PPCA`` and ``VAE`` with the interface of scikit-learn's ``PCA``: rows to latents, and back.

Letters: N rows, D features, L latent dimensions.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_array
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from latentlab import models
from latentlab.data.checks import as_count
from latentlab.data.table import Table
from latentlab.inference.engine import fit
from latentlab.inference.posterior import Posterior
from latentlab.seeds import seeded
from latentlab.sklearn.rows import check_variances, read_rows, seed_of, told_by

if TYPE_CHECKING:
    from latentlab.inference.verdict import Verdict

__all__ = ["PPCA", "VAE"]

_NUM_DRAWS = 200  # that answers are averaged over
_CHUNK = 2**23  # numbers of (S, B, D) held at a time


class _Transformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator, ABC):
    """What both share: a fit that leaves nothing behind if it fails, and plain answers."""

    n_components: int
    random_state: int | np.random.RandomState | None
    posterior_: Posterior
    _verdict: Verdict | None
    _n_features_out: int

    def fit(self, X: Any, y: Any = None) -> Any:  # noqa: ANN401
        """Fit the model.

        Arguments:
            X: rows, shape (N, D), NaN where a cell is missing.
            y: not used.

        Returns:
            The estimator itself; after an error it is as it was before.

        Raises:
            ValueError: for arguments out of range, or rows that cannot be fitted.
            TypeError: for text or sparse rows.
        """
        with told_by(self):
            posterior = self._fit(read_rows(self, X, reset=True))
        self.posterior_, self._verdict = posterior, None
        self._n_features_out = self.n_components
        self.converged_, self.n_iter_ = posterior.converged, len(posterior.losses)
        self._describe()
        if not posterior.converged:
            why = f"the fit did not converge ({posterior.stop_reason})"
            text = f"{why}; raise max_iter, or see what verdict_ advises"
            warnings.warn(text, ConvergenceWarning, stacklevel=2)
        return self

    def transform(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """Mean of the latents of each row, shape (N, L).

        Arguments:
            X: rows, shape (N, D), NaN where a cell is missing.
        """
        return self._encoded(self._new_rows(X)).numpy(force=True)

    def inverse_transform(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """Rows that latents stand for, shape (N, D).

        Arguments:
            X: latents, shape (N, L).
        """
        check_is_fitted(self, "posterior_")
        X = X.numpy(force=True) if isinstance(X, Tensor) else X
        z = torch.from_numpy(check_array(X, dtype=np.float64))
        if z.shape[1] != self._n_features_out:
            raise ValueError(
                f"X: expected shape (N, {self._n_features_out}), one column a latent, "
                f"got {tuple(z.shape)}"
            )
        return self._decoded(z).numpy(force=True)

    def score_samples(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """Log-density of the cells of each row that are there, in nats, shape (N,).

        That of a ``VAE`` is estimated from 200 draws of the latents, and a little low;
        ``posterior_.model.log_prob`` takes more of them, and gives the error.

        Arguments:
            X: rows, shape (N, D), NaN where a cell is missing.
        """
        return self._log_prob(self._new_rows(X)).numpy(force=True)

    def score(self, X: Any, y: Any = None) -> float:  # noqa: ANN401
        """Mean log-density of a row in nats, as ``PCA`` has it."""
        return float(self.score_samples(X).mean())

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
        tags.transformer_tags.preserves_dtype = []
        return tags

    @abstractmethod
    def _fit(self, table: Table) -> Posterior:
        """Fit the model to checked rows."""

    @abstractmethod
    def _describe(self) -> None:
        """Set what the fit has to say."""

    @abstractmethod
    def _encoded(self, x: Tensor) -> Tensor:
        """Latents of rows, (N, L)."""

    @abstractmethod
    def _decoded(self, z: Tensor) -> Tensor:
        """Rows of latents, (N, D)."""

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor:
        """Log-density of rows, (N,)."""

    def _new_rows(self, X: Any) -> Tensor:  # noqa: ANN401
        check_is_fitted(self, "posterior_")
        return read_rows(self, X, reset=False).x

    def _seed(self, random_state: Any) -> int:  # noqa: ANN401
        return seed_of(self.random_state if random_state is None else random_state)


class PPCA(_Transformer):
    r"""Probabilistic principal components of a table, as a drop-in for ``sklearn``'s ``PCA``.

    A fit of :class:`latentlab.ProbabilisticPCA` with weak priors: every component has an error,
    and cells may be missing. Latents are independent with variance one, as with ``whiten=True``;
    each is the mean over the posterior.

    Arguments:
        n_components: latents L, fewer than columns.
        max_iter: optimisation steps at most.
        tol: the fit stops when two stages agree to this shift, in posterior standard deviations.
        random_state: an int (the same fit each time), a ``numpy.random.RandomState``, or ``None``
            (a fresh one).
        verbose: from 1 on, a progress bar on stderr.

    Attributes:
        components_: axes, orthogonal but for the averaging, times the root of what they explain,
            shape (L, D), posterior means.
        components_sd_: their posterior standard deviations, shape (L, D).
        mean_: mean of each column, shape (D,).
        noise_variance_: variance of the noise.
        converged_: whether the fit converged; if not, there was a ``ConvergenceWarning``.
        n_iter_: steps taken.
        n_features_in_: number of columns D.
        feature_names_in_: their names, where ``X`` has names, shape (D,).
        posterior_: the :class:`latentlab.Posterior`, in the units of ``X``.

    Example:
        >>> import latentlab as ll
        >>> from latentlab.sklearn import PPCA
        >>> x = ll.data.simulate.eruptions(num_rows=100).x
        >>> ppca = PPCA(n_components=1, random_state=0).fit(x)
        >>> ppca.transform(x).shape, ppca.components_.shape
        ((100, 1), (1, 2))
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        max_iter: int = 20_000,
        tol: float = 0.03,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.verbose = verbose

    def impute(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """Rows with each missing cell at its mean given the others, shape (N, D).

        Arguments:
            X: rows, shape (N, D), NaN where a cell is missing.
        """
        x = self._new_rows(X)
        return self._model.impute(x, self._draws()).mean.numpy(force=True)

    def sample(
        self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None
    ) -> np.ndarray:
        """New rows, each at a draw of the parameters, shape (N, D).

        Arguments:
            n_samples: number of rows N.
            random_state: of the draws; by default that of the estimator.
        """
        check_is_fitted(self, "posterior_")
        N, seed = as_count(n_samples, "n_samples"), self._seed(random_state)
        row = self._model.distribution(self._draws())
        with seeded(seed):
            each = -(-N // _NUM_DRAWS)
            drawn = row.sample((each,)).flatten(0, 2)
            return drawn[torch.randperm(len(drawn))[:N]].numpy(force=True)

    def _fit(self, table: Table) -> Posterior:
        D, L = table.x.shape[1], as_count(self.n_components, "n_components")
        if L >= D:
            raise ValueError(
                f"n_components: expected fewer than columns, got {L} for {D} feature(s), "
                "shape (N, D) of X; noise needs a dimension of its own"
            )
        check_variances(table)
        return fit(
            models.ProbabilisticPCA(D, L),
            table,
            num_restarts=1,
            max_steps=as_count(self.max_iter, "max_iter"),
            tol=self.tol,
            seed=seed_of(self.random_state),
            progress=bool(self.verbose),
        )

    def _describe(self) -> None:
        draws = self._draws()
        loadings = self._model.loadings(draws).mT
        self.components_ = loadings.mean(0).numpy(force=True)
        self.components_sd_ = loadings.std(0).numpy(force=True)
        self.mean_ = draws["loc"].mean(0).numpy(force=True)
        self.noise_variance_ = float(draws["scale"].square().mean())

    def _encoded(self, x: Tensor) -> Tensor:
        return self._model.encode(x, self._draws()).mean

    def _decoded(self, z: Tensor) -> Tensor:
        return self._model.decode(z, self._draws())

    def _log_prob(self, x: Tensor) -> Tensor:
        return self._model.log_prob(x, self._draws())

    def _draws(self) -> dict[str, Tensor]:
        return self.posterior_.sample(_NUM_DRAWS)

    @property
    def _model(self) -> models.ProbabilisticPCA:
        """The fit's own copy of the model, scaled to its rows."""
        return cast(models.ProbabilisticPCA, self.posterior_.model)


class VAE(_Transformer):
    r"""A variational autoencoder of a table, with the interface of ``sklearn``'s ``PCA``.

    A fit of :class:`latentlab.VariationalAutoencoder`. Cells may be missing. A share of the rows
    is kept aside, and the fit ends where these get no more probable.

    Arguments:
        n_components: latents L.
        likelihood: of a cell: ``"gaussian"``, ``"bernoulli"``, ``"poisson"``, or a likelihood of
            :mod:`latentlab.distributions`.
        hidden_layer_sizes: widths of the hidden layers of the encoder, the decoder's in reverse.
        beta: weight of the KL in training.
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
        >>> from latentlab.sklearn import VAE
        >>> x = ll.data.simulate.eruptions(num_rows=100).x
        >>> vae = VAE(n_components=1, hidden_layer_sizes=(8,), random_state=0).fit(x)
        >>> vae.transform(x).shape
        (100, 1)
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        likelihood: Any = "gaussian",  # noqa: ANN401
        hidden_layer_sizes: Sequence[int] = (256,),
        beta: float = 1.0,
        validation_fraction: float = 0.1,
        batch_size: int = 128,
        max_iter: int = 20_000,
        learning_rate_init: float = 0.002,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.likelihood = likelihood
        self.hidden_layer_sizes = hidden_layer_sizes
        self.beta = beta
        self.validation_fraction = validation_fraction
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.learning_rate_init = learning_rate_init
        self.random_state = random_state
        self.verbose = verbose

    def impute(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """Rows with each missing cell at its mean given the others, shape (N, D).

        It is taken over 1000 latents, by their importance weights. A code is the most probable.

        Arguments:
            X: rows, shape (N, D), NaN where a cell is missing.
        """
        x = self._new_rows(X)
        mean = self._model.impute(x, num_samples=2).mean
        return torch.where(x.isnan(), mean.to(x), x).numpy(force=True)

    def sample(
        self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None
    ) -> np.ndarray:
        """New rows, shape (N, D).

        Arguments:
            n_samples: number of rows N.
            random_state: of the draws; by default that of the estimator.
        """
        check_is_fitted(self, "posterior_")
        N, seed = as_count(n_samples, "n_samples"), self._seed(random_state)
        return self._model.sample(N, seed).numpy(force=True)

    def _fit(self, table: Table) -> Posterior:
        (N, D), seed = table.x.shape, seed_of(self.random_state)
        batch_size = as_count(self.batch_size, "batch_size")
        model = models.VariationalAutoencoder(
            likelihood=self.likelihood,
            latent_dim=as_count(self.n_components, "n_components"),
            num_features=D,
            hidden_dims=self.hidden_layer_sizes,
            beta=self.beta,
            seed=seed,
        ).double()  # rows answer alike whatever others they come with
        share = self.validation_fraction
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 <= share < 1:
            raise ValueError(
                f"validation_fraction: expected a share in [0, 1), such as 0.1, got {share!r}"
            )
        kept = 0.0 if round(share * N) < 2 else share  # too few rows to keep any of them aside
        return fit(
            model,
            table,
            batch_size=batch_size if batch_size < N * (1 - kept) else None,
            max_steps=as_count(self.max_iter, "max_iter"),
            lr=self.learning_rate_init,
            held_out=kept or None,
            seed=seed,
            progress=bool(self.verbose),
        )

    def _describe(self) -> None:
        held = self.posterior_.held_out
        self.validation_score_ = None if held is None else held.value

    def _encoded(self, x: Tensor) -> Tensor:
        return self._model.encode(x)[0].double()

    def _decoded(self, z: Tensor) -> Tensor:
        return self._model.decode(z).double()

    def _log_prob(self, x: Tensor) -> Tensor:
        # The same noise for each row, so that its answer depends on no other row.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(_NUM_DRAWS, 1, self._n_features_out, generator=generator).double()
        step = max(1, _CHUNK // (_NUM_DRAWS * x.shape[1]))
        with torch.no_grad():
            return torch.cat([self._log_mean_weight(part, noise) for part in x.split(step)])

    def _log_mean_weight(self, x: Tensor, noise: Tensor) -> Tensor:
        model, q = self._model, self._model.posterior(x)
        z = q.mean + q.stddev * noise  # (S, B, L)
        log_prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
        log_w = log_prior + model.distribution(z).log_prob(x) - q.log_prob(z)
        return log_w.logsumexp(0) - math.log(len(log_w))

    @property
    def _model(self) -> models.VariationalAutoencoder:
        """The fit's own copy of the model, scaled to its rows."""
        model = self.posterior_.model
        return cast(models.VariationalAutoencoder, getattr(model, "__self__", model))
