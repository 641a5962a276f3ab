"""What becomes of training after a cut: with this package, with a fresh optimizer, and with Torch-Pruning by hand.

    python examples/benchmarks/continued_training.py --data FOLDER [--steps 80] [--picture curves.png]

A trained ResNet-20 goes on training on CIFAR-10; half of its MACs are cut away in the middle of it, the same neurons in
all variants. By hand, the old optimizer still holds the old parameters: the cut weights never move again, and nobody
says so.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).parent))
from cutting import accuracy, by_hand
from nets import ResNet20

from lightning_neurons import PruningBudget, PruningPlan, prune

Net = tuple[nn.Module, torch.optim.Optimizer]


def fresh(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every variant."""
    return torch.optim.AdamW(model.parameters(), 1e-3)


def train(net: Net, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """The loss of every step."""
    model, optimizer = net
    model.train()
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def twin(net: Net) -> Net:
    """A copy of a model and of its optimizer with all of its state."""
    model = copy.deepcopy(net[0])
    optimizer = fresh(model)
    optimizer.load_state_dict(net[1].state_dict())
    return model, optimizer


def with_this_package(net: Net, plan: PruningPlan, x: Tensor) -> Net:
    """Model and optimizer are cut together."""
    model, optimizer = twin(net)
    prune(model, x, plan, optimizer=optimizer)
    return model, optimizer


def with_a_fresh_optimizer(net: Net, plan: PruningPlan, x: Tensor) -> Net:
    """The model is cut and gets a new optimizer."""
    model, _ = twin(net)
    prune(model, x, plan)
    return model, fresh(model)


def with_torch_pruning_by_hand(net: Net, plan: PruningPlan, x: Tensor) -> Net:
    """The model is cut by Torch-Pruning, and the optimizer goes on."""
    model, optimizer = twin(net)
    old = list(model.parameters())
    smaller = by_hand(model, x, plan)  # a deep copy: let the optimizer hold what a cut in place would have left it
    names = [name for name, _ in model.named_parameters()]
    now = dict(smaller.named_parameters())
    kept = {id(p): now[n] for n, p in zip(names, old, strict=True) if now[n].shape == p.shape}
    for group in optimizer.param_groups:
        group["params"] = [kept.get(id(p), p) for p in group["params"]]
    optimizer.state = {kept.get(id(p), p): state for p, state in optimizer.state.items()}  # type: ignore[assignment]
    return smaller, optimizer


VARIANTS: dict[str, Callable[[Net, PruningPlan, Tensor], Net]] = {
    "this package: optimizer state cut with the weights": with_this_package,
    "fresh optimizer": with_a_fresh_optimizer,
    "Torch-Pruning by hand, old optimizer": with_torch_pruning_by_hand,
}


def smooth(losses: list[float], width: int = 10) -> list[float]:
    """Running mean."""
    return [statistics.fmean(losses[max(i - width + 1, 0) : i + 1]) for i in range(len(losses))]


def draw(path: Path, before: list[float], curves: dict[str, list[float]]) -> None:
    """One figure: the loss before the cut, and after it in each variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.plot(range(1, len(before) + 1), smooth(before), color="black", label="before the cut")
    for (name, losses), color in zip(curves.items(), ("#1b7837", "#2166ac", "#b2182b"), strict=True):
        axes.plot(range(len(before) + 1, len(before) + len(losses) + 1), smooth(losses), color=color, label=name)
    axes.axvline(len(before) + 0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="optimizer step", ylabel="training loss (mean of 10)", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def start(data: Path | None, steps: int, size: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """A network, batches for both halves, and pictures to test on; without data, random ones."""
    torch.manual_seed(0)
    if data is None:
        x, y = torch.randn(2 * steps * size, 3, 32, 32), torch.randint(0, 10, (2 * steps * size,))
        return ResNet20(), list(zip(x.split(size), y.split(size), strict=True)), x[:size], y[:size]
    sys.path.insert(0, str(data))
    import lnn_data
    from cifar_resnet import cifar_resnet

    pictures, labels = lnn_data.load_cifar10("train", 2 * steps * size)
    batches = zip(lnn_data.to_tensor(pictures).split(size), torch.from_numpy(labels).split(size), strict=True)
    test, answers = lnn_data.load_cifar10("test", 2000)
    net = cifar_resnet(20, str(data / "cifar_resnet20.safetensors"))
    return net, list(batches), lnn_data.to_tensor(test), torch.from_numpy(answers)


def main() -> None:
    """Train, cut, train on, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, batches, x, y = start(arguments.data, arguments.steps, arguments.batch)
    net = model, fresh(model)
    before = train(net, batches[: arguments.steps])
    report = prune(copy.deepcopy(model), x[:2], PruningBudget("weight_l2", target_macs=0.5, scope="layer"))
    print(f"{report.cost.macs_after / report.cost.macs:.1%} of the MACs remain")
    curves = {}
    for name, variant in VARIANTS.items():
        cut = variant(net, report.plan, x[:2])
        weights = {n: p.detach().clone() for n, p in cut[0].named_parameters()}
        curves[name] = train(cut, batches[arguments.steps :])
        moved = sum(not torch.equal(weights[n], p) for n, p in cut[0].named_parameters())
        last = statistics.fmean(curves[name][-20:])
        print(
            f"{name}: loss of the first step {curves[name][0]:.3f}, mean of steps 2 to 11 "
            f"{statistics.fmean(curves[name][1:11]):.3f}, of the last 20 {last:.3f}; test accuracy "
            f"{accuracy(cut[0].eval(), x, y):.1f} %; {moved} of {len(weights)} tensors moved"
        )
    if arguments.picture is not None:
        draw(arguments.picture, before, curves)


if __name__ == "__main__":
    main()
