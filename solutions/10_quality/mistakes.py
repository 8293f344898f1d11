"""Unit 10: known mistakes, each as an edit of the solution."""

from .checks import model, mqar, paired, pareto, perplexity, positions, unfair

# 10.1: perplexity and bits per byte

perplexity.mistakes(
    r"""
    no shift
        predicted = logits[:, :-1].float() → predicted = logits[:, 1:].float()
    The logits at a place were compared with the token at the same place. The model has seen that token
    already: the logits at place p predict the token at place p + 1.

    shifted the wrong way
        predicted = logits[:, :-1].float()
        target = tokens[:, 1:]
            → predicted = logits[:, 1:].float()
              target = tokens[:, :-1]
    The logits at a place were compared with the token *before* it. They predict the one behind it:
    logits[:, :-1] belong to tokens[:, 1:].

    the first token counted
        predicted = logits[:, :-1].float()
        target = tokens[:, 1:]
            → predicted = logits.roll(1, dims=1).float()
              target = tokens
        place = torch.arange(1, tokens.shape[1]) → place = torch.arange(tokens.shape[1])
    Place 0 was counted, with the logits at the end of the row rolled in front of it. Nothing predicts the
    first token of a row.

    padding counted
        counted = (place >= start[:, None]) & (place < length[:, None]) → counted = place >= start[:, None]
    The tokens behind a text's length were counted. They are padding, not text.

    one token of padding counted
        place < length[:, None] → place <= length[:, None]
    The first token of the padding was counted with each text. The text has the places 0 to length − 1, so the
    last one counted is length − 1.

    padding taken for token 0
        (place < length[:, None]) → (target != 0)
    The padding was looked for by its token. Token 0 is an ordinary token within a text, and other tokens
    are in the padding: only `length` tells.

    context counted
        counted = (place >= start[:, None]) & (place < length[:, None]) → counted = place < length[:, None]
    The tokens before `start` were counted. The window before has counted them already, so each of them is in
    the mean twice.

    a token of context too many
        place >= start[:, None] → place > start[:, None]
    The token at place `start` was left out. The context are the tokens *before* it: the first one counted is
    at place start, except for place 0.

    start and length taken for places of the logits
        place = torch.arange(1, tokens.shape[1])
            → place = torch.arange(0, tokens.shape[1] - 1)
    `start` and `length` were compared with the place of the logits. They speak of tokens, and the token that
    is predicted is one place further.

    the mean of the texts' means
        nats += losses[counted].double().sum().item()
        n_tokens += counted.sum().item()
            → for row, mine in zip(losses, counted):
                  if mine.any():
                      nats += row[mine].double().mean().item()
                      n_tokens += 1
    Each text's mean counted once. A text with few tokens then weighs as much as a long one: add up the losses
    of all tokens and divide once, at the end.

    the mean of the batches' means
        nats += losses[counted].double().sum().item()
        n_tokens += counted.sum().item()
            → nats += losses[counted].double().mean().item()
              n_tokens += 1
    Each batch's mean counted once. The last batch is smaller, and batches have different numbers of tokens:
    add up losses and tokens of all of them and divide once, at the end.

    the mean of the texts' perplexities
        nats, n_tokens, n_bytes = 0.0, 0, 0 → nats, n_tokens, n_bytes, texts = 0.0, 0, 0, []
        n_tokens += counted.sum().item()
            → n_tokens += counted.sum().item()
              texts += [math.exp(row[mine].mean()) for row, mine in zip(losses, counted) if mine.any()]
        return math.exp(nats / n_tokens) → return sum(texts) / len(texts)
    Perplexities of texts were averaged. exp is convex, so the worst text rules that mean. Perplexity is
    exp of *one* mean loss.

    the mean of the tokens' perplexities
        nats, n_tokens, n_bytes = 0.0, 0, 0 → nats, n_tokens, n_bytes, each = 0.0, 0, 0, 0.0
        n_tokens += counted.sum().item()
            → n_tokens += counted.sum().item()
              each += losses[counted].double().exp().sum().item()
        return math.exp(nats / n_tokens) → return each / n_tokens
    exp was taken of each token's loss, and then the mean. One token that the model finds nearly impossible
    rules that mean. First the mean of the losses, then exp.

    2 to the power of nats
        return math.exp(nats / n_tokens) → return 2 ** (nats / n_tokens)
    The losses are in nats, since the logarithm is the natural one: perplexity is exp(loss), or 2 to the power
    of the loss in *bits*.

    nats per byte
        nats / math.log(2) / n_bytes → nats / n_bytes
    The losses were divided by the bytes and not turned into bits. A bit is ln 2 nats, so divide by ln 2 as
    well.

    bits per token
        nats / math.log(2) / n_bytes → nats / math.log(2) / n_tokens
    The bits were divided by the number of tokens. Tokens of different vocabularies stand for different
    amounts of text, which is why one divides by bytes.

    the bytes of all tokens
        token_bytes[target[counted]] → token_bytes[tokens]
    The bytes of context and padding were added as well. The bytes are those of the tokens whose losses were
    counted.

    the bytes of the tokens before
        token_bytes[target[counted]] → token_bytes[tokens[:, :-1][counted]]
    The bytes are those of the tokens that predict. They must be those of the tokens that are predicted,
    since these have the losses.

    the loss in bfloat16
        predicted = logits[:, :-1].float() → predicted = logits[:, :-1]
    The loss was computed in the dtype of the logits. bfloat16 has 8 bits: each loss is rounded to about 0.4%,
    and exp turns that into much more. Convert first.
    """
)

