r"""Where a climb begins: near a mode, with the curvature there.

A start is a point u on the real line: the model's own starting values, the median of the prior or
a draw from it. From there the log joint density is climbed to a mode, and a guide of ours is laid
over it with the curvature as its precision (Laplace),

.. math:: \hat u = \arg\max_u \log p(x, T(u)) + \log |T'(u)|, \qquad
          \Lambda = -\nabla^2 \log p(x, T(\hat u)) - \nabla^2 \log |T'(\hat u)|,

so that the climb of the ELBO begins near its end, whatever the units. The mode of a hierarchy may
be a spike that holds no mass: the start without it is kept where its ELBO is larger.

Letters: L latent numbers, P particles.

Reference:
    | Accurate approximations for posterior moments and marginal densities
      (Tierney and Kadane, 1986)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from latentlab.guides import Arrow, Guide, Structured
from latentlab.inference import objectives
from latentlab.inference.density import log_density
from latentlab.inference.evaluation import evaluate, first_bad_site
from latentlab.inference.modes import standing
from latentlab.inference.pair import Pair
from latentlab.inference.replay import done, go_to
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.simulate import prior_draws
from latentlab.inference.training import SINGULAR
from latentlab.protocols import StartsFrom, owner_of

__all__ = ["Starts"]

_ATTEMPTS = 10
_PRIOR_DRAWS = 200
_ELBO_DRAWS = 64
_MODE_STEPS = 200
_CURVED = 300  # latents up to which the whole matrix of second derivatives is taken


class Starts:
    """Start 0 is the model's own or the median of the prior, the others are further ones.

    Arguments:
        pair: the pair, entered.
        seed: of the fit.
    """

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair, self.seed = pair, seed

    def place(self, start: int) -> None:
        """Put the pair at a start with a finite objective; at most ten are tried.

        Raises:
            ValueError: if there is none; the message names the site.
        """
        self._remember("place", start, work=lambda: self._try(start))

    def _remember(self, *what: object, work: Callable[[], None]) -> None:
        """Move the pair, or put it where it was moved before the fit was resumed."""
        journal = self.pair.journal
        name = journal.name(*what, self.seed, standing(self.pair))
        part = journal.find(name)
        if part is not None:
            go_to(self.pair, part)
            return
        work()
        journal.keep(name, lambda: done(self.pair, [], {}))

    def _try(self, start: int) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                self._place(start, attempt)
                manual_seed(stream(self.seed, "start", start, attempt))
                with torch.no_grad():
                    weights = objectives.log_weights(self.pair, 4 if self.pair.vectorised else 1)
            except SINGULAR:  # a matrix that is singular here may not be elsewhere
                continue
            if torch.isfinite(weights).all():
                return
        raise self._hopeless()

    def _hopeless(self) -> ValueError:
        site, value = first_bad_site(self.pair, 1, self.pair.data)
        return ValueError(
            f"site {site!r}: its log-density is {value} at each of ten starts; "
            "look at its support and at the scale of its parents' priors"
        )

    def _place(self, start: int, attempt: int) -> None:
        guide = self.pair.guide
        if not isinstance(guide, Guide) or not self.pair.latents:
            return
        seed = stream(self.seed, "place", start, attempt)
        free, center, unit = self._prior(guide, seed)
        if start or attempt:
            center = free[0].clamp(center - 2 * unit, center + 2 * unit)
        center = self._as_the_model_likes(guide, center, seed)
        guide.start(center, 0.1 * unit)
        if not attempt and not self.pair.store["params"]:  # parameters yet to learn have no mode
            self._go_to_mode(guide, center, unit, seed)

    def point(self, start: int) -> Tensor:
        """Where a chain of a sampler may begin: a draw of the prior that is not far out.

        Modes are no such places: that of a hierarchy may be a spike that holds no mass.

        Arguments:
            start: its number.

        Returns:
            Numbers (L,) on the real line.

        Raises:
            ValueError: if there is none; the message names the site.
        """
        guide = self.pair.guide
        if not isinstance(guide, Guide):
            raise TypeError("guide: expected one of latentlab.guides, which lays out the latents")
        for attempt in range(_ATTEMPTS):
            seed = stream(self.seed, "point", start, attempt)
            free, center, unit = self._prior(guide, seed)
            point = free[0].clamp(center - 2 * unit, center + 2 * unit)
            point = self._as_the_model_likes(guide, point, seed)
            with torch.no_grad():
                if bool(log_density(self.pair, guide, point[None]).isfinite().all()):
                    return point
        guide.start(point, 1e-3 * unit)
        raise self._hopeless()

    def spread_over_prior(self) -> None:
        """Put a guide of ours over the prior, a third as wide: where no data are known yet."""
        guide = self.pair.guide
        if isinstance(guide, Guide) and guide.num_latents:
            _, center, unit = self._prior(guide, stream(self.seed, "spread"))
            guide.start(center, unit / 3)

    def lay_over_mode(self, center: Tensor) -> None:
        """Lay a guide that stands somewhere over the mode near there, if that has the larger ELBO.

        Arguments:
            center: where it stands, shape (L,).
        """
        guide, seed = self.pair.guide, stream(self.seed, "mode")
        if isinstance(guide, Guide) and not self.pair.store["params"]:
            unit = self._prior(guide, seed)[2]
            work = partial(self._go_to_mode, guide, center, unit, seed)
            self._remember("mode", center, unit, work=work)

    def _prior(self, guide: Guide, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draws of the prior on the real line, their median and half their width, (L,) each."""
        manual_seed(seed)
        free = guide.pack(prior_draws(self.pair, _PRIOR_DRAWS))
        free = torch.where(torch.isfinite(free), free, 0.0)
        if not free.shape[1]:  # as of a Dirichlet over one share
            return free, free[0], free[0]
        low, center, high = free.quantile(torch.tensor([0.16, 0.5, 0.84]).to(free), dim=0)
        return free, center, ((high - low) / 2).clamp_min(1e-8 * center.abs() + 1e-300)

    def _go_to_mode(self, guide: Guide, center: Tensor, unit: Tensor, seed: int) -> None:
        """Lay the guide over the nearest mode, where that has the larger ELBO."""
        if not guide.num_latents:
            return
        before = {k: v.clone() for k, v in guide.state_dict().items()}
        plain = self._elbo(seed)
        mode = _mode(self.pair, guide, center, unit)
        guide.start(mode, 0.1 * unit)
        if guide.num_latents <= _CURVED:
            precision = _precision(self.pair, guide, mode, unit)
            if precision.isfinite().all():  # in some units it overflows
                guide.lay(mode, precision)
        elif len(guide.layout.outer) + guide.layout.inner.shape[1] <= _CURVED:
            _lay_by_row(self.pair, guide, mode, unit)
        if not self._elbo(seed) > plain:  # a NaN is no gain
            guide.load_state_dict(before)

    def _elbo(self, seed: int) -> float:
        manual_seed(seed)
        with torch.no_grad():
            num_draws = _ELBO_DRAWS if self.pair.vectorised else _ELBO_DRAWS // 4
            value = evaluate(self.pair, objectives.draw(self.pair, num_draws)).value
        return value if math.isfinite(value) else -math.inf

    def _as_the_model_likes(self, guide: Guide, center: Tensor, seed: int) -> Tensor:
        """A centre (L,) with what the model knows of good starts in it."""
        owner, data = owner_of(self.pair.model), self.pair.data
        if not isinstance(owner, StartsFrom):
            return center
        values = owner.starting_values(*data.args, seed=seed, **data.kwargs)
        current = guide.unpack(center[None])[0]
        current |= {
            name: value.reshape(current[name].shape).to(center)
            for name, value in values.items()
            if name in current
        }
        return guide.pack(current)[0]


