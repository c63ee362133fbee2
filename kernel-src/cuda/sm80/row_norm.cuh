// The tensor-core kernel of row_norm: one pass over W, B·A only in accumulators.
//
// A block of 2×2 warps walks a contiguous range of 128×128 tiles, along K first. For each tile
// it multiplies B [128, ranks] by A [ranks, 128] in steps of 32 ranks (mma.sync, fp32
// accumulators, 64×64 a warp), then adds the W tile and sums squares by row. All three reach
// shared memory by cp.async: A in a ring of `stages` steps, W in `w_buffers` tiles, B once per
// row block where it fits and step by step beside A where not. Shared memory is swizzled in
// 16-byte chunks so that ldmatrix meets no bank conflict. Threads keep running pointers: index
// arithmetic at every step cost more issue slots than the products.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/dtype.cuh"
#include "mma.cuh"

namespace lora_fused {

constexpr int kRows = 128, kCols = 128;  // a tile: 2×2 warps of 64×64
constexpr int kThreads = 128;
constexpr int kRanks = 32;                  // ranks of one step
constexpr int kAChunks = kCols / 8;         // of 16 bytes in a row of A
constexpr int kAStep = kRanks * kCols * 2;  // bytes of A in one step
constexpr int kBStep = kRows * kRanks * 2;  // bytes of B in one step

constexpr int kNorms = 8;  // of one launch

struct RowNormArgs {
  float* partial;  // [blocks + row_blocks, 128]
  const void* w;   // [n, k]
  int w_dtype;
  bool w_vector;  // rows of W are 16-byte aligned
  int64_t n, k;
  // Operands of one half type, rows 16-byte aligned. Ranks of product i start at step
  // i·period; steps beyond 2·period pair the lo of A with the hi of B.
  const uint16_t* a;  // [a_rows, lda]
  const uint16_t* b;  // [n, ldb]
  int64_t a_rows, lda, ldb;
  int steps, period;
  float scaling;
  const float* row_scale;  // [n] and [whole tiles], or null for 1
  const float* col_scale;
  int64_t row_blocks, col_tiles, blocks;
  int stages, w_buffers, w_lead;  // W of a tile is asked for w_lead steps ahead of the tile
  bool b_resident;
};

__device__ __forceinline__ void wait_for_all_but(int groups) {
  if (groups == 0)
    asm volatile("cp.async.wait_group 0;\n" ::: "memory");
  else if (groups == 1)
    asm volatile("cp.async.wait_group 1;\n" ::: "memory");
  else
    asm volatile("cp.async.wait_group 2;\n" ::: "memory");
}

template <int kBytes>  // of an element; a quarter of a warp reads one 32-byte run of floats
__device__ __forceinline__ int w_swizzle(int row) {
  return kBytes == 4 ? (row & 3) * 2 : row & 7;
}

// 128×128 of W. `from` is this thread's first chunk, `rows` and `valid_cols` what of the tile
// exists from there on. A thread keeps its column and, since rows come a multiple of the
// swizzle's period apart, its swizzled chunk.
template <int kBytes>
__device__ __forceinline__ void load_w(char* to, const char* from, int64_t row_bytes, int rows, int64_t valid_cols,
                                       bool vector) {
  constexpr int kPerChunk = 16 / kBytes, kChunks = kCols / kPerChunk;
  constexpr int kRowStep = kThreads / kChunks;
  const int chunk = threadIdx.x % kChunks, row0 = threadIdx.x / kChunks;
  char* const place = to + (row0 * kChunks + (chunk ^ w_swizzle<kBytes>(row0))) * 16;
  if (vector) {
    const uint32_t address = shared_address(place);
    const int valid_rows = valid_cols > 0 ? rows : 0;
#pragma unroll 16
    for (int row = 0; row < kRows; row += kRowStep) {
      copy_async(address + row * kChunks * 16, from, row < valid_rows);
      from += kRowStep * row_bytes;
    }
    return;
  }
  using Element = std::conditional_t<kBytes == 4, uint32_t, uint16_t>;
#pragma unroll 1
  for (int row = 0; row < kRows; row += kRowStep) {
    for (int e = 0; e < kPerChunk; ++e)
      reinterpret_cast<Element*>(place + row * kChunks * 16)[e] =
          row < rows && e < valid_cols ? reinterpret_cast<const Element*>(from)[e] : 0;
    from += kRowStep * row_bytes;
  }
}

// 32 ranks × 128 columns of A, `ranks` of them there from this thread's first on.
__device__ __forceinline__ void load_a(uint32_t to, const uint16_t* from, int64_t lda, int ranks) {
#pragma unroll
  for (int row = 0; row < kRanks; row += kThreads / kAChunks) {
    copy_async(to + row * kAChunks * 16, from, row < ranks);
    from += kThreads / kAChunks * lda;
  }
}

__device__ __forceinline__ int b_step(const RowNormArgs& p, int step) {
  return step < 2 * p.period ? step : step - 2 * p.period;
}

// 32 ranks of B: 128 rows of 64 bytes.
__device__ __forceinline__ void load_b(uint32_t to, const RowNormArgs& p, int step, int64_t row0) {
  const int chunk = threadIdx.x % 4;
  const int64_t rank = step * int64_t{kRanks} + chunk * 8;
#pragma unroll
  for (int row = threadIdx.x / 4; row < kRows; row += kThreads / 4) {
    const bool valid = row0 + row < p.n && rank < p.ldb;
    copy_async(to + (row * 4 + (chunk ^ (row >> 1 & 3))) * 16, valid ? p.b + (row0 + row) * p.ldb + rank : p.b, valid);
  }
}

// sums[row] += (w + scale[row] · acc)² over the warp's 64×64 part of the tile; acc to zero.
template <typename W, bool kScaled>
__device__ __forceinline__ void add_squares(float (&sums)[4][2], float (&acc)[4][8][4], const float (&scale)[4][2],
                                            const char* w, const float* col_scale, int warp_row, int warp_col) {
  constexpr int kRowBytes = kCols * sizeof(W);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float2 by[2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
    if constexpr (kScaled)
      for (int h = 0; h < 2; ++h)
        by[h] = *reinterpret_cast<const float2*>(col_scale + warp_col + 16 * j + 8 * h + 2 * (lane % 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 v[4];  // rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
      if constexpr (sizeof(W) == 2) {
        const int row = warp_row + 16 * i + lane % 16;
        const int chunk = warp_col / 8 + 2 * j + lane / 16;
        uint32_t bits[4];
        load_matrices<false>(bits, shared_address(w) + row * kRowBytes + (chunk ^ w_swizzle<2>(row)) * 16);
#pragma unroll
        for (int q = 0; q < 4; ++q) v[q] = pair(bits[q], W());
      } else {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int row = warp_row + 16 * i + 8 * (q % 2) + lane / 4;
          const int col = warp_col + 16 * j + 8 * (q / 2) + 2 * (lane % 4);
          const int chunk = (col / 4) ^ w_swizzle<4>(row);
          v[q] = *reinterpret_cast<const float2*>(w + row * kRowBytes + chunk * 16 + col % 4 * 4);
        }
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        float* c = &acc[i][2 * j + q / 2][2 * (q % 2)];
        const float x = fmaf(kScaled ? c[0] * by[q / 2].x : c[0], scale[i][q % 2], v[q].x);
        const float y = fmaf(kScaled ? c[1] * by[q / 2].y : c[1], scale[i][q % 2], v[q].y);
        sums[i][q % 2] = fmaf(x, x, fmaf(y, y, sums[i][q % 2]));
        c[0] = c[1] = 0.0f;
      }
    }
  }
}

template <typename W>
__device__ __forceinline__ void add_squares(float (&sums)[4][2], float (&acc)[4][8][4], const float (&scale)[4][2],
                                            const char* w, const float* col_scale, int warp_row, int warp_col) {
  if (col_scale == nullptr)
    add_squares<W, false>(sums, acc, scale, w, col_scale, warp_row, warp_col);
  else
    add_squares<W, true>(sums, acc, scale, w, col_scale, warp_row, warp_col);
}

// The W tiles, the ring of A and B in a block's shared memory.
struct Buffers {
  char* w_tiles;
  uint32_t a_ring, b_steps;  // addresses of the shared window
  int w_bytes;               // of a tile

