// gather_add: the forward of an adapted embedding in one launch, see embedding_common.cuh.
#pragma once

#include "embedding_common.cuh"

namespace lora_fused {
namespace embedding {

constexpr int kForwardTokens = 16;    // of a step
constexpr int kForwardWarpCols = 32;  // 8 a lane

// A block of kThreads threads has as many columns, and A of kMost steps of 32 ranks in shared memory; W is asked for
// kAhead steps ahead. Every block gathers A of its tokens anew: small ones, a step each, are for few tokens.
template <int kThreads_, int kMost_, int kAhead_>
struct ForwardBlock {
  static constexpr int kThreads = kThreads_, kMost = kMost_, kAhead = kAhead_, kWarps = kThreads / 32;
  static_assert(kForwardWarpCols == 32 && kForwardTokens % kWarps == 0 && kMost * kForwardTokens <= kThreads);
  struct Shared {
    uint4 w[kAhead][2][kThreads];  // of two tokens and 8 columns, each thread's own
    float a[kMost * kForwardTokens][kRanks + 4];
    int ids[kMost * kForwardTokens];
  };
};
using FewTokens = ForwardBlock<128, 1, 1>;
using ManyTokens = ForwardBlock<512, 16, 2>;

// How a warp holds B, an adapter of P, for its 32 columns and 32 ranks: right operands in the half type H, hi and lo of
// a float32 B.
template <typename P>
struct ForwardB {
  static constexpr bool kSplit = std::is_same_v<P, float>;
  static constexpr int kTiles = kForwardWarpCols / 8, kSplits = kSplit ? 2 : 1;
  using H = std::conditional_t<kSplit, __nv_bfloat16, P>;
  using Fragments = uint32_t[kTiles][kSteps][2][kSplits];

  // Ranks [rank0, rank0 + 32) of the warp's columns from `warp_col` on.
  static __device__ __forceinline__ void load(Fragments& b, const Args& p, int warp_col, int rank0) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = warp_col + g / 2 * 8 + tile * 2 + g % 2;
          const int from = rank0 + step * 16 + half * 8 + t * 2;
          float x[2];
#pragma unroll
          for (int i = 0; i < 2; ++i)
            x[i] = at < p.h && from + i < p.r
                       ? static_cast<float>(static_cast<const P*>(p.b.data)[int64_t{at} * p.r + from + i])
                       : 0.0f;
          if constexpr (kSplit)
            split(x[0], x[1], b[tile][step][half][0], b[tile][step][half][1]);
          else
            b[tile][step][half][0] = pack_as<H>(x[0], x[1]);
        }
  }

  // c [16 tokens, 32 columns] += A's 32 gathered ranks of 16 tokens, `a` [16, 36], times B.
  static __device__ __forceinline__ void multiply_ranks(float (&c)[kTiles][4], const float (*a)[kRanks + 4],
                                                        const Fragments& b) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t left[kSplits][4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float2 x = *reinterpret_cast<const float2*>(&a[g + q % 2 * 8][step * 16 + q / 2 * 8 + t * 2]);
        if constexpr (kSplit)
          split(x.x, x.y, left[0][q], left[1][q]);
        else
          left[0][q] = pack_as<H>(x.x, x.y);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t (&of)[2][kSplits] = b[tile][step];
        if constexpr (kSplit) {
          multiply<H>(c[tile], left[1], of[0][0], of[1][0]);
          multiply<H>(c[tile], left[0], of[0][1], of[1][1]);
        }
        multiply<H>(c[tile], left[0], of[0][0], of[1][0]);
      }
    }
  }
};

// A block's tokens [first, first + count), of at most `tokens`.
struct ForwardTokens {
  int64_t first;
  int tokens, count;
};

// Asks for W of one step's 16 tokens, this thread's 8 columns from `col` on.
template <typename Block>
__device__ __forceinline__ void fetch_w(typename Block::Shared& shared, const Args& p, int count, int col, int step) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = step * kForwardTokens + g + 8 * i;
    const bool valid = token < count && col < p.h;
    const int64_t at = valid ? int64_t{shared.ids[token]} * p.h + col : 0;
    copy_async(shared_address(&shared.w[step % Block::kAhead][i][threadIdx.x]), static_cast<const uint16_t*>(p.w) + at,
               valid);
  }
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// All ranks of A at the block's tokens to shared memory, a warp a token, 32 ranks a pass below each other; and to
// `rows` [m, r] where it is not null.
template <typename Block>
__device__ __forceinline__ void gather_a(typename Block::Shared& shared, float* __restrict__ rows, const Args& p,
                                         const ForwardTokens& at, int passes) {
  constexpr int kWarps = Block::kWarps;
  constexpr int kGathered = Block::kMost == 1 ? kForwardTokens / kWarps : 8;  // of a warp at once
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int pass = 0; pass < passes; ++pass) {
    const int rank = pass * kRanks + lane;
    for (int row0 = warp; row0 < at.tokens; row0 += kGathered * kWarps) {
      float a[kGathered];
#pragma unroll
      for (int i = 0; i < kGathered; ++i) {
        const int token = row0 + i * kWarps;
        a[i] = token < at.count && rank < p.r ? load(p.a, rank * p.v + shared.ids[token]) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kGathered; ++i) {
        const int token = row0 + i * kWarps;
        if (token >= at.tokens) continue;
        shared.a[pass * at.tokens + token][lane] = a[i];
        if (rows != nullptr && blockIdx.x == 0 && token < at.count && rank < p.r)
          rows[(at.first + token) * p.r + rank] = a[i];
      }
    }
  }
}

