"""Unit 13: wrong answers that people give, for a diagnosis and for testing the checks."""

import torch

from .checks import bars, claims, model, table, trial, unstated

# 13.1: claims

claims.mistakes(
    r"""
    query heads in place of KV heads
        ("layers", "kv_heads", → ("layers", "query_heads",
    The query heads were counted. Only keys and values are cached, and query heads share them: it is
    `kv_heads` that counts.

    keys only
        return 2 * heads * head_dim * size * stored, 2 * heads * head_dim * size * read
            → return heads * head_dim * size * stored, heads * head_dim * size * read
    The factor 2 is missing: a token has a key and a value for each KV head.

    bytes for numbers
        return 2 * heads * head_dim * size * stored, 2 * heads * head_dim * size * read
            → return 2 * heads * head_dim * stored, 2 * heads * head_dim * read
    Numbers were counted, not bytes. Multiply by `bytes_per_number`.

    layers counted from 0
        range(1, layers + 1) → range(layers)
    Layers were counted from 0, so that layer 0 came out as global. They are numbered from 1, and multiples of
    `global_every` are global.

    the window in the global layers
        has_window = "window" in config and not is_global → has_window = "window" in config and is_global
    The roles are exchanged: global layers have no window, all others have it.

    no layer is global
        has_window = "window" in config and not is_global → has_window = "window" in config
    Every layer was given the window. Those whose number is a multiple of `global_every` keep all tokens, and
    in a long text they are most of the cache.

    the window is full from the beginning
        min(context, config["window"]) if has_window → config["window"] if has_window
    The whole window was counted although the text is shorter. A cache of fewer tokens holds only those.

    windows read less and store all
        stored += tokens → stored += context
    All tokens were counted as stored. A layer with a window drops the older ones: that is what it is for.

    windows read everything
        min(tokens, config.get("top_k", tokens)) → min(context, config.get("top_k", context))
    A step was said to read all `context` tokens in a layer with a window. It reads what is kept, at most.

    top_k stores less
        stored += tokens → stored += min(tokens, config.get("top_k", tokens))
    Only top_k tokens were counted as stored. The next step may choose others, so all of them stay: stored is
    not read.

    top_k left out
        min(tokens, config.get("top_k", tokens)) → tokens
    The step was said to read everything. With `top_k` it reads at most so many tokens of each layer.

    what is not published counts as 0
        return None → return 0, 0
    (0, 0) was returned where a field is missing. Nothing known is not zero bytes: return None, and no
    verdict can be built on it.

    unknown KV heads taken to be all heads
        needed = [config.get(name)
            → config = {"kv_heads": config.get("query_heads"), **config}
              config["kv_heads"] = config["kv_heads"] or config.get("query_heads")
              needed = [config.get(name)
    Missing KV heads were replaced by the query heads. That is a guess: for a model with grouped queries it is
    wrong by the size of the group.

    GB of 1024³ bytes
        size * 1e9 - new → size * 2**30 - new
    GB were read as GiB. A GB has 10⁹ bytes; the difference of 7% is more than the tolerance.

    any of the numbers is enough
        def is_right(claim, new, old, kind):
            size, saving = claim["gb_per_user"], claim["saving"]
            right = []
            if size is not None:
                right.append(abs(size * 1e9 - new[kind]) <= 0.05 * new[kind])
            if saving is not None:
                right.append(abs(saving - (1 - new[kind] / old[kind])) <= 0.02)
            return any(right)
    A claim with one right and one wrong number was accepted. All that is claimed has to be right together.

    the saving never looked at
        return saving is None or abs(saving - (1 - new[kind] / old[kind])) <= 0.02 → return True
    Only the gigabytes were compared. The saving is half of the claim, and usually the half in the headline.

    the gigabytes never looked at
        if size is not None and abs(size * 1e9 - new[kind]) > 0.05 * new[kind]:
        return False
            →
    Only the saving was compared. A right percentage of a wrong number is a wrong number.

    the share that is left as the saving
        (1 - new[kind] / old[kind]) → new[kind] / old[kind]
    new / old is what is left, not what is saved: 75% saved leaves 0.25.

    the saving against the new model
        (1 - new[kind] / old[kind]) → (old[kind] / new[kind] - 1)
    The difference was divided by the new bytes. A saving is a share of the baseline: 1 − new / old.

    within 5% of the claim
        > 0.05 * new[kind]: → > 0.05 * size * 1e9:
    The tolerance was taken as 5% of the number claimed. It is 5% of yours: a claim that is too large would
    have a larger tolerance.

    a saving of 0 not looked at
        return saving is None or → return not saving or
    A saving of 0 was taken as not claimed. 0 is a number and is claimed; only None is not.

    the saving within 5% of itself
        <= 0.02 → <= 0.05 * abs(1 - new[kind] / old[kind])
    The tolerance of the saving was taken as 5% of it. It is 0.02, whatever the saving: two percentage points.

    what is read against what the baseline stores
        (1 - new[kind] / old[kind]) → (1 - new[kind] / old[0])
    Bytes read were compared with bytes that the baseline stores. Compare the same thing in both: if the
    baseline reads less than it stores, the saving is smaller.

    reading looked at first
        if is_right(claim, new, old, 0):
        return "holds"
        return "holds for what is read" if is_right(claim, new, old, 1) else "does not hold"
            → if is_right(claim, new, old, 1):
                  return "holds for what is read"
              return "holds" if is_right(claim, new, old, 0) else "does not hold"
    "holds for what is read" was returned where the claim is right for stored bytes too. That is the stronger
    statement, so it is asked first.

    stored or read, each number as it fits
        return "holds for what is read" if is_right(claim, new, old, 1) else "does not hold"
            → size_fits = any(is_right({**claim, "saving": None}, new, old, kind) for kind in (0, 1))
              saving_fits = any(is_right({**claim, "gb_per_user": None}, new, old, kind) for kind in (0, 1))
              return "holds for what is read" if size_fits and saving_fits else "does not hold"
    One number was compared with what is stored and the other with what is read. A claim means one of the two:
    both numbers have to fit the same.

    a claim without a baseline does not hold
        if new is None or (claim["saving"] is not None and old is None):
        return "cannot be checked"
            → if new is None:
                  return "cannot be checked"
              if claim["saving"] is not None and old is None:
                  return "does not hold"
    "does not hold" was returned where the baseline is not known. It may hold: nobody can check it, which is
    another verdict.

    a baseline that nobody needs
        (claim["saving"] is not None and old is None) → old is None
    "cannot be checked" was returned for want of a baseline although no saving is claimed. The gigabytes alone
    can be checked.
    """
)

