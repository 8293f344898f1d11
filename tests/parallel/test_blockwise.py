"""Blockwise attention and the blockwise layer against PyTorch, and what memory they need."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_runs import inputs, one_device

from kvlearn.measure.memory import peak_memory
from kvlearn.model import Decoder, ModelConfig, Spec
from kvlearn.parallel import Rule, blockwise_attention, blockwise_layer


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from([Rule(), Rule(causal=False), Rule(window=1), Rule(window=6)]),
    st.booleans(),
)
def test_outputs_and_gradients_are_those_of_sdpa(tokens: int, block: int, rule: Rule, ragged: bool) -> None:
    lengths = torch.tensor([tokens, max(1, tokens // 3)]) if ragged else None
    q, k, v, d_out = given = inputs((2, 6, 3), tokens, 8)
    if lengths is not None:  # slots behind the end of a row have no effect
        behind = torch.arange(tokens)[:, None] >= lengths[:, None, None, None]
        given = [x.masked_fill(behind, torch.nan) for x in given]
    inner = [x.requires_grad_() for x in given[:3]]
    out = blockwise_attention(inner[0], inner[1], inner[2], rule, lengths=lengths, block=block)
    got = [out.detach(), *torch.autograd.grad(out, inner, given[3])]
    for a, b in zip(got, one_device(q.detach(), k.detach(), v.detach(), d_out, rule, lengths), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=0, atol=1e-5)


def test_queries_may_be_the_last_of_more_keys() -> None:
    q, k, v, _ = inputs((1, 4, 2), 30, 8)
    whole = blockwise_attention(q, k, v)
    torch.testing.assert_close(blockwise_attention(q[:, :, 25:], k, v, block=4), whole[:, :, 25:])


@pytest.mark.parametrize("options", [{}, {"norms": "both"}, {"d_ff": 0}])
def test_a_layer_by_blocks_is_the_layer(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 11, "d_model": 24, "n_layers": 1, "n_heads": 6, "d_ff": 40} | options
    model = Decoder(ModelConfig(layers=[Spec("gqa", n_kv_heads=2)], **shape))  # type: ignore[arg-type]
    layer, x = model.blocks[0], torch.randn(2, 33, 24, requires_grad=True)
    expected = layer(x, None, {})
    d_y = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, *layer.parameters()), d_y)
    y = blockwise_layer(layer, x, block=7)  # type: ignore[arg-type]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    for a, b in zip(torch.autograd.grad(y, (x, *layer.parameters()), d_y), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_of_many_blocks_are_summed_in_fp32() -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=11, d_model=16, n_layers=1, n_heads=2, d_ff=32)
    layer, x, d_y = Decoder(config).blocks[0], torch.randn(1, 96, 16), torch.randn(1, 96, 16)

    def gradients(block: int) -> list[torch.Tensor]:
        part = x.to(layer.mixer.q_proj.weight.dtype).requires_grad_()  # type: ignore[union-attr,arg-type]
        y = blockwise_layer(layer, part, block)  # type: ignore[arg-type]
        return [g.double() for g in torch.autograd.grad(y, (part, *layer.parameters()), d_y.to(y.dtype))]

    wanted = gradients(96)
    layer.bfloat16()
    for got, one, want in zip(gradients(3), gradients(96), wanted, strict=True):
        assert (got - want).norm() < 1.4 * (one - want).norm()  # hardly worse than in one block


def test_second_derivatives_are_refused() -> None:
    q, k, v, _ = (x.requires_grad_() for x in inputs((1, 2, 1), 4, 4))
    (d_q,) = torch.autograd.grad(blockwise_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        d_q.sum().backward()


def test_other_mechanisms_are_refused_by_name() -> None:
    model = Decoder(ModelConfig(vocab_size=11, d_model=24, n_layers=1, n_heads=3, layers=["linear"]))
    with pytest.raises(TypeError, match="linear"):
        blockwise_layer(model.blocks[0], torch.zeros(1, 4, 24))  # type: ignore[arg-type]


def test_bad_input_is_named() -> None:
    q, k, v, _ = inputs((1, 6, 3), 5, 8)
    cases = [
        (
            "KV heads",
            lambda: blockwise_attention(q, k[:, :2].repeat(1, 2, 1, 1), v[:, :2].repeat(1, 2, 1, 1)),
        ),
        ("v", lambda: blockwise_attention(q, k, v[:, :, :4])),
        ("block", lambda: blockwise_attention(q, k, v, block=0)),
        ("time", lambda: blockwise_attention(q, k[:, :, :3], v[:, :, :3])),
        ("lengths", lambda: blockwise_attention(q, k, v, lengths=torch.tensor([1, 2]))),
    ]
    for name, call in cases:
        with pytest.raises((ValueError, TypeError), match=name):
            call()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_square_of_the_tokens() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=11, d_model=32, n_layers=1, n_heads=4, d_ff=128))
    layer = model.blocks[0]

    def train(tokens: int) -> None:
        x = torch.randn(1, tokens, 32, requires_grad=True)
        blockwise_layer(layer, x, block=64).sum().backward()  # type: ignore[arg-type]

    train(64)  # gradients exist from here on
    short, long = (peak_memory(partial(train, n)) for n in (512, 1024))
    assert long < 2.2 * short
    assert long < 4 * 1024 * 1024 * 4 // 4  # a quarter of the scores of four heads
