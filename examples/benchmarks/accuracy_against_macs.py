"""Accuracy against multiply-accumulates, right after the cut and after a short tuning: one figure.

    python examples/benchmarks/accuracy_against_macs.py --data FOLDER [--picture kept.png] [--pictures 5000]

A trained ResNet-20 loses inner channels, chosen and compensated by this package, by the L2 norm of weights, or at
random; then all get the same epoch of training, in the first case with the dense network as a teacher.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from cutting import accuracy
from kept_accuracy import OUTER
from recovery import train

from lightning_neurons import PruningBudget, prune

Curve = list[tuple[float, float, float]]
"""Share of MACs, accuracy right after the cut, accuracy after the tuning."""

VARIANTS = {
    "this package": ("reconstruction", "patch_least_squares", 1.0),
    "plain L2": ("weight_l2", "none", 0.0),
    "random": ("random", "none", 0.0),
}


def draw(path: Path, curves: dict[str, Curve], dense: float) -> None:
    """Two panels: before any tuning, and after it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for column, (panel, title) in enumerate(zip(panels, ("right after the cut", "after one short epoch"), strict=True)):
        for (name, curve), color in zip(curves.items(), ("#1b7837", "#2166ac", "#999999"), strict=True):
            panel.plot([m for m, *_ in curve], [point[1 + column] for point in curve], "o-", color=color, label=name)
        panel.axhline(dense, color="black", linewidth=0.8, linestyle=":")
        panel.set(title=title, xlabel="multiply-accumulates left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_formatter("{x:.0%}")
        panel.invert_xaxis()
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Cut to several sizes, tune, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.4, 0.3])
    settings = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(settings.data))
    import lnn_data
    from cifar_resnet import cifar_resnet

    def make() -> nn.Module:
        return cifar_resnet(20, str(settings.data / "cifar_resnet20.safetensors")).eval()

    pictures, labels = lnn_data.load_cifar10("train", settings.pictures)
    data = lnn_data.to_tensor(pictures), torch.from_numpy(labels)
    seen = list(zip(*(part[:512].split(128) for part in data), strict=True))
    pictures, labels = lnn_data.load_cifar10("test", 2000)
    settings.test = lnn_data.to_tensor(pictures), torch.from_numpy(labels)
    dense = accuracy(make(), *settings.test)
    print(f"dense: {dense:.2f} %")
    curves: dict[str, Curve] = {name: [] for name in VARIANTS}
    for target in settings.targets:
        for name, (criterion, how, weight) in VARIANTS.items():
            model = make()
            budget = PruningBudget(criterion, target_macs=target, ignore=OUTER)
            cost = prune(model, seen[0][0][:2], budget, seen, compensation=how).cost
            first, *_, last = train(model, make() if weight else None, data, settings, weight)
            curves[name].append((cost.macs_after / cost.macs, first, last))
            print(
                f"{cost.macs_after / cost.macs:.1%} of the MACs, {name}: {first:.2f} %, then {last:.2f} %", flush=True
            )
    if settings.picture is not None:
        draw(settings.picture, curves, dense)


if __name__ == "__main__":
    main()
