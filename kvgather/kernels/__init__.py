"""What every Triton kernel shares: numbers, addresses, launches."""
