"""Unit 07: known mistakes, each as an edit of the solution."""

from .checks import balance, convert, design, model, moe, place, table, transpose

# 07.1: a config.json as a table of bytes

table.mistakes(
    r"""
    query heads in place of KV heads
        2 * kv_heads * head_dim → 2 * heads * head_dim
    num_attention_heads counts the queries, which are used and forgotten. The cache has keys and values, and
    of those there are num_key_value_heads.

    keys only
        token = 2 * → token =
    A factor of 2 is missing: a token leaves a key *and* a value in each KV head.

    head_dim always hidden_size / heads
        config.get("head_dim") or config["hidden_size"] // heads → config["hidden_size"] // heads
    head_dim was not looked up. Many newer models choose it freely: in Gemma 3 and gpt-oss it is not
    hidden_size / num_attention_heads. Compute it only where the field is missing or None.

    two bytes per number, whatever the dtype
        getattr(torch, config["torch_dtype"]).itemsize → 2
    torch_dtype was not looked up: float32 takes 4 bytes per number.

    the switch of the window not looked at
        None if config.get("use_sliding_window") is False else config.get("sliding_window")
            → config.get("sliding_window")
    Qwen2's configs have a sliding_window and use_sliding_window = False: the number is there and nobody uses
    it. Every layer is full.

    window memory for max_len tokens
        token * min(max_len, window) → token * max_len
    Memory for all max_len tokens was counted for a window layer. It can never look at more than
    sliding_window of them, so no more are allocated.

    a window layer reads all tokens
        token * min(length, window) → token * length
    A step of a window layer was counted as reading the whole text. It reads the last sliding_window tokens.

    a full window, however short the text
        token * min(max_len, window), token * min(length, window) → token * window, token * window
    A window layer was always counted with sliding_window tokens. A text may be shorter than the window; then
    only its tokens are read: min(length, window).

    read taken for stored
        rows.append(("full", token * max_len, token * length))
            → rows.append(("full", token * max_len, token * max_len))
    A full layer was counted as reading max_len tokens. That is what is allocated; a step reads the `length`
    tokens that are there.

    the first layer of a group is full
        "window" if (i + 1) % config → "window" if i % config
        "state" if (i + 1) % config → "state" if i % config
    The full layers were put at 0, p, 2p, …. In Gemma 3 and Qwen3-Next the *last* layer of each group of p is
    full: layers p − 1, 2p − 1, …

    the state in the model's dtype
        state = 4 * channels → state = getattr(torch, config["torch_dtype"]).itemsize * channels
        state = 4 * (value_heads
            → state = getattr(torch, config["torch_dtype"]).itemsize * (value_heads
    The state was counted in torch_dtype. It is a sum over the whole text and is kept in fp32, 4 bytes per
    number, whatever the dtype of the model.

    the convolution keeps kernel inputs
        config["mamba_d_conv"] - 1) → config["mamba_d_conv"])
        (config["linear_conv_kernel_dim"] - 1) → config["linear_conv_kernel_dim"]
    A convolution with a kernel of 4 was counted with 4 earlier inputs. The newest of the 4 is the token that
    is just computed: kernel − 1 earlier ones are kept.

    no inputs of the convolution
        (config["mamba_d_state"] + config["mamba_d_conv"] - 1) → config["mamba_d_state"]
        * value_dim + inputs) → * value_dim)
    Only the state was counted. In front of it is a short convolution, and for the next token it needs its
    last kernel − 1 inputs: they are kept too.

    the convolution over the values only
        channels = 2 * key_heads * key_dim + value_heads * value_dim → channels = value_heads * value_dim
    Only the values went through the convolution. Queries and keys go through it as well: its channels are q,
    k and v side by side.

    a matrix for each key head
        4 * (value_heads * key_dim → 4 * (key_heads * key_dim
    The matrices were counted by linear_num_key_heads. Key heads are shared, like KV heads in attention; each
    *value* head has a matrix of its own.

    Mamba's channels are hidden_size
        channels = config["mamba_expand"] * config["hidden_size"] → channels = config["hidden_size"]
    mamba_expand is missing. A Mamba layer first widens its input to mamba_expand · hidden_size channels, and
    each of these has a state.

    the offset of Jamba not used
        i % config["attn_layer_period"] == config["attn_layer_offset"] → i % config["attn_layer_period"] == 0
    The first layer of each period was taken as the full one. attn_layer_offset says which it is: in Jamba the
    fifth of eight, offset 4.
    """
)

