"""The article's claims about products and money, its predictions, remarks and headlines.

Most of them cannot be checked from outside; the others are computed. Prices per hour and the part of the
roofline that is reached are assumptions: ``PRICE`` and ``REACHED``.
"""

from dataclasses import replace

from kvlearn.measure import (
    DEVICES,
    GIB,
    KIB,
    MODELS,
    Load,
    cache_bytes,
    dollars_per_million,
    users_per_device,
)
from kvlearn.measure.cache_size import ModelShape
from kvlearn.measure.cost import devices_needed, saved_per_year, sharded
from kvlearn.verdict.claim import Claim, Evidence, Records, Verdict
from kvlearn.verdict.guide import Request, route
from kvlearn.verdict.predictions import PREDICTIONS, Prediction
from kvlearn.verdict.released import RELEASED, without_sharing

HOLDS, CONDITIONS, FAILS, OPEN = Verdict.HOLDS, Verdict.CONDITIONS, Verdict.FAILS, Verdict.OPEN
K32 = 32_768
CARD = DEVICES["A100 80 GB"]
PRICE, REACHED = 2.0, 0.6  # dollars per hour of one card, part of the roofline: assumptions


def _cost(name: str, length: int = K32) -> float:
    return dollars_per_million(Load.of(MODELS[name], length), CARD, PRICE, efficiency=REACHED)


def _assumed(device: str = CARD.name) -> str:
    return f"{device} at {PRICE:g} dollars per hour, {REACHED:.0%} of the roofline"


def mistral_price(_: Records) -> Evidence:
    at = {n: _cost("Mistral 7B v0.2", n) for n in (1024, K32)}
    measured = f"computed, {_assumed()}, a full card: " + ", ".join(
        f"{dollars:.2f} dollars at {n // 1024}K" for n, dollars in at.items()
    )
    note = (
        "32K is version 0.2, without the window that the article credits. A price is a shop's decision; "
        "Mistral's own list said more."
    )
    return Evidence(OPEN, measured, note, {f"{n}": dollars for n, dollars in at.items()})


def mixtral_price(_: Records) -> Evidence:
    card = sharded(CARD, 2)
    dollars = dollars_per_million(Load.of(MODELS["Mixtral 8x7B"], K32), card, 2 * PRICE, efficiency=REACHED)
    measured = f"computed, 2 × {_assumed()}, full cards: {dollars:.2f} dollars at 32K"
    return Evidence(
        OPEN, measured, "32K is right, and without a window. The price is a shop's.", {"dollars": dollars}
    )


def claude_price(_: Records) -> Evidence:
    return Evidence(
        FAILS,
        "",
        "200K is right. $3.00 was the price of a million *input* tokens; output was $15.00.",
    )


def claude_method(_: Records) -> Evidence:
    return Evidence(
        OPEN, "", "Anthropic alone could say. We know of nothing that it published on its attention."
    )


def gemini_price(_: Records) -> Evidence:
    return Evidence(
        FAILS,
        "",
        "10M was a test of retrieval in the report. The product had 128K, then 1M, then 2M tokens. $10.00 "
        "was the price of output after prompts above 128K tokens, $5.00 below.",
    )


def gemini_method(_: Records) -> Evidence:
    return Evidence(
        OPEN, "", "Google alone could say. The report discloses a mixture of experts, no attention."
    )


def gpt_price(_: Records) -> Evidence:
    return Evidence(
        FAILS, "", "128K is right. $5.00 was the price of *input* at launch; output was $15.00, later $10.00."
    )


def gpt_method(_: Records) -> Evidence:
    return Evidence(OPEN, "", 'OpenAI alone could say. The article itself writes "suspected".')


def price_gap(_: Records) -> Evidence:
    times = 3.00 / 0.10
    return Evidence(
        FAILS,
        f"0.10 and 3.00 dollars are {times:.0f}x apart",
        "Wrong by its own numbers. And no measurement of a cache: sizes, margins and hardware differ.",
        {"times": times},
    )


def share_of_cost(_: Records) -> Evidence:
    return Evidence(OPEN, "", "Each operator knows its own share; no survey was named.")


def a_hundred_cards(_: Records) -> Evidence:
    load = Load.of(MODELS["Llama 3.1 8B"], K32)
    users = 100 * users_per_device(load, CARD.memory)
    fewer = devices_needed(load.with_cache_divided(4), CARD, users)
    saved = {price: saved_per_year(100, price, 1 - fewer / 100) / 1e6 for price in (1.0, 2.0, 3.0)}
    measured = (
        f"{users:,} users of Llama 3.1 8B at 32K need 100 A100s, or {fewer:.0f} with a cache ÷ 4; saved per "
        "year: "
        + ", ".join(
            f"{million:.2f} million dollars at {price:g} per hour" for price, million in saved.items()
        )
    )
    inside = [price for price, million in saved.items() if 1 <= million <= 2]
    prices = " to ".join(f"{million / saved[1.0]:.2f}" for million in (1, 2))
    note = (
        f"If all hundred are full of long contexts, at all hours, at {prices} dollars per hour. Where "
        "weights fill the cards, or users are few, nothing is saved."
    )
    return Evidence(
        CONDITIONS if inside else FAILS, measured, note, {f"at {price:g}": m for price, m in saved.items()}
    )


