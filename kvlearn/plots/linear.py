"""The picture of chapter 06: a state as a memory that is written, faded, erased and read.

Letters beside those of recurrent.py: N keys that are written.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.delta import delta_rule
from kvlearn.attention.linear import linear_attention
from kvlearn.plots.picture import COLOURS, Picture, drawing

POSITIVE, NEGATIVE, GREY = COLOURS["linear"], COLOURS["sliding"], "#8a8a8a"
RULES = {
    "adds": ("linear attention adds", "S + k vᵀ"),
    "fades": ("a decay fades, then adds", "a S + k vᵀ,  a = {decay:g}"),
    "erases": ("the delta rule erases,\nthen writes", "S + β k (v − Sᵀk)ᵀ,  β = {beta:g}"),
}
CELL, LABELS, CHARACTER = 0.152, 14.5, 0.38  # a cell in inches; the left column and a letter in cells


class Read(NamedTuple):
    """The value that a state gives for ``key``, and the ``wanted`` one: the last written under that key."""

    key: int
    given: Float[Tensor, "V"]
    wanted: int
    text: str  # the same as a sum of written values


def state_memory(
    keys: Float[Tensor, "N K"] | None = None,
    values: Float[Tensor, "N V"] | None = None,
    *,
    decay: float = 0.6,
    beta: float = 1.0,
) -> Picture:
    """The state after each of N writes of a value under a key, by three rules, and what it then gives back.

    A row of panels a rule: linear attention adds; a ``decay`` fades all, then adds; the delta rule erases the
    share ``beta`` of what the key gives, then writes that share of the value. A panel shows the key, the
    state S, (K, V), and what it gives for the first two different keys, Sᵀk: as bars, and as a sum of
    what was written. Outlines are the value that was written last under that key.

    Without keys and values: two keys at right angles, and the first of them a second time. States come from
    ``linear_attention`` and ``delta_rule``. Raises ValueError for keys and values that do not fit each other,
    and for more than 9 writes.
    """
    if keys is None or values is None:
        keys, values = _example()
    N, K = validate.tensor("keys", keys, ("writes", "numbers of a key")).shape
    validate.at_most("len(keys)", N, 9, "panels side by side")
    V = validate.tensor("values", values, (N, "numbers of a value")).shape[1]
    keys, values = keys.double(), values.double()
    states = _states(keys, values, decay, beta)
    first = [next(j for j in range(i + 1) if torch.equal(keys[i], keys[j])) for i in range(N)]
    reads = {
        rule: [_reads(states[rule][t], keys, values, first[: t + 1]) for t in range(N)] for rule in RULES
    }
    lengths = [max(len(r.text) for rule in RULES for r in reads[rule][t]) * CHARACTER for t in range(N)]
    wide, high, scale = V + 3.7 + max(V, *lengths[:-1], 0), max(K, 6) + 1.8, float(values.abs().max())
    size = LABELS + (N - 1) * wide + V + 3 + max(V, lengths[-1]), 3 * high + 3.2
    with drawing(size=(CELL * size[0], CELL * size[1])) as (figure, axes):
        for t in range(N):
            x = t * wide
            title = f"write {_name('k', first[t])} → {_name('v', t)}"
            axes.text(x - 1.5, -2.7, title, va="center", weight="bold")
            axes.text(x + V + 1, -2.7, "then read", va="center", weight="bold")
            _cells(axes, x, -1.5, values[None, t], scale)
            for row, rule in enumerate(RULES):
                _cells(axes, x - 1.5, row * high, keys[t, :, None], float(keys.abs().max()))
                _cells(axes, x, row * high, states[rule][t], scale)
                for n, read in enumerate(reads[rule][t]):
                    y = row * high + 3.2 * n
                    axes.text(x + V + 1, y + 0.2, read.text, va="center", fontsize=8.5)
                    _bars(axes, x + V + 1, y + 1.9, read.given, values[read.wanted], scale)
        for row, (about, formula) in enumerate(RULES.values()):
            at, text = row * high + K / 2, "S ← " + formula.format(decay=decay, beta=beta)
            axes.text(-LABELS, at - 0.2, about, va="bottom", weight="bold", fontsize=9)
            axes.text(-LABELS, at + 0.2, text, va="top", fontsize=9)
        axes.set(xlim=(-LABELS, size[0] - LABELS), ylim=(3 * high - 1.6, -3.4), aspect="equal")
        axes.set_axis_off()
    writes = ", ".join(f"{_name('k', first[t])} → {_name('v', t)}" for t in range(N))
    told = "; ".join(
        f"{about}: " + ", ".join(f"{r.text[:-2]} ({_name('v', r.wanted)} is right)" for r in reads[rule][-1])
        for rule, (about, _) in RULES.items()
    )
    alt = f"A state of {K} x {V} numbers after the writes {writes}, by three rules. At the end, {told}."
    return Picture(figure, alt.replace("\n", " "), {"states": states, "reads": reads})


def _example() -> tuple[Tensor, Tensor]:
    """k₁ → v₁, k₂ → v₂, k₁ → v₃."""
    first, second = torch.eye(6)[[1, 4]]
    value = torch.tensor([1.0, 0.7, 0.4, 0.0, 0.0, 0.0])
    return torch.stack((first, second, first)), torch.stack((value, -value.roll(2), value.flip(0)))


def _states(keys: Tensor, values: Tensor, decay: float, beta: float) -> dict[str, Float[Tensor, "N K V"]]:
    """By rule: the state after each write."""
    one = torch.ones(1, 1, 1, dtype=keys.dtype)
    states: dict[str, list[Tensor]] = {rule: [] for rule in RULES}
    for k, v in zip(keys[:, None, None, None], values[:, None, None, None], strict=True):
        before = {rule: states[rule][-1] if states[rule] else None for rule in RULES}
        states["adds"].append(linear_attention(k, k, v, None, before["adds"])[1])
        states["fades"].append(linear_attention(k, k, v, (decay * one).log(), before["fades"])[1])
        states["erases"].append(delta_rule(k, k, v, beta * one, None, before["erases"])[1])
    return {rule: torch.cat(after)[:, 0] for rule, after in states.items()}


def _reads(state: Tensor, keys: Tensor, values: Tensor, first: list[int]) -> list[Read]:
    """Of the first two different keys; ``first`` says of every write so far when its key came first."""
    reads, written = [], values[: len(first)]
    for key in list(dict.fromkeys(first))[:2]:
        given = state.T @ keys[key]
        wanted = max(t for t, same in enumerate(first) if same == key)
        right = torch.allclose(given, values[wanted], atol=0.005 * float(values.abs().max()))
        text = f"{_name('k', key)} gives {_sum(given, written)} {'✓' if right else '✗'}"
        reads.append(Read(key, given, wanted, text))
    return reads


def _sum(given: Float[Tensor, "V"], written: Float[Tensor, "N V"]) -> str:
    """``given`` as a sum of the values written so far, as in "0.6 v₁ + v₂"; of many, the two largest."""
    shares = torch.linalg.lstsq(written.T, given[:, None], driver="gelsd").solution[:, 0].tolist()
    there = [i for i, share in enumerate(shares) if abs(share) > 0.005]
    most = sorted(sorted(there, key=lambda i: -abs(shares[i]))[:2])
    terms = [
        _name("v", i) if abs(shares[i] - 1) < 0.005 else f"{shares[i]:.2g} {_name('v', i)}" for i in most
    ]
    text = " + ".join(terms).replace("+ -", "− ").replace("-", "−") or "0"
    return text + " …" * (len(there) > 2)


def _name(letter: str, i: int) -> str:
    return letter + "₁₂₃₄₅₆₇₈₉"[i]


def _cells(axes: Axes, x: float, y: float, matrix: Float[Tensor, "n m"], scale: float) -> None:
    """A heat map: how opaque a cell is says how large its number is, so that zeros are the page itself."""
    for i, row in enumerate(matrix.tolist()):
        for j, number in enumerate(row):
            fill = to_rgba(POSITIVE if number > 0 else NEGATIVE, min(abs(number) / scale, 1))
            axes.add_patch(Rectangle((x + j, y + i), 1, 1, fc=fill, ec=GREY, lw=0.5))


def _bars(axes: Axes, x: float, y: float, given: Tensor, wanted: Tensor, scale: float) -> None:
    """The values given, upwards where positive, and outlines of the right ones."""
    axes.plot([x, x + len(given)], [y, y], color=GREY, lw=0.6)
    for j, (number, right) in enumerate(zip(given.tolist(), wanted.tolist(), strict=True), start=1):
        at, colour = (x + j - 0.88, y), POSITIVE if number > 0 else NEGATIVE
        axes.add_patch(Rectangle(at, 0.76, -number / scale, fc=colour))
        if right:
            axes.add_patch(Rectangle(at, 0.76, -right / scale, fc="none", ec="#808080", lw=1.3))
