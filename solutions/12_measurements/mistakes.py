"""Unit 12: known mistakes, each as an edit of the solution."""

from .checks import bench, card, count, fit, model, roof, serve

# 12.1: the bytes of a decode step

count.mistakes(
    r"""
    query heads in place of KV heads
        numbers = 2 * config["num_key_value_heads"] → numbers = 2 * config["num_attention_heads"]
    num_attention_heads counts the queries, which are used and forgotten. The cache has keys and values of
    num_key_value_heads.

    keys only
        numbers = 2 * config["num_key_value_heads"] → numbers = config["num_key_value_heads"]
    A factor of 2 is missing: a token leaves a key *and* a value in each KV head.

    the weights once per sequence
        experts) * size(config["torch_dtype"]) → experts) * size(config["torch_dtype"]) * len(lengths)
    The weights were counted once for each sequence. One step multiplies them with the tokens of all
    sequences while they are there: they are read once, and that is why batches are worth while.

    every sequence as long as the longest
        sum(tokens(config, i, n) for n in lengths for i in layers)
            → sum(tokens(config, i, max(lengths)) for n in lengths for i in layers)
    Each sequence was counted with the longest length of the batch. That is what padding would read; a decode
    kernel reads of each sequence its own tokens.

    only the longest sequence is read
        sum(tokens(config, i, n) for n in lengths for i in layers)
            → sum(tokens(config, i, max(lengths)) for i in layers)
    The cache was counted once for the batch. Weights are shared by all sequences, the cache is not: every
    sequence has keys and values of its own.

    the cache in the dtype of the weights
        size(config.get("cache_dtype", config["torch_dtype"])) → size(config["torch_dtype"])
    cache_dtype was not looked up. A cache is often kept in another type than the weights, for example in fp8
    beside weights in bf16.

    the window not looked at
        return min(length, config["sliding_window"]) if sliding else length → return length
    All tokens were counted in every layer. A "sliding_attention" layer reads and stores the last
    sliding_window of them.

    a full window, however short the text
        return min(length, config["sliding_window"]) if sliding else length
            → return config["sliding_window"] if sliding else length
    A sliding layer was always counted with sliding_window tokens. A short text has fewer.

    a latent for each head
        numbers = config["kv_lora_rank"] + config["qk_rope_head_dim"]
            → numbers = config["num_attention_heads"] * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
    The latent was counted once per head. It is one vector for all heads, from which each makes its own keys
    and values: that is what it saves.

    a latent for the keys and one for the values
        numbers = config["kv_lora_rank"] + config["qk_rope_head_dim"]
            → numbers = 2 * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
    The latent was doubled. Keys and values are made from the same vector, so there is no factor 2.

    the latent without its RoPE part
        numbers = config["kv_lora_rank"] + config["qk_rope_head_dim"] → numbers = config["kv_lora_rank"]
    qk_rope_head_dim is missing. Beside the latent a token keeps a small key with its position, since a
    rotated key cannot be made from the latent.

    all experts read
        chosen = 1 - (1 - share) ** len(lengths) → chosen = 1.0
    All experts were counted as read. A step reads those that a token of its batch has chosen; for a small
    batch these are few.

    k experts read, whatever the batch
        chosen = 1 - (1 - share) ** len(lengths) → chosen = share
    k experts were counted for the whole batch. Each token chooses its own, so a larger batch reads more
    different ones, in the end all of them.

    k new experts for every token
        chosen = 1 - (1 - share) ** len(lengths) → chosen = min(1.0, share * len(lengths))
    Every token was counted with k experts that no other token has chosen. Choices coincide, and an expert
    that two tokens share is read once: E · (1 − (1 − k/E)^B).

    only the active experts stored
        sum(config["parameters"].values())
            → config["parameters"]["other"] + config["parameters"].get("experts", 0) * (
                  config.get("num_experts_per_tok", 1) / config.get("num_local_experts", 1)
              )
    Only k experts were counted as stored. The next token may choose any of them, so all lie in memory.

    the input table read as a whole
        head = config["vocab_size"] → head = (2 - config["tie_word_embeddings"]) * config["vocab_size"]
    Both tables were counted as read. The head multiplies every row; of the input table a step looks up one
    row per sequence.

    one table stored, tied or not
        tables = (2 - config["tie_word_embeddings"]) * → tables =
    One table was counted. Without tie_word_embeddings the input table and the head are two different ones,
    and both are stored.

    layers that share a cache read nothing
        layers = range(config["num_hidden_layers"])
            → layers = range(config["num_hidden_layers"] - config.get("num_kv_shared_layers", 0))
    The layers without a cache of their own were left out of what is read. They store nothing, but they attend
    to the keys and values of an earlier layer, which is read once more.

    layers that share a cache store one
        range(config["num_hidden_layers"] - config.get("num_kv_shared_layers", 0))
            → range(config["num_hidden_layers"])
    The last num_kv_shared_layers were counted with a cache of their own. They read that of an earlier layer.
    """
)

