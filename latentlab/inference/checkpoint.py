"""Posteriors on disk: one safetensors file with its facts as JSON, checked by a sha256.

Nothing is pickled, so that loading a file never runs code from it. The file is written aside and
put in place in one step, so that there is either the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from latentlab.diagnostics import Estimate
from latentlab.guides import GaussianGuide, Latent, guide_from_spec
from latentlab.inference.arguments import as_arguments
from latentlab.inference.pair import Arguments, Pair, copy_pair, modules_of
from latentlab.protocols import Rebuildable
from latentlab.supports import support_from_spec, support_spec

if TYPE_CHECKING:
    from latentlab.inference.posterior import Posterior

__all__ = ["FILE", "fingerprint", "probe", "restore", "save", "write_atomically"]

FILE = "model.safetensors"
_SCHEMA = 1


def save(posterior: Posterior, path: str | Path) -> Path:
    """Write a posterior without its data; see :meth:`latentlab.Posterior.save`.

    Arguments:
        posterior: the posterior.
        path: a folder, made if missing, or a ``.safetensors`` file.

    Returns:
        The file written.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    pair = posterior.pair
    tensors = {"losses": posterior.losses}
    tensors |= {f"store.{k}": v for k, v in pair.store["params"].items()}
    tensors |= {f"model.{k}": v for k, v in _states(pair.model)}
    tensors |= {f"guide.{k}": v for k, v in _states(pair.guide)}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    facts = json.dumps(_facts(posterior), sort_keys=True, allow_nan=True)
    metadata = {"latentlab": facts, "sha256": _digest(facts, tensors)}
    write_atomically(file, tensors_to_bytes(tensors, metadata=metadata))
    return file


def restore(
    path: str | Path,
    model: Callable | None,
    guide: Callable | None,
    data: Any,  # noqa: ANN401
    build: Callable[[Mapping[str, Any]], Callable],
) -> Posterior:
    """Read a posterior; see :func:`latentlab.load`.

    Arguments:
        path: the file or its folder.
        model: the model, where the file cannot build it.
        guide: the guide, where it is not one of ``latentlab.guides``.
        data: the data, or ``None``.
        build: makes a model of ours from its description.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, from a newer version, or of another pair.
    """
    from latentlab.inference.posterior import Posterior, Restarts

    file, facts, tensors = _read(path)
    if model is None:
        if facts["model"] is None:
            raise ValueError(f"{file}: holds a model of your own; load it with model=")
        model = build(facts["model"])
    dtype = getattr(torch, facts["dtype"])
    if facts["guide"] is not None:
        guide = guide_from_spec(facts["guide"], dtype)
    elif guide is None:
        raise ValueError(f"{file}: holds a guide of your own; load it with guide=")
    model, guide = copy_pair(model, guide)
    arguments = _placeholder(facts) if data is None else as_arguments(data, model)
    pair = Pair(model, guide, arguments, dtype, **_sites(facts))
    _fill(file, pair, facts, tensors)
    posterior = Posterior(
        pair=pair,
        seed=facts["seed"],
        elbo=Estimate(*facts["elbo"]),
        losses=tensors["losses"],
        stage_starts=tuple(facts["stage_starts"]),
        stage_elbos=tuple(Estimate(*e) for e in facts["stage_elbos"]),
        converged=facts["converged"],
        stop_reason=facts["stop_reason"],
        restarts=Restarts(tuple(Estimate(*e) for e in facts["restarts"])),
        notes=tuple(facts["notes"]),
        seconds=facts["seconds"],
        fitted_to=facts["fitted_to"],
        recorded=facts["verdict"],
        has_data=data is not None or not facts["data"]["args"] and not facts["data"]["kwargs"],
    )
    if not posterior.has_data:
        _refuse_amortised(file, pair)
    return posterior


