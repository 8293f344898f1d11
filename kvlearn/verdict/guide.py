"""Which mechanism for this model, context, users and hardware, with the numbers behind it.

    recommend("Llama 3.1 8B", context=32_768, users=64, device="A100 80 GB", price=2.0)

A change of the model's layers is judged by four things: the bytes that its cache stores and that a step reads
(formulas, which chapter 12 found equal to what is allocated and touched), users per device and dollars per
million tokens (``kvlearn.measure.cost``), what it costs in quality (the study of chapter 10, where its rows
are recorded), and whether every token can still be found. Recommended is the least change whose dollars are
within ``near`` of the cheapest that is allowed. ``unknown`` lists the missing numbers.

The times are those of the roofline of the device that is asked about: on a processor, whose arithmetic is
small beside its bandwidth, latents are slower than shared heads, as chapter 12 measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvlearn import validate
from kvlearn.measure.budget import KINDS
from kvlearn.measure.cache_size import LayerShape, ModelShape, cache_bytes, read_bytes
from kvlearn.measure.controls import table_with_controls
from kvlearn.measure.cost import Load, batch_step_seconds, part, sharded, users_per_device
from kvlearn.measure.devices import DEVICES, Device
from kvlearn.measure.models import MODELS
from kvlearn.measure.table import Table
from kvlearn.measure.units import format_bytes, format_seconds
from kvlearn.study.quality import BUDGETS, Difference
from kvlearn.verdict.claim import NOT_YET, NotRecordedError, Records, said

WINDOW = 4096
RECALLED = 0.9  # of the recall tasks that full attention answers: less is not finding any token again
EVIDENCE = ("known", "planned", "any")
GROUPS = (1, 2, 4, 8, 16, 32, 64)  # devices that may hold one copy of a model together


@dataclass(frozen=True)
class Change:
    """One way to change a model's attention.

    ``layers``: the pattern that takes the place of all layers; empty leaves them. ``divide``: the KV heads by
    so much. ``design``: of the study of chapter 10 the nearest; empty where it has none. ``bench``: of
    ``kvlearn bench hardware`` a layer of this kind with 32 heads of 128, mechanism and model. ``finds``:
    whether any token of the context can be looked up. ``recall``: the design that stands for it in the recall
    tasks of chapter 10, empty where it has none. ``work``: the steps to get such a model.
    """

    name: str
    work: str
    layers: tuple[LayerShape, ...] = ()
    divide: int = 1
    design: str = ""
    bench: tuple[str, str] = ("", "")
    finds: bool = True
    recall: str = ""

    def of(self, model: ModelShape) -> ModelShape | None:
        """The changed model; None where the change does not apply to it."""
        if self.divide > 1:
            plain = all(model.layer(i) == LayerShape() for i in range(model.n_layers))
            if not plain or model.n_kv_heads % self.divide:
                return None
            return replace(model, n_kv_heads=model.n_kv_heads // self.divide)
        return replace(model, layers=self.layers) if self.layers else model


_CONVERT = "convert and train on (chapters 02, 03)"
_TRAIN = "a model trained so from the start"
AS_IT_IS = Change("as it is", "none")
CHANGES = (
    AS_IT_IS,
    Change("KV heads ÷ 4", _CONVERT, divide=4, design="gqa-4x", bench=("gqa", "Llama 3.1 8B")),
    Change("latents", _CONVERT, (KINDS["latent"],), design="mhc-4x", bench=("mhc", "widths of Llama 3.1 8B")),
    Change("latents, selected", _TRAIN, (KINDS["indexed"],)),
    Change("5 windows : 1", _TRAIN, (*5 * (KINDS["window"],), LayerShape())),
    Change(
        "3 states : 1",
        _TRAIN,
        (*3 * (KINDS["state"],), LayerShape()),
        design="hybrid",
        recall="hybrid-linear-8",
    ),
    Change("3 states : 1 latent", _TRAIN, (*3 * (KINDS["state"],), KINDS["latent"])),
    Change(
        f"windows of {WINDOW}",
        _TRAIN,
        (LayerShape(window=WINDOW),),
        design="window",
        bench=("window", "Mistral 7B v0.1"),
        finds=False,
    ),
    Change(
        "states",
        _TRAIN,
        (KINDS["state"],),
        design="gated-delta",
        bench=("linear", "widths of Llama 3.1 8B"),
        finds=False,
    ),
)
"""From the least change to the greatest."""


@dataclass(frozen=True)
class Option:
    """A change with its numbers. ``excluded``: why it is not recommended; ``unknown``: the missing numbers.

    ``stored`` and ``read``: bytes per user. ``group``: devices that hold one copy of the model; ``devices``:
    all that are needed. ``step``: seconds in which each user gets a token. ``quality``: loss above full
    attention's in the study. ``recall``: the least share of right answers in the recall tasks that full
    attention answers. ``layer``: seconds of one layer of its kind with 32 heads, measured at
    ``layer_at`` tokens.
    """

    change: Change
    stored: int
    read: int
    per_device: float
    group: int
    devices: float
    step: float
    dollars: float
    quality: Difference | None
    layer: float | None
    layer_at: int | None
    recall: float | None = None
    excluded: str = ""
    unknown: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.change.name


@dataclass(frozen=True)
class Recommendation:
    """The result of ``recommend``. ``best`` is None if nothing can be recommended; ``unknown`` says why."""

    question: str
    options: tuple[Option, ...]
    best: Option | None
    why: str
    unknown: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    def table(self) -> Table:
        """The options, a row each; the last column says which one is recommended, and why others are not."""
        answer = "I do not know" if self.best is None else self.best.name
        caption = f"{self.question}: {answer}. {self.why}"
        if not self.options:
            return Table([{"not known": item} for item in self.unknown], caption)
        for title, items in (("Not known", self.unknown), ("Assumed", self.assumed)):
            caption += f" {title}: {'; '.join(items)}." if items else ""
        rows = []
        for option in self.options:
            verdict = option.excluded or ("recommended" if option is self.best else "")
            devices = f"{option.devices:,.0f}" if math.isfinite(option.devices) else "–"
            rows.append(
                {
                    "change": option.name,
                    "stored per user": format_bytes(option.stored),
                    "read per step": format_bytes(option.read),
                    "users per device": f"{option.per_device:,.3g}",
                    "devices": devices,
                    "$ per million": f"{option.dollars:.3g}" if math.isfinite(option.dollars) else "–",
                    "quality": "the baseline" if option.change is AS_IT_IS else said(option.quality),
                    "a layer of 32 heads, measured": "–"
                    if option.layer is None
                    else f"{format_seconds(option.layer)} at {(option.layer_at or 0) // 1024}K",
                    "": verdict,
                }
            )
        return Table(rows, caption)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def __repr__(self) -> str:
        return repr(self.table())


def recommend(
    model: str | ModelShape,
    context: int,
    users: int,
    device: str | Device,
    *,
    price: float = 2.0,
    find_anything: bool = True,
    worse: float = 0.02,
    evidence: str = "planned",
    near: float = 0.1,
    efficiency: float = 0.6,
    records: Records | None = None,
) -> Recommendation:
    """Which change of the model's attention serves ``users`` at ``context`` tokens best on ``device``.

    ``price``: dollars per hour of one device. ``find_anything``: whether any token of the context must be
    found again; windows and states alone do not promise that. ``worse``: the loss in nats per byte that is
    accepted; a design whose interval in the study lies above it is left out. ``evidence`` of quality that is
    demanded: "known" (rows are recorded), "planned" (the study has the design, its rows may be missing) or
    "any". ``near``: of changes that cost within this part of the cheapest, the least is taken. A name that is
    not in ``MODELS`` or ``DEVICES`` is answered with "I do not know".
    """
    context, users = validate.positive("context", context), validate.positive("users", users)
    validate.one_of("evidence", evidence, EVIDENCE)
    validate.instance("model", model, (str, ModelShape))
    validate.instance("device", device, (str, Device))
    validate.instance("find_anything", find_anything, bool)
    validate.instance("records", records, (Records, type(None)))
    validate.above("price", price, 0)
    validate.finite("worse", worse)
    validate.at_least_zero("near", near)
    part("efficiency", efficiency)
    records = records or Records()
    name, card_name = (x if isinstance(x, str) else x.name for x in (model, device))
    question = f"{name}, {context:,} tokens, {users:,} users, {card_name}"
    missing = []
    if isinstance(model, str) and model not in MODELS:
        missing.append(f"the shape of {model!r}: give a ModelShape, from its config.json")
    if isinstance(device, str) and device not in DEVICES:
        missing.append(f"memory, bandwidth and peak of {device!r}: give a Device, from its data sheet")
    if missing:
        return Recommendation(question, (), None, "Give me the numbers of it.", tuple(missing))
    shape = MODELS[model] if isinstance(model, str) else model
    card = DEVICES[device] if isinstance(device, str) else device
    asked = _Question(shape, context, users, card, price, efficiency, records)
    options = []
    for change in CHANGES:
        option = asked.option(change)
        if option is not None:
            options.append(_judged(option, context, find_anything, worse, evidence))
    allowed = [option for option in options if not option.excluded]
    best = None
    why = "Nothing of what is left fits, or is allowed."
    if allowed:
        cheapest = min(option.dollars for option in allowed)
        best = next(option for option in allowed if option.dollars <= (1 + near) * cheapest)
        why = _why(best, options[0], cheapest, asked.mostly_weights(options[0]))
    return Recommendation(
        question,
        tuple(options),
        best,
        why,
        _unknown(best, shape, context, records),
        _assumed(card, price, efficiency),
    )


@dataclass(frozen=True)
class _Question:
    """The parts of a question that all options share."""

    model: ModelShape
    context: int
    users: int
    card: Device
    price: float
    efficiency: float
    records: Records

    def option(self, change: Change) -> Option | None:
        """``change`` with its numbers; None where it does not apply, or saves nothing at this context."""
        model = change.of(self.model)
        if model is None:
            return None
        stored, read = (of(model, self.context) for of in (cache_bytes, read_bytes))
        if change is not AS_IT_IS and stored >= cache_bytes(self.model, self.context):
            return None
        load = Load.of(model, self.context)
        group, per_group = place(load, self.card)
        quality = self.records.above_full(change.design) if change.design else None
        layer, layer_at = self._layer(change)
        recall = self.records.worst_recall(change.recall) if change.recall else None
        option = Option(
            change, stored, read, 0.0, group, math.inf, math.inf, math.inf, quality, layer, layer_at, recall
        )
        if not per_group:
            return replace(option, excluded=f"does not fit on {group} devices")
        groups = -(-self.users // per_group)
        batch = -(-self.users // groups)
        step = batch_step_seconds(load, sharded(self.card, group), batch, self.efficiency)
        devices = groups * group
        dollars = devices * self.price / 3600 * step / self.users * 1e6
        return replace(option, per_device=per_group / group, devices=devices, step=step, dollars=dollars)

    def mostly_weights(self, option: Option) -> bool:
        """Whether a step as it is moves more bytes of weights than of caches."""
        load = Load.of(self.model, self.context)
        groups = option.devices / option.group
        return math.isfinite(groups) and load.weights > math.ceil(self.users / groups) * load.moved

    def _layer(self, change: Change) -> tuple[float | None, int | None]:
        """Seconds of a layer of this kind at the longest measured context that is not longer than ours."""
        mechanism, model = change.bench
        if change.divide > 1 and self.model.n_kv_heads < self.model.n_heads:
            return None, None  # shared heads were measured, heads that are shared once more were not
        if change is AS_IT_IS and all(
            self.model.layer(i) == LayerShape() for i in range(self.model.n_layers)
        ):
            shared = self.model.n_kv_heads < self.model.n_heads
            mechanism, model = (
                ("gqa", "Llama 3.1 8B") if shared else ("full", "Llama 3.1 8B without shared heads")
            )
        if not mechanism:
            return None, None
        found: tuple[float | None, int | None] = (None, None)
        for length in (2**n for n in range(10, 24)):
            if length > self.context:
                break
            try:
                found = (
                    self.records.hardware("decode_time", mechanism, length, model)["measured"],
                    length,
                )
            except NotRecordedError:
                continue
        return found


def place(load: Load, card: Device, speed: float = 0.0, efficiency: float = 1.0) -> tuple[int, int]:
    """The fewest devices that hold one copy with one user, and how many users they serve; 0 users: too few.

    With ``speed``, each user gets at least so many tokens per second.
    """
    for group in GROUPS:
        users = users_at_speed(load, sharded(card, group), speed, efficiency)
        if users:
            return group, users
    return GROUPS[-1], 0


def users_at_speed(load: Load, card: Device, speed: float = 0.0, efficiency: float = 1.0) -> int:
    """The most users that fit and get ``speed`` tokens per second each.

    users ≤ (efficiency · bandwidth / speed - weights) / moved,   users ≤ efficiency · peak / (speed · FLOPs)
    """
    fit = users_per_device(load, card.memory)
    if not speed:
        return fit
    by_memory = (efficiency * card.bandwidth / speed - load.weights) / load.moved
    by_arithmetic = efficiency * card.peak / speed / load.flops
    return max(0, min(fit, math.floor(by_memory), math.floor(by_arithmetic)))


def _judged(option: Option, context: int, find_anything: bool, worse: float, evidence: str) -> Option:
    """``option`` with the reason that excludes it, if any, and with what is not known of it."""
    change, unknown, excluded = option.change, [], option.excluded
    no_quality = option.quality is None and change is not AS_IT_IS
    if no_quality:
        rest = f"{NOT_YET}: {change.design}" if change.design else "the study has no design like it"
        unknown.append(f"what {change.name} costs in quality ({rest})")
    if find_anything and change.recall and option.recall is None:
        unknown.append(f"whether {change.name} finds everything again ({NOT_YET}: {change.recall})")
    if excluded:
        pass
    elif find_anything and not change.finds and not (context <= WINDOW and "window" in change.name):
        excluded = "cannot find every token again"
    elif find_anything and option.recall is not None and option.recall < RECALLED:
        excluded = f"found {option.recall:.0%} again where full attention found 95% and more"
    elif option.quality is not None and option.quality.low > worse:
        excluded = f"worse than {worse:+g} nats per byte in the study"
    elif no_quality and (evidence == "known" or (evidence == "planned" and not change.design)):
        excluded = "its quality was not measured"
    return replace(option, excluded=excluded, unknown=tuple(unknown))


def _why(best: Option, as_it_is: Option, cheapest: float, mostly_weights: bool) -> str:
    if best.change is AS_IT_IS:
        if cheapest < best.dollars:
            saved = 1 - cheapest / best.dollars
            reason = ": most bytes are weights" if mostly_weights else ""
            return f"The cheapest change would save {saved:.0%}{reason}."
        return "No change that is allowed is cheaper."
    if not math.isfinite(as_it_is.dollars):
        return "As it is, it does not fit."
    return (
        f"{as_it_is.dollars / best.dollars:.1f} times cheaper than as it is: "
        f"{format_bytes(best.stored)} per user in place of {format_bytes(as_it_is.stored)}."
    )


def _unknown(best: Option | None, model: ModelShape, context: int, records: Records) -> tuple[str, ...]:
    found = list(best.unknown) if best is not None else []
    longest = longest_measured(records)
    if not longest:
        found.append("whether code touches these bytes: kvlearn bench hardware is not recorded")
    elif context > longest:
        found.append(f"anything measured beyond {longest:,} tokens: bytes are those of the formulas")
    if context > model.context:
        found.append(f"whether the model can use them: it was made for {model.context:,} tokens")
    if best is not None and best.quality is not None:
        plan = BUDGETS["cpu"].training
        found.append(
            f"quality at this size: it was measured on small models in contexts of {plan.length} tokens"
        )
    return tuple(found)


def _assumed(card: Device, price: float, efficiency: float) -> tuple[str, ...]:
    return (
        f"{price:g} dollars per hour of one {card.name}",
        f"{efficiency:.0%} of its roofline ({card.source}), devices that talk to each other for nothing",
        "all users at the full context, in 16 bit; no prefill, no idle hours",
    )


def longest_measured(records: Records) -> int:
    """The longest context at which a layer's bytes were measured; 0 if none was."""
    try:
        rows = records.rows("hardware")
    except NotRecordedError:
        return 0
    return max(
        (row["length"] for row in rows if row["what"] == "stored" and row["preset"] == "real"), default=0
    )


