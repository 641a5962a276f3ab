"""The rules of the house: who may import whom, what is public, how long things are."""

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning_neurons
from lightning_neurons import CRITERIA

ROOT = Path(lightning_neurons.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PACKAGES = [
    name
    for name in ("lightning_neurons", *(m.name for m in pkgutil.walk_packages([str(ROOT)], "lightning_neurons.")))
    if not name.endswith("__main__")
]
with_each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def test_imports_point_down_only():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_name_in_all_exists_once_and_in_order(name):
    module = importlib.import_module(name)
    names = list(getattr(module, "__all__", []))
    assert [n for n in names if not hasattr(module, n)] == []
    assert names == sorted(set(names), key=lambda n: (not n.isupper(), not n[0].isupper(), n))


@pytest.mark.parametrize("name", lightning_neurons.__all__)
def test_every_public_object_says_what_it_is(name):
    found = getattr(lightning_neurons, name)
    if inspect.isclass(found) or inspect.isroutine(found):
        assert inspect.getdoc(found)
        assert found.__doc__ is not None, "its own words, not inherited ones"
    else:
        assert name == "CRITERIA"


@pytest.mark.parametrize(
    "name", ["ActivationStatisticsCallback", "NeuronSensitivityCallback", "find_neurons", "measure", "agreement"]
)
def test_every_entry_point_has_an_example(name):
    assert "Example:" in (inspect.getdoc(getattr(lightning_neurons, name)) or "")


def definitions(path: Path) -> Iterator[Any]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def _public(tree: Any) -> Iterator[Any]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


@with_each_file
def test_every_file_and_everything_public_in_it_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body
    assert [node.name for node in _public(tree) if not ast.get_docstring(node)] == []


@with_each_file
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@with_each_file
def test_no_function_body_is_longer_than_50_lines(path):
    long = {}
    for node in definitions(path):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if not isinstance(node, ast.ClassDef) and body and body[-1].end_lineno - body[0].lineno >= 50:
            long[node.name] = body[-1].end_lineno - body[0].lineno + 1
    assert long == {}


@with_each_file
def test_no_file_is_called_utils_or_has_names_from_a_star(path):
    assert path.stem not in {"utils", "helpers", "misc", "common"}
    stars = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"
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
