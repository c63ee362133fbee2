// The backward of an adapted embedding in two launches, see embedding_common.cuh: products, then dA's
// scatter and the sums of splits.
#pragma once

#include "embedding_common.cuh"

namespace lora_fused {
namespace embedding {

// Backward, first launch: blocks that run along the columns (drows), blocks that run along the tokens
// (dB and dm in splits), blocks that zero dA. Second launch: dA scattered, splits added.
constexpr int kBackwardThreads = 256;

struct RowsArgs {
  float* drows;              // [splits, m, r]
  int blocks, splits, cols;  // of tokens; of H, `cols` columns each
};

struct ColumnsArgs {
  float *sums, *bases;         // [splits, h, r], [splits, h] or null
  const float* rows;           // [m, r]
  int blocks, splits, tokens;  // of columns; of the tokens, `tokens` each
};

constexpr int kRowsTokens = kBackwardThreads / 32 * 16;
constexpr int kSlots = kWarpCols / 16 * kRankTiles * 32 / kBackwardThreads;  // fragments a thread stages

// Partial drows: 128 tokens, one split of H, 32 ranks. 64 columns at a time: g∘B in shared memory as
// fragments, dy straight from global memory.
template <typename T>
__device__ __forceinline__ void rows_grad(char* smem, int block, const RowsArgs& q, const T* __restrict__ dy,
                                          const Args& p) {
  auto* const b_fragments = reinterpret_cast<uint4(*)[kRankTiles][32]>(smem);  // [kWarpCols / 16]
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int split_index = block / q.blocks % q.splits, rank0 = block / q.blocks / q.splits * kRanks;
  const int64_t token = int64_t{block % q.blocks} * kRowsTokens + threadIdx.x / 32 * 16 + g;
  const int first = split_index * q.cols, end = min(first + q.cols, p.h);
  float staged[kSlots][4];
  uint4 ahead[2][2];
  const auto fetch = [&](int col0) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int col = col0 + t * 16 + half * 8;
        ahead[i][half] = load_row(dy, (token + 8 * i) * p.h + col, token + 8 * i < p.m && col < end);
      }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int i = threadIdx.x + slot * kBackwardThreads, step = i / 32 / kRankTiles;
      const int rank = rank0 + i / 32 % kRankTiles * 8 + g;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int col = col0 + t * 16 + step * 4 + k;
        float x = col < end && rank < p.r ? load(p.b, int64_t{col} * p.r + rank) : 0.0f;
        if (p.mag_norm_scale != nullptr && col < end) x *= p.mag_norm_scale[col];
        staged[slot][k] = x;
      }
    }
  };
  float c[kRankTiles][4] = {};
  fetch(first);
  for (int col0 = first; col0 < end; col0 += kWarpCols) {
    __syncthreads();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      (&b_fragments[0][0][0])[threadIdx.x + slot * kBackwardThreads] = split_four(staged[slot]);
    uint32_t a[2][8];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<uint4*>(&a[i][0]) = ahead[i][0];
      *reinterpret_cast<uint4*>(&a[i][4]) = ahead[i][1];
    }
    if (col0 + kWarpCols < end) fetch(col0 + kWarpCols);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kWarpCols / 16; ++step) {
      const uint32_t of_step[4] = {a[0][2 * step], a[1][2 * step], a[0][2 * step + 1], a[1][2 * step + 1]};
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile) multiply_bf16x3<T>(c[tile], of_step, b_fragments[step][tile][lane]);
    }
  }
  const float on_delta = own_scale(p, p.b.dtype) * p.scaling;
#pragma unroll
  for (int tile = 0; tile < kRankTiles; ++tile)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int rank = rank0 + tile * 8 + t * 2 + k % 2;
      const int64_t at = token + k / 2 * 8;
      if (at < p.m && rank < p.r) q.drows[(split_index * p.m + at) * p.r + rank] = c[tile][k] * on_delta;
    }
}

constexpr int kColumns = 64, kColumnsTokens = 64;
constexpr int kTileBytes = 2 * kColumnsTokens * kColumns * 2;
constexpr int kBackwardBytes = kTileBytes + 2 * kColumnsTokens / 16 * kRankTiles * 32 * 16;

