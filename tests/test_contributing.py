"""The drawing of the house in CONTRIBUTING.md is the one that imports are held to, and its files exist."""

import re
import tomllib

from tests.test_house import ROOT

TEXT = (ROOT.parent / "CONTRIBUTING.md").read_text()
CONTRACTS = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def drawn() -> list[set[str]]:
    """The packages on each line of the drawing, from top to bottom."""
    lines = re.search(r"```\n(cli.*?)```", TEXT, re.DOTALL)[1].splitlines()
    return [set(re.findall(r"\w+", line[:34])) for line in lines if not line.startswith(" ")]


def test_the_drawing_is_the_contract_of_imports():
    contract = [set(re.findall(r"lightning_neurons\.(\w+)", layer)) for layer in CONTRACTS[0]["layers"]]
    order = {name: level for level, names in enumerate(contract) for name in names}
    assert set.union(*drawn()) == order.keys() - {"__main__"}
    for above, below in zip(drawn(), drawn()[1:], strict=False):
        assert max(order[name] for name in above) < min(order[name] for name in below)


def test_the_parts_of_callbacks_are_drawn_in_the_order_of_their_contract():
    parts = re.search(r"callbacks .*\n +(\w+) < (\w+) < (\w+)", TEXT).groups()
    assert CONTRACTS[1]["layers"][1:] == [f"lightning_neurons.callbacks.{part}" for part in reversed(parts)]


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`([\w/.-]+\.(?:py|txt|toml))`", TEXT))
    assert len(named) > 15
    places = [ROOT.parent, ROOT, ROOT / "pruning", ROOT / "callbacks" / "observing", ROOT / "pruning" / "compensation"]
    places += [ROOT / "criteria", ROOT / "pruning" / "selection"]
    assert [name for name in named if not any((place / name).exists() for place in places)] == []
