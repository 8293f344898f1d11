"""Unit 07 takes right answers of every style, gives points for half of one, and trains a model."""

from itertools import combinations, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from answers import earned, full_marks, right, stub, unit_module
from torch import Tensor

from kvlearn import workbench
from kvlearn.grading import check, find_exercise
from kvlearn.measure.models import MODELS

pytestmark = pytest.mark.answers

CHECKS = unit_module("07_hybrids", "checks")
MODEL = find_exercise("07.8")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ours(exercise: str) -> tuple[Any, ...]:
    return right(find_exercise(exercise))


# 07.1


def test_a_table_may_be_made_of_lists_and_of_numpys_numbers() -> None:
    (table,) = ours("07.1")

    def lists(*args: Any) -> list[Any]:
        return [[kind, torch.tensor(stored), float(read)] for kind, stored, read in table(*args)]

    assert full_marks("07.1", CHECKS.table_reference)
    assert full_marks("07.1", lambda *args: tuple(CHECKS.table_reference(*args)))
    assert full_marks("07.1", lists)


def test_a_table_without_states_or_kinds_earns_the_rest() -> None:
    (table,) = ours("07.1")
    assert earned(check("07.1", lambda *a: [("?", *row[1:]) for row in table(*a)])) == [1, 1, 1, 1, 1, 0, 1]
    assert earned(check("07.1", lambda *a: [*table(*a)[:-1], ("all", 0, 0)])) == [1, 1, 1, 1, 1, 1, 0]

    def attention_only(config: Any, *args: Any) -> Any:
        if "linear_key_head_dim" in config or "mamba_expand" in config:
            raise KeyError("a state")
        return table(config, *args)

    assert earned(check("07.1", attention_only)) == [1, 1, 1, 0, 0, 0, 0]


def test_the_table_of_a_real_model_is_the_courses() -> None:
    """Llama 3.1 8B at 128K: kvlearn.measure says the same."""
    shape = MODELS["Llama 3.1 8B"]
    config = {**CHECKS.LLAMA, "torch_dtype": "bfloat16"}
    assert len(CHECKS.table_reference(config, 131_072, 131_072)) == shape.n_layers + 1
    assert CHECKS.table_reference(config, 131_072, 131_072)[-1][1] == 131_072 * 4096 * shape.n_layers


# 07.2


def by_trying(n_layers: int, window: int, hops: Any, first: int, max_len: int, budget: int) -> Any:
    """The last of the smallest sets of places that work, as a set."""
    for n in range(n_layers + 1):
        good = [
            places
            for places in combinations(range(n_layers), n)
            if CHECKS.carried(CHECKS.stack_of(n_layers, window, places), hops, first)
        ]
        if good:
            slots = n * max_len + (n_layers - n) * min(window, max_len)
            return set(good[-1]) if slots <= budget else None
    return None


def test_any_place_that_is_as_good_counts() -> None:
    carries, place = ours("07.2")
    assert full_marks("07.2", carries, by_trying)
    assert full_marks("07.2", CHECKS.carried, by_trying)
    assert full_marks("07.2", carries, lambda *a: None if (got := place(*a)) is None else torch.tensor(got))


def test_carries_alone_earns_its_three_points() -> None:
    carries, _ = ours("07.2")
    assert earned(check("07.2", carries, stub)) == [1, 1, 1, 0, 0, 0]
    assert earned(check("07.2", carries, lambda n, w, hops, first, *_: list(range(first, n)))) == [
        1,
        1,
        1,
        1,
        0,
        0,
    ]


# 07.3


def by_sorting(
    x: Tensor, weights: Tensor, chosen: Tensor, experts: Any, capacity: int | None = None
) -> Tensor:
    k = chosen.shape[1]
    order = (chosen.T.flatten() * 10_000 + torch.arange(chosen.numel())).argsort()
    counts = chosen.flatten().bincount(minlength=len(experts)).tolist()
    y = torch.zeros(len(x), k, x.shape[1])
    for expert, pairs in zip(experts, order.split(counts), strict=True):
        pairs = pairs[:capacity]
        if len(pairs):
            token, rank = pairs % len(x), pairs // len(x)
            y = y.index_put((token, rank), expert(x[token]))
    return (y * weights[..., None]).sum(1)