def decision_map(
    model: str | ModelShape,
    device: str | Device,
    contexts: Sequence[int],
    users: Sequence[int],
    **options: Any,
) -> dict[tuple[int, int], str | None]:
    """The name of what is recommended at each context and number of users; None where nothing is."""
    options.setdefault("records", Records())
    found = {}
    for context in contexts:
        for n in users:
            best = recommend(model, context, n, device, **options).best
            found[context, n] = None if best is None else best.name
    return found


# Routing


@dataclass(frozen=True)
class Request:
    """A kind of request: its context, how many users have one at a time, tokens per second for each."""

    name: str
    context: int
    users: int
    speed: float = 10.0

    def __post_init__(self) -> None:
        validate.instance("name", self.name, str)
        validate.fields_at_least(self, context=1, users=1)
        validate.at_least_zero("speed", self.speed)


@dataclass(frozen=True)
class Assignment:
    """Requests on ``devices`` of a kind, ``dollars`` per hour; both infinite where it cannot serve them."""

    request: Request
    device: str
    devices: float
    dollars: float


@dataclass(frozen=True)
class Plan:
    """A card for each kind of request. ``alone``: dollars per hour if one kind of card had to serve all."""

    assignments: tuple[Assignment, ...]
    alone: Mapping[str, float] = field(default_factory=dict)

    @property
    def dollars(self) -> float:
        return sum(assignment.dollars for assignment in self.assignments)

    def table(self) -> Table:
        """A row per kind of request, then what one kind of card alone would cost."""
        rows = [
            {
                "requests": a.request.name,
                "context": f"{a.request.context:,}",
                "users": f"{a.request.users:,}",
                "tokens/s each": f"{a.request.speed:g}",
                "card": a.device if math.isfinite(a.devices) else "none",
                "cards": f"{a.devices:,.0f}" if math.isfinite(a.devices) else "–",
                "$ per hour": f"{a.dollars:.2f}" if math.isfinite(a.dollars) else "–",
            }
            for a in self.assignments
        ]
        alone = ", ".join(
            f"{name} {dollars:.2f}" if math.isfinite(dollars) else f"{name} cannot"
            for name, dollars in self.alone.items()
        )
        total = (
            f"{self.dollars:.2f} dollars per hour in all"
            if math.isfinite(self.dollars)
            else "no card serves all of it"
        )
        return Table(rows, f"{total}; one kind of card alone: {alone}")

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def __repr__(self) -> str:
        return repr(self.table())


