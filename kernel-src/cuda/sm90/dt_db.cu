// Both products of dy with an adapter's rank on Hopper, those of a whole group in one launch and their sums in a
// second: what it supports, how it is cut, and the launches of dt_db.cuh, which says what it computes.
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../../common/kernels.h"
#include "../../common/tensors.h"
#include "dt_db.cuh"
#include "tma_host.h"
#include "../common/stream.h"

namespace {

using namespace lora_fused;
using namespace lora_fused::sm90;
using namespace lora_fused::sm90::dt_db;

int width_of(int64_t ranks) { return ranks <= 16 ? 16 : ranks <= 32 ? 32 : 64; }

int64_t partials_of(const DtDb& p, int64_t slabs, int64_t shares) {
  return (slabs * p.dy.size(0) + shares * p.dy.size(1)) * width_of(p.t.size(1));
}

Sum sum_of(const float* partials, int count, int width, const MatrixView& out, bool bf16x3, double scaling) {
  Sum sum{};
  sum.partials = partials, sum.out = out.mutable_data_ptr(), sum.stride = out.stride(0), sum.count = count;
  sum.rows = static_cast<int>(out.size(0)), sum.ranks = static_cast<int>(out.size(1)), sum.width = width;
  sum.bf16x3 = bf16x3, sum.out_is_float = out.scalar_type() == ScalarType::Float;
  sum.scaling = static_cast<float>(scaling);
  return sum;
}

template <typename T>
void launch(const std::vector<DtDb>& products, size_t begin) {
  const size_t end = std::min(products.size(), begin + kEntries);
  const MatrixView& like = products[begin].dy;
  const int device = like.get_device_index();
  Arguments args{};
  args.rows = static_cast<int>(like.size(0)), args.steps = tiles(like.size(0), kRows);
  int slabs = 0;
  for (size_t i = begin; i < end; ++i) slabs += tiles(products[i].dy.size(1), kSlab);
  args.shares = std::clamp(multiprocessors(device) / slabs, 1, args.steps);
  int64_t floats = 0;
  for (size_t i = begin; i < end; ++i)
    floats += partials_of(products[i], tiles(products[i].dy.size(1), kSlab), args.shares);
  const Tensor buffer = empty(like.base(), {floats}, ScalarType::Float);
  float* next = static_cast<float*>(buffer.mutable_data_ptr());
  Sums sums;
  int64_t most_quads = 0;
  slabs = 0;
  for (size_t i = begin; i < end; ++i) {
    const DtDb& p = products[i];
    Entry& e = args.entry[args.entries];
    encode_tensor_map(e.dy, p.dy, kRows);
    encode_tensor_map(e.b, p.b, kSlab / 2);
    encode_tensor_map(e.t, p.t, kRows);
    e.columns = static_cast<int>(p.dy.size(1)), e.width = width_of(p.t.size(1));
    e.slabs = tiles(p.dy.size(1), kSlab), e.first_slab = slabs;
    e.dt_partials = next, e.db_partials = next + int64_t{e.slabs} * args.rows * e.width;
    next += partials_of(p, e.slabs, args.shares);
    Sum& dt = sums.sum[2 * args.entries] =
        sum_of(e.dt_partials, e.slabs, e.width, p.dt, p.split.has_value(), p.scaling);
    sums.sum[2 * args.entries + 1] =
        sum_of(e.db_partials, args.shares, e.width, p.db, p.split.has_value(), p.db_scaling);
    if (p.split) dt.split_ranks = static_cast<int>(p.split->ranks), dt.split_stride = static_cast<int>(p.split->stride);
    most_quads = std::max<int64_t>(most_quads, int64_t{std::max(args.rows, e.columns)} * e.width / 4);
    slabs += e.slabs, ++args.entries;
  }
  static SharedMemory shared_memory;
  shared_memory.allow(dt_db_kernel<T>, kBytes, device);
  const cudaStream_t stream = stream_of(like);
  dt_db_kernel<T><<<dim3(slabs, args.shares), kThreads, kBytes, stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  finish_kernel<T><<<dim3(tiles(most_quads, kFinishQuads), 2 * args.entries), kFinishThreads, 0, stream>>>(sums);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

bool lora_fused::dt_db_sm90_supports(const DtDb& p) {
  const auto dtype = p.dy.scalar_type();
  const auto given = [&](const MatrixView& m) { return m.scalar_type() == dtype && supports_tma(m); };
  const auto found = [&](const MatrixView& m) {
    return m.scalar_type() == dtype || m.scalar_type() == ScalarType::Float;
  };
  const bool splits = !p.split || (is_bfloat16(p.dy) && is_bfloat16(p.dt) && p.dt.size(1) % 4 == 0);
  return given(p.dy) && given(p.b) && given(p.t) && found(p.dt) && found(p.db) && p.t.size(1) <= kMostRanks && splits;
}

void lora_fused::dt_db_sm90(const std::vector<DtDb>& products) {
  for (size_t first = 0; first < products.size(); first += kEntries)
    is_bfloat16(products[0].dy) ? launch<__nv_bfloat16>(products, first) : launch<__half>(products, first);
}
