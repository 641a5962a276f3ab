"""What of many architectures can be cut, is the cut right, and what does Torch-Pruning alone make of them?

    python examples/benchmarks/zoo.py [--zoo FOLDER] [--only NAME ...] [--json FILE] [--limit 120]

Each file of FOLDER has a dict ``Z`` of builders: ``Z[name]()`` returns a model and its example inputs, a tensor or a
dict of keyword arguments. Without it, a few small networks are built here. Each network runs in two processes of its
own, one for this package and one for Torch-Pruning, that are killed at the limit. Needs a system that can fork.
"""

import argparse
import contextlib
import copy
import json
import logging
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from architectures import (
    Build,
    Row,
    attempt,
    built,
    in_float64,
    largest_difference,
    networks_in,
    outputs,
    own_networks,
    recount,
)

from lightning_neurons import PruningBudget, PruningReport, prune
from lightning_neurons.data.batches import map_tensors, samples_in, tensors_of
from lightning_neurons.errors import PruningError
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import Structure, discover

MEMORY = 8 * 2**30
"""Bytes that a process may allocate: graphs that grow for ever end with an error, not with the machine."""

HEADS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads")
HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
PROJECTIONS = ("qkv", "q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin")


def least_share(structure: Structure) -> float:
    """Return the share of MACs that stays when everything goes that may."""
    units = {}
    for root, group in structure.offered.items():
        left = {name: sum(map(len, of)) for name, of in group.layers.items()}
        units[root] = []
        for unit in range(group.size):
            gone = group.neurons([unit])
            if all(left[name] - len(gone[name]) >= group.least for name in left):
                units[root].append(unit)
                left = {name: left[name] - len(gone[name]) for name in left}
    return structure.costs_without(units)[1] / max(structure.costs.macs(), 1)


def refusals(model: nn.Module, structure: Structure) -> list[Row]:
    """Return each group and layer that stays whole, with its share of the MACs of all weights, largest first."""
    of = {name: structure.costs.macs_of(f"{name}.weight") for name in structure.widths}
    total = max(structure.costs.macs(), 1)
    rows = [
        {"root": root, "size": structure.groups[root].size, "layers": list(structure.groups[root].layers), "why": why}
        for root, why in structure.refused.items()
    ]
    rows += [{"root": name, "size": 0, "layers": [name], "why": why} for name, why in structure.unseen.items()]
    for row in rows:
        row["macs"] = round(sum(of.get(name, 0) for name in row["layers"]) / total, 4)
    return sorted(rows, key=lambda row: -row["macs"])


def cut_to_half(model: nn.Module, inputs: Any) -> tuple[PruningReport, bool]:
    """Cut a network to half its MACs, or where that is not reached to half its neurons."""
    try:
        return prune(model, inputs, PruningBudget("weight_l2", target_macs=0.5)), True
    except PruningError as error:
        if "not reached" not in str(error):
            raise
    return prune(model, inputs, PruningBudget("weight_l2", amount=0.5)), False


