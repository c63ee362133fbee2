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

// Grid: blocks of columns × blocks of `steps` steps, of which a block holds A whole: kMost / steps times 32 ranks at
// most. `rows` [m, r], or null. No warp waits for another after A and the ids.
template <typename T, typename P, typename Block>
__global__ void __launch_bounds__(Block::kThreads)
    gather_add_fwd_kernel(T* __restrict__ y, float* __restrict__ rows, int steps, const Args p) {
  constexpr bool kSplit = std::is_same_v<P, float>;
  constexpr int kTiles = kForwardWarpCols / 8, kSplits = kSplit ? 2 : 1, kWarps = Block::kWarps;
  constexpr int kGathered = Block::kMost == 1 ? kForwardTokens / kWarps : 8;  // of a warp at once
  using H = std::conditional_t<kSplit, __nv_bfloat16, P>;
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<typename Block::Shared*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_col = blockIdx.x * Block::kThreads + warp * kForwardWarpCols, col = warp_col + t * 8;
  const int64_t first = int64_t{blockIdx.y} * steps * kForwardTokens;
  const int tokens = steps * kForwardTokens, count = static_cast<int>(min(int64_t{tokens}, p.m - first));

  const int64_t id = threadIdx.x < count ? load_id(p, first + threadIdx.x) : 0;
  uint32_t b[kTiles][kSteps][2][kSplits];
  const auto load_b = [&](int rank0) {
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
                       ? static_cast<float>(
                             static_cast<const P*>(p.b.data)[int64_t{at} * p.r + from + i])
                       : 0.0f;
          if constexpr (kSplit)
            split(x[0], x[1], b[tile][step][half][0], b[tile][step][half][1]);
          else
            b[tile][step][half][0] = pack_as<H>(x[0], x[1]);
        }
  };
  load_b(0);
  if (threadIdx.x < count) {
    CUDA_KERNEL_ASSERT(id >= 0 && id < p.v && "index out of range in self");
    shared.ids[threadIdx.x] = static_cast<int>(id);
  }
  __syncthreads();
  const auto fetch = [&](int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = step * kForwardTokens + g + 8 * i;
      const bool valid = token < count && col < p.h;
      const int64_t at = valid ? int64_t{shared.ids[token]} * p.h + col : 0;
      copy_async(shared_address(&shared.w[step % Block::kAhead][i][threadIdx.x]),
                 static_cast<const uint16_t*>(p.w) + at, valid);
    }
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  };
  for (int step = 0; step < Block::kAhead; ++step) fetch(step);

  const int passes = (p.r + kRanks - 1) / kRanks;  // of 32 ranks each, their A below each other
  for (int pass = 0; pass < passes; ++pass) {
    const int rank = pass * kRanks + lane;
    for (int row0 = warp; row0 < tokens; row0 += kGathered * kWarps) {
      float a[kGathered];
#pragma unroll
      for (int i = 0; i < kGathered; ++i) {
        const int token = row0 + i * kWarps;
        a[i] = token < count && rank < p.r ? load(p.a, rank * p.v + shared.ids[token]) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kGathered; ++i) {
        const int token = row0 + i * kWarps;
        if (token >= tokens) continue;
        shared.a[pass * tokens + token][lane] = a[i];
        if (rows != nullptr && blockIdx.x == 0 && token < count && rank < p.r)
          rows[(first + token) * p.r + rank] = a[i];
      }
    }
  }
  __syncthreads();
  const auto multiply_ranks = [&](float (&c)[kTiles][4], int row0) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kSplits][4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float2 x = *reinterpret_cast<const float2*>(
            &shared.a[row0 + g + q % 2 * 8][step * 16 + q / 2 * 8 + t * 2]);
        if constexpr (kSplit)
          split(x.x, x.y, a[0][q], a[1][q]);
        else
          a[0][q] = pack_as<H>(x.x, x.y);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t(&of)[2][kSplits] = b[tile][step];
        if constexpr (kSplit) {
          multiply<H>(c[tile], a[1], of[0][0], of[1][0]);
          multiply<H>(c[tile], a[0], of[0][1], of[1][1]);
        }
        multiply<H>(c[tile], a[0], of[0][0], of[1][0]);
      }
    }
  };

  const float on_base = own_scale(p, dtype_of<T>());
  const float on_delta = own_scale(p, p.b.dtype) * p.scaling;
#pragma unroll 1
  for (int step = 0; step * kForwardTokens < count; ++step) {
    const int start = step * kForwardTokens;
    float c[kTiles][4] = {};
    multiply_ranks(c, start);
    for (int pass = 1; pass < passes; ++pass) {
      load_b(pass * kRanks);
      multiply_ranks(c, pass * tokens + start);
    }
    if (passes > 1) load_b(0);
    asm volatile("cp.async.wait_group %0;\n" ::"n"(Block::kAhead - 1) : "memory");
    uint4 base[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) base[i] = shared.w[step % Block::kAhead][i][threadIdx.x];
    asm volatile("" ::: "memory");  // read before it is written again
    fetch(step + Block::kAhead);
    if (col >= p.h) continue;
    float mag_norm_scale[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) mag_norm_scale[i] = p.mag_norm_scale != nullptr ? p.mag_norm_scale[col + i] : 1.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = start + g + 8 * i;
      if (token >= count) continue;
      const uint32_t words[4] = {base[i].x, base[i].y, base[i].z, base[i].w};
      uint32_t out[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 from = pair(words[j], T());
        out[j] = pack_as<T>((from.x * on_base + c[j][2 * i] * on_delta) * mag_norm_scale[2 * j],
                            (from.y * on_base + c[j][2 * i + 1] * on_delta) * mag_norm_scale[2 * j + 1]);
      }
      *reinterpret_cast<uint4*>(y + (first + token) * p.h + col) =
          uint4{out[0], out[1], out[2], out[3]};
    }
  }
}

}  // namespace embedding
}  // namespace lora_fused
