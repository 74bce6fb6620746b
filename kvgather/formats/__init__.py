"""What the bytes of a paged KV cache mean: layouts, scales, FP8 codes."""
