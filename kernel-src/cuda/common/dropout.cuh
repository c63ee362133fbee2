// dropout on CUDA: out[m, k] = mask(seed, m, k) · x[m, k] / (1 - p), in out's dtype, or += that; without the scale
// where not `scaled`.
//
// Fused: the mask (Philox, see common/dropout.h), the scale, the sum and the conversion. A thread takes
// eight neighbouring columns, one Philox block. The seed stays on the GPU: no synchronisation, and a CUDA
// graph that draws a new seed replays a new mask.
#pragma once

#include "../../common/dropout.h"
#include "dtype.cuh"
#include "vector_access.cuh"

namespace lora_fused::dropout {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // more work is looped over

template <typename In, typename Out>
struct Arguments {
  Matrix<In> x;
  Matrix<Out> out;
  const int64_t* seed;
  int64_t cols, blocks, total;
  Keep keep;
  bool accumulate;
};

// kAligned: rows of whole accesses.
template <typename In, typename Out, bool kAligned>
__global__ void __launch_bounds__(kThreads) dropout_fwd_kernel(const __grid_constant__ Arguments<In, Out> a) {
  using W = Wide<In>;
  const uint64_t key = static_cast<uint64_t>(*a.seed);
  const W scale = static_cast<W>(a.keep.scale);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.total; i += step) {
    const int64_t row = quotient(i, a.blocks), col = kColumns * (i - row * a.blocks);
    const int64_t count = min(static_cast<int64_t>(kColumns), a.cols - col);
    Columns<In> x;
    Columns<Out> out;
    load(x, a.x, row, col, count, kAligned);
    if (a.accumulate) load(out, a.out, row, col, count, kAligned);
    const auto words = philox(key, row, static_cast<uint32_t>(col / kMaskColumns));
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const W value = words.number(j) >= a.keep.threshold ? widen(x.value[j]) * scale : W(0);
      out.value[j] = narrow<Out, W>(a.accumulate ? static_cast<W>(widen(out.value[j])) + value : value);
    }
    store(a.out, out, row, col, count, kAligned);
  }
}

}  // namespace lora_fused::dropout
