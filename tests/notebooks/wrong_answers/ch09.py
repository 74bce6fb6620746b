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
    ],
    "09.2": [
        # only K is looked at
        (
            FLAG + "    return k_scale.numel() != 1\n",
            "K with 1 and V with 1024 elements, 1024 tokens and heads: expected a ValueError, got False",
        ),
        # one element in either is enough, without a refusal
        (
            FLAG + "    return not (k_scale.numel() == 1 or v_scale.numel() == 1)\n",
            "K with 1 and V with 1024 elements, 1024 tokens and heads: expected a ValueError, got False",
        ),
        # the shipped fix: more than one element is taken for one per token and head
        (
            FLAG
            + "    if (k_scale.numel() == 1) != (v_scale.numel() == 1):\n"
            + "        raise ValueError('K and V disagree')\n"
            + "    return k_scale.numel() != 1\n",
            "K with 2 and V with 2 elements, 1024 tokens and heads: expected a ValueError, got True",
        ),
        # the default, made explicit
        (FLAG + "    return True\n", "K with 1 and V with 1 elements, 1024 tokens and heads: expected False, got True"),
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
