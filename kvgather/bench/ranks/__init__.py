"""What `kvgather bench parallel` needs on every rank: the group, the pools, timing in step, and rows."""
