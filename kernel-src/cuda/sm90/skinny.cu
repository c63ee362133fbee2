// Products of activations with an adapter's rank on Hopper, those of a whole group in one launch:
// what it takes, how it is cut, and the launch of skinny_sm90_kernel.h, which says what it computes.
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <atomic>

#include "../../common/kernels.h"
#include "tma_host.h"
#include "skinny.cuh"
#include "../common/stream.h"

namespace {

using namespace lora_fused;
using namespace lora_fused::sm90::skinny;
using namespace lora_fused::sm90;
using torch::headeronly::ScalarType;

// One product: x, the other operand as the copy engine takes it, and how out is laid out.
struct Work {
  Form form;
  View x, other, out;  // out by [rows of the tile, ranks]
  double scaling;
  std::optional<Dropped> mask;
  MaybeView rest;  // laid out as `other`
  std::optional<Parts> parts;
};

Work work_of(const SkinnyDown& d) {
  const bool transposed = d.a.stride(1) != 1;
  const auto turned = [&](const View& m) { return transposed ? m.transposed() : m; };
  const MaybeView rest = d.rest ? MaybeView(turned(*d.rest)) : std::nullopt;
  return {transposed ? kDownTransposed : kDown, d.x, turned(d.a), d.t, d.scaling, d.mask, rest, d.parts};
}

Work work_of(const SkinnyOuter& d) {
  return {kAcross, d.x, d.t, d.transposed ? d.out : d.out.transposed(), d.scaling, d.mask, d.rest, std::nullopt};
}

// Ranks from the first element of `other` to the first of `rest`.
int64_t rest_at(const Work& work) {
  const auto *first = static_cast<const char*>(work.other.const_data_ptr()),
             *rest = static_cast<const char*>(work.rest->const_data_ptr());
  return (rest - first) / 2 / work.other.stride(work.form == kDown ? 0 : 1);
}

// `other` with its rest, and what lies between.
View whole_of(const Work& work) {
  if (!work.rest) return work.other;
  const int64_t ranks = rest_at(work) + work.out.size(1);
  return work.form == kDown ? work.other.rows(0, ranks) : work.other.columns(0, ranks);
}

int64_t ranks_of(const Work& work) { return work.out.size(1); }
int64_t summed(const Work& work) { return work.x.size(work.form == kAcross ? 0 : 1); }

// The copy engine begins at multiples of 16 bytes of a row, so that a rest beside what it is added to must lie there;
// elsewhere its load is an illegal instruction.
bool reaches_rest(const Work& work) { return !work.rest || work.form == kDown || rest_at(work) % 8 == 0; }

bool serves(const Work& work) {
  const auto dtype = work.x.scalar_type(), out = work.out.scalar_type();
  return skinny_sm90_serves(work.x) && takes_boxes(whole_of(work)) && work.other.scalar_type() == dtype &&
         (out == dtype || out == ScalarType::Float) && (!work.rest || is_brain(work.x)) && reaches_rest(work) && ranks_of(work) <= kMostRanks;
}

int width_of(int64_t ranks) { return ranks <= 16 ? 16 : ranks <= 32 ? 32 : (static_cast<int>(ranks) + 31) / 32 * 32; }

Entry entry_of(const Work& work, int first_tile) {
  Entry e{};
  e.form = work.form;
  e.ranks = static_cast<int>(ranks_of(work));
  e.width = width_of(ranks_of(work));
  encode_boxes(e.x, work.x, work.form == kAcross ? kStep : kTile);
  encode_boxes(e.other, whole_of(work), work.form == kDown ? e.width : kStep);
  e.out = work.out.mutable_data_ptr();
  e.row_stride = work.out.stride(0), e.rank_stride = work.out.stride(1);
  e.rows = static_cast<int>(work.out.size(0));
  e.steps = tiles(summed(work), kStep);
  e.first_tile = first_tile;
  e.out_is_float = work.out.scalar_type() == ScalarType::Float;
  e.scaling = static_cast<float>(work.scaling * scale_of(work.mask));
  e.mask = mask_of(work.mask);
  if (work.rest) e.rest_at = static_cast<int>(rest_at(work));
  if (work.parts) e.part_ranks = static_cast<int>(work.parts->ranks), e.parts_apart = static_cast<int>(work.parts->apart);
  return e;
}

// Blocks that share a tile: about as many in all as there are multiprocessors, of four steps each or more. Two on each
// were slower, their reads further apart.
unsigned cluster_of(int all_tiles, int most_steps, int multiprocessors) {
  const int most = multiprocessors * 7 / 4;
  unsigned cluster = 1;
  while (cluster < kMostBlocks && static_cast<int>(2 * cluster) * all_tiles <= most &&
         8 * static_cast<int>(cluster) <= most_steps)
    cluster *= 2;
  return cluster;
}

// Clusters that run at once with one block on a multiprocessor, asked once a device.
template <typename T, int kParts>
int clusters_apart(unsigned cluster, int device) {
  static std::atomic<int> known[64][kMostBlocks + 1];
  std::atomic<int>& most = known[device % 64][cluster];
  if (most == 0) most = most_clusters(skinny_kernel<T, kParts>, cluster, kThreads, kBytesApart<kParts>);
  return most;
}

template <typename T, int kParts>
void launch(const std::vector<Work>& works, size_t first) {
  const View& like = works[first].x;
  Arguments args;
  args.entries = 0;
  int all_tiles = 0, most_steps = 0;
  for (size_t i = first; i < std::min(works.size(), first + kEntries); ++i) {
    STD_TORCH_CHECK(works[i].rest.has_value() == (kParts == 2), "skinny: entry ", i, " is exact and others are not");
    const Entry& e = args.entry[args.entries++] = entry_of(works[i], all_tiles);
    all_tiles += tiles(e.rows, kTile);
    most_steps = std::max(most_steps, e.steps);
  }
  const int device = like.get_device_index();
  static SharedMemory shared_memory;
  shared_memory.allow(skinny_kernel<T, kParts>, kBytesApart<kParts>, device);
  unsigned cluster = cluster_of(all_tiles, most_steps, multiprocessors(device));
  // Blocks of a cluster meet on one multiprocessor, and leave others idle, unless each asks for one of its own.
  const bool apart = all_tiles * static_cast<int>(cluster) <= multiprocessors(device);
  while (apart && cluster > 1 && all_tiles > clusters_apart<T, kParts>(cluster, device)) --cluster;
  const int bytes = apart ? kBytesApart<kParts> : kBytes<kParts>;
  launch_clusters(skinny_kernel<T, kParts>, all_tiles * cluster, cluster, kThreads, bytes, stream_of(like), args);
}

template <typename Product>
void run(const std::vector<Product>& products) {
  std::vector<Work> works;
  for (const Product& product : products) works.push_back(work_of(product));
  for (size_t first = 0; first < works.size(); first += kEntries) {
    if (works[first].rest)
      launch<__nv_bfloat16, 2>(works, first);
    else
      is_brain(works[first].x) ? launch<__nv_bfloat16, 1>(works, first) : launch<__half, 1>(works, first);
  }
}

}  // namespace

bool lora_fused::skinny_sm90_serves(const View& matrix) {
  return matrix.is_cuda() && takes_boxes(matrix) && is_hopper(matrix.get_device_index());
}
bool lora_fused::skinny_sm90_serves(const SkinnyDown& product) { return serves(work_of(product)); }
bool lora_fused::skinny_sm90_serves(const SkinnyOuter& product) { return serves(work_of(product)); }
void lora_fused::skinny_sm90(const std::vector<SkinnyDown>& products) { run(products); }
void lora_fused::skinny_sm90(const std::vector<SkinnyOuter>& products) { run(products); }
