// Products of activations with an adapter's rank on Hopper, those of a whole group in one launch:
// what it supports, how it is cut, and the launch of skinny.cuh, which says what it computes.
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <atomic>

#include "../../common/kernels.h"
#include "../../dispatch/table.h"
#include "tma_host.h"
#include "skinny.cuh"
#include "../common/stream.h"

namespace {

using namespace lora_fused;
using namespace lora_fused::sm90::skinny;
using namespace lora_fused::sm90;
using torch::headeronly::ScalarType;

// One product: x, the other operand as TMA copies it, and how out is laid out.
struct Work {
  Form form;
  MatrixView x, other, out;  // out by [rows of the tile, ranks]
  double scaling;
  std::optional<Dropped> mask;
  MaybeMatrixView lo;  // laid out as `other`
  std::optional<SplitLayout> split;
};

Work work_of(const Shrink& d) {
  const bool transposed = d.a.stride(1) != 1;
  const auto turned = [&](const MatrixView& m) { return transposed ? m.transposed() : m; };
  const MaybeMatrixView lo = d.lo ? MaybeMatrixView(turned(*d.lo)) : std::nullopt;
  return {transposed ? kByRowsTransposed : kByRows, d.x, turned(d.a), d.t, d.scaling, d.mask, lo, d.split};
}

Work work_of(const AdapterGrad& d) {
  return {kByColumns, d.x, d.t, d.transposed ? d.out : d.out.transposed(), d.scaling, d.mask, d.lo, std::nullopt};
}

// Ranks from the first element of `other` to the first of `lo`.
int64_t lo_offset(const Work& work) {
  const auto *first = static_cast<const char*>(work.other.const_data_ptr()),
             *lo = static_cast<const char*>(work.lo->const_data_ptr());
  return (lo - first) / 2 / work.other.stride(work.form == kByRows ? 0 : 1);
}

// `other` with its lo, and what lies between.
MatrixView whole_of(const Work& work) {
  if (!work.lo) return work.other;
  const int64_t ranks = lo_offset(work) + work.out.size(1);
  return work.form == kByRows ? work.other.rows(0, ranks) : work.other.columns(0, ranks);
}

int64_t ranks_of(const Work& work) { return work.out.size(1); }
int64_t summed(const Work& work) { return work.x.size(work.form == kByColumns ? 0 : 1); }

// The copy engine begins at multiples of 16 bytes of a row, so that lo beside hi must lie there;
// elsewhere its load is an illegal instruction.
bool reaches_lo(const Work& work) { return !work.lo || work.form == kByRows || lo_offset(work) % 8 == 0; }

bool supports(const Work& work) {
  const auto dtype = work.x.scalar_type(), out = work.out.scalar_type();
  return skinny_sm90_supports(work.x) && supports_tma(whole_of(work)) && work.other.scalar_type() == dtype &&
         (out == dtype || out == ScalarType::Float) && (!work.lo || is_bfloat16(work.x)) && reaches_lo(work) &&
         ranks_of(work) <= kMostRanks;
}

int width_of(int64_t ranks) { return ranks <= 16 ? 16 : ranks <= 32 ? 32 : (static_cast<int>(ranks) + 31) / 32 * 32; }

Entry entry_of(const Work& work, int first_tile) {
  Entry e{};
  e.form = work.form;
  e.ranks = static_cast<int>(ranks_of(work));
  e.width = width_of(ranks_of(work));
  encode_tensor_map(e.x, work.x, work.form == kByColumns ? kStep : kTile);
  encode_tensor_map(e.other, whole_of(work), work.form == kByRows ? e.width : kStep);
  e.out = work.out.mutable_data_ptr();
  e.row_stride = work.out.stride(0), e.rank_stride = work.out.stride(1);
  e.rows = static_cast<int>(work.out.size(0));
  e.steps = tiles(summed(work), kStep);
  e.first_tile = first_tile;
  e.out_is_float = work.out.scalar_type() == ScalarType::Float;
  e.scaling = static_cast<float>(work.scaling * scale_of(work.mask));
  e.mask = mask_of(work.mask);
  if (work.lo) e.lo_offset = static_cast<int>(lo_offset(work));
  if (work.split)
    e.split_ranks = static_cast<int>(work.split->ranks), e.split_stride = static_cast<int>(work.split->stride);
  return e;
}

// Blocks of a cluster beside a product, whose own clusters leave two multiprocessors at a time. With four, a gated MLP
// of 2048 tokens takes 1218 µs, with one or two 1178.
constexpr unsigned kMostBeside = 2;

// Clusters that run at once with one block on a multiprocessor, asked once a device.
template <typename T, int kSplits>
int clusters_alone(unsigned cluster, int device) {
  static std::atomic<int> known[64][kMostBlocks + 1];
  std::atomic<int>& most = known[device % 64][cluster];
  if (most == 0) most = most_clusters(skinny_kernel<T, kSplits>, cluster, kThreads, kBytesAlone<kSplits>);
  return most;
}

template <typename T, int kSplits>
void launch(const std::vector<Work>& works, size_t first, SideStream* side) {
  const MatrixView& like = works[first].x;
  Arguments args;
  args.entries = 0;
  int all_tiles = 0, most_steps = 0;
  for (size_t i = first; i < std::min(works.size(), first + kEntries); ++i) {
    STD_TORCH_CHECK(works[i].lo.has_value() == (kSplits == 2), "skinny: entry ", i, " is bf16x3 and others are not");
    const Entry& e = args.entry[args.entries++] = entry_of(works[i], all_tiles);
    all_tiles += tiles(e.rows, kTile);
    most_steps = std::max(most_steps, e.steps);
  }
  const int device = like.get_device_index();
  static SharedMemory shared_memory;
  shared_memory.allow(skinny_kernel<T, kSplits>, kBytesAlone<kSplits>, device);
  unsigned cluster =
      dispatch::skinny_cluster(all_tiles, most_steps, multiprocessors(device), side ? kMostBeside : kMostBlocks);
  // Blocks of a cluster meet on one multiprocessor, and leave others idle, unless each asks for one of its own.
  const bool alone = !side && all_tiles * static_cast<int>(cluster) <= multiprocessors(device);
  while (alone && cluster > 1 && all_tiles > clusters_alone<T, kSplits>(cluster, device)) --cluster;
  const int bytes = alone ? kBytesAlone<kSplits> : kBytes<kSplits>;
  launch_clusters(skinny_kernel<T, kSplits>, all_tiles * cluster, cluster, kThreads, bytes,
                  side ? side->forked() : stream_of(like), args);
}

template <typename Product>
void run(const std::vector<Product>& products, SideStream* side = nullptr) {
  std::vector<Work> works;
  for (const Product& product : products) works.push_back(work_of(product));
  for (size_t first = 0; first < works.size(); first += kEntries) {
    if (works[first].lo)
      launch<__nv_bfloat16, 2>(works, first, side);
    else
      is_bfloat16(works[first].x) ? launch<__nv_bfloat16, 1>(works, first, side)
                                  : launch<__half, 1>(works, first, side);
  }
}

}  // namespace

bool lora_fused::skinny_sm90_supports(const MatrixView& matrix) { return supports_tma(matrix); }
bool lora_fused::skinny_sm90_supports(const Shrink& product) { return supports(work_of(product)); }
bool lora_fused::skinny_sm90_supports(const AdapterGrad& product) { return supports(work_of(product)); }
void lora_fused::skinny_sm90(const std::vector<Shrink>& products) { run(products); }
void lora_fused::skinny_sm90(const std::vector<AdapterGrad>& products, SideStream* side) {
  if (side == nullptr || !side->is_started()) return run(products);
  run(products, side);
  side->join();
}
