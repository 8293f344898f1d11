"""Unit 09: known mistakes, each as an edit of the solution."""

from statistics import mean

from .checks import accounts, cow, leak, model, prefix, quotas, tables

# 09.1: slots

tables.mistakes(
    r"""
    blocks rounded down
        blocks = [-(-n // page) for n in after] → blocks = [n // page for n in after]
        n - -(-old // page) for → n - old // page for
    Blocks were rounded down. A block that is partly full is a whole block: its tokens have to be somewhere.

    one block too many where the last is full
        blocks = [-(-n // page) for n in after] → blocks = [n // page + 1 for n in after]
        n - -(-old // page) for → n - (old // page + 1) for
    n // page + 1 counts an empty block more where n is a multiple of the page. A full last block needs no
    further one until the next token comes.

    all blocks, not the further ones
        further = [n - -(-old // page) for n, old in zip(blocks, lengths, strict=True)] → further = blocks
    All blocks of each sequence were returned. Those of its cached tokens are in its table already.

    new tokens in blocks of their own
        further = [n - -(-old // page) for n, old in zip(blocks, lengths, strict=True)]
            → further = [-(-n // page) for n in new]
    The new tokens were given blocks of their own. They fill the partly empty last block first.

    the empty places before the step
        page * sum(blocks) - sum(after) → page * sum(-(-old // page) for old in lengths) - sum(lengths)
    The empty places were counted before the new tokens were there. Asked for are those afterwards.

    new tokens from position 0
        range(start, start + n) → range(n)
    The new tokens were placed from position 0, on top of the cached ones. They follow after `lengths`
    tokens.

    one position too far
        range(start, start + n) → range(start + 1, start + n + 1)
    Positions begin at 0, so the first new token of a sequence with n cached ones has position n, not n + 1.

    the block's number not times page
        table[position // page] * page + position % page → table[position // page] + position % page
    The number of the block was added as it is. Block b begins at slot b · page.

    the position in place of the place in the block
        table[position // page] * page + position % page → table[position // page] * page + position
    The whole position was added to the start of the block. Its place in the block is position % page.

    the table not looked up
        table[position // page] * page + position % page → position // page * page + position % page
    The slots are those of a sequence whose blocks are 0, 1, 2, … The table says where block i of the
    sequence really is.

    the first block of the table only
        table[position // page] * page → table[0] * page
    Every token was put into the first block of the table. A position of p lies in block p // page of its
    sequence.

    padding written to the last slot
        real = slots >= 0 → real = slots >= -1
    The row of slot −1 went to the last place of the last block, since a negative index counts from the end.
    It overwrites somebody's token there.

    slot 0 taken for padding
        real = slots >= 0 → real = slots > 0
    Slot 0 was taken for padding. It is a place as all others; only −1 means padding.

    padding written to slot 0
        real = slots >= 0 → slots, real = slots.clamp(min=0), slots >= -1
    The row of slot −1 was written to slot 0. That is somebody's place too; a row of padding goes nowhere.

    slots taken for rows of the memory
        pages[slots[real] // page, :, slots[real] % page] = rows[real]
            → pages.view(-1, *rows.shape[1:])[slots[real]] = rows[real]
    The pages were seen as rows (slots, G, D). In a block the heads come before the places, so each row was
    spread over places of one head.

    written into the input
        pages, page = pages.clone(), pages.shape[2] → pages, page = pages, pages.shape[2]
    The input was changed. The task asks for a new tensor: the caller may still need the old one.

    heads and places interchanged
        pages[blocks].transpose(0, 1).flatten(1, 2) → pages[blocks].reshape(G, -1, D)
    The blocks were reshaped without bringing the heads to the front. The numbers are then in the wrong
    order: each head reads pieces of others.

    the table in the order of the memory
        blocks = torch.tensor(table[: -(-n // page)], dtype=torch.long)
            → blocks = torch.tensor(sorted(table[: -(-n // page)]), dtype=torch.long)
    The blocks were read in the order of their numbers. Their order in the table is that of the tokens.

    not cut at the length
        out[row, :, :n] = pages[blocks].transpose(0, 1).flatten(1, 2)[:, :n]
            → tokens = pages[blocks].transpose(0, 1).flatten(1, 2)
              n = min(max(lengths), tokens.shape[1])
              out[row, :, :n] = tokens[:, :n]
    What lies in the rest of the last block was returned too. It is of an earlier sequence, perhaps of
    another user.
    """
)

