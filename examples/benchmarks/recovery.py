"""Half of the inner multiply-accumulates go, then a few epochs of the same recipe: who gets how far, and when?

    python examples/benchmarks/recovery.py --data FOLDER [--depth 20] [--epochs 4] [--pictures 10000] [--only ...]

All variants lose the same share of a trained CIFAR ResNet and get a fresh optimizer, the same batches and the same
learning rates; test accuracy is measured after every epoch.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import prune as masks

sys.path.insert(0, str(Path(__file__).parent))
from cutting import accuracy
from kept_accuracy import OUTER

from lightning_neurons import PruningBudget, prune
from lightning_neurons.pruning.distillation import distillation_loss
from lightning_neurons.pruning.structure.costs import latency
from lightning_neurons.pruning.structure.example import Example

SHARE = 0.5
"""Of the multiply-accumulates that may stay."""

Make = Callable[[], nn.Module]


def this_package(make: Make, seen: list[Any]) -> nn.Module:
    """Chosen and compensated by reconstruction."""
    model, x = make(), seen[0][0][:2]
    budget = PruningBudget("reconstruction", target_macs=SHARE, ignore=OUTER)
    prune(model, x, budget, seen, compensation="patch_least_squares")
    return model


def plain_l2(make: Make, seen: list[Any]) -> nn.Module:
    """The smallest L2 norms of each layer, nothing compensated."""
    model = make()
    prune(model, seen[0][0][:2], PruningBudget("weight_l2", target_macs=SHARE, ignore=OUTER))
    return model


def at_random(make: Make, seen: list[Any]) -> nn.Module:
    """Chance, nothing compensated."""
    model = make()
    prune(model, seen[0][0][:2], PruningBudget("random", target_macs=SHARE, ignore=OUTER))
    return model


def torch_pruning_by_hand(make: Make, seen: list[Any]) -> nn.Module:
    """Torch-Pruning's group L2, the smallest ratio that reaches the target."""
    x = seen[0][0][:2]
    total = torch_pruning.utils.count_ops_and_params(make(), x)[0]
    for step in range(1, 100):
        model = make()
        ignored = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and not inner(n)]
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        pruner = torch_pruning.pruner.BasePruner(model, x, importance, pruning_ratio=step / 100, ignored_layers=ignored)
        pruner.step()
        if torch_pruning.utils.count_ops_and_params(model, x)[0] <= SHARE * total:
            break
    return model


def lightnings_masks(make: Make, seen: list[Any]) -> nn.Module:
    """What Lightning's ModelPruning does: structured masks, the layers keep their size."""
    model = make()
    for name, module in model.named_modules():
        if inner(name):
            masks.ln_structured(module, "weight", amount=SHARE, n=2, dim=0)
    return model


def inner(name: str) -> bool:
    """Whether a layer makes the inner channels of a block."""
    return name.startswith("layer") and name.endswith("conv1")


VARIANTS: dict[str, tuple[Callable[[Make, list[Any]], nn.Module], float]] = {
    "this package, distillation": (this_package, 1.0),
    "this package": (this_package, 0.0),
    "Torch-Pruning by hand, group L2": (torch_pruning_by_hand, 0.0),
    "plain L2": (plain_l2, 0.0),
    "Lightning's masks": (lightnings_masks, 0.0),
    "random": (at_random, 0.0),
}


def train(
    model: nn.Module, teacher: nn.Module | None, data: tuple[Tensor, Tensor], settings: Any, weight: float
) -> list[float]:
    """A few epochs of SGD with a cosine schedule; test accuracies are appended by the caller."""
    x, y = data
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, weight_decay=1e-4)
    steps = len(x) // settings.batch * settings.epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    found = [accuracy(model.eval(), *settings.test)]
    for _ in range(settings.epochs):
        model.train()
        for part in torch.randperm(len(x)).split(settings.batch)[: len(x) // settings.batch]:
            pictures = shifted(x[part])
            logits = model(pictures)
            loss = F.cross_entropy(logits, y[part])
            if teacher is not None:
                with torch.no_grad():
                    target = teacher(pictures)
                loss = loss + weight * distillation_loss(logits, target, temperature=2.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found.append(accuracy(model.eval(), *settings.test))
    return found


def shifted(x: Tensor) -> Tensor:
    """Mirrored half of the time, and moved by up to four pixels."""
    x = x.flip(3) if torch.rand(()) < 0.5 else x
    down, right = torch.randint(0, 9, (2,)).tolist()
    return F.pad(x, (4,) * 4)[:, :, down : down + 32, right : right + 32]


def main() -> None:
    """Cut, train on, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--weight", type=float, default=1.0, help="of the distillation loss")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS))
    settings = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(settings.data))
    import lnn_data
    from cifar_resnet import cifar_resnet

    def make() -> nn.Module:
        return cifar_resnet(settings.depth, str(settings.data / f"cifar_resnet{settings.depth}.safetensors")).eval()

    pictures, labels = lnn_data.load_cifar10("train", settings.pictures)
    data = lnn_data.to_tensor(pictures), torch.from_numpy(labels)
    seen = list(zip(*(part[:1024].split(128) for part in data), strict=True))
    pictures, labels = lnn_data.load_cifar10("test", 2000)
    settings.test = lnn_data.to_tensor(pictures), torch.from_numpy(labels)
    print(f"ResNet-{settings.depth}, dense {accuracy(make(), *settings.test):.2f} %, latency {times(make()):s}")
    for name in settings.only:
        cut, weight = VARIANTS[name]
        begun = time.perf_counter()
        model = cut(make, seen)
        seconds = time.perf_counter() - begun
        sized = make() if cut is lightnings_masks else model  # masks make nothing smaller
        macs, parameters = torch_pruning.utils.count_ops_and_params(sized, seen[0][0][:1])
        speed = times(model)
        found = train(model, make() if weight else None, data, settings, weight * settings.weight)
        listed = " ".join(f"{value:.2f}" for value in found)
        print(
            f"{name}: accuracy by epoch {listed}; {parameters:,.0f} parameters, {macs:,.0f} MACs, {speed}; cut in "
            f"{seconds:.1f} s, all {time.perf_counter() - begun:.0f} s",
            flush=True,
        )


def times(model: nn.Module) -> str:
    """Latencies of single pictures and of batches of 128."""
    return " / ".join(f"{1000 * latency(model, Example(torch.zeros(n, 3, 32, 32))):.1f} ms" for n in (1, 128))


if __name__ == "__main__":
    main()
