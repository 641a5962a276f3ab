"""``perturb`` on a trained network and real pictures. Collected only where the data are at hand."""

import torch

from lightning_neurons import perturb
from tests.ablation.perturbed import classic
from tests.test_real_models import cifar, cross_entropy, resnet, with_data


@with_data
def test_the_ranking_of_resnet20_is_that_of_the_classic_loop():
    net, batch = resnet(), cifar(32)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    report = perturb(net, [batch], cross_entropy)
    assert [(row.name, row.loss) for row in report.ranking()] == classic(net, batch, cross_entropy)
    assert len(report.rows) == 19 * 2 + 1
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
