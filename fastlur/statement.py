"""What a record says that was not done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlur.fingerprints import Fingerprints

ALWAYS = (
    "Only the items passed as forget were meant; near-duplicates of them elsewhere in the training data were not.",
    "Copies made before are untouched: backups, other replicas, models distilled or fine-tuned from the old one.",
    "Whoever holds the weights from before and these can compare them; the difference points at what was forgotten.",
    "The checksums show damage. They are no signature: whoever can write here can write a record that is consistent.",
)


def statement(
    caveat: str, settings: Mapping[str, Any], data: Mapping[str, Fingerprints], metrics: Mapping[str, Any]
) -> list[str]:
    """Sentences, those first that depend on the method and on the run."""
    lines = [caveat] if caveat else []
    missing = [name for name in ("before", "after", "reference") if name not in metrics]
    if missing:
        names = {"before": "before", "after": "after", "reference": "of a retrained model"}
        lines.append(f"Not measured: figures {', '.join(names[name] for name in missing)}.")
    if metrics:
        lines.append("The figures hold for the attacks that were made; a better one may find more.")
    for side, items in data.items():
        if items.left_out:
            lines.append(f"{items.left_out} of {items.items + items.left_out} {side} items were not hashed.")
    total = settings.get("parameters_total", 0)
    still = total - settings.get("parameters_moved", total)
    if still > 0:
        lines.append(f"{still} of {total} parameters were not moved; they hold what they held.")
    if settings.get("checkpoints_kept"):
        lines.append("Checkpoints were kept, and they hold the model from before: `fastlur purge DIR` removes them.")
    return [*lines, *ALWAYS]