def _shared(name: str) -> int:
    return MODELS[name].n_heads // MODELS[name].n_kv_heads


def memory_per_user(_: Records) -> Evidence:
    names = ("Mixtral 8x7B", "Qwen3 32B", "Llama 3.1 70B", "Llama 3.1 405B", "DeepSeek-V3")
    stored = {name: cache_bytes(MODELS[name], K32) / GIB for name in names}
    measured = ", ".join(f"{name} {size:.2f} GiB" for name, size in stored.items())
    exact = [name for name, size in stored.items() if abs(size - 8) < 0.01]
    shared = [f"{name}, which shares its heads {_shared(name)}x already" for name in exact]
    note = f"8 GiB is {', '.join(shared) or 'none of these'}. From 8 to 2 is the definition of 4x."
    return Evidence(CONDITIONS if exact else FAILS, measured, note, stored)


def cost_per_million(_: Records) -> Evidence:
    ratio = {}
    for length in (1024, K32, 131_072):
        load = Load.of(MODELS["Llama 3.1 8B"], length)
        one, other = (dollars_per_million(x, CARD, PRICE) for x in (load, load.with_cache_divided(4)))
        ratio[length] = one / other
    claimed = 2.00 / 0.30
    short = max(ratio.values()) < 0.8 * claimed
    measured = (
        "dollars before / after, a cache ÷ 4 on a full A100: "
        + ", ".join(f"{times:.2f} at {n // 1024}K" for n, times in ratio.items())
        + f"; the article: {claimed:.2f}"
    )
    note = (
        f"{'Not from' if short else 'From'} a 4 times smaller cache: that gives at most "
        f"{max(ratio.values()):.1f}x."
    ) + (" The rest must come from cheaper cards, more of the roofline, smaller models." if short else "")
    return Evidence(
        FAILS if short else CONDITIONS,
        measured,
        note,
        {f"{n}": times for n, times in ratio.items()},
    )


def practical_context(_: Records) -> Evidence:
    long = [model for model in RELEASED if model.context >= 1_000_000]
    return Evidence(
        CONDITIONS if long else FAILS,
        f"{len(long)} of the {len(RELEASED)} models of chapter 07 were made for 1M tokens: "
        + ", ".join(model.name for model in long),
        "As what an API takes: it was so before the article was written. As what a model uses well: tests of "
        "long contexts show less.",
        {"models": len(long)},
    )


def market(_: Records) -> Evidence:
    return Evidence(OPEN, "", "A forecast without a source. No measurement of ours bears on it.")


def cost_gap(_: Records) -> Evidence:
    return Evidence(
        OPEN,
        "",
        "Not yet due: 12 to 18 months from May 2026 end between May and November 2027. The gap of what, at "
        "equal quality, the article does not say.",
    )


def shops(_: Records) -> Evidence:
    return Evidence(
        OPEN,
        "",
        "They do not publish what each method brings. Together AI's own guide names kernels, quantisation, "
        "speculative decoding and the layout of the cluster; sharing is a property of the model they serve.",
    )


def routing(_: Records) -> Evidence:
    plan = route(MODELS["Llama 3.1 8B"], MIX, PRICES, efficiency=REACHED)
    best = min(plan.alone.items(), key=lambda item: item[1])
    saved = 1 - plan.dollars / best[1]
    measured = (
        f"a mix of {len(MIX)} kinds of requests to Llama 3.1 8B, computed with assumed prices: "
        f"{plan.dollars:.2f} dollars per hour routed, {best[1]:.2f} on the best single card ({best[0]})"
    )
    note = (
        "It pays where the mix is wide and a cheap card suits a part of it; by how much, the prices decide. "
        "With one kind of request there is nothing to route."
        if saved > 0
        else "With this mix and these prices one kind of card is the cheapest for all."
    )
    return Evidence(CONDITIONS if saved > 0 else FAILS, measured, note, {"saved": saved})


