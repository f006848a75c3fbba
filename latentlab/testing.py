"""The laws that every model/guide pair obeys, as functions for your own tests too.

Each law is a function of ``(model, data, guide)``. It returns a sentence with the figure it rests
on, or raises :class:`LawBrokenError` with one; a law that says nothing about a pair, such as the
one on mini-batches of a model that takes none, returns a sentence that starts with "does not
apply". In a test file:

.. code-block:: python

    @pytest.mark.parametrize("law", latentlab.testing.LAWS)
    def test_my_pair_obeys(law):
        law(model, data, guide)

The fits behind the laws are of a few steps: laws hold at every step, converged or not.
"""

from __future__ import annotations

import inspect
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from latentlab import models
from latentlab.guides import Draws, Guide
from latentlab.inference import objectives
from latentlab.inference.check import accepts_size, check_pair, prepare
from latentlab.inference.engine import fit
from latentlab.inference.pair import Arguments, Pair, latents_of, modules_of, plates_of
from latentlab.inference.posterior import Posterior
from latentlab.loading import load

__all__ = [
    "LAWS",
    "LawBrokenError",
    "a_batch_stands_for_all_rows",
    "a_loaded_posterior_is_the_saved_one",
    "a_prior_draw_has_the_shape_of_the_data",
    "a_seed_fixes_every_byte",
    "check_laws",
    "every_parameter_gets_a_gradient",
    "fit_leaves_no_trace",
]

_STEPS = 20  # of a fit whose end does not matter
_BATCHES = 4


class LawBrokenError(AssertionError):
    """A pair breaks a law; the message names the law, the site or parameter, and the figure."""


Law = Callable[..., str]


def a_prior_draw_has_the_shape_of_the_data(
    model: Callable,
    data: Any = None,  # noqa: ANN401
    guide: Any = "auto",  # noqa: ANN401
) -> str:
    """Called without its observations, the model draws new ones of the same shape.

    Observations are the arguments whose default is ``None``; ``size`` is the number of rows.

    Arguments:
        model: as for :func:`latentlab.fit`.
        data: likewise.
        guide: likewise.

    Returns:
        What was found.

    Raises:
        LawBrokenError: if a site is not drawn, or has another shape.
    """
    law = "a prior draw has the shape of the data"
    pair = _prepared(model, data, guide)
    bare = _without_observations(pair)
    if bare is None or not pair.observed:
        return "does not apply: no argument of the model has the default None"
    with torch.no_grad(), pair.entered(seed=0):
        try:
            trace = poutine.trace(pair.model).get_trace(*bare.args, **bare.kwargs)
        except Exception as error:
            raise LawBrokenError(f"{law}: without data the model raises {error!r}") from error
    for site in pair.observed:
        node: Any = trace.nodes.get(site)
        if node is None or node["is_observed"]:
            raise LawBrokenError(f"{law}: site {site!r} is not drawn when the model gets no data")
        if (drawn := tuple(node["value"].shape)) != pair.shapes[site]:
            raise LawBrokenError(
                f"{law}: site {site!r} has shape {pair.shapes[site]} in the data, but {drawn} in "
                "a prior draw; write model(x=None, size=None) with rows(x, size) around it"
            )
    return f"holds: shapes {', '.join(f'{s} {pair.shapes[s]}' for s in pair.observed)}"


def a_batch_stands_for_all_rows(
    model: Callable,
    data: Any = None,  # noqa: ANN401
    guide: Any = "auto",  # noqa: ANN401
) -> str:
    r"""The log-densities of mini-batches have those of all rows as their mean.

    Over a partition of the rows into equal batches the mean is exact, up to rounding:

    .. math:: \frac{1}{M} \sum_{m=1}^{M} \Big[ \log p(z)
              + \frac{N}{B} \sum_{n \in \mathrm{batch}_m} \log p(x_n \mid z) \Big] = \log p(x, z)

    Likewise for a guide of your own that takes ``size``.

    Arguments:
        model: as for :func:`latentlab.fit`.
        data: likewise.
        guide: likewise.

    Returns:
        What was found.

    Raises:
        LawBrokenError: if the means differ.
    """
    pair = _prepared(model, data, guide)
    tensors = pair.data.tensors()
    if not accepts_size(pair.model):
        return "does not apply: the model does not take size"
    if len({tuple(t.shape[:1]) for t in tensors}) != 1 or tensors[0].shape[:1].numel() < 2:
        return "does not apply: the data are not two rows or more"
    scores = {"model": objectives.log_joint}
    if not isinstance(pair.guide, Guide) and accepts_size(pair.guide):
        scores["guide"] = objectives.log_q
    with torch.no_grad(), pair.entered(seed=0):
        axes = _row_axes(pair)
        draws = objectives.draw(pair, 1)
        # Local latents have fewer rows in a batch: no shape is to be taken for granted.
        pair.shapes = {k: v for k, v in pair.shapes.items() if k not in axes}
        gaps = [_gap(pair, who, score, draws, axes) for who, score in scores.items()]
    return f"holds for the {' and the '.join(scores)}: largest gap {max(gaps):.1g} nats"


