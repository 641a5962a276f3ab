"""The neurons that a class needs: its sub-network, the network without it, and how classes share neurons.

    python examples/class_subnetwork.py [--dataset digits|mnist|cifar10] [--method thresholding|masking] [--class k]
                                        [--data FILE] [--share 0.5] [--output FOLDER]

Trains a small network (a few seconds for digits), or reads the weights.pt of an earlier run with --weights; then makes
the class study, writes its figures and classes.json, cuts the network down to the class (or classes), and measures
what is left. MNIST and CIFAR-10 come from OpenML through scikit-learn, or from a local .npz file with ``x`` (number,
height, width[, channel]) and ``y``.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_neurons import MissingPackageError, class_study, plan_keeping, prune
from lightning_neurons.report.figures.classes import save_class_figures

OPENML = {"mnist": ("mnist_784", (28, 28, 1)), "cifar10": ("CIFAR_10", (3, 32, 32))}


def pictures_of(dataset: str, data: Path | None) -> tuple[Tensor, Tensor]:
    """Pictures ``(number, channel, height, width)`` in [0, 1], and labels."""
    if data is not None:
        return from_file(data)
    if dataset == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)
    from sklearn.datasets import fetch_openml

    name, shape = OPENML[dataset]
    try:
        bunch = fetch_openml(name, version=1, as_frame=False, parser="auto")
    except OSError as error:
        raise SystemExit(
            f"{dataset} could not be fetched from OpenML ({error}). Without a network, pass --data FILE: an .npz file "
            "with pictures x and labels y, or use --dataset digits"
        ) from error
    x = torch.from_numpy(bunch.data.astype(np.float32)).view(-1, *shape) / 255
    x = x.permute(0, 3, 1, 2) if shape[-1] == 1 else x
    return x, torch.from_numpy(bunch.target.astype(np.int64))


def from_file(data: Path) -> tuple[Tensor, Tensor]:
    """What an .npz file holds."""
    try:
        file = np.load(data)
        x, y = torch.from_numpy(np.asarray(file["x"])).float(), torch.from_numpy(np.asarray(file["y"])).long()
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"--data {data}: expected an .npz file with pictures x and labels y ({error})") from error
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return x / max(float(x.max()), 1.0), y


def network(channels: int, size: int, classes: int) -> nn.Module:
    """Three convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, classes),
    )  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Adam on cross entropy."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def accuracies(model: nn.Module, batches: list[tuple[Tensor, Tensor]], classes: list[int]) -> tuple[float, float]:
    """On samples of some classes, and on the others."""
    with torch.no_grad():
        hits = torch.cat([model(x).argmax(1) == y for x, y in batches]).float()
    own = torch.isin(torch.cat([y for _, y in batches]), torch.tensor(classes))
    return float(hits[own].mean()), float(hits[~own].mean())


def options() -> argparse.Namespace:
    """The command line, checked before anything takes time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("digits", *OPENML), default="digits")
    parser.add_argument("--method", choices=("thresholding", "masking"), default="thresholding")
    parser.add_argument("--class", dest="classes", type=int, nargs="+", default=[3], help="one class, or several")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path, help="the weights.pt of an earlier run, instead of training")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=12000, help="how many pictures are used")
    parser.add_argument("--output", type=Path, default=Path("class_subnetwork"))
    found = parser.parse_args()
    if not 0 < found.share < 1:
        parser.error(f"--share {found.share}: expected a share between 0 and 1")
    if found.weights is not None and not found.weights.is_file():
        parser.error(f"--weights {found.weights}: there is no such file")
    return found


def main() -> None:
    """Train, study, draw, cut, measure."""
    arguments = options()
    torch.manual_seed(0)
    x, y = pictures_of(arguments.dataset, arguments.data)
    if wrong := [klass for klass in arguments.classes if klass not in y]:
        raise SystemExit(f"--class {wrong[0]}: the data has classes {', '.join(map(str, y.unique().tolist()))}")
    order = torch.randperm(len(x))[: arguments.samples]
    x, y = x[order], y[order]
    middle = 4 * len(x) // 5
    model = network(x.shape[1], x.shape[2], int(y.max()) + 1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.weights is None:
        train(model, x[:middle], y[:middle], arguments.epochs)
        torch.save(model.state_dict(), arguments.output / "weights.pt")
    else:
        model.load_state_dict(torch.load(arguments.weights, weights_only=True))
    model.eval()
    test = list(zip(x[middle:].split(250), y[middle:].split(250), strict=True))
    report = class_study(model, test, method=arguments.method, share=arguments.share)
    report.save(arguments.output / "classes.json")
    try:
        figures = save_class_figures(report, arguments.output)
        print(f"wrote {len(figures)} figures and classes.json to {arguments.output}")
    except MissingPackageError as error:
        print(error)
    for klass in arguments.classes:
        print(f"class {klass}: accuracy on all samples, on its own, on the others, balanced")
        for row in report.accuracies:
            if row.klass == klass:
                print(f"  {row.model:18s}", *(f"{value:7.1%}" for value in row[2:6]))
    shared = report.shared_by.tolist()
    print(f"neurons that serve one class alone: {shared[1]}, all classes: {shared[-1]}, none: {shared[0]}")
    plan = plan_keeping(model, x[:2], report.subnetwork(arguments.classes))
    print(prune(model, x[:2], plan, compensation="none"))
    own, others = accuracies(model, test, arguments.classes)
    torch.save(model.state_dict(), arguments.output / "smaller.pt")
    print(f"the smaller network: {own:.1%} on those classes, {others:.1%} on the others")


if __name__ == "__main__":
    main()
