// row_norm on CUDA: out[n] = sqrt(sum_k (W[n,k] + s * sum_r B[n,r] A[r,k])^2), fp32 [N].
//
// W [N,K], A [R,K], B [N,R], each fp32, bf16 or fp16. Fused: the conversion to fp32, the
// product B·A (only as a 64×64 register tile per block), the sum with W and the squared
// row sum; W is read once. A and B pass through shared memory, 32 ranks at a time. K is
// split over grid.y where N alone cannot fill a GPU; a second kernel adds the partial sums
// in a fixed order. The split depends on the shape alone: results are deterministic.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../../torch-ext/torch_binding.h"
#include "../common/row_norm_check.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kTile = 64;           // rows and columns of a block's tile
constexpr int kRanks = 32;          // ranks of A and B in shared memory at a time
constexpr int kLanes = 16;          // threads along each side; each owns a 4×4 tile
constexpr int64_t kBlocks = 1024;   // blocks wanted in flight; more K-splits gain nothing
constexpr int64_t kMaxSplits = 32;

enum Dtype : int { kFloat, kBFloat16, kHalf };

struct Matrix {  // row-major, `cols` elements a row
  const void* data;
  int dtype;
  int64_t rows, cols;
};

__device__ __forceinline__ float load(const Matrix& m, int64_t row, int64_t col) {
  if (row >= m.rows || col >= m.cols) return 0.0f;
  const int64_t i = row * m.cols + col;
  if (m.dtype == kFloat) return static_cast<const float*>(m.data)[i];
  if (m.dtype == kBFloat16)
    return __bfloat162float(static_cast<const __nv_bfloat16*>(m.data)[i]);
  return __half2float(static_cast<const __half*>(m.data)[i]);
}

// partial[split, n] = sum of squares over the split's columns. Grid (N/64, splits),
// 16×16 threads.
__global__ void __launch_bounds__(kLanes* kLanes)
    row_norm_fwd_kernel(float* __restrict__ partial, Matrix w, Matrix a, Matrix b,
                        float scaling, int64_t cols_per_split) {
  __shared__ __align__(16) float a_tile[kRanks][kTile];
  __shared__ __align__(16) float b_tile[kRanks][kTile + 4];
  const int tid = threadIdx.x, tx = tid % kLanes, ty = tid / kLanes;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t begin = blockIdx.y * cols_per_split;
  const int64_t end = min(begin + cols_per_split, w.cols);
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};

  for (int64_t col0 = begin; col0 < end; col0 += kTile) {
    float acc[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        acc[i][j] = load(w, row0 + 4 * ty + i, col0 + 4 * tx + j);

    for (int64_t r0 = 0; r0 < a.rows; r0 += kRanks) {
      __syncthreads();
      for (int e = tid; e < kRanks * kTile; e += kLanes * kLanes) {
        a_tile[e / kTile][e % kTile] = load(a, r0 + e / kTile, col0 + e % kTile);
        b_tile[e % kRanks][e / kRanks] =
            scaling * load(b, row0 + e / kRanks, r0 + e % kRanks);
      }
      __syncthreads();
#pragma unroll 8
      for (int r = 0; r < kRanks; ++r) {
        const float4 av = *reinterpret_cast<const float4*>(&a_tile[r][4 * tx]);
        const float4 bv = *reinterpret_cast<const float4*>(&b_tile[r][4 * ty]);
        const float as[4] = {av.x, av.y, av.z, av.w}, bs[4] = {bv.x, bv.y, bv.z, bv.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(bs[i], as[j], acc[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i] = fmaf(acc[i][j], acc[i][j], sums[i]);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      sums[i] += __shfl_down_sync(0xffffffffu, sums[i], offset, kLanes);
    const int64_t row = row0 + 4 * ty + i;
    if (tx == 0 && row < w.rows) partial[blockIdx.y * w.rows + row] = sums[i];
  }
}

// out[n] = sqrt(sum over splits of partial[split, n]).
__global__ void row_norm_finish_kernel(float* __restrict__ out,
                                       const float* __restrict__ partial, int64_t n,
                                       int64_t splits) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= n) return;
  float total = 0.0f;
  for (int64_t s = 0; s < splits; ++s) total += partial[s * n + row];
  out[row] = sqrtf(total);
}

Matrix matrix(const Tensor& t) {
  const auto dtype = t.scalar_type();
  return {t.const_data_ptr(),
          dtype == ScalarType::Float ? kFloat
                                     : (dtype == ScalarType::BFloat16 ? kBFloat16 : kHalf),
          t.size(0), t.size(1)};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Tensor row_norm_cuda(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                     double scaling) {
  lora_fused::check_row_norm(weight, lora_a, lora_b, /*cuda=*/true);
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const Tensor w = torch::stable::contiguous(weight), a = torch::stable::contiguous(lora_a),
               b = torch::stable::contiguous(lora_b);
  const int64_t n = w.size(0), k = w.size(1);
  Tensor out = torch::stable::new_empty(w, {n}, ScalarType::Float);
  if (n == 0) return out;

  const int64_t row_blocks = ceil_div(n, kTile), col_tiles = ceil_div(k, kTile);
  const int64_t wanted = std::min({col_tiles, ceil_div(kBlocks, row_blocks), kMaxSplits});
  const int64_t cols_per_split =
      ceil_div(std::max<int64_t>(col_tiles, 1), std::max<int64_t>(wanted, 1)) * kTile;
  const int64_t splits = std::max<int64_t>(1, ceil_div(k, cols_per_split));
  Tensor partial = torch::stable::new_empty(w, {splits, n}, ScalarType::Float);

  void* stream_ptr = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(weight.get_device_index(), &stream_ptr));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_ptr);
  float* sums = static_cast<float*>(partial.mutable_data_ptr());
  const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(splits));
  row_norm_fwd_kernel<<<grid, kLanes * kLanes, 0, stream>>>(
      sums, matrix(w), matrix(a), matrix(b), static_cast<float>(scaling), cols_per_split);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  row_norm_finish_kernel<<<static_cast<unsigned>(ceil_div(n, 256)), 256, 0, stream>>>(
      static_cast<float*>(out.mutable_data_ptr()), sums, n, splits);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