# 07.2: hops through a stack

place.mistakes(
    r"""
    a window carries W tokens
        else windows[layer] - 1 → else windows[layer]
        // (window - 1)) → // window)
    A layer with window W was counted with W tokens. The window contains the query's own token, so the oldest
    one it sees is W − 1 back.

    a hop uses what the one before it left over
        layer = first
        for distance in hops:
        carried = 0
            → layer, carried = first, 0
              for distance in hops:
                  carried -= 0
        layer += 1
            → layer += 1
              carried -= distance
    What the last layer of a hop could carry beyond its distance was given to the next hop. The next look-up
    needs the *result* of the first one, and that is only there behind this layer: each hop begins with
    nothing.

    the layers in all are compared with the distances in all
        layer = first
        for distance in hops:
        carried = 0
        while carried < distance:
        if layer >= len(windows):
        return False
        carried += distance if windows[layer] is None else windows[layer] - 1
        layer += 1
        return True
            → rest = windows[first:]
              return None in rest or sum(w - 1 for w in rest) >= sum(hops)
    The reach of the whole stack was compared with the sum of the hops. A hop uses whole layers, and one
    global layer serves one hop and not all of them. Walk through the layers hop by hop.

    `first` not used
        layer = first
        for distance → layer = 0
            for distance
        sum(needs) > n_layers - first → sum(needs) > n_layers
        places, layer = [], first → places, layer = [], 0
    The hops began in layer 0. The layers in front of `first` are busy with other things and carry nothing.

    the next hop in the same layer
        carried = 0
        while → carried, layer = 0, max(layer - 1, first)
            while
    A hop began in the last layer of the hop before it. A layer serves one hop: what the first hop finds is
    known behind its last layer, not in it.

    further than the distance, not as far
        while carried < distance: → while carried <= distance:
    A hop was carried until it was *beyond* its distance. Being carried d tokens is enough for a distance of
    d.

    every hop by a global layer
        while sum(needs) > n_layers - first:
        if n_global == len(hops):
        return None
        needs[by_saving[n_global]] = 1
        n_global += 1
            → needs, n_global = [1] * len(hops), len(hops)
              if sum(needs) > n_layers - first:
                  return None
    Each hop got a global layer. As few as possible are asked for: hops that fit into window layers need none.

    the first hops made global, not the longest
        key=lambda i: -needs[i] → key=lambda i: i
    The hops were made global in their order. A global layer saves a hop's window layers but one, so begin
    with the hop that needs the most of them.

    global layers at the top of the stack
        return places → return list(range(n_layers - n_global, n_layers))
    The number of global layers is right, and they were put at the end of the stack. A long hop that comes
    early needs its global layer early, behind the layers of the hops before it.

    the number of the hop for the number of the layer
        places.append(layer) → places.append(i + first)
    The global layer of hop i was put at layer first + i. The hops before it may have used several layers
    each: count them.

    a layer too late
        places.append(layer) → places.append(layer + 1)
    The global layer is one layer behind the place where its hop begins. Layers count from 0, and hop 0 begins
    in layer `first` itself.

    the budget not looked at
        > budget: → > float("inf"):
    The slots were not compared with the budget. Where the fewest global layers already need too many, the
    answer is None.

    window layers cost nothing
        n_global * max_len + (n_layers - n_global) * min(window, max_len) → n_global * max_len
    Only the global layers were counted. Each window layer has min(window, max_len) slots as well.

    a window larger than the text
        min(window, max_len) → window
    A window layer was counted with W slots also where max_len is smaller. No more than max_len tokens can be
    there.

    a budget that is just met is refused
        > budget: → >= budget:
    Slots that fill the budget exactly were refused. They must not exceed it: equal is enough.

    an impossible stack is an empty list
        if n_global == len(hops):
        return None
            → if n_global == len(hops):
                  return []
    An empty list was returned where no choice carries the hops. It says "windows are enough"; None is the
    answer that says it cannot be done.
    """
)

# 07.3: experts with a capacity

