"""Run a benchmark by its name, or list the names."""

import argparse
import importlib
import pkgutil
from pathlib import Path

from tests import benchmarks


def main():
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    names.remove("__main__")
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=names, help="without it, the names are listed")
    parser.add_argument("--out", type=Path, help="folder to write NAME.md to")
    options = parser.parse_args()
    if options.name is None:
        for name in names:
            module = importlib.import_module(f"tests.benchmarks.{name}")
            print(f"{name}: {module.__doc__.splitlines()[0]}")
        return
    table = str(importlib.import_module(f"tests.benchmarks.{options.name}").run())
    print(table)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{options.name}.md").write_text(table)


if __name__ == "__main__":
    main()
