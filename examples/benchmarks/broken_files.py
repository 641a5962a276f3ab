"""Readers on broken files: every one is read right, or refused by an error that says what is wrong with it.

    python examples/benchmarks/broken_files.py [--mutations 1000] [--seed 0]

Good files of each kind are broken at random: cut off, with bytes changed, doubled and left out, and, where they are
JSON, with values of other types in other places. What is read must be complete: it can be used, and is written and read
again as the same. A plan is carried out or refused whole.
"""

import argparse
import base64
import copy
import json
import pickle
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_neurons import (
    ArgumentError,
    NeuronReport,
    PruningError,
    PruningPlan,
    ablate,
    load_pruned,
    measure,
    prune,
)
from lightning_neurons.results.ablation_report import AblationReport
from lightning_neurons.results.history import NeuronHistory

INPUTS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
ODD = [
    None, True, -1, 0.5, 10**400, 2**63, 1e308, "", "text", "inf", "nan", [], {}, [[]], [None], {"0": 1}, "\udcff",
    base64.b64encode(b"\0" * 9).decode(),
]  # fmt: skip


def network() -> nn.Sequential:
    """What all files are about, before any cut."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """For measurements."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def use_report(path: Path) -> None:
    """Ask a report all that a page asks."""
    report = NeuronReport.load(path)
    for layer in report.deadness:
        report.dead(layer), report.unknown(layer)
    str(report), [layer.activation_point for layer in report.layers]
    again(NeuronReport, report, path)


def use_history(path: Path) -> None:
    """Go on with a history."""
    history = NeuronHistory.load(path)
    history.persistently_dead(), [entry.mean_stability for entry in history.entries]
    again(NeuronHistory, history, path)
    history.add(measure(network(), [(INPUTS, torch.zeros(6, dtype=torch.long))], loss_fn=loss))


def use_ablation(path: Path) -> None:
    """Rank what a study has found."""
    report = AblationReport.load(path)
    report.ranking()
    again(AblationReport, report, path)


def use_plan(path: Path) -> None:
    """Carry a plan out, wholly or not at all."""
    plan = PruningPlan.load(path)
    again(PruningPlan, plan, path)
    net = network()
    before, expected = copy.deepcopy(net.state_dict()), repr(net)
    try:
        report = prune(net, INPUTS, plan)
    except (ArgumentError, PruningError):
        assert repr(net) == expected, "half applied"
        assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items()), "half applied"
        raise
    assert all(len(net.get_submodule(layer).weight) == width for layer, width in report.widths.items()), "half applied"
    net(INPUTS)


def use_weights(path: Path) -> None:
    """Run a pruned network."""
    net = load_pruned(network, path)
    assert net(INPUTS).shape == (6, 2)
    assert repr(net) == repr(load_pruned(network(), path))


def again(kind: Any, value: Any, path: Path) -> None:
    """What was read is whole: it comes back from another file as it is."""
    first, second = path.with_name("first.json"), path.with_name("second.json")
    value.save(first)
    kind.load(first).save(second)
    assert first.read_text() == second.read_text(), "not the same when it is written again"


USES = {
    "neurons.json": use_report,
    "history.json": use_history,
    "plan.json": use_plan,
    "ablation.json": use_ablation,
    "pruned.pt": use_weights,
}


def write_good_files(folder: Path) -> None:
    """One good file of each kind."""
    batches = [(INPUTS, torch.tensor([0, 1, 0, 1, 1, 0]))]
    report = measure(network(), batches, loss_fn=loss, per_class=True)
    report.save(folder / "neurons.json")
    history = NeuronHistory()
    history.add(report), history.add(report)
    history.save(folder / "history.json")
    ablate(network(), batches, loss, per_class=True).save(folder / "ablation.json")
    net = network()
    prune(net, INPUTS, 0.4).plan.save(folder / "plan.json")
    torch.save(net.state_dict(), folder / "pruned.pt")


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every value of a document: what holds it, and under which key."""
    keys = document.keys() if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    return [place for key in keys for place in ((document, key), *places(document[key]))]


def other_values(data: bytes, chance: random.Random) -> bytes:
    """Other values of other types in some places of a document."""
    document = json.loads(data)
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(places(document))
        change = chance.randrange(4)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[chance.choice(["", "0", "other", "9" * 5000])] = holder.pop(key)
        elif change == 2 and isinstance(holder[key], int | float):
            holder[key] = chance.choice([-holder[key], holder[key] + 1, 0.5])
        else:
            holder[key] = copy.deepcopy(chance.choice(ODD))
    return json.dumps(document).encode()


def other_bytes(data: bytes, chance: random.Random) -> bytes:
    """Cut off, changed, doubled or left out."""
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice([1, 4, 64, len(data)]))
    change = chance.randrange(5)
    if change == 0:
        return data[:start]
    if change == 1:
        return data[:start] + data[end:]
    if change == 2:
        return data[:end] + data[start:]
    if change == 3:
        return data[:start] + chance.randbytes(end - start) + data[end:]
    return data[:start] + chance.choice([b"[" * 100_000, b"\0" * 1000, b'{"a":', b"NaN"]) + data[start:]


def judge(use: Callable[[Path], None], path: Path) -> str:
    """How a file is taken."""
    try:
        use(path)
    except (ArgumentError, PruningError):
        return "refused"
    except pickle.UnpicklingError as error:
        return "refused" if "Unsupported global" in str(error) else f"WRONG {type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 (whatever it is, it is counted)
        return f"WRONG {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "read"


def broken(name: str, mutations: int, seed: int, folder: Path) -> Counter[str]:
    """How many mutated files of a kind are read, are refused, and end in something else.

    Args:
        name: Of a good file.
        mutations: How many broken ones to make of it.
        seed: Of what is broken.
        folder: Of the good files.
    """
    data, chance = (folder / name).read_bytes(), random.Random(f"{name} {seed}")
    assert judge(USES[name], folder / name) == "read", "the good file"
    found: Counter[str] = Counter()
    for _ in range(mutations):
        change = other_values if name.endswith(".json") and chance.random() < 0.7 else other_bytes
        (folder / f"broken-{name}").write_bytes(change(data, chance))
        found[judge(USES[name], folder / f"broken-{name}")] += 1
    return found


def main() -> int:
    """Count, and say what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, wrong = Path(temporary), 0
        write_good_files(folder)
        for name in USES:
            found = broken(name, chosen.mutations, chosen.seed, folder)
            bad = {how: count for how, count in found.items() if how.startswith("WRONG")}
            wrong += sum(bad.values())
            print(f"{name}: {chosen.mutations} broken files, {found['read']} read, {found['refused']} refused, {bad}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
