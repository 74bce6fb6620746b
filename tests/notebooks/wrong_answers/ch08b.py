"""Plausible wrong answers of chapter 08b, and what the check must say to each."""

MERGE = "def merge(out_a, lse_a, out_b, lse_b):\n"
FINISH = "def finish(parts, sinks):\n"
JUDGE = "def judge(new, cached, sequences, q_heads, kv_heads, head_dim, itemsize, us):\n"
NUMBERS = "    numbers = 2 * sequences * (cached + new) * kv_heads * head_dim\n"
PAIRS = "    pairs = sequences * q_heads * (new * cached + new * (new + 1) / 2)\n"
READ = "    read = itemsize * numbers / READ_SPEED\n"
MULTIPLY = "    multiply = 4 * head_dim * pairs / PRODUCT_SPEED\n"
RETURN = "    return 'bytes' if read > multiply else 'products', max(read, multiply) / us\n"
AUTO = "def my_auto(new, cached, sequences, q_heads, kv_heads, head_dim):\n"

WRONG = {
    "08b.1": [
        # the plain mean
        (
            MERGE + "    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)\n",
            "out, lse 1 and 2: answer[0, 0",
        ),
        # the formula as it stands
        (
            MERGE
            + "    a, b = lse_a.exp(), lse_b.exp()\n"
            + "    out = (a[..., None] * out_a + b[..., None] * out_b) / (a + b)[..., None]\n"
            + "    return out, torch.log(a + b)\n",
            "out, lse 200 and 199: answer[0, 0, 0]",
        ),
        # stable, but 0 times NaN is NaN
        (
            MERGE
            + "    lse = torch.logaddexp(lse_a, lse_b)\n"
            + "    a, b = (lse_a - lse).exp(), (lse_b - lse).exp()\n"
            + "    return a[..., None] * out_a + b[..., None] * out_b, lse\n",
            "out, lse 3 and -inf: answer[0, 0, 0]",
        ),
        # each side alone is right, both empty is not
        (
            MERGE
            + "    lse = torch.logaddexp(lse_a, lse_b)\n"
            + "    a, b = (lse_a - lse).exp(), (lse_b - lse).exp()\n"
            + "    out = a[..., None] * out_a + b[..., None] * out_b\n"
            + "    out = torch.where((lse_a == -math.inf)[..., None], out_b, out)\n"
            + "    return torch.where((lse_b == -math.inf)[..., None], out_a, out), lse\n",
            "out, lse -inf and -inf: answer[0, 0, 0]",
        ),
        # nan_to_num instead of a choice: a NaN that was seen becomes 0
        (
            MERGE
            + "    top = torch.maximum(lse_a, lse_b)\n"
            + "    a, b = (lse_a - top).exp().nan_to_num(0), (lse_b - top).exp().nan_to_num(0)\n"
            + "    total = (a + b)[..., None]\n"
            + "    out = (a[..., None] * out_a.nan_to_num(0) + b[..., None] * out_b.nan_to_num(0)) / total\n"
            + "    return out.nan_to_num(0), top + (a + b).log()\n",
            "out, lse 1 and 2, out_a has a NaN that was seen: it must stay: answer[0, 0, 0]: expected nan",
        ),
        # nan_to_num on the result of the formula alone
        (
            MERGE
            + "    no_a, no_b = (lse_a == -math.inf)[..., None], (lse_b == -math.inf)[..., None]\n"
            + "    lse = torch.logaddexp(lse_a, lse_b)\n"
            + "    a, b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]\n"
            + "    out = torch.where(no_a, out_b, torch.where(no_b, out_a, a * out_a + b * out_b))\n"
            + "    return out.nan_to_num(0), lse\n",
            "a NaN that was seen: it must stay: answer[0, 0, 0]: expected nan",
        ),
        # one decision for all heads of a row
        (
            MERGE
            + "    if (lse_a == -math.inf).all() and (lse_b == -math.inf).all():\n"
            + "        return torch.zeros_like(out_a), lse_a\n"
            + "    if (lse_a == -math.inf).all():\n"
            + "        return out_b, lse_b\n"
            + "    if (lse_b == -math.inf).all():\n"
            + "        return out_a, lse_a\n"
            + "    lse = torch.logaddexp(lse_a, lse_b)\n"
            + "    a, b = (lse_a - lse).exp(), (lse_b - lse).exp()\n"
            + "    return a[..., None] * out_a + b[..., None] * out_b, lse\n",
            "out, head 0 lse -inf and 3, head 1 lse 1 and 2: answer[0, 0, 0]",
        ),
    ],
    "08b.2": [
        # every part brings the sink
        (
            FINISH
            + "    out, lse = None, None\n"
            + "    for part, part_lse in parts:\n"
            + "        with_sink = torch.logaddexp(part_lse, sinks.expand_as(part_lse))\n"
            + "        part = part * (part_lse - with_sink).exp()[..., None]\n"
            + "        state = part, with_sink\n"
            + "        out, lse = state if out is None else kg.merge_states(out, lse, *state)\n"
            + "    return out, lse\n",
            "out, three parts: answer[0, 0",
        ),
        # never
        (
            FINISH
            + "    out, lse = parts[0]\n"
            + "    for part in parts[1:]:\n"
            + "        out, lse = kg.merge_states(out, lse, *part)\n"
            + "    return out, lse\n",
            "out, one part: answer[0, 0",
        ),
        # in the log-sum-exp alone
        (
            FINISH
            + "    out, lse = parts[0]\n"
            + "    for part in parts[1:]:\n"
            + "        out, lse = kg.merge_states(out, lse, *part)\n"
            + "    return out, torch.logaddexp(lse, sinks.expand_as(lse))\n",
            "out, one part: answer[0, 0",
        ),
        # in the output alone
        (
            FINISH
            + "    out, lse = parts[0]\n"
            + "    for part in parts[1:]:\n"
            + "        out, lse = kg.merge_states(out, lse, *part)\n"
            + "    return out * torch.sigmoid(lse - sinks)[..., None], lse\n",
            "lse, one part: answer[0, 0",
        ),
        # zeros hide a lost row
        (
            FINISH
            + "    out, lse = parts[0]\n"
            + "    for part in parts[1:]:\n"
            + "        out, lse = kg.merge_states(out, lse, *part)\n"
            + "    total = torch.logaddexp(lse, sinks.expand_as(lse))\n"
            + "    return (out * (lse - total).exp()[..., None]).nan_to_num(0), total\n",
            "out, two parts, the first with a NaN that was seen: it must stay: answer[1, 0, 0]: expected nan",
        ),
    ],
    "08b.3": [
        # the path with the fewest bytes
        (AUTO + "    return 'direct'\n", "hybrid 603 µs"),
        # the path with the fastest kernel
        (AUTO + "    return 'hybrid'\n", "takes 329 µs, direct 27 µs, 12.1 times as long"),
        # direct for one tile of rows
        (
            AUTO + "    return 'direct' if new * q_heads // kv_heads <= 128 else 'hybrid'\n",
            "64 new and 32,768 cached tokens, 1 sequence, 32 query and 8 KV heads of 128: hybrid takes",
        ),
        # a number of tokens, whatever the heads
        (AUTO + "    return 'direct' if new <= 128 else 'hybrid'\n", "16 query and 2 KV heads of 256: direct takes"),
        # a number of tokens that all recorded batches accept
        (
            AUTO + "    return 'direct' if new <= 64 else 'hybrid'\n",
            "32 query and 2 KV heads of 256, not measured: the rule of auto expects 1,686 µs of direct and",
        ),
        # a number of rows, of all KV heads together
        (
            AUTO + "    return 'direct' if new * q_heads <= 1024 else 'hybrid'\n",
            "32 query and 8 KV heads of 128: hybrid",
        ),
        # a number of tokens, with an exception for one measured layer
        (
            AUTO + "    return 'direct' if new <= (64 if head_dim < 256 else 16) else 'hybrid'\n",
            "these 64 new tokens are 64 rows of a KV head, and the direct path pays for rows",
        ),
        # not a path
        (AUTO + "    return new <= 64\n", "expected one of direct, gather, hybrid, got True"),
    ],
    "08b.4": [
        # K and V have fewer heads than Q
        (
            JUDGE + NUMBERS.replace("kv_heads", "q_heads") + PAIRS + READ + MULTIPLY + RETURN,
            "share, 1 new and 8,192 cached tokens, 16 sequences, 64 query and 8 KV heads of 64, ours",
        ),
        # the heads of a group share the bytes, not the products
        (
            JUDGE + NUMBERS + PAIRS.replace("q_heads", "kv_heads") + READ + MULTIPLY + RETURN,
            "limit, 128 new and 8,192 cached tokens, 16 sequences, 64 query and 8 KV heads of 64, ours",
        ),
        # Q times K alone
        (
            JUDGE + NUMBERS + PAIRS + READ + MULTIPLY.replace("4", "2") + RETURN,
            "share, 128 new and 8,192 cached tokens, 16 sequences, 64 query and 8 KV heads of 64, ours",
        ),
        # every pool has one byte a number
        (
            JUDGE + NUMBERS + PAIRS + READ.replace("itemsize * ", "") + MULTIPLY + RETURN,
            "share, 1 new and 8,192 cached tokens, 16 sequences, 64 query and 8 KV heads of 64, FA3 BF16",
        ),
        # a new token sees the new ones after it, too
        (
            JUDGE + NUMBERS + "    pairs = sequences * q_heads * new * (cached + new)\n" + READ + MULTIPLY + RETURN,
            "share, 128 new and 8,192 cached tokens",
        ),
        # both times, one after the other
        (
            JUDGE + NUMBERS + PAIRS + READ + MULTIPLY + RETURN.replace("max(read, multiply)", "(read + multiply)"),
            "share, 1 new and 8,192 cached tokens",
        ),
        # how many times the limit the measurement is
        (
            JUDGE + NUMBERS + PAIRS + READ + MULTIPLY + RETURN.replace("max(read, multiply) / us", "us / read"),
            "share, 1 new and 8,192 cached tokens",
        ),
        # the wrong way round
        (
            JUDGE + NUMBERS + PAIRS + READ + MULTIPLY + RETURN.replace(">", "<"),
            "limit, 1 new and 8,192 cached tokens",
        ),
        # not a limit
        (JUDGE + "    return cached > new, 0.5\n", "expected one of bytes, products, got True"),
    ],
}
