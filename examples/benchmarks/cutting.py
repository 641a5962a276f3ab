"""Is a cut right, how fast is it, and does it do what others have published?

    python examples/benchmarks/cutting.py [--data FOLDER] [--pictures 500]

FOLDER holds trained networks and pictures. Without it, the same is done on a ResNet-20 with random weights, where that
makes sense.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
import torch_pruning
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from nets import ResNet20

from lightning_neurons import PruningBudget, PruningPlan, prune
from lightning_neurons.pruning.planning import complete
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from lightning_neurons.pruning.surgery.surgery import cut

PUBLISHED = {0.5: 88.40, 0.6: 85.17, 0.7: 71.26, 0.8: 66.76}
"""Kim et al. (NeurIPS 2020): LeNet-300-100 on Fashion-MNIST after plain removal, by the share removed."""


def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """In percent."""
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in pictures.split(500)])
    return 100 * float((found == labels).float().mean())


def published_rule(data: Path) -> None:
    """Remove the neurons with the smallest l1 norm of weight row and bias, and nothing else."""
    import lnn_data
    import small_models

    pictures, labels = lnn_data.load_fashion_mnist("test")
    x, y = lnn_data.to_tensor(pictures, 0.5, 0.5), torch.from_numpy(labels)
    for share, published in PUBLISHED.items():
        net = small_models.load(small_models.LeNet300(), str(data / "lenet300_fashion.safetensors"))
        plan = {}
        for name, layer in (("ip1", net.ip1), ("ip2", net.ip2)):
            norm = torch.cat([layer.weight, layer.bias[:, None]], 1).abs().sum(1)
            plan[name] = norm.argsort()[: len(norm) - round(len(norm) * (1 - share))].tolist()
        prune(net, x[:2], plan)
        print(f"LeNet-300-100, {share:.0%} removed: {accuracy(net, x, y):.2f} %, published {published:.2f} %")


def by_hand(model: nn.Module, inputs: Tensor, plan: PruningPlan) -> nn.Module:
    """The same cut with Torch-Pruning alone: one group after the other, each begun at a layer of its own."""
    model = copy.deepcopy(model)
    modules, done = dict(model.named_modules()), set()
    graph = torch_pruning.DependencyGraph().build_dependency(model, (inputs,))
    for layer, neurons in plan.neurons.items():
        if layer in done:
            continue
        module = modules[layer]
        group = graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, list(neurons))
        made = [i.dep.target.module for i in group if graph.is_out_channel_pruning_fn(i.dep.handler)]
        done |= {name for name, m in modules.items() if any(m is other for other in made)}
        group.prune()
    return model.eval()


def equal_cuts(nets: Mapping[str, tuple[Callable[[], nn.Module], Tensor]]) -> None:
    """With the same plan, this package and Torch-Pruning by hand must give the same logits."""
    for name, (make, x) in nets.items():
        ours = make()
        report = prune(ours, x[:2], PruningBudget("weight_l2", target_macs=0.6, scope="layer"))
        theirs = by_hand(make(), x[:2], report.plan)
        with torch.no_grad():
            a, b = ours.eval()(x), theirs(x)
        error = float((a - b).abs().max() / b.abs().max())
        cost = report.cost
        print(f"{name}: {cost.macs_after / cost.macs:.3f} of the MACs, logits differ by {error:.1e} of the largest")


def time_of_a_cut(nets: Mapping[str, tuple[Callable[[], nn.Module], Tensor]], repeats: int = 5) -> None:
    """Seconds for finding and trying groups, for trying the plan, for the cut, and for wrapping it in DDP."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    for name, (make, x) in nets.items():
        seconds: list[list[float]] = []
        for _ in range(repeats):
            model = make()
            optimizer = torch.optim.AdamW(model.parameters())
            model(x[:2]).sum().backward()
            optimizer.step()
            times = [time.perf_counter()]
            structure = discover(model, Example(x[:2]))
            times.append(time.perf_counter())
            half = {root: list(range(group.size // 2)) for root, group in structure.offered.items()}
            tried_cut = complete(structure, PruningPlan.from_indices(structure.neurons(half)))
            times.append(time.perf_counter())
            cut(model, tried_cut.tensor_cuts, optimizers=[optimizer])
            times.append(time.perf_counter())
            torch.nn.parallel.DistributedDataParallel(model)
            times.append(time.perf_counter())
            seconds.append([b - a for a, b in pairwise(times)])
        found, tried, made, wrapped = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(
            f"{name}: structure {found:.2f} s, trial of the plan {tried:.2f} s, cut with AdamW state {made:.3f} s, "
            f"wrapping in DDP again {wrapped:.3f} s"
        )


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(arguments.pictures, 3, 32, 32)
    nets: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {"ResNet-20, random": (_random_net, x)}
    if arguments.data is not None:
        sys.path.insert(0, str(arguments.data))
        published_rule(arguments.data)
        nets = real_nets(arguments.data, arguments.pictures)
    equal_cuts(nets)
    time_of_a_cut(nets, arguments.repeats)


def _random_net() -> nn.Module:
    torch.manual_seed(1)
    return ResNet20().eval()


def real_nets(data: Path, count: int) -> dict[str, tuple[Callable[[], nn.Module], Tensor]]:
    """Trained networks, each with pictures that it was made for."""
    import lnn_data
    from cifar_resnet import cifar_resnet
    from mobilenet_v3 import mobilenet_v3

    small = lnn_data.to_tensor(lnn_data.load_cifar10("test", count)[0])
    large = lnn_data.to_tensor(lnn_data.load_imagenet_sample(min(count, 50))[0], lnn_data.TF_MEAN, lnn_data.TF_STD)
    weights = str(data / "mobilenet_v3_small.safetensors")
    return {
        "ResNet-20": (lambda: cifar_resnet(20, str(data / "cifar_resnet20.safetensors")), small),
        "ResNet-56": (lambda: cifar_resnet(56, str(data / "cifar_resnet56.safetensors")), small),
        "MobileNetV3-Small": (lambda: mobilenet_v3("small", weights=weights), large),
    }


if __name__ == "__main__":
    main()
