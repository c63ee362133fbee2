// Registers the native ops under a namespace that is unique per build (TORCH_EXTENSION_NAME).
#include "torch_binding.h"

#include <torch/csrc/stable/library.h>

#include "../kernel-src/common/names.h"
#include "python_module.h"

// One more macro level, so that TORCH_EXTENSION_NAME is expanded before it is stringified.
#define OPS_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define OPS_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

OPS_LIBRARY(TORCH_EXTENSION_NAME, ops) {
  ops.def("names(str kind) -> str");
  // Whose kernels run on like's device: "cpu", "sm80" for every GPU but Hopper, "sm90" (kernel-src/dispatch/).
  ops.def("architecture(Tensor like) -> str");
  // From now on all GPUs of the process run this architecture's kernels, "" for their own: for tests and benchmarks, so
  // that a Hopper runs what another GPU does. An error names what is possible.
  ops.def("set_architecture(str name) -> ()");
  ops.def("row_norm(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling) -> Tensor");
  ops.def("gain(Tensor magnitude, Tensor norm) -> Tensor");
  ops.def("dropout(Tensor x, Tensor seed, float p, Tensor(a!) out, bool accumulate=False, bool scaled=True) -> ()");
  ops.def(
      "dora_gains(Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor[] magnitudes, "
      "float[] scalings, Tensor[] scales, int[] quantized) -> (Tensor[], Tensor[])");
  ops.def(
      "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
      "Tensor? offset, int blocksize, int nested_blocksize, bool fp4, int first, Tensor(a!) out) "
      "-> ()");
  ops.def(
      "gemm(Tensor[] a, Tensor[] b, bool b_rows_are_n, Tensor(a!) out, Tensor? bias=None, "
      "Tensor? gain=None, Tensor(b!)? z=None, bool accumulate=False, Tensor? seed=None, float p=0.0, int leading=0, "
      "float leading_scale=1.0) -> ()");
  ops.def("gemm_pays(Tensor like, int rows, int cols) -> bool");
  ops.def(
      "skinny(Tensor[] x, Tensor[] other, Tensor(a!)[] out, float scaling, bool across, bool hopper, "
      "Tensor? seed=None, float p=0.0, int exact=0) -> ()");
  ops.def(
      "dy_products(Tensor[] dy, Tensor[] b, Tensor[] t, Tensor(a!)[] dt, Tensor(b!)[] db, float scaling, "
      "bool exact=False, float db_scaling=1.0) -> ()");
  ops.def(
      "lora_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] lora_a, "
      "Tensor?[] lora_b, Tensor?[] gains, Tensor?[] magnitudes, float[] scalings, Tensor? seeds, float[] dropouts, "
      "Tensor[] scales, int[] quantized, bool exact) "
      "-> (Tensor[], Tensor[], Tensor, Tensor[], Tensor[])");
  ops.def(
      "lora_backward(Tensor?[] dys, Tensor x, Tensor t, Tensor[] us, Tensor[] weights, "
      "Tensor?[] biases, Tensor?[] lora_a, Tensor?[] lora_b, Tensor?[] gains, Tensor?[] norms, "
      "float[] scalings, Tensor? seeds, float[] dropouts, Tensor[] scales, int[] quantized, bool exact, "
      "bool need_dx, int[] needs) "
      "-> (Tensor[], Tensor[])");
  ops.def(
      "gated_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] lora_a, "
      "Tensor?[] lora_b, Tensor?[] gains, Tensor?[] magnitudes, float[] scalings, Tensor? seeds, float[] dropouts, "
      "Tensor[] scales, int[] quantized, bool exact, int activation, int gate_half, "
      "bool up_to_h) -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])");
  ops.def(
      "gated_backward(Tensor dy, Tensor x, Tensor[] outputs, Tensor[] us, Tensor[] ts, "
      "Tensor[] weights, Tensor?[] biases, Tensor?[] lora_a, Tensor?[] lora_b, Tensor?[] gains, "
      "Tensor?[] norms, float[] scalings, Tensor? seeds, float[] dropouts, Tensor[] scales, "
      "int[] quantized, bool exact, int activation, int gate_half, bool need_dx, int[] needs) -> (Tensor[], Tensor[])");
  ops.def(
      "column_norm(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, Tensor? magnitude=None) -> Tensor[]");
  ops.def(
      "embedding_forward(Tensor ids, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? gain, "
      "Tensor? scale, float scaling, float number, bool keep) -> (Tensor, Tensor)");
  ops.def(
      "embedding_backward(Tensor dy, Tensor ids, Tensor? rows, Tensor weight, Tensor lora_a, "
      "Tensor lora_b, Tensor? magnitude, Tensor? gain, Tensor? norm, Tensor? scale, float scaling, "
      "float number, int padding, bool need_a, bool need_b, bool need_m) -> Tensor[]");
}

bool gemm_is_faster_cpu(const torch::stable::Tensor&, int64_t, int64_t) { return false; }

std::string names(std::string kind) { return lora_fused::names_of(kind); }

OPS_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("names", TORCH_BOX(&names));
  ops.impl("architecture", TORCH_BOX(&architecture));
  ops.impl("set_architecture", TORCH_BOX(&set_architecture));
}

OPS_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("row_norm", TORCH_BOX(&row_norm_cpu));
  ops.impl("gain", TORCH_BOX(&mag_norm_scale_cpu));
  ops.impl("dropout", TORCH_BOX(&dropout_cpu));
  ops.impl("dora_gains", TORCH_BOX(&dora_scales));
  ops.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit_cpu));
  ops.impl("gemm_pays", TORCH_BOX(&gemm_is_faster_cpu));
  ops.impl("lora_forward", TORCH_BOX(&lora_forward));
  ops.impl("lora_backward", TORCH_BOX(&lora_backward));
  ops.impl("gated_forward", TORCH_BOX(&gated_forward));
  ops.impl("gated_backward", TORCH_BOX(&gated_backward));
}

#if defined(CUDA_KERNEL)
OPS_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("row_norm", TORCH_BOX(&row_norm_cuda));
  ops.impl("gain", TORCH_BOX(&mag_norm_scale_cuda));
  ops.impl("dropout", TORCH_BOX(&dropout_cuda));
  ops.impl("dora_gains", TORCH_BOX(&dora_scales));
  ops.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit_cuda));
  ops.impl("gemm", TORCH_BOX(&gemm_cuda));
  ops.impl("gemm_pays", TORCH_BOX(&gemm_is_faster_cuda));
  ops.impl("skinny", TORCH_BOX(&skinny_cuda));
  ops.impl("dy_products", TORCH_BOX(&dt_db_cuda));
  ops.impl("lora_forward", TORCH_BOX(&lora_forward));
  ops.impl("lora_backward", TORCH_BOX(&lora_backward));
  ops.impl("gated_forward", TORCH_BOX(&gated_forward));
  ops.impl("gated_backward", TORCH_BOX(&gated_backward));
  ops.impl("column_norm", TORCH_BOX(&column_norm_cuda));
  ops.impl("embedding_forward", TORCH_BOX(&embedding_forward_cuda));
  ops.impl("embedding_backward", TORCH_BOX(&embedding_backward_cuda));
}
#endif

LORA_FUSED_PYTHON_MODULE(TORCH_EXTENSION_NAME)
