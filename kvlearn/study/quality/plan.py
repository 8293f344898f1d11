"""The plan of the study: which designs are trained, how long, in which order, in which parts.

A preset has tiers, a tier has parts, a part has runs. Every run has a name that is its identity in results/
and in runs/, and settings that say everything about it. A learning rate of None is chosen when the run
starts: the best of ``candidates``, shorter runs of one seed.

Designs are sized relative to the model and the training length L: at L tokens, ``gqa-4x``, ``mhc-4x``,
``window`` and the states of ``gated-delta``, ``mamba2`` and ``linear`` store the same bytes, a quarter of
full attention's (on the GPU the states less). Models are parameter-matched: the width of the MLP is adapted
until the number of parameters is that of full attention.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch

from kvlearn import validate
from kvlearn.model import Decoder, ModelConfig, Spec
from kvlearn.study.base import TRAINING as BASE_TRAINING
from kvlearn.study.conversion import RUNS as CONVERSIONS
from kvlearn.study.recall import HEAD, Recall, Task
from kvlearn.study.tasks import Induction, Needle, SelectiveCopy
from kvlearn.study.training import TrainConfig

Layers = tuple[Spec, ...]


@cache
def designs(model: ModelConfig, length: int) -> dict[str, Layers]:
    """Every design of the study by its name, as the pattern of its layers."""
    D = model.head_dim or model.d_model // model.n_heads
    H = model.n_heads
    quarter = H * D // 2  # numbers per token and layer: a quarter of 2 · H · D
    window, block = length // 4, length // 16
    n_sinks = min(4, window // 2)
    most = min(length // 8, 4 * D, 128)  # of the keys of a state
    delta = _fitted(
        model,
        length,
        lambda K: Spec("gated_delta", key_dim=K, head_dim=2 * D, n_key_heads=H // 2),
        most,
    )
    full = Spec("full")
    narrow = Spec("window", window=window - n_sinks, n_sinks=n_sinks)
    bigbird = f"local({length // 8}, block={block}) | global(4) | random(2, block={block}, skip_last=1)"
    return {
        "full": (full,),
        "gqa-4x": (Spec("gqa", n_kv_heads=H // 4),),
        "mhc-4x": (Spec("mhc", rank=quarter - D, rope_dim=D),),
        "window": (narrow,),
        "bigbird": (Spec("sparse", pattern=bigbird),),
        "gated-delta": (delta,),
        "mamba2": (_fitted(model, length, lambda N: Spec("mamba2", d_state=N), most),),
        "hybrid": (delta, delta, delta, full),
        # The control of designs that come with a short convolution: it is here, and no state is.
        "hybrid-conv": (Spec("short_conv"), full),
        "gqa-2x": (Spec("gqa", n_kv_heads=H // 2),),
        "gqa-8x": (Spec("gqa", n_kv_heads=H // 8),),
        "cross-layer": (full, Spec("full", reads=-1)),
        "mhc-8x": (Spec("mhc", rank=quarter // 2 - D, rope_dim=D),),
        "mhc-transformer-4x": (Spec("mhc_transformer", rank=quarter - D, rope_dim=D),),
        "mhc-transformer-8x": (Spec("mhc_transformer", rank=quarter // 2 - D, rope_dim=D),),
        "mla-4x": (Spec("mla", rank=quarter - D, rope_dim=D),),
        "window-no-sinks": (Spec("window", window=window),),
        "longformer": (Spec("sparse", pattern=f"local({length // 8}) | global(4)"),),
        "moba": (Spec("moba", block=block, n_blocks=4),),
        "nsa": (
            Spec(
                "nsa",
                compress=block // 2,
                stride=block // 4,
                block=block,
                n_blocks=4,
                n_local=2,
                window=length // 8,
            ),
        ),
        "linear": (_fitted(model, length, lambda K: Spec("linear", key_dim=K, head_dim=2 * D), most),),
        "kda": (Spec("kda"),),
        "mamba": (Spec("mamba"),),
        "rwkv7": (Spec("rwkv7"),),
        "hybrid-window-mhc": (narrow, narrow, narrow, Spec("mhc", rank=quarter - D, rope_dim=D)),
    }


def _fitted(model: ModelConfig, length: int, make: Callable[[int], Spec], most: int) -> Spec:
    """``make`` with the largest even size up to ``most`` that stores what ``gqa-4x`` does at ``length``."""
    heads = model.d_model if model.head_dim is None else model.n_heads * model.head_dim
    allowed = length // 4 * 2 * heads * torch.bfloat16.itemsize
    for size in range(most, 2, -2):
        one = unallocated(replace(model, n_layers=1, layers=(make(size),)))
        if one.table(length, dtype=torch.bfloat16)[-1]["stored"] <= 1.02 * allowed:
            return make(size)
    return make(2)


# How many times the time of full attention a training token may take at T=256.
SLOW = ("mhc-transformer-4x", "mhc-transformer-8x", "kda", "mamba", "rwkv7")
BAR, SLOW_BAR = 3.0, 5.0
TIER_A = ("full", "gqa-4x", "mhc-4x", "window", "bigbird", "gated-delta", "mamba2", "hybrid")


@cache
def matched(model: ModelConfig, layers: Layers) -> ModelConfig:
    """``model`` with these layers, and the width of the MLP with which it has as many parameters.

    Widths are multiples of 4. Raises ValueError where even without an MLP there are too many.
    """
    wanted = n_parameters(model)
    narrow = replace(model, layers=layers, d_ff=4)
    per_unit = 3 * model.d_model * model.n_layers
    d_ff = 4 + 4 * round((wanted - n_parameters(narrow)) / (4 * per_unit))
    if d_ff < 4:
        raise ValueError(f"layers: {layers} has more parameters than the {wanted} of {model.layers}")
    return replace(narrow, d_ff=d_ff)


def n_parameters(model: ModelConfig) -> int:
    """Trained numbers of a model of this shape."""
    return unallocated(model).n_parameters


def unallocated(model: ModelConfig) -> Decoder:
    """A decoder of this shape whose weights take no memory: for its table and its parameters."""
    with torch.device("meta"):
        return Decoder(model)


@dataclass(frozen=True)
class Budget:
    """The settings that a preset's language runs share: the shape of the full model, and its training."""

    model: ModelConfig
    training: TrainConfig
    n_windows: int  # of the training length, that evaluate

    @property
    def designs(self) -> dict[str, Layers]:
        return designs(self.model, self.training.length)

    def shape(self, design: str) -> ModelConfig:
        """The parameter-matched model of ``design``."""
        return matched(self.model, self.designs[validate.one_of("design", design, self.designs)])

    def equal_cache(self, tolerance: float = 0.05) -> list[list[str]]:
        """Groups of designs whose caches store equal bytes at the training length, within ``tolerance``."""
        stored: dict[str, int] = {}
        for name in self.designs:
            table = unallocated(self.shape(name)).table(self.training.length, dtype=torch.bfloat16)
            stored[name] = table[-1]["stored"]
        groups: list[list[str]] = []
        for name in sorted(stored, key=lambda name: stored[name]):
            if groups and stored[name] <= stored[groups[-1][0]] * (1 + tolerance):
                groups[-1].append(name)
            else:
                groups.append([name])
        return [group for group in groups if len(group) > 1]


