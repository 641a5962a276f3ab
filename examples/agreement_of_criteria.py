"""Do the criteria agree on which neurons matter? Spearman correlations on a trained network.

python examples/agreement_of_criteria.py
"""

import lightning as L  # noqa: N812
from torch.nn.functional import cross_entropy

from lightning_neurons import agreement, measure
from lightning_neurons.demo import DigitsModule, digits

CRITERIA = ("gradient", "taylor", "fisher", "second_order_ggn", "rms", "weight_l2", "outgoing_l2")


def main() -> None:
    """Train shortly, measure without a Trainer, print a table."""
    L.seed_everything(0, verbose=False)
    module, (train, val) = DigitsModule(), digits()
    options = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    L.Trainer(max_epochs=2, enable_model_summary=False, **options).fit(module, train, val)
    report = measure(module.net, val, loss_fn=lambda m, b: cross_entropy(m(b[0]), b[1]), criteria=CRITERIA)
    print("layer conv2: Spearman correlation of importance")
    print(" " * 17 + "".join(f"{name:>17s}" for name in CRITERIA))
    for first in CRITERIA:
        row = (agreement(report.scores[first]["conv2"], report.scores[other]["conv2"]) for other in CRITERIA)
        print(f"{first:17s}" + "".join(f"{a.spearman:17.2f}" for a in row))


if __name__ == "__main__":
    main()
