// The kernel of gemm.cu: a matrix product for Hopper with the LoRA terms inside.
//
// Fused: every segment's product runs as further K steps of one accumulator, so a rank-R term costs
// R/K of the base product and out is written once; a dropout mask or DoRA's excess over the sum of the leading
// segments, in registers; bias or DoRA's scale, the unscaled sum and y in the epilogue.
//
// A block makes tiles of 128 x kBlockN of out until none is left. One warp of it loads 64 columns of
// a and of b a step into a ring of shared memory stages; two warpgroups multiply them, 64 rows each,
// and know nothing of segments. Two blocks with neighbouring rows form a cluster, and each loads
// half of the b that both need. The stores of a tile overlap the products of the next. Everything is
// 128-byte swizzled; ragged edges and ranks are what the copy engine fills with zeros or leaves out.
//
// a [M, k] of each segment, 128-byte swizzled boxes of 128 rows and 64 columns; b [N, k] in boxes of kBlockN / 2 rows
// and 64 columns, or [k, N] in boxes of 64 rows and 64 columns (kRowsAreN says which); out and the unscaled sum [M, N]
// leave by boxes of 16 rows and 64 columns, a warp's each. bias [N] in T, mag_norm_scale [N] in float32.
#pragma once

#include "../../common/gemm.h"
#include "../common/dropout_mask.cuh"
#include "ptx.cuh"

