// Sums of matrix products, see products.h.
#include "products.h"

#include "../common/gemm.h"
#include "../dispatch/table.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#if defined(CUDA_KERNEL)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

namespace lora_fused {

namespace {

// out = beta·add + alpha·a b; add may be out itself, and is not read at beta = 0.
void addmm(const Tensor& out, const Tensor& add, const Tensor& a, const Tensor& b, double beta, double alpha) {
#if defined(CUDA_KERNEL)
  if (out.is_cuda()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), add.get(), a.get(), b.get(), beta, alpha));
    return;
  }
#endif
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), add.get(), a.get(), b.get(), beta, alpha));
}

// m in `dtype`, a copy where it is not.
Tensor as(ScalarType dtype, const MatrixView& m) {
  if (m.scalar_type() == dtype) return m.tensor();
  const Tensor copy = empty(m.base(), {m.size(0), m.size(1)}, dtype);
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), m.tensor().get(), 0));
  return copy;
}

// The bias [N] in every row of a small out, which addmm begins with.
bool fill_rows(const MatrixView& out, const Tensor& bias) {
  if (bias.dim() != 1 || bias.size(0) != out.size(1)) return false;
  return copy_small(out, {bias, out.size(0), out.size(1), /*row_stride=*/0, bias.stride(0)});
}

#if defined(CUDA_KERNEL)
bool is_scaled(const Term& term) { return term.alpha != 1.0; }

// The sum of terms as our own product has it, what it does beside still to be filled in.
Gemm sum_of(const MatrixView& out, const std::vector<Term>& terms, const std::vector<Term>& leading) {
  const bool rows_are_n = terms[0].b.stride(0) == 1;
  Gemm gemm{{}, rows_are_n, out};
  for (const auto* part : {&leading, &terms})
    for (const Term& term : *part) gemm.segments.push_back({term.a, rows_are_n ? term.b.transposed() : term.b});
  gemm.leading = leading.size();
  return gemm;
}

// As one launch, where that is faster. A single term is the library's: it needs no second pass over out.
std::optional<Gemm> gemm_of(const MatrixView& out, const std::vector<Term>& terms, const std::vector<Term>& leading) {
  if (!out.is_cuda() || leading.size() + terms.size() < 2 || !dispatch::gemm_is_faster(out, out.size(0), out.size(1)))
    return std::nullopt;
  if (std::any_of(terms.begin(), terms.end(), is_scaled)) return std::nullopt;
  return sum_of(out, terms, leading);
}

// The same of terms of which some have an alpha in common: these lead.
std::optional<Gemm> gemm_of(const MatrixView& out, const std::vector<Term>& terms) {
  if (std::none_of(terms.begin(), terms.end(), is_scaled)) return gemm_of(out, terms, {});
  std::vector<Term> plain, scaled;
  for (const Term& term : terms) (is_scaled(term) ? scaled : plain).push_back(term);
  for (const Term& term : scaled)
    if (term.alpha != scaled[0].alpha || plain.empty()) return std::nullopt;
  std::optional<Gemm> gemm = gemm_of(out, plain, scaled);
  if (gemm && !scaled.empty()) gemm->leading_scale = scaled[0].alpha;
  return gemm;
}

bool run_if_supported(const Gemm& gemm) {
  if (!gemm_sm90_supports(gemm)) return false;
  gemm_sm90(gemm);
  return true;
}
#endif

}  // namespace

bool supports_float_output(const MatrixView& a) {
  return a.is_cuda() && (a.scalar_type() == ScalarType::BFloat16 || a.scalar_type() == ScalarType::Half);
}

void multiply(const MatrixView& out, const MatrixView& a, const MatrixView& b, double alpha, bool add) {
#if defined(CUDA_KERNEL)
  if (out.is_cuda() && cublas_gemm(out, a, b, static_cast<float>(alpha), add ? 1.0f : 0.0f)) return;
  if (out.is_cuda() && out.scalar_type() != a.scalar_type()) {  // a fresh product, unscaled
    const Tensor to = out.tensor(), left = a.tensor(), right = b.tensor();
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_dtype_out(to.get(), left.get(), right.get(), aoti_torch_dtype_float32()));
    return;
  }
#endif
  const Tensor to = out.tensor();
  addmm(to, to, as(out.scalar_type(), a), as(out.scalar_type(), b), add ? 1.0 : 0.0, alpha);
}

void multiply(const MatrixView& out, const std::vector<Term>& terms, const std::optional<Tensor>& bias,
              SideStream* side) {
#if defined(CUDA_KERNEL)
  if (std::optional<Gemm> gemm = gemm_of(out, terms)) {
    gemm->bias = bias, gemm->side = side;
    if (run_if_supported(*gemm)) return;
  }
#endif
  const bool filled = bias && fill_rows(out, *bias);
  bool fresh = !filled;
  for (const Term& term : terms) {
    if (fresh && bias)
      addmm(out.tensor(), *bias, term.a.tensor(), term.b.tensor(), 1.0, term.alpha);
    else
      multiply(out, term.a, term.b, term.alpha, !fresh);
    fresh = false;
  }
}

int64_t group_counters(int64_t rows) { return GemmGroup::counters(rows); }

bool multiply_group(const std::vector<Shrink>& shrinks, const std::vector<Sum>& sums, const MaybeMatrixView& zeros,
                    SideStream* side) {
#if defined(CUDA_KERNEL)
  GemmGroup group{shrinks, {}, zeros, side};
  for (const Sum& sum : sums) {
    if (std::any_of(sum.terms.begin(), sum.terms.end(), is_scaled)) return false;
    Gemm gemm = sum_of(sum.out, sum.terms, {});
    gemm.bias = sum.bias, gemm.unscaled = sum.unscaled, gemm.mag_norm_scale = sum.mag_norm_scale, gemm.made = sum.made;
    group.sums.push_back(gemm);
  }
  if (!gemm_group_sm90_supports(group)) return false;
  gemm_group_sm90(group);
  return true;
#else
  return false;
#endif
}

bool multiply_dropped(const MatrixView& out, const std::vector<Term>& dropped, const Dropped& mask,
                      const std::vector<Term>& terms, SideStream* side) {
#if defined(CUDA_KERNEL)
  if (std::any_of(dropped.begin(), dropped.end(), is_scaled)) return false;
  if (std::optional<Gemm> gemm = gemm_of(out, terms, dropped)) {
    gemm->mask = mask, gemm->side = side;
    return run_if_supported(*gemm);
  }
#endif
  return false;
}

bool multiply_excess(const MatrixView& out, const MatrixView& unscaled, const std::vector<Term>& leading,
                     const std::vector<Term>& terms, const Tensor& mag_norm_scale, const std::optional<Tensor>& bias) {
#if defined(CUDA_KERNEL)
  if (std::any_of(leading.begin(), leading.end(), is_scaled)) return false;
  if (std::optional<Gemm> gemm = gemm_of(out, terms, leading)) {
    gemm->mag_norm_scale = mag_norm_scale, gemm->unscaled = unscaled, gemm->bias = bias;
    return run_if_supported(*gemm);
  }
#endif
  return false;
}

bool multiply_scaled(const MatrixView& out, const MatrixView& unscaled, const std::vector<Term>& terms,
                     const Tensor& mag_norm_scale) {
#if defined(CUDA_KERNEL)
  if (std::optional<Gemm> gemm = gemm_of(out, terms)) {
    gemm->mag_norm_scale = mag_norm_scale, gemm->unscaled = unscaled;
    return run_if_supported(*gemm);
  }
#endif
  return false;
}

}  // namespace lora_fused