constexpr int kColumnChunks = kColumns / 8, kColumnRowStep = kBackwardThreads / kColumnChunks;

// Where chunk `chunk` of 8 columns of a row of dy is in a tile.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kColumnChunks + (chunk ^ (row & 7)); }

// sum += a∘b in float32, eight values of T each.
template <typename T>
__device__ __forceinline__ void add_products(float (&sum)[8], const uint4& a, const uint4& b) {
  const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 left = pair(as[j], T()), right = pair(bs[j], T());
    sum[2 * j] = fmaf(left.x, right.x, sum[2 * j]);
    sum[2 * j + 1] = fmaf(left.y, right.y, sum[2 * j + 1]);
  }
}

// A block's 64 columns by 32 ranks of sums: those of the two halves of its tokens meet in `halves`, shared memory that
// nothing reads any more.
__device__ __forceinline__ void store_sums(const float (&c)[kRankTiles][4], float* halves, const ColumnsArgs& q,
                                           const Args& p, int split_index, int rank0, int col0) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tile_row = warp % 4, in_half = warp / 4;
#pragma unroll
  for (int k = 0; k < kRankTiles * 4; ++k)
    if (in_half == 1) halves[(k * 4 + tile_row) * 32 + lane] = c[k / 4][k % 4];
  __syncthreads();
  if (in_half == 1) return;
#pragma unroll
  for (int k = 0; k < kRankTiles * 4; ++k) {
    const int at = col0 + tile_row * 16 + k % 4 / 2 * 8 + g;
    const int rank = rank0 + k / 4 * 8 + t * 2 + k % 2;
    if (at < p.h && rank < p.r)
      q.sums[(int64_t{split_index} * p.h + at) * p.r + rank] = c[k / 4][k % 4] + halves[(k * 4 + tile_row) * 32 + lane];
  }
}

// A block's 64 columns of Σ dy∘W: the rows of each chunk meet in `columns`, shared memory that nothing reads any more.
__device__ __forceinline__ void store_bases(const float (&base)[8], float* columns, float* bases, int col0, int h) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    columns[threadIdx.x / kColumnChunks * kColumns + threadIdx.x % kColumnChunks * 8 + i] = base[i];
  __syncthreads();
  if (threadIdx.x >= kColumns || col0 + threadIdx.x >= h) return;
  float total = 0.0f;
  for (int i = 0; i < kColumnRowStep; ++i) total += columns[i * kColumns + threadIdx.x];
  bases[col0 + threadIdx.x] = total;
}

