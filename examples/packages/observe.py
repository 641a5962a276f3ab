"""Train with other people's packages, with and without NeuronSensitivityCallback: every weight and metric is the same.

examples/packages/run.sh makes an environment with the packages and runs this.
"""

import sys
import time
import warnings
from typing import Any

import lightning as L  # noqa: N812
import torch
from packages import PACKAGES

from lightning_neurons import NeuronSensitivityCallback


def train(name: str, callbacks: list[Any]) -> tuple[dict[str, bytes], float]:
    """Everything that could differ, as bytes, and the seconds that it took."""
    L.seed_everything(0, verbose=False)
    begun = time.process_time()
    trainer, module, *_ = PACKAGES[name](callbacks)
    seconds = time.process_time() - begun
    values = {**module.state_dict(), **{f"metric {n}": v for n, v in trainer.callback_metrics.items()}}
    values["random state"] = torch.get_rng_state()
    tensors = {n: v.detach().cpu().contiguous() for n, v in values.items() if isinstance(v, torch.Tensor)}
    return {n: v.flatten().view(torch.uint8).numpy().tobytes() for n, v in tensors.items()}, seconds


def main() -> int:
    """Compare, and print a line for each package; the number of packages that differ."""
    torch.set_num_threads(1)
    failures = 0
    for name in sys.argv[1:] or PACKAGES:
        plain, before = train(name, [])
        callback = NeuronSensitivityCallback()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            observed, after = train(name, [callback])
        different = sorted(n for n in plain.keys() | observed.keys() if plain.get(n) != observed.get(n))
        report = callback.report
        failures += bool(different) or report is None
        print(f"{name}: {'DIFFERENT ' + str(different[:5]) if different else f'{len(plain)} tensors equal to the bit'}")
        print(f"  {report!r}; {before:.1f} s without, {after:.1f} s with the callback")
        for line in [*(report.notes if report else ()), *(str(w.message) for w in said if "Neuron" in str(w.message))]:
            print("  -", line[:300])
    return failures


if __name__ == "__main__":
    sys.exit(main())
