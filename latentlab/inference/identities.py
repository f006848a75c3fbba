r"""Whether draws belong to the posterior of a model, whoever made them.

.. math:: \mathbb{E}\,[\partial_i \ell(u)] = 0, \qquad
          \mathbb{E}\,[(u_i - m_i) \, \partial_i \ell(u)] = -1

hold for draws of the posterior on the real line, with :math:`\ell` the log density of
:mod:`.density`, and fail for others: milliseconds, where a second sampler takes minutes.

Letters: C chains, S draws of each, L latent numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentlab.diagnostics import Stein, stein
from latentlab.guides import MeanField
from latentlab.inference.axes import labels_of
from latentlab.inference.chains import Chains
from latentlab.inference.check import prepare
from latentlab.inference.density import log_density
from latentlab.inference.evaluation import particle_chunk
from latentlab.inference.pair import Pair
from latentlab.inference.posterior import Posterior

__all__ = ["check_posterior"]

_DRAWS = 4000  # of a posterior


def check_posterior(
    model: Callable,
    data: Any,  # noqa: ANN401
    draws: Posterior | Chains | Mapping[str, Any],
) -> Stein:
    r"""Check any draws against a model: ours, Stan's, NUTS's, your own sampler's.

    Looks at each latent number on the real line (a scale as its logarithm). How to read it: draws
    of the posterior of this model and these data pass 19 times in 20; a failure says which number
    is off, and by how many standard errors. A prior or a unit that differs between two programs, a
    variance taken for a standard deviation, a wrong Jacobian: all of these fail.

    Arguments:
        model: as for :func:`latentlab.fit`.
        data: as for :func:`latentlab.fit`.
        draws: site -> draws of every continuous latent, shape (S, ...), independent, in the
            model's own units; or a posterior, of which 4000 are drawn; or what
            :func:`latentlab.nuts` returned, whose chains count as such.

    Returns:
        z-scores, and whether they are more than chance.

    Raises:
        ValueError: for draws of another shape, or outside of a site's support.

    Reference:
        | A kernelized Stein discrepancy for goodness-of-fit tests (Liu, Lee and Jordan, 2016)

    Example:
        >>> import pyro, torch, latentlab as ll, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> z = torch.randn(2000, generator=torch.Generator().manual_seed(0))
        >>> ll.check_posterior(model, torch.tensor(1.0), {"loc": 0.5 + 0.5**0.5 * z}).ok
        True
        >>> ll.check_posterior(model, torch.tensor(1.0), {"loc": 0.5 + 0.5 * z}).ok
        False
    """
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        return _check(model, data, draws)


def _check(
    model: Callable,
    data: Any,  # noqa: ANN401
    draws: Posterior | Chains | Mapping[str, Any],
) -> Stein:
    pair, report = prepare(model, data, MeanField())
    report.expect_ok("the model cannot be scored")
    _learn(pair, draws)
    if isinstance(draws, Posterior):
        draws = draws.sample(_DRAWS)
    chains = isinstance(draws, Chains)
    values = _checked(pair, draws.draws if isinstance(draws, Chains) else draws, chains)
    num_chains, num_samples = next(iter(values.values())).shape[:2]
    points, slopes = _scores(pair, {k: v.flatten(0, 1) for k, v in values.items()})
    shape = (num_chains, num_samples, -1) if chains else (num_samples, -1)
    return stein(points.reshape(shape), slopes.reshape(shape), names=_names(pair))


def _learn(pair: Pair, draws: object) -> None:
    """Parameters of the model, which are those that a posterior was fitted with, in place."""
    learned = [name for name, value in pair.store["params"].items() if value.requires_grad]
    if not learned:
        return
    fitted = draws.pair.store["params"] if isinstance(draws, Posterior) else {}
    absent = [name for name in learned if name not in fitted]
    if absent:
        raise ValueError(
            f"model: its parameter {absent[0]!r} is fitted, and draws alone do not say where it "
            "is; give it a prior (pyro.sample), or hand in the posterior"
        )
    with torch.no_grad():
        for name in learned:
            pair.store["params"][name].copy_(fitted[name])


def _checked(pair: Pair, draws: Mapping[str, Any], chains: bool) -> dict[str, Tensor]:
    """Draws of all latents, each (C, S, ...), C = 1 where they are independent."""
    if not isinstance(draws, Mapping):
        raise TypeError(
            f"draws: expected a dict of draws, a Posterior or Chains, got {type(draws).__name__}"
        )
    found: dict[str, Tensor] = {}
    for latent in pair.latents:
        if latent.name not in draws:
            have = ", ".join(map(repr, draws)) or "none"
            raise ValueError(f"draws: expected those of site {latent.name!r}, got {have}")
        given = draws[latent.name]
        value = given.detach() if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
        value = value.to(pair.dtype)
        value = value if chains else value[None]
        if value.dim() < 2 or value.shape[2:] != latent.shape or value.shape[1] < 2:
            want = ", ".join(map(str, ("S", *latent.shape)))
            got = tuple(value.shape if chains else value.shape[1:])
            raise ValueError(f"draws[{latent.name!r}]: expected shape ({want}), got {got}")
        if not bool(torch.as_tensor(latent.support.check(value)).all()):
            raise ValueError(
                f"draws[{latent.name!r}]: some are outside of the support of the site; give them "
                "in the units of the model, not on the real line"
            )
        found[latent.name] = value
    counts = {name: tuple(value.shape[:2]) for name, value in found.items()}
    if len({*counts.values()}) > 1:
        raise ValueError(f"draws: expected as many of each site, got {counts}")
    return found


def _scores(pair: Pair, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Points on the real line and the slopes of the log density there, each (S, L)."""
    guide: Any = pair.guide
    num = len(next(iter(values.values())))
    with pair.entered(seed=0):
        points = guide.pack(values).detach()
        size = particle_chunk(pair, num) if pair.vectorised else 1
        slopes = []
        for part in points.split(size):
            at = part.clone().requires_grad_()
            density = log_density(pair, guide, at)
            if not density.isfinite().all():
                raise ValueError(
                    "draws: the log-density of some is not finite, so that they cannot be draws "
                    "of this posterior; look at the factors and the supports of the model"
                )
            slopes += torch.autograd.grad(density.sum(), at)
    return points, torch.cat(slopes)


def _names(pair: Pair) -> list[str]:
    """Of the numbers on the real line; where a site has fewer there than values, by number."""
    found = []
    for latent in pair.latents:
        shape = latent.free_shape
        if shape == latent.shape:
            labels = labels_of(pair, latent.name, shape)
        else:
            labels = [", ".join(map(str, index)) for index in np.ndindex(*shape)]
        found += [f"{latent.name}[{label}]" if label else latent.name for label in labels]
    return found
