// Registers the native ops under a namespace that is unique per build (TORCH_EXTENSION_NAME).
#include "torch_binding.h"

#include <torch/csrc/stable/library.h>

#include "python_module.h"

// One more macro level (kernel-builder's registration.h has one for the libraries that are not stable-ABI), so that
// TORCH_EXTENSION_NAME is expanded before it is stringified.
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
  ops.def("mag_norm_scale(Tensor magnitude, Tensor norm) -> Tensor");
  ops.def("dropout(Tensor x, Tensor seed, float p, Tensor(a!) out, bool accumulate=False, bool scaled=True) -> ()");
  ops.def(
      "dora_scales(Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor[] magnitudes, "
      "float[] scalings, Tensor[] scales, int[] quantized) -> (Tensor[], Tensor[])");
  ops.def(
      "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
      "Tensor? offset, int blocksize, int nested_blocksize, bool fp4, int first, Tensor(a!) out) "
      "-> ()");
  ops.def(
      "gemm(Tensor[] a, Tensor[] b, bool b_rows_are_n, Tensor(a!) out, Tensor? bias=None, "
      "Tensor? mag_norm_scale=None, Tensor(b!)? unscaled=None, bool accumulate=False, Tensor? seed=None, float p=0.0, "
      "int leading=0, "
      "float leading_scale=1.0) -> ()");
  ops.def(
      "gemm_group(Tensor[] x, Tensor[] other, Tensor(a!)[] t, float[] scalings, Tensor[] a, Tensor[] b, int[] "
      "segments, "
      "int[] made, bool b_rows_are_n, Tensor(b!)[] out, Tensor?[] bias, Tensor(c!)? zeros=None) -> ()");
  ops.def("gemm_is_faster(Tensor like, int rows, int cols) -> bool");
  ops.def(
      "skinny(Tensor[] x, Tensor[] other, Tensor(a!)[] out, float scaling, bool by_columns, bool sm90, "
      "Tensor? seed=None, float p=0.0, int bf16x3=0) -> ()");
  ops.def(
      "dt_db(Tensor[] dy, Tensor[] b, Tensor[] t, Tensor(a!)[] dt, Tensor(b!)[] db, float scaling, "
      "bool bf16x3=False, float db_scaling=1.0) -> ()");
  // `operands` are those of GroupArgs (kernel-src/group/members.h).
  ops.def(
      "lora_forward(Tensor x, Tensor?[] operands, float[] scalings, Tensor? seeds, float[]? dropouts, int[]? "
      "quantized, "
      "bool bf16x3) -> Tensor[]");
  ops.def(
      "lora_backward(Tensor?[] dys, Tensor x, Tensor t, Tensor[]? unscaled, Tensor?[] operands, float[] scalings, "
      "Tensor? seeds, float[]? dropouts, int[]? quantized, bool bf16x3, bool need_dx, int[] needs) -> Tensor[]");
  ops.def(
      "gated_forward(Tensor x, Tensor?[] operands, float[] scalings, Tensor? seeds, float[]? dropouts, int[]? "
      "quantized, "
      "bool bf16x3, int activation, int gate_half, bool up_to_h) -> Tensor[]");
  ops.def(
      "gated_backward(Tensor dy, Tensor x, Tensor[] kept, Tensor?[] operands, float[] scalings, Tensor? seeds, "
      "float[]? dropouts, int[]? quantized, bool bf16x3, int activation, int gate_half, bool need_dx, int[] needs) "
      "-> Tensor[]");
  ops.def(
      "column_norm(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, Tensor? magnitude=None) -> Tensor[]");
  ops.def(
      "embedding_forward(Tensor ids, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? mag_norm_scale, "
      "Tensor? scale, float scaling, float number, bool keep) -> (Tensor, Tensor)");
  ops.def(
      "embedding_backward(Tensor dy, Tensor ids, Tensor? rows, Tensor weight, Tensor lora_a, "
      "Tensor lora_b, Tensor? magnitude, Tensor? mag_norm_scale, Tensor? norm, Tensor? scale, float scaling, "
      "float number, int padding, bool need_a, bool need_b, bool need_m) -> Tensor[]");
}

bool gemm_is_faster_cpu(const torch::stable::Tensor&, int64_t, int64_t) { return false; }

OPS_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("names", TORCH_BOX(&names));
  ops.impl("architecture", TORCH_BOX(&architecture));
  ops.impl("set_architecture", TORCH_BOX(&set_architecture));
}

OPS_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("row_norm", TORCH_BOX(&row_norm));
  ops.impl("mag_norm_scale", TORCH_BOX(&mag_norm_scale));
  ops.impl("dropout", TORCH_BOX(&dropout));
  ops.impl("dora_scales", TORCH_BOX(&dora_scales));
  ops.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit));
  ops.impl("gemm_is_faster", TORCH_BOX(&gemm_is_faster_cpu));
  ops.impl("lora_forward", TORCH_BOX(&lora_forward));
  ops.impl("lora_backward", TORCH_BOX(&lora_backward));
  ops.impl("gated_forward", TORCH_BOX(&gated_forward));
  ops.impl("gated_backward", TORCH_BOX(&gated_backward));
}

#if defined(CUDA_KERNEL)
OPS_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("row_norm", TORCH_BOX(&row_norm));
  ops.impl("mag_norm_scale", TORCH_BOX(&mag_norm_scale));
  ops.impl("dropout", TORCH_BOX(&dropout));
  ops.impl("dora_scales", TORCH_BOX(&dora_scales));
  ops.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit));
  ops.impl("gemm", TORCH_BOX(&gemm_cuda));
  ops.impl("gemm_group", TORCH_BOX(&gemm_group_cuda));
  ops.impl("gemm_is_faster", TORCH_BOX(&gemm_is_faster_cuda));
  ops.impl("skinny", TORCH_BOX(&skinny_cuda));
  ops.impl("dt_db", TORCH_BOX(&dt_db_cuda));
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
