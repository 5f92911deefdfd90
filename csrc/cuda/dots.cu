// grad_dot and step_control on CUDA.
#include "sums.cuh"

namespace fastlur {
namespace {

struct Dots {
  static constexpr int LISTS = 2, READS = 0b11, WRITES = 0, MASK = -1, FLOATS = 0, SUMS = 3;

  template <class W>
  struct Scalars {
    __device__ explicit Scalars(const Dots&) {}
    __device__ bool go() const { return true; }
    __device__ bool reads(int) const { return true; }
    __device__ __forceinline__ void apply(W (&v)[LISTS], const bool*, W* sums) const {
      sums[0] += v[0] * v[1];
      sums[1] += v[0] * v[0];
      sums[2] += v[1] * v[1];
    }
  };
};

std::tuple<Tensor, Tensor> grad_dot(const Tensors& a, const Tensors& b) {
  const auto rows = rows_of(home_of(a, "a"), {{"a", a}, {"b", b}});
  const torch::stable::accelerator::DeviceGuard guard(a.front().get_device_index());
  const cudaStream_t stream = current_stream(a.front());
  Tensor partial = new_numbers({first_tiles(rows).back(), SUMS}, a.front());
  Tensor total = new_numbers({SUMS}, a.front()), each = new_numbers({int64_t(rows.size()), SUMS}, a.front());
  auto* p = static_cast<double*>(partial.mutable_data_ptr());
  launch(rows, Dots{}, stream, p);
  finish(rows, p, static_cast<double*>(each.mutable_data_ptr()), nullptr,
         static_cast<double*>(total.mutable_data_ptr()), stream);
  return {total, each};
}

template <class T>
__global__ void control_kernel(double* control, const double* dots, const T* losses, int64_t n_losses,
                               const double* hyper) {
  // a handful of numbers: one thread reads them sooner than a second launch would begin
  double sum = 0;
  for (int i = 0; i < 3; ++i) sum += dots[i];
  for (int64_t i = 0; i < n_losses; ++i) sum += double(widen(losses[i]));
  control_step(control, dots, sum, hyper);
}

void step_control(const Tensor& control, const Tensor& dots, const Tensor& losses, const Tensor& hyper) {
  const Decision at = decision_of(control, dots, losses, hyper);
  const torch::stable::accelerator::DeviceGuard guard(control.get_device_index());
  const auto with = [&](auto zero, ScalarType dtype) {
    using T = decltype(zero);
    if (at.losses.dtype != dtype) return;
    control_kernel<T><<<1, 1, 0, current_stream(control)>>>(
        at.control, at.dots, static_cast<const T*>(at.losses.at[0]), at.losses.numel, at.hyper);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  with(float{}, ScalarType::Float);
  with(double{}, ScalarType::Double);
  with(__nv_bfloat16{}, ScalarType::BFloat16);
  with(__half{}, ScalarType::Half);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlur_ext, CUDA, m) {
  m.impl("grad_dot", TORCH_BOX(&grad_dot));
  m.impl("step_control", TORCH_BOX(&step_control));
}

}  // namespace fastlur