def every_parameter_gets_a_gradient(
    model: Callable,
    data: Any = None,  # noqa: ANN401
    guide: Any = "auto",  # noqa: ANN401
) -> str:
    """The loss depends on every parameter, its gradient is finite, and all of them are optimised.

    Arguments:
        model: as for :func:`latentlab.fit`.
        data: likewise.
        guide: likewise.

    Returns:
        What was found.

    Raises:
        LawBrokenError: if a parameter is unused or unknown to the fit, or its gradient not finite.
    """
    law = "every parameter gets a gradient"
    pair = _prepared(model, data, guide)
    loss, gradients = _gradients(pair)
    if not np.isfinite(loss):  # far from the data, where a fit would not begin
        pair = _fitted(model, data, guide).pair
        loss, gradients = _gradients(pair)
    for name, gradient in gradients.items():
        if gradient is None:
            raise LawBrokenError(f"{law}: the loss does not depend on {name!r}; use or remove it")
        if not torch.isfinite(gradient).all():
            raise LawBrokenError(f"{law}: that of {name!r} is not finite (loss {loss:.6g})")
    optimised = {p.data_ptr() for p in pair.parameters().values()}
    for module in (m for f in (pair.model, pair.guide) for m in modules_of(f)):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter.data_ptr() not in optimised:
                raise LawBrokenError(
                    f"{law}: parameter {name!r} of {type(module).__name__} is not optimised; "
                    "register it with pyro.module, make it a PyroModule, or freeze it with "
                    "requires_grad_(False)"
                )
    return f"holds: {len(gradients)} parameters, loss {loss:.6g} nats"


def a_loaded_posterior_is_the_saved_one(
    model: Callable,
    data: Any = None,  # noqa: ANN401
    guide: Any = "auto",  # noqa: ANN401
) -> str:
    """A posterior from disk has the same parameters, draws and weights, byte for byte.

    Arguments:
        model: as for :func:`latentlab.fit`.
        data: likewise.
        guide: likewise.

    Returns:
        What was found.

    Raises:
        LawBrokenError: if anything differs; the pair then keeps numbers outside of its parameters
            and buffers, where the file does not hold them.
    """
    saved = _fitted(model, data, guide)
    ours = type(model) is getattr(models, type(model).__name__, None)
    with tempfile.TemporaryDirectory() as folder:
        saved.save(folder)
        loaded = load(
            folder,
            model=None if ours else model,
            guide=None if isinstance(saved.guide, Guide) else guide,
            data=data,
        )
    return _equal("a loaded posterior is the saved one", _numbers(saved), _numbers(loaded))


def a_seed_fixes_every_byte(
    model: Callable,
    data: Any = None,  # noqa: ANN401
    guide: Any = "auto",  # noqa: ANN401
) -> str:
    """Two fits with one seed are equal byte for byte; a fit with another seed is not.

    Arguments:
        model: as for :func:`latentlab.fit`.
        data: likewise.
        guide: likewise.

    Returns:
        What was found.

    Raises:
        LawBrokenError: if the pair takes noise from elsewhere than torch, or seeds torch itself.
    """
    law = "a seed fixes every byte"
    one, again, other = (_fitted(model, data, guide, seed) for seed in (0, 0, 1))
    found = _equal(law, _numbers(one), _numbers(again))
    if one.pair.is_point():
        return found + "; a point has no noise, so that another seed may agree"
    numbers = _numbers(one)
    differ = _different(numbers, _numbers(other))
    # A guide that is exact from its start on has the same parameters under any seed.
    if "draws" not in differ:
        raise LawBrokenError(
            f"{law}: seeds 0 and 1 give the same draws; the pair must not seed torch"
        )
    return found + f"; another seed has other {', '.join(differ)}"


