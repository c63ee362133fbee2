// The kernels of dt_db.cu: both products of dy with an adapter's rank on Hopper, from one read of dy.
//
//   dt [M, R] = scaling · dy B      dB [N, R] = dyᵀ t
//
// A block has a slab of 512 columns of dy and a share of its rows, and steps down them 128 at a time. The slab's rows
// of B stay in shared memory; one thread loads dy, 128 rows and 128 columns a stage, and t, 128 rows a step. Two
// warpgroups multiply: each has half of the step's rows for dt, whose sum over the slab is done with the step, and half
// of the slab's columns for dB, whose sums stay in registers to the end. Sums over slabs, of dt, and over shares, of
// dB, are a second kernel's, in their order. Everything is 128-byte swizzled; ragged edges and ranks are what the copy
// engine fills with zeros.
#pragma once

#include "../common/bf16x3.cuh"
#include "ptx.cuh"

namespace lora_fused::sm90::dt_db {

constexpr int kSlab = 512, kRows = 128, kCols = 128, kWgmmaK = 16;  // kWgmmaK: elements summed by a wgmma
constexpr int kStagesOfSlab = kSlab / kCols;
// One thread loads; its warpgroup is whole, since registers move between warpgroups.
constexpr int kConsumerWarps = 8, kThreads = 32 * kConsumerWarps + 128;
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
constexpr int kBox = 64 * 128;  // bytes of 64 rows of 64 elements
constexpr int kStages = 4, kStageBytes = 4 * kBox, kSlots = 2, kSlotBytes = 2 * kBox;
constexpr int kB = kStages * kStageBytes, kT = kB + kSlab / 64 * kBox, kBarriers = kT + kSlots * kSlotBytes;
constexpr int kBytes = kBarriers + 8 * (2 * kStages + 2 * kSlots + 1) + 1024;  // to align the base
constexpr int kMostRanks = 64, kEntries = 4;
// Of the second kernel: outputs of a block, four ranks each, and threads that share the sum of one.
constexpr int kFinishQuads = 64, kFinishShares = 4, kFinishThreads = kFinishQuads * kFinishShares;

struct Entry {
  CUtensorMap dy, b, t;
  float *dt_partials, *db_partials;  // [slabs, M, width] and [shares, N, width]
  int columns, width;                // N; ranks rounded up to what a wgmma takes
  int slabs, first_slab;
};

struct Arguments {
  Entry entry[kEntries];
  int entries, rows, steps, shares;
};

// Rings of barriers: full and empty of each stage of dy, then of each slot of t, then B's.
struct Barriers {
  uint32_t base;
  __device__ __forceinline__ uint32_t full(int stage) const { return base + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return base + 8 * (kStages + stage); }
  __device__ __forceinline__ uint32_t t_full(int slot) const { return base + 8 * (2 * kStages + slot); }
  __device__ __forceinline__ uint32_t t_empty(int slot) const { return base + 8 * (2 * kStages + kSlots + slot); }
  __device__ __forceinline__ uint32_t b_full() const { return base + 8 * (2 * kStages + 2 * kSlots); }
};

// Where a thread is in a ring, and the parity of that slot's current phase.
template <int kCount>
struct Ring {
  int at = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++at == kCount) at = 0, phase ^= 1;
  }
};

// One thread: the slab's B, and all loads of steps [first, last).
__device__ __forceinline__ void produce(const Entry& e, uint32_t base, Barriers barriers, int slab, int first,
                                        int last) {
  const int column = slab * kSlab;
  barrier_arrive_expect(barriers.b_full(), kSlab / 64 * kBox);
  tensor_load(base + kB, &e.b, 0, column, barriers.b_full());
  tensor_load(base + kB + kSlab / 128 * kBox, &e.b, 0, column + kSlab / 2, barriers.b_full());
  Ring<kStages> ring;
  Ring<kSlots> slots;
  for (int step = first; step < last; ++step, slots.advance()) {
    const int row = step * kRows;
    barrier_wait(barriers.t_empty(slots.at), slots.phase ^ 1);
    barrier_arrive_expect(barriers.t_full(slots.at), kSlotBytes);
    tensor_load(base + kT + slots.at * kSlotBytes, &e.t, 0, row, barriers.t_full(slots.at));
    for (int i = 0; i < kStagesOfSlab; ++i, ring.advance()) {
      const uint32_t stage = base + ring.at * kStageBytes, full = barriers.full(ring.at);
      barrier_wait(barriers.empty(ring.at), ring.phase ^ 1);
      barrier_arrive_expect(full, kStageBytes);
      tensor_load(stage, &e.dy, column + i * kCols, row, full);
      tensor_load(stage + 2 * kBox, &e.dy, column + i * kCols + 64, row, full);
    }
  }
}

