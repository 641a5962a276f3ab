"""Attention of torch with any number of heads: ``nn.MultiheadAttention`` itself demands that they fill its width."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import torch
import torch.nn.functional as F  # noqa: N812 (the name that the field uses)
from torch import Tensor, nn
from torch.nn.utils import parametrize

WEIGHTS_APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_UNMASKED = "a mask of booleans or floating-point numbers"


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with fewer heads than fill its width.

    A cut gives this class to a module that loses heads, and loading gives it to one whose checkpoint has fewer; the
    names and the order of its tensors stay. Arguments and results are those of the base class, which are equal at full
    width. Unlike there, the output projection runs as a module, and no fused kernel for all of it is taken.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False keeps ``nn.TransformerEncoderLayer`` off its fused path, which takes the heads from the width."""
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention, as ``nn.MultiheadAttention`` does.

        Returns:
            Results and attention weights, as there; with 3-D masks and weights for the heads that are left.
        """
        if query.is_nested and query is key and key is value:  # an encoder has packed its sequences without padding
            dense, padding = _padded(query)
            whole = self.forward(dense, dense, dense, padding, need_weights, attn_mask, average_attn_weights)
            return _packed(whole[0], query), whole[1]
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        q, k, v = (self._by_head(made, batched) for made in self.project(query, key, value))
        if is_causal and key_padding_mask is None and not need_weights:
            mask: Tensor | None = None  # the kernel makes it itself
        else:
            mask, is_causal = self._merged(attn_mask, key_padding_mask, q, k), False
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            products = (q * self.head_dim**-0.5) @ k.mT
            shares: Tensor | None = F.dropout((products if mask is None else products + mask).softmax(-1), dropout)
            assert shares is not None, "just computed"
            mixed = shares @ v
        else:
            shares = None
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        order = (0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3)
        out = self.out_proj(mixed.permute(order).flatten(2))
        if shares is not None and average_attn_weights:
            shares = shares.mean(1)
        if batched:
            return out, shares
        return out.squeeze(0), None if shares is None else shares.squeeze(0)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries, keys and values of all heads.

        Returns:
            Each of them, with one head after the other on the last axis.
        """
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value and weight is not None:
            q, k, v = F.linear(query, weight, bias).chunk(3, -1)
        else:
            apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            weights = apart if weight is None else weight.chunk(3)
            operands = zip((query, key, value), weights, biases, strict=True)
            q, k, v = (F.linear(x, rows, some) for x, rows, some in operands)
        return q, k, v

    def _by_head(self, made: Tensor, batched: bool) -> Tensor:
        """Return what a projection made as (batch, head, position, size of a head)."""
        made = made.unsqueeze(0) if not batched else made if self.batch_first else made.transpose(0, 1)
        heads: Tensor = made.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads

    def _merged(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Return what is added to the products of queries with keys, in a shape that fits theirs."""
        batch, heads, steps, places = *q.shape[:3], k.shape[2]
        found = None
        if padding is not None:
            found = _added(padding, q).view(batch, 1, 1, places)
        if attn_mask is not None:
            by_head = (batch * heads, steps, places)
            if attn_mask.shape not in ((steps, places), by_head):
                raise RuntimeError(
                    f"The shape of the attn_mask is {tuple(attn_mask.shape)}, but should be {(steps, places)} or, with "
                    f"{heads} heads, {by_head}."
                )
            mask = _added(attn_mask, q)
            mask = mask if mask.dim() == 2 else mask.view(batch, heads, steps, places)
            found = mask if found is None else found + mask
        return found


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as numbers to add: minus infinity where it is True."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise TypeError(f"expected {_UNMASKED}, got one of {mask.dtype}")
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _padded(nested: Tensor) -> tuple[Tensor, Tensor]:
    """Return sequences of different lengths side by side, and where there is padding behind them."""
    dense = nested.to_padded_tensor(0.0)
    lengths = torch.tensor([len(sequence) for sequence in nested.unbind()], device=dense.device)
    return dense, torch.arange(dense.shape[1], device=dense.device) >= lengths[:, None]


def _packed(dense: Tensor, like: Tensor) -> Tensor:
    """Return sequences without the padding behind them."""
    pairs = zip(dense, like.unbind(), strict=True)
    return torch.nested.as_nested_tensor([row[: len(sequence)] for row, sequence in pairs])


def heads_of(module: nn.MultiheadAttention) -> int | None:
    """Return how many heads an attention has left, by the size of its weight; heads keep their sizes."""
    weight = module._parameters.get("q_proj_weight" if has_weights_apart(module) else "in_proj_weight")
    return None if weight is None else weight.shape[0] // rows_of_head(module)


def has_weights_apart(module: object) -> bool:
    """Return True for an attention with a weight each for queries, keys and values, as with ``kdim`` or ``vdim``."""
    return isinstance(module, nn.MultiheadAttention) and module._parameters.get("q_proj_weight") is not None


def rows_of_head(module: nn.Module) -> int:
    """Return how many rows of its weights go with one head of an attention; 1 for other modules."""
    if not isinstance(module, nn.MultiheadAttention):
        return 1
    size: int = module.head_dim
    return size if has_weights_apart(module) else 3 * size


def why_inseparable(module: nn.Module) -> str | None:
    """Return the reason why no heads of an attention of torch can be removed, or None."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        return None  # whoever asks says so of every type
    if type(module) not in (nn.MultiheadAttention, PrunedMultiheadAttention) or "forward" in vars(module):
        return f"{kind} may have another forward than nn.MultiheadAttention, so its heads cannot be told apart"
    own = module._parameters
    weights = WEIGHTS_APART if has_weights_apart(module) else ("in_proj_weight",)
    if any(own.get(name) is None for name in weights) or (
        getattr(module, "in_proj_bias", None) is not own.get("in_proj_bias")
    ):
        return f"{kind} computes its projections from other tensors"
    if own.get("bias_k") is not None or own.get("bias_v") is not None:
        return f"{kind} adds a key and a value of its own to each head (add_bias_kv)"
    if getattr(module, "add_zero_attn", False):
        return f"{kind} adds a key and a value of zeros to each head (add_zero_attn)"
    return None


def has_separable_heads(module: object) -> TypeGuard[nn.MultiheadAttention]:
    """Return True for an attention of torch whose heads can be removed."""
    known = isinstance(module, nn.MultiheadAttention) and not parametrize.is_parametrized(module)
    return known and why_inseparable(module) is None  # type: ignore[arg-type]


def set_class(module: nn.Module) -> None:
    """Give an attention the class whose forward runs with the heads that it has."""
    if has_separable_heads(module):
        full = module.num_heads * module.head_dim == module.embed_dim
        kind = nn.MultiheadAttention if full else PrunedMultiheadAttention
        if type(module) is not kind:
            module.__class__ = kind


def separate_heads(model: nn.Module) -> list[nn.Module]:
    """Let attentions run as they do without some of their heads, with all of their output projections as modules.

    Args:
        model: A model or a copy of it; its results stay the same.

    Returns:
        The modules that have another class now: ``nn.MultiheadAttention`` before.
    """
    whole: list[nn.Module] = [m for m in model.modules() if type(m) is nn.MultiheadAttention and has_separable_heads(m)]
    for module in whole:
        module.__class__ = PrunedMultiheadAttention
    return whole


@contextmanager
def separated_heads(model: nn.Module) -> Iterator[None]:
    """Do the same inside the context only, so that what an output projection reads can be seen by hooks."""
    whole = separate_heads(model)
    try:
        yield
    finally:
        for module in whole:
            set_class(module)


@contextmanager
def silent_rows(module: nn.Module, rows: Sequence[int]) -> Iterator[None]:
    """Silence neurons of an attention inside the context: a head all of whose rows are zero adds nothing.

    Args:
        module: The attention; its own parameters are only read.
        rows: Rows of its projection of queries, keys and values, packed or of each.
    """
    own, undo = module._parameters, []
    for name in ("in_proj_weight", *WEIGHTS_APART, "in_proj_bias"):
        if (whole := own.get(name)) is not None:
            index = torch.tensor(list(rows), device=whole.device)
            if name == "in_proj_bias" and has_weights_apart(module):
                index = torch.cat([index + part * len(whole) // 3 for part in range(3)])
            undo.append(partial(own.__setitem__, name, whole))
            own[name] = nn.Parameter(whole.detach().index_fill(0, index, 0), whole.requires_grad)
    try:
        yield
    finally:
        for put_back in undo:
            put_back()