// Partial dyᵀ rows and, where `bases` is not null, Σ dy∘W[i]: 64 columns, one split of the tokens, 32
// ranks. 64 tokens at a time: dy by cp.async, rows as fragments, both in two buffers.
template <typename T>
__device__ __forceinline__ void columns_grad(char* smem, int block, const ColumnsArgs& q, const T* __restrict__ dy,
                                             const Args& p) {
  constexpr int kChunks = kColumnChunks, kEach = kColumnsTokens * kChunks / kBackwardThreads;
  constexpr int kRowStep = kColumnRowStep, kSteps64 = kColumnsTokens / 16;
  using Fragments = uint4[kSteps64][kRankTiles][32];
  auto* const tiles = reinterpret_cast<uint4(*)[kColumnsTokens * kChunks]>(smem);  // [2]
  auto* const fragments = reinterpret_cast<Fragments*>(smem + kTileBytes);         // [2]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tile_row = warp % 4, in_half = warp / 4;  // 16 columns and 32 tokens of 64
  const int split_index = block / q.blocks % q.splits, rank0 = block / q.blocks / q.splits * kRanks;
  const int col0 = block % q.blocks * kColumns;
  const int chunk = threadIdx.x % kChunks, col = col0 + chunk * 8;
  const int64_t first = int64_t{split_index} * q.tokens;
  const int64_t end = first + q.tokens < p.m ? first + q.tokens : p.m;
  const bool with_base = q.bases != nullptr && rank0 == 0;
  float staged[kSlots][4], base[8] = {};
  uint4 w_ahead[kEach] = {};
  const auto fetch = [&](int64_t start, int buffer) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = threadIdx.x / kChunks + i * kRowStep;
      const bool valid = start + row < end && col < p.h;
      copy_async(shared_address(&tiles[buffer][swizzled(row, chunk)]), valid ? dy + (start + row) * p.h + col : dy,
                 valid);
      if (with_base) w_ahead[i] = load_row(p.w, valid ? load_id(p, start + row) * p.h + col : 0, valid);
    }
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int i = threadIdx.x + slot * kBackwardThreads, step = i / 32 / kRankTiles;
      const int rank = rank0 + i / 32 % kRankTiles * 8 + g;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t token = start + step * 16 + k / 2 * 8 + t * 2 + k % 2;
        staged[slot][k] = token < end && rank < p.r ? q.rows[token * p.r + rank] : 0.0f;
      }
    }
  };
  const auto stage = [&](int buffer) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      (&fragments[buffer][0][0][0])[threadIdx.x + slot * kBackwardThreads] = split_four(staged[slot]);
  };
  float c[kRankTiles][4] = {};
  int buffer = 0;
  if (first < end) {
    fetch(first, 0);
    stage(0);
  }
  for (int64_t start = first; start < end; start += kColumnsTokens, buffer ^= 1) {
    asm volatile("cp.async.wait_group 0;\n" ::: "memory");
    __syncthreads();
    uint4 w[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) w[i] = w_ahead[i];
    const bool more = start + kColumnsTokens < end;
    if (more) fetch(start + kColumnsTokens, buffer ^ 1);
#pragma unroll
    for (int step = in_half * 2; step < in_half * 2 + 2; ++step) {
      const int row = step * 16 + lane / 16 * 8 + lane % 8, at = tile_row * 2 + lane / 8 % 2;
      uint32_t a[4];
      load_matrices<true>(a, shared_address(&tiles[buffer][swizzled(row, at)]));
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile) multiply_bf16x3<T>(c[tile], a, fragments[buffer][step][tile][lane]);
    }
    if (with_base) {
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        add_products<T>(base, tiles[buffer][swizzled(threadIdx.x / kChunks + i * kRowStep, chunk)], w[i]);
    }
    if (more) stage(buffer ^ 1);
  }
  __syncthreads();
  store_sums(c, reinterpret_cast<float*>(fragments), q, p, split_index, rank0, col0);
  if (with_base) store_bases(base, reinterpret_cast<float*>(tiles), q.bases + int64_t{split_index} * p.h, col0, p.h);
}

// Grid: rows_blocks of `rows_grad`, then columns_blocks of `columns_grad`, the rest zeroes `bytes` of da.
template <typename T>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    products_bwd_kernel(const T* __restrict__ dy, const RowsArgs rows, int rows_blocks, const ColumnsArgs columns,
                        int columns_blocks, char* __restrict__ da, int64_t bytes, const Args p) {
#if __CUDA_ARCH__ >= 800
  __shared__ __align__(128) char smem[kBackwardBytes];
  int block = blockIdx.x;
  if (block < rows_blocks) return rows_grad(smem, block, rows, dy, p);
  block -= rows_blocks;
  if (block < columns_blocks) return columns_grad(smem, block, columns, dy, p);
  block -= columns_blocks;
  const int64_t blocks = gridDim.x - rows_blocks - columns_blocks, step = blocks * kBackwardThreads;
  const int64_t at = int64_t{block} * kBackwardThreads + threadIdx.x;
  for (int64_t i = at; i < bytes / 16; i += step) reinterpret_cast<uint4*>(da)[i] = uint4{0, 0, 0, 0};
  for (int64_t i = bytes / 16 * 16 + at; i < bytes; i += step) da[i] = 0;
#endif
}

struct FinishArgs {
  void *db, *dm;  // [h, r], [h], either of them null
  int dm_dtype, base_dtype;
};

