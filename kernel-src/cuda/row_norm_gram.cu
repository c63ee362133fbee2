// row_norm on CUDA for a half-precision W and small ranks, its sums as gram.h has them: one product of W
// and A whatever the dtype of B, and for a float32 A two instead of the three that B·A takes.
//
// A block takes kRows rows of W and, of K, every gridDim.y-th tile of kCols columns, a warp 32 of
// the rows. W and A reach shared memory by cp.async in a ring of kStages tiles; A's fragments are made one tile
// ahead of their use, so that a tile costs one barrier. A last kernel adds each row's partial sums in a
// fixed order, so results are deterministic on a given GPU.
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
constexpr int kRows = 32 * kWarps, kCols = 32, kChunks = kCols / 8;  // of 16 bytes in a row of a tile
constexpr int kWBytes = kRows * kCols * 2;
constexpr int64_t kLargestRank = 64;

struct Args {
  float *partial, *grams;  // [gridDim.y, n]; [copies of a block, gridDim.y, r, r], r in whole blocks of 16
  const void *w, *a, *b;  // [n, k], [r, k], [n, r]
  float scaling;
  int64_t n, k;
  int r, tiles;
};

template <typename W, typename P, int kSteps>
struct Shape {
  static constexpr bool kSplit = std::is_same_v<P, float>;
  using A = AdapterTile<W, P, kSteps, kCols, kSplit>;
  static constexpr int kStages = kSteps <= 2 ? 4 : 3;  // within 99 KiB, all that small GPUs have
  static constexpr int kStageBytes = kWBytes + A::kBytes, kBytes = kStages * kStageBytes;
  using Share = GramShare<kSteps, kWarps>;
  static constexpr int kGramSize = A::kRanks * A::kRanks;
};

// Where a chunk of a row lies, so that ldmatrix meets no bank conflict.
__device__ __forceinline__ int place(int row, int chunk) { return (row * kChunks + (chunk ^ (row >> 1 & 3))) * 16; }

template <typename P, typename S>
__device__ __forceinline__ void load_tile(char* stage, const Args& p, int64_t row0, int64_t first) {
  const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
  const auto* w = static_cast<const uint16_t*>(p.w);
  const auto* from = w + (row0 + row) * p.k + first + chunk * 8;
  const uint32_t to = shared_address(stage) + place(row, chunk);
  const bool inside = first + chunk * 8 < p.k;
  constexpr int kStep = kThreads / kChunks;  // a multiple of the swizzle's period
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const bool valid = inside && row0 + row + i * kStep < p.n;
    copy_async(to + i * kStep * kChunks * 16, valid ? from + i * kStep * p.k : w, valid);
  }
  S::A::template load<kThreads>(reinterpret_cast<P*>(stage + kWBytes), static_cast<const P*>(p.a), first, p.k, p.r, true);
}

template <typename W, typename P, int kSteps>
__global__ void __launch_bounds__(kThreads, kBlocks) row_norm_gram_kernel(const Args p) {
  using S = Shape<W, P, kSteps>;
  using A = typename S::A;
  using Share = typename S::Share;
  extern __shared__ __align__(128) char smem[];
  __shared__ uint4 parts[2][A::kParts][32], low_parts[2][A::kLowParts][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp * 32;
  const int64_t row0 = int64_t{blockIdx.x} * kRows;
  const int first = blockIdx.y, stride = gridDim.y, count = (p.tiles - first + stride - 1) / stride;
  const auto load = [&](int i) {
    if (i < count)
      load_tile<P, S>(smem + i % S::kStages * S::kStageBytes, p, row0, (first + int64_t{i} * stride) * kCols);
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  };
  const auto make_parts = [&](int i) {
    const char* a = smem + i % S::kStages * S::kStageBytes + kWBytes;
    A::template make_parts<kWarps>(parts[i % 2], low_parts[i % 2], reinterpret_cast<const P*>(a));
  };

  // Of 16 rows twice: |w|² of rows lane / 4 and 8 more, W Aᵀ by 8 ranks; a share of A Aᵀ.
  float squares[2][2] = {}, cross[2][2 * kSteps][4] = {}, gram[Share::kGrams][2][4] = {};
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) load(i);
  asm volatile("cp.async.wait_group %0;\n" ::"n"(S::kStages - 2) : "memory");
  __syncthreads();
  make_parts(0);
  for (int tile = 0; tile < count; ++tile) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(S::kStages - 3) : "memory");
    __syncthreads();  // the next tile and the fragments of this one are there, the one before is done with
    load(tile + S::kStages - 1);
    if (tile + 1 < count) make_parts(tile + 1);
    const uint32_t w_tile = shared_address(smem + tile % S::kStages * S::kStageBytes);
