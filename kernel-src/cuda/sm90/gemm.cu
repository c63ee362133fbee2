// Matrix product for Hopper with the LoRA terms inside, see common/gemm.h: what it takes, when it
// pays, and the launch of gemm_sm90_kernel.h. Tensor maps are made for every call, on the host.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <type_traits>

#include "../../../torch-ext/torch_binding.h"
#include "../../common/gemm.h"
#include "gemm.cuh"
#include "tma_host.h"
#include "../common/stream.h"

namespace {

using namespace lora_fused::sm90;
using lora_fused::Gemm;
using lora_fused::GemmSegment;
using lora_fused::kGemmSegments;
using lora_fused::is_hopper;
using lora_fused::mask_of;
using lora_fused::multiprocessors;
using lora_fused::scale_of;
using lora_fused::SharedMemory;
using lora_fused::View;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T, int kBlockN, bool kRowsAreN, Middle kMiddle>
void launch(const Gemm& gemm, int count) {
  Arguments args;
  args.segments = static_cast<int>(gemm.segments.size());
  args.steps = 0;
  for (int s = 0; s < args.segments; ++s) {
    const GemmSegment& segment = gemm.segments[s];
    encode_boxes(args.a[s], segment.a, kBlockM);
    encode_boxes(args.b[s], segment.b, kRowsAreN ? kBlockN / kCluster : kBlockK);
    args.steps_of[s] = tiles(segment.a.size(1), kBlockK);
    args.steps += args.steps_of[s];
    if (s + 1 == static_cast<int>(gemm.leading)) args.leading_steps = args.steps;
  }
  args.mask = mask_of(gemm.mask), args.kept = static_cast<float>(gemm.mask ? scale_of(gemm.mask) : gemm.leading_scale);
  encode_boxes(args.out, gemm.out, 16);
  if (gemm.z) encode_boxes(args.z, *gemm.z, 16);
  args.tiles_m = tiles(gemm.out.size(0), kBlockM * kCluster);
  args.tiles_n = tiles(gemm.out.size(1), kBlockN);
  args.n = static_cast<int>(gemm.out.size(1));
  args.accumulate = gemm.accumulate;
  args.bias = gemm.bias ? gemm.bias->const_data_ptr() : nullptr;
  args.gain = gemm.gain ? static_cast<const float*>(gemm.gain->const_data_ptr()) : nullptr;

  const int device = gemm.out.get_device_index();
  const auto kernel = gemm_kernel<T, kBlockN, kRowsAreN, kMiddle>;
  constexpr int kBytes = Layout<kBlockN>::bytes;
  static SharedMemory shared_memory;
  shared_memory.allow(kernel, kBytes, device);
  const int blocks = kCluster * std::min(args.tiles_m * args.tiles_n, count / kCluster);
  launch_clusters(kernel, blocks, kCluster, kThreads, kBytes, stream_of(gemm.out), args);
}

// How out is cut into tiles. Narrow ones take half the time of wide ones and a fifth more, which
// pays where they fill multiprocessors that wide ones leave idle.
struct Tiling {
  int width;
  double efficiency;  // wide tiles without remainder on all multiprocessors would be 1

  Tiling(int64_t m, int64_t n, int multiprocessors) {
    const int clusters = multiprocessors / kCluster;
    const auto rounds = [&](int columns) {
      return tiles(int64_t(tiles(m, kBlockM * kCluster)) * tiles(n, columns), clusters);
    };
    const double wide = rounds(256), narrow = 0.6 * rounds(128);
    width = narrow < wide ? 128 : 256;
    efficiency = double(m) * double(n) / (double(kBlockM * kCluster) * 256 * clusters) / std::min(narrow, wide);
  }
};

template <typename T, bool kRowsAreN, Middle kMiddle>
void launch(const Gemm& gemm) {
  const int count = multiprocessors(gemm.out.get_device_index());
  if (Tiling(gemm.out.size(0), gemm.out.size(1), count).width == 128)
    launch<T, 128, kRowsAreN, kMiddle>(gemm, count);
  else
    launch<T, 256, kRowsAreN, kMiddle>(gemm, count);
}

// In float16 alone: in bfloat16 no term needs a scale.
template <typename T>
void launch_scaled(const Gemm& gemm) {
  if constexpr (std::is_same_v<T, __half>)
    gemm.b_rows_are_n ? launch<T, true, Middle::kScale>(gemm) : launch<T, false, Middle::kScale>(gemm);
}

template <typename T>
void launch(const Gemm& gemm) {
  if (gemm.mask)
    gemm.b_rows_are_n ? launch<T, true, Middle::kMask>(gemm) : launch<T, false, Middle::kMask>(gemm);
  else if (gemm.leading_scale != 1.0)
    launch_scaled<T>(gemm);
  else if (gemm.leading > 0)
    launch<T, true, Middle::kExcess>(gemm);
  else
    gemm.b_rows_are_n ? launch<T, true, Middle::kNone>(gemm) : launch<T, false, Middle::kNone>(gemm);
}

// A matrix of out's dtype that the copy engine takes.
bool fits(const View& m, const View& like, int64_t rows, int64_t cols) {
  return m.size(0) == rows && m.size(1) == cols && m.scalar_type() == like.scalar_type() && takes_boxes(m);
}

bool fits(const Tensor& v, ScalarType dtype, int64_t count) {
  return v.dim() == 1 && v.size(0) == count && v.is_cuda() && v.scalar_type() == dtype &&
         v.is_contiguous() && reinterpret_cast<uintptr_t>(v.const_data_ptr()) % 8 == 0;
}

// Whether the tiles of out [m, n] keep the multiprocessors busy.
bool fills(int64_t m, int64_t n, int32_t device) {
  constexpr double kEnough = 0.75;
  return Tiling(m, n, multiprocessors(device)).efficiency >= kEnough;
}

}  // namespace

