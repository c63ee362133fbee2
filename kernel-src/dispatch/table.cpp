// The dispatch table, see table.h.
#include "table.h"

#include "../common/gemm.h"

#if defined(CUDA_KERNEL)
#include "device.h"
#endif

namespace lora_fused::dispatch {

#if defined(CUDA_KERNEL)
namespace {

using torch::headeronly::ScalarType;

bool is_launch_bound(const MatrixView& x) {
  const auto dtype = x.scalar_type();
  return (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) && x.size(0) <= kSkinnySm80Tokens;
}

template <typename Product>
SkinnyKernel skinny_kernel(const Product& product, const MatrixView& other, bool alone, bool beside) {
  const MatrixView& x = product.x;
  if (!x.is_cuda()) return SkinnyKernel::kLibrary;
  const bool fits_sm90 = product.mask || beside || x.size(0) <= kSkinnySm90Tokens;
  if (fits_sm90 && is_sm90(x) && skinny_sm90_supports(product)) return SkinnyKernel::kSm90;
  // The sm80 kernels know no lo.
  if (alone || product.lo) return SkinnyKernel::kLibrary;
  const bool is_faster = product.mask || (is_launch_bound(x) && product.t.size(1) <= kSkinnySm80Ranks);
  return is_faster && skinny_fits_sm80(x) && skinny_fits_sm80(other) ? SkinnyKernel::kSm80 : SkinnyKernel::kLibrary;
}

}  // namespace

SkinnyKernel skinny_kernel(const Shrink& product, bool alone) {
  return skinny_kernel(product, product.a, alone, /*beside=*/false);
}
SkinnyKernel skinny_kernel(const AdapterGrad& product, bool beside) {
  return skinny_kernel(product, product.t, /*alone=*/false, beside);
}

bool skinny_fits_sm80(const MatrixView& operand) { return has_sm80(operand) && skinny_supports(operand); }

bool wants_b_transposed(const MatrixView& x) {
  return has_sm80(x) && !(is_sm90(x) && skinny_sm90_supports(x)) && is_launch_bound(x);
}

bool dt_db_is_faster(const MatrixView& dy, int64_t elements) {
  return dy.size(0) >= kDtDbTokens && elements >= kDtDbElements && is_sm90(dy);
}

bool run_beside(const MatrixView& x, const AdapterGradsOf& of) {
  if (x.size(0) < kBesideTokens || !gemm_is_faster(x, x.size(0), x.size(1)) || !has_launch_completion_events())
    return false;
  if (of.mlp) return true;
  return !of.bf16x3 && (of.masked ? of.members > 1 : x.size(0) >= kBesideTokensOfLinears);
}

unsigned skinny_cluster(int all_tiles, int most_steps, int multiprocessors, unsigned most) {
  const int most_blocks = multiprocessors * 7 / 4;
  unsigned cluster = 1;
  while (cluster < most && static_cast<int>(2 * cluster) * all_tiles <= most_blocks &&
         8 * static_cast<int>(cluster) <= most_steps)
    cluster *= 2;
  return cluster;
}

GemmTiling::GemmTiling(int64_t m, int64_t n, int multiprocessors) {
  const int64_t clusters = multiprocessors / 2, rows = 256;
  const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  const auto rounds = [&](int64_t columns) { return double(parts(parts(m, rows) * parts(n, columns), clusters)); };
  const double wide = rounds(256), narrow = 0.6 * rounds(128);
  width = narrow < wide ? 128 : 256;
  efficiency = double(m) * double(n) / (double(rows) * 256 * double(clusters)) / std::min(narrow, wide);
}

bool gemm_is_faster(const MatrixView& like, int64_t m, int64_t n) {
  return is_sm90(like) && GemmTiling(m, n, multiprocessors(like.get_device_index())).efficiency >= kGemmEfficiency;
}

bool gemm_group_is_faster(const MatrixView& like, int64_t m, int64_t n, int64_t shrinks, int64_t ranks) {
  return shrinks <= kGemmGroupShrinks && ranks <= kGemmGroupRanks && gemm_is_faster(like, m, n);
}

void check_row_norm_fits(const RowNorm& norm) { check_has_sm80(norm.weight, "row_norm"); }

bool row_norm_fits_sm90(const RowNorm& norm) {
  return !norm.fill && norm.weight.size(1) >= kRowNormSm90Columns && is_sm90(norm.weight) &&
         row_norm_sm90_supports(norm);
}
#else
bool wants_b_transposed(const MatrixView&) { return false; }
bool run_beside(const MatrixView&, const AdapterGradsOf&) { return false; }
bool gemm_group_is_faster(const MatrixView&, int64_t, int64_t, int64_t, int64_t) { return false; }
#endif

}  // namespace lora_fused::dispatch