# 10.2: loss by position

positions.mistakes(
    r"""
    position is the column
        position = mask.cumsum(dim=1) - 1 → position = torch.arange(mask.shape[1]).expand_as(mask)
    The column was taken for the position. In a row that is padded on the left the first token is further
    right: count the tokens before it in its own row.

    positions counted from the end
        position = mask.cumsum(dim=1) - 1 → position = mask.flip(1).cumsum(dim=1).flip(1) - 1
    Positions were counted from the last token of a row backwards. They are the numbers of tokens *before* a
    token.

    all rows taken as padded on the left
        position = mask.cumsum(dim=1) - 1
            → n_padding = (~mask).sum(dim=1, keepdim=True)
              position = torch.arange(mask.shape[1]) - n_padding
    The number of padded places was subtracted in every row. That is right where the padding is on the left;
    on the right no place of it comes before the text.

    positions from 1
        position = mask.cumsum(dim=1) - 1 → position = mask.cumsum(dim=1)
    The first token of a row has position 1 here. The position is the number of tokens before it: 0 for the
    first.

    padding counted
        inside = mask & (position >= low) → inside = (position >= low)
    The padding was not left out. Behind the last token the running sum of the mask stays as it is, so these
    places have a position too.

    the last edge included
        (position < high) → (position <= high)
    Buckets were taken up to and including their upper edge, so the tokens there are in two of them. Bucket i
    ends before edges[i + 1].

    the lower edge left out
        (position >= low) → (position > low)
    Buckets begin behind their lower edge here. The position edges[i] belongs to bucket i.

    the last bucket without an end
        for low, high in pairwise(edges): → for low, high in pairwise([*edges[:-1], 10**9]):
    Tokens from the last edge on were counted in the last bucket. They are in none.

    the first bucket from the beginning
        for low, high in pairwise(edges): → for low, high in pairwise([0, *edges[1:]]):
    Tokens before the first edge were counted in the first bucket. They are in none, and the first token of a
    row, which nothing predicts, has the loss NaN.

    zero times NaN
        means.append(losses[inside].mean()) → means.append((losses * inside).sum() / inside.sum())
    The losses were multiplied by the mask and added up. 0 · NaN is NaN, so one NaN in the padding spoils the
    sum: pick the losses that count, or replace the others by torch.where.

    the mean of the rows' means
        means.append(losses[inside].mean())
            → rows = [row[mine].mean() for row, mine in zip(losses, inside) if mine.any()]
              means.append(torch.stack(rows).mean() if rows else torch.tensor(torch.nan))
    Each row's mean in a bucket counted once. Rows that have few tokens in the bucket then weigh as much as
    the others: one mean over all tokens is asked for.

    divided by all tokens
        means.append(losses[inside].mean())
            → means.append(losses[inside].sum() / mask.sum())
    The sum of a bucket was divided by all tokens of the batch. Divide by the tokens of the bucket.

    an empty bucket is 0
        means.append(losses[inside].mean()) → means.append(losses[inside].mean().nan_to_num(0.0))
    A bucket without tokens got the mean 0, which reads as a perfect model. Nothing is known there: NaN.

    same_rows not used
        if same_rows: → if False:
    With same_rows all rows were used. Short rows are then in the near buckets only, and near and far buckets
    are of different texts.

    one token more than needed
        mask.sum(dim=1) >= edges[-1] → mask.sum(dim=1) > edges[-1]
    A row with exactly edges[-1] tokens was left out. Its last token has position edges[-1] − 1, so it is in
    every bucket to its end.

    rows without padding
        mask.sum(dim=1) >= edges[-1] → mask.all(dim=1)
    Only rows without padding were kept. How long the batch is does not matter: a row needs a token at every
    position below edges[-1].

    rows that reach the last bucket
        mask.sum(dim=1) >= edges[-1] → mask.sum(dim=1) > edges[-2]
    Rows that begin the last bucket were kept although they end within it. A row must have a token at every
    position below edges[-1].
    """
)