# 09.2: copy-on-write

cow.mistakes(
    r"""
    full blocks only
        table[: -(-length // page)] → table[: length // page]
    The last block was left out of the fork where it is partly full. Its tokens belong to the fork too; it is
    copied when somebody writes to it.

    reserved blocks shared
        list(table[: -(-length // page)]) → list(table)
    Reserved blocks went to the fork as well. Nothing is in them, and the first who writes there would have to
    replace them.

    a block more where the last is full
        table[: -(-length // page)] → table[: length // page + 1]
    length // page + 1 is a block more than needed where the length is a multiple of the page: a reserved one,
    if there is one.

    every shared block copied
        range(length // page, min(end, len(table))) → range(min(end, len(table)))
    Every shared block was replaced, full ones too. Nobody writes to them any more, so they stay shared: that
    is what copy-on-write saves.

    the last block only
        range(length // page, min(end, len(table)))
            → range(length // page, min(length // page + 1, end, len(table)))
    Only the block of the next token was looked at. n tokens may go to several blocks, and shared ones may lie
    past the last token.

    copied although nobody shares it
        if references[table[i]] > 1 → if references[table[i]] > 0
    A block with one reference was replaced. A sequence that is alone with a block may write to it as it is.

    never copied
        if references[table[i]] > 1 → if references[table[i]] > 10**9
    Nothing is ever replaced, so the fork writes into the block that its parent reads. The parent's tokens
    change without its doing.

    copied from two sharers on
        if references[table[i]] > 1 → if references[table[i]] > 2
    A block with two references was not replaced. The references count the writer itself: two are a writer
    and somebody else.

    the whole block kept
        (i, max(length - i * page, 0)) → (i, page)
    All places of the old block were kept. Only the tokens before `length` are this sequence's; what follows
    belongs to the other one.

    the length as kept tokens
        (i, max(length - i * page, 0)) → (i, length)
    `kept` is the number of tokens in *this* block that come before the new ones, not the number of all tokens
    of the sequence.

    the last place of the block missed
        end = -(-(length + n) // page) → end = (length + n - 1) // page
    The last block that is written to was not counted. The last new token has position length + n − 1, and
    the table needs that entry: one more than its index.

    a block for the token after the last
        end = -(-(length + n) // page) → end = (length + n) // page + 1
    A block was added for the token after the last one. If the new tokens fill the last block, the next one is
    not needed yet.

    new blocks for all new tokens
        return replace, max(end - len(table), 0) → return replace, -(-n // page)
    The new tokens were given blocks of their own. They first fill what is left of the last block, and
    reserved ones.

    nothing copied
        pages[table[i], :kept] = pages[old, :kept] → pass
    The new block took the place of the shared one, and the kept tokens were not copied into it. The fork
    forgets the end of its prompt.

    the old block still counted
        references[old] -= 1 → pass
    The reference to the old block was not given back. It will never be free, and the other sequence copies
    it without need.

    the new block not counted
        references[table[i]] = 1 → pass
    The block that was taken for the copy has no reference. Somebody may take it for free.

    copies not counted as needed
        if len(replace) + n_new > len(free): → if n_new > len(free):
    Only the blocks at the end were counted. A copy needs a free block too.

    nothing counted before
        if len(replace) + n_new > len(free):
        raise MemoryError("too few free blocks") →
    Free blocks were taken until none was left. Count what is needed first, and raise MemoryError: the caller
    waits for that, and not for an IndexError.

    written into the input
        pages.clone(), list(table), list(references), list(free)
            → pages, list(table), list(references), list(free)
    The pages of the caller were changed. The task asks for new objects; the caller may still refuse the
    step.

    lists of the caller changed
        list(table), list(references), list(free) → table, references, free
    The table, the references or the free blocks of the caller were changed. The task asks for new objects; a
    list that is handed to a function is not copied by that.
    """
)

# 09.3: accounts

