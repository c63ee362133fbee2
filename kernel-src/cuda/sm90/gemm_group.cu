// The sums of a group in one launch with the products that they read, see common/gemm.h: what is supported, how it is
// cut into slices and tiles, and the launch of gemm_group.cuh.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../../common/gemm.h"
#include "../../common/tensors.h"
#include "../../dispatch/table.h"
#include "../common/stream.h"
#include "gemm_group.cuh"
#include "gemm_host.h"
#include "tma_host.h"

namespace {

using namespace lora_fused::sm90;
using lora_fused::Gemm;
using lora_fused::GemmGroup;
using lora_fused::MatrixView;
using lora_fused::multiprocessors;
using lora_fused::ScalarType;
using lora_fused::SharedMemory;
using lora_fused::Tensor;

// The other operand as b of a sum is stored: [R, C] with contiguous rows, or its transpose.
MatrixView other_of(const lora_fused::Shrink& shrink, bool rows_are_n) {
  return rows_are_n ? shrink.a : shrink.a.transposed();
}

bool fits(const lora_fused::Shrink& shrink, const Gemm& like) {
  const MatrixView other = other_of(shrink, like.b_rows_are_n);
  const ScalarType dtype = like.out.scalar_type();
  const int64_t ranks = shrink.t.size(1);
  for (const MatrixView* m : {&shrink.x, &other, &shrink.t})
    if (m->scalar_type() != dtype || !supports_tma(*m)) return false;
  return !shrink.mask && !shrink.lo && !shrink.split && shrink.x.size(0) == like.out.size(0) &&
         shrink.t.size(0) == like.out.size(0) && shrink.a.size(0) == ranks && shrink.a.size(1) == shrink.x.size(1) &&
         ranks % 8 == 0 && ranks <= kGroupRanks;
}

// K steps of a slice, the fewest with which there are as many slices as blocks at most: all are made at once, while
// the blocks begin. A slice takes four steps or more, which its sums cost as much as.
int steps_of_slice(const GemmGroup& group, int blocks) {
  const int row_blocks = tiles(group.sums[0].out.size(0), kBlockM);
  int most = 1;
  for (const auto& shrink : group.shrinks) most = std::max(most, tiles(shrink.x.size(1), kBlockK));
  const auto slices = [&](int steps) {
    int64_t count = 0;
    for (const auto& shrink : group.shrinks)
      count += int64_t(row_blocks) * tiles(tiles(shrink.x.size(1), kBlockK), steps);
    return count;
  };
  int steps = std::min(4, most);
  while (steps < most && slices(steps) > blocks) ++steps;
  return steps;
}

// The slices of all shrinks, and the memory for their sums and counters.
template <bool kRowsAreN>
Tensor add_shrinks(Shrinks& shrinks, const GemmGroup& group, int blocks, cudaStream_t stream) {
  const MatrixView& out = group.sums[0].out;
  const int row_blocks = tiles(out.size(0), kBlockM), steps = steps_of_slice(group, blocks);
  shrinks.entries = static_cast<int>(group.shrinks.size());
  shrinks.rows = static_cast<int>(out.size(0));
  shrinks.slices = 0;
  int64_t sums[kGroupShrinks], scratch = 0;  // floats, from where each entry's begin
  for (int i = 0; i < shrinks.entries; ++i) {
    const lora_fused::Shrink& shrink = group.shrinks[i];
    ShrinkEntry& e = shrinks.entry[i];
    const MatrixView other = other_of(shrink, kRowsAreN);
    e.ranks = static_cast<int>(shrink.t.size(1));
    e.width = (e.ranks + 31) / 32 * 32;
    encode_tensor_map(shrinks.x[i], shrink.x, kBlockM);
    encode_tensor_map(shrinks.other[i], other, kRowsAreN ? e.width : kBlockK);
    e.out = shrink.t.mutable_data_ptr();
    e.row_stride = shrink.t.stride(0);
    e.scaling = static_cast<float>(shrink.scaling);
    e.steps = tiles(shrink.x.size(1), kBlockK);
    e.splits = tiles(e.steps, steps);
    e.first_slice = shrinks.slices;
    sums[i] = scratch;
    const int slices = row_blocks * e.splits;
    shrinks.slices += slices;
    if (e.splits > 1) scratch += int64_t(slices) * kBlockM * e.width;
  }
  const int64_t counters = group.counters(), before = group.zeros ? 0 : (counters + 3) / 4 * 4;  // sums on 16 bytes
  const Tensor memory = lora_fused::empty(out.base(), {std::max<int64_t>(before + scratch, 1)}, ScalarType::Float);
  float* const first = static_cast<float*>(memory.mutable_data_ptr());
  int* const zeros = static_cast<int*>(group.zeros ? group.zeros->mutable_data_ptr() : first);
  if (!group.zeros) STD_CUDA_CHECK(cudaMemsetAsync(zeros, 0, counters * sizeof(int), stream));
  shrinks.next_slice = zeros;
  shrinks.ready = zeros + 1;
  for (int i = 0; i < shrinks.entries; ++i) {
    shrinks.entry[i].arrived = zeros + 1 + (i + 1) * row_blocks;
    shrinks.entry[i].sums = reinterpret_cast<float4*>(first + before + sums[i]);
  }
  return memory;
}

template <typename T, int kBlockN, bool kRowsAreN>
void launch(const GemmGroup& group, int count) {
  const MatrixView& out = group.sums[0].out;
  GroupArguments args;
  args.tiles_m = tiles(out.size(0), kBlockM * kCluster);
  args.outputs = static_cast<int>(group.sums.size()), args.tiles_n = 0;
  args.accumulate = false, args.mask = {}, args.kept = 1.0f, args.leading_steps = 0;
  int next_segment = 0;
  for (int i = 0; i < args.outputs; ++i) add_output<kBlockN, kRowsAreN>(args, i, group.sums[i], next_segment);
  const int blocks = kCluster * std::min(args.tiles_m * args.tiles_n, count / kCluster);
  const cudaStream_t stream = lora_fused::stream_of(out);
  const Tensor memory = add_shrinks<kRowsAreN>(args.shrinks, group, blocks, stream);

  const auto kernel = gemm_group_kernel<T, kBlockN, kRowsAreN>;
  constexpr int kBytes = GroupLayout<kBlockN>::bytes;
  static SharedMemory shared_memory;
  shared_memory.allow(kernel, kBytes, out.get_device_index());
  launch_clusters(kernel, blocks, kCluster, kThreads, kBytes, stream, args);
}

template <typename T, bool kRowsAreN>
void launch(const GemmGroup& group) {
  const MatrixView& out = group.sums[0].out;
  const int count = multiprocessors(out.get_device_index());
  int64_t columns = 0;
  for (const Gemm& sum : group.sums) columns += sum.out.size(1);
  if (lora_fused::dispatch::GemmTiling(out.size(0), columns, count).width == 128)
    launch<T, 128, kRowsAreN>(group, count);
  else
    launch<T, 256, kRowsAreN>(group, count);
}

template <typename T>
void launch(const GemmGroup& group) {
  group.sums[0].b_rows_are_n ? launch<T, true>(group) : launch<T, false>(group);
}

}  // namespace

namespace lora_fused {

bool gemm_group_sm90_supports(const GemmGroup& group) {
  if (group.sums.empty() || group.sums.size() > kGroupOutputs) return false;
  if (group.shrinks.empty() || group.shrinks.size() > kGroupShrinks) return false;
  const Gemm& first = group.sums[0];
  size_t segments = 0;
  for (const Gemm& sum : group.sums) {
    segments += sum.segments.size();
    if (sum.mask || sum.leading > 0 || sum.accumulate || sum.made > sum.segments.size() ||
        sum.b_rows_are_n != first.b_rows_are_n || sum.out.size(0) != first.out.size(0) ||
        sum.out.scalar_type() != first.out.scalar_type() || !gemm_sm90_supports(sum))
      return false;
  }
  return segments <= kGemmSegments && std::all_of(group.shrinks.begin(), group.shrinks.end(),
                                                  [&](const Shrink& shrink) { return fits(shrink, first); });
}

void gemm_group_sm90(const GemmGroup& group) {
  is_bfloat16(group.sums[0].out) ? launch<__nv_bfloat16>(group) : launch<__half>(group);
}

}  // namespace lora_fused