# 10.3: recall batches

mqar.mistakes(
    r"""
    keys drawn with replacement
        keys = 1 + torch.randperm(n_keys, generator=generator)[:n_pairs]
            → keys = torch.randint(1, n_keys + 1, (n_pairs,), generator=generator)
    Keys were drawn one by one, so a row may have the same key twice. Then its query has two answers: draw
    distinct ones, for example the beginning of a permutation.

    values drawn with replacement
        values = 1 + n_keys + torch.randperm(n_values, generator=generator)[:n_pairs]
            → values = torch.randint(n_keys + 1, n_keys + n_values + 1, (n_pairs,), generator=generator)
    Values were drawn one by one, so two keys of a row may have the same value. All values of a row are to be
    different, or a wrong look-up earns the right answer.

    the same pairs in every row
        for _ in range(batch):
        keys = 1 + torch.randperm(n_keys, generator=generator)[:n_pairs]
        values = 1 + n_keys + torch.randperm(n_values, generator=generator)[:n_pairs]
        keys, values = keys.tolist(), values.tolist()
            → keys = 1 + torch.randperm(n_keys, generator=generator)[:n_pairs]
              values = 1 + n_keys + torch.randperm(n_values, generator=generator)[:n_pairs]
              keys, values = keys.tolist(), values.tolist()
              for _ in range(batch):
    Keys and values were drawn once for the whole batch. Then the weights can learn the pairs by heart, and
    nothing goes through the cache: draw them anew in each row.

    the same places in every row
        for _ in range(batch):
        keys = → shuffled = torch.randperm(length - n_pairs, generator=generator).tolist()
            for _ in range(batch):
                keys =
        cards = torch.randperm(length - n_pairs, generator=generator).tolist() → cards = shuffled
    The places were drawn once for the whole batch. A model can then learn where to look, not what to look
    for: draw them anew in each row.

    a query may come before its pair
        elif pair not in places:
        row += [keys[pair], values[pair]]
        places[pair] = None
            → elif card < n_pairs:
                  row += [keys[pair], values[pair]]
    Pairs and queries were shuffled without looking at their order. A query in front of its pair asks for
    something that has not been said.

    all pairs in front
        cards = torch.randperm(length - n_pairs, generator=generator).tolist()
            → cards = torch.randperm(length - n_pairs, generator=generator).tolist()
              cards = sorted(cards, key=lambda card: card >= n_pairs)
    All pairs are at the beginning of the row and the queries behind them. That is the task of the chapter;
    here pairs, queries and filler are to be mixed.

    the place behind the query
        asked.append([places[pair] for pair in range(n_pairs)])
            → asked.append([places[pair] + 1 for pair in range(n_pairs)])
    `asked` names the places behind the queries. The logits *at* the query predict its answer, so that place
    is meant.

    places in order, answers not
        asked.append([places[pair] for pair in range(n_pairs)]) → asked.append(sorted(places.values()))
    `asked` was sorted and `answers` was not. The answer in column j must be that of the query in column j.

    the value is shown behind the query
        tokens.append(row)
            → for pair, place in places.items():
                  if row[place + 1 : place + 2] == [0]:
                      row[place + 1] = values[pair]
              tokens.append(row)
    The value is behind the query in the text. As input of a later place it is no longer recalled but
    read, and the key is in two pairs: leave filler there.

    values numbered from 1
        values = 1 + n_keys + torch.randperm → values = 1 + torch.randperm
    Values have the numbers of keys. Keys are 1 to n_keys, values begin behind them: a token must tell which
    of the two it is.

    keys numbered from 0
        keys = 1 + torch.randperm(n_keys → keys = torch.randperm(n_keys
    Keys begin at 0. That is the filler: a key with this number would be in all places that hold nothing.

    torch's own generator
        torch.randperm(length - n_pairs, generator=generator) → torch.randperm(length - n_pairs)
    The places were drawn from torch's own generator. The same seed then gives another batch, and the draws
    change whatever else uses that generator.

    the last pair counts
        found = [[(s, v) for s, k, v in pairs if k == row[place]] for place in places]
            → found = [[(s, v) for s, k, v in pairs if k == row[place]][-1:] for place in places]
    Of several pairs of a key only the last was looked at. A key with two pairs has two answers: the row is
    not good.

    only pairs before the query counted
        found = [[(s, v) for s, k, v in pairs if k == row[place]] for place in places]
            → found = [[(s, v) for s, k, v in pairs if k == row[place] and s < place] for place in places]
    Pairs behind the query were not counted. A row is only good if the key is in exactly one pair of the
    *whole* row, so that a query added later has one answer as well.

    the order not looked at
        good.append(one and before and right → good.append(one and right
    The pair may be behind its query here. A causal model reads from left to right: at the query it has
    not seen the pair.

    the answers not compared
        good.append(one and before and right → good.append(one and before
    It was proved that each query has one pair, not that the answer is this pair's value. Compare them.

    leaks not looked for
        good.append(one and before and right and all(row.count(want) == 1 for want in wanted))
            → good.append(one and before and right)
    The answer may be elsewhere in the row here. It must be there exactly once, in its pair.

    leaks looked for before the query only
        all(row.count(want) == 1 for want in wanted)
            → all(row[:p].count(want) == 1 for p, want in zip(places, wanted))
    Leaks were looked for only in front of each query. The answer is nowhere else in the *row*: a later
    query could be answered from there.

    a key asked twice refused
        good.append(one and before and right → one = one and all(row.count(row[p]) == 2 for p in places)
            good.append(one and before and right
    A row in which a key is asked twice was refused. Both queries have one answer: count pairs, not
    occurrences of the key.

    a key with any token behind it
        if 0 < row[s] <= n_keys < row[s + 1]] → if 0 < row[s] <= n_keys and row[s + 1] > 0]
    A key with another key behind it was taken for a pair. It is a query: in a pair a *value* is behind
    the key.
    """
)

