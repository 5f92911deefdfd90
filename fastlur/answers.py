"""What a network answers about known texts, kept instead of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlur.data import Feed
from fastlur.errors import DataError
from fastlur.losses import IGNORED, following, logits_and_targets
from fastlur.task import CAUSAL, known
from fastlur.texts import keys_of


@dataclass(frozen=True, eq=False)
class Answers:
    """Logits of known items, at the places whose next token counts.

    Args:
        keys: of the items (`fastlur.texts.keys_of`), int64, ascending, shape (items,).
        begins: the first row of each, int64, shape (items,).
        logits: one row a token that counts, shape (rows, words).
    """

    keys: Tensor
    begins: Tensor
    logits: Tensor

    def of(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits for every place of a batch, shape (items · tokens, words), and whether all items are known, shape ().

        A place whose next token does not count has some row.

        Raises:
            DataError: an item is not known; on a GPU, which is not waited for, only the flag tells.
        """
        wanted, counts = keys_of(batch), following(batch["labels"]) != IGNORED
        place = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        found = self.keys[place] == wanted
        if found.device.type == "cpu" and not bool(found.all()):
            raise DataError(
                f"forget: items {(~found).nonzero().flatten().tolist()} of a batch were not seen when the target was "
                "made; items must be the same each time they are read, without random changes"
            )
        rows = torch.where(counts & found[:, None], self.begins[place][:, None] + counts.cumsum(1) - 1, 0)
        return self.logits[rows.flatten()], found.all()


def kept(feed: Feed, network: nn.Module, ask: Any) -> Answers | None:
    """Ask a network once about all forget items; None where it is better kept itself.

    That is where the items are no text, where answers would take more room than the network, and where items cannot be
    told again, since one pass over the data does not show them all or shows others each time.

    Args:
        feed: of the run.
        network: it, in eval mode.
        ask: what runs it.
    """
    if known(network) != CAUSAL or feed.misses("forget") is not None:
        return None
    room = sum(parameter.nbytes for parameter in network.parameters())
    keys, rows, logits = [], [], []
    with torch.no_grad():
        for batch in feed.batches("forget", draw="answers"):
            labels = batch.get("labels") if isinstance(batch, Mapping) else None
            tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
            if not isinstance(labels, Tensor) or not isinstance(tokens, Tensor) or tokens.shape != labels.shape:
                return None
            said, targets = logits_and_targets(ask, batch)
            keys.append(keys_of(batch))
            rows.append((following(labels) != IGNORED).sum(1))
            logits.append(said[targets != IGNORED])
            room -= logits[-1].nbytes
            if room < 0:
                return None
    found = torch.cat(keys)
    again = torch.cat([keys_of(batch) for batch in feed.batches("forget", draw="answers again")])
    if not torch.equal(found.sort()[0], again.sort()[0]):
        return None
    each, (ascending, order) = torch.cat(rows), found.sort(stable=True)
    return Answers(ascending, (each.cumsum(0) - each)[order], torch.cat(logits))
