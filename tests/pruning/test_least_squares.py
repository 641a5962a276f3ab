"""Least squares from sums alone, compared with numpy on the stacked values and with closed forms."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.compensate import compensation_named
from lightning_neurons.pruning.compensation.moments import Moments
from lightning_neurons.pruning.compensation.ridge import FEW, RIDGE, refine
from lightning_neurons.pruning.compensation.weight_shifts import Wiring
from lightning_neurons.pruning.surgery.surgery import TensorCut
from tests.criteria.streams import laws
from tests.models import seeded
from tests.tables import for_each


def error_of(moments, matrix, variance_y):
    """The mean square of ``y - M x - c`` with the best constant, by target."""
    s_xx, s_yx = moments.covariance_xx, moments.covariance_yx
    return variance_y.diagonal() - 2 * (matrix * s_yx).sum(1) + ((matrix @ s_xx) * matrix).sum(1)


def values(inputs: int = 6, count: int = 200, seed: int = 0) -> Tensor:
    """Correlated, with means and sizes of their own, ``(input, position)``."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return random(inputs, inputs) @ random(inputs, count) + 2 * random(inputs, 1)


def sums(x: Tensor, y: Tensor) -> Moments:
    found = Moments.empty(len(x), len(y))
    found.add(x, y)
    return found


def solved(x: Tensor, y: Tensor, *, centred: bool = True) -> Tensor:
    """By numpy."""
    columns = torch.cat([x, torch.ones_like(x[:1])]) if centred else x
    found = np.linalg.lstsq(columns.T.numpy(), y.T.numpy(), rcond=None)[0].T
    return torch.from_numpy(found)[:, : len(x)]


def mean_square(rest: Tensor) -> Tensor:
    """Of what is left with the best constant, by row."""
    return (rest - rest.mean(1, keepdim=True)).square().mean(1)


def covariance(z: Tensor) -> Tensor:
    return torch.cov(z, correction=0)


@for_each("centred", [True, False])
def test_without_a_ridge_it_is_the_solution_of_numpy(centred):
    z = values(9)
    x, y = z[:5], z[5:].square()
    found = refine(sums(x, y), torch.zeros(4, 5), ridge=0.0, centred=centred)
    torch.testing.assert_close(found.matrix, solved(x, y, centred=centred), rtol=1e-8, atol=1e-8)
    assert found.ridge == 0


@for_each("centred", [True, False])
@for_each("ridge", [1e-3, 1.0])
def test_a_ridge_is_rows_of_data_that_ask_for_no_change(ridge, centred):
    z, start = values(8), torch.randn(3, 5, dtype=torch.float64)
    x, y, count = z[:5], z[5:], z.shape[1]
    near = x - x.mean(1, keepdim=True) if centred else x
    weight = (ridge * near.square().mean() * count).sqrt()
    more = torch.eye(5, dtype=torch.float64) * weight
    target = y - y.mean(1, keepdim=True) if centred else y
    expected = solved(torch.cat([near, more], 1), torch.cat([target, start * weight], 1), centred=False)
    found = refine(sums(x, y), start, ridge=ridge, centred=centred).matrix
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_the_error_is_what_is_left_when_everything_is_added_up():
    z, matrix = values(8), torch.randn(3, 5, dtype=torch.float64)
    found = error_of(sums(z[:5], z[5:]), matrix, covariance(z[5:]))
    torch.testing.assert_close(found, mean_square(z[5:] - matrix @ z[:5]))


@for_each("gone", [(0,), (1, 4), (0, 2, 3, 5)])
def test_the_error_of_the_outputs_is_the_schur_complement_seen_through_the_weights(gone):
    z, weight = values(), torch.randn(4, 6, dtype=torch.float64)
    keep, gone = [i for i in range(6) if i not in gone], list(gone)
    start = torch.eye(6, dtype=torch.float64)[:, keep]
    matrix = refine(sums(z[keep], z), start, ridge=0.0).matrix
    s = covariance(z)
    schur = s[gone][:, gone] - s[gone][:, keep] @ torch.linalg.inv(s[keep][:, keep]) @ s[keep][:, gone]
    expected = torch.trace(weight[:, gone] @ schur @ weight[:, gone].T)
    torch.testing.assert_close(mean_square(weight @ (z - matrix @ z[keep])).sum(), expected)
    direct = error_of(sums(z[keep], weight @ z), weight @ matrix, covariance(weight @ z)).sum()
    torch.testing.assert_close(direct, expected)


@for_each("gone", range(6))
def test_one_neuron_costs_its_weights_over_the_inverse(gone):
    z, weight = values(seed=3), torch.randn(4, 6, dtype=torch.float64)
    keep = [i for i in range(6) if i != gone]
    matrix = refine(sums(z[keep], z), torch.eye(6)[:, keep], ridge=0.0).matrix
    expected = weight[:, gone].square().sum() / torch.linalg.inv(covariance(z))[gone, gone]
    torch.testing.assert_close(mean_square(weight @ (z - matrix @ z[keep])).sum(), expected)


@laws
@given(st.integers(0, 99), st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0, 100.0]), st.integers(2, 40), st.integers(1, 5))
def test_whatever_the_ridge_no_error_exceeds_that_of_the_mean(seed, ridge, count, kept):
    z = values(count=count, seed=seed)
    start = torch.eye(6, dtype=torch.float64)[:, :kept]
    moments = sums(z[:kept], z)
    found = error_of(moments, refine(moments, start, ridge=ridge).matrix, covariance(z))
    folded = mean_square(z - start @ z[:kept])
    assert bool((found <= folded + 1e-9 * covariance(z).diagonal()).all())
    assert float(found.min()) >= -1e-9 * float(covariance(z).diagonal().max())


