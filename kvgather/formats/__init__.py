"""Data formats of a paged KV cache: layouts, scales, FP8 codes."""
