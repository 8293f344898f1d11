"""Generation: prefill the prompts, whole or in chunks, then one token per step.

Letters beside those of core.py: V tokens of the vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.attention import LongRopeScaling, Rope
from kvlearn.extras import progress_bar
from kvlearn.model.decoder import Decoder, DecoderCache

TEMPERATURES = (1e-30, 1e30)  # fp32 holds both and 1 over both; beyond them a distribution does not change


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Tensor | Sequence[Any],
    n: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: int | Sequence[int] | None = None,
    seed: int | None = None,
    chunk: int | None = None,
    use_cache: bool = True,
    progress: bool = False,
) -> Tensor | list[Tensor]:
    """``tokens`` (B, T), followed by ``n`` generated ones, or fewer if every row has met a stop token.

    ``temperature`` 0 is greedy; above, logits are divided by it and a token is drawn from the ``top_k`` most
    likely ones (all unless given), and of these from the smallest set that holds ``top_p`` of their
    probability. ``seed`` makes sampling repeatable. A row ends with the first token of ``stop`` that it
    generates (one or several; the model's ``stop_tokens`` unless given; () for none); it is filled up with
    the model's ``pad_token`` or the first of ``stop`` while other rows go on. ``chunk`` tokens of the prompt
    are fed at a time (all at once by default). ``use_cache=False`` computes all tokens again at every step:
    the same result, at the cost of having no cache.

    A list of prompts, each a tensor (T,) or a list of integers, may hold different lengths. The result is
    then a list of tensors, each a prompt and its new tokens up to its stop token: greedily those of the
    prompt alone. They are padded on the right and fed together, and the caches cut back to each row's length.

    Raises ValueError or TypeError that names the argument; for prompts of different lengths ValueError also
    if a layer's cache cannot forget the padding (a state, a ring that is full; ``use_cache=False`` needs no
    cache), or if RoPE's angles depend on the length of the longest row: these need a call for each prompt.
    """
    validate.instance("model", model, Decoder)
    n = validate.positive("n", n)
    check_sampling(temperature, top_k, top_p)
    if seed is not None:
        seed = validate.at_most("seed", validate.at_least("seed", seed, -(2**63)), 2**64 - 1, "64 bits")
    if chunk is not None:
        chunk = validate.positive("chunk", chunk)
    for name, flag in (("use_cache", use_cache), ("progress", progress)):
        validate.instance(name, flag, bool)
    ends = stop_tokens(model, stop)
    text, lengths = as_batch(model, tokens)
    ragged = len(set(lengths)) > 1
    if ragged:
        check_ragged(model, max(lengths) + n)

    device, prompt = text.device, text.shape[1]
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    cache = model.new_cache(len(text), prompt + n) if use_cache else None
    at = torch.tensor(lengths, device=device)  # of each row's next token
    rows = torch.arange(len(text), device=device)
    ending = torch.tensor(ends, dtype=text.dtype, device=device)
    pad = padding(model, ends)
    done = torch.zeros(len(text), dtype=torch.bool, device=device)
    text = torch.cat((text, text.new_zeros(len(text), n)), dim=1)
    steps = progress_bar(range(n), desc="generate", unit="token") if progress else range(n)
    for step in steps:
        longest = prompt + step
        if cache is None:
            hidden = model.hidden(text[:, :longest])[rows, at - 1]
        elif step and not becomes_long(model, cache, longest):
            hidden = model.hidden(text[rows, at - 1][:, None], cache)[:, 0]
        else:  # the prompt; or a text that becomes long: its keys need LongRoPE's other angles, all together
            if step:
                cache.reset()
            hidden = prefill(model, text[:, :longest], at, cache, longest if step else chunk or longest)
        token = sample(model.logits(hidden), temperature, top_p, generator, top_k)
        if pad is not None:
            token = token.masked_fill(done, pad)
            done |= torch.isin(token, ending)
        text[rows, at] = token
        at += 1
        if pad is not None and bool(done.all()):
            break
    if isinstance(tokens, Tensor):
        return text[:, : prompt + step + 1]
    return [up_to_stop(row[:end], length, ends) for row, length, end in zip(text, lengths, at, strict=True)]


def check_sampling(temperature: float, top_k: int | None, top_p: float) -> None:
    """Raise ValueError or TypeError for options that ``sample`` cannot use."""
    if validate.finite("temperature", temperature) < 0:
        raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature}")
    if top_k is not None:
        validate.positive("top_k", top_k)
    if not 0 < validate.finite("top_p", top_p) <= 1:
        raise ValueError(f"top_p: expected a probability above 0 and at most 1, got {top_p}")


def stop_tokens(model: Decoder, stop: int | Sequence[int] | None) -> list[int]:
    """``stop`` as a list, checked; the model's own if it is None."""
    if stop is None:
        return list(model.config.stop_tokens)
    if isinstance(stop, Tensor) and stop.dim() < 2:
        stop = stop.tolist()
    if not isinstance(stop, list | tuple | set | frozenset | range):
        stop = [stop]  # type: ignore[list-item]
    most, because = model.config.vocab_size - 1, f"vocab_size={model.config.vocab_size}"
    return [validate.at_most("stop", validate.at_least("stop", token, 0), most, because) for token in stop]


def padding(model: Decoder, ends: list[int]) -> int | None:
    """The token that follows a row's end: the model's ``pad_token``, or the first of ``ends``."""
    if not ends:
        return None
    pad = model.config.pad_token
    return ends[0] if pad is None or not 0 <= pad < model.config.vocab_size else pad