accounts.mistakes(
    r"""
    freed with its first user
        self.counts[block] -= 1 → self.counts[block] = 0
    Every block of the sequence was freed, though others may use it. A block is free when its last reference
    has gone.

    never freed
        self.free += freed → pass
    The blocks were counted down and never given back. The server runs out of memory after some hours.

    the name stays open
        table = self.tables.pop(name, [])
            → table = self.tables.get(name, [])
              self.tables[name] = []
    An empty table stayed under the name, so that it cannot be opened again.

    counted down below zero by a second cancel
        table = self.tables.pop(name, []) → table = self.tables.get(name, [])
    The table stayed after the end of the sequence. A second cancel counts the same blocks down again, which
    others may use by now.

    an error for a second cancel
        table = self.tables.pop(name, [])
            → if name not in self.tables:
                  raise ValueError(f"name: {name!r} is not open")
              table = self.tables.pop(name)
    A second cancel raises. A user's click and the end of an answer come at the same time, so cancel has to
    be harmless for a name that is gone.

    all its blocks returned as free
        return freed → return table
    All blocks of the sequence were returned. The prefix cache needs exactly those that became free: it goes
    on serving the others.

    shared blocks not counted
        self.counts[block] += 1 → pass
    A shared block was put into the table without a reference. The first of the two that ends frees it under
    the other.

    the shared blocks in place of the table
        self.tables[name] = together → self.tables[name] = list(blocks)
    The table was replaced by the shared blocks. They come at its end: the blocks that it had are lost.

    free blocks shared
        if any(self.counts[block] == 0 for block in blocks) or len(set(together)) < len(together):
            → if len(set(together)) < len(together):
    A block that nobody uses was shared. It is still in the free list and will be given to somebody else too.

    a block twice in one table
        if any(self.counts[block] == 0 for block in blocks) or len(set(together)) < len(together):
            → if any(self.counts[block] == 0 for block in blocks):
    A block came twice into one table. Two different positions of a sequence cannot be in the same place.

    only the table looked at for doubles
        len(set(together)) < len(together) → set(self.tables[name]) & set(blocks)
    A block that comes twice in `blocks` was accepted. It has to be refused as well as one that is in the
    table.

    checked block by block while sharing
        together = [*self.tables[name], *blocks]
        if any(self.counts[block] == 0 for block in blocks) or len(set(together)) < len(together):
        raise ValueError("blocks: one of them is free, or would be twice in the table")
        for block in blocks:
            → together = self.tables[name]
              for block in blocks:
                  if self.counts[block] == 0 or block in together:
                      raise ValueError("blocks: one of them is free or there already")
                  together.append(block)
    The blocks before the bad one were added when it was refused. Look at all of them first, then change
    anything.

    as many as there are
        raise MemoryError(f"{n} blocks wanted, {self.n_free()} free") → n = self.n_free()
    `grow` gave what was left and said nothing. The caller would write past the end of its table.

    some of them before the refusal
        if n > self.n_free():
        raise MemoryError(f"{n} blocks wanted, {self.n_free()} free")
        self.tables[name] += [self.take() for _ in range(n)]
            → for _ in range(n):
                  self.tables[name].append(self.take())
    The sequence kept the blocks that it got before the refusal. All or none: otherwise two requests can hold
    half of what they need, and wait for each other for ever.

    lost in the refusal
        if n > self.n_free():
        raise MemoryError(f"{n} blocks wanted, {self.n_free()} free")
        self.tables[name] += [self.take() for _ in range(n)]
            → self.tables[name] += [self.take() for _ in range(n)]
    `take` gave what was left and then refused. Those blocks are not free any more and in no table: look
    whether there are enough before you take the first.

    counted twice
        self.tables[name] += [self.take() for _ in range(n)]
            → new = [self.take() for _ in range(n)]
              for block in new:
                  self.counts[block] += 1
              self.tables[name] += new
    A new block has two references and is in one table. `take` has set its count to 1 already; with one more
    it never becomes free.

    always replaced
        if self.counts[old] == 1: → if self.counts[old] == 0:
    A block was replaced although nobody else uses it. It then has no reference, and is not in the free list
    either: it is lost.

    the old block keeps the reference
        self.counts[old] -= 1 → pass
    The replaced block kept the reference of the sequence that has left it. It never becomes free.

    counted down before the refusal
        self.tables[name][i] = self.take()
        self.counts[old] -= 1
            → self.counts[old] -= 1
              self.tables[name][i] = self.take()
    The old block had lost its reference when no free block was found. It is still in the table: take the new
    block first, then count.
    """
)

# 09.4: a hash for prefixes

