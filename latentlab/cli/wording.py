"""The library's words for an argument, as the option of the command line that sets it."""

from __future__ import annotations

import re

__all__ = ["as_options"]

_WORDS = (
    (r"^num_components:", "--components:"),
    (r"^num_states:", "--states:"),
    (r"^latent_dim:", "--latent:"),
    (
        r"^(covariance|guide|kind|batch_size|seed):",
        lambda found: _option(found[1]) + ":",
    ),
    (r"^(num_restarts|max_steps|checkpoint):", lambda found: _option(found[1]) + ":"),
    (r"^emissions:", "--emission:"),
    (r"^kinds:", "--likelihood:"),
    (r"\bgive the model num_categories=", "give --categories "),
    (r"\bcolumns=\[\.\.\.\]", "--columns a,b"),
    (r"\bcolumns=\[([^]]*)\]", lambda found: "--columns " + _plain(found[1])),
    (r'\bguide="(\w+)"', r"--guide \1"),
    (r"\ba larger max_steps\b", "a larger --max-steps"),
    (r'\bplot\("losses"\)', "the losses in report.html"),
    (r"\blatentlab\.data\.load\(\w+\)\.complete_rows\(\)", "another program"),
    (r",? or (an Emission|a callable)(?=, got)", ""),
    (r" and pass a frame or an array\b", " and save it as another file"),
)
_PLACES = {2: ("row", "column"), 3: ("sequence", "step", "column")}


def as_options(text: str, file: object = None) -> str:
    """A message of the library in the words of the command line.

    Arguments:
        text: the message.
        file: the data, which the library calls ``x``; places in them are counted from 1, as in
            an editor, rows below the names of the columns.

    Example:
        >>> as_options("num_components: expected at most 5, got 7")
        '--components: expected at most 5, got 7'
        >>> as_options("x: expected counts, got -1 at [0, 2]", "a.csv")
        'a.csv: expected counts, got -1 at row 1, column 3'
    """
    for word, option in _WORDS:
        text = re.sub(word, option, text)
    if file is not None:
        text = re.sub(r"^x\b(?=:| has)", str(file), text)
        text = re.sub(r"\bat \[(\d+(?:, \d+)+)\]", _place, text)
    return text


def _option(argument: str) -> str:
    return "--" + argument.replace("_", "-")


def _plain(names: str) -> str:
    return ",".join(name.strip().strip("'\"") for name in names.split(","))


def _place(found: re.Match[str]) -> str:
    indices = [int(index) + 1 for index in found[1].split(",")]
    names = _PLACES.get(len(indices), ("image", "channel", "line", "pixel"))
    if len(names) != len(indices):
        return found[0]
    parts = (f"{name} {index}" for name, index in zip(names, indices, strict=True))
    return "at " + ", ".join(parts)
