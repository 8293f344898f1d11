"""A decoder language model that takes any mechanism of the course in any layer.

RMSNorm before each part and no bias; SwiGLU; RoPE inside the mechanisms; the output shares its weights with
the embedding. ``ModelConfig`` has what other models do instead. The cache of the model is a list of its
layers' caches.

Letters beside those of core.py: V tokens of the vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention import KV, REGISTRY, Cache, DecodeStep, LatentStep, Mechanism, NoCache
from kvlearn.model.config import ModelConfig
from kvlearn.model.feed_forward import SwiGLU
from kvlearn.model.moe import MoE
from kvlearn.model.table import LENGTHS, BytesTable


def new_norm(config: ModelConfig) -> nn.RMSNorm | nn.LayerNorm:
    """RMSNorm, or LayerNorm with its bias."""
    kind = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[config.norm]
    return kind(config.d_model, eps=config.norm_eps)


def norm_at(where: str, config: ModelConfig) -> nn.Module:
    """The norm of a part's input ("pre") or output ("post"), if this model has one there."""
    return new_norm(config) if config.norms in (where, "both") else nn.Identity()


class Block(nn.Module):
    """One layer: the mechanism mixes tokens, then a feed-forward works on each; both add to the stream.

        x = x + norm(mixer(norm(x))),    x = x + norm(mlp(norm(x)))

    of which most models have only the inner norms (``ModelConfig.norms``). The feed-forward is SwiGLU or a
    mixture of experts. With ``d_ff`` of 0 there is none: a Mamba block is its own feed-forward, RWKV's is a
    separate layer. ``number`` counts layers from 0, ``owner`` is the layer whose keys and values this one
    reads, ``is_read`` says whether later layers read this one's.
    """

    def __init__(self, mixer: Mechanism, config: ModelConfig, number: int) -> None:
        super().__init__()
        assert config.d_ff is not None
        self.number, self.owner = number, config.owners[number]
        self.is_read = config.owners.count(number) > 1
        self.mixer_norm, self.mixer_post_norm = norm_at("pre", config), norm_at("post", config)
        self.mixer = mixer
        self.mlp: SwiGLU | MoE | None = None
        if config.experts is not None and number not in config.dense_layers:
            self.mlp = MoE(config.d_model, config.experts)
        elif config.d_ff:
            self.mlp = SwiGLU(config.d_model, config.d_ff, config.activation, config.mlp_bias)
        if self.mlp is not None:
            self.mlp_norm, self.mlp_post_norm = norm_at("pre", config), norm_at("post", config)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None, shared: dict[int, KV]
    ) -> Float[Tensor, "B T M"]:
        """``shared``: the keys and values of earlier layers that later ones read, by their numbers."""
        mixed = self.mixer_norm(x)
        if self.is_read:
            shared[self.number] = self.mixer.project_kv(mixed, cache)
        x = x + self.mixer_post_norm(self.mixer(mixed, cache, shared.get(self.owner)))
        return x if self.mlp is None else x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


class DecoderCache:
    """The caches of all layers, changed together; ``owners`` are those that store anything."""

    def __init__(self, layers: list[Cache]) -> None:
        self.layers = layers
        self.owners = [cache for cache in layers if not isinstance(cache, NoCache)]

    @property
    def nbytes(self) -> int:
        """Bytes really allocated by all layers."""
        return sum(cache.nbytes for cache in self.layers)

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return self.owners[0].length

    def trim(self, lengths: Int[Tensor, "B"]) -> None:
        """Cut every row back to its own length, in every layer or in none.

        Raises ValueError if a layer cannot, such as a state, which contains the padding too. Such a model
        needs prompts of one length, or one cache per prompt.
        """
        for cache in self.owners:
            cache.check_lengths(lengths)
        for cache in self.owners:
            cache.trim(lengths)

    def reset(self) -> None:
        """Empty every layer's cache."""
        for cache in self.owners:
            cache.reset()


def tie_loaded(decoder: nn.Module, _: Any) -> None:
    """Called after ``load_state_dict``, which with ``assign=True`` replaces every parameter."""
    assert isinstance(decoder, Decoder)
    decoder.tie()


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; those on "meta" hold none."""
    if a.is_meta or b.is_meta:
        return True
    return a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def draw(weight: Tensor, std: float) -> None:
    """Normal numbers; none on the device "meta", where torch takes 5 ms per matrix to draw nothing."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