def by_masks(x: Tensor, weights: Tensor, chosen: Tensor, experts: Any, capacity: int | None = None) -> Tensor:
    y = 0 * x
    for e, expert in enumerate(experts):
        hit = (chosen == e).T  # (k, N): first choices first
        if capacity is not None:
            hit = hit & (hit.flatten().cumsum(0).view_as(hit) <= capacity)
        tokens = hit.any(0).nonzero().flatten()
        if len(tokens):
            weight = (weights.T * hit).sum(0)[tokens, None]
            y = y.index_add(0, tokens, weight * expert(x[tokens]))
    return y


@pytest.mark.parametrize("dispatch", [by_sorting, by_masks, CHECKS.library_dispatch])
def test_experts_may_be_served_in_any_way(dispatch: Any) -> None:
    assert full_marks("07.3", ours("07.3")[0], dispatch)


def test_a_route_may_be_written_in_any_way() -> None:
    dispatch = ours("07.3")[1]

    def by_sort(logits: Tensor, bias: Tensor, k: int) -> list[Tensor]:
        scores = 1 / (1 + (-logits.float()).exp())
        chosen = (scores + bias).sort(dim=-1, descending=True, stable=True).indices[:, :k]
        weights = torch.take_along_dim(scores, chosen, -1)
        return [F.normalize(weights, p=1, dim=-1), chosen.int()]

    assert full_marks("07.3", by_sort, dispatch)
    assert full_marks("07.3", CHECKS.library_route, dispatch)
    assert full_marks("07.3", CHECKS.route_reference, dispatch)


def test_a_loop_over_tokens_loses_the_point_for_the_work_alone() -> None:
    route, _ = ours("07.3")

    def loop(x: Tensor, weights: Tensor, chosen: Tensor, experts: Any, capacity: int | None = None) -> Tensor:
        y = torch.zeros_like(x)
        for token, rank in CHECKS.served(chosen, capacity):
            out = weights[token, rank] * experts[chosen[token, rank]](x[token : token + 1])
            y = y.index_add(0, torch.tensor([token]), out)
        return y

    assert earned(check("07.3", route, loop)) == [1, 1, 1, 1, 2, 0, 1]
    assert earned(check("07.3", route, stub)) == [1, 1, 1, 0, 0, 0, 0]
    assert earned(check("07.3", stub, by_masks)) == [0, 0, 0, 1, 2, 1, 1]


# 07.4


