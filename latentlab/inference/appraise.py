r"""What a posterior says of itself and of its data: thin callers of :mod:`latentlab.diagnostics`.

Letters: S draws, N data, F figures, R replicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from latentlab import diagnostics
from latentlab.data.checks import as_count
from latentlab.diagnostics import (
    Comparison,
    DrawComparison,
    ElboParts,
    Loo,
    Ppc,
    Sandwich,
    Sensitivity,
)
from latentlab.guides import Draws, Families, Guide
from latentlab.inference import objectives, predictive
from latentlab.inference.axes import names_of
from latentlab.inference.batches import follows_rows
from latentlab.inference.chains import Chains
from latentlab.inference.evaluation import chunks
from latentlab.inference.pair import Pair
from latentlab.inference.posterior import Posterior

__all__ = [
    "compare",
    "compare_draws",
    "elbo_parts",
    "loo",
    "ppc",
    "sandwich",
    "sensitivity",
]

_LOO_DRAWS, _FEWEST_DRAWS = 2_000, 200
_ELEMENTS = 2**27  # of log-densities (S, N)
_REPLICATES = 400
_DRAWS = 4_000


def compare(posteriors: Mapping[str, Posterior]) -> Comparison:
    """Compare models by how well each predicts rows that are left out.

    Arguments:
        posteriors: name -> a posterior, all of the same rows.

    Returns:
        Differences with their errors, ranks and stacking weights; see
        :func:`latentlab.diagnostics.compare`.

    Raises:
        ValueError: for posteriors of different rows, or without rows.

    Example:
        >>> import latentlab as ll
        >>> x = ll.data.simulate.eruptions(num_rows=60)
        >>> fits = {
        ...     f"K={k}": ll.fit(ll.GaussianMixture(2, k), x, num_restarts=1, progress=False)
        ...     for k in (1, 2)
        ... }
        >>> ll.compare(fits).best
        'K=2'
    """
    if not isinstance(posteriors, Mapping) or not all(
        isinstance(p, Posterior) for p in posteriors.values()
    ):
        raise TypeError('posteriors: expected a dict as {"K=2": posterior, "K=3": other}')
    data = {name: posterior._observed() for name, posterior in posteriors.items()}
    first = next(iter(data.values()), {})
    for name, found in data.items():
        same = found.keys() == first.keys() and all(
            torch.equal(found[k].nan_to_num(), first[k].nan_to_num()) for k in found
        )
        if not same:
            raise ValueError(f"posteriors: {name!r} was fitted to other rows than the first one")
    return diagnostics.compare({name: loo(posterior) for name, posterior in posteriors.items()})


def loo(posterior: Posterior, num_samples: int | None = None, seed: int | None = None) -> Loo:
    """See :meth:`Posterior.loo`."""
    pair, plate = posterior.pair, posterior._plate
    posterior._need_data("loo")
    if pair.latents and follows_rows(pair):
        raise ValueError(
            "loo: each row has latents of its own and shares none, so that leaving another one "
            "out changes nothing; see held_out=, and log_prob()"
        )
    if plate is None or pair.is_point():
        why = "the data are one datum" if plate is None else "a point has no draws to weigh"
        raise ValueError(f"loo: {why}")
    N = next(size for name, size, _ in pair.plates[pair.observed[0]] if name == plate)
    num = num_samples or max(_FEWEST_DRAWS, min(_LOO_DRAWS, _ELEMENTS // N))
    with torch.no_grad(), posterior._entered("loo", seed):
        draws = objectives.draw(pair, as_count(num, "num_samples", minimum=25))
        log_weights = _log_joint(pair, draws) - draws.log_q
        log_lik, _ = predictive.log_density(pair, draws, plate)
    return diagnostics.loo(log_lik, log_weights)


def compare_draws(
    posterior: Posterior, reference: Chains | Mapping[str, Tensor], num_samples: int
) -> DrawComparison:
    """See :meth:`Posterior.compare_draws`."""
    given = reference._aligned if isinstance(reference, Chains) else reference
    chains = isinstance(reference, Chains)
    theirs = {k: torch.as_tensor(v) for k, v in given.items()}
    theirs = {k: v if chains else v[None] for k, v in theirs.items()}  # (C, S, ...)
    sites = [z.name for z in posterior.pair.latents if z.name in theirs]
    if not sites:
        have = ", ".join(map(repr, theirs)) or "none"
        raise ValueError(f"reference: expected draws of the posterior's sites, got {have}")
    theirs = {k: v.cpu() for k, v in theirs.items()}
    ours = {k: v.cpu() for k, v in posterior.sample(num_samples).items()}
    axes = {site: axis for site, axis in posterior._axes.items() if site in sites}
    if axes:
        middle = {k: theirs[k].flatten(0, 1).double().mean(0).to(ours[k]) for k in axes}
        ours |= diagnostics.align({k: ours[k] for k in axes}, axes, middle).draws
    names, a, b = [], [], []
    for site in sites:
        shape = tuple(ours[site].shape[1:])
        if tuple(theirs[site].shape[2:]) != shape:
            raise ValueError(
                f"reference: expected draws of {site!r} of shape {shape}, got "
                f"{tuple(theirs[site].shape[2:])}"
            )
        names += names_of(posterior.pair, site, shape)
        a.append(ours[site].reshape(num_samples, -1).double())
        b.append(theirs[site].flatten(2).double() if shape else theirs[site][..., None].double())
    reference_draws = torch.cat(b, -1)
    given_draws = reference_draws if chains else reference_draws[0]
    return diagnostics.compare_draws(torch.cat(a, -1), given_draws, names)


def ppc(
    posterior: Posterior,
    statistics: Mapping[str, Callable] | None,
    site: str | None,
    num_samples: int | None,
    seed: int | None,
) -> Ppc:
    """See :meth:`Posterior.ppc`."""
    observed = posterior._observed()
    if site is None:
        if len(observed) != 1:
            names = ", ".join(map(repr, observed)) or "none"
            raise ValueError(f"site: expected which observed site to check, one of {names}")
        (site,) = observed
    if site not in observed:
        raise ValueError(f"site: expected one of {', '.join(map(repr, observed))}, got {site!r}")
    num = as_count(num_samples or _REPLICATES, "num_samples", minimum=20)
    drawn = posterior.predict(num, seed=seed)[site]
    data = observed[site]
    if data.dim() > 2:  # of sequences, each step is a row
        data, drawn = data.flatten(0, -2), drawn.flatten(1, -2)
    missing = data.isnan() | drawn.isnan().all(0)  # a step after the end is drawn as NaN
    if missing.dim() == 2:
        there = ~missing.all(-1)
        data, drawn, missing = data[there], drawn[:, there], missing[there]
    if missing.any():  # what is not there is not looked at, in data and replicates alike
        data, drawn = data[~missing], drawn[:, ~missing]
    return diagnostics.ppc(data, drawn, statistics)


def sandwich(posterior: Posterior, num_samples: int, seed: int | None) -> Sandwich:
    """See :meth:`Posterior.sandwich`."""
    _expect_spread(posterior.pair, "sandwich")
    return diagnostics.sandwich(posterior.log_weights(num_samples, seed))


def sensitivity(posterior: Posterior, num_samples: int, seed: int | None) -> Sensitivity:
    """See :meth:`Posterior.sensitivity`."""
    pair = posterior.pair
    posterior._need_data("sensitivity")
    _expect_spread(pair, "sensitivity")
    with torch.no_grad(), posterior._entered("sensitivity", seed):
        draws = objectives.draw(pair, num_samples)
        sites = _by_site(pair, draws)
        latents = [z for z in pair.latents if not pair.is_local(z.name)]
        shared = {z.name for z in latents}
        prior = sum((v for k, v in sites.items() if k in shared), torch.zeros(num_samples))
        rest = sum((v for k, v in sites.items() if k not in shared), torch.zeros(num_samples))
        log_weights = prior + rest - draws.log_q
    if not latents:
        raise ValueError("sensitivity: no latent is shared by all rows, so that no prior is one")
    names, figures = [], []
    for latent in latents:
        value = draws.values[latent.name].reshape(num_samples, *latent.shape)
        if not value.is_floating_point():
            continue  # a label has no mean that could move
        names += names_of(pair, latent.name, latent.shape)
        figures.append(value.reshape(num_samples, -1).double())
    parts = prior.cpu(), rest.cpu(), log_weights.cpu()
    return diagnostics.sensitivity(torch.cat(figures, -1).cpu(), *parts, names)


def elbo_parts(posterior: Posterior, num_samples: int, seed: int | None) -> ElboParts:
    """See :meth:`Posterior.elbo_parts`."""
    pair = posterior.pair
    posterior._need_data("elbo_parts")
    _expect_spread(pair, "elbo_parts")
    with torch.no_grad(), posterior._entered("parts of the ELBO", seed):
        draws = objectives.draw(pair, num_samples)
        log_p = _by_site(pair, draws)
        log_q = _in_order(pair, draws)
        latents = {z.name for z in pair.latents}
        if {*log_q} != latents:  # only all latents together are known
            joint = sum((log_p.pop(k) for k in [*log_p] if k in latents), torch.zeros(num_samples))
            log_p = {"all latents": joint} | log_p
    observed = [site for site in log_p if site not in log_q]
    plates = {k: v[0][0] for k, v in pair.plates.items() if v and (k in log_p)}
    return diagnostics.elbo_parts(log_p, log_q, observed, plates)


def _expect_spread(pair: Pair, what: str) -> None:
    """Refuse a point: its log-density is zero by convention, and it does not move."""
    if pair.latents and pair.is_point():
        raise ValueError(f"{what}: a point has no spread; fit a guide that has one")


def _log_joint(pair: Pair, draws: Draws) -> Tensor:
    return torch.cat([objectives.log_joint(pair, part) for part in chunks(pair, draws)])


def _by_site(pair: Pair, draws: Draws) -> dict[str, Tensor]:
    """Log-density (S,) of each site of the model."""
    parts = []
    for part in chunks(pair, draws):
        found = objectives.site_log_probs(pair, part)
        parts.append(
            {k: objectives.per_particle({k: v}, len(part), pair.nesting) for k, v in found.items()}
        )
    return {k: torch.cat([part[k] for part in parts]).double() for k in parts[0]}


def _in_order(pair: Pair, draws: Draws) -> dict[str, Tensor]:
    """Log-density (S,) of each latent given those before it; of all, where that is unknown."""
    guide, num = pair.guide, len(draws)
    if isinstance(guide, Families):
        return {k: v.double() for k, v in guide.log_prob_in_order(draws.values).items()}
    if not isinstance(guide, Guide):
        found = objectives.guide_log_probs(pair, draws)
        parts = {k: objectives.per_particle({k: v}, num, pair.nesting) for k, v in found.items()}
        return {k: v.double() for k, v in parts.items()}
    try:
        u = guide.pack(draws.values)
        volumes = guide.unpack(u)[1]
        before, parts = torch.zeros(num), {}
        for site in guide.layout.sites:
            end = site.part.stop
            until = guide._free_log_prob(u[:, :end], slice(0, end))
            own = until - before
            if site.latent.name in volumes:
                own = own - volumes[site.latent.name].reshape(num, -1).sum(-1)
            parts[site.latent.name], before = own.double(), until
    except (NotImplementedError, ValueError, AttributeError):
        return {"all latents": draws.log_q.double()}
    total = sum(parts.values(), torch.zeros(num))
    exact = torch.allclose(total, draws.log_q.double(), rtol=1e-4, atol=1e-3 * math.sqrt(num))
    return parts if exact else {"all latents": draws.log_q.double()}
