r"""A step of a fit as a graph: the pair is run once, and what it did to tensors is written down.

.. math:: f(\phi, x, \varepsilon) \to -\mathrm{ELBO}

A pure function of everything that may change from step to step: what moves (parameters and the
frame of a guide), the data, and the noise, which is an explicit tape of standard draws. The graph
holds some hundred operations of torch, in order, and no Python; whatever the pair decided while it
ran is decided for good. Hence :func:`verify`: the graph and the pair are given the same noise, at
several places, and have to agree. The weight of the KL, where it changes from step to step, is on
the tape, too.

References:
    | torch.fx: practical program capture and transformation for deep learning (Reed et al., 2022)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from latentlab.guides import Guide
from latentlab.inference.pair import Arguments, Pair, copy_pair
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.training import kl_weight, objective
from latentlab.protocols import Anneals, owner_of

__all__ = ["Noise", "Program", "UntraceableError", "moving", "record", "record_function", "verify"]

_MOST_OPERATIONS = 6000  # of a graph; a longer one is a loop that was unrolled
_TAPES = 3
_LONG = 10_000  # rows, beyond which a sum over them is rounded by more than the tolerance
_STEPS_APART = 100  # at which a pair that anneals is compared
_SHAKEN = 0.05  # by which parameters are moved for a comparison
_ROUNDING = 8  # times what the last digits of parameters and data make, for those of all else
_MOST_ROUNDING = 100  # times the tolerance, whatever they make
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}

aten: Any = torch.ops.aten


class UntraceableError(Exception):
    """A pair cannot be written down as a graph; the message says why."""


class Noise(NamedTuple):
    """What a step finds on its tape: its kind, shape and dtype.

    Standard draws of one operation, ``"normal"`` or ``"uniform"``, or the ``"weight"`` of the KL.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Program:
    """The loss of a step as a pure function of tensors.

    Arguments:
        graph: from what moves, data, constants and noise, in this order, to the loss and the ELBO.
        names: of what moves, parameters first.
        num_learned: how many of these are parameters; the others are the frame of a guide.
        constants: tensors that the pair made or holds, and that stay as they are.
        noise: what the tape has to hold, the weight of the KL first.
    """

    graph: fx.GraphModule
    names: tuple[str, ...]
    num_learned: int
    constants: tuple[Tensor, ...]
    noise: tuple[Noise, ...]

    def __call__(
        self, state: Sequence[Tensor], data: Sequence[Tensor], noise: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Loss and ELBO, with the gradient of torch."""
        return self.graph(*state, *data, *self.constants, *noise)

    def draw(self, generator: torch.Generator, weights: Sequence[float]) -> list[Tensor]:
        """Tapes for n steps, each (n, ...).

        Arguments:
            generator: of the noise.
            weights: of the KL in each of the steps.
        """
        makers: dict[str, Callable] = {"normal": torch.randn, "uniform": torch.rand}
        return [
            torch.tensor(weights, dtype=noise.dtype)
            if noise.kind == "weight"
            else makers[noise.kind](
                len(weights), *noise.shape, dtype=noise.dtype, generator=generator
            )
            for noise in self.noise
        ]

    @property
    def anneals(self) -> bool:
        """Whether a weight of the KL is on the tape."""
        return any(each.kind == "weight" for each in self.noise)

    @cached_property
    def code(self) -> str:
        """All that the graph does, as text: equal for equal graphs."""
        return str(self.graph.graph)


def moving(pair: Pair) -> dict[str, Tensor]:
    """Parameters by name, then the frame of a guide of ours."""
    found = pair.parameters()
    if isinstance(pair.guide, Guide):
        own = {f"frame.{k}": v for k, v in pair.guide.named_buffers()}
        return found | own
    return found


def inputs(data: Arguments) -> list[Tensor]:
    """The tensors of the data of a step, in order; the rows of a mini-batch are the last."""
    return data.tensors() + ([] if data.rows is None else [data.rows])


def record(pair: Pair, num_particles: int, data: Arguments, step: int = 0) -> Program:
    """Run a pair, and write down what it does.

    Arguments:
        pair: the pair, entered, its networks in the mode of a step.
        num_particles: draws per step P.
        data: the data of a step; those of others may have other values.
        step: its number.

    Raises:
        UntraceableError: if the pair reads values, draws noise of an unknown kind, or is too long.
    """
    programs = [_record(pair, num_particles, data, step, seed) for seed in (1, 2)]
    first, second = programs
    same = first.code == second.code and all(
        torch.equal(a, b) or bool((a.isnan() & b.isnan() | (a == b)).all())
        for a, b in zip(first.constants, second.constants, strict=True)
    )
    if not same:
        raise UntraceableError("it does not do the same twice: it draws numbers beside torch")
    return first


def _record(pair: Pair, num_particles: int, data: Arguments, step: int, seed: int) -> Program:
    # What a pair remembers of a run would be tensors of the record: a copy is run, and dropped.
    state = moving(pair)
    model, guide = copy_pair(pair.model, pair.guide, shared=state.values())
    pair = replace(pair, model=model, guide=guide)

    # That one weight is not that of another step is known to models that anneal only.
    anneals = isinstance(owner_of(pair.model), Anneals)
    weight = [torch.tensor(kl_weight(pair, step), dtype=pair.dtype)] * anneals

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(tensors)
        batch = data.map(lambda _: next(rest))
        if data.rows is not None:
            batch = Arguments(batch.args, batch.kwargs, batch.names, next(rest))
        with torch.enable_grad():  # a guide may follow slopes of its own
            return objective(pair, num_particles, batch, step, next(rest, None))[:2]

    graph = _written(run, [*inputs(data), *weight], seed)
    return _made_explicit(graph, state, len(pair.parameters()), weight)


def record_function(run: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> Program:
    """Run a function of tensors, and write down what it does: a program of no state.

    Arguments:
        run: from tensors to some tensors; it must not draw.
        given: what it is run at.

    Raises:
        UntraceableError: if it reads values, draws, or is too long.
    """
    program = _made_explicit(_written(run, given, seed=1), {}, 0, [])
    if program.noise:
        raise UntraceableError("it draws")
    return program


def _written(run: Callable, given: Sequence[Tensor], seed: int) -> fx.GraphModule:
    """What a function does at some tensors, without side effects."""
    from torch.fx.experimental.proxy_tensor import make_fx

    kept = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    manual_seed(seed)
    try:
        pure = torch.func.functionalize(run)
        graph = make_fx(pure, tracing_mode="real", _allow_non_fake_inputs=True)(*given)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise UntraceableError(f"{type(error).__name__}: {first_line}") from error
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
    count = sum(node.op == "call_function" for node in graph.graph.nodes)
    if count > _MOST_OPERATIONS:
        raise UntraceableError(f"it takes {count} operations, of which a loop makes the most")
    return graph


def _made_explicit(
    graph: fx.GraphModule, state: dict[str, Tensor], num_learned: int, weight: Sequence[Tensor]
) -> Program:
    """Every tensor from outside, and all noise, becomes an argument of the graph."""
    nodes = graph.graph
    first = next(iter(nodes.nodes))
    with nodes.inserting_before(first):
        tensors = enumerate(state.values())
        places = {id(tensor): nodes.placeholder(f"state_{k}") for k, tensor in tensors}
    last = [node for node in nodes.nodes if node.op == "placeholder"][-1]
    given = last
    constants: dict[int, tuple[Tensor, fx.Node]] = {}
    for node in [node for node in nodes.nodes if node.op == "get_attr"]:
        tensor = getattr(graph, str(node.target))
        found = places.get(id(tensor))
        if found is None:
            if id(tensor) not in constants:
                with nodes.inserting_after(last):
                    last = nodes.placeholder(f"constant_{len(constants)}")
                constants[id(tensor)] = (tensor.detach(), last)
            found = constants[id(tensor)][1]
        node.replace_all_uses_with(found)
        nodes.erase_node(node)
    noise = [Noise("weight", (), each.dtype) for each in weight]
    if weight:  # from the end of the data to the head of the tape
        with nodes.inserting_after(last):
            last = nodes.placeholder("weight")
        given.replace_all_uses_with(last)
        nodes.erase_node(given)
    for node in [node for node in nodes.nodes if _is_random(node)]:
        shape, dtype = _made(node)
        kind, write = _standard(node)
        with nodes.inserting_after(last):
            last = nodes.placeholder(f"noise_{len(noise)}")
        noise.append(Noise(kind, shape, dtype))
        with nodes.inserting_before(node):
            node.replace_all_uses_with(write(nodes, last))
        nodes.erase_node(node)
    nodes.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    nodes.lint()
    graph.recompile()
    fixed = tuple(tensor for tensor, _ in constants.values())
    return Program(graph, tuple(state), num_learned, fixed, tuple(noise))


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _made(node: fx.Node) -> tuple[tuple[int, ...], torch.dtype]:
    meta = node.meta.get("tensor_meta") or node.meta["val"]
    return tuple(meta.shape), meta.dtype


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:  # noqa: ANN401
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _standard(node: fx.Node) -> tuple[str, Callable[[fx.Graph, fx.Node], fx.Node]]:
    """The kind of noise of a random operation, and how to make its draws of standard ones."""
    target = node.target

    def as_it_is(_: fx.Graph, z: fx.Node) -> fx.Node:
        return z

    def scaled(center: Any, unit: Any) -> Callable[[fx.Graph, fx.Node], fx.Node]:  # noqa: ANN401
        def write(graph: fx.Graph, z: fx.Node) -> fx.Node:
            times = aten.mul.Tensor if isinstance(unit, fx.Node) else aten.mul.Scalar
            plus = aten.add.Tensor if isinstance(center, fx.Node) else aten.add.Scalar
            return graph.call_function(plus, (graph.call_function(times, (z, unit)), center))

        return write

    def exponential(graph: fx.Graph, u: fx.Node) -> fx.Node:
        rate = _argument(node, 1, "lambd", 1.0)
        log = graph.call_function(
            aten.log1p.default, (graph.call_function(aten.neg.default, (u,)),)
        )
        return graph.call_function(aten.div.Scalar, (log, -rate))

    def below(graph: fx.Graph, u: fx.Node) -> fx.Node:
        # A unit of dropout is there with probability p.
        found = graph.call_function(aten.lt.Scalar, (u, _argument(node, 1, "p", 0.5)))
        return graph.call_function(aten._to_copy.default, (found,), {"dtype": _made(node)[1]})

    if target in (aten.randn.default, aten.randn_like.default):
        return "normal", as_it_is
    if target in (aten.rand.default, aten.rand_like.default):
        return "uniform", as_it_is
    if target is aten.normal_functional.default:
        return "normal", scaled(_argument(node, 1, "mean", 0.0), _argument(node, 2, "std", 1.0))
    if target in (aten.normal.Tensor_Tensor, aten.normal.float_Tensor, aten.normal.Tensor_float):
        return "normal", scaled(_argument(node, 0, "mean", 0.0), _argument(node, 1, "std", 1.0))
    if target is aten.uniform.default:
        low, high = _argument(node, 1, "from", 0.0), _argument(node, 2, "to", 1.0)
        return "uniform", scaled(low, high - low)
    if target is aten.exponential.default:
        return "uniform", exponential
    if target is aten.bernoulli.p:
        return "uniform", below
    raise UntraceableError(f"it draws with {target}, which has no tape")


class _Tape(TorchDispatchMode):
    """Hand out given noise, in order, in the place of new draws."""

    def __init__(self, noise: Sequence[Tensor]) -> None:
        super().__init__()
        self.rest = iter(noise)

    def __torch_dispatch__(
        self,
        function: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return function(*args, **kwargs)
        z = next(self.rest)
        if function in (aten.normal_.default, aten.normal_functional.default):
            mean, sd = [*args[1:], 0.0, 1.0][:2] if len(args) != 2 else (args[1], 1.0)
            made = mean + sd * z
        elif function.overloadpacket is aten.normal:
            made = args[0] + args[1] * z
        elif function in (aten.uniform_.default, aten.uniform.default):
            low, high = [*args[1:], 0.0, 1.0][:2] if len(args) != 2 else (args[1], 1.0)
            made = low + (high - low) * z
        elif function in (aten.bernoulli_.float, aten.bernoulli.p):
            made = (z < (args[1] if len(args) > 1 else 0.5)).to(args[0].dtype)
        elif function in (aten.exponential_.default, aten.exponential.default):
            made = -torch.log1p(-z) / (args[1] if len(args) > 1 else 1.0)
        else:
            return z.clone()
        return args[0].copy_(made) if function._schema.is_mutable else made


Slope = Callable[[Sequence[Tensor], Arguments], tuple[float, Sequence[Tensor]]]


def verify(
    pair: Pair,
    program: Program,
    slope: Slope,
    num_particles: int,
    data: Sequence[Arguments],
    step: int = 0,
) -> None:
    """Compare a program with the pair itself, on the same noise, at several places.

    Arguments:
        pair: the pair, entered; its parameters are moved, and put back.
        program: the program.
        slope: what runs it: from noise and data to the ELBO and the gradient of the loss.
        num_particles: draws per step P.
        data: data of some steps.
        step: the number of the step that was recorded.

    Raises:
        UntraceableError: if they do not agree to 1e-5 in single precision, to 1e-9 in double, and
            beyond 10,000 rows to more by the root of their number;
            where large terms cancel, to some times what last digits of parameters and data make.
    """
    state, parameters = moving(pair), pair.parameters()
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    generator = torch.Generator().manual_seed(stream(0, "verify"))
    # Networks may be in single precision beside data in double.
    dtypes = {p.dtype for p in parameters.values()} | {noise.dtype for noise in program.noise}
    tolerance = max((_TOLERANCE.get(dtype, 1e-3) for dtype in dtypes), default=1e-9)
    longest = max((n for tensor in pair.data.tensors() for n in tensor.shape), default=1)
    tolerance *= max(1.0, longest / _LONG) ** 0.5  # as the rounding of a sum grows
    compared = 0
    try:
        for k in range(_TAPES):
            for name, p in parameters.items():
                shaken = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.data.copy_(before[name] + (k > 0) * _SHAKEN * shaken)
            at, batch = step + k * _STEPS_APART, data[k % len(data)]
            tape = [z[0] for z in program.draw(generator, [kl_weight(pair, at)])]
            noise = [
                z for z, what in zip(tape, program.noise, strict=True) if what.kind != "weight"
            ]

            def truth(batch: Arguments, noise: list[Tensor] = noise, at: int = at) -> list[Tensor]:
                with _Tape(noise):
                    loss, elbo = objective(pair, num_particles, batch, at)
                    slopes = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
                return [elbo.detach(), *_filled(slopes, [*parameters.values()])]

            expected = truth(batch)
            if not all(bool(x.isfinite().all()) for x in expected):
                continue
            loss, slopes = slope(tape, batch)
            errors = _errors(expected, [expected[0].new_tensor(loss), *slopes], tolerance)
            if not max(errors) <= tolerance:
                for p in parameters.values():
                    p.data.mul_(_last_digits(p, generator))
                nudged = batch.map(lambda x: x * _last_digits(x, generator, least=0))
                rounding = _errors(expected, truth(nudged), tolerance)
                _expect_small(errors, rounding, tolerance)
            compared += 1
    finally:
        for name, tensor in state.items():
            tensor.data.copy_(before[name])
    if not compared:
        raise UntraceableError("its loss is finite at none of the places where it was compared")


def _last_digits(x: Tensor, generator: torch.Generator, least: int = -1) -> Tensor | int:
    """Factors near one: codes and counts among data may grow (``least=0``), but not shrink."""
    if not x.is_floating_point():
        return 1
    sign = torch.randint(least, 2, x.shape, generator=generator)
    return 1 + sign * torch.finfo(x.dtype).eps


def _filled(slopes: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(p) if slope is None else slope
        for slope, p in zip(slopes, like, strict=True)
    ]


def _errors(
    expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float
) -> tuple[float, float]:
    """Of the ELBO and of its gradient, relative to their sizes."""
    elbo = float((found[0] - expected[0]).abs()) / max(1.0, abs(float(expected[0])))
    size = max((float(x.abs().max()) for x in expected[1:] if x.numel()), default=0.0)
    pairs = [(a, b) for a, b in zip(expected[1:], found[1:], strict=True) if a.numel()]
    worst = [float((a - b).abs().max()) for a, b in pairs]  # max() would pass by a NaN
    worst = [math.inf if math.isnan(error) else error for error in worst]
    # At an optimum terms of the size of the ELBO cancel, and leave their rounding.
    least = math.sqrt(tolerance) * max(1.0, abs(float(expected[0])))
    slope = max(worst, default=0.0) / max(size, least)
    return math.inf if math.isnan(elbo) else elbo, slope


def _expect_small(
    errors: tuple[float, float], rounding: tuple[float, float], tolerance: float
) -> None:
    for what, error, own in zip(("loss", "gradient"), errors, rounding, strict=True):
        if not error <= max(tolerance, min(_ROUNDING * own, _MOST_ROUNDING * tolerance)):
            raise UntraceableError(f"its {what} differs by {error:.0e} from that of the pair")