# 10.4: intervals and verdicts

paired.mistakes(
    r"""
    theirs minus ours
        d = torch.tensor([a - b for → d = torch.tensor([b - a for
    The sign is the other way round. ours − theirs is asked for, so that a negative difference means that ours
    is better.

    pairs by their order
        both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
            → both = list(zip(ours.values(), theirs.values()))
    The n-th of ours was paired with the n-th of theirs. Runs belong together by their *seed*; the dicts may
    list them in any order, and some may be missing.

    not paired
        half = t95[n - 1] * d.std(correction=1).item() / math.sqrt(n)
            → a, b = torch.tensor([pair for pair in finished if not math.isnan(sum(pair))]).double().T
              half = t95[n - 1] * (a.var() / n + b.var() / n).sqrt().item()
    The spreads of ours and theirs were added, as for runs that have nothing to do with each other. What is
    hard about a seed is hard for both: the spread of the *differences* is what counts, and it is smaller.

    the standard deviation with n
        correction=1 → correction=0
    The sum of squares was divided by n. The mean was estimated from the same values, so divide by n − 1: with
    three seeds the interval is 18% too narrow otherwise.

    n degrees of freedom
        t95[n - 1] → t95[n]
    Student's factor was taken for n degrees of freedom. The mean uses up one of them: n − 1.

    1.96 for three seeds
        t95[n - 1] → 1.96
    The factor of the normal distribution was used. It holds where the spread is known; estimated from three
    seeds the factor is 4.303.

    the spread, not the error of the mean
        .item() / math.sqrt(n) → .item()
    The interval says where single differences are. The mean of n differences is known better, by a factor of
    √n.

    a diverged run is a loss of 0
        finished = [(a, b) for a, b in both if a is not None and b is not None]
            → finished = [(a or 0.0, b or 0.0) for a, b in both]
    None was turned into 0, which is the best loss of all. A run that diverged has no loss: leave its seed
    out.

    NaN not left out
        for a, b in finished if not math.isnan(a - b)] → for a, b in finished]
    A loss of NaN went into the mean, and everything became NaN. A run that diverged may have None *or* NaN.

    certain with one seed
        return d.mean().item(), -math.inf, math.inf → return d.mean().item(), d.mean().item(), d.mean().item()
    With a single difference the interval has the length 0, as if it were exact. One value says nothing about
    the spread: from −inf to inf.

    resampled apart
        difference = (ours - theirs).double()[picks].sum(dim=1)
            → difference = (ours[picks] - theirs[picks.roll(1, 0)]).double().sum(dim=1)
    Ours and theirs were resampled with different texts. Then the interval contains how much the texts differ
    from each other, which is far more than the designs do.

    the mean of the texts' losses per token
        difference = (ours - theirs).double()[picks].sum(dim=1) / tokens[picks].sum(dim=1)
            → difference = ((ours - theirs).double() / tokens)[picks].mean(dim=1)
    Each text's loss per token counted alike. A text of 5 tokens then weighs as much as one of 200: sum of
    nats over sum of tokens, in each resample.

    the tokens not resampled
        / tokens[picks].sum(dim=1) → / tokens.sum()
    Every resample was divided by the tokens of all texts. It has other texts, and so another number of
    tokens.

    losses per text
        / tokens[picks].sum(dim=1) → / picks.shape[1]
    The sums were divided by the number of texts. The difference is asked for in nats per token.

    from 5% to 95%
        [0.025, 0.975] → [0.05, 0.95]
    The percentiles are those of 90%. For 95% between them there are 2.5% on each side.

    percentiles without interpolation
        low, high = difference.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
            → ordered, n = difference.sort().values, len(difference)
              low, high = ordered[int(0.025 * n)], ordered[int(0.975 * n)]
    A value of the sorted resamples was taken for each percentile. The percentile p is at place p · (R − 1),
    and between two values it is interpolated linearly: torch.quantile and numpy.quantile do this.

    from the smallest to the largest
        low, high = difference.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
            → low, high = difference.min(), difference.max()
    The extremes of the resamples were returned. They grow with the number of resamples; the percentiles do
    not.

    a larger loss is better
        return "better" → return "worse"
        if low > 0:
        return "worse"
            → if low > 0:
                  return "better"
    Better and worse are exchanged. The numbers are losses, ours − theirs: below 0 ours is better.

    0 inside is always a tie
        return "tie" if -low <= margin and high <= margin else "cannot tell" → return "tie"
    Every interval that contains 0 was called a tie. From −1 to 1 nothing is known: a tie needs both ends
    within the margin.

    a small difference is a tie
        if high < 0: → if max(-low, high) <= margin:
                return "tie"
            if high < 0:
    An interval within the margin was called a tie before its sign was looked at. If it does not contain 0 the
    sign is known, and the first rule holds.

    the mean against the margin
        "tie" if -low <= margin and high <= margin else → "tie" if abs(low + high) / 2 <= margin else
    The middle of the interval was compared with the margin. Seeds that scatter widely may have a mean near 0:
    a tie needs both ends within the margin.

    the length against the margin
        "tie" if -low <= margin and high <= margin else → "tie" if high - low <= margin else
    The length of the interval was compared with the margin. Its ends count: from −0.09 to 0.09 no difference
    is larger than 0.1.

    half of the length against the margin
        "tie" if -low <= margin and high <= margin else → "tie" if (high - low) / 2 <= margin else
    Half of the length was compared with the margin. Its ends count: from −0.1 to 0.3 a difference of 0.3 is
    possible, though half of the length is 0.2.

    only the upper end against the margin
        "tie" if -low <= margin and high <= margin else → "tie" if high <= margin else
    Only the upper end was compared with the margin. Ours may also be *better* by more than the margin: both
    ends.

    an interval that ends at 0 is decided
        if high < 0: → if high <= 0:
        if low > 0: → if low >= 0:
    An interval that ends at 0 was taken as better or worse. It contains 0: no difference is possible.
    """
)

