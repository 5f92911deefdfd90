"""What a network answers about known texts, kept instead of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlur.data import Feed
from fastlur.losses import IGNORED, following, logits_and_targets
from fastlur.task import CAUSAL, known
from fastlur.texts import check_known, find, keys_of, told_by_tokens

ROOM = 0.5  # of the network's, that its answers may take


@dataclass(frozen=True, eq=False)
class Answers:
    """Logits of known items, at the places whose next token counts.

    Args:
        keys: of the items (`fastlur.texts.keys_of`), int64, ascending, shape (items,).
        begins: the first row of each, int64, shape (items,).
        sizes: how many rows each has, int64, shape (items,).
        logits: one row a token that counts, shape (rows, words).
    """

    keys: Tensor
    begins: Tensor
    sizes: Tensor
    logits: Tensor

    def of(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits for every place of a batch, shape (items · tokens, words), and whether all items are known, shape ().

        A place whose next token does not count has some row.

        Raises:
            DataError: an item is not known; on a GPU, which is not waited for, only the flag tells.
        """
        rows, counts, found = self.places(batch)
        check_known(found, "target")
        return self.logits[torch.where(counts, rows, 0).flatten()], found.all()

    def places(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The row of each place, which places have one, both of shape (items, tokens), and which items are known."""
        wanted, counts = keys_of(batch), following(batch["labels"]) != IGNORED
        place, found = find(self.keys, wanted)
        found = found & (self.sizes[place] == counts.sum(1))
        rows = self.begins[place][:, None] + counts.cumsum(1) - 1
        return rows, counts & found[:, None], found


def kept(feed: Feed, network: nn.Module, ask: Any) -> Answers | None:
    """Ask a network once about all forget items; None where it is better kept itself.

    That is where the items are more or other than text, where answers would take more than half of the network's room,
    and where items cannot be told again, since one pass over the data does not show them all or shows others each time.

    Args:
        feed: of the run.
        network: it, in eval mode.
        ask: what runs it.
    """
    if known(network) != CAUSAL or feed.misses("forget") is not None:
        return None
    seen: list[tuple[Tensor, Tensor]] = []
    for batch in feed.batches("forget", draw="answers"):
        if not told_by_tokens(batch):
            return None
        seen.append((keys_of(batch), (following(batch["labels"]) != IGNORED).sum(1)))
    keys, sizes = (torch.cat(each) for each in zip(*seen, strict=True))
    ascending, order = keys.sort(stable=True)
    empty = Answers(ascending, (sizes.cumsum(0) - sizes)[order], sizes[order], keys.new_empty(0, 0))
    logits = _asked(feed, network, ask, empty)
    return None if logits is None else replace(empty, logits=logits)


def _asked(feed: Feed, network: nn.Module, ask: Any, items: Answers) -> Tensor | None:
    """What it says of these items; None: too much, or others came when they were read again."""
    total, room = int(items.sizes.sum()), ROOM * sum(parameter.nbytes for parameter in network.parameters())
    logits: Tensor | None = None
    read = 0
    with torch.no_grad():
        for batch in feed.batches("forget", draw="answers again"):
            rows, counts, found = items.places(batch)
            read += len(found)
            if not bool(found.all()):
                return None
            said, targets = logits_and_targets(ask, batch)
            said = said[targets != IGNORED]
            if logits is None:
                if not total or total * said.shape[1] * said.itemsize > room:
                    return None
                logits = said.new_zeros(total, said.shape[1])
            logits[rows[counts]] = said
    return logits if read == len(items.keys) else None
