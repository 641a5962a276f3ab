"""The loss without every neuron: replay against captum, in CPU seconds of one thread, and how far the two differ.

    python examples/benchmarks/ablation_speed.py [--data FOLDER] [--pictures 128] [--net resnet20]

Some neurons of each layer are measured (``--every``, ``--ours``) and the time is scaled up to all of them. Without a
folder of real pictures and weights (--data), random ones are used.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from nets import Vgg11, resnet20_and_pictures

from lightning_neurons import ablate, find_neurons

NETS = ("resnet20", "resnet20_projection", "mobilenet_v3_small", "vgg11")


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def net_and_pictures(name: str, pictures: int, data: Path | None) -> tuple[nn.Module, Tensor, Tensor]:
    """One of ``NETS`` in evaluation mode, with pictures and labels."""
    net, x, y = resnet20_and_pictures(pictures, data)
    torch.manual_seed(0)
    if name == "resnet20_projection" and data is not None:
        from cifar_resnet import cifar_resnet

        return cifar_resnet(20, projection=True).eval(), x, y
    if name == "mobilenet_v3_small" and data is not None:
        import lnn_data
        from mobilenet_v3 import mobilenet_v3

        images, labels = lnn_data.load_imagenet_sample(pictures)
        x = lnn_data.to_tensor(images, lnn_data.TF_MEAN, lnn_data.TF_STD)
        return (
            mobilenet_v3("small", weights=str(data / "mobilenet_v3_small.safetensors")).eval(),
            x,
            torch.tensor(labels),
        )
    return (Vgg11().eval() if name == "vgg11" else net), x, y


def final_module(model: nn.Module, layer: str, x: Tensor) -> nn.Module:
    """The module whose output is the layer's activation."""
    (found,) = [one for one in find_neurons(model, x[:2]) if one.name == layer]
    last = next((link.module for link in reversed(found.chain) if link.module), layer)
    return model.get_submodule(last)


def with_captum(model: nn.Module, module: nn.Module, x: Tensor, y: Tensor, neurons: list[int], width: int) -> Tensor:
    """The change of the loss without some channels, by ``LayerFeatureAblation`` (one group holds all the others)."""
    from captum.attr import LayerFeatureAblation

    shape: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, i, o: shape.append(o))
    base = loss(model, (x, y))
    handle.remove()
    groups = torch.zeros(width, dtype=torch.int64)
    groups[neurons] = torch.arange(1, len(neurons) + 1)
    mask = groups.view(1, -1, *[1] * (shape[0].ndim - 2)).expand(1, *shape[0].shape[1:])
    ablation = LayerFeatureAblation(lambda inputs: loss(model, (inputs, y)).reshape(1), module)
    found = ablation.attribute(x, layer_mask=mask, perturbations_per_eval=1)
    assert base.isfinite(), "the loss is a number"
    return torch.stack([-found[0].reshape(width, -1)[n].mean() for n in neurons])


def main() -> None:
    """Compare, layer by layer and in all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--net", choices=NETS, default="resnet20")
    parser.add_argument("--every", type=int, default=8, help="captum ablates one neuron in so many")
    parser.add_argument("--ours", type=int, default=1, help="so does replay")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, x, y = net_and_pictures(arguments.net, arguments.pictures, arguments.data)
    model.requires_grad_(False)
    layers = [layer for layer in find_neurons(model, x[:2]) if layer.calls == 1]
    neurons = {layer.name: list(range(0, layer.neurons, arguments.ours)) for layer in layers}
    total = sum(layer.neurons for layer in layers)
    spent, expected, reports, ours = 0.0, {}, {}, {}
    for name, exact in (("exact replay", True), ("replay with shortcut", False)):
        begin = time.process_time()
        reports[name] = ablate(model, [(x, y)], loss, neurons=neurons, exact=exact)
        ours[name] = (time.process_time() - begin) * total / sum(map(len, neurons.values()))
        print(f"{name:22s} {ours[name]:8.1f} CPU seconds (one neuron in {arguments.ours} measured)", flush=True)
    for layer in layers:
        sampled = list(range(0, layer.neurons, arguments.every))
        begin = time.process_time()
        with torch.no_grad():
            changes = with_captum(model, final_module(model, layer.name, x), x, y, sampled, layer.neurons)
        # Beside one forward per neuron: the unchanged loss twice, the shapes, and the group of all other neurons.
        spent += (time.process_time() - begin) / (len(sampled) + 4) * layer.neurons
        expected[layer.name] = sampled, changes
    total = sum(layer.neurons for layer in layers)
    print(
        f"captum, one forward for each of {total} neurons (one in {arguments.every} measured): {spent:.1f} CPU seconds"
    )
    for name, report in reports.items():
        both = [(report.delta_loss[n][rows], found) for n, (rows, found) in expected.items()]
        worst = max(float((mine - found).nan_to_num().abs().max()) for mine, found in both)
        print(f"{arguments.net}, {len(x)} pictures: {name} {spent / ours[name]:.1f} x less, differs by {worst:.1e}")


if __name__ == "__main__":
    main()
