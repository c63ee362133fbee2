// Matrix product for Hopper with the LoRA terms inside, see common/gemm.h: what it supports, when it
// is faster, and the launch of gemm.cuh. Tensor maps are made for every call, on the host.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <type_traits>

#include "../../common/gemm.h"
#include "../../dispatch/table.h"
#include "gemm.cuh"
#include "gemm_host.h"
#include "tma_host.h"
#include "../common/stream.h"

namespace {

using namespace lora_fused::sm90;
using lora_fused::Gemm;
using lora_fused::GemmSegment;
using lora_fused::kGemmSegments;
using lora_fused::mask_of;
using lora_fused::MatrixView;
using lora_fused::multiprocessors;
using lora_fused::scale_of;
using lora_fused::SharedMemory;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T, int kBlockN, bool kRowsAreN, LeadingOp kLeading>
void launch(const Gemm& gemm, int count) {
  Arguments<1> args;
  args.tiles_m = tiles(gemm.out.size(0), kBlockM * kCluster);
  args.outputs = 1, args.tiles_n = 0;
  int next_segment = 0;
  add_output<kBlockN, kRowsAreN>(args, 0, gemm, next_segment);
  args.leading_steps = 0;
  for (size_t s = 0; s < gemm.leading; ++s) args.leading_steps += args.steps_of[s];
  args.accumulate = gemm.accumulate;
  args.mask = mask_of(gemm.mask), args.kept = static_cast<float>(gemm.mask ? scale_of(gemm.mask) : gemm.leading_scale);

  const int device = gemm.out.get_device_index();
  const auto kernel = gemm_kernel<T, kBlockN, kRowsAreN, kLeading>;
  constexpr int kBytes = Layout<kBlockN>::bytes;
  static SharedMemory shared_memory;
  shared_memory.allow(kernel, kBytes, device);
  const int blocks = kCluster * std::min(args.tiles_m * args.tiles_n, count / kCluster);
  launch_clusters(kernel, blocks, kCluster, kThreads, kBytes, stream_of(gemm.out), args, gemm.side);
}

template <typename T, bool kRowsAreN, LeadingOp kLeading>
void launch(const Gemm& gemm) {
  const int count = multiprocessors(gemm.out.get_device_index());
  if (lora_fused::dispatch::GemmTiling(gemm.out.size(0), gemm.out.size(1), count).width == 128)
    launch<T, 128, kRowsAreN, kLeading>(gemm, count);
  else
    launch<T, 256, kRowsAreN, kLeading>(gemm, count);
}

// In float16 alone: in bfloat16 no term needs a scale.
template <typename T>
void launch_scaled(const Gemm& gemm) {
  if constexpr (std::is_same_v<T, __half>)
    gemm.b_rows_are_n ? launch<T, true, LeadingOp::kScale>(gemm) : launch<T, false, LeadingOp::kScale>(gemm);
}

template <typename T>
void launch(const Gemm& gemm) {
  if (gemm.mask)
    gemm.b_rows_are_n ? launch<T, true, LeadingOp::kMask>(gemm) : launch<T, false, LeadingOp::kMask>(gemm);
  else if (gemm.leading_scale != 1.0)
    launch_scaled<T>(gemm);
  else if (gemm.leading > 0)
    launch<T, true, LeadingOp::kExcess>(gemm);
  else
    gemm.b_rows_are_n ? launch<T, true, LeadingOp::kNone>(gemm) : launch<T, false, LeadingOp::kNone>(gemm);
}

// A matrix of out's dtype that TMA can copy.
bool fits(const MatrixView& m, const MatrixView& like, int64_t rows, int64_t cols) {
  return m.size(0) == rows && m.size(1) == cols && m.scalar_type() == like.scalar_type() && supports_tma(m);
}

bool fits(const Tensor& v, ScalarType dtype, int64_t count) {
  return v.dim() == 1 && v.size(0) == count && v.is_cuda() && v.scalar_type() == dtype && v.is_contiguous() &&
         reinterpret_cast<uintptr_t>(v.const_data_ptr()) % 8 == 0;
}

}  // namespace

namespace lora_fused {

bool gemm_sm90_supports(const Gemm& gemm) {
  const MatrixView& out = gemm.out;
  if (!out.is_cuda() || gemm.segments.empty() || gemm.segments.size() > kGemmSegments) return false;
  const ScalarType dtype = out.scalar_type();
  const int64_t m = out.size(0), n = out.size(1);
  if (n % 8 != 0 || !supports_tma(out)) return false;
  for (const GemmSegment& segment : gemm.segments) {
    const int64_t k = segment.a.size(1);
    if (!fits(segment.a, out, m, k)) return false;
    if (!(gemm.b_rows_are_n ? fits(segment.b, out, n, k) : fits(segment.b, out, k, n))) return false;
  }
  if (gemm.bias && !fits(*gemm.bias, dtype, n)) return false;
  if (gemm.mag_norm_scale.has_value() != gemm.unscaled.has_value()) return false;
  if (gemm.mag_norm_scale && !(fits(*gemm.mag_norm_scale, ScalarType::Float, n) && fits(*gemm.unscaled, out, m, n)))
    return false;
  if (gemm.accumulate && (gemm.mag_norm_scale || gemm.bias)) return false;
  if (gemm.leading >= gemm.segments.size() || (gemm.mask && gemm.leading == 0)) return false;
  const bool scaled = gemm.leading_scale != 1.0;
  if (scaled && (gemm.leading == 0 || gemm.mask || dtype != ScalarType::Half)) return false;
  if (gemm.leading > 0 && !gemm.mask && !scaled && !(gemm.mag_norm_scale && gemm.b_rows_are_n)) return false;
  return true;
}

void gemm_sm90(const Gemm& gemm) { is_bfloat16(gemm.out) ? launch<__nv_bfloat16>(gemm) : launch<__half>(gemm); }

}  // namespace lora_fused