def route(
    model: str | ModelShape,
    requests: Sequence[Request],
    prices: Mapping[str, float],
    *,
    efficiency: float = 0.6,
) -> Plan:
    """The cheapest card for each kind of request, of those that ``prices`` names, in dollars per hour.

    A card holds requests of one kind. Raises ValueError for a model or device whose numbers are not known.
    """
    validate.instance("model", model, (str, ModelShape))
    validate.positive("len(requests)", len(validate.instance("requests", requests, (list, tuple))))
    for request in requests:
        validate.instance("requests", request, Request)
    validate.positive("len(prices)", len(validate.instance("prices", prices, Mapping)))
    for price in prices.values():
        validate.above("prices", price, 0)
    part("efficiency", efficiency)
    shape = MODELS[validate.one_of("model", model, MODELS)] if isinstance(model, str) else model
    cards = {name: DEVICES[validate.one_of("prices", name, DEVICES)] for name in prices}
    costs: dict[str, list[Assignment]] = {name: [] for name in cards}
    for request in requests:
        load = Load.of(shape, request.context)
        for name, card in cards.items():
            group, users = place(load, card, request.speed, efficiency)
            devices = group * -(-request.users // users) if users else math.inf
            costs[name].append(Assignment(request, name, devices, devices * prices[name]))
    chosen = tuple(
        min((costs[name][i] for name in cards), key=lambda assignment: assignment.dollars)
        for i in range(len(requests))
    )
    return Plan(chosen, {name: sum(a.dollars for a in own) for name, own in costs.items()})


def guide() -> None:
    """Menus above, the table of ``recommend`` below; where no kernel runs, the table as it was saved."""
    import ipywidgets as widgets

    lengths = [(f"{n // 1024}K", n) for n in (2**p for p in range(10, 21))]
    counts = [(str(n), n) for n in (2**p for p in range(13))]
    controls: dict[str, Any] = {
        "model": widgets.Dropdown(options=list(MODELS), value="Llama 3.1 8B", description="model"),
        "context": widgets.SelectionSlider(options=lengths, value=32_768, description="context"),
        "users": widgets.SelectionSlider(options=counts, value=64, description="users"),
        "device": widgets.Dropdown(options=list(DEVICES), value="A100 80 GB", description="device"),
        "price": widgets.FloatSlider(value=2.0, min=0.1, max=10, step=0.1, description="$ per hour"),
        "find_anything": widgets.Checkbox(value=True, description="every token must be found"),
        "evidence": widgets.Dropdown(options=EVIDENCE, value="planned", description="quality"),
    }
    records = Records()
    table_with_controls(controls, lambda **values: recommend(**values, records=records).table())
