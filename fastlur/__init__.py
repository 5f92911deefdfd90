"""Make a trained PyTorch model forget some data and keep the rest: `unlearn(model, forget, retain)`."""

from fastlur import audit, methods, record, stopping, targets
from fastlur._version import __version__
from fastlur.api import unlearn
from fastlur.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    FastlurError,
    ModelError,
    NonFiniteError,
    RecordError,
)
from fastlur.estimate import Estimate, estimate
from fastlur.evaluate import Evaluation, evaluate
from fastlur.info import info
from fastlur.likelihood import likelihood_ratio_attack
from fastlur.meta import meta_gradient
from fastlur.meta_step import MetaStep
from fastlur.methods.lur import LUR
from fastlur.purge import purge
from fastlur.result import Result
from fastlur.verify import verify

__all__ = [
    "LUR",
    "ArgumentError",
    "CheckpointError",
    "DataError",
    "Estimate",
    "Evaluation",
    "FastlurError",
    "MetaStep",
    "ModelError",
    "NonFiniteError",
    "RecordError",
    "Result",
    "__version__",
    "audit",
    "estimate",
    "evaluate",
    "info",
    "likelihood_ratio_attack",
    "meta_gradient",
    "methods",
    "purge",
    "record",
    "stopping",
    "targets",
    "unlearn",
    "verify",
]
