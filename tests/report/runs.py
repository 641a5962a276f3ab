"""Folders of runs for the tests of the HTML report, and a reader of pages."""

import json
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from lightning_neurons import NeuronReport, ablate, measure
from lightning_neurons.results.ablation_report import AblationReport
from lightning_neurons.results.class_report import ClassAccuracy
from lightning_neurons.results.history import NeuronHistory
from lightning_neurons.results.pruning_history import PruningHistory, PruningPoint
from tests.callbacks.modules import Plain, loader

EVIL = "<script>alert('x')</script>\"'&$x_1^"
ALWAYS = ["overview", "layers", "rankings", "deadness", "pages", "settings"]
_VOID = {"meta", "link", "img", "br", "input", "rect"}


class Read(HTMLParser):
    """Elements, text by element, and whether what is opened is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag: str, name: str) -> list[str]:
        return [found[name] for t, found in self.elements if t == tag and name in found]

    def text(self, tag: str) -> list[str]:
        return [text for t, text in self.texts if t == tag]


def two_reports() -> list[NeuronReport]:
    """Two measurements; two neurons have died in between."""
    torch.manual_seed(0)
    module = Plain()
    first = replace(measure(module, loader(48), loss_fn=Plain.loss), epoch=0, step=10)
    module.net.norm1.bias.data = torch.tensor([-100.0, 1.0, -100.0, 1.0])
    return [first, replace(measure(module, loader(48), loss_fn=Plain.loss), epoch=1, step=20)]


def fill(folder: Path, reports: Sequence[NeuronReport]) -> None:
    """Write everything that a run can leave behind."""
    reports[-1].save(folder / "neurons.json")
    history = NeuronHistory()
    for report in reports:
        history.add(report)
    history.save(folder / "history.json", {"torch": "2.13.0"})
    torch.manual_seed(0)
    ablate(Plain(), loader(16), loss_fn=Plain.loss, loss_reduction="mean").save(folder / "ablation.json")
    points = (PruningPoint(1, 2, 80, 800, 0.9, 0.8, 0.85), PruningPoint(2, 1, 70, 600, 0.9, 0.2, 0.3, taken_back=True))
    PruningHistory(100, 1000, {"net.fc1": 8}, {"net.fc1": 6}, "val_acc", points).save(folder / "pruning.json")
    rows = [ClassAccuracy("whole", k, 0.9, 0.8, 0.7, 0.75)._asdict() | {"deviation": None} for k in range(3)]
    document = {"format": "lightning_neurons classes", "version": 1, "accuracies": rows}
    (folder / "classes.json").write_text(json.dumps(document))
    put_picture(folder, "saliency.png", 32)
    card = {"file": "saliency.png", "name": "net.conv2 3", "why": "most important", "numbers": {"deadness": 0.25}}
    put_list(folder, "cards", [card])
    put_list(folder, "pictures", [{"file": "saliency.png", "title": "Saliency", "caption": "Where it looks"}])


def put_picture(folder: Path, name: str, size: int) -> None:
    (folder / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (size, size), (10, 120, 200)).save(folder / "pictures" / name)


def put_list(folder: Path, name: str, entries: Any) -> None:
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "pictures" / f"{name}.json").write_text(json.dumps(entries))


def fill_with_evil(folder: Path) -> None:
    """A run in which all that can be named has a name that looks like HTML."""
    torch.manual_seed(0)
    net = nn.ModuleDict({EVIL: nn.Linear(36, 3)})
    loss = lambda m, b: nn.functional.cross_entropy(m[EVIL](b[0].flatten(1)), b[1])
    report = replace(measure(net, loader(16), loss_fn=loss), notes=(EVIL,))
    report.save(folder / "neurons.json")
    history = NeuronHistory()
    history.add(report)
    history.add(report)
    history.save(folder / "history.json", {EVIL: EVIL})
    deltas = {EVIL: torch.ones(3)}
    AblationReport(1.0, 8, deltas, deltas, metrics={EVIL: 1.0}, notes=(EVIL,)).save(folder / "ablation.json")
    points = (PruningPoint(1, 2, 80, 800, 0.9, 0.8, 0.85),)
    PruningHistory(100, 1000, {EVIL: 3}, {EVIL: 2}, EVIL, points).save(folder / "pruning.json")
    put_picture(folder, "a.png", 8)
    put_list(folder, "cards", [{"file": "a.png", "name": EVIL, "why": EVIL, "numbers": {EVIL: 1.0}}])
    put_list(folder, "pictures", [{"file": "a.png", "title": EVIL, "caption": EVIL}, {"file": EVIL}])
