// row_norm on CUDA for a bfloat16 W and float32 adapters of small rank, its sums as gram.h has them: two products
// of W and A instead of the three that B·A takes.
//
// A block takes kRows rows of W and, of K, every gridDim.y-th tile of kCols columns, a warp 32 of
// the rows. W and A reach shared memory by cp.async in a ring of kStages tiles. A last kernel adds each row's
// partial sums in a fixed order, so results are deterministic on a given GPU.
#include "row_norm_gram.h"

#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../common/products.h"
#include "gram.h"
#include "stream.h"

namespace lora_fused {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256, kWarps = kThreads / 32, kBlocks = 2;
constexpr int kRows = 32 * kWarps, kCols = 64, kChunks = kCols / 8;  // of 16 bytes in a row of a tile
constexpr int kSteps = 2, kLargestRank = 16 * kSteps;

using W = __nv_bfloat16;
using P = float;

struct S {
  static constexpr int kStages = 2;  // within 99 KiB, all that small GPUs have
  using A = AdapterTile<W, P, kSteps, kCols, true>;
  using Share = GramShare<kSteps, kWarps>;
  static constexpr int kWBytes = kRows * kCols * 2, kStageBytes = kWBytes + A::kBytes;
  static constexpr int kBytes = kStages * kStageBytes, kGramSize = A::kRanks * A::kRanks;
  static_assert(kBytes >= Share::kCopies * kGramSize * 4, "A Aᵀ takes the ring's place");
};

struct Args {
  float *partial, *grams;  // [gridDim.y, n] and [gridDim.y, r, r], r in whole blocks of 16
  const W* w;              // [n, k]
  const P *a, *b;          // [r, k], [n, r]
  float scaling;
  int64_t n, k;
  int r, tiles;
};

// Where a chunk of a row lies, so that ldmatrix meets no bank conflict.
__device__ __forceinline__ int place(int row, int chunk) { return (row * kChunks + (chunk ^ (row & 7))) * 16; }

__device__ __forceinline__ void load_tile(char* stage, const Args& p, int64_t row0, int64_t first) {
  const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
  const W* const from = p.w + (row0 + row) * p.k + first + chunk * 8;
  const uint32_t to = shared_address(stage) + place(row, chunk);
  const bool inside = first + chunk * 8 < p.k;
  constexpr int kStep = kThreads / kChunks;  // a multiple of the swizzle's period
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const bool valid = inside && row0 + row + i * kStep < p.n;
    copy_async(to + i * kStep * kChunks * 16, valid ? from + i * kStep * p.k : p.w, valid);
  }
  S::A::load<kThreads>(reinterpret_cast<P*>(stage + S::kWBytes), p.a, first, p.k, p.r, true);
}

__global__ void __launch_bounds__(kThreads, kBlocks) row_norm_gram_kernel(const Args p) {
  using A = S::A;
  using Share = S::Share;
  extern __shared__ __align__(128) char smem[];
  __shared__ uint4 parts[A::kParts][32], low_parts[A::kLowParts][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp * 32;
  const int64_t row0 = int64_t{blockIdx.x} * kRows;
  const int stride = gridDim.y;
  int next = blockIdx.y;
  const auto load = [&](int stage) {
    if (next < p.tiles) load_tile(smem + stage * S::kStageBytes, p, row0, int64_t{next} * kCols);
    next += stride;
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  };

  // Of 16 rows twice: |w|² of rows lane / 4 and 8 more, W Aᵀ by 8 ranks; a share of A Aᵀ.
  float squares[2][2] = {}, cross[2][2 * kSteps][4] = {}, gram[Share::kGrams][2][4] = {};
#pragma unroll
  for (int stage = 0; stage < S::kStages - 1; ++stage) load(stage);
  int slot = 0;
  for (int tile = blockIdx.y; tile < p.tiles; tile += stride) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(S::kStages - 2) : "memory");
    __syncthreads();
    load(slot == 0 ? S::kStages - 1 : slot - 1);
    const char* stage = smem + slot * S::kStageBytes;
    slot = slot + 1 == S::kStages ? 0 : slot + 1;
    A::make_parts<kWarps>(parts, low_parts, reinterpret_cast<const P*>(stage + S::kWBytes));
    __syncthreads();
#pragma unroll
    for (int slab = 0; slab < A::kSlabs; ++slab) {
      const uint4(*high)[32] = parts + slab * kSteps;
      const uint4(*low)[32] = low_parts + slab * kSteps;
      uint32_t w[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices<false>(w[i], shared_address(stage) + place(warp_row + 16 * i + lane % 16, 2 * slab + lane / 16));
#pragma unroll
        for (int q = 0; q < 4; ++q) squares[i][q % 2] = add_square(squares[i][q % 2], pair(w[i][q], W()));
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const auto add = [&](const uint4& a) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply<W>(cross[i][2 * step], w[i], a.x, a.z);
            multiply<W>(cross[i][2 * step + 1], w[i], a.y, a.w);
          }
        };
        add(low[step][lane]);
        add(high[step][lane]);
      }
      if (blockIdx.x > 0 || slab % Share::kCopies != Share::copy(warp)) continue;
