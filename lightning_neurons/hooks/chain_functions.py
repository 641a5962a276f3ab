"""Torch functions that may be steps on the way from a layer to its activation point.

Activation functions are often written out: ``x * torch.sigmoid(x)``, ``x[x < 0] = 0``. What they are made of are
elementwise functions, functions that change the layout, and functions that only use a tensor's shape and type. Each is
known here under all names by which ``torch`` dispatches it: ``torch.mul``, ``x.mul_``, ``2 * x``, ``x *= 2``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that the field uses)
from torch import Tensor

from lightning_neurons.isolation.tensors import tensors_in
from lightning_neurons.layers.registry import LINKS, LinkKind, function_name

_OWNERS = (torch, Tensor, F, torch.special, torch._C._nn, torch.ops.aten)
_FORMS = ("{}", "{}_", "__{}__", "__r{}__", "__i{}__")


_TO_PYTHON = (Tensor.__bool__, Tensor.__float__, Tensor.__int__)


def _named(names: str) -> dict[Callable[..., Any], str]:
    """Return the functions of these names, on tensors and in modules, in place and as operators, with their names."""
    places = ((name, getattr(o, form.format(name), None)) for name, form, o in product(names.split(), _FORMS, _OWNERS))
    functions = {f: name for name, f in reversed(list(places)) if callable(f) and f not in _TO_PYTHON}
    packets = [f for f in functions if isinstance(f, torch._ops.OpOverloadPacket)]
    return functions | {getattr(packet, form): functions[packet] for packet in packets for form in packet.overloads()}


def _getter(name: str) -> Callable[..., Any]:
    """Return the function that ``torch`` dispatches when an attribute of a tensor is read."""
    return getattr(Tensor, name).__get__  # type: ignore[no-any-return]


_RECIPROCAL = dict.fromkeys((Tensor.__rdiv__, Tensor.__rtruediv__), "reciprocal")
_ARITHMETIC = {
    f: name
    for f, name in _named(
        "add sub mul div true_divide truediv multiply divide subtract rsub neg negative positive"
    ).items()
    if f not in _RECIPROCAL
}
_POINTWISE = _named(
    "abs absolute acos acosh addcdiv addcmul and angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin "
    "asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor bool ceil celu clamp clamp_max clamp_min "
    "clip copysign cos cosh deg2rad digamma entr eq erf erfc erfcx erfinv exp exp2 expit expm1 "
    "fake_quantize_per_channel_affine fake_quantize_per_tensor_affine fix float_power floor floor_divide floordiv "
    "fmax fmin fmod frac gammainc gammaincc gammaln ge greater greater_equal gt hardshrink heaviside hypot i0 i0e i1 "
    "i1e igamma igammac int invert ldexp le lerp less less_equal lgamma log log10 log1p log2 log_ndtr logaddexp "
    "logaddexp2 logical_and logical_not logical_or logical_xor logit long lt masked_fill max maximum min minimum mod "
    "nan_to_num ndtr ndtri ne nextafter not_equal or pow psi rad2deg reciprocal relu remainder round rsqrt sgn "
    "sigmoid sign signbit sin sinc sinh sqrt square tan tanh threshold trunc where xlog1py xlogy xor"
)


ARITHMETIC = frozenset(_ARITHMETIC.values())
"""Names of functions that scale and shift, if their other operands are constants."""

MOVES: dict[Callable[..., Any], str] = {
    **_named("flatten moveaxis movedim permute reshape reshape_as squeeze swapaxes swapdims t transpose unflatten"),
    **_named("unsqueeze view view_as"),
    _getter("T"): "T",
    _getter("mT"): "mT",
}
"""Functions that change the layout of a tensor, but not its values."""

COPIES: dict[Callable[..., Any], str] = _named("bfloat16 clone contiguous cpu cuda double float half to type type_as")
"""Functions that copy a tensor or convert its type."""

DETACHES: dict[Callable[..., Any], str] = {Tensor.detach: "detach", torch.detach: "detach", _getter("data"): "data"}
"""Functions whose result has the same values and passes no gradient back."""

SET, GET = Tensor.__setitem__, Tensor.__getitem__

STEPS: dict[Callable[..., Any], str] = {
    **MOVES,
    **DETACHES,
    **COPIES,
    **_POINTWISE,
    **_RECIPROCAL,
    **_ARITHMETIC,
    **{function: function.__name__.strip("_") for function in LINKS},
    SET: "setitem",
    GET: "getitem",
}
"""The functions that may be steps, each with its name."""

ELEMENTWISE = frozenset(_ARITHMETIC | _POINTWISE | _RECIPROCAL) | {f for f, kind in LINKS.items() if kind != "norm"}
"""Functions whose every value depends on nothing but the operands' values in the same place."""

FORMS: dict[str, frozenset[Callable[..., Any]]] = {
    name: frozenset(f for f, other in STEPS.items() if other == name) for name in set(STEPS.values())
}
"""The functions that share a name, by name."""

