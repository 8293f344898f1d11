"""Unit 08: known mistakes, each as an edit of the solution."""

from .checks import balance, count, deadlock, merge, model, plan, ragged

# 08.1: merging partial results

merge.mistakes(
    r"""
    the mean of the outputs
        return old[..., None] * state[0] + new[..., None] * out, both → return (state[0] + out) / 2, both
    Both outputs were counted alike. Each is normalised over its own keys, so it must be weighted by the share
    that these keys have in the sum of all exp(score): exp(its lse − the common lse).

    outputs added up
        return old[..., None] * state[0] + new[..., None] * out, both → return state[0] + out, both
    The outputs were added without weights. They are averages over different keys, and an average of averages
    needs the share of each.

    weighted by lse, not by exp(lse)
        old, new = torch.exp(state[1] - common), torch.exp(lse - common)
            → old, new = state[1] / (state[1] + lse), lse / (state[1] + lse)
    The weights were made of lse itself. lse is the logarithm of a sum; the sums add up, their logarithms do
    not.

    the weights exchanged
        return old[..., None] * state[0] + new[..., None] * out, both
            → return new[..., None] * state[0] + old[..., None] * out, both
    Each output got the weight of the other. The weight exp(lse − common) belongs to the output whose lse it
    is made of.

    the larger lse as the common one
        both = torch.logaddexp(state[1], lse) → both = torch.maximum(state[1], lse)
    The larger lse is what to subtract so that nothing overflows, but the sum of both is larger than it: the
    weights do not add up to 1.

    the lse of both added
        both = torch.logaddexp(state[1], lse) → both = state[1] + lse
    Two lse were added. That multiplies the sums of exp(score); the keys of both parts together have their
    sum.

    exp without a maximum
        both = torch.logaddexp(state[1], lse) → both = torch.log(state[1].exp() + lse.exp())
    exp(lse) was computed as it is. Above about 88 it is inf in fp32, below about −103 it is 0, and the
    logarithm does not bring it back. Take the larger lse out first, as torch.logaddexp does.

    one maximum for all rows
        both = torch.logaddexp(state[1], lse)
            → top = torch.maximum(state[1].max(), lse.max())
              both = top + torch.log(torch.exp(state[1] - top) + torch.exp(lse - top))
    One number was subtracted in all rows. In rows whose scores are much smaller every exp is then 0, and the
    logarithm of 0 is −inf. Each row needs its own maximum.

    the lse of the last part
        both = torch.logaddexp(state[1], lse)
            → both = lse
              total = torch.logaddexp(state[1], lse)
        common = both.masked_fill(both == -torch.inf, 0.0)
            → common = total.masked_fill(total == -torch.inf, 0.0)
    The lse of the newest part was kept in place of that of all. The next merge then gives all parts before
    too little weight.

    −inf minus −inf
        common = both.masked_fill(both == -torch.inf, 0.0) → common = both
    Where neither side has a key, both lse are −inf, and their difference is NaN. Such a row has the weights 0
    and 0: subtract 0 from it.

    0 times NaN
        out = out.masked_fill((lse == -torch.inf)[..., None], 0.0) → out = out
    The output of a row without keys was multiplied by 0. Its numbers mean nothing, and 0 · NaN is NaN:
    put a 0 in its place before you multiply.

    the newest part alone
        if state is None: → if True:
    What came before is forgotten: the state after a merge is the newest part alone.

    an empty state that counts as a key
        return out, lse → state = torch.zeros_like(out), torch.zeros_like(lse)
    The state began with out = 0 and lse = 0. That is what one key of score 0 and value 0 gives, and nobody
    has such a key: lse is −inf where there is none.

    old sums not scaled to the new maximum
        def merge(state, part):
            out, lse = part[0].float(), part[1].float()
            out = out.masked_fill((lse == -torch.inf)[..., None], 0.0)
            if state is None:
                return out, torch.where(lse == -torch.inf, 0.0, 1.0), lse
            top = torch.maximum(state[2], lse)
            new = torch.exp(lse - top.masked_fill(top == -torch.inf, 0.0))
            return state[0] + new[..., None] * out, state[1] + new, top


        def finish(state, dtype):
            return (state[0] / state[1].clamp_min(1e-30)[..., None]).to(dtype), state[1].log() + state[2]
    The new part was counted relative to the new maximum, the sums so far still relative to the old one. When
    the maximum rises, multiply the old sums by exp(old maximum − new maximum).

    the lse in the type of the output
        return state[0].to(dtype), state[1] → return state[0].to(dtype), state[1].to(dtype)
    The lse was converted to `dtype` as well. It stays in fp32: a merge of this result with another one
    needs its last digits.

    the result in fp32
        return state[0].to(dtype), state[1] → return state[0], state[1]
    The output stayed in fp32. The sums are kept in fp32, and the result goes back to the type in which the
    parts came.

    lse kept in fp16
        out, lse = part[0].float(), part[1].float() → out, lse = part[0].float(), part[1].half().float()
    The lse went through fp16, which has 11 bits: around 150 its neighbours are 0.125 apart, and a weight
    exp(lse − common) is then wrong by as many parts.

    all parts kept until the end
        def merge(state, part):
            return [*(state or []), (part[0].clone(), part[1].clone())]


        def finish(state, dtype):
            lse = torch.stack([part[1].float() for part in state])
            out = torch.stack([part[0].float() for part in state])
            out = out.masked_fill((lse == -torch.inf)[..., None], 0.0)
            both = lse.logsumexp(0)
            weights = torch.exp(lse - both.masked_fill(both == -torch.inf, 0.0))
            return (weights[..., None] * out).sum(0).to(dtype), both
    The state is a list of all parts: it grows with every block, so a rank would hold an output for each block
    of the ring. Merge each part when it comes and let it go.
    """
)

