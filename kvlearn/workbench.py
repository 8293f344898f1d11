"""The workbench: a learner's functions take the place of the library's in a trained small model.

"Your model" is the last exercise of a unit. Its answers are the model's ``attention`` layer and, where the
unit asks for it, ``generate``; what these call (the *parts*) are the answers to the unit's earlier exercises.
A ``Wiring``, declared in the unit's ``checks.py``, says which parts there are and how they fit the base
model. A ``Training`` in its place says how they make a model that is trained in the notebook. Nothing here
knows a unit.

    code("01.9")                  the code of the model, with the calls of attention and parts
    compare("01.9", globals())    whose each part is, and the model with them beside kvlearn's own decoder
    losses("01.9", 96, KVCache=BrokenCache)    the model's loss by position with one part replaced

A part that is missing, not written, or does not earn all points of its own exercise is the library's.
"""

import base64
import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kvlearn.model
from kvlearn import html, validate
from kvlearn.grading.calls import NotWritten
from kvlearn.grading.catalogue import find_exercise
from kvlearn.grading.exercise import Exercise
from kvlearn.grading.run_checks import judge, last_check, one_thread, solved
from kvlearn.model import Decoder, load

# Python, as the base model has seen it in training; bytes are its tokens.
PROMPTS = (
    'def is_even(n):\n    """Return True if ``n`` is an even number."""\n    return ',
    "class Point:\n    def __init__(self, x, y):\n        self.x = ",
    "    for i in range(len(args)):\n        if args[i] is None:\n            raise ",
)
TEXT = '''def polynomial_sum(a, b):
    """Add two polynomials, given as lists of coefficients."""
    n = max(len(a), len(b))
    result = [0]*n
    for i in range(n):
        if i < len(a):
            result[i] += a[i]
        if i < len(b):
            result[i] += b[i]
    while len(result) > 1 and result[-1] == 0:
        result.pop()
    return result
'''
YOURS, LIBRARY = "yours", "kvlearn's"
Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Part:
    """One function or class of the model: the learner's object where it is good, else the library's.

    ``why`` says what is wrong with the learner's; it is empty where that is the one in use.
    """

    name: str
    exercise: str
    theirs: Any
    library: Any
    why: str = ""

    @property
    def is_theirs(self) -> bool:
        return not self.why

    @property
    def chosen(self) -> Any:
        return self.theirs if self.is_theirs else self.library


@dataclass(frozen=True)
class Wiring:
    """How the parts of one unit fit the base model.

    parts       {name: (the exercise that asks for it, the library's object)}
    weights     of a layer's attention in the base model, as ``attention`` gets them
    new_cache   (parts, weights, max_len) -> an empty cache of one layer, for one sequence
    variants    {name: attention -> another attention that must give the same}, tried beside the learner's
    """

    parts: Mapping[str, tuple[str, Any]]
    weights: Callable[[Any], Any]
    new_cache: Callable[[Any, Any, int], Any]
    variants: Mapping[str, Callable[[Attention], Attention]] = field(default_factory=dict)

    @property
    def shown(self) -> list[Any]:
        """The text that ``code`` shows."""
        return [Model, self.weights, self.new_cache, *self.variants.values()]

    def compare(self, exercise: Exercise, notebook: Mapping[str, Any], n_new: int) -> "Comparison":
        return _compared(exercise, notebook, n_new)


@dataclass(frozen=True)
class Trained:
    """A model after its training: its numbers, as text by what they are, and its curve by steps."""

    numbers: Mapping[str, str]
    curve: Mapping[int, float]


@dataclass(frozen=True)
class Training:
    """How the parts of one unit make a small model that is trained in the notebook.

    parts       {name: (the exercise that asks for it, the library's object)}
    shown       functions and classes that are the model and its training; ``code`` shows them
    train       (answers by name, parts) -> a trained model
    baselines   {name: answers that take the place of ours}, trained with the library's parts to compare
    label       of the curves, with their unit ("%" for shares), and over what they go
    """

    parts: Mapping[str, tuple[str, Any]]
    shown: Sequence[Any]
    train: Callable[[Mapping[str, Any], Any], Trained]
    baselines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    label: str = "right answers"
    unit: str = "%"
    over: str = "steps of training"
    _runs: dict[str, Trained] = field(default_factory=dict, init=False, repr=False, compare=False)

    def library_runs(self, ours: Mapping[str, Any]) -> dict[str, Trained]:
        """kvlearn's model and the baselines, trained once: no answer changes them."""
        for name, answers in {"kvlearn's": {}, **self.baselines}.items():
            if name not in self._runs:
                self._runs[name] = self.train({**ours, **answers}, library(self))
        return self._runs

    def compare(self, exercise: Exercise, notebook: Mapping[str, Any], n_new: int) -> "Comparison":
        return _trained(exercise, notebook)


