"""Slow, obvious twins of everything that the package computes: loops over images, neurons and positions in float64.

Nothing of the package is imported. Values are nested lists, ``values[image][neuron][position]``; scores are lists with
one float per neuron.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Values = Sequence[Sequence[Sequence[float]]]
Scores = list[float]


@dataclass
class Case:
    """What a layer did on a few images, and what it is."""

    activations: Values
    gradients: Values
    sampled_gradients: Values
    bounds: tuple[float, float] = (-1.0, 1.0)
    incoming: Sequence[Sequence[float]] = ()
    outgoing: Sequence[Sequence[float]] = ()
    norm_scale: Sequence[float] = ()
    threshold: float = 0.01
    tau: float = 0.025
    tolerance: float = 1e-3


def all_values(values: Values, neuron: int) -> list[float]:
    """Every single value of one neuron."""
    return [value for image in values for value in image[neuron]]


def average(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


def of_values(rule: Callable[[list[float]], float]) -> Callable[[Case], Scores]:
    """A twin that looks at all values of one neuron after the other."""
    return lambda case: [rule(all_values(case.activations, i)) for i in range(len(case.activations[0]))]


def variance(values: list[float]) -> float:
    """In two passes, as a textbook has it."""
    mean = average(values)
    return average([(v - mean) ** 2 for v in values])


def dormant_score(case: Case) -> Scores:
    magnitudes = of_values(lambda values: average([abs(v) for v in values]))(case)
    layer = average(magnitudes)
    return [m / layer if layer > 0 else 0.0 for m in magnitudes]


def layer_rms(values: Values) -> float:
    everything = [v for image in values for neuron in image for v in neuron]
    return math.sqrt(average([v * v for v in everything]))


def share_at_most(values: Values, limit: float) -> Scores:
    """The share of values with a magnitude of at most ``limit``."""
    return [average([float(abs(v) <= limit) for v in all_values(values, i)]) for i in range(len(values[0]))]


def near_zero(case: Case) -> Scores:
    return share_at_most(case.activations, case.threshold * layer_rms(case.activations))


def constant(case: Case) -> Scores:
    def rule(values: list[float]) -> float:
        return float(variance(values) <= case.tolerance**2 * average([v * v for v in values]))

    return of_values(rule)(case)


def saturated(case: Case) -> Scores:
    low, high = case.bounds
    return of_values(lambda values: average([float(v < low + 0.05 or v > high - 0.05) for v in values]))(case)


def gate_gradients(activations: Values, gradients: Values) -> list[Scores]:
    """``u[image][neuron]``: the sum over positions of activation times gradient."""
    gates = []
    for image, slope in zip(activations, gradients, strict=True):
        gates.append([sum(a * g for a, g in zip(*pair, strict=True)) for pair in zip(image, slope, strict=True)])
    return gates


def of_gates(rule: Callable[[list[float]], float], sampled: bool = False) -> Callable[[Case], Scores]:
    """A twin that looks at one gate gradient per image."""

    def twin(case: Case) -> Scores:
        gates = gate_gradients(case.activations, case.sampled_gradients if sampled else case.gradients)
        return [rule([gate[i] for gate in gates]) for i in range(len(gates[0]))]

    return twin


def gradient(case: Case) -> Scores:
    """Per image, then averaged over the data set, then divided by the layer's sum."""
    per_neuron = []
    for neuron in range(len(case.gradients[0])):
        per_image = [sum(g * g for g in image[neuron]) for image in case.gradients]
        per_neuron.append(average(per_image))
    layer = sum(per_neuron)
    return [score / layer if layer > 0 else 0.0 for score in per_neuron]


def mean_square(numbers: list[float]) -> float:
    return average([n * n for n in numbers])


def second_order_ggn(case: Case) -> Scores:
    slopes, curves = of_gates(average)(case), of_gates(mean_square, sampled=True)(case)
    return [-slope + curve / 2 for slope, curve in zip(slopes, curves, strict=True)]


