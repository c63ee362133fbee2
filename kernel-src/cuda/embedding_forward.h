// gather_add: the forward of an adapted embedding in one launch, see embedding_kernels.h.
#pragma once

#include "embedding_kernels.h"

namespace lora_fused {
namespace embedding {

constexpr int kForwardThreads = 128, kForwardTokens = 16, kForwardWarps = kForwardThreads / 32;
constexpr int kForwardWarpCols = 32;  // 8 a lane
constexpr int kForwardCols = kForwardWarps * kForwardWarpCols;

// Grid: blocks of 128 columns × blocks of `tokens` tokens, 16 at a time. `rows` [m, r], or null. W and A
// of the next tokens are asked for before this one's products, their ids one step earlier.
template <typename T, typename P>
__global__ void __launch_bounds__(kForwardThreads, 3)
    gather_add_fwd_kernel(T* __restrict__ y, float* __restrict__ rows, int tokens, const Args p) {
  constexpr bool kSplit = std::is_same_v<P, float>;
  constexpr int kTiles = kForwardWarpCols / 8, kParts = kSplit ? 2 : 1, kLine = kRanks + 4;
  constexpr int kEach = kForwardTokens / kForwardWarps;  // tokens whose A a warp gathers
  using H = std::conditional_t<kSplit, __nv_bfloat16, P>;
  __shared__ __align__(16) float down[kForwardTokens][kLine];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_col = blockIdx.x * kForwardCols + warp * kForwardWarpCols, col = warp_col + t * 8;
  const int64_t first = int64_t{blockIdx.y} * tokens;
  const int64_t end = first + tokens < p.m ? first + tokens : p.m;

  int ids[2], gathered[kEach];  // of the step that is asked for next; -1 where there is no token
  const auto fetch_ids = [&](int64_t start) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = start + g + 8 * i;
      ids[i] = -1;
      if (token >= end) continue;
      const int64_t id = load_id(p, token);
      CUDA_KERNEL_ASSERT(id >= 0 && id < p.v && "index out of range in self");
      ids[i] = static_cast<int>(id);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t token = start + i * kForwardWarps + warp;
      gathered[i] = token < end ? static_cast<int>(load_id(p, token)) : -1;
    }
  };
  uint4 w[2];
  float a_ahead[kEach];
  const auto fetch = [&] {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      w[i] = load_row(p.w, int64_t{ids[i]} * p.h + col, ids[i] >= 0 && col < p.h);
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      a_ahead[i] = gathered[i] >= 0 && lane < p.r ? load(p.a, lane * p.v + gathered[i]) : 0.0f;
  };
  uint32_t b[kTiles][kSteps][2][kParts];
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

  fetch_ids(first);
  fetch();
  if (p.r <= kRanks) load_b(0);
  const float on_base = own_scale(p, dtype_of<T>());
  const float on_delta = own_scale(p, p.b.dtype) * p.scaling;
  for (int64_t start = first; start < end; start += kForwardTokens) {
    const uint4 base[2] = {w[0], w[1]};
    int own[kEach];
    float a_now[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) own[i] = gathered[i], a_now[i] = a_ahead[i];
    const bool more = start + kForwardTokens < end;
    if (more) fetch_ids(start + kForwardTokens);
    float c[kTiles][4] = {};
    for (int rank0 = 0; rank0 < p.r; rank0 += kRanks) {
      const int rank = rank0 + lane;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int row = i * kForwardWarps + warp;
        const bool live = own[i] >= 0 && rank < p.r;
        const float a = rank0 == 0 ? a_now[i] : live ? load(p.a, rank * p.v + own[i]) : 0.0f;
        down[row][lane] = a;
        if (rows != nullptr && blockIdx.x == 0 && live) rows[(start + row) * p.r + rank] = a;
      }
      if (p.r > kRanks) load_b(rank0);
      __syncthreads();
      if (more && rank0 == 0) fetch();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[kParts][4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float2 x = *reinterpret_cast<const float2*>(
              &down[g + q % 2 * 8][step * 16 + q / 2 * 8 + t * 2]);
          if constexpr (kSplit)
            split(x.x, x.y, a[0][q], a[1][q]);
          else
            a[0][q] = pack_as<H>(x.x, x.y);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint32_t(&of)[2][kParts] = b[tile][step];
          if constexpr (kSplit) {
            multiply<H>(c[tile], a[1], of[0][0], of[1][0]);
            multiply<H>(c[tile], a[0], of[0][1], of[1][1]);
          }
          multiply<H>(c[tile], a[0], of[0][0], of[1][0]);
        }
      }
    }
    if (col >= p.h) continue;
    float gain[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) gain[i] = p.gain != nullptr ? p.gain[col + i] : 1.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (start + g + 8 * i >= end) continue;
      const uint32_t words[4] = {base[i].x, base[i].y, base[i].z, base[i].w};
      uint32_t out[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 from = pair(words[j], T());
        out[j] = pack_as<T>((from.x * on_base + c[j][2 * i] * on_delta) * gain[2 * j],
                            (from.y * on_base + c[j][2 * i + 1] * on_delta) * gain[2 * j + 1]);
      }
      *reinterpret_cast<uint4*>(y + (start + g + 8 * i) * p.h + col) =
          uint4{out[0], out[1], out[2], out[3]};
    }
  }
}

}  // namespace embedding
}  // namespace lora_fused
