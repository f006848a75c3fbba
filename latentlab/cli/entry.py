"""Where the command line begins and ends."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence

import typer

from latentlab.cli import answers, choose, demo, fits, uses
from latentlab.cli.commands import app
from latentlab.cli.inputs import BAD_INPUT
from latentlab.cli.show import show_line, show_warning

__all__ = ["main"]

_ADDED = (fits, uses, answers, choose, demo)  # each adds its commands when it is imported


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Arguments:
        args: the words after ``latentlab``; by default those of the process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot write
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            code = app(args=args, prog_name="latentlab", standalone_mode=False)
        except typer.TyperException as error:
            code = show_line(error.format_message(), error.exit_code)
        except OSError as error:
            code = show_line(str(error), BAD_INPUT)
    sys.exit(code)