  __device__ __forceinline__ Buffers(const RowNormArgs& p, char* smem)
      : w_tiles(smem),
        a_ring(shared_address(smem + p.w_buffers * kRows * kCols * (p.w_dtype == kFloat ? 4 : 2))),
        b_steps(a_ring + p.stages * kAStep),
        w_bytes(kRows * kCols * (p.w_dtype == kFloat ? 4 : 2)) {}
};

// What a thread loads next of `count` tiles beside each other, as running pointers. A: row `a_row` of a step, 8
// columns; W likewise. `next` asks for one step of A, for B beside it where B is not resident, and for a tile of W when
// it is due.
struct Loader {
  const RowNormArgs& p;
  const Buffers& to;
  int64_t row0;
  int count, a_row;
  uint32_t a_place;
  int64_t a_step;
  const uint16_t *a_tile_from, *a_from;
  int64_t a_cols;
  int a_ranks;
  const char* w_from;
  int64_t w_cols;
  int w_rows;
  int tile = 0, step = 0, slot = 0;  // of A
  int w_tile = 0, w_slot = 0, w_in;  // of W; w_in: steps until the next is due

  __device__ __forceinline__ Loader(const RowNormArgs& p, const Buffers& to, int64_t row0, int64_t col0, int count)
      : p(p), to(to), row0(row0), count(count) {
    const int a_col = threadIdx.x % kAChunks;
    a_row = threadIdx.x / kAChunks;
    a_place = to.a_ring + (a_row * kAChunks + (a_col ^ a_row % 8)) * 16;
    a_step = kRanks * p.lda;
    a_from = a_tile_from = p.a + a_row * p.lda + col0 + a_col * 8;
    a_cols = p.lda - col0 - a_col * 8;
    a_ranks = a_cols > 0 ? static_cast<int>(p.a_rows) - a_row : 0;
    const int w_chunks = to.w_bytes / kRows / 16, w_row = threadIdx.x / w_chunks;
    const int w_col = threadIdx.x % w_chunks * kCols / w_chunks;
    w_from = static_cast<const char*>(p.w) + ((row0 + w_row) * p.k + col0 + w_col) * (to.w_bytes / kRows / kCols);
    w_cols = p.k - col0 - w_col;
    w_rows = static_cast<int>(min(p.n - row0, int64_t{kRows})) - w_row;
    w_in = p.stages - 1 - p.w_lead;
  }

