// Many small conversions between float32, bfloat16 and float16 in one launch.
//
// Fused: the copies of all A's and B's of a batch to the dtype of the products, and of all
// gradients back. Each tensor is cut into pieces; grid.y is the tensor, grid.x its pieces.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../common/lora_group.h"

namespace {

using torch::headeronly::ScalarType;

constexpr int kThreads = 256;
constexpr int kTensors = 16;       // of one launch: 16 × 24 bytes of parameters
constexpr int64_t kPieces = 64;    // blocks a tensor: more than enough for R·K elements

enum Dtype : int { kFloat, kBFloat16, kHalf };

struct Piece {
  const void* from;
  void* to;
  int64_t count;
};

struct Pieces {
  Piece piece[kTensors];
  int from_dtype[kTensors], to_dtype[kTensors];
};

__device__ __forceinline__ float load(const void* data, int dtype, int64_t i) {
  if (dtype == kFloat) return static_cast<const float*>(data)[i];
  if (dtype == kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return __half2float(static_cast<const __half*>(data)[i]);
}

__device__ __forceinline__ void store(void* data, int dtype, int64_t i, float value) {
  if (dtype == kFloat)
    static_cast<float*>(data)[i] = value;
  else if (dtype == kBFloat16)
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(value);
  else
    static_cast<__half*>(data)[i] = __float2half(value);
}

__global__ void __launch_bounds__(kThreads) cast_fwd_kernel(const __grid_constant__ Pieces pieces) {
  const Piece piece = pieces.piece[blockIdx.y];
  const int from = pieces.from_dtype[blockIdx.y], to = pieces.to_dtype[blockIdx.y];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < piece.count;
       i += step)
    store(piece.to, to, i, load(piece.from, from, i));
}

int code(const torch::stable::Tensor& t) {
  const auto dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "cast: expected float32, bfloat16 or float16");
  return dtype == ScalarType::Float ? kFloat : dtype == ScalarType::BFloat16 ? kBFloat16 : kHalf;
}

}  // namespace

void lora_fused::cast_all_cuda(const std::vector<Cast>& casts) {
  void* stream_ptr = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(casts[0].from.get_device_index(), &stream_ptr));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_ptr);
  for (size_t first = 0; first < casts.size(); first += kTensors) {
    const size_t tensors = std::min<size_t>(kTensors, casts.size() - first);
    Pieces pieces{};
    int64_t most = 1;
    for (size_t i = 0; i < tensors; ++i) {
      const Cast& cast = casts[first + i];
      pieces.piece[i] = {cast.from.const_data_ptr(), cast.to.mutable_data_ptr(), cast.to.numel()};
      pieces.from_dtype[i] = code(cast.from);
      pieces.to_dtype[i] = code(cast.to);
      most = std::max(most, cast.to.numel());
    }
    const int64_t blocks = std::min((most + kThreads - 1) / kThreads, kPieces);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(tensors));
    cast_fwd_kernel<<<grid, kThreads, 0, stream>>>(pieces);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}
