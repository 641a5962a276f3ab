"""Trials of cuts on a copy: the output without the neurons must be the output with them silenced.

Silenced means that layers that read them have weights of zero for them. The copy has random weights, so that a wrong
cut cannot go unnoticed.
"""

import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import Tensor, nn

from lightning_neurons.data.batches import results_of, rows_of, samples_in, tensors_of
from lightning_neurons.dependency.groups import Group
from lightning_neurons.errors import PruningError, in_short
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.layers.width_handlers import axes
from lightning_neurons.pruning.structure.costs import Costs, costs_of
from lightning_neurons.pruning.structure.example import Example, in_precision
from lightning_neurons.pruning.structure.norm_streams import Norms, narrowed
from lightning_neurons.pruning.surgery.surgery import TensorCut, cut, cuts_of

_NOT_THE_USERS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[2]))
_TOLERANCES = ((torch.float64, 1e-8), (torch.float32, 1e-4))


class Preflight:
    """A trial of cuts on a copy of a model, which it changes and puts back.

    Args:
        twin: A copy with random weights, in evaluation mode.
        example: The inputs that it is run on.
        ends: Layers whose values are compared too: a saturated output could hide a difference.
        norms: Modules that may take their statistics over the neurons that stay.

    Attributes:
        costs: What the copy costs with its weights.
    """

    def __init__(self, twin: nn.Module, example: Example, ends: Sequence[str] = (), norms: Norms | None = None) -> None:
        self.twin, self.example, self.ends, self.norms = twin, example, tuple(ends), norms or Norms()
        twin.requires_grad_(False)
        self._find_precision()

    def failing(
        self, groups: Sequence[Group], units: Mapping[str, Sequence[int]], together: str | None = None
    ) -> dict[str, str]:
        """Return the groups whose cut changes more than silence does, by root, each with the reason.

        All are tried together first; only where that fails, the halves.

        Args:
            groups: The groups to cut.
            units: By root, the units to remove.
            together: What is wrong with all of them together, where that has been tried already.

        Returns:
            The reason in words by root; empty if all cuts are right.
        """
        if not groups:
            return {}
        reason = together or self.difference(cuts_of(groups, units))
        if reason is None:
            return {}
        if len(groups) == 1:
            return {groups[0].root: reason}
        half = len(groups) // 2
        found = self.failing(groups[:half], units) | self.failing(groups[half:], units)
        # Fine one by one, and not together: then none of them can be trusted.
        return found or {group.root: f"together with others, {reason}" for group in groups}

    @cached_property
    def names(self) -> frozenset[str] | None:
        """The names in the code that a forward runs: it reads no other attributes. None while a profiler runs."""
        if sys.getprofile() is not None:  # that of C code, as cProfile, could not be set again
            return None
        codes: set[CodeType] = set()

        def note(frame: FrameType, event: str, _: object) -> None:
            if event == "call":
                codes.add(frame.f_code)

        sys.setprofile(note)
        try:
            self._outputs(self.example)
        finally:
            sys.setprofile(None)
        words = (word for code in codes for word in (*code.co_names, *code.co_consts))
        return frozenset(word for word in words if isinstance(word, str))

    def _find_precision(self) -> None:
        """Compute in float64 where the model can, else in float32: a dtype may be written in it."""
        for dtype, tolerance in _TOLERANCES:
            try:
                self.twin._apply(partial(in_precision, dtype=dtype))  # ``to`` would drop what is imaginary
                example = self.example.to(dtype)
                self.costs, outputs = self._counted(example)
            except (RuntimeError, TypeError, ValueError) as error:
                failure = error
                continue
            if not all(t.isfinite().all() for t in outputs):
                raise PruningError("the model's output is not finite, so cuts cannot be compared")
            self.example, self.tolerance, self._whole = example, tolerance, outputs
            return
        raise PruningError(f"the model runs on a copy neither in float64 nor in float32 ({failure})")

    def _counted(self, example: Example) -> tuple[Costs, list[Tensor]]:
        outputs: list[Tensor] = []
        costs = costs_of(self.twin, example, lambda: outputs.extend(self._outputs(example)))
        return costs, outputs

    @contextmanager
    def on_one_sample(self) -> Iterator[None]:
        """Try on the first sample alone, inside the context, if its outputs do not depend on the others."""
        first, example = self._first, self.example
        self.example = first or example
        try:
            yield
        finally:
            self.example = example

    @cached_property
    def _first(self) -> Example | None:
        size = samples_in(self.example.inputs)
        if size < 2 or any(t.shape[:1] != (size,) for t in self._whole):
            return None
        try:
            first = replace(self.example, inputs=rows_of(self.example.inputs, torch.tensor([0]), size))
            outputs = self._outputs(first)
        except Exception:  # noqa: BLE001 (a batch or a model that cannot do with one sample, whatever it raises)
            return None
        return first if _compare([t[:1] for t in self._whole], outputs, self.tolerance) is None else None

    def expected(self, cuts: Sequence[TensorCut]) -> list[Tensor]:
        """Run the copy with neurons silenced.

        Args:
            cuts: The neurons.

        Returns:
            The outputs, which those without the neurons have to equal.
        """
        with silenced(self.twin, cuts, self.norms):
            return self._outputs(self.example)

    def difference(self, cuts: Sequence[TensorCut], expected: Sequence[Tensor] | None = None) -> str | None:
        """Return the difference between silence and removal in words, or None.

        Args:
            cuts: The neurons to remove.
            expected: The outputs with them silenced, where they are computed already.
        """
        got = self._without(cuts)
        if isinstance(got, str) and not any(map(self.norms.narrows, cuts)):
            return got
        try:
            expected = self.expected(cuts) if expected is None else expected
        except Exception as error:  # noqa: BLE001 (a norm that does not run on fewer neurons)
            return f"its norms cannot be narrowed ({in_short(error)})"
        return got if isinstance(got, str) else _compare(expected, got, self.tolerance)

    def _without(self, cuts: Sequence[TensorCut]) -> list[Tensor] | str:
        """Run the copy without neurons.

        Returns:
            The outputs, or in words why there are none.
        """
        try:
            operation = cut(self.twin, cuts)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is why this group cannot be cut)
            return f"the cut fails ({type(error).__name__}: {error})"
        try:
            return self._outputs(self.example)
        except Exception as error:  # noqa: BLE001
            return (
                f"the forward fails without them{_line_of(error)} ({in_short(error)}): something that is not cut "
                "depends on their number"
            )
        finally:
            operation.roll_back()

    def _outputs(self, example: Example) -> list[Tensor]:
        values: list[Tensor] = []
        modules = modules_by_name(self.twin)
        hooks = [modules[n].register_forward_hook(lambda m, i, out: values.extend(tensors_of(out))) for n in self.ends]
        try:
            with torch.no_grad():
                out = example.run(self.twin)
        finally:
            for hook in hooks:
                hook.remove()
        return [_dense(tensor.detach()) for tensor in (*values, *results_of(out))]


