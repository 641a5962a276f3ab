"""Every series that is logged, and the page of TensorBoard's custom scalars on which they stand together.

``{layer}``, ``{criterion}`` and ``{class}`` stand for names, ``{n}`` for a number from 1.

A second callback of the same kind writes to ``neurons_2/...``, ``scores_2/...``, ``ablation_2/...``, ``saliency_2`` and
so on: the group has its number. Another fit into the same log directory writes to ``neurons_fit_2/...``. A test after a
fit writes to ``neurons_test/...`` and so on. So does another Trainer that tests or validates (``neurons_validate/...``)
into the logger of a fit: its steps are its own.

The table below is the documentation; a test compares it with what is really written.

TensorBoard shows the last page that a run has laid out; ours is added to the user's, and never hides it.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

from fsspec.core import url_to_fs
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard.summary import custom_scalars

_SUFFIX = re.compile(r"(_[1-9]\d*)?(_fit_[1-9]\d*)?(_test|_validate)?$")


@dataclass(frozen=True)
class Tag:
    """One series, or one family of series.

    Attributes:
        name: The tag, with placeholders.
        kind: ``"scalar"`` goes to every logger; anything else to those that can show it.
        meaning: A description of it.
    """

    name: str
    kind: Literal["scalar", "histogram", "text", "figure"]
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
    Tag("pruning/metric_predicted", "scalar", "the same with the plan's neurons silenced, before a cut is decided"),
    Tag("ablation/loss", "scalar", "loss on the sample of the ablation callback"),
    Tag("ablation/agreement", "scalar", "Spearman of criterion and |change of loss without a neuron|, same samples"),
    Tag("ablation/agreement_held_out", "scalar", "the same on samples that the criterion has not seen"),
    Tag("ablation/reliability", "scalar", "Spearman of the measured change on two halves: the ceiling of the last"),
    Tag("ablation/delta_loss/{layer}", "histogram", "change of the loss without each measured neuron"),
    Tag("ablation/ranking", "text", "both ends of the measured ranking"),
    Tag("classes/subnetwork/{class}", "scalar", "accuracy of the class's sub-network on the class's own samples"),
    Tag("classes/ablation/{class}", "scalar", "the same of the network without the class's neurons"),
    Tag("classes/random_subnetwork/{class}", "scalar", "the same of random sub-networks of equal size"),
    Tag("classes/reuse", "scalar", "mean over pairs of classes of the Jaccard index of their neurons minus chance"),
    Tag("classes/importance", "figure", "importance by class, a heat map for each layer"),
    Tag("classes/reuse_matrix", "figure", "neurons that two classes share beyond chance"),
    Tag("classes/selectivity", "figure", "class selectivity index over neurons"),
    Tag("classes/accuracy", "figure", "accuracy of sub-networks, ablation models and controls"),
    Tag("classes/sharing", "figure", "classes on a circle, joined where they share neurons beyond chance"),
    Tag("ablation/scatter", "figure", "score by the criterion against |change of loss|, neuron by neuron"),
    Tag("figures/importance", "figure", "both ends of the ranking, as bars"),
    Tag("figures/importance_by_layer", "figure", "how importance is spread over each layer's neurons"),
    Tag("figures/deadness", "figure", "share of dead neurons at every threshold"),
    Tag("figures/dead_history", "figure", "share of dead neurons of each layer, epoch by epoch"),
    Tag("figures/deadness_grid/{layer}", "figure", "a cell for each neuron, the brighter the deader"),
    Tag("figures/magnitudes/{layer}", "figure", "histogram of |activation| over epochs, as a heat map"),
    Tag("figures/histogram/{layer}", "figure", "histogram of |activation| with the threshold"),
    Tag("pruning/progress", "figure", "parameters, MACs and the metric over the cuts"),
    Tag("saliency", "figure", "the same images each time, and what of them the model looks at"),
    Tag("maximization", "figure", "images made to excite each target"),
    Tag("cards/most_important/{n}", "figure", "card of a neuron: what excites it, and its numbers"),
    Tag("cards/least_important/{n}", "figure", "the same"),
    Tag("cards/newly_dead/{n}", "figure", "the same"),
    Tag("pruning/taken_back", "scalar", "rounds that were taken back so far, as the metric did not recover"),
    Tag("neurons/ranking", "text", "layers, global ranking, deadness by threshold (shown as .../text_summary)"),
)


def kind_of(name: str) -> str | None:
    """Return the kind of the series that ``name`` belongs to, or None if it is in no family of the table.

    Example:
        >>> kind_of("scores/fisher/net.conv1"), kind_of("loss")
        ('histogram', None)
    """
    return next((tag.kind for tag in TAGS if _fits(tag.name, name)), None)


def with_suffix(name: str, suffix: str) -> str:
    """Return the name of a series with a suffix on its group, as of another callback of the same kind.

    Example:
        >>> with_suffix("neurons/dead_share", "_2"), with_suffix("saliency", "_2"), kind_of("neurons_2/dead_share")
        ('neurons_2/dead_share', 'saliency_2', 'scalar')
    """
    group, slash, rest = name.partition("/")
    return f"{group}{suffix}{slash}{rest}"


def _fits(pattern: str, name: str) -> bool:
    wanted, got = pattern.split("/"), name.split("/")
    got[0] = _SUFFIX.sub("", got[0])
    same = all(w == g or (w.startswith("{") and g) for w, g in zip(wanted, got, strict=False))
    return len(wanted) == len(got) and same


_NEURONS, _ABLATION = r"^neurons(_\d+)?", r"^ablation(_\d+)?"

LAYOUT = {
    "deadness": {
        "dead": ["Multiline", [rf"{_NEURONS}/dead_share"]],
        "dormant": ["Multiline", [rf"{_NEURONS}/dormant_share"]],
        "died and revived": ["Multiline", [rf"{_NEURONS}/(died|revived)$"]],
    },
    "importance": {
        "effective number of important neurons": ["Multiline", [rf"{_NEURONS}/effective/"]],
        "rank stability": ["Multiline", [rf"{_NEURONS}/rank_stability"]],
        "agreement with ablation": ["Multiline", [rf"{_ABLATION}/(agreement|reliability)"]],
    },
    "pruning": {
        "neurons": ["Multiline", [r"^pruning/neurons/"]],
        "parameters": ["Multiline", [r"^pruning/parameters$"]],
        "MACs": ["Multiline", [r"^pruning/macs$"]],
        "metric": ["Multiline", [r"^pruning/metric_"]],
    },
}
"""The series of each chart, as regular expressions."""

_TAG = "custom_scalars__config__"


@dataclass
class _Shown:
    """The state of reading a run's event files: the offset in each, and the last page found."""

    read: dict[str, int] = field(default_factory=dict)
    page: bytes | None = None


