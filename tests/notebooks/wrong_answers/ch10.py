"""Plausible wrong answers of chapter 10, and what the check must say to each."""

SCALE = "def scale_of_rank(scale, rank, ranks):\n"
PLACE = "def place(position, page, ranks):\n"
MERGE = "def merge_ranks(outs, lses, sinks):\n"
BYTES = "def received(rows, heads, dim, itemsize, ranks):\n"

WRONG = {
    "10.1": [
        # the first heads, on every rank
        (
            SCALE
            + "    if scale.shape[1] % ranks:\n"
            + "        raise ValueError('heads')\n"
            + "    return scale[:, : scale.shape[1] // ranks]\n",
            "5 blocks, 8 heads, rank 1 of 2: answer[0, 0]: expected 4, got 0",
        ),
        # blocks instead of heads
        (
            SCALE + "    n = scale.shape[0] // ranks\n    return scale[rank * n : (rank + 1) * n]\n",
            "5 blocks, 8 heads, rank 0 of 2: expected shape [5, 4], got [2, 8]",
        ),
        # the whole scale: the pool has fewer heads
        (SCALE + "    return scale\n", "5 blocks, 8 heads, rank 0 of 2: expected shape [5, 4], got [5, 8]"),
        # heads dealt out in turn
        (
            SCALE + "    return scale[:, rank::ranks]\n",
            "5 blocks, 8 heads, rank 0 of 2: answer[0, 1]: expected 1, got 2",
        ),
        # heads that do not divide
        (
            SCALE + "    n = scale.shape[1] // ranks\n    return scale[:, rank * n : (rank + 1) * n]\n",
            "8 heads, 3 ranks: expected a ValueError, got [4, 2]",
        ),
    ],
    "10.2": [
        # tokens dealt out instead of pages
        (
            PLACE + "    return position % ranks, position // ranks // page, position // ranks % page\n",
            "position 1, blocks of 4, 2 ranks: answer[0]: expected 0, got 1",
        ),
        # the column of the table that all ranks share
        (
            PLACE
            + "    column, page_offset = divmod(position, page)\n    return column % ranks, column, page_offset\n",
            "position 4, blocks of 4, 2 ranks: answer[1]: expected 0, got 1",
        ),
        # a contiguous part for each rank
        (
            PLACE
            + "    column, page_offset = divmod(position, page)\n"
            + "    return column // ranks, column % ranks, page_offset\n",
            "position 4, blocks of 4, 2 ranks: answer[0]: expected 1, got 0",
        ),
    ],
    "10.3": [
        # the mean
        (
            MERGE + "    return outs.mean(0), torch.cat([lses, sinks[None]]).logsumexp(0)\n",
            "out, one rank: answer[0, 0]",
        ),
        # every rank brings the sink
        (
            MERGE
            + "    lses = torch.logaddexp(lses, sinks.expand_as(lses))\n"
            + "    lse = lses.logsumexp(0)\n"
            + "    return ((lses - lse).exp()[..., None] * outs).sum(0), lse\n",
            "out, one rank: answer[0, 0]",
        ),
        # no sink
        (
            MERGE + "    lse = lses.logsumexp(0)\n    return ((lses - lse).exp()[..., None] * outs).sum(0), lse\n",
            "out, one rank: answer[0, 0]",
        ),
        # exp as it stands
        (
            MERGE
            + "    weights = lses.exp()\n"
            + "    total = weights.sum(0) + sinks.exp()\n"
            + "    return (weights[..., None] * outs).sum(0) / total[..., None], total.log()\n",
            "out, two ranks, lse 200 and 199: answer[0, 0]",
        ),
        # 0 times NaN is NaN
        (
            MERGE
            + "    lse = torch.cat([lses, sinks[None]]).logsumexp(0)\n"
            + "    return ((lses - lse).exp()[..., None] * outs).sum(0), lse\n",
            "out, three ranks, rank 1 without keys: answer[0, 0]: expected",
        ),
        # a NaN that was seen becomes 0
        (
            MERGE
            + "    lse = torch.cat([lses, sinks[None]]).logsumexp(0)\n"
            + "    return ((lses - lse).exp()[..., None] * outs.nan_to_num()).sum(0), lse\n",
            "out, two ranks, rank 0 saw a NaN: answer[0, 0]: expected nan",
        ),
        (
            MERGE
            + "    lse = torch.cat([lses, sinks[None]]).logsumexp(0)\n"
            + "    weights = (lses - lse).exp()[..., None]\n"
            + "    return torch.where(weights > 0, weights * outs, 0).sum(0), lse\n",
            "out, two ranks, rank 1 saw a NaN, and its lse is NaN: answer[0, 0]: expected nan",
        ),
        # the sink in the log-sum-exp alone
        (
            MERGE
            + "    lse = lses.logsumexp(0)\n"
            + "    outs = torch.where(lses[..., None] == -math.inf, 0, outs)\n"
            + "    out = ((lses - lse).exp()[..., None] * outs).sum(0)\n"
            + "    return out, torch.logaddexp(lse, sinks)\n",
            "out, one rank: answer[0, 0]",
        ),
    ],
    "10.4": [
        # its own state, too
        (
            BYTES + "    return ranks * rows * heads * (dim * itemsize + 4)\n",
            "1 new tokens, 64 heads of 64, 2 bytes each, 2 ranks: expected 8448, got 16896",
        ),
        # the output alone
        (
            BYTES + "    return (ranks - 1) * rows * heads * dim * itemsize\n",
            "1 new tokens, 64 heads of 64, 2 bytes each, 2 ranks: expected 8448, got 8192",
        ),
        # the log-sum-exp in the output's dtype
        (
            BYTES + "    return (ranks - 1) * rows * heads * (dim + 1) * itemsize\n",
            "1 new tokens, 64 heads of 64, 2 bytes each, 2 ranks: expected 8448, got 8320",
        ),
        # all that crosses the wire
        (
            BYTES + "    return ranks * (ranks - 1) * rows * heads * (dim * itemsize + 4)\n",
            "1 new tokens, 64 heads of 64, 2 bytes each, 2 ranks: expected 8448, got 16896",
        ),
    ],
}
