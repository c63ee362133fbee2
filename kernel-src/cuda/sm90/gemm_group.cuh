// The kernel of gemm_group.cu: the sums of a whole group in one launch (gemm.cuh), and before them the products with an
// adapter's rank that these sums read: t for the y of all members, dt for dx.
//
//   t [M, R] = scaling · x aᵀ     then     outᵢ = Σ aₛ bₛ + biasᵢ, in which t, or some columns of it, are the a of the
//                                          last segments
//
// A slice is 128 rows of t over all of K. Tiles do not fill their last round of multiprocessors, as a rule: clusters that
// have a tile less than the others make the slices first, beside the others' first tiles. A tile comes to t after the K
// steps of its base product, and only then its loads wait for these 128 rows, which are mostly there by then.
//
// No block waits for one that may not run. Clusters are numbered as they begin. The first `makers` of them take slices
// by a number from a counter until none is left, so that a slice belongs to a block that runs and that makes it without
// waiting for others. Whoever waits for t either has seen the counter's end, so that every slice is taken, or has a
// higher number than all makers, so that they all run. So all slices are made, wherever and whenever the other blocks of
// this and of other launches are.
//
// Order of memory. (1) t: every thread stores, then fences ordinary accesses against the copy engine's; the warpgroups
// meet, one thread counts `ready` with release. The thread that loads t waits for the count with acquire, fences the
// same way, and asks the copy engine for t, for its own block's rows alone. What the other block multicasts to it is b,
// an input of the launch, which needs no order. (2) The ring: tiles of out use the memory of the slices' ring, and the other block
// writes there. So a ring's stage counts as full until all consumers of both blocks have no slice left to multiply:
// their first arrivals at `empty` say so, and the loads wait for these first.
#pragma once

#include "gemm.cuh"

namespace lora_fused::sm90 {

constexpr int kGroupOutputs = 3, kGroupShrinks = 3, kGroupRanks = 128;
constexpr int kConsumerThreads = 128 * kConsumers;

// One product t. `width`: of its sums, ranks rounded up to what is compiled.
struct ShrinkEntry {
  void* out;
  int64_t row_stride;
  int ranks, width, steps;
  float scaling;
};

struct Shrinks {
  CUtensorMap x[kGroupShrinks], other[kGroupShrinks];
  ShrinkEntry entry[kGroupShrinks];
  int entries, rows, slices;
  int makers;  // clusters that make them
  int *next_cluster, *next_slice;
  int* ready;  // [blocks of 128 rows]: entries that are made
};

struct GroupArguments : Arguments<kGroupOutputs> {
  Shrinks shrinks;
};
static_assert(sizeof(GroupArguments) <= 4096);  // drivers before CUDA 12.1 take no more

// The slices' ring, smaller stages and more of them, lies where the tiles' is. Behind what Layout has: its barriers (full,
// then empty, of each stage), those of the taken slice (full, empty), and two numbers: the cluster's own, in its first
// block, and the slice taken.
template <int kBlockN>
struct GroupLayout : Layout<kBlockN> {
  using L = Layout<kBlockN>;
  static constexpr int slice_bytes = L::a_bytes + kGroupRanks * kBlockK * 2;
  static constexpr int slice_stages = L::staging / slice_bytes;
  static constexpr int slice_barriers = L::barriers + 2 * L::stages * 8;
  static constexpr int taken_barriers = slice_barriers + 2 * slice_stages * 8;
  static constexpr int number = taken_barriers + 2 * 8, taken = number + 4;
  static constexpr int bytes = taken + 4 + 1024;
};
static_assert(GroupLayout<256>::bytes <= 227 * 1024 && GroupLayout<128>::bytes <= 227 * 1024);

struct Slice {
  int entry, row;
};

// All entries' slices of the same rows follow each other: tiles wait for them together.
__device__ __forceinline__ Slice slice_of(const Shrinks& shrinks, int slice) {
  return {slice % shrinks.entries, slice / shrinks.entries * kBlockM};
}

// One thread: takes slices and loads them, until none is left.
template <int kBlockN, bool kRowsAreN>
__device__ __forceinline__ void produce_slices(const Shrinks& shrinks, uint32_t base, volatile int* taken) {
  using L = GroupLayout<kBlockN>;
  const uint32_t taken_full = base + L::taken_barriers, taken_empty = taken_full + 8;
  Ring<L::slice_stages> ring;
  for (uint32_t phase = 0;; phase ^= 1) {
    const int next = counter_take(shrinks.next_slice);
    barrier_wait(taken_empty, phase ^ 1);
    *taken = next;
    barrier_arrive(taken_full);
    if (next >= shrinks.slices) return;
    const Slice slice = slice_of(shrinks, next);
    const ShrinkEntry& e = shrinks.entry[slice.entry];
    const int boxes = kRowsAreN ? 1 : (e.width + 63) / 64;
    const uint32_t bytes = L::a_bytes + (kRowsAreN ? e.width * 128 : boxes * kBlockK * 128);
    for (int step = 0; step < e.steps; ++step, ring.advance()) {
      const uint32_t full = base + L::slice_barriers + 8 * ring.stage, empty = full + 8 * L::slice_stages;
      const uint32_t a = base + ring.stage * L::slice_bytes, b = a + L::a_bytes;
      const int k = step * kBlockK;
      barrier_wait(empty, ring.phase ^ 1);
      barrier_arrive_expect(full, bytes);
      tensor_load(a, &shrinks.x[slice.entry], k, slice.row, full);
      if constexpr (kRowsAreN) {
        tensor_load(b, &shrinks.other[slice.entry], k, 0, full);
      } else {
        for (int i = 0; i < boxes; ++i)
          tensor_load(b + i * kBlockK * 128, &shrinks.other[slice.entry], 64 * i, k, full);
      }
    }
  }
}

// The threads of both warpgroups meet. Barrier 0 is the whole block's.
__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumerThreads) : "memory"); }