# 12.2: a roofline

roof.mistakes(
    r"""
    a FLOP for a product and its addition
        return 4 * heads * length * head_dim → return 2 * heads * length * head_dim
        return 2 * heads * length * (key + value) → return heads * length * (key + value)
    A product that is added to a sum was counted as one FLOP. It is two: a multiplication and an addition.
    Data sheets count in the same way.

    scores only
        return 4 * heads * length * head_dim → return 2 * heads * length * head_dim
        return 2 * heads * length * (key + value) → return 2 * heads * length * key
    Only the scores were counted. Adding up the values, weighted, takes as many FLOPs again.

    FLOPs by KV heads
        return 4 * heads * length → return 4 * kv_heads * length
    The FLOPs were counted by KV heads. Each *query* head has scores of its own; it is the bytes that a group
    shares, and so the intensity of GQA is H / G.

    bytes by query heads
        2 * 2 * kv_heads * length → 2 * 2 * heads * length
    The keys and values were counted once per query head. The heads of a group use them together: they are
    read once.

    keys only in the bytes
        2 * 2 * kv_heads * length → 2 * kv_heads * length
    A token has a key and a value in each KV head, of 2 bytes per number: four times G · D, not twice.

    the window not looked at
        length = min(length, layer["window"]) → pass
    All tokens were counted in a layer with a window. It looks at the last `window` of them.

    a full window, however short the text
        length = min(length, layer["window"]) → length = layer["window"]
    The window was always counted as full. A text may be shorter.

    the latent's bytes for keys and for values
        return 2 * heads * length * (key + value), 2 * length * key
            → return 2 * heads * length * (key + value), 2 * length * (key + value)
    The latent was read twice, as keys and as values. It is one vector that serves as both, which doubles the
    intensity.

    the latent's values with the RoPE part
        key, value = layer["rank"] + layer["rope"], layer["rank"]
            → key, value = layer["rank"] + layer["rope"], layer["rank"] + layer["rope"]
    The values were counted with rank + rope numbers. The RoPE part carries a position: it takes part in the
    scores, and is no value.

    the latent's scores without the RoPE part
        key, value = layer["rank"] + layer["rope"], layer["rank"]
            → key, value = layer["rank"], layer["rank"]
    The scores were counted over `rank` numbers. The RoPE part belongs to the key: it is read and multiplied
    too.

    a state that is read and not written
        2 * 4 * numbers → 4 * numbers
    The state was counted as read. Every number of it changes with each token, so it is written as well: twice
    the bytes.

    a state that grows with the text
        return 5 * numbers, 2 * 4 * numbers → return 5 * numbers * length, 2 * 4 * numbers * length
    The state was counted once per token of the text. It stands for all of them; a step works on it once, at
    any length.

    bytes per FLOP
        intensity = flops / nbytes → intensity = nbytes / flops
        "memory" if intensity < ridge → "memory" if flops / nbytes < ridge
    The intensity is upside down. It is the number of FLOPs done with each byte that was read.

    memory and compute exchanged
        "memory" if intensity < ridge else "compute" → "compute" if intensity < ridge else "memory"
    The bounds are exchanged. A low intensity means little arithmetic per byte: the device waits for memory.

    bytes and arithmetic one after the other
        max(flops / device["flops"], nbytes / device["bandwidth"])
            → flops / device["flops"] + nbytes / device["bandwidth"]
    The times of arithmetic and of memory were added. Within one computation they overlap; the longer one is
    the time.

    the smaller time
        max(flops / device["flops"], nbytes / device["bandwidth"])
            → min(flops / device["flops"], nbytes / device["bandwidth"])
    The smaller of the two times was taken. Both the arithmetic and the reading have to be done: the larger
    one is the least time.

    one bound for the whole step
        seconds = place(2 * parameters * batch, 2 * parameters, device)[3]
        for layer in layers:
        flops, nbytes = work(layer, length)
        seconds += place(batch * flops, batch * nbytes, device)[3]
        return seconds
            → each = [work(layer, length) for layer in layers]
              flops = 2 * parameters * batch + batch * sum(one[0] for one in each)
              nbytes = 2 * parameters + batch * sum(one[1] for one in each)
              return place(flops, nbytes, device)[3]
    All FLOPs and all bytes were added up before the maximum. The parts run one after the other: while the
    weights wait for arithmetic, the attention of the next layer cannot use the idle memory.

    the weights read once per sequence
        place(2 * parameters * batch, 2 * parameters, device)
            → place(2 * parameters * batch, 2 * parameters * batch, device)
    The weights were counted once for every sequence. One reading serves the whole batch: their intensity
    grows with it, which attention's does not.

    the weights' FLOPs of one sequence
        place(2 * parameters * batch, 2 * parameters, device)
            → place(2 * parameters, 2 * parameters, device)
    The weights were multiplied for one sequence only. They are read once, but each sequence has a token of
    its own to multiply.

    one sequence's cache for the batch
        place(batch * flops, batch * nbytes, device) → place(batch * flops, nbytes, device)
    The cache was read once for the batch. Each sequence has keys and values of its own, so FLOPs and bytes
    both grow with the batch, and attention keeps its intensity.
    """
)

