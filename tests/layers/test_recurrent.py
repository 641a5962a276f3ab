"""Hidden units of recurrent layers: cut beside the same net with their weights at zero, saved, loaded, ranked."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import PruningError, conform, load_pruned, prune
from lightning_neurons.layers.recurrent import incoming_weights
from tests.models import seeded
from tests.tables import for_each

HIDDEN, GONE = 8, [1, 4, 6]


class Sequences(nn.Module):
    """Tokens, a layer in front, and all outputs and the last states of a recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1, both: bool = False, **options) -> None:
        super().__init__()
        self.embed, self.pre = nn.Embedding(11, 6), nn.Linear(6, 5)
        self.rnn = kind(5, HIDDEN, num_layers=layers, batch_first=True, bidirectional=both, **options)
        self.mean, self.last, self.head = nn.Linear(HIDDEN * (1 + both), 7), nn.Linear(HIDDEN, 7), nn.Linear(7, 3)

    def forward(self, codes: Tensor) -> Tensor:
        outputs, states = self.rnn(F.relu(self.pre(self.embed(codes))))
        states = states[0] if isinstance(states, tuple) else states
        return self.head(F.relu(self.mean(outputs.mean(1)) + self.last(states[-1])))


def codes() -> Tensor:
    return torch.randint(0, 11, (3, 5))


def silenced(net: Sequences) -> Sequences:
    """Without the weights of the units' gates a unit is zero at all times."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for name, weight in net.rnn.named_parameters():
            weight[[gate * HIDDEN + i for gate in range(len(weight) // HIDDEN) for i in GONE]] = 0
            if name.startswith("weight_hh"):
                weight[:, GONE] = 0
    return net


KINDS = {
    "LSTM": (nn.LSTM, 1, False),
    "GRU, two layers, both directions": (nn.GRU, 2, True),
    "RNN, two layers": (nn.RNN, 2, False),
    "LSTM, two layers, both directions": (nn.LSTM, 2, True),
    "GRU without biases": (lambda *args, **kwargs: nn.GRU(*args, bias=False, **kwargs), 1, True),
}


@for_each("name", KINDS)
def test_hidden_units_go_from_all_gates_layers_and_directions(name):
    kind, layers, both = KINDS[name]
    net, x = seeded(Sequences, kind, layers, both, double=True).eval(), codes()
    right = silenced(net)
    report = prune(net, x, {"rnn": GONE}, compensation="none")
    assert report.plan.neurons == {"rnn": (*GONE, *([HIDDEN + i for i in GONE] if both else []))}
    assert torch.allclose(net(x), right(x), rtol=1e-10, atol=1e-12)
    assert (net.rnn.hidden_size, net.rnn.input_size) == (HIDDEN - 3, 5)
    assert net.last.in_features == HIDDEN - 3
    net(x).sum().backward()
    loaded = seeded(Sequences, kind, layers, both, double=True).eval()
    conform(loaded, net.state_dict())
    loaded.load_state_dict(net.state_dict())
    assert torch.equal(loaded(x), net(x))


@for_each("name", KINDS)
def test_a_budget_cuts_what_they_read_as_well_as_their_units(name):
    kind, layers, both = KINDS[name]
    net, x = seeded(Sequences, kind, layers, both, double=True).eval(), codes()
    report = prune(net, x, {"criterion": "weight_l2", "target_macs": 0.5}, compensation="none")
    assert net.rnn.hidden_size < HIDDEN
    assert net.rnn.input_size == net.pre.out_features < 5
    assert report.plan.cost.macs_after <= 0.5 * report.plan.cost.macs
    assert net(x).isfinite().all()


@for_each("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_units_go_where_only_the_last_states_are_read(kind):
    class Last(Sequences):
        def forward(self, codes: Tensor) -> Tensor:
            states = self.rnn(F.relu(self.pre(self.embed(codes))))[1]
            states = states[0] if isinstance(states, tuple) else states
            return self.head(F.relu(self.last(states[-1])))

    net, x = seeded(Last, kind, double=True).eval(), codes()
    right = silenced(net)
    prune(net, x, {"rnn": GONE}, compensation="none")
    assert torch.allclose(net(x), right(x), rtol=1e-10, atol=1e-12)
    assert net.last.in_features == HIDDEN - 3


def test_loading_a_narrower_layer_says_nothing(tmp_path, recwarn):
    net, x = seeded(Sequences, nn.LSTM, 1, True).eval(), codes()
    prune(net, x, {"rnn": GONE, "pre": [1]}, compensation="none")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    loaded = load_pruned(lambda: Sequences(nn.LSTM, 1, True), tmp_path / "net.pt").eval()
    assert torch.equal(loaded(x), net(x))
    assert [str(w.message) for w in recwarn] == []


def test_units_are_judged_by_the_rows_of_all_their_gates():
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    weights = incoming_weights(lstm)
    for unit in range(8):
        suffix, i = ("", unit) if unit < 4 else ("_reverse", unit - 4)
        both = [getattr(lstm, f"weight_{side}_l1{suffix}") for side in ("ih", "hh")]
        slow = torch.cat([torch.cat([weight[4 * gate + i] for weight in both]) for gate in range(4)])
        assert torch.equal(weights[unit], slow)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_an_lstm_that_projects_its_units_is_refused():
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pre, self.rnn, self.head = nn.Linear(4, 5), nn.LSTM(5, 8, proj_size=3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(F.relu(self.pre(x)))[0])

    with pytest.raises(PruningError, match=r"pre cannot be cut: rnn: LSTM projects its hidden units \(proj_size\)"):
        prune(seeded(Projected), torch.randn(2, 3, 4), {"pre": [0]})


def test_a_state_dict_that_contradicts_itself_leaves_the_layer_as_it_is():
    state = nn.GRU(3, 5).state_dict()
    state["weight_hh_l0"] = torch.zeros(12, 4)
    gru = nn.GRU(3, 6)
    conform(gru, state)
    assert gru.weight_hh_l0.shape == (18, 6)
