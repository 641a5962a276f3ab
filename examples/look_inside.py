"""Look inside a network: activations, deadness, where a neuron looks before and after pruning, saliency, maximisation.

    python examples/look_inside.py [--output look_inside] [--data FOLDER]

By default, a small network is trained on handwritten digits. With a folder of ImageNet pictures and the weights of
MobileNetV3-Small (--data), it is that network. Pictures are written as PNG; they need matplotlib.
"""

import argparse
import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn

from lightning_neurons import activation_map, find_neurons, maximize_activation, measure, prune, saliency
from lightning_neurons.demo import DigitsModule, digits
from lightning_neurons.report.figures.drawing import save_figure
from lightning_neurons.report.figures.images import activation_overlay, maximized_images, saliency_rows
from lightning_neurons.report.figures.measurements import activation_histogram, deadness_grid

_ANIMALS = {"king penguin": 145, "monarch": 323, "zebra": 340}


@dataclass(frozen=True)
class Subject:
    """A trained network, pictures, and what of it is looked at.

    Attributes:
        net: From pictures to logits.
        pictures: As the network takes them.
        labels: Their classes.
        normalization: Mean and standard deviation that the pictures have been normalised with.
        late: A late layer, with positions.
        classes: Three classes, by name.
    """

    net: nn.Module
    pictures: Tensor
    labels: Tensor
    normalization: dict[str, Any]
    late: str
    classes: dict[str, int]

    def shown(self, pictures: Tensor) -> Tensor:
        """Pictures in [0, 1]."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in self.normalization.values())
        return pictures * std + mean


def trained_on_digits() -> Subject:
    """The network of the demo, after a few epochs."""
    L.seed_everything(0, verbose=False)
    module = DigitsModule()
    train, val = digits()
    trainer = L.Trainer(
        max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, train, val)
    pictures, labels = (torch.cat(column) for column in zip(*val, strict=True))
    plain = {"mean": (0.0,), "std": (1.0,)}
    return Subject(module.net, pictures, labels, plain, "conv2", {str(digit): digit for digit in (0, 3, 4)})


def mobilenet(data: Path) -> Subject:
    """A published network, and ImageNet pictures."""
    sys.path.insert(0, str(data))
    import lnn_data
    from mobilenet_v3 import mobilenet_v3

    net = mobilenet_v3("small", weights=str(data / "mobilenet_v3_small.safetensors")).eval()
    pictures, labels = lnn_data.load_imagenet_sample()
    wanted = [place for number in _ANIMALS.values() for place in (labels == number).nonzero()[0][:1]]
    chosen = sorted({*wanted, *range(0, len(labels), 3)})  # a third of them, and one of each class that is looked at
    x = lnn_data.to_tensor(pictures[chosen], lnn_data.TF_MEAN, lnn_data.TF_STD)
    normalization = {"mean": lnn_data.TF_MEAN, "std": lnn_data.TF_STD}
    return Subject(net, x, torch.from_numpy(labels[chosen]), normalization, "features.9.block.0.0", _ANIMALS)


def pruned(subject: Subject, batches: list[Any]) -> tuple[nn.Module, dict[int, int]]:
    """A copy with fewer MACs, and where each neuron of the late layer that is left can be found in it."""
    smaller = copy.deepcopy(subject.net)
    report = prune(smaller, subject.pictures[:2], {"criterion": "weight_l2", "target_macs": 0.8}, batches=batches)
    print(f"pruned: MACs {report.cost.macs:,} -> {report.cost.macs_after:,}")
    gone = set(report.plan.neurons.get(subject.late, ()))
    width = next(one.neurons for one in find_neurons(subject.net, subject.pictures[:1]) if one.name == subject.late)
    left = [i for i in range(width) if i not in gone]
    return smaller, {old: new for new, old in enumerate(left)}


def look(subject: Subject, output: Path) -> None:
    """Write all pictures."""
    net, x, late = subject.net, subject.pictures, subject.late
    batches = list(zip(x.split(64), subject.labels.split(64), strict=True))
    report = measure(net, batches, criteria=["near_zero", "mean", "variance"], layers=[late])
    print(f"{int(report.dead(late).sum())} of {len(report.dead(late))} neurons of {late} never fired")
    save_figure(activation_histogram(report, late).figure, output / "histogram.png")
    save_figure(deadness_grid(report, late).figure, output / "deadness_grid.png")

    smaller, places = pruned(subject, batches)
    one = int((subject.labels == list(subject.classes.values())[-1]).nonzero()[0, 0])
    here = measure(net, [x[one : one + 1]], criteria=["mean"], layers=[late]).scores["mean"][late]
    unusual = (here - report.scores["mean"][late]) / report.scores["variance"][late].sqrt().clamp_min(1e-6)
    neuron = max(places, key=lambda i: float(unusual[i]))  # what this picture excites more than others do
    before = activation_map(net, x[one : one + 1], late, neuron)
    after = activation_map(smaller, x[one : one + 1], late, places[neuron])
    titles = [f"{late} {neuron}", f"after pruning ({places[neuron]})"]
    overlay = activation_overlay(subject.shown(x[one : one + 1])[0], [before[0], after[0]], titles)
    save_figure(overlay, output / "overlay.png")

    chosen = torch.stack([(subject.labels == number).nonzero()[0, 0] for number in subject.classes.values()])
    explained = saliency(net, x[chosen], list(subject.classes.values()), method="smoothgrad")
    save_figure(saliency_rows(subject.shown(x[chosen]), explained, list(subject.classes)), output / "saliency.png")

    found = maximize_activation(
        net, list(subject.classes.values()), images=x, value_range=(0.0, 1.0), **subject.normalization
    )
    titles = [
        f"{name}\n{reached:.1f} (data: {most:.1f})"
        for name, reached, most in zip(subject.classes, found.activations, found.data_maximum, strict=True)
    ]
    save_figure(maximized_images(found.shown, titles), output / "maximization.png")
    above = int((found.activations > found.data_p99).sum())
    print(f"maximised {len(titles)} classes, {above} above the data's 99th percentile")


def main() -> None:
    """Look, and say where the pictures are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("look_inside"))
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    look(trained_on_digits() if options.data is None else mobilenet(options.data), options.output)
    print(f"pictures are in {options.output}/")


if __name__ == "__main__":
    main()
