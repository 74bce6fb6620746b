"""Plausible wrong answers of chapter 06, and what the check must say to each."""

FLAG = "def honest_flag(k_scale, v_scale, num_blocks, num_heads, page_size):\n"
SHAPES = (
    FLAG
    + """    flags = []
    for scale in (k_scale, v_scale):
        if scale.numel() == 1:
            flags.append(False)
        elif scale.shape == (num_blocks, num_heads, page_size) and ({per_token}):
            flags.append(True)
        else:
            raise ValueError("neither")
    if flags[0] != flags[1]:
        raise ValueError("mixed")
    return flags[0]
"""
)
STRIDES = "def strides_of(scale, num_blocks, num_heads, page_size):\n"

WRONG = {
    "06.1": [
        # the shipped fix without its refusal
        (
            FLAG + "    return not (k_scale.numel() == 1 and v_scale.numel() == 1)\n",
            "K [1] and V [6, 2, 16]: expected a ValueError, got True",
        ),
        # the shipped fix: per-head still passes as per token
        (
            FLAG
            + "    if (k_scale.numel() == 1) != (v_scale.numel() == 1):\n"
            + "        raise ValueError('mixed')\n"
            + "    return k_scale.numel() > 1\n",
            "K [2] and V [2]: expected a ValueError, got True",
        ),
        # enough elements instead of the right shape
        (
            FLAG
            + "    sizes = {k_scale.numel(), v_scale.numel()}\n"
            + "    if sizes == {1}:\n"
            + "        return False\n"
            + "    if sizes == {num_blocks * num_heads * page_size}:\n"
            + "        return True\n"
            + "    raise ValueError('neither')\n",
            "K [16, 2, 6] and V [16, 2, 6]: expected a ValueError, got True",
        ),
        # only K is looked at
        (
            FLAG
            + "    if k_scale.numel() == 1:\n"
            + "        return False\n"
            + "    if k_scale.shape == (num_blocks, num_heads, page_size):\n"
            + "        return True\n"
            + "    raise ValueError('neither')\n",
            "K [1] and V [6, 2, 16]: expected a ValueError, got False",
        ),
        # shapes only: one expanded number is read as 192
        (SHAPES.format(per_token="True"), "one number, expanded: expected False or a ValueError, got True"),
        # a storage that is large enough, whatever the strides
        (
            SHAPES.format(per_token="scale.untyped_storage().nbytes() >= 4 * scale.numel()"),
            "K and V [6, 2, 16], a transposed view: expected a ValueError, got True",
        ),
        # the shape of K is checked, of V only the number of elements and the strides
        (
            FLAG
            + "    count = num_blocks * num_heads * page_size\n"
            + "    if k_scale.numel() == 1 and v_scale.numel() == 1:\n"
            + "        return False\n"
            + "    if k_scale.shape == (num_blocks, num_heads, page_size) and v_scale.numel() == count:\n"
            + "        if k_scale.is_contiguous() and v_scale.is_contiguous():\n"
            + "            return True\n"
            + "    raise ValueError('neither')\n",
            "K [6, 2, 16] and V [16, 2, 6]: expected a ValueError, got True",
        ),
        # one element in either decides, unless the other is per token
        (
            SHAPES.format(per_token="scale.is_contiguous()").replace(
                "    flags = []\n",
                "    sizes = {k_scale.numel(), v_scale.numel()}\n"
                "    if 1 in sizes and num_blocks * num_heads * page_size not in sizes:\n"
                "        return False\n"
                "    flags = []\n",
            ),
            "K [1] and V [2]: expected a ValueError, got False",
        ),
        # one element only when its shape is [1]
        (
            SHAPES.format(per_token="scale.is_contiguous()").replace("scale.numel() == 1", "scale.shape == (1,)"),
            "K [1] and V [1, 1, 1]: expected False, got ValueError: neither",
        ),
        # the strides of K are checked, those of V are not
        (
            SHAPES.format(per_token="scale is v_scale or scale.is_contiguous()"),
            "K and V [6, 2, 16], one number, expanded: expected False or a ValueError, got True",
        ),
    ],
    "06.2": [
        # the strides of a contiguous [blocks, heads, page], whatever came: the bug
        (
            STRIDES + "    return num_heads * page_size, page_size, 1\n",
            "a scale of one element, [1]: answer[0]: expected 0, got 32",
        ),
        # right shapes, contiguous strides assumed
        (
            STRIDES
            + "    known = {(num_heads,): (0, 1, 0), (num_blocks, num_heads): (num_heads, 1, 0)}\n"
            + "    known[num_blocks, num_heads, page_size] = (num_heads * page_size, page_size, 1)\n"
            + "    if scale.numel() == 1:\n"
            + "        return 0, 0, 0\n"
            + "    if tuple(scale.shape) not in known:\n"
            + "        raise ValueError('unknown')\n"
            + "    return known[tuple(scale.shape)]\n",
            "a scale of [2], every third of a longer tensor: answer[1]: expected 3, got 1",
        ),
        # the rank decides, and the sizes are not looked at
        (
            STRIDES
            + "    if scale.numel() == 1:\n"
            + "        return 0, 0, 0\n"
            + "    if scale.ndim == 1:\n"
            + "        return 0, scale.stride(0), 0\n"
            + "    return (*scale.stride(), 0)[:3]\n",
            "a scale of shape [7]: expected a ValueError, got (0, 1, 0)",
        ),
        # with two and three axes, only the number of blocks is compared
        (
            STRIDES
            + "    if scale.numel() == 1:\n"
            + "        return 0, 0, 0\n"
            + "    if scale.shape == (num_heads,):\n"
            + "        return 0, scale.stride(0), 0\n"
            + "    if scale.ndim == 2 and scale.shape[0] == num_blocks:\n"
            + "        return *scale.stride(), 0\n"
            + "    if scale.ndim == 3 and scale.shape[0] == num_blocks:\n"
            + "        return scale.stride()\n"
            + "    raise ValueError('none of the kinds')\n",
            "a scale of shape [6, 2, 1]: expected a ValueError, got (2, 1, 1)",
        ),
        # one element only when it has one axis
        (
            STRIDES
            + "    if scale.shape == (1,):\n"
            + "        return 0, 0, 0\n"
            + "    if scale.shape == (num_heads,):\n"
            + "        return 0, scale.stride(0), 0\n"
            + "    raise ValueError('none of the kinds')\n",
            "a scale of one element, []: expected (0, 0, 0), got ValueError: none of the kinds",
        ),
        # one element only when its shape is [1]
        (
            STRIDES
            + "    if scale.shape == (1,):\n"
            + "        return 0, 0, 0\n"
            + "    if scale.shape == (num_heads,):\n"
            + "        return 0, scale.stride(0), 0\n"
            + "    if scale.shape == (num_blocks, num_heads):\n"
            + "        return *scale.stride(), 0\n"
            + "    return scale.stride()\n",
            "a scale of one element, []",
        ),
    ],
    "06.3": [
        ("escaping_scale = (2,)\n", "(2,) has 1 axes: the rule refuses it"),
        ("escaping_scale = (6, 2, 16)\n", "(6, 2, 16) passes the rule, but the kernel read nothing outside"),
        ("escaping_scale = (1, 1, 1)\n", "(1, 1, 1) has one element: the rule returns False"),
        ("escaping_scale = (16, 2, 6)\n", "(16, 2, 6) passes the rule, but the kernel read nothing outside"),
        # wrong numbers, but inside
        ("escaping_scale = torch.ones(6, 16, 2).transpose(1, 2)\n", "with strides (32, 1, 2) passes the rule, but"),
        ("escaping_scale = torch.tensor([0.5]).expand(6, 2)\n", "(6, 2) with strides (0, 0) has 2 axes"),
        ("escaping_scale = torch.ones(1, 2, 1).double()\n", "dtype torch.float64; use torch.float32"),
        ("escaping_scale = 192\n", "expected a tensor or a tuple of positive ints, got 192"),
    ],
}
