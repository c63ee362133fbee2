// DoRA's norms on Hopper, those of a group from one read of each weight: what is supported, how it is cut, and the
// launches of row_norm.cuh, which says what they compute.
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <limits>

#include "../../common/kernels.h"
#include "../../common/tensors.h"
#include "../../dispatch/table.h"
#include "tma_host.h"
#include "row_norm.cuh"
#include "../common/stream.h"

namespace {

using namespace lora_fused;
using namespace lora_fused::sm90;
using namespace lora_fused::sm90::row_norm;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kNorms = kEntries / 2;

int64_t padded(int64_t count) { return (count + 63) / 64 * 64; }  // so that all in a buffer starts on 128 bytes

MatrixB matrix_b(const Tensor& b) {
  return {b.const_data_ptr(), dtype_code(b.scalar_type(), "row_norm"), static_cast<int>(b.size(1))};
}

// A of each norm as hi and lo below each other, [2R, K], all made by one launch.
std::vector<MatrixView> split_a(const RowNorm* norms, size_t count) {
  int64_t total = 0, used = 0;
  for (size_t i = 0; i < count; ++i) total += padded(2 * norms[i].a.numel());
  const Tensor buffer = empty(norms[0].weight, {total}, ScalarType::BFloat16);
  std::vector<MatrixView> splits;
  std::vector<Cast> casts;
  for (size_t i = 0; i < count; ++i) {
    const Tensor a = in_rows(norms[i].a);
    const int64_t ranks = a.size(0), cols = a.size(1);
    splits.push_back(MatrixView(buffer, 2 * ranks, cols, cols, 1, used));
    used += padded(2 * ranks * cols);
    casts.push_back({a, splits[i].rows(0, ranks)});
    casts.push_back({a, splits[i].rows(ranks, ranks), /*transposed=*/false, /*lo=*/true});
  }
  cast_all_cuda(casts);
  return splits;
}

// W [N, K] or A's hi and lo, beside these, as the next of the launch.
Entry& push(Arguments& args, int& all_tiles, const MatrixView& w, const MatrixView& splits, int width) {
  Entry& e = args.entry[args.entries++];
  encode_tensor_map(e.w, w, kRows);
  encode_tensor_map(e.a, splits, width);
  e.rows = static_cast<int>(w.size(0)), e.steps = tiles(w.size(1), kStep), e.tiles = tiles(w.size(0), kRows);
  e.first_step = args.steps, e.first_tile = all_tiles;
  args.steps += e.steps * e.tiles, all_tiles += e.tiles;
  return e;
}

Finish finish_of(const RowNorm& of, const Arguments& args, const Entry& e, const Entry& gram) {
  Finish f{args.products, args.squares, gram.gram};
  f.grams = runs_of(gram, args);
  f.b = e.b;
  f.norm = static_cast<float*>(of.norm.mutable_data_ptr());
  if (of.magnitude) {
    f.magnitude = static_cast<const float*>(of.magnitude->const_data_ptr());
    f.mag_norm_scale = static_cast<float*>(of.mag_norm_scale->mutable_data_ptr());
  }
  f.rows = e.rows, f.steps = e.steps, f.first_step = e.first_step, f.first_tile = e.first_tile;
  f.all_steps = args.steps, f.blocks = args.blocks;
  f.scaling = e.scaling, f.unit = static_cast<float>(kScaleUnits) * std::numeric_limits<float>::epsilon();
  return f;
}

template <int kRanks>
void launch(const RowNorm* norms, size_t count) {
  constexpr int kWidth = 2 * kRanks;
  const Tensor& like = norms[0].weight;
  const int device = like.get_device_index();
  const std::vector<MatrixView> splits = split_a(norms, count);
  std::vector<Tensor> bs;
  Arguments args{};
  int all_tiles = 0, most_rows = 0;
  for (size_t i = 0; i < count; ++i) {
    bs.push_back(in_rows(norms[i].b));
    Entry& e = push(args, all_tiles, norms[i].weight, splits[i], kWidth);
    e.b = matrix_b(bs[i]), e.scaling = static_cast<float>(norms[i].scaling);
    push(args, all_tiles, splits[i], splits[i], kWidth);
    most_rows = std::max(most_rows, e.rows);
  }
  args.blocks = std::max(1, std::min(multiprocessors(device), args.steps / dispatch::kRowNormSm90Steps));
  const int64_t sums = int64_t{args.blocks + all_tiles} * kRows;
  int64_t floats = 2 * sums;
  for (int i = 1; i < args.entries; i += 2) floats += int64_t{runs_of(args.entry[i], args)} * kWidth * kWidth;
  const Tensor buffer = empty(like, {floats}, ScalarType::Float);
  float* next = static_cast<float*>(buffer.mutable_data_ptr());
  args.products = next, args.squares = next + sums, next += 2 * sums;
  Finishes finishes{};
  for (size_t i = 0; i < count; ++i) {
    Entry& gram = args.entry[2 * i + 1];
    gram.gram = next, gram.first_block = block_of(gram.first_step, args.steps, args.blocks);
    next += int64_t{runs_of(gram, args)} * kWidth * kWidth;
    finishes.of[i] = finish_of(norms[i], args, args.entry[2 * i], gram);
  }
  static SharedMemory shared_memory;
  shared_memory.allow(products_kernel<kWidth>, kBytes, device);
  const cudaStream_t stream = stream_of(like);
  products_kernel<kWidth><<<args.blocks, kThreads, kBytes, stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const dim3 grid(static_cast<unsigned>(tiles(most_rows, kFinishRows)), static_cast<unsigned>(count));
  finish_kernel<kRanks><<<grid, kFinishThreads, 0, stream>>>(finishes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

bool lora_fused::row_norm_sm90_supports(const RowNorm& of) {
  const MatrixView w = of.weight;
  const int64_t ranks = of.a.size(0);
  return of.a.scalar_type() == ScalarType::Float && w.scalar_type() == ScalarType::BFloat16 && ranks >= 1 &&
         ranks <= kMostRanks && supports_tma(w);
}

void lora_fused::row_norms_sm90(const std::vector<RowNorm>& norms) {
  for (size_t first = 0; first < norms.size(); first += kNorms) {
    const size_t count = std::min(kNorms, norms.size() - first);
    int64_t ranks = 0;
    for (size_t i = first; i < first + count; ++i) ranks = std::max(ranks, norms[i].a.size(0));
    const auto run = ranks <= 8 ? launch<8> : ranks <= 16 ? launch<16> : launch<32>;
    run(norms.data() + first, count);
  }
}
