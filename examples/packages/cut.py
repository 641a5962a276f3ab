"""Cut other people's models in the middle of training, train on, and load them again in the way of their package.

examples/packages/run.sh makes an environment with the packages and runs this.
"""

import sys
import tempfile
import warnings
from typing import Any

import lightning as L  # noqa: N812
import torch
from packages import PACKAGES, Run
from torch import Tensor

from lightning_neurons import NeuronPruningCallback, pruned_widths

OPTIONS: dict[str, dict[str, Any]] = {
    # Its validation step logs metrics alone.
    "chemprop": {"loss_fn": lambda module, batch: module.training_step(batch, 0)},
}


def outputs(run: Run, model: Any) -> Tensor:
    """What a model says in evaluation, drawing from the same random numbers each time."""
    L.seed_everything(0, verbose=False)
    network = model if isinstance(model, torch.nn.Module) else model.module
    network.eval()
    with torch.no_grad():
        found: Tensor = run.outputs(model)
    return found


def problems(run: Run, callback: NeuronPruningCallback) -> list[str]:
    """What has not gone as it should; nothing if the model was cut, trained on, and is the same once it is loaded."""
    made = [one for one in callback.rounds.done if one.plan]
    if not made:
        return ["NOTHING WAS CUT"]
    found = []
    sizes = dict(run.module.named_parameters())
    whole = [
        layer
        for layer, width in callback.plan.widths.items()
        if callback.plan.neurons.get(layer) and width in sizes[f"{layer}.weight"].shape[:1]
    ]
    if whole:
        found.append(f"STILL AS WIDE: {whole}")
    if run.trainer.current_epoch <= made[-1].epoch:
        found.append("NO EPOCH AFTER THE CUT")
    with tempfile.TemporaryDirectory() as folder, pruned_widths():
        loaded = run.reload(folder)
    before, after = outputs(run, run.model), outputs(run, loaded)
    if loaded is run.model or not before.isfinite().all() or not torch.equal(before, after):
        found.append("LOADED ANOTHER MODEL")
    return found


def main() -> int:
    """Cut a model of each package, and print what became of it; the number of packages with a problem."""
    torch.set_num_threads(1)
    failures = 0
    for name in sys.argv[1:] or PACKAGES:
        L.seed_everything(0, verbose=False)
        callback = NeuronPruningCallback("fisher", amount=0.3, start_epoch=1, **OPTIONS.get(name, {}))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run = PACKAGES[name]([callback])
        wrong = problems(run, callback)
        failures += bool(wrong)
        print(f"{name}: {'; '.join(wrong) or 'cut, trained on, and loaded again with the same outputs to the bit'}")
        for made in callback.rounds.done:
            print(f"  epoch {made.epoch} of {run.trainer.current_epoch}, {made.summary}")
        for layer, gone in callback.plan.neurons.items():
            width = callback.plan.widths[layer]
            print(f"  {layer}: {width} -> {width - len(gone)}")
        for line in [str(w.message) for w in said if "Neuron" in str(w.message)]:
            print("  -", line[:300])
    return failures


if __name__ == "__main__":
    sys.exit(main())