# A mix to compute with: kinds of requests, users at a time, tokens per second that each wants. Dollars per
# hour of a card: assumptions, not quotations.
MIX = (
    Request("chat", context=2048, users=400, speed=20),
    Request("documents", context=K32, users=60, speed=20),
    Request("whole books", context=131_072, users=8, speed=10),
)
PRICES = {"RTX 4090": 0.4, "L40S": 0.9, "A100 80 GB": 1.6, "H100": 2.5, "H200": 3.5}


def eighty_percent(_: Records) -> Evidence:
    found = {}
    for name, users in (("one user", 1), ("a full card", None)):
        for length in (1024, K32):
            load = Load.of(MODELS["Llama 3.1 8B"], length)
            small = load.with_cache_divided(5)
            one, other = (dollars_per_million(x, CARD, PRICE, users=users) for x in (load, small))
            found[f"{name}, {length // 1024}K"] = 1 - other / one
    measured = "saved by a cache ÷ 5 on an A100: " + ", ".join(f"{k} {v:.0%}" for k, v in found.items())
    verdict = CONDITIONS if max(found.values()) >= 0.795 and min(found.values()) < 0.4 else FAILS
    note = (
        "As an upper limit, of the part of the cost that is decoding: a 5 times smaller cache, cards full of "
        "long contexts. Prefill, weights and idle hours do not shrink."
        if verdict is CONDITIONS
        else "These four cases do not reach it."
    )
    return Evidence(verdict, measured, note, found)


def kilobytes_per_token(records: Records) -> Evidence:
    model = MODELS["DeepSeek-V3"]
    layer = records.hardware("stored", "mla", K32, model.name)["measured"] / K32
    token = model.n_layers * layer
    gpt2 = 2 * 48 * 1600 * 2  # GPT-2 XL: 48 layers, 25 heads of 64, 16 bit
    baselines = {
        "GPT-2 XL": gpt2,
        "Llama 3.1 8B": cache_bytes(MODELS["Llama 3.1 8B"], 1),
        "Llama 3.1 405B": cache_bytes(MODELS["Llama 3.1 405B"], 1),
        "itself without MLA": cache_bytes(without_sharing(_plain(model)), 1),
    }
    times = {name: size / token for name, size in baselines.items()}
    measured = f"DeepSeek-V3, allocated: {token / KIB:.1f} KiB per token. Less than " + ", ".join(
        f"{name}: {x:.1f}x" for name, x in times.items()
    )
    right = round(token / KIB) == 69 and 4 <= times["GPT-2 XL"] <= 5
    note = (
        "69 is DeepSeek-V3 in KiB, and 4–5x is beside GPT-2 XL, a model of 2019 that is 400 times smaller. "
        if right
        else "What was allocated for DeepSeek-V3 is neither 69 KiB nor 4–5x less than GPT-2 XL. "
    ) + "Beside another baseline it is another factor: name it."
    return Evidence(CONDITIONS if right else FAILS, measured, note, {"KiB": token / KIB, **times})


def _plain(model: ModelShape) -> ModelShape:
    return replace(model, layers=())


def _prediction(prediction: Prediction) -> Claim:
    def check(_: Records) -> Evidence:
        state = prediction.state()
        note = f"{prediction.note} Read off on {prediction.due}. It holds if: {prediction.criterion}"
        return Evidence(prediction.today, state, note)

    return Claim(
        prediction.id,
        "predictions",
        prediction.topic,
        prediction.claimed,
        check,
        prediction.published,
        chapter=13,
    )


CLOSED = "a closed model, without a paper or code to build it from"
UNKNOWN_PRICE = "a list price, and the shape that chapter 12's model of cost needs is not published"

