// Products of activations with an adapter's rank on CUDA, those of a whole group in one launch each:
//
//   shrink   t = s·D(x) Aᵀ      adapter_grad   dA = dtᵀ D(x), dB = dy'ᵀ t      dropped_expand_add   dx += Σ D(dt A)
//
// with D(x) = mask ∘ x / (1 - p), the scale applied to the sum, or x. Fused: the mask is drawn in
// registers (Philox, see common/dropout.h), D(x) is never written, gradients are written in their own
// dtype and layout. Bound by one read of x and, with a mask, by its integer arithmetic, some ten
// operations an element. Tensor cores (mma.sync), float32 sums; every sum has one owner, so results
// are deterministic.
//
// x [M, C], A [R, C], t and dt [M, R], dA [R, C], dB [C, R]; one half-precision dtype, gradients in it or in float32.
// Rows are contiguous, of a multiple of eight elements, and start on 16 bytes, so that every access is whole. A group's
// entries share M, and each has a row of the grid.
#pragma once

#include <cstdint>

#include "../common/vector_access.cuh"
#include "../common/dropout_mask.cuh"
#include "mma.cuh"

namespace lora_fused::skinny {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kEntries = 16;  // of one launch

template <typename T>
struct Entry {
  const T *x, *a, *t;  // [M, C], [R, C], [M, R]; expand: a and t
  void* out;           // shrink: t in T; adapter_grad: [R, C] or [C, R]
  int64_t x_stride, a_stride, t_stride, cols;
  int ranks;
  bool out_is_float, transposed;
  float scaling;  // of the product, 1 / (1 - p) in it
  Mask mask;
};

template <typename T>
struct Arguments {
  Entry<T> entry[kEntries];
  T* dx;
  int64_t rows;
  int entries;
};

// Eight columns of a row, or zeros where the mask drops them.
template <typename T>
__device__ __forceinline__ Columns<T> masked(Columns<T> x, uint64_t key, const Mask& mask, int64_t row, int64_t col) {
  if (mask.seed == nullptr) return x;
  const uint4 kept = lora_fused::masked(*reinterpret_cast<const uint4*>(&x), key, mask, row,
                                        static_cast<uint32_t>(col / kMaskColumns));
  return *reinterpret_cast<const Columns<T>*>(&kept);
}

// Eight columns from base + offset, zeros where !valid. No branch: loads would wait for each other.
template <typename T>
__device__ __forceinline__ Columns<T> load_if(const T* base, int64_t offset, bool valid) {
  uint4 bits = *reinterpret_cast<const uint4*>(base + (valid ? offset : 0));
  if (!valid) bits = uint4{0, 0, 0, 0};
  return *reinterpret_cast<const Columns<T>*>(&bits);
}

__device__ __forceinline__ const uint32_t* bits(const void* p) { return static_cast<const uint32_t*>(p); }

// t for 16 tokens and up to 8·kTiles ranks of one entry. The warps take turns at blocks of 32 columns;
// a lane loads eight neighbouring columns of x and of A, which only permutes the sum's order.
template <typename T, int kTiles, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kWarps > 8   ? 1
                                               : kTiles > 4 ? 2
                                                            : 3)
    shrink_fwd_kernel(const __grid_constant__ Arguments<T> args) {
#if __CUDA_ARCH__ >= 800
  __shared__ float shared[kWarps][16][8 * kTiles];
  const Entry<T>& e = args.entry[blockIdx.y];
  const int first_rank = blockIdx.z * 8 * kTiles;
  if (first_rank >= e.ranks) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 16 + g;
  const uint64_t key = e.mask.key();
  const int64_t x_row = row * e.x_stride;
  float acc[kTiles][4] = {};
#pragma unroll 2
  for (int64_t col = 32 * warp + 8 * q; col - 8 * q < e.cols; col += 32 * kWarps) {
    const bool inside = col < e.cols;
    Columns<T> top = load_if(e.x, x_row + col, inside && row < args.rows);
    Columns<T> bottom = load_if(e.x, x_row + 8 * e.x_stride + col, inside && row + 8 < args.rows);
    Columns<T> a[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int rank = first_rank + 8 * i + g;
      a[i] = load_if(e.a, rank * e.a_stride + col, inside && rank < e.ranks);
    }
    top = masked(top, key, e.mask, row, col);
    bottom = masked(bottom, key, e.mask, row + 8, col);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t left[4] = {bits(&top)[2 * step], bits(&bottom)[2 * step], bits(&top)[2 * step + 1],
                                bits(&bottom)[2 * step + 1]};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) multiply<T>(acc[i], left, bits(&a[i])[2 * step], bits(&a[i])[2 * step + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int rank = 8 * i + 2 * q;
    *reinterpret_cast<float2*>(&shared[warp][g][rank]) = {acc[i][0], acc[i][1]};
    *reinterpret_cast<float2*>(&shared[warp][g + 8][rank]) = {acc[i][2], acc[i][3]};
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * 8 * kTiles; i += 32 * kWarps) {
    const int token = i / (8 * kTiles), rank = i % (8 * kTiles);
    const int64_t at = static_cast<int64_t>(blockIdx.x) * 16 + token;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared[w][token][rank];
    if (at < args.rows && first_rank + rank < e.ranks)
      static_cast<T*>(e.out)[at * e.t_stride + first_rank + rank] = narrow<T, float>(total * e.scaling);
  }
#endif
}

constexpr int kGradCols = 32, kGradRanks = 32, kGradRows = 32;  // of a block; of a warp's step
constexpr int kGradPitch = kGradCols + 8;                       // elements of a row in shared memory: no bank conflicts

// 32 ranks by 32 columns of one entry. The warps take turns at 32 tokens, each with a stage of its own
// in shared memory, from which ldmatrix transposes both operands.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3) adapter_grad_bwd_kernel(const __grid_constant__ Arguments<T> args) {
#if __CUDA_ARCH__ >= 800
  union Shared {
    T stage[kWarps][2][kGradRows][kGradPitch];
    float sums[kWarps][kGradRanks][kGradCols + 1];
  };
  __shared__ __align__(16) Shared shared;
  const Entry<T>& e = args.entry[blockIdx.y];
  const int first_rank = blockIdx.z * kGradRanks;
  const int64_t first_col = static_cast<int64_t>(blockIdx.x) * kGradCols;
  if (first_rank >= e.ranks || first_col >= e.cols) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint64_t key = e.mask.key();
  T(*const xs)[kGradPitch] = shared.stage[warp][0];
  T(*const ts)[kGradPitch] = shared.stage[warp][1];
  // A row's 32 elements are four pieces: lane / 4 is the first of four rows eight apart.
  const int piece = 8 * (lane % 4), first_row = lane / 4;
  const int64_t col = first_col + piece;
  const bool col_inside = col < e.cols, rank_inside = first_rank + piece < e.ranks;
  float acc[2][4][4] = {};
  Columns<T> x[4], t[4];
  const auto fetch = [&](int64_t start) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = start + first_row + 8 * i;
      x[i] = load_if(e.x, row * e.x_stride + col, row < args.rows && col_inside);
      t[i] = load_if(e.t, row * e.t_stride + first_rank + piece, row < args.rows && rank_inside);
    }
  };
  int64_t start = kGradRows * warp;
  fetch(start);
  for (; start < args.rows; start += kGradRows * kWarps) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 8 * i;
      *reinterpret_cast<Columns<T>*>(&xs[row][piece]) = masked(x[i], key, e.mask, start + row, col);
      *reinterpret_cast<Columns<T>*>(&ts[row][piece]) = t[i];
    }
    __syncwarp();
    fetch(start + kGradRows * kWarps);
