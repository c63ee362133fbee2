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

// How many of the clusters make the slices: those that have a tile less than the others, as long as their blocks are
// done with theirs before the first tile comes to t; else as many as can. A step of a slice is counted as half of one of
// a tile.
template <int kOutputs>
int makers_of(const Shrinks& shrinks, const Arguments<kOutputs>& args, int clusters) {
  const int idle = (clusters - args.tiles_m * args.tiles_n % clusters) % clusters;
  const int most = std::min(tiles(shrinks.slices, kCluster), clusters);
  int steps = 0;
  for (int i = 0; i < shrinks.entries; ++i) steps += shrinks.entry[i].steps * (shrinks.slices / shrinks.entries);
  const int fewest = tiles(steps, 2 * args.output[0].steps * kCluster);
  return idle < fewest ? most : std::min(idle, most);
}

// The slices of all shrinks, and their counters where there are none yet.
template <bool kRowsAreN>
std::optional<Tensor> add_shrinks(Shrinks& shrinks, const GemmGroup& group, cudaStream_t stream) {
  const MatrixView& out = group.sums[0].out;
  shrinks.entries = static_cast<int>(group.shrinks.size());
  shrinks.rows = static_cast<int>(out.size(0));
  shrinks.slices = shrinks.entries * tiles(out.size(0), kBlockM);
  for (int i = 0; i < shrinks.entries; ++i) {
    const lora_fused::Shrink& shrink = group.shrinks[i];
    ShrinkEntry& e = shrinks.entry[i];
    e.ranks = static_cast<int>(shrink.t.size(1));
    e.width = (e.ranks + 31) / 32 * 32;
    encode_tensor_map(shrinks.x[i], shrink.x, kBlockM);
    encode_tensor_map(shrinks.other[i], other_of(shrink, kRowsAreN), kRowsAreN ? e.width : kBlockK);
    e.out = shrink.t.mutable_data_ptr();
    e.row_stride = shrink.t.stride(0);
    e.scaling = static_cast<float>(shrink.scaling);
    e.steps = tiles(shrink.x.size(1), kBlockK);
  }
  std::optional<Tensor> counters;
  if (!group.zeros) {
    counters = lora_fused::empty(out.base(), {group.counters()}, ScalarType::Float);
    STD_CUDA_CHECK(cudaMemsetAsync(counters->mutable_data_ptr(), 0, group.counters() * sizeof(int), stream));
  }
  int* const zeros = static_cast<int*>(counters ? counters->mutable_data_ptr() : group.zeros->mutable_data_ptr());
  shrinks.next_cluster = zeros, shrinks.next_slice = zeros + 1, shrinks.ready = zeros + 2;
  return counters;
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
  const int clusters = std::min(args.tiles_m * args.tiles_n, count / kCluster);
  const cudaStream_t stream = lora_fused::stream_of(out);
  const std::optional<Tensor> counters = add_shrinks<kRowsAreN>(args.shrinks, group, stream);
  args.shrinks.makers = makers_of(args.shrinks, args, clusters);

  const auto kernel = gemm_group_kernel<T, kBlockN, kRowsAreN>;
  constexpr int kBytes = GroupLayout<kBlockN>::bytes;
  static SharedMemory shared_memory;
  shared_memory.allow(kernel, kBytes, out.get_device_index());
  launch_clusters(kernel, clusters * kCluster, kCluster, kThreads, kBytes, stream, args, group.side);
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
