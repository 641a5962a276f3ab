"""Checks the shapes of tensors in signatures while testing, and nothing else.

What an argument may be besides is checked by the package itself, in words for people; a general type checker would get
in its way."""

import ast
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType, UnionType
from typing import Any, TypeVar, Union, get_origin

from beartype import beartype
from jaxtyping import jaxtyped

Function = TypeVar("Function", bound=Callable[..., Any])


def install(package: str) -> None:
    """Check shapes in all modules of ``package`` that are imported from now on."""
    sys.meta_path.insert(0, _Finder(package))


def check_shapes(described: Any) -> Any:
    """Check the shapes that a function or a dataclass declares, if it does."""
    hints = getattr(described, "__annotations__", {})
    return jaxtyped(described, typechecker=_only_shapes) if any(map(_is_shape, hints.values())) else described


def _only_shapes(function: Function) -> Function:
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: hint for name, hint in hints.items() if _is_shape(hint)}
    return beartype(function)


def _is_shape(hint: object) -> bool:
    # Of a container, a type checker looks at an entry at random, and tests compare random states.
    container = get_origin(hint) not in (None, Union, UnionType)
    return not container and ("jaxtyping" in repr(hint) or "jaxtyping" in getattr(type(hint), "__module__", ""))


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Compile the module with its decorators, beside the cache of compiled files."""
        tree = ast.parse(self.get_data(self.path), self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                decorator = ast.parse("__import__('shape_checks').check_shapes", mode="eval").body
                # A dataclass is made by its own decorator first; a function is checked as it was written.
                node.decorator_list.insert(0 if isinstance(node, ast.ClassDef) else len(node.decorator_list), decorator)
                for part in ast.walk(decorator):
                    ast.copy_location(part, node)
        return compile(tree, self.path, "exec", dont_inherit=True)
