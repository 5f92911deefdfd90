"""Attacks on a model that has forgotten: does it come back quickly, and does the change give away what is gone?

Both take models, not runs: whoever holds the weights can make them. docs/audit.md says what they found on digits.
"""

from fastlur.audit.inversion import Inversion, inversion
from fastlur.audit.relearning import Relearning, relearning

__all__ = ["Inversion", "Relearning", "inversion", "relearning"]