#pragma unroll
      for (int i = 0; i < Share::kGrams; ++i)
        add_gram<W, true>(gram[i], high, low, Share::row_step(warp, i), Share::col_step(warp, i));
    }
  }
  asm volatile("cp.async.wait_group 0;\n" ::: "memory");
  __syncthreads();
  if (blockIdx.x == 0)
    write_gram<A::kRanks, Share, kThreads>(p.grams + blockIdx.y * S::kGramSize, reinterpret_cast<float*>(smem), gram);

#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = warp_row + 16 * i + 8 * half + lane / 4;
      float dot = 0.0f;
#pragma unroll
      for (int j = 0; j < 4 * kSteps; ++j) {
        const int rank = j / 2 * 8 + lane % 4 * 2 + j % 2;
        if (row0 + at < p.n && rank < p.r)
          dot = fmaf(p.b[(row0 + at) * p.r + rank], cross[i][j / 2][2 * half + j % 2], dot);
      }
      float sum = fmaf(2.0f * p.scaling, dot, squares[i][half]);
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane % 4 == 0 && row0 + at < p.n) p.partial[int64_t{blockIdx.y} * p.n + row0 + at] = sum;
    }
}

bool aligned(const Tensor& t) {
  return t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

}  // namespace

bool row_norm_gram_fits(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b) {
  return weight.scalar_type() == ScalarType::BFloat16 && lora_a.scalar_type() == ScalarType::Float &&
         lora_b.scalar_type() == ScalarType::Float && lora_a.size(0) >= 1 && lora_a.size(0) <= kLargestRank &&
         weight.numel() > 0 && weight.size(1) % 8 == 0 && aligned(weight) && aligned(lora_a) && lora_b.is_contiguous();
}

Tensor row_norm_gram(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling) {
  const int64_t n = weight.size(0), k = weight.size(1);
  const auto rows = static_cast<unsigned>((n + kRows - 1) / kRows);
  int multiprocessors = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, weight.get_device_index()));
  Args p{};
  p.w = static_cast<const W*>(weight.const_data_ptr());
  p.a = static_cast<const P*>(lora_a.const_data_ptr()), p.b = static_cast<const P*>(lora_b.const_data_ptr());
  p.scaling = static_cast<float>(scaling);
  p.n = n, p.k = k, p.r = static_cast<int>(lora_a.size(0));
  p.tiles = static_cast<int>((k + kCols - 1) / kCols);
  const int splits = std::clamp(kBlocks * multiprocessors / static_cast<int>(rows), 1, p.tiles);
  const Tensor norm = empty(weight, {n}, ScalarType::Float);
  const Tensor buffer = empty(weight, {splits * (S::kGramSize + n)}, ScalarType::Float);
  p.grams = static_cast<float*>(buffer.mutable_data_ptr());
  p.partial = p.grams + splits * S::kGramSize;
  STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(row_norm_gram_kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  const cudaStream_t stream = stream_of(weight);
  row_norm_gram_kernel<<<dim3(rows, splits), kThreads, S::kBytes, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  norm_finish_kernel<P, S::A::kRanks>
      <<<static_cast<unsigned>((n + kFinishThreads - 1) / kFinishThreads), kFinishThreads, 0, stream>>>(
          static_cast<float*>(norm.mutable_data_ptr()), p.partial, p.grams, p.b, p.scaling, n, p.r, splits);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return norm;
}

}  // namespace lora_fused