#pragma unroll
    for (int slab = 0; slab < A::kSlabs; ++slab) {
      const uint4(*high)[32] = parts[tile % 2] + slab * kSteps;
      const uint4(*low)[32] = low_parts[tile % 2] + (S::kSplit ? slab * kSteps : 0);
      uint32_t w[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices<false>(w[i], w_tile + place(warp_row + 16 * i + lane % 16, 2 * slab + lane / 16));
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
        if constexpr (S::kSplit) add(low[step][lane]);
        add(high[step][lane]);
      }
      if (blockIdx.x > 0 || slab % Share::kCopies != Share::copy(warp)) continue;
#pragma unroll
      for (int i = 0; i < Share::kGrams; ++i)
        add_gram<W, S::kSplit>(gram[i], high, low, Share::row_step(warp, i), Share::col_step(warp, i));
    }
  }

  if (blockIdx.x == 0) {
    float* grams = p.grams + (Share::copy(warp) * gridDim.y + blockIdx.y) * S::kGramSize;
#pragma unroll
    for (int i = 0; i < Share::kGrams; ++i)
      store_gram<A::kRanks>(grams, gram[i], Share::row_step(warp, i), Share::col_step(warp, i));
  }
  const P* b = static_cast<const P*>(p.b);
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
          dot = fmaf(static_cast<float>(b[(row0 + at) * p.r + rank]), cross[i][j / 2][2 * half + j % 2], dot);
      }
      float sum = fmaf(2.0f * p.scaling, dot, squares[i][half]);
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane % 4 == 0 && row0 + at < p.n) p.partial[int64_t{blockIdx.y} * p.n + row0 + at] = sum;
    }
}

template <typename W, typename P, int kSteps>
void run(Args p, const Tensor& norm, int multiprocessors, cudaStream_t stream) {
  using S = Shape<W, P, kSteps>;
  const auto kernel = row_norm_gram_kernel<W, P, kSteps>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  p.tiles = static_cast<int>((p.k + kCols - 1) / kCols);
  const auto rows = static_cast<unsigned>((p.n + kRows - 1) / kRows);
  const int splits = std::clamp(kBlocks * multiprocessors / static_cast<int>(rows), 1, p.tiles);
  const int64_t copies = S::Share::kCopies * splits;
  const Tensor buffer = empty(norm, {copies * S::kGramSize + splits * p.n}, ScalarType::Float);
  p.grams = static_cast<float*>(buffer.mutable_data_ptr());
  p.partial = p.grams + copies * S::kGramSize;
  kernel<<<dim3(rows, splits), kThreads, S::kBytes, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  norm_finish_kernel<P, S::A::kRanks><<<static_cast<unsigned>((p.n + kFinishThreads - 1) / kFinishThreads),
                                        kFinishThreads, 0, stream>>>(
      static_cast<float*>(norm.mutable_data_ptr()), p.partial, p.grams, static_cast<const P*>(p.b), p.scaling, p.n,
      p.r, splits, static_cast<int>(copies));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename W, typename P>
void run_rank(const Args& p, const Tensor& norm, int multiprocessors, cudaStream_t stream) {
  (p.r <= 32 ? run<W, P, 2> : run<W, P, 4>)(p, norm, multiprocessors, stream);
}

bool aligned(const Tensor& t) {
  return t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

}  // namespace

bool row_norm_gram_fits(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b) {
  const auto dtype = weight.scalar_type(), adapter = lora_a.scalar_type();
  // A float32 A beside a float16 W could leave that type's range.
  const bool taken = dtype == ScalarType::BFloat16 ? adapter == dtype || adapter == ScalarType::Float
                                                   : dtype == ScalarType::Half && adapter == dtype;
  return taken && lora_b.scalar_type() == adapter && lora_a.size(0) >= 1 && lora_a.size(0) <= kLargestRank &&
         weight.size(0) > 0 && weight.size(1) > 0 && weight.size(1) % 8 == 0 && aligned(weight) && aligned(lora_a) &&
         lora_b.is_contiguous();
}

Tensor row_norm_gram(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling) {
  Args p{};
  p.w = weight.const_data_ptr(), p.a = lora_a.const_data_ptr(), p.b = lora_b.const_data_ptr();
  p.scaling = static_cast<float>(scaling);
  p.n = weight.size(0), p.k = weight.size(1), p.r = static_cast<int>(lora_a.size(0));
  const Tensor norm = empty(weight, {p.n}, ScalarType::Float);
  int multiprocessors = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, weight.get_device_index()));
  const bool wide = lora_a.scalar_type() == ScalarType::Float;
  (weight.scalar_type() == ScalarType::Half ? run_rank<__half, __half>
   : wide                                   ? run_rank<__nv_bfloat16, float>
                                            : run_rank<__nv_bfloat16, __nv_bfloat16>)(
      p, norm, multiprocessors, stream_of(weight));
  return norm;
}

}  // namespace lora_fused