def fingerprint(data: Arguments) -> str:
    """A sha256 of the data a posterior was fitted to."""
    digest = hashlib.sha256()
    for key, value in [*enumerate(data.args), *sorted(data.kwargs.items())]:
        digest.update(str(key).encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def probe(folder: str | Path) -> Path:
    """Make a folder and write to it, before the work that is to be stored there.

    Arguments:
        folder: where results will go.

    Returns:
        The folder.

    Raises:
        OSError: if it cannot be written to; the message names it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".latentlab-probe"
        trial.write_bytes(b"probe")
        trial.unlink()
    except OSError as error:
        raise OSError(f"{folder}: cannot be written to ({error.strerror or error})") from error
    return folder


def write_atomically(file: Path, content: bytes) -> None:
    """Write aside, flush to disk, put in place: there is the old file or the new one.

    Arguments:
        file: the file to write.
        content: its bytes.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with aside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _facts(posterior: Posterior) -> dict[str, Any]:
    pair = posterior.pair
    owner = getattr(pair.model, "__self__", pair.model)
    described = isinstance(owner, Rebuildable) and owner is pair.model
    ours = isinstance(pair.guide, GaussianGuide)
    verdict = posterior.check() if posterior.has_data else None
    return {
        "schema": _SCHEMA,
        "model": owner.spec() if described else None,
        "guide": pair.guide.spec() if ours else None,
        "dtype": str(pair.dtype).removeprefix("torch."),
        "names": pair.data.names,
        "data": _shapes_of(pair.data),
        "constraints": {k: support_spec(v) for k, v in pair.store["constraints"].items()},
        "latents": [latent.spec() for latent in pair.latents],
        "summed_out": pair.summed_out,
        "observed": pair.observed,
        "points": pair.points,
        "noisy": pair.noisy,
        "shapes": pair.shapes,
        "plates": pair.plates,
        "nesting": pair.nesting,
        "vectorised": pair.vectorised,
        "seed": posterior.seed,
        "elbo": [posterior.elbo.value, posterior.elbo.se],
        "stage_starts": posterior.stage_starts,
        "stage_elbos": [[e.value, e.se] for e in posterior.stage_elbos],
        "converged": posterior.converged,
        "stop_reason": posterior.stop_reason,
        "restarts": [[e.value, e.se] for e in posterior.restarts.elbos],
        "notes": posterior.notes,
        "seconds": posterior.seconds,
        "fitted_to": posterior.fitted_to or fingerprint(pair.data),
        "verdict": verdict.spec() if verdict is not None else posterior.recorded,
    }


def _sites(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "latents": tuple(Latent.from_spec(spec) for spec in facts["latents"]),
        "summed_out": tuple(facts["summed_out"]),
        "observed": tuple(facts["observed"]),
        "points": tuple(facts["points"]),
        "noisy": facts["noisy"],
        "shapes": {k: tuple(v) for k, v in facts["shapes"].items()},
        "plates": {k: tuple(tuple(p) for p in v) for k, v in facts["plates"].items()},
        "nesting": facts["nesting"],
        "vectorised": facts["vectorised"],
    }


def _states(function: Callable) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the modules a callable is or refers to."""
    for i, module in enumerate(modules_of(function)):
        for name, value in module.state_dict().items():
            yield f"{i}.{name}", value


def _fill(file: Path, pair: Pair, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put the stored numbers into a pair of the same structure."""
    store = {k.removeprefix("store."): v for k, v in tensors.items() if k.startswith("store.")}
    pair.store["params"].update({k: v.requires_grad_() for k, v in store.items()})
    pair.store["constraints"].update(
        {k: support_from_spec(v) for k, v in facts["constraints"].items()}
    )
    if not isinstance(pair.guide, GaussianGuide):
        with pair.entered(seed=0), torch.no_grad():
            pair.data.call(pair.guide)  # an autoguide has no parameters before it has run
    for role, function in (("model", pair.model), ("guide", pair.guide)):
        for i, module in enumerate(modules_of(function)):
            prefix = f"{role}.{i}."
            state = {
                k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
            }
            try:
                module.load_state_dict(state, assign=True)
            except RuntimeError as error:
                what = str(error).splitlines()[1].strip() if "\n" in str(error) else error
                raise ValueError(f"{file}: was written for another {role}: {what}") from error


def _shapes_of(data: Arguments) -> dict[str, Any]:
    def describe(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, Tensor):
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        return {"value": value if isinstance(value, int | float | str | bool) else None}

    kwargs = {k: describe(v) for k, v in data.kwargs.items()}
    return {"args": [describe(v) for v in data.args], "kwargs": kwargs}


def _placeholder(facts: Mapping[str, Any], fill: float = 0) -> Arguments:
    """Data of the stored shape without its values."""

    def make(described: Mapping[str, Any]) -> Any:  # noqa: ANN401
        if "shape" in described:
            dtype = getattr(torch, described["dtype"])
            return torch.full(described["shape"], fill, dtype=dtype)
        return described["value"]

    described = facts["data"]
    names = tuple(facts["names"]) if facts["names"] else None
    kwargs = {k: make(v) for k, v in described["kwargs"].items()}
    return Arguments(tuple(map(make, described["args"])), kwargs, names)


def _refuse_amortised(file: Path, pair: Pair) -> None:
    """A guide that reads the data cannot be drawn from without them."""
    if isinstance(pair.guide, GaussianGuide):
        return
    from latentlab.inference.objectives import draw

    drawn = []
    for fill in (0, 1):
        data = pair.data.map(lambda t, fill=fill: torch.full_like(t, fill))
        with pair.entered(seed=0), torch.no_grad():
            drawn.append(draw(pair, 1, data).values)
    if any(not torch.equal(value, drawn[1][name]) for name, value in drawn[0].items()):
        raise ValueError(f"{file}: its guide reads the data; load it with data=")


def _read(path: str | Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The file, its facts and its tensors, or one line that says what is wrong with it."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; save a posterior there first")
    content = file.read_bytes()
    try:
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        facts_text, digest = metadata["latentlab"], metadata["sha256"]
        tensors = tensors_from_bytes(content)
    except Exception as error:
        raise ValueError(f"{file}: is damaged, or not a file of latentlab") from error
    if _digest(facts_text, tensors) != digest:
        raise ValueError(f"{file}: is damaged (its sha256 does not match); use another copy")
    facts = json.loads(facts_text)
    if facts["schema"] > _SCHEMA:
        raise ValueError(
            f"{file}: was written by a newer latentlab (schema {facts['schema']}, this one reads "
            f"{_SCHEMA}); update latentlab"
        )
    return file, facts, tensors


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
