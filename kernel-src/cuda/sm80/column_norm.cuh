// The tensor-core kernel of column_norm: one pass over W, its sums as norm_expansion.cuh has them.
//
// A block owns kCols columns, a warp an eighth of them, and walks through every gridDim.y-th tile of
// kRows rows. W and A reach shared memory by cp.async in a ring of kStages tiles. A float32 A enters as hi and lo
// where kSplitA, for small vocabularies; over a large one its rounding averages out.
#pragma once

#include "norm_expansion.cuh"

namespace lora_fused {
namespace column_norm {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// kSteps: blocks of 16 ranks. Rows and stages are as many as fit 99 KiB, all that small GPUs have.
template <typename W, typename P, int kSteps, bool kSplit>
struct Shape {
  static constexpr bool kSplitA = kSplit;
  static constexpr int kTiles = 4, kCols = kWarps * kTiles * 8;  // of 8 columns, of a warp
  static constexpr int kRows = kSteps <= 2 ? 64 : 32, kStages = kSteps <= 2 ? 2 : 3;
  using A = AdapterTile<W, P, kSteps, kRows, kSplit>;
  using Share = GramShare<kSteps, kWarps>;
  static constexpr int kWBytes = kRows * kCols * 2, kStageBytes = kWBytes + A::kBytes;
  static constexpr int kBytes = kStages * kStageBytes, kGramSize = A::kRanks * A::kRanks;
  static_assert(kBytes >= Share::kCopies * kGramSize * 4, "A Aᵀ takes the ring's place");
};

struct Args {
  float *partial, *grams;  // [gridDim.y, h] and [gridDim.y, r, r], r in whole blocks of 16
  const void *w, *a, *b;   // [v, h], [r, v], [h, r]
  float scaling;
  int64_t v;
  int h, r, tiles;
  bool a_vector;  // rows of A are 16-byte aligned
};

// Rows first .. first + kRows of W's columns col0 .. and of A, into one stage.
template <typename P, typename S>
__device__ __forceinline__ void load_tile(char* stage, const Args& p, int64_t first, int col0) {
  constexpr int kChunks = S::kCols / 8, kStep = kThreads / kChunks;  // a multiple of the swizzle's period
  const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks, col = col0 + chunk * 8;
  const auto* w = static_cast<const uint16_t*>(p.w);
  const uint16_t* from = w + (first + row) * p.h + col;
  const uint32_t to = shared_address(stage) + (row * kChunks + (chunk ^ (row & 7))) * 16;
  const int rows = col < p.h ? static_cast<int>(min(p.v - first, int64_t{S::kRows})) - row : 0;
#pragma unroll
  for (int i = 0; i < S::kRows / kStep; ++i) {
    const bool valid = i * kStep < rows;
    copy_async(to + i * kStep * kChunks * 16, valid ? from : w, valid);
    from += int64_t{kStep} * p.h;
  }
  S::A::template load<kThreads>(reinterpret_cast<P*>(stage + S::kWBytes), static_cast<const P*>(p.a), first, p.v, p.r,
                                p.a_vector);
}

// What a warp sums: |w|² of column lane / 4 of each tile, A w as [16, 8] products, a share of A Aᵀ.
template <typename S>
struct Sums {
  static constexpr int kSteps = S::A::kRanks / 16;
  float squares[S::kTiles] = {}, cross[S::kTiles][kSteps][4] = {}, gram[S::Share::kGrams][2][4] = {};
};

// Adds 16 rows of a tile. `fragments` and `lo_fragments` hold A's fragments at those rows.
template <typename W, typename S>
__device__ __forceinline__ void add_slab(Sums<S>& sums, uint32_t w_tile, int slab, const uint4 (*fragments)[32],
                                         const uint4 (*lo_fragments)[32]) {
  using Share = typename S::Share;
  constexpr int kSteps = Sums<S>::kSteps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t a[kSteps][4], a_low[S::kSplitA ? kSteps : 1][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    *reinterpret_cast<uint4*>(a[step]) = fragments[step][lane];
    if constexpr (S::kSplitA) *reinterpret_cast<uint4*>(a_low[step]) = lo_fragments[step][lane];
  }
#pragma unroll
  for (int two = 0; two < S::kTiles; two += 2) {
    const int row = slab * 16 + lane % 16, chunk = warp * S::kTiles + two + lane / 16;
    uint32_t bits[4];  // rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
    load_matrices<true>(bits, w_tile + (row * (S::kCols / 8) + (chunk ^ (row & 7))) * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t b0 = bits[2 * i], b1 = bits[2 * i + 1];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if constexpr (S::kSplitA) multiply<W>(sums.cross[two + i][step], a_low[step], b0, b1);
        multiply<W>(sums.cross[two + i][step], a[step], b0, b1);
      }
      sums.squares[two + i] = add_square(add_square(sums.squares[two + i], pair(b0, W())), pair(b1, W()));
    }
  }
  if (blockIdx.x > 0 || slab % Share::kCopies != Share::copy(warp)) return;
#pragma unroll
  for (int i = 0; i < Share::kGrams; ++i)
    add_gram<W, S::kSplitA>(sums.gram[i], fragments, lo_fragments, Share::row_step(warp, i), Share::col_step(warp, i));
}

template <typename W, typename P, typename S, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) column_norm_fwd_kernel(const Args p) {
#if __CUDA_ARCH__ >= 800
  using A = typename S::A;
  constexpr int kSteps = Sums<S>::kSteps;
  extern __shared__ __align__(128) char smem[];
  __shared__ float squares_of[S::kCols], cross_of[S::kCols];
  __shared__ uint4 fragments[A::kFragments][32], lo_fragments[A::kLoFragments][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, col0 = blockIdx.x * S::kCols;
  const int stride = gridDim.y;
  int next = blockIdx.y;
  const auto load = [&](int stage) {
    if (next < p.tiles) load_tile<P, S>(smem + stage * S::kStageBytes, p, int64_t{next} * S::kRows, col0);
    next += stride;
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  };

  Sums<S> sums;
#pragma unroll
  for (int stage = 0; stage < S::kStages - 1; ++stage) load(stage);
  int slot = 0;
  for (int tile = blockIdx.y; tile < p.tiles; tile += stride) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(S::kStages - 2) : "memory");
    __syncthreads();
    load(slot == 0 ? S::kStages - 1 : slot - 1);
    const char* stage = smem + slot * S::kStageBytes;
    slot = slot + 1 == S::kStages ? 0 : slot + 1;
    A::template make_fragments<kWarps>(fragments, lo_fragments, reinterpret_cast<const P*>(stage + S::kWBytes));
    __syncthreads();
#pragma unroll 2  // all of them take more registers than there are
    for (int slab = 0; slab < A::kSlabs; ++slab)
      add_slab<W, S>(sums, shared_address(stage), slab, fragments + slab * kSteps,
                     lo_fragments + (S::kSplitA ? slab * kSteps : 0));
  }
  asm volatile("cp.async.wait_group 0;\n" ::: "memory");
  __syncthreads();
  if (blockIdx.x == 0)
    write_gram<A::kRanks, typename S::Share, kThreads>(p.grams + blockIdx.y * S::kGramSize,
                                                       reinterpret_cast<float*>(smem), sums.gram);

  const P* b = static_cast<const P*>(p.b);
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile) {
    const int tile_col = (warp * S::kTiles + tile) * 8;
    float square = sums.squares[tile];
    for (int offset = 1; offset < 4; offset *= 2) square += __shfl_xor_sync(0xffffffffu, square, offset);
    if (lane % 4 == 0) squares_of[tile_col + lane / 4] = square;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = tile_col + lane % 4 * 2 + i, col = col0 + at;
      float cross = 0.0f;
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int rank = step * 16 + half * 8 + lane / 4;
          if (col < p.h && rank < p.r)
            cross = fmaf(static_cast<float>(b[int64_t{col} * p.r + rank]), sums.cross[tile][step][2 * half + i], cross);
        }
      for (int offset = 4; offset < 32; offset *= 2) cross += __shfl_xor_sync(0xffffffffu, cross, offset);
      if (lane < 4) cross_of[at] = cross;
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < S::kCols && col0 + at < p.h; at += kThreads)
    p.partial[int64_t{blockIdx.y} * p.h + col0 + at] = fmaf(2.0f * p.scaling, cross_of[at], squares_of[at]);
#endif
}

}  // namespace column_norm
}  // namespace lora_fused
