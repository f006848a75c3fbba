"""The command line: a data file in, a verdict and its files out.

Standard output carries the answer, with ``--json`` one JSON object and nothing else. Progress,
warnings and errors go to standard error, an error as one line. A folder of results is written as a
whole or not at all. torch and Pyro are imported when first used, so that ``--help`` is quick.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as Grid

import latentlab as ll

if TYPE_CHECKING:
    import pandas as pd
    from rich.status import Status

__all__ = ["app", "main"]

_FILES = {
    "report": "report.html",
    "posterior": "posterior.nc",
    "summary": "summary.csv",
    "model": "model.safetensors",
}
_EXIT = {"use": 0, "use with care": 0, "do not use": 1}
_BAD_INPUT, _INTERRUPTED = 2, 130
_STYLE = {"use": "bold green", "use with care": "bold yellow", "do not use": "bold red"}
_ROWS_SHOWN = 30
_DRAWS = 1000  # that a label is averaged over

_PLAIN: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # its boxes do not fit on a screen
}
app = typer.Typer(**_PLAIN, epilog="Example: latentlab demo --out demo/")
fit = typer.Typer(**_PLAIN, epilog="Example: latentlab fit gmm --help")
app.add_typer(fit, name="fit", help="Fit a model to a file, and say whether to use the fit.")


def _option(metavar: str, words: str, *names: str, least: int | None = None) -> Any:  # noqa: ANN401
    return typer.Option(*names, metavar=metavar, help=words, min=least)


_Data = Annotated[
    Path, typer.Argument(metavar="DATA", help="CSV, TSV, Parquet, JSON lines, NPY or NPZ.")
]
_Run = Annotated[Path, typer.Argument(metavar="DIR", help="Where a fit was written to.")]
_Out = Annotated[Path, _option("DIR", "Folder for the results.")]
_Columns = Annotated[str | None, _option("A,B", "Columns to take, in this order.")]
_Seed = Annotated[int, _option("N", "Same seed, same numbers.", least=0)]
_DrawSeed = Annotated[
    int | None, _option("N", "Of the draws; by default the fit's.", "--seed", least=0)
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]


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


@fit.command("gmm", epilog="Example: latentlab fit gmm measurements.csv --components 3 --out run/")
def _fit_gmm(
    data: _Data,
    components: Annotated[int, _option("K", "Number of components.", least=1)],
    out: _Out,
    columns: _Columns = None,
    guide: Annotated[str, _option("NAME", "full_rank, mean_field, point or auto.")] = "auto",
    num_restarts: Annotated[int | None, _option("N", "Starts; by default 4.", least=1)] = None,
    max_steps: Annotated[int, _option("N", "Steps at the most.", least=1)] = 20_000,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Fit a mixture of diagonal Gaussians.

    Writes report.html, posterior.nc (ArviZ), summary.csv and model.safetensors to DIR. Empty cells
    are missing and integrated out. Ctrl-C ends the climb; what it reached is judged and written.
    """
    with _bad_input():
        from latentlab.data.checks import as_rows

        table = ll.data.load(data, _listed(columns))
        table = as_rows(table, argument=str(data), allow_missing=True)
        model = ll.GaussianMixture(table.x.shape[1], components)
    settings = {"guide": guide, "num_restarts": num_restarts, "max_steps": max_steps, "seed": seed}
    _fit(model, table, out, settings, as_json=as_json)


@app.command("check", epilog="Example: latentlab check run/ --data measurements.csv")
def _check(
    run: _Run,
    data: Annotated[Path | None, _option("DATA", "The data that were fitted.")] = None,
    columns: _Columns = None,
    seed: _DrawSeed = None,
    as_json: _Json = False,
) -> None:
    """Say whether to use a fit, and what that rests on.

    A fit does not hold its data: without --data this is the verdict that was stored with it, with
    --data everything is measured anew.
    """
    with _bad_input(), _busy("checking the fit"):
        posterior = ll.load(run)
        if data is not None:
            posterior = ll.load(run, data=_matching(posterior, data, columns))
        verdict = posterior.check(seed=seed)
    if as_json:
        _print_json(_facts(posterior, verdict, posterior.summary()))
    else:
        _print_verdict(verdict)
        _print_pairs(verdict.evidence)
        if data is None:
            _print("\n  stored with the fit; --data DATA measures it anew")
    raise typer.Exit(_EXIT[verdict.level])


@app.command("predict", epilog="Example: latentlab predict run/ new.csv --out labels.csv")
def _predict(
    run: _Run,
    data: _Data,
    out: Annotated[Path, _option("FILE", "A .csv or .parquet file.")],
    columns: _Columns = None,
    seed: _DrawSeed = None,
) -> None:
    """Label rows: component, probability of each one, log-density.

    FILE has one line for each row of DATA, in the same order. Components are numbered as in
    summary.csv.
    """
    with _bad_input():
        from latentlab.protocols import LabelsRows

        posterior = _load(run)
        model = posterior.model
        if not isinstance(model, LabelsRows):
            raise ValueError(f"{run}: a {type(model).__name__} has no labels for rows")
        table = _matching(posterior, data, columns)
        _expect_writable(out, data)
        labels = model.label_rows(posterior._aligned(_DRAWS, seed).draws, table.x)
    _write_table({name: value.numpy(force=True) for name, value in labels.items()}, out)