# 13.2: readings

unstated.mistakes(
    r"""
    keys only
        2 * heads * config → heads * config
    The factor 2 is missing: a token has a key and a value per head.

    bits for bytes
        reading["bits"] / 8 → reading["bits"]
    Bits were taken as bytes. A byte has 8 bits: a number of 16 bits has 2 bytes.

    heads exchanged
        if reading["heads"] == "KV" else → if reading["heads"] == "query" else
    "KV" and "query" are exchanged: "KV" means kv_heads of the config.

    stored layers with those that share
        config["layers"] - config["shared_layers"] → config["layers"]
    All layers were counted as stored. The last shared_layers read the cache of others and store nothing.

    read layers without those that share
        "read": config["layers"], → "read": config["layers"] - config["shared_layers"],
    The layers that share were left out of what is read. They store nothing, and read as much as any other.

    only the shared layers are stored
        config["layers"] - config["shared_layers"] → config["shared_layers"]
    The layers that share were counted as those that store. It is the others that have a cache.

    a batch of single tokens
        config["batch"] * config["context"] → config["batch"]
    A batch was counted as `batch` tokens. It is `batch` users, and each of them has `context` tokens.

    KB is 1000 only
        if unit.endswith("iB") and reading["base"] == 1000:
            → if reading["base"] != (1024 if unit.endswith("iB") else 1000):
    KB was read with base 1000 only. By the standard it is; but people write KB for 1024 bytes too, and the
    task asks for both.

    KB is 1024 only
        if unit.endswith("iB") and reading["base"] == 1000: → if reading["base"] == 1000:
    Every unit was read with base 1024. Without an i it may be either.

    KiB may be 1000
        if unit.endswith("iB") and reading["base"] == 1000:
        continue
            →
    KiB was read with base 1000 too. The i settles it: with it the base is 1024.

    every unit is K
        " KMG".index(unit[0]) → 1
    The letter was not looked at. M is the second power of the base and G the third.

    within 1%
        <= last_digit / 2 → <= 0.01 * float(amount)
    A number counted as reproduced within 1%. How exact a printed number is, its digits say: half a unit of
    the last one.

    half a unit of the ones
        <= last_digit / 2 → <= 0.5
    The tolerance is 0.5 whatever was printed. Half a unit of the **last digit** is 0.005 for "1.20".

    zeros at the end dropped
        len(amount.partition(".")[2]) → len(amount.partition(".")[2].rstrip("0"))
    The last digits of "1.20" were counted as those of "1.2", as `str(float(text))` does. A printed zero is a
    digit: it says that the number is known to 0.01.

    a whole unit of the last digit
        <= last_digit / 2 → <= last_digit
    The tolerance is twice too wide. Rounding changes a number by at most half a unit of its last digit.

    rounded down
        abs(value - float(amount)) <= last_digit / 2 → 0 <= value - float(amount) < last_digit
    The number was taken to be cut off behind its last digit. It is rounded: the value may be half a unit
    below it or above.

    exactly the number
        <= last_digit / 2 → <= 1e-9 * value
    Only a value that equals the printed number counted. A printed number is rounded.

    the first reading only
        found.append(reading)
        return found → return [reading]
            return found
    One reading was returned. The first that fits proves nothing as long as others fit too.

    settled by the majority
        {field: each.pop() for field, each in values.items() if len(each) == 1}
            → {
                  field: Counter(reading[field] for reading in found).most_common(1)[0][0]
                  for field in values
                  if 2 * max(Counter(reading[field] for reading in found).values(), default=0) > len(found)
              }
    An answer that most readings give was called settled. A reading that is outvoted is as possible as the
    others.

    settled by the first reading
        values = {field: {reading[field] for reading in found} for field in OPTIONS}
            → values = {field: {reading[field] for reading in found[:1]} for field in OPTIONS}
    The first reading's answers were returned for all of them. Only questions on which **all** agree are
    settled.

    the values for the open ones too
        {field: each.pop() for field, each in values.items() if len(each) == 1}
            → {field: each.pop() if len(each) == 1 else each for field, each in values.items() if each}
    Questions that are open were returned as well. The dict has the settled ones only.

    the question with the most answers
        key=lambda field: max(Counter(each[field] for each in found).values())
            → key=lambda field: -len({each[field] for each in found})
    The question with the most different answers was chosen. One of these answers may leave nearly all
    readings: what counts is how many are left in the worst case.

    the best case
        key=lambda field: max(Counter → key=lambda field: min(Counter
    The question was chosen by its luckiest answer. You do not know the answer yet: plan for the worst one.

    the fewest on average
        key=lambda field: max(Counter(each[field] for each in found).values())
            → key=lambda field: sum(n * n for n in Counter(each[field] for each in found).values())
    The question was chosen that leaves the fewest readings on average. The task asks for the worst case: the
    largest group of readings with one answer.

    the question that splits least
        return min(OPTIONS, key → return max(OPTIONS, key
    The question that leaves the most readings was chosen. Ask the one that leaves the fewest.

    the last of equal ones
        min(OPTIONS, key → min(reversed(OPTIONS), key
    Of several equally good questions the last was returned. The task asks for the first in OPTIONS.

    a question for one reading
        if len(found) < 2: → if not found:
    A question was asked although only one reading is left. There is nothing to ask then: None.
    """
)