# 12.3: which card is faster

card.mistakes(
    r"""
    the times of memory and arithmetic added
        max(parts[name]["bandwidth"], parts[name]["compute"]) + parts[name]["launches"]
            → sum(parts[name].values())
    All three times were added. Reading and arithmetic happen at the same time, so the larger of the two
    counts; only the launches come on top.

    launches at the same time as the work
        max(parts[name]["bandwidth"], parts[name]["compute"]) + parts[name]["launches"]
            → max(parts[name].values())
    The largest of the three times was taken. In this model a kernel begins when it has been launched: the
    launches come on top of the larger of the two others.

    launches not counted
        job["kernels"] * card["launch"] → 0.0
    The launches are missing. With a small model a step is hundreds of short kernels, and the time to launch
    them decides.

    the weights once per sequence
        (job["weights"] + batch * job["read"]) → batch * (job["weights"] + job["read"])
    The weights were read once for each sequence. A step reads them once for the whole batch.

    the cache of one sequence
        (job["weights"] + batch * job["read"]) → (job["weights"] + job["read"])
    The cache was read for one sequence. Each of the batch has its own.

    stored bytes in place of read ones
        (job["weights"] + batch * job["read"]) → (job["weights"] + batch * job["stored"])
    The stored bytes were taken for the time. What is stored decides whether a job has room; what is *read*
    decides how long a step takes.

    room by what is read
        job["weights"] + batch * job["stored"] <= → job["weights"] + batch * job["read"] <=
    The room was computed from the bytes that a step reads. A cache takes the bytes that it stores, read or
    not.

    room for the cache alone
        job["weights"] + batch * job["stored"] <= → batch * job["stored"] <=
    The weights are missing in the memory. They lie beside the caches.

    the FLOPs of one token
        batch * tokens * job["flops"] / card["flops"] → batch * job["flops"] / card["flops"]
    The FLOPs were counted for one token per sequence. A prompt has `tokens` of them, computed together.

    the bytes once per token of the prompt
        (job["weights"] + batch * job["read"]) → tokens * (job["weights"] + batch * job["read"])
    The bytes were counted once for every token of a prompt. All tokens of a step go through the weights
    together: that is why prefill is bound by arithmetic and decoding is not.

    cards without room not left out
        able = [name for name in cards if room[name]] → able = list(cards)
    The fastest of all cards was returned, although the job does not fit into its memory.

    capacity never a reason
        any(times[name] < times[winner] for name in cards) → False
    The winner's own times were looked at although a faster card was out for want of memory. Then it is
    capacity that decides.

    capacity whenever a card has no room
        any(times[name] < times[winner] for name in cards) → not all(room.values())
    "capacity" was returned whenever some card has no room. It is the reason only if such a card would have
    been faster than the winner.

    the order always that of a before b
        first, _ = fastest(job, 1, tokens, cards) → first = "a"
    The batch at which b is faster was returned. The question is where the order *changes*: at batch 1 either
    of the two may be ahead.

    the last batch before the flip
        return batch → return batch - 1
    The batch before the flip was returned. Asked for is the first one at which the order is the other.

    `most` left out
        range(2, most + 1) → range(2, most)
    The search ended before `most`. The task asks for batches up to and including it.

    a flip where neither has room
        if winner is None:
        return None
        if winner != first:
            → if winner != first:
    A batch was returned for which neither card has room. There is no order there, so nothing flips.
    """
)