# 08.2: who needs which block

plan.mistakes(
    r"""
    the owner on the wrong side
        owners = [(rank - direction * step) % P for rank in range(P)]
            → owners = [(rank + direction * step) % P for rank in range(P)]
    A block that moves from r to r + 1 comes to a rank from the rank *before* it: after s steps rank r has the
    block of r − s, not of r + s.

    the direction not looked at
        queries[(owner + direction * s) % P] → queries[(owner + s) % P]
        (rank - direction * step) % P → (rank - step) % P
    The blocks were always passed to rank r + 1. With direction −1 they go to r − 1, and other blocks have the
    long way.

    a query does not see itself
        j <= i → j < i
    The token's own key was left out. A query at position i sees the keys up to and including i.

    keys that come later
        j <= i → j >= i
    The mask is upside down: a query sees the keys at and *before* its position.

    the window one too wide
        i - j < window → i - j <= window
    A window of W keys holds the token itself and W − 1 before it: i − j is at most W − 1.

    the window not looked at
        and (window is None or i - j < window) → and True
    The window was left out. With it, blocks whose tokens all lie too far back are needed by nobody, and that
    is what saves the messages.

    padding sees and is seen
        if i < 0 or j < 0: → if False:
    Slots of position −1 were compared like tokens. −1 is smaller than every position, so a causal mask shows
    them to everybody.

    position 0 taken for padding
        if i < 0 or j < 0: → if i <= 0 or j <= 0:
    Position 0 was treated like padding. It is the first token; only −1 is padding. (`if not position` is true
    for 0.)

    the block shown wherever it passes
        needed = [sees(queries[rank], keys[owner], causal, window) for rank, owner in enumerate(owners)]
            → ways = hops(queries, keys, causal, window, direction)
              needed = [step <= ways[owner] for owner in owners]
    The timetable shows a block on every rank that it passes. A rank that only passes it on does not compute
    with it: its entry is None.

    the distance without the ring
        ways.append(max(need, default=0))
            → away = [abs((owner + direction * s) % P - owner) for s in need]
              ways.append(max(away, default=0))
    The way was measured as the difference of the ranks' numbers. Blocks move in one direction only: from rank
    3 of 4 to rank 0 it is one hop, from 1 to 0 it is three.

    ranks compared in place of positions
        needed = [sees(queries[rank], keys[owner], causal, window) for rank, owner in enumerate(owners)]
            → needed = [owner <= rank or not causal for rank, owner in enumerate(owners)]
    "The owner comes before me" decides only when the tokens lie in contiguous order and every rank has some.
    What a query sees depends on positions, whatever ranks they are on.

    blocks compared by their first tokens
        return any(pair_visible(i, j, causal, window) for i in queries for j in keys)
            → return bool(queries and keys) and pair_visible(queries[0], keys[0], causal, window)
    The first query was compared with the first key. A block is needed as soon as *any* query sees any of its
    keys; in striped order that is nearly always so.

    hops counted instead of measured
        ways.append(max(need, default=0)) → ways.append(len([s for s in need if s]))
    The ranks that need a block were counted. The block also passes ranks that do not need it, so its way is
    the distance to the last one that does.

    the block ends at the first rank without use for it
        ways.append(max(need, default=0))
            → way = 0
              while way + 1 in need:
                  way += 1
              ways.append(way)
    The block was stopped at the first rank that does not need it. A rank further on may need it, and it can
    only come through all ranks between.

    one step short
        for step in range(1 + max(hops(queries, keys, causal, window, direction))):
            → for step in range(max(1, max(hops(queries, keys, causal, window, direction)))):
    The step in which the block with the longest way is used for the last time is missing: h hops are h + 1
    steps, since step 0 needs none.

    always P steps
        for step in range(1 + max(hops(queries, keys, causal, window, direction))): → for step in range(P):
    The timetable goes on after the last block has come to its end. Where nobody needs the far blocks, these
    steps are what a window saves.
    """
)