prefix.mistakes(
    r"""
    no chain
        parent = hash_function(sizes + salt + parent + content)
        keys.append(parent)
            → keys.append(hash_function(sizes + salt + content))
    The key depends on the block's own tokens only. The same tokens after another start have other keys and
    values: attention has mixed in what came before.

    the whole prefix hashed for each block
        content = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + page])
        sizes = len(salt).to_bytes(8, "little") + len(parent).to_bytes(8, "little")
        parent = hash_function(sizes + salt + parent + content)
        keys.append(parent)
            → content = b"".join(token.to_bytes(4, "little") for token in tokens[: start + page])
              keys.append(hash_function(len(salt).to_bytes(8, "little") + salt + content))
    All tokens so far were hashed for each block: the bytes grow with the square of the prompt. The parent's
    key stands for everything before the block.

    a key for the rest
        range(0, len(tokens) - page + 1, page) → range(0, len(tokens), page)
    The partly full last block has a key too. Its owner goes on writing to it, so it must not be found.

    the last full block missed
        range(0, len(tokens) - page + 1, page) → range(0, len(tokens) - page, page)
    The last block has no key where the prompt ends with it. It is full and may be cached.

    no salt
        parent = hash_function(sizes + salt + parent + content)
            → parent = hash_function(sizes + parent + content)
    The salt is not in the key. Two tenants have the same keys; the comparison of contents still keeps them
    apart, but the one evicts or hides the entries of the other.

    salt in the first block only
        parent = hash_function(sizes + salt + parent + content)
            → parent = hash_function((parent or salt) + content)
    The salt is where later blocks have their parent's key. A tenant whose salt is another's key continues
    the other's chain.

    salt and parent without their lengths
        hash_function(sizes + salt + parent + content) → hash_function(salt + parent + content)
    Salt and parent were written one after the other. A tenant chooses a salt that ends in another's key, and
    its first block is the other's second one.

    parent and salt without their lengths
        hash_function(sizes + salt + parent + content) → hash_function(parent + salt + content)
    Parent and salt were written one after the other. A salt that begins with another's key makes the first
    block of a prompt the second one of another's.

    a separator in place of the lengths
        hash_function(sizes + salt + parent + content) → hash_function(salt + b"|" + parent + b"|" + content)
    A separator was put between salt and parent. Both may hold any bytes, the separator too: then a longer
    salt and no parent look like a shorter salt and a parent. Their lengths in front leave no doubt.

    a byte for each token
        token.to_bytes(4, "little") for token → bytes([token % 256]) for token
    Tokens above 255 were cut off. A vocabulary has more than 256 of them: 1 and 257 get the same key.

    two bytes for each token
        token.to_bytes(4, "little") for token → (token % 65536).to_bytes(2, "little") for token
    Tokens above 65,535 were cut off. Many vocabularies are larger, and two different tokens get the same key.

    digits without a separator
        content = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + page])
            → content = b"".join(str(token).encode() for token in tokens[start : start + page])
    The tokens were written as digits, one after the other: [1, 23] and [12, 3] are the same then. Give each
    token a fixed number of bytes, or a separator.

    equal hashes taken for equal content
        if held != (salt, tuple(tokens[: (i + 1) * self.page])): → if held is None:
    The content was not compared. With a collision another prompt's keys and values are served, perhaps
    another user's.

    the salt not compared
        if held != (salt, tuple(tokens[: (i + 1) * self.page])):
            → if held is None or held[1] != tuple(tokens[: (i + 1) * self.page]):
    Tokens were compared, but not the salt. With a collision one tenant finds what another has sent.

    only the block's own tokens compared
        if held != (salt, tuple(tokens[: (i + 1) * self.page])):
            → own = tuple(tokens[i * self.page : (i + 1) * self.page])
              if held is None or held[0] != salt or held[1][-self.page :] != own:
    Only the block's own tokens were compared. With a collision it may come after another start, and has other
    keys and values.

    the last token found too
        block_keys(tokens[:-1], self.page → block_keys(tokens, self.page
    The block of the prompt's last token was found. That token has to be computed: the logits after it are
    what the user waits for.

    never the last full block
        block_keys(tokens[:-1], self.page → block_keys(tokens[: max(len(tokens) - self.page, 0)], self.page
    A whole block was left out at the end. Only the block of the last token has to be computed.

    any cached block of the prompt
        break → continue
    The search went on after a missing block. What follows is of no use: the prompt's keys must be there from
    the start without a gap.

    new blocks for cached content
        self.entries.setdefault(key, (content, blocks[i])) → self.entries[key] = content, blocks[i]
    The entry of a cached block was replaced by the new one. Content that is cached keeps its block; the table
    of an earlier request may be the only one that is in use.

    forgotten with everything
        self.entries = {key: entry for key, entry in self.entries.items() if entry[1] not in gone}
            → self.entries = {}
    Everything was forgotten. Only the blocks that are given away must not be found any more.

    not forgotten
        self.entries = {key: entry for key, entry in self.entries.items() if entry[1] not in gone}
            → pass
    The entries stayed. The block gets other content, and is still found under its old name.
    """
)

