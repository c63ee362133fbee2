// The kernel of skinny.cu: products of activations with an adapter's rank on Hopper, each one read of x.
//
//   by rows      out [M, R] = scaling · x aᵀ      a block has 128 rows of x, and steps along its columns
//   by columns   out [C, R] = scaling · xᵀ t      a block has 128 columns of x, and steps along its rows
//
// Bound by that read: 2·R operations an element of 2 bytes; with a mask over x, by its integer arithmetic. One warp
// loads x and the other operand 64 steps at a time into a ring in shared memory, two warpgroups multiply them, 64
// rows of out each, and before that clear there what the mask drops of those rows. The blocks of a cluster share
// a tile's steps; their sums meet in shared memory, added in the order of the blocks. Everything is 128-byte
// swizzled; ragged edges and ranks are what the copy engine fills with zeros, or columns that nobody reads.
//
// bf16x3: the other operand is the sum of hi and lo, and each has a sum of its own in registers: twice the products of
// one read of x. These blocks have a multiprocessor of their own.
#pragma once

#include "../common/dropout_mask.cuh"
#include "../common/bf16x3.cuh"
#include "ptx.cuh"

namespace lora_fused::sm90::skinny {

constexpr int kTile = 128, kStep = 64, kWgmmaK = 16;  // rows of out; elements summed a step and a wgmma
constexpr int kConsumers = 2, kConsumerWarps = 4 * kConsumers, kThreads = 32 * kConsumerWarps + 32;
constexpr int kBox = 64 * 128;                                  // bytes of 64 rows of 64 elements
constexpr int kMostRanks = 128, kEntries = 8, kMostBlocks = 8;  // of a cluster
constexpr int kXBytes = 2 * kBox, kMostStages = 4;
// Of a kernel whose other operand is a sum of kSplits matrices: the ring, the barriers after it, and all of it with
// what aligns the base.
template <int kSplits>
constexpr int kRing = kSplits == 1 ? 96 * 1024 : 144 * 1024;
template <int kSplits>
constexpr int kBytes = kRing<kSplits> + 2 * kMostStages * 8 + 1024;
template <int kSplits>
constexpr int kBytesAlone = kSplits == 1 ? 120 * 1024 : kBytes<kSplits>;  // no multiprocessor has as much twice

enum Form : int {
  kByRows,            // a [R, C]
  kByRowsTransposed,  // aᵀ [C, R]
  kByColumns,         // t [M, R]
};

struct Entry {
  CUtensorMap x, other;
  void* out;
  int64_t row_stride, rank_stride;  // of out
  int rows, ranks, width;           // of out; ranks rounded up to what a wgmma takes
  int steps, first_tile;
  Form form;
  bool out_is_float;
  float scaling;  // of the product, 1 / (1 - p) in it
  Mask mask;
  int lo_offset;                  // ranks from hi to lo of the other operand
  int split_ranks, split_stride;  // `SplitLayout` of out, or zeros
};

struct Arguments {
  Entry entry[kEntries];
  int entries;
};

// A stage holds two boxes of x and what hi and lo of the other operand have beside them.
__device__ __forceinline__ int other_bytes(const Entry& e) {
  return e.form == kByRows ? e.width * 128 : (e.width + 63) / 64 * kBox;
}
template <int kSplits>
__device__ __forceinline__ int stage_bytes(const Entry& e) {
  return kXBytes + kSplits * (e.width > 64 ? 2 : 1) * kBox;
}
__device__ __forceinline__ int stages_of(const Entry& e) { return e.width > 64 ? 3 : 4; }

// Where a thread is in the ring, and the parity of that stage's current phase.
struct Ring {
  int stages, stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

// One thread: the loads of steps [first, last) of a tile.
template <int kSplits>
__device__ __forceinline__ void produce(const Entry& e, uint32_t base, int at, int first, int last) {
  Ring ring{stages_of(e)};
  const uint32_t bytes = kXBytes + kSplits * other_bytes(e);
  for (int step = first; step < last; ++step, ring.advance()) {
    const uint32_t full = base + kRing<kSplits> + 8 * ring.stage, empty = full + 8 * kMostStages;
    const uint32_t x = base + ring.stage * stage_bytes<kSplits>(e);
    const int k = step * kStep;
    barrier_wait(empty, ring.phase ^ 1);  // all consumer warps are done with the stage
    barrier_arrive_expect(full, bytes);
    if (e.form == kByColumns) {
      tensor_load(x, &e.x, at, k, full);
      tensor_load(x + kBox, &e.x, at + 64, k, full);
    } else {
      tensor_load(x, &e.x, k, at, full);
    }
#pragma unroll
    for (int split = 0; split < kSplits; ++split) {
      const uint32_t other = x + kXBytes + split * other_bytes(e);
      const int rank = split * e.lo_offset;
      if (e.form == kByRows) {
        tensor_load(other, &e.other, k, rank, full);
      } else {
        tensor_load(other, &e.other, rank, k, full);
        if (e.width > 64) tensor_load(other + kBox, &e.other, rank + 64, k, full);
      }
    }
  }
}

// One warpgroup: clears what the mask drops of a box of 64 rows and 64 columns of x from (row, col) on.
__device__ __forceinline__ void drop(uint8_t* box, const Mask& mask, uint64_t key, int row, int col) {
  const int thread = threadIdx.x % 128, piece = thread % 8;  // a row is eight pieces, swizzled by the row
#pragma unroll 4
  for (int i = 0; i < 4; ++i) {
    const int at = thread / 8 + 16 * i;
    uint4* const place = reinterpret_cast<uint4*>(box + 128 * at + 16 * (piece ^ (at % 8)));
    *place = masked(*place, key, mask, row + at, col / kMaskColumns + piece);
  }
  // Every thread's part, before wgmma reads it: the fence is each thread's own, the barrier the warpgroup's (2 or 3).
  async_proxy_fence();
  asm volatile("bar.sync %0, 128;" ::"r"(2 + static_cast<int>(threadIdx.x) / 128) : "memory");
}

// Where a block is: its tile's first row of out, and its first step.
struct Place {
  int at, step;
};

// One warpgroup: the sum of the block's steps for its 64 rows of out, to `sums` [kTile, kWidth + 4], which the ring
// begins with.
template <typename T, int kSplits, int kWidth, bool kTransposeX, bool kTransposeOther>
__device__ __forceinline__ void consume(const Entry& e, uint32_t base, float* sums, Place from, int count) {
  constexpr int kPitch = kWidth + 4;
  constexpr uint64_t kNextX = (kTransposeX ? kWgmmaK * 128 : kWgmmaK * 2) >> 4;
  constexpr uint64_t kNextOther = (kTransposeOther ? kWgmmaK * 128 : kWgmmaK * 2) >> 4;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t full = base + kRing<kSplits>, empty = full + 8 * kMostStages;
  const auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(empty + 8 * stage);
  };
  const uint64_t key = e.mask.key();
  float acc[kSplits][kWidth / 2] = {};
  Ring ring{stages_of(e)};
  int before = 0;
  for (int step = 0; step < count; ++step) {
    barrier_wait(full + 8 * ring.stage, ring.phase);
    const uint32_t offset = ring.stage * stage_bytes<kSplits>(e), stage = base + offset;
    if (e.mask.seed != nullptr) {
      const int rows = from.at + 64 * group, k = (from.step + step) * kStep;
      drop(reinterpret_cast<uint8_t*>(sums) + offset + group * kBox, e.mask, key, e.form == kByColumns ? k : rows,
           e.form == kByColumns ? rows : k);
    }
    // By rows a warpgroup has 64 rows of x, contiguous along what is summed; by columns 64 columns, contiguous along M.
    const uint64_t x = matrix_descriptor(stage + group * kBox, kBox, 1024);
    wgmma_fence();
#pragma unroll
    for (int split = 0; split < kSplits; ++split) {
      const uint64_t other = matrix_descriptor(stage + kXBytes + split * other_bytes(e), kBox, 1024);
#pragma unroll
      for (int i = 0; i < kStep / kWgmmaK; ++i)
        wgmma<T, kTransposeX, kTransposeOther>(acc[split], x + i * kNextX, other + i * kNextOther, 1);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0) release(before);
    before = ring.stage;
    ring.advance();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int split = 0; split < kSplits; ++split) keep_below(acc[split]);
  if constexpr (kSplits == 2) {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) acc[0][i] += acc[1][i];
  }
  // Every stage has been read: the sums take their place.
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kConsumerWarps) : "memory");
  float* const row = sums + (warp * 16 + lane / 4) * kPitch + 2 * (lane % 4);
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j) {
    *reinterpret_cast<float2*>(row + 8 * j) = {acc[0][4 * j], acc[0][4 * j + 1]};
    *reinterpret_cast<float2*>(row + 8 * kPitch + 8 * j) = {acc[0][4 * j + 2], acc[0][4 * j + 3]};
  }
}

