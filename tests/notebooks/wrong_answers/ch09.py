"""Plausible wrong answers of chapter 09, and what the check must say to each."""

CALLS = "def calls_gather(new, tokens):\n"
FLAG = "def flag_of(k_scale, v_scale, expected):\n"
FOUND = (
    "def cached_tokens(prompt, earlier, page):\n"
    "    equal = 0\n"
    "    while equal < min(len(prompt), len(earlier)) and prompt[equal] == earlier[equal]:\n"
    "        equal += 1\n"
)

WRONG = {
    "09.1": [
        # every request with cached tokens, decodes included
        (CALLS + "    return tokens > new\n", "a decode, new 1, tokens 45: expected False, got True"),
        # every prefill
        (CALLS + "    return new > 1\n", "a whole prompt, nothing cached, new 44, tokens 44: expected False"),
        # more cached than new
        (CALLS + "    return 1 < new < tokens - new and tokens - new >= 40\n", "of which 32 were found, new 12"),
        # a whole block before the new tokens
        (CALLS + "    return new > 1 and tokens - new >= 16\n", "a second chunk after 5 tokens, new 39, tokens 44"),
        (
            CALLS + "    return new > 1 and (tokens - new) // 16 > 0\n",
            "after 5 tokens, new 39, tokens 44: expected True",
        ),
        # no more new tokens than cached ones
        (
            CALLS + "    return 1 < new <= tokens // 2 and new < tokens\n",
            "after 5 tokens, new 39, tokens 44: expected True",
        ),
        # four tokens before the new ones
        (
            CALLS + "    return new > 1 and tokens - new > 3\n",
            "after 3 tokens, new 7, tokens 10: expected True, got False",
        ),
    ],
    "09.2": [
        # only K is looked at
        (
            FLAG + "    return k_scale.numel() != 1\n",
            "K [1] and V [2], 1024 tokens and heads: expected a ValueError, got False",
        ),
        # one element in either is enough, without a refusal
        (
            FLAG + "    return not (k_scale.numel() == 1 or v_scale.numel() == 1)\n",
            "K [1] and V [2], 1024 tokens and heads: expected a ValueError, got False",
        ),
        # the shipped fix: more than one element is taken for one per token and head
        (
            FLAG
            + "    if (k_scale.numel() == 1) != (v_scale.numel() == 1):\n"
            + "        raise ValueError('K and V disagree')\n"
            + "    return k_scale.numel() != 1\n",
            "K [2] and V [2], 1024 tokens and heads: expected a ValueError, got True",
        ),
        # the default, made explicit
        (FLAG + "    return True\n", "K [1] and V [1], 1024 tokens and heads: expected False, got True"),
        # a mix is refused only when one of the two is per token and head
        (
            FLAG
            + "    sizes = {k_scale.numel(), v_scale.numel()}\n"
            + "    if sizes == {expected}:\n"
            + "        return True\n"
            + "    if 1 in sizes and expected not in sizes:\n"
            + "        return False\n"
            + "    raise ValueError('neither')\n",
            "K [1] and V [2], 1024 tokens and heads: expected a ValueError, got False",
        ),
        # one element only when its shape is [1]
        (
            FLAG
            + "    if k_scale.shape == v_scale.shape == (1,):\n"
            + "        return False\n"
            + "    if k_scale.numel() == v_scale.numel() == expected:\n"
            + "        return True\n"
            + "    raise ValueError('neither')\n",
            "K [1, 1, 1] and V [1], 1024 tokens and heads: expected False, got ValueError: neither",
        ),
    ],
    "09.3": [
        # tokens instead of blocks
        (FOUND + "    return min(equal, len(prompt) - 1)\n", "40 equal tokens, then others, blocks of 16: expected 32"),
        # the whole prompt may be found
        (FOUND + "    return equal // page * page\n", "48 tokens, all equal to the first three blocks, blocks of 16: "),
        # one block too few whenever all tokens are equal
        (
            FOUND + "    whole = equal // page * page\n    return whole - page if equal == len(prompt) else whole\n",
            "the same prompt, blocks of 16: expected 48, got 32",
        ),
    ],
}
