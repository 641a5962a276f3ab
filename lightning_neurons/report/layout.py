"""The custom-scalars page of TensorBoard: curves that belong together, in one chart."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

LAYOUT = {
    "deadness": {
        "dead": ["Multiline", [r"^neurons/dead_share"]],
        "dormant": ["Multiline", [r"^neurons/dormant_share"]],
        "died and revived": ["Multiline", [r"^neurons/(died|revived)$"]],
    },
    "importance": {
        "effective number of important neurons": ["Multiline", [r"^neurons/effective/"]],
        "rank stability": ["Multiline", [r"^neurons/rank_stability"]],
        "agreement with ablation": ["Multiline", [r"^ablation/(agreement|reliability)"]],
    },
    "pruning": {
        "neurons": ["Multiline", [r"^pruning/neurons/"]],
        "parameters": ["Multiline", [r"^pruning/parameters$"]],
        "MACs": ["Multiline", [r"^pruning/macs$"]],
        "metric": ["Multiline", [r"^pruning/metric_"]],
    },
}
"""Chart by chart, which series it shows: a regular expression each."""

_LAID_OUT: "WeakSet[Any]" = WeakSet()


def write_layout(loggers: Sequence[Any]) -> None:
    """Lay the page out, once in each logger that has one."""
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_custom_scalars") and experiment not in _LAID_OUT:
            experiment.add_custom_scalars(LAYOUT)
            _LAID_OUT.add(experiment)
