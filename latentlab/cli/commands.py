"""``latentlab`` and ``latentlab fit``, to which the commands are added."""

from __future__ import annotations

from typing import Annotated

import typer

import latentlab as ll
from latentlab.cli.options import PLAIN

__all__ = ["app", "fit"]

app = typer.Typer(**PLAIN, epilog="Example: latentlab demo --out demo/")
fit = typer.Typer(**PLAIN, epilog="Example: latentlab fit gmm --help")
app.add_typer(fit, name="fit", help="Fit a model to a file, and say whether to use the fit.")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Fit latent-variable models, and learn whether to believe the fit.

    Exit codes: 0 done; 1 the verdict is "do not use", or the fit diverged; 2 bad input, or no
    place to write to: nothing was written; 130 Ctrl-C.
    """
    if version:
        typer.echo(f"latentlab {ll.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
