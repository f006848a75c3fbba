"""What a model or a guide may lend the engine, each a small protocol asked for by ``isinstance``.

The engine works without any of them: a plain function with ``pyro.sample`` statements is a model.
A method that is there is used; nothing else about the object is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = [
    "Anneals",
    "ArrangesData",
    "ChecksData",
    "CountsObservations",
    "Describes",
    "DrawsFit",
    "Exchangeable",
    "HasNetworks",
    "HoldsOut",
    "KnowsColumns",
    "LabelsRows",
    "NamesDims",
    "OffersGuide",
    "OffersUpdates",
    "PlacesStarts",
    "ReadsItsRows",
    "Rebuildable",
    "ScalesToData",
    "StartsFrom",
    "ToleratesMissing",
    "Updates",
    "owner_of",
]


def owner_of(function: Callable) -> Any:  # noqa: ANN401
    """The object that lends: a model or guide itself, or what a bound method is bound to."""
    return getattr(function, "__self__", function)


@runtime_checkable
class Anneals(Protocol):
    """A model that is trained with another weight on its KL than it is judged by.

    A step of training ascends E log p(x | z) - kl_weight(step) KL, the KL of each latent
    dimension counted as ``free_bits`` where it is less. The ELBO that is reported has neither.
    """

    @property
    def free_bits(self) -> float:
        """Nats that each latent dimension of a datum may spend for free."""

    def kl_weight(self, step: int) -> float:
        """Weight of the KL at a step of training."""


@runtime_checkable
class ArrangesData(Protocol):
    """A model whose data come in other forms than its arguments, such as ragged sequences."""

    def arrange(
        self,
        *data: Any,  # noqa: ANN401
        names: Sequence[str] | None = None,
        **named: Any,  # noqa: ANN401
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...] | None]:
        """The arguments that the model is called with, and the names of the columns.

        Arguments:
            data: as the user gave them.
            names: the columns that there must be, where the model was fitted to some.
            named: data given by keyword.
        """


@runtime_checkable
class ChecksData(Protocol):
    """A model that knows which data it has a density of, new ones as well as those of the fit."""

    def check_data(self, *data: Any) -> None:  # noqa: ANN401
        """Raise a ``ValueError`` for other data.

        Arguments:
            data: what the model is called with, as for ``scale_to``.
        """


@runtime_checkable
class CountsObservations(Protocol):
    """A model each of whose data is many observations, as a sequence is."""

    def num_observations(self, *data: Any) -> int:  # noqa: ANN401
        """Their number, from the arguments of the model."""


@runtime_checkable
class HoldsOut(Protocol):
    """A model that would follow its data too closely, were no rows kept aside."""

    @property
    def held_out(self) -> float:
        """Share of the rows that a fit keeps aside, where the caller does not say."""


@runtime_checkable
class ScalesToData(Protocol):
    """A model whose priors are set in the units of the data, before the pair is checked."""

    def scale_to(self, *data: Any) -> Any:  # noqa: ANN401
        """Set the priors' location and scale from the data, in place.

        Arguments:
            data: what the model is called with; a ``Table``, or ``Sequences``, where the columns
                have names.
        """


@runtime_checkable
class StartsFrom(Protocol):
    """A model that knows good places to start from."""

    def starting_values(self, *data: Any, seed: int) -> dict[str, Tensor]:  # noqa: ANN401
        """Values of (some of) the latents, one start for each seed."""


@runtime_checkable
class HasNetworks(Protocol):
    """A guide with networks: their weights move by shorter steps, and never come to rest."""

    def network_parameters(self) -> Iterable[Tensor]:
        """The parameters that are weights of networks."""


@runtime_checkable
class OffersGuide(Protocol):
    """A model that brings the guide it is best fitted with."""

    def default_guide(self) -> Any:  # noqa: ANN401
        """A guide for this model, not yet bound to data."""


@runtime_checkable
class Updates(Protocol):
    """The conjugate update of a guide, which a natural-gradient step of length one is.

    Both methods are called with the parameters of the pair at hand, as its guide is.
    """

    def statistics(self, *data: Any, **named: Any) -> tuple[dict[str, Tensor], Tensor]:  # noqa: ANN401
        """Expected sufficient statistics at the guide as it is, and the bound there.

        Statistics of parts of the rows may be averaged: they are sums over rows, and those of a
        mini-batch are scaled to all rows.

        Arguments:
            data: what the model is called with; a mini-batch has ``size``.
            named: data given by keyword.

        Returns:
            Name -> statistic; and what ``maximise`` never lowers, in nats per data set.
        """

    def maximise(self, statistics: Mapping[str, Tensor]) -> None:
        """Put the guide where statistics lead, in place: an M-step, or a conjugate update.

        Arguments:
            statistics: as ``statistics`` returns them, or a weighted mean of several.
        """


@runtime_checkable
class PlacesStarts(Protocol):
    """Updates that know good places to start from, in the place of ``StartsFrom``."""

    def place(self, seed: int, *data: Any, **named: Any) -> None:  # noqa: ANN401
        """Put the guide at a start, in place; another seed, another start.

        Arguments:
            seed: of all chance.
            data: what the model is called with; of some rows, with ``size``.
            named: data given by keyword.
        """


@runtime_checkable
class OffersUpdates(Protocol):
    """A model that knows the conjugate updates of guides of it."""

    def updates(self, guide: Any) -> Updates | None:  # noqa: ANN401
        """The update of a guide in place, or ``None`` where it has none.

        Arguments:
            guide: the fit's own copy, bound to the data.
        """


@runtime_checkable
class Exchangeable(Protocol):
    """A model with components that may swap their labels."""

    @property
    def exchangeable(self) -> Mapping[str, int | tuple[int, ...]]:
        """Site -> the axis, from the right, that runs over the exchangeable components.

        Several axes are renumbered alike: rows and columns of a transition matrix.
        """


@runtime_checkable
class NamesDims(Protocol):
    """A model that names the axes of its sites."""

    @property
    def dims(self) -> Mapping[str, Sequence[str]]:
        """Site -> names of its axes; the axis ``"feature"`` takes the names of the columns.

        ``"feature[1:3]"`` takes those of two of them, counted as Python slices.
        """


def columns_along(axis: str, names: Sequence[str]) -> Sequence[str]:
    """The names of the columns that an axis goes along; none if it goes along no columns.

    Arguments:
        axis: name of the axis, as in :attr:`NamesDims.dims`.
        names: of all columns.

    Example:
        >>> names = ["time", "count", "kind"]
        >>> columns_along("feature", names), columns_along("feature[1:3]", names)
        (['time', 'count', 'kind'], ['count', 'kind'])
        >>> columns_along("state", names)
        ()
    """
    if axis == "feature":
        return names
    part = re.fullmatch(r"feature\[(\d+):(\d+)\]", axis)
    return names[int(part[1]) : int(part[2])] if part else ()


@runtime_checkable
class ToleratesMissing(Protocol):
    """A model that reads NaN cells as missing and integrates them out."""

    @property
    def tolerates_missing(self) -> bool:
        """True where NaN cells are understood."""


@runtime_checkable
class KnowsColumns(Protocol):
    """A model whose own methods find the columns of a table by name; a fit sets the names."""

    column_names: Sequence[str] | None


@runtime_checkable
class LabelsRows(Protocol):
    """A model that says something about each row of a table: a label, a probability."""

    def label_rows(self, draws: Mapping[str, Tensor], *data: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Column name -> one value a row, averaged over the draws."""


@runtime_checkable
class DrawsFit(Protocol):
    """A model that can draw itself on its data."""

    def plot_fit(self, draws: Mapping[str, Tensor], names: Sequence[str], *data: Any) -> Any:  # noqa: ANN401
        """Axes with the data and the fit on them."""


@runtime_checkable
class Describes(Protocol):
    """A model with something of its own to say after a fit."""

    def remarks(self, draws: Mapping[str, Tensor], *data: Any) -> list[str]:  # noqa: ANN401
        """Sentences for the verdict; each one asks for care."""


@runtime_checkable
class Rebuildable(Protocol):
    """A model or guide that can be built again from plain values, so that files need no pickle."""

    def spec(self) -> dict[str, Any]:
        """``{"class": name, "arguments": {...}, "buffers": {...}}`` of JSON values."""


@runtime_checkable
class ReadsItsRows(Protocol):
    """A model whose density of a row is conditional on that very row, so that none is held out."""

    @property
    def reads_its_rows(self) -> bool:
        """True where the observed site depends on the value it is compared with."""
