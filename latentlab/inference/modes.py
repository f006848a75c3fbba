"""Training mode while steps are taken, evaluation mode at all other times.

Dropout is at work, and batch normalisation looks at the batch, in the steps of a fit only. All
else that is said of a model is of the function it will be for its user, in which rows do not
depend on each other and nothing moves. A network whose parameters are all frozen
(``requires_grad_(False)``) is in evaluation mode in the steps, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from latentlab.guides import Guide
from latentlab.inference.copying import modules_of
from latentlab.inference.pair import Pair

__all__ = ["TrainingMode", "evaluation_mode", "standing"]

_STILL = ("latentlab", "zuko")  # whose buffers no step moves


def evaluation_mode(*functions: Callable) -> None:
    """Put all modules of callables in evaluation mode, in place.

    Arguments:
        functions: models and guides.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
        >>> def model():
        ...     return network
        >>> evaluation_mode(model)
        >>> network.training
        False
    """
    for function in functions:
        for module in modules_of(function):
            module.eval()


def standing(pair: Pair, mode: TrainingMode | None = None) -> dict[str, Tensor]:
    """Where a pair stands, by name: weights, what networks keep, the frame of a guide of ours.

    Arguments:
        pair: the pair.
        mode: that of its steps, where it is at hand.
    """
    frame: dict[str, Tensor] = {}
    if isinstance(pair.guide, Guide):
        frame = {f"frame.{k}": v.detach() for k, v in pair.guide.named_buffers()}
    mode = mode or TrainingMode(pair)
    return mode.moving() | mode.others() | frame


class TrainingMode:
    """A context in which the networks of a pair are in training mode; to be entered each step.

    Arguments:
        pair: the pair, its modules in evaluation mode.
    """

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        tops = [*modules_of(pair.model), *modules_of(pair.guide)]
        found = {id(part): part for top in tops for part in _learning(top)}
        self._modules = [*found.values()]
        self._buffers: dict[str, Tensor] = {}
        self._others: dict[str, Tensor] = {}
        for k, part in enumerate(self._modules):
            whose = type(part).__module__.partition(".")[0]
            for name, buffer in part.named_buffers(recurse=False):
                running = whose == "torch" and buffer.is_floating_point()
                kept = self._buffers if running else self._others
                if whose not in _STILL:
                    kept[f"buffer.{k}.{name}"] = buffer

    def moving(self) -> dict[str, Tensor]:
        """What steps move, by name: weights, and running means, of batches or of baselines."""
        weights = {name: value.detach() for name, value in self._pair.parameters().items()}
        past = {f"baseline.{site}": value for site, value in self._pair.baselines.items()}
        return weights | self._buffers | past

    def others(self) -> dict[str, Tensor]:
        """What else steps may move, by name: counts of batches, buffers of a user's modules."""
        return self._others

    def __enter__(self) -> None:
        for module in self._modules:  # past ``nn.Module.__setattr__``, which takes a microsecond
            module.__dict__["training"] = True

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            module.__dict__["training"] = False


def _learning(module: nn.Module) -> Iterator[nn.Module]:
    own = [*module.parameters()]
    if own and not any(parameter.requires_grad for parameter in own):
        return
    yield module
    for part in module.children():
        yield from _learning(part)
