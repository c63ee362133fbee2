// What lora_group.cpp and gated_mlp.cpp need of a device: passes over activations, many small
// conversions at once, and the products of a dropped input. M tokens, N features out, R rank.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <optional>
#include <vector>

#include "dropout.h"
#include "names.h"
#include "matrix_view.h"

namespace lora_fused {

using MaybeTensor = std::optional<torch::stable::Tensor>;

// One conversion, `from` [rows, cols] contiguous: `to` has its shape, its rows strided or not, or is
// [cols, rows] contiguous where transposed. `rest`: what the conversion leaves out, from - to, instead.
struct Cast {
  View from, to;
  bool transposed = false, rest = false;
};

// Where a matrix of float32 goes as three of bfloat16, where exact (projections.h): rounded, the same again, and what
// the rounding leaves out, each `apart` columns from the one before. Its columns are those of members of `ranks` each,
// whose three are next to each other: column j begins at j + 2·apart·(j / ranks).
struct Parts {
  int64_t ranks, apart;
};

// out = scaling·(first + second) in float32, or its parts, from out's first column on. Rows of each may be strided.
struct PartSum {
  View first, second, out;
  double scaling;
  std::optional<Parts> parts = std::nullopt;
};

// DoRA's gain on the value u before it, which holds the bias b: g∘(u - b) + b, in the order that
// leaves u unchanged where g is 1. Vectors [N]: the gain in float32 (float64 for float64), the bias
// in u's dtype.
struct Gain {
  MaybeTensor gain, bias;
};

// Matrices [M, I] with contiguous rows: gate and up may be halves of wider ones, and so may their
// gradients. Without dh the forward, h = f(gate)·up; else dgate, dup and h. Gate and up are values
// before the gain where a gain is given.
struct Gated {
  View gate, up, h;
  MaybeView dh, dgate, dup;
  int64_t activation;  // an Activation
  Gain gate_gain, up_gain;
};

// y = g∘(u - b) + b, y = (g - 1)∘u or y += (g - 1)∘u; u and y [M, N] contiguous.
struct Scale {
  enum Form { kGain, kExcess, kAddExcess };
  View u, y;
  Gain gain;
  Form form;
};

// One pass over dy [M, N], contiguous: scaled = g∘dy, which may be dy's own memory, dots = Σ dy∘(u - b) / norm
// and sums = Σ dy over tokens. What is not there is not computed; dots and sums [N] are in float32
// (float64 for float64), each a sum in a fixed order.
struct TokenSums {
  View dy;
  MaybeView u, scaled;
  MaybeTensor norm, dots, sums;
  Gain gain;
};

// t [M, R] = scaling · dropped(x) aᵀ for x [M, C] and a [R, C]; rows of t may be strided. Exact, a is the sum of a and
// of `rest`, in the same memory, and t's parts are written.
struct SkinnyDown {
  View x, a, t;
  double scaling;
  std::optional<Dropped> mask;
  MaybeView rest = std::nullopt;
  std::optional<Parts> parts = std::nullopt;
};

// out = scaling · tᵀ dropped(x) for t [M, R] and x [M, C], rows of t strided or not: [R, C], or [C, R] where
// transposed, contiguous, in x's dtype or float32. Exact, t is the sum of t and of `rest`, in the same memory.
struct SkinnyOuter {
  View t, x, out;
  bool transposed;
  std::optional<Dropped> mask;
  MaybeView rest = std::nullopt;
  double scaling = 1.0;
};

// dt [M, R] = scaling · dy b and db [N, R] = db_scaling · dyᵀ t for dy [M, N], b [N, R] and t [M, R], from one read of dy; dt and
// db in dy's dtype or float32. Rows are contiguous, and may be strided. Exact, b and t are [.., 2R], each with the rest
// of its values beside them, and dt's parts are written.
struct DyProducts {
  View dy, b, t, dt, db;
  double scaling;
  std::optional<Parts> parts = std::nullopt;
  double db_scaling = 1.0;
};

// dropped(dt a), a term of dx [M, K].
struct DroppedUp {
  View dt, a;
  Dropped mask;
};

// norm [N] = ‖weight + scaling·b a‖ by row, in float32, and where there is a magnitude gain = magnitude / norm
// (gain.h), both in float32. `fill` writes the weight, just before it is read.
struct RowNorm {
  torch::stable::Tensor weight, a, b, norm;
  double scaling;
  MaybeTensor magnitude = std::nullopt, gain = std::nullopt;
  std::function<void()> fill = nullptr;
};

void gated_cpu(const Gated& gated);
void scale_cpu(const Scale& scale);
void token_sums_cpu(const TokenSums& sums);
void rest_cpu(const Cast& cast);  // of one with `rest`, to bfloat16
void part_sums_cpu(const std::vector<PartSum>& sums);

#if defined(CUDA_KERNEL)
// out = alpha·a b + beta·out by cuBLAS itself, on the current stream of torch's handle. False where it
// can't be: another dtype than half precision, sizes beyond 32 bits, cuBLAS not found in the process.
bool blas_gemm(const View& out, const View& a, const View& b, float alpha, float beta);

// All conversions in as few launches as their number allows.
void cast_all_cuda(const std::vector<Cast>& casts);
// By row_norms_sm90 where that serves and pays, else a launch for each, and one before and one after for all.
void row_norms_cuda(const std::vector<RowNorm>& norms);
// On Hopper a bfloat16 weight and a float32 a, up to rank 32: three launches for every four. `fill` is not called.
bool row_norm_sm90_serves(const RowNorm& norm);
void row_norms_sm90(const std::vector<RowNorm>& norms);
void part_sums_cuda(const std::vector<PartSum>& sums);
void gated_cuda(const Gated& gated);
void scale_cuda(const Scale& scale);
// All in one launch, and what they sum in another; they share M and dtype.
void token_sums_cuda(const std::vector<TokenSums>& sums);

// Each list is one launch; its entries share M and dtype. Half precision; every row of x, a, t and dt
// starts on 16 bytes, as `skinny_serves` asks of each of them.
bool skinny_serves(const View& matrix);
void skinny_down_cuda(const std::vector<SkinnyDown>& entries);
void skinny_outer_cuda(const std::vector<SkinnyOuter>& entries);
// dx += the sum of all terms.
void dropped_up_add_cuda(const View& dx, const std::vector<DroppedUp>& terms);

// The same two products on Hopper, up to rank 128; a of either layout. Each list is one launch for
// every eight entries, which share the dtype, and are all exact or none.
bool skinny_sm90_serves(const View& matrix);  // as x, a or t of one
bool skinny_sm90_serves(const SkinnyDown& product);
bool skinny_sm90_serves(const SkinnyOuter& product);
void skinny_sm90(const std::vector<SkinnyDown>& products);
void skinny_sm90(const std::vector<SkinnyOuter>& products);

// On Hopper, up to rank 64, exact up to 32. Two launches for every four entries, which share M and dtype.
bool dy_products_sm90_serves(const DyProducts& products);
void dy_products_sm90(const std::vector<DyProducts>& products);
#endif

}  // namespace lora_fused