def as_batch(model: Decoder, tokens: Tensor | Sequence[Any]) -> tuple[Int[Tensor, "B T"], list[int]]:
    """``tokens`` as one tensor, padded with zeros on the right, and the length of each row."""
    device = model.embed.weight.device
    if isinstance(tokens, Tensor):
        validate.tensor("tokens", tokens, ("batch", "time"), device=device)
        for dimension, what in enumerate(("batch", "time")):
            validate.positive(f"tokens.shape[{dimension}] ({what})", tokens.shape[dimension])
        validate.integers("tokens", tokens)
        return tokens.long(), [tokens.shape[1]] * len(tokens)
    validate.instance("tokens", tokens, (Tensor, list, tuple))
    validate.positive("len(tokens)", len(tokens))
    rows = []
    for i, row in enumerate(tokens):
        name = f"tokens[{i}]"
        if not isinstance(row, Tensor):
            validate.instance(name, row, (Tensor, list, tuple))
            row = torch.tensor([validate.at_least(name, token, 0) for token in row], dtype=torch.long)
        validate.tensor(name, row, ("time",))
        validate.positive(f"{name}.shape[0] (time)", len(row))
        validate.integers(name, row)
        rows.append(row.to(device, torch.long))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), [len(row) for row in rows]


def check_ragged(model: Decoder, longest: int) -> None:
    """Raise ValueError if rows of different length would influence each other by the angles of RoPE."""
    for part in model.modules():
        rope = part.config if isinstance(part, Rope) else None
        if rope is not None and rope.depends_on_length and longest > rope.scaling.original_max_len:  # type: ignore[union-attr]
            raise ValueError(
                f"tokens: expected prompts of one length, since the angles of {type(rope.scaling).__name__} "
                f"depend on the longest row past {rope.scaling.original_max_len} tokens; "  # type: ignore[union-attr]
                "generate these prompts one by one"
            )


def becomes_long(model: Decoder, cache: DecoderCache, longest: int) -> bool:
    """Whether the next token is the first one past the length at which LongRoPE changes its angles."""
    scaling = None if model.config.rope is None else model.config.rope.scaling
    return isinstance(scaling, LongRopeScaling) and cache.length <= scaling.original_max_len < longest


def prefill(
    model: Decoder, text: Int[Tensor, "B T"], lengths: Int[Tensor, "B"], cache: DecoderCache, chunk: int
) -> Float[Tensor, "B M"]:
    """Feed ``text`` to an empty ``cache``; the hidden state of each row's last token, at its own length."""
    last = model.embed.weight.new_empty(len(text), model.config.d_model)
    ragged = bool((lengths < text.shape[1]).any())
    if ragged:
        check_can_trim(model, cache)
    for start in range(0, text.shape[1], chunk):
        piece = text[:, start : start + chunk]
        hidden, at = model.hidden(piece, cache), lengths - 1 - start
        inside = ((at >= 0) & (at < piece.shape[1])).nonzero()[:, 0]
        last[inside] = hidden[inside, at[inside]].to(last.dtype)
    if ragged:
        check_can_trim(model, cache)
        cache.trim(lengths)
    return last


def check_can_trim(model: Decoder, cache: DecoderCache) -> None:
    """Raise ValueError that names the layer whose cache cannot be cut back to the rows' own lengths."""
    for number, (mixer, part) in enumerate(zip(model.mixers, cache.layers, strict=True)):
        if not part.can_trim:
            raise ValueError(
                f"tokens: expected prompts of one length, since layer {number} ({mixer.label}) keeps a "
                f"{type(part).__name__}, which cannot forget padding; generate these prompts one by one"
            )


def up_to_stop(row: Int[Tensor, "T"], prompt: int, ends: list[int]) -> Int[Tensor, "_"]:
    """``row`` without what follows the first of ``ends`` past its prompt."""
    for i, token in enumerate(row[prompt:].tolist(), prompt):
        if token in ends:
            return row[: i + 1].clone()
    return row.clone()


def sample(
    logits: Float[Tensor, "B V"],
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    top_k: int | None = None,
) -> Int[Tensor, "B"]:
    """One token per row: the most likely one at temperature 0, else drawn from the most likely ones.

        p = softmax(logits / temperature),  of it the ``top_k`` largest,  of these the nucleus of ``top_p``

    A temperature near 0 gives the most likely token, as the limit does. Raises ValueError for NaN.
    Sources: Fan et al., "Hierarchical Neural Story Generation" (2018), section 5.1 (``top_k``); Holtzman et
    al., "The Curious Case of Neural Text Degeneration" (2019), section 3.1 (``top_p``).
    """
    if logits.device.type == "cpu" and bool(logits.isnan().any()):
        raise ValueError("logits: expected numbers, got NaN: the weights or the cache hold NaN or infinity")
    if temperature == 0:
        return logits.argmax(-1)
    # From the largest logit down: the others may overflow to -inf, which is a probability of 0.
    logits, order = logits.float().sort(dim=-1, descending=True)
    top, (least, most) = logits[..., :1], TEMPERATURES
    below = torch.where(logits == top, 0.0, (logits - top) / min(max(temperature, least), most))
    probabilities = below.softmax(-1)
    if top_k is not None:
        probabilities[..., top_k:] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    outside = before >= top_p
    outside[..., 0] = False  # the most likely token stays, however small top_p is
    choice = torch.multinomial(probabilities.masked_fill(outside, 0), 1, generator=generator)
    return order.gather(-1, choice)[:, 0]
