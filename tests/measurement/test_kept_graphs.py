"""What a user's code keeps of a watched forward keeps nothing of the measurement alive."""

import gc
from unittest.mock import Mock

from torch import Tensor, nn

from lightning_neurons import measure
from lightning_neurons.hooks.capture import WatchGradients
from tests.models import ConvNet, cross_entropy, pictures, seeded


def test_a_graph_that_is_kept_lets_go_of_who_watched():
    keep = Mock()

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = cross_entropy(model, batch)
        keep(loss)
        return loss

    measure(seeded(ConvNet), [pictures()], loss_fn=loss_fn)
    assert any(call.args[0].grad_fn is not None for call in keep.call_args_list)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is WatchGradients]
