"""Language models: what is made of text, and how likely a model finds it."""

from fastlur.llm.likelihood import Likelihood, causal_cross_entropy, likelihood

__all__ = ["Likelihood", "causal_cross_entropy", "likelihood"]
