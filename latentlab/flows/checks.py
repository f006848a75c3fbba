r"""Is a flow what it says? Four figures that a wrong one cannot all get right.

- *round trip*: :math:`|f^{-1}(f(\varepsilon)) - \varepsilon|`;
- *log_det*: against the determinant of the Jacobian by autograd;
- *score*: the density of a draw as the draw knows it, against the density that scoring it gives;
- *mass*: :math:`\int q(x) \, dx`, which is one, by importance sampling from a Student-t laid over
  the draws; judged where the k-hat of its weights says that it can be.

Letters: D features, S draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from latentlab.data.checks import as_count, as_seed
from latentlab.diagnostics import Estimate, psis
from latentlab.flows.density import Invertible, kind_of, standard_normal_log_prob

__all__ = ["FlowCheck", "check_flow"]

_JACOBIANS = 8
_FREEDOM = 5.0  # of the proposal's tails
_RELIABLE = 0.7  # k-hat up to which weights are believed


@dataclass(frozen=True)
class FlowCheck:
    """What :func:`check_flow` found.

    Arguments:
        round_trip: largest error of noise, pushed and pulled back, relative to its size (at
            least one).
        log_det: largest error of the log-determinant, in nats.
        score: largest difference between the two densities of a draw, in nats.
        mass: the integral of the density with its error.
        khat: of the weights behind the mass; above 0.7 they say nothing.
        tolerance: what the first three may be off by, for rounding.
    """

    round_trip: float
    log_det: float
    score: float
    mass: Estimate
    khat: float
    tolerance: float

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, in words."""
        faults = []
        if not self.round_trip <= self.tolerance:
            faults.append(f"pull does not undo push: it is off by {self.round_trip:.2g}")
        if not self.log_det <= self.tolerance:
            faults.append(f"log_det is not that of push: it is off by {self.log_det:.2g} nats")
        if not self.score <= self.tolerance:
            faults.append(
                f"draws are scored by another density than they have: {self.score:.2g} nats off"
            )
        known = not self.khat > _RELIABLE
        if known and not abs(self.mass.value - 1) <= 5 * self.mass.se + self.tolerance:
            faults.append(f"the density integrates to {self.mass}, not to one")
        return tuple(faults)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def __str__(self) -> str:
        head = "a flow as it should be" if self.ok else "not a flow"
        figures = (
            f"round trip {self.round_trip:.1g}, log_det {self.log_det:.1g} nats, "
            f"score {self.score:.1g} nats, mass {self.mass} (k-hat {self.khat:.2f})"
        )
        return "\n".join([f"{head}: {figures}", *(f"  fault: {fault}" for fault in self.faults)])


def check_flow(
    flow: Invertible,
    *,
    context: Tensor | None = None,
    num_samples: int = 4000,
    tolerance: float | None = None,
    seed: int = 0,
) -> FlowCheck:
    """Check that a flow is invertible and scores what it draws.

    Worth a call for every flow of your own, and after training: a flow may be right where it
    starts and fall apart where it ends.

    Arguments:
        flow: anything with ``num_features``, ``push`` and ``pull``.
        context: one context, shape (C,), for a conditional flow.
        num_samples: draws S.
        tolerance: for rounding; by default 1e-6 in double precision, 1e-2 in single precision.
        seed: of the draws.

    Returns:
        The figures; ``.ok`` says whether all is well, and ``print`` what is not.

    Raises:
        ValueError: if a setting is out of range, if ``flow`` lacks what a flow has, or if its
            push or pull gives other shapes than (S, D) and (S,).

    Example:
        >>> from latentlab import flows
        >>> check_flow(flows.make("realnvp", 3)).ok
        True
    """
    num_samples = as_count(num_samples, "num_samples", minimum=100)
    _expect_flow(flow)
    like = kind_of(flow)
    generator = torch.Generator(like.device).manual_seed(as_seed(seed))
    shape = (num_samples, flow.num_features)
    noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    contexts = None if context is None else context.expand(num_samples, -1).contiguous()
    with torch.no_grad():
        value, log_det = _of_rows("push", flow.push(noise, contexts), shape)
        # Another tensor of the same values: what was remembered of the push must not help.
        back, back_det = _of_rows("pull", flow.pull(value.clone(), contexts), shape)
        own = standard_normal_log_prob(noise) - log_det
        scored = standard_normal_log_prob(back) + back_det
        log_weights = _log_weights(flow, value, contexts, generator)
    size = noise.abs().clamp_min(1.0)
    if tolerance is None:
        tolerance = 1e-6 if value.dtype == torch.float64 else 1e-2
    return FlowCheck(
        round_trip=_largest((back - noise) / size),
        log_det=_log_det_error(flow, noise[:_JACOBIANS], contexts),
        score=_largest(own - scored),
        mass=Estimate.from_draws(log_weights.exp()),
        khat=float(psis(log_weights).khat) if log_weights.isfinite().any() else math.nan,
        tolerance=tolerance,
    )


