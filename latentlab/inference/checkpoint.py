"""Posteriors on disk: one safetensors file with its facts as JSON, checked by a sha256.

Nothing is pickled, so that loading a file never runs code from it. The file is written aside and
put in place in one step, so that there is either the old file or the new one.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro.poutine as poutine
import torch
from torch import Tensor, nn

from latentlab.diagnostics import Estimate
from latentlab.guides import Amortised, Guide, Latent, guide_from_spec
from latentlab.inference import objectives
from latentlab.inference.arguments import tell_columns
from latentlab.inference.batches import num_rows, parted
from latentlab.inference.files import (
    digest_of_all,
    naming,
    packed,
    probe,
    unpacked,
    update,
    write_atomically,
)
from latentlab.inference.held_out import HeldOut
from latentlab.inference.modes import evaluation_mode
from latentlab.inference.pair import Arguments, Pair, copy_pair, latent_of, modules_of
from latentlab.inference.placeholders import described, placeholder
from latentlab.inference.predictive import as_fitted
from latentlab.inference.ranks import is_first
from latentlab.inference.restarts import Restarts
from latentlab.protocols import OffersGuide, Rebuildable, owner_of
from latentlab.supports import support_from_spec, support_spec

if TYPE_CHECKING:
    from latentlab.inference.posterior import Posterior

__all__ = [
    "FILE",
    "digest_of",
    "fingerprint",
    "numbers_of",
    "probe",
    "restore",
    "save",
    "write_atomically",
]

FILE = "model.safetensors"
_SCHEMA = 2  # 2: intervals and simplices by the normal distribution function


def save(posterior: Posterior, path: str | Path) -> Path:
    """Write a posterior without its data; see :meth:`latentlab.Posterior.save`.

    Arguments:
        posterior: the posterior.
        path: a folder, made if missing, or a ``.safetensors`` file.

    Returns:
        The file written.

    Raises:
        OSError: if it cannot be written to; the message names it.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE
    if not is_first():
        return file
    with naming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"losses": posterior.losses, **numbers_of(posterior.pair)}
    write_atomically(file, packed(tensors, _facts(posterior)))
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
    from latentlab.inference.ladder import Rung
    from latentlab.inference.posterior import Posterior

    file, facts, tensors = _read(path)
    dtype = getattr(torch, facts["dtype"])
    model = _model(file, facts, model, build)
    model, guide = copy_pair(model, _guide(file, facts, model, guide, dtype))
    evaluation_mode(model, guide)
    tell_columns(model, facts["names"])
    pair = Pair(model, guide, placeholder(facts), dtype, **_sites(facts))
    has_data = data is not None or not (pair.data.args or pair.data.kwargs)
    if data is not None:
        pair.data = _without_kept(as_fitted(data, pair), pair.data, facts)
    _fill(file, pair, facts, tensors)
    held = facts.get("held_out")
    return Posterior(
        pair=pair,
        seed=facts["seed"],
        elbo=Estimate(*facts["elbo"]),
        losses=tensors["losses"],
        stage_starts=tuple(facts["stage_starts"]),
        stage_elbos=tuple(Estimate(*e) for e in facts["stage_elbos"]),
        converged=facts["converged"],
        stop_reason=facts["stop_reason"],
        restarts=Restarts(
            tuple(Estimate(*e) for e in facts["restarts"]),
            tuple(facts["apart"]),
            *facts.get("halving", ()),
        ),
        notes=tuple(facts["notes"]),
        seconds=facts["seconds"],
        method=facts["method"],
        backend=facts["backend"],
        ladder=tuple(Rung.from_spec(rung) for rung in facts.get("ladder", ())),
        fitted_to=facts["fitted_to"],
        recorded=facts["verdict"],
        has_data=has_data,
        reads_data=not has_data and _reads_data(pair),
        held_out_rows=held and HeldOut.from_spec(held),
    )


def _without_kept(data: Arguments, fitted: Arguments, facts: Mapping[str, Any]) -> Arguments:
    """Of all rows that a fit was given those that it did not keep aside; else the data as is."""
    more = (num_rows(data) or 0) - (num_rows(fitted) or 0)
    if facts.get("held_out") is None or more <= 0:
        return data
    rows, _ = parted(data, more, facts["seed"])
    return rows if fingerprint(rows) == facts["fitted_to"] else data