// Consumers: what both warpgroups do between the loads of slices and the tiles.
template <typename T, int kBlockN, bool kRowsAreN>
struct SliceConsumer {
  using L = GroupLayout<kBlockN>;
  const Shrinks& shrinks;
  uint32_t base;
  volatile int* taken;
  Ring<L::slice_stages> ring = {};
  uint32_t phase = 0;

  __device__ __forceinline__ void run() {
    int slice = take();
    if (slice >= shrinks.slices) leave_ring();
    while (slice < shrinks.slices) {
      switch (shrinks.entry[slice_of(shrinks, slice).entry].width) {
        case 32: slice = make<16>(slice); break;
        case 64: slice = make<32>(slice); break;
        case 96: slice = make<48>(slice); break;
        default: slice = make<64>(slice); break;
      }
    }
  }

  // Nothing of a slice is in the ring any more: tiles may be loaded, as far as this warp is concerned.
  __device__ __forceinline__ void leave_ring() const {
    const int lane = threadIdx.x % 32;
    const uint32_t empty = cluster_address(base + L::barriers + 8 * L::stages, lane % kCluster);
    for (int stage = 0; stage < L::stages; ++stage)
      if (lane < kCluster) barrier_arrive_cluster(empty + 8 * stage);
  }

 private:
  // The slice that the loads are at.
  __device__ __forceinline__ int take() {
    const uint32_t full = base + L::taken_barriers;
    barrier_wait(full, phase);
    const int slice = *taken;
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(full + 8);
    phase ^= 1;
    return slice;
  }

  // Makes a slice, and gives the next one; tiles are loaded behind the last one's sums.
  template <int kCount>
  __device__ __forceinline__ int make(int number) {
    const Slice slice = slice_of(shrinks, number);
    const ShrinkEntry& e = shrinks.entry[slice.entry];
    float acc[kCount];
    multiply(e.steps, acc);
    const int next = take();
    if (next >= shrinks.slices) leave_ring();
    write(e, slice.row, acc);
    any_proxy_fence();  // each thread's own part of t, before the copy engine reads it
    consumers_meet();
    if (threadIdx.x == 128) counter_add(shrinks.ready + slice.row / kBlockM);
    return next;
  }