# 08.3: bytes

count.mistakes(
    r"""
    query heads in place of KV heads
        2 * layer["n_kv_heads"] → 2 * layer["n_heads"]
    The block was counted with the query heads. Queries stay where they are; only keys and values of the KV
    heads travel, and that is what grouped queries save on a ring.

    keys only
        batch * per_rank * 2 * layer["n_kv_heads"] → batch * per_rank * layer["n_kv_heads"]
    A factor of 2 is missing: a block has a key *and* a value in each KV head.

    a latent for keys and one for values
        return batch * per_rank * (layer["rank"] + layer["rope"])
            → return batch * per_rank * 2 * (layer["rank"] + layer["rope"])
    The latent was doubled. Keys and values are made from the same vector, on the rank that receives it.

    a latent for each head
        return batch * per_rank * (layer["rank"] + layer["rope"])
            → return batch * per_rank * layer["n_heads"] * (layer["rank"] + layer["rope"])
    The latent was counted once per head. It is one vector for all of them, and each rank makes the keys and
    values of all heads from it.

    the latent without its rotated key
        (layer["rank"] + layer["rope"]) → layer["rank"]
    The `rope` numbers are missing. The rotated key cannot be made from the latent, so it travels beside it.

    one row of the batch
        return batch * per_rank * (layer["rank"] → return per_rank * (layer["rank"]
        return batch * per_rank * 2 → return per_rank * 2
    The batch is missing: a block holds the tokens of all rows, and all of them travel in one message.

    a rotated key for each head
        (layer["rank"] + layer["rope"]) → (layer["rank"] + layer["n_heads"] * layer["rope"])
    The rotated key was counted once per head. All heads share one: it is `rope` numbers per token.

    what is received
        return [sum((rank - owner) % len(hops) < hops[owner] for owner in ranks) for rank in ranks]
            → return [sum(0 < (rank - owner) % len(hops) <= hops[owner] for owner in ranks) for rank in ranks]
    The blocks that come to each rank were counted. All ranks together receive what they send, but each rank
    sends what it holds, its own block first, and does not pass on what ends there.

    everything on the owner's account
        return [sum((rank - owner) % len(hops) < hops[owner] for owner in ranks) for rank in ranks]
            → return list(hops)
    All messages of a block were counted at its owner. The owner sends it once; every further hop is a message
    of the rank that the block has come to.

    every block all the way
        < hops[owner] for owner → < len(hops) - 1 for owner
    Every block was sent P − 1 times. Those that nobody further on needs stop before: `hops` says where.

    the last rank sends it too
        < hops[owner] for owner → <= hops[owner] for owner
    The rank at the end of a way keeps the block and lets it go; h hops are h messages, and a block with 0
    hops none.

    gradients in the dtype of the keys
        wide = max(4, size) → wide = size
    The gradients were counted in `dtype`. They are sums over many ranks, which are kept in fp32 at least.

    gradients always in 4 bytes
        wide = max(4, size) → wide = 4
    4 bytes are the least. Where the numbers themselves have 8, their gradients have 8 too.

    no way home
        wide * (n + back) → wide * n
    The gradient is not sent home. After the last hop the sum lies on the last rank, and the owner needs it:
    one message more for every block that has travelled.

    the way home on the owner's account
        home[(owner + way) % len(hops)] += 1 → home[owner] += 1
    The message home was counted at the owner, who receives it. The rank at the end of the way sends it.

    a way home for blocks that stayed
        if way > 0: → if way >= 0:
    A block that does not travel has its gradient at home already. A message to oneself is none.

    keys and values not sent again
        block * (size * n + wide * (n + back)) → block * (wide * (n + back))
    Only gradients were counted. The ranks need the keys and values to compute them, and after the forward
    pass nobody has kept those of others: the blocks go round once more.
    """
)