def trains(model: nn.Module, inputs: Any) -> None:
    """Make a training step."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    torch.stack([out.square().mean() for out in outputs(model, inputs)]).sum().backward()
    optimizer.step()
    model.eval()


def exports(model: nn.Module, inputs: Any) -> None:
    """Export a network, and compare the outputs of what is exported."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False  # a cache is no tensor
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    program = torch.export.export(model, args, kwargs, strict=False).module()
    with torch.no_grad():
        for a, b in zip(outputs(model, inputs), outputs(program, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def study(build: Build, send: Callable[[Row], None]) -> None:
    """Find the groups of a network, cut it, and check the cut."""
    row: Row = {}
    model, inputs = built(build)
    with torch.no_grad():
        outputs(model, inputs)  # what is done once is not counted
    start = time.process_time()
    with attempt(row, "not traced"):
        structure = discover(model, Example(inputs))
        row["groups seconds"] = time.process_time() - start
        row |= {"groups": len(structure.groups), "offered": len(structure.offered)}
        row |= {"least": least_share(structure), "refused": refusals(model, structure)}
    send(row)
    if "least" not in row:
        return
    exact(build, row)
    send(row)
    works(build, row)
    send(row)


def exact(build: Build, row: Row) -> None:
    """Cut a copy in double precision, and compare its outputs with the reference."""
    with attempt(row, "not cut"):
        whole, inputs = built(build, double=True)
        cut = copy.deepcopy(whole)
        report, _ = cut_to_half(cut, inputs)
        if report.plan:
            with attempt(row, "not compared"):
                row["difference"] = largest_difference(whole, cut, inputs)


def works(build: Build, row: Row) -> None:
    """Cut a network as it is, count again, and run what is left forward, train it for a step, and export it."""
    whole, inputs = built(build)
    cut = copy.deepcopy(whole)
    with attempt(row, "forward"):
        report, reached = cut_to_half(cut, inputs)
        outputs(cut, inputs)
        row["forward"] = "works"
        compare_costs(report, whole, cut, inputs, row)
        row["half"] = reached and row["left"] < 0.505
    for name, step in (("training", trains), ("export", exports)):
        with attempt(row, name):
            step(copy.deepcopy(cut), inputs)
            row[name] = "works"
        if row[name] != "works":
            with attempt(row, f"{name} of the whole"):
                step(copy.deepcopy(whole), inputs)
                row[f"{name} of the whole"] = "works"


def compare_costs(report: PruningReport, whole: nn.Module, cut: nn.Module, inputs: Any, row: Row) -> None:
    """Compare predicted costs with a recount in double precision, in which recurrent layers are counted too."""
    cost, samples = report.cost, samples_in(inputs)
    (parameters, macs), (parameters_after, macs_after) = (
        recount(copy.deepcopy(model).double(), map_tensors(inputs, in_float64)) for model in (whole, cut)
    )
    row["left"] = macs_after / macs
    row["predicted"] = [cost.parameters, cost.parameters_after, cost.macs, cost.macs_after]
    row["recounted"] = [parameters, parameters_after, macs / samples, macs_after / samples]
    row["costs right"] = all(abs(a - b) <= 1 for a, b in zip(row["predicted"], row["recounted"], strict=True))


def final_layers(model: nn.Module, inputs: Any) -> list[nn.Module]:
    """Return the layers whose outputs are those of the network: the last with a weight on each way."""
    names = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
    stack = [out.grad_fn for out in outputs(model, inputs)]
    seen, found = set(stack), {}
    while stack:
        function = stack.pop()
        sources = [source for source, _ in getattr(function, "next_functions", ()) if source is not None]
        weights = [getattr(w, "variable", None) for s in sources for w in (s, *_through_transposition(s))]
        owners = [names[id(weight)] for weight in weights if weight is not None and weight.ndim > 1]
        found |= dict.fromkeys(owners)
        if not owners:
            stack += [source for source in sources if source not in seen]
            seen.update(sources)
    return [model.get_submodule(name) for name in found]


def _through_transposition(function: Any) -> list[Any]:
    return [source for source, _ in function.next_functions] if type(function).__name__ == "TBackward0" else []


def heads_of(model: nn.Module) -> dict[nn.Module, tuple[int, nn.Module]]:
    """Return the heads and the attention of each projection to queries, keys and values."""
    found = {}
    for module in model.modules():
        sources = (module, getattr(module, "config", None))
        heads = next((n for source in sources for h in HEADS if isinstance(n := getattr(source, h, None), int)), None)
        for name, child in module.named_children():
            if heads is not None and name in PROJECTIONS and isinstance(child, nn.Linear):
                found[child] = heads, module
    return found


def mend_heads(heads: Mapping[nn.Module, tuple[int, nn.Module]], widths: Mapping[nn.Module, int]) -> None:
    """Set the attributes of attention to the new widths, as one who prunes by hand does."""
    for layer, (count, attention) in heads.items():
        fused = 3 if layer is getattr(attention, "qkv", None) else 1
        for name, value in list(vars(attention).items()):
            if name in HEAD_SIZES:
                setattr(attention, name, layer.out_features // fused // count)
            elif type(value) is int and value == widths[layer] // fused and name not in HEADS:
                setattr(attention, name, layer.out_features // fused)


def mend_vision_transformer(model: nn.Module) -> None:
    """Set the width that torchvision's vision transformer keeps beside its patch embedding."""
    if hasattr(model, "hidden_dim") and hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels


def by_hand(build: Build, send: Callable[[Row], None]) -> None:
    """Do the same with Torch-Pruning alone: half of each group by its L2 norm, heads given, the last layers ignored."""
    row: Row = {}
    model, inputs = built(build)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    ends, heads = final_layers(model, inputs), heads_of(model)
    settings: Row = {"example_inputs": inputs, "output_transform": lambda out: tensors_of(getattr(out, "logits", out))}
    start = time.process_time()
    with attempt(row, "not traced"):
        graph = torch_pruning.DependencyGraph().build_dependency(model, **settings)
        row["groups"] = sum(1 for _ in graph.get_all_groups(ignored_layers=ends))
        row["groups seconds"] = time.process_time() - start
    send(row)
    with attempt(row, "not cut"):
        whole, inputs = built(build, double=True)
        cut = copy.deepcopy(whole)
        ends, heads = final_layers(cut, inputs), heads_of(cut)
        widths = {layer: layer.out_features for layer in heads}
        torch_pruning.pruner.MagnitudePruner(
            cut, **(settings | {"example_inputs": inputs}), pruning_ratio=0.5, ignored_layers=ends,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            num_heads={layer: count for layer, (count, _) in heads.items()},
        ).step()  # fmt: skip
        mend_heads(heads, widths)
        mend_vision_transformer(cut)
        row["left"] = recount(cut.eval(), inputs)[1] / recount(whole, inputs)[1]
        with attempt(row, "not compared"):
            row["difference"] = largest_difference(whole, cut, inputs)
    send(row)


def in_a_process(work: Callable[[Build, Callable[[Row], None]], None], build: Build, limit: float) -> Row:
    """Run in a process of its own, and kill it at the limit; what it has sent until then counts."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(work, build, sender))
    process.start()
    sender.close()
    row: Row = {}
    end, ended = time.monotonic() + limit, False
    with contextlib.suppress(EOFError):
        while receiver.poll(max(end - time.monotonic(), 0)):
            row = receiver.recv()
        row["never ends"], ended = f"killed after {limit:g} s", True
        process.kill()
    process.join()
    if process.exitcode and not ended:
        row["died"] = f"exit code {process.exitcode}"
    return row


def _quietly(work: Callable[[Build, Callable[[Row], None]], None], build: Build, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    row: Row = {}
    with attempt(row, "not traced"):
        work(build, sender.send)
    if row:
        sender.send(row)
    sender.close()


def line(name: str, ours: Row, theirs: Row) -> str:
    """Return a row of the table."""

    def share(row: Row, key: str) -> str:
        return f"{row[key]:.0%}" if key in row else "-"

    def failure(row: Row, *keys: str) -> str:
        return next((row[key].partition(":")[0] for key in keys if row.get(key, "works") != "works"), "")

    def seconds(row: Row) -> str:
        return f"{row['groups seconds']:.2f}" if "groups seconds" in row else "-"

    def error(row: Row) -> str:
        why = failure(row, "never ends", "died", "not traced", "not cut", "not compared")
        return f"{row['difference']:.0e}" if "difference" in row else why or "-"

    right = {True: "yes", False: "NO"}.get(ours.get("costs right"), "-")
    works = failure(ours, "forward", "training", "export") or ("yes" if "export" in ours else "-")
    cells = [
        name, "yes" if "least" in ours else failure(ours, "never ends", "died", "not traced"), share(ours, "least"),
        {True: "yes", False: "no"}.get(ours.get("half"), "-"), share(ours, "left"), error(ours), right, works,
        seconds(ours), seconds(theirs), share(theirs, "left"), error(theirs),
    ]  # fmt: skip
    return " | ".join(cells)


HEADER = (
    "network | traced | least MACs | half reached | MACs left | difference | costs right | runs, trains, exports | "
    "seconds for groups | theirs | their MACs left | their difference"
)


def main() -> None:
    """Study all networks, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, help="a folder of builders")
    parser.add_argument("--only", nargs="+", help="names of networks")
    parser.add_argument("--json", type=Path, help="where all that was seen is written")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one network in one process")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if chosen.zoo is not None and not chosen.zoo.is_dir():
        parser.error(f"--zoo: {chosen.zoo} is no folder")
    networks = own_networks() if chosen.zoo is None else networks_in(chosen.zoo)
    unknown = sorted(set(chosen.only or ()) - set(networks))
    if unknown or not networks:
        parser.error(f"--only: {', '.join(unknown)} not among {', '.join(networks) or 'no networks at all'}")
    print(HEADER, "|".join(["--"] * len(HEADER.split("|"))), sep="\n", flush=True)
    rows: dict[str, dict[str, Row]] = {}
    for name in chosen.only or networks:
        rows[name] = {
            who: in_a_process(work, networks[name], chosen.limit)
            for who, work in (("ours", study), ("torch_pruning", by_hand))
        }
        print(line(name, *rows[name].values()), flush=True)
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(rows, indent=1))
    reached = [name for name, row in rows.items() if row["ours"].get("half")]
    print(f"{len(reached)} of {len(rows)} reach half their MACs")


if __name__ == "__main__":
    main()
