// DoRA's norms on Hopper, those of a group from one read of each weight: what is served, how it is cut, and the launches
// of row_norm_sm90_kernel.h, which says what they compute.
//
// A float32 A beside a bfloat16 W is two bfloat16 parts below each other, 16 of its 24 bits, made by a launch before; B
// is read as it is. Terms cancel where s·b A nearly takes w away: an error of 1e-7 of |w|², not of the result.
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <limits>

#include "../common/lora_group.h"
#include "../common/products.h"
#include "hopper.h"
#include "row_norm_sm90_kernel.h"
#include "stream.h"

namespace {

using namespace lora_fused;
using namespace lora_fused::sm90;
using namespace lora_fused::sm90::row_norm;
using torch::headeronly::ScalarType;

// Below, launches are all it takes; and few terms would not average out what A's parts leave out.
constexpr int64_t kLeastElements = int64_t(1) << 20, kLeastColumns = 512;
constexpr int kLeastSteps = 4;  // of a block

int64_t padded(int64_t count) { return (count + 63) / 64 * 64; }  // so that all in a buffer starts on 128 bytes

// A as it is multiplied, and A Aᵀ, of which a launch leaves as many parts as blocks made it. Pieces of one weight in four
// bits have it in common.
struct Adapter {
  View a;
  const float* gram = nullptr;
  int grams = 0, gram_width = 0;
};

struct Norm {
  RowNorm of;
  Tensor b;
  int parts;
  bool first;  // with its adapter

  int ranks() const { return static_cast<int>(of.a.size(0)); }
  int rows() const { return static_cast<int>(of.weight.size(0)); }
};

int parts_of(const RowNorm& of) { return of.a.scalar_type() == of.weight.scalar_type() ? 1 : 2; }

bool same_adapter(const RowNorm& x, const RowNorm& y) {
  const View a = x.a, b = y.a;
  return a.const_data_ptr() == b.const_data_ptr() && a.scalar_type() == b.scalar_type() && a.size(0) == b.size(0) &&
         a.size(1) == b.size(1) && a.stride(0) == b.stride(0) && a.stride(1) == b.stride(1);
}

MatrixB matrix_b(const Tensor& b) {
  const auto dtype = b.scalar_type();
  return {b.const_data_ptr(), dtype == ScalarType::Float ? kFloat : dtype == ScalarType::BFloat16 ? kBFloat16 : kHalf,
          static_cast<int>(b.size(1))};
}

// A of each norm as it is multiplied; parts of float32 are made by one launch for all.
std::vector<Adapter> adapters_of(const std::vector<Norm>& norms) {
  int64_t halves = 0;
  for (const Norm& norm : norms)
    if (norm.first && norm.parts > 1) halves += padded(norm.parts * norm.of.a.numel());
  const MaybeTensor buffer = halves > 0 ? MaybeTensor(empty(norms[0].of.weight, {halves}, ScalarType::BFloat16)) : std::nullopt;
  std::vector<Cast> casts;
  std::vector<Adapter> adapters;
  int64_t used = 0;
  for (const Norm& norm : norms) {
    if (!norm.first) {
      adapters.push_back(adapters.back());
      continue;
    }
    if (norm.parts == 1) {
      adapters.push_back({norm.of.a});
      continue;
    }
    const Tensor a = in_rows(norm.of.a);
    const View parts(*buffer, 2 * a.size(0), a.size(1), a.size(1), 1, used);
    used += padded(parts.numel());
    casts.push_back({a, parts.rows(0, a.size(0))});
    casts.push_back({a, parts.rows(a.size(0), a.size(0)), /*transposed=*/false, /*rest=*/true});
    adapters.push_back({parts});
  }
  if (!casts.empty()) cast_all_cuda(casts);
  return adapters;
}

Finish finish_of(const Norm& norm, const Arguments& args, const Entry& e) {
  Finish f{args.products, args.squares};
  f.b = matrix_b(norm.b);
  f.norm = static_cast<float*>(norm.of.norm.mutable_data_ptr());
  if (norm.of.magnitude) {
    f.magnitude = static_cast<const float*>(norm.of.magnitude->const_data_ptr());
    f.gain = static_cast<float*>(norm.of.gain->mutable_data_ptr());
  }
  f.rows = norm.rows(), f.parts = norm.parts;
  f.steps = e.steps, f.first_step = e.first_step, f.first_tile = e.first_tile;
  f.all_steps = args.steps, f.blocks = args.blocks;
  f.scaling = static_cast<float>(norm.of.scaling);
  f.unit = static_cast<float>(kGainUnits) * std::numeric_limits<float>::epsilon();
  return f;
}

// What is launched together: products of some norms with their A, and A Aᵀ where it is not there yet.
class Batch {
 public:
  bool takes(bool gram) const { return args_.entries + (gram ? 2 : 1) <= kEntries; }
  bool empty() const { return args_.entries == 0; }

