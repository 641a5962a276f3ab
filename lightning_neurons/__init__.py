"""See which neurons of a network are dead and which matter, while PyTorch Lightning trains it."""

from lightning_neurons.ablation.ablate import ablate
from lightning_neurons.ablation.joint_ablation import ablate_together, ablation_curves
from lightning_neurons.ablation.perturbation import perturb
from lightning_neurons.attribution.grad_cam import activation_map
from lightning_neurons.attribution.saliency import integrated_gradients, saliency
from lightning_neurons.attribution.sanity_checks import randomization_check
from lightning_neurons.callbacks import (
    ActivationMaximizationCallback,
    ActivationStatisticsCallback,
    ClassNeuronsCallback,
    NeuronAblationCallback,
    NeuronPruningCallback,
    NeuronSensitivityCallback,
    PrunedCheckpointMixin,
    SaliencyCallback,
    load_pruned,
    pruned_widths,
)
from lightning_neurons.callbacks.pruning.recovery_settings import Distillation, Guard
from lightning_neurons.class_study.class_study import class_study
from lightning_neurons.criteria import CRITERIA, Criterion, LayerView, Statistic, Summary, agreement
from lightning_neurons.dependency.conform import conform
from lightning_neurons.errors import (
    ArgumentError,
    MeasurementError,
    MissingPackageError,
    PruningError,
    UnknownNameError,
)
from lightning_neurons.feature_visualization.maximize import maximize_activation
from lightning_neurons.hooks.find_neurons import find_neurons
from lightning_neurons.layers.layer import Layer
from lightning_neurons.layers.prunable import register_prunable
from lightning_neurons.layers.registry import register_layer
from lightning_neurons.measurement.measure import logit, measure, predicted_logit
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.cut import PruningReport
from lightning_neurons.pruning.plan import PruningPlan
from lightning_neurons.pruning.prune import prune
from lightning_neurons.pruning.schedule import PruningSchedule
from lightning_neurons.pruning.selection.subnetwork import plan_keeping
from lightning_neurons.pruning.structure.describe import describe_structure
from lightning_neurons.results.neuron_report import NeuronReport

__version__ = "0.1.0"

__all__ = [
    "CRITERIA",
    "ActivationMaximizationCallback",
    "ActivationStatisticsCallback",
    "ArgumentError",
    "ClassNeuronsCallback",
    "Criterion",
    "Distillation",
    "Guard",
    "Layer",
    "LayerView",
    "MeasurementError",
    "MissingPackageError",
    "NeuronAblationCallback",
    "NeuronPruningCallback",
    "NeuronReport",
    "NeuronSensitivityCallback",
    "PrunedCheckpointMixin",
    "PruningBudget",
    "PruningError",
    "PruningPlan",
    "PruningReport",
    "PruningSchedule",
    "SaliencyCallback",
    "Statistic",
    "Summary",
    "UnknownNameError",
    "ablate",
    "ablate_together",
    "ablation_curves",
    "activation_map",
    "agreement",
    "class_study",
    "conform",
    "describe_structure",
    "find_neurons",
    "integrated_gradients",
    "load_pruned",
    "logit",
    "maximize_activation",
    "measure",
    "perturb",
    "plan_keeping",
    "predicted_logit",
    "prune",
    "pruned_widths",
    "randomization_check",
    "register_layer",
    "register_prunable",
    "saliency",
]
