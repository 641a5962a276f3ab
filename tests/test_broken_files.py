"""Broken files are read whole, or refused with a reason; a plan is carried out or refused, never by half."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "broken_files.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("broken_files", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("files")
    script.write_good_files(path)
    return path


@pytest.mark.parametrize("name", ["neurons.json", "history.json", "plan.json", "ablation.json", "pruned.pt"])
def test_broken_files_are_read_whole_or_refused(script, folder, name):
    found = script.broken(name, 60, 1, folder)
    assert found.keys() == {"read", "refused"}
    assert found.total() == 60
    assert found["refused"] > found["read"] > 0


def test_the_script_knows_what_is_wrong(script, tmp_path):
    def use(path: Path) -> None:
        raise KeyError(path.name)

    assert script.judge(use, tmp_path / "a.json") == "WRONG KeyError: 'a.json'"
    assert "broken_files" not in sys.modules