// One warpgroup: its 64 rows of `to` [.., kWidth] from `row` on, those below `rows`.
template <int kWidth>
__device__ __forceinline__ void store(float* to, int row, int rows, const float (&acc)[kWidth / 2]) {
  const int lane = threadIdx.x % 32, first = row + 16 * (threadIdx.x / 32 % 4) + lane / 4;
  float* const at = to + int64_t{first} * kWidth + 2 * (lane % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (first + 8 * half >= rows) continue;
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j)
      *reinterpret_cast<float2*>(at + 8 * half * kWidth + 8 * j) = {acc[4 * j + 2 * half], acc[4 * j + 2 * half + 1]};
  }
}

template <typename T, int kWidth>
__device__ __forceinline__ void consume(const Entry& e, const Arguments& args, uint32_t base, Barriers barriers,
                                        int slab, int share, int first, int last) {
  constexpr uint64_t kAlongRow = kWgmmaK * 2 >> 4, kAlongColumn = kWgmmaK * 128 >> 4;
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) barrier_arrive(barrier);
  };
  const uint64_t b = matrix_descriptor(base + kB, kBox, 1024);
  float dt[kWidth / 2], db[kStagesOfSlab][kWidth / 2] = {};
  Ring<kStages> ring;
  Ring<kSlots> slots;
  barrier_wait(barriers.b_full(), 0);
  for (int step = first; step < last; ++step, slots.advance()) {
    barrier_wait(barriers.t_full(slots.at), slots.phase);
    const uint64_t t = matrix_descriptor(base + kT + slots.at * kSlotBytes, kBox, 1024);
    int before = 0;
#pragma unroll
    for (int i = 0; i < kStagesOfSlab; ++i) {
      barrier_wait(barriers.full(ring.at), ring.phase);
      const uint32_t stage = base + ring.at * kStageBytes;
      const uint64_t rows = matrix_descriptor(stage + group * kBox, kBox, 1024);
      const uint64_t columns = matrix_descriptor(stage + group * 2 * kBox, kBox, 1024);
      // dy as [rows, 64] for dt, contiguous along what is summed, and the same bytes as [64, rows] for dB, transposed.
      wgmma_fence();
#pragma unroll
      for (int part = 0; part < kCols / kWgmmaK; ++part) {
        const int box = part / 4;  // of 64 columns
        wgmma<T, false, true>(dt, rows + box * (2 * kBox >> 4) + part % 4 * kAlongRow,
                              b + (2 * i + box) * (kBox >> 4) + part % 4 * kAlongColumn, i + part > 0);
      }
#pragma unroll
      for (int part = 0; part < kRows / kWgmmaK; ++part)
        wgmma<T, true, true>(db[i], columns + part * kAlongColumn, t + part * kAlongColumn, 1);
      wgmma_commit();
      if (i > 0) {  // the products of the stage before are done while these run
        wgmma_wait<1>();
        release(barriers.empty(before));
      }
      before = ring.at;
      ring.advance();
    }
    wgmma_wait<0>();
    release(barriers.empty(before));
    release(barriers.t_empty(slots.at));
    keep_below(dt);
    store<kWidth>(e.dt_partials + int64_t{slab} * args.rows * kWidth, step * kRows + 64 * group, args.rows, dt);
  }
