"""The calculator of chapter 00: the size of a cache, for any model, context, number of users and card."""

from typing import Any

import torch

from kvlearn import validate
from kvlearn.extras import require
from kvlearn.measure.cache_size import cache_bytes, elements_per_token, read_bytes, users, weights_bytes
from kvlearn.measure.controls import table_with_controls
from kvlearn.measure.models import MODELS
from kvlearn.measure.table import Table
from kvlearn.measure.units import GB, format_bytes

PRECISIONS = {"32 bit": torch.float32, "16 bit": torch.bfloat16, "8 bit": torch.float8_e4m3fn}
CARDS = {"24 GB": 24 * GB, "80 GB": 80 * GB, "141 GB": 141 * GB, "8 × 141 GB": 8 * 141 * GB}


def memory_table(
    model: str = "Llama 3.1 8B",
    context: int = 32_768,
    n_users: int = 16,
    precision: str = "16 bit",
    card: str = "80 GB",
) -> Table:
    """Weights and cache of ``n_users`` sequences of ``context`` tokens, and whether a card holds them."""
    shape = MODELS[validate.one_of("model", model, MODELS)]
    dtype = PRECISIONS[validate.one_of("precision", precision, PRECISIONS)]
    context = validate.positive("context", context)
    n_users = validate.positive("n_users", n_users)
    validate.one_of("card", card, CARDS)
    weights = weights_bytes(shape)
    stored = cache_bytes(shape, context, batch=n_users, dtype=dtype)
    read = read_bytes(shape, context, batch=n_users, dtype=dtype)
    fits = users(shape, CARDS[card], context, dtype=dtype)
    lines = {
        "weights": format_bytes(weights),
        "a token adds": f"{elements_per_token(shape):,} numbers, "
        f"{format_bytes(cache_bytes(shape, 1, dtype=dtype))}",
        "cache of one user": format_bytes(stored // n_users),
        f"cache of {n_users}, stored": format_bytes(stored),
        f"cache of {n_users}, read by one step": format_bytes(read),
        "cache beside the weights": f"{stored / weights:.2f} times their size",
        f"users that fit on {card}": str(fits)
        if weights < CARDS[card]
        else "none: the weights alone do not fit",
    }
    title = f"{model}, {context:,} tokens, {precision}"
    return Table([{title: name, " ": value} for name, value in lines.items()])


def calculator() -> None:
    """Sliders above, a table below that follows them."""
    require("ipywidgets", "calculator")
    import ipywidgets as widgets

    def powers(name: str, first: int, last: int, at: int) -> widgets.SelectionSlider:
        options = [
            (f"{n // 1024}K" if n >= 1024 else str(n), n) for n in (2**p for p in range(first, last + 1))
        ]
        return widgets.SelectionSlider(options=options, value=at, description=name, continuous_update=True)

    controls: dict[str, Any] = {
        "model": widgets.Dropdown(options=list(MODELS), value="Llama 3.1 8B", description="model"),
        "context": powers("context", 10, 20, 32_768),
        "n_users": powers("users", 0, 9, 16),
        "precision": widgets.ToggleButtons(options=list(PRECISIONS), value="16 bit", description="cache"),
        "card": widgets.Dropdown(options=list(CARDS), value="80 GB", description="card"),
    }
    table_with_controls(controls, memory_table)
