"""Builds the optional compiled extension; everything else about the package stands in pyproject.toml.

FASTLUR_EXT=1 makes a build that fails fatal, 0 skips it; unset, it is tried and its failure leaves one warning line.
Where only the CUDA part fails, the CPU part is built alone, with a warning line too.
FASTLUR_SANITIZE=1 builds the CPU part under the address and undefined-behaviour sanitizers.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as plain_build_ext

WISH = os.environ.get("FASTLUR_EXT", "")
TARGET = "0x020A000000000000ULL"  # torch 2.10: the binary serves it and every later one
ARCHES = "8.0;9.0"  # when neither TORCH_CUDA_ARCH_LIST nor a device says otherwise

try:
    if WISH == "0":
        raise ImportError("FASTLUR_EXT=0")
    from torch.utils import cpp_extension
except Exception as error:  # build isolation hides torch: then there is nothing to build against
    if WISH == "1":
        raise SystemExit(f"FASTLUR_EXT=1, but torch cannot be imported: {error}") from error
    cpp_extension = None


def give_up(error: BaseException, what: str = "its compiled extension") -> None:
    """One line in place of what could not be built; to be called while the error is handled."""
    if WISH == "1":
        raise error
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    print(f"warning: fastlur is installed without {what}: {reason}", file=sys.stderr)


def with_cuda() -> bool:
    """Whether this torch has CUDA and there is a compiler for it."""
    import torch

    home = cpp_extension.CUDA_HOME
    return torch.version.cuda is not None and home is not None and (Path(home) / "bin" / "nvcc").exists()


def extension(cuda: bool) -> Extension:
    """The extension as torch's build helpers describe it."""
    import torch

    sanitize = os.environ.get("FASTLUR_SANITIZE") == "1"
    cuda = cuda and not sanitize
    if cuda and not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHES
    defines = [f"-DTORCH_TARGET_VERSION={TARGET}"]
    # no contraction to fused multiply-add: the CPU kernels then round where plain torch does
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-fopenmp-simd", "-ffp-contract=off"]
    cxx += ["-fno-math-errno", "-fno-trapping-math"]
    # messages tell the place in the source: as it stands in the repository, not where this machine keeps it
    roots = {Path(__file__).resolve().parent: ".", **{Path(path): "torch" for path in cpp_extension.include_paths()}}
    places = [f"-fmacro-prefix-map={root}/={name}/" for root, name in roots.items()]
    link = []
    if sanitize:
        link = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        cxx = [*link, "-fno-omit-frame-pointer", "-O1", "-g", "-fvisibility=hidden", "-fopenmp-simd"]
        # the functions that choose a copy would run before the sanitizer is ready
        cxx.append("-DFASTLUR_ONE_CLONE")
    sources = sorted(str(path) for path in [Path("csrc/library.cpp"), *Path("csrc/cpu").glob("*.cpp")])
    flags = {"cxx": [*defines, *cxx, *places]}
    make = cpp_extension.CppExtension
    if cuda:
        make = cpp_extension.CUDAExtension
        sources += sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
        flags["cxx"].append("-DUSE_CUDA")
        flags["nvcc"] = [*defines, "-DUSE_CUDA", "-O3", "--fmad=false", *(f"-Xcompiler={place}" for place in places)]
    depends = [str(path) for path in Path("csrc").rglob("*.*h")]
    return make(
        "fastlur._native",
        sources,
        depends=depends,
        extra_compile_args=flags,
        extra_link_args=link,
        py_limited_api=True,
    )


class build_ext(plain_build_ext if cpp_extension is None else cpp_extension.BuildExtension):
    """Goes on without the extension when it cannot be built: setuptools' own `optional` misses torch's errors."""

    def run(self) -> None:
        """Build, and let a failure pass unless FASTLUR_EXT=1: that of CUDA first, then that of the rest."""
        before = vars(self).copy()  # a build that fails leaves its own compiler and folders behind
        try:
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if not any(source.endswith(".cu") for each in self.extensions for source in each.sources):
                    raise
                give_up(error, "the CUDA part of its extension")
                vars(self).update(before)
                for each in self.extensions:  # changed, not replaced: setuptools has notes of its own on them
                    vars(each).update(vars(extension(cuda=False)))
                super().run()
        except (Exception, SystemExit) as error:
            give_up(error)
            self.extensions = []

    def get_outputs(self) -> list[str]:
        """Only what is there: an extension that was not built is not installed."""
        return [path for path in super().get_outputs() if Path(path).exists()]


def extensions() -> list[Extension]:
    """The extension, or nothing where it was not asked for or cannot be had."""
    if cpp_extension is None or platform.system() == "Windows":
        return []
    for cuda in (True, False) if with_cuda() else (False,):
        try:
            return [extension(cuda)]
        except Exception as error:
            give_up(error, "the CUDA part of its extension" if cuda else "its compiled extension")
    return []


setup(ext_modules=extensions(), cmdclass={"build_ext": build_ext})
