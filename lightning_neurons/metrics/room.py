"""Memory that the sums of a measurement need, checked before it begins."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lightning_neurons.criteria.contract import NEEDS, Criterion
from lightning_neurons.errors import MeasurementError
from lightning_neurons.metrics.histogram import BINS

_GIB = 2**30
_LIMITS = {"/sys/fs/cgroup/memory.max": "/sys/fs/cgroup/memory.current"}
"""Files with the most memory that a container may take, and with what it takes."""


def bytes_per_neuron(criteria: Sequence[Criterion]) -> int:
    """Return the number of bytes that the sums of one neuron take, without classes."""
    statistics = {s.name for c in criteria for s in c.statistics}
    counts = 2 * len(NEEDS) + 1  # samples and those left out by need, and values
    return 8 * (len(statistics) + counts + (BINS if any(c.histogram for c in criteria) else 0))


def available_bytes(device: torch.device) -> int | None:
    """Return the number of free bytes on a device; None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    sizes = [_number(limit) - _number(taken) for limit, taken in _LIMITS.items() if _number(limit) and _number(taken)]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass  # another operating system
    return min(sizes, default=None)


def _number(path: str) -> int:
    """Read a number from a file.

    Returns:
        The number, or 0 if the file has none or cannot be read.
    """
    try:
        return int(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def require_room(widths: Mapping[str, int], criteria: Sequence[Criterion], device: torch.device) -> None:
    """Refuse a measurement whose sums would not fit.

    Args:
        widths: Number of neurons by layer.
        criteria: The criteria to measure.
        device: The device of the sums.

    Raises:
        MeasurementError: If they take more memory than is free.
    """
    device = torch.device("cpu") if device.type == "mps" else device  # float64 does not exist on Apple's GPUs
    each, free = bytes_per_neuron(criteria), available_bytes(device)
    total = each * sum(widths.values())
    if free is None or total <= free:
        return
    widest = max(widths, key=widths.__getitem__)
    without = " (the histograms of 'near_zero' take most of it)" if any(c.histogram for c in criteria) else ""
    raise MeasurementError(
        f"the sums of {sum(widths.values()):,} neurons would take {total / _GIB:.3g} GiB of {free / _GIB:.3g} GiB that "
        f"are free, of them {each * widths[widest] / _GIB:.3g} GiB for layer {widest!r} with {widths[widest]:,} "
        f"neurons; leave layers out by layers=, or measure less by criteria={without}"
    )
