"""The cost of serving: users per device, tokens per second and dollars per million tokens.

    users   = ⌊(memory · (1 - reserve) - weights) / stored⌋
    step    = max((weights + users · moved) / bandwidth, users · FLOPs / peak)
    dollars = price per hour / 3600 · step / users · 10⁶

A step gives one token to every user; the dollars are those of a million output tokens. The step is the
roofline's: real ones take longer. ``efficiency`` is the part of bandwidth and peak that is reached, ``busy``
the part of the users' places that is taken, averaged over the hours that are paid for. Prefill, idle hours,
networks and people are not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvlearn import validate
from kvlearn.extras import require
from kvlearn.measure.budget import step_work
from kvlearn.measure.cache_size import ModelShape, cache_bytes, weights_bytes
from kvlearn.measure.devices import DEVICES, Device
from kvlearn.measure.models import MODELS
from kvlearn.measure.table import Table
from kvlearn.measure.units import format_bytes, format_bytes_decimal, format_seconds

HOURS = 8760  # of a year


@dataclass(frozen=True)
class Load:
    """The demands of one model on a device at one context length.

    ``weights``: bytes, once for all users. ``stored``: bytes of cache per user. ``moved``: bytes of cache
    that one step reads and writes per user. ``flops``: of one token of one user.
    """

    weights: float
    stored: float
    moved: float
    flops: float

    def __post_init__(self) -> None:
        for name in ("weights", "moved", "flops"):
            validate.at_least_zero(name, getattr(self, name))
        validate.above("stored", self.stored, 0)

    @classmethod
    def of(cls, model: ModelShape, length: int) -> "Load":
        """By the formulas, with a 16-bit cache."""
        one = step_work(model, length)
        weights = weights_bytes(model)
        return cls(weights, cache_bytes(model, length), one.nbytes - weights, one.flops)

    def with_cache_divided(self, by: float) -> "Load":
        """The same model with a cache ``by`` times smaller, stored and moved; FLOPs as they were."""
        validate.above("by", by, 0)
        return replace(self, stored=self.stored / by, moved=self.moved / by)


def part(name: str, value: Any) -> float:
    """A part above 0, at most 1."""
    if not 0 < validate.finite(name, value) <= 1:
        raise ValueError(f"{name}: expected a part above 0, at most 1, got {value}")
    return float(value)


def measured_load(
    model: ModelShape,
    rows: Sequence[Mapping[str, Any]],
    mechanism: str,
    length: int,
    of_model: str | None = None,
) -> Load:
    """``Load`` from the bytes that ``kvlearn bench hardware`` measured for one layer, for all layers.

    ``rows`` are those of one preset; ``of_model`` tells layers of one mechanism apart. The weights, all of
    the model, are those of ``model``, and so are the FLOPs outside the attention layers: 2 per parameter.
    Raises ValueError where the bytes were not measured at this length.
    """
    validate.instance("model", model, ModelShape)
    for row in validate.instance("rows", rows, (list, tuple)):
        validate.instance("rows", row, Mapping)
    found = {
        row["what"]: row
        for row in rows
        if row.get("mechanism") == mechanism
        and row.get("length") == length
        and row.get("what") in ("stored", "read")
        and of_model in (None, row.get("model"))
        and row.get("measured") is not None
    }
    if len(found) < 2:
        raise ValueError(
            f"rows: expected bytes of {mechanism!r} stored and read at {length} tokens, got none"
        )
    read = found["read"]
    n = model.n_layers
    moved = n * (read["measured"] + read["written"])
    flops = 2.0 * model.n_parameters + n * read["attention"]
    return Load(weights_bytes(model), n * found["stored"]["measured"], moved, flops)


def users_per_device(load: Load, memory: float, reserve: float = 0.1) -> int:
    """How many users fit beside the weights; a part ``reserve`` of the memory is left for everything else."""
    validate.instance("load", load, Load)
    validate.finite("memory", memory)
    if not 0 <= validate.finite("reserve", reserve) < 1:
        raise ValueError(f"reserve: expected a part from 0 to below 1, got {reserve}")
    return max(0, int((memory * (1 - reserve) - load.weights) // load.stored))


def batch_step_seconds(load: Load, device: Device, users: int, efficiency: float = 1.0) -> float:
    """The least time of a step in which each of ``users`` gets one token."""
    validate.instance("load", load, Load)
    validate.instance("device", device, Device)
    users = validate.positive("users", users)
    part("efficiency", efficiency)
    moved = (load.weights + users * load.moved) / device.bandwidth
    return max(moved, users * load.flops / device.peak) / efficiency


def dollars_per_million(
    load: Load,
    device: Device,
    price: float,
    *,
    users: int | None = None,
    reserve: float = 0.1,
    efficiency: float = 1.0,
    busy: float = 1.0,
) -> float:
    """Dollars for a million output tokens at ``price`` dollars per hour; infinite where no user fits.

    ``users`` served together: as many as fit unless given.
    """
    validate.instance("device", device, Device)
    validate.at_least_zero("price", price)
    part("busy", busy)
    part("efficiency", efficiency)
    users = users_per_device(load, device.memory, reserve) if users is None else users
    users = validate.at_least("users", users, 0)
    if users < 1:
        return float("inf")
    return price / 3600 * batch_step_seconds(load, device, users, efficiency) / (users * busy) * 1e6


def devices_needed(load: Load, device: Device, users: int, reserve: float = 0.1) -> float:
    """How many devices hold so many users, each with all weights; infinite where none fits one."""
    validate.instance("device", device, Device)
    users = validate.positive("users", users)
    each = users_per_device(load, device.memory, reserve)
    return -(-users // each) if each else float("inf")


def sharded(device: Device, n: int) -> Device:
    """``n`` devices as one: memory, bandwidth and peak added up. Communication costs nothing here."""
    validate.instance("device", device, Device)
    n = validate.positive("n", n)
    return replace(
        device,
        name=f"{n} × {device.name}" if n > 1 else device.name,
        memory=n * device.memory,
        bandwidth=n * device.bandwidth,
        peak=n * device.peak,
    )


def cost_table(
    model: str = "Llama 3.1 8B",
    context: int = 32_768,
    device: str = "A100 80 GB",
    n_devices: int = 1,
    price: float = 2.0,
    smaller: float = 4.0,
    efficiency: float = 0.6,
) -> Table:
    """One model as it is, and with a cache ``smaller`` times as small: users, speed and dollars.

    ``price``: dollars per hour of one device.
    """
    card = DEVICES[validate.one_of("device", device, DEVICES)]
    n_devices = validate.positive("n_devices", n_devices)
    card = sharded(card, n_devices)
    shape = MODELS[validate.one_of("model", model, MODELS)]
    load = Load.of(shape, validate.positive("context", context))
    validate.at_least_zero("price", price)
    if not 1e-6 <= validate.finite("smaller", smaller) <= 1e6:
        raise ValueError(f"smaller: expected a number from 1e-6 to 1e6, got {smaller}")
    rows = []
    for name, one in (("as it is", load), (f"{smaller:g} times smaller", load.with_cache_divided(smaller))):
        n = users_per_device(one, card.memory)
        row = {"cache": name, "memory per user": format_bytes(one.stored), "users": n}
        if n:
            step = batch_step_seconds(one, card, n, efficiency)
            dollars = dollars_per_million(one, card, n_devices * price, efficiency=efficiency)
            row |= {
                "a step": format_seconds(step),
                "tokens/s": f"{n / step:,.0f}",
                "dollars per million tokens": f"{dollars:.3g}",
            }
        else:
            row |= {"a step": "–", "tokens/s": "–", "dollars per million tokens": "does not fit"}
        rows.append(row)
    return Table(
        rows,
        f"{model} at {context:,} tokens on {card.name} ({format_bytes_decimal(card.memory)}), "
        f"{price:g} dollars per hour each, {efficiency:.0%} of the roofline reached",
    )


def costs() -> None:
    """Sliders above, the table below that follows them.

    The table is an ordinary output: where no kernel runs, on GitHub for one, the saved one is shown.
    """
    require("ipywidgets", "costs")
    import ipywidgets as widgets
    from IPython.display import display

    lengths = [(f"{n // 1024}K", n) for n in (2**p for p in range(10, 18))]
    controls: dict[str, Any] = {
        "model": widgets.Dropdown(options=list(MODELS), value="Llama 3.1 8B", description="model"),
        "context": widgets.SelectionSlider(options=lengths, value=32_768, description="context"),
        "device": widgets.Dropdown(options=list(DEVICES), value="A100 80 GB", description="device"),
        "n_devices": widgets.IntSlider(value=1, min=1, max=8, description="devices"),
        "price": widgets.FloatSlider(value=2.0, min=0.1, max=10, step=0.1, description="$ per hour"),
        "smaller": widgets.FloatSlider(value=4.0, min=1, max=16, step=0.5, description="cache ÷"),
        "efficiency": widgets.FloatSlider(value=0.6, min=0.1, max=1, step=0.05, description="reached"),
    }

    def values() -> dict[str, Any]:
        return {name: control.value for name, control in controls.items()}

    display(widgets.VBox(list(controls.values())))
    table = display(cost_table(**values()), display_id=True)
    for control in controls.values():
        control.observe(lambda _: table.update(cost_table(**values())), names="value")


def saved_per_year(n_devices: int, price: float, part: float) -> float:
    """Dollars that a ``part`` fewer of ``n_devices`` save in a year at ``price`` dollars per hour each."""
    n_devices = validate.at_least("n_devices", n_devices, 0)
    validate.at_least_zero("price", price)
    if not 0 <= validate.finite("part", part) <= 1:
        raise ValueError(f"part: expected 0 to 1, got {part}")
    return n_devices * part * price * HOURS
