// The kernels of row_norm.cu: DoRA's norms of a group on Hopper, from one read of each weight, for a bfloat16 W and a
// float32 A.
//
//   |w + s·b A|² = |w|² + 2s b·(A w) + s² b·(A Aᵀ) b      for each row w of W [N, K] and b of B [N, R]
//
// Bound by that read. All work is steps: 64 columns of 256 rows of a W, or of A itself for A Aᵀ. They are dealt out
// evenly, a run to each block, so that a run begins and ends anywhere in a row. One thread loads; four warpgroups
// multiply 64 rows each by A and square what they multiply. Where rows or run end they apply B, in float32, and leave
// |w|² and 2s b·(A w) of the run as one number each a row. A second kernel adds these up in their order, and A Aᵀ.
// A is hi and lo of bfloat16 below each other, 16 of its 24 bits, whose products are added up; B is of any dtype. A
// wgmma truncates what it adds to: those of a step are a sum of their own, and steps are added up in registers. Terms
// cancel where s·b A nearly takes w away: an error of 1e-7 of |w|², not of the result. Everything is 128-byte swizzled;
// ragged edges and ranks are what the copy engine fills with zeros.
#pragma once

#include "../../common/mag_norm_scale.h"
#include "../common/dtype.cuh"
#include "../common/vector_access.cuh"
#include "ptx.cuh"

namespace lora_fused::sm90::row_norm {

constexpr int kRows = 256, kStep = 64, kWgmmaK = 16;  // kWgmmaK: elements summed by a wgmma
constexpr int kGroups = 4, kConsumerWarps = 4 * kGroups;
// One thread loads; its warpgroup is whole, since registers move between warpgroups.
constexpr int kThreads = 128 * (kGroups + 1), kConsumerRegisters = 112, kProducerRegisters = 24;
constexpr int kBox = 64 * 128;  // bytes of 64 rows of 64 elements
constexpr int kStages = 5, kWBytes = kGroups * kBox, kStageBytes = kWBytes + kBox;
constexpr int kBarriers = kStages * kStageBytes, kBytes = kBarriers + 2 * kStages * 8 + 1024;  // to align the base
constexpr int kMostRanks = 32, kEntries = 8;                                                   // of one launch

struct MatrixB {  // [N, R]
  const void* data;
  int dtype, ranks;

  // Calls `use` with it in its dtype: one branch for all that is read there.
  template <typename Use>
  __device__ __forceinline__ void read(const Use& use) const {
    if (dtype == kFloat)
      use(static_cast<const float*>(data));
    else if (dtype == kBFloat16)
      use(static_cast<const __nv_bfloat16*>(data));
    else
      use(static_cast<const __half*>(data));
  }
};

// W and A, or A and A with a place for A Aᵀ.
struct Entry {
  CUtensorMap w, a;
  MatrixB b;
  float* gram;             // [runs, kWidth, kWidth] or null
  int rows, steps, tiles;  // steps of a tile
  int first_step, first_tile, first_block;
  float scaling;
};

struct Arguments {
  Entry entry[kEntries];
  float *products, *squares;   // [blocks + tiles, kRows]: of block + tile
  int entries, steps, blocks;  // of all
};

// Steps [first, last) of a block.
struct Run {
  int first, last;
  __device__ __forceinline__ explicit Run(const Arguments& args)
      : first(static_cast<int>(int64_t{blockIdx.x} * args.steps / args.blocks)),
        last(static_cast<int>(int64_t{blockIdx.x + 1} * args.steps / args.blocks)) {}
};

// The block whose run has a step.
__host__ __device__ inline int block_of(int64_t step, int steps, int blocks) {
  return static_cast<int>(((step + 1) * blocks - 1) / steps);
}

// Blocks whose runs have steps of an entry.
inline int runs_of(const Entry& e, const Arguments& args) {
  const int64_t last = e.first_step + int64_t{e.tiles} * e.steps - 1;
  return block_of(last, args.steps, args.blocks) - block_of(e.first_step, args.steps, args.blocks) + 1;
}

// Where a step is.
struct Place {
  int entry = 0, tile, step;
  __device__ __forceinline__ Place(const Arguments& args, int first) {
    while (entry + 1 < args.entries && first >= args.entry[entry + 1].first_step) ++entry;
    const Entry& e = args.entry[entry];
    tile = (first - e.first_step) / e.steps;
    step = (first - e.first_step) % e.steps;
  }
  __device__ __forceinline__ void advance(const Entry& e) {
    if (++step < e.steps) return;
    step = 0;
    if (++tile == e.tiles) tile = 0, ++entry;
  }
};

// Where a thread is in the ring, and the parity of that stage's current phase.
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// One thread: all loads of a run.
template <int kWidth>
__device__ __forceinline__ void produce(const Arguments& args, uint32_t base, const Run& run) {
  Ring ring;
  Place at(args, run.first);
  for (int i = run.first; i < run.last; ++i, ring.advance()) {
    const Entry& e = args.entry[at.entry];
    const uint32_t full = base + kBarriers + 8 * ring.stage, empty = full + 8 * kStages;
    const uint32_t stage = base + ring.stage * kStageBytes;
    barrier_wait(empty, ring.phase ^ 1);
    barrier_arrive_expect(full, kWBytes + kWidth * 128);
    tensor_load(stage, &e.w, at.step * kStep, at.tile * kRows, full);
    tensor_load(stage + kWBytes, &e.a, at.step * kStep, 0, full);
    at.advance(e);
  }
}

// One warpgroup: adds the squares of a box of 64 rows and 64 columns, to four rows a thread, 16 apart; eight
// neighbouring threads share a row.
__device__ __forceinline__ void add_squares(float (&squares)[4], const uint8_t* box) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 eight = *reinterpret_cast<const uint4*>(box + 16 * (threadIdx.x % 128) + 16 * 128 * i);
    for (const uint32_t both : {eight.x, eight.y, eight.z, eight.w}) {
      const float2 x = unpack<__nv_bfloat16>(both);
      squares[i] = fmaf(x.x, x.x, fmaf(x.y, x.y, squares[i]));
    }
  }
}

