"""Layer types that ``register_prunable`` makes known are cut, counted, scored and loaded as any other."""

import copy

import torch
from torch import Tensor, nn

from lightning_neurons import conform, describe_structure, measure, perturb, prune
from lightning_neurons.hooks.weights import incoming_weight, neuron_weights, outgoing_weight
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from tests.models import cross_entropy, seeded
from tests.pruning.registered import Kernels, OfOneself, Scaled
from tests.pruning.test_equivalence import outputs
from tests.tables import for_each

GROUPS = {
    "conv": {"conv": 6, "norm": 6},
    "first": {"first": 8},
    "square": {"square": 8, "aside": 8},
    "last": {"last": 5},
}
GONE = {"conv": [1, 4], "first": [0, 3, 7], "square": [2, 3], "last": [4]}
X = torch.randn(6, 3, 7, 7, generator=torch.Generator().manual_seed(1)).double()


def net() -> OfOneself:
    return seeded(OfOneself, double=True)


def places(root: str) -> dict[str, list[int]]:
    return dict.fromkeys(GROUPS[root], GONE[root])


def test_their_groups_are_those_that_one_counts_by_hand():
    structure = discover(net(), Example(X))
    assert structure.coupling.unseen == {}
    assert {root: group.size for root, group in structure.offered.items()} == {
        root: next(iter(layers.values())) for root, layers in GROUPS.items()
    }
    assert structure.refused == {"head": "its neurons are the model's output"}
    assert structure.coupling.reads["square"] == ("first",)


@for_each("roots", [[root] for root in GROUPS] + [list(GROUPS)])
def test_removing_their_neurons_is_silencing_them(roots):
    model = net()
    expected = outputs(model, X, [places(root) for root in roots])
    assert not torch.allclose(expected, outputs(model, X)), "else nothing would be shown"
    report = prune(model, X, {root: GONE[root] for root in roots})
    torch.testing.assert_close(outputs(model, X), expected, rtol=1e-8, atol=1e-12)
    for root in roots:
        for name, size in GROUPS[root].items():
            if name != "norm":
                assert report.widths[name] == size - len(GONE[root])


def test_attributes_tensors_and_macs_follow():
    model = net()
    report = prune(model, X, GONE)
    first, square, last, head = model.first, model.square, model.last, model.head
    assert (first.inputs, first.units, square.inputs, square.units) == (4, 5, 5, 6)
    assert (last.in_features, last.out_features, head.inputs, head.units, model.norm.width) == (6, 4, 4, 2, 4)
    assert (first.weight.shape, first.scale.shape, model.norm.centre.shape) == ((4, 5), (5,), (4,))
    by_hand = 25 * 4 * 27 + 4 * 5 + 5 * 6 + 4 * 6 + 6 * 4 + 4 * 2
    assert report.cost.macs_after == by_hand
    assert report.cost.parameters_after == sum(p.numel() for p in model.parameters())


def test_a_model_that_is_whole_takes_the_widths_of_one_that_was_cut_and_goes_back():
    whole, narrow, target = net(), net(), seeded(OfOneself, seed=3, double=True)
    prune(narrow, X, GONE)
    for source in (narrow, whole):
        conform(target, source.state_dict())
        target.load_state_dict(source.state_dict())
        assert torch.equal(target(X), source(X))
        assert (target.first.units, target.norm.width) == (source.first.units, source.norm.width)


def test_an_optimizer_goes_on_with_what_stays_of_its_state():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).square().sum().backward()
    optimizer.step()
    momentum = optimizer.state[model.first.weight]["momentum_buffer"].clone()
    prune(model, X, {"conv": [1, 4], "first": [0, 3, 7]}, optimizer=optimizer)
    stays = momentum[[0, 2, 3, 5]][:, [1, 2, 4, 5, 6]]
    assert torch.equal(optimizer.state[model.first.weight]["momentum_buffer"], stays)
    model(X).square().sum().backward()
    optimizer.step()


def test_weights_are_those_of_the_neuron_also_where_a_square_would_hide_it():
    square = seeded(lambda: Scaled(4, 4))
    for neuron in range(4):
        assert torch.equal(incoming_weight(square, 4)[neuron], square.weight[:, neuron])
        assert torch.equal(neuron_weights(square)[neuron], square.weight[:, neuron])
        assert torch.equal(outgoing_weight(square)[neuron], square.weight[neuron])
    assert outgoing_weight(seeded(lambda: Scaled(8, 4)), spread=2).shape == (4, 8)


def test_they_are_measured_by_the_weights_of_each_neuron():
    model = net()
    lengths = model.square.weight.norm(dim=0)
    report = measure(model, [(X, torch.zeros(6).long())], loss_fn=cross_entropy, criteria=["weight_l2"])
    torch.testing.assert_close(report.scores["weight_l2"]["square"].double(), lengths.detach(), rtol=1e-6, atol=0)


