"""What a validation step runs besides the network itself: transforms of ``torch.func``, copies, other weights."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_mode
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, func, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neurons import ActivationStatisticsCallback, NeuronAblationCallback, NeuronSensitivityCallback
from tests.callbacks.modules import Altered, trainer_of

Batch = list[Tensor]


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (24,), generator=generator)
    return DataLoader(TensorDataset(torch.randn(24, 5, generator=generator), labels), batch_size=8)


def weights(net: nn.Module, shift: float = 0.0) -> dict[str, Tensor]:
    return {name: parameter.detach() + shift for name, parameter in net.named_parameters()}


def jacobian(net: nn.Module, batch: Batch) -> Tensor:
    return func.jacrev(lambda x: net(x).sum(0))(batch[0]).square().mean()


def forward_jacobian(net: nn.Module, batch: Batch) -> Tensor:
    return func.jacfwd(lambda x: net(x).sum(0))(batch[0]).square().mean()


def mapped(net: nn.Module, batch: Batch) -> Tensor:
    return func.vmap(net)(batch[0] + 30).square().mean()


def gradients_by_sample(net: nn.Module, batch: Batch) -> Tensor:
    def loss(given: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(func.functional_call(net, given, (x[None],)), label[None])

    found = func.vmap(func.grad(loss), in_dims=(None, 0, 0))(weights(net), *batch)
    return sum(gradient.square().sum() for gradient in found.values())


def linearized(net: nn.Module, batch: Batch) -> Tensor:
    _, map_tangent = func.linearize(net, batch[0])
    return map_tangent(batch[0]).mean()


def dual(net: nn.Module, batch: Batch) -> Tensor:
    with forward_mode.dual_level():
        out = net(forward_mode.make_dual(batch[0] + 30, torch.ones_like(batch[0])))
        return forward_mode.unpack_dual(out).tangent.mean()


def traced(net: nn.Module, batch: Batch) -> Tensor:
    return torch.jit.trace(net, batch[0])(batch[0]).mean()


def scripted(net: nn.Module, batch: Batch) -> Tensor:
    return torch.jit.script(net)(batch[0]).mean()


def exported(net: nn.Module, batch: Batch) -> Tensor:
    return torch.export.export(net, (batch[0],)).module()(batch[0]).mean()


def nested(net: nn.Module, batch: Batch) -> Tensor:
    rows = torch.nested.nested_tensor([batch[0][:3], batch[0][3:]], layout=torch.jagged)
    return net(rows).values().mean()


def sparse(net: nn.Module, batch: Batch) -> Tensor:
    return torch.sparse.mm(batch[0].to_sparse(), net[0].weight.t()).mean()


def without_data(net: nn.Module, batch: Batch) -> Tensor:
    return copy.deepcopy(net).to("meta")(batch[0].to("meta")).shape[0] * batch[0].mean()


def copied(net: nn.Module, batch: Batch) -> Tensor:
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].bias.add_(60)
    return other(batch[0]).mean()


def averaged(net: nn.Module, batch: Batch) -> Tensor:
    average = torch.optim.swa_utils.AveragedModel(net)
    assert not [m for m in average.modules() if m._forward_hooks or m._forward_pre_hooks]
    with torch.no_grad():
        average.module[0].bias.add_(60)
    return average(batch[0]).mean()


def shallow(net: nn.Module, batch: Batch) -> Tensor:
    other = copy.copy(net[0])
    other._parameters = dict(net[0]._parameters, bias=nn.Parameter(net[0].bias.detach() + 60))
    return other(batch[0]).mean()


def other_weights(net: nn.Module, batch: Batch) -> Tensor:
    return func.functional_call(net, weights(net, 60.0), (batch[0],)).mean()


def ensemble(net: nn.Module, batch: Batch) -> Tensor:
    stacked, buffers = func.stack_module_state([copy.deepcopy(net) for _ in range(2)])
    skeleton = copy.deepcopy(net).to("meta")
    run = func.vmap(lambda p, b: func.functional_call(skeleton, (p, b), (batch[0],)))
    return run(stacked, buffers).mean()


def saved(net: nn.Module, batch: Batch) -> Tensor:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(batch[0]).mean()


OTHER_RUNS = [
    jacobian, forward_jacobian, mapped, gradients_by_sample, linearized, dual, traced, scripted, exported, nested,
    sparse, without_data, copied, averaged, shallow, other_weights, ensemble, saved,
]  # fmt: skip


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        net[0].bias[:2] = -50  # dead, but not in what else is run
    return net


def fitted(other: Callable[[nn.Module, Batch], Tensor] | None, callbacks: list[Any]) -> dict[str, float]:
    def step(module: Any, batch: Batch, batch_idx: int) -> Tensor:
        if other is not None:
            module.log("other", other(module.net, batch))
        loss = F.cross_entropy(module.net(batch[0]), batch[1])
        module.log("val_loss", loss)
        return loss

    module = Altered(step)
    module.net, module.lr = small_net(), 0.0
    trainer = trainer_of(callbacks, inference_mode=False)
    trainer.fit(module, data(), data())
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name != "train_loss"}


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.jit
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of vmap
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),  # of linearize
]


@pytest.mark.parametrize("other", OTHER_RUNS)
def test_only_the_plain_runs_of_the_network_itself_are_measured(other):
    observer = ActivationStatisticsCallback(max_figures=0)
    assert fitted(other, [observer]) == fitted(other, [])
    net = small_net()
    with torch.no_grad():
        values = torch.cat([torch.relu(net[0](x)) for x, _ in data()])
    torch.testing.assert_close(observer.report.scores["mean"]["net.0"].float(), values.mean(0))
    assert observer.report.dead("net.0").tolist() == [not value.any() for value in values.T]


@pytest.mark.parametrize("other", [jacobian, gradients_by_sample, linearized, copied, other_weights, saved])
@pytest.mark.parametrize("kind", [NeuronSensitivityCallback, NeuronAblationCallback])
def test_sensitivity_and_ablation_are_those_of_the_returned_loss(other, kind):
    found = []
    for run in (None, other):
        callback = kind()
        fitted(run, [callback])
        is_ablation = isinstance(callback, NeuronAblationCallback)
        found.append(callback.ablation.delta_loss if is_ablation else callback.report.scores["fisher"])
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-7)


def test_a_copy_of_a_layer_with_hooks_keeps_those_and_one_that_does_nothing():
    heard: list[int] = []
    copies: list[nn.Module] = []

    def step(module: Any, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == 0 and module.current_epoch == 0:
            copies.append(copy.deepcopy(module.net))
        copies[0](batch[0] + 60)
        return F.cross_entropy(module.net(batch[0]), batch[1])

    module, observer = Altered(step), ActivationStatisticsCallback(max_figures=0)
    module.net, module.lr = small_net(), 0.0
    module.net[0].register_forward_hook(lambda *_: heard.append(1))
    trainer_of([observer], num_sanity_val_steps=0).fit(module, data(), data())
    assert observer.report.dead("net.0").tolist() == [True, True, False, False, False, False]
    modules = {hook.__module__ for hook in copies[0][0]._forward_hooks.values()}
    assert "lightning_neurons.hooks.function_mode" not in modules
    calls = len(heard)
    copies[0](torch.zeros(1, 5))
    assert len(heard) == calls + 1
    assert len(module.net[0]._forward_hooks) == 1
