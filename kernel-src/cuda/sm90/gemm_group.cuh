// The kernel of gemm_group.cu: the sums of a whole group in one launch (gemm.cuh), and before them the products with an
// adapter's rank that these sums read: t for the y of all members, dt for dx.
//
//   t [M, R] = scaling · x aᵀ     then     outᵢ = Σ aₛ bₛ + biasᵢ, in which t, or some columns of it, are the a of the
//                                          last segments
//
// A block makes slices of t until none is left, and then its tiles of out. A slice has 128 rows of t and some of the K
// steps: with as many slices as blocks, all multiprocessors read x once, which then lies in the L2 for the tiles. Its
// sum is left in a scratch buffer, as registers hold it, and counted; who counts the last slice of 128 rows adds up
// all of theirs, in the order of K whoever it is, writes t and says so. Nothing else waits for that: a tile of out
// comes to t after the K steps of its base product, and only then its loads wait for these 128 rows.
//
// No block waits for one that may not run. A slice is taken by a number from a counter, so that it belongs to a block
// that runs and that makes it without waiting for others; a block comes to its tiles, and to their waits, when all
// slices are taken. So all slices are made, wherever and whenever the other blocks of this and of other launches are.
//
// Order of memory. (1) Sums: every thread stores its own, the warpgroups meet at a barrier, one thread counts by an
// acquiring and releasing atomic, and they meet again: so the stores of all who counted before are seen by all threads
// of who counts last. (2) t: every thread stores, then fences ordinary accesses against the copy engine's; the
// warpgroups meet, one thread counts `ready` with release. The thread that loads t waits for the count with acquire,
// fences the same way, and asks the copy engine for t, for its own block's rows alone: a multicast from the other block
// holds b, which no launch makes for itself. (3) The ring: tiles of out use the memory of the slices' ring, and the
// other block writes there. So a ring's stage counts as full until all consumers of both blocks have no slice left to
// multiply: their first arrivals at `empty` say so, and the loads wait for these first.
#pragma once

#include "gemm.cuh"

