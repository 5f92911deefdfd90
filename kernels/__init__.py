"""Triton kernels, one family of operations a file; each launcher takes what its twin in `fastlur.reference` takes."""

if __name__ == "kernels":
    raise ImportError("these kernels are fastlur.kernels; `kernels` is another project's name, import fastlur instead")