def fit_leaves_no_trace(
    model: Callable,
    data: Any = None,  # noqa: ANN401
    guide: Any = "auto",  # noqa: ANN401
) -> str:
    """Neither ``fit`` nor its posterior changes its arguments or the state of the process.

    Compared are the model, the data and the guide with the tensors they refer to, Pyro's
    parameter store and settings, all three random generators, and torch's default dtype, number
    of threads and gradient mode.

    Arguments:
        model: as for :func:`latentlab.fit`.
        data: likewise.
        guide: likewise.

    Returns:
        What was found.

    Raises:
        LawBrokenError: if anything was changed.
    """

    def state() -> dict[str, Any]:
        arguments = {"model": model, "data": data, "guide": guide}
        return {k: _frozen(v, set()) for k, v in arguments.items()} | _process()

    with pyro.get_param_store().scope({"params": {}, "constraints": {}}):
        pyro.param("a parameter of somebody else", torch.ones(()))
        before = state()
        posterior = _fitted(model, data, guide)
        posterior.sample(3)
        posterior.log_weights(3)
        posterior.predict(3)
        changed = _different(before, state())
    if changed:
        raise LawBrokenError(f"fit leaves no trace: it changed {', '.join(changed)}")
    return f"holds for all of {len(before)}: {', '.join(before)}"


LAWS: tuple[Law, ...] = (
    a_prior_draw_has_the_shape_of_the_data,
    a_batch_stands_for_all_rows,
    every_parameter_gets_a_gradient,
    a_loaded_posterior_is_the_saved_one,
    a_seed_fixes_every_byte,
    fit_leaves_no_trace,
)


def check_laws(
    model: Callable,
    data: Any = None,  # noqa: ANN401
    guide: Any = "auto",  # noqa: ANN401
    laws: Sequence[Law] = LAWS,
) -> dict[str, str]:
    """Check a pair against all laws.

    Arguments:
        model: as for :func:`latentlab.fit`.
        data: likewise.
        guide: likewise.
        laws: those to check.

    Returns:
        Name of the law -> what was found.

    Raises:
        ValueError: if the pair cannot be fitted at all.
        LawBrokenError: with a line for each law that is broken.

    Example:
        >>> import latentlab as ll
        >>> x = ll.data.simulate.eruptions(num_rows=20)
        >>> found = check_laws(ll.GaussianMixture(num_features=2, num_components=2), x)
        >>> found["a_prior_draw_has_the_shape_of_the_data"]
        'holds: shapes x (20, 2)'
    """
    found, broken = {}, []
    for law in laws:
        try:
            found[law.__name__] = law(model, data, guide)
        except LawBrokenError as error:
            broken.append(str(error))
    if broken:
        raise LawBrokenError("\n".join(broken))
    return found


# ---- pairs and fits -------------------------------------------------------------------------


def _prepared(model: Callable, data: Any, guide: Any) -> Pair:  # noqa: ANN401
    pair, report = prepare(model, data, guide)
    if not report.ok:
        raise ValueError(str(check_pair(model, data, guide)))
    return pair


def _fitted(model: Callable, data: Any, guide: Any, seed: int = 0) -> Posterior:  # noqa: ANN401
    return fit(model, data, guide, num_restarts=1, max_steps=_STEPS, seed=seed, progress=False)


def _without_observations(pair: Pair) -> Arguments | None:
    """The arguments of a draw from the prior; ``None`` where the model has no such call."""
    function = pair.model.forward if isinstance(pair.model, nn.Module) else pair.model
    bound = inspect.signature(function).bind(*pair.data.args, **pair.data.kwargs)
    optional = [
        name
        for name, parameter in bound.signature.parameters.items()
        if parameter.default is None and name in bound.arguments
    ]
    if not optional:
        return None
    rows = [v for v in bound.arguments.values() if isinstance(v, Tensor) and v.dim()]
    bound.arguments |= dict.fromkeys(optional)
    if rows and accepts_size(pair.model):
        bound.arguments["size"] = len(rows[0])
    return Arguments(bound.args, bound.kwargs)