def test_a_balance_may_be_summed_in_any_way() -> None:
    def by_einsum(logits: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
        scores, real = logits.float().softmax(-1), mask.float()
        hits = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        n, k = real.sum(1), chosen.shape[-1]
        pairs = torch.einsum("bte, bt -> be", hits, real) * torch.einsum("bte, bt -> be", scores, real)
        each = logits.shape[-1] / k * pairs.sum(1) / n.clamp(min=1) ** 2
        return each.sum() / (n > 0).sum()

    assert full_marks("07.4", by_einsum)
    assert full_marks("07.4", CHECKS.balance_reference)
    borrowed = check("07.4", CHECKS.library_balance)
    assert borrowed == 0
    assert "kvlearn.model.moe.load_balancing_loss" in borrowed.message


def test_a_balance_for_one_expert_per_token_earns_part() -> None:
    (balance,) = ours("07.4")
    assert earned(check("07.4", lambda a, b, c: balance(a, b, c) * b.shape[-1])) == [1, 0, 0, 0, 1, 0]
    assert earned(check("07.4", lambda a, b, c: balance(a, b, c).detach())) == [1, 1, 0, 1, 1, 1]


# 07.5


def row_by_row(tensors: dict[str, Tensor], H: int, G: int) -> dict[str, Tensor]:
    if unknown := [n for n in tensors if "bias" in n or "ln_3" in n or "score" in n]:
        raise ValueError(unknown[0])
    qkv = tensors["h.0.attn.qkv.weight"]
    n_layers = sum(name.endswith("qkv.weight") for name in tensors)
    width = len(tensors["h.0.mlp.gate_up.weight"]) // 2
    shape = {"H": H, "G": G, "D": len(qkv) // (H + 2 * G), "L": n_layers, "F": width}
    return CHECKS.convert_reference(tensors, shape)  # type: ignore[no-any-return]


def test_a_converter_may_go_row_by_row_or_give_views() -> None:
    (convert,) = ours("07.5")
    assert full_marks("07.5", row_by_row)
    assert full_marks("07.5", lambda *a: {n: torch.nn.Parameter(w) for n, w in convert(*a).items()})
    assert full_marks("07.5", lambda *a: type("State", (dict,), {})(convert(*a)))


def test_what_is_only_renamed_earns_its_points() -> None:
    (convert,) = ours("07.5")

    def without_qkv(*args: Any) -> dict[str, Tensor]:
        return {n: w for n, w in convert(*args).items() if not n.endswith(("q_proj.weight", "k_proj.weight"))}

    assert earned(check("07.5", without_qkv)) == [0, 1, 1, 0, 0, 0]


# 07.6


def test_wrong_kinds_may_be_found_and_returned_in_any_way() -> None:
    _, convert = ours("07.6")

    def by_product(state: dict[str, Tensor], loss: Any) -> set[str]:
        names = [n.partition("blocks.0.")[2] for n in state if n.startswith("blocks.0.")]
        square = [
            n
            for n in names
            if state[f"blocks.0.{n}"].ndim == 2 and len(set(state[f"blocks.0.{n}"].shape)) == 1
        ]
        tried = {}
        for flags in product((0, 1), repeat=len(square)):
            wrong = frozenset(n for n, flag in zip(square, flags, strict=True) if flag)
            mended = dict(state)
            for name in state:
                if name.startswith("blocks.") and name.split(".", 2)[2] in wrong:
                    mended[name] = state[name].T.contiguous()
            tried[wrong] = loss(mended)
        return set(min(tried, key=lambda wrong: tried[wrong]))

    def changing_the_dict(state: dict[str, Tensor], loss: Any) -> tuple[str, ...]:
        state = {name: w.clone() for name, w in state.items()}
        return tuple(by_product(state, loss))

    def by_name(tensors: Any, shapes: Any) -> Any:
        return {n: w.T.contiguous() if "proj" in n else w.clone() for n, w in tensors.items()}

    assert full_marks("07.6", by_product, convert)
    assert full_marks("07.6", changing_the_dict, by_name)
    assert full_marks("07.6", lambda *a: sorted(by_product(*a)), convert)


def test_subsets_of_single_matrices_end_after_a_limited_number_of_calls() -> None:
    _, convert = ours("07.6")

    def by_matrix(state: dict[str, Tensor], loss: Any) -> list[str]:
        square = [n for n, w in state.items() if n.startswith("blocks.") and len({*w.shape}) == w.ndim - 1]
        for flags in product((False, True), repeat=len(square)):
            wrong = [n for n, flag in zip(square, flags, strict=True) if flag]
            loss({n: w.T if n in wrong else w for n, w in state.items()})
        return []

    score = check("07.6", by_matrix, convert)
    assert score.rows[0].status == "raised"
    assert "a kind is transposed in all layers at once" in score.rows[0].came


def test_half_of_07_6() -> None:
    find, convert = ours("07.6")
    assert earned(check("07.6", stub, convert)) == [0, 0, 0, 0, 1, 1]
    assert earned(check("07.6", find, stub)) == [1, 1, 1, 1, 0, 0]
    assert earned(check("07.6", lambda state, loss: [], convert)) == [0, 0, 1, 0, 1, 1]


# 07.7


def by_counting(kinds: Any, n_layers: int, *limits: Any) -> Any:
    return CHECKS.library_design(kinds, n_layers, *limits)


def test_equally_good_patterns_count() -> None:
    (design,) = ours("07.7")
    assert full_marks("07.7", by_counting)
    assert full_marks("07.7", lambda *a: None if (got := design(*a)) is None else got[::-1])
    assert full_marks("07.7", lambda *a: None if (got := by_counting(*a)) is None else tuple(got))


def test_a_pattern_that_is_only_allowed_earns_the_first_point() -> None:
    (design,) = ours("07.7")

    def one_exact(kinds: Any, n: int, *limits: Any) -> Any:
        best = design(kinds, n, *limits)
        if best is None:
            return None
        exact = [name for name in best if kinds[name]["reach"] is None][:1]
        cheap = min(kinds, key=lambda name: kinds[name]["read"])
        return exact + [cheap] * (n - 1) if exact else best

    assert earned(check("07.7", one_exact))[:3] == [1, 0, 0]
    assert earned(check("07.7", lambda *a: sorted(design(*a) or []) or None))[:2] == [1, 2]


# 07.8


def notebook(**changes: Any) -> dict[str, Any]:
    """The names of a solved notebook, and these in place of some."""
    found: dict[str, Any] = {}
    for source in {source for source, _ in MODEL.wiring.parts.values()} | {"07.8"}:
        found |= dict(zip(find_exercise(source).answers, ours(source), strict=True))
    return found | changes


def points(**changes: Any) -> list[float]:
    names = notebook(**changes)
    return earned(check("07.8", *(names[each] for each in MODEL.answers), notebook=names))


def test_a_notebook_without_parts_earns_the_functions() -> None:
    """A solved one trains: tests/course/test_exercises.py grades it."""
    assert points(**dict.fromkeys(MODEL.wiring.parts)) == [1, 2, 1, 0, 0, 0]
    assert points(balance_loss=stub) == [1, 2, 1, 1, 0, 0]


@pytest.mark.slow
def test_a_pattern_by_hand_counts_if_it_learns_and_a_loss_may_gather_and_take_logarithms() -> None:
    def by_gather(logits: Tensor, asked: Tensor, answers: Tensor, balance: Tensor) -> Tensor:
        rows = logits.gather(1, asked[..., None].expand(-1, -1, logits.shape[-1]))
        return -rows.log_softmax(-1).gather(-1, answers[..., None]).mean() + balance / 100

    assert points(layers=lambda *_: ["full", "linear", "linear"], loss=by_gather) == [1, 2, 1, 1, 1, 1]
    assert points(layers=lambda *_: ["linear", "linear", "full"]) == [1, 2, 1, 1, 1, 0]
    assert points(layers=lambda *_: ["full", "full", "full"]) == [0, 2, 1, 1, 0, 0]


@pytest.mark.slow
@pytest.mark.xdist_group("07.8")  # with the others that train the baselines
def test_the_comparison_has_the_baselines_and_a_curve_for_each_model() -> None:
    shown = workbench.compare("07.8", notebook(design=stub))
    assert shown.columns == ("kvlearn's", "yours", "full in every layer", "linear in every layer")
    rows = {what: values for what, *values in shown.rows}
    ours_, yours, full, linear = (int(each.rstrip("%")) for each in rows["right answers on new texts"])
    assert min(ours_, yours, full) > 90 > 60 > linear
    stored = [int(each.replace(",", "")) for each in rows["bytes stored at 65,536 tokens"]]
    assert stored[1] < 0.4 * stored[2]
    assert set(shown.picture.data["curves"]) == set(shown.columns)
    assert {part.name for part, _ in shown.parts if not part.is_theirs} == {"design"}
    assert "07.7 does not have all its points yet" in shown._repr_mimebundle_()["text/html"]
