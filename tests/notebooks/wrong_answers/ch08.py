"""Plausible wrong answers of chapter 08, and what the check must say to each."""

MASK = "def visible(len_q, len_k, window=None):\n"
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
