// dropout on CUDA: out[m, k] = mask(seed, m, k) · x[m, k] / (1 - p), in out's dtype, or += that.
//
// Fused: the mask (Philox, see common/dropout.h), the scale, the sum and the conversion. One thread per
// four columns, one Philox block each. The seed stays on the GPU: no synchronisation, and a CUDA
// graph that draws a new seed replays a new mask.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <type_traits>

#include "../../torch-ext/torch_binding.h"
#include "../common/dropout.h"
#include "columns.h"

namespace {

using namespace lora_fused;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // more work is looped over

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads)
    dropout_fwd_kernel(Out* __restrict__ out, const In* __restrict__ x,
                       const int64_t* __restrict__ seed, int64_t cols, int64_t blocks,
                       int64_t total, lora_fused::Keep keep, bool accumulate) {
  using Wide = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const uint64_t key = static_cast<uint64_t>(*seed);
  const Wide scale = static_cast<Wide>(keep.scale);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t row = i / blocks, col = 4 * (i - row * blocks);
    const auto words = lora_fused::philox(key, row, static_cast<uint32_t>(col / 4));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (col + j >= cols) break;
      const int64_t at = row * cols + col + j;
      const bool kept = words.word[j] >= keep.threshold;
      const Wide value = kept ? widen(x[at]) * scale : Wide(0);
      out[at] = narrow<Out, Wide>(accumulate ? static_cast<Wide>(widen(out[at])) + value : value);
    }
  }
}

template <typename In, typename Out>
void drop(Tensor& out, const Tensor& x, const Tensor& seed, double p, bool accumulate,
          cudaStream_t stream) {
  const int64_t cols = x.size(1), blocks = (cols + 3) / 4, total = x.size(0) * blocks;
  if (total == 0) return;
  const int64_t grid = std::min((total + kThreads - 1) / kThreads, kMaxBlocks);
  dropout_fwd_kernel<In, Out><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(
      static_cast<Out*>(out.mutable_data_ptr()), static_cast<const In*>(x.const_data_ptr()),
      static_cast<const int64_t*>(seed.const_data_ptr()), cols, blocks, total,
      lora_fused::Keep(p), accumulate);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename In>
void drop_to(Tensor& out, const Tensor& x, const Tensor& seed, double p, bool accumulate,
          cudaStream_t stream) {
  switch (out.scalar_type()) {
    case ScalarType::Float: return drop<In, float>(out, x, seed, p, accumulate, stream);
    case ScalarType::Double: return drop<In, double>(out, x, seed, p, accumulate, stream);
    case ScalarType::BFloat16: return drop<In, __nv_bfloat16>(out, x, seed, p, accumulate, stream);
    default: return drop<In, __half>(out, x, seed, p, accumulate, stream);
  }
}

}  // namespace

void dropout_cuda(const Tensor& x, const Tensor& seed, double p, Tensor out,
                  bool accumulate) {
  lora_fused::check_dropout(x, seed, p, out, /*cuda=*/true);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream_ptr = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_ptr));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_ptr);
  switch (x.scalar_type()) {
    case ScalarType::Float: return drop_to<float>(out, x, seed, p, accumulate, stream);
    case ScalarType::Double: return drop_to<double>(out, x, seed, p, accumulate, stream);
    case ScalarType::BFloat16: return drop_to<__nv_bfloat16>(out, x, seed, p, accumulate, stream);
    default: return drop_to<__half>(out, x, seed, p, accumulate, stream);
  }
}