# 08.4: balance

balance.mistakes(
    r"""
    one piece of the text for each rank
        order = sorted(range(len(costs)), key=lambda position: costs[position])
            → order = list(range(len(costs)))
        return [order[rank::world] for rank in range(world)]
            → each = -(-len(costs) // world)
              return [order[rank * each : (rank + 1) * each] for rank in range(world)]
    The ranks got contiguous pieces. In causal attention the last piece has the most work by far, and all wait
    for its rank.

    the work alone
        return [order[rank::world] for rank in range(world)]
            → shares, work = [[] for _ in range(world)], [0] * world
              for position in reversed(order):
                  rank = work.index(min(work))
                  shares[rank].append(position)
                  work[rank] += costs[position]
              return shares
    Each token went to the rank with the least work so far. The work is balanced, but a rank with costly
    tokens gets fewer of them, and every block of the ring has to hold as many tokens as the fullest.

    striped by position
        order = sorted(range(len(costs)), key=lambda position: costs[position])
            → order = list(range(len(costs)))
    Positions were dealt out in their order. That balances one causal text; where the costs have a period,
    such as documents as long as there are ranks, one rank gets all the cheap ones.

    zig-zag by position
        order = sorted(range(len(costs)), key=lambda position: costs[position])
            → order = list(range(len(costs)))
        return [order[rank::world] for rank in range(world)]
            → each = -(-len(costs) // (2 * world))
              pieces = [order[i * each : (i + 1) * each] for i in range(2 * world)]
              return [pieces[rank] + pieces[-1 - rank] for rank in range(world)]
    A piece from the start and one from the end balance costs that grow evenly from start to end, and a length
    that 2 · world divides. Other costs and lengths they do not.

    the cheap tokens to one rank
        return [order[rank::world] for rank in range(world)]
            → each = -(-len(costs) // world)
              return [order[rank * each : (rank + 1) * each] for rank in range(world)]
    The tokens were sorted by cost and then cut into pieces, so that the first rank has all the cheap ones.
    Deal them out one by one instead.

    the remainder left out
        return [order[rank::world] for rank in range(world)]
            → whole = len(order) // world * world
              return [order[:whole][rank::world] for rank in range(world)]
    The tokens beyond a multiple of `world` are on no rank. A length that does not divide gives some ranks one
    token more.

    the remainder to the last rank
        return [order[rank::world] for rank in range(world)]
            → whole = len(order) // world * world
              shares = [order[:whole][rank::world] for rank in range(world)]
              shares[-1] += order[whole:]
              return shares
    The whole remainder went to one rank, the most expensive tokens. Spread it: one token for each rank.

    costs in place of positions
        return [order[rank::world] for rank in range(world)]
            → return [[costs[position] for position in order[rank::world]] for rank in range(world)]
    The lists hold the costs of the tokens. What a rank has to know is which positions it gets.

    the busiest rank of the whole ring
        total += sum(work)
        time += max(work)
            → total += sum(work)
              loads = [a + b for a, b in zip(work, loads)] if step else work
              time = max(loads)
    The work of each rank was summed up first, and the largest sum taken as the time. All ranks wait for each
    other after *every* step, so a rank that is late in turns with others costs more than that.

    the mean over the steps
        P, total, time = len(held), 0, 0 → P, shares = len(held), []
        total += sum(work)
        time += max(work)
            → shares.append(1 - sum(work) / (P * max(work)) if max(work) else 0.0)
        return 1 - total / (P * time) → return sum(shares) / len(shares)
    The shares of the steps were averaged as if all steps took as long. A step with little work counts little:
    divide the sum of all pairs by the sum of all times.

    the share of steps without work
        time += max(work) → time += sum(each == 0 for each in work)
        return 1 - total / (P * time) → return time / P**2
    Steps in which a rank has nothing to do were counted. A rank that has a little to do also waits, until the
    one with the most is done.

    busy, not idle
        return 1 - total / (P * time) → return total / (P * time)
    This is the share of the time in which ranks work. Asked for is the rest.

    a query does not see itself
        0 <= j <= i → 0 <= j < i
    The pairs of a token with itself are missing: j ≤ i, its own key included.

    padding counted
        0 <= j <= i → j <= i
    Slots of position −1 were counted as keys and queries. They have no work, and make none.

    every pair counted
        0 <= j <= i → 0 <= j and 0 <= i
    The pairs of later keys were counted as well. Without the mask every rank has the same work, and nobody
    ever waits.
    """
)