moe.mistakes(
    r"""
    softmax in place of the sigmoid
        logits.float().sigmoid() → logits.float().softmax(dim=-1)
    The scores are the softmax over the experts, as in Mixtral. DeepSeek-V3 takes the sigmoid of each logit by
    itself: an expert's score does not depend on the others.

    the bias weighs too
        scores.gather(1, chosen) → (scores + bias).gather(1, chosen)
    The weights were taken from score + bias. The bias is there to balance the load: it takes part in the
    choice and must not change what the experts' outputs count.

    the bias added to the logits
        scores = logits.float().sigmoid()
        chosen = (scores + bias).topk → scores = logits.float().sigmoid()
            chosen = (logits.float() + bias).topk
    The bias was added before the sigmoid. Where scores are close to 0 or 1 this orders the experts
    differently: choose by sigmoid(logits) + bias.

    the bias not used
        (scores + bias).topk → scores.topk
    The experts were chosen by the scores alone. The bias lifts experts with too little to do: choose by score
    + bias.

    weights not divided by their sum
        return weights / weights.sum(dim=-1, keepdim=True), chosen → return weights, chosen
    The chosen scores were returned as they are. Sigmoids do not add up to 1, so divide them by the sum of the
    *chosen* ones.

    divided by the sum of all scores
        return weights / weights.sum(dim=-1, keepdim=True), chosen
            → return weights / scores.sum(dim=-1, keepdim=True), chosen
    The weights were divided by the sum over all E experts. Only the chosen ones contribute, so only they must
    add up to 1.

    sigmoid in half precision
        logits.float().sigmoid() → logits.sigmoid().float()
    The sigmoid was computed in the dtype of the logits. bf16 has 8 bits: close scores become equal and the
    choice is an accident. Convert first.

    chosen in the order of the experts
        .topk(k, dim=-1).indices → .topk(k, dim=-1).indices.sort(dim=-1).values
    The chosen experts are sorted by number. The order says which is a token's first choice, and dispatch
    serves first choices first: keep the largest score + bias first.

    served token by token
        pairs = chosen.T.flatten() → pairs = chosen.flatten()
        weight = weights.T.flatten() → weight = weights.flatten()
        tokens = served % N → tokens = served // chosen.shape[1]
    All choices of token 0 were served before those of token 1. First come the first choices of all tokens:
    otherwise an early token's second choice takes the place of a later token's first.

    one place more than the capacity
        [:capacity, 0] → [: None if capacity is None else capacity + 1, 0]
    Each expert serves capacity + 1 pairs. A capacity of 1 is one token.

    the largest weights served first
        served = (pairs == number).nonzero()[:capacity, 0]
            → served = (pairs == number).nonzero()[:, 0]
              served = served[weight[served, 0].argsort(descending=True)][:capacity]
    An expert served the pairs with the largest weights. The order here is by choice and then by the token's
    number; the weights take no part in it.

    the capacity not used
        [:capacity, 0] → [:, 0]
    Every pair was served. With a capacity an expert stops after that many; the others are dropped.

    weights renormalised over the experts that serve
        N = len(x)
            → N = len(x)
              kept = torch.zeros(chosen.numel(), dtype=torch.bool)
              for number in range(len(experts)):
                  kept[(chosen.T.flatten() == number).nonzero()[:capacity, 0]] = True
              weights = weights * kept.view(chosen.T.shape).T
              weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
    The weights of a token's remaining experts were raised until they add up to 1 again. A dropped pair adds
    nothing, and the other weights stay as the router gave them.

    a token without an expert passes through
        return y
            → missing = y.abs().sum(-1, keepdim=True) == 0
              return torch.where(missing, x, y)
    A token all of whose pairs were dropped came back as x. The block adds x around the experts anyway (the
    residual stream): here its y is 0.

    x added to the result
        y = torch.zeros_like(x) → y = x.clone()
    y began with x in place of zeros. The block adds x around the experts (the residual stream); y is the sum
    of their weighted outputs alone.

    written over, not added
        y = y.index_add(0, tokens, weight[served] * expert(x[tokens]))
            → y = y.index_copy(0, tokens, weight[served] * expert(x[tokens]))
    Each expert's result replaced what an earlier expert had put there. A token has k experts and gets the
    sum: add to its row.

    outputs not weighted
        weight[served] * expert → expert
    The experts' outputs were added as they are. Each counts with its weight, and through the weights the
    router gets its gradient.

    weights without a gradient
        weight = weights.T.flatten()[:, None] → weight = weights.detach().T.flatten()[:, None]
    The values are right and the weights get no gradient (a .detach, .data, .item or no_grad). The choice
    itself has none, so through the weights alone the router learns.

    weights in the other order
        weight = weights.T.flatten() → weight = weights.flatten()
    The pairs are listed choice by choice and the weights token by token, so outputs get weights of other
    tokens. Bring both into the same order.
    """
)

