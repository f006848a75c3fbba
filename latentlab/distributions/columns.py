r"""Tables with columns of several kinds: a likelihood for each.

.. math:: \log p(x \mid \eta) = \sum_g \log p_g(x_{D_g} \mid \eta_g)

Letters: D columns, :math:`D_g` those of kind g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentlab.distributions.cells import Parts
from latentlab.distributions.observation import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    Poisson,
)

__all__ = ["Columns", "likelihood_of"]

_KINDS = {"gaussian": Gaussian, "bernoulli": Bernoulli, "poisson": Poisson}


class Columns(Likelihood):
    """A likelihood for each column of a table.

    Columns given the same name, or the very same object, share one likelihood; the Gaussian ones
    have a learned scale each.

    Arguments:
        kinds: for each column ``"gaussian"``, ``"bernoulli"``, ``"poisson"`` or a likelihood,
            such as ``Categorical(3)``.

    Raises:
        ValueError: if there is no column, or a kind is not known.

    Example:
        >>> from latentlab.distributions import Categorical
        >>> mixed = Columns(["gaussian", "poisson", Categorical(3)]).bind((3,))
        >>> mixed.num_params(3)
        5
        >>> x = torch.tensor([[0.2, 4.0, 2.0], [float("nan"), 1.0, 0.0]])
        >>> mixed.distribution(torch.zeros(2, 5)).log_prob(x).shape
        torch.Size([2])
    """

    beside: Tensor
    order: Tensor

    def __init__(self, kinds: Sequence[str | Likelihood]) -> None:
        super().__init__()
        if isinstance(kinds, str) or not len(kinds):
            raise ValueError(
                f"kinds: expected one for each column, such as ['gaussian', 'poisson'], "
                f"got {kinds!r}"
            )
        places: dict[str | Likelihood, list[int]] = {}
        for column, kind in enumerate(kinds):
            if isinstance(kind, Columns):
                raise ValueError("kinds: expected a kind for each column, got Columns in Columns")
            places.setdefault(kind, []).append(column)
        self.parts = nn.ModuleList(
            Gaussian("column") if kind == "gaussian" else likelihood_of(kind) for kind in places
        )
        self.places = tuple(map(tuple, places.values()))
        beside = torch.tensor([column for place in self.places for column in place])
        self.register_buffer("beside", beside, persistent=False)
        self.register_buffer("order", beside.argsort(), persistent=False)

    @property
    def size(self) -> int:
        """The number of columns D."""
        return sum(map(len, self.places))

    def num_params(self, num_features: int) -> int:
        """Numbers that a decoder gives for a row."""
        self._expect(num_features)
        return sum(p.num_params(len(i)) for p, i in self._pairs())

    def num_cells(self, num_params: int) -> int:
        """Columns that so many numbers of a decoder are for."""
        num_columns = self.size
        if num_params != self.num_params(num_columns):
            raise ValueError(
                f"decoder: expected {self.num_params(num_columns)} numbers for these "
                f"{num_columns} columns, got {num_params}"
            )
        return num_columns

    def num_inputs(self, num_features: int) -> int:
        """Numbers that an encoder reads of a row."""
        self._expect(num_features)
        return sum(p.num_inputs(len(i)) for p, i in self._pairs())

    def spec(self) -> dict[str, Any] | None:
        """What builds this likelihood again; ``None`` where one of them is your own."""
        parts = [part.spec() for part, _ in self._pairs()]
        groups = [next(g for g, i in enumerate(self.places) if d in i) for d in range(self.size)]
        if None in parts:
            return None
        return {"class": "Columns", "arguments": {"parts": parts, "groups": groups}}

    def bind(self, event_shape: Sequence[int]) -> Columns:
        """Make room for rows of this shape."""
        if len(event_shape) != 1:
            raise ValueError(f"Columns: expected a table (N, D), got rows of {event_shape}")
        self._expect(event_shape[0])
        super().bind(event_shape)
        for part, columns in self._pairs():
            part.bind((len(columns),))
        return self

    def measure(self, x: Tensor) -> None:
        """Units and base rates of all columns, in place."""
        for part, columns in self._pairs():
            part.measure(x[:, list(columns)])

    def check(self, x: Tensor, argument: str = "x") -> None:
        """Raise where observed cells cannot come from their column's likelihood."""
        for part, columns in self._pairs():
            for column in columns:
                part.check(x[:, column], f"{argument}[:, {column}]")

    def inputs(self, x: Tensor) -> Tensor:
        """What an encoder reads, kind by kind."""
        pieces = x.index_select(-1, self.beside).split([len(i) for i in self.places], -1)
        return torch.cat(
            [part.inputs(piece) for (part, _), piece in zip(self._pairs(), pieces, strict=True)],
            -1,
        )

    def distribution(self, params: Tensor) -> Parts:
        """The distribution of rows, event shape (D,)."""
        return Parts([p.distribution(v) for p, v in self._pieces(params)], self.order)

    def mean(self, params: Tensor) -> Tensor:
        """Mean of each cell, the most probable code where there are codes."""
        pieces = [part.mean(piece) for part, piece in self._pieces(params)]
        return torch.cat(pieces, -1).index_select(-1, self.order)

    def average(self, params: Tensor, weights: Tensor) -> Tensor:
        """Mean of each cell over several decoder's numbers; a code where there are codes."""
        pieces = [part.average(piece, weights) for part, piece in self._pieces(params)]
        return torch.cat(pieces, -1).index_select(-1, self.order)

    def _pairs(self) -> list[tuple[Likelihood, tuple[int, ...]]]:
        return list(zip(self.parts, self.places, strict=True))  # type: ignore[arg-type]

    def _pieces(self, params: Tensor) -> list[tuple[Likelihood, Tensor]]:
        sizes = [part.num_params(len(columns)) for part, columns in self._pairs()]
        pieces = params.split(sizes, -1)
        return [(part, piece) for (part, _), piece in zip(self._pairs(), pieces, strict=True)]

    def _expect(self, num_features: int) -> None:
        if num_features != self.size:
            raise ValueError(
                f"kinds: expected one for each of the {num_features} columns, got {self.size}"
            )


def likelihood_of(kind: str | Likelihood | Mapping[str, Any]) -> Likelihood:
    """A likelihood by its name, ``"gaussian"``, ``"bernoulli"`` or ``"poisson"``, or itself.

    Arguments:
        kind: the name, a likelihood, or what its ``spec`` returned.

    Raises:
        ValueError: if it is none of these.

    Example:
        >>> likelihood_of("bernoulli")
        Bernoulli()
        >>> likelihood_of(Categorical(3).spec()).num_categories
        3
    """
    if isinstance(kind, Likelihood):
        return kind
    if isinstance(kind, str) and kind in _KINDS:
        return _KINDS[kind]()
    if isinstance(kind, Mapping):
        return _from_spec(kind)
    known = ", ".join(map(repr, _KINDS))
    raise ValueError(
        f"likelihood: expected {known} or a Likelihood, such as Categorical(3), got {kind!r}"
    )


def _from_spec(spec: Mapping[str, Any]) -> Likelihood:
    arguments = spec["arguments"]
    if spec["class"] == "Columns":
        parts = [_from_spec(part) for part in arguments["parts"]]
        return Columns([parts[group] for group in arguments["groups"]])
    kinds = {kind.__name__: kind for kind in (Bernoulli, Categorical, Gaussian, Poisson)}
    return kinds[spec["class"]](**arguments)
