"""The keys under which a block pool publishes full blocks: hash chains over the tokens of a prefix."""

from __future__ import annotations

from collections.abc import Hashable


class BlockKey:
    """Content of a full block: its tokens, its extra key, and through its parent every earlier token.

    The hash covers the parent's hash and is computed once. Equality does not rely on hashes: it compares tokens from
    the last block back to the first one, or to the first key object that both chains share. Chains of one pool usually
    share the parent, so that one comparison suffices.

    Args:
        parent: the key of the preceding block; None for the first block.
        token_ids: the tokens of the block.
        extra_key: other inputs of K and V, such as an adapter id.
    """

    __slots__ = ("extra_key", "hash", "parent", "token_ids")

    def __init__(self, parent: BlockKey | None, token_ids: tuple[int, ...], extra_key: Hashable) -> None:
        self.parent = parent
        self.token_ids = token_ids
        self.extra_key = extra_key
        self.hash: int = chain_hash(None if parent is None else parent.hash, token_ids, extra_key)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockKey):
            return NotImplemented
        left: BlockKey | None = self
        right: BlockKey | None = other
        while left is not right:
            if left is None or right is None or left.hash != right.hash:
                return False
            if left.token_ids != right.token_ids or left.extra_key != right.extra_key:
                return False
            left, right = left.parent, right.parent
        return True


def chain_hash(parent_hash: int | None, token_ids: tuple[int, ...], extra_key: Hashable) -> int:
    """Hash of a full block and of every block before it."""
    return hash((parent_hash, token_ids, extra_key))