namespace lora_fused {

bool gemm_sm90_serves(const Gemm& gemm) {
  const View& out = gemm.out;
  if (!out.is_cuda() || gemm.segments.empty() || gemm.segments.size() > kGemmSegments) return false;
  const ScalarType dtype = out.scalar_type();
  const int64_t m = out.size(0), n = out.size(1);
  if (n % 8 != 0 || !takes_boxes(out)) return false;
  for (const GemmSegment& segment : gemm.segments) {
    const int64_t k = segment.a.size(1);
    if (!fits(segment.a, out, m, k)) return false;
    if (!(gemm.b_rows_are_n ? fits(segment.b, out, n, k) : fits(segment.b, out, k, n)))
      return false;
  }
  if (gemm.bias && !fits(*gemm.bias, dtype, n)) return false;
  if (gemm.gain.has_value() != gemm.z.has_value()) return false;
  if (gemm.gain && !(fits(*gemm.gain, ScalarType::Float, n) && fits(*gemm.z, out, m, n)))
    return false;
  if (gemm.accumulate && (gemm.gain || gemm.bias)) return false;
  if (gemm.leading >= gemm.segments.size() || (gemm.mask && gemm.leading == 0)) return false;
  const bool scaled = gemm.leading_scale != 1.0;
  if (scaled && (gemm.leading == 0 || gemm.mask || dtype != ScalarType::Half)) return false;
  if (gemm.leading > 0 && !gemm.mask && !scaled && !(gemm.gain && gemm.b_rows_are_n)) return false;
  return is_hopper(out.get_device_index());
}

bool gemm_sm90_pays(const View& out) { return fills(out.size(0), out.size(1), out.get_device_index()); }

void gemm_sm90(const Gemm& gemm) {
  is_brain(gemm.out) ? launch<__nv_bfloat16>(gemm) : launch<__half>(gemm);
}

}  // namespace lora_fused

bool gemm_pays_cuda(const Tensor& like, int64_t rows, int64_t cols) {
  const ScalarType dtype = like.scalar_type();
  if ((dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) || rows <= 0 || cols <= 0 || cols % 8 != 0) return false;
  return lora_fused::is_hopper(like.get_device_index()) && fills(rows, cols, like.get_device_index());
}

void gemm_cuda(lora_fused::Tensors a, lora_fused::Tensors b, bool b_rows_are_n, Tensor out,
               std::optional<Tensor> bias, std::optional<Tensor> gain, std::optional<Tensor> z,
               bool accumulate, std::optional<Tensor> seed, double p, int64_t leading, double leading_scale) {
  STD_TORCH_CHECK(a.size() == b.size(), "gemm: ", a.size(), " matrices a for ", b.size(), " b");
  for (const auto* matrices : {&a, &b})
    for (const Tensor& m : *matrices) STD_TORCH_CHECK(m.dim() == 2, "gemm: a and b must be matrices");
  STD_TORCH_CHECK(out.dim() == 2 && (!z || z->dim() == 2), "gemm: out and z must be matrices");
  Gemm gemm{{}, b_rows_are_n, out, accumulate, bias, gain, z ? lora_fused::MaybeView(*z) : std::nullopt};
  for (size_t i = 0; i < a.size(); ++i) gemm.segments.push_back({a[i], b[i]});
  if (seed) gemm.mask = {*seed, p};
  gemm.leading = static_cast<size_t>(leading), gemm.leading_scale = leading_scale;
  STD_TORCH_CHECK(lora_fused::gemm_sm90_serves(gemm),
                  "gemm: not for this device, these dtypes, shapes or strides");
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  lora_fused::gemm_sm90(gemm);
}
