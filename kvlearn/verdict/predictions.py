"""The article's three predictions as tests: an exact criterion, what to look up and where, today's state.

Each ``state`` is counted from the models of chapter 07, or from models that the reader adds when the day has
come: ``ModelShape`` is filled from a model's config.json.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

from kvlearn.measure import DEVICES, MODELS, Load
from kvlearn.measure.cache_size import ModelShape
from kvlearn.measure.cost import batch_step_seconds
from kvlearn.verdict.claim import Verdict
from kvlearn.verdict.released import (
    RELEASED,
    has_latents,
    has_selection,
    has_state,
    mostly_windows,
    shares_heads,
    without_sharing,
)

LONG, MILLION = 256_000, 1_000_000  # tokens


@dataclass(frozen=True)
class Counted:
    """How many of the models that were counted have a property, and those that do not."""

    have: tuple[str, ...]
    lack: tuple[str, ...]

    @property
    def total(self) -> int:
        return len(self.have) + len(self.lack)

    @property
    def all(self) -> bool:
        return not self.lack

    def __str__(self) -> str:
        return f"{len(self.have)} of {self.total}"


def count(models: Sequence[ModelShape], has: Callable[[ModelShape], bool]) -> Counted:
    """Which of ``models`` have a property, by name."""
    found = {model.name: has(model) for model in models}
    return Counted(
        tuple(name for name, has in found.items() if has),
        tuple(name for name, has in found.items() if not has),
    )


@dataclass(frozen=True)
class SmallCaches:
    """The source of P1's numbers."""

    shared_or_latent: Counted
    windows: Counted
    long_with_latents: Counted

    @property
    def holds(self) -> bool:
        """All share or compress; most have windows in half of their layers; most long ones latents."""
        most = (2 * len(found.have) > found.total for found in (self.windows, self.long_with_latents))
        return self.shared_or_latent.all and all(most)


def small_caches(models: Sequence[ModelShape] = RELEASED) -> SmallCaches:
    """P1: sharing or latents by default, windows as the baseline, latents for long contexts."""
    long = [model for model in models if model.context >= LONG]
    return SmallCaches(
        count(models, lambda model: shares_heads(model) or has_latents(model)),
        count(models, mostly_windows),
        count(long, has_latents),
    )


def million_tokens(models: Sequence[ModelShape] = RELEASED) -> dict[str, tuple[str, ...]]:
    """P2: of the models made for a million tokens, which of its three means each has."""
    means = {"window": mostly_windows, "latents": has_latents, "selection": has_selection, "state": has_state}
    return {
        model.name: tuple(name for name, has in means.items() if has(model))
        for model in models
        if model.context >= MILLION
    }


def gain_by_compression(length: int = 131_072) -> dict[str, float]:
    """P3: on each device, how many times faster one user's step gets by the same compression."""
    model = MODELS["Llama 3.1 8B"]
    plain, small = Load.of(without_sharing(model), length), Load.of(model, length)
    return {
        device.name: batch_step_seconds(plain, device, 1) / batch_step_seconds(small, device, 1)
        for device in DEVICES.values()
    }


@dataclass(frozen=True)
class Prediction:
    """A prediction with the day, the criterion and the place by which it is read off.

    ``today``: the verdict that can be given before the day, with its ``note``. ``state``: the count of today,
    in words.
    """

    id: str
    topic: str
    claimed: str
    due: date
    criterion: str
    look_up: str
    state: Callable[[], str]
    today: Verdict
    note: str
    published: str = ""


def _small_caches_now() -> str:
    found = small_caches()
    return (
        f"of the {len(RELEASED)} models of chapter 07, {found.shared_or_latent} share heads or keep latents "
        f"(lacking: {', '.join(found.shared_or_latent.lack) or 'none'}); {found.windows} have windows in "
        f"half of their layers or more; of those made for 256K tokens, {found.long_with_latents} keep latents"
    )


def _million_now() -> str:
    found = million_tokens()
    return "models of chapter 07 made for 1M tokens: " + "; ".join(
        f"{name} by {' and '.join(means) or 'none of the three'}" for name, means in found.items()
    )


def _gain_now() -> str:
    gains = gain_by_compression()
    return (
        f"4x fewer KV heads at 128K make one user's step {min(gains.values()):.2f} to "
        f"{max(gains.values()):.2f} times faster on all {len(gains)} devices of the course"
        + (": bandwidth cancels" if max(gains.values()) < 1.01 * min(gains.values()) else "")
    )


PREDICTIONS = (
    Prediction(
        "P1",
        "sharing or MHC by default",
        "By the first quarter of 2027 every major open model has KV sharing or MHC by default; Mistral's "
        "window is the baseline, MHC the premium for long contexts.",
        date(2027, 3, 31),
        "take the ten most downloaded open models for text generation released after May 2026, one per "
        "maker. All have fewer KV heads than heads, latents, or layers that share a cache; more than half "
        "have a window in at least half of the layers; of those made for 256K tokens more than half "
        "have latents.",
        "Hugging Face, models sorted by downloads, task text-generation; in each config.json "
        "num_key_value_heads, kv_lora_rank, num_kv_shared_layers, sliding_window, layer_types, "
        "max_position_embeddings. Then small_caches(models).holds",
        _small_caches_now,
        Verdict.CONDITIONS,
        "Sharing holds already. Windows as the baseline and latents for long contexts do not, today.",
        "the sources in kvlearn.measure.models",
    ),
    Prediction(
        "P2",
        "1M tokens in APIs by 2028",
        "The largest practical context of production APIs reaches 1M tokens by 2028, by a window (local), "
        "MHC (memory) and sparse attention (long range).",
        date(2028, 12, 31),
        "three makers' APIs take 1M tokens of text at general availability, and RULER at 1M is at least 85% "
        "of its score at 4K for one of them; and one of these models documents all three means in one model.",
        "the makers' documentation of models and limits; the RULER repository and the model cards; the "
        "technical reports, for the means. Then million_tokens(models)",
        _million_now,
        Verdict.CONDITIONS,
        "The length holds already, as what an API takes. The means do not: how the closed models do it is "
        "not published, and the open ones above use states.",
        "Google Cloud documentation (2024): Gemini 1.5 with up to 2M tokens; Anthropic's documentation "
        "(2026): models with 1M; DeepSeek-V4 (2026): 1M by a window, a compressed sequence and a selection",
    ),
    Prediction(
        "P3",
        "memory-efficient hardware: 10x",
        "A new category of memory-efficient hardware (Groq, Cerebras) gains 10x on compressed attention over "
        "general-purpose processors.",
        date(2028, 12, 31),
        "in one round of MLPerf Inference, closed division, an accelerator that is not a GPU makes ten times "
        "the tokens per second per accelerator of the best GPU on DeepSeek-R1 (which has MLA), and not ten "
        "times on Llama 3.1 405B (which has not): a gain on both is bandwidth, not compression.",
        "MLCommons, results of MLPerf Inference: Datacenter. The article gives no year; 2028 is ours",
        _gain_now,
        Verdict.OPEN,
        "Only a common benchmark could say. We found no entry of Groq or Cerebras for it.",
        "MLPerf Inference has Llama 3.1 405B since v5.0 and DeepSeek-R1 since v5.1 (MLCommons, 2025)",
    ),
)


def table() -> list[dict[str, str]]:
    """The three predictions, a row each: day, criterion, place, state."""
    return [
        {
            "": p.id,
            "read off on": p.due.isoformat(),
            "holds if": p.criterion,
            "look up": p.look_up,
            "today": p.state(),
        }
        for p in PREDICTIONS
    ]