# 09.5: the leak

leak.mistakes(
    r"""
    the last answer to each guess
        first.setdefault(guess, cached) → first[guess] = cached
    The last answer to each guess was taken. By then the attacker's own first question is in the cache.

    the largest answer to each guess
        first.setdefault(guess, cached) → first[guess] = max(cached, first.get(guess, 0))
    The largest answer was taken. A guess that was asked before is found as a whole, right or wrong.

    all answers added up
        first.setdefault(guess, cached) → first[guess] = cached + first.get(guess, 0)
    The answers to each guess were added up. That finds the guess that was asked most often.

    the fewest cached tokens
        return max(first, key=first.get) → return min(first, key=first.get)
    The guess with the fewest cached tokens was returned. What the victim has sent is found in the cache.

    the mean time
        median(times[guess]) → mean(times[guess])
    The mean was taken. One answer that was held up a hundred times longer decides it.

    the shortest time
        median(times[guess]) → min(times[guess])
    The shortest time was taken. A clock that went wrong once decides it.

    the longest time
        median(times[guess]) → max(times[guess])
    The longest times were compared. These show which answers were held up by other work.

    the first time
        median(times[guess]) → times[guess][0]
    The first time of each guess was taken. A single answer can be held up, or have a wrong clock.

    the last time
        median(times[guess]) → times[guess][-1]
    The last time of each guess was kept. A single answer can be held up, or have a wrong clock.

    the slowest guess
        return min(times, key=lambda guess: median(times[guess]))
            → return max(times, key=lambda guess: median(times[guess]))
    The slowest guess was returned. What is cached need not be computed, so the secret is the fastest.

    hits only
        if max(right.values()) < 27: → if right["hits"] < 27:
    Only the reported tokens were used. A server that reports nothing still answers sooner when it finds
    something.

    times only
        if max(right.values()) < 27: → if right["times"] < 27:
    Only the times were used. A server whose answers all take equally long may still report cached tokens.

    the same server asked again
        answers = {guess: ask(guess) for guess in candidates}
            → answers = {guess: (ask(guess)[0], ask(guess)[1]) for guess in candidates}
    A server was asked for each guess twice, once for each number. The second time every guess is in the
    cache, because it was asked before, and the times tell nothing. Ask once and keep both numbers.

    closed if one attack fails
        if max(right.values()) < 27: → if min(right.values()) < 27:
    A server was called closed if one of the two attacks fails. The attacker chooses the one that succeeds.

    open only if always right
        if max(right.values()) < 27: → if max(right.values()) < 95:
    Only a server that is read every time was called open. An attack that is right in six of ten trials is a
    leak as well, where chance is one in eight.

    closed only if never right
        if max(right.values()) < 27: → if max(right.values()) == 0:
    A server was called open as soon as one guess was right. With eight candidates, one in eight guesses is
    right by chance.

    the open ones
        if max(right.values()) < 27: → if max(right.values()) >= 27:
    The open servers were returned. Asked for are the closed ones.
    """,
    mean=mean,
)

# 09.6: quotas

