// DoRA's norms on Hopper, those of a group from one read of each weight: what is served, and the launches.
//
//   |w + s·b A|² = |w|² + 2s b·(A w) + s² b·(A Aᵀ) b      for each row w of W [N, K] and b of B [N, R]
//
// W Aᵀ and |w|², and A Aᵀ, are products of skinny_sm90_kernel.h, all in one launch; a last kernel puts them together in
// float32, B in whatever dtype. A float32 A beside a bfloat16 W is two bfloat16 parts below each other, 16 of its 24
// bits, made by a launch before, and their products are added up. The terms cancel where s·b A nearly takes w away: an
// error of 1e-7 of |w|², not of the result.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <limits>

#include "../common/gain.h"
#include "../common/lora_group.h"
#include "../common/products.h"
#include "columns.h"
#include "hopper.h"
#include "stream.h"

namespace {

using namespace lora_fused;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMostRanks = 64, kNorms = 8;  // of one launch
constexpr int kWarps = 8, kBlockRows = 32;
// Below, another launch is no shorter; and few terms would not average out what A's parts leave out.
constexpr int64_t kLeastElements = int64_t(1) << 20, kLeastColumns = 512;

enum Dtype : int { kFloat, kBFloat16, kHalf };

struct Finish {
  const float *products, *gram, *squares, *magnitude;  // [N, parts·R], [parts·R, parts·R], [N]; no magnitude: no gain
  const void* b;                                       // [N, R]
  float *norm, *gain;
  int rows, ranks, parts, b_dtype;
  float scaling, unit;  // unit: of gain_of
};

struct FinishBatch {
  Finish of[kNorms];
};

__device__ __forceinline__ float load(const void* from, int dtype, int64_t i) {
  if (dtype == kFloat) return static_cast<const float*>(from)[i];
  if (dtype == kBFloat16) return widen(static_cast<const __nv_bfloat16*>(from)[i]);
  return widen(static_cast<const __half*>(from)[i]);
}

// Of norm blockIdx.y, kBlockRows rows; a warp has a row at a time, a lane ranks `lane` and `lane` + 32.
__global__ void __launch_bounds__(32 * kWarps) row_norm_sm90_finish_kernel(const __grid_constant__ FinishBatch batch) {
  __shared__ float gram[kMostRanks * kMostRanks];
  const Finish& f = batch.of[blockIdx.y];
  const int first = blockIdx.x * kBlockRows, lane = threadIdx.x % 32, ranks = f.ranks, wide = f.parts * ranks;
  if (first >= f.rows) return;
  for (int i = threadIdx.x; i < ranks * ranks; i += 32 * kWarps) {
    float sum = 0.0f;
    for (int p = 0; p < f.parts; ++p)
      for (int q = 0; q < f.parts; ++q) sum += f.gram[(p * ranks + i / ranks) * wide + q * ranks + i % ranks];
    gram[i] = sum;
  }
  __syncthreads();
  for (int row = first + threadIdx.x / 32; row < min(first + kBlockRows, f.rows); row += kWarps) {
    float b[2], of_gram[2] = {}, sum = 0.0f;
    for (int half = 0; half < 2; ++half) {
      const int rank = lane + 32 * half;
      b[half] = rank < ranks ? load(f.b, f.b_dtype, int64_t{row} * ranks + rank) : 0.0f;
    }
#pragma unroll 8
    for (int rank = 0; rank < ranks; ++rank) {  // the gram is symmetric: its rows for its columns
      const float of_rank = __shfl_sync(0xffffffffu, rank < 32 ? b[0] : b[1], rank % 32);
      if (lane < ranks) of_gram[0] += gram[rank * ranks + lane] * of_rank;
      if (lane + 32 < ranks) of_gram[1] += gram[rank * ranks + lane + 32] * of_rank;
    }
    for (int half = 0; half < 2; ++half) {
      const int rank = lane + 32 * half;
      if (rank >= ranks) break;
      float product = 0.0f;
      for (int part = 0; part < f.parts; ++part) product += f.products[int64_t{row} * wide + part * ranks + rank];
      sum += f.scaling * b[half] * (2.0f * product + f.scaling * of_gram[half]);
    }
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (lane > 0) continue;
    const float squared = f.squares[row] + sum, norm = sqrtf(squared < 0.0f ? 0.0f : squared);
    f.norm[row] = norm;
    if (f.magnitude != nullptr) f.gain[row] = gain_of<float>(f.magnitude[row], norm, f.unit);
  }
}

// A as it is multiplied, and A Aᵀ of that. Pieces of one weight in four bits have it in common.
struct Adapter {
  View a, gram;
};

// Scratch memory in pieces: counted once, given out in the same order. Pieces start on 128 bytes.
class Scratch {
 public:
  static int64_t padded(int64_t count) { return (count + 63) / 64 * 64; }
  Scratch(const Tensor& like, int64_t count, ScalarType dtype) : buffer_(empty(like, {count}, dtype)) {}
  View take(int64_t rows, int64_t cols) {
    const View view(buffer_, rows, cols, cols, 1, used_);
    used_ += padded(rows * cols);
    return view;
  }