# 12.4: users per GPU

serve.mistakes(
    r"""
    GB and GiB taken as the same, powers of 1000
        base = 1024 if "i" in unit else 1000 → base = 1000
    GiB was read as GB. An i in the unit means powers of 1024: 1 GiB is 1.074 GB.

    GB and GiB taken as the same, powers of 1024
        base = 1024 if "i" in unit else 1000 → base = 1024
    GB was read as GiB. Without an i the unit is a power of 1000: a card of 80 GB has 74.5 GiB.

    the two bases exchanged
        base = 1024 if "i" in unit else 1000 → base = 1000 if "i" in unit else 1024
    The bases are exchanged. KiB, MiB, GiB are powers of 1024; KB, MB, GB of 1000.

    only whole amounts
        float(amount) * base → int(float(amount)) * base
    The digits after the point were lost: "1.5 GiB" is 1,610,612,736 bytes.

    users not whole
        int(left // to_bytes(model["stored"])) → left / to_bytes(model["stored"])
    A part of a user was counted. A user whose cache does not fit is not served.

    users rounded to the nearest
        int(left // to_bytes(model["stored"])) → round(left / to_bytes(model["stored"]))
    The number of users was rounded. If half of the last user's cache is missing, this user does not fit:
    round down.

    one user fewer to be safe
        int(left // to_bytes(model["stored"])) → int((left - 1) // to_bytes(model["stored"]))
    The last user was refused although the memory is exactly enough.

    fewer than no users
        max(0, int(left // to_bytes(model["stored"]))) → int(left // to_bytes(model["stored"]))
    The number of users is negative where the weights do not fit. It is 0 then.

    no weights in the memory
        left = to_bytes(gpu["capacity"]) - weights - → left = to_bytes(gpu["capacity"]) -
    The whole memory was given to users. The weights lie in it too, and are often the largest part.

    no workspace in the memory
        - weights - to_bytes(model["workspace"]) → - weights
    The workspace was left out. Activations and buffers take memory beside weights and caches.

    room by what is read
        int(left // to_bytes(model["stored"])) → int(left // to_bytes(model["read"]))
    The users were counted by the bytes that a step reads. Each takes the memory that is stored for it.

    the limit not looked at
        if limit is None: → if True:
    Only the memory was looked at. With a limit on the time of a step there may be fewer users than fit.

    the weights not read in the limit
        (limit * to_bytes(gpu["bandwidth"]) - weights) → (limit * to_bytes(gpu["bandwidth"]))
    The weights are missing in the time of a step. They are read before any user's cache, in every step.

    stored bytes in place of read ones in the limit
        - weights) // read) → - weights) // to_bytes(model["stored"]))
    The limit was divided by what a user stores. A step takes the time of what it *reads*.

    the larger of the two numbers
        (by_time, "latency") if by_time < by_memory else (by_memory, "memory")
            → (by_time, "latency") if by_time > by_memory else (by_memory, "memory")
    The larger of the two numbers was returned. Users have to fit *and* to be served in time: the smaller one
    counts.

    the price of a step, not of a token
        seconds / n * 1e6 → seconds * 1e6
    The price of a million steps was returned. A step makes a token for each user, so a token costs an n-th of
    it. This is why batches are cheap.

    the price of one user alone
        (to_bytes(model["weights"]) + n * to_bytes(model["read"]))
            → (to_bytes(model["weights"]) + to_bytes(model["read"]))
    The step was timed with the cache of one user. It reads those of all n.

    the weights read once per user
        (to_bytes(model["weights"]) + n * to_bytes(model["read"]))
            → n * (to_bytes(model["weights"]) + to_bytes(model["read"]))
    The weights were read once for each user. A step reads them once for all of them.

    dollars per hour as dollars per second
        gpu["dollars_per_hour"] / 3600 * → gpu["dollars_per_hour"] *
    The price per hour was multiplied with seconds. An hour has 3600 of them.

    the price without the limit
        n, _ = users(gpu, model, limit) → n, _ = users(gpu, model)
    The price was computed with all users that fit. With a limit on the time of a step fewer are served, and
    each pays more.

    a price of zero without users
        return math.inf → return 0.0
    Without users the price was 0. The GPU costs money and no token is made: a token is infinitely expensive.
    """
)

