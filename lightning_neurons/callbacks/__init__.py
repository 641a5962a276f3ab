"""Lightning callbacks: when to measure, not what."""

from lightning_neurons.callbacks.activation_statistics import ActivationStatisticsCallback
from lightning_neurons.callbacks.neuron_sensitivity import NeuronSensitivityCallback

__all__ = ["ActivationStatisticsCallback", "NeuronSensitivityCallback"]
