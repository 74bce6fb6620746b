"""Attention from FP8 pages with the instructions of Hopper (compute capability 9.0); `attention.direct` launches it."""
