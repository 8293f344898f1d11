"""Generation: prefill the prompt, whole or in chunks, then one token per step."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.attention import LongRopeScaling
from kvlearn.extras import progress_bar
from kvlearn.model.decoder import Decoder


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Int[Tensor, "B T"],
    n_new: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[int] | None = None,
    seed: int | None = None,
    chunk: int | None = None,
    use_cache: bool = True,
    progress: bool = False,
) -> Int[Tensor, "B _"]:
    """``tokens`` followed by ``n_new`` generated ones, or fewer if every row has met a stop token.

    ``temperature`` 0 is greedy; above, logits are divided by it and sampled from the smallest set of tokens
    that holds ``top_p`` of the probability. ``seed`` makes sampling repeatable. A row ends with the first
    token of ``stop`` that it generates (the model's ``stop_tokens`` unless given; () for none); it is filled
    up with the model's ``pad_token`` or the first of ``stop`` while other rows go on. ``chunk`` tokens of the
    prompt are fed at a time (all at once by default). ``use_cache=False`` computes all tokens again at every
    step: the same result, at the cost of having no cache.
    """
    validate.tensor("tokens", tokens, ("batch", "time"))
    validate.at_least("tokens.shape[1] (time)", tokens.shape[1], 1)
    validate.positive("n_new", n_new)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a probability above 0 and at most 1, got {top_p}")
    chunk = validate.positive("chunk", tokens.shape[1] if chunk is None else chunk)

    generator = torch.Generator(tokens.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    cache = model.new_cache(len(tokens), tokens.shape[1] + n_new) if use_cache else None
    out = tokens
    scaling = None if model.config.rope is None else model.config.rope.scaling
    switch = scaling.original_max_len if isinstance(scaling, LongRopeScaling) else None
    stop = model.config.stop_tokens if stop is None else stop
    ends = torch.tensor(list(stop), dtype=tokens.dtype, device=tokens.device)
    pad = model.config.pad_token
    pad = stop[0] if stop and pad is None else pad
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    steps = progress_bar(range(n_new), desc="generate", unit="token") if progress else range(n_new)
    for _ in steps:
        if cache is None:
            hidden = model.hidden(out)
        else:
            size = chunk
            if switch is not None and 0 < cache.length <= switch < out.shape[1]:
                cache.reset()  # the text becomes long: its keys need LongRoPE's other angles, all together
                size = out.shape[1]
            for piece in out[:, cache.length :].split(size, dim=1):
                hidden = model.hidden(piece, cache)
        token = sample(model.logits(hidden[:, -1]), temperature, top_p, generator)
        if pad is not None and stop:
            token = token.masked_fill(done, pad)
            done |= torch.isin(token, ends)
        out = torch.cat((out, token[:, None]), dim=1)
        if stop and bool(done.all()):
            break
    return out


def sample(
    logits: Float[Tensor, "B V"], temperature: float, top_p: float, generator: torch.Generator
) -> Int[Tensor, "B"]:
    """One token per row: the most likely one at temperature 0, else drawn from the nucleus of ``top_p``.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019), section 3.1.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities  # 0 before the most likely token: always kept
    choice = torch.multinomial(probabilities.masked_fill(before >= top_p, 0), 1, generator=generator)
    return order.gather(-1, choice)[:, 0]
