// regularize and meta_update on CUDA.
#include "sums.cuh"

namespace fastlur {
namespace {

using torch::stable::accelerator::DeviceGuard;

struct Regularize {
  static constexpr int LISTS = 4, READS = 0b1111, WRITES = 0b0001, MASK = -1, FLOATS = 0, SUMS = 3;
  const double* hyper;

  template <class W>
  struct Scalars {
    Penalty<W> penalty;
    __device__ explicit Scalars(const Regularize& op) : penalty(op.hyper, true) {}
    __device__ bool go() const { return true; }
    __device__ bool reads(int) const { return true; }
    __device__ __forceinline__ void apply(W (&v)[LISTS], const bool* has, W* sums) const {
      W gradient = penalty.norms(v[1]);
      sums[0] += present(penalty.l2, v[1] * v[1]);
      sums[1] += present(penalty.l1, W(std::abs(v[1])));
      if (has[2]) {
        const W away = v[1] - v[2], pull = has[3] ? away * v[3] : away;
        gradient = gradient + penalty.pull(pull);
        sums[2] += present(penalty.prox, W(pull * away));
      }
      v[0] = v[0] + gradient;
    }
  };
};

Tensor regularize(const Tensors& grad, const Tensors& theta, const MaybeTensors& theta0, const MaybeTensors& fisher,
                  const Tensor& hyper) {
  const double* h = numbers(hyper, "hyper", HYPER, hyper);
  const auto rows =
      rows_of(hyper, {{"grad", grad, List::WRITTEN}, {"theta", theta}, {"theta0", theta0}, {"fisher", fisher}},
              {{"hyper", h, HYPER}});
  const DeviceGuard guard(hyper.get_device_index());
  const cudaStream_t stream = current_stream(hyper);
  Tensor partial = new_numbers({first_tiles(rows).back(), SUMS}, hyper);
  Tensor each = new_numbers({int64_t(rows.size()), SUMS}, hyper), value = new_numbers({}, hyper);
  auto* p = static_cast<double*>(partial.mutable_data_ptr());
  launch(rows, Regularize{h}, stream, p);
  finish(rows, p, static_cast<double*>(each.mutable_data_ptr()), h, static_cast<double*>(value.mutable_data_ptr()),
         stream);
  return value;
}

enum Column { THETA, A, U, MOMENT1, MOMENT2, THETA0, FISHER, MASKED };

template <bool ADAMW, bool WIDE_MOMENTS>
struct Update {
  static constexpr int LISTS = 8, MASK = MASKED, SUMS = 0;
  static constexpr int FLOATS = WIDE_MOMENTS ? 1 << MOMENT1 | 1 << MOMENT2 : 0;
  static constexpr int WRITES = 1 << THETA | 1 << MOMENT1 | (ADAMW ? 1 << MOMENT2 : 0);
  static constexpr int READS = WRITES | 1 << A | 1 << U | 1 << THETA0 | 1 << FISHER;
  const double *control, *hyper;

  template <class W>
  struct Scalars {
    Rule<W> rule;
    Penalty<W> penalty;
    bool ok;
    __device__ explicit Scalars(const Update& op)
        : rule(op.hyper, op.control), penalty(op.hyper, !ADAMW), ok(op.control[OK] > 0) {}
    __device__ bool go() const { return ok; }
    __device__ bool reads(int) const { return true; }
    __device__ __forceinline__ void apply(W (&v)[LISTS], const bool* has, W*) const {
      W g = (has[U] ? v[A] + v[U] : v[A]) * rule.scale;
      W gradient = penalty.norms(v[THETA]);
      if (has[THETA0]) {
        const W away = v[THETA] - v[THETA0];
        gradient = gradient + penalty.pull(has[FISHER] ? away * v[FISHER] : away);
      }
      g = g + gradient;
      if constexpr (ADAMW)
        rule.adamw(g, v[THETA], v[MOMENT1], v[MOMENT2]);
      else
        rule.sgd(g, v[THETA], v[MOMENT1]);
    }
  };
};

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
  const DeviceGuard guard(hyper.get_device_index());
  const cudaStream_t stream = current_stream(hyper);
  if (moment2) {
    launch(rows, Update<true, false>{c, h}, stream);
    launch(rows, Update<true, true>{c, h}, stream);
  } else {
    launch(rows, Update<false, false>{c, h}, stream);
    launch(rows, Update<false, true>{c, h}, stream);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlur_ext, CUDA, m) {
  m.impl("regularize", TORCH_BOX(&regularize));
  m.impl("meta_update", TORCH_BOX(&meta_update));
}

}  // namespace fastlur