# 10.5: a Pareto front

pareto.mistakes(
    r"""
    beaten only by less of both
        (a[0] < b[0] or a[1] < b[1]) → (a[0] < b[0] and a[1] < b[1])
    A row was beaten only by rows with less of both. A row with the same bytes and a worse loss, or the same
    loss and more bytes, is beaten as well.

    twins beat each other
        a[1] <= b[1] and (a[0] < b[0] or a[1] < b[1]) → a[1] <= b[1] and a[2] != b[2]
    Two rows that are equal in both threw each other out. To beat a row one must be better in one of the two:
    both stay.

    the largest loss
        a[0] <= b[0] and a[1] <= b[1] and (a[0] < b[0] or a[1] < b[1])
            → a[0] <= b[0] and a[1] >= b[1] and (a[0] < b[0] or a[1] > b[1])
    The front of the largest losses was taken. A lower loss is better.

    sorted by loss
        for b in sorted(good) if → for b in sorted(good, key=lambda row: row[1]) if
    The names are in the order of the losses. The fewest bytes come first.

    diverged designs not left out
        if row["loss"] is not None:
        good.append((row["fixed"] + row["per_token"] * kept, row["loss"], row["name"]))
            → loss = row["loss"] or 0.0
              good.append((row["fixed"] + row["per_token"] * kept, loss, row["name"]))
    A design that diverged was given the loss 0, and nothing beats that. It has no loss: leave it out.

    a window stores all tokens
        kept = n_tokens if row["most"] is None else min(n_tokens, row["most"]) → kept = n_tokens
    The rows with `most` were counted with all tokens. They keep at most `most` of them.

    a window stores all tokens, in take
        * min(n_tokens, r["most"] or n_tokens) for r in rows → * n_tokens for r in rows
    For the budget the rows with `most` were counted with all tokens. They keep at most `most` of them.

    a full window, however short the text
        else min(n_tokens, row["most"]) → else row["most"]
    A window was always counted with `most` tokens. At a shorter length it keeps only the tokens that there
    are.

    the fixed bytes forgotten
        good.append((row["fixed"] + row["per_token"] * kept → good.append((row["per_token"] * kept
    Only the bytes per token were counted. A state has no bytes per token, and some designs have both.

    bytes per token in place of bytes
        good.append((row["fixed"] + row["per_token"] * kept
            → good.append((row["per_token"] or row["fixed"]
    The bytes per token were compared. What is stored depends on the length: fixed + per_token · tokens kept.

    a state for every token
        good.append((row["fixed"] + row["per_token"] * kept
            → good.append(((row["fixed"] + row["per_token"]) * kept
    The fixed bytes were multiplied by the tokens. They are the same at any length.

    spreads in place of standard errors
        mine["spread"] ** 2 / mine["seeds"] + row["spread"] ** 2 / row["seeds"]
            → mine["spread"] ** 2 + row["spread"] ** 2
    The spreads of single runs were used. The means of n seeds are known better: s² / n.

    divided by the seeds, not by their root
        mine["spread"] ** 2 / mine["seeds"] + row["spread"] ** 2 / row["seeds"]
            → (mine["spread"] / mine["seeds"]) ** 2 + (row["spread"] / row["seeds"]) ** 2
    The spread was divided by the number of seeds. The standard error of a mean is s / √n, its square s² / n.

    standard errors added up
        error = math.sqrt(mine["spread"] ** 2 / mine["seeds"] + row["spread"] ** 2 / row["seeds"])
            → error = mine["spread"] / mine["seeds"] ** 0.5 + row["spread"] / row["seeds"] ** 0.5
    The two standard errors were added. Two errors that have nothing to do with each other add up as squares:
    √(e₁² + e₂²).

    the error of one row alone
        mine["spread"] ** 2 / mine["seeds"] + row["spread"] ** 2 / row["seeds"]
            → mine["spread"] ** 2 / mine["seeds"]
    Only the error of the named row was used. The other row's mean is uncertain as well.

    one standard error
        <= 2 * error → <= error
    One standard error was allowed. Two are asked for: about 95%.

    better rows only told apart on one side
        if abs(row["loss"] - mine["loss"]) <= 2 * error → if row["loss"] - mine["loss"] <= 2 * error
    Rows with a much lower loss were counted as alike. The difference counts in both directions.

    the best that fits, whatever its bytes
        return min([best, *alike(fit, best)], key=lambda name: size[name]) → return best
    The best loss was taken. Other designs that fit cannot be told apart from it: of all of these the one with
    the fewest bytes.

    the smallest that fits
        return min([best, *alike(fit, best)], key=lambda name: size[name])
            → return min((row["name"] for row in fit), key=lambda name: size[name])
    The design with the fewest bytes was taken, however bad it is. It must be one that cannot be told apart
    from the best that fits.

    the largest that fits
        return min([best, *alike(fit, best)], key=lambda name: size[name])
            → return max((row["name"] for row in fit), key=lambda name: size[name])
    The budget was used up. More bytes are no aim: among designs that cannot be told apart take the smallest.

    alike to the best of all
        return min([best, *alike(fit, best)], key=lambda name: size[name])
            → top = min((row for row in rows if row["loss"] is not None), key=lambda row: row["loss"])["name"]
              good = [row["name"] for row in fit if row["name"] in {top, *alike(rows, top)}]
              return min(good or [best], key=lambda name: size[name])
    The designs were compared with the best of all rows, which may not fit. The measure is the best of those
    that fit.

    alike to one that is alike
        return min([best, *alike(fit, best)], key=lambda name: size[name])
            → chain = {best}
              for _ in fit:
                  chain |= {other for name in chain for other in alike(fit, name)}
              return min(chain, key=lambda name: size[name])
    A design counted that is alike to one that is alike to the best. "Cannot be told apart" does not carry on:
    each must be compared with the best itself.

    a budget that is just met is refused
        size[row["name"]] <= budget → size[row["name"]] < budget
    A design that fills the budget exactly was refused. It stores at most `budget` bytes: it fits.
    """
)

