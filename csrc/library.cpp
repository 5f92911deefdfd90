// The schemas: names and order of arguments are those of fastlur/reference.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastlur_ext, m) {
  m.def("grad_dot(Tensor[] a, Tensor[] b) -> (Tensor, Tensor)");
  m.def("displace(Tensor(a!)[] out, Tensor[] theta, Tensor[] d, Tensor alpha, Tensor? norm2) -> ()");
  m.def("step_control(Tensor(a!) control, Tensor dots, Tensor losses, Tensor hyper) -> ()");
  m.def("regularize(Tensor(a!)[] grad, Tensor[] theta, Tensor[]? theta0, Tensor[]? fisher, Tensor hyper) -> Tensor");
  m.def(
      "meta_update(Tensor(a!)[] theta, Tensor[] a, Tensor[]? u, Tensor(b!)[] moment1, Tensor(c!)[]? moment2, "
      "Tensor[]? theta0, Tensor[]? fisher, Tensor[]? mask, Tensor control, Tensor hyper) -> ()");
  m.def("project(Tensor(a!)[] a, Tensor(b!)[] b, Tensor dots, str kind) -> ()");
  m.def("extrapolate(Tensor(a!)[] theta, Tensor[] theta0, Tensor[] memorised, Tensor alpha, Tensor eta) -> ()");
  m.def("saliency(Tensor(a!)[] out, Tensor[] grad, Tensor[]? theta) -> ()");
}
