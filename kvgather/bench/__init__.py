"""What is tested and timed: one table of cases, shared by the tests and the benchmarks."""
