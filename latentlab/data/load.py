"""``load``: a table from a file, a frame or an array.

pandas reads the files; what is here names the fault, the line and the column where one is broken.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

import numpy as np

from latentlab.data.convert import as_table, from_frame
from latentlab.data.table import Columns, Table, check_unique, listed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["load", "load_steps"]

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".ndjson")
_ARRAYS = (".npy", ".npz")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zip")
_KNOWN = (*_SEPARATORS, ".parquet", *_JSON, *_ARRAYS)


def load(source: object, columns: Columns | None = None) -> Table:
    """Read rows of numbers, and keep the names of their columns.

    A file's first line names its columns. Cells that are empty or hold ``NA``, ``NaN`` or ``null``
    are missing. A first column without a name, or called ``rownames``, holds the names of the rows
    where R or pandas wrote the file: it is left out unless it is chosen. Nothing is unpickled.

    Arguments:
        source: a path to CSV, TSV, JSON lines (each of them also ``.gz``, ``.bz2``, ``.xz`` or
            ``.zip``), Parquet, NPY or NPZ; or a pandas or polars frame, an array, a tensor, a
            ``Table``.
        columns: names of the columns to take, in this order; ints for arrays. By default all,
            which must then be numeric.

    Returns:
        The table, float64 (a float32 tensor stays so), in the units of the source.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is broken, or a column is absent or not numeric; the message names
            file, line and column.
        TypeError: if the source holds no real numbers.

    Example:
        >>> import pandas as pd
        >>> load(pd.DataFrame({"site": ["a", "b"], "mass": [1, 2]}), columns=["mass"])
        Table(2 rows, 1 column: 'mass'; 0 missing cells)
    """
    if not isinstance(source, str | os.PathLike):
        return as_table(source, columns, argument="source")
    path = Path(source).expanduser()
    kind = _kind(path)
    found = _guarded(path, kind, columns)
    if isinstance(found, np.ndarray):
        return as_table(found, columns, argument=str(path))
    if not len(found):
        raise ValueError(f"{path}: expected rows of numbers, got none")
    return from_frame(found, columns, argument=str(path), place=partial(_place, path, kind))


def load_steps(
    source: str | os.PathLike[str], columns: Columns | None = None, *, keys: Sequence[str] = ()
) -> pd.DataFrame:
    """Read the steps of sequences: columns of numbers, and those that tell the steps apart.

    Arguments:
        source: a path, as for :func:`load`.
        columns: names of the columns of numbers; by default all but the keys.
        keys: names of columns of any kind: ids, times. Text stays as it stands in the file.

    Returns:
        A frame, for :func:`latentlab.data.as_sequences`.

    Raises:
        ValueError: as :func:`load`; also if a key is absent or lacks a value.
    """
    path = Path(source).expanduser()
    if not keys:
        return _frame_of(load(path, columns))
    kind = _kind(path)
    found = _guarded(path, kind, columns, keys)
    frame = _frame_of(as_table(found, argument=str(path))) if kind in _ARRAYS else found
    check_unique(frame.columns, str(path))
    if absent := [key for key in keys if key not in frame.columns]:
        raise ValueError(f"{path}: no column {listed(absent)}; it has {listed(frame.columns)}")
    place = partial(_place, path, kind)
    for key in keys:
        if (empty := frame[key].isna().to_numpy()).any():
            row = int(empty.argmax())
            raise ValueError(f"{path}: column {key!r} has no value in {place(row)}")
    rest = frame[[name for name in frame.columns if name not in keys]]
    if not rest.shape[1]:
        raise ValueError(
            f"{path}: expected columns of numbers, got no column besides {listed(keys)}"
        )
    numbers = _frame_of(from_frame(rest, columns, argument=str(path), place=place))
    return numbers.assign(**{key: frame[key].to_numpy() for key in keys})


def _frame_of(table: Table) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(table.x.numpy(force=True), columns=list(table.names))


def _kind(path: Path) -> str:
    """The ending that says how to read the file."""
    if path.is_dir():
        raise ValueError(f"{path}: expected a file, got a folder; name one of the files in it")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; the current folder is {Path.cwd()}")
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    kind = name.suffix.lower()
    if kind not in _KNOWN or (name != path and kind not in (*_SEPARATORS, *_JSON)):
        raise ValueError(
            f"{path}: expected a name that ends in {listed(_KNOWN)}; "
            "read others with pandas and pass the frame"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: expected rows of numbers, got an empty file")
    return kind


def _guarded(path: Path, kind: str, columns: Columns | None, texts: Sequence[str] = ()) -> Any:  # noqa: ANN401
    """The array or frame in the file; whatever is wrong with it, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read(path, kind, columns, texts)
    except (MemoryError, PermissionError):
        raise
    except ImportError as error:
        way = "pip install 'latentlab[parquet]'"
        raise ImportError(f"{path}: reading it needs another package; {way}") from error
    except Exception as error:  # the readers raise what they like at broken bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        if kind in _ARRAYS and "pickle" in reason:  # NumPy would say how to load them all the same
            reason = "it holds pickled objects, which are never loaded"
        raise ValueError(
            f"{path}: not readable as {kind[1:].upper()}: {reason}; "
            "mend the file, or read it another way and pass a frame or an array"
        ) from error