  __device__ __forceinline__ void next() {
    if (tile < count) next_a();
    if (w_in == 0 && w_tile < count) next_w();
    --w_in;
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  }

 private:
  __device__ __forceinline__ void next_a() {
    load_a(a_place + slot * kAStep, a_from, p.lda, a_ranks);
    if (!p.b_resident) load_b(to.b_steps + slot * kBStep, p, b_step(p, step), row0);
    slot = slot + 1 == p.stages ? 0 : slot + 1;
    ++step;
    a_from += a_step, a_ranks -= kRanks;
    if (step == 2 * p.period) a_from -= p.period * a_step, a_ranks += p.period * kRanks;
    if (step == p.steps) {
      step = 0, ++tile;
      a_from = a_tile_from += kCols;
      a_cols -= kCols;
      a_ranks = a_cols > 0 ? static_cast<int>(p.a_rows) - a_row : 0;
    }
  }

  __device__ __forceinline__ void next_w() {
    char* const place = to.w_tiles + w_slot * to.w_bytes;
    if (p.w_dtype == kFloat)
      load_w<4>(place, w_from, p.k * 4, w_rows, w_cols, p.w_vector);
    else
      load_w<2>(place, w_from, p.k * 2, w_rows, w_cols, p.w_vector);
    w_from += to.w_bytes / kRows, w_cols -= kCols;
    w_slot = w_slot + 1 == p.w_buffers ? 0 : w_slot + 1;
    ++w_tile;
    w_in = p.steps;
  }
};

// acc [64, 64] of a warp += 32 ranks of B, a row's 64 bytes, times 32 ranks of A; both at this lane's rows.
template <typename T>
__device__ __forceinline__ void multiply_step(float (&acc)[4][8][4], uint32_t b_tile, uint32_t a_tile, uint32_t b_chunk,
                                              uint32_t a_chunk) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t b[4][4], a[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) load_matrices<false>(b[i], b_tile + i * 16 * 64 + (b_chunk ^ 2 * half) * 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) load_matrices<true>(a[j], a_tile + half * 16 * kCols * 2 + (a_chunk ^ 2 * j) * 16);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        multiply<T>(acc[i][2 * j], b[i], a[j][0], a[j][1]);
        multiply<T>(acc[i][2 * j + 1], b[i], a[j][2], a[j][3]);
      }
  }
}