template <typename T, int kSplits, int kWidth>
__device__ __forceinline__ void consume_form(const Entry& e, uint32_t base, float* sums, Place from, int count) {
  if (e.form == kByRows)
    consume<T, kSplits, kWidth, false, false>(e, base, sums, from, count);
  else if (e.form == kByRowsTransposed)
    consume<T, kSplits, kWidth, false, true>(e, base, sums, from, count);
  else
    consume<T, kSplits, kWidth, true, true>(e, base, sums, from, count);
}

template <typename T, int kSplits>
__device__ __forceinline__ void consume_width(const Entry& e, uint32_t base, float* sums, Place from, int count) {
  switch (e.width) {
    case 16: return consume_form<T, kSplits, 16>(e, base, sums, from, count);
    case 32: return consume_form<T, kSplits, 32>(e, base, sums, from, count);
    case 64: return consume_form<T, kSplits, 64>(e, base, sums, from, count);
    case 96: return consume_form<T, kSplits, 96>(e, base, sums, from, count);
    default: return consume_form<T, kSplits, 128>(e, base, sums, from, count);
  }
}

// This block's share of the tile's rows: the sums of all blocks of the cluster, four ranks at a time.
template <typename T, int kSplits>
__device__ __forceinline__ void reduce(const Entry& e, uint32_t sums, int at, int rank, int blocks) {
  const int first_row = rank * kTile / blocks, share = (rank + 1) * kTile / blocks - first_row;
  const int pitch = e.width + 4, quads = e.width / 4;
  const bool rank_fastest = e.rank_stride == 1;
  for (int i = threadIdx.x; i < share * quads; i += kThreads) {
    const int row = first_row + (rank_fastest ? i / quads : i % share);
    const int quad = rank_fastest ? i % quads : i / share;
    const uint32_t place = sums + (row * pitch + 4 * quad) * 4;
    float4 parts[kMostBlocks], sum{};  // all asked for before any is waited for
#pragma unroll
    for (int block = 0; block < kMostBlocks; ++block)
      if (block < blocks) parts[block] = cluster_load(cluster_address(place, block));
#pragma unroll
    for (int block = 0; block < kMostBlocks; ++block) {
      const float4 x = parts[block];
      if (block < blocks) sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
    }
    if (at + row >= e.rows) continue;
    const float values[] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (4 * quad + j >= e.ranks) break;
      const int column = 4 * quad + j;
      const int64_t to = (at + row) * e.row_stride + column * e.rank_stride;
      const float value = values[j] * e.scaling;
      if constexpr (kSplits == 2) {
        if (e.split_stride > 0) {
          store_split(static_cast<T*>(e.out) + (at + row) * e.row_stride, column, e.split_ranks, e.split_stride, value);
          continue;
        }
      }
      if (e.out_is_float)
        static_cast<float*>(e.out)[to] = value;
      else
        static_cast<T*>(e.out)[to] = T(value);
    }
  }
}