namespace lora_fused::sm90 {

constexpr int kBlockM = 128, kBlockK = 64;  // 64 elements of 2 bytes: one row of a swizzle
constexpr int kWgmmaK = 16;                 // K of one wgmma
constexpr int kCluster = 2;                 // blocks of neighbouring rows that share b
constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
constexpr int kConsumerWarps = 4 * kConsumers;
// What becomes of the leading segments' sum: D of it, a multiple of it, or unscaled = it and then (mag_norm_scale -
// 1)∘it.
enum class LeadingOp { kNone, kMask, kScale, kExcess };
constexpr int kStagingSlabs = 2, kSlabBytes = 16 * 128;  // a warp's staging: 16 rows x 64 columns each

// A block's shared memory: the ring (a, then b, each stage), two staging slabs a warp, the ring's barriers (full, then
// empty, of each stage).
template <int kBlockN>
struct Layout {
  static constexpr int a_bytes = kBlockM * kBlockK * 2, b_bytes = kBlockN * kBlockK * 2;
  static constexpr int stage_bytes = a_bytes + b_bytes;
  static constexpr int stages = 192 * 1024 / stage_bytes;
  static constexpr int staging = stages * stage_bytes;
  static constexpr int barriers = staging + kConsumerWarps * kStagingSlabs * kSlabBytes;
  static constexpr int bytes = barriers + 2 * stages * 8 + 1024;  // to align the base
};
static_assert(Layout<256>::bytes <= 227 * 1024 && Layout<128>::bytes <= 227 * 1024);

// One sum that a launch makes, of segments [first_segment, first_segment + segments).
struct Output {
  const void* bias;
  const float* mag_norm_scale;  // with unscaled
  int first_segment, segments, steps;
  int made;           // its last segments whose a the launch makes itself (gemm_group.cuh)
  int first_tile, n;  // its first column of tiles among those of all outputs; its columns
};

template <int kMostOutputs>
struct Arguments {
  static constexpr int kOutputs = kMostOutputs;
  CUtensorMap a[kGemmSegments], b[kGemmSegments], out[kOutputs], unscaled[kOutputs];
  Output output[kOutputs];
  int steps_of[kGemmSegments];  // K steps of each segment
  int outputs;
  int tiles_m, tiles_n;  // tiles_m in clusters along M, tiles_n of all outputs
  bool accumulate;
  Mask mask;
  float kept;         // what is kept of the leading segments' sum is multiplied by it
  int leading_steps;  // of the leading segments, fewer than all
};

// A block's tile: its first row and column of an output.
struct Tile {
  int row, col, output;
};

// Neighbours in time share a and b in L2: bands of rows.
template <int kBlockN, int kOutputs>
__device__ __forceinline__ Tile tile_of(const Arguments<kOutputs>& args, int tile, int rank) {
  constexpr int kBand = 8;
  const int band = tile / (kBand * args.tiles_n), within = tile - band * kBand * args.tiles_n;
  const int high = min(args.tiles_m - band * kBand, kBand);
  const int cluster_m = band * kBand + within % high, column = within / high;
  int output = 0;
  if constexpr (kOutputs > 1)
    while (output + 1 < args.outputs && column >= args.output[output + 1].first_tile) ++output;
  return {(cluster_m * kCluster + rank) * kBlockM, (column - args.output[output].first_tile) * kBlockN, output};
}

// Where a thread is in the ring, and the parity of that stage's current phase.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// One thread: all loads of the block's tiles, every so many from `first_tile` on as there are clusters. `made(row)` is
// called before the first load of what the launch makes itself of the rows from `row` on; `first_parity` is that of an
// empty ring's barriers.
template <int kBlockN, bool kRowsAreN, int kOutputs, typename Made>
__device__ __forceinline__ void produce(const Arguments<kOutputs>& args, uint32_t base, int rank, int first_tile,
                                        uint32_t first_parity, const Made& made) {
  using L = Layout<kBlockN>;
  constexpr int kShare = kBlockN / kCluster;  // columns of b that this block loads
  constexpr uint16_t kAll = (1 << kCluster) - 1;
  Ring<L::stages> ring;
  for (int tile = first_tile; tile < args.tiles_m * args.tiles_n; tile += gridDim.x / kCluster) {
    const Tile place = tile_of<kBlockN>(args, tile, rank);
    const Output& output = args.output[place.output];
    const int end = output.first_segment + output.segments;
    for (int s = output.first_segment; s < end; ++s) {
      if (s + output.made == end) made(place.row);
      for (int step = 0; step < args.steps_of[s]; ++step, ring.advance()) {
        const uint32_t full = base + L::barriers + 8 * ring.stage, empty = full + 8 * L::stages;
        const uint32_t a = base + ring.stage * L::stage_bytes;
        const uint32_t b = a + L::a_bytes + rank * (L::b_bytes / kCluster);
        const int k = step * kBlockK, n = place.col + rank * kShare;
        barrier_wait(empty, ring.phase ^ first_parity);  // the consumers of both blocks are done with the stage
        // All of a and of b arrive here, half of b by the other block's multicast.
        barrier_arrive_expect(full, L::stage_bytes);
        tensor_load(a, &args.a[s], k, place.row, full);
        if constexpr (kRowsAreN) {
          tensor_load_multicast(b, &args.b[s], k, n, full, kAll);
        } else {
#pragma unroll
          for (int i = 0; i < kShare / 64; ++i)
            tensor_load_multicast(b + i * 64 * kBlockK * 2, &args.b[s], n + 64 * i, k, full, kAll);
        }
      }
    }
  }
}

// One warpgroup: acc (+)= a b for its 64 rows of a and all columns of b of a stage, in flight until it is waited for.
// Rows of 128 bytes, eight rows 1024 apart. A step of 16 along K moves 32 bytes within the swizzle where rows are
// contiguous along K, and 16 rows where they are contiguous along N. Descriptors count 16 bytes.
template <typename T, bool kRowsAreN, int kCount>
__device__ __forceinline__ void multiply_stage(float (&acc)[kCount], uint32_t stage, int group, int keep) {
  constexpr uint64_t kNextA = kWgmmaK * 2 >> 4;
  constexpr uint64_t kNextB = (kRowsAreN ? kWgmmaK * 2 : kWgmmaK * 128) >> 4;
  const uint64_t a = matrix_descriptor(stage + group * 64 * 128, 0, 1024);
  const uint64_t b = matrix_descriptor(stage + kBlockM * kBlockK * 2, kBlockK * 128, 1024);
  wgmma_fence();
#pragma unroll
  for (int part = 0; part < kBlockK / kWgmmaK; ++part)
    wgmma<T, 0, !kRowsAreN>(acc, a + part * kNextA, b + part * kNextB, keep + part > 0);
  wgmma_commit();
}

// 64 columns of a tile as pairs of T, from how wgmma holds them.
template <typename T>
__device__ __forceinline__ void pack_slab(uint32_t* pairs, const float* acc) {
#pragma unroll
  for (int i = 0; i < 16; ++i) pairs[i] = pack<T>(acc[2 * i], acc[2 * i + 1]);
}

// A warp's staging and what it stores from there.
struct Staging {
  uint32_t slabs;
  int turn = 0;