def _read(path: Path, kind: str, columns: Columns | None, texts: Sequence[str]) -> Any:  # noqa: ANN401
    import pandas as pd

    if kind in _SEPARATORS:
        return _read_csv(path, _SEPARATORS[kind], texts, named=columns is not None)
    if kind in _JSON:
        return _read_json(path)
    return pd.read_parquet(path) if kind == ".parquet" else _read_array(path)


def _read_array(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        if len(loaded.files) != 1:
            raise ValueError(
                f"expected exactly one array, got {listed(loaded.files) or 'none'}; "
                "numpy.load(path)[name] is one of them"
            )
        return loaded[loaded.files[0]]


def _read_json(path: Path) -> Any:  # noqa: ANN401
    import pandas as pd

    try:
        return pd.read_json(path, lines=True, dtype=False, precise_float=True)
    except ValueError:
        for line, text in _json_lines(path):
            try:
                json.loads(text)
            except ValueError as error:
                raise ValueError(f"line {line} is no JSON") from error
        raise


def _read_csv(path: Path, separator: str, texts: Sequence[str], *, named: bool) -> Any:  # noqa: ANN401
    import pandas as pd

    header = next((cells for _, cells in _records(path, separator)), [])
    if any("\0" in cell for cell in header):
        raise ValueError("line 1 is not text")
    if header and all(map(_is_number, header)) and not named:
        raise ValueError(
            f"line 1 holds numbers ({listed(header, 3)}), not names of columns; "
            "if they are names, choose them with columns=[...]"
        )
    if len(header) == 1 and (found := [mark for mark in ";\t,|" if mark in header[0]]):
        way = f"pandas.read_csv(path, sep={found[0]!r}) makes a frame of it"
        raise ValueError(f"line 1 is separated by {found[0]!r}, not by {separator!r}; {way}")
    check_unique([name for name in header if name], "line 1")  # pandas would rename them
    try:
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
        kinds = dict.fromkeys(texts, str)
        frame = pd.read_csv(path, sep=separator, index_col=False, dtype=kinds)
    except (pd.errors.ParserError, pd.errors.ParserWarning):
        _check_lengths(path, separator, len(header))
        raise
    if frame.iloc[:, -1].isna().any():  # pandas fills short rows up without a word
        _check_lengths(path, separator, len(header))
    return frame


def _check_lengths(path: Path, separator: str, width: int) -> None:
    for line, cells in _records(path, separator):
        n = len(cells)
        if n != width and not (n == width + 1 and not cells[-1]):  # pandas takes a last comma
            raise ValueError(f"line {line} has {n} cell{'s' * (n != 1)}, the header {width}")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _place(path: Path, kind: str, row: int) -> str:
    """The line of the file that a row of the frame came from."""
    if kind in _JSON:
        lines: Iterator[tuple[int, Any]] = _json_lines(path)
    elif kind in _SEPARATORS:
        lines = islice(_records(path, _SEPARATORS[kind]), 1, None)
    else:
        return f"row {row}"
    try:
        return f"line {next(islice(lines, row, None))[0]}"
    except (StopIteration, csv.Error):  # csv and pandas count otherwise
        return f"row {row}"


def _records(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The number of the line and its cells, blank lines left out as pandas does."""
    with _text(path) as text:
        reader = csv.reader(text, delimiter=separator)
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield reader.line_num, cells


def _json_lines(path: Path) -> Iterator[tuple[int, str]]:
    with _text(path) as text:
        for line, content in enumerate(text, start=1):
            if content.strip():
                yield line, content


def _text(path: Path) -> TextIO:
    openers: dict[str, Callable[..., Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zip": _open_zip,
    }
    stream = openers.get(path.suffix.lower(), open)(path, "rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def _open_zip(path: Path, _mode: str) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    return archive.open(archive.namelist()[0])
