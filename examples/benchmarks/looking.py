"""Saliency against captum, activation maximisation against lucent, and figures: CPU seconds of one thread, and memory.

    python examples/benchmarks/looking.py [--data FOLDER] [--pictures 128] [--repeats 5]

Without a folder of real pictures and weights (--data), random ones are used. Lucent is compared with where it can be
imported. Variants take turns; given are medians. Memory is the peak of a process of its own, beyond what it had before.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from captum.attr import NoiseTunnel, Saliency
from nets import resnet20_and_pictures

from lightning_neurons import find_neurons, maximize_activation, measure, saliency
from lightning_neurons.report.figures.choice import report_figures
from lightning_neurons.report.figures.drawing import save_figure
from lightning_neurons.results.history import NeuronHistory

NEURONS, STEPS, SAMPLES = 8, 128, 16


def cpu_seconds(cases: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median of each case; they take turns, after one run each that does not count."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, run in cases.items():
            start = time.process_time()
            run()
            if turn:
                found[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def smoothgrad_by_captum(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Its defaults: all noisy copies of all pictures in one batch."""
    tunnel = NoiseTunnel(Saliency(net))
    return tunnel.attribute(x, nt_type="smoothgrad", nt_samples=SAMPLES, stdevs=0.15, target=y, abs=False)


def smoothgrad_here(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same number of copies."""
    return saliency(net, x, y, method="smoothgrad", samples=SAMPLES)


def _highest() -> float:
    """The most memory that this process has had, in MiB, as Linux tells it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def _peak(name: str, pictures: int, data: Path | None) -> float:
    torch.set_num_threads(1)
    net, x, y = resnet20_and_pictures(pictures, data)
    net(x[:2])
    before = _highest()
    {"captum": smoothgrad_by_captum, "here": smoothgrad_here}[name](net, x, y)
    return _highest() - before


def peak_mebibytes(name: str, pictures: int, data: Path | None) -> float:
    """What SmoothGrad adds to the memory of a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, name, pictures, data).result()


def maximization_cases(net: nn.Module, layer: str, steps: int) -> dict[str, Callable[[], object]]:
    """Eight neurons of a layer, here and by lucent, one by one and in a batch."""
    neurons = [(layer, i) for i in range(NEURONS)]
    cases: dict[str, Callable[[], object]] = {
        "here": lambda: maximize_activation(net, neurons, input_shape=(3, 32, 32), value_range=(0, 1), steps=steps),
        "here, to the output": lambda: maximize_activation(
            net, range(NEURONS), input_shape=(3, 32, 32), value_range=(0, 1), steps=steps
        ),
    }
    try:
        from lucent.optvis import objectives, param, render
    except ImportError:
        return cases
    path = layer.replace(".", "_")
    quiet = {"thresholds": (steps,), "progress": False, "show_image": False, "fixed_image_size": 32}

    def one_by_one() -> None:
        for i in range(NEURONS):
            render.render_vis(net, f"{path}:{i}", lambda: param.image(32), **quiet)
            forget_hooks(net)

    def batch() -> None:
        objective = sum(objectives.channel(path, i, batch=i) for i in range(NEURONS))
        render.render_vis(net, objective, lambda: param.image(32, batch=NEURONS), **quiet)
        forget_hooks(net)

    return {**cases, "lucent, one by one": one_by_one, "lucent, batch": batch}


def forget_hooks(net: nn.Module) -> None:
    """Lucent leaves its hooks behind, which would slow down every case after it."""
    for module in net.modules():
        module._forward_hooks.clear()


def figure_seconds(net: nn.Module, x: Tensor, y: Tensor) -> tuple[int, float]:
    """Every figure of a report of the whole network, as PNG."""
    report = measure(net, [(x, y)], loss_fn=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    history = NeuronHistory()
    for _ in range(5):
        history.add(report)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        drawn = [save_figure(figure, Path(folder) / "one.png") for _, figure in report_figures(report, history, 10_000)]
    return len(drawn), time.process_time() - start


def main() -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--no-figures", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    net, x, y = resnet20_and_pictures(options.pictures, options.data)
    explained = Saliency(net)
    found = cpu_seconds(
        {
            "captum Saliency": lambda: explained.attribute(x.requires_grad_(), target=y, abs=False),
            "saliency": lambda: saliency(net, x.detach(), y),
        },
        options.repeats,
    )
    show("saliency", found, "captum Saliency")
    found = cpu_seconds(
        {
            "captum NoiseTunnel": lambda: smoothgrad_by_captum(net, x, y),
            "smoothgrad": lambda: smoothgrad_here(net, x, y),
        },
        max(1, options.repeats // 3),
    )
    show(f"SmoothGrad of {SAMPLES} copies", found, "captum NoiseTunnel")
    theirs, ours = (peak_mebibytes(name, options.pictures, options.data) for name in ("captum", "here"))
    print(f"  peak memory: captum {theirs:.0f} MiB, here {ours:.0f} MiB ({ours / theirs:.2f})")
    layer = next(one.name for one in find_neurons(net, x[:1].detach()) if one.neurons == 32)
    found = cpu_seconds(maximization_cases(net, layer, options.steps), max(1, options.repeats // 2))
    show(f"maximisation of {NEURONS} neurons of {layer} x {options.steps} steps", found, "lucent, one by one")
    if not options.no_figures:
        count, seconds = figure_seconds(net, x.detach(), y)
        print(f"{count} figures of a report: {seconds:.1f} s")


def show(title: str, found: Mapping[str, float], peer: str) -> None:
    """Seconds, and shares of the peer's where it was measured."""
    print(title)
    for name, seconds in found.items():
        ratio = f"  {seconds / found[peer]:.2f}" if peer in found else ""
        print(f"  {name:25} {seconds:8.3f} s{ratio}")


if __name__ == "__main__":
    main()
