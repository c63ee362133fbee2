// The column norm without B·A: ‖w + s·Aᵀb‖² = |w|² + 2s b·(A w) + s² b·(A Aᵀ) b.
//
// w is a column of W [V, H], b its row of B. A block sums A w over its share of the vocabulary on tensor cores and
// applies B once, at its end, in float32; one block of each share sums A Aᵀ; a last kernel puts them together. So
// one product of A and W serves for a B of any dtype. A float32 A is rounded to W's type, where kSplitA as hi
// and lo. The terms cancel where s·b·A nearly takes w away: an error of 1e-7 of |w|², not of the result.
#pragma once

#include "../../common/mag_norm_scale.h"
#include "embedding_common.cuh"
#include "mma.cuh"

namespace lora_fused {

// A tile of A in shared memory, [kRanks, kWidth] with lines so long that reading fragments meets no bank
// conflict, and its fragments, made once for all warps: fragments[slab * kSteps + step] is that of 16
// ranks and 16 of the width, as a left operand; {x, z} and {y, w} are right operands of 8 ranks each.
template <typename W, typename P, int kSteps, int kTileWidth, bool kSplitA>
struct AdapterTile {
  static constexpr int kRanks = 16 * kSteps, kWidth = kTileWidth, kSlabs = kWidth / 16, kLine = kWidth + 8;
  static constexpr int kBytes = kRanks * kLine * static_cast<int>(sizeof(P));
  static constexpr int kFragments = kSlabs * kSteps, kLoFragments = kSplitA ? kFragments : 1;

  // Columns first .. of A [r, count]; `vector`: its rows are 16-byte aligned.
  template <int kThreads>
  static __device__ __forceinline__ void load(P* tile, const P* a, int64_t first, int64_t count, int r, bool vector) {
    constexpr int kPer = 16 / sizeof(P), kChunks = kWidth / kPer;  // of a rank
    if (vector) {
#pragma unroll
      for (int i = threadIdx.x; i < kRanks * kChunks; i += kThreads) {
        const int rank = i / kChunks, at = i % kChunks * kPer;
        const bool valid = rank < r && first + at < count;
        copy_async(shared_address(tile + rank * kLine + at), valid ? a + rank * count + first + at : a, valid);
      }
      return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < kRanks * kWidth; i += kThreads) {
      const int rank = i / kWidth, at = i % kWidth;
      const bool valid = rank < r && first + at < count;
      tile[rank * kLine + at] = valid ? a[rank * count + first + at] : P(0.0f);
    }
  }

  template <int kWarps>
  static __device__ __forceinline__ void make_fragments(uint4 (*fragments)[32], uint4 (*lo_fragments)[32],
                                                        const P* tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = threadIdx.x / 32; i < kFragments; i += kWarps) {
      uint32_t hi[4], lo[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int rank = i % kSteps * 16 + q % 2 * 8 + lane / 4, at = i / kSteps * 16 + q / 2 * 8 + lane % 4 * 2;
        const P* from = tile + rank * kLine + at;
        if constexpr (std::is_same_v<W, P>) {
          hi[q] = *reinterpret_cast<const uint32_t*>(from);
        } else {
          const float x = static_cast<float>(from[0]), y = static_cast<float>(from[1]);
          hi[q] = pack(W(x), W(y));
          const float2 rounded = pair(hi[q], W());
          lo[q] = pack(W(x - rounded.x), W(y - rounded.y));
        }
      }
      fragments[i][lane] = uint4{hi[0], hi[1], hi[2], hi[3]};
      if constexpr (kSplitA) lo_fragments[i][lane] = uint4{lo[0], lo[1], lo[2], lo[3]};
    }
  }
};

// How kWarps warps share A Aᵀ in blocks of 16 by 16 ranks: a warp has kGrams of them, at every kCopies-th slab.
template <int kSteps, int kWarps>
struct GramShare {
  static constexpr int kPairs = kSteps * kSteps, kGrams = kPairs > kWarps ? kPairs / kWarps : 1;
  static constexpr int kCopies = kWarps * kGrams / kPairs;
  static __device__ __forceinline__ int copy(int warp) { return warp * kGrams / kPairs; }
  static __device__ __forceinline__ int row_step(int warp, int i) { return (warp * kGrams + i) % kPairs / kSteps; }
  static __device__ __forceinline__ int col_step(int warp, int i) { return (warp * kGrams + i) % kSteps; }
};

// sum += left · rightᵀ, both fragments of A: 16 ranks by two times 8.
template <typename W>
__device__ __forceinline__ void add_gram(float (&sum)[2][4], const uint4& left, const uint4& right) {
  const uint32_t a[4] = {left.x, left.y, left.z, left.w};
  multiply<W>(sum[0], a, right.x, right.z);
  multiply<W>(sum[1], a, right.y, right.w);
}