# 13.3: experiments

trial.mistakes(
    r"""
    no power
        return (t95[n - 1] + t80[n - 1]) * spread → return t95[n - 1] * spread
    Only the half width of the interval was returned. A true difference of this size is detected in half of
    the experiments, when its estimate happens to be too large; t80 makes it 80%.

    the normal quantiles
        return (t95[n - 1] + t80[n - 1]) * spread → return (1.96 + 0.8416) * spread
    The normal distribution was used. With few seeds the spread itself is uncertain: t95[2] is 4.30, more than
    twice 1.96.

    n degrees of freedom
        return (t95[n - 1] + t80[n - 1]) → return (t95[n] + t80[n])
    The tables were asked at n. The mean was estimated from the same n differences: n − 1 degrees of freedom
    are left.

    divided by n
        * spread / math.sqrt(n) → * spread / n
    The spread was divided by n. The standard error of a mean falls with the root of n: four times the seeds
    halve it.

    the error by n − 1
        * spread / math.sqrt(n) → * spread / math.sqrt(n - 1)
    The root of n − 1 was taken. `spread` is a standard deviation already; the mean of n has the error
    spread / √n.

    not divided at all
        * spread / math.sqrt(n) → * spread
    The root of n is missing. Without it more seeds would not help; with it the error shrinks.

    the error of unpaired runs
        * spread / math.sqrt(n) → * spread * math.sqrt(2 / n)
    A factor √2 was added as for two independent means. `spread` is that of the paired differences: both runs
    are in it.

    one seed is enough
        for n in range(2, 32) if → for n in range(1, 32) if n == 1 or
    One seed was planned. Without a second there is no spread, and no interval.

    one seed more to be safe
        return next(enough, None)
            → n = next(enough, None)
              return n if n is None else n + 1 if n < 31 else None
    One seed more than needed was planned. The first number of seeds that is small enough is the answer.

    the most affordable
        return next(enough, None) → return max(enough, default=None)
    31 seeds were planned whenever they are enough. The fewest that are enough cost less.

    31 where even they are too few
        return next(enough, None) → return next(enough, 31)
    31 seeds were planned although they do not detect the difference. Such an experiment costs money and
    decides nothing: None.

    looked before the end
        measured = [measure(seed) for seed in range(n)]
            → measured = []
              for seed in range(n):
                  measured.append(measure(seed))
                  seen = [each for each in measured if each is not None]
                  few = len(seen) < 3
                  half = math.inf if few else t95[len(seen) - 1] * stdev(seen) / math.sqrt(len(seen))
                  if seen and fmean(seen) - half > claim["at_most"]:
                      return n, "refuted"
    The experiment stopped at the first seed that made the interval clear. With a look after each seed, equal
    designs come out as different far more often than in 5%.

    seeds added until it is clear
        left = [each for each in measured if each is not None]
            → left = [each for each in measured if each is not None]
              for seed in range(n, 40):
                  half = stdev(left) * t95[len(left) - 1] / math.sqrt(len(left)) if len(left) > 1 else 0
                  if len(left) > 30 or abs(fmean(left or [0]) - claim["at_most"]) > half:
                      break
                  left += [each for each in [measure(seed)] if each is not None]
    Seeds were added as long as the result was open. That finds differences by luck: the number of seeds is
    fixed before the first run.

    one seed again and again
        measure(seed) for seed in range(n) → measure(0) for seed in range(n)
    The same seed was measured n times. The runs are copies of one another and tell nothing about the spread
    over seeds.

    seeds from 1 on
        measure(seed) for seed in range(n) → measure(seed) for seed in range(1, n + 1)
    Seeds 1 to n were measured. They are counted from 0: the task asks for 0 to n − 1.

    diverged runs as no difference
        [each for each in measured if each is not None] → [each or 0.0 for each in measured]
    A diverged run was counted as a difference of 0. It is no measurement: leave it out.

    diverged runs replaced
        measured = [measure(seed) for seed in range(n)]
            → measured = [measure(seed) for seed in range(n)]
              for seed in range(n, n + measured.count(None)):
                  measured.append(measure(seed))
    New seeds were run for those that diverged. Then a method that diverges often looks as good as one that
    never does; the plan says n seeds.

    decided by the mean
        low, high = fmean(left) - half, fmean(left) + half → low = high = fmean(left)
    The mean alone was compared with at_most. Its interval says what the seeds allow; where at_most is inside,
    they cannot decide.

    compared with zero
        if low > claim["at_most"]: → if low > 0:
    The interval was compared with 0. The claim is not that it costs nothing, but that it costs at most
    `at_most`.

    supported unless refuted
        return n, "supported" if high <= claim["at_most"] else "undecided" → return n, "supported"
    What was not refuted was called supported. An interval with at_most inside allows both.

    refuted by the upper end
        if low > claim["at_most"]: → if high > claim["at_most"]:
    "refuted" was returned as soon as the upper end is above at_most. The whole interval has to be above it.

    the spread for the error
        * stdev(left) / math.sqrt(len(left)) → * stdev(left)
    The interval has the width of single differences. That of their mean is smaller by the root of their
    number.

    the spread that was planned with
        * stdev(left) / → * claim["spread"] /
    The interval was made with the spread of the plan. That was a guess before the first run; now the
    differences themselves say how far they scatter.

    degrees of freedom of the plan
        half = t95[len(left) - 1] → half = t95[n - 1]
    The table was asked at the planned number minus 1. Diverged runs are no measurements: it is the number of
    differences left, minus 1.

    divided by the planned number
        / math.sqrt(len(left)) → / math.sqrt(n)
    The error was divided by the root of the planned number. Only the differences that are left make the mean.

    the power in the interval
        half = t95[len(left) - 1] → half = t80[len(left) - 1]
    The interval was made with t80. That one belongs to the plan; an interval of 95% has t95 alone.

    wrong by the whole difference
        if low > claim["at_most"]: → if low > claim["at_most"] + claim["difference"]:
    The interval had to be above at_most + difference. The difference is what the plan is made for; the claim
    is refuted as soon as the interval is above `at_most`.

    a difference of 0 dropped
        each is not None] → each]
    A difference of exactly 0 was dropped with the diverged runs. It is a measurement; only None is not.

    n without the diverged runs
        return n, "refuted" → return len(left), "refuted"
        return n, "supported" → return len(left), "supported"
    The number of differences that are left was returned. n is the number that was planned and run.

    the spread over n
        stdev(left) / → stdev(left) * math.sqrt((len(left) - 1) / len(left)) /
    The squares were divided by their number. The mean was estimated from them, so it is their number minus 1;
    `statistics.pstdev` and numpy's `std` divide by n.
    """
)

