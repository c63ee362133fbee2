// One matrix product out of several: the LoRA terms beside the base product, in one accumulator.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "kernels.h"
#include "matrix_view.h"
#include "side_stream.h"

namespace lora_fused {

// a [M, k] with contiguous rows; b [N, k] or [k, N] with contiguous rows, as Gemm says.
struct GemmSegment {
  MatrixView a, b;
};

// acc = Σ aᵢ bᵢ over the segments, summed in float32, of which the sum of the `leading` ones is masked or multiplied by
// `leading_scale` first, where there is one: D(Σ aᵢ bᵢ) + Σ aᵢ bᵢ. Then one of
//   out = acc + bias      bias [N] in out's dtype, or none
//   out += acc            accumulate: acc is rounded to out's dtype before it is added
//   unscaled = acc, out = scale∘acc + bias     scale (mag_norm_scale) [N] in float32, unscaled as out
// or, of leading segments without either and for b [N, k] alone,
//   unscaled = Σ aᵢ bᵢ of these, out = (scale - 1)∘unscaled + Σ aᵢ bᵢ of the others + bias
// out [M, N] with contiguous rows; every matrix bfloat16, or every one float16.
struct Gemm {
  std::vector<GemmSegment> segments;
  bool b_rows_are_n;  // b is [N, k] in every segment; else [k, N] in every one
  MatrixView out;
  bool accumulate = false;
  std::optional<torch::stable::Tensor> bias, mag_norm_scale;
  MaybeMatrixView unscaled = std::nullopt;
  std::optional<Dropped> mask = std::nullopt;
  size_t leading = 0;          // fewer than there are segments
  double leading_scale = 1.0;  // in float16 alone
  size_t made = 0;             // of a GemmGroup: the last segments, whose a are its `shrinks`
  SideStream* side = nullptr;  // for what is to run beside the launch
};

// The sums of a group in one launch, with what they read of it: every t of `shrinks` [M, R], and then the outs, in
// whose last segments a is a t or some columns of one. t and outs share M, dtype and device, shrinks have neither masks
// nor a `lo`, sums neither masks nor leading segments nor what they would accumulate to; b, and a shrink's a, are all
// stored as the first sum's.
struct GemmGroup {
  std::vector<Shrink> shrinks;
  std::vector<Gemm> sums;
  // `counters()` zeros of four bytes, which the launch writes over; made by it where there are none.
  MaybeMatrixView zeros = std::nullopt;
  SideStream* side = nullptr;

  // How many clusters have begun and slices are taken; of each 128 rows, how many shrinks are made.
  int64_t counters() const { return counters(sums[0].out.size(0)); }
  static int64_t counters(int64_t rows) { return 2 + (rows + 127) / 128; }
};

#if defined(CUDA_KERNEL)
constexpr int kGemmSegments = 8;

// Whether gemm_sm90 can compute it, on sm90: one half dtype, up to 8 segments, base
// addresses and row strides that are multiples of 16 bytes, N a multiple of 8, nothing empty.
bool gemm_sm90_supports(const Gemm& gemm);
// One launch on the current stream of out's device, which has to be the current device. Neither
// allocates nor waits. For what gemm_sm90_supports alone.
void gemm_sm90(const Gemm& gemm);

// The same of a group: up to 3 shrinks of ranks up to 128, multiples of 8, and up to 3 sums of 8 segments in all.
// Allocates counters where it has no zeros. See sm90/gemm_group.cuh.
bool gemm_group_sm90_supports(const GemmGroup& group);
void gemm_group_sm90(const GemmGroup& group);
#endif

}  // namespace lora_fused
