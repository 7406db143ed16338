"""Block tables: what a sequence holds of the KV cache, and what it shares there."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from quantd.daemon.kv.cache import KvCache, Match
from quantd.daemon.kv.namespace import Namespace
from quantd.daemon.kv.tree import KEY_BYTES
from quantd.daemon.scheduler.sequence import Sequence, blocks_for
from quantd.daemon.types import BLOCK_TOKENS, Rebind


class BlockTables:
    """The only hand that changes `Sequence.blocks`, `root` and `node`.

    A full block whose tokens are known goes into the tree as soon as a plan computes it, so another
    sequence may use it in the same plan: the worker writes a layer's keys and values of the whole
    batch before any attention reads them. A block that holds a token which is not known yet, or is
    only partly filled, belongs to its sequence alone.
    """

    def __init__(self, kv: KvCache, revision: str, share: bool = True, whole: bool = False) -> None:
        """share: False keeps every sequence's blocks to itself. whole: a prompt is computed from
        its beginning, and takes over nothing, not what was its own before it was preempted."""
        self.kv = kv
        self._namespace = Namespace(revision=revision)
        self._share = share and not whole
        self._whole = whole
        self._rebinds: list[tuple[Sequence, int, Rebind]] = []

    def enter(self, seq: Sequence) -> None:
        """A sequence is taken in: where its blocks belong, and how many are there already."""
        salt = seq.request.cache_salt
        alone = 0 if self._share else seq.id + 1
        seq.namespace = (
            msgspec.structs.replace(self._namespace, salt=salt, alone=alone)
            if salt or alone
            else self._namespace
        )
        self.look(seq)

    def look(self, seq: Sequence) -> None:
        """How much of it is known, for whoever ranks by the work that is left."""
        seq.num_known_blocks = self.match(seq).num_blocks

    def match(self, seq: Sequence) -> Match:
        """What of its known tokens can be taken over."""
        if not self._takes_over(seq):
            return Match(None, 0, 0, 0)
        assert seq.namespace is not None
        return self.kv.match(seq.namespace, seq.key, len(seq.tokens) // BLOCK_TOKENS)

    def _takes_over(self, seq: Sequence) -> bool:
        """Log-probabilities of the prompt need every position computed too."""
        return not self._whole and seq.request.sampling.prompt_logprobs is None

    def start(self, seq: Sequence, match: Match) -> None:
        """It gets what was matched, but for the last token, which must be computed to go on."""
        assert seq.namespace is not None and not seq.blocks
        seq.root, node, seq.blocks = self.kv.start(seq.namespace, match)
        seq.num_scheduled_tokens = len(seq.blocks) * BLOCK_TOKENS
        seq.node = node
        if seq.num_scheduled_tokens == len(seq.tokens):
            # The last block would be written to, by the one token that is computed: into a copy.
            copy = self.kv.copy_on_write(node)
            seq.blocks.pop()
            self.kv.give_back(node)
            assert node.parent is not None
            if copy is not None:
                seq.node = node.parent
                seq.blocks.append(copy)
                seq.num_scheduled_tokens = len(seq.tokens) - 1
            else:
                seq.node = self.kv.retreat(node.parent, seq.blocks)
                seq.num_scheduled_tokens = len(seq.blocks) * BLOCK_TOKENS
        seq.num_computed_tokens = seq.num_scheduled_tokens
        if self.kv.pool.num_trimmed:
            seq.num_trimmed = sum(map(self.kv.pool.is_trimmed, seq.blocks))
        self._count_cached(seq, seq.num_scheduled_tokens)

    def adopt(self, seq: Sequence) -> None:
        """Take over what others have computed since, or compute in this plan."""
        if seq.num_scheduled_tokens + BLOCK_TOKENS >= len(seq.tokens) or not self._takes_over(seq):
            return
        assert seq.node is not None
        while seq.num_scheduled_tokens + BLOCK_TOKENS < len(seq.tokens):
            if seq.node.depth * BLOCK_TOKENS != seq.num_scheduled_tokens:
                break
            start = seq.node.depth * KEY_BYTES
            node = self.kv.adopt_next(seq.node, bytes(seq.key[start : start + KEY_BYTES]))
            if node is None:
                break
            seq.blocks.append(node.block)
            seq.node = node
            seq.num_scheduled_tokens += BLOCK_TOKENS
            self._count_cached(seq, BLOCK_TOKENS)
        if not seq.num_chunks:
            # Also if it gets no block to go on in this plan: then these can be trimmed for it.
            seq.num_computed_tokens = seq.num_scheduled_tokens

    def next_shared(self, seq: Sequence) -> tuple[int, bytes] | None:
        """The block that it is at, equal for all that could share it; None: it is the last one, or
        has a token that is not known."""
        node = seq.node
        assert node is not None
        if (node.depth + 1) * BLOCK_TOKENS > len(seq.tokens):
            return None
        at = node.depth * KEY_BYTES
        return id(node), bytes(seq.key[at : at + KEY_BYTES])

    def may_wait(self, seq: Sequence) -> bool:
        """Whether `adopt` could take over the block that it is at: it has not begun with it."""
        assert seq.node is not None
        start = seq.num_scheduled_tokens
        return (
            seq.node.depth * BLOCK_TOKENS == start
            and start + BLOCK_TOKENS < len(seq.tokens)
            and self._takes_over(seq)
        )

    def num_missing(self, seq: Sequence) -> int:
        """Blocks' worth of bytes that it needs for its expected tokens beside what it has."""
        held = len(seq.blocks) - self.kv.pool.given_by(seq.num_trimmed)
        return max(0, self.kv.window.cost(blocks_for(seq.num_expected_tokens)) - held)

    def needed(self, seq: Sequence, match: Match) -> int:
        """Blocks that one has to have room for who is to start with this match."""
        return max(0, self.kv.window.cost(blocks_for(len(seq.tokens))) - match.num_used)

    def room(self, running: Iterable[Sequence]) -> int:
        """Blocks that the expected tokens of none of these lay claim to; may be below zero."""
        return self.kv.num_available - sum(map(self.num_missing, running))

    def trim(self, running: Iterable[Sequence], num_blocks: int) -> None:
        """Try to make so many available by what running sequences hold outside of their windows."""
        if not self.kv.window.share or self.kv.num_available >= num_blocks:
            return
        for seq in running:
            outside = self.kv.window.num_outside(seq.num_computed_tokens)
            if seq.num_trimmed >= outside:
                continue
            for block in seq.blocks[:outside]:
                if self.kv.num_available >= num_blocks:
                    return
                seq.num_trimmed += self.kv.trim(block)

    def room_for(self, seq: Sequence) -> int:
        """Tokens that can be scheduled with its own blocks and those that can be had."""
        num_blocks = len(seq.blocks) + max(0, self.kv.num_available)
        return num_blocks * BLOCK_TOKENS - seq.num_scheduled_tokens

    def extend(self, seq: Sequence, stop: int) -> bool:
        """Blocks for the positions up to `stop`, which are then scheduled; False: there are not
        enough, and nothing has changed for the sequence."""
        missing = blocks_for(stop) - len(seq.blocks)
        if missing:
            blocks = self.kv.allocate(missing)
            if blocks is None:
                return False
            seq.blocks += blocks
        seq.num_scheduled_tokens = stop
        assert seq.node is not None
        if stop >= (seq.node.depth + 1) * BLOCK_TOKENS:
            self.publish(seq, merge=False)
        return True

    def publish(self, seq: Sequence, *, merge: bool) -> None:
        """Its full blocks of known tokens become known to the tree.

        Where an equal one is there already the sequence goes over to that one with the next plan
        and gives its own back; without `merge`, while a plan is made that writes to the own one, it
        waits for `commit` to call again.
        """
        assert seq.node is not None
        full = min(seq.num_scheduled_tokens, len(seq.tokens)) // BLOCK_TOKENS
        while (depth := seq.node.depth) < full:
            key = bytes(seq.key[depth * KEY_BYTES : (depth + 1) * KEY_BYTES])
            own = seq.blocks[depth]
            if not merge:
                child = seq.node.child(key)
                if child is not None and child.block >= 0:
                    return
            was_trimmed = self.kv.pool.is_trimmed(own)
            node = self.kv.insert(seq.node, key, own)
            if node is None:
                return
            seq.node = node
            if node.block != own:
                seq.blocks[depth] = node.block
                seq.num_trimmed -= was_trimmed
                self._rebinds.append((seq, seq.stay, Rebind(seq.id, depth, seq.node.block)))

    def release(self, seq: Sequence, *, spoilt: bool = False) -> None:
        """It leaves the batch. `spoilt`: what it computed must not be used by others."""
        assert seq.root is not None and seq.node is not None
        node, root = seq.node, seq.root
        self.kv.release(root, node, seq.blocks, "" if spoilt else seq.request.mark)
        if spoilt:
            self.kv.discard(node)
        seq.blocks = []
        seq.root = seq.node = None
        seq.num_computed_tokens = seq.num_scheduled_tokens = 0
        seq.num_pending = seq.num_chunks = seq.num_told_blocks = seq.num_trimmed = 0
        seq.stay += 1

    def leave(self, seq: Sequence) -> None:
        """It has ended. What nobody else may use is forgotten."""
        assert seq.namespace is not None and seq.root is None
        if not self._share:
            self.kv.drop(self.kv.tree.root(seq.namespace))

    def take_rebinds(self) -> tuple[Rebind, ...]:
        rebinds, self._rebinds = self._rebinds, []
        return tuple(rebind for seq, stay, rebind in rebinds if seq.on_worker and seq.stay == stay)

    def _count_cached(self, seq: Sequence, num_tokens: int) -> None:
        if seq.num_preemptions == 0 and seq.first_token_at is None:
            seq.num_cached_tokens += num_tokens

    def check(self, running: Iterable[Sequence]) -> None:
        """Blocks are owned by running sequences alone, and what they share the tree knows."""
        self.kv.check()
        owners: dict[int, int] = {}
        for seq in running:
            assert seq.root is not None and seq.node is not None
            path = seq.node.path()
            assert seq.blocks[: len(path)] == [node.block for node in path]
            assert b"".join(node.key for node in path) == seq.key[: len(path) * KEY_BYTES]
            assert len(seq.blocks) == blocks_for(seq.num_scheduled_tokens)
            for block in seq.blocks:
                owners[block] = owners.get(block, 0) + 1
            assert seq.num_trimmed == sum(map(self.kv.pool.is_trimmed, seq.blocks))
            for block in seq.blocks[len(path) :]:
                assert owners[block] == 1 and not self.kv.pool.is_held(block), "not its own"
        assert len(owners) == self.kv.pool.num_used, "a block is used by no sequence"
        assert all(self.kv.pool.num_owners(block) == n for block, n in owners.items())