@for_each("compensation", ["mean", "least_squares", "patch_least_squares"])
def test_a_reader_of_which_nobody_knows_that_it_is_linear_is_left_as_it_is_and_named(compensation):
    plain, model, batches = net(), net(), [X, X + 1]
    prune(plain, X, {"first": [0, 3, 7], "conv": [1]})
    report = prune(model, X, {"first": [0, 3, 7], "conv": [1]}, batches, compensation=compensation)
    for name in ("first", "square"):
        said = [note for note in report.notes if note.startswith(f"{name} is not compensated: ")]
        assert said == [f"{name} is not compensated: it is not known whether Scaled is linear"]
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert not torch.equal(model.aside.bias, plain.aside.bias), "what is linear is made up for"


def read_by_a_linear_layer() -> OfOneself:
    """The group of ``square`` is; all others are read by registered types."""
    model = net()
    model.last = nn.Linear(8, 5).double()
    return model


def test_by_reconstruction_only_what_linear_layers_read_is_cut():
    report = prune(read_by_a_linear_layer(), X, {"criterion": "reconstruction", "amount": 0.3}, [X, X + 1])
    assert set(report.plan.neurons) == {"square", "aside"}
    assert "first is not cut: it is not known what square read" in report.notes


def test_without_loss_only_what_linear_layers_read_goes_and_the_rest_is_named():
    model = read_by_a_linear_layer()
    with torch.no_grad():
        for dead in (model.first, model.square):
            dead.weight[:, 2] = 0
        model.aside.weight[2], model.aside.bias[2] = 0, 0
    expected = model(X)
    report = prune(model, X, None, [X], lossless=True)
    assert set(report.plan.neurons) == {"square", "aside"}
    assert 2 in report.plan.neurons["square"]
    torch.testing.assert_close(model(X), expected, rtol=1e-8, atol=1e-12)
    assert "first is not cut: it is not known what square read" in report.notes


class Forces(nn.Module):
    """Differentiates twice through such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(Scaled(4, 6), nn.Tanh(), Scaled(6, 1))
        self.other, self.head = Scaled(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
            (slope,) = torch.autograd.grad(force.square().sum(), x, create_graph=True)
        return slope, self.head(torch.relu(self.other(x)))


def test_a_forward_that_differentiates_itself_is_traced():
    model, x = seeded(Forces, double=True), torch.randn(5, 4).double()
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.head.weight[:, [1, 4]] = 0
    assert "a function reads them" in describe_structure(model, x)["groups"]["energy.0"]["why_not"]
    prune(model, x, {"other": [1, 4]})
    for ours, theirs in zip(model(x), expected(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


class Broadcast(Scaled):
    """The same by products and a sum, through which no graph could follow a neuron."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-1) * self.weight).sum(-2) * self.scale


def test_what_a_type_does_inside_does_not_matter():
    model, x = seeded(lambda: nn.Sequential(Broadcast(4, 6), nn.ReLU(), Broadcast(6, 2)), double=True), X[0, 0, :, :4]
    expected = outputs(model, x, [{"0": [1, 4]}])
    assert prune(model, x, {"0": [1, 4]}).widths == {"0": 4, "2": 2}
    torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-12)


def test_weights_may_have_any_name_and_shape():
    model = seeded(Kernels, double=True)
    kernel, x = model.first.kernel.detach().clone(), X[:2]
    batches = [(x, torch.zeros(2).long())]
    lengths = torch.stack([kernel[..., neuron].norm() for neuron in range(6)])
    report = measure(model, batches, loss_fn=cross_entropy, criteria=["weight_l2"])
    torch.testing.assert_close(report.scores["weight_l2"]["first"].double(), lengths, rtol=1e-6, atol=0)
    assert torch.equal(outgoing_weight(model.last)[2], model.last.kernel[2].flatten())
    assert describe_structure(model, x)["blocks"]["first"]["layers"]["first"]["macs"] == 49 * 27 * 6
    expected = outputs(model, x, [{"first": [1, 4]}])
    assert prune(model, x, {"first": [1, 4]}).cost.macs_after == 49 * (27 * 4 + 36 * 2)
    torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-12)
    perturbed = perturb(model, batches, cross_entropy, level="neuron")
    assert {row.name for row in perturbed.rows} >= {"first.kernel[3]", "last.kernel[1]"}


class Again(nn.Module):
    """A type that runs twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(4, 6), Scaled(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.twice(torch.relu(self.twice(x)))))


def test_a_type_that_runs_twice_is_one_group_with_what_goes_into_it():
    model, x = seeded(Again, double=True), torch.randn(5, 4).double()
    assert describe_structure(model, x)["groups"]["first"]["layers"] == ["first", "twice"]
    expected = outputs(model, x, [{"first": [1, 4], "twice": [1, 4]}])
    prune(model, x, {"twice": [1, 4]})
    assert (model.twice.inputs, model.twice.units) == (4, 4)
    torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-12)
