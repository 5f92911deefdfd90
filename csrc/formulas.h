// The scalar formulas, each written once for the CPU and the CUDA kernels. `W` is the type computed with: double for
// float64 data, float for all other. Scalars are worked out in double and rounded to W once, as plain torch does.
#pragma once

#include <cmath>
#include <cstdint>

#include "layout.h"

#ifdef __CUDACC__
#define FASTLUR_INLINE __host__ __device__ __forceinline__
#else
#define FASTLUR_INLINE inline __attribute__((always_inline))
#endif

namespace fastlur {

FASTLUR_INLINE double step_length(const double* alpha, const double* norm2) {
  if (norm2 == nullptr) return *alpha;
  return *norm2 > 0 ? *alpha / std::sqrt(*norm2) : 0.0;
}

enum Projection : int { ONE_SIDED, SYMMETRIC, SCISSORHANDS };

struct Factors {
  double s, t;
};

FASTLUR_INLINE Factors projection(const double* dots, int kind) {
  const double ab = dots[0], aa = dots[1], bb = dots[2];
  if (!(ab < 0)) return {0, 0};
  if (kind == SCISSORHANDS) {
    const double t = -ab / (aa + 1e-3);
    return {0, t < 0.5 ? 0.5 : t};
  }
  return {kind == SYMMETRIC && bb > 0 ? -ab / bb : 0, aa > 0 ? -ab / aa : 0};
}

FASTLUR_INLINE void control_step(double* control, const double* dots, double sum, const double* hyper) {
  control[OK] *= sum - sum == 0 ? 1.0 : 0.0;  // 0 when the sum is infinite or NaN
  control[COUNT] += control[OK];
  // ||a + u||^2; rounding may leave it below zero where a and -u nearly cancel
  const double norm2 = dots[1] + 2 * dots[0] + dots[2];
  const double norm = std::sqrt(norm2 < 0 ? 0 : norm2), clip = hyper[CLIP];
  control[SCALE] = clip > 0 && norm > clip ? clip / norm : 1.0;
}

// A term, or 0 where its factor is 0: 0 * inf would be NaN.
template <class W>
FASTLUR_INLINE W present(W factor, W term) {
  return factor != 0 ? term : W(0);
}

template <class W>
struct Penalty {
  W l2, l1, prox;

  FASTLUR_INLINE Penalty(const double* hyper, bool decay)
      : l2(W(decay ? hyper[WEIGHT_DECAY] : 0)), l1(W(hyper[L1])), prox(W(hyper[PROX])) {}

  FASTLUR_INLINE W norms(W theta) const {
    return present(l2, theta * l2) + present(l1, (W(theta > 0) - W(theta < 0)) * l1);
  }
  FASTLUR_INLINE W pull(W away) const { return present(prox, away * prox); }
};

FASTLUR_INLINE double penalty_value(const double* hyper, const double* sums) {
  return present(hyper[WEIGHT_DECAY], 0.5 * hyper[WEIGHT_DECAY] * sums[0]) + present(hyper[L1], hyper[L1] * sums[1]) +
         present(hyper[PROX], 0.5 * hyper[PROX] * sums[2]);
}

// The number of the step that the bias correction is for: 1 before `step_control` has counted any, not 0, which would
// divide by zero.
FASTLUR_INLINE double step_number(const double* control) { return control[COUNT] < 1 ? 1.0 : control[COUNT]; }

// SGD with momentum and AdamW, for one element.
template <class W>
struct Rule {
  W lr, beta1, beta2, eps, fresh1, fresh2, correction1, correction2, shrink, scale;

  FASTLUR_INLINE Rule(const double* hyper, const double* control)
      : lr(W(hyper[LR])),
        beta1(W(hyper[MOMENTUM])),
        beta2(W(hyper[BETA2])),
        eps(W(hyper[EPS])),
        fresh1(W(1 - hyper[MOMENTUM])),
        fresh2(W(1 - hyper[BETA2])),
        correction1(W(1 - std::pow(hyper[MOMENTUM], step_number(control)))),
        correction2(W(1 - std::pow(hyper[BETA2], step_number(control)))),
        shrink(W(1 - hyper[LR] * hyper[WEIGHT_DECAY])),
        scale(W(control[SCALE])) {}

  FASTLUR_INLINE void sgd(W g, W& theta, W& moment) const {
    moment = moment * beta1 + g;
    theta = theta - moment * lr;
  }

  FASTLUR_INLINE void adamw(W g, W& theta, W& moment1, W& moment2) const {
    moment1 = moment1 * beta1 + g * fresh1;
    moment2 = moment2 * beta2 + g * g * fresh2;
    const W away = (moment1 / correction1) / (std::sqrt(moment2 / correction2) + eps);
    theta = theta * shrink - away * lr;
  }
};

}  // namespace fastlur
