"""Custom-scalars page of TensorBoard: curves that belong together, in one chart.

TensorBoard shows the last page that a run has laid out; ours is added to the user's, and never hides it.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from fsspec.core import url_to_fs
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard.summary import custom_scalars

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
    return ["Margin", [tag for one in chart.margin.series for tag in (one.value, one.lower, one.upper)]]


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