  // 16 rows of 64 columns to the matrix behind `map`.
  __device__ __forceinline__ void store(const CUtensorMap* map, bool add, const uint32_t* pairs, int row, int col) {
    const int lane = threadIdx.x % 32;
    const uint32_t slab = slabs + turn * kSlabBytes;
    if (lane == 0) store_wait_read<kStagingSlabs - 1>();  // the slab's store before has read it
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t chunk = (2 * i + lane / 16) ^ (lane % 8);
      matrix_store(slab + lane % 16 * 128 + chunk * 16, pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2],
                   pairs[4 * i + 3]);
    }
    async_proxy_fence();  // every lane's part of the slab, before TMA reads it
    __syncwarp();
    if (lane == 0) {
      add ? tensor_add(map, slab, col, row) : tensor_store(map, slab, col, row);
      store_commit();
    }
    turn = turn + 1 == kStagingSlabs ? 0 : turn + 1;
  }
};

// The columns of 64 from `col` on of which a lane holds this one and the next. Past the last column, which is not
// stored, the last one's values serve.
__device__ __forceinline__ int column_of(const Output& output, int col, int j) {
  return min(col + 8 * j + 2 * int(threadIdx.x % 4), output.n - 2);
}

// acc = (mag_norm_scale - less)∘acc in 64 columns; all loads before the first use.
__device__ __forceinline__ void scale(const Output& output, float* acc, int col, float less) {
  float2 g[8];
#pragma unroll
  for (int j = 0; j < 8; ++j)
    g[j] = *reinterpret_cast<const float2*>(output.mag_norm_scale + column_of(output, col, j));
#pragma unroll
  for (int i = 0; i < 32; ++i) acc[i] *= (i % 2 ? g[i / 4].y : g[i / 4].x) - less;
}

// acc += bias in the same way.
template <typename T>
__device__ __forceinline__ void shift(const Output& output, float* acc, int col) {
  const T* bias = static_cast<const T*>(output.bias);
  uint32_t b[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) b[j] = *reinterpret_cast<const uint32_t*>(bias + column_of(output, col, j));
#pragma unroll
  for (int i = 0; i < 32; ++i) acc[i] += i % 2 ? unpack<T>(b[i / 4]).y : unpack<T>(b[i / 4]).x;
}

// Four words of each lane of four neighbouring ones: word j of lane i becomes word i of lane j.
__device__ __forceinline__ void transpose_words(uint32_t (&w)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? w[i] : w[i + 2], 2);
    (high ? w[i] : w[i + 2]) = got;
  }
}

// acc = D(acc) in 64 columns of the tile, from `col` on, for the rows `row` and `row` + 8 of this lane. Of four blocks
// of eight columns a lane draws one, and has two columns of each.
__device__ __forceinline__ void drop(const Mask& mask, float kept, uint64_t key, float* acc, int row, int col) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int block = 0; block < 8; block += 4) {
      Words words = philox(key, row + 8 * half, col / kMaskColumns + block + threadIdx.x % 4);
      transpose_words(words.word);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* const pair = acc + 4 * (block + i) + 2 * half;
        pair[0] = mask.keeps_low(words.word[i]) ? pair[0] * kept : 0.0f;
        pair[1] = mask.keeps_high(words.word[i]) ? pair[1] * kept : 0.0f;
      }
    }
}

// Lines of bias and mag_norm_scale that the end of a tile will read.
template <typename T, int kBlockN>
__device__ __forceinline__ void prefetch_vectors(const Output& output, int col) {
  const int line = threadIdx.x % 128, n = col + line * (128 / sizeof(float));
  if (output.mag_norm_scale && line < kBlockN / 32 && n < output.n) prefetch_l1(output.mag_norm_scale + n);
  if (output.bias && line < kBlockN / 32 && n < output.n)
    prefetch_l1(static_cast<const T*>(output.bias) + n);  // each line of it twice
}