def fingerprint(data: Arguments) -> str:
    """A sha256 of the data a posterior was fitted to."""
    digest = hashlib.sha256()
    for key, value in [*enumerate(data.args), *sorted(data.kwargs.items())]:
        digest.update(str(key).encode())
        update(digest, value)
    return digest.hexdigest()


def digest_of(pair: Pair) -> str:
    """A sha256 of the numbers of a pair and of its data."""
    return digest_of_all(fingerprint(pair.data), numbers_of(pair))


def _facts(posterior: Posterior) -> dict[str, Any]:
    pair = posterior.pair
    verdict = posterior.check().spec() if posterior.has_data else posterior.recorded
    return {
        "schema": _SCHEMA,
        "model": _description(pair.model),
        "guide": pair.guide.spec() if isinstance(pair.guide, Guide) else None,
        "model_brings_guide": _brings_guide(pair),
        "dtype": str(pair.dtype).removeprefix("torch."),
        "names": pair.data.names,
        "args": [described(value) for value in pair.data.args],
        "kwargs": {name: described(value) for name, value in pair.data.kwargs.items()},
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
        "in_parts": pair.in_parts,
        "seed": posterior.seed,
        "elbo": [posterior.elbo.value, posterior.elbo.se],
        "stage_starts": posterior.stage_starts,
        "stage_elbos": [[e.value, e.se] for e in posterior.stage_elbos],
        "converged": posterior.converged,
        "stop_reason": posterior.stop_reason,
        "restarts": [[e.value, e.se] for e in posterior.restarts.elbos],
        "apart": posterior.restarts.apart,
        "halving": [posterior.restarts.given_up, posterior.restarts.num_rows],
        "notes": posterior.notes,
        "seconds": posterior.seconds,
        "method": posterior.method,
        "backend": posterior.backend,
        "ladder": [rung.spec() for rung in posterior.ladder],
        "fitted_to": posterior.fitted_to or fingerprint(pair.data),
        "held_out": posterior.held_out_rows and posterior.held_out_rows.spec(),
        "verdict": verdict,
    }


def _description(model: Callable) -> dict[str, Any] | None:
    """What builds the model again; ``None`` for one that only its author has."""
    if isinstance(model, type) or not isinstance(model, Rebuildable):
        return None
    spec = model.spec()
    return spec if spec["class"] == type(model).__name__ else None  # not that of a base class


def _model(
    file: Path,
    facts: Mapping[str, Any],
    model: Callable | None,
    build: Callable[[Mapping[str, Any]], Callable],
) -> Callable:
    stored = facts["model"]
    if model is None:
        if stored is None:
            raise ValueError(f"{file}: holds a model of your own; load it with model=")
        return build(stored)
    given = _description(model)
    if stored is not None and given != stored:
        raise ValueError(
            f"{file}: was written for another model, {_call(stored)}, not "
            f"{_call(given) if given else _name(model)}; leave model= out"
        )
    return model


def _brings_guide(pair: Pair) -> bool:
    """Whether the guide is a method of the model, which the model hands out."""
    owner = owner_of(pair.model)
    return isinstance(owner, OffersGuide) and owner.default_guide() == pair.guide


def _guide(
    file: Path,
    facts: Mapping[str, Any],
    model: Callable,
    guide: Callable | None,
    dtype: torch.dtype,
) -> Callable:
    stored, owner = facts["guide"], owner_of(model)
    if stored is None:
        if guide is None and facts.get("model_brings_guide") and isinstance(owner, OffersGuide):
            return owner.default_guide()
        if guide is None:
            raise ValueError(f"{file}: holds a guide of your own; load it with guide=")
        return guide
    if guide is not None and type(guide).__name__ != stored["class"]:
        raise ValueError(
            f"{file}: holds a guide of latentlab, {stored['class']}, not {_name(guide)}; "
            "leave guide= out"
        )
    encoder = guide.given_encoder if isinstance(guide, Amortised) else None
    return guide_from_spec(stored, dtype, copy.deepcopy(encoder))


def _call(spec: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in spec["arguments"].items())
    return f"{spec['class']}({arguments})"


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


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
        "in_parts": facts.get("in_parts", False),
    }


