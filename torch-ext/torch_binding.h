#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

// The names of what the ops take as numbers, see kernel-src/common/names.h.
std::string names(std::string kind);

// Whose kernels run on like's device, and those of which architecture all GPUs run from now on:
// kernel-src/dispatch/architecture.h.
std::string architecture(const torch::stable::Tensor& like);
void set_architecture(std::string name);

// kernel-src/ops/ says what each computes. An op without another word takes tensors on the CPU and on CUDA.
torch::stable::Tensor row_norm(const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_a,
                               const torch::stable::Tensor& lora_b, double scaling);
torch::stable::Tensor mag_norm_scale(const torch::stable::Tensor& magnitude, const torch::stable::Tensor& norm);
void dropout(const torch::stable::Tensor& x, const torch::stable::Tensor& seed, double p, torch::stable::Tensor out,
             bool accumulate, bool scaled);
void dequantize_4bit(const torch::stable::Tensor& packed, const torch::stable::Tensor& absmax,
                     std::optional<torch::stable::Tensor> nested_absmax,
                     std::optional<torch::stable::Tensor> nested_code, std::optional<torch::stable::Tensor> offset,
                     int64_t blocksize, int64_t nested_blocksize, bool fp4, int64_t first, torch::stable::Tensor out);

// Lists of projections: kernel-src/ops/lora_group.cpp and gated_mlp.cpp say what they hold.
namespace lora_fused {
using Tensors = std::vector<torch::stable::Tensor>;
using Optionals = std::vector<std::optional<torch::stable::Tensor>>;
}  // namespace lora_fused

std::tuple<lora_fused::Tensors, lora_fused::Tensors> dora_scales(
    lora_fused::Tensors weights, lora_fused::Tensors lora_a, lora_fused::Tensors lora_b, lora_fused::Tensors magnitudes,
    std::vector<double> scalings, lora_fused::Tensors scales, std::vector<int64_t> quantized);
lora_fused::Tensors lora_forward(const torch::stable::Tensor& x, lora_fused::Optionals operands,
                                 std::vector<double> scalings, std::optional<torch::stable::Tensor> seeds,
                                 std::optional<std::vector<double>> dropouts,
                                 std::optional<std::vector<int64_t>> quantized, bool bf16x3);
lora_fused::Tensors lora_backward(lora_fused::Optionals dys, const torch::stable::Tensor& x,
                                  const torch::stable::Tensor& t, std::optional<lora_fused::Tensors> unscaled,
                                  lora_fused::Optionals operands, std::vector<double> scalings,
                                  std::optional<torch::stable::Tensor> seeds,
                                  std::optional<std::vector<double>> dropouts,
                                  std::optional<std::vector<int64_t>> quantized, bool bf16x3, bool need_dx,
                                  std::vector<int64_t> needs);
lora_fused::Tensors gated_forward(const torch::stable::Tensor& x, lora_fused::Optionals operands,
                                  std::vector<double> scalings, std::optional<torch::stable::Tensor> seeds,
                                  std::optional<std::vector<double>> dropouts,
                                  std::optional<std::vector<int64_t>> quantized, bool bf16x3, int64_t activation,
                                  int64_t gate_half, bool up_to_h);
lora_fused::Tensors gated_backward(const torch::stable::Tensor& dy, const torch::stable::Tensor& x,
                                   lora_fused::Tensors kept, lora_fused::Optionals operands,
                                   std::vector<double> scalings, std::optional<torch::stable::Tensor> seeds,
                                   std::optional<std::vector<double>> dropouts,
                                   std::optional<std::vector<int64_t>> quantized, bool bf16x3, int64_t activation,
                                   int64_t gate_half, bool need_dx, std::vector<int64_t> needs);

// Whether a sum of products [rows, cols] in like's dtype, on its device, is faster as one launch of gemm_sm90: for
// `explain`.
bool gemm_is_faster_cuda(const torch::stable::Tensor& like, int64_t rows, int64_t cols);

// kernel-src/common/gemm.h says what it computes; an error where gemm_sm90_supports says no.
void gemm_cuda(lora_fused::Tensors a, lora_fused::Tensors b, bool b_rows_are_n, torch::stable::Tensor out,
               std::optional<torch::stable::Tensor> bias, std::optional<torch::stable::Tensor> mag_norm_scale,
               std::optional<torch::stable::Tensor> unscaled, bool accumulate,
               std::optional<torch::stable::Tensor> seed, double p, int64_t leading, double leading_scale);

// Every t = scaling · x otherᵀ [M, R] and every out = Σ a b + bias in one launch; `segments` of a and b belong to each
// out, the last `made` of whose a are t or columns of it. b_rows_are_n: every other is [R, C] and every b [N, k], else
// [C, R] and [k, N]. `zeros` as GemmGroup has them. An error where gemm_group_sm90_supports refuses.
void gemm_group_cuda(lora_fused::Tensors x, lora_fused::Tensors other, lora_fused::Tensors t,
                     std::vector<double> scalings, lora_fused::Tensors a, lora_fused::Tensors b,
                     std::vector<int64_t> segments, std::vector<int64_t> made, bool b_rows_are_n,
                     lora_fused::Tensors out, lora_fused::Optionals bias, std::optional<torch::stable::Tensor> zeros);

// out = scaling · D(x) otherᵀ [M, R], or scaling · D(x)ᵀ other [C, R] where by_columns, of each of a list; D drops with
// probability p where there is a seed. `sm90`: by cuda/sm90/skinny.cu, else by cuda/sm80/skinny.cu. An error where that
// does not support it. `bf16x3`, on sm90, the ranks of a member: other is [2R, C] or [M, 2R], with lo below or beside
// hi, and scaling · D(x) otherᵀ is written as hi, hi, lo [M, 3R].
void skinny_cuda(lora_fused::Tensors x, lora_fused::Tensors other, lora_fused::Tensors out, double scaling,
                 bool by_columns, bool sm90, std::optional<torch::stable::Tensor> seed, double p, int64_t bf16x3);

// dt = scaling · dy b and db = db_scaling · dyᵀ t of each of a list, from one read of dy; an error where
// dt_db_sm90_supports refuses. `bf16x3`: b is [N, 2R] and t [M, 2R], with lo beside hi, and dt is written as
// hi, hi, lo [M, 3R].
void dt_db_cuda(lora_fused::Tensors dy, lora_fused::Tensors b, lora_fused::Tensors t, lora_fused::Tensors dt,
                lora_fused::Tensors db, double scaling, bool bf16x3, double db_scaling);

// On CUDA alone: the CPU computes an embedding with the library's products.
lora_fused::Tensors column_norm_cuda(const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_a,
                                     const torch::stable::Tensor& lora_b, double scaling,
                                     std::optional<torch::stable::Tensor> magnitude);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> embedding_forward_cuda(
    const torch::stable::Tensor& ids, const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_a,
    const torch::stable::Tensor& lora_b, std::optional<torch::stable::Tensor> mag_norm_scale,
    std::optional<torch::stable::Tensor> scale, double scaling, double number, bool keep);
lora_fused::Tensors embedding_backward_cuda(
    const torch::stable::Tensor& dy, const torch::stable::Tensor& ids, std::optional<torch::stable::Tensor> rows,
    const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_a, const torch::stable::Tensor& lora_b,
    std::optional<torch::stable::Tensor> magnitude, std::optional<torch::stable::Tensor> mag_norm_scale,
    std::optional<torch::stable::Tensor> norm, std::optional<torch::stable::Tensor> scale, double scaling,
    double number, int64_t padding, bool need_a, bool need_b, bool need_m);
