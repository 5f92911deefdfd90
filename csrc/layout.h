// Places in the vectors of hyper-parameters and control; fastlur/reference.py says what stands there.
// A test asserts that both files agree.
#pragma once

namespace fastlur {

enum Hyper { LR, MOMENTUM, BETA2, EPS, WEIGHT_DECAY, L1, PROX, CLIP, HYPER };
enum Control { OK, COUNT, SCALE, CONTROL };

}  // namespace fastlur
