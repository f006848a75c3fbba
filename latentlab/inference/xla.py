r"""Many steps in one call: a recorded program, compiled by XLA, where JAX is installed.

.. math::
    m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
    v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
    \phi \leftarrow \phi - \rho_t \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

Adam as torch takes it, the noise given, the rows of mini-batches taken from data that stay where
they are. Between calls the parameters are those of the pair.

Letters: n steps of a call.

Reference:
    | Adam: a method for stochastic optimization (Kingma and Ba, 2015)
"""

from __future__ import annotations

import functools
import importlib.util
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from latentlab.inference.lowerings import lowerings
from latentlab.inference.program import Program, UntraceableError

__all__ = ["BETAS", "Steps", "adam", "has_jax", "read", "to_jax", "to_torch"]

BETAS = (0.9, 0.999)
_KEPT = 64  # compiled programs

Array = Any


@functools.cache
def has_jax() -> bool:
    """Whether JAX is installed; it is imported then, which draws from Python's own generators."""
    if importlib.util.find_spec("jax") is None:
        return False
    kept = random.getstate(), np.random.get_state()
    try:
        importlib.import_module("jax")
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
    return True


def read(program: Program) -> Callable:
    """A graph as a function of JAX arrays.

    Raises:
        UntraceableError: if it holds an operation that has no lowering.
    """
    table = lowerings()
    nodes = list(program.graph.graph.nodes)
    steps: list[tuple[fx.Node, Callable]] = []
    for node in nodes:
        if node.op != "call_function":
            continue
        name = str(node.target).removeprefix("aten.")
        if name == "<built-in function getitem>":
            steps.append((node, lambda x, k: x[k]))
        elif name in table:
            steps.append((node, table[name]))
        else:
            raise UntraceableError(f"the operation {node.target} has no lowering")
    places = [node for node in nodes if node.op == "placeholder"]
    (last,) = [node for node in nodes if node.op == "output"]

    def run(*arrays: Array) -> Any:  # noqa: ANN401
        known = dict(zip(places, arrays, strict=True))

        def value(x: Any) -> Any:  # noqa: ANN401
            return fx.map_arg(x, lambda node: known[node])

        for node, function in steps:
            known[node] = function(*value(node.args), **value(_own(node)))
        return value(last.args[0])

    return run


def _own(node: fx.Node) -> dict[str, Any]:
    """Keyword arguments that mean something to JAX."""
    foreign = ("layout", "device", "pin_memory", "memory_format", "non_blocking")
    return {key: value for key, value in node.kwargs.items() if key not in foreign}


def _loss(program: Program) -> Callable:
    function = read(program)

    def loss(learned: Array, frame: Array, data: Array, constants: Array, noise: Array) -> Array:
        return function(*learned, *frame, *data, *constants, *noise)

    return loss


def _arrays(tensors: Sequence[Tensor]) -> tuple:
    """Tensors as JAX sees them, in the memory that they have."""
    from jax import dlpack
    from jax import numpy as jnp

    own = [x.detach().contiguous() for x in tensors]
    return tuple(
        jnp.asarray(x.numpy()) if x.dtype == torch.bool else dlpack.from_dlpack(x) for x in own
    )


def to_jax(tensors: Sequence[Tensor]) -> tuple:
    """Tensors for one call: JAX is faster at arrays of NumPy than at making its own of them."""
    return tuple(x.detach().numpy() for x in tensors)


def adam(
    p: Array, m: Array, v: Array, g: Array, wear: Sequence[Array], rate: Array, eps: Array
) -> tuple[Array, Array, Array]:
    """A step of Adam: the parameter, and the means of its slope and of their squares.

    Arguments:
        p: the parameter.
        m: mean of the slopes.
        v: mean of their squares.
        g: the slope here.
        wear: what the means have of their weight by now.
        rate: of the step.
        eps: added to the root.
    """
    from jax import numpy as jnp

    m = m + (1 - BETAS[0]) * (g - m)
    v = BETAS[1] * v + (1 - BETAS[1]) * g * g
    size = jnp.sqrt(v / wear[1]) + eps
    return (p - rate / wear[0] * m / size).astype(p.dtype), m, v


def to_torch(array: Array) -> Tensor:
    """An array of JAX as a tensor, in the memory that it has."""
    return torch.utils.dlpack.from_dlpack(array)