class Model:
    """The base model with a hole where attention is: 4 layers, bytes as tokens, trained on Python code.

    ``attention(x, layer, cache, start, parts)`` fills the hole: x (B, T, M) -> (B, T, M).
    """

    def __init__(self, wiring: Wiring, attention: Attention, parts: Any) -> None:
        self.base = base_model()
        self.blocks: list[Any] = list(self.base.blocks)
        self.layers = [wiring.weights(block.mixer) for block in self.blocks]
        self.new_cache, self.attention, self.parts = wiring.new_cache, attention, parts
        self.steps: list[tuple[int, int, float]] = []  # of each call: start, tokens, seconds

    def new_caches(self, max_len: int) -> list[Any]:
        """An empty cache for each layer, with room for ``max_len`` tokens."""
        return [self.new_cache(self.parts, layer, max_len) for layer in self.layers]

    @torch.no_grad()
    def __call__(self, tokens: Tensor, caches: Sequence[Any] | None = None, start: int = 0) -> Tensor:
        """Tokens (B, T), the first of them at position ``start`` -> logits of the next one, (B, T, 256).

        With caches, earlier tokens are in them, and these are added. Without, there are no earlier tokens.
        """
        began = time.perf_counter()
        x = self.base.embed(tokens)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            h = block.mixer_norm(x)
            x = x + self.attention(h, self.layers[i], cache, start, self.parts)
            x = x + block.mlp(block.mlp_norm(x))  # down(silu(gate(h)) · up(h))
        logits = self.base.norm(x) @ self.base.embed.weight.T
        self.steps.append((start, tokens.shape[1], time.perf_counter() - began))
        return logits


class LibraryModel(Model):
    """kvlearn's own decoder, called as a ``Model`` is."""

    def new_caches(self, max_len: int) -> list[Any]:
        return [self.base.new_cache(1, max_len)]

    @torch.no_grad()
    def __call__(self, tokens: Tensor, caches: Sequence[Any] | None = None, start: int = 0) -> Tensor:
        began = time.perf_counter()
        logits = self.base(tokens, None if caches is None else caches[0])
        self.steps.append((start, tokens.shape[1], time.perf_counter() - began))
        return logits


@cache
def base_model() -> Decoder:
    """The committed base model: full attention, 885,888 parameters, kvlearn/model/base.json."""
    return load(Path(kvlearn.model.__file__).with_name("base.safetensors")).requires_grad_(False)


def encode(text: str) -> Tensor:
    """Text as tokens, (1, T)."""
    return torch.tensor([list(text.encode())])


def decode(tokens: Tensor) -> str:
    """Tokens (1, T) as text."""
    return bytes(tokens[0].tolist()).decode(errors="replace")


def without_cache(model: Model, tokens: Tensor, n_new: int) -> Tensor:
    """``tokens`` and ``n_new`` more, the whole text computed again for each."""
    for _ in range(n_new):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens


# Whose each part is


_asked: dict[str, tuple[list[Any], str]] = {}  # by exercise: the objects looked at, and what was missing


def choose(exercise: Exercise, notebook: Mapping[str, Any] | None) -> list[Part]:
    """The parts of a "Your model": of the names in ``notebook`` those that earn all points of their exercise.

    Without a notebook the library's objects stand for the learner's.
    """
    if notebook is None:
        return [Part(name, source, lib, lib) for name, (source, lib) in exercise.wiring.parts.items()]
    why = {source: _missing(source, notebook) for source, _ in exercise.wiring.parts.values()}
    return [
        Part(name, source, notebook.get(name), library, why[source])
        for name, (source, library) in exercise.wiring.parts.items()
    ]


def library(wiring: Wiring | Training) -> SimpleNamespace:
    """The library's objects by name."""
    return SimpleNamespace(**{name: lib for name, (_, lib) in wiring.parts.items()})


def _missing(exercise_id: str, notebook: Mapping[str, Any]) -> str:
    """Why the answer to an exercise is not used; empty if it is.

    Asked again where an object is another, or ``check`` has run since: what it calls may have changed.
    """
    exercise = find_exercise(exercise_id)
    answers = tuple(notebook.get(name) for name in exercise.answers)
    looked_at = [*answers, last_check(exercise_id)]
    known, why = _asked.get(exercise_id, ([], ""))
    if len(known) != len(looked_at) or any(a is not b for a, b in zip(known, looked_at, strict=True)):
        why = _fault(exercise, answers)
        _asked[exercise_id] = (looked_at, why)
    return why