# 07.4: a load-balancing loss

balance.mistakes(
    r"""
    the weights of the chosen experts for P
        scores = logits.float().softmax(dim=-1)
            → scores = logits.float().softmax(dim=-1)
              weights = scores.gather(-1, chosen)
              weights = weights / weights.sum(dim=-1, keepdim=True)
              scores = torch.zeros_like(scores).scatter(-1, chosen, weights)
    This is the broken loss: P is made of the weights as they are used, the chosen scores divided by their
    sum. With one expert per token each of them is 1, a constant, and its gradient is 0. P needs the scores of
    all experts.

    the broken loss as it was given
        return broken_balance_loss(logits, chosen, mask)
    This is broken_balance_loss: its P is made of weights that are divided by their sum, and with one expert
    per token these are 1, without a gradient. It also takes the whole batch for one sequence.

    sigmoid in place of the softmax
        logits.float().softmax(dim=-1) → logits.float().sigmoid()
    The scores are sigmoids, as in the routing of 07.3. They do not add up to 1, so a balanced router has not
    the loss 1. Here scores are the softmax over the experts.

    sigmoids divided by their sum
        scores = logits.float().softmax(dim=-1)
            → scores = logits.float().sigmoid()
              scores = scores / scores.sum(dim=-1, keepdim=True)
    The scores are sigmoids divided by their sum, as in DeepSeek-V3's own loss. Only the form is taken from
    there: the scores of this exercise are the softmax of the logits.

    only the chosen experts' scores in P
        scores = logits.float().softmax(dim=-1)
            → scores = logits.float().softmax(dim=-1)
              scores = scores * F.one_hot(chosen, E).sum(-2)
    P contains a token's score only for the experts that it chose. The mean is over all tokens, whichever
    expert they chose; otherwise an expert's P is small only because few chose it.

    P in place of f
        return (f * P).sum → return (P * P * E).sum
    Both factors are mean scores. f is the share of tokens that were really sent to an expert; a router can
    have even mean scores and still send all tokens to one expert.

    no gradient
        return (f * P).sum → P = P.detach()
            return (f * P).sum
    The value is right and the gradient is 0: P was detached (or computed under no_grad). f is a count and has
    no gradient, so P is the one that must have it.

    f from the scores' largest, not from chosen
        F.one_hot(chosen, E).sum(dim=-2) → k * F.one_hot(scores.argmax(dim=-1), E)
    f was counted by the largest score of each token. With several experts per token all chosen ones do work:
    count `chosen`.

    not divided by k
        / n * E / k → / n * E
    f counts the pairs of tokens and experts, and there are k of them per token. Without the division a
    balanced router has the loss k, not 1.

    without the factor E
        / n * E / k → / n / k
    The factor E is missing: a balanced router has the loss 1/E, and the more experts there are, the weaker
    the loss.

    padding counts in f
        (F.one_hot(chosen, E).sum(dim=-2) * real).sum(dim=1) → F.one_hot(chosen, E).sum(dim=-2).sum(dim=1)
    The choices of padding tokens were counted. They do no work: the router would learn to balance padding
    against text.

    padding counts in P
        (scores * real).sum(dim=1) → scores.sum(dim=1)
    The scores of padding tokens are part of the mean. Only real tokens count.

    divided by T
        n = real.sum(dim=1).clamp(min=1) → n = torch.full_like(real.sum(dim=1), real.shape[1])
    Sums over the real tokens were divided by T, padding included. Divide by the number of real tokens of the
    sequence.

    one batch, not one sequence
        f = ( → n = real.sum()
            f = (
        .sum(dim=1) / n * E → .sum(dim=1).sum(dim=0, keepdim=True) / n * E
        P = (scores * real).sum(dim=1) / n → P = (scores * real).sum(dim=(0, 1))[None] / n
        [mask.any(dim=1)].mean() → .mean()
    f and P were taken over all sequences together. Here each sequence is balanced by itself: f and P of one
    sequence, and then the mean over the sequences.

    the sum over the sequences
        .mean() → .sum()
    The losses of the sequences were added. With more sequences in a batch the loss would weigh more: take the
    mean.

    empty sequences in the mean
        [mask.any(dim=1)].mean() → .mean()
    A sequence without real tokens counts as one with the loss 0 (or NaN) and lowers the mean. Leave it out.

    scores in half precision
        logits.float().softmax(dim=-1) → logits.softmax(dim=-1).float()
    The softmax was computed in the dtype of the logits. In bf16 that is right to two digits only: convert
    first.
    """
)

