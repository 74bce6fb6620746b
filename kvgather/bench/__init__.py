"""Benchmarks: what `kvgather bench` times, the limits it compares with, and the rows it writes."""
