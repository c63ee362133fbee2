// Matrix product for Hopper with the LoRA terms inside, see common/gemm.h: what it takes, when it
// pays, and the launch of gemm_sm90_kernel.h. Tensor maps are made for every call, on the host.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>

#include "../../torch-ext/torch_binding.h"
#include "../common/gemm.h"
#include "gemm_sm90_kernel.h"

namespace {

using namespace lora_fused::sm90;
using lora_fused::Gemm;
using lora_fused::GemmSegment;
using lora_fused::kGemmSegments;
using lora_fused::View;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// From the driver that is loaded, so that the library needs no link to it.
Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "gemm: the driver has no tensor maps");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

bool is_brain(const View& m) { return m.scalar_type() == ScalarType::BFloat16; }

// Boxes of `rows` rows and 64 columns of a matrix with contiguous rows.
void encode(CUtensorMap& map, const View& m, int rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.size(1)),
                              static_cast<cuuint64_t>(m.size(0))};
  const cuuint64_t stride = static_cast<cuuint64_t>(m.stride(0)) * 2;
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(rows)}, steps[] = {1, 1};
  const CUresult result = encoder()(
      &map, is_brain(m) ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(m.const_data_ptr()), sizes, &stride, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "gemm: cuTensorMapEncodeTiled failed with ",
                  static_cast<int>(result));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

int tiles(int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); }

template <typename T, int kBlockN, bool kRowsAreN>
void launch(const Gemm& gemm, int count) {
  Arguments args;
  args.segments = static_cast<int>(gemm.segments.size());
  args.steps = 0;
  for (int s = 0; s < args.segments; ++s) {
    const GemmSegment& segment = gemm.segments[s];
    encode(args.a[s], segment.a, kBlockM);
    encode(args.b[s], segment.b, kRowsAreN ? kBlockN / kCluster : kBlockK);
    args.steps_of[s] = tiles(segment.a.size(1), kBlockK);
    args.steps += args.steps_of[s];
  }
  encode(args.out, gemm.out, 16);
  if (gemm.z) encode(args.z, *gemm.z, 16);
  args.tiles_m = tiles(gemm.out.size(0), kBlockM * kCluster);
  args.tiles_n = tiles(gemm.out.size(1), kBlockN);
  args.n = static_cast<int>(gemm.out.size(1));
  args.accumulate = gemm.accumulate;
  args.bias = gemm.bias ? gemm.bias->const_data_ptr() : nullptr;
  args.gain = gemm.gain ? static_cast<const float*>(gemm.gain->const_data_ptr()) : nullptr;

  const int device = gemm.out.get_device_index();
  const auto kernel = gemm_kernel<T, kBlockN, kRowsAreN>;
  constexpr int kBytes = Layout<kBlockN>::bytes;
  static std::atomic<uint64_t> prepared{0};  // a bit for each device
  if (!(prepared >> device & 1)) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    prepared |= uint64_t(1) << device;
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(
      kCluster * std::min(args.tiles_m * args.tiles_n, count / kCluster));
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
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

int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

template <typename T, bool kRowsAreN>
void launch(const Gemm& gemm) {
  const int count = multiprocessors(gemm.out.get_device_index());
  if (Tiling(gemm.out.size(0), gemm.out.size(1), count).width == 128)
    launch<T, 128, kRowsAreN>(gemm, count);
  else
    launch<T, 256, kRowsAreN>(gemm, count);
}

// The copy engine takes it: contiguous rows at multiples of 16 bytes.
bool fits(const View& m, const View& like, int64_t rows, int64_t cols) {
  return m.size(0) == rows && m.size(1) == cols && m.is_cuda() &&
         m.scalar_type() == like.scalar_type() && m.stride(1) == 1 && m.stride(0) >= cols &&
         m.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(m.const_data_ptr()) % 16 == 0;
}

bool fits(const Tensor& v, ScalarType dtype, int64_t count) {
  return v.dim() == 1 && v.size(0) == count && v.is_cuda() && v.scalar_type() == dtype &&
         v.is_contiguous() && reinterpret_cast<uintptr_t>(v.const_data_ptr()) % 8 == 0;
}

}  // namespace

namespace lora_fused {

bool gemm_sm90_serves(const Gemm& gemm) {
  const View& out = gemm.out;
  if (!out.is_cuda() || gemm.segments.empty() || gemm.segments.size() > kGemmSegments) return false;
  const ScalarType dtype = out.scalar_type();
  const int64_t m = out.size(0), n = out.size(1), limit = int64_t(1) << 22;
  if (!(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) || m < 1 || n < 1 ||
      m > limit || n > limit || n % 8 != 0 || !fits(out, out, m, n))
    return false;
  for (const GemmSegment& segment : gemm.segments) {
    const int64_t k = segment.a.size(1);
    if (k < 1 || k > limit || !fits(segment.a, out, m, k)) return false;
    if (!(gemm.b_rows_are_n ? fits(segment.b, out, n, k) : fits(segment.b, out, k, n)))
      return false;
  }
  if (gemm.bias && !fits(*gemm.bias, dtype, n)) return false;
  if (gemm.gain.has_value() != gemm.z.has_value()) return false;
  if (gemm.gain && !(fits(*gemm.gain, ScalarType::Float, n) && fits(*gemm.z, out, m, n)))
    return false;
  if (gemm.accumulate && (gemm.gain || gemm.bias)) return false;
  const int device = out.get_device_index();
  return attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
}

bool gemm_sm90_pays(const View& out) {
  constexpr double kEnough = 0.75;
  return Tiling(out.size(0), out.size(1), multiprocessors(out.get_device_index())).efficiency >= kEnough;
}

void gemm_sm90(const Gemm& gemm) {
  if (is_brain(gemm.out))
    gemm.b_rows_are_n ? launch<__nv_bfloat16, true>(gemm) : launch<__nv_bfloat16, false>(gemm);
  else
    gemm.b_rows_are_n ? launch<__half, true>(gemm) : launch<__half, false>(gemm);
}

}  // namespace lora_fused

void gemm_cuda(lora_fused::Tensors a, lora_fused::Tensors b, bool b_rows_are_n, Tensor out,
               std::optional<Tensor> bias, std::optional<Tensor> gain, std::optional<Tensor> z,
               bool accumulate) {
  STD_TORCH_CHECK(a.size() == b.size(), "gemm: ", a.size(), " matrices a for ", b.size(), " b");
  for (const auto* matrices : {&a, &b})
    for (const Tensor& m : *matrices) STD_TORCH_CHECK(m.dim() == 2, "gemm: a and b must be matrices");
  STD_TORCH_CHECK(out.dim() == 2 && (!z || z->dim() == 2), "gemm: out and z must be matrices");
  Gemm gemm{{}, b_rows_are_n, out, accumulate, bias, gain, z ? lora_fused::MaybeView(*z) : std::nullopt};
  for (size_t i = 0; i < a.size(); ++i) gemm.segments.push_back({a[i], b[i]});
  STD_TORCH_CHECK(lora_fused::gemm_sm90_serves(gemm),
                  "gemm: not for this device, these dtypes, shapes or strides");
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  lora_fused::gemm_sm90(gemm);
}
