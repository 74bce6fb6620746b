"""The write: quantize new tokens and scatter them into the slots of a paged cache."""

from .write import SlotError, check_duplicates, check_slots, scatter

__all__ = ["SlotError", "check_duplicates", "check_slots", "scatter"]
