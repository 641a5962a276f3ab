"""A pruned model is a plain model: it is copied, stored, traced and exported as any other."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import onnx
import onnx.reference
import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import PruningError, load_pruned, prune, pruned_widths
from tests.models import pictures, seeded
from tests.pruning.nets import NETS, MobileNet, net_and_inputs
from tests.tables import for_each


class Exported(MobileNet):
    """Convolutions, depthwise ones among them, with norm layers, and linear layers."""

    def __init__(self) -> None:
        super().__init__(squeeze=0, act=nn.ReLU6)


def inputs(samples: int = 3) -> Tensor:
    return pictures(samples)[0]


@pytest.fixture
def pruned() -> Exported:
    model = seeded(Exported)
    report = prune(model, inputs(), 0.4)
    assert report.cost.parameters_after < 0.7 * report.cost.parameters
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert {m.groups for m in depthwise} & {2, 3, 5, 6, 7, 8}, "depthwise convolutions are narrower as well"
    return model.eval()


def outputs(model: Callable[[Tensor], Tensor], given: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(inputs() if given is None else given)


def test_torch_export_gives_the_same_program(pruned):
    program = torch.export.export(pruned, (inputs(),))
    assert torch.equal(outputs(program.module()), outputs(pruned))
    shapes = {name: tensor.shape for name, tensor in program.state_dict.items()}
    assert shapes == {name: tensor.shape for name, tensor in pruned.state_dict().items()}


def test_torch_export_is_stored_and_takes_batches_of_any_size(pruned):
    samples = torch.export.Dim("samples", min=2, max=16)
    program = torch.export.export(pruned, (inputs(),), dynamic_shapes=({0: samples},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (2, 5):
        torch.testing.assert_close(outputs(loaded, inputs(count)), outputs(pruned, inputs(count)))


def test_onnx_gives_the_same_outputs(pruned, tmp_path):
    program = torch.onnx.export(pruned, (inputs(),), dynamo=True, verbose=False)
    program.save(tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model)
    shapes = {tuple(one.dims) for one in model.graph.initializer}
    assert {tuple(m.weight.shape) for m in pruned.modules() if isinstance(m, nn.Conv2d)} <= shapes
    evaluator = onnx.reference.ReferenceEvaluator(model)
    (found,) = evaluator.run(None, {evaluator.input_names[0]: inputs().numpy()})
    torch.testing.assert_close(torch.from_numpy(found), outputs(pruned), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")  # in general, by later torch
def test_torch_script_gives_the_same_outputs(pruned, tmp_path):
    torch.jit.save(torch.jit.trace(pruned, inputs()), tmp_path / "net.pt")
    assert torch.equal(outputs(torch.jit.load(tmp_path / "net.pt"), inputs(5)), outputs(pruned, inputs(5)))


def test_torch_compile_captures_the_whole_graph_and_gives_the_same_outputs(pruned):
    compiled = torch.compile(pruned, backend="eager", fullgraph=True)
    assert torch.equal(outputs(compiled), outputs(pruned))


def stored(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), stored])
def test_a_copy_has_the_same_sizes_and_outputs_and_a_life_of_its_own(pruned, way):
    twin = way(pruned)
    assert_same(twin, pruned, inputs())
    before = outputs(pruned)
    optimizer = torch.optim.SGD(twin.train().parameters(), 0.1)
    twin(inputs()).square().sum().backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in twin.parameters())
    assert all(p.grad is None for p in pruned.parameters())
    assert torch.equal(outputs(pruned), before)


def assert_same(ours: nn.Module, theirs: nn.Module, given: Tensor) -> None:
    assert repr(ours) == repr(theirs), "sizes are also what attributes say"
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert torch.equal(outputs(ours.eval(), given), outputs(theirs.eval(), given))


def through_a_file(model: nn.Module, path: Any, **kwargs: Any) -> nn.Module:
    torch.save(model.state_dict(), path)
    loaded = load_pruned(type(model), path, **kwargs)
    assert type(loaded) is type(model)
    return loaded


def test_a_state_dict_is_loaded_into_a_whole_model(pruned, tmp_path):
    assert_same(through_a_file(pruned, tmp_path / "net.pt"), pruned, inputs())
    with pytest.raises(RuntimeError, match="size mismatch"):
        Exported().load_state_dict(pruned.state_dict())


def conv(dimensions: int, inputs: int, outputs: int, groups: int = 1) -> nn.Module:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    return kind(inputs, outputs, 3, padding=1, groups=groups)


KINDS: dict[str, tuple[Callable[[int], list[nn.Module]], tuple[int, ...]]] = {
    "Conv1d": (lambda n: [conv(1, 3, n), nn.BatchNorm1d(n), nn.ReLU(), conv(1, n, 2)], (2, 3, 5)),
    "Conv2d": (lambda n: [conv(2, 3, n), nn.BatchNorm2d(n), nn.ReLU(), conv(2, n, 2)], (2, 3, 5, 5)),
    "Conv3d": (lambda n: [conv(3, 3, n), nn.BatchNorm3d(n), nn.ReLU(), conv(3, n, 2)], (2, 3, 4, 4, 4)),
    "ConvTranspose2d": (
        lambda n: [nn.ConvTranspose2d(3, n, 2, 2), nn.ReLU(), nn.ConvTranspose2d(n, n, 2, 2), nn.ReLU(), conv(2, n, 2)],
        (2, 3, 4, 4),
    ),
    "depthwise": (lambda n: [conv(2, 3, n), conv(2, n, n, groups=n), nn.BatchNorm2d(n), conv(2, n, 2)], (2, 3, 5, 5)),
    "Linear": (lambda n: [nn.Linear(4, n), nn.ReLU(), nn.Linear(n, n, bias=False), nn.Tanh(), nn.Linear(n, 2)], (3, 4)),
    "BatchNorm": (lambda n: [nn.Linear(4, n), nn.BatchNorm1d(n, affine=False), nn.ReLU(), nn.Linear(n, 2)], (3, 4)),
    "PReLU": (lambda n: [conv(2, 3, n), nn.PReLU(n), conv(2, n, n), nn.PReLU(), conv(2, n, 2)], (2, 3, 5, 5)),
    "LayerNorm": (lambda n: [nn.Linear(4, n), nn.LayerNorm(n), nn.GELU(), nn.Linear(n, 2)], (3, 4)),
    "InstanceNorm": (
        lambda n: [conv(2, 3, n), nn.InstanceNorm2d(n, affine=True, track_running_stats=True), conv(2, n, 2)],
        (2, 3, 5, 5),
    ),
}


class Layers(nn.Sequential):
    """Layers of a kind, as wide as is asked."""

    def __init__(self, kind: str, width: int = 8) -> None:
        super().__init__(*KINDS[kind][0](width))


def layers(kind: str, width: int = 8) -> tuple[Layers, Tensor]:
    """With norm layers that have seen something, and a batch."""
    model, given = Layers(kind, width), torch.randn(*KINDS[kind][1])
    model(given + 1)
    return model.eval(), given


@for_each("kind", [kind for kind in KINDS if kind != "LayerNorm"])
def test_every_kind_of_layer_is_loaded_as_it_was_pruned(tmp_path, kind):
    live, given = layers(kind)
    report = prune(live, given, 0.4)
    assert all(report.widths[name] < width for name, width in [*report.plan.widths.items()][:-1])
    assert_same(through_a_file(live, tmp_path / "net.pt", kind=kind), live, given)


@for_each("kind", KINDS)
@for_each("width", [1, 5, 8, 11])
def test_every_kind_of_layer_takes_the_width_in_a_file(tmp_path, kind, width):
    live, given = layers(kind, width)
    if width <= 8:
        assert_same(through_a_file(live, tmp_path / "net.pt", kind=kind), live, given)
        return
    with pytest.raises(PruningError, match=r"larger than in the model are 0\.weight"):  # no cut has made that
        through_a_file(live, tmp_path / "net.pt", kind=kind)
    loaded = Layers(kind)
    with pruned_widths():
        loaded.load_state_dict(live.state_dict())
    assert_same(loaded, live, given)


class Stored(nn.Module):
    """A network by its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = net_and_inputs(name)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@for_each("name", NETS)
def test_every_kind_of_network_is_loaded_as_it_was_pruned(tmp_path, name):
    live, given = Stored(name).eval(), net_and_inputs(name)[1]
    assert len(prune(live, given, 0.4).plan) > 1
    assert_same(through_a_file(live, tmp_path / "net.pt", name=name), live, given)


def test_an_embedding_and_learned_positions_are_loaded_as_they_were_pruned(tmp_path):
    live, given = Stored("tokens").eval(), net_and_inputs("tokens")[1]
    prune(live, given, {"net.fc2": [1, 4]})
    loaded = through_a_file(live, tmp_path / "net.pt", name="tokens")
    assert (loaded.net.embed.embedding_dim, loaded.net.embed.num_embeddings) == (4, 11)
    assert loaded.net.place.bias.shape == (5, 4)
    assert_same(loaded, live, given)