quotas.mistakes(
    r"""
    what is held at the end
        most[tenant] = max(most.get(tenant, 0), now[tenant]) → most[tenant] = now[tenant]
    The blocks at the end of the day were returned. A quota must be enough for the busiest moment.

    everything that was taken
        now[tenant] = now.get(tenant, 0) + change → now[tenant] = now.get(tenant, 0) + max(change, 0)
    What was released was not subtracted. A block that was given back can be taken again.

    the largest single request
        most[tenant] = max(most.get(tenant, 0), now[tenant]) → most[tenant] = max(most.get(tenant, 0), change)
    The largest single change was returned. A tenant holds what it took before as well.

    the peak of all tenants
        most[tenant] = max(most.get(tenant, 0), now[tenant])
            → most[tenant] = max(most.get(tenant, 0), sum(now.values()))
    The blocks of all tenants were added up. A quota is for one tenant.

    one after the other
        quota[min(hungry, key=quota.get)] += 1 → quota[hungry[0]] += 1
    The first tenant got everything that it wants, then the second. The rest goes to the smallest quota each
    time.

    the largest quota first
        quota[min(hungry, key=quota.get)] += 1 → quota[max(hungry, key=quota.get)] += 1
    The rest went to the largest quota. It goes to the smallest, so that those with little come up first.

    to the largest demand
        quota[min(hungry, key=quota.get)] += 1
            → quota[max(hungry, key=lambda tenant: demand[tenant] - quota[tenant])] += 1
    The rest went to the tenant that lacks most. A tenant could then get more just by asking for more.

    of equal ones the last
        quota[min(hungry, key=quota.get)] += 1 → quota[min(reversed(hungry), key=quota.get)] += 1
    Of several equal quotas the last got the block. The task asks for the first in the order of `minimum`.

    of equal ones the first in the alphabet
        quota[min(hungry, key=quota.get)] += 1 → quota[min(sorted(hungry), key=quota.get)] += 1
    Of several equal quotas the first by name got the block. The task asks for the first in the order of
    `minimum`.

    more than was asked for
        if quota[tenant] < demand[tenant]] → if True]
    Blocks were given to tenants that do not demand them. They stay unassigned, and can be used for something
    else.

    the minimum cut at the demand
        quota = dict(minimum) → quota = {tenant: min(n, demand[tenant]) for tenant, n in minimum.items()}
    A minimum was lowered to the demand. It was promised: the tenant may need it tomorrow.

    the minimum not given
        quota = dict(minimum) → quota = dict.fromkeys(minimum, 0)
        rest = capacity - sum(minimum.values())
            → rest = capacity if capacity >= sum(minimum.values()) else -1
    All blocks were divided as if there were no minimums. Each tenant gets its minimum first.

    no refusal
        if rest < 0: → if False:
    More was promised than there is, and nothing was raised. The last to come finds no block for its minimum.

    refused when nothing is left over
        if rest < 0: → if rest <= 0:
    Exactly enough memory was refused. If the minimums fill it, everybody gets the minimum.

    the oldest block of all tenants
        own = [block for block, owner in cached if owner == tenant]
            → own = [block for block, owner in cached]
        too_many = in_use[tenant] + len(own) + n - quotas[tenant]
            → held = len([block for block, owner in cached if owner == tenant])
              too_many = in_use[tenant] + held + n - quotas[tenant]
    Blocks of others were evicted. Their owner notices, and learns that somebody is busy: that is the channel
    that quotas close.

    the newest first
        return own[: max(too_many, 0)] → return own[::-1][: max(too_many, 0)]
    The most recently used blocks were evicted. These are the likeliest to be found again.

    cached blocks not counted
        too_many = in_use[tenant] + len(own) + n - quotas[tenant]
            → too_many = in_use[tenant] + n - quotas[tenant]
    The tenant's cached blocks were not counted against its quota. They take memory that is promised to
    others.

    all of them
        return own[: max(too_many, 0)] → return own if too_many > 0 else []
    All cached blocks of the tenant were evicted. One more than necessary is a prefix that has to be computed
    again.

    as many as it takes
        return own[: max(too_many, 0)] → return own[:n] if too_many > 0 else []
    n blocks were evicted. Part of the n may fit into what is left of the quota.

    an empty list for a refusal
        return None → return []
    An empty list was returned where the request must be refused. It means that nothing has to be evicted.
    """
)

# 09.7: the manager

