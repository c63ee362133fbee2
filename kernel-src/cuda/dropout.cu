// dropout on CUDA: out[m, k] = mask(seed, m, k) · x[m, k] / (1 - p), in out's dtype, or += that; without the scale where
// not `scaled`.
//
// Fused: the mask (Philox, see common/dropout.h), the scale, the sum and the conversion. A thread takes
// eight neighbouring columns, one Philox block. The seed stays on the GPU: no synchronisation, and a CUDA
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
struct Arguments {
  Matrix<In> x;
  Matrix<Out> out;
  const int64_t* seed;
  int64_t cols, blocks, total;
  lora_fused::Keep keep;
  bool accumulate;
};

// kAligned: rows of whole accesses.
template <typename In, typename Out, bool kAligned>
__global__ void __launch_bounds__(kThreads) dropout_fwd_kernel(const __grid_constant__ Arguments<In, Out> a) {
  using Wide = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const uint64_t key = static_cast<uint64_t>(*a.seed);
  const Wide scale = static_cast<Wide>(a.keep.scale);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.total; i += step) {
    const int64_t row = i / a.blocks, col = kColumns * (i - row * a.blocks);
    const int64_t count = min(static_cast<int64_t>(kColumns), a.cols - col);
    Columns<In> x;
    Columns<Out> out;
    load(x, a.x, row, col, count, kAligned);
    if (a.accumulate) load(out, a.out, row, col, count, kAligned);
    const auto words = lora_fused::philox(key, row, static_cast<uint32_t>(col / lora_fused::kMaskColumns));
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const Wide value = words.number(j) >= a.keep.threshold ? widen(x.value[j]) * scale : Wide(0);
      out.value[j] =
          narrow<Out, Wide>(a.accumulate ? static_cast<Wide>(widen(out.value[j])) + value : value);
    }
    store(a.out, out, row, col, count, kAligned);
  }
}

template <typename In, typename Out>
void drop(Tensor& out, const Tensor& x, const Tensor& seed, const Keep& keep, bool accumulate,
          cudaStream_t stream) {
  bool aligned = true;
  Arguments<In, Out> a{matrix<In>(x, aligned), matrix<Out>(out, aligned),
                       static_cast<const int64_t*>(seed.const_data_ptr()), x.size(1),
                       (x.size(1) + kColumns - 1) / kColumns, 0, keep, accumulate};
  a.total = x.size(0) * a.blocks;
  if (a.total == 0) return;
  const int64_t grid = std::min((a.total + kThreads - 1) / kThreads, kMaxBlocks);
  const auto kernel = aligned && a.cols % kColumns == 0 ? dropout_fwd_kernel<In, Out, true> : dropout_fwd_kernel<In, Out, false>;
  kernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename In>
void drop_to(Tensor& out, const Tensor& x, const Tensor& seed, const Keep& keep, bool accumulate,
          cudaStream_t stream) {
  switch (out.scalar_type()) {
    case ScalarType::Float: return drop<In, float>(out, x, seed, keep, accumulate, stream);
    case ScalarType::Double: return drop<In, double>(out, x, seed, keep, accumulate, stream);
    case ScalarType::BFloat16: return drop<In, __nv_bfloat16>(out, x, seed, keep, accumulate, stream);
    default: return drop<In, __half>(out, x, seed, keep, accumulate, stream);
  }
}

}  // namespace

void dropout_cuda(const Tensor& x, const Tensor& seed, double p, Tensor out,
                  bool accumulate, bool scaled) {
  lora_fused::check_dropout(x, seed, p, out, /*cuda=*/true);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream_ptr = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_ptr));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_ptr);
  const Keep keep(p, scaled);
  switch (x.scalar_type()) {
    case ScalarType::Float: return drop_to<float>(out, x, seed, keep, accumulate, stream);
    case ScalarType::Double: return drop_to<double>(out, x, seed, keep, accumulate, stream);
    case ScalarType::BFloat16: return drop_to<__nv_bfloat16>(out, x, seed, keep, accumulate, stream);
    default: return drop_to<__half>(out, x, seed, keep, accumulate, stream);
  }
}