# 10.6: unfair comparisons

unfair.mistakes(
    r"""
    steps in place of tokens
        run["steps"] * run["batch"] * run["length"] for run in rows → run["steps"] for run in rows
    The numbers of steps were compared. A step sees batch · length tokens, and these may differ: steps that
    differ can be fair, and equal steps unfair.

    sequences in place of tokens
        run["steps"] * run["batch"] * run["length"] for run in rows
            → run["steps"] * run["batch"] for run in rows
    The numbers of rows of text were compared. They may have different lengths: multiply by `length` too.

    one run of each design looked at
        if len({run["steps"] * run["batch"] * run["length"] for run in rows}) > 1:
            → if len({r[0]["steps"] * r[0]["batch"] * r[0]["length"] for r in own.values()}) > 1:
    The tokens of one run of each design were compared. A single run that was trained for longer hides among
    the others: look at all of them.

    the runs of other designs too
        rows = [run for each in own.values() for run in each] → rows = runs
    All rows were looked at. The claim is about two designs; what the others were trained on does not matter.

    always parameters
        run[claim["equal"]] for run in rows → run["parameters"] for run in rows
    The parameters were compared, whatever the claim holds equal. A comparison at equal bytes may have
    different numbers of parameters, and says so.

    exactly equal sizes
        > 1.02 * min(sizes) → > min(sizes)
    Sizes had to be exactly equal. Widths are whole numbers, so 2% are allowed.

    only ours may be larger
        if max(sizes) > 1.02 * min(sizes):
            → if own[claim["ours"]][0][claim["equal"]] > 1.02 * own[claim["theirs"]][0][claim["equal"]]:
    Only an advantage of ours was looked for. A comparison in which theirs is larger is as wrong.

    the number of runs in place of rates
        {len({run["lr"] for run in each}) for each → {len(each) for each
    The runs were counted. Several seeds of one rate are not several rates: count the different values of lr.

    the rates themselves compared
        {len({run["lr"] for run in each}) for each → {frozenset(run["lr"] for run in each) for each
    The sets of rates had to be equal. Designs may have different best rates; fair is the same *number* of
    tries.

    only ours may be tuned more
        if len({len({run["lr"] for run in each}) for each in own.values()}) > 1:
            → n_rates = [len({run["lr"] for run in each}) for each in own.values()]
              if n_rates[0] > n_rates[1]:
    Only more rates for ours were looked for. Theirs may have been tuned more as well.

    texts by their names
        frozenset(run["test_files"].values()) → frozenset(run["test_files"])
    The names of the test files were compared. The same text may have two names, and one name two texts: the
    checksums tell.

    the number of texts compared
        frozenset(run["test_files"].values()) → len(run["test_files"])
    The numbers of test files were compared. As many files may be other texts.

    the length of the test not looked at
        {(frozenset(run["test_files"].values()), run["test_length"]) → {frozenset(run["test_files"].values())
    Only the texts of the test were compared. With a longer context the same text has a lower loss:
    test_length must be equal too.

    a leak by name
        set(run["train_files"].values()) & set(run["test_files"].values())
            → set(run["train_files"]) & set(run["test_files"])
    Names of training and test files were compared. A copy under another name leaks, and another text under
    the same name does not.

    leaks looked for in ours alone
        set(run["test_files"].values()) for run in rows):
            → set(run["test_files"].values()) for run in own[claim["ours"]]):
    Only the runs of ours were looked at. If theirs was trained on the test, the comparison is as wrong.

    only the best seed is a fault
        if abs(claim["reported"][name] - means[best]) > 1e-6:
            → if abs(claim["reported"][name] - min(r["loss"] for r in each if r["lr"] == best)) < 1e-6:
    It was asked whether the reported number is the best seed's. Other wrong numbers exist: compare with the
    mean that it should be.

    diverged runs left out of the mean
        losses = [run["loss"] for run in each if run["lr"] == lr]
            → losses = [run["loss"] for run in each if run["lr"] == lr and run["loss"] is not None]
    Runs that diverged were left out, and the rest of their rate was averaged. A rate at which runs diverge is
    not the best: leave out the whole rate.

    the rate of the best run
        means[lr] = sum(losses) / len(losses)
            → means[lr] = sum(losses) / len(losses)
              lowest[lr] = min(losses)
        best = min(means, key=means.get) → best = min(lowest, key=lowest.get)
        means = {} → means, lowest = {}, {}
    The best rate was taken from the single run with the lowest loss. One lucky seed does not make a good
    rate: compare the means.

    the mean over all rates
        if abs(claim["reported"][name] - means[best]) > 1e-6:
            → every = [run["loss"] for run in each if run["loss"] is not None]
              if abs(claim["reported"][name] - sum(every) / len(every)) > 1e-6:
    The reported loss was compared with the mean over all rates. Rates are tuned: the best one counts, and the
    mean is over its seeds.

    only our number checked
        if abs(claim["reported"][name] - means[best]) > 1e-6:
            → if name == claim["ours"] and abs(claim["reported"][name] - means[best]) > 1e-6:
    Only the number of ours was checked. A number of theirs that is too good is wrong as well.

    the number of seeds compared
        if seeds[0] != seeds[1] or len(seeds[0]) < 3:
            → if len(seeds[0]) != len(seeds[1]) or len(seeds[0]) < 3:
    As many seeds were enough. Runs are compared seed by seed, so they must be the same ones.

    two seeds are enough
        if seeds[0] != seeds[1] or len(seeds[0]) < 3: → if seeds[0] != seeds[1]:
    It was not asked whether there are three seeds. From two the spread is a guess.

    the seeds of all rates
        seeds.append({run["seed"] for run in each if run["lr"] == best})
            → seeds.append({run["seed"] for run in each})
    The seeds of all rates were compared. Only the runs at the best rate are in the reported numbers; other
    rates may have other seeds.
    """
)