// What is left and what is right of a block of A Aᵀ, hi alone or hi and lo.
template <typename W, bool kSplitA>
__device__ __forceinline__ void add_gram(float (&sum)[2][4], const uint4 (*fragments)[32],
                                         const uint4 (*lo_fragments)[32], int left, int right) {
  const int lane = threadIdx.x % 32;
  add_gram<W>(sum, fragments[left][lane], fragments[right][lane]);
  if constexpr (kSplitA) {
    add_gram<W>(sum, fragments[left][lane], lo_fragments[right][lane]);
    add_gram<W>(sum, lo_fragments[left][lane], fragments[right][lane]);
    add_gram<W>(sum, lo_fragments[left][lane], lo_fragments[right][lane]);
  }
}

// The block of 16 by 16 ranks at (row_step, col_step) to gram [kRanks, kRanks].
template <int kRanks>
__device__ __forceinline__ void store_gram(float* gram, const float (&sum)[2][4], int row_step, int col_step) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int q = 0; q < 8; ++q) {
    const int row = row_step * 16 + q % 4 / 2 * 8 + lane / 4, col = col_step * 16 + q / 4 * 8 + lane % 4 * 2 + q % 2;
    gram[row * kRanks + col] = sum[q / 4][q % 4];
  }
}

// A block's A Aᵀ, the sum of its warps' shares, to gram [kRanks, kRanks]; `scratch` is shared memory that nothing
// reads any more.
template <int kRanks, typename Share, int kThreads>
__device__ __forceinline__ void write_gram(float* gram, float* scratch, const float (&sums)[Share::kGrams][2][4]) {
  constexpr int kSize = kRanks * kRanks;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < Share::kGrams; ++i)
    store_gram<kRanks>(scratch + Share::copy(warp) * kSize, sums[i], Share::row_step(warp, i),
                       Share::col_step(warp, i));
  __syncthreads();
  for (int i = threadIdx.x; i < kSize; i += kThreads) {
    float total = 0.0f;
#pragma unroll
    for (int copy = 0; copy < Share::kCopies; ++copy) total += scratch[copy * kSize + i];
    gram[i] = total;
  }
}

constexpr int kFinishThreads = 256;

// DoRA's magnitude [n] and where magnitude / norm goes; null for the norm alone.
struct MagNormScaleOut {
  embedding::Array magnitude;
  float* mag_norm_scale;
  float unit;  // of mag_norm_scale_of
};

// norm[i] = √(Σ over splits of partial[split, i] + s² b·G b), G the sum of `grams` [splits, kRanks, kRanks], b row i
// of B [n, r]. Everything is added in a fixed order. Rounding may leave a sum below zero; NaN stays. And mag_norm_scale
// = magnitude / norm, see common/mag_norm_scale.h.
template <typename P, int kRanks>
__global__ void __launch_bounds__(kFinishThreads)
    norm_finish_kernel(float* __restrict__ norm, const float* __restrict__ partial, const float* __restrict__ grams,
                       const P* __restrict__ b, float scaling, int64_t n, int r, int splits,
                       MagNormScaleOut scale_out) {
  __shared__ float4 gram[kRanks][kRanks / 4];
  constexpr int kPieces = kRanks * kRanks / 4;
  for (int i = threadIdx.x; i < kPieces; i += kFinishThreads) {
    float4 sum{};
#pragma unroll 8
    for (int split = 0; split < splits; ++split) {
      const float4 x = reinterpret_cast<const float4*>(grams)[split * kPieces + i];
      sum = float4{sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
    }
    gram[i / (kRanks / 4)][i % (kRanks / 4)] = sum;
  }
  __syncthreads();
  const int64_t at = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (at >= n) return;
  float of[kRanks], total = 0.0f, form = 0.0f;
#pragma unroll
  for (int rank = 0; rank < kRanks; ++rank) of[rank] = rank < r ? static_cast<float>(b[at * r + rank]) : 0.0f;
#pragma unroll
  for (int row = 0; row < kRanks; ++row) {
    float4 dot{};  // four sums: each would wait for itself
#pragma unroll
    for (int i = 0; i < kRanks / 4; ++i) {
      const float4 x = gram[row][i];
      dot.x = fmaf(x.x, of[4 * i], dot.x), dot.y = fmaf(x.y, of[4 * i + 1], dot.y);
      dot.z = fmaf(x.z, of[4 * i + 2], dot.z), dot.w = fmaf(x.w, of[4 * i + 3], dot.w);
    }
    form = fmaf(of[row], (dot.x + dot.y) + (dot.z + dot.w), form);
  }
#pragma unroll 8
  for (int split = 0; split < splits; ++split) total += partial[split * n + at];
  total = fmaf(scaling * scaling, form, total);
  norm[at] = sqrtf(total < 0.0f ? 0.0f : total);
  if (scale_out.mag_norm_scale != nullptr)
    scale_out.mag_norm_scale[at] =
        mag_norm_scale_of(embedding::load(scale_out.magnitude, at), norm[at], scale_out.unit);
}

__device__ __forceinline__ float add_square(float sum, float2 x) { return fmaf(x.x, x.x, fmaf(x.y, x.y, sum)); }

}  // namespace lora_fused