# 08.5: deadlocks

deadlock.mistakes(
    r"""
    sends that never wait
        elif kind == "send" and sum(message[0] == rank for message in under_way) < room:
            → elif kind == "send":
    Every send ended at once, as if the network could take any number of messages. Then hardly anything gets
    stuck, and the program hangs with the first block that is too large.

    room for one message more
        sum(message[0] == rank for message in under_way) < room
            → sum(message[0] == rank for message in under_way) <= room
    A send ended at once although `room` messages were under way already. With room 0 no send ends before its
    receiver takes the message.

    sends that only room can end
        elif kind == "send" and left[peer][:1] == [("recv", rank, block)]: → elif False:
    A send that found no room never ended. It also ends when the receiver is at its receive; without room
    that is the only way.

    no hand-over for those who have had room
        left[peer][:1] == [("recv", → not room and left[peer][:1] == [("recv",
    With its room taken, a rank was made to wait although the receiver of this message was ready. A receiver
    that waits takes a message whether there is room or not.

    every rank looked at once
        while moved: → for _ in range(1):
    Each rank had one chance. One that cannot move now may move after another has: look again until nothing
    moves any more.

    room that never comes back
        under_way.remove((peer, rank, block))
            → under_way[under_way.index((peer, rank, block))] = (peer, -1, block)
    Received messages still take room. As soon as a message is received, its sender has room for another.

    room for each receiver
        sum(message[0] == rank for message in under_way) < room
            → sum(message[:2] == (rank, peer) for message in under_way) < room
    The messages were counted separately for each receiver. A rank has `room` messages under way in all, to
    all receivers together.

    room shared by all ranks
        sum(message[0] == rank for message in under_way) < room → len(under_way) < room
    All ranks' messages were counted together. Each rank has room of its own.

    whatever comes from that rank
        left[peer][:1] == [("recv", rank, block)] → [op[:2] for op in left[peer][:1]] == [("recv", rank)]
    A receive was ended by another block of the same sender. It waits for the block that it names.

    only those that cannot send
        if program] → if program and program[0][0] == "send"]
    Ranks that wait for a message were left out. They never end either, if the message never comes.

    all sends first
        while sends:
        source, target, block = next(message for message in sends if message[2] in has[message[0]])
        sends.remove((source, target, block))
        new[source].append(("send", target, block))
        new[target].append(("recv", source, block))
        has[target].add(block)
        return new
            → return [sorted(program, key=lambda op: op[0], reverse=True) for program in programs]
    If all send first, nobody receives, and without room no send ends.

    all receives first
        while sends:
        source, target, block = next(message for message in sends if message[2] in has[message[0]])
        sends.remove((source, target, block))
        new[source].append(("send", target, block))
        new[target].append(("recv", source, block))
        has[target].add(block)
        return new
            → return [sorted(program, key=lambda op: op[0]) for program in programs]
    If all receive first, nobody sends, and all wait for the first message.

    one rank turned round
        while sends:
        source, target, block = next(message for message in sends if message[2] in has[message[0]])
        sends.remove((source, target, block))
        new[source].append(("send", target, block))
        new[target].append(("recv", source, block))
        has[target].add(block)
        return new
            → return [program[::-1] if rank == 0 else program for rank, program in enumerate(programs)]
    One rank that receives first mends a ring of one step. Where blocks are passed on, or messages cross in
    other ways than one circle, each rank needs a place in an order that all share.

    every second rank receives first
        while sends:
        source, target, block = next(message for message in sends if message[2] in has[message[0]])
        sends.remove((source, target, block))
        new[source].append(("send", target, block))
        new[target].append(("recv", source, block))
        has[target].add(block)
        return new
            → return [
                  sorted(program, key=lambda op: op[0]) if rank % 2 else program
                  for rank, program in enumerate(programs)
              ]
    Even ranks send and odd ones receive first: that is right for one step of a ring. Over several steps the
    receives of one step must not wait for those of the next, and other patterns have messages between two
    odd ranks.

    blocks sent before they have come
        next(message for message in sends if message[2] in has[message[0]]) → sends[0]
    The order ends, but some rank sends a block that it has not received yet: it would send what lies in its
    memory by chance.
    """
)

