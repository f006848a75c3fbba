"""The house stands: imports go down, and what must not be in the library is not in it."""

import ast
import sys
from pathlib import Path

import pytest

import latentlab

PACKAGE = Path(latentlab.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# From the ground up. A part imports itself and the floors below, never its neighbours: the two
# towers do not see each other. The report draws plain arrays, and so stands on the ground.
FLOORS = (
    ("seeds",),
    (
        *("data", "diagnostics", "distributions", "nn", "objectives"),
        *("protocols", "report", "supports"),
    ),
    ("flows", "plates"),
    ("guides",),
    ("inference", "models"),
    ("codes", "loading"),
    ("sklearn", "testing"),
    ("__init__",),
    ("cli",),
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
ROOF = FLOORS[-1] + FLOORS[-3]

# What may be imported at the top of a file; all else is optional, and imported where it is used.
GROUND_PACKAGES = {"numpy", "pyro", "scipy", "torch"}
PACKAGES = GROUND_PACKAGES | {"safetensors"}

MAX_MODULE, MAX_FUNCTION = 500, 60  # lines


def part_of(name):
    return name.split("/")[0].removesuffix(".py")


def imports(tree):
    """Each module that is imported, with whether it is when the file is."""
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        or isinstance(function, ast.If)
        and "TYPE_CHECKING" in ast.unparse(function.test)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [("." * node.level) + (node.module or "")]
            if names == ["latentlab"]:
                names = [f"latentlab.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in inner


def upward(part, source):
    """Imports that do not go down, at the top of a file or in a function."""
    faults = []
    for name, _ in imports(ast.parse(source)):
        package, *rest = name.split(".")
        if package not in ("latentlab", ""):
            continue
        other = rest[0] if rest else "__init__"
        goes_down = FLOOR.get(other, len(FLOORS)) < FLOOR[part]
        if other != part and not (package and goes_down):
            faults.append(f"{part} imports {name}")
    return faults


def uninvited(part, source):
    """Packages that are imported with the file, and should be where they are used."""
    if part in ROOF or part == "__init__":
        return []
    allowed = GROUND_PACKAGES if FLOOR[part] <= FLOOR["flows"] else PACKAGES
    allowed = allowed | sys.stdlib_module_names | {"latentlab"}
    names = {name.split(".")[0] for name, at_once in imports(ast.parse(source)) if at_once}
    return [f"{part} imports {name} at the top" for name in sorted(names - allowed)]


def forbidden(part, source):
    """Calls and imports that have no place in the library."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and part != "cli":
            faults.append(f"line {node.lineno}: print")
        if isinstance(node, ast.keyword) and ast.unparse(node) == "weights_only=False":
            faults.append(f"line {node.value.lineno}: weights_only=False")
        if isinstance(node, ast.Assert):
            faults.append(f"line {node.lineno}: assert")
    names = {name.split(".")[0] for name, _ in imports(ast.parse(source))}
    return faults + sorted(names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib"})


def undocumented(source):
    """Public functions, classes and methods without a docstring."""
    tree = ast.parse(source)
    faults = [] if ast.get_docstring(tree) else ["the module"]
    for owner in [tree, *public(tree, ast.ClassDef)]:
        for node in public(owner, ast.FunctionDef | ast.ClassDef):
            overloaded = any("overload" in ast.unparse(d) for d in node.decorator_list)
            if not ast.get_docstring(node) and not overloaded:
                faults.append(node.name)
    return faults


def public(owner, kind):
    return [n for n in owner.body if isinstance(n, kind) and not n.name.startswith("_")]


def too_long(source):
    """Functions that do not fit on a screen, docstring left out, and files that are too long."""
    faults = ["the module"] if len(source.splitlines()) > MAX_MODULE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body and body[-1].end_lineno - body[0].lineno + 1 > MAX_FUNCTION:
                faults.append(node.name)
    return faults


def lists_its_names(source):
    return any(
        isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for node in ast.parse(source).body
    )


# ---- the library ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
class TestModule:
    def test_imports_go_down(self, name):
        assert upward(part_of(name), MODULES[name].read_text()) == []

    def test_optional_packages_are_imported_where_they_are_used(self, name):
        assert uninvited(part_of(name), MODULES[name].read_text()) == []

    def test_nothing_forbidden(self, name):
        assert forbidden(part_of(name), MODULES[name].read_text()) == []

    def test_what_is_public_is_documented_and_listed(self, name):
        assert undocumented(MODULES[name].read_text()) == []
        assert lists_its_names(MODULES[name].read_text())

    def test_modules_and_functions_stay_short(self, name):
        assert too_long(MODULES[name].read_text()) == []


def test_every_file_has_a_floor_and_says_what_it_holds():
    assert {part_of(name) for name in MODULES} <= set(FLOOR)
    assert not {Path(name).stem for name in MODULES} & {"utils", "util", "helpers", "misc"}
    assert max(name.count("/") for name in MODULES) == 1  # two levels of folders


# ---- the checks themselves can fail -------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("models", "from latentlab.inference.engine import fit"),
        ("inference", "def f():\n    from latentlab.models import GaussianMixture"),
        ("inference", "from latentlab import models"),
        ("models", "from latentlab import fit, rows"),
        ("models", "import latentlab as ll"),
        ("guides", "import latentlab.inference"),
        ("diagnostics", "from latentlab.data import load"),
        ("report", "if TYPE_CHECKING:\n    from latentlab.inference.posterior import Posterior"),
        ("inference", "from . import engine"),
        ("testing", "from latentlab.cli import app"),
    ],
)
def test_an_import_that_goes_up_is_found(part, source):
    assert upward(part, source)


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("inference", "def f():\n    from latentlab.report import Page"),
        ("inference", "from latentlab.inference import objectives"),
        ("models", "from latentlab.guides import FullRank\nimport torch"),
        ("cli", "import latentlab as ll"),
    ],
)
def test_an_import_that_goes_down_is_fine(part, source):
    assert upward(part, source) == []


def test_other_faults_are_found():
    assert uninvited("data", "import pandas as pd") == ["data imports pandas at the top"]
    assert uninvited("data", "def f():\n    import pandas") == []
    assert uninvited("data", "if TYPE_CHECKING:\n    import pandas") == []
    assert uninvited("data", "import safetensors")
    assert not uninvited("inference", "import safetensors.torch")
    assert forbidden("data", "print(3)")
    assert not forbidden("cli", "print(3)")
    assert forbidden("data", "def f():\n    import pickle")
    assert forbidden("data", "torch.load(file, weights_only=False)")
    assert forbidden("data", "assert x > 0")
    assert undocumented('"""M."""\nclass A:\n    """A."""\n    def f(self): ...') == ["f"]
    assert undocumented("class A:\n    def _f(self): ...") == ["the module", "A"]
    assert too_long("def f():\n" + "    x = 1\n" * 61) == ["f"]
    assert not too_long('def f():\n    """' + "\n" * 80 + '    """\n' + "    x = 1\n" * 60)
    assert too_long("x = 1\n" * 501) == ["the module"]
    assert not lists_its_names("def f():\n    __all__ = []")
