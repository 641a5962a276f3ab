"""Every private name of other libraries that the package leans on, and a live object that has it.

A library may rename such a name in any release, and ``getattr(thing, "_name", None)`` would not notice. A name that is
used and has no line here fails the first test; one that is gone fails the second.
"""

import ast
import functools
import sys
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
import torch_pruning
import torchmetrics
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import launchers
from lightning.pytorch.strategies import strategy as of_strategy
from torch import nn

from tests.callbacks.modules import Plain, fit
from tests.tables import for_each
from tests.test_house import TREES

PARTS = {
    "_sizes_after_cuts",
    "_reverse",
    "_batch_",
    "_epoch_end",
    "_err",
    "_foreach_",
    "_mode",
    "_dataloader",
    "_GLOBAL",
}  # of other names, or our own
GRAPH = torch_pruning.DependencyGraph
GRADIENTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "_saved_dim": lambda x: x.softmax(1),
    "_saved_dim0": lambda x: x.transpose(0, 1),
    "_saved_dim1": lambda x: x.transpose(0, 1),
    "_saved_dims": lambda x: x.permute(1, 0),
    "_saved_keepdim": lambda x: x.mean(1),
    "_saved_index": lambda x: x.index_select(0, torch.tensor([0])),
    "_saved_indices": lambda x: x[torch.tensor([0])],
    "_saved_start": lambda x: x[0:1:1],
    "_saved_end": lambda x: x[0:1:1],
    "_saved_step": lambda x: x[0:1:1],
    "_saved_pad": lambda x: nn.functional.pad(x, (1, 1)),
    "_saved_repeats": lambda x: x.repeat(2, 1),
    "_saved_shifts": lambda x: x.roll(1, 0),
    "_saved_groups": lambda x: nn.functional.conv1d(x[None], x[:, :2, None], groups=2),
    "_saved_upscale_factor": lambda x: nn.functional.pixel_shuffle(x[None, :, :, None].expand(1, 4, 4, 4), 2),
    "_saved_downscale_factor": lambda x: nn.functional.pixel_unshuffle(x[None, None], 2),
    "_input_metadata": lambda x: x * 2,
}


@functools.cache
def trained() -> L.Trainer:
    callbacks = [EMAWeightAveraging(decay=0.9)]
    return fit(Plain(), callbacks, max_epochs=1)


def compiled() -> Any:
    return torch.compile(nn.Linear(1, 1), backend="eager")


def node(name: str) -> Any:
    return GRADIENTS[name](torch.ones(4, 4, requires_grad=True)).grad_fn