#pragma unroll
    for (int step = 0; step < kGradRows; step += 16) {
      // Matrices of eight tokens by eight ranks or columns, in the order of the fragments' registers.
      uint32_t left[2][4], right[2][4];
      const int token = step + lane % 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices<true>(left[i], shared_address(&ts[token + 8 * (lane / 16)][16 * i + 8 * (lane / 8 % 2)]));
        load_matrices<true>(right[i], shared_address(&xs[token + 8 * (lane / 8 % 2)][16 * i + 8 * (lane / 16)]));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          multiply<T>(acc[i][j], left[i], right[j / 2][2 * (j % 2)], right[j / 2][2 * (j % 2) + 1]);
    }
    __syncwarp();
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int rank = 16 * i + lane / 4, at = 8 * j + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < 4; ++n) shared.sums[warp][rank + n / 2 * 8][at + n % 2] = acc[i][j][n];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < kGradRanks * kGradCols; i += kThreads) {
    // Neighbouring threads write neighbouring elements.
    const int rank = e.transposed ? i % kGradRanks : i / kGradCols;
    const int at = e.transposed ? i / kGradRanks : i % kGradCols;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared.sums[w][rank][at];
    total *= e.scaling;
    if (first_rank + rank >= e.ranks || first_col + at >= e.cols) continue;
    const int64_t place =
        e.transposed ? (first_col + at) * e.ranks + first_rank + rank : (first_rank + rank) * e.cols + first_col + at;
    if (e.out_is_float)
      static_cast<float*>(e.out)[place] = total;
    else
      static_cast<T*>(e.out)[place] = narrow<T, float>(total);
  }