@app.command("sample", epilog="Example: latentlab sample run/ -n 1000 --out new.csv")
def _sample(
    run: _Run,
    num_rows: Annotated[int, _option("N", "Number of rows.", "-n", least=1)],
    out: Annotated[
        Path | None, _option("FILE", "A .csv or .parquet file; by default CSV is printed.")
    ] = None,
    seed: _DrawSeed = None,
) -> None:
    """Draw new rows of data from the fit.

    Each row has a posterior draw of its own, so that rows also differ by what the fit does not
    know. Draws of the parameters are in posterior.nc.
    """
    with _bad_input():
        posterior = _load(run)
        if out is not None:
            _expect_writable(out)
        blank = posterior.pair.data.args[0][:1] * 0
        (rows,) = posterior.predict(num_rows, blank, seed=seed).values()
    columns = dict(zip(_names(posterior), rows[:, 0].T.numpy(force=True), strict=True))
    _write_table(columns, out)


@app.command("demo", epilog="Example: latentlab demo --out demo/")
def _demo(out: _Out = Path("latentlab-demo"), seed: _Seed = 0, as_json: _Json = False) -> None:
    """Fit three components to the petals of 150 irises.

    Takes some seconds, and no file. DIR also gets the data, iris.csv, to go on with.
    """
    from sklearn.datasets import load_iris

    petals = load_iris(as_frame=True).frame[["petal length (cm)", "petal width (cm)"]]
    model = ll.GaussianMixture(num_features=2, num_components=3)
    data = {"iris.csv": petals.to_csv(index=False)}
    _fit(model, ll.data.load(petals), out, {"seed": seed}, data, as_json=as_json)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Arguments:
        args: the words after ``latentlab``; by default those of the process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot write
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = app(args=args, prog_name="latentlab", standalone_mode=False)
        except typer.TyperException as error:
            code = _show_line(error.format_message(), error.exit_code)
        except OSError as error:
            code = _show_line(str(error), _BAD_INPUT)
    sys.exit(code)


# ── what goes in ─────────────────────────────────────────────────────────────────────────────


class _BadInputError(typer.TyperException):
    exit_code = _BAD_INPUT


@contextmanager
def _bad_input() -> Iterator[None]:
    """What the library says of the input ends the command with one line."""
    try:
        yield
    except (ImportError, MemoryError, OSError, TypeError, ValueError) as error:
        raise _BadInputError(str(error) or type(error).__name__) from error


def _listed(columns: str | None) -> list[str] | None:
    """``a,b`` as a list; a name with a comma in it goes in quotes, as in a file."""
    return None if columns is None else next(csv.reader([columns], skipinitialspace=True), [])


def _load(run: Path) -> ll.Posterior:
    """A posterior to draw from, whose verdict is not kept quiet."""
    posterior = ll.load(run)
    level = posterior.check().level
    if level == "do not use":
        _show_line(f'warning: the verdict on this fit is "{level}"; see latentlab check {run}')
    return posterior


def _names(posterior: ll.Posterior) -> tuple[str, ...]:
    return posterior.names or ll.data.Table(posterior.pair.data.args[0]).names


def _matching(posterior: ll.Posterior, data: Path, columns: str | None) -> ll.data.Table:
    """Rows with the columns that were fitted."""
    from latentlab.data.checks import as_rows

    names = _names(posterior)
    table = ll.data.load(data, _listed(columns))
    if set(table.names) > set(names):
        line = io.StringIO()
        csv.writer(line).writerow(names)
        way = shlex.quote(line.getvalue().strip())
        raise ValueError(f"{data}: more columns than were fitted; add --columns {way}")
    return as_rows(table, argument=str(data), min_rows=1, allow_missing=True, names=names)


# ── what comes out ───────────────────────────────────────────────────────────────────────────


def _fit(
    model: Any,  # noqa: ANN401
    table: ll.data.Table,
    out: Path,
    settings: Mapping[str, Any],
    texts: Mapping[str, str] | None = None,
    *,
    as_json: bool,
) -> None:
    """Fit, judge, write and show; ``texts`` are further files for the folder."""
    with _results(out) as aside:
        try:
            with _bad_input():
                posterior = ll.fit(model, table, **settings)
        except ll.FitDivergedError as error:
            raise typer.TyperException(str(error)) from error
        with _busy("checking the fit and writing its report"):
            verdict, summary = posterior.check(), posterior.summary()
            for name, text in (texts or {}).items():
                (aside / name).write_text(text, encoding="utf-8")
            posterior.report(aside / _FILES["report"])
            posterior.to_arviz().to_netcdf(str(aside / _FILES["posterior"]))
            summary.to_csv(aside / _FILES["summary"], index=False)
            posterior.save(aside / _FILES["model"])
    paths = {what: str(out / name) for what, name in _FILES.items()}
    if as_json:
        _print_json({**_facts(posterior, verdict, summary), "paths": paths})
    else:
        _print_verdict(verdict)
        _print_summary(summary, paths["summary"])
        steps = f"{len(posterior.losses)} steps in {posterior.seconds:.1f} s"
        _print_pairs({"ELBO": f"{posterior.elbo} nats, {steps}", **paths})
    interrupted = posterior.stop_reason.startswith("interrupted")
    raise typer.Exit(_INTERRUPTED if interrupted else _EXIT[verdict.level])