# 13.4: users and prices

table.mistakes(
    r"""
    no reserve
        gpu["memory"] * (1 - given["reserve"]) - model["weights"] → gpu["memory"] - model["weights"]
    The reserve was given to users. That part of the memory stays free for everything else.

    no weights in the memory
        (1 - given["reserve"]) - model["weights"] → (1 - given["reserve"])
    The weights are missing. They lie in the same memory as the caches.

    users rounded to the nearest
        int(room // model["cache"]) → round(room / model["cache"])
    The number of users was rounded. A user whose cache does not fit as a whole is not served.

    users rounded up
        int(room // model["cache"]) → math.ceil(room / model["cache"])
    The number of users was rounded up. The last one's cache does not fit as a whole: round down.

    the reserve of what the weights leave
        gpu["memory"] * (1 - given["reserve"]) - model["weights"]
            → (gpu["memory"] - model["weights"]) * (1 - given["reserve"])
    The reserve was taken of what the weights leave. It is a part of the whole memory.

    parts of users
        int(room // model["cache"]) → room / model["cache"]
    A part of a user was counted. Nobody is served by half a cache: round down.

    fewer than no users
        return max(0, int(room // model["cache"])) → return int(room // model["cache"])
    The number of users is negative where the weights do not fit. It is 0 then.

    free where nobody fits
        return math.inf → return 0.0
    The price is 0 where nobody fits. No token comes out at any price: math.inf.

    the weights read for each user
        (model["weights"] + n * model["cache"]) → n * (model["weights"] + model["cache"])
    The weights were read once for each user. One step reads them once for all of them; that is why more users
    make tokens cheaper.

    no weights in the step
        (model["weights"] + n * model["cache"]) / gpu["bandwidth"] → n * model["cache"] / gpu["bandwidth"]
    Only the caches were read. Each step reads the weights too, and a smaller cache does not change that.

    one cache in the step
        (model["weights"] + n * model["cache"]) / gpu["bandwidth"]
            → (model["weights"] + model["cache"]) / gpu["bandwidth"]
    The cache of one user was read. A step reads those of all of them.

    only the places taken are read
        (model["weights"] + n * model["cache"]) → (model["weights"] + n * given["busy"] * model["cache"])
    A step was said to read the caches of the busy places only. Here it reads every user's; `busy` counts the
    tokens that somebody pays for.

    the shorter of the two times
        max(memory, n * model → min(memory, n * model
    The shorter time was taken. A step is over when both are: the longer one counts.

    arithmetic at its peak
        max(memory, n * model["flops"] / gpu["flops"]) / given["reached"]
            → max(memory / given["reached"], n * model["flops"] / gpu["flops"])
    Only the bandwidth was taken as reached in part. `reached` is the part of bandwidth **and** FLOP/s.

    arithmetic left out
        max(memory, n * model["flops"] / gpu["flops"]) → memory
    Only the bytes were timed. With many users arithmetic takes longer than memory, and then a smaller cache
    saves nothing any more.

    arithmetic of one user
        n * model["flops"] / gpu["flops"] → model["flops"] / gpu["flops"]
    The FLOPs of one token were taken. A step computes one for each user.

    memory and arithmetic one after the other
        max(memory, n * model["flops"] / gpu["flops"]) → (memory + n * model["flops"] / gpu["flops"])
    The two times were added. Reading and computing go on side by side: the longer one counts.

    multiplied by what is reached
        / given["reached"] → * given["reached"]
    The time was multiplied by `reached`. A kernel that reaches 60% of the bandwidth takes longer: divide.

    everything at its peak
        / gpu["flops"]) / given["reached"] → / gpu["flops"])
    `reached` was left out. Kernels reach a part of the bandwidth on the data sheet.

    every place taken
        / (n * given["busy"]) → / n
    All places were taken as busy. Those that are empty at night are paid for, and give no tokens.

    multiplied by busy
        / (n * given["busy"]) * 1e6 → / n * given["busy"] * 1e6
    The price was multiplied by `busy`. Fewer tokens that are paid for make each of them cost more: divide. In
    `a / n * busy` only n is below the line.

    the price of a step
        / (n * given["busy"]) * 1e6 → / given["busy"] * 1e6
    The price of a step was taken for that of a token. A step makes one token for each user.

    dollars per hour as per second
        gpu["price"] / 3600 → gpu["price"]
    The price per hour was charged for each second. An hour has 3,600 of them: divide by that.

    per thousand tokens
        * 1e6 → * 1e3
    The price is that of a thousand tokens. Asked for is a million.

    the next factor of two
        for k in range(1, 1025)} → for k in (2**i for i in range(11))}
    Only powers of two were tried. The smallest whole number that is enough may lie between them.

    strictly below the ratio
        <= most), None) → < most), None)
    Prices equal to the ratio were not enough. "At most" includes equality: for a ratio of 1 nothing has to be
    divided.

    the largest factor where none is enough
        <= most), None) → <= most), 1024)
    1024 was returned although it is not enough. If arithmetic or the weights keep the price up, no divisor is
    the answer: None.

    decisive by the difference
        max(prices) / min(prices) → max(prices) - min(prices)
    The prices were subtracted. How many times as high the price can be is a quotient, and does not depend on
    what the other assumptions are.

    decisive by the width of its range
        max(prices) / min(prices) → max(ranges[name]) / min(ranges[name])
    The width of the assumption's own range was compared. What counts is what it does to the price: a reserve
    that is ten times as large may hardly change it.

    decisive in one direction
        max(prices) / min(prices) → prices[1] / prices[0]
    The price at the high value was divided by that at the low one. An assumption that lowers the price as it
    grows, such as `busy`, then counts as one that hardly matters.

    decisive in the other direction
        max(prices) / min(prices) → prices[0] / prices[1]
    The price at the low value was divided by that at the high one. An assumption that raises the price as it
    grows, such as the price per hour, then counts as one that hardly matters.

    the GPU left as it is
        {**gpu, name: x}, {**given, name: x} → gpu, {**given, name: x}
    Only the names of `given` were set. A name of `gpu`, such as its memory, is an assumption as well.

    the least decisive
        return max(ranges, key=quotient) → return min(ranges, key=quotient)
    The assumption that matters least was returned. The one that changes the result the most is asked for.
    """
)