 private:
  Tensor buffer_;
  int64_t used_ = 0;
};

int parts_of(const RowNorm& of) { return of.a.scalar_type() == of.weight.scalar_type() ? 1 : 2; }
bool same_adapter(const RowNorm& x, const RowNorm& y) {
  const View a = x.a, b = y.a;
  return a.const_data_ptr() == b.const_data_ptr() && a.scalar_type() == b.scalar_type() && a.size(0) == b.size(0) &&
         a.size(1) == b.size(1) && a.stride(0) == b.stride(0) && a.stride(1) == b.stride(1);
}

int code(ScalarType dtype) {
  return dtype == ScalarType::Float ? kFloat : dtype == ScalarType::BFloat16 ? kBFloat16 : kHalf;
}

Finish finish_of(const RowNorm& of, const Tensor& b, const Adapter& adapter, const View& products, const View& squares) {
  const auto floats = [](const View& view) { return static_cast<const float*>(view.const_data_ptr()); };
  Finish f{floats(products), floats(adapter.gram), floats(squares)};
  f.b = b.const_data_ptr(), f.b_dtype = code(b.scalar_type());
  f.norm = static_cast<float*>(of.norm.mutable_data_ptr());
  if (of.magnitude) {
    f.magnitude = static_cast<const float*>(of.magnitude->const_data_ptr());
    f.gain = static_cast<float*>(of.gain->mutable_data_ptr());
  }
  f.rows = static_cast<int>(b.size(0)), f.ranks = static_cast<int>(b.size(1)), f.parts = parts_of(of);
  f.scaling = static_cast<float>(of.scaling);
  f.unit = static_cast<float>(kGainUnits) * std::numeric_limits<float>::epsilon();
  return f;
}

void launch_finish(const std::vector<Finish>& all, cudaStream_t stream) {
  for (size_t first = 0; first < all.size(); first += kNorms) {
    const size_t count = std::min<size_t>(kNorms, all.size() - first);
    FinishBatch batch{};
    int most = 0;
    for (size_t i = 0; i < count; ++i) {
      batch.of[i] = all[first + i];
      most = std::max(most, batch.of[i].rows);
    }
    const dim3 grid(static_cast<unsigned>(sm90::tiles(most, kBlockRows)), static_cast<unsigned>(count));
    row_norm_sm90_finish_kernel<<<grid, 32 * kWarps, 0, stream>>>(batch);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace

bool lora_fused::row_norm_sm90_serves(const RowNorm& of) {
  const View w = of.weight;
  const int64_t wide = parts_of(of) * of.a.size(0);
  const bool large = w.numel() >= kLeastElements && w.size(1) >= kLeastColumns;
  if (!large || wide < 1 || wide > kMostRanks || !skinny_sm90_serves(w)) return false;
  if (of.a.scalar_type() == ScalarType::Float) return w.scalar_type() == ScalarType::BFloat16;
  return of.a.scalar_type() == w.scalar_type() && skinny_sm90_serves(View(of.a));
}

void lora_fused::row_norms_sm90(const std::vector<RowNorm>& all) {
  // Long rows first: a block has 128 of them, and the last to end should be a short one.
  std::vector<RowNorm> norms = all;
  std::stable_sort(norms.begin(), norms.end(),
                   [](const RowNorm& x, const RowNorm& y) { return x.weight.size(1) > y.weight.size(1); });
  int64_t floats = 0, halves = 0;
  for (size_t i = 0; i < norms.size(); ++i) {
    const RowNorm& of = norms[i];
    const int64_t n = of.weight.size(0), wide = parts_of(of) * of.a.size(0);
    floats += Scratch::padded(n * wide) + Scratch::padded(n);
    if (i > 0 && same_adapter(of, norms[i - 1])) continue;
    floats += Scratch::padded(wide * wide);
    if (parts_of(of) > 1) halves += Scratch::padded(wide * of.a.size(1));
  }
  Scratch wide_ones(norms[0].weight, floats, ScalarType::Float), parts(norms[0].weight, halves, ScalarType::BFloat16);

  std::vector<Cast> casts;
  std::vector<Adapter> adapters;
  for (size_t i = 0; i < norms.size(); ++i) {
    const RowNorm& of = norms[i];
    if (i > 0 && same_adapter(of, norms[i - 1])) {
      adapters.push_back(adapters.back());
      continue;
    }
    const int64_t ranks = of.a.size(0), wide = parts_of(of) * ranks;
    View a = of.a;
    if (parts_of(of) > 1) {
      const Tensor whole = in_rows(of.a);
      a = parts.take(wide, whole.size(1));
      casts.push_back({whole, a.rows(0, ranks)});
      casts.push_back({whole, a.rows(ranks, ranks), /*transposed=*/false, /*rest=*/true});
    }
    adapters.push_back({a, wide_ones.take(wide, wide)});
  }
  if (!casts.empty()) cast_all_cuda(casts);

  std::vector<Finish> finishes;
  std::vector<Tensor> kept;  // until all is launched
  std::vector<SkinnyDown> products;
  const auto multiply = [&] {
    if (!products.empty()) skinny_sm90(products);
    products.clear();
  };
  for (size_t i = 0; i < norms.size(); ++i) {
    const RowNorm& of = norms[i];
    const Adapter& adapter = adapters[i];
    if (of.fill) {
      multiply();
      of.fill();
    }
    const int64_t n = of.weight.size(0);
    const View product = wide_ones.take(n, adapter.a.size(0)), squares = wide_ones.take(n, 1);
    products.push_back({of.weight, adapter.a, product, 1.0, std::nullopt, squares});
    if (i == 0 || !same_adapter(of, norms[i - 1])) products.push_back({adapter.a, adapter.a, adapter.gram, 1.0});
    if (of.fill) multiply();
    kept.push_back(in_rows(of.b));
    finishes.push_back(finish_of(of, kept.back(), adapter, product, squares));
  }
  multiply();
  launch_finish(finishes, stream_of(norms[0].weight));
}