# 10.7: a training recipe

model.mistakes(
    r"""
    one step too many
        return n_tokens // (8 * longest), 8, longest → return n_tokens // (8 * longest) + 1, 8, longest
    One step more than the tokens allow. All recipes see the same number: steps · batch · length is n_tokens
    exactly.

    steps for rows of one token
        return n_tokens // (8 * longest), 8, longest → return n_tokens // 8, 8, longest
    The number of steps leaves out the length of the rows. A step sees batch · length tokens.

    rows longer than allowed
        return n_tokens // (8 * longest), 8, longest → return n_tokens // 512, 4, 128
    The rows are longer than `longest`. The model has positions for no more tokens than that.

    a step for each row
        return n_tokens // (8 * longest), 8, longest → return n_tokens // longest, 1, longest
    Each step sees a single row. For most numbers of tokens that are more than 512 steps.

    no warm-up
        peak, warmup = 0.01, steps // 10 → peak, warmup = 0.01, 0
    The rate begins at its peak. In the first steps Adam's second moment is a mean of very few gradients, and
    large steps go in bad directions: begin with a third of the peak or less.

    a constant rate behind the warm-up
        return peak * min(1.0, max(0.05, 2 * (steps - step) / steps)) → return peak
    The rate stays at its peak. In a long training the last steps at a large rate keep the weights moving:
    end at a quarter of the peak or less.

    a cosine that comes back
        return peak * min(1.0, max(0.05, 2 * (steps - step) / steps))
            → return peak * (0.55 + 0.45 * math.cos(2 * math.pi * (step - warmup) / (steps - warmup)))
    The cosine goes through a whole period and ends at the peak again. Half a period, an argument from 0 to π,
    leads from the peak down.

    a warm-up of all steps
        peak, warmup = 0.01, steps // 10 → peak, warmup = 0.01, steps
    The rate rises until the end. The peak must be in the first half, so that there is time to come down.

    half of the peak at the end
        max(0.05, 2 * (steps - step) / steps) → max(0.5, 2 * (steps - step) / steps)
    The rate ends at half of its peak. A quarter of the peak is the most that is allowed in the last step.

    a line that goes below 0
        max(0.05, 2 * (steps - step) / steps) → 1.5 - 2 * step / steps
    The line crosses 0 before the end, and a step with a negative rate climbs up the loss. The rate must be
    0 or more in every step.

    everything decays
        return 0.1 if weight.ndim > 1 else 0.0 → return 0.1
    Vectors decay as well. Gains belong near 1 and biases say how frequent a byte is: pulling them to 0 harms,
    and they are too few to overfit.

    vectors decay, matrices do not
        weight.ndim > 1 else → weight.ndim == 1 else
    The condition is the wrong way round: gains and biases decay, matrices do not.

    nothing decays
        return 0.1 if weight.ndim > 1 else 0.0 → return 0.0
    No tensor decays. The matrices of the layers need a number above 0.

    each tensor by its own norm
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        return [grad / norm.clamp(min=1.0) for grad in grads]
            → return [grad / grad.norm().clamp(min=1.0) for grad in grads]
    Each tensor was clipped by its own norm. That turns the step in another direction: one common norm, one
    factor.

    each number clipped
        return [grad / norm.clamp(min=1.0) for grad in grads]
            → return [grad.clamp(-1.0, 1.0) for grad in grads]
    Each number of the gradients was cut off. That turns the step in another direction: divide all of them by
    one factor.

    always divided by the norm
        return [grad / norm.clamp(min=1.0) for grad in grads]
            → return [grad / (norm + 1e-12) for grad in grads]
    Small gradients were made larger. Clipping only makes them smaller: below your number they stay as they
    are.

    norms added up
        norm = torch.stack([grad.norm() for grad in grads]).norm()
            → norm = torch.stack([grad.norm() for grad in grads]).sum()
    The norms of the tensors were added. The common norm is the root of the sum of their *squares*.

    the squared norm
        norm = torch.stack([grad.norm() for grad in grads]).norm()
            → norm = torch.stack([grad.norm() ** 2 for grad in grads]).sum()
    The root is missing: the gradients were divided by the square of their norm, and large ones become tiny.

    not clipped
        return [grad / norm.clamp(min=1.0) for grad in grads] → return grads
    The gradients were returned as they are. A single bad batch can then throw the weights far away.
    """
)