CREATES = frozenset(
    _named(
        "empty_like full_like ones_like rand_like randint_like randn_like zeros_like new_empty new_full new_ones "
        "new_tensor new_zeros"
    )
)
"""Functions that make a tensor after the shape and type of another one, whatever its values."""

LOOKS = (
    frozenset(_named("detach isfinite isinf isnan isneginf isposinf requires_grad_ retain_grad"))
    | CREATES
    | DETACHES.keys()
)
"""Functions that do not count as a use of a value: debugging and logging call them in passing."""

WORKS: dict[Callable[..., Any], str] = {
    **_POINTWISE,
    **_RECIPROCAL,
    **{function: function.__name__.strip("_") for function, kind in LINKS.items() if kind == "activation"},
    **_named("bucketize glu index_put masked_scatter searchsorted"),
}
"""Functions that do more to values than scale and shift them."""

TEARS: dict[Callable[..., Any], str] = {
    **MOVES,
    **_ARITHMETIC,
    **{f: f.__name__.strip("_") for f, kind in LINKS.items() if kind in ("norm", "dropout")},
    **_named(
        "cat chunk column_stack concat concatenate detach diagonal dsplit dstack expand expand_as flip fliplr flipud "
        "gather hsplit hstack index_select narrow repeat roll select split stack take_along_dim tensor_split tile "
        "unbind unfold vsplit vstack"
    ),
    Tensor.__iter__: "unbind",
    GET: "getitem",
}
"""Functions whose result still holds a layer's own values, though perhaps not all of them, or in other places."""

JOINS = frozenset(_named("cat column_stack concat concatenate dstack hstack stack vstack").values())
"""Names of the functions that join tensors along an axis."""
MIXES = frozenset(
    _named(
        "addbmm addmm addmv baddbmm bilinear bmm cdist chain_matmul conv1d conv2d conv3d conv_transpose1d "
        "conv_transpose2d conv_transpose3d convolution dot einsum inner kron linear matmul mm multi_dot mv outer "
        "scaled_dot_product_attention tensordot"
    )
)
"""Functions that sum products: no value of their result belongs to a single neuron of what they read."""

REDUCES: dict[Callable[..., Any], str] = _named(
    "amax amin cummax cummin cumprod cumsum kthvalue log_softmax logcumsumexp logsumexp max mean median min norm "
    "normalize prod quantile softmax softmin sort std sum topk var"
)
"""Functions whose result depends on the values of several neurons, or of several positions, at once."""

_FORM_OF_SECOND = frozenset(f for f, name in STEPS.items() if name in {"reshape_as", "to", "type_as", "view_as"})


def operands(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors whose values a call reads, or writes into.

    Example:
        >>> mask, x = torch.tensor([True, False]), torch.ones(2)
        >>> [t is x for t in operands(torch.where, (mask, x, 0.0), {})]
        [False, True]
        >>> len(operands(Tensor.reshape_as, (x, mask), {}))
        1
    """
    if function in _FORM_OF_SECOND:
        args, kwargs = args[:1], {} if args else kwargs
    tensors = [a for a in args if isinstance(a, Tensor)]
    if len(tensors) < len(args) or kwargs:
        return list(tensors_in((args, {name: value for name, value in kwargs.items() if name != "out"})))
    return tensors


MAY_COPY = COPIES.keys() | FORMS["view_as"]
"""Functions that may hand values on unchanged and in the same places."""


def is_copied(function: Callable[..., Any], inputs: Sequence[Tensor], made: Tensor) -> bool:
    """Return whether a call hands values on unchanged and in the same places: a copy, or a view of the same shape."""
    return function in COPIES or (function in MAY_COPY and made.shape == inputs[0].shape)


@dataclass(frozen=True, eq=False)
class Step:
    """A call that makes a value.

    Attributes:
        function: The function that ran.
        args: Its arguments.
        kwargs: Its keyword arguments.
        reads: The numbers of the values that it reads, in the order of its operands; None for a constant.
        module: Path of the module that called it, if that has no modules of its own and is no layer.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int | None, ...]
    module: str | None

    @property
    def values(self) -> tuple[int, ...]:
        """The numbers of the values that the call reads, without its constants."""
        return tuple(number for number in self.reads if number is not None)

    def operands(self) -> list[Tensor]:
        """Return the tensors that the call reads, constants as well."""
        return operands(self.function, self.args, self.kwargs)

    @property
    def name(self) -> str:
        """The name of the function in ``STEPS``."""
        return STEPS[self.function]

    @property
    def title(self) -> str:
        """The name of the function for reports: that of the activation function it computes, if it is one."""
        return function_name(self.function, self.args, self.kwargs) if self.function in LINKS else self.name

    @property
    def is_move(self) -> bool:
        """True if the call reshapes, detaches or indexes values without changing them."""
        return self.function in MOVES or self.function in DETACHES or self.function is GET

    @property
    def kind(self) -> LinkKind:
        """The kind of link that the call makes on its own."""
        divides_by_it = "div" in self.name and self.reads[0] is None
        affine = self.name in ARITHMETIC and len(self.values) == 1 and not divides_by_it
        return LINKS.get(self.function, "affine" if affine else "activation")
