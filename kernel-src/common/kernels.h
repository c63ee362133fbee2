// The work that group/ and ops/ give to a device: what each kernel computes, and its launchers in cpu/ and cuda/.
//
// Shapes: M tokens, K features in, N features out, R rank. D is dropout. "hi" and "lo" are a float32 value as two
// bfloat16 numbers: rounded, and what the rounding leaves out (bf16x3, see group/adapters.h).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <optional>
#include <vector>

#include "dropout.h"
#include "four_bit.h"
#include "matrix_view.h"
#include "names.h"
#include "side_stream.h"

namespace lora_fused {

using MaybeTensor = std::optional<torch::stable::Tensor>;

// One conversion, `from` [rows, cols] contiguous: `to` has its shape, its rows strided or not, or is [cols, rows]
// contiguous where transposed. `lo`: what the conversion leaves out, from - to, instead.
struct Cast {
  MatrixView from, to;
  bool transposed = false, lo = false;
};

// How a float32 matrix is stored as three of bfloat16: (hi, hi, lo), each `stride` columns from the one before. The
// columns are those of members of `ranks` each, whose three are next to each other: column j begins at
// j + 2·stride·(j / ranks).
struct SplitLayout {
  int64_t ranks, stride;
};

// out = scaling·(hi + lo), the float32 products of an operand's hi and lo, in float32 or as `split`, from out's first
// column on. Rows of each may be strided.
struct HiLoSum {
  MatrixView hi, lo, out;
  double scaling;
  std::optional<SplitLayout> split = std::nullopt;
};

// DoRA's scale of an output u that holds the bias b: scale∘(u - b) + b, as a sum that leaves u unchanged where the
// scale is 1. Vectors [N]: the scale in float32 (float64 for float64), the bias in u's dtype.
struct ScaleAroundBias {
  MaybeTensor scale, bias;
};

// With u the unscaled output: y = scale∘(u - b) + b, y = (scale - 1)∘u or y += (scale - 1)∘u; u and y [M, N]
// contiguous.
struct ScaleOutput {
  enum Form { kScale, kExcess, kAddExcess };
  MatrixView unscaled, y;
  ScaleAroundBias scale;
  Form form;
};

// The backward of y = scale∘(u - b) + b with scale = magnitude / norm, in one pass over dy [M, N], rows contiguous and
// strided or not: dunscaled = scale∘dy, which may be dy's own memory, dmagnitude = Σ dy∘(u - b) / norm and dbias = Σ dy
// over tokens. What is not there is not computed. The sums [N] are in float32 (float64 for float64), in a fixed order.
struct ScaleOutputBackward {
  MatrixView dy;
  MaybeMatrixView unscaled, dunscaled;
  MaybeTensor norm, dmagnitude, dbias;
  ScaleAroundBias scale;
};

// Matrices [M, I] with contiguous rows: gate and up may be halves of wider ones, and so may their gradients. Without dh
// the forward, h = f(gate)·up; else dgate, dup and h. Gate and up are unscaled where a scale is given. A pass follows on
// dgate or dup, as on any dy, in whose memory it leaves the gradient of the unscaled output.
struct GatedActivation {
  MatrixView gate, up, h;
  MaybeMatrixView dh, dgate, dup;
  int64_t activation;  // an Activation
  ScaleAroundBias gate_scale, up_scale;
  std::optional<ScaleOutputBackward> gate_pass = std::nullopt, up_pass = std::nullopt;
};

// Those that there are.
inline std::vector<ScaleOutputBackward> passes_of(const GatedActivation& work) {
  std::vector<ScaleOutputBackward> passes;
  for (const auto* pass : {&work.gate_pass, &work.up_pass})
    if (*pass) passes.push_back(**pass);
  return passes;
}

// t [M, R] = scaling · D(x) aᵀ for x [M, C] and a [R, C]; rows of t may be strided. bf16x3: a is the sum of a and of
// `lo`, in the same memory, and t is written as `split`.
struct Shrink {
  MatrixView x, a, t;
  double scaling;
  std::optional<Dropped> mask;
  MaybeMatrixView lo = std::nullopt;
  std::optional<SplitLayout> split = std::nullopt;
};

// out = scaling · tᵀ D(x) for t [M, R] and x [M, C], rows of t strided or not: [R, C], or [C, R] where transposed,
// contiguous, in x's dtype or float32. dA from (dt, x), dB from (t, dy). bf16x3: t is the sum of t and of `lo`, in the
// same memory.
struct AdapterGrad {
  MatrixView t, x, out;
  bool transposed;
  std::optional<Dropped> mask;
  MaybeMatrixView lo = std::nullopt;
  double scaling = 1.0;
};

// dt [M, R] = scaling · dy b and db [N, R] = db_scaling · dyᵀ t for dy [M, N], b [N, R] and t [M, R], from one read of
// dy; dt and db in dy's dtype or float32. Rows are contiguous, and may be strided. bf16x3: b and t are [.., 2R], each
// with its lo beside its hi, and dt is written as `split`.
struct DtDb {
  MatrixView dy, b, t, dt, db;
  double scaling;
  std::optional<SplitLayout> split = std::nullopt;
  double db_scaling = 1.0;
};

// D(dt a), a term of dx [M, K].
struct DroppedExpand {
  MatrixView dt, a;
  Dropped mask;
};

// norm [N] = ‖weight + scaling·b a‖ by row, in float32, and where there is a magnitude
// mag_norm_scale = magnitude / norm (mag_norm_scale.h), both in float32. `fill` writes the weight, just before it is
// read.
struct RowNorm {
  torch::stable::Tensor weight, a, b, norm;
  double scaling;
  MaybeTensor magnitude = std::nullopt, mag_norm_scale = std::nullopt;
  std::function<void()> fill = nullptr;
};

// out = D(x), or += it, without the factor 1 / (1 - p) where not `scaled`; x and out contiguous, of any floating
// dtypes.
void dropout_cpu(const MatrixView& x, const Dropped& mask, const MatrixView& out, bool accumulate, bool scaled);
// To `weight.out`, in `dtype`.
void dequantize_4bit_cpu(const FourBit& weight, torch::headeronly::ScalarType dtype);
// norm [N] = ‖weight + scaling·lora_b lora_a‖ by row, in float32.
void row_norm_cpu(const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_a,
                  const torch::stable::Tensor& lora_b, double scaling, const torch::stable::Tensor& norm);
// out = magnitude / norm, in norm's dtype.
void mag_norm_scale_cpu(const torch::stable::Tensor& magnitude, const torch::stable::Tensor& norm,
                        const torch::stable::Tensor& out);
void gated_activation_cpu(const GatedActivation& work);
void scale_output_cpu(const ScaleOutput& work);
void scale_output_backward_cpu(const ScaleOutputBackward& work);
void lo_cpu(const Cast& cast);  // of one with `lo`, to bfloat16
void hi_lo_sums_cpu(const std::vector<HiLoSum>& sums);

#if defined(CUDA_KERNEL)
// `supports`: what a launcher can compute, on an architecture that has it. Whether it is faster is dispatch/table.h's.

// out = alpha·a b + beta·out by cuBLAS itself, on the current stream of torch's handle. False where it can't be:
// another dtype than half precision, sizes beyond 32 bits, cuBLAS not found in the process.
bool cublas_gemm(const MatrixView& out, const MatrixView& a, const MatrixView& b, float alpha, float beta);

void dropout_cuda(const MatrixView& x, const Dropped& mask, const MatrixView& out, bool accumulate, bool scaled);
// On the device of `like`.
void dequantize_4bit_cuda(const FourBit& weight, torch::headeronly::ScalarType dtype,
                          const torch::stable::Tensor& like);
torch::stable::Tensor mag_norm_scale_cuda(const torch::stable::Tensor& magnitude, const torch::stable::Tensor& norm);
// All conversions in as few launches as their number allows.
void cast_all_cuda(const std::vector<Cast>& casts);
void hi_lo_sums_cuda(const std::vector<HiLoSum>& sums);
void gated_activation_cuda(const GatedActivation& work);
void scale_output_cuda(const ScaleOutput& work);
// All in one launch, and what they sum in another; they share M and dtype.
void scale_output_backward_cuda(const std::vector<ScaleOutputBackward>& works);

// A launch for each norm, and one before and one after for all.
void row_norms_sm80(const std::vector<RowNorm>& norms);
// Of a bfloat16 weight and a float32 a, up to rank 32: three launches for every four. `fill` is not called.
bool row_norm_sm90_supports(const RowNorm& norm);
void row_norms_sm90(const std::vector<RowNorm>& norms);

// Each list is one launch; its entries share M and dtype. Half precision; every row of x, a, t and dt starts on 16
// bytes, as `skinny_supports` asks of each of them.
bool skinny_supports(const MatrixView& matrix);
void shrink_cuda(const std::vector<Shrink>& entries);
void adapter_grad_cuda(const std::vector<AdapterGrad>& entries);
// dx += the sum of all terms.
void dropped_expand_add_cuda(const MatrixView& dx, const std::vector<DroppedExpand>& terms);

// The same two products on sm90, up to rank 128; a of either layout. Each list is one launch for every eight entries,
// which share the dtype, and are all bf16x3 or none.
bool skinny_sm90_supports(const MatrixView& matrix);  // as x, a or t of one
bool skinny_sm90_supports(const Shrink& product);
bool skinny_sm90_supports(const AdapterGrad& product);
void skinny_sm90(const std::vector<Shrink>& products);
void skinny_sm90(const std::vector<AdapterGrad>& products, SideStream* side = nullptr);

// On sm90, up to rank 64, bf16x3 up to 32. Two launches for every four entries, which share M and dtype.
bool dt_db_sm90_supports(const DtDb& products);
void dt_db_sm90(const std::vector<DtDb>& products);
#endif

}  // namespace lora_fused
