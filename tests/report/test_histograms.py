"""Histograms in TensorBoard: numbers of any size and sign lie in buckets that tell them apart, and one that fails fails
alone."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_neurons import NeuronSensitivityCallback
from lightning_neurons.report.logging.loggers import BUCKETS, spread
from tests.callbacks.modules import MemoryLogger, Plain, fit

SMALL = [10.0**-power for power in range(13, 17) for _ in range(3)]
NUMBERS = {
    "small": SMALL,
    "smallest": [5e-324, 1e-320, 1e-310],
    "largest": [1e300, 1.5e308],
    "far apart": [1e-30, 2e-30, 1.0, 1e30, 3e30],
    "both signs": [-1e-14, -3e-15, 0.0, 2e-15, 1e-13],
    "negative": [-5.0, -5.0, -1e-20],
    "all equal": [0.7] * 9,
    "all zero": [0.0] * 4,
    "one": [-3.5],
    "many": torch.randn(1000, generator=torch.Generator().manual_seed(0)).exp().mul(1e-15).tolist(),
    "next to each other": [1.0, math.nextafter(1.0, 2)],
}


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS.keys())
def test_each_number_is_in_its_bucket_and_buckets_are_narrow(numbers):
    found = spread(torch.tensor(numbers, dtype=torch.float64))
    limits, counts = found["bucket_limits"], found["bucket_counts"]
    assert limits == sorted(set(limits))
    below = [-math.inf, *limits[:-1]]
    assert counts == [sum(low < n <= high for n in numbers) for low, high in zip(below, limits, strict=True)]
    assert (found["min"], found["max"], found["num"]) == (min(numbers), max(numbers), len(numbers))
    assert found["sum"] == pytest.approx(sum(numbers), rel=1e-9)
    assert len(limits) <= 2 * BUCKETS + 1
    sizes = [abs(n) for n in numbers if n]
    widest = max(1.1, (max(sizes) / min(sizes)) ** (1.01 / (BUCKETS - 1))) if sizes else 0
    for low, high in zip(below[1:], limits[1:], strict=True):
        same_sign = low * high > 0 and any(low < n <= high for n in numbers)
        assert not same_sign or abs(math.log2(high / low)) <= math.log2(widest) + 1e-2


def test_tensorboard_shows_them_as_they_were_counted(tmp_path):
    writer, shown = SummaryWriter(str(tmp_path)), {name: n for name, n in NUMBERS.items() if name != "largest"}
    for place, numbers in enumerate(shown.values()):
        writer.add_histogram_raw(str(place), **spread(torch.tensor(numbers, dtype=torch.float64)), global_step=0)
    writer.close()
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    for place, (name, numbers) in enumerate(shown.items()):
        buckets = accumulator.Histograms(str(place))[0].histogram_value.bucket
        assert sum(buckets) == len(numbers)
        assert sum(count > 0 for count in buckets) >= (4 if name in ("small", "far apart", "both signs", "many") else 1)


class Refusing(SummaryWriter):
    """Cannot write some histograms."""

    def add_histogram_raw(self, tag: str, *args: Any, **kwargs: Any) -> None:
        if tag.startswith("scores/fisher/"):
            raise ValueError("no such histogram")
        super().add_histogram_raw(tag, *args, **kwargs)


class RefusingLogger(TensorBoardLogger):
    """A TensorBoard that cannot write some histograms."""

    @property
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = Refusing(self.log_dir)
        return self._experiment


class Unreachable(MemoryLogger):
    """A tracking service that cannot be reached any more."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "neurons/dead_share" in metrics:
            raise ConnectionError("no network")


def test_a_histogram_that_cannot_be_written_does_not_lose_the_others_nor_the_text(tmp_path):
    loggers = [Unreachable(), RefusingLogger(tmp_path, name="", version="")]
    with pytest.warns(UserWarning, match="could not be written, the first of them because of ConnectionError") as said:
        fit(Plain(), [NeuronSensitivityCallback(max_figures=0)], logger=loggers, max_epochs=2)
    assert sum("could not be written" in str(w.message) for w in said) <= 2
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    groups = {tag.split("/")[0] + "/" + tag.split("/")[1] for tag in tags["histograms"]}
    assert {"scores/taylor", "deadness/near_zero"} <= groups
    assert "scores/fisher" not in groups
    assert any(tag.startswith("magnitudes/") for tag in tags["histograms"])
    assert "neurons/ranking/text_summary" in tags["tensors"]
    assert "neurons/dead_share" in tags["scalars"]
