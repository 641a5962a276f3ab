"""Reports of made up numbers, also strange ones, and every figure of a report."""

import math
from dataclasses import replace

import torch

from lightning_neurons import NeuronReport
from lightning_neurons.metrics.histogram import BINS, bin_index
from lightning_neurons.report.figures import measurements as figures
from lightning_neurons.results.ablation_report import AblationReport
from lightning_neurons.results.neuron_report import LayerCounts

HOSTILE = ("_$x_", "a$b$c", "<script>", "net." + 39 * "block." + "conv1")


def made(names=("net.conv1",), neurons=12, scores=None, dead=None, values=None, **settings) -> NeuronReport:
    """A report of made up numbers."""
    generator = torch.Generator().manual_seed(neurons)
    drawn = torch.randn(neurons, 40, generator=generator).relu() if values is None else values
    histogram = torch.zeros(neurons, BINS, dtype=torch.int64).scatter_add_(
        1, bin_index(drawn).long(), torch.ones_like(drawn, dtype=torch.int64)
    )
    seen = torch.full((neurons,), drawn.shape[1])
    rms = float(drawn.square().mean().sqrt()) if drawn.numel() else 0.0
    counts = LayerCounts(
        seen,
        seen,
        seen,
        torch.zeros_like(seen),
        torch.zeros_like(seen),
        rms,
        drawn.double().amax(1) if drawn.shape[1] else seen.double(),
        histogram,
    )
    scores = torch.rand(neurons, generator=generator).double() if scores is None else scores
    dead = torch.rand(neurons, generator=generator).double() if dead is None else dead
    return NeuronReport(
        (), {"taylor": dict.fromkeys(names, scores)}, {"near_zero": dict.fromkeys(names, dead)}, {}, (),
        dict.fromkeys(names, counts), {}, {"threshold": 0.01, "relative_threshold": True, **settings},
    )  # fmt: skip


def ablation_of(report, scale=1.0) -> AblationReport:
    delta = {name: scale * scores.flip(0) for name, scores in report.scores["taylor"].items()}
    return AblationReport(1.0, 8, delta, delta)


def every_figure(report: NeuronReport):
    layer = next(iter(report.counts))
    return [
        figures.activation_histogram(report, layer),
        figures.deadness_curve(report, layer),
        figures.deadness_curve(report),
        figures.deadness_grid(report, layer),
        figures.importance_bars(report),
        figures.importance_bars(report, layer=layer),
        figures.sensitivity_by_layer(report),
        figures.agreement_scatter(report, ablation_of(report)),
    ]


CASES = {
    "hostile names": lambda: made(HOSTILE),
    "120 layers": lambda: made([f"net.layer{i}.conv" for i in range(120)]),
    "one neuron": lambda: made(neurons=1),
    "2048 neurons": lambda: made(neurons=2048),
    "no neurons": lambda: made(neurons=0, values=torch.zeros(0, 4)),
    "all NaN": lambda: made(scores=torch.full((12,), math.nan), dead=torch.full((12,), math.nan)),
    "all infinite": lambda: made(scores=torch.full((12,), math.inf)),
    "all zero": lambda: made(scores=torch.zeros(12), dead=torch.ones(12), values=torch.zeros(12, 4)),
    "signed": lambda: made(scores=torch.linspace(-1, 1, 12)),
    "huge and tiny": lambda: made(values=torch.tensor([[1e-30, 1e30, 1e-5, 1.0]]).repeat(12, 1)),
    "nothing was seen": lambda: made(values=torch.zeros(12, 0)),
    "no histogram": lambda: without_histogram(made()),
    "absolute threshold": lambda: made(relative_threshold=False),
    "threshold zero": lambda: made(threshold=0.0),
}


def without_histogram(report: NeuronReport) -> NeuronReport:
    bare = {n: replace(c, rms=None, largest=None, histogram=c.histogram[:0]) for n, c in report.counts.items()}
    return replace(report, counts=bare)