def _expect_flow(flow: object) -> None:
    lacks = [name for name in ("num_features", "push", "pull") if not hasattr(flow, name)]
    if lacks or isinstance(flow, type):
        what = f"the class {flow.__name__}" if isinstance(flow, type) else type(flow).__name__
        way = "make one of it" if isinstance(flow, type) else f"without {', '.join(lacks)}"
        raise ValueError(
            f"flow: expected an object with num_features, push and pull, got {what}; {way}"
        )


def _of_rows(
    name: str, found: tuple[Tensor, Tensor], shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """What a push or a pull gave, if it has the shapes of a flow."""
    try:
        shapes = [tuple(each.shape) for each in found]
    except (TypeError, AttributeError):
        shapes = [type(found)]  # type: ignore[list-item]
    if shapes != [shape, shape[:1]]:
        raise ValueError(
            f"flow.{name}: expected a value and a log-determinant of shapes {shape} and "
            f"{shape[:1]}, got {' and '.join(map(str, shapes))}"
        )
    return found


def _largest(error: Tensor) -> float:
    """The largest absolute error, infinite where one is not a number."""
    return float(error.detach().abs().nan_to_num(nan=math.inf).max())


def _log_det_error(flow: Invertible, noise: Tensor, contexts: Tensor | None) -> float:
    errors = []
    for s, one in enumerate(noise):
        given = None if contexts is None else contexts[s]
        with torch.enable_grad():
            jacobian = torch.autograd.functional.jacobian(
                lambda x, given=given: flow.push(x, given)[0], one
            )
            log_det = flow.push(one, given)[1]
        errors.append(torch.linalg.slogdet(jacobian.double())[1] - log_det.detach().double())
    return _largest(torch.stack(errors))


def _log_weights(
    flow: Invertible, value: Tensor, contexts: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Log importance weights (S,) of a Student-t laid over the flow's own draws."""
    num_samples, num_features = value.shape
    if not value.isfinite().all():
        return torch.full((num_samples,), math.nan)
    center = value.median(0).values
    scatter = torch.cov((value - center).double().T).reshape(num_features, num_features)
    tril = torch.linalg.cholesky(scatter + 1e-12 * scatter.diagonal().mean() * _eye(scatter))
    draw = partial(torch.randn, generator=generator, device=value.device, dtype=torch.float64)
    squares = draw((num_samples, int(_FREEDOM))).square().sum(-1)
    standard = draw((num_samples, num_features)) / (squares / _FREEDOM).sqrt().unsqueeze(-1)
    points = (center + standard @ tril.T).to(value)
    back, log_det = flow.pull(points, contexts)
    log_q = (standard_normal_log_prob(back) + log_det).double()
    half = (_FREEDOM + num_features) / 2
    constant = math.lgamma(half) - math.lgamma(_FREEDOM / 2)
    constant -= num_features / 2 * math.log(_FREEDOM * math.pi)
    tail = torch.log1p(standard.square().sum(-1) / _FREEDOM)
    log_proposal = constant - half * tail - tril.diagonal().log().sum()
    return log_q - log_proposal


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)
