"""Contents of a batch: lengths, offsets and the block table, checked once, and the state that layers share."""