#pragma unroll
  for (int i = 0; i < kStagesOfSlab; ++i) {
    keep_below(db[i]);
    store<kWidth>(e.db_partials + int64_t{share} * e.columns * kWidth, slab * kSlab + i * kCols + 64 * group, e.columns,
                  db[i]);
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads, 1) void dt_db_kernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared[];
  const uint32_t base = (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + 1023) / 1024 * 1024;
  const Barriers barriers{base + kBarriers};
  int n = 0;
  while (n + 1 < args.entries && static_cast<int>(blockIdx.x) >= args.entry[n + 1].first_slab) ++n;
  const Entry& e = args.entry[n];
  const int slab = blockIdx.x - e.first_slab, share = blockIdx.y;
  const int first = share * args.steps / args.shares, last = (share + 1) * args.steps / args.shares;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(barriers.full(stage), 1);
      barrier_init(barriers.empty(stage), kConsumerWarps);
    }
    for (int slot = 0; slot < kSlots; ++slot) {
      barrier_init(barriers.t_full(slot), 1);
      barrier_init(barriers.t_empty(slot), kConsumerWarps);
    }
    barrier_init(barriers.b_full(), 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= 32 * kConsumerWarps) {
    registers_lower<kProducerRegisters>();
    if (threadIdx.x == 32 * kConsumerWarps) produce(e, base, barriers, slab, first, last);
    return;
  }
  registers_raise<kConsumerRegisters>();
  if (e.width == 16)
    consume<T, 16>(e, args, base, barriers, slab, share, first, last);
  else if (e.width == 32)
    consume<T, 32>(e, args, base, barriers, slab, share, first, last);
  else
    consume<T, 64>(e, args, base, barriers, slab, share, first, last);
#endif
}

// out [rows, ranks] = scaling · the sum of partials [count, rows, width]; bf16x3, of their columns below `ranks` and of
// as many after these.
struct Sum {
  const float* partials;
  void* out;
  int64_t stride;  // of out's rows
  int count, rows, ranks, width;
  bool bf16x3, out_is_float;
  float scaling;
  int split_ranks, split_stride;  // `SplitLayout` of out, or zeros
};

struct Sums {
  Sum sum[2 * kEntries];
};

__device__ __forceinline__ float4 plus(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

__device__ __forceinline__ float4 sum_of_partials(const float4* partials, int first, int last, int64_t stride) {
  float4 sum{};
#pragma unroll 8
  for (int part = first; part < last; ++part) sum = plus(sum, partials[part * stride]);
  return sum;
}

// Four ranks of an output for each column of threads, whose shares of the partials meet in shared memory; a sum for each
// y of the grid.
template <typename T>
__global__ __launch_bounds__(kFinishThreads) void finish_kernel(const __grid_constant__ Sums args) {
  const Sum& s = args.sum[blockIdx.y];
  __shared__ float4 shares[kFinishShares - 1][kFinishQuads];
  const int quads = s.width / 4, column = threadIdx.x % kFinishQuads, share = threadIdx.x / kFinishQuads;
  const int64_t all = int64_t{s.rows} * quads, i = int64_t{blockIdx.x} * kFinishQuads + column;
  const int rank = static_cast<int>(i % quads) * 4;
  const bool is_there = i < all && rank < s.ranks;
  float4 sum{};
  if (is_there) {
    const float4* const partials = reinterpret_cast<const float4*>(s.partials) + i;
    const int first = share * s.count / kFinishShares, last = (share + 1) * s.count / kFinishShares;
    sum = sum_of_partials(partials, first, last, all);
    if (s.bf16x3) sum = plus(sum, sum_of_partials(partials + s.ranks / 4, first, last, all));
  }
  if (share > 0) shares[share - 1][column] = sum;
  __syncthreads();
  if (share > 0 || !is_there) return;
#pragma unroll
  for (int other = 0; other < kFinishShares - 1; ++other) sum = plus(sum, shares[other][column]);
  const float values[] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (rank + j >= s.ranks) break;
    const int64_t row = i / quads * s.stride, to = row + rank + j;
    const float value = values[j] * s.scaling;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      if (s.split_stride > 0) {
        store_split(static_cast<T*>(s.out) + row, rank + j, s.split_ranks, s.split_stride, value);
        continue;
      }
    }
    if (s.out_is_float)
      static_cast<float*>(s.out)[to] = value;
    else
      static_cast<T*>(s.out)[to] = T(value);
  }
}

}  // namespace lora_fused::sm90::dt_db