# 12.5: exponents

fit.mistakes(
    r"""
    the logarithm of the lengths only
        x, y = (torch.tensor(values).double().log() for values in (n, t))
            → x, y = torch.tensor(n).double().log(), torch.tensor(t).double()
    The line went through t over log n. A power is a straight line only where *both* axes are logarithmic.

    no logarithm
        x, y = (torch.tensor(values).double().log() for values in (n, t))
            → x, y = (torch.tensor(values).double() for values in (n, t))
    The line went through t over n: its slope is seconds per token, not an exponent.

    from the first and the last point
        slope = (x @ y) / (x @ x) → slope = (y[-1] - y[0]) / (x[-1] - x[0])
    The slope was taken between the first and the last point. All the points between are thrown away, and with
    them what they say about the errors.

    a line through the origin
        x, y = x - x.mean(), y - y.mean() → pass
    The line was forced through log n = 0, log t = 0. That says that one token takes one second. Subtract the
    means, or fit a constant too.

    n over t
        slope = (x @ y) / (x @ x) → x, y = y, x
            slope = (x @ y) / (x @ x)
    The axes are exchanged: this is the exponent of the length over the time.

    divided by N
        (len(x) - 2) → len(x)
    The residuals were divided by N. Slope and constant were fitted to the same points, so only N − 2 of their
    squares are independent: with 4 points the error comes out too small by 1.4.

    divided by N − 1
        (len(x) - 2) → (len(x) - 1)
    The residuals were divided by N − 1, as for a mean. Two numbers were fitted, the slope and the constant:
    N − 2.

    the spread of the residuals
        (len(x) - 2) / (x @ x)).sqrt() → (len(x) - 2)).sqrt()
    The standard deviation of the residuals was returned. The slope is the surer, the wider the lengths are
    spread: divide by Σ (x − x̄)² under the root.

    the variance of the slope
        (len(x) - 2) / (x @ x)).sqrt() → (len(x) - 2) / (x @ x))
    The root is missing: this is the square of the standard error.

    the shortest time as the offset
        longest, t = max(n), torch.tensor(t).double()
            → c = min(t)
              p, _ = fit_power(n[1:], [each - c for each in t[1:]])
              return c, (t[-1] - c) / n[-1] ** p, p
    The shortest time was subtracted as the constant. It contains a · nᵖ of the shortest length too, so the
    constant is too large, and the exponent with it.

    no offset
        c, a = c.clamp(min=0), torch.where(c < 0, (x / t).sum(1) / (x / t).square().sum(1), a)
            → c, a = 0 * c, (x / t).sum(1) / (x / t).square().sum(1)
    The law was fitted without its constant. That gives the plain slope, which is too small where a constant
    hides the short lengths.

    offsets below zero
        c, a = c.clamp(min=0), torch.where(c < 0, (x / t).sum(1) / (x / t).square().sum(1), a)
            →
    A negative constant was allowed. Nothing takes less than no time; without the limit c ≥ 0 the constant
    bends the law until its exponent is wrong.

    whole exponents only
        torch.linspace(0.2, 3, 141) → torch.linspace(1, 3, 3)
    Only whole exponents were tried. Real ones lie between, for example where a cost per block or a cache
    changes with the length.

    absolute errors
        laws = torch.stack(((1 / t).expand_as(x), x / t), dim=-1)
            → laws = torch.stack((torch.ones_like(x), x), dim=-1)
        torch.ones_like(x)[..., None] → t.expand_as(x)[..., None]
        ((c[:, None] + a[:, None] * x) / t - 1) → (c[:, None] + a[:, None] * x - t)
    The errors were taken in seconds. The longest times then decide alone, and their noise is larger than the
    whole constant. Divide by t: times are known to a percentage, not to a microsecond.

    the candidate nearest to the slope
        return possible[0] if len(possible) == 1 else None
            → return min(candidates, key=lambda p: abs(p - fit_power(n, t[:, 0].tolist())[0]))
    The candidate nearest to the plain slope was returned, always. A constant makes the slope too small, and
    where the data cannot tell, None is the honest answer.

    the first candidate that is possible
        return possible[0] if len(possible) == 1 else None → return possible[0] if possible else None
    The first possible candidate was returned although another one is possible too. Then the range is too
    short to tell them apart: None.

    the largest candidate that is possible
        return possible[0] if len(possible) == 1 else None → return max(possible, default=None)
    The largest possible candidate was returned although another one is possible too. Data that several laws
    explain prove none of them.

    the candidate that fits best
        for p in candidates:
        a = torch.linspace(0, 1, 5001).double()[1:] * (most / x**p).min()  # as many as one likes to try
        if ((most - a * x**p).amin(0) >= (least - a * x**p).amax(0).clamp(min=0)).any():
        possible.append(p)
            → def squares(p):
                  laws = torch.cat((1 / t, x**p / t), dim=1)
                  best = torch.linalg.lstsq(laws, torch.ones_like(t), driver="gelsd").solution
                  return ((laws @ best - 1) ** 2).sum().item()
              possible = [min(candidates, key=squares)]
    The candidate with the smaller errors was returned, always. Some candidate always fits best; whether it
    fits within the noise, and whether it is the only one, was not asked.

    no offset in what is possible
        .amax(0).clamp(min=0)).any()
            → .amax(0).clamp(min=0)).any() and ((least <= a * x**p) & (a * x**p <= most)).all(0).any()
    A candidate counted as possible only without a constant. With c > 0 it may explain all times.

    a negative offset is possible
        .amax(0).clamp(min=0)).any() → .amax(0)).any()
        a = torch.linspace(0, 1, 5001).double()[1:] * (most / x**p).min()
            → a = torch.linspace(0, 2, 5001).double()[1:] * (most / x**p).max()
    A negative constant was allowed. It makes laws possible that no machine can follow: c is at least 0.

    never an answer
        return possible[0] if len(possible) == 1 else None → return None
    None was returned although exactly one candidate explains the times. It may be that too many counted as
    possible: a candidate has to explain *all* points, with one c and one a.
    """
)

