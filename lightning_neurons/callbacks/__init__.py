"""Lightning callbacks: they decide when to measure and when to cut; the packages below do it."""

from lightning_neurons.callbacks.trainer import namespaces  # noqa: F401 (first: it looks which one is there before us)

# isort: split
from lightning_neurons.callbacks.activation_maximization import ActivationMaximizationCallback
from lightning_neurons.callbacks.activation_statistics import ActivationStatisticsCallback
from lightning_neurons.callbacks.class_neurons import ClassNeuronsCallback
from lightning_neurons.callbacks.neuron_ablation import NeuronAblationCallback
from lightning_neurons.callbacks.neuron_pruning import NeuronPruningCallback
from lightning_neurons.callbacks.neuron_sensitivity import NeuronSensitivityCallback
from lightning_neurons.callbacks.pruning.checkpoint import PrunedCheckpointMixin, load_pruned, pruned_widths
from lightning_neurons.callbacks.saliency import SaliencyCallback

__all__ = [
    "ActivationMaximizationCallback",
    "ActivationStatisticsCallback",
    "ClassNeuronsCallback",
    "NeuronAblationCallback",
    "NeuronPruningCallback",
    "NeuronSensitivityCallback",
    "PrunedCheckpointMixin",
    "SaliencyCallback",
    "load_pruned",
    "pruned_widths",
]
