"""Language models: what is made of text, how likely a model finds it, and what makes it forget."""

from fastlur.llm.collapse import Collapse, unlikeness
from fastlur.llm.core import Core, core
from fastlur.llm.forgetting import DPO, IDK, NPO, ReferenceKL, SimNPO
from fastlur.llm.likelihood import Likelihood, causal_cross_entropy, likelihood
from fastlur.llm.preferred import refusals, with_preferred
from fastlur.llm.reference import ReferenceLogProbs, reference_log_probs
from fastlur.llm.representation import RMU
from fastlur.llm.text import Encoded, encode

__all__ = [
    "DPO",
    "IDK",
    "NPO",
    "RMU",
    "Collapse",
    "Core",
    "Encoded",
    "Likelihood",
    "ReferenceKL",
    "ReferenceLogProbs",
    "SimNPO",
    "causal_cross_entropy",
    "core",
    "encode",
    "likelihood",
    "reference_log_probs",
    "refusals",
    "unlikeness",
    "with_preferred",
]
