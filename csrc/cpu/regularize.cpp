// regularize on the CPU: gradient and value of the penalties in one pass.
#include "numbers.h"
#include "plan.h"

namespace fastlur {
namespace {

constexpr int64_t SHORT = 256;  // elements summed in the wide type before double takes over

enum Pull { NONE, PLAIN, FISHER };

template <class T, Pull PULL>
FASTLUR_CLONES void regularize_span(T* grad, const T* theta, const T* theta0, const T* fisher, int64_t n,
                                    Penalty<Wide<T>> penalty, double* out) {
  using W = Wide<T>;
  double squares = 0, sizes = 0, pulls = 0;
  for (int64_t from = 0; from < n; from += SHORT) {
    const int64_t to = from + SHORT < n ? from + SHORT : n;
    W square = 0, size = 0, pulled = 0;
#pragma omp simd reduction(+ : square, size, pulled)
    for (int64_t i = from; i < to; ++i) {
      const W weight = load(theta + i);
      W gradient = penalty.norms(weight);
      square += weight * weight;
      size += weight < 0 ? -weight : weight;
      if constexpr (PULL != NONE) {
        const W away = weight - load(theta0 + i);
        W pull = away;
        if constexpr (PULL == FISHER) pull = away * load(fisher + i);
        gradient = gradient + penalty.pull(pull);
        pulled += pull * away;
      }
      store(grad + i, load(grad + i) + gradient);
    }
    squares += square;
    sizes += size;
    pulls += pulled;
  }
  out[0] = squares;
  out[1] = sizes;
  out[2] = pulls;
}

Tensor regularize(const Tensors& grad, const Tensors& theta, const MaybeTensors& theta0, const MaybeTensors& fisher,
                  const Tensor& hyper) {
  const double* h = numbers(hyper, "hyper", HYPER, hyper);
  const auto rows = rows_of(hyper, {{"grad", grad, List::WRITTEN}, {"theta", theta}, {"theta0", theta0}, {"fisher", fisher}});
  const Plan plan(rows);
  std::vector<double> partial(3 * plan.spans().size());
  Tensor value = new_numbers({}, hyper);  // all that may fail comes before the first write
  plan.run([&](int64_t index, const Span& span) {
    const Row& row = rows[span.row];
    typed(row.dtype, [&](auto zero) {
      using T = decltype(zero);
      const auto run = row.at[2] == nullptr ? regularize_span<T, NONE>
                       : row.at[3] == nullptr ? regularize_span<T, PLAIN>
                                              : regularize_span<T, FISHER>;
      run(part<T>(row, 0, span.start), part<const T>(row, 1, span.start), part<const T>(row, 2, span.start),
          part<const T>(row, 3, span.start), span.count, Penalty<Wide<T>>(h, true), &partial[3 * index]);
    });
  });
  double sums[3] = {0, 0, 0};
  for (size_t i = 0; i < partial.size(); ++i) sums[i % 3] += partial[i];
  *static_cast<double*>(value.mutable_data_ptr()) = penalty_value(h, sums);
  return value;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlur_ext, CPU, m) { m.impl("regularize", TORCH_BOX(&regularize)); }

}  // namespace fastlur