@contextmanager
def _results(out: Path) -> Iterator[Path]:
    """A hidden folder in ``out``; at the end its files are put in place, or none of them is."""
    from latentlab.inference.checkpoint import probe

    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        probe(out)
        with TemporaryDirectory(dir=out, prefix=".latentlab-") as aside:
            yield Path(aside)
            for file in Path(aside).iterdir():
                file.replace(out / file.name)
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _expect_writable(file: Path, data: Path | None = None) -> None:
    """Refuse a file that could not be written, before the work."""
    from latentlab.inference.checkpoint import probe

    if file.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--out: expected a name that ends in .csv or .parquet, got {file}")
    if file.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"{file}: writing it needs pip install 'latentlab[parquet]'")
    if data is not None and file.exists() and file.samefile(data):
        raise ValueError(f"--out: {file} holds the data; choose another name")
    probe(file.parent)


def _write_table(columns: Mapping[str, Any], file: Path | None) -> None:
    """All of a file or nothing of it; without a file, CSV on standard output."""
    import pandas as pd

    from latentlab.inference.checkpoint import write_atomically

    frame = pd.DataFrame(columns)
    if file is None:
        frame.to_csv(sys.stdout, index=False)
        return
    buffer = io.BytesIO()
    frame.to_csv(buffer, index=False) if file.suffix == ".csv" else frame.to_parquet(buffer)
    write_atomically(file, buffer.getvalue())
    _print(f"{file}: {len(frame)} rows of {', '.join(columns)}")


def _facts(posterior: ll.Posterior, verdict: ll.Verdict, summary: pd.DataFrame) -> dict[str, Any]:
    """A fit as JSON values."""
    spec = verdict.spec()
    return {
        "verdict": spec.pop("level"),
        **spec,
        "elbo": {"value": posterior.elbo.value, "se": posterior.elbo.se},
        "converged": posterior.converged,
        "stop_reason": posterior.stop_reason,
        "steps": len(posterior.losses),
        "seconds": posterior.seconds,
        "seed": posterior.seed,
        "summary": summary.to_dict("records"),
    }


def _print_json(value: dict[str, Any]) -> None:
    def finite(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    sys.stdout.write(json.dumps(finite(value), indent=2) + "\n")  # JSON has no NaN, but null


# ── what is shown ────────────────────────────────────────────────────────────────────────────


def _console(*, stderr: bool = False) -> Console:
    """Texts are the user's own: nothing in them is taken for markup or coloured."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def _busy(what: str) -> Status:
    """A spinner on a terminal, nothing elsewhere."""
    return _console(stderr=True).status(what)


def _show_line(message: str, code: int = 0) -> int:
    sys.stderr.write(f"latentlab: {' '.join(message.split())}\n")
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:  # noqa: ANN401
    _show_line(f"warning: {message}")


def _print(text: str) -> None:
    _console().print(text, soft_wrap=True)


def _print_verdict(verdict: ll.Verdict) -> None:
    _console().print(verdict.level, style=_STYLE[verdict.level])
    grid = Grid.grid(padding=(0, 2))
    for word, lines in (("why", verdict.reasons), ("try", verdict.next_steps)):
        for line in lines:
            grid.add_row(f"  {word}", line)
    _console().print(grid)
    _print("")


def _print_pairs(pairs: Mapping[str, str]) -> None:
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        _print(f"  {name:<{width}}  {value}")


def _print_summary(summary: pd.DataFrame, file: str) -> None:
    """Mean, sd and 90 % interval of each number."""
    grid = Grid(box=None, padding=(0, 2), header_style="bold")
    for name in ("site", "index", "mean", "sd", "5 %", "95 %"):
        grid.add_column(name, justify="left" if name in ("site", "index") else "right")
    for row in summary.head(_ROWS_SHOWN).to_dict("records"):
        numbers = (_rounded(row[name], row["sd"]) for name in ("mean", "sd", "q05", "q95"))
        grid.add_row(row["site"], row["index"], *numbers)
    _console().print(grid)
    if len(summary) > _ROWS_SHOWN:
        _print(f"  ... and {len(summary) - _ROWS_SHOWN} more in {file}")
    _print("")


def _rounded(value: float, sd: float) -> str:
    """To two digits of the standard deviation, however far from zero the value is."""
    if not (sd > 0 and value != 0 and math.isfinite(value)):
        return f"{value:.4g}"
    digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(sd)) + 2
    return f"{value:#.{min(max(digits, 2), 16)}g}".rstrip(".")