# 13.5: a table with error bars

bars.mistakes(
    r"""
    the probability of one
        return 1 - (1 - level) ** m → return level
    The probability for a single comparison was returned. With m of them there are m chances to err.

    the probabilities added up
        return 1 - (1 - level) ** m → return m * level
    The probabilities were added. That is a bound (Bonferroni's), and above 1 for many comparisons; the
    probability that none errs is (1 − level)ᵐ.

    the probability of none
        return 1 - (1 - level) ** m → return (1 - level) ** m
    That is the probability that **no** comparison errs. Asked for is the opposite.

    the probability of all
        return 1 - (1 - level) ** m → return level**m
    That is the probability that **all** m comparisons err. Asked for is that of one error or more.

    a baseline with more bytes
        row["kind"] == "baseline" and row["bytes"] <= table[name]["bytes"]] → row["kind"] == "baseline"]
    A baseline was taken that stores more. With more memory full attention is better as well: compare at no
    more bytes.

    not at equal bytes
        row["bytes"] <= table[name]["bytes"] → row["bytes"] < table[name]["bytes"]
    The baseline that stores exactly as much was left out. It is the fairest of all.

    the nearest in bytes
        best = min(fair, key=lambda row: fmean(row["losses"].values()), default=None)
            → best = max(fair, key=lambda row: row["bytes"], default=None)
    The baseline with the most bytes was taken. A smaller one may be better, and would then be the one to
    beat.

    the best seed
        fmean(row["losses"].values()) → min(row["losses"].values())
    The baseline with the luckiest seed was taken. Compare means over the seeds.

    the sum of the losses
        fmean(row["losses"].values()) → sum(row["losses"].values())
    Sums were compared. A baseline with more seeds has the larger sum, however good it is: compare means.

    only the seeds of the design
        fmean(row["losses"].values())
            → fmean([row["losses"][x] for x in row["losses"] if x in table[name]["losses"]] or [math.inf])
    The baseline was chosen by the seeds that it shares with the design. Which baseline is the best does not
    depend on the design: all of its seeds count. Pairs come afterwards.

    the median seed
        fmean(row["losses"].values()) → sorted(row["losses"].values())[len(row["losses"]) // 2]
    The median over the seeds was taken. The task compares means.

    the worst baseline
        best = min(fair, key → best = max(fair, key
    The baseline with the highest loss was taken. Against that one everything looks good.

    methods as baselines
        row["kind"] == "baseline" and row["bytes"] <= table[name]["bytes"]
            → row["name"] != name and row["bytes"] <= table[name]["bytes"]
    Other methods were taken as baselines. The claim is about full attention with fewer heads or layers.

    each claim at 5%
        verdict(differences, 0.05 / m, quantile) → verdict(differences, 0.05, quantile)
    Each claim was tested at 5%. With m claims the chance of a false one grows with m: share the 5% among
    them.

    claims without a baseline counted
        m = sum(other is not None for other in against.values()) → m = len(against)
    All names were counted in m, also those that have no baseline and are not tested.

    claims with too few seeds not counted
        m = sum(other is not None for other in against.values())
            → both = [set(losses[x]) & set(losses[y]) for x, y in against.items() if y is not None]
              m = max(1, sum(len(seeds) > 1 for seeds in both))
    Claims with fewer than two differences were left out of m. They are claims as well: m is fixed by what is
    claimed, not by how it comes out.

    every design of the table counted
        m = sum(other is not None for other in against.values())
            → m = sum(row["kind"] == "method" for row in rows)
    All methods in the table were counted in m. What is not claimed is not tested.

    the level multiplied
        verdict(differences, 0.05 / m, quantile) → verdict(differences, min(0.9, 0.05 * m), quantile)
    The level was multiplied by m. More claims need wider intervals, not narrower ones.

    one side only
        quantile(1 - level / 2, n - 1) → quantile(1 - level, n - 1)
    The whole error was put on one side. An interval has two ends: quantile at 1 − level / 2.

    the normal quantile
        quantile(1 - level / 2, n - 1) → 1.96
    The normal distribution was used. With 5 seeds the factor is 2.78, not 1.96, and it grows with the number
    of claims.

    n degrees of freedom
        quantile(1 - level / 2, n - 1) → quantile(1 - level / 2, n)
    The quantile was asked with n degrees of freedom. The mean was estimated from the same differences: n − 1.

    the spread over n
        stdev(differences) / math.sqrt(n) → stdev(differences) * math.sqrt((n - 1) / n) / math.sqrt(n)
    The squares were divided by n. The mean was estimated from them, so it is n − 1: numpy's `std` does the
    former unless told.

    the spread as the error
        * stdev(differences) / math.sqrt(n) → * stdev(differences)
    The spread of single differences was taken for the error of their mean. Divide by √n.

    not paired
        [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            → [a - b for a, b in zip(ours.values(), theirs.values())]
    Losses were paired in the order in which they are listed. The two rows list their seeds in different
    orders: pair by seed.

    the errors of two means
        found[name] = verdict(differences, 0.05 / m, quantile)
            → found[name] = "undecided"
              if len(differences) > 1:
                  a, b = [ours[x] for x in ours if x in theirs], [theirs[x] for x in ours if x in theirs]
                  error = math.sqrt((stdev(a) ** 2 + stdev(b) ** 2) / len(a))
                  half, mean = quantile(1 - 0.05 / m / 2, len(a) - 1) * error, fmean(differences)
                  found[name] = "supported" if mean + half < 0 else "refuted" if mean > half else "undecided"
    The errors of both means were added. Runs with the same seed rise and fall together, and their difference
    does not: take the standard deviation of the differences.

    differences upside down
        ours[seed] - theirs[seed] → theirs[seed] - ours[seed]
    The method was subtracted from the baseline. A lower loss is better: the difference of a better method is
    negative.

    by the mean alone
        half = quantile(1 - level / 2, n - 1) * stdev(differences) / math.sqrt(n) → half = 0.0
    The sign of the mean decided. Where the interval holds 0, the seeds cannot decide.

    refuted unless supported
        return "refuted" if fmean(differences) - half > 0 else "undecided" → return "refuted"
    What is not supported was called refuted. The claim may still be true: undecided.

    no baseline is no support
        dict.fromkeys(names, "no baseline") → dict.fromkeys(names, "undecided")
    "undecided" was returned where there is nothing to compare with. No number of seeds would change that: it
    is another verdict.
    """
)

