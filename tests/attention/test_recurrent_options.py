"""Options of recurrences that released models have: each in every form, against the naive form."""

from typing import Any

import pytest
import torch
from attention_tools import close, draw, redraw

from kvlearn.attention import REGISTRY, Mechanism

M = 24
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "negative eigenvalues": ("delta", {"beta_max": 2.0, "key_dim": 6}),
    "gated, negative eigenvalues": ("gated_delta", {"beta_max": 2.0, "norm_eps": 0.3}),
    "kda, negative eigenvalues": ("kda", {"beta_max": 2.0, "rank": 5}),
    "mamba with norms": ("mamba", {"d_state": 4, "dt_rank": 3, "norms": True, "norm_eps": 0.1}),
    "mamba2, norm before gate": ("mamba2", {"d_state": 6, "n_groups": 3, "norm": "norm_gate"}),
    "mamba2, gate alone": ("mamba2", {"d_state": 6, "n_groups": 3, "norm": "gate"}),
    "mamba2, limits": ("mamba2", {"d_state": 6, "dt_limit": (0.9, 1.4)}),
    "gated convolution with biases": ("gated_conv", {"width": 4, "bias": True}),
}
every_layer = pytest.mark.parametrize("case", LAYERS)


def layer(case: str) -> Mechanism:
    name, options = LAYERS[case]
    return redraw(REGISTRY[name](M, 3, **options))  # type: ignore[call-arg]


@every_layer
@torch.no_grad()
def test_every_form_and_every_cutting_gives_the_naive_form(case: str) -> None:
    mixer, x = layer(case), draw(2, 13, M)
    expected = mixer.naive(x)
    for form in mixer.forms:
        mixer.form = form
        close(mixer(x), expected)
        cache = mixer.new_cache(2, 13)
        close(torch.cat([mixer(piece, cache) for piece in x.split((5, 1, 1, 6), dim=1)], dim=1), expected)


@every_layer
@torch.no_grad()
def test_the_option_changes_the_output(case: str) -> None:
    name, options = LAYERS[case]
    plain = {k: v for k, v in options.items() if k not in ("beta_max", "norms", "norm", "dt_limit", "bias")}
    with_it, without = layer(case), redraw(REGISTRY[name](M, 3, **plain))  # type: ignore[call-arg]
    without.load_state_dict(with_it.state_dict(), strict=False)
    missing, _ = without.load_state_dict(with_it.state_dict(), strict=False)
    assert not set(missing) - {"norm.weight"}
    x = draw(2, 13, M)
    assert (with_it(x) - without(x)).abs().max() > 1e-2


@torch.no_grad()
def test_a_step_beyond_one_changes_the_sign_of_what_is_stored() -> None:
    """The parity of the number of ones: β = 2 with a fixed key negates the state, β = 0 leaves it."""
    from kvlearn.attention.delta import delta_rule

    bits = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0])
    ones = torch.ones(1, 1, len(bits), 1)
    state = torch.ones(1, 1, 1, 1)
    out, _ = delta_rule(ones, ones, 0 * ones, 2.0 * bits[None, None], None, state)
    assert out.flatten().tolist() == [1.0 - 2 * (n % 2) for n in bits.cumsum(0).tolist()]


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("delta", {"beta_max": 2.5}, "beta_max"),
        ("gated_delta", {"beta_max": 0.0}, "beta_max"),
        ("kda", {"beta_max": -1.0}, "beta_max"),
        ("mamba2", {"dt_limit": (1.0, 0.5)}, "dt_limit"),
        ("mamba2", {"norm": "none"}, "norm"),
        ("gated_conv", {"width": 1}, "width"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_an_impossible_option_is_refused_by_name(name: str, options: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        REGISTRY[name](M, 3, **options)  # type: ignore[call-arg]