  void add(const Norm& norm, const Adapter& adapter, size_t index) {
    indices_.push_back(index);
    entries_.push_back(args_.entries);
    Entry& e = push(norm.of.weight, adapter, norm);
    e.scaling = static_cast<float>(norm.of.scaling);
    if (norm.first) grams_.push_back({index, args_.entries}), push(adapter.a, adapter, norm);
  }

  // Appends what is left to do, and fills in the adapters' grams. Returns the memory that it needs until then.
  Tensor launch(const std::vector<Norm>& norms, std::vector<Adapter>& adapters, std::vector<Finish>& finishes) {
    const Tensor& like = norms[indices_[0]].of.weight;
    const int device = like.get_device_index();
    args_.blocks = std::max(1, std::min(multiprocessors(device), args_.steps / kLeastSteps));
    const int width = width_ <= 16 ? 16 : width_ <= 32 ? 32 : 64;
    const int64_t sums = int64_t{args_.blocks + tiles_} * kRows;
    int64_t floats = 2 * sums;
    for (const auto& [index, n] : grams_) floats += int64_t{runs_of(args_.entry[n])} * width * width;
    const Tensor buffer = lora_fused::empty(like, {floats}, ScalarType::Float);
    float* next = static_cast<float*>(buffer.mutable_data_ptr());
    args_.products = next, args_.squares = next + sums, next += 2 * sums;
    for (const auto& [index, n] : grams_) {
      Entry& e = args_.entry[n];
      e.gram = next, e.first_block = block_of(e.first_step, args_.steps, args_.blocks);
      adapters[index].gram = next, adapters[index].grams = runs_of(e), adapters[index].gram_width = width;
      next += int64_t{runs_of(e)} * width * width;
    }
    is_brain(like) ? launch_as<__nv_bfloat16>(width, like) : launch_as<__half>(width, like);
    for (size_t i = 0; i < indices_.size(); ++i)
      finishes.push_back(finish_of(norms[indices_[i]], args_, args_.entry[entries_[i]]));
    return buffer;
  }

 private:
  int runs_of(const Entry& e) const {
    const int64_t last = e.first_step + int64_t{e.tiles} * e.steps - 1;
    return block_of(last, args_.steps, args_.blocks) - block_of(e.first_step, args_.steps, args_.blocks) + 1;
  }

  Entry& push(const View& w, const Adapter& adapter, const Norm& norm) {
    Entry& e = args_.entry[args_.entries++];
    e = {};
    maps_.push_back({w, adapter.a});
    e.b = matrix_b(norm.b), e.parts = norm.parts;
    e.rows = static_cast<int>(w.size(0)), e.steps = tiles(w.size(1), kStep), e.tiles = tiles(w.size(0), kRows);
    e.first_step = args_.steps, e.first_tile = tiles_;
    args_.steps += e.steps * e.tiles, tiles_ += e.tiles;
    width_ = std::max(width_, norm.parts * norm.ranks());
    return e;
  }

