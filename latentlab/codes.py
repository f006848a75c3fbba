r"""New rows from an autoencoder: a mixture fitted to its codes. On the roof, above both towers.

.. math::
    z_n = e(x_n), \quad z \sim \sum_k \pi_k \, \mathcal{N}(\mu_k, \Sigma_k), \quad
    x = d(z)

Letters: N rows, L latent dimensions, S draws.

Reference:
    | From variational to deterministic autoencoders (Ghosh et al., 2020)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from latentlab.data.checks import as_count, as_seed
from latentlab.inference.engine import fit
from latentlab.inference.posterior import Posterior
from latentlab.models import Autoencoder, GaussianMixture, VariationalAutoencoder
from latentlab.seeds import seeded

__all__ = ["CodeMixture", "fit_codes"]


@dataclass(frozen=True)
class CodeMixture:
    """A mixture on the codes of an autoencoder, and the decoder.

    Arguments:
        autoencoder: the fitted model.
        posterior: of the mixture on its codes.
    """

    autoencoder: Autoencoder | VariationalAutoencoder
    posterior: Posterior

    def sample_codes(self, num_samples: int, seed: int = 0) -> Tensor:
        """New codes, shape (S, L).

        Arguments:
            num_samples: S.
            seed: of the draws.
        """
        num_samples = as_count(num_samples, "num_samples")
        mixture = cast(GaussianMixture, self.posterior.model).mixture(
            self.posterior.sample(1, seed=seed)
        )
        with torch.no_grad(), seeded(as_seed(seed)):
            return mixture.sample((num_samples,)).reshape(num_samples, -1)

    def sample(self, num_samples: int, seed: int = 0) -> Tensor:
        """New rows, the decoder's means at new codes, shape (S, D) or (S, C, H, W).

        Arguments:
            num_samples: S.
            seed: of the draws.
        """
        return self.autoencoder.decode(self.sample_codes(num_samples, seed))


def fit_codes(
    posterior: Posterior, num_components: int = 10, *, max_steps: int = 20_000, seed: int = 0
) -> CodeMixture:
    """Fit a mixture of Gaussians to the codes of the rows that an autoencoder was fitted to.

    The codes of a variational autoencoder are drawn from the encoder's distribution, one a row.

    Arguments:
        posterior: of an ``Autoencoder`` or a ``VariationalAutoencoder``, with its data.
        num_components: of the mixture, each with a covariance of its own.
        max_steps: of the fit, which begins where expectation-maximisation ends: few will do.
        seed: of the fit and of the draws.

    Returns:
        The mixture, at its mode, with the decoder.

    Raises:
        TypeError: if the posterior is of another model.
        ValueError: if it has no data, or fewer rows than components.

    Example:
        >>> import latentlab as ll
        >>> x = ll.data.simulate.eruptions(num_rows=100)
        >>> ae = ll.Autoencoder(num_features=2, latent_dim=1, hidden_dims=(8,))
        >>> posterior = ll.fit(ae, x, max_steps=200, progress=False)
        >>> ll.fit_codes(posterior, num_components=2).sample(5).shape
        torch.Size([5, 2])
    """
    model: Any = getattr(posterior, "model", posterior)
    model = getattr(model, "__self__", model)
    known = isinstance(model, Autoencoder | VariationalAutoencoder)
    if not isinstance(posterior, Posterior) or not known:
        raise TypeError(
            "posterior: expected that of an Autoencoder or VariationalAutoencoder, got one of "
            f"{type(model).__name__}"
        )
    if not posterior.has_data:
        raise ValueError(
            "posterior: expected one with its data; load it with ll.load(path, data=x)"
        )
    x = posterior.pair.data.args[0]
    if isinstance(model, Autoencoder):
        codes = model.encode(x)
    else:
        with torch.no_grad(), seeded(as_seed(seed)):
            codes = model.posterior(x).rsample()
    mixture = GaussianMixture(model.latent_dim, num_components, covariance="full")
    how: dict[str, Any] = {"num_restarts": 1, "max_steps": max_steps, "seed": seed}
    return CodeMixture(model, fit(mixture, codes.double(), "point", **how, progress=False))
