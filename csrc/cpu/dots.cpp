// grad_dot and step_control on the CPU.
#include "numbers.h"
#include "plan.h"

namespace fastlur {
namespace {

constexpr int64_t SHORT = 256;  // elements summed in the wide type before double takes over

template <class T>
FASTLUR_CLONES void dot_span(const T* a, const T* b, int64_t n, double* out) {
  using W = Wide<T>;
  double total_ab = 0, total_aa = 0, total_bb = 0;
  for (int64_t from = 0; from < n; from += SHORT) {
    const int64_t to = from + SHORT < n ? from + SHORT : n;
    W ab = 0, aa = 0, bb = 0;
#pragma omp simd reduction(+ : ab, aa, bb)
    for (int64_t i = from; i < to; ++i) {
      const W x = load(a + i), y = load(b + i);
      ab += x * y;
      aa += x * x;
      bb += y * y;
    }
    total_ab += ab;
    total_aa += aa;
    total_bb += bb;
  }
  out[0] = total_ab;
  out[1] = total_aa;
  out[2] = total_bb;
}

std::tuple<Tensor, Tensor> grad_dot(const Tensors& a, const Tensors& b) {
  const auto rows = rows_of(home_of(a, "a"), {{"a", a}, {"b", b}});
  const Plan plan(rows);
  std::vector<double> partial(3 * plan.spans().size());
  plan.run([&](int64_t index, const Span& span) {
    const Row& row = rows[span.row];
    typed(row.dtype, [&](auto zero) {
      using T = decltype(zero);
      dot_span(part<const T>(row, 0, span.start), part<const T>(row, 1, span.start), span.count, &partial[3 * index]);
    });
  });

  Tensor total = new_numbers({3}, a.front()), each = new_numbers({int64_t(rows.size()), 3}, a.front());
  auto* sum = static_cast<double*>(total.mutable_data_ptr());
  auto* by_row = static_cast<double*>(each.mutable_data_ptr());
  std::fill_n(sum, 3, 0.0);
  std::fill_n(by_row, 3 * rows.size(), 0.0);
  for (size_t i = 0; i < plan.spans().size(); ++i)
    for (int k = 0; k < 3; ++k) by_row[3 * plan.spans()[i].row + k] += partial[3 * i + k];
  for (size_t i = 0; i < rows.size(); ++i)
    for (int k = 0; k < 3; ++k) sum[k] += by_row[3 * i + k];
  return {total, each};
}

void step_control(const Tensor& control, const Tensor& dots, const Tensor& losses, const Tensor& hyper) {
  const Decision at = decision_of(control, dots, losses, hyper);
  double sum = 0;
  for (int i = 0; i < 3; ++i) sum += at.dots[i];
  typed(at.losses.dtype, [&](auto zero) {
    const auto* p = static_cast<const decltype(zero)*>(at.losses.at[0]);
    for (int64_t i = 0; i < at.losses.numel; ++i) sum += load(p + i);
  });
  control_step(at.control, at.dots, sum, at.hyper);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlur_ext, CPU, m) {
  m.impl("grad_dot", TORCH_BOX(&grad_dot));
  m.impl("step_control", TORCH_BOX(&step_control));
}

}  // namespace fastlur
