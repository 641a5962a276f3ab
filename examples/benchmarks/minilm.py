"""A trained BERT at a share of its MACs without any training: how near are its embeddings of unseen lines?

    python examples/benchmarks/minilm.py --model FOLDER --text FILE [--macs 0.5] [--mlps 0.25] [--only-mlps]

FOLDER has all-MiniLM-L6-v2 (6 layers, 384 wide, 12 heads), or another BERT, as Hugging Face stores it. Measured on 256
lines of FILE that nothing was calibrated on: the mean cosine to the embeddings of the whole network, and the rank
correlation of the similarities of all pairs. Needs transformers. ``--only-mlps`` does the last table alone, which also
runs with earlier versions of this package, to compare the seconds.
"""

import argparse
import copy
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoTokenizer

from lightning_neurons import prune

LENGTH, LINES = 24, 256


class Sentences(nn.Module):
    """Embeds lines by the mean over their tokens."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.bert = AutoModel.from_pretrained(folder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``(line, token)`` to ``(line, width)``, each of length 1."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def compare(model: nn.Module, test: dict[str, Tensor], dense: Tensor) -> str:
    """Cosine and rank correlation, in words."""
    with torch.no_grad():
        embeddings = model.eval()(**test)
    rows, columns = torch.triu_indices(len(dense), len(dense), 1)
    ours, theirs = ((e @ e.T)[rows, columns] for e in (embeddings, dense))
    return (
        f"cosine {float((embeddings * dense).sum(1).mean()):.4f}, rank correlation {rank_correlation(ours, theirs):.4f}"
    )


def cut_by_torch_pruning(model: Any, example: dict[str, Tensor], macs: float) -> float:
    """Cut by the L2 norm of groups, with the heads and what stays whole given by hand; return the share that stays."""
    import torch_pruning

    attentions = [module for module in model.modules() if hasattr(module, "num_attention_heads")]
    layers = model.bert.encoder.layer
    streams = [model.bert.embeddings, *(layer.output.dense for layer in layers)]
    streams += [layer.attention.output.dense for layer in layers]
    before = macs_of(model, example)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1 - macs,
        head_pruning_ratio=1 - macs,
        num_heads={layer: m.num_attention_heads for m in attentions for layer in (m.query, m.key, m.value)},
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=streams,
        output_transform=lambda out: out.sum(),
    )
    pruner.step()
    for module in attentions:
        module.num_attention_heads = pruner.num_heads[module.query]
        module.all_head_size = module.query.out_features
    return macs_of(model, example) / before


def macs_of(model: nn.Module, example: dict[str, Tensor]) -> float:
    """MACs of all matrix products of a forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**example)
    return counter.get_total_flops() / 2


def main() -> None:
    """Cut in several ways, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--mlps", type=float, default=0.25)
    parser.add_argument("--only-mlps", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    tokenizer, model = AutoTokenizer.from_pretrained(arguments.model), Sentences(arguments.model).eval()
    lines = [line for line in arguments.text.read_text().split("\n") if len(line) > LENGTH + 1]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()

    def encoded(begin: int, count: int) -> dict[str, Tensor]:
        some = [lines[i] for i in order[begin : begin + count]]
        tokens = tokenizer(some, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    calibration, test = [encoded(begin, 64) for begin in range(0, LINES, 64)], encoded(1000, LINES)
    example = {name: tensor[:2] for name, tensor in calibration[0].items()}
    with torch.no_grad():
        dense = model(**test)

    def report(budget: dict[str, Any], how: str) -> None:
        cut, begin, batches = copy.deepcopy(model), time.process_time(), None if how == "none" else calibration
        made = prune(cut, example, budget, batches, compensation=how)  # type: ignore[arg-type]
        seconds, left = time.process_time() - begin, made.cost.macs_after / made.cost.macs
        what = f"{budget['criterion']}, {how}: {left:.1%} of MACs"
        print(f"  {what}, {compare(cut, test, dense)}, {seconds:.0f} CPU s", flush=True)

    if not arguments.only_mlps:
        print(f"{arguments.macs:.0%} of MACs, heads and hidden units")
        for criterion, scope, how in (
            ("weight_l2", "layer", "none"),
            ("weight_l2", "layer", "least_squares"),
            ("reconstruction", "layer", "least_squares"),
            ("reconstruction", "global", "least_squares"),
            ("reconstruction", None, "least_squares"),
        ):
            print(f"  scope {scope or 'the better of layer and global'}:")
            report({"criterion": criterion, "target_macs": arguments.macs, "scope": scope}, how)
        other = copy.deepcopy(model)
        left = cut_by_torch_pruning(other, example, arguments.macs)
        print(f"  Torch-Pruning, L2 of groups: {left:.1%} of MACs, {compare(other, test, dense)}", flush=True)
    print(f"without {arguments.mlps:.0%} of the hidden units of all MLPs")
    alone = {"amount": arguments.mlps, "ignore": ["*attention.self.*"]}
    for criterion, how in (("weight_l2", "none"), ("weight_l2", "least_squares"), ("reconstruction", "least_squares")):
        report({"criterion": criterion, **alone}, how)


if __name__ == "__main__":
    main()