# 07.5: a checkpoint of another form

convert.mistakes(
    r"""
    norms without the 1
        tensor + 1 if "ln_" in kind else tensor → tensor
    The norm weights were taken as they are. This form multiplies by 1 + weight, so a stored 0 means 1: add 1.

    the last norm forgotten
        tensor + 1 if "ln_" in kind else tensor → tensor + 1 if layer and "ln_" in kind else tensor
    The norms of the layers got their 1, and ln_f did not. It is a norm of the same kind.

    gate and up swapped
        gate, up = tensor.chunk(2) → up, gate = tensor.chunk(2)
    The first half of the rows is gate, the second one up. Both have the same shape, so nothing complains, and
    silu is applied to the wrong one.

    rows not reordered for the rotation
        turned = torch.cat((heads[:, :-1, 0::2], heads[:, :-1, 1::2]), dim=2) → turned = heads[:, :-1]
    Queries and keys were cut out and left in their order. There row 2i and 2i + 1 are turned together, here
    row i and i + D/2: the same rotation of other numbers.

    the reordering the wrong way round
        turned = torch.cat((heads[:, :-1, 0::2], heads[:, :-1, 1::2]), dim=2)
            → turned = heads[:, :-1].unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3)
    The rows were reordered from halves to pairs. It is the other way round: they come as pairs and must
    become halves. The two are inverse to each other, and equal only for D = 4.

    the reordering across heads
        turned = torch.cat((heads[:, :-1, 0::2], heads[:, :-1, 1::2]), dim=2)
            → q, k = heads[:, :-2].reshape(-1, M), heads[:, -2].reshape(-1, M)
              q, k = (torch.cat((rows[0::2], rows[1::2])) for rows in (q, k))
              D = heads.shape[2]
              turned = torch.cat((q.view(n_kv_heads, -1, D, M), k.view(n_kv_heads, 1, D, M)), dim=1)
    All even rows of q_proj came first, then all odd ones, and so in k_proj. The pairs are within a head:
    reorder the D rows of each head by themselves.

    values reordered too
        heads[:, -1].reshape(-1, M) → torch.cat((heads[:, -1, 0::2], heads[:, -1, 1::2]), 1).reshape(-1, M)
    The rows of v were reordered like those of q and k. Values are not rotated; the output matrix expects them
    as they are.

    keys not reordered
        turned[:, -1].reshape(-1, M) → heads[:, -2].reshape(-1, M)
    Only the queries were reordered. A score is a product of q and k: both are rotated, and both must have the
    same order.

    qkv cut in three blocks
        heads = tensor.view(n_kv_heads, n_heads // n_kv_heads + 2, -1, M)
            → D = tensor.shape[0] // (n_heads + 2 * n_kv_heads)
              q, k, v = tensor.split((n_heads * D, n_kv_heads * D, n_kv_heads * D))
              q = q.view(n_kv_heads, -1, D, M)
              heads = torch.cat((q, k.view(n_kv_heads, 1, D, M), v.view(n_kv_heads, 1, D, M)), dim=1)
    The rows were cut into all queries, all keys, all values. This form stores them group by group: the
    queries of a KV head, its key, its value, then the next group.

    k and v swapped
        turned = torch → heads = heads[:, [*range(heads.shape[1] - 2), -1, -2]]
            turned = torch
    The last head of a group was taken as the key. In each group the key comes before the value.

    the unknown dropped without a word
        elif kind != "attn.rotary.inv_freq":
        raise ValueError(f"tensors: expected the names of the other form, got {name}")
            → else:
                  pass
    Names that nobody knows were dropped. A bias that is dropped gives a model that runs and talks nonsense:
    raise ValueError with the name.

    head.weight made of the embedding
        return state
            → return {"head.weight": state["embed.weight"], **state}
    head.weight was filled with the embedding where lm_head.weight is missing. Our model ties the two by
    itself; only the tensors of the checkpoint are asked for.
    """
)