CPU = Budget(
    ModelConfig(d_model=96, n_layers=4, n_heads=8, d_ff=256),
    TrainConfig(steps=1500, batch=8, length=256, warmup=75),
    n_windows=256,
)
GPU = Budget(
    ModelConfig(d_model=512, n_layers=8, n_heads=8, d_ff=1344),
    TrainConfig(steps=1500, batch=16, length=2048, warmup=150),
    n_windows=256,
)
BUDGETS = {"cpu": CPU, "gpu": GPU}


@dataclass(frozen=True)
class LanguageRun:
    """A design trained on the corpus from nothing, for ``steps`` of the budget's steps."""

    budget: str
    design: str
    steps: int
    lr: float | None
    seed: int
    candidates: "tuple[LanguageRun, ...]" = ()

    @property
    def name(self) -> str:
        return f"language-{self.budget}-{self.design}-{self.steps}-lr{self.lr:g}-seed{self.seed}"

    @property
    def cost_key(self) -> str:
        return f"language-{self.budget}-{self.design}"

    @property
    def n_steps(self) -> int:
        return self.steps

    @property
    def model(self) -> ModelConfig:
        return BUDGETS[self.budget].shape(self.design)

    @property
    def training(self) -> TrainConfig:
        whole = BUDGETS[self.budget].training
        assert self.lr is not None
        warmup = max(whole.warmup * self.steps // whole.steps, 1)
        return replace(whole, steps=self.steps, warmup=warmup, lr=self.lr, seed=self.seed)

    def settings(self) -> dict[str, Any]:
        return {
            "model": self.model.to_dict(),
            "training": asdict(self.training),
            "n_windows": BUDGETS[self.budget].n_windows,
        }


@dataclass(frozen=True)
class RecallRun:
    """A design trained on a synthetic task."""

    task_name: str
    design: str
    lr: float | None
    seed: int
    candidates: "tuple[RecallRun, ...]" = ()
    steps: int = 1000
    preset: str = "cpu"

    @property
    def name(self) -> str:
        return f"recall-{self.preset}-{self.task_name}-{self.design}-lr{self.lr:g}-seed{self.seed}"

    @property
    def cost_key(self) -> str:
        return f"recall-{self.preset}-{self.task_name}-{self.design}"

    @property
    def n_steps(self) -> int:
        return self.steps

    @property
    def task(self) -> Task:
        return TASKS[self.preset][self.task_name][0]

    @property
    def n_mixers(self) -> int:
        return TASKS[self.preset][self.task_name][1]

    @property
    def mixer(self) -> Layers:
        return RECALL_DESIGNS[self.design]

    @property
    def training(self) -> TrainConfig:
        assert self.lr is not None
        return TrainConfig(
            steps=self.steps,
            batch=64,
            length=self.task.length,
            lr=self.lr,
            warmup=self.steps // 25,
            weight_decay=0.0,
            seed=self.seed,
        )

    def settings(self) -> dict[str, Any]:
        return {
            "task": [type(self.task).__name__, asdict(self.task)],  # type: ignore[call-overload]
            "layers": [repr(spec) for spec in self.mixer],
            "n_mixers": self.n_mixers,
            "training": asdict(self.training),
        }


@dataclass(frozen=True)
class ConversionRun:
    """The base model with other mechanisms, trained on by a ``share`` of the tokens that it has seen.

    The loss before that, a share of 0, is in the same row. The seed draws the batches: the base model is one.
    """

    conversion: str
    share: float
    lr: float
    seed: int
    candidates: tuple[()] = ()

    @property
    def design(self) -> str:
        return self.conversion

    @property
    def name(self) -> str:
        return f"conversion-{self.conversion}-{self.share:g}-lr{self.lr:g}-seed{self.seed}"

    @property
    def cost_key(self) -> str:
        return f"conversion-{self.conversion}"

    @property
    def n_steps(self) -> int:
        return round(BASE_TRAINING.steps * self.share)  # in batches as large as the base model's

    def settings(self) -> dict[str, Any]:
        layers, init = CONVERSIONS[self.conversion]
        return {
            "layers": [spec if isinstance(spec, str) else repr(spec) for spec in layers],
            "init": init,
            "share": self.share,
            "lr": self.lr,
            "seed": self.seed,
        }


Run = LanguageRun | RecallRun | ConversionRun


@dataclass(frozen=True)
class Part:
    """Runs that belong together, numbered from 1 within a tier."""

    preset: str
    tier: str
    number: int
    title: str
    runs: tuple[Run, ...]


# A value of HEAD numbers and one head in every design; a short convolution comes before each (recall.py).
RECALL_DESIGNS: dict[str, Layers] = {
    "full": (Spec("full", head_dim=HEAD),),
    "short-conv": (Spec("short_conv"),),
    "window-8": (Spec("window", window=8, head_dim=HEAD),),
    "linear-8": (Spec("linear", key_dim=8, head_dim=HEAD),),
    "linear-32": (Spec("linear", key_dim=32, head_dim=HEAD),),
    "gated-delta-4": (Spec("gated_delta", key_dim=4, head_dim=HEAD, conv=None),),
    "gated-delta-16": (Spec("gated_delta", key_dim=16, head_dim=HEAD, conv=None),),
    "mamba2-4": (Spec("mamba2", d_state=4, head_dim=HEAD),),
    "mamba2-16": (Spec("mamba2", d_state=16, head_dim=HEAD),),
    # Full attention first: behind the linear layer it had not learned to recall after 600 steps.
    "hybrid-linear-8": (Spec("full", head_dim=HEAD), Spec("linear", key_dim=8, head_dim=HEAD)),
}
# The task, and how many layers of the design it gets: copying has to count before it can copy.
TASKS: dict[str, dict[str, tuple[Task, int]]] = {
    "minutes": {"mqar-8": (Recall(8, 24), 2)},
    "cpu": {
        "mqar-8": (Recall(8, 48), 1),
        "mqar-16": (Recall(16, 48), 1),
        "needle-1": (Needle(1), 1),
        "needle-8": (Needle(8), 1),
        "copy-4": (SelectiveCopy(4), 2),
        "induction": (Induction(), 1),
    },
    "gpu": {
        "mqar-32": (Recall(32, 256, 64, 64), 1),
        "needle-1": (Needle(1, 512), 1),
        "needle-16": (Needle(16, 512, 64, 64, 64), 1),
        "copy-8": (SelectiveCopy(8, 128), 2),
        "induction": (Induction(512, 64), 1),
    },
}
LONGER = (2, 4)  # times the length in training, at which recall and language are evaluated
RATES, MORE_RATES = (2e-3, 6e-3), (1e-3, 2e-3, 6e-3, 12e-3)
RECALL_RATES = (5e-3, 1e-2)
CONVERSION_RATES = (1e-3, 3e-3)
CONVERTED = ("full", "gqa-2-mean", "gqa-1-mean", "mhc-32-activations")


def language(
    budget: str, design: str, *, seeds: Sequence[int], rates: Sequence[float]
) -> tuple[list[LanguageRun], list[LanguageRun]]:
    """A quarter of the budget at each rate on the first seed; then all of it at the best, on each seed."""
    steps = BUDGETS[budget].training.steps
    short = [LanguageRun(budget, design, steps // 4, lr, seeds[0]) for lr in rates]
    return short, [LanguageRun(budget, design, steps, None, seed, tuple(short)) for seed in seeds]


def recall(
    preset: str, task: str, design: str, *, seeds: Sequence[int], steps: int = 1000
) -> list[RecallRun]:
    """One seed at each rate; then the other seeds at the best. Diverging runs count as the worst."""
    first = [RecallRun(task, design, lr, seeds[0], steps=steps, preset=preset) for lr in RECALL_RATES]
    return [
        *first,
        *(RecallRun(task, design, None, seed, tuple(first), steps, preset) for seed in seeds[1:]),
    ]


def tiers(preset: str) -> dict[str, str]:
    """The tiers of ``preset``, and what each is."""
    return {
        "minutes": {"live": "recall of full, window, linear and hybrid, one seed and rate each"},
        "cpu": {
            "A": "language: eight designs, two rates, three seeds (five of full attention)",
            "B": "recall: six tasks, nine designs and a hybrid, two rates, three seeds",
            "C": "three conversions and a control, 0, 1 and 5% of the tokens, two rates, three seeds",
            "D": "language: all other designs, four rates; conversions with 20% of the tokens",
        },
        "gpu": {
            "A": "language: eight designs, larger and with longer contexts, two rates, five seeds",
            "B": "recall in longer texts, five seeds",
            "D": "language: all other designs, four rates, five seeds",
        },
    }[validate.one_of("preset", preset, ("minutes", "cpu", "gpu"))]


def parts(preset: str, tier: str) -> list[Part]:
    """The parts of a tier, in the order in which they are to run."""
    validate.one_of("tier", tier, tiers(preset))
    found = _gpu(tier) if preset == "gpu" else {"live": _live, "A": _a, "B": _b, "C": _c, "D": _d}[tier]()
    return [Part(preset, tier, i + 1, title, tuple(runs)) for i, (title, runs) in enumerate(found)]


Listed = Iterator[tuple[str, Sequence[Run]]]


def _live() -> Listed:
    names = ("full", "window-8", "linear-8", "hybrid-linear-8")
    yield (
        "recall of 8 pairs",
        [RecallRun("mqar-8", name, 1e-2, 0, steps=600, preset="minutes") for name in names],
    )


def _a() -> Listed:
    plans = {
        name: language("cpu", name, seeds=range(5 if name == "full" else 3), rates=RATES) for name in TIER_A
    }
    yield "full attention: rates, then five seeds", [*plans["full"][0], *plans["full"][1]]
    yield "rates of the other designs", [run for name in TIER_A[1:] for run in plans[name][0]]
    for names in (("gqa-4x", "mhc-4x", "window"), ("bigbird", "gated-delta"), ("mamba2", "hybrid")):
        yield f"three seeds of {', '.join(names)}", [run for name in names for run in plans[name][1]]


def _b() -> Listed:
    for task, (_, n_mixers) in TASKS["cpu"].items():
        names = [name for name, layers in RECALL_DESIGNS.items() if len(layers) <= n_mixers]
        yield (
            f"{task}: {len(names)} designs",
            [run for name in names for run in recall("cpu", task, name, seeds=range(3))],
        )


def _c() -> Listed:
    for name in CONVERTED:
        runs = [
            ConversionRun(name, share, lr, seed)
            for share in (0.01, 0.05)
            for lr in CONVERSION_RATES
            for seed in range(3)
        ]
        yield f"{'control, nothing converted' if name == 'full' else name}: 1% and 5%", runs


def _d() -> Listed:
    others = [name for name in CPU.designs if name not in TIER_A]
    for name in others:
        short, final = language("cpu", name, seeds=range(3), rates=MORE_RATES)
        yield f"{name}: four rates, one seed", [*short, final[0]]
        yield f"{name}: two more seeds", final[1:]
    plans = {name: language("cpu", name, seeds=range(3), rates=MORE_RATES) for name in TIER_A}
    for half in (TIER_A[:4], TIER_A[4:]):
        yield f"four rates of {', '.join(half)}", [run for name in half for run in plans[name][0]]
    for name in TIER_A:
        yield f"{name}: three seeds at the best of four rates", plans[name][1]
    for name in CONVERTED:
        for lr in CONVERSION_RATES:
            yield (
                f"{name}: 20% of the tokens at {lr:g}",
                [ConversionRun(name, 0.2, lr, seed) for seed in range(3)],
            )


def _gpu(tier: str) -> Listed:
    if tier == "B":
        for task, (_, n_mixers) in TASKS["gpu"].items():
            for name, layers in RECALL_DESIGNS.items():
                if len(layers) <= n_mixers:
                    yield f"{task}, {name}", recall("gpu", task, name, seeds=range(5), steps=2000)
        return
    names = TIER_A if tier == "A" else [name for name in GPU.designs if name not in TIER_A]
    for name in names:
        short, final = language("gpu", name, seeds=range(5), rates=RATES if tier == "A" else MORE_RATES)
        yield f"{name}: rates", short
        for run in final:
            yield f"{name}: seed {run.seed}", [run]