class Decoder(nn.Module):
    """Tokens in, logits of the next token out; with a cache, the tokens continue the sequence in it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_norm = new_norm(config) if config.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList()
        for number, spec in enumerate(config.specs):
            common = {"head_dim": config.head_dim, "rope": config.rope}
            options: dict[str, Any] = {k: v for k, v in common.items() if k in spec.parameters} | spec.options
            if spec.reads is not None and spec.reading is not None:
                options[spec.reading] = True
            n_heads = options.pop("n_heads", config.n_heads)
            mixer = REGISTRY[spec.name](config.d_model, n_heads, **options)
            self.blocks.append(Block(mixer, config, number))
        self.norm = new_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        self.apply(self._initialise)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # up to 2 · n_layers of them add up
                draw(weight, std=0.02 / (2 * config.n_layers) ** 0.5)
        for mixer in self.mixers:
            mixer.initialise()
        self.tie()
        self.register_load_state_dict_post_hook(tie_loaded)

    def tie(self) -> None:
        """Make output and embedding one matrix, if ``config.tied``; what replaces parameters parts them."""
        if self.config.tied:
            self.head.weight = self.embed.weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """With ``config.tied`` the output's matrix may be missing; it may not differ from the embedding's."""
        embed, head = (state_dict.get(f"{prefix}{name}.weight") for name in ("embed", "head"))
        if self.config.tied and isinstance(embed, Tensor):
            if isinstance(head, Tensor) and not equal(embed, head):
                raise ValueError(
                    "state_dict: expected head.weight equal to embed.weight, since config.tied makes them one"
                )
            state_dict[f"{prefix}head.weight"] = embed
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        """Moves or converts all tensors; ``to_empty`` makes a new parameter for each name of a shared one."""
        super()._apply(fn, recurse)
        self.tie()
        return self

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            draw(module.weight, std=0.02)

    def forward(
        self, tokens: Integer[Tensor, "B T"], cache: DecoderCache | None = None
    ) -> Float[Tensor, "B T V"]:
        """Logits (batch, time, vocabulary) for the token after each of ``tokens``."""
        return self.logits(self.hidden(tokens, cache))

    def logits(self, hidden: Float[Tensor, "... M"]) -> Float[Tensor, "... V"]:
        """Logits of the next token, from ``hidden``."""
        logits, cap = self.head(hidden), self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def hidden(
        self, tokens: Integer[Tensor, "B T"], cache: DecoderCache | None = None
    ) -> Float[Tensor, "B T M"]:
        """The last layer's output for each token, normalised: all of ``forward`` but ``logits``."""
        validate.tensor("tokens", tokens, ("batch", "time"), device=self.embed.weight.device)
        validate.integers("tokens", tokens)
        if tokens.numel() and validate.may_read(tokens):
            least, most = (int(bound) for bound in tokens.aminmax())
            if least < 0 or most >= self.config.vocab_size:
                raise ValueError(f"tokens: expected 0 to {self.config.vocab_size - 1}, got {least} to {most}")
        if cache is not None:
            layers = validate.instance("cache", cache, DecoderCache).layers
            if len(layers) != len(self.blocks):
                raise ValueError(f"cache: expected {len(self.blocks)} layers, got {len(layers)}")
            lengths = [owner.length for owner in cache.owners]
            if len(set(lengths)) > 1:  # a forward was interrupted between two layers
                raise ValueError(f"cache: expected layers of one length, got {lengths}; reset it")
        shared: dict[int, KV] = {}
        x = self.embed(tokens.long())
        if self.config.embed_scale != 1:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype)  # rounded to it, as when trained
        x = self.embed_norm(x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.layers[i], shared)
        return self.norm(x)

    @property
    def mixers(self) -> list[Mechanism]:
        """The mechanism of each layer."""
        return [block.mixer for block in self.blocks]  # type: ignore[misc]

    @property
    def n_parameters(self) -> int:
        """Trained numbers, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def n_active_parameters(self) -> int:
        """Trained numbers that one token uses: without the experts that are not chosen for it."""
        mixtures = [part for part in self.modules() if isinstance(part, MoE)]
        idle = sum(sum(p.numel() for p in moe.parameters()) - moe.n_active_parameters for moe in mixtures)
        return self.n_parameters - idle

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> DecoderCache:
        """An empty cache for up to ``max_len`` tokens in every layer."""
        return DecoderCache([mixer.new_cache(batch, max_len, dtype, device) for mixer in self.mixers])

    def decode_with(self, step: DecodeStep | None, latent_step: LatentStep | None = None) -> None:
        """Let ``step`` compute the attention of one token in every layer that supports it; None removes it.

        ``latent_step`` is the same for layers that cache a latent. ``kvlearn.kernels`` has both:
        ``decode_attention`` and ``decode_latent``. Raises ValueError for a step that no layer can use.
        """
        for name, given, attribute in (
            ("step", step, "decode"),
            ("latent_step", latent_step, "decode_latent_step"),
        ):
            able = [
                part for part in self.modules() if isinstance(part, Mechanism) and hasattr(part, attribute)
            ]
            if given is not None:
                validate.function(name, given)
            if given is not None and not able:
                raise ValueError(f"{name}: no layer of {self.config.layers} can decode by another's function")
            for mixer in able:
                setattr(mixer, attribute, given)

    def table(self, *lengths: int, batch: int = 1, dtype: torch.dtype | None = None) -> BytesTable:
        """Bytes STORED at each of ``lengths`` and READ by a step there: one row per layer, then the total.

        The lengths are 4K, 32K, 128K and 1M unless given. With a single one the columns are "stored" and
        "read". A layer that reads another's keys and values stores none, and reads as many as its owner.
        """
        lengths = lengths or LENGTHS
        layers = [
            (
                mixer.label if owner == i else f"{mixer.label}, reads layer {owner}",
                [
                    (
                        mixer.cache_bytes(length, batch=batch, dtype=dtype),
                        mixer.read_bytes(length, batch=batch, dtype=dtype),
                    )
                    for length in lengths
                ],
            )
            for i, (mixer, owner) in enumerate(zip(self.mixers, self.config.owners, strict=True))
        ]
        return BytesTable(layers, lengths)

    @overload
    def generate(self, tokens: Tensor, n: int, **options: Any) -> Tensor: ...

    @overload
    def generate(self, tokens: Sequence[Any], n: int, **options: Any) -> list[Tensor]: ...

    def generate(self, tokens: Tensor | Sequence[Any], n: int, **options: Any) -> Tensor | list[Tensor]:
        """``tokens``, or each prompt of a list, continued by up to ``n``: ``kvlearn.model.generate``.

        Options: ``temperature``, ``top_k``, ``top_p``, ``stop``, ``seed``, ``chunk``, ``use_cache`` and
        ``progress``.
        """
        from kvlearn.model.generation import generate

        return generate(self, tokens, n, **options)