// One warpgroup: the products and the stores of its rows of the block's tiles.
template <typename T, int kBlockN, bool kRowsAreN, LeadingOp kLeading, int kOutputs>
__device__ __forceinline__ void consume(const Arguments<kOutputs>& args, uint32_t base, int rank, int first_tile) {
  using L = Layout<kBlockN>;
  const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const uint32_t full = base + L::barriers;
  // One lane of every warp tells one block of the cluster that a stage has been read.
  const uint32_t empty = cluster_address(full + 8 * L::stages, lane % kCluster);
  const auto release = [&](int stage) {
    if (lane < kCluster) barrier_arrive_cluster(empty + 8 * stage);
  };
  Ring<L::stages> ring;
  float acc[kBlockN / 2];
  // The tile before, rounded: its stores go out behind the first products of this one.
  constexpr int kSlabs = kBlockN / 64;
  uint32_t held[kBlockN / 4];
  Tile held_at{-1, 0, 0};
  Staging staging{base + L::staging + warp * kStagingSlabs * kSlabBytes};
  const auto store_held = [&](int part) {
    staging.store(&args.out[held_at.output], args.accumulate, held + 16 * part, held_at.row, held_at.col + 64 * part);
  };

  for (int tile = first_tile; tile < args.tiles_m * args.tiles_n; tile += gridDim.x / kCluster) {
    const Tile place = tile_of<kBlockN>(args, tile, rank);
    const Output& output = args.output[place.output];
    prefetch_vectors<T, kBlockN>(output, place.col);
    const auto store_unscaled = [&](int part) {
      uint32_t pairs[16];
      pack_slab<T>(pairs, acc + 32 * part);
      staging.store(&args.unscaled[place.output], false, pairs, place.row + warp * 16, place.col + 64 * part);
    };
    int before = 0;  // the stage of the step before, whose product may still run
    for (int step = 0; step < output.steps; ++step) {
      barrier_wait(full + 8 * ring.stage, ring.phase);
      const uint32_t stage = base + ring.stage * L::stage_bytes;
      if constexpr (kLeading != LeadingOp::kNone) {
        if (step == args.leading_steps) {  // the leading segments' sum is whole: once a tile, in registers
          wgmma_wait<0>();
          keep_below(acc);
          const uint64_t key = kLeading == LeadingOp::kMask ? args.mask.key() : 0;
#pragma unroll
          for (int part = 0; part < kSlabs; ++part) {
            if constexpr (kLeading == LeadingOp::kMask) {
              drop(args.mask, args.kept, key, acc + 32 * part, place.row + warp * 16 + lane / 4, place.col + 64 * part);
            } else if constexpr (kLeading == LeadingOp::kScale) {
#pragma unroll
              for (int i = 0; i < 32; ++i) acc[32 * part + i] *= args.kept;
            } else {
              store_unscaled(part);
              scale(output, acc + 32 * part, place.col + 64 * part, 1.0f);
            }
          }
        }
      }
      multiply_stage<T, kRowsAreN>(acc, stage, group, step);
      if (step < kSlabs && held_at.row >= 0) {
#pragma unroll
        for (int part = 0; part < kSlabs; ++part)
          if (part == step) store_held(part);
      }
      // All but this step's products are done: the stage before may be loaded again, while these run.
      wgmma_wait<1>();
      if (step > 0) release(before);
      before = ring.stage;
      ring.advance();
    }
    wgmma_wait<0>();
    release(before);
    keep_below(acc);

#pragma unroll
    for (int part = 0; part < kSlabs; ++part) {
      if (part >= output.steps && held_at.row >= 0) store_held(part);
      const int col = place.col + 64 * part;
      if (kLeading != LeadingOp::kExcess && output.mag_norm_scale) {
        store_unscaled(part);
        scale(output, acc + 32 * part, col, 0.0f);
      }
      if (output.bias) shift<T>(output, acc + 32 * part, col);
      pack_slab<T>(held + 16 * part, acc + 32 * part);
    }
    held_at = {place.row + warp * 16, place.col, place.output};
  }
#pragma unroll
  for (int part = 0; part < kSlabs; ++part) store_held(part);
  if (lane == 0) store_wait_all();
}

template <typename T, int kBlockN, bool kRowsAreN, LeadingOp kLeading>
__global__ __launch_bounds__(kThreads, 1) void gemm_kernel(const __grid_constant__ Arguments<1> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kBlockN>;
  extern __shared__ uint8_t shared[];
  const uint32_t base = (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + 1023) / 1024 * 1024;
  const int rank = static_cast<int>(cluster_rank()), cluster = blockIdx.x / kCluster;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < L::stages; ++stage) {
      barrier_init(base + L::barriers + 8 * stage, 1);
      barrier_init(base + L::barriers + 8 * (L::stages + stage), kConsumerWarps * kCluster);
    }
    barrier_init_fence();
  } else if (threadIdx.x >= 32 && threadIdx.x < 32 + args.output[0].segments) {
    tensor_map_prefetch(&args.a[threadIdx.x - 32]);
    tensor_map_prefetch(&args.b[threadIdx.x - 32]);
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    registers_lower<40>();
    if (threadIdx.x == 0) produce<kBlockN, kRowsAreN>(args, base, rank, cluster, /*first_parity=*/1, [](int) {});
  } else {
    registers_raise<232>();
    consume<T, kBlockN, kRowsAreN, kLeading>(args, base, rank, cluster);
  }
  cluster_sync();  // the other block of the cluster still arrives at this one's barriers
#endif
}

}  // namespace lora_fused::sm90