def numbers_of(pair: Pair) -> dict[str, Tensor]:
    """Parameters and buffers of a pair: of Pyro's store, and of the modules of both halves."""
    found = {f"store.{name}": value for name, value in pair.store["params"].items()}
    for place, module in _modules(pair).items():
        found |= {f"{place}.{name}": value for name, value in module.state_dict().items()}
    return found


def _modules(pair: Pair) -> dict[str, nn.Module]:
    """The modules of both halves by a name, each of them once."""
    found: dict[str, nn.Module] = {}
    for role, function in (("model", pair.model), ("guide", pair.guide)):
        further = [m for m in modules_of(function) if m not in found.values()]
        found |= {f"{role}.{i}": module for i, module in enumerate(further)}
    return found


def _fill(file: Path, pair: Pair, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put the stored numbers into a pair of the same structure."""
    for name, support in facts["constraints"].items():
        pair.store["params"][name] = tensors[f"store.{name}"].requires_grad_()
        pair.store["constraints"][name] = support_from_spec(support)
    _expect_sites(file, pair)
    for place, module in _modules(pair).items():
        prefix = f"{place}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            role, why = place.split(".")[0], " ".join(str(error).split())
            raise ValueError(f"{file}: was written for another {role}: {why}") from error


def _expect_sites(file: Path, pair: Pair) -> None:
    """Run the pair once, which gives an autoguide its parameters, and compare its latents."""
    expected = {z.name: z.shape for z in pair.latents}
    expected |= {name: pair.shapes[name] for name in pair.summed_out}
    for role, function in (("model", pair.model), ("guide", pair.guide)):
        if isinstance(function, Guide):
            continue
        try:
            with pair.entered(seed=0), torch.no_grad(), objectives.Substitute({}) as record:
                trace = poutine.trace(function).get_trace(*pair.data.args, **pair.data.kwargs)
        except Exception as error:
            shapes = [tuple(t.shape) for t in pair.data.tensors()]
            raise ValueError(
                f"{file}: this {role} does not run on data of shapes {shapes} "
                f"({' '.join(str(error).split())}); load it with its own pair, and with data= "
                "where the pair depends on their values"
            ) from error
        for name, shape in expected.items():
            if role == "guide" and name in pair.summed_out:
                continue
            found = record.values.get(name)
            if found is None or tuple(found.shape) != shape:
                has = "no such site" if found is None else f"shape {tuple(found.shape)}"
                raise ValueError(
                    f"{file}: was written for another {role}: site {name!r} has shape {shape} in "
                    f"the file, and {has} here"
                )
        if role == "model":
            _expect_supports(file, pair, trace)


def _expect_supports(file: Path, pair: Pair, trace: poutine.Trace) -> None:
    """Latents of another kind are those of another model; bounds may come from the data."""
    for latent in pair.latents:
        found = latent_of(latent.name, trace.nodes[latent.name]).support
        kinds = [_kind(support_spec(support)) for support in (latent.support, found)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{file}: was written for another model: site {latent.name!r} has the support "
                f"{kinds[0]} in the file, and {kinds[1]} here"
            )


def _kind(spec: Mapping[str, Any]) -> str:
    return _kind(spec["base"]) if "base" in spec else spec["name"]


def _reads_data(pair: Pair) -> bool:
    """Whether the guide reads the data: it cannot be drawn from without them."""
    if isinstance(pair.guide, Guide) and not isinstance(pair.guide, Amortised):
        return False
    drawn = []
    for data in (pair.data, pair.data.map(torch.ones_like)):
        with pair.entered(seed=0), torch.no_grad():
            drawn.append(objectives.draw(pair, 1, data).values)
    return any(not torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())


def _read(path: str | Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The file, its facts and its tensors, or one line that says what is wrong with it."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; save a posterior there first")
    try:
        tensors, facts = unpacked(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: is damaged{error}") from error
    if facts["schema"] > _SCHEMA:
        raise ValueError(
            f"{file}: was written by a newer latentlab (schema {facts['schema']}, this one reads "
            f"{_SCHEMA}); update latentlab"
        )
    if facts["schema"] < _SCHEMA:
        raise ValueError(
            f"{file}: was written by an older latentlab (schema {facts['schema']}, this one reads "
            f"{_SCHEMA}), whose guides mean other numbers; fit again, or load it with that version"
        )
    return file, facts, tensors
