"""Finding the least important quarter of the neurons by a race, against the exact study.

python examples/benchmarks/racing.py --data FOLDER [--pictures 2000] [--budgets 0.2 0.1] [--exact FILE]
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from ablation_speed import loss
from nets import resnet20_and_pictures

from lightning_neurons import ablate
from lightning_neurons.results.ablation_report import AblationReport


def bottom(report: AblationReport, share: float) -> set[tuple[str, int]]:
    """The neurons whose loss hurts least."""
    ranking = report.ranking()
    return {(row.layer, row.neuron) for row in ranking[-round(share * len(ranking)) :]}


def main() -> None:
    """Race with several budgets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.1])
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--exact", type=Path, help="where the exact study is kept, or read from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, x, y = resnet20_and_pictures(arguments.pictures, arguments.data)
    batches = [(x[i : i + 500], y[i : i + 500]) for i in range(0, len(x), 500)]
    layers = [name for name in dict(model.named_modules()) if "conv" in name]
    if arguments.exact is not None and arguments.exact.exists():
        exact = AblationReport.load(arguments.exact)
    else:
        begin = time.process_time()
        exact = ablate(model, batches, loss, neurons=layers, exact=False)
        print(
            f"exact study: {exact.runs:.0f} forward-equivalents, {time.process_time() - begin:.0f} CPU seconds",
            flush=True,
        )
        if arguments.exact is not None:
            exact.save(arguments.exact)
    wanted = bottom(exact, arguments.share)
    for budget in arguments.budgets:
        begin = time.process_time()
        report = ablate(model, batches, loss, neurons=layers, exact=False, budget=budget, bottom=arguments.share)
        spent = time.process_time() - begin
        overlap = len(wanted & bottom(report, arguments.share)) / max(len(wanted), 1)
        print(
            f"race with a budget of {budget:.0%}: {exact.runs / report.runs:.1f} x fewer forward-equivalents "
            f"({report.runs:.0f}), {spent:.0f} CPU seconds, overlap of the bottom {arguments.share:.0%} {overlap:.3f}, "
            f"{sum(map(len, report.undecided.values()))} undecided",
            flush=True,
        )


if __name__ == "__main__":
    main()