// The block's sums of 128 rows, those of the two warps beside each other added, to partial [128].
__device__ __forceinline__ void store_row_sums(float* partial, float (&row_sums)[2][kRows], const float (&sums)[4][2],
                                               int warp_row, int warp_col) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float sum = sums[i / 2][i % 2];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0) row_sums[warp_col / 64][warp_row + 8 * i + lane / 4] = sum;
  }
  __syncthreads();  // also: nothing is read from the ring any more
  for (int row = threadIdx.x; row < kRows; row += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < 2; ++c) sum += row_sums[c][row];
    partial[row] = sum;
  }
}

// partial[block + row block, 128]: the pairs a block visits are distinct in their sum, since from one to the next
// either the block or the row block grows by one.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) row_norm_fwd_kernel(const RowNormArgs p) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) char smem[];
  __shared__ float row_sums[2][kRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % 2 * 64, warp_col = warp / 2 * 64;
  const Buffers buffers(p, smem);
  const uint32_t a_lane = lane % 16 * kCols * 2, a_chunk = (warp_col / 8 + lane / 16) ^ lane % 8;
  const uint32_t b_lane = (warp_row + lane % 16) * 64, b_chunk = lane / 16 ^ (lane / 2 & 3);

  const int64_t tiles = p.row_blocks * p.col_tiles;
  const int64_t end = (blockIdx.x + 1) * tiles / gridDim.x;
  for (int64_t tile = blockIdx.x * tiles / gridDim.x; tile < end;) {
    const int64_t row_block = tile / p.col_tiles, row0 = row_block * kRows;
    const int64_t col0 = tile % p.col_tiles * kCols;
    const int count = static_cast<int>(min(end - tile, p.col_tiles - tile % p.col_tiles));
    tile += count;

    float scale[4][2], sums[4][2] = {}, acc[4][8][4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t row = row0 + warp_row + 8 * i + lane / 4;
      const bool scaled = p.row_scale != nullptr && row < p.n;
      scale[i / 2][i % 2] = scaled ? p.scaling * p.row_scale[row] : p.scaling;
    }
    if (p.b_resident)
      for (int s = 0; s < min(p.steps, 2 * p.period); ++s) load_b(buffers.b_steps + s * kBStep, p, s, row0);

    Loader loader(p, buffers, row0, col0, count);
    int step = 0, slot = 0, w_at = 0, done = 0;  // what is computed
    for (int at = 1 - p.stages; at < count * p.steps; ++at) {
      if (at >= 0) {
        wait_for_all_but(p.stages - 2);
        __syncthreads();
      }
      loader.next();
      if (at < 0) continue;

      multiply_step<T>(acc, buffers.b_steps + (p.b_resident ? b_step(p, step) : slot) * kBStep + b_lane,
                       buffers.a_ring + slot * kAStep + a_lane, b_chunk, a_chunk);
      slot = slot + 1 == p.stages ? 0 : slot + 1;
      if (++step < p.steps) continue;

      step = 0;
      const char* w = buffers.w_tiles + w_at * buffers.w_bytes;
      w_at = w_at + 1 == p.w_buffers ? 0 : w_at + 1;
      const float* by = p.col_scale == nullptr ? nullptr : p.col_scale + col0 + int64_t{done} * kCols;
      ++done;
      if (p.w_dtype == kFloat)
        add_squares<float>(sums, acc, scale, w, by, warp_row, warp_col);
      else if (p.w_dtype == kBFloat16)
        add_squares<__nv_bfloat16>(sums, acc, scale, w, by, warp_row, warp_col);
      else
        add_squares<__half>(sums, acc, scale, w, by, warp_row, warp_col);
    }
    store_row_sums(p.partial + (blockIdx.x + row_block) * kRows, row_sums, sums, warp_row, warp_col);
  }
#endif
}

}  // namespace lora_fused
