// How work is cut: into spans whose borders depend on the sizes alone, never on the number of threads. Kernels leave one
// partial result a span; summed in the order of the spans, these give the same bits for any number of threads.
#pragma once

#include <vector>

#include "../lists.h"

namespace fastlur {

constexpr int64_t BLOCK = 1 << 15;  // elements
constexpr int64_t GRAIN = 4;        // units a thread: to wake another for less takes longer than the work

struct Span {
  int64_t row, start, count;
};

class Plan {
 public:
  explicit Plan(const std::vector<Row>& rows) {
    int64_t filled = BLOCK;
    for (size_t i = 0; i < rows.size(); ++i) {
      for (int64_t start = 0; start < rows[i].numel; start += BLOCK) {
        // many tiny tensors share a unit, so that a unit is worth a thread's while and all weigh about the same
        if (filled >= BLOCK) {
          units_.push_back(int64_t(spans_.size()));
          filled = 0;
        }
        spans_.push_back({int64_t(i), start, std::min(BLOCK, rows[i].numel - start)});
        filled += spans_.back().count;
      }
    }
    units_.push_back(int64_t(spans_.size()));
  }

  const std::vector<Span>& spans() const { return spans_; }

  // f(index of the span, span), in parallel; f must not throw.
  template <class F>
  void run(const F& f) const {
    torch::stable::parallel_for(0, int64_t(units_.size()) - 1, GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t i = units_[begin]; i < units_[end]; ++i) f(i, spans_[i]);
    });
  }

 private:
  std::vector<Span> spans_;
  std::vector<int64_t> units_;  // the first span of each unit, and the number of spans
};

}  // namespace fastlur