def test_what_has_a_double_goes_without_a_loss():
    z, weight = values(), torch.randn(4, 8, dtype=torch.float64)
    z = torch.cat([z, z[:1], 0.5 * z[2:3] - z[4:5] + 3])
    matrix = refine(sums(z[:6], z), torch.eye(8)[:, :6], ridge=1e-12).matrix
    new = weight @ matrix
    expected = weight[:, :6].clone()
    expected[:, 0] += weight[:, 6]
    expected[:, 2] += 0.5 * weight[:, 7]
    expected[:, 4] -= weight[:, 7]
    torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-6)
    assert float(mean_square(weight @ z - new @ z[:6]).max()) < 1e-9


@laws
@given(st.lists(st.integers(1, 199), max_size=6, unique=True), st.integers(0, 9))
def test_what_comes_in_parts_gives_the_same_sums(ends, seed):
    z = values(seed=seed)
    streamed, stacked = Moments.empty(4, 6), sums(z[:4], z)
    ends = [0, *sorted(ends), 200]
    for begin, end in pairwise(ends):
        streamed.add(z[:4, begin:end], z[:, begin:end])
    for name in ("count", "mean_x", "mean_y", "covariance_xx", "covariance_yx"):
        torch.testing.assert_close(getattr(streamed, name), getattr(stacked, name))
    torch.testing.assert_close(stacked.covariance_xx, covariance(z)[:4, :4])


def test_the_sums_of_two_processes_are_those_of_one():
    z = values()
    ours, theirs = sums(z[:4, :70], z[:, :70]), sums(z[:4, 70:], z[:, 70:])
    other = iter([theirs.count, theirs.sum_x, theirs.sum_y, theirs.xx, theirs.yx])
    merged, whole, start = ours.reduced(lambda t: t + next(other)), sums(z[:4], z), torch.eye(6)[:, :4]
    assert int(merged.count) == 200
    torch.testing.assert_close(refine(merged, start).matrix, refine(whole, start).matrix)


def three_layers() -> nn.Sequential:
    return seeded(
        nn.Sequential, nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3, bias=False), double=True
    )


CUTS = [
    TensorCut("0", "makes", (1, 3)),
    TensorCut("2", "reads", (1, 3)),
    TensorCut("2", "makes", (0,)),
    TensorCut("4", "reads", (0,)),
]
WIRING = Wiring({"2": 1, "4": 1}, {})


@for_each("how", ["least_squares", "patch_least_squares", "mean"])
def test_two_processes_with_half_of_the_data_each_find_what_one_finds(how):
    net, x = three_layers(), torch.randn(90, 5, dtype=torch.float64)

    def found(batches, added):
        """With what the other process has put in, in turn; and what this one puts in."""
        own, other = [], iter(added)

        def reduce(tensor):
            own.append(tensor.clone())
            return tensor + next(other, 0)

        calibration = Calibration(batches, lambda model, batch: model(batch), lambda m, b: b.mean(), reduce)
        return compensation_named(how)(net, CUTS, calibration, WIRING), own

    alone, _ = found([x[:50], x[50:]], [])
    first, second = [], []
    for _ in range(5):  # what goes in depends on what came out before: twice for each of the two readers
        (a, first), (b, second) = found([x[:50]], second), found([x[50:]], first)
    assert set(alone.shifts) == set(a.shifts) == set(b.shifts)
    assert "2.bias" in alone.shifts
    for name, shift in alone.shifts.items():
        torch.testing.assert_close(a.shifts[name], shift, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(b.shifts[name], shift, rtol=1e-8, atol=1e-10)


def test_fewer_positions_than_inputs_raise_the_ridge_and_are_told():
    z = values(count=4)
    moments, start = sums(z[:5], z), torch.eye(6, dtype=torch.float64)[:, :5]
    few = refine(moments, start)
    assert few.ridge == FEW > RIDGE == refine(sums(values()[:5], values()), start).ridge
    torch.testing.assert_close(few.matrix, refine(moments, start, ridge=FEW).matrix)
    x = torch.randn(3, 5, dtype=torch.float64)
    calibration = Calibration([x], lambda model, batch: model(batch), lambda m, b: b.mean())
    notes = compensation_named("least_squares")(three_layers(), CUTS, calibration, WIRING).notes
    assert any("2 was solved with a larger ridge (0.1" in n and "3 positions for 5 inputs" in n for n in notes)


def test_singular_inputs_are_solved_with_as_much_of_a_ridge_as_it_takes():
    z = values()
    x = torch.stack([z[0], z[0], z[1], 2 * z[1], torch.full_like(z[0], 0.3)])
    moments, start = sums(x, z), torch.zeros(6, 5, dtype=torch.float64)
    found = refine(moments, start, ridge=0.0)
    assert 0 < found.ridge < 1e-3
    expected = mean_square(z - solved(z[:2], z) @ z[:2])
    torch.testing.assert_close(mean_square(z - found.matrix @ x), expected, rtol=1e-5, atol=1e-6)


@for_each("values_of", [[0.0, 0.0, 0.0], [0.5, 2.0, -1.0], [0.1, 0.3, 1 / 7], [1e4 / 3, 0.7, 0.0]])
@for_each("count", [4, 7, 1000, 3001])
def test_inputs_that_are_all_constant_change_nothing(values_of, count):
    x = torch.tensor(values_of, dtype=torch.float64)[:, None].repeat(1, count)
    y, start = values(4, count), torch.randn(4, 3, dtype=torch.float64)
    found = refine(sums(x, y), start).matrix
    torch.testing.assert_close(found, start, rtol=1e-6, atol=1e-6)