def _dense(tensor: Tensor) -> Tensor:
    """Return sequences of different lengths side by side, as inside of an encoder of torch; others as they are."""
    return tensor.to_padded_tensor(0.0) if tensor.is_nested else tensor


@contextmanager
def silenced(model: nn.Module, cuts: Sequence[TensorCut], norms: Norms | None = None) -> Iterator[None]:
    """Silence neurons inside the context: weights of layers that read them, and parameters added to them, are 0.

    Args:
        model: The model, with all of its neurons.
        cuts: The neurons, by what reads and holds them.
        norms: Modules that take their statistics over the other neurons.
    """
    modules, undo, norms = modules_by_name(model), [], norms or Norms()
    owners = Counter(id(parameter) for module in modules.values() for parameter in module._parameters.values())
    with torch.no_grad():
        for one in cuts:
            if norms.narrows(one):
                continue
            if one.role == "holds":
                owner, _, leaf = one.path.rpartition(".")
                found = {leaf: one.axis or 0}
            else:
                owner, found = one.path, _reading(modules[one.path]) if one.role == "reads" else {}
            for leaf, axis in found.items():
                module, tensor = modules[owner], getattr(modules[owner], leaf)
                gone = torch.tensor(one.places, device=tensor.device)
                if owners[id(tensor)] > 1:  # what others do with it stays as it is
                    undo.append(partial(module._parameters.__setitem__, leaf, tensor))
                    tensor = module._parameters[leaf] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
                else:
                    before = tensor.detach().index_select(axis, gone)
                    undo.append(partial(tensor.data.index_copy_, axis, gone, before))
                tensor.data.index_fill_(axis, gone, 0)
    try:
        with narrowed(model, [one for one in cuts if norms.narrows(one)], norms):
            yield
    finally:
        for take_back in reversed(undo):
            take_back()


def _line_of(error: Exception) -> str:
    """Return the line of the user's code that fails, in words: the innermost outside of torch and the package."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.line and not any(f.filename.startswith(folder) for folder in _NOT_THE_USERS)]
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno}, `{own[-1].line}`" if own else ""


def _reading(module: nn.Module) -> dict[str, int]:
    """Return the weights by which a module reads neurons; a value for each of them may as well be divided by."""
    reads, makes = axes(module, "reads"), axes(module, "makes")
    tensors = {name: getattr(module, name) for name in reads}
    weights = {n: a for n, a in reads.items() if n in makes or tensors[n].numel() > tensors[n].shape[a]}
    return weights or reads


def _compare(expected: Sequence[Tensor], got: Sequence[Tensor], tolerance: float) -> str | None:
    if [t.shape for t in expected] != [t.shape for t in got]:
        return "the model's output changes its shape"
    for a, b in zip(expected, got, strict=True):
        if not (a.is_floating_point() or a.is_complex()):
            continue
        scale = float(a.abs().max()) if a.numel() else 0.0
        error = float((a - b).abs().max()) if a.numel() else 0.0
        if not error <= tolerance * max(scale, 1e-30):
            return f"the output differs from that with silenced neurons by {error / max(scale, 1e-30):.1e} of its size"
    return None
