"""Every series that is logged. ``{layer}`` and ``{criterion}`` stand for names.

The table below is the documentation; a test compares it with what is really written.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Tag:
    """One series, or one family of series.

    Attributes:
        name: The tag, with placeholders.
        kind: ``"scalar"`` goes to every logger; ``"histogram"`` and ``"text"`` to those that can show them.
        meaning: What it shows.
    """

    name: str
    kind: Literal["scalar", "histogram", "text"]
    meaning: str


TAGS = (
    Tag("neurons/dead_share", "scalar", "share of all neurons that never fired"),
    Tag("neurons/dead_share/{layer}", "scalar", "share of the layer's neurons that never fired"),
    Tag("neurons/dormant_share", "scalar", "share of all neurons that are tau-dormant"),
    Tag("neurons/dormant_share/{layer}", "scalar", "share of the layer's neurons that are tau-dormant"),
    Tag("neurons/constant_share", "scalar", "share of all neurons whose value never changes"),
    Tag("neurons/effective/{layer}", "scalar", "effective number of important neurons: exp(entropy of importance)"),
    Tag("neurons/effective_share", "scalar", "sum of effective numbers over the number of neurons"),
    Tag("neurons/rank_stability", "scalar", "mean over layers of the next"),
    Tag("neurons/rank_stability/{layer}", "scalar", "Spearman correlation of importance with the measurement before"),
    Tag("neurons/died", "scalar", "neurons that are dead now and were alive in the measurement before"),
    Tag("neurons/revived", "scalar", "neurons that are alive now and were dead in the measurement before"),
    Tag("neurons/nonfinite", "scalar", "samples x neurons with NaN or infinite values (left out of everything)"),
    Tag("scores/{criterion}/{layer}", "histogram", "scores over the layer's neurons"),
    Tag("deadness/{criterion}/{layer}", "histogram", "deadness over the layer's neurons; 1 is dead"),
    Tag("magnitudes/{layer}", "histogram", "log10 of |activation| over neurons and samples: where to put a threshold"),
    Tag("pruning/parameters", "scalar", "parameters of the model"),
    Tag("pruning/macs", "scalar", "multiply-accumulate operations per sample"),
    Tag("pruning/latency_ms", "scalar", "milliseconds of a forward on the example, right after a cut"),
    Tag("pruning/removed", "scalar", "neurons removed by a cut"),
    Tag("pruning/neurons/{layer}", "scalar", "neurons of the layer"),
    Tag("pruning/metric_before", "scalar", "the monitored metric at the validation before a cut"),
    Tag("pruning/metric_cut", "scalar", "the same right after the cut, on kept samples"),
    Tag("pruning/metric_after", "scalar", "the same at the next validation"),
    Tag("pruning/taken_back", "scalar", "rounds that were taken back so far, as the metric did not recover"),
    Tag("neurons/ranking", "text", "layers, global ranking, deadness by threshold (shown as .../text_summary)"),
)


def kind_of(name: str) -> str | None:
    """The kind of the series that ``name`` belongs to, or None if it is in no family of the table.

    Example:
        >>> kind_of("scores/fisher/net.conv1"), kind_of("loss")
        ('histogram', None)
    """
    return next((tag.kind for tag in TAGS if _fits(tag.name, name)), None)


def _fits(pattern: str, name: str) -> bool:
    wanted, got = pattern.split("/"), name.split("/")
    same = all(w == g or (w.startswith("{") and g) for w, g in zip(wanted, got, strict=False))
    return len(wanted) == len(got) and same