template <typename T, int kSplits>
__global__ __launch_bounds__(kThreads, 3 - kSplits) void skinny_kernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared[];
  const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t base = (start + 1023) / 1024 * 1024;
  float* const sums = reinterpret_cast<float*>(shared + (base - start));
  const int blocks = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
  const int tile = blockIdx.x / blocks;
  int n = 0;
  while (n + 1 < args.entries && tile >= args.entry[n + 1].first_tile) ++n;
  const Entry& e = args.entry[n];
  const int at = (tile - e.first_tile) * kTile;
  const int first = rank * e.steps / blocks, last = (rank + 1) * e.steps / blocks;
  if (threadIdx.x == 32 * kConsumerWarps) {
    tensor_map_prefetch(&e.x);
    tensor_map_prefetch(&e.other);
  } else if (threadIdx.x == 0) {
    for (int stage = 0; stage < kMostStages; ++stage) {
      barrier_init(base + kRing<kSplits> + 8 * stage, 1);
      barrier_init(base + kRing<kSplits> + 8 * (kMostStages + stage), kConsumerWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 32 * kConsumerWarps)
    consume_width<T, kSplits>(e, base, sums, {at, first}, last - first);
  else if (threadIdx.x == 32 * kConsumerWarps)
    produce<kSplits>(e, base, at, first, last);
  __syncwarp();
  cluster_sync();  // the sums of all blocks are in shared memory
  reduce<T, kSplits>(e, base, at, rank, blocks);
  if (blocks > 1) cluster_sync();  // others still read this block's sums
#endif
}

}  // namespace lora_fused::sm90::skinny
