"""Safe files: tensors and facts without pickle, checked by a sha256, put in place in one step."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

__all__ = [
    "digest_of_all",
    "naming",
    "packed",
    "probe",
    "unpacked",
    "update",
    "write_atomically",
]


def packed(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """The bytes of a file: tensors, facts as JSON, and a sha256 of both.

    Arguments:
        tensors: by name.
        facts: JSON values.
    """
    own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    text = json.dumps(facts)
    # One entry: several would be written in an order that changes from run to run.
    return tensors_to_bytes(own, metadata={"latentlab": f"{digest_of_all(text, own)} {text}"})


def unpacked(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of the bytes of a file.

    Arguments:
        content: what :func:`packed` returned.

    Raises:
        ValueError: if they are others; the message goes on after "is damaged".
    """
    try:
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        digest, text = metadata["latentlab"].split(" ", 1)
        tensors = tensors_from_bytes(content)
    except Exception as error:
        raise ValueError(", or not a file of latentlab") from error
    if digest_of_all(text, tensors) != digest:
        raise ValueError(" (its sha256 does not match); use another copy")
    return tensors, json.loads(text)


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
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as trial:
            trial.write(b"probe")
    return folder


def write_atomically(file: Path, content: bytes) -> None:
    """Write aside, flush to disk, put in place: there is the old file or the new one.

    Arguments:
        file: the file to write.
        content: its bytes.

    Raises:
        OSError: if it cannot be written to; the message names it.
    """
    aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with naming(file):
        try:
            with aside.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(file)
        finally:
            with suppress(OSError):
                aside.unlink()
    with suppress(OSError):  # some systems cannot flush a folder
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Say which place cannot be written to, and what to do.

    Arguments:
        place: a file or a folder.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(
            f"{place}: cannot be written ({reason}); choose a folder that you may write to"
        ) from error


def digest_of_all(text: str, tensors: Mapping[str, Tensor]) -> str:
    """A sha256 of text and tensors.

    Arguments:
        text: any.
        tensors: by name.
    """
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        update(digest, tensors[name])
    return digest.hexdigest()


def update(digest: Any, value: Any) -> None:  # noqa: ANN401
    """Add the shape, type and bytes of a tensor, or the text of another value.

    Arguments:
        digest: of hashlib, in place.
        value: tensors may be in lists and tuples.
    """
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, list | tuple):
        digest.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            update(digest, item)
    else:
        digest.update(repr(value).encode())
