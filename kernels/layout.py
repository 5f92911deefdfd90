"""Places in the vectors that the kernels share with `fastlur.reference`; a test holds the two files together."""

import triton.language as tl

# The vector of hyper-parameters.
LR = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
BETA2 = tl.constexpr(2)
EPS = tl.constexpr(3)
WEIGHT_DECAY = tl.constexpr(4)
L1 = tl.constexpr(5)
PROX = tl.constexpr(6)
CLIP = tl.constexpr(7)

# The vector that `step_control` writes and `meta_update` reads.
OK = tl.constexpr(0)
COUNT = tl.constexpr(1)
SCALE = tl.constexpr(2)