// One warpgroup: what a run has of a tile's rows. Thread l of warp w has rows 16 w + l / 4 (+ 8) of `sums`.
template <int kWidth>
__device__ __forceinline__ void store_run(const Arguments& args, const Entry& e, int tile,
                                          const float (&sums)[kWidth / 2], float (&squares)[4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (e.gram != nullptr) {
    float* const gram = e.gram + (blockIdx.x - e.first_block) * kWidth * kWidth;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (row < kWidth) gram[row * kWidth + col] = sums[i];
    }
    return;
  }
  const int64_t from = int64_t{blockIdx.x + e.first_tile + tile} * kRows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int in_tile = 16 * warp + lane / 4 + 8 * half, row = tile * kRows + in_tile;
    float b[kWidth / 4], dot = 0.0f;
    e.b.read([&](const auto* data) {
#pragma unroll
      for (int i = 0; i < kWidth / 4; ++i) {
        const int col = i / 2 * 8 + lane % 4 * 2 + i % 2, rank = col < e.b.ranks ? col : col - e.b.ranks;
        b[i] = row < e.rows && col < 2 * e.b.ranks ? widen(data[int64_t{row} * e.b.ranks + rank]) : 0.0f;
      }
    });
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) dot += sums[i / 2 * 4 + 2 * half + i % 2] * b[i];
    for (int other = 1; other < 4; other *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, other);
    if (lane % 4 == 0) args.products[from + in_tile] = 2.0f * e.scaling * dot;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    for (int other = 1; other < 8; other *= 2) squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], other);
    const int in_tile = 64 * (warp / 4) + threadIdx.x % 128 / 8 + 16 * i;
    if (lane % 8 == 0) args.squares[from + in_tile] = squares[i];
  }
}

template <int kWidth>
__device__ __forceinline__ void consume(const Arguments& args, const uint8_t* shared, uint32_t base, const Run& run) {
  constexpr uint64_t kNext = kWgmmaK * 2 >> 4;
  const int group = threadIdx.x / 128;
  const uint32_t full = base + kBarriers, empty = full + 8 * kStages;
  float acc[kWidth / 2] = {}, sums[kWidth / 2] = {}, squares[4] = {};
  Ring ring;
  Place at(args, run.first);
  for (int i = run.first; i < run.last; ++i, ring.advance()) {
    const Entry& e = args.entry[at.entry];
    const int offset = ring.stage * kStageBytes + group * kBox;
    barrier_wait(full + 8 * ring.stage, ring.phase);
    const uint64_t w = matrix_descriptor(base + offset, kBox, 1024);
    const uint64_t a = matrix_descriptor(base + ring.stage * kStageBytes + kWBytes, kBox, 1024);
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < kStep / kWgmmaK; ++part)
      wgmma<__nv_bfloat16, 0, 0>(acc, w + part * kNext, a + part * kNext, part > 0);
    wgmma_commit();
    // Squares while the products run; both only read the stage. The order within the box does not matter: a chunk keeps
    // its row under the swizzle.
    add_squares(squares, shared + offset);
    wgmma_wait<0>();
    keep_below(acc);
#pragma unroll
    for (int j = 0; j < kWidth / 2; ++j) sums[j] += acc[j];
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * ring.stage);
    if (at.step + 1 == e.steps || i + 1 == run.last) {
      store_run<kWidth>(args, e, at.tile, sums, squares);
#pragma unroll
      for (int j = 0; j < kWidth / 2; ++j) sums[j] = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) squares[j] = 0.0f;
    }
    at.advance(e);
  }
}

