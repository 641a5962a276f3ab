"""The neurons that a class needs: its sub-network, the network without it, and how classes share neurons.

    python examples/class_subnetwork.py [--dataset digits|mnist|cifar10] [--method thresholding|masking] [--class k]
                                        [--data FILE] [--share 0.5] [--output FOLDER]

Trains a small network (a few seconds for digits), or reads one with --weights; then makes the class study, writes its
figures and classes.json, and cuts the network down to the class. MNIST and CIFAR-10 come from OpenML through
scikit-learn, or from a local .npz file with ``x`` (number, height, width[, channel]) and ``y``.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_neurons import MissingPackageError, class_study, plan_keeping, prune
from lightning_neurons.report.class_figures import save_class_figures

OPENML = {"mnist": ("mnist_784", (28, 28, 1)), "cifar10": ("CIFAR_10", (3, 32, 32))}


def pictures_of(dataset: str, data: Path | None) -> tuple[Tensor, Tensor]:
    """Pictures ``(number, channel, height, width)`` in [0, 1], and labels."""
    if data is not None:
        if not data.is_file():
            raise SystemExit(f"--data {data}: there is no such file")
        file = np.load(data)
        x = torch.from_numpy(np.asarray(file["x"])).float()
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
        return x / max(float(x.max()), 1.0), torch.from_numpy(np.asarray(file["y"])).long()
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


def network(channels: int, size: int) -> nn.Module:
    """Three convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Adam on cross entropy."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def main() -> None:
    """Train, study, draw, cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("digits", *OPENML), default="digits")
    parser.add_argument("--method", choices=("thresholding", "masking"), default="thresholding")
    parser.add_argument("--class", dest="klass", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path, help="a state dict of this network instead of training")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=12000, help="how many pictures are used")
    parser.add_argument("--output", type=Path, default=Path("class_subnetwork"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x, y = pictures_of(arguments.dataset, arguments.data)
    order = torch.randperm(len(x))[: arguments.samples]
    x, y = x[order], y[order]
    middle = 4 * len(x) // 5
    model = network(x.shape[1], x.shape[2])
    if arguments.weights is None:
        train(model, x[:middle], y[:middle], arguments.epochs)
    else:
        model.load_state_dict(torch.load(arguments.weights, weights_only=True))
    test = list(zip(x[middle:].split(250), y[middle:].split(250), strict=True))
    report = class_study(model, test, method=arguments.method, share=arguments.share)
    report.save(arguments.output / "classes.json")
    try:
        figures = save_class_figures(report, arguments.output)
        print(f"wrote {len(figures)} figures and classes.json to {arguments.output}")
    except MissingPackageError as error:
        print(error)
    print(f"class {arguments.klass}: accuracy on its own samples / on the others")
    for row in report.accuracies:
        if row.klass == arguments.klass:
            print(f"  {row.model:18s} {row.on_class:6.1%} / {row.on_others:6.1%}")
    shared = report.shared_by.tolist()
    print(f"neurons that serve one class alone: {shared[1]}, all classes: {shared[-1]}, none: {shared[0]}")
    plan = plan_keeping(model, x[:2], report.subnetwork(arguments.klass))
    print(prune(model, x[:2], plan, compensation="none"))


if __name__ == "__main__":
    main()
