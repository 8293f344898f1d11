"""02.7: two layers on one cache, held against one pass over the whole sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.attention import KVCache, Rope, RopeConfig
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="02.7",
    slug="step",
    title="A step of two layers on one cache",
    answers=("shared_step",),
    may_use_kvlearn=True,
    hints=(
        "The owner does all that a layer of chapter 01 does: positions, rotate q and k, append, attend "
        "with a mask. The reader does only two things: rotate its own queries, attend.",
        "Ask for the positions once, `positions = cache.positions(T)`, before the append. Both layers' "
        "tokens are the same tokens at the same places, so the reader's queries turn by the same "
        "positions.",
        "`keys, values, _ = cache.append(rope(owner.k(x_owner), positions), owner.v(x_owner))` gives all "
        "keys, rotated already. Hand the same `keys, values` to both layers; turn and append nothing "
        "again.",
        "One mask for both: `core.causal_mask(T, keys.shape[2])`. Then "
        "`core.attention(rope(reader.q(x_reader), positions), keys, values, mask)`.",
    ),
)


class Layer:
    """A layer's projections to heads, and the record of which were used."""

    def __init__(self, t: Trial, M: int, H: int, D: int) -> None:
        self.weights = {name: t.randn(H * D, M) * M**-0.5 for name in "qkv"}
        self.n_heads = H
        self.used: set[str] = set()

    def project(self, name: str, x: Tensor) -> Tensor:
        """x (B, T, M) to heads (B, H, T, D), not rotated."""
        return (x @ self.weights[name].T).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def q(self, x: Tensor) -> Tensor:
        self.used.add("q")
        return self.project("q", x)

    def k(self, x: Tensor) -> Tensor:
        self.used.add("k")
        return self.project("k", x)

    def v(self, x: Tensor) -> Tensor:
        self.used.add("v")
        return self.project("v", x)


class Model:
    """Two layers on one cache, and the sequence that they are fed: x for each layer, in chunks."""

    def __init__(self, t: Trial, shared_step: Answer, *chunks: int) -> None:
        B, H, D, M = t.pick(2, 3), t.pick(5, 7), 16, 24
        self.t, self.shared_step = t, shared_step
        self.owner, self.reader = Layer(t, M, H, D), Layer(t, M, H, D)
        self.rope, self.chunks = Rope(D, RopeConfig()), chunks
        self.xs = t.randn(B, sum(chunks), M), t.randn(B, sum(chunks), M)
        # Twice the room: a step that writes twice is to be named for it, not to meet a full cache.
        self.cache = KVCache(B, H, 2 * sum(chunks) + 2, D, torch.float32, torch.device("cpu"))
        self.lengths: list[int] = []  # of the cache, after each step
        self.positions = torch.arange(sum(chunks))[None]
        k = self.rope(self.owner.project("k", self.xs[0]), self.positions)
        self.kv = k, self.owner.project("v", self.xs[0])

    def want(self) -> list[Tensor]:
        """Both layers' outputs for the whole sequence: causal attention over the owner's keys and values."""
        queries = (self.owner.project("q", self.xs[0]), self.reader.project("q", self.xs[1]))
        return [
            F.scaled_dot_product_attention(self.rope(q, self.positions), *self.kv, is_causal=True)
            for q in queries
        ]

    def run(self) -> list[list[Tensor]]:
        """What the answer gives for each chunk: [of the owner, of the reader]."""
        got = []
        for x_owner, x_reader in zip(*(x.split(self.chunks, dim=1) for x in self.xs), strict=True):
            outs = self.shared_step(x_owner, x_reader, self.owner, self.reader, self.cache, self.rope)
            self.lengths.append(self.cache.length)
            got.append(list(self.t.pair(outs, "a pair of tensors, (out_owner, out_reader)")))
        return got

    def compare(self, *which: str) -> None:
        """Chunk by chunk, the outputs of these layers."""
        names, got = ("the owner's output:", "the reader's output:"), self.run()
        wanted = [w.split(self.chunks, dim=2) for w in self.want()]
        for i, outs in enumerate(got):
            for layer in (0, 1):
                if ("owner", "reader")[layer] in which:
                    self.t.close(outs[layer], wanted[layer][i], names[layer], tolerance=1e-3)


@EXERCISE.requirement(1, "the owner", rounds=2)
def owner(t: Trial, shared_step: Answer) -> None:
    """out_owner as in chapter 01: a prompt, then one token at a time, over its own keys and values"""
    Model(t, shared_step, t.integer(4, 6), 1, 1).compare("owner")


@EXERCISE.requirement(1, "the reader, for a prompt", rounds=2)
def prompt(t: Trial, shared_step: Answer) -> None:
    """out_reader: the reader's queries over the owner's keys and values, each token up to itself"""
    Model(t, shared_step, t.integer(5, 8)).compare("reader")


@EXERCISE.requirement(2, "the reader, one token at a time", rounds=2)
def decode(t: Trial, shared_step: Answer) -> None:
    """the same when the prompt is in the cache: the positions go on, the new token's key is there"""
    Model(t, shared_step, t.integer(4, 6), 1, 1).compare("reader")


@EXERCISE.requirement(1, "several tokens behind a prompt", rounds=2)
def chunk(t: Trial, shared_step: Answer) -> None:
    """both outputs for a chunk that continues what is in the cache"""
    Model(t, shared_step, t.integer(4, 6), 3).compare("owner", "reader")


@EXERCISE.requirement(1, "one cache, written once", rounds=2)
def once(t: Trial, shared_step: Answer) -> None:
    """each step appends its T tokens once, the owner's rotated keys and its values; the reader projects
    nothing but queries; the inputs are unchanged"""
    model = Model(t, shared_step, 4, 1)
    model.run()
    before, after = model.lengths
    if t.true((before, after) == (4, 5), "4 tokens in the cache, then 5", f"{before} tokens, then {after}"):
        for got, want, name in zip((model.cache.k, model.cache.v), model.kv, ("keys", "values"), strict=True):
            t.close(got[:, :, :5], want, f"the {name} in the cache:", tolerance=1e-3)
    extra = sorted(model.reader.used - {"q"})
    came = f"the reader's {' and '.join(extra)} too"
    t.true(not extra, "the reader's q projection alone", came)
    t.unchanged()
