"""MobileNetV3-Small on ImageNet pictures: what goes without loss, and accuracy against MACs beyond that.

    python examples/benchmarks/mobilenet.py --data FOLDER [--calibration 200]

The pictures on which accuracy is measured are not those of the calibration.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from cutting import accuracy

from lightning_neurons import PruningBudget, prune
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover


def without_loss(model: nn.Module, whole: nn.Module, seen: list[Any], x: Tensor) -> None:
    """Remove what is constant on some pictures, and compare logits on those and on all others."""
    report = prune(model, seen[0][0][:2], batches=seen, lossless=True)
    with torch.no_grad():
        expected = torch.cat([whole(part) for part in x.split(50)])
        errors = (torch.cat([model(part) for part in x.split(50)]) - expected).abs().amax(1)
    known, cost = sum(len(batch[0]) for batch in seen), report.cost
    others = f", of the {len(x) - known} others {errors[known:].max():.1e}" if known < len(x) else ""
    print(report)
    print(
        f"lossless on {known} pictures: {len(report.plan)} neurons, {cost.macs - cost.macs_after:,} MACs and "
        f"{cost.parameters - cost.parameters_after:,} parameters saved; their logits differ by "
        f"{errors[:known].max():.1e}{others}, the largest being {expected.abs().max():.1f}",
        flush=True,
    )


def main() -> None:
    """Without loss, then with more and more of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=200)
    parser.add_argument("--only-lossless", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(arguments.data))
    import lnn_data
    from mobilenet_v3 import mobilenet_v3

    weights = str(arguments.data / "mobilenet_v3_small.safetensors")
    pictures, labels = lnn_data.load_imagenet_sample()
    x, y = lnn_data.to_tensor(pictures, lnn_data.TF_MEAN, lnn_data.TF_STD), torch.from_numpy(labels)
    count = arguments.calibration
    seen = list(zip(x[:count].split(50), y[:count].split(50), strict=True))
    test, answers = x[count:], y[count:]

    whole = mobilenet_v3("small", weights=weights).eval()
    for some in (count, len(x)):
        model = mobilenet_v3("small", weights=weights).eval()
        without_loss(model, whole, list(zip(x[:some].split(50), y[:some].split(50), strict=True)), x)

    if arguments.only_lossless:
        return
    print(f"dense: top-1 {accuracy(whole, test, answers):.1f} %")
    blocks = dict.fromkeys(discover(whole, Example(x[:2])).blocks.values())
    print(f"{len(blocks)} blocks")
    for target in (0.95, 0.9, 0.8, 0.7):
        row = []
        for criterion, how in (
            ("weight_l2", "none"),
            ("weight_l2", "least_squares"),
            ("reconstruction", "none"),
            ("reconstruction", "least_squares"),
        ):
            model, begun = mobilenet_v3("small", weights=weights).eval(), time.perf_counter()
            scope = "block" if criterion == "weight_l2" else None
            budget = PruningBudget(criterion, target_macs=target, scope=scope)
            prune(model, x[:2], budget, seen, compensation=how)
            row.append(f"{criterion} {how} {accuracy(model, test, answers):.1f} ({time.perf_counter() - begun:.0f} s)")
        print(f"{target:.0%} of the MACs: {', '.join(row)}", flush=True)


if __name__ == "__main__":
    main()
