"""Rotary positions: what RoPE promises, and what it agrees with."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf

from kvlearn.attention import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeConfig,
    YarnScaling,
)
from kvlearn.attention.rope import angular_frequencies, rotate_naive


def heads(time: int, head_dim: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, time, head_dim, generator=torch.Generator().manual_seed(seed))


def test_every_pair_is_rotated_by_its_own_angle() -> None:
    """Complex numbers say it in one line: (x_i + j·x_{i+D/2}) · exp(j·m·ω_i)."""
    x, positions = heads(5), torch.tensor([[0, 1, 7, 100, 4000]])
    omega = 10_000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    rotated = torch.complex(*x.double().chunk(2, -1)) * torch.exp(1j * positions[0, :, None] * omega)
    expected = torch.cat((rotated.real, rotated.imag), -1).float()
    torch.testing.assert_close(Rope(16, RopeConfig())(x, positions), expected, atol=1e-3, rtol=1e-3)


def test_position_zero_changes_nothing() -> None:
    x = heads(1)
    assert torch.equal(Rope(16, RopeConfig())(x, torch.tensor([[0]])), x)


@given(m=st.integers(0, 2000), n=st.integers(0, 2000), shift=st.integers(0, 1 << 22))
def test_a_score_depends_on_the_distance_alone(m: int, n: int, shift: int) -> None:
    rope, q, k = Rope(16, RopeConfig()), heads(1), heads(1, seed=1)

    def score(a: int, b: int) -> torch.Tensor:
        return (rope(q, torch.tensor([[a]])) * rope(k, torch.tensor([[b]]))).sum(-1)

    torch.testing.assert_close(score(m, n), score(m + shift, n + shift), atol=1e-4, rtol=0)


def test_rows_may_have_different_positions() -> None:
    rope, x = Rope(16, RopeConfig()), heads(3)
    together = rope(x, torch.tensor([[0, 1, 2], [5, 6, 7]]))
    assert torch.equal(together[0], rope(x, torch.tensor([[0, 1, 2]]))[0])
    assert torch.equal(together[1], rope(x, torch.tensor([[5, 6, 7]]))[1])


def test_half_precision_heads_are_rotated_in_single() -> None:
    rope, x = Rope(16, RopeConfig()), heads(1)
    far = torch.tensor([[50_001]])
    got = rope(x.bfloat16(), far)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), rope(x, far), atol=3e-2, rtol=3e-2)


def exact_angles(head_dim: int, config: RopeConfig, m: int) -> tuple[list[mpf], mpf]:
    """The angles of all pairs at position ``m``, of which the m + 1 tokens end; and the factor. 40 digits."""
    half, theta, factor = head_dim // 2, mpf(config.theta), mpf(1)
    match config.scaling:
        case DynamicScaling(stretch, original):
            excess = max(mpf(stretch) * (m + 1) / original - (mpf(stretch) - 1), mpf(1))
            theta *= excess ** (mpf(head_dim) / (head_dim - 2))
    omega = [theta ** (-mpf(i) / half) for i in range(half)]
    match config.scaling:
        case LinearScaling(by):
            omega = [w / mpf(by) for w in omega]
        case Llama3Scaling(by, low, high, original):
            keep = [(original * w / (2 * mp.pi) - mpf(low)) / (mpf(high) - mpf(low)) for w in omega]
            keep = [min(max(share, mpf(0)), mpf(1)) for share in keep]
            omega = [share * w + (1 - share) * w / mpf(by) for share, w in zip(keep, omega, strict=True)]
        case YarnScaling(by, original, fast, slow):
            first, last = (
                half * mp.log(original / (mpf(turns) * 2 * mp.pi)) / mp.log(theta) for turns in (fast, slow)
            )
            first, last = max(mp.floor(first), mpf(0)), min(mp.ceil(last), mpf(head_dim - 1))
            keep = [1 - min(max((i - first) / (last - first), mpf(0)), mpf(1)) for i in range(half)]
            omega = [share * w + (1 - share) * w / mpf(by) for share, w in zip(keep, omega, strict=True)]
            factor = mp.log(mpf(by)) / 10 + 1
        case LongRopeScaling(short, long, original, sharper):
            divisors = long if m + 1 > original else short
            omega = [w / mpf(by) for w, by in zip(omega, divisors, strict=True)]
            factor = mpf(sharper)
    return [m * w for w in omega], factor


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearScaling(8.0),
        Llama3Scaling(8.0, 1.0, 4.0, 8192),
        YarnScaling(32.0, 4096),
        DynamicScaling(4.0, 8192),
        LongRopeScaling([1.0 + 0.1 * i for i in range(8)], [2.0 + 0.7 * i for i in range(8)], 4096, 1.2),
    ],
    ids=lambda scaling: "none" if scaling is None else type(scaling).__name__,
)
def test_far_angles_are_right(scaling: object) -> None:
    """Of a token at 262K and at 4M, where fp32 would be wrong by 6e-3 and 0.2 radians; and of the last one
    before a scaling changes its angles, and the first after."""
    config = RopeConfig(10_000.0, scaling)  # type: ignore[arg-type]
    x = torch.zeros(1, 1, 1, 16)
    x[..., :8] = 1  # (1, 0) -> factor · (cos, sin)
    for m in (0, 4095, 4096, 5000, 262_143, 4_194_303):
        with mp.workdps(40):
            angles, factor = exact_angles(16, config, m)
            expected = [float(factor * of(angle)) for of in (mp.cos, mp.sin) for angle in angles]
        rotated = Rope(16, config)(x, torch.tensor([[m]]))
        naive = rotate_naive(x, config, [m])
        for got in (rotated, naive, Rope(16, config).bfloat16()(x, torch.tensor([[m]]))):
            torch.testing.assert_close(got.flatten(), torch.tensor(expected), atol=1e-6, rtol=0)
        if m:
            back = Rope(16, config)(rotated, torch.tensor([[-m]])) if not config.depends_on_length else None
            if back is not None:
                torch.testing.assert_close(back / float(factor) ** 2, x, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("scaling", "theirs"),
    [
        (None, {"rope_type": "default"}),
        (LinearScaling(4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            Llama3Scaling(8.0, 1.0, 4.0, 8192),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            YarnScaling(16.0, 4096),
            {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
        ),
        (
            YarnScaling(4.0, 2048, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 2048,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 1.3,
            },
        ),
        (
            YarnScaling(32.0, 4096, truncate=False),
            {
                "rope_type": "yarn",
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
        ),
        # The last dimension of the blend, 35 with theta 10,000, is beyond the 32 pairs.
        (
            YarnScaling(4.0, 131_072),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 131_072},
        ),
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn with options", "yarn, not rounded", "yarn, long"],
)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_scaled_frequencies_are_those_of_transformers(
    scaling: object, theirs: dict[str, object], theta: float
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * 64,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters={"rope_theta": theta, **theirs},
    )
    oracle = LlamaRotaryEmbedding(config)
    omega, factor = angular_frequencies(64, RopeConfig(theta, scaling))  # type: ignore[arg-type]
    torch.testing.assert_close(omega.float(), oracle.inv_freq, atol=0, rtol=1e-6)
    assert factor == pytest.approx(oracle.attention_scaling)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_stay_single_when_the_model_becomes_half(dtype: torch.dtype) -> None:
    rope, far = Rope(16, RopeConfig()), torch.tensor([[8_001]])
    expected = rope(heads(1), far)
    torch.testing.assert_close(rope.to(dtype)(heads(1), far), expected)


@pytest.mark.parametrize("scaling", [LinearScaling, Llama3Scaling, YarnScaling])
def test_a_scaling_that_shrinks_is_refused(scaling: type) -> None:
    arguments = {LinearScaling: (0.5,), Llama3Scaling: (0.5, 1.0, 4.0, 64), YarnScaling: (0.5, 64)}[scaling]
    with pytest.raises(ValueError, match="factor"):
        scaling(*arguments)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("head_dim", "config", "names"),
    [(7, RopeConfig(), "head_dim"), (0, RopeConfig(), "head_dim"), (8, RopeConfig(theta=1.0), "rope.theta")],
)
def test_impossible_rotations_are_refused_by_name(head_dim: int, config: RopeConfig, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        Rope(head_dim, config)