model.mistakes(
    r"""
    nothing is shared
        found = self.cache.find(prompt, salt) → found = []
    Nothing was ever found: `start` did not ask the prefix cache, or `commit` gave it nothing. Every prompt is
    computed as a whole, and stored once more.

    found and not counted as written
        return len(self.tokens[name])
            → self.tokens[name] = []
              return len(found) * self.page
    The found tokens are in the table, and the length says 0. New tokens are then written from position 0.

    blocks in place of tokens
        list(prompt[: len(found) * self.page]), salt → list(prompt[: len(found)]), salt
    As many tokens as blocks were counted. Each found block holds `page` tokens.

    no salt
        found = self.cache.find(prompt, salt) → found = self.cache.find(prompt, b"")
        list(prompt[: len(found) * self.page]), salt → list(prompt[: len(found) * self.page]), b""
    The salt was not passed on. All tenants find each other's prompts.

    generated tokens without the salt
        self.cache.add(self.tokens[name], self.salts[name], self.table(name))
            → self.cache.add(self.tokens[name], b"", self.table(name))
    What was written is cached without its salt, so its own tenant never finds it, and one without a salt
    would.

    only the new tokens added
        self.cache.add(self.tokens[name], self.salts[name], self.table(name))
            → self.cache.add(tokens, self.salts[name], self.table(name))
    The cache was given the new tokens, and the whole table. A block is found by all tokens from the start of
    the sequence.

    the tokens replaced by the new ones
        self.tokens[name] += tokens → self.tokens[name] = list(tokens)
    The tokens of the sequence were replaced by the new ones. They follow after those before, and the length
    is that of all.

    cached before the tokens are there
        self.tokens[name] += tokens
        self.cache.add(self.tokens[name], self.salts[name], self.table(name))
            → self.cache.add(self.tokens[name], self.salts[name], self.table(name))
              self.tokens[name] += tokens
    The cache was told before the new tokens were added, so it always lacks those of the last call.

    the fork without its parent's salt
        list(self.tokens[name]), self.salts[name] → list(self.tokens[name]), b""
    The fork's text is cached without a salt. It starts with the parent's prompt, and belongs to the same
    tenant.

    the fork has its parent's list of tokens
        list(self.tokens[name]), self.salts[name] → self.tokens[name], self.salts[name]
    Parent and fork have one and the same list of tokens: what one of them writes makes the other longer.

    the fork shares nothing
        self.accounts.share(new, self.parts.fork_table(self.table(name), self.length(name), self.page))
            → self.accounts.grow(new, len(self.table(name)))
    The fork got blocks of its own, and nothing in them. It shares those of its parent until it writes.

    the fork's blocks not counted
        self.accounts.open(new)
        self.accounts.share(new, self.parts.fork_table(self.table(name), self.length(name), self.page))
            → parent = self.table(name)
              self.accounts.tables[new] = self.parts.fork_table(parent, self.length(name), self.page)
    The fork got its parent's blocks past the accounts, so their counts do not know it. Nobody sees that they
    are shared: parent and fork write to the same place.

    the fork starts like a new prompt
        self.accounts.open(new)
        self.accounts.share(new, self.parts.fork_table(self.table(name), self.length(name), self.page))
        self.tokens[new], self.salts[new] = list(self.tokens[name]), self.salts[name]
            → self.start(new, self.tokens[name], self.salts[name])
    `start` finds full blocks only, and never the one with the last token. A fork has all tokens of its
    parent, those of the last block too.

    no copy on write
        copies = [(*self.accounts.replace(name, i), kept) for i, kept in replace] → copies = []
    Shared blocks were not replaced. Parent and fork write to the same place.

    the copies not named
        return copies → return []
    Shared blocks were replaced, and the server was told nothing: the new blocks are empty, and the kept
    tokens are lost.

    new blocks only
        if len(replace) + n_new > self.n_free(): → if n_new > self.n_free():
    Only the further blocks were counted. Some entries were replaced before the refusal, and stay so.

    one block too many
        self.accounts.grow(name, n_new) → self.accounts.grow(name, n_new + (n_new > 0))
    A block more than needed was taken each time. write_plan counts exactly what is written now.

    released and still found
        self.cache.forget(self.accounts.cancel(name)) → self.accounts.cancel(name)
    The prefix cache was not told. It finds blocks that are free, and that somebody else may get next.

    all its blocks forgotten
        self.cache.forget(self.accounts.cancel(name))
            → if name in self.accounts.tables:
                  self.cache.forget(self.table(name))
              self.accounts.cancel(name)
    All blocks of the sequence were forgotten, those too that others still use. The next user with the same
    prefix computes it again.
    """
)
