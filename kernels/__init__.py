"""Triton kernels, one family of operations a file; each launcher takes what its twin in `fastlur.reference` takes.

An operation is one launch a dtype, however many tensors; a sum is one more for all dtypes. The vector work of a step,
from the displacement over dots and decision to the update, is so five launches, and three more for a second dtype.
"""

if __name__ == "kernels":
    # from the repository's root the folder is found under another project's name, by libraries that look whether that
    # is installed: they may find it without a version, and whoever wants something of it is told

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("these kernels are fastlur.kernels; `kernels` is another project's, import fastlur instead")

else:
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