# 12.6: benchmarks

bench.mistakes(
    r"""
    a and g exchanged
        names = ["unequal lengths", → names = ["one after the other",
        names += ["one after the other", → names += ["unequal lengths",
    bench_a interleaves its measurements, but the text grows between the two sides. bench_g has equal
    lengths, and one side runs when the device is warm already.

    c and f exchanged
        "queued work", → "set-up timed",
        "asynchronous", "set-up timed"] → "asynchronous", "queued work"]
    In bench_f the flush is asked for between the two looks at the clock. In bench_c it is asked for before
    the first look, and still in the queue.

    c taken for the right one
        "queued work", "right" → "right", "queued work"
    bench_c flushes and looks at the clock at once. The flush is only queued then: the device is not idle, and
    the step waits for it. bench_d waits before it looks.

    b and h exchanged
        "first call", "warm cache"] → "mean", "warm cache"]
        names = ["unequal lengths", "mean", → names = ["unequal lengths", "first call",
    bench_b runs once before it measures, so nothing is compiled later; its total divided by 21 is a mean.
    bench_h takes a median, but each of its lengths is new and compiled.

    e and i exchanged
        "asynchronous", → "warm cache",
        "first call", "warm cache"] → "first call", "asynchronous"]
    bench_e looks at the clock before the device is done. bench_i waits, and never empties the cache.

    d and i exchanged
        "right", → "warm cache",
        "first call", "warm cache"] → "first call", "right"]
    bench_d leaves out its first pair, and flushes before each run. bench_i does not flush: all runs but the
    first find their data in the cache.

    the clock read too early
        device.run(kernel, length)
        device.synchronize()
        return → device.run(kernel, length)
            return
    The clock is read right behind `run`, which returns at once: that is the time of a launch. Wait until the
    device is done.

    the flush is in the time
        device.flush()
        device.synchronize()
        start = device.now() → device.flush()
            start = device.now()
    The time of emptying the cache is counted: it comes behind the first look at the clock, or it is still in
    the queue then. Flush, wait for the device, and only then look.

    the cache never emptied
        device.flush()
        device.synchronize() → device.synchronize()
    The data are in the device's cache from the second run on. A real step reads weights and caches far larger
    than that: flush before each run.

    a single run
        once(device, kernel, length)
        return median([once(device, kernel, length) for _ in range(21)]) → return once(device, kernel, length)
    One run was measured, the first one. The compiler's half a second is in it.

    the first call among few
        once(device, kernel, length)
        return median([once(device, kernel, length) for _ in range(21)])
            → return sum(once(device, kernel, length) for _ in range(21)) / 21
    The mean of all runs was returned, the first one among them. The compiler's half a second, divided by 21,
    is still many times the step.

    the mean
        return median([once(device, kernel, length) for _ in range(21)])
            → return sum(once(device, kernel, length) for _ in range(21)) / 21
    The mean of the runs was returned. A run that another process has slowed down by a factor of 8 pulls it
    up; the median does not move.

    the slowest run
        return median([once(device, kernel, length) for _ in range(21)])
            → return max(once(device, kernel, length) for _ in range(21))
    The slowest run was returned. It tells what others do on this device, not how long the step takes.

    one after the other
        return median([once(device, a, length) / once(device, b, length) for _ in range(21)])
            → return median([once(device, a, length) for _ in range(21)]) / median(
                  [once(device, b, length) for _ in range(21)]
              )
    All runs of a came before all of b. The device got warmer meanwhile, so b is measured on a slower device.
    Interleave the measurements.

    b over a
        once(device, a, length) / once(device, b, length) for
            → once(device, b, length) / once(device, a, length) for
    The ratio is upside down: asked for is the time of a over that of b.

    a difference in place of a ratio
        once(device, a, length) / once(device, b, length) for
            → once(device, a, length) - once(device, b, length) for
    The times were subtracted. How many *times* as long is a ratio, which does not depend on the temperature.

    unequal lengths
        once(device, a, length) / once(device, b, length) for _ in
            → once(device, a, length + i) / once(device, b, length - i) for i in
    The lengths were changed while measuring. Each new one is compiled anew, and the two sides have different
    work to do.
    """
)

