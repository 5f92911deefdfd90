// meta_update on the CPU: combine, clip, regularise, mask and step, each operand read from memory once.
//
// The optional operands would make two dozen variants of one loop. Instead a tile of gradients stays in the first-level
// cache, and short loops, each with one decision taken beforehand, pass over it.
#include "numbers.h"
#include "plan.h"

namespace fastlur {
namespace {

constexpr int64_t TILE = 512;  // elements

enum Column { THETA, A, U, MOMENT1, MOMENT2, THETA0, FISHER, MASK };

// T is the type of the weights, M that of the moments: the same, or float beside half weights.
template <class T, class M>
struct Operands {
  T* theta;
  const T *a, *u;
  M *moment1, *moment2;
  const T *theta0, *fisher;
  const uint8_t* mask;
};

template <class T>
FASTLUR_INLINE void gather(Wide<T>* g, const T* a, const T* u, int64_t n, Wide<T> scale) {
  if (u == nullptr) {
    FASTLUR_SIMD
    for (int64_t i = 0; i < n; ++i) g[i] = load(a + i) * scale;
  } else {
    FASTLUR_SIMD
    for (int64_t i = 0; i < n; ++i) g[i] = (load(a + i) + load(u + i)) * scale;
  }
}

template <class T>
FASTLUR_INLINE void penalise(Wide<T>* g, const T* theta, const T* theta0, const T* fisher, int64_t n,
                             const Penalty<Wide<T>>& by) {
  using W = Wide<T>;
  if (theta0 == nullptr || by.prox == 0) {
    if (by.l2 == 0 && by.l1 == 0) return;
    FASTLUR_SIMD
    for (int64_t i = 0; i < n; ++i) g[i] = g[i] + by.norms(load(theta + i));
  } else if (fisher == nullptr) {
    FASTLUR_SIMD
    for (int64_t i = 0; i < n; ++i) {
      const W weight = load(theta + i);
      g[i] = g[i] + (by.norms(weight) + by.pull(weight - load(theta0 + i)));
    }
  } else {
    FASTLUR_SIMD
    for (int64_t i = 0; i < n; ++i) {
      const W weight = load(theta + i);
      g[i] = g[i] + (by.norms(weight) + by.pull((weight - load(theta0 + i)) * load(fisher + i)));
    }
  }
}

template <class T, class M, bool MASKED>
FASTLUR_INLINE void move(const Wide<T>* g, const Operands<T, M>& at, int64_t start, int64_t n,
                         const Rule<Wide<T>>& rule) {
  using W = Wide<T>;
  T* theta = at.theta + start;
  M *first = at.moment1 + start, *second = at.moment2 == nullptr ? nullptr : at.moment2 + start;
  const uint8_t* mask = MASKED ? at.mask + start : nullptr;
  if (second == nullptr) {
    FASTLUR_SIMD
    for (int64_t i = 0; i < n; ++i) {
      const W weight = load(theta + i), before = load(first + i);
      W moved = weight, moment = before;
      rule.sgd(g[i], moved, moment);
      const bool keep = !MASKED || mask[i] != 0;
      store(theta + i, keep ? moved : weight);
      store(first + i, keep ? moment : before);
    }
  } else {
    FASTLUR_SIMD
    for (int64_t i = 0; i < n; ++i) {
      const W weight = load(theta + i), before1 = load(first + i), before2 = load(second + i);
      W moved = weight, moment1 = before1, moment2 = before2;
      rule.adamw(g[i], moved, moment1, moment2);
      const bool keep = !MASKED || mask[i] != 0;
      store(theta + i, keep ? moved : weight);
      store(first + i, keep ? moment1 : before1);
      store(second + i, keep ? moment2 : before2);
    }
  }
}

template <class T, class M>
FASTLUR_CLONES void update_span(const Operands<T, M>& at, int64_t n, const Rule<Wide<T>>& rule,
                                const Penalty<Wide<T>>& penalty) {
  Wide<T> g[TILE];
  for (int64_t start = 0; start < n; start += TILE) {
    const int64_t count = start + TILE < n ? TILE : n - start;
    const auto from = [start](const T* p) { return p == nullptr ? nullptr : p + start; };
    gather(g, at.a + start, from(at.u), count, rule.scale);
    penalise(g, static_cast<const T*>(at.theta + start), from(at.theta0), from(at.fisher), count, penalty);
    if (at.mask == nullptr)
      move<T, M, false>(g, at, start, count, rule);
    else
      move<T, M, true>(g, at, start, count, rule);
  }
}

template <class T, class M>
void update_row(const Row& row, const Span& span, const Rule<Wide<T>>& rule, const Penalty<Wide<T>>& penalty) {
  const int64_t start = span.start;
  const Operands<T, M> at{part<T>(row, THETA, start),        part<const T>(row, A, start),
                          part<const T>(row, U, start),      part<M>(row, MOMENT1, start),
                          part<M>(row, MOMENT2, start),      part<const T>(row, THETA0, start),
                          part<const T>(row, FISHER, start), part<const uint8_t>(row, MASK, start)};
  update_span(at, span.count, rule, penalty);
}

void meta_update(const Tensors& theta, const Tensors& a, const MaybeTensors& u, const Tensors& moment1,
                 const MaybeTensors& moment2, const MaybeTensors& theta0, const MaybeTensors& fisher,
                 const MaybeTensors& mask, const Tensor& control, const Tensor& hyper) {
  const double *c = numbers(control, "control", CONTROL, hyper), *h = numbers(hyper, "hyper", HYPER, hyper);
  const auto rows = rows_of(hyper,
                            {{"theta", theta, List::WRITTEN},
                             {"a", a},
                             {"u", u},
                             {"moment1", moment1, List::MOMENT},
                             {"moment2", moment2, List::MOMENT},
                             {"theta0", theta0},
                             {"fisher", fisher},
                             {"mask", mask, List::MASK}},
                            {{"control", c, CONTROL}, {"hyper", h, HYPER}});
  if (!(c[OK] > 0)) return;
  // AdamW decays the weights beside the gradient: its penalties have no decay
  Plan(rows).run([&](int64_t, const Span& span) {
    const Row& row = rows[span.row];
    typed(row.dtype, [&](auto zero) {
      using T = decltype(zero);
      if (row.wide_moments)
        update_row<T, Wide<T>>(row, span, Rule<Wide<T>>(h, c), Penalty<Wide<T>>(h, !moment2));
      else
        update_row<T, T>(row, span, Rule<Wide<T>>(h, c), Penalty<Wide<T>>(h, !moment2));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlur_ext, CPU, m) { m.impl("meta_update", TORCH_BOX(&meta_update)); }

}  // namespace fastlur