@dataclass
class Steps:
    """Steps of Adam from a state of a pair, many in one call.

    Arguments:
        program: the program of a step.
        state: what moves: the parameters of the pair, moved in place, and the frame.
        data: tensors of all rows.
        units: for each parameter, what its rate is multiplied by.
        eps: for each parameter, the epsilon of Adam.
        batched: whether a step takes some rows.
    """

    program: Program
    state: Sequence[Tensor]
    data: Sequence[Tensor]
    units: Sequence[float]
    eps: Sequence[float]
    batched: bool
    _moments: Any = field(default=None, repr=False)
    _held: Any = field(default=None, repr=False)

    def run(
        self, noise: Sequence[Tensor], rates: Sequence[float], every: int, rows: Tensor | None
    ) -> tuple[list[float], Tensor]:
        """Take n steps, and move the parameters.

        Arguments:
            noise: the tapes of the steps, each (n, ...).
            rates: of each step, (n,); n is a multiple of ``every``.
            every: steps between two snapshots.
            rows: of the mini-batch of each step, (n, B).

        Returns:
            The ELBO at each step, and the parameters after each ``every`` of them.
        """
        import jax

        learned = self.state[: self.program.num_learned]
        dtype = learned[0].dtype
        shape = (len(rates) // every, every)
        with jax.enable_x64(True):
            if self._held is None:
                scales = [torch.tensor([*x], dtype=dtype) for x in (self.units, self.eps)]
                self._held = _arrays(self.data), _arrays(self.program.constants), *_arrays(scales)
            if self._moments is None:
                self._moments = self._new_moments()
            frame = to_jax([x.clone() for x in self.state[len(learned) :]])
            carry = to_jax([p.detach().clone() for p in learned]), *self._moments
            plan = (
                to_jax([z.reshape(*shape, *z.shape[1:]) for z in noise]),
                *to_jax([torch.tensor(rates, dtype=dtype).reshape(shape)]),
                None if rows is None else to_jax([rows.reshape(*shape, -1)])[0],
            )
            function = _compiled(self.program, self.batched)
            (now, *moments), (elbos, path) = function(carry, (frame, *self._held), plan)
            self._moments = tuple(moments)
            with torch.no_grad():
                for parameter, array in zip(learned, now, strict=True):
                    parameter.copy_(to_torch(array))
            return to_torch(elbos).flatten().tolist(), to_torch(path)

    def steepest(self) -> tuple[str, float]:
        """The parameter with the largest gradient of late, and at most how large it was.

        Adam keeps a mean of squares: a single one that is far above all others is what is left.
        """
        import numpy as np

        largest = [float(np.asarray(v).max(initial=0.0)) for v in self._moments[1]]
        slopes = [math.inf if math.isnan(v) else math.sqrt(v / (1 - BETAS[1])) for v in largest]
        return max(zip(self.program.names, slopes, strict=False), key=lambda named: named[1])

    def slope(
        self, noise: Sequence[Tensor], num_steps: int, every: int, rows: Tensor | None
    ) -> tuple[float, list[Tensor]]:
        """The ELBO and the gradient of the loss for one tape, by the compiled steps themselves.

        At a rate of zero the same step is taken again and again: the mean of its gradients, which
        Adam keeps, is the gradient.
        """
        import jax

        tapes = [z.expand(num_steps, *z.shape).contiguous() for z in noise]
        chosen = None if rows is None else rows.expand(num_steps, -1).contiguous()
        self._held = self._moments = None
        elbos, _ = self.run(tapes, [0.0] * num_steps, every, chosen)
        with jax.enable_x64(True):
            kept = 1 - BETAS[0] ** num_steps
            return elbos[0], [to_torch(m) / kept for m in self._moments[0]]

    def memory(self) -> dict[str, Tensor]:
        """What Adam remembers of the steps so far, by name; nothing before the first."""
        import jax

        if self._moments is None:
            return {}
        with jax.enable_x64(True):
            *both, count = self._moments
            named = {f"{m}.{k}": a for m, part in enumerate(both) for k, a in enumerate(part)}
            return {name: to_torch(a).clone() for name, a in {**named, "count": count}.items()}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`memory` gave."""
        import jax

        if memory:
            with jax.enable_x64(True):
                places = range(self.program.num_learned)
                both = ([memory[f"{m}.{k}"] for k in places] for m in range(2))
                self._moments = *map(_arrays, both), *_arrays([memory["count"]])

    def _new_moments(self) -> tuple:
        # Made as the answers are, so that the second call finds the same program.
        zeros = [torch.zeros_like(p) for p in self.state[: self.program.num_learned]]
        return _arrays(zeros), _arrays(zeros), *_arrays([torch.zeros((), dtype=torch.int32)])


_compilations: dict[Any, Callable] = {}


def _compiled(program: Program, batched: bool) -> Callable:
    """The steps of a program, compiled once for each graph; JAX adds the shapes."""
    key = (program.code, program.num_learned, batched)
    if key not in _compilations:
        while len(_compilations) >= _KEPT:
            _compilations.pop(next(iter(_compilations)))
        _compilations[key] = _built(program, batched)
    return _compilations[key]


def _built(program: Program, batched: bool) -> Callable:
    import jax
    from jax import numpy as jnp

    slope_of = jax.value_and_grad(_loss(program), argnums=0, has_aux=True)

    def call(carry: Array, held: Array, plan: Array) -> Array:
        frame, data, constants, units, eps = held

        def step(carry: Array, now: Array) -> Array:
            learned, first, second, t = carry
            noise, rate, rows = now
            batch = (*(jnp.take(x, rows, axis=0) for x in data), rows) if batched else data
            (_, elbo), slopes = slope_of(learned, frame, batch, constants, noise)
            t = t + 1
            age = t.astype(rate.dtype)
            wear = [1 - beta**age for beta in BETAS]
            moved, firsts, seconds = [], [], []
            for k, (p, m, v, g) in enumerate(zip(learned, first, second, slopes, strict=True)):
                p, m, v = adam(p, m, v, g, wear, rate * units[k], eps[k])
                moved.append(p)
                firsts.append(m)
                seconds.append(v)
            return (tuple(moved), tuple(firsts), tuple(seconds), t), elbo

        def stretch(carry: Array, now: Array) -> Array:
            carry, elbos = jax.lax.scan(step, carry, now)
            return carry, (elbos, jnp.concatenate([p.reshape(-1) for p in carry[0]]))

        return jax.lax.scan(stretch, carry, plan)

    return jax.jit(call)
