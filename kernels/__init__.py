"""Triton kernels, one family of operations a file; each launcher takes what its twin in `fastlur.reference` takes."""

if __name__ == "kernels":
    raise ImportError("these kernels are fastlur.kernels; `kernels` is another project's name, import fastlur instead")

from .control import step_control
from .displace import displace
from .dot import grad_dot
from .extrapolate import extrapolate
from .project import project
from .regularize import regularize
from .saliency import saliency
from .update import meta_update

__all__ = [
    "displace",
    "extrapolate",
    "grad_dot",
    "meta_update",
    "project",
    "regularize",
    "saliency",
    "step_control",
]