  template <typename T>
  void launch_as(int width, const Tensor& like) {
    width == 16 ? launch_width<T, 16>(like) : width == 32 ? launch_width<T, 32>(like) : launch_width<T, 64>(like);
  }

  template <typename T, int kWidth>
  void launch_width(const Tensor& like) {
    for (size_t n = 0; n < maps_.size(); ++n) {
      encode_boxes(args_.entry[n].w, maps_[n].w, kRows);
      encode_boxes(args_.entry[n].a, maps_[n].a, kWidth);
    }
    static SharedMemory shared_memory;
    shared_memory.allow(products_kernel<T, kWidth>, kBytes, like.get_device_index());
    products_kernel<T, kWidth><<<args_.blocks, kThreads, kBytes, stream_of(like)>>>(args_);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  struct Maps {
    View w, a;
  };

  Arguments args_{};
  int tiles_ = 0, width_ = 0;
  std::vector<Maps> maps_;
  std::vector<size_t> indices_;                 // of norms
  std::vector<int> entries_;                    // theirs
  std::vector<std::pair<size_t, int>> grams_;  // of which norm, and its entry
};

template <int kRanks>
void launch_finish(const Finishes& finishes, int most, unsigned count, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(tiles(most, finish_rows(kRanks))), count);
  finish_kernel<kRanks><<<grid, kFinishThreads, 0, stream>>>(finishes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void finish(const std::vector<Finish>& all, cudaStream_t stream) {
  for (size_t first = 0; first < all.size(); first += kFinishes) {
    const unsigned count = static_cast<unsigned>(std::min<size_t>(kFinishes, all.size() - first));
    Finishes finishes{};
    int most = 0, ranks = 0;
    for (size_t i = 0; i < count; ++i) {
      finishes.of[i] = all[first + i];
      most = std::max(most, all[first + i].rows), ranks = std::max(ranks, all[first + i].b.ranks);
    }
    const auto launch = ranks <= 16 ? launch_finish<16> : ranks <= 32 ? launch_finish<32> : launch_finish<64>;
    launch(finishes, most, count, stream);
  }
}

}  // namespace

bool lora_fused::row_norm_sm90_serves(const RowNorm& of) {
  const View w = of.weight;
  const int64_t ranks = parts_of(of) * of.a.size(0);
  const bool large = w.numel() >= kLeastElements && w.size(1) >= kLeastColumns;
  if (!large || ranks < 1 || ranks > kMostRanks || !takes_boxes(w) || !is_hopper(w.get_device_index())) return false;
  if (of.a.scalar_type() == ScalarType::Float) return w.scalar_type() == ScalarType::BFloat16;
  return of.a.scalar_type() == w.scalar_type() && takes_boxes(of.a);
}

void lora_fused::row_norms_sm90(const std::vector<RowNorm>& all) {
  std::vector<Norm> norms;
  for (const RowNorm& of : all) {
    const bool first = norms.empty() || !same_adapter(of, norms.back().of);
    norms.push_back({of, in_rows(of.b), parts_of(of), first});
  }
  std::vector<Adapter> adapters = adapters_of(norms);
  std::vector<Finish> finishes;
  std::vector<Tensor> kept;  // until all is launched
  Batch batch;
  const auto launch = [&] {
    if (!batch.empty()) kept.push_back(batch.launch(norms, adapters, finishes));
    batch = Batch();
  };
  for (size_t i = 0; i < norms.size(); ++i) {
    const std::function<void()>& fill = norms[i].of.fill;  // of memory that the norm before may have read
    if (fill || !batch.takes(norms[i].first)) launch();
    if (fill) fill();
    batch.add(norms[i], adapters[i], i);
    if (fill) launch();
  }
  launch();
  for (size_t i = 0; i < norms.size(); ++i) {
    if (!norms[i].first) adapters[i] = adapters[i - 1];
    finishes[i].gram = adapters[i].gram, finishes[i].grams = adapters[i].grams;
    finishes[i].gram_width = adapters[i].gram_width;
  }
  finish(finishes, stream_of(norms[0].of.weight));
}
