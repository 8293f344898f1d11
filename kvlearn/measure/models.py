"""Real models to compute with. Every number comes from the file or paper named in ``source``.

Parameters are counted from the published shape, embeddings included; where the source is a configuration, a
test counts them again by building the model without memory. Vision and audio towers do not count.

Of a recurrent layer, ``state`` is heads · key dim · value dim (Mamba: channels · state size), and ``conv``
the convolution's channels · (kernel − 1).
"""

from kvlearn.measure.cache_size import LayerShape, ModelShape

FULL = LayerShape()
LLAMA_3_1 = "meta-llama/llama-models: models/llama3_1/api/sku_list.py"

# gpt-oss: the experts' matrices in MXFP4 (17 bytes for 32 numbers), the rest in bf16 (arXiv:2508.10925).
_GPT_OSS, _GPT_OSS_EXPERTS = 116_829_156_672, 36 * 128 * 3 * 2880 * 2880

_LATENT = LayerShape(latent=512 + 64)
_MAMBA = LayerShape(state=8192 * 16, conv=8192 * 3)
_KDA = LayerShape(state=32 * 128 * 128, conv=3 * 32 * 128 * 3)

MODELS: dict[str, ModelShape] = {
    model.name: model
    for model in (
        ModelShape(
            "Llama 3.1 8B",
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            n_parameters=8_030_261_248,
            context=131_072,
            source=LLAMA_3_1,
        ),
        ModelShape(
            "Llama 3.1 70B",
            n_layers=80,
            n_heads=64,
            n_kv_heads=8,
            head_dim=128,
            n_parameters=70_553_706_496,
            context=131_072,
            source=LLAMA_3_1,
        ),
        ModelShape(
            "Llama 3.1 405B",
            n_layers=126,
            n_heads=128,
            n_kv_heads=8,
            head_dim=128,
            n_parameters=405_853_388_800,
            context=131_072,
            source=LLAMA_3_1,
        ),
        ModelShape(
            "Llama 3.1 405B as the article tells it",
            n_layers=128,
            n_heads=64,
            n_kv_heads=64,
            head_dim=128,
            n_parameters=405_000_000_000,
            context=131_072,
            source="the article's own numbers; compare Llama 3.1 405B",
        ),
        ModelShape(
            "Mistral 7B v0.1",
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            layers=(LayerShape(window=4096),),
            n_parameters=7_241_732_096,
            context=8192,
            source="arXiv:2310.06825, table 1",
        ),
        ModelShape(
            "Mistral 7B v0.2",
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            n_parameters=7_241_732_096,
            context=32_768,
            source="mistralai/Mistral-7B-Instruct-v0.2: config.json (sliding_window: null)",
        ),
        ModelShape(
            "Mixtral 8x7B",
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            n_parameters=46_702_792_704,
            context=32_768,
            source="arXiv:2401.04088, table 1; section 2: fully dense context, no window",
        ),
        ModelShape(
            "Qwen3 32B",
            n_layers=64,
            n_heads=64,
            n_kv_heads=8,
            head_dim=128,
            n_parameters=32_762_123_264,
            context=131_072,
            source="arXiv:2505.09388, table 1; head_dim from the config.json of Qwen/Qwen3-32B",
        ),
        ModelShape(
            "Gemma 2 27B",
            n_layers=46,
            n_heads=32,
            n_kv_heads=16,
            head_dim=128,
            layers=(LayerShape(window=4096), FULL),
            n_parameters=27_227_128_320,
            context=8192,
            source="google/gemma_pytorch: gemma/config.py, get_config_for_27b",
        ),
        ModelShape(
            "Gemma 3 27B",
            n_layers=62,
            n_heads=32,
            n_kv_heads=16,
            head_dim=128,
            layers=5 * (LayerShape(window=1024),) + (FULL,),
            n_parameters=27_009_002_240,
            context=131_072,
            source="google/gemma_pytorch: gemma/config.py, get_config_for_27b_v3",
        ),
        ModelShape(
            "Gemma 4 E2B",
            n_layers=35,
            n_heads=8,
            n_kv_heads=1,
            head_dim=256,
            # The first 15 layers keep a cache, the other 20 read that of layer 13 (window) or 14 (full).
            layers=3 * (4 * (LayerShape(window=512),) + (LayerShape(head_dim=512),))
            + 4 * (4 * (LayerShape(window=512, shared=True),) + (LayerShape(head_dim=512, shared=True),)),
            n_parameters=4_628_569_344,
            context=131_072,
            source="google-deepmind/gemma: gemma/gm/nn/gemma4/_gemma4.py, Gemma4_E2B",
        ),
        ModelShape(
            "gpt-oss-120b",
            n_layers=36,
            n_heads=64,
            n_kv_heads=8,
            head_dim=64,
            layers=(LayerShape(window=128), FULL),
            n_parameters=_GPT_OSS,
            bytes_per_parameter=2 - _GPT_OSS_EXPERTS / _GPT_OSS * (2 - 17 / 32),
            context=131_072,
            source="openai/gpt-oss: gpt_oss/torch/model.py, ModelConfig",
        ),
        ModelShape(
            "DeepSeek-V3",
            n_layers=61,
            n_heads=128,
            n_kv_heads=128,
            head_dim=128,
            layers=(_LATENT,),
            n_parameters=671_026_404_352,
            bytes_per_parameter=1.0,
            context=131_072,
            source="deepseek-ai/DeepSeek-V3: inference/configs/config_671B.json; fp8 weights",
        ),
        ModelShape(
            "DeepSeek-V3.2",
            n_layers=61,
            n_heads=128,
            n_kv_heads=128,
            head_dim=128,
            layers=(LayerShape(latent=512 + 64, index_dim=128, top_k=2048),),
            n_parameters=671_877_929_216,
            bytes_per_parameter=1.0,
            context=131_072,
            source="deepseek-ai/DeepSeek-V3.2-Exp: inference/config_671B_v3.2.json; fp8 weights",
        ),
        ModelShape(
            "Jamba v0.1",
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            # Mamba, 8192 channels with a state of 16 numbers each; attention in the middle of every eight.
            layers=4 * (_MAMBA,) + (FULL,) + 3 * (_MAMBA,),
            n_parameters=51_570_323_328,
            context=262_144,
            source="ai21labs/Jamba-v0.1: config.json; arXiv:2403.19887, section 3.1",
        ),
        ModelShape(
            "MiniMax-Text-01",
            n_layers=80,
            n_heads=64,
            n_kv_heads=8,
            head_dim=128,
            # Lightning attention: linear attention with a constant decay, 64 heads, no convolution.
            layers=7 * (LayerShape(state=64 * 128 * 128),) + (FULL,),
            n_parameters=456_089_655_296,
            context=1_000_000,
            source="MiniMaxAI/MiniMax-Text-01: config.json; arXiv:2501.08313 (trained to 1M tokens)",
        ),
        ModelShape(
            "Qwen3-Next 80B-A3B",
            n_layers=48,
            n_heads=16,
            n_kv_heads=2,
            head_dim=256,
            # Gated DeltaNet: 16 key heads, 32 value heads, all of 128.
            layers=3 * (LayerShape(state=32 * 128 * 128, conv=(2 * 16 + 32) * 128 * 3),) + (FULL,),
            n_parameters=79_674_391_296,
            context=262_144,
            source="Qwen/Qwen3-Next-80B-A3B-Instruct: config.json",
        ),
        ModelShape(
            "Kimi Linear 48B-A3B",
            n_layers=27,
            n_heads=32,
            n_kv_heads=32,
            head_dim=128,
            # Kimi Delta Attention, 32 heads of 128; MLA in layers 4, 8, … 24 and in the last.
            layers=6 * (*3 * (_KDA,), _LATENT) + 2 * (_KDA,) + (_LATENT,),
            n_parameters=49_122_675_072,
            context=1_048_576,
            source="moonshotai/Kimi-Linear-48B-A3B-Instruct: config.json; arXiv:2510.26692",
        ),
        ModelShape(
            "Pythia 2.8B",
            n_layers=32,
            n_heads=32,
            n_kv_heads=32,
            head_dim=80,
            n_parameters=2_775_208_960,
            context=2048,
            source="EleutherAI/pythia: models/2.8B/pythia-2.8b.yml",
        ),
    )
}
"""By name: the models of the course's calculators and tables."""
