r"""The no-U-turn sampler, for a reference: slower than a fit, and right in the limit.

A chain moves u on the real line by Hamiltonian dynamics of the density

.. math:: \ell(u) = \log p(x, T(u)) + \log |T'(u)|,

as far as it does not turn back; its step and the scales of u are found in a warm-up. Where JAX and
blackjax are installed the density is written down once, compared with the pair, and a whole chain
is one compiled program; elsewhere Pyro's own sampler runs.

Letters: C chains, S draws of each, L latent numbers.

References:
    | The no-U-turn sampler (Hoffman and Gelman, 2014)
    | A conceptual introduction to Hamiltonian Monte Carlo (Betancourt, 2017)
    | Stan reference manual, section on automatic parameter tuning (Stan Development Team, 2024)
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from latentlab.data.checks import as_count, as_seed
from latentlab.guides import Guide, MeanField
from latentlab.inference.chains import Chains
from latentlab.inference.check import prepare
from latentlab.inference.density import TracedDensity, log_density, trace_density
from latentlab.inference.devices import CPU
from latentlab.inference.pair import Pair
from latentlab.inference.program import UntraceableError
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.settings import expect_one_of
from latentlab.inference.starts import Starts

__all__ = ["nuts"]

Backend = Literal["auto", "pyro", "xla"]

_log = logging.getLogger("latentlab")

_DEEPEST = 10  # doublings of a trajectory
_COMPARED = 3  # places at which the density that was written down is compared
_KEPT = 16  # compiled chains
_TOLD = ("diverging", "n_steps", "acceptance_rate", "energy")  # by ArviZ's names

Array = Any


class _Draws(NamedTuple):
    """Of one chain: points (S, L), and for each draw how it came about, (S,)."""

    points: Tensor
    told: dict[str, Tensor]


@dataclass(frozen=True)
class _Plan:
    num_warmup: int
    num_samples: int
    target_accept: float


def nuts(
    model: Callable,
    data: Any = None,  # noqa: ANN401
    *,
    num_samples: int = 1000,
    num_warmup: int = 1000,
    num_chains: int = 4,
    target_accept: float = 0.9,
    seed: int = 0,
    backend: Backend = "auto",
) -> Chains:
    r"""Draw from the posterior of a model by the no-U-turn sampler.

    The reference to hold a fit against: ``posterior.compare_draws(ll.nuts(model, data))``.
    Discrete latents that the model marks for enumeration are summed out. The model reckons in
    the precision of the data: give large data in double precision, since the sampler looks at
    differences of the log density.

    Arguments:
        model: as for :func:`latentlab.fit`; all its unknowns have priors.
        data: as for :func:`latentlab.fit`.
        num_samples: draws S that each chain keeps.
        num_warmup: steps before, in which step size and scales are found.
        num_chains: number of chains C, each from a start of its own; as many at a time as there
            are processors.
        target_accept: mean acceptance that the step size is to reach; nearer to 1, smaller steps
            and fewer divergences.
        seed: same seed, same machine, same backend: same draws.
        backend: ``"xla"`` (JAX and blackjax), ``"pyro"``, or ``"auto"``: the first, where it
            can.

    Returns:
        The draws, with :meth:`Chains.check` to say whether to believe them.

    Raises:
        ValueError: for a model that cannot be sampled, or settings out of range.

    Example:
        >>> import pyro, torch, latentlab as ll, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with ll.rows(x):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> chains = ll.nuts(model, torch.arange(5.0), num_samples=200, num_warmup=200)
        >>> chains.draws["loc"].shape                              # chain, draw
        torch.Size([4, 200])
    """
    expect_one_of(get_args(Backend), backend, "backend")
    if not isinstance(target_accept, int | float) or not 0.5 <= target_accept < 1:
        raise ValueError(f"target_accept: expected a number in [0.5, 1), got {target_accept!r}")
    plan = _Plan(
        as_count(num_warmup, "num_warmup", minimum=20),
        as_count(num_samples, "num_samples", minimum=4),
        float(target_accept),
    )
    num_chains, seed = as_count(num_chains, "num_chains"), as_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        return _sampled(model, data, plan, num_chains, seed, backend)


def _sampled(
    model: Callable,
    data: Any,  # noqa: ANN401
    plan: _Plan,
    num_chains: int,
    seed: int,
    backend: Backend,
) -> Chains:
    begin = time.perf_counter()
    guide = MeanField()  # never fitted: it lays the latents out on the real line
    pair, report = prepare(model, data, guide)
    report.expect_ok("the model cannot be sampled")
    for fault in report.faults:
        warnings.warn(str(fault), stacklevel=4)
    _expect_priors(pair)
    with pair.entered(stream(seed, "nuts")):
        own: Any = pair.guide
        starts = Starts(pair, seed)
        points = torch.stack([starts.point(chain) for chain in range(num_chains)])
        used, why, traced = "pyro", "", None
        if backend != "pyro":
            traced, why = _traced(pair, own, points)
            if traced is None and backend == "xla":
                raise ValueError(f'backend: "xla" cannot run this model: {why}')
        if traced is not None:
            used = "xla"
            found = _by_blackjax(traced, points, plan, seed)
        else:
            found = [
                _by_pyro(pair, own, point, plan, stream(seed, "chain", chain))
                for chain, point in enumerate(points)
            ]
        draws = _as_sites(own, torch.stack([each.points for each in found]))
    seconds = time.perf_counter() - begin
    _log.info("drew %d chains in %.1f s", num_chains, seconds)
    return Chains(
        pair=pair,
        seed=seed,
        draws={site: value.cpu() for site, value in draws.items()},  # where figures are made
        told={
            name: torch.stack([each.told[name] for each in found]).cpu() for name in found[0].told
        },
        backend=f"{used}: {why}" if why and backend == "auto" else used,
        seconds=seconds,
    )


def _expect_priors(pair: Pair) -> None:
    """Refuse a model without unknowns, or with some that have no prior."""
    if not pair.latents:
        raise ValueError("model: it has no continuous latents to draw; fit() may be what you need")
    learned = [name for name, value in pair.store["params"].items() if value.requires_grad]
    if learned:
        shown = ", ".join(map(repr, learned[:3])) + (", ..." if len(learned) > 3 else "")
        raise ValueError(
            f"model: its parameters {shown} are optimised, not drawn; give them priors "
            "(pyro.sample), or fit() it"
        )


def _as_sites(guide: Guide, points: Tensor) -> dict[str, Tensor]:
    """Values of the sites, each (C, S, ...), at points (C, S, L)."""
    with torch.no_grad():
        values, _ = guide.unpack(points.flatten(0, 1))
    return {z.name: values[z.name].reshape(*points.shape[:2], *z.shape) for z in guide.latents}


# ---- by JAX -------------------------------------------------------------------------------------


def _traced(pair: Pair, guide: Guide, points: Tensor) -> tuple[TracedDensity | None, str]:
    """The density as a program, or why there is none."""
    if pair.device != CPU:
        return None, f"it is on {pair.device}, and XLA runs on the CPU here"
    missing = [name for name in ("jax", "blackjax") if importlib.util.find_spec(name) is None]
    if missing:
        return None, f"{' and '.join(missing)} not installed: pip install 'latentlab[xla]'"
    try:
        return trace_density(pair, guide, points[:_COMPARED]), ""
    except (UntraceableError, NotImplementedError) as error:
        return None, str(error)


def _by_blackjax(density: TracedDensity, points: Tensor, plan: _Plan, seed: int) -> list[_Draws]:
    """All chains, by one compiled program, as many at a time as there are processors."""
    import jax

    from latentlab.inference.xla import to_jax

    def run(chain: int) -> _Draws:
        # JAX's precision is a setting of each thread.
        with jax.enable_x64(True):
            key = jax.random.PRNGKey(stream(seed, "chain", chain) % 2**32)
            start = to_jax([points[chain].double()])
            out = jax.block_until_ready(chain_of(key, *start, *to_jax(density.program.constants)))
            path, *told = (torch.tensor(array.__array__().copy()) for array in out)
            return _Draws(path.to(points), dict(zip(_TOLD, told, strict=True)))

    chain_of = _compiled(density, plan)
    first = run(0)  # compiles
    with ThreadPoolExecutor(max(1, min(len(points), os.cpu_count() or 1))) as pool:
        return [first, *pool.map(run, range(1, len(points)))]


_chains: dict[Any, Callable] = {}


def _compiled(density: TracedDensity, plan: _Plan) -> Callable:
    """A chain of a density, compiled once for each program; JAX adds the shapes."""
    key = (density.program.code, plan)
    if key not in _chains:
        while len(_chains) >= _KEPT:
            _chains.pop(next(iter(_chains)))
        _chains[key] = _built(density, plan)
    return _chains[key]


def _built(density: TracedDensity, plan: _Plan) -> Callable:
    import jax

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what blackjax itself imports
        import blackjax

    def chain(key: Array, start: Array, *constants: Array) -> tuple[Array, ...]:
        def log_density(u: Array) -> Array:
            return density.function(u, *constants)

        first, second = jax.random.split(key)
        warm_up = blackjax.window_adaptation(
            blackjax.nuts, log_density, target_acceptance_rate=plan.target_accept
        )
        (state, found), _ = warm_up.run(first, start, num_steps=plan.num_warmup)
        kernel = blackjax.nuts(log_density, **found).step

        def step(state: Array, key: Array) -> Array:
            state, info = kernel(key, state)
            told = (info.is_divergent, info.num_integration_steps)
            return state, (state.position, *told, info.acceptance_rate, info.energy)

        return jax.lax.scan(step, state, jax.random.split(second, plan.num_samples))[1]

    return jax.jit(chain)


# ---- by Pyro ------------------------------------------------------------------------------------


def _by_pyro(pair: Pair, guide: Guide, point: Tensor, plan: _Plan, seed: int) -> _Draws:
    """A chain of Pyro's sampler on the same density."""
    from pyro.infer import MCMC
    from pyro.infer import NUTS as Kernel

    manual_seed(seed)

    def potential(values: dict[str, Tensor]) -> Tensor:
        return -log_density(pair, guide, values["u"][None])[0]

    sampler = MCMC(
        Kernel(potential_fn=potential, target_accept_prob=plan.target_accept),
        num_samples=plan.num_samples,
        warmup_steps=plan.num_warmup,
        initial_params={"u": point.clone()},
        disable_progbar=True,
    )
    sampler.run()
    drawn = sampler.get_samples()["u"]
    diverging = torch.zeros(len(drawn), dtype=torch.bool)
    diverging[list(sampler.diagnostics()["divergences"]["chain 0"])] = True
    return _Draws(drawn, {"diverging": diverging})
