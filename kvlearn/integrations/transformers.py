"""kvlearn's attention in the models of transformers, by its attention interface.

    from kvlearn.integrations.transformers import register
    model.set_attn_implementation(register())        # or attn_implementation=register() where it is built

Which function computes a call:

    one new token per row, no gradient    kvlearn.kernels.decode_attention: Triton on a GPU, PyTorch on a CPU
    other calls                           kvlearn.attention.core.grouped_attention, by PyTorch's SDPA
    other calls, with softcap or s_aux    kvlearn.attention.core.grouped_partial, all scores in fp32
    dropout, masks that are not boolean   transformers' own SDPA function
    or differ between heads, position
    bias, a paged cache

GQA is in all of them. The kernel takes a sliding window, rows of different lengths and the sinks of gpt-oss
(``s_aux``). It takes no softcap, and no rows that begin at different positions: a batch padded on the left
goes to ``grouped_attention`` with its mask. Attention weights are returned by none (``output_attentions``).
The tests run on a CPU; with a GPU this module is untried.

transformers gives an attention function a mask, and the kernel needs lengths. ``visible_keys`` derives them
when the mask is made, once per step instead of once per layer. It reads values, so a step with a mask inside
``torch.compile`` goes to ``grouped_attention``.

Source: transformers' documentation, "Attention backends" (AttentionInterface, AttentionMaskInterface).
"""

from kvlearn.extras import require

require("transformers", "kvlearn.integrations.transformers")

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvlearn import validate
from kvlearn.attention.core import causal_mask, grouped_attention, grouped_partial, has_no_values, with_sinks
from kvlearn.kernels import decode_attention

NAME = "kvlearn"


def register(name: str = NAME) -> str:
    """Register ``attention`` and ``attention_mask`` with transformers under ``name``, and return the name.

    Raises TypeError for a name that is no string.
    """
    validate.instance("name", name, str)
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, attention_mask)
    return name


class VisibleKeys(NamedTuple):
    """The keys of one decode step: of the first ``lengths[row]`` keys the last ``window``, or all of them."""

    lengths: Int[Tensor, "B"]
    window: int | None


# The mask of a decode step, kept as long as the mask itself.
_VISIBLE = WeakTensorKeyDictionary()


def attention_mask(*given: Any, **options: Any) -> Tensor | None:
    """transformers' mask for SDPA: boolean, (batch, 1, queries, keys), or None if every key is visible.

    For a single query it also keeps the mask's ``visible_keys`` for ``attention``. That reads the mask's
    values, so it synchronises with a GPU, once for each kind of layer in a step.
    """
    mask = sdpa_mask(*given, **options)
    if mask is not None and mask.shape[2] == 1 and not has_no_values(mask):
        mask = mask.contiguous()  # generate() calls this too: it then keeps the tensor
        _VISIBLE[mask] = visible_keys(mask)
    return mask


def visible_keys(mask: Bool[Tensor, "B 1 1 S"]) -> VisibleKeys | None:
    """Lengths and window that say the same as ``mask``, or None where none do.

    Row b of the mask ends after its last visible key: lengths_b. The rows that do not begin at key 0 must all
    have the same number of visible keys, which is the window, and the others at most as many.
    """
    rows = mask[:, 0, 0]
    S = rows.shape[1]
    keys = torch.arange(S, device=rows.device)
    count = rows.sum(dim=1)
    lengths = (rows * (keys + 1)).amax(dim=1)
    widest = int((count * (count < lengths)).max())
    begin = (lengths - widest).clamp_min(0) if widest else torch.zeros_like(lengths)
    if not torch.equal(rows, (keys >= begin[:, None]) & (keys < lengths[:, None])):
        return None
    return VisibleKeys(lengths.to(torch.int32), widest or None)


def attention(
    module: nn.Module,
    query: Float[Tensor, "#B H T D"],
    key: Float[Tensor, "B G S D"],
    value: Float[Tensor, "B G S Dv"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, "H"] | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "B T H Dv"], None]:
    """softmax(q kᵀ · scaling) v with transformers' arguments: (batch, time, heads, width), and no weights.

    ``softcap`` limits the scores as in Gemma 2; ``s_aux`` is one more logit per head, without a value, as in
    gpt-oss. Raises ValueError for either of them together with what only transformers' SDPA does, since that
    has neither.
    """
    plain_mask = attention_mask is None or (
        attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
    )
    others = {name for name in ("position_bias", "cache") if options.get(name) is not None}
    if others or dropout or not plain_mask or len(query) != len(key):
        if softcap is not None or s_aux is not None:
            raise ValueError(
                "softcap, s_aux: expected no dropout, no position_bias, no paged cache and one boolean mask "
                f"for all heads, got dropout {dropout}, {sorted(others)}, mask {_described(attention_mask)}"
            )
        theirs = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **options}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **theirs)
    T, S = query.shape[2], key.shape[2]
    step = _decode_step(query, key, value, attention_mask) if T == 1 and softcap is None else None
    if step is not None:
        out = decode_attention(
            query[:, :, 0], key, value, step.lengths, scale=scaling, window=step.window, sink_logits=s_aux
        )
        return out[:, None], None
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = bool(is_causal) and attention_mask is None and T > 1
    if is_causal and S > T:  # a static cache that holds nothing before these tokens
        key, value = key[:, :, :T], value[:, :, :T]
    if softcap is None and s_aux is None:
        out = grouped_attention(query, key, value, attention_mask, scaling, is_causal)
    else:
        mask = causal_mask(T, T, query.device)[None, None] if is_causal else attention_mask
        part = grouped_partial(query, key, value, mask, scaling, softcap)
        out = (part.out if s_aux is None else with_sinks(part, s_aux)).to(query.dtype)
    return out.transpose(1, 2).contiguous(), None


def _described(mask: Tensor | None) -> str:
    return "None" if mask is None else f"{tuple(mask.shape)} of {mask.dtype}"


def _decode_step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> VisibleKeys | None:
    """The keys that the decode kernel shall read, or None where it cannot compute this call."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return None
    if q.device.type not in ("cpu", "cuda") or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    if not q.dtype == k.dtype == v.dtype:
        return None
    if mask is None:
        return VisibleKeys(torch.full((len(q),), k.shape[2], dtype=torch.int32, device=q.device), None)
    if torch.compiler.is_compiling() or mask.shape != (len(q), 1, 1, k.shape[2]):
        return None
    visible: VisibleKeys | None = _VISIBLE.get(mask)
    return visible