# 08.6: a ring with padding

ragged.mistakes(
    r"""
    padding seen as keys
        & (keys < n_tokens) → & (keys < P * C)
    The slots behind the last token were seen. Set to 0 they have a score of 0, which is a weight like any
    other; a causal mask hides them by chance, since they come last.

    weights of 0 in place of a mask on the values
        return x.float().masked_fill(~valid[:, None], 0.0) → return x.float()
    The scores of padding are masked, but its values are still multiplied by these weights, and 0 · NaN is
    NaN. Put 0 into the padding itself.

    padded queries attend
        mask = (queries < n_tokens)[:, None] & (keys < n_tokens)
            → mask = (queries < 2 * P * C)[:, None] & (keys < n_tokens)
    Slots without a token got an output: the mean of what they see. They have to give 0.

    causal by slots
        (keys <= queries[:, None]) → (slots <= slots[:, None])
    Slots were compared in place of positions. The slot of a token says where it lies in its block; whether it
    comes before another depends on the block too.

    causal by blocks
        (keys <= queries[:, None]) → (owner <= rank)
    Whole blocks were shown or hidden. Within its own block a query sees only the tokens up to itself.

    positions from the number of tokens
        queries = rank * C + slots → queries = rank * (n_tokens // P) + slots
        keys = owner * C + slots → keys = owner * (n_tokens // P) + slots
    A rank has C slots, and the last ranks have the padding. n_tokens // P is smaller than C where the length
    does not divide, so two slots would have one position.

    one block too few
        for step in range(P): → for step in range(P - 1):
    The block that comes last is missing: P blocks are P steps, since step 0 is the rank's own.

    KV heads in the wrong order
        k, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)
            → k, v = k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1)
    repeat gives the KV heads 0, 1, 0, 1. Neighbouring query heads share one: 0, 0, 1, 1, which is
    repeat_interleave.

    no scale
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 → scores = q @ k.transpose(-1, -2)
    The scores are not divided by √D, the root of the numbers per head. Every block needs it, as in plain
    attention.

    the mean of the blocks
        out, lse = old[..., None] * out + new[..., None] * new_out, both
            → out, lse = (out + new_out) / 2, both
    The outputs of two blocks were counted alike. Each counts exp(its lse − the common lse).

    the blocks added up
        out, lse = old[..., None] * out + new[..., None] * new_out, both → out, lse = out + new_out, both
    The outputs of the blocks were added. Each is an average over its own keys, and needs its share of all.

    NaN in rows that see nothing
        return lse.masked_fill(lse == -torch.inf, 0.0) → return lse
    A query that sees nothing in a block has lse = −inf there, and −inf − (−inf) is NaN. Subtract 0 for such a
    row.

    the padding of the inputs overwritten
        masked_fill(~valid[:, None], 0.0) → masked_fill_(~valid[:, None], 0.0)
    The zeros were written into the caller's tensors: .float() makes no copy of what is fp32 already. Use
    masked_fill without the underscore.

    all blocks put together
        def ring(blocks, n_tokens, causal=True):
            P, C = len(blocks), blocks[0][0].shape[2]
            at = torch.arange(P * C)
            whole = [torch.cat(each, dim=2) for each in zip(*blocks)]
            q, k, v = (cleaned(x, at < n_tokens) for x in whole)
            mask = (at < n_tokens)[:, None] & (at < n_tokens)
            if causal:
                mask = mask & (at <= at[:, None])
            return list(attend(q, k, v, mask)[0].to(blocks[0][0].dtype).split(C, dim=2))
    The blocks of all ranks were put together. The numbers are right, but no rank has that much memory, which
    is why there is a ring.
    """
)