PRODUCTS = (
    Claim(
        "mistral",
        "products",
        "Mistral 7B: 32K, $0.10",
        "Mistral 7B: 32K tokens, $0.10 per million output tokens, by its window.",
        mistral_price,
        "copies of Mistral's price list of March 2024: $0.25",
        chapter=4,
        shows="the window and its versions; chapter 12 has the model of cost",
    ),
    Claim(
        "mixtral",
        "products",
        "Mixtral 8x7B: 32K, $0.30",
        "Mixtral 8x7B: 32K tokens, $0.30 per million output tokens.",
        mixtral_price,
        "copies of Mistral's price list of March 2024: $0.70; resellers from $0.24 to $0.60",
        chapter=4,
        shows="that it has no window; chapter 12 has the model of cost",
    ),
    Claim(
        "claude.price",
        "products",
        "Claude 3.5 Sonnet: 200K, $3.00",
        "Claude 3.5 Sonnet: 200K tokens, $3.00 per million output tokens.",
        claude_price,
        "Anthropic, pricing page of its documentation (2025): $3 input, $15 output",
        shows=UNKNOWN_PRICE,
    ),
    Claim(
        "claude.method",
        "products",
        "… a proprietary MHC variant",
        "Claude 3.5 Sonnet uses a proprietary variant of MHC.",
        claude_method,
        shows=CLOSED,
    ),
    Claim(
        "gemini.price",
        "products",
        "Gemini 1.5 Pro: 10M, $10.00",
        "Gemini 1.5 Pro: 10M tokens, $10.00 per million output tokens.",
        gemini_price,
        "Gemini 1.5 report (2024); Google Cloud documentation (2024): up to 2M tokens; S. Willison, "
        "llm-prices: $5 up to 128K, $10 beyond",
        chapter=8,
        shows="ten million tokens on a ring; not the price",
    ),
    Claim(
        "gemini.method",
        "products",
        "… ring and sparse attention",
        "Gemini 1.5 Pro combines ring and sparse attention.",
        gemini_method,
        "Gemini 1.5 report (2024), model architecture",
        chapter=8,
        shows="that the report does not say; a ring is built from open papers",
    ),
    Claim(
        "gpt.price",
        "products",
        "GPT-4o: 128K, $5.00",
        "GPT-4o: 128K tokens, $5.00 per million output tokens.",
        gpt_price,
        "OpenRouter's listing of gpt-4o-2024-05-13: $5 input, $15 output; of 2024-08-06: $2.50 and $10",
        shows=UNKNOWN_PRICE,
    ),
    Claim(
        "gpt.method",
        "products",
        "… a suspected hybrid",
        "GPT-4o is suspected to be a hybrid.",
        gpt_method,
        shows=CLOSED,
    ),
    Claim(
        "gap",
        "money",
        "$0.10 against $3.00: 10x",
        "Between Mistral 7B's $0.10 and Claude's $3.00 lies a factor of ten.",
        price_gap,
        chapter=12,
    ),
    Claim(
        "share",
        "money",
        "inference: 60–80% of the cost",
        "Inference is 60–80% of the cost of a deployment.",
        share_of_cost,
        shows="a survey of operators, not a measurement; chapter 12 computes the cost of decoding alone",
    ),
    Claim(
        "cards",
        "money",
        "100 A100s: $1–2M a year saved",
        "A hundred A100s with 75% less cache save $1–2M a year.",
        a_hundred_cards,
        chapter=12,
    ),
    Claim(
        "user",
        "money",
        "8 GB per user at 32K, then 2 GB",
        "A concurrent user at 32K tokens takes 8 GB now, 2 GB with 4x sharing.",
        memory_per_user,
        "the configurations named in kvlearn.measure.models",
        chapter=12,
    ),
    Claim(
        "million",
        "money",
        "$2.00 to $0.30 per million",
        "The average cost of a million tokens falls from $2.00 to $0.30.",
        cost_per_million,
        chapter=12,
    ),
    Claim(
        "context",
        "money",
        "practical context 128K to 1M+",
        "Practical context grows from 128K to more than 1M tokens.",
        practical_context,
        "RULER (2024): half of 17 models that claim 32K or more do well at 32K",
        chapter=10,
    ),
    Claim(
        "market",
        "money",
        "a market of $2.5B, then $18B",
        "The market grows from $2.5 to $18 billion.",
        market,
        shows="a forecast of sales, on which no measurement bears",
    ),
    *(_prediction(prediction) for prediction in PREDICTIONS),
    Claim(
        "catch up",
        "remarks",
        "open models close the cost gap",
        "Open models close the cost gap in 12 to 18 months.",
        cost_gap,
        shows="prices of 2027 are needed, and costs are all that chapter 12 computes",
    ),
    Claim(
        "shops",
        "remarks",
        "Together, Fireworks: 2–5x cheaper",
        "Together AI and Fireworks AI are 2–5x cheaper by sharing and windows.",
        shops,
        "Together AI, guide to accelerating inference (2026)",
        chapter=12,
        shows="the cost with a smaller cache, of one model on one card; not what these two firms charge",
    ),
    Claim(
        "routing",
        "remarks",
        "requests routed to hardware",
        "Serving must route requests to the hardware that fits them.",
        routing,
        "The xPU-athalon (2026), arXiv:2604.10852: the best platform varies with batch and length",
        chapter=13,
    ),
    Claim(
        "80%",
        "headlines",
        "up to 80% less inference cost",
        "Compressing, sharing and pruning the cache costs up to 80% less.",
        eighty_percent,
        chapter=12,
    ),
    Claim(
        "69 KB",
        "headlines",
        "69 KB per token, 4–5x less",
        "69 KB per token, 4–5x less memory.",
        kilobytes_per_token,
        'the headline "From 300KB to 69KB per Token" (March 2026): GPT-2 XL to DeepSeek-V3; DeepSeek-V3: 61 '
        "layers of 576 numbers",
        chapter=3,
    ),
)