_SHOWN: "WeakKeyDictionary[Any, _Shown]" = WeakKeyDictionary()


def write_layout(loggers: Sequence[Any]) -> None:
    """Write the page to each TensorBoard logger, unless the last page there has all of our charts."""
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if not hasattr(experiment, "add_custom_scalars"):
            continue
        experiment.flush()
        shown = _SHOWN.setdefault(experiment, _Shown())
        _read_on(shown, str(logger.log_dir))
        theirs = {} if shown.page is None else _charts(Layout.FromString(shown.page))
        if shown.page is not None and _page(theirs) != Layout.FromString(shown.page):
            continue  # this page cannot be laid out again as it is
        together = theirs | {title: charts | theirs.get(title, {}) for title, charts in LAYOUT.items()}
        if together != theirs:
            experiment.add_custom_scalars(together)


def _charts(page: Layout) -> dict[str, dict[str, list[Any]]]:
    """Return a page as ``add_custom_scalars`` takes it."""
    return {category.title: {chart.title: _chart(chart) for chart in category.chart} for category in page.category}


def _chart(chart: Any) -> list[Any]:
    if not chart.HasField("margin"):
        return ["Multiline", list(chart.multiline.tag)]
    return ["Margin", [tag for band in chart.margin.series for tag in (band.value, band.lower, band.upper)]]


def _page(charts: dict[str, dict[str, list[Any]]]) -> Layout | None:
    """Return the page that ``add_custom_scalars`` makes of charts; None if it does not take them."""
    try:
        return Layout.FromString(custom_scalars(charts).value[0].tensor.string_val[0])
    except AssertionError:  # several margins in one chart
        return None


def _read_on(shown: _Shown, folder: str) -> None:
    """Find the last page in the event files of a folder, reading from the offsets reached before."""
    files, name = url_to_fs(folder)
    for path in sorted(files.find(name, maxdepth=1)):
        if "tfevents" not in path:
            continue
        with files.open(path, "rb") as file:
            file.seek(shown.read.get(path, 0))
            for event, end in _events(file):
                shown.read[path] = end
                if _TAG.encode() in event:
                    values = Event.FromString(event).summary.value
                    shown.page = next((v.tensor.string_val[0] for v in values if v.tag == _TAG), shown.page)


def _events(file: Any) -> Iterator[tuple[bytes, int]]:
    """Yield whole records of an event file and their end offsets: length and checksum, then data and checksum."""
    end = file.tell()
    while len(head := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", head[:8])
        record = file.read(length + 4)
        if len(record) < length + 4:
            return
        end += 12 + length + 4
        yield record[:-4], end
