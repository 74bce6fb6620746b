"""A tokenizer for models with random weights: one token for each character, and lossless for any token."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
"""Characters with a token of their own; any other becomes a question mark."""


def character_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose text has as many tokens as characters.

    Other tokens of a model's vocabulary are written as their number, such as ⟨500⟩: different tokens always have
    different texts, so that answers of a server can be compared as texts.

    Args:
        vocab_size: tokens of the model, at least one for each of `CHARACTERS`.

    Raises:
        ValueError: the vocabulary is too small.
    """
    if vocab_size < len(CHARACTERS):
        raise ValueError(f"vocab_size is {vocab_size}; accepted: at least {len(CHARACTERS)}")
    tokens = [*CHARACTERS, *(f"⟨{i}⟩" for i in range(len(CHARACTERS), vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
