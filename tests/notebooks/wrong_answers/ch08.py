"""Plausible wrong answers of chapter 08, and what the check must say to each."""

MASK = "def visible(len_q, len_k, window=None):\n"
MERGE = "def merge(out_a, lse_a, out_b, lse_b):\n"
FINISH = "def finish(parts, sinks):\n"
WINDOW = "def window_gather(lens_q, lens_k, window):\n"

WRONG = {
    "08.1": [
        # aligned to the upper left
        (
            MASK + "    return torch.ones(len_q, len_k).tril().bool()\n",
            "2 new of 5, window None: answer[0, 1]: expected 1, got 0",
        ),
        # a window of w keys and the token itself
        (
            MASK
            + "    position = torch.arange(len_k - len_q, len_k)[:, None]\n"
            + "    key = torch.arange(len_k)\n"
            + "    seen = key <= position\n"
            + "    return seen if window is None else seen & (key >= position - window)\n",
            "3 new of 6, window 1: answer[0, 2]: expected 0, got 1",
        ),
        # the window of the last token for all
        (
            MASK
            + "    position = torch.arange(len_k - len_q, len_k)[:, None]\n"
            + "    key = torch.arange(len_k)\n"
            + "    seen = key <= position\n"
            + "    return seen if window is None else seen & (key >= len_k - window)\n",
            "3 new of 6, window 1: answer[0, 3]: expected 1, got 0",
        ),
        # what may not be seen, as some masks say it
        (
            MASK
            + "    position = torch.arange(len_k - len_q, len_k)[:, None]\n"
            + "    return torch.arange(len_k) > position\n",
            "1 new of 1, window None: answer[0, 0]: expected 1, got 0",
        ),
    ],
    "08.2": [
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
    ],
    "08.3": [
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
    ],
    "08.4": [
        # the window of the last new token
        (
            WINDOW
            + "    starts = [max(0, total - window) for total in lens_k]\n"
            + "    return starts, [total - start for total, start in zip(lens_k, starts)]\n",
            "lengths, new [7] of [23], window 6: answer[0]: expected 12, got 6",
        ),
        # a window of w keys and the token itself
        (
            WINDOW
            + "    starts = [max(0, k - q - window) for q, k in zip(lens_q, lens_k)]\n"
            + "    return starts, [total - start for total, start in zip(lens_k, starts)]\n",
            "lengths, new [7] of [23], window 6: answer[0]: expected 12, got 13",
        ),
        # the sequence may be shorter than the window
        (
            WINDOW
            + "    starts = [k - q - window + 1 for q, k in zip(lens_q, lens_k)]\n"
            + "    return starts, [total - start for total, start in zip(lens_k, starts)]\n",
            "lengths, new [3, 2] of [3, 20], window 10: answer[0]: expected 3, got 12",
        ),
        # where nothing is new
        (
            WINDOW
            + "    starts = [max(0, k - q - window + 1) for q, k in zip(lens_q, lens_k)]\n"
            + "    return starts, [total - start for total, start in zip(lens_k, starts)]\n",
            "lengths, new [0, 2] of [9, 9], window 4: answer[0]: expected 0, got 3",
        ),
    ],
}
