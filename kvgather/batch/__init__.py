"""The contents of a batch: lengths, offsets and block table, checked once; and what its layers share."""