def l1(rows: Sequence[Sequence[float]]) -> Scores:
    return [sum(abs(w) for w in row) for row in rows]


def l2(rows: Sequence[Sequence[float]]) -> Scores:
    return [math.sqrt(sum(w * w for w in row)) for row in rows]


TWINS: dict[str, Callable[[Case], Scores]] = {
    "mean": of_values(average),
    "rms": of_values(lambda values: math.sqrt(mean_square(values))),
    "max": of_values(max),
    "active_share": of_values(lambda values: average([float(v > 0) for v in values])),
    "variance": of_values(variance),
    "dormant_score": dormant_score,
    "near_zero": near_zero,
    "apoz": of_values(lambda values: average([float(v == 0) for v in values])),
    "dormant": lambda case: [float(score <= case.tau) for score in dormant_score(case)],
    "constant": constant,
    "saturated": saturated,
    "gradient": gradient,
    "taylor": of_gates(lambda u: average([abs(one) for one in u])),
    "taylor_fo": of_gates(lambda u: average(u) ** 2),
    "fisher": of_gates(lambda u: mean_square(u) / 2),
    "second_order": of_gates(lambda u: -average(u) + mean_square(u) / 2),
    "second_order_ggn": second_order_ggn,
    "weight_l1": lambda case: l1(case.incoming),
    "weight_l2": lambda case: l2(case.incoming),
    "outgoing_l1": lambda case: l1(case.outgoing),
    "outgoing_l2": lambda case: l2(case.outgoing),
    "norm_scale": lambda case: [abs(scale) for scale in case.norm_scale],
}
"""One twin for every criterion, by name."""


def order(scores: Sequence[float]) -> list[int]:
    """From the highest to the lowest score by repeated search; ties by index, NaN last."""
    left, found = list(range(len(scores))), []
    while left:
        measured = [i for i in left if not math.isnan(scores[i])]
        best = left[0] if not measured else measured[0]
        for i in measured:
            if scores[i] > scores[best]:
                best = i
        left.remove(best)
        found.append(best)
    return found


def top_share(scores: Sequence[float], share: float) -> set[int]:
    """The nearest whole number of neurons, at least one unless the share is 0."""
    ranked = [i for i in order(scores) if not math.isnan(scores[i])]
    keep = max(round(share * len(ranked)), 1) if share > 0 else 0
    return set(ranked[:keep])


def cumulative(scores: Sequence[float], share: float) -> set[int]:
    """Add the best neuron until the share of the sum is reached."""
    ranked = [i for i in order(scores) if not math.isnan(scores[i])]
    total, held, chosen = sum(scores[i] for i in ranked), 0.0, set()
    for i in ranked:
        if total == 0 or held >= share * total * (1 - 1e-12):
            break
        held += scores[i]
        chosen.add(i)
    return chosen


def ranks(numbers: Sequence[float]) -> list[float]:
    """The place of each number; equal numbers share the mean of their places."""
    return [sum(other < n for other in numbers) + (sum(other == n for other in numbers) + 1) / 2 for n in numbers]


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = average(x), average(y)
    together = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    alone = sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)
    return together / math.sqrt(alone) if alone > 0 else math.nan


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    return pearson(ranks(x), ranks(y)) if len(x) > 1 else math.nan


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Tau-b: concordant minus discordant pairs, over the pairs that are not tied in x and not tied in y."""
    balance = untied_x = untied_y = 0
    for i in range(len(x)):
        for j in range(i):
            step_x, step_y = (x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])
            balance += step_x * step_y
            untied_x += step_x != 0
            untied_y += step_y != 0
    return balance / math.sqrt(untied_x * untied_y) if untied_x and untied_y else math.nan


def jaccard(first: set[int], second: set[int]) -> float:
    return len(first & second) / len(first | second) if first | second else math.nan