// The rows of y of one step, from `start` on: (e·W + s·e·c) times DoRA's scale.
template <typename T, int kTiles>
__device__ __forceinline__ void store_y(T* __restrict__ y, const Args& p, const ForwardTokens& at, int start, int col,
                                        const uint4 (&base)[2], const float (&c)[kTiles][4], float2 scales) {
  const int g = threadIdx.x % 32 / 4;
  float mag_norm_scale[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) mag_norm_scale[i] = p.mag_norm_scale != nullptr ? p.mag_norm_scale[col + i] : 1.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = start + g + 8 * i;
    if (token >= at.count) continue;
    const uint32_t words[4] = {base[i].x, base[i].y, base[i].z, base[i].w};
    uint32_t out[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 from = pair(words[j], T());
      out[j] = pack_as<T>((from.x * scales.x + c[j][2 * i] * scales.y) * mag_norm_scale[2 * j],
                          (from.y * scales.x + c[j][2 * i + 1] * scales.y) * mag_norm_scale[2 * j + 1]);
    }
    *reinterpret_cast<uint4*>(y + (at.first + token) * p.h + col) = uint4{out[0], out[1], out[2], out[3]};
  }
}

// Grid: blocks of columns × blocks of `steps` steps, of which a block holds A whole: kMost / steps times 32 ranks at
// most. `rows` [m, r], or null. No warp waits for another after A and the ids.
template <typename T, typename P, typename Block>
__global__ void __launch_bounds__(Block::kThreads)
    gather_add_fwd_kernel(T* __restrict__ y, float* __restrict__ rows, int steps, const Args p) {
#if __CUDA_ARCH__ >= 800
  using B = ForwardB<P>;
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<typename Block::Shared*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_col = blockIdx.x * Block::kThreads + warp * kForwardWarpCols, col = warp_col + lane % 4 * 8;
  const int64_t first = int64_t{blockIdx.y} * steps * kForwardTokens;
  const int tokens = steps * kForwardTokens, count = static_cast<int>(min(int64_t{tokens}, p.m - first));
  const ForwardTokens at{first, tokens, count};

  const int64_t id = threadIdx.x < count ? load_id(p, first + threadIdx.x) : 0;
  typename B::Fragments b;
  B::load(b, p, warp_col, 0);
  if (threadIdx.x < count) {
    CUDA_KERNEL_ASSERT(id >= 0 && id < p.v && "index out of range in self");
    shared.ids[threadIdx.x] = static_cast<int>(id);
  }
  __syncthreads();
  for (int step = 0; step < Block::kAhead; ++step) fetch_w<Block>(shared, p, count, col, step);

  const int passes = (p.r + kRanks - 1) / kRanks;  // of 32 ranks each, their A below each other
  gather_a<Block>(shared, rows, p, at, passes);
  __syncthreads();

  const float on_base = own_scale(p, dtype_of<T>());
  const float on_delta = own_scale(p, p.b.dtype) * p.scaling;
#pragma unroll 1
  for (int step = 0; step * kForwardTokens < count; ++step) {
    const int start = step * kForwardTokens;
    float c[B::kTiles][4] = {};
    B::multiply_ranks(c, shared.a + start, b);
    for (int pass = 1; pass < passes; ++pass) {
      B::load(b, p, warp_col, pass * kRanks);
      B::multiply_ranks(c, shared.a + pass * tokens + start, b);
    }
    if (passes > 1) B::load(b, p, warp_col, 0);
    asm volatile("cp.async.wait_group %0;\n" ::"n"(Block::kAhead - 1) : "memory");
    uint4 base[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) base[i] = shared.w[step % Block::kAhead][i][threadIdx.x];
    asm volatile("" ::: "memory");  // read before it is written again
    fetch_w<Block>(shared, p, count, col, step + Block::kAhead);
    if (col < p.h) store_y(y, p, at, start, col, base, c, {on_base, on_delta});
  }
#endif
}

}  // namespace embedding
}  // namespace lora_fused