#endif
}

constexpr int kExpandRows = 64, kExpandCols = 64, kExpandPitch = kExpandCols + 8,
              kExpandTiles = 4;    // rows and columns; tiles of a block
constexpr int kExpandRanks = 640;  // of all entries of a launch, each rounded up to 32: rows of A in shared memory

__host__ __device__ constexpr int padded_ranks(int ranks) { return (ranks + 31) / 32 * 32; }

// dx [64, 64] += all entries' terms, for every gridDim.y-th 64 rows; a warp has 16 rows by 32 columns. A's columns
// are stored so that the four tiles of eight give a lane eight neighbouring columns, one Philox block.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    dropped_expand_add_bwd_kernel(const __grid_constant__ Arguments<T> args) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) uint8_t storage[];
  T(*const as)[kExpandPitch] = reinterpret_cast<T(*)[kExpandPitch]>(storage);
  __shared__ uint64_t keys[kEntries];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int64_t first_col = static_cast<int64_t>(blockIdx.x) * kExpandCols, cols = args.entry[0].cols;
  const int warp_col = warp % 2 * 32;
  const int64_t col = first_col + warp_col + 8 * q;
  if (threadIdx.x < args.entries) keys[threadIdx.x] = args.entry[threadIdx.x].mask.key();
  for (int n = 0, above = 0; n < args.entries; above += padded_ranks(args.entry[n].ranks), ++n) {
    const Entry<T>& e = args.entry[n];
    for (int i = threadIdx.x; i < padded_ranks(e.ranks) * (kExpandCols / 8); i += kThreads) {
      const int rank = i / (kExpandCols / 8), piece = 8 * (i % (kExpandCols / 8));
      const Columns<T> a =
          load_if(e.a, rank * e.a_stride + first_col + piece, rank < e.ranks && first_col + piece < cols);
      // Columns 8u + 2v + {0, 1} of 32 go to place 8v + 2u.
      const int base = piece / 32 * 32 + piece % 32 / 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) *reinterpret_cast<uint32_t*>(&as[above + rank][base + 8 * j]) = bits(&a)[j];
    }
  }
  __syncthreads();
  for (int64_t tile = blockIdx.y; tile * kExpandRows < args.rows; tile += gridDim.y) {
    const int64_t row = tile * kExpandRows + warp / 2 * 16 + g;
    const bool inside[2] = {row < args.rows && col < cols, row + 8 < args.rows && col < cols};
    Columns<T> dx[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) dx[half] = load_if(args.dx, (row + 8 * half) * cols + col, inside[half]);
    float total[2][kColumns] = {};
    for (int n = 0, above = 0; n < args.entries; ++n) {
      const Entry<T>& e = args.entry[n];
      float acc[4][4] = {};
      for (int first_rank = 0; first_rank < e.ranks; first_rank += 32, above += 32) {
        // A lane's eight neighbouring ranks are those of its two steps: rows of A are read to match.
        const int rank = first_rank + 8 * q;
        const Columns<T> top = load_if(e.t, row * e.t_stride + rank, row < args.rows && rank < e.ranks);
        const Columns<T> bottom = load_if(e.t, (row + 8) * e.t_stride + rank, row + 8 < args.rows && rank < e.ranks);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint32_t left[4] = {bits(&top)[2 * step], bits(&bottom)[2 * step], bits(&top)[2 * step + 1],
                                    bits(&bottom)[2 * step + 1]};
          const int in_tile = lane % 8, second = lane / 8 % 2;
          const int from = above + 8 * (in_tile / 2) + in_tile % 2 + 2 * second + 4 * step;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t right[4];
            load_matrices<true>(right, shared_address(&as[from][warp_col + 16 * i + 8 * (lane / 16)]));
            multiply<T>(acc[2 * i], left, right[0], right[1]);
            multiply<T>(acc[2 * i + 1], left, right[2], right[3]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Words words = philox(keys[n], row + 8 * half, static_cast<uint32_t>(col / kMaskColumns));
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const uint32_t word = words.word[j / 2];
          const bool keeps = j % 2 == 0 ? e.mask.keeps_low(word) : e.mask.keeps_high(word);
          const float sum = fmaf(acc[j / 2][2 * half + j % 2], e.scaling, total[half][j]);
          total[half][j] = keeps ? sum : total[half][j];
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!inside[half]) continue;
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        dx[half].value[j] = narrow<T, float>(widen(dx[half].value[j]) + total[half][j]);
      store(args.dx + (row + 8 * half) * cols + col, dx[half]);
    }
  }
#endif
}

}  // namespace lora_fused::skinny