def _fault(exercise: Exercise, answers: tuple[Any, ...]) -> str:
    if solved(exercise, answers):
        return ""
    absent = [name for name, answer in zip(exercise.answers, answers, strict=True) if not callable(answer)]
    return f"there is no {absent[0]} yet" if absent else f"{exercise.id} does not have all its points yet"


def namespace(parts: Sequence[Part], theirs: Sequence[str] | None = None) -> SimpleNamespace:
    """The chosen objects by name, as ``attention`` gets them; of the learner's only those in ``theirs``."""
    return SimpleNamespace(
        **{p.name: p.chosen if theirs is None or p.name in theirs else p.library for p in parts}
    )


def theirs(exercise: Exercise, notebook: Mapping[str, Any] | None, *names: str) -> SimpleNamespace:
    """The parts called ``names`` from the learner's notebook, all others from the library, for a requirement.

    Raises NotWritten, which ends the requirement, where one of these is not solved yet.
    """
    parts = choose(exercise, notebook)
    for part in parts:
        if part.name in names and not part.is_theirs:
            raise NotWritten(f"kvlearn's {part.name} in place of yours: {part.why}")
    return namespace(parts, names)


# Tables and pictures


@dataclass(frozen=True)
class Code:
    """Source code, shown in a notebook as such."""

    source: str

    def __repr__(self) -> str:
        return self.source

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": self.source, "text/markdown": f"```python\n{self.source}```"}


def code(exercise_id: str) -> Code:
    """The code of the model: what runs the learner's functions, and the unit's own wiring."""
    return Code("\n\n".join(inspect.getsource(each) for each in _wired(exercise_id).wiring.shown))


def _wired(exercise_id: str) -> Exercise:
    exercise = find_exercise(exercise_id)
    if exercise.wiring is None:
        raise ValueError(f'exercise: expected the "Your model" of a unit, got {exercise.id!r}')
    return exercise


@torch.no_grad()
def losses(exercise_id: str, chunk: int, text: str = TEXT, **replaced: Any) -> Tensor:
    """The loss at each position of ``text``, fed in chunks of ``chunk`` tokens through caches; nats per byte.

    ``replaced`` are parts by name; all others are the library's. Position t holds −log p(token t + 1), so
    there is one value fewer than tokens.
    """
    exercise = _wired(exercise_id)
    parts = library(exercise.wiring)
    for name, part in replaced.items():
        setattr(parts, validate.one_of("replaced", name, vars(parts)), part)
    attention = dict(zip(exercise.answers, exercise.right, strict=True))["attention"]
    tokens = encode(text)
    model = Model(exercise.wiring, attention, parts)
    caches = model.new_caches(tokens.shape[1])
    starts = range(0, tokens.shape[1], chunk)
    pieces = [model(tokens[:, start : start + chunk], caches, start) for start in starts]
    logits = torch.cat(pieces, dim=1)[0, :-1]
    return F.cross_entropy(logits, tokens[0, 1:], reduction="none")


@dataclass(frozen=True)
class Run:
    """One way to write the text: the tokens, or how it broke off; seconds of each step by tokens so far."""

    tokens: Tensor | None
    fault: str = ""
    seconds: Mapping[int, float] = field(default_factory=dict)

    def same_as(self, want: Tensor) -> str:
        if self.tokens is None:
            return f"no: {self.fault}"
        return "yes" if torch.equal(self.tokens, want) else "no"


