"""What observing costs, as ratios to a plain forward in the same run.

    python examples/benchmarks/cost_of_observing.py [--data FOLDER] [--device cuda]

Variants are interleaved; the median of CPU seconds (of wall seconds on a GPU) is shown. Peak memory is measured in a
process of its own for each case. FOLDER holds CIFAR-10 pictures and a trained ResNet-20; without it, random ones are
used, which take the same time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).parent))
from nets import resnet20_and_pictures, tiny_net

from lightning_neurons import measure
from lightning_neurons.criteria import ACTIVATION_CRITERIA, GRADIENT_CRITERIA, resolve
from lightning_neurons.layers.registry import family_of
from lightning_neurons.measurement.measurement import Measurement
from lightning_neurons.measurement.passes import Passes

BATCH = 128


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def plain(model: nn.Module, batches: list) -> None:
    """A forward without gradients: what validation does anyway."""
    with torch.no_grad():
        for x, _ in batches:
            model(x)


def ride(model: nn.Module, batches: list) -> None:
    """The same forward, watched: all default statistics, and the report."""
    measurement = Measurement(model, resolve(ACTIVATION_CRITERIA), device=batches[0][0].device)
    passes = Passes(model, [measurement])
    for x, y in batches:
        measurement.start_batch(len(x), y)
        with torch.no_grad(), passes.observe():
            model(x)
        measurement.finish_batch()
    measurement.report(settings={})


def sensitivity(model: nn.Module, batches: list) -> None:
    """Forward and backward to the activations: all default gradient criteria, and the report."""
    measure(model, batches, loss_fn=loss, criteria=GRADIENT_CRITERIA)


def training_step(model: nn.Module, batches: list) -> None:
    """Forward and backward to the parameters."""
    for batch in batches:
        loss(model, batch).backward()
    model.zero_grad()


def bare_backward(model: nn.Module, batches: list) -> None:
    """Forward and backward to the activations by plain hooks, nothing computed from them."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        outputs.append(output if output.requires_grad else output.requires_grad_())

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for x, y in batches:
        outputs.clear()
        F.cross_entropy(model(x), y, reduction="sum").backward(inputs=outputs[:1])
    for handle in handles:
        handle.remove()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def captum_list(model: nn.Module, batches: list) -> None:
    """The captum attribution LayerGradientXActivation over the list of layers, reduced to one number per neuron."""
    from captum.attr import LayerGradientXActivation

    layers = [m for m in model.modules() if family_of(m)]
    attribution = LayerGradientXActivation(model, layers)
    sums = None
    for x, y in batches:
        found = attribution.attribute(x, target=y)
        rows = [a.detach().flatten(2).sum(-1).abs().sum(0) if a.ndim > 2 else a.detach().abs().sum(0) for a in found]
        sums = rows if sums is None else [a + b for a, b in zip(sums, rows, strict=True)]


CASES: dict[str, Callable] = {
    "plain forward": plain,
    "statistics riding on it": ride,
    "sensitivity pass": sensitivity,
    "forward + backward to activations, bare": bare_backward,
    "forward + backward to parameters": training_step,
    "captum LayerGradientXActivation(list)": captum_list,
}


def timed(action: Callable[[], None], device: str) -> float:
    """CPU seconds of this process; wall seconds on a GPU, when it has finished."""
    if device == "cpu":
        start = time.process_time()
        action()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def installed(name: str) -> bool:
    """Whether what a case compares with is there."""
    return not name.startswith("captum") or find_spec("captum") is not None


def ratios(samples: int, repeats: int, data: Path | None, device: str) -> None:
    """All cases, interleaved."""
    model, x, y = resnet20_and_pictures(samples, data)
    model = model.to(device)
    batches = list(zip(x.to(device).split(BATCH), y.to(device).split(BATCH), strict=True))
    cases = {name: lambda case=case: case(model, batches) for name, case in CASES.items() if installed(name)}
    for case in cases.values():
        case()
    times = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            times[name].append(timed(case, device))
    base = statistics.median(times["plain forward"])
    print(f"ResNet-20, {samples} pictures, batches of {BATCH}, {device}: median of {repeats}")
    for name, seconds in times.items():
        paired = statistics.median(a / b for a, b in zip(seconds, times["plain forward"], strict=True))
        print(f"  {name:42s} {statistics.median(seconds):7.3f} s  {statistics.median(seconds) / base:5.2f} x  "
              f"(median of paired ratios {paired:5.2f})")  # fmt: skip


def overhead(repeats: int) -> None:
    """Microseconds per layer and batch on a network that hardly computes."""
    model, batch = tiny_net(), (torch.randn(16, 8), torch.randint(0, 4, (16,)))
    batches, layers = [batch] * 200, sum(1 for m in model.modules() if family_of(m))
    for name, case in (("statistics riding", ride), ("sensitivity pass", sensitivity)):
        case(model, batches[:2])
        extra = []
        for _ in range(repeats):
            base = timed(lambda: plain(model, batches), "cpu")
            extra.append(timed(lambda case=case: case(model, batches), "cpu") - base)
        each = statistics.median(extra) / len(batches) / layers * 1e6
        print(f"tiny net, {name:20s} {each:6.1f} microseconds per layer and batch above a plain forward")


def memory(name: str, samples: int, data: Path | None) -> None:
    """Peak resident memory above what the model and the data take, in this process."""
    model, x, y = resnet20_and_pictures(samples, data)
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    CASES[name](model, [(x[:2], y[:2])])  # libraries are loaded
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    CASES[name](model, batches)
    print(json.dumps({"extra": _status("VmHWM") - before}))


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def peaks(arguments: argparse.Namespace) -> None:
    """Peak memory of each case, each in its own process; two sizes for the passes of this package."""
    sizes = {
        name: (512, 5120) if name in ("statistics riding on it", "sensitivity pass") else (512,)
        for name in CASES
        if installed(name)
    }
    for name, all_samples in sizes.items():
        for samples in all_samples:
            command = [sys.executable, __file__, "--peak", name, "--samples", str(samples)]
            command += ["--data", str(arguments.data)] if arguments.data else []
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"  peak memory, {samples:5d} pictures: {name:42s} {json.loads(out)['extra']:7.0f} MiB extra")


def growth(data: Path | None) -> None:
    """Time against the number of samples."""
    model, x, y = resnet20_and_pictures(2560, data)
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    for name in ("statistics riding on it", "sensitivity pass"):
        seconds = [timed(lambda n=n, name=name: CASES[name](model, batches[:n]), "cpu") for n in (5, 10, 20)]
        print(f"  {name}: {[round(s, 2) for s in seconds]} s for 640, 1280, 2560 pictures")


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, nargs="+", default=[512, 2560])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only-ratios", action="store_true", help="leave out overhead, growth and memory")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        memory(arguments.peak, arguments.samples[0], arguments.data)
        return
    for samples in arguments.samples:
        ratios(samples, arguments.repeats, arguments.data, arguments.device)
    if arguments.device == "cpu" and not arguments.only_ratios:
        overhead(arguments.repeats)
        growth(arguments.data)
        peaks(arguments)


if __name__ == "__main__":
    main()