LIVE: dict[str, Callable[[], Any]] = {
    "_C": lambda: torch,
    "_nn": lambda: torch._C,
    "_ops": lambda: torch,
    "_get_tracing_state": lambda: torch._C,
    "_len_torch_dispatch_stack": lambda: torch._C,
    "_len_torch_function_stack": lambda: torch._C,
    "_ConvNd": lambda: nn.modules.conv,
    "_ConvTransposeNd": lambda: nn.modules.conv,
    "_DropoutNd": lambda: nn.modules.dropout,
    "_InstanceNorm": lambda: nn.modules.instancenorm,
    "_NormBase": lambda: nn.modules.batchnorm,
    "_apply": lambda: nn.Linear(1, 1),
    "_backward_hooks": lambda: torch.ones(1, requires_grad=True),
    "_post_accumulate_grad_hooks": lambda: torch.ones(1, requires_grad=True),
    "_buffers": lambda: nn.Linear(1, 1),
    "_forward_hooks": lambda: nn.Linear(1, 1),
    "_forward_pre_hooks": lambda: nn.Linear(1, 1),
    "_state_dict_hooks": lambda: nn.Linear(1, 1),
    "_metadata": lambda: nn.Linear(1, 1).state_dict(),
    "_load_state_dict_pre_hooks": lambda: nn.Linear(1, 1),
    "_get_backward_hooks": lambda: nn.Module,
    "_get_backward_pre_hooks": lambda: nn.Module,
    "_global_forward_hooks_with_kwargs": lambda: nn.modules.module,
    "_compiled_call_impl": lambda: nn.Linear(1, 1),
    "_reversed_padding_repeated_twice": lambda: nn.Conv2d(1, 1, 1),
    "_is_view": lambda: torch.ones(1),
    "_cdata": lambda: torch.ones(1).untyped_storage(),
    "_disable_current_modes": lambda: sys.modules["torch.utils._python_dispatch"],
    "_unsafe_preserve_version_counter": lambda: torch.autograd.grad_mode,
    "_engine_run_backward": lambda: torch.autograd.graph,
    "_foreach_lerp_": lambda: torch,
    "_overloadpacket": lambda: torch.ops.aten.add.Tensor,
    "_last_lr": lambda: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)], 0.1), 1),
    "_orig_mod": compiled,
    "_torchdynamo_orig_callable": lambda: torch.compile(lambda x: x, backend="eager"),
    "_asdict": lambda: namedtuple("Pair", "a")(1),
    "_replace": lambda: namedtuple("Pair", "a")(1),
    "_getframe": lambda: sys,
    "_lru_cache_wrapper": lambda: functools,
    "_detect_unwrapped_parameters": lambda: GRAPH,
    "_param_to_name": lambda: GRAPH().build_dependency(nn.Linear(1, 1), torch.ones(1, 1)),
    "_module2name": lambda: GRAPH().build_dependency(nn.Linear(1, 1), torch.ones(1, 1)),
    "_defaults": torchmetrics.MeanMetric,
    "_forward_cache": torchmetrics.MeanMetric,
    "_is_synced": torchmetrics.MeanMetric,
    "_should_unsync": torchmetrics.MeanMetric,
    "_to_sync": torchmetrics.MeanMetric,
    "_MultiProcessingLauncher": lambda: launchers.multiprocessing,
    "_ForwardRedirection": lambda: of_strategy,
    "_average_model": lambda: StochasticWeightAveraging(0.1),
    "_swap_models": lambda: EMAWeightAveraging(decay=0.9),
    "_generate_state_key": L.Callback,
    "_on_before_batch_transfer": Plain,
    "_compiler_ctx": lambda: L.pytorch.utilities.compile.from_compiled(torch.compile(Plain(), backend="eager")),
    "_logger_connector": trained,
    "_logged_metrics": lambda: trained()._logger_connector,
    "_first_loop_iter": lambda: trained()._logger_connector,
    "_combined_loader": lambda: trained().fit_loop,
    "_data_fetcher": lambda: trained().fit_loop,
    "_restarting": lambda: trained().fit_loop,
    "_batches_that_stepped": lambda: trained().fit_loop.epoch_loop,
    "_should_accumulate": lambda: trained().fit_loop.epoch_loop,
    "_should_check_val_fx": lambda: trained().fit_loop.epoch_loop,
    "_has_run": lambda: trained().fit_loop.epoch_loop.val_loop,
    "_is_sequential": lambda: trained().fit_loop.epoch_loop.val_loop,
    "_max_batches": lambda: trained().fit_loop.epoch_loop.val_loop,
    "_results": lambda: trained().fit_loop.epoch_loop.val_loop,
    **{name: functools.partial(node, name) for name in GRADIENTS},
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier()


def own_names() -> set[str]:
    """What the package itself defines."""
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    made = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    made |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return made | {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def used_names() -> set[str]:
    """Private names in the package: attributes, words in quotes, and what is imported from others."""
    used: set[str] = set()
    for tree in TREES.values():
        for found in ast.walk(tree):
            if isinstance(found, ast.Attribute):
                used.add(found.attr)
            elif isinstance(found, ast.Constant) and isinstance(found.value, str):
                used.add(found.value)
            elif isinstance(found, ast.ImportFrom) and not str(found.module).startswith("lightning_neurons"):
                used |= {alias.name for alias in found.names}
    return {name for name in used if is_private(name)}


def test_every_private_name_of_others_has_a_line_here():
    assert used_names() - own_names() - PARTS == LIVE.keys()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@for_each("name", LIVE)
def test_others_still_have_the_name(name):
    assert hasattr(LIVE[name](), name)