def _mode(pair: Pair, guide: Guide, center: Tensor, unit: Tensor) -> Tensor:
    """A mode of the log density near a centre, by L-BFGS in units of the prior."""
    from scipy.optimize import minimize

    def loss(v: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.from_numpy(v).to(center).requires_grad_()
        value = -log_density(pair, guide, (center + unit * at)[None])[0]
        (slope,) = torch.autograd.grad(value, at)
        return value.item(), slope.double().numpy(force=True)

    # To the last digit, so that the order of the rows, which rounds sums, is of no account.
    options = {"maxiter": _MODE_STEPS, "ftol": 1e-15, "gtol": 1e-8}
    start = np.zeros(len(center))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    return center + unit * torch.from_numpy(found.x).to(center)


def _precision(pair: Pair, guide: Guide, mode: Tensor, unit: Tensor) -> Tensor:
    """Negative second derivatives (L, L) at a mode, made positive definite."""

    def loss(v: Tensor) -> Tensor:
        return -log_density(pair, guide, (mode + unit * v)[None])[0]

    curvature = torch.autograd.functional.hessian(loss, torch.zeros_like(mode))
    if not curvature.isfinite().all():
        return curvature
    size, axes = torch.linalg.eigh(curvature.double())
    # A flat or hollow direction gets the width of the prior.
    size = size.abs().clamp_min(1.0)
    return ((axes * size) @ axes.T).to(mode) / (unit[:, None] * unit)


def _lay_by_row(pair: Pair, guide: Guide, mode: Tensor, unit: Tensor) -> None:
    """Lay a guide over a mode where rows are independent given the global numbers, in place."""
    arrow = _arrow(pair, guide, mode, unit)
    if not all(part.isfinite().all() for part in (arrow.outer, arrow.cross, arrow.inner)):
        return
    arrow = arrow.made_positive()  # a flat or hollow direction gets the width of the prior
    if isinstance(guide, Structured):
        guide.lay_arrow(mode, arrow, unit.double())
    else:
        guide.start(mode, unit * arrow.diagonal(guide.layout).rsqrt().to(unit))


def _arrow(pair: Pair, guide: Guide, mode: Tensor, unit: Tensor) -> Arrow:
    """Negative second derivatives at a mode, in units, none between different rows.

    One product with the Hessian gives a column of it for a global number, and a column for every
    row at once for one of the rows' numbers.
    """
    outer, inner = guide.layout.outer, guide.layout.inner
    zeros = torch.zeros_like(mode)
    at = zeros.clone().requires_grad_()
    with torch.enable_grad():
        value = -log_density(pair, guide, (mode + unit * at)[None])[0]
        (slope,) = torch.autograd.grad(value, at, create_graph=True)
        columns = [
            torch.autograd.grad(slope, at, zeros.index_fill(0, places, 1.0), retain_graph=True)[0]
            for places in (*outer[:, None], *inner.T)
        ]
    matrix = torch.stack(columns).double()  # (G + l, L)
    by_global, by_row = matrix[: len(outer)], matrix[len(outer) :]
    cross, blocks = (part[:, inner].movedim(0, -1) for part in (by_global, by_row))
    return Arrow(by_global[:, outer], cross, blocks)
