"""A criterion of your own: a value that names what it sums and how sums become scores. No registration.

python examples/own_criterion.py
"""

import torch
from torch import Tensor, nn

from lightning_neurons import Criterion, LayerView, Statistic, Summary, measure
from lightning_neurons.demo import DigitsNet, digits


def fired(view: LayerView) -> Tensor:
    """Whether a neuron fires anywhere in a sample: ``(batch, neuron)``."""
    return (view.activation.amax(-1) > 0).float()


FIRED = Statistic("fired", fired)


def share_of_samples(summary: Summary) -> Tensor:
    """Share of samples in which the neuron fires at all."""
    return summary.per_sample(FIRED)


FIRES_IN = Criterion("fires_in", (FIRED,), share_of_samples)


def main() -> None:
    """Compare it with the share of values that are positive, and with sensitivity, on an untrained network."""
    torch.manual_seed(0)
    _, batches = digits()
    report = measure(
        DigitsNet(),
        batches,
        loss_fn=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        criteria=[FIRES_IN, "active_share", "taylor"],
    )
    for name in ("fires_in", "active_share", "taylor"):
        print(f"{name:13s}", [round(score, 3) for score in report.scores[name]["conv1"].tolist()[:6]])


if __name__ == "__main__":
    main()