# 07.6: wrong transposes

transpose.mistakes(
    r"""
    one kind after the other
        best, lowest = (), float("inf")
        for n in range(len(square) + 1):
        for subset in combinations(sorted(square), n):
        value = loss({name: w.T if kind(name) in subset else w for name, w in state.items()})
        if value < lowest:
        best, lowest = subset, value
            → best, lowest = (), loss(state)
              for each in sorted(square):
                  value = loss({name: w.T if kind(name) in (*best, each) else w for name, w in state.items()})
                  if value < lowest:
                      best, lowest = (*best, each), value
    Each kind was mended by itself and kept if the loss fell. If q and k are both wrong, mending one of them
    can raise the loss; only both together bring it down. Try all subsets.

    only one kind at a time
        for n in range(len(square) + 1): → for n in range(2):
    Only single kinds were tried. Several may be wrong at once: try all subsets of the square ones.

    something is always found
        for n in range(len(square) + 1): → for n in range(1, len(square) + 1):
    The empty subset was not tried. If nothing is wrong, the loss of the state as it is is the lowest.

    the highest loss
        best, lowest = (), float("inf") → best, lowest = (), -float("inf")
        if value < lowest: → if value > lowest:
    The subset with the highest loss was returned. A wrong transpose raises the loss, so the right state is
    the one with the lowest.

    the embedding among the candidates
        if name.startswith("blocks.") else ""
            → if name.startswith("blocks.") else name
    Square matrices outside the blocks were tried as well, which doubles the calls for each. Only matrices
    within `blocks.` can be wrong here.

    decided by shapes
        if name.startswith("blocks.") and tensor.ndim == 2 else
            → if tensor.shape != tuple(shapes[name]) else
    This is the broken converter: it transposes where the shape does not fit. A square matrix always fits. The
    name says what a tensor is.

    square ones on top of the shapes
        if name.startswith("blocks.") and tensor.ndim == 2 else
            → if tensor.ndim == 2 and tensor.shape in (tensor.T.shape, tuple(shapes[name])[::-1]) else
    Every square matrix is transposed, the embedding too if it is square. embed.weight and head.weight are
    stored as ours are.

    every matrix transposed
        if name.startswith("blocks.") and tensor.ndim == 2 else → if tensor.ndim == 2 else
    The embedding and the head were transposed as well. They are stored as ours; only matrices within
    `blocks.` are (in, out).

    one subset on top of the other
        value = loss({name: w.T if kind(name) in subset else w for name, w in state.items()})
            → for name in state:
                  if kind(name) in subset:
                      state[name] = state[name].T
              value = loss(state)
    The matrices were transposed in `state` itself and not put back, so the next subset came on top of this
    one. Make a new dict for each subset.
    """
)

# 07.7: a pattern for a budget

design.mistakes(
    r"""
    the read limit not looked at
        > budget or read > read_limit: → > budget:
    The bytes read were not compared with read_limit. A pattern that fits into memory can still be too slow.

    the budget not looked at
        if sum(layer["stored"] for layer in layers) > budget or read > read_limit: → if read > read_limit:
    The bytes stored were not compared with the budget. What a layer reads is not what it stores: an index
    stores more and reads less.

    the needle not looked at
        if not exact and sum(layer["reach"] for layer in layers) < distance: → if False:
    Patterns were allowed that cannot reach the needle. Without an exact layer the reaches must add up to the
    distance.

    the longest reach, not the sum
        sum(layer["reach"] for layer in layers) < distance
            → max(layer["reach"] for layer in layers) < distance
    The largest reach of one layer was compared with the distance. Each layer hands on what the layer below it
    has carried: reaches add up.

    an exact layer is required
        if not exact and sum(layer["reach"] for layer in layers) < distance: → if not exact:
    Patterns without an exact layer were refused. Several windows reach a needle as well, if their reaches add
    up to the distance.

    further than the distance
        layers) < distance: → layers) <= distance:
    A reach of exactly the distance was refused. It is enough: the needle is the last token in reach.

    limits that are just met are refused
        > budget or read > read_limit: → >= budget or read >= read_limit:
    A pattern that needs exactly the budget was refused. "At most" includes it.

    least read first
        (exact, -read) > best_key → (-read, exact) > best_key
        best_key = chosen, (exact, -read) → best_key = chosen, (-read, exact)
    The pattern that reads least was taken. First come the exact layers, as many as fit; the bytes read decide
    among those with equally many.

    the most exact layers, whatever they read
        if best is None or (exact, -read) > best_key: → if best is None or exact > best_key[0]:
    The number of exact layers is right, but another pattern with as many reads less.

    least stored in place of least read
        if best is None or (exact, -read) > best_key:
        best, best_key = chosen, (exact, -read)
            → read = sum(layer["stored"] for layer in layers)
              if best is None or (exact, -read) > best_key:
                  best, best_key = chosen, (exact, -read)
    Of the patterns with the most exact layers the one that *stores* least was taken. What is asked for is the
    least read: the index stores more than the plain latent and reads less.

    all exact layers at the end
        pattern = []
        for gap in range(len(exact) + 1):
        n = least + (gap < longer)
        pattern, others = pattern + others[:n] + exact[gap : gap + 1], others[n:]
            → pattern = others + exact
    The exact layers were put behind all others. Spread them: m of them leave m + 1 gaps of about the same
    length.

    each group ends in an exact layer
        divmod(len(others), len(exact) + 1)
            → divmod(len(others), max(len(exact), 1))
        for gap in range(len(exact) + 1): → for gap in range(max(len(exact), 1)):
    The others were spread over m gaps, each in front of an exact layer, and none behind the last one. There
    are m + 1 gaps.

    an empty list where nothing is allowed
        return None → return []
    An empty list was returned. A pattern without layers is no answer; None says that there is none.
    """
)

