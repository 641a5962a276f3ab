"""Logits may stand in an object, as hub models return them: the answers are those of the bare logits."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import ArgumentError, MeasurementError, class_study, logit, measure, predicted_logit, prune
from lightning_neurons.hooks.output_layers import logits_in
from tests.models import seeded
from tests.tables import for_each


@dataclass
class Output:
    logits: Tensor
    inputs: Tensor


class Record(OrderedDict):
    """A dict with attributes."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


FORMS = {
    "dataclass": Output,
    "record": lambda logits, inputs: Record(loss=None, logits=logits, inputs=inputs),
    "only tensor": lambda logits, inputs: {"scores": logits, "ids": logits.argmax(1)},
}


class Net(nn.Module):
    def __init__(self, form=None) -> None:
        super().__init__()
        self.a, self.b, self.out, self.form = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3), form

    def forward(self, x: Tensor):
        logits = self.out(torch.relu(self.b(torch.relu(self.a(x)))))
        return logits if self.form is None else self.form(logits, x)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(12, 5, generator=generator), torch.arange(12) % 3) for _ in range(2)]


@for_each("form", FORMS.values())
def test_prune_by_gradients_takes_the_same_neurons_as_with_bare_logits(form):
    for criterion in ("fisher", "second_order_ggn"):
        plans = [
            prune(seeded(Net, f), torch.zeros(2, 5), {"criterion": criterion, "amount": 0.5}, batches()).plan.neurons
            for f in (None, form)
        ]
        assert plans[0] == plans[1] != {}


@for_each("loss_fn", [predicted_logit, logit(1)])
def test_the_loss_functions_read_the_logits_in_an_object(loss_fn):
    scores = [
        measure(seeded(Net, form), batches(), loss_fn=loss_fn, criteria=["taylor"]).scores["taylor"]
        for form in (None, *FORMS.values())
    ]
    for found in scores[1:]:
        assert all(torch.equal(found[name], scores[0][name]) for name in ("a", "b"))


def test_a_class_study_reads_the_logits_in_an_object():
    bare, wrapped = (class_study(seeded(Net, form), batches(), share=0.5) for form in (None, FORMS["record"]))
    assert bare.accuracies == wrapped.accuracies


def test_an_output_of_several_tensors_without_logits_is_an_error_that_names_what_helps():
    two = Net(lambda logits, inputs: (logits, inputs))
    assert logits_in((torch.zeros(2, 3), torch.zeros(2, 5))) is None
    with pytest.raises(ArgumentError, match=r"loss_fn.*tuple shows no logits"):
        prune(two, torch.zeros(2, 5), {"criterion": "fisher", "amount": 0.5}, batches())
    for ask in (lambda: measure(two, batches(), loss_fn=predicted_logit), lambda: class_study(two, batches())):
        with pytest.raises(MeasurementError, match="the model returned tuple"):
            ask()
