"""Language models: what is made of text, and how likely a model finds it."""

from fastlur.llm.likelihood import Likelihood, causal_cross_entropy, likelihood
from fastlur.llm.text import Encoded, encode

__all__ = ["Encoded", "Likelihood", "causal_cross_entropy", "encode", "likelihood"]
