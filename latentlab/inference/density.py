r"""The log joint density of a pair on the real line, the guide left out.

.. math:: \ell(u) = \log p(x, T(u)) + \log |T'(u)|

The latents are laid out as a guide of ours lays them out; the density is that of u, as samplers
and modes need it.

Letters: L latent numbers, P points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latentlab.guides import Draws, Guide
from latentlab.inference import objectives
from latentlab.inference.pair import Pair, copy_pair
from latentlab.inference.program import Program, UntraceableError, record_function

__all__ = ["TracedDensity", "log_density", "trace_density"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def log_density(pair: Pair, guide: Guide, u: Tensor) -> Tensor:
    """Log joint density (P,) in nats at points u (P, L) of the real line.

    For a point guide it is that of the latents themselves: a mode depends on no Jacobian then.

    Arguments:
        pair: the pair, entered.
        guide: one of ours, which lays out the latents.
        u: the points.
    """
    values, log_det = guide.unpack(u)
    joint = objectives.log_joint(pair, Draws(values, u.new_zeros(len(u))))
    if pair.is_point():
        return joint
    stretch = [part.reshape(len(u), -1).sum(-1) for part in log_det.values()]
    return joint + sum(stretch, u.new_zeros(()))


@dataclass(frozen=True)
class TracedDensity:
    """The density of :func:`log_density` at one point, as a function of JAX arrays.

    Arguments:
        program: what it does.
        function: from u (L,) and the constants of the program to a number.
    """

    program: Program
    function: Callable


def trace_density(pair: Pair, guide: Guide, points: Tensor) -> TracedDensity:
    """Write the density down once, for JAX, and compare it with the pair.

    Arguments:
        pair: the pair, entered.
        guide: one of ours, which lays out the latents.
        points: where it is compared, in value and slope, shape (P, L).

    Raises:
        UntraceableError: if the pair reads values, holds an operation without a lowering, or if
            the two do not agree; the message says which.
    """
    import jax

    from latentlab.inference.xla import read, to_jax

    # What a model remembers of a run would be tensors of the record: a copy is run, and dropped.
    copied = replace(pair, model=copy_pair(pair.model, pair.guide)[0])

    def run(u: Tensor) -> tuple[Tensor, ...]:
        return (log_density(copied, guide, u[None])[0],)

    program = record_function(run, points[0])
    graph = read(program)

    single = points.dtype == torch.float32

    def function(u: Any, *constants: object) -> object:  # noqa: ANN401
        # A sampler walks in double precision, whatever the model reckons in.
        value = graph(u.astype("float32") if single else u, *constants)[0]
        return value.astype(u.dtype)

    compared, slope_of = 0, jax.jit(jax.value_and_grad(function))
    with jax.enable_x64(True):
        constants = to_jax(program.constants)
        for point in points:
            at = point.detach().clone().requires_grad_()
            value = log_density(pair, guide, at[None])[0]
            truth = torch.stack([value, *torch.autograd.grad(value, at)[0]]).detach()
            if not truth.isfinite().all():
                continue
            found, slope = slope_of(*to_jax([point]), *constants)
            error = (truth.new_tensor([float(found), *slope.tolist()]) - truth).abs().max()
            off = float(error / truth.abs().max().clamp_min(1.0))
            if not off <= _TOLERANCE[points.dtype]:
                raise UntraceableError(f"its density differs by {off:.0e} from that of the pair")
            compared += 1
    if not compared:
        raise UntraceableError("its density is finite at none of the places that were compared")
    return TracedDensity(program, function)