// kWidth: twice the ranks of all entries, rounded up to what a wgmma takes.
template <int kWidth>
__global__ __launch_bounds__(kThreads, 1) void products_kernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared[];
  const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t base = (start + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(base + kBarriers + 8 * stage, 1);
      barrier_init(base + kBarriers + 8 * (kStages + stage), kConsumerWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const Run run(args);
  if (threadIdx.x < 32 * kConsumerWarps) {
    registers_raise<kConsumerRegisters>();
    consume<kWidth>(args, shared + (base - start), base, run);
  } else {
    registers_lower<kProducerRegisters>();
    if (threadIdx.x == 32 * kConsumerWarps) produce<kWidth>(args, base, run);
  }
#endif
}

// The norms of one weight, and its mag_norm_scale where there is a magnitude.
struct Finish {
  const float *products, *squares, *gram, *magnitude;
  MatrixB b;
  float *norm, *mag_norm_scale;
  int rows, steps, first_step, first_tile;
  int all_steps, blocks;  // of the launch
  int grams;
  float scaling, unit;  // unit: of mag_norm_scale_of
};

struct Finishes {
  Finish of[kEntries / 2];
};

constexpr int kFinishThreads = 256, kFinishRows = 128;  // of a block

// Of norm blockIdx.y, a row a thread. kRanks: of all, rounded up.
template <int kRanks>
__global__ __launch_bounds__(kFinishThreads) void finish_kernel(const __grid_constant__ Finishes all) {
  constexpr int kWidth = 2 * kRanks, kElements = (kRanks * kRanks + kFinishThreads - 1) / kFinishThreads, kBatch = 8;
  __shared__ float4 gram[kElements * kFinishThreads / 4];
  __shared__ float rows_of_b[kFinishRows][kRanks + 1];
  const Finish& f = all.of[blockIdx.y];
  const int first = blockIdx.x * kFinishRows, count = min(kFinishRows, f.rows - first), ranks = f.b.ranks;
  if (count <= 0) return;
  f.b.read([&](const auto* data) {
#pragma unroll
    for (int j = 0; j < kFinishRows * kRanks / kFinishThreads; ++j) {
      const int i = threadIdx.x + j * kFinishThreads, row = i / kRanks, rank = i % kRanks;
      rows_of_b[row][rank] = row < count && rank < ranks ? widen(data[int64_t{first + row} * ranks + rank]) : 0.0f;
    }
  });
  // A Aᵀ is the sum of each run's four blocks of it, hi and lo by hi and lo: many asked for at once.
  float sums[kElements] = {};
  for (int term = 0; term < 4 * f.grams; term += kBatch) {
    float batch[kBatch][kElements];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int t = term + i, row = t % 2 * ranks, col = t / 2 % 2 * ranks;
      const float* const from = f.gram + (t / 4 * kWidth + row) * kWidth + col;
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        const int at = threadIdx.x + j * kFinishThreads, r = at / kRanks, c = at % kRanks;
        batch[i][j] = t < 4 * f.grams && r < ranks && c < ranks ? from[r * kWidth + c] : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int j = 0; j < kElements; ++j) sums[j] += batch[i][j];
  }
#pragma unroll
  for (int j = 0; j < kElements; ++j) reinterpret_cast<float*>(gram)[threadIdx.x + j * kFinishThreads] = sums[j];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= count) return;
  float b[kRanks], of_gram = 0.0f, squared = 0.0f;
#pragma unroll
  for (int i = 0; i < kRanks; ++i) b[i] = rows_of_b[threadIdx.x][i];
#pragma unroll 4
  for (int i = 0; i < kRanks; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kRanks / 4; ++j) {
      const float4 four = gram[i * (kRanks / 4) + j];
      sum += four.x * b[4 * j] + four.y * b[4 * j + 1] + four.z * b[4 * j + 2] + four.w * b[4 * j + 3];
    }
    of_gram += sum * rows_of_b[threadIdx.x][i];
  }
  const int row = first + static_cast<int>(threadIdx.x), tile = row / kRows;
  const int64_t step = f.first_step + int64_t{tile} * f.steps;
  const int last = block_of(step + f.steps - 1, f.all_steps, f.blocks);
  for (int block = block_of(step, f.all_steps, f.blocks); block <= last; ++block) {
    const int64_t at = int64_t{block + f.first_tile + tile} * kRows + row % kRows;
    squared += f.squares[at] + f.products[at];
  }
  squared += f.scaling * f.scaling * of_gram;
  const float norm = sqrtf(squared < 0.0f ? 0.0f : squared);  // not a number stays so
  f.norm[row] = norm;
  if (f.magnitude != nullptr) f.mag_norm_scale[row] = mag_norm_scale_of<float>(f.magnitude[row], norm, f.unit);
}

}  // namespace lora_fused::sm90::row_norm
