// The host side of the outputs of gemm.cuh: how a sum becomes a launch's arguments.
#pragma once

#include "../../common/gemm.h"
#include "gemm.cuh"
#include "tma_host.h"

namespace lora_fused::sm90 {

// Output `at` of a launch, whose columns of tiles and segments follow those that `args` has.
template <int kBlockN, bool kRowsAreN, int kOutputs>
void add_output(Arguments<kOutputs>& args, int at, const Gemm& gemm, int& next_segment) {
  Output& output = args.output[at];
  output.first_segment = next_segment;
  output.segments = static_cast<int>(gemm.segments.size());
  output.made = static_cast<int>(gemm.made);
  output.steps = 0;
  for (const GemmSegment& segment : gemm.segments) {
    const int s = next_segment++;
    encode_tensor_map(args.a[s], segment.a, kBlockM);
    encode_tensor_map(args.b[s], segment.b, kRowsAreN ? kBlockN / kCluster : kBlockK);
    args.steps_of[s] = tiles(segment.a.size(1), kBlockK);
    output.steps += args.steps_of[s];
  }
  encode_tensor_map(args.out[at], gemm.out, 16);
  if (gemm.unscaled) encode_tensor_map(args.unscaled[at], *gemm.unscaled, 16);
  output.bias = gemm.bias ? gemm.bias->const_data_ptr() : nullptr;
  output.mag_norm_scale =
      gemm.mag_norm_scale ? static_cast<const float*>(gemm.mag_norm_scale->const_data_ptr()) : nullptr;
  output.n = static_cast<int>(gemm.out.size(1));
  output.first_tile = args.tiles_n;
  args.tiles_n += tiles(gemm.out.size(1), kBlockN);
}

}  // namespace lora_fused::sm90