  template <int kCount>
  __device__ __forceinline__ void multiply(int steps, float (&acc)[kCount]) {
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    const uint32_t full = base + L::slice_barriers, empty = full + 8 * L::slice_stages;
    const auto release = [&](int stage) {
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    };
    int before = 0;
    for (int step = 0; step < steps; ++step, ring.advance()) {
      barrier_wait(full + 8 * ring.stage, ring.phase);
      multiply_stage<T, kRowsAreN>(acc, base + ring.stage * L::slice_bytes, group, step);
      wgmma_wait<1>();
      if (step > 0) release(before);
      before = ring.stage;
    }
    wgmma_wait<0>();
    release(before);
    keep_below(acc);
  }

  // This warp's 16 rows of t.
  template <int kCount>
  __device__ __forceinline__ void write(const ShrinkEntry& e, int first_row, const float (&acc)[kCount]) const {
    const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32, col = 2 * (lane % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + warp * 16 + lane / 4 + 8 * half;
      if (row >= shrinks.rows) continue;
      T* const out = static_cast<T*>(e.out) + row * e.row_stride + col;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j)
        if (8 * j < e.ranks)  // a multiple of 8
          *reinterpret_cast<uint32_t*>(out + 8 * j) =
              pack<T>(acc[4 * j + 2 * half] * e.scaling, acc[4 * j + 2 * half + 1] * e.scaling);
    }
  }
};

template <typename T, int kBlockN, bool kRowsAreN>
__global__ __launch_bounds__(kThreads, 1) void gemm_group_kernel(const __grid_constant__ GroupArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = GroupLayout<kBlockN>;
  extern __shared__ uint8_t shared[];
  const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t base = (start + 1023) / 1024 * 1024;
  volatile int* const number = reinterpret_cast<volatile int*>(shared + (base - start) + L::number);
  volatile int* const taken = number + 1;
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < L::stages; ++stage) {
      barrier_init(base + L::barriers + 8 * stage, 1);
      barrier_init(base + L::barriers + 8 * (L::stages + stage), kConsumerWarps * kCluster);
    }
    for (int stage = 0; stage < L::slice_stages; ++stage) {
      barrier_init(base + L::slice_barriers + 8 * stage, 1);
      barrier_init(base + L::slice_barriers + 8 * (L::slice_stages + stage), kConsumerWarps);
    }
    barrier_init(base + L::taken_barriers, 1);
    barrier_init(base + L::taken_barriers + 8, kConsumerWarps);
    barrier_init_fence();
    if (rank == 0) *number = counter_take(args.shrinks.next_cluster);
  } else if (threadIdx.x >= 32 && threadIdx.x < 32 + args.shrinks.entries) {
    tensor_map_prefetch(&args.shrinks.x[threadIdx.x - 32]);
    tensor_map_prefetch(&args.shrinks.other[threadIdx.x - 32]);
  } else if (threadIdx.x >= 64 && threadIdx.x < 64 + args.output[0].segments) {
    tensor_map_prefetch(&args.a[threadIdx.x - 64]);
    tensor_map_prefetch(&args.b[threadIdx.x - 64]);
  }
  cluster_sync();
  const int cluster = cluster_load_int(cluster_address(base + L::number, 0));
  const bool makes = cluster < args.shrinks.makers;
  const int first_tile = gridDim.x / kCluster - 1 - cluster;  // the last ones have the fewest tiles
  if (threadIdx.x < 128) {
    registers_lower<40>();
    if (threadIdx.x == 0) {
      if (makes) produce_slices<kBlockN, kRowsAreN>(args.shrinks, base, taken);
      const auto wait = [&](int row) {
        if (row >= args.shrinks.rows) return;  // of a cluster's second block, whose rows are past the last
        counter_wait(args.shrinks.ready + row / kBlockM, args.shrinks.entries);
        any_proxy_fence();
      };
      produce<kBlockN, kRowsAreN>(args, base, rank, first_tile, /*first_parity=*/0, wait);
    }
  } else {
    registers_raise<232>();
    SliceConsumer<T, kBlockN, kRowsAreN> slices{args.shrinks, base, taken};
    makes ? slices.run() : slices.leave_ring();
    consume<T, kBlockN, kRowsAreN, LeadingOp::kNone>(args, base, rank, first_tile);
  }
  cluster_sync();  // the other block of the cluster still arrives at this one's barriers
#endif
}

}  // namespace lora_fused::sm90