# 13.7: the learner's own course

model.mistakes(
    r"""
    the bytes of a whole sequence
        m.nbytes(length) / length → m.nbytes(length)
    The bytes of the sequence were returned. Asked for is what one token takes, at this length.

    the bytes of a cache with one token
        m.nbytes(length) / length → m.nbytes(1)
    The cache of a single token was asked for. A window looks as large as full attention there, and whatever
    has a constant part looks huge: divide the bytes at `length` by `length`.

    the bytes of one token more
        m.nbytes(length) / length → m.nbytes(length + 1) - m.nbytes(length)
    What one more token adds was taken. That is 0 for a full window, although it holds bytes: divide all bytes
    by the tokens.

    the mean of the texts' means
        sum(float(each.sum()) for each in ours) / sum(map(len, ours))
            → fmean(float(each.mean()) for each in ours)
    Means of texts were averaged. Short texts, which are harder, then count as much as long ones: divide the
    sum over all bytes by their number.

    divided by the bytes of the texts
        / sum(map(len, ours)) → / sum(text.shape[1] for text in texts)
    The sum was divided by the length of the texts. The first byte of each is not predicted: divide by the
    number of losses.

    the error over bytes
        "error": math.sqrt(variance / n),
            → "error": float(torch.cat([a - b for a, b in zip(ours, theirs)]).std())
              / math.sqrt(sum(map(len, ours))),
    Every byte was taken as a measurement of its own. Bytes of one text rise and fall together, so the error
    comes out too small: one number per text.

    the spread for the error
        math.sqrt(variance / n) → math.sqrt(variance)
    The spread of single texts was returned. The error of their mean is smaller by √n.

    the spread over n
        math.sqrt(variance / n)
            → math.sqrt(variance * (n - 1) / n / n)
    The squares were divided by n. The mean was estimated from the same differences, so it is n − 1.

    the error of the loss
        math.sqrt(variance / n)
            → stdev(float(each.mean()) for each in ours) / math.sqrt(len(ours))
    The error of the loss itself was returned. Texts differ in how hard they are; in the difference to full on
    the same text that drops out, and the error is far smaller.

    full minus m
        float(a.mean() - b.mean()) → float(b.mean() - a.mean())
    The sign is wrong: excess is what m costs beyond full, so it is positive where m is worse.

    the excess by bytes
        "excess": mean,
            → "excess": (sum(float(a.sum() - b.sum()) for a, b in zip(ours, theirs)) / sum(map(len, ours))),
    The difference over all bytes was returned. Its error is that of a mean over texts, so the excess has to
    be this mean as well.

    full is not on the board
        for name, make in makers.items():
            → for name, make in makers.items():
                  if name == "full":
                      continue
    full was left out. The picture needs the point that all others are compared with.

    full made anew
        full if name == "full" else make() → make()
    The maker of full was called twice. Making a mechanism may mean training it: each maker once.

    full made anew for each
        entry(full if name == "full" else make(), full, texts, length)
            → entry(make(), makers["full"](), texts, length)
    full was made again for each mechanism. Making it may mean training it: once.

    one that breaks ends it all
        failed[name] = repr(error)
            → failed[name] = repr(error)
              break
    The loop ended at the first mechanism that raises. Those that come after it are not its fault.

    only the maker may break
        def assemble(makers, texts, length):
            made, failed = {}, {}
            for name, make in makers.items():
                try:
                    made[name] = make()
                except Exception as error:
                    failed[name] = repr(error)
            board = {name: entry(m, made["full"], texts, length) for name, m in made.items()}
            failed |= {name: "not finite" for name in board if not math.isfinite(board[name]["loss"])}
            return {name: board[name] for name in board if name not in failed}, failed
    Exceptions were caught while a mechanism is made, not while it is measured. It may break there as well.

    a loss of NaN on the board
        if not math.isfinite(found["loss"]): → if False:
    A loss that is not finite came onto the board. It beats nothing and is beaten by nothing, and the picture
    has no place for it.

    only NaN is looked for
        if not math.isfinite(found["loss"]): → if math.isnan(found["loss"]):
    An infinite loss came onto the board. NaN is not the only loss that is not finite.

    without a reason
        failed[name] = repr(error) → failed[name] = ""
    The failure has no reason. `repr(error)` says which exception it was, even where it has no text.

    the reason as an exception
        failed[name] = repr(error) → failed[name] = error
    The exception itself was stored. A text is asked for: `repr(error)`.

    only what is better in both
        b != a and b[0] <= a[0] and b[1] <= a[1]} → b[0] < a[0] and b[1] < a[1]}
    A design counted as beaten only if another is better in both numbers. One with equal bytes and less loss
    beats it as well.

    equal ones beat each other
        every = pairs.values()
        beaten = {a for a in every for b in every if b != a and
            → every = list(enumerate(pairs.values()))
              beaten = {a for i, a in every for j, b in every if i != j and
    Two designs with equal numbers threw each other out. Neither is better in anything: both stay.

    one of two equal ones
        return sorted((name for name in pairs if pairs[name] not in beaten), key=pairs.get)
            → kept = {pairs[name]: name for name in pairs if pairs[name] not in beaten}
              return sorted(kept.values(), key=pairs.get)
    Of several equal designs one was kept. None of them beats another: all of them stay.

    the excess in place of the loss
        (each["bytes"], each["loss"]) → (each["bytes"], each["excess"])
    Names were compared by their excess. It weighs every text alike, the loss every byte, so their order may
    differ; the front is about the loss.

    in the order of the names
        key=pairs.get) → key=str)
    The names are in alphabetical order. By growing bytes they are those of the picture, from left to right.

    from the most bytes on
        key=pairs.get) → key=pairs.get, reverse=True)
    The order is that of falling bytes. By growing bytes it is that of the picture, from left to right.
    """,
    torch=torch,
)
