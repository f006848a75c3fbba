"""``load``: a stored posterior back from disk. On the roof, for it sees both towers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latentlab import models
from latentlab.inference.checkpoint import restore
from latentlab.inference.posterior import Posterior

__all__ = ["load"]


def load(
    path: str | Path,
    model: Callable | None = None,
    guide: Callable | None = None,
    *,
    data: Any = None,  # noqa: ANN401
) -> Posterior:
    """Load a posterior that was stored by ``Posterior.save`` or by the command line.

    Arguments:
        path: the file, or the folder it is in.
        model: your model, where it is not one of latentlab's.
        guide: your guide, where it is not one of latentlab's.
        data: the data it was fitted to, for what needs them (``check`` anew, ``log_weights``);
            the file does not hold them.

    Returns:
        The posterior; without data its verdict is the stored one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, of a newer version, or of another pair.

    Example:
        >>> import tempfile, latentlab as ll
        >>> x = ll.data.simulate.eruptions(num_rows=50)
        >>> posterior = ll.fit(ll.GaussianMixture(2, 1), x, num_restarts=1, max_steps=300)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = posterior.save(folder)
        ...     again = ll.load(folder)
        >>> bool((again.sample(3)["locs"] == posterior.sample(3)["locs"]).all())
        True
    """
    return restore(path, model, guide, data, _build)


def _build(spec: Mapping[str, Any]) -> Callable:
    if spec["class"] not in models.__all__:
        raise ValueError(f"model {spec['class']!r}: not known to this version of latentlab")
    return getattr(models, spec["class"])(**spec["arguments"])
