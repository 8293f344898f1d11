"""kvlearn's attention in models of transformers: the same logits and tokens, by the promised paths."""

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import kvlearn.integrations.transformers as ours

VOCAB, TIME, NEW, LAYERS = 61, 11, 8, 2
FIELDS = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# A window that is shorter than the prompt.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0},
    "gpt_oss": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    },
}
# SDPA has neither softcap nor sinks, so these are compared with transformers' eager attention.
EAGER = {"gemma2", "gpt_oss"}


def model(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**FIELDS, **MODELS[name], **options})
    theirs = "eager" if name in EAGER else "sdpa"
    built = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=theirs).eval()
    for weight in built.parameters():
        nn.init.normal_(weight, std=0.3)
    return built


def prompts(rows: int = 3) -> Tensor:
    return torch.randint(2, VOCAB, (rows, TIME), generator=torch.Generator().manual_seed(1))


def generate(built: Any, tokens: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The new tokens, and the logits of each step."""
    options = {"attention_mask": torch.ones_like(tokens), **options}
    done = built.generate(
        tokens,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return done.sequences[:, tokens.shape[1] :], torch.stack(done.logits, dim=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of the functions was called."""
    count: Counter[str] = Counter()

    def counted(name: str) -> None:
        function = getattr(ours, name)

        def call(*given: Any, **options: Any) -> Any:
            count[name] += 1
            return function(*given, **options)

        monkeypatch.setattr(ours, name, call)

    for name in ("decode_attention", "grouped_attention", "grouped_partial", "sdpa_attention_forward"):
        counted(name)
    return count


def agree(built: Any, tokens: Tensor, **options: Any) -> None:
    """kvlearn's attention gives the tokens and the logits of transformers' own."""
    expected_tokens, expected = generate(built, tokens, **options)
    built.set_attn_implementation(ours.register())
    made, logits = generate(built, tokens, **options)
    assert torch.equal(made, expected_tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_generates_the_same_tokens_from_the_same_logits(name: str, calls: Counter[str]) -> None:
    agree(model(name), prompts())
    steps, prefills = LAYERS * (NEW - 1), LAYERS
    assert calls == {
        "gemma2": {"grouped_partial": steps + prefills},
        "gpt_oss": {"decode_attention": steps, "grouped_partial": prefills},
    }.get(name, {"decode_attention": steps, "grouped_attention": prefills})


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_a_batch_padded_on_the_left_is_attended_with_its_mask(name: str, calls: Counter[str]) -> None:
    tokens = prompts()
    padding = torch.ones_like(tokens)
    for row, pads in enumerate((0, 3, 6)):
        tokens[row, :pads], padding[row, :pads] = 0, 0
    agree(model(name), tokens, attention_mask=padding)
    assert calls["sdpa_attention_forward"] == 0
    # In a window of 5, the padding is out of sight before the last step.
    assert (calls["decode_attention"] > 0) == (name != "llama")


def test_a_window_over_a_cache_that_keeps_everything_is_the_kernels_window(calls: Counter[str]) -> None:
    built = model("mistral")
    expected, _ = generate(built, prompts(), past_key_values=DynamicCache())
    built.set_attn_implementation(ours.register())
    made, _ = generate(built, prompts(), past_key_values=DynamicCache())
    assert torch.equal(made, expected)
    assert calls["decode_attention"] == LAYERS * (NEW - 1)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_static_cache_gives_the_kernel_lengths(name: str, calls: Counter[str]) -> None:
    agree(model(name), prompts(), cache_implementation="static", disable_compile=True)
    assert calls["decode_attention"] == LAYERS * (NEW - 1)


def test_a_model_is_built_with_it_by_name(calls: Counter[str]) -> None:
    config = transformers.LlamaConfig(**FIELDS)
    built = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ours.register())
    generate(built.eval(), prompts())
    assert calls["decode_attention"] == LAYERS * (NEW - 1)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_training_has_the_same_gradients_and_never_runs_the_kernel(name: str, calls: Counter[str]) -> None:
    built, tokens = model(name), prompts()
    gradients = []
    for implementation in (built.config._attn_implementation, ours.register()):
        built.set_attn_implementation(implementation)
        for part in (tokens, tokens[:, :1]):
            built.zero_grad()
            built(part, labels=tokens[:, : part.shape[1]]).logits.square().mean().backward()
            gradients.append(built.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(gradients[2:], gradients[:2], atol=1e-5, rtol=1e-4)
    assert calls["decode_attention"] == 0


MASKS = {
    "prefixes": ([[1, 1, 0, 0], [1, 1, 1, 0]], [2, 3], None),
    "one window": ([[0, 1, 1, 0], [0, 0, 1, 1]], [3, 4], 2),
    "a row shorter than the window": ([[1, 0, 0, 0], [0, 0, 1, 1]], [1, 4], 2),
    "nothing visible": ([[0, 0, 0, 0], [1, 1, 1, 1]], [0, 4], None),
    "two windows": ([[0, 1, 1, 1], [0, 0, 1, 1]], None, None),
    "a row longer than the window": ([[1, 1, 1, 0], [0, 0, 1, 1]], None, None),
    "a hole": ([[1, 0, 1, 1], [1, 1, 1, 1]], None, None),
}


@pytest.mark.parametrize("case", MASKS)
def test_lengths_and_window_say_what_the_mask_says(case: str) -> None:
    rows, lengths, window = MASKS[case]
    visible = ours.visible_keys(torch.tensor(rows, dtype=torch.bool)[:, None, None])
    assert (visible is None) == (lengths is None)
    if visible is not None:
        assert visible.lengths.tolist() == lengths
        assert visible.lengths.dtype == torch.int32
        assert visible.window == window


def call(T: int, S: int = 7, **options: Any) -> tuple[Tensor, Tensor]:
    """One call of our function and of transformers' SDPA with the same arguments."""
    draw = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, heads, n, 12, generator=draw) for heads, n in ((6, T), (2, S), (2, S)))
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    given = {"attention_mask": None, "scaling": 0.7, **options}
    torch.manual_seed(3)
    mine = ours.attention(module, q, k, v, **given)[0]
    torch.manual_seed(3)
    return mine, sdpa_attention_forward(module, q, k, v, **given)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.5},
        {"attention_mask": torch.randn(2, 1, 4, 7, generator=torch.Generator().manual_seed(4))},
        {"attention_mask": torch.rand(2, 6, 4, 7, generator=torch.Generator().manual_seed(4)) < 0.7},
        {"position_bias": torch.randn(1, 6, 4, 7, generator=torch.Generator().manual_seed(4))},
    ],
    ids=["dropout", "a mask of numbers", "a mask per head", "position bias"],
)
def test_what_kvlearn_lacks_falls_back_to_sdpa(options: dict[str, Any], calls: Counter[str]) -> None:
    mine, theirs = call(4, **options)
    torch.testing.assert_close(mine, theirs)
    assert calls == {"sdpa_attention_forward": 1}


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("is_causal", [True, False, None])
def test_causality_is_that_of_transformers(T: int, is_causal: bool | None) -> None:
    mine, theirs = call(T, is_causal=is_causal)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("wrong", [{"softcap": 2.0}, {"s_aux": torch.zeros(6)}], ids=["softcap", "s_aux"])
def test_what_sdpa_would_leave_out_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="softcap, s_aux: expected no dropout"):
        call(4, dropout=0.5, **wrong)


def printed(code: str) -> str:
    """What a fresh Python prints, without the hook that checks shapes."""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_step_is_one_graph_and_a_step_with_a_mask_too() -> None:
    code = """
import torch
from torch import nn
from kvlearn.integrations.transformers import attention
q, cache = torch.randn(2, 6, 1, 12), torch.randn(2, 2, 7, 12)
compiled = torch.compile(attention, fullgraph=True, backend="eager")
for mask in (None, torch.ones(2, 1, 1, 7, dtype=torch.bool)):
    given = (nn.Module(), q, cache, cache, mask)
    torch.testing.assert_close(compiled(*given)[0], attention(*given)[0])
    print("equal")
"""
    assert printed(code).split() == ["equal", "equal"]


def test_without_transformers_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["transformers"] = None  # importing it raises ImportError
try:
    import kvlearn.integrations.transformers
except ModuleNotFoundError as error:
    print(error)
"""
    message = printed(code)
    assert "kvlearn.integrations.transformers needs transformers" in message
    assert "pip install 'kvlearn[hf]'" in message
