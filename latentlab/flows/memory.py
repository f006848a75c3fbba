"""The last push of a flow, so that the pull of the value just drawn costs nothing.

A value drawn and scored at once is the everyday case, and inverting an autoregressive map takes a
pass for each feature. One pair is kept and no more, and only while somebody holds the value.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["LastPush"]


class _Entry(NamedTuple):
    value: weakref.ref[Tensor]
    context: Tensor | None
    versions: list[int]
    parameters: Tensor | None
    noise: Tensor
    log_det: Tensor


class LastPush:
    """One remembered push; it answers for the very same tensors only, all of them unchanged.

    Parameters are compared by their numbers, for a fused optimiser writes to them without
    counting it. A gradient with respect to the value itself does not pass through a remembered
    noise: ask for that at ``value.detach().requires_grad_()``, which is another tensor.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def __reduce__(self) -> tuple[type[LastPush], tuple[()]]:
        return LastPush, ()  # a copy of a flow, or one from disk, remembers nothing

    def keep(
        self,
        flow: nn.Module,
        noise: Tensor,
        value: Tensor,
        log_det: Tensor,
        context: Tensor | None,
    ) -> None:
        """Remember that the flow pushed a noise to a value.

        Arguments:
            flow: the flow, for the state of its parameters.
            noise: what was pushed, shape (..., D).
            value: where to, shape (..., D).
            log_det: with which log-determinant, shape (...,).
            context: in which context.
        """
        self._entry = None
        tensors = (value,) if context is None else (value, context)
        if value is noise or any(tensor.is_inference() for tensor in tensors):
            return  # nothing to save, or tensors that do not count what is written to them

        def forget(dead: weakref.ref[Tensor]) -> None:
            if self._entry is not None and self._entry.value is dead:
                self._entry = None

        versions, now = _versions(value, context), _parameters(flow)
        reference = weakref.ref(value, forget)
        self._entry = _Entry(reference, context, versions, now, noise, log_det)

    def recall(
        self, flow: nn.Module, value: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The noise of a value and the log-determinant of the push, if they are remembered.

        Arguments:
            flow: the flow.
            value: shape (..., D).
            context: as it was pushed with.

        Returns:
            Noise (..., D) and log-determinant (...,), or ``None``.
        """
        entry = self._entry
        if entry is None or entry.value() is not value or entry.context is not context:
            return None
        if torch.is_grad_enabled() and not value.requires_grad and get_proxy_mode() is None:
            return None  # drawn without a gradient, and now perhaps asked for one
        if entry.versions != _versions(value, context):
            return None
        if not _equal(entry.parameters, _parameters(flow)):
            return None
        return entry.noise, entry.log_det


def _versions(value: Tensor, context: Tensor | None) -> list[int]:
    """How often each tensor was written to."""
    return [value._version] if context is None else [value._version, context._version]


def _parameters(flow: nn.Module) -> Tensor | None:
    """A copy of all numbers of a flow; none while it is traced, when they cannot change."""
    if get_proxy_mode() is not None:
        return None
    parameters = [parameter.detach().flatten() for parameter in flow.parameters()]
    return torch.cat(parameters) if parameters else torch.empty(0)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    try:
        return torch.equal(one, other)
    except RuntimeError:  # inside of vmap no value can be read
        return False
