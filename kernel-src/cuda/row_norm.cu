// row_norm on CUDA: out[n] = sqrt(sum_k (W[n,k] + s * sum_r B[n,r] A[r,k])^2), fp32 [N].
//
// W [N,K], A [R,K], B [N,R], each fp32, bf16 or fp16. The product runs on tensor cores, exact
// products with fp32 sums: A and B of one half type and aligned as they are, anything else
// split into two fp16 parts first (22 bits; a power of two per column of A and row of B keeps
// them in range) and multiplied in three terms. The tiles are dealt out evenly to as many
// blocks as the GPU holds; a last kernel adds each row's partial sums in a fixed order, so
// results are deterministic on a given GPU.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../../torch-ext/torch_binding.h"
#include "../common/row_norm_check.h"
#include "row_norm_kernel.h"

namespace {

using namespace lora_fused;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Matrix {  // row-major
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

// Exponent that brings `largest` to [2^14, 2^15), near the top of fp16.
__device__ __forceinline__ int exponent_for(float largest) {
  return largest > 0.0f && isfinite(largest) ? min(14 - ilogbf(largest), 126) : 0;
}

// x·2^exponent as the sum of two fp16 numbers.
__device__ __forceinline__ void split(float x, int exponent, __half* high, __half* low) {
  const float scaled = ldexpf(x, exponent);
  *high = __float2half(scaled);
  *low = __float2half(isfinite(scaled) ? scaled - __half2float(*high) : 0.0f);
}

// a_parts [2·ranks, lda]: low parts, then high parts. b_parts [n, 2·ranks]: high, then low.
// The first ceil(lda/32) blocks split 32 columns of A each, the others 8 rows of B.
__global__ void __launch_bounds__(256)
    row_norm_split_kernel(__half* __restrict__ a_parts, __half* __restrict__ b_parts,
                          float* __restrict__ col_scale, float* __restrict__ row_scale,
                          Matrix a, Matrix b, int64_t ranks, int64_t lda) {
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  const int64_t a_blocks = lda / 32;
  if (blockIdx.x < a_blocks) {
    __shared__ float largest[8][32];
    const int64_t col = blockIdx.x * int64_t{32} + x;
    float top = 0.0f;
    for (int64_t r = y; r < a.rows; r += 8) top = fmaxf(top, fabsf(load(a, r, col)));
    largest[y][x] = top;
    __syncthreads();
    for (int i = 0; i < 8; ++i) top = fmaxf(top, largest[i][x]);
    const int exponent = exponent_for(top);
    if (y == 0) col_scale[col] = ldexpf(1.0f, -exponent);
    for (int64_t r = y; r < ranks; r += 8)
      split(load(a, r, col), exponent, a_parts + (ranks + r) * lda + col,
            a_parts + r * lda + col);
  } else {
    const int64_t row = (blockIdx.x - a_blocks) * 8 + y;
    if (row >= b.rows) return;
    float top = 0.0f;
    for (int64_t r = x; r < b.cols; r += 32) top = fmaxf(top, fabsf(load(b, row, r)));
    for (int offset = 16; offset > 0; offset /= 2)
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const int exponent = exponent_for(top);
    if (x == 0) row_scale[row] = ldexpf(1.0f, -exponent);
    for (int64_t r = x; r < ranks; r += 32) {
      __half* high = b_parts + row * 2 * ranks + r;
      split(load(b, row, r), exponent, high, high + ranks);
    }
  }
}

// out[n] = sqrt of the row's partial sums, added in the order of the blocks that made them.
__global__ void row_norm_finish_kernel(float* __restrict__ out,
                                       const float* __restrict__ partial, int64_t n,
                                       int64_t row_blocks, int64_t col_tiles,
                                       int64_t blocks) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= n) return;
  const int64_t row_block = row / kRows, tiles = row_blocks * col_tiles;
  const int64_t tile = row_block * col_tiles;
  const int64_t first = ((tile + 1) * blocks - 1) / tiles;
  const int64_t last = ((tile + col_tiles) * blocks - 1) / tiles;
  float total = 0.0f;
  for (int64_t b = first; b <= last; ++b)
    total += partial[(b + row_block) * kRows + row % kRows];
  out[row] = sqrtf(total);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Asked first: the dispatcher's own answer takes microseconds of host time.
Tensor in_rows(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Matrix matrix(const Tensor& t) {
  const auto dtype = t.scalar_type();
  return {t.const_data_ptr(),
          dtype == ScalarType::Float ? kFloat
                                     : (dtype == ScalarType::BFloat16 ? kBFloat16 : kHalf),
          t.size(0), t.size(1)};
}

bool aligned(const Matrix& m) {
  const int64_t bytes = m.dtype == kFloat ? 4 : 2;
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.cols * bytes % 16 == 0;
}

int device_attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Fills in the buffers that fit `limit` bytes of shared memory, the deepest first, B read once
// before B read again for every tile. Returns the bytes, 0 where nothing fits.
int64_t plan(RowNormArgs& p, int64_t limit) {
  const int64_t w_bytes = kRows * kCols * (p.w_dtype == kFloat ? 4 : 2);
  const int64_t b_all = std::min(p.steps, 2 * p.period);
  for (const bool resident : {true, false})
    for (const int w_buffers : {2, 1})
      for (const int stages : {4, 3, 2}) {
        const int64_t bytes = w_buffers * w_bytes + stages * kRanks * kCols * 2 +
                              (resident ? b_all : stages) * kBStep;
        if (bytes > limit || w_buffers * p.steps < stages) continue;
        p.b_resident = resident;
        p.w_buffers = w_buffers;
        p.stages = stages;
        p.w_lead = std::min(stages - 1, (w_buffers - 1) * p.steps);
        return bytes;
      }
  return 0;
}

}  // namespace

Tensor row_norm_cuda(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                     double scaling) {
  lora_fused::check_row_norm(weight, lora_a, lora_b, /*cuda=*/true);
  const int device = weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor wt = in_rows(weight), at = in_rows(lora_a), bt = in_rows(lora_b);
  const Matrix w = matrix(wt), a = matrix(at), b = matrix(bt);
  const int64_t n = w.rows, k = w.cols;
  Tensor out = torch::stable::new_empty(wt, {n}, ScalarType::Float);
  if (n == 0) return out;
  if (k == 0) return torch::stable::fill_(out, 0.0);

  const bool direct = a.dtype == b.dtype && a.dtype != kFloat && aligned(a) && aligned(b);
  const int period = static_cast<int>(std::max<int64_t>(1, ceil_div(a.rows, kRanks)));
  RowNormArgs p{};
  p.w = w.data, p.w_dtype = w.dtype, p.w_vector = aligned(w);
  p.n = n, p.k = k;
  p.period = period;
  // Two steps a tile at least where one W tile is all that small GPUs can hold.
  p.steps = direct ? std::max(period, w.dtype == kFloat ? 2 : 1) : 3 * period;
  p.scaling = static_cast<float>(scaling);

  const int64_t block_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int64_t all = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  constexpr int64_t kFixed = 2 * kRows * 4;  // the kernel's row sums
  int per_sm = 2;
  int64_t bytes = plan(p, std::min(block_limit, all / per_sm - 1024) - kFixed);
  if (bytes == 0) per_sm = 1, bytes = plan(p, block_limit - kFixed);
  STD_TORCH_CHECK(bytes > 0, "row_norm: needs 98 KiB of shared memory a block");
  p.row_blocks = ceil_div(n, kRows);
  p.col_tiles = ceil_div(k, kCols);
  const int64_t blocks =
      std::min(p.row_blocks * p.col_tiles,
               int64_t{per_sm} * device_attribute(cudaDevAttrMultiProcessorCount, device));

  // One buffer: partial sums, scales, parts; every piece a multiple of 16 bytes.
  const int64_t ranks = int64_t{period} * kRanks, lda = p.col_tiles * kCols;
  const int64_t sums = (blocks + p.row_blocks) * kRows, scales = p.row_blocks * kRows + lda;
  const int64_t parts = (lda + n) * 2 * ranks / 2;  // in floats
  Tensor buffer =
      torch::stable::new_empty(wt, {sums + (direct ? 0 : scales + parts)}, ScalarType::Float);
  float* partial = static_cast<float*>(buffer.mutable_data_ptr());

  void* stream_ptr = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_ptr));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_ptr);
  if (direct) {
    p.a = static_cast<const uint16_t*>(a.data), p.b = static_cast<const uint16_t*>(b.data);
    p.a_rows = a.rows, p.lda = k, p.ldb = a.rows;
  } else {
    float* row_scale = partial + sums;
    float* col_scale = row_scale + p.row_blocks * kRows;
    __half* a_parts = reinterpret_cast<__half*>(col_scale + lda);
    __half* b_parts = a_parts + 2 * ranks * lda;
    row_norm_split_kernel<<<static_cast<unsigned>(lda / 32 + ceil_div(n, 8)), 256, 0,
                            stream>>>(a_parts, b_parts, col_scale, row_scale, a, b, ranks,
                                      lda);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    p.a = reinterpret_cast<const uint16_t*>(a_parts);
    p.b = reinterpret_cast<const uint16_t*>(b_parts);
    p.a_rows = p.ldb = 2 * ranks, p.lda = lda;
    p.row_scale = row_scale, p.col_scale = col_scale;
  }

  const auto kernel = direct && a.dtype == kBFloat16 ? row_norm_fwd_kernel<__nv_bfloat16>
                                                     : row_norm_fwd_kernel<__half>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)));
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(partial, p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  row_norm_finish_kernel<<<static_cast<unsigned>(ceil_div(n, 256)), 256, 0, stream>>>(
      static_cast<float*>(out.mutable_data_ptr()), partial, n, p.row_blocks, p.col_tiles,
      blocks);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
