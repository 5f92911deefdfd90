// displace, project, extrapolate and saliency on CUDA.
#include <string>

#include "walk.cuh"

namespace fastlur {
namespace {

using torch::stable::accelerator::DeviceGuard;

struct Displace {
  static constexpr int LISTS = 3, READS = 0b110, WRITES = 0b001, MASK = -1, FLOATS = 0, SUMS = 0;
  const double *alpha, *norm2;

  template <class W>
  struct Scalars {
    W step;
    __device__ explicit Scalars(const Displace& op) : step(W(step_length(op.alpha, op.norm2))) {}
    __device__ bool go() const { return true; }
    __device__ bool reads(int) const { return true; }
    __device__ __forceinline__ void apply(W (&v)[LISTS], const bool*, W*) const {
      v[0] = step != 0 ? v[1] - v[2] * step : v[1];
    }
  };
};

void displace(const Tensors& out, const Tensors& theta, const Tensors& d, const Tensor& alpha,
              const std::optional<Tensor>& norm2) {
  const Displace op{numbers(alpha, "alpha", 1, alpha), numbers(norm2, "norm2", alpha)};
  const auto rows = rows_of(alpha, {{"out", out, List::WRITTEN}, {"theta", theta}, {"d", d}},
                            {{"alpha", op.alpha}, {"norm2", op.norm2}});
  const DeviceGuard guard(alpha.get_device_index());
  launch(rows, op, current_stream(alpha));
}

template <bool BOTH>
struct Project {
  static constexpr int LISTS = 2, READS = 0b11, WRITES = BOTH ? 0b11 : 0b10, MASK = -1, FLOATS = 0, SUMS = 0;
  const double* dots;
  int kind;

  template <class W>
  struct Scalars {
    W s, t;
    __device__ explicit Scalars(const Project& op) {
      const Factors by = projection(op.dots, op.kind);
      s = W(by.s);
      t = W(by.t);
    }
    __device__ bool go() const { return s != 0 || t != 0; }  // no conflict: nothing to read either
    __device__ bool reads(int) const { return true; }
    __device__ __forceinline__ void apply(W (&v)[LISTS], const bool*, W*) const {
      const W left = v[0], right = v[1];
      if (BOTH && s != 0) v[0] = left + right * s;
      if (t != 0) v[1] = right + left * t;
    }
  };
};

void project(const Tensors& a, const Tensors& b, const Tensor& dots, const std::string& kind) {
  STD_TORCH_CHECK(kind == "one_sided" || kind == "symmetric" || kind == "scissorhands", "kind='", kind,
                  "' is no projection; use 'one_sided', 'symmetric' or 'scissorhands'");
  const double* d = numbers(dots, "dots", 3, dots);
  const auto rows = rows_of(dots, {{"a", a, kind == "symmetric" ? List::WRITTEN : List::READ}, {"b", b, List::WRITTEN}},
                            {{"dots", d, 3}});
  const DeviceGuard guard(dots.get_device_index());
  if (kind == "symmetric")
    launch(rows, Project<true>{d, SYMMETRIC}, current_stream(dots));
  else
    launch(rows, Project<false>{d, kind == "one_sided" ? ONE_SIDED : SCISSORHANDS}, current_stream(dots));
}

struct Extrapolate {
  static constexpr int LISTS = 3, READS = 0b111, WRITES = 0b001, MASK = -1, FLOATS = 0, SUMS = 0;
  const double *alpha, *eta;

  template <class W>
  struct Scalars {
    W ahead, alpha, eta, rest;
    bool replace;
    __device__ explicit Scalars(const Extrapolate& op)
        : ahead(W(1 + *op.alpha)), alpha(W(*op.alpha)), eta(W(*op.eta)), rest(W(1 - *op.eta)), replace(*op.eta == 1) {}
    __device__ bool go() const { return true; }
    __device__ bool reads(int list) const { return list != 0 || !replace; }
    __device__ __forceinline__ void apply(W (&v)[LISTS], const bool*, W*) const {
      const W away = v[1] * ahead - v[2] * alpha;
      v[0] = replace ? away : away * eta + v[0] * rest;
    }
  };
};

void extrapolate(const Tensors& theta, const Tensors& theta0, const Tensors& memorised, const Tensor& alpha,
                 const Tensor& eta) {
  const Extrapolate op{numbers(alpha, "alpha", 1, alpha), numbers(eta, "eta", 1, alpha)};
  const auto rows = rows_of(alpha, {{"theta", theta, List::WRITTEN}, {"theta0", theta0}, {"memorised", memorised}},
                            {{"alpha", op.alpha}, {"eta", op.eta}});
  const DeviceGuard guard(alpha.get_device_index());
  launch(rows, op, current_stream(alpha));
}

struct Saliency {
  static constexpr int LISTS = 3, READS = 0b110, WRITES = 0b001, MASK = -1, FLOATS = 0, SUMS = 0;

  template <class W>
  struct Scalars {
    __device__ explicit Scalars(const Saliency&) {}
    __device__ bool go() const { return true; }
    __device__ bool reads(int) const { return true; }
    __device__ __forceinline__ void apply(W (&v)[LISTS], const bool* has, W*) const {
      const W x = has[2] ? v[1] * v[2] : v[1];
      v[0] = std::abs(x);
    }
  };
};

void saliency(const Tensors& out, const Tensors& grad, const MaybeTensors& theta) {
  const auto rows = rows_of(home_of(out, "out"), {{"out", out, List::WRITTEN}, {"grad", grad}, {"theta", theta}});
  const DeviceGuard guard(out.front().get_device_index());
  launch(rows, Saliency{}, current_stream(out.front()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlur_ext, CUDA, m) {
  m.impl("displace", TORCH_BOX(&displace));
  m.impl("project", TORCH_BOX(&project));
  m.impl("extrapolate", TORCH_BOX(&extrapolate));
  m.impl("saliency", TORCH_BOX(&saliency));
}

}  // namespace fastlur
