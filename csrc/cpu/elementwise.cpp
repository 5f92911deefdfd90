// displace, project, extrapolate and saliency on the CPU: one read of each operand, one write of each output.
#include <string>

#include "numbers.h"
#include "plan.h"
#include "stream.h"

namespace fastlur {
namespace {

// Walks the rows in parallel; f(zero, row, start, count), `zero` telling the element type.
template <class F>
void walk(const std::vector<Row>& rows, const F& f) {
  Plan(rows).run([&](int64_t, const Span& span) {
    const Row& row = rows[span.row];
    typed(row.dtype, [&](auto zero) { f(zero, row, span.start, span.count); });
  });
}

template <class T>
FASTLUR_CLONES void displace_span(T* out, const T* theta, const T* d, int64_t n, Wide<T> alpha,
                                  bool past_cache) {
  if (alpha == 0)  // by an infinite norm, say: not even an infinity in d reaches the point
    write(out, n, past_cache, [=](int64_t i) FASTLUR_LAMBDA { return load(theta + i); });
  else
    write(out, n, past_cache, [=](int64_t i) FASTLUR_LAMBDA { return load(theta + i) - load(d + i) * alpha; });
}

void displace(const Tensors& out, const Tensors& theta, const Tensors& d, const Tensor& alpha,
              const std::optional<Tensor>& norm2) {
  const double *length = numbers(alpha, "alpha", 1, alpha), *square = numbers(norm2, "norm2", alpha);
  const auto rows = rows_of(alpha, {{"out", out, List::WRITTEN}, {"theta", theta}, {"d", d}},
                            {{"alpha", length}, {"norm2", square}});
  const double step = step_length(length, square);
  const bool past_cache = worth_streaming(rows);
  walk(rows, [=](auto zero, const Row& row, int64_t start, int64_t n) {
    using T = decltype(zero);
    displace_span(part<T>(row, 0, start), part<const T>(row, 1, start), part<const T>(row, 2, start), n, Wide<T>(step),
                  past_cache);
  });
}

template <class T>
FASTLUR_CLONES void project_span(const T* a, T* b, int64_t n, Wide<T> t) {
  if (t == 0) return;  // rounded to nothing: not even an infinity in a reaches b
  FASTLUR_SIMD
  for (int64_t i = 0; i < n; ++i) store(b + i, load(b + i) + load(a + i) * t);
}

template <class T>
FASTLUR_CLONES void project_both_span(T* a, T* b, int64_t n, Wide<T> s, Wide<T> t) {
  FASTLUR_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const Wide<T> left = load(a + i), right = load(b + i);
    store(a + i, s != 0 ? left + right * s : left);
    store(b + i, t != 0 ? right + left * t : right);
  }
}

void project(const Tensors& a, const Tensors& b, const Tensor& dots, const std::string& kind) {
  STD_TORCH_CHECK(kind == "one_sided" || kind == "symmetric" || kind == "scissorhands", "kind='", kind,
                  "' is no projection; use 'one_sided', 'symmetric' or 'scissorhands'");
  const int which = kind == "one_sided" ? ONE_SIDED : kind == "symmetric" ? SYMMETRIC : SCISSORHANDS;
  const double* d = numbers(dots, "dots", 3, dots);
  const auto rows = rows_of(dots, {{"a", a, which == SYMMETRIC ? List::WRITTEN : List::READ}, {"b", b, List::WRITTEN}},
                            {{"dots", d, 3}});
  const Factors by = projection(d, which);
  if (by.s == 0 && by.t == 0) return;  // no conflict: nothing to read either
  walk(rows, [=](auto zero, const Row& row, int64_t start, int64_t n) {
    using T = decltype(zero);
    if (which == SYMMETRIC)
      project_both_span(part<T>(row, 0, start), part<T>(row, 1, start), n, Wide<T>(by.s), Wide<T>(by.t));
    else
      project_span(part<const T>(row, 0, start), part<T>(row, 1, start), n, Wide<T>(by.t));
  });
}

template <class T>
FASTLUR_CLONES void extrapolate_span(T* theta, const T* theta0, const T* memorised, int64_t n, Wide<T> ahead,
                                     Wide<T> alpha, Wide<T> eta, Wide<T> rest, bool replace, bool past_cache) {
  if (replace) {  // the theta given is not read: it may hold anything
    write(theta, n, past_cache,
          [=](int64_t i) FASTLUR_LAMBDA { return load(theta0 + i) * ahead - load(memorised + i) * alpha; });
  } else {
    FASTLUR_SIMD
    for (int64_t i = 0; i < n; ++i) {
      const Wide<T> away = load(theta0 + i) * ahead - load(memorised + i) * alpha;
      store(theta + i, away * eta + load(theta + i) * rest);
    }
  }
}

void extrapolate(const Tensors& theta, const Tensors& theta0, const Tensors& memorised, const Tensor& alpha,
                 const Tensor& eta) {
  const double *ahead = numbers(alpha, "alpha", 1, alpha), *share = numbers(eta, "eta", 1, alpha);
  const double a = *ahead, e = *share;
  const auto rows = rows_of(alpha, {{"theta", theta, List::WRITTEN}, {"theta0", theta0}, {"memorised", memorised}},
                            {{"alpha", ahead}, {"eta", share}});
  const bool past_cache = worth_streaming(rows);
  walk(rows, [=](auto zero, const Row& row, int64_t start, int64_t n) {
    using T = decltype(zero);
    using W = Wide<T>;
    extrapolate_span(part<T>(row, 0, start), part<const T>(row, 1, start), part<const T>(row, 2, start), n, W(1 + a),
                     W(a), W(e), W(1 - e), e == 1, past_cache);
  });
}

template <class T>
FASTLUR_CLONES void saliency_span(T* out, const T* grad, const T* theta, int64_t n, bool past_cache) {
  if (theta == nullptr)
    write(out, n, past_cache, [=](int64_t i) FASTLUR_LAMBDA { return std::abs(load(grad + i)); });
  else
    write(out, n, past_cache, [=](int64_t i) FASTLUR_LAMBDA { return std::abs(load(grad + i) * load(theta + i)); });
}

void saliency(const Tensors& out, const Tensors& grad, const MaybeTensors& theta) {
  const auto rows = rows_of(home_of(out, "out"), {{"out", out, List::WRITTEN}, {"grad", grad}, {"theta", theta}});
  const bool past_cache = worth_streaming(rows);
  walk(rows, [=](auto zero, const Row& row, int64_t start, int64_t n) {
    using T = decltype(zero);
    saliency_span(part<T>(row, 0, start), part<const T>(row, 1, start), part<const T>(row, 2, start), n, past_cache);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlur_ext, CPU, m) {
  m.impl("displace", TORCH_BOX(&displace));
  m.impl("project", TORCH_BOX(&project));
  m.impl("extrapolate", TORCH_BOX(&extrapolate));
  m.impl("saliency", TORCH_BOX(&saliency));
}

}  // namespace fastlur