// dB and dm from the splits of `columns_grad`: a warp a column.
__device__ __forceinline__ void finish_columns(int col, const FinishArgs& f, const ColumnsArgs& q, const Args& p) {
  const int lane = threadIdx.x % 32;
  if (col >= p.h) return;
  const float on_delta = own_scale(p, p.b.dtype) * p.scaling;
  const float mag_norm_scale = p.mag_norm_scale != nullptr ? p.mag_norm_scale[col] : 1.0f;
  float through_rows = 0.0f;
  for (int rank = lane; rank < p.r; rank += 32) {
    const int64_t at = int64_t{col} * p.r + rank;
    float total = 0.0f;
    for (int split_index = 0; split_index < q.splits; ++split_index)
      total += q.sums[int64_t{split_index} * p.h * p.r + at];
    if (f.db != nullptr) store_float(f.db, p.b.dtype, at, total * on_delta * mag_norm_scale);
    if (f.dm != nullptr) through_rows = fmaf(total, load(p.b, at), through_rows);
  }
  if (f.dm == nullptr) return;
  for (int offset = 16; offset > 0; offset /= 2) through_rows += __shfl_xor_sync(0xffffffffu, through_rows, offset);
  float base = 0.0f;
  for (int split_index = 0; split_index < q.splits; ++split_index) base += q.bases[int64_t{split_index} * p.h + col];
  if (lane == 0)
    store_float(f.dm, f.dm_dtype, col, (own_scale(p, f.base_dtype) * base + on_delta * through_rows) / p.norm[col]);
}

// dA [r, v], zero on entry: a warp a token; the first token of an id sums the rows of all, in order.
__device__ __forceinline__ void scatter_rows(int64_t token, void* __restrict__ da, const RowsArgs& q, int64_t padding,
                                             const Args& p) {
  constexpr int kAtOnce = 8;
  const int lane = threadIdx.x % 32;
  if (token >= p.m) return;
  const int64_t own = load_id(p, token);
  if (own == padding) return;
  for (int64_t start = 0; start < token; start += 32 * kAtOnce) {
    bool earlier = false;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t other = start + i * 32 + lane;
      earlier |= other < token && load_id(p, other) == own;
    }
    if (__any_sync(0xffffffffu, earlier)) return;
  }
  for (int rank0 = 0; rank0 < p.r; rank0 += 32) {
    const int rank = rank0 + lane;
    float total = 0.0f;
    for (int64_t start = token; start < p.m; start += 32 * kAtOnce) {
      uint32_t mine = 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t other = start + i * 32 + lane;
        if (other < p.m && load_id(p, other) == own) mine |= 1u << i;
      }
      if (!__any_sync(0xffffffffu, mine != 0)) continue;
      for (int i = 0; i < kAtOnce; ++i) {
        uint32_t same = __ballot_sync(0xffffffffu, mine >> i & 1u);
        while (same != 0) {
          float values[kAtOnce];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            const int bit = __ffs(same) - 1;
            same &= same - 1;
            values[j] = 0.0f;
            if (bit < 0 || rank >= p.r) continue;
            for (int split_index = 0; split_index < q.splits; ++split_index)
              values[j] += q.drows[(split_index * p.m + start + i * 32 + bit) * p.r + rank];
          }
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) total += values[j];
        }
      }
    }
    if (rank < p.r) store_float(da, p.a.dtype, rank * p.v + own, total);
  }
}

// Grid: a warp for each of m tokens where da is not null, then a warp for each of h columns.
static __global__ void __launch_bounds__(kBackwardThreads)
    finish_bwd_kernel(void* __restrict__ da, const RowsArgs rows, int64_t padding, const FinishArgs finish,
                      const ColumnsArgs columns, const Args p) {
  int64_t item = (int64_t{blockIdx.x} * kBackwardThreads + threadIdx.x) / 32;
  if (da != nullptr) {
    if (item < p.m) return scatter_rows(item, da, rows, padding, p);
    item -= p.m;
  }
  if (columns.sums != nullptr) finish_columns(static_cast<int>(item), finish, columns, p);
}

}  // namespace embedding
}  // namespace lora_fused