def _row_axes(pair: Pair) -> dict[str, int]:
    """The axis of each local site that runs over the rows, from the right."""
    plate, axes = pair.local_plate(), {}
    for function in (pair.model, pair.guide):
        trace = poutine.trace(function).get_trace(*pair.data.args, **pair.data.kwargs)
        for site, node in latents_of(trace).items():
            for name, _, dim in plates_of(node):
                if name == plate:
                    axes[site] = dim - node["fn"].event_dim
    return axes


def _gap(
    pair: Pair, who: str, score: Callable[..., Tensor], draws: Draws, axes: Mapping[str, int]
) -> float:
    """Difference between the mean over equal batches and the whole."""
    num_rows = len(pair.data.tensors()[0])
    batch_size = max(1, num_rows // _BATCHES)
    whole = batch_size * (num_rows // batch_size)

    def at(rows: slice, **size: int) -> float:
        data = pair.data.map(lambda t: t[rows])
        data = replace(data, kwargs={**data.kwargs, **size})
        values = {k: _rows_of(v, axes.get(k), rows) for k, v in draws.values.items()}
        return float(score(pair, Draws(values, draws.log_q), data))

    expected = at(slice(whole))
    starts = range(0, whole, batch_size)
    parts = [at(slice(start, start + batch_size), size=whole) for start in starts]
    gap = abs(float(np.mean(parts)) - expected)
    if not gap <= 1e4 * torch.finfo(pair.dtype).eps * (1 + np.abs(parts).max()):
        raise LawBrokenError(
            f"a batch stands for all rows: the {who}'s log-density of {whole} rows is "
            f"{expected:.6g}, but the mean over {len(parts)} batches is {np.mean(parts):.6g}; "
            "put what belongs to the rows, and only that, in rows(x, size)"
        )
    return gap


def _rows_of(value: Tensor, axis: int | None, rows: slice) -> Tensor:
    if axis is None:
        return value
    return value.movedim(axis, 0)[rows].movedim(0, axis)


def _gradients(pair: Pair) -> tuple[float, dict[str, Tensor | None]]:
    """The loss and its gradient by parameter, ``None`` where it does not depend on one."""
    with torch.enable_grad(), pair.entered(seed=0):
        draws = objectives.draw(pair, 1 if pair.is_point() else 4)
        loss = (draws.log_q - objectives.log_joint(pair, draws)).mean()
        names, parameters = zip(*pair.parameters().items(), strict=True)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return float(loss.detach()), dict(zip(names, found, strict=True))


# ---- what is compared -----------------------------------------------------------------------


def _numbers(posterior: Posterior) -> dict[str, Any]:
    """All numbers of a posterior as bytes, by a name for messages."""
    return {
        "parameters": _frozen(posterior.params, set()),
        "draws": _frozen(posterior.sample(5), set()),
        "weights": _frozen(posterior.log_weights(5), set()),
    }


def _different(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name, value in one.items() if value != other[name]]


def _equal(law: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if different := _different(one, other):
        raise LawBrokenError(f"{law}: {', '.join(different)} differ")
    return f"holds: {', '.join(one)} are equal byte for byte"


def _process() -> dict[str, Any]:
    """State of the process that a fit might touch, by a name for messages."""
    return {
        "Pyro's parameter store": _frozen(dict(pyro.get_param_store().get_state()), set()),
        "Pyro's settings": pyro.settings.get(),
        "torch's random generator": torch.get_rng_state().tolist(),
        "NumPy's random generator": _frozen(np.random.get_state(), set()),
        "Python's random generator": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "the gradient mode": torch.is_grad_enabled(),
    }


def _frozen(value: Any, seen: set[int]) -> Any:  # noqa: ANN401
    """A value and all it refers to, as plain data that can be compared."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return str(value.dtype), tuple(value.shape), raw.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, int | float | str | bytes | None | torch.dtype):
        return repr(value)  # NaN does not equal itself, its text does
    if id(value) in seen or isinstance(value, type | ModuleType):
        return type(value).__name__
    seen.add(id(value))
    return [(str(key), _frozen(part, seen)) for key, part in _parts(value)]


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401
    """What a value refers to: items, attributes, or the variables of a function."""
    if isinstance(value, Mapping):
        yield from sorted(value.items(), key=lambda item: str(item[0]))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from enumerate(value)
    elif inspect.ismethod(value):
        yield "owner", value.__self__
    elif isinstance(value, FunctionType):
        variables = inspect.getclosurevars(value)
        yield from (*variables.nonlocals.items(), *variables.globals.items())
    else:
        yield from getattr(value, "__dict__", {}).items()