# 12.7: a decoder of one's own

model.mistakes(
    r"""
    too many bytes per sequence
        {"num_key_value_heads": 2, "layer_types": kinds, "sliding_window": 256}
            → {"num_key_value_heads": 4, "layer_types": 4 * ["full_attention"]}
    200 sequences of 8,192 tokens do not fit with this choice. Four KV heads and bfloat16 save a factor of 4
    of the 32 MiB per sequence; a factor of more than 6 is needed.

    the dtype alone
        return {**choice, "cache_dtype": "bfloat16"} → return {"cache_dtype": "bfloat16"}
    A cache in bfloat16 has half the bytes. That makes 63 sequences out of 31; 200 are asked for.

    no full layer
        kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
            → kinds = 4 * ["sliding_attention"]
    All four layers have a window. That saves most, and no layer sees the whole text: one full layer is asked
    for.

    another field changed
        return {**choice, "cache_dtype": "bfloat16"}
            → return {**choice, "cache_dtype": "bfloat16", "torch_dtype": "bfloat16"}
    A field was changed that is not free. The weights are a small part of 1 GiB here; the four fields of the
    cache are yours.

    the batch without the weights
        "weights": weights, "workspace" → "weights": 0, "workspace"
    The weights are missing in the memory. They lie beside the caches: parts.stored_bytes gives both.

    the weights stored by every sequence
        "weights": weights, "workspace": 0, "stored": one
            → "weights": 0, "workspace": 0, "stored": one + weights
    Each sequence was given weights of its own. They are stored once.

    the batch by what is read
        weights, one = parts.stored_bytes(config, 1, context)
            → weights, one = parts.step_bytes(config, [context // 2])
    The bytes of a step in the middle of the text were taken for the room. A cache is allocated for `context`
    tokens from the beginning.

    the batch for one token
        parts.stored_bytes(config, 1, context) → parts.stored_bytes(config, 1, 1)
    One token's bytes were taken as a sequence's: room for `context` tokens is needed.

    one sequence too many
        model)[0] → model)[0] + 1
    One sequence more was promised than fits: the division already gives the number of whole sequences.

    the context without the weights
        key=lambda n: sum(parts.stored_bytes(config, batch, n))
            → key=lambda n: parts.stored_bytes(config, batch, n)[1]
    The context was computed without the weights. Caches and weights share the memory.

    the context of one sequence
        parts.stored_bytes(config, batch, n)) → parts.stored_bytes(config, 1, n))
    The longest context of a single sequence was returned. There are `batch` of them in the memory.

    a line through one token
        contexts = range(1, 2**20 + 1)
        return bisect_right(contexts, memory, key=lambda n: sum(parts.stored_bytes(config, batch, n)))
            → weights, one = parts.stored_bytes(config, batch, 1)
              return min(2**20, max(0, (memory - weights) // one))
    The room was divided by the bytes of the first token. With windows in some layers later tokens cost less:
    the cache is no straight line over the context.

    no longest context
        contexts = range(1, 2**20 + 1) → contexts = range(1, 2**24 + 1)
    A context beyond 2**20 was returned. Where all layers have a window nothing limits it, so the task does.

    the earlier cache still held
        new_cache(batch)  # it has no name, so it is free again → cache = new_cache(batch)
    A power of two came out, since behind the first batch that fitted no larger one was found. Usually the
    last cache still has a name while the next one is tried: then both lie in memory.

    the first that does not fit
        return room → return no_room
    The smallest batch without room was returned, one more than fits.

    one after the other
        no_room, room = 2**20, 0
        while no_room - room > 1:
        batch = (room + no_room) // 2
        try:
        new_cache(batch)  # it has no name, so it is free again
        room = batch
        except MemoryError:
        no_room = batch
        return room
            → room = 0
              while room < 400:
                  try:
                      new_cache(room + 1)
                  except MemoryError:
                      break
                  room += 1
              return room
    The batches were tried one after the other. With thousands of sequences that are thousands of
    allocations; by halves it is about twenty.
    """
)
