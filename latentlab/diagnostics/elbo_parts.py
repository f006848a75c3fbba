r"""What the ELBO is made of, site by site.

.. math:: \mathrm{ELBO} = \sum_{\text{observed } x} \mathrm{E}_q \log p(x \mid \cdot)
          \; - \sum_{\text{latent } z} \mathrm{E}_q
          \left[ \log q(z \mid \cdot) - \log p(z \mid \cdot) \right]

The first sum is how well the data are explained; a term of the second is what a latent costs: the
information that the data gave about it, in nats.

Letter: S draws.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import strings, to_tensor
from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.psis import _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ElboParts", "elbo_parts"]


@dataclass(frozen=True, eq=False, repr=False)
class ElboParts:
    """Result of :func:`elbo_parts`; all figures in nats.

    Arguments:
        elbo: the sum of ``log_likelihood`` less the sum of ``kl``; the error knows that the parts
            share their draws.
        log_likelihood: expected log-likelihood by observed site.
        kl: expected log q - log p by latent site; the KL to the prior, where a site has no
            parents.
        plates: by plate, what its sites add to the ELBO.
    """

    elbo: Estimate
    log_likelihood: Mapping[str, Estimate]
    kl: Mapping[str, Estimate]
    plates: Mapping[str, Estimate]

    @property
    def unused(self) -> tuple[str, ...]:
        """The latents about which the data say nothing: a KL below 0.01 nats, or its error."""
        return tuple(z for z, kl in self.kl.items() if kl.value <= max(0.01, 2 * kl.se))

    def plot(self, ax: Axes | None = None) -> Axes:
        """A bar for what each site adds to the ELBO, with its error; latents take away.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        for parts, sign, color, start, label in (
            (self.log_likelihood, 1, "C0", 0, "expected log-likelihood"),
            (self.kl, -1, "C1", len(self.log_likelihood), "KL, taken away"),
        ):
            places = np.arange(start, start + len(parts))
            values = [sign * part.value for part in parts.values()]
            errors = [part.se for part in parts.values()]
            ax.barh(places, values, xerr=errors, color=color, label=label)
        names = [*self.log_likelihood, *self.kl]
        ax.set(yticks=range(len(names)), yticklabels=names, xlabel="nats")
        ax.set(title=f"ELBO {self.elbo}")
        ax.axvline(0, color="0.5", linewidth=0.8)
        ax.invert_yaxis()
        ax.legend()
        return ax

    def __str__(self) -> str:
        rows = [("ELBO", "", str(self.elbo))]
        rows += [("log-likelihood", x, str(part)) for x, part in self.log_likelihood.items()]
        rows += [("KL", z, str(part)) for z, part in self.kl.items()]
        rows += [("in plate", plate, str(part)) for plate, part in self.plates.items()]
        kinds, names = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(
            f"{kind:<{kinds}}  {name:<{names}}  {figure}" for kind, name, figure in rows
        )

    __repr__ = __str__


def elbo_parts(
    log_p: Mapping[str, ArrayLike | Tensor],
    log_q: Mapping[str, ArrayLike | Tensor],
    observed: Collection[str],
    plates: Mapping[str, str] | None = None,
) -> ElboParts:
    """Divide the ELBO among the sites of a pair.

    How to read it: a latent whose KL is 0 is still its prior: the data say nothing about it, or
    the fit has not found it. Many nats for a latent that should matter little, or a sum that
    outweighs the likelihood, say that its prior is off or too wide. A KL below zero by more than
    its error comes from a guide that draws latents in another order than the model; then only
    the sum of these latents can be read.

    Arguments:
        log_p: log-density of each site of the model at draws of the guide, summed over all its
            axes, shape (S,) each, S at least 2.
        log_q: of each site of the guide at the same draws. A site of the guide alone, which the
            model does not have, counts as a latent.
        observed: the sites of the model that are data, or factors.
        plates: the innermost plate of a site, by site; sites that are not there are in none.

    Returns:
        The parts, in the order of ``log_p``.

    Raises:
        ValueError: for a site that is neither observed nor in ``log_q``, or is both; other shapes;
            or a density that is NaN.

    Example:
        A standard normal latent, one observation 2, and a guide that is a little wide:

        >>> from torch.distributions import Normal
        >>> z = 1 + 0.8 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> lik = Normal(z, 1.0).log_prob(torch.tensor(2.0))
        >>> log_p = {"z": Normal(0.0, 1.0).log_prob(z), "x": lik}
        >>> print(elbo_parts(log_p, {"z": Normal(1.0, 0.8).log_prob(z)}, observed=["x"]))
        ELBO               -2.290 ± 0.007
        log-likelihood  x  -1.73 ± 0.03
        KL              z  0.56 ± 0.03
    """
    plates = {} if plates is None else plates
    for argument, parts in (("log_p", log_p), ("log_q", log_q), ("plates", plates)):
        if not isinstance(parts, Mapping):
            kind = "plate" if argument == "plates" else "log-densities"
            raise TypeError(f"{argument}: expected site -> {kind}, got {type(parts).__name__}")
    observed = strings(observed, "observed")
    p = {site: _draws(f"log_p[{site!r}]", values) for site, values in log_p.items()}
    q = {site: _draws(f"log_q[{site!r}]", values) for site, values in log_q.items()}
    _check(p, q, set(observed))
    added = {site: values if site in observed else values - q[site] for site, values in p.items()}
    added |= {site: -values for site, values in q.items() if site not in p}

    likelihood = {site: Estimate.from_draws(added[site]) for site in p if site in observed}
    kl = {site: Estimate.from_draws(-v) for site, v in added.items() if site not in observed}
    value = sum(e.value for e in likelihood.values()) - sum(e.value for e in kl.values())
    se = Estimate.from_draws(torch.stack(list(added.values())).sum(0)).se
    groups: dict[str, list[Tensor]] = {}
    for site, values in added.items():
        if site in plates:
            groups.setdefault(plates[site], []).append(values)
    by_plate = {g: Estimate.from_draws(torch.stack(v).sum(0)) for g, v in groups.items()}
    return ElboParts(Estimate(value, se), likelihood, kl, by_plate)


def _draws(name: str, values: ArrayLike | Tensor) -> Tensor:
    draws = to_tensor(values, name).double()
    if draws.dim() != 1 or len(draws) < 2:
        raise ValueError(
            f"{name}: expected shape (S,) with at least 2 draws, got {tuple(draws.shape)}"
        )
    if draws.isnan().any():
        raise ValueError(f"{name} has {int(draws.isnan().sum())} NaN")
    return draws


def _check(p: dict[str, Tensor], q: dict[str, Tensor], observed: set[str]) -> None:
    if not p:
        raise ValueError("log_p: expected the log-densities of at least one site, got none")
    if missing := observed - p.keys():
        raise ValueError(f"observed: expected sites of log_p, got {sorted(missing)} as well")
    if both := observed & q.keys():
        raise ValueError(f"log_q: {sorted(both)} are observed, and a guide does not draw data")
    if lost := p.keys() - q.keys() - observed:
        raise ValueError(
            f"log_q: expected all latents of log_p, got none of {sorted(lost)}; name them in "
            "observed if they are data or factors"
        )
    sizes = {len(values) for values in (*p.values(), *q.values())}
    if len(sizes) > 1:
        raise ValueError(f"log_p, log_q: expected as many draws of all sites, got {sorted(sizes)}")