namespace lora_fused::sm90 {

constexpr int kGroupOutputs = 3, kGroupShrinks = 3, kGroupRanks = 128;
constexpr int kConsumerThreads = 128 * kConsumers;

// One product t. `width`: of its sums, ranks rounded up to what is compiled.
struct ShrinkEntry {
  void* out;
  int64_t row_stride;
  float4* sums;  // [slices, width / 8, kConsumerThreads]
  int* arrived;  // [blocks of 128 rows]: slices whose sums are there
  int ranks, width, steps, splits, first_slice;
  float scaling;
};

struct Shrinks {
  CUtensorMap x[kGroupShrinks], other[kGroupShrinks];
  ShrinkEntry entry[kGroupShrinks];
  int entries, rows, slices;
  int* next_slice;
  int* ready;  // [blocks of 128 rows]: entries that are made
};

struct GroupArguments : Arguments<kGroupOutputs> {
  Shrinks shrinks;
};
static_assert(sizeof(GroupArguments) <= 4096);  // drivers before CUDA 12.1 take no more

// Behind what Layout has: barriers of the slices' ring (full, then empty, of each stage), of the taken slice (full,
// empty), and two numbers: the slice taken, and whether the sums are complete.
template <int kBlockN>
struct GroupLayout : Layout<kBlockN> {
  using L = Layout<kBlockN>;
  static constexpr int slice_barriers = L::barriers + 2 * L::stages * 8;
  static constexpr int taken_barriers = slice_barriers + 2 * L::stages * 8;
  static constexpr int numbers = taken_barriers + 2 * 8;
  static constexpr int bytes = numbers + 2 * 4 + 1024;
};
static_assert(GroupLayout<256>::bytes <= 227 * 1024 && GroupLayout<128>::bytes <= 227 * 1024);

// A slice's place: `index` counts those of its entry.
struct Slice {
  int entry, index, row, first_step, last_step;
};

__device__ __forceinline__ Slice slice_of(const Shrinks& shrinks, int slice) {
  int entry = 0;
  while (entry + 1 < shrinks.entries && slice >= shrinks.entry[entry + 1].first_slice) ++entry;
  const ShrinkEntry& e = shrinks.entry[entry];
  const int index = slice - e.first_slice, split = index % e.splits;
  return {entry, index, index / e.splits * kBlockM, split * e.steps / e.splits, (split + 1) * e.steps / e.splits};
}

// One thread: takes slices and loads them, until none is left.
template <int kBlockN, bool kRowsAreN>
__device__ __forceinline__ void produce_slices(const Shrinks& shrinks, uint32_t base, volatile int* taken) {
  using L = GroupLayout<kBlockN>;
  const uint32_t taken_full = base + L::taken_barriers, taken_empty = taken_full + 8;
  Ring<L::stages> ring;
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
    for (int step = slice.first_step; step < slice.last_step; ++step, ring.advance()) {
      const uint32_t full = base + L::slice_barriers + 8 * ring.stage, empty = full + 8 * L::stages;
      const uint32_t a = base + ring.stage * L::stage_bytes, b = a + L::a_bytes;
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

// acc becomes the sum over all slices of its rows where this block's is the last of them to be there; else false.
template <int kCount>
__device__ __forceinline__ bool add_slices(const ShrinkEntry& e, const Slice& slice, float (&acc)[kCount],
                                           volatile int* is_last) {
  constexpr int kQuads = kCount / 4;
  const int thread = threadIdx.x - 128;
  float4* const own = e.sums + static_cast<int64_t>(slice.index) * kQuads * kConsumerThreads + thread;
#pragma unroll
  for (int i = 0; i < kQuads; ++i)
    own[i * kConsumerThreads] = {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]};
  consumers_meet();
  if (thread == 0) *is_last = counter_add(e.arrived + slice.row / kBlockM) + 1 == e.splits;
  consumers_meet();
  if (!*is_last) return false;
  const float4* from =
      e.sums + static_cast<int64_t>(slice.index - slice.index % e.splits) * kQuads * kConsumerThreads + thread;
#pragma unroll
  for (int i = 0; i < kCount; ++i) acc[i] = 0.0f;
  constexpr int kAtOnce = kCount <= 32 ? 4 : 2;
#pragma unroll kAtOnce
  for (int split = 0; split < e.splits; ++split, from += kQuads * kConsumerThreads) {
    float4 part[kQuads];
#pragma unroll
    for (int i = 0; i < kQuads; ++i) part[i] = load_l2(from + i * kConsumerThreads);
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
      acc[4 * i] += part[i].x, acc[4 * i + 1] += part[i].y, acc[4 * i + 2] += part[i].z, acc[4 * i + 3] += part[i].w;
  }
  return true;
}

// Consumers: what both warpgroups do between the loads of slices and the tiles.
template <typename T, int kBlockN, bool kRowsAreN>
struct SliceConsumer {
  using L = GroupLayout<kBlockN>;
  const Shrinks& shrinks;
  uint32_t base;
  volatile int* numbers;
  Ring<L::stages> ring = {};
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

 private:
  // The slice that the loads are at.
  __device__ __forceinline__ int take() {
    const uint32_t full = base + L::taken_barriers;
    barrier_wait(full, phase);
    const int slice = numbers[0];
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(full + 8);
    phase ^= 1;
    return slice;
  }

  // Nothing of a slice is in the ring any more: tiles may be loaded, as far as this warp is concerned.
  __device__ __forceinline__ void leave_ring() const {
    const int lane = threadIdx.x % 32;
    const uint32_t empty = cluster_address(base + L::barriers + 8 * L::stages, lane % kCluster);
    for (int stage = 0; stage < L::stages; ++stage)
      if (lane < kCluster) barrier_arrive_cluster(empty + 8 * stage);
  }

  // Makes a slice, and gives the next one; tiles are loaded behind the last one's sums.
  template <int kCount>
  __device__ __forceinline__ int make(int number) {
    const Slice slice = slice_of(shrinks, number);
    const ShrinkEntry& e = shrinks.entry[slice.entry];
    float acc[kCount];
    multiply(slice.last_step - slice.first_step, acc);
    const int next = take();
    if (next >= shrinks.slices) leave_ring();
    if (e.splits == 1 || add_slices(e, slice, acc, numbers + 1)) {
      write(e, slice.row, acc);
      any_proxy_fence();  // each thread's own part of t, before the copy engine reads it
      consumers_meet();
      if (threadIdx.x == 128) counter_add(shrinks.ready + slice.row / kBlockM);
    }
    return next;
  }

  template <int kCount>
  __device__ __forceinline__ void multiply(int steps, float (&acc)[kCount]) {
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    const uint32_t full = base + L::slice_barriers, empty = full + 8 * L::stages;
    const auto release = [&](int stage) {
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    };
    int before = 0;
    for (int step = 0; step < steps; ++step, ring.advance()) {
      barrier_wait(full + 8 * ring.stage, ring.phase);
      multiply_stage<T, kRowsAreN>(acc, base + ring.stage * L::stage_bytes, group, step);
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
  volatile int* const numbers = reinterpret_cast<volatile int*>(shared + (base - start) + L::numbers);
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < L::stages; ++stage) {
      barrier_init(base + L::barriers + 8 * stage, 1);
      barrier_init(base + L::barriers + 8 * (L::stages + stage), kConsumerWarps * kCluster);
      barrier_init(base + L::slice_barriers + 8 * stage, 1);
      barrier_init(base + L::slice_barriers + 8 * (L::stages + stage), kConsumerWarps);
    }
    barrier_init(base + L::taken_barriers, 1);
    barrier_init(base + L::taken_barriers + 8, kConsumerWarps);
    barrier_init_fence();
  } else if (threadIdx.x >= 32 && threadIdx.x < 32 + args.shrinks.entries) {
    tensor_map_prefetch(&args.shrinks.x[threadIdx.x - 32]);
    tensor_map_prefetch(&args.shrinks.other[threadIdx.x - 32]);
  } else if (threadIdx.x >= 64 && threadIdx.x < 64 + args.output[0].segments) {
    tensor_map_prefetch(&args.a[threadIdx.x - 64]);
    tensor_map_prefetch(&args.b[threadIdx.x - 64]);
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    registers_lower<40>();
    if (threadIdx.x == 0) {
      produce_slices<kBlockN, kRowsAreN>(args.shrinks, base, numbers);
      const auto wait = [&](int row) {
        if (row >= args.shrinks.rows) return;  // of a cluster's second block, whose rows are past the last
        counter_wait(args.shrinks.ready + row / kBlockM, args.shrinks.entries);
        any_proxy_fence();
      };
      produce<kBlockN, kRowsAreN>(args, base, rank, /*first_parity=*/0, wait);
    }
  } else {
    registers_raise<232>();
    SliceConsumer<T, kBlockN, kRowsAreN>{args.shrinks, base, numbers}.run();
    consume<T, kBlockN, kRowsAreN, LeadingOp::kNone>(args, base, rank);
  }
  cluster_sync();  // the other block of the cluster still arrives at this one's barriers
#endif
}

}  // namespace lora_fused::sm90