# 08.7: the model over ranks

model.mistakes(
    r"""
    positions counted from 0 in every call
        queries = [[start + i for i in share] for share in tokens]
            → queries = [list(share) for share in tokens]
    The new tokens were put at positions 0, 1, …. They are at start, start + 1, …: otherwise they do not see
    what is in the cache.

    the cache left out
        ring = layer.ring() if cache is None else cache → ring = layer.ring()
    Every call began with an empty ring. What came before lies in `cache`; layer.ring() is for calls without
    one.

    the newest block alone
        parts.merge(states[rank], part) → parts.merge(None, part)
    Each block replaced what was merged before. The first argument of merge is the state so far.

    its own block alone
        if owner is not None: → if owner == rank:
    Each rank attended to its own block only. A query sees the keys of all ranks; the timetable says which
    block lies where.

    outputs in the order of the ranks
        out = torch.empty_like(q) → done = []
        out[:, :, share] = parts.finish(state, q.dtype)[0] → done.append(parts.finish(state, q.dtype)[0])
        return layer.finish(out) → return layer.finish(torch.cat(done, dim=2))
    The outputs of the ranks were put one behind the other. The tokens were dealt out, so each output has to
    go back to the place of its token.

    every block all the way
        if step < ways[owner]: → if step < P - 1:
    Blocks were sent on though nobody further on needs them. In a step of decode only the other ranks' blocks
    are needed, by the one rank that has the new token.

    one message too many
        if step < ways[owner]: → if step <= ways[owner]:
    The last rank of a way sent the block once more. h hops are h messages.

    sent by its owner every time
        (owner + step) % P) → owner)
    All messages of a block were charged to its owner. After s steps it lies on rank owner + s, and that rank
    sends it.

    sent by the wrong side
        (owner + step) % P) → (owner - step) % P)
    After s steps the block of o lies on rank o + s, since ring.send brings it to the next rank, not to the
    one before.

    new tokens always to the first ranks
        emptiest = sorted(range(P), key=lambda rank: len(ring.positions[rank])) → emptiest = list(range(P))
    The first share is the longest one, and it always went to rank 0: in decode that rank stores every new
    token. Let the rank with the fewest keys take it.
    """
)