# 07.8: a hybrid that is trained

model.mistakes(
    r"""
    full in every layer
        return parts.design(kinds, n_layers, budget, float("inf"), distance) → return n_layers * ["full"]
    Every layer has full attention. That learns the task and stores twice what is allowed: the budget is half
    of it.

    no exact layer
        return parts.design(kinds, n_layers, budget, float("inf"), distance) → return n_layers * ["linear"]
    No layer sees all tokens. The states are small enough for the budget, and a needle far away is lost in
    them.

    the bias not handed over
        layer.bias, layer.k → torch.zeros_like(layer.bias), layer.k
    The router's bias was replaced by zeros. In training it is 0 here, so nothing is seen, and in a model that
    balances by it other experts would be chosen.

    one expert per token
        layer.bias, layer.k → layer.bias, 1
    Each token got one expert. layer.k says how many experts it has.

    outputs of one expert after the other, unweighted
        parts.dispatch(rows, weights, chosen, → parts.dispatch(rows, torch.ones_like(weights), chosen,
    The experts' outputs were added without their weights. The router gets its gradient through them, and the
    sum of k outputs is k times as large.

    tokens before texts
        layer.experts).unflatten(0, (B, T)) → layer.experts).unflatten(0, (T, B)).transpose(0, 1)
    The rows were put back as (T, B) and transposed. They were made of texts first, tokens second: each text
    got outputs of others.

    all texts as one sequence
        logits.unflatten(0, (B, T)), chosen.unflatten(0, (B, T)), mask
            → logits[None], chosen[None], mask.view(1, -1)
    The balance was taken over all texts together. Each text is a sequence of its own, as in 07.4.

    the balance of the weights
        parts.balance_loss(logits.unflatten → parts.balance_loss(logits.sigmoid().unflatten
    balance_loss was called with scores in place of logits. It takes their softmax itself.

    every place counts
        rows = logits[torch.arange(len(logits))[:, None], asked]
            → rows = logits[:, -asked.shape[1] :]
    The last places of the text were compared with the answers. The keys ask at the places in `asked`, which
    differ from text to text.

    one place late
        [:, None], asked] → [:, None], (asked + 1).clamp(max=logits.shape[1] - 1)]
    The logits after the asked place were taken. The logits at place t predict the token after t: the answer
    is expected at the place where the key asks.

    the balance not added
        answers.flatten()) + 0.01 * balance → answers.flatten())
    The loss has no balance. The model learns without it too, and nothing keeps its router from using few
    experts.

    the balance with its full weight
        + 0.01 * balance → + balance
    The balance was added without the factor 0.01. It is larger than the loss that matters, and the router
    would balance instead of learning.

    the sum over the answers
        answers.flatten()) + → answers.flatten(), reduction="sum") +
    The losses of the answers were added up. Their mean is asked for: otherwise the weight of the balance
    depends on the size of the batch.
    """
)
