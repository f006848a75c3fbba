r"""What a fit has done so far, on disk, so that the same call goes on from there after a kill.

A fit is made of parts: a start is placed, a stage is run, an ELBO is estimated. Each is a function
of where the pair stands, of the seed and of the step, and of nothing else; so it has a name,

.. math:: \text{name} = \mathrm{sha256}(\text{kind}, \text{where the pair stands}, \text{seed},
          \text{step}, \dots),

under which its result is kept. To resume is to run the fit again: what lies between the parts is
decided anew, in the same way, and a part whose name is known is read, not run. Nothing has to be
in order, and a part that is not there costs its time and no more.

Stages that carry on the moments of the one before are a chain: the name of each is part of the
name of the next. What only the next link needs, names that begin with ``passing``, is kept of the
two newest; of a stage that lasts, a point on the way is kept, and the one before it.

| ``manifest.json`` | what was fitted, and how: another call is refused |
| ``lock`` | held by the process that fits; the system lets go of it with the process |
| ``00017-NAME.safetensors`` | the result of a part, in the order in which they were run |
| ``point.safetensors`` | how far the stage in progress is; ``point.before.safetensors`` |
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentlab.diagnostics import Estimate
from latentlab.inference.files import packed, probe, unpacked, update, write_atomically

__all__ = ["Journal", "Part", "opened"]

_POINT_EVERY = 30.0  # seconds between two points of a stage
_POINT_COST = 20  # a point is not written before so many times the time the last one took
_FULL = 2  # newest links of chains of which all is kept
_RANDOM = "random state"
_PART = re.compile(r"(\d{5,})-([0-9a-f]{32})\.safetensors")
_LEFT = re.compile(r"\.(\d{5,}-[0-9a-f]{32}|point|point\.before|manifest)\.\w+\.[0-9a-f]{8}")


@dataclass(frozen=True)
class Part:
    """The result of a part of a fit.

    Arguments:
        tensors: by name; names may have a prefix and a dot.
        facts: JSON values.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]) -> Part:
        """A part of groups of tensors, each under its prefix."""
        tensors = {f"{g}.{name}": t for g, group in groups.items() for name, t in group.items()}
        return cls(tensors, dict(facts))

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors with a prefix, by the rest of their names."""
        start = f"{prefix}."
        return {k.removeprefix(start): t for k, t in self.tensors.items() if k.startswith(start)}


class Journal:
    """The parts of a fit, on disk; without a folder it keeps nothing, and costs nothing.

    Arguments:
        folder: where they are kept, there already.

    Example:
        >>> journal = Journal()
        >>> journal.remember(journal.name("a sum", 1, 2), lambda: Part({}, {"sum": 3})).facts
        {'sum': 3}
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._writes = folder is not None
        self._files: dict[str, Path] = {}
        self._full: list[str] = []
        self._marked = ""
        self._due = time.monotonic() + _POINT_EVERY
        if folder is not None:
            self._read()

    def begin(self, manifest: Mapping[str, str]) -> None:
        """Say what is fitted; a folder that was begun for something else is refused.

        Arguments:
            manifest: everything that the result depends on, by name.

        Raises:
            ValueError: naming what differs.
        """
        if self.folder is None:
            return
        file = self.folder / "manifest.json"
        if not file.exists():
            self._forget(0)  # of what, nobody knows
            write_atomically(file, json.dumps(manifest, indent=1).encode())
            return
        try:
            begun = json.loads(file.read_text())
            if not isinstance(begun, dict) or not begun:
                raise ValueError("expected what was fitted, by name")
            differing = [k for k in {**begun, **manifest} if begun.get(k) != manifest.get(k)]
        except (ValueError, OSError) as error:
            raise ValueError(f"checkpoint: {file} is damaged; choose another folder") from error
        if differing:
            old, new = (
                ", ".join(f"{k}={kept.get(k, 'none')}" for k in differing)
                for kept in (begun, manifest)
            )
            raise ValueError(
                f"checkpoint: {self.folder} was begun with {old}, and this call has {new}; give "
                "the same, or another folder"
            )

    def name(self, *parts: object) -> str:
        """The name of a part: a sha256 of all that it depends on; empty if nothing is kept.

        Arguments:
            parts: its kind, and tensors, dictionaries of tensors or plain values.
        """
        if self.folder is None:
            return ""
        digest = hashlib.sha256()
        for part in (*parts, torch.get_rng_state()):
            items = [x for kv in part.items() for x in kv] if isinstance(part, Mapping) else part
            update(digest, items)
            digest.update(b"\0")
        return digest.hexdigest()[:32]

    def remember(self, name: str, compute: Callable[[], Part]) -> Part:
        """The part of a name: read if it is known, else computed and kept.

        Arguments:
            name: as :meth:`name` gives it.
            compute: runs the part.
        """
        part = self.find(name)
        if part is None:
            part = compute()
            self.keep(name, lambda: part)
        return part

    def estimate(self, name: str, compute: Callable[[], Estimate]) -> Estimate:
        """As :meth:`remember`, for an estimate."""
        if self.folder is None:
            return compute()

        def run() -> Part:
            found = compute()
            return Part({}, {"estimate": [float(found.value), float(found.se)]})

        return Estimate(*self.remember(name, run).facts["estimate"])

    def find(self, name: str) -> Part | None:
        """The part of a name, if it is known; torch's random state is then as it was after it."""
        file = self._files.get(name)
        if file is None:
            return None
        try:
            return _as_it_was(*unpacked(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise OSError(f"{file}: changed while the fit ran; run it again") from error

    def keep(self, name: str, make: Callable[[], Part]) -> None:
        """Keep a part that was run.

        Arguments:
            name: as :meth:`name` gives it.
            make: puts it together; not called if nothing is kept.
        """
        if self.folder is None or not self._writes:
            return
        file = self.folder / f"{len(self._files):05d}-{name}.safetensors"
        part = make()
        if self._write(file, _packed(Part(part.tensors, {**part.facts, "of": name}))):
            self._files[name] = file
        for point in self._points() if name == self._marked else ():
            point.unlink(missing_ok=True)
        self._due = time.monotonic() + _POINT_EVERY
        if part.under("passing"):
            self._full.append(name)
            self._thin_out()

    def point(self, name: str) -> Part | None:
        """How far a part came that was not finished.

        Arguments:
            name: of the part.
        """
        for file in self._points() if name else ():
            if not file.exists():
                continue
            try:
                tensors, facts = unpacked(file.read_bytes())
            except (OSError, ValueError):
                _tell_damaged(file)
                continue
            if facts.pop("of", "") == name:
                self._marked = name
                return _as_it_was(tensors, facts)
        return None

    def mark(self, name: str, make: Callable[[], Part]) -> None:
        """Keep a point on the way, if it is time to.

        Arguments:
            name: of the part in progress.
            make: puts together what it needs to go on from here; not called if it is not time.
        """
        if not self._writes or time.monotonic() < self._due:
            return
        begin, (file, before) = time.monotonic(), self._points()
        part = make()
        with suppress(OSError):  # there may be none
            file.replace(before)
        self._marked = name
        self._write(file, _packed(Part(part.tensors, {**part.facts, "of": name})))
        now = time.monotonic()
        self._due = now + max(_POINT_EVERY, _POINT_COST * (now - begin))

    def _points(self) -> tuple[Path, ...]:
        """The files of the newest point and of the one before."""
        if self.folder is None:
            return ()
        return self.folder / "point.safetensors", self.folder / "point.before.safetensors"

    def _read(self) -> None:
        """Look through what is there: parts up to the first that is damaged or missing."""
        for left in (self.folder or Path()).iterdir():
            if _LEFT.fullmatch(left.name):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)
        last, begin, is_full = "", 0, True  # the last chain of stages
        for k, (number, name, file) in enumerate(self._parts()):
            try:
                if number != k:
                    raise ValueError(f": {k - 1} is followed by {number}")
                tensors, facts = unpacked(file.read_bytes())
                if facts.get("of") != name:
                    raise ValueError(": it is another part")
            except (OSError, ValueError):
                _tell_damaged(file)
                # A chain whose last link is thinned out cannot be carried on: it is run again.
                self._forget(k if is_full else begin)
                return
            self._files[name] = file
            if "after" in facts:
                begin = begin if last and facts["after"] == last else k
                last, is_full = name, any(key.startswith("passing.") for key in tensors)
                self._full += [name] * is_full

    def _parts(self) -> list[tuple[int, str, Path]]:
        """Number, name and file of the parts that are there, in order."""
        files = [*(self.folder or Path()).iterdir()]
        found = ((_PART.fullmatch(file.name), file) for file in files)
        return sorted((int(match[1]), match[2], file) for match, file in found if match)

    def _forget(self, first: int) -> None:
        """Remove the parts from a number on."""
        for number, name, file in self._parts():
            if number >= first:
                file.unlink(missing_ok=True)
                self._files.pop(name, None)
        self._full = [name for name in self._full if name in self._files]

    def _thin_out(self) -> None:
        while len(self._full) > _FULL:
            file = self._files.get(self._full.pop(0))
            if file is not None:
                tensors, facts = unpacked(file.read_bytes())
                own = {k: t for k, t in tensors.items() if not k.startswith("passing.")}
                self._write(file, packed(own, facts))

    def _write(self, file: Path, content: bytes) -> bool:
        """Write a file; where that fails, say so once, and write no more."""
        try:
            write_atomically(file, content)
        except OSError as error:
            self._writes = False
            reason = getattr(error.__cause__, "strerror", None) or error
            warnings.warn(
                f"checkpoint: {file} cannot be written ({reason}); the fit goes on, and nothing "
                "more of it is kept",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        return True


@contextmanager
def opened(folder: str | Path | None) -> Iterator[Journal]:
    """The journal of a folder, which no other process may use meanwhile.

    Arguments:
        folder: made if missing; ``None`` for a journal that keeps nothing.

    Raises:
        OSError: if it cannot be written to, or is in use.
    """
    if folder is None:
        yield Journal()
        return
    if not isinstance(folder, str | Path):
        raise TypeError(f"checkpoint: expected a folder, got {folder!r}")
    if not str(folder).strip() or "\0" in str(folder):
        raise ValueError(f"checkpoint: expected a folder, got {str(folder)!r}")
    place = probe(Path(folder).expanduser())
    if (place / "lock").is_dir():
        raise OSError(f"checkpoint: {place / 'lock'} is a folder; choose another one")
    with (place / "lock").open("w") as lock:
        _take(lock, place)
        yield Journal(place)


def _take(lock: Any, place: Path) -> None:  # noqa: ANN401
    try:
        import fcntl
    except ImportError:  # not there on Windows
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"checkpoint: {place} is in use by another fit; wait for it, or choose another folder"
        ) from error
    except OSError:  # a file system that has no locks
        return


def _packed(part: Part) -> bytes:
    return packed({**part.tensors, _RANDOM: torch.get_rng_state()}, part.facts)


def _as_it_was(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Part:
    torch.set_rng_state(tensors.pop(_RANDOM))
    return Part(tensors, {key: value for key, value in facts.items() if key != "of"})


def _tell_damaged(file: Path) -> None:
    warnings.warn(
        f"checkpoint: {file} is damaged or not in its place; the fit goes on from before it",
        RuntimeWarning,
        stacklevel=2,
    )
