"""The rules of the house: who may import whom, what is public, how long things are."""

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning_neurons
from lightning_neurons import CRITERIA

ROOT = Path(lightning_neurons.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = [
    name
    for name in ("lightning_neurons", *(m.name for m in pkgutil.walk_packages([str(ROOT)], "lightning_neurons.")))
    if not name.endswith("__main__")
]


def test_imports_point_down_only():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_every_name_in_all_exists_once_and_in_order():
    wrong = {}
    for name in PACKAGES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # former places
            module = importlib.import_module(name)
        names = list(getattr(module, "__all__", []))
        missing = [n for n in names if not hasattr(module, n)]
        if missing or names != sorted(set(names), key=lambda n: (not n.isupper(), not n[0].isupper(), n)):
            wrong[name] = missing or names
    assert wrong == {}


def test_every_public_object_says_what_it_is():
    found = {name: getattr(lightning_neurons, name) for name in lightning_neurons.__all__}
    others = {name for name, thing in found.items() if not (inspect.isclass(thing) or inspect.isroutine(thing))}
    assert others == {"CRITERIA"}
    # Its own words, not inherited ones.
    assert [name for name in found.keys() - others if not (inspect.getdoc(found[name]) and found[name].__doc__)] == []


@pytest.mark.parametrize(
    "name", ["ActivationStatisticsCallback", "NeuronSensitivityCallback", "find_neurons", "measure", "agreement"]
)
def test_every_entry_point_has_an_example(name):
    assert "Example:" in (inspect.getdoc(getattr(lightning_neurons, name)) or "")


def _public(tree: Any) -> Iterator[Any]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


def test_every_file_and_everything_public_in_it_has_a_docstring():
    without = {
        (path.name, getattr(node, "name", ""))
        for path, tree in TREES.items()
        for node in (tree, *_public(tree))
        if node.body and not ast.get_docstring(node)
    }
    assert without == set()


def test_no_file_is_longer_than_400_lines():
    lengths = {path.name: len(path.read_text().splitlines()) for path in TREES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_function_body_is_longer_than_50_lines():
    functions = [
        (path.name, node)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {}
    for file, node in functions:
        body: Any = node.body[1:] if ast.get_docstring(node) else node.body
        if body:
            lengths[file, node.name] = body[-1].end_lineno - body[0].lineno + 1
    assert {name: length for name, length in lengths.items() if length > 50} == {}


def test_parameters_of_callbacks_have_types():
    annotations = [
        argument.annotation
        for path, tree in TREES.items()
        if "callbacks" in path.parts
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg)
        if argument is not None and argument.arg not in ("self", "cls")
    ]
    untyped = [one for one in annotations if one is None or (isinstance(one, ast.Name) and one.id == "Any")]
    assert len(annotations) > 1000
    assert len(untyped) / len(annotations) < 0.05


def test_no_file_is_called_utils_or_has_names_from_a_star():
    assert {path.stem for path in TREES} & {"utils", "helpers", "misc", "common"} == set()
    stars = [
        path.name
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]
    assert stars == []


def test_the_readme_mentions_every_criterion():
    readme = (ROOT.parent / "README.md").read_text()
    assert [name for name in CRITERIA if f"`{name}`" not in readme] == []


def test_criteria_are_importable_without_any_optional_package():
    code = (
        "import sys, pkgutil, importlib; import lightning_neurons.criteria as c; "
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(c.__path__, c.__name__ + '.')]; "
        "print(sorted({'captum', 'pandas'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_the_one_of_the_project_file():
    project = (ROOT.parent / "pyproject.toml").read_text()
    assert f'version = "{lightning_neurons.__version__}"' in project


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").exists()