def run(write: Callable[[Model], Tensor], model: Model) -> Run:
    """``write`` with the model; an exception is noted, not raised."""
    try:
        tokens = write(model)
    except Exception as error:
        return Run(None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return Run(tokens, "", {start + n: seconds for start, n, seconds in model.steps})


@dataclass(frozen=True)
class Comparison:
    """The model with a learner's parts beside kvlearn's; shown as two tables and a picture."""

    exercise: str
    parts: Sequence[tuple[Part, str]]  # with "yes", or what is wrong with it in the model
    rows: Sequence[tuple[str, ...]]  # what, then a value for each column
    times: Mapping[str, Mapping[int, float]]  # seconds of each step by tokens so far
    columns: Sequence[str] = ("kvlearn's decoder", "the model with your parts")
    caption: str = "The model, before and after"

    @cached_property
    def picture(self) -> Any:
        """Time per token over the tokens so far."""
        from kvlearn.plots.workbench import time_per_token  # matplotlib takes a second to import

        return time_per_token(self.times)

    def __repr__(self) -> str:
        whose = [f"{p.exercise}  {p.name}: {_whose(p)}; works: {works}" for p, works in self.parts]
        return "\n".join([*whose, *(f"{what}: {' | '.join(map(repr, each))}" for what, *each in self.rows)])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        left = "text-align: left; white-space: pre-wrap"
        parts = html.table(
            ("exercise", "part", "whose", "works"),
            ((p.exercise, p.name, _whose(p), works) for p, works in self.parts),
            styles=[left] * 4,
            caption="The parts of this model",
        )
        rows = html.table(
            ("", *self.columns),
            ((what, *map(_written, each)) for what, *each in self.rows),
            styles=[left] * (1 + len(self.columns)),
            caption=self.caption,
        )
        alt = escape(self.picture.alt, quote=True)
        png = base64.b64encode(self.picture.png()).decode()
        image = f'<img alt="{alt}" src="data:image/png;base64,{png}" style="max-width: 100%">'
        return {"text/plain": repr(self), "text/html": parts + rows + image}


@dataclass(frozen=True, repr=False)
class TrainedComparison(Comparison):
    """The same for models that were trained: the picture shows their curves."""

    curves: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    label: str = ""
    unit: str = "%"
    over: str = ""

    @cached_property
    def picture(self) -> Any:
        from kvlearn.plots.workbench import learning_curves  # matplotlib takes a second to import

        return learning_curves(self.curves, self.label, over=self.over, unit=self.unit)


def _whose(part: Part) -> str:
    return YOURS if part.is_theirs else f"{LIBRARY} ({part.why})"


def _written(text: str) -> str | html.Cell:
    """Text of several lines as code."""
    return html.Cell(f"<code>{escape(text)}</code>") if "\n" in text else text


def compare(exercise_id: str, notebook: Mapping[str, Any], n_new: int = 48) -> Comparison:
    """The base model with the learner's parts, and before, with kvlearn's decoder.

    ``notebook`` are the names of the notebook, ``globals()``. The text of ``n_new`` tokens is written
    greedily; times are of one run on this machine. A unit with a ``Training`` trains the learner's model,
    kvlearn's and the baselines instead.
    """
    exercise = _wired(exercise_id)
    with one_thread():
        return exercise.wiring.compare(exercise, notebook, n_new)


def _own(exercise: Exercise, notebook: Mapping[str, Any]) -> list[Part]:
    """The answers to "Your model" itself, judged with the library's parts."""
    ours = dict(zip(exercise.answers, exercise.right, strict=True))
    answers = tuple(notebook.get(name) for name in exercise.answers)
    complete = judge(exercise, answers, name=False).status == "passed"
    why = "" if complete else f"{exercise.id} does not have all its points yet"
    return [Part(name, exercise.id, notebook.get(name), ours[name], why) for name in exercise.answers]


def _trained(exercise: Exercise, notebook: Mapping[str, Any]) -> Comparison:
    """Models trained one after the other: ours, the learner's, the baselines."""
    training = exercise.wiring
    own, parts = _own(exercise, notebook), choose(exercise, notebook)
    first, *baselines = training.library_runs({part.name: part.library for part in own}).items()
    if any(part.is_theirs for part in (*own, *parts)):
        yours = training.train({part.name: part.chosen for part in own}, namespace(parts))
    else:  # it is kvlearn's
        yours = first[1]
    runs = dict([first, ("yours", yours), *baselines])
    rows = [(what, *(run.numbers[what] for run in runs.values())) for what in runs["kvlearn's"].numbers]
    used = [(part, _works(part)) for part in (*own, *parts)]
    curves = {name: run.curve for name, run in runs.items()}
    columns, caption = tuple(runs), "The models after their training"
    axes = (training.label, training.unit, training.over)
    return TrainedComparison(exercise.id, used, rows, {}, columns, caption, curves, *axes)


def _compared(exercise: Exercise, notebook: Mapping[str, Any], n_new: int) -> Comparison:
    wiring, prompt = exercise.wiring, encode(PROMPTS[0])
    ours = dict(zip(exercise.answers, exercise.right, strict=True))
    own = _own(exercise, notebook)
    parts = choose(exercise, notebook)
    functions = {part.name: part.chosen for part in own}
    attention = functions["attention"]
    generate = functions.get("generate", greedy)
    length = prompt.shape[1] + n_new

    def model(theirs: Sequence[str] | None, layer: Attention = attention) -> Model:
        return Model(wiring, layer, namespace(parts, theirs))

    def with_cache(chunk: int, steps: Callable[..., Tensor] = generate) -> Callable[[Model], Tensor]:
        return lambda model: steps(model, model.new_caches(length), prompt, n_new, chunk)

    whole, chunk = prompt.shape[1], 24

    def library_run() -> Run:
        return run(with_cache(whole, ours.get("generate", greedy)), LibraryModel(wiring, attention, None))

    library_run()  # the first run of each pays for what is loaded and allocated
    run(with_cache(whole), model(None))
    library = library_run()
    assert library.tokens is not None
    want = library.tokens
    runs = {
        "with a cache": run(with_cache(whole), model(None)),
        "without a cache": run(lambda model: without_cache(model, prompt, n_new), model(None)),
        f"the prompt in chunks of {chunk}": run(with_cache(chunk), model(None)),
    }
    for name, variant in wiring.variants.items():
        runs[name] = run(with_cache(whole), model(None, variant(attention)))
    works = [
        (part, run(with_cache(chunk), model([part.name])).same_as(want) if part.is_theirs else "–")
        for part in parts
    ]
    main = runs["with a cache"]
    written = decode(main.tokens[:, whole:]) if main.tokens is not None else main.fault
    stored, read = _bytes(model(None), length) if main.tokens is not None else ("–", "–")
    layers = base_model().table(length)[-1]
    rows = [
        ("text written", decode(want[:, whole:]), written),
        *((f"identical tokens, {name}", "yes", each.same_as(want)) for name, each in runs.items()),
        (f"bytes stored, room for {length} tokens", f"{layers['stored']:,}", stored),
        (f"bytes read for token {length}", f"{layers['read']:,}", read),
        ("tokens per second", _rate(library), _rate(main)),
    ]
    times = {
        "kvlearn's decoder": library.seconds,
        "your parts": main.seconds,
        "your parts, no cache": runs["without a cache"].seconds,
    }
    return Comparison(exercise.id, [*((part, _works(part)) for part in own), *works], rows, times)


def _works(part: Part) -> str:
    return "yes" if part.is_theirs else "–"


def greedy(model: Model, caches: Sequence[Any], tokens: Tensor, n_new: int, chunk: int) -> Tensor:
    """``tokens`` and ``n_new`` more: the prompt in chunks through caches, then a token per step.

    The library's loop, for a unit that does not ask for one.
    """
    start = 0
    for piece in tokens.split(chunk, dim=1):
        logits, start = model(piece, caches, start), start + piece.shape[1]
    for i in range(n_new):
        token = logits[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, token), dim=1)
        if i + 1 < n_new:
            logits, start = model(token, caches, start), start + 1
    return tokens


def _rate(run: Run) -> str:
    """Tokens per second of the steps of decode: all but the first, which is the prompt."""
    steps = list(run.seconds.values())[1:]
    return f"{len(steps) / sum(steps):,.0f}" if steps else "–"


class Watched:
    """A cache whose methods note the bytes of the tensors that they return."""

    def __init__(self, cache: Any) -> None:
        self._cache, self.read = cache, 0

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the cache, for ``isinstance``."""
        return type(self._cache)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._cache, name)
        return partial(self._call, value) if callable(value) else value

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        self.read += sum(t.numel() * t.element_size() for t in tensors_in(result))
        return result


def _bytes(model: Model, length: int) -> tuple[str, str]:
    """Bytes that the caches hold, and that one step at this length gets from them, both measured."""
    caches = model.new_caches(length)
    tokens = encode(TEXT)[:, :length]
    model(tokens[:, :-1], caches, 0)
    watched = [Watched(each) for each in caches]
    model(tokens[:, -1:], watched, tokens.shape[1] - 1)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(caches)}
    return f"{sum(storages.values()):,}", f"{sum(each.read for each in watched):,}"


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in a value: in lists and mappings, and in the attributes of objects.

    ``seen``: ids of objects that have been looked into, for they may point back to each other.
    """
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, type) and id(value) not in seen:
        seen.add(id(value))
        for part in _parts_of(value):
            yield from tensors_in(part, seen)


def _parts_of(value: Any) -> list[Any]:
    if isinstance(value, list | tuple | set | deque):
        return list(value)
    if isinstance(value, Mapping):
        return list(value.values())
    slots = (vars(kind).get("__slots__", ()) for kind in type(value).__mro__)
    names = [name for each in slots for name in ([each] if isinstance(each, str) else each)]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in names)]
