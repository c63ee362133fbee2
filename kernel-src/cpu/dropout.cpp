// dropout on the CPU: out[m, k] = mask(seed, m, k) · x[m, k] / (1 - p), in out's dtype, or += that; without the scale
// where not `scaled`.
//
// Fused: the mask (Philox, see common/dropout.h), the scale, the sum and the conversion. The product is
// taken in float32 (float64 for float64) and rounded once.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../common/dtypes.h"
#include "../common/kernels.h"

namespace {

using namespace lora_fused;

template <typename In, typename Out>
void drop_rows(Out* out, const In* x, int64_t begin, int64_t end, int64_t cols, uint64_t seed, const Keep& keep,
               bool accumulate) {
  using W = Wide<In>;
  const W scale = static_cast<W>(keep.scale);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t col = 0; col < cols; col += kMaskColumns) {
      const auto words = philox(seed, row, static_cast<uint32_t>(col / kMaskColumns));
      const int lanes = static_cast<int>(std::min<int64_t>(kMaskColumns, cols - col));
      for (int i = 0; i < lanes; ++i) {
        const int64_t at = row * cols + col + i;
        const bool kept = words.number(i) >= keep.threshold;
        const W value = kept ? static_cast<W>(x[at]) * scale : W(0);
        out[at] = static_cast<Out>(accumulate ? static_cast<W>(out[at]) + value : value);
      }
    }
}

template <typename Out, typename In>
void drop(const MatrixView& out, const In* x, uint64_t seed, const Keep& keep, bool accumulate) {
  Out* to = static_cast<Out*>(out.mutable_data_ptr());
  const int64_t cols = out.size(1);
  const int64_t grain = std::max<int64_t>(1, 16384 / (cols + 1));
  torch::stable::parallel_for(0, out.size(0), grain, [&](int64_t begin, int64_t end) {
    drop_rows<In, Out>(to, x, begin, end, cols, seed, keep, accumulate);
  });
}

template <typename In>
void drop_to(const MatrixView& out, const In* x, uint64_t seed, const Keep& keep, bool accumulate) {
  LORA_FUSED_FLOATING(out.scalar_type(), "dropout", [&] { drop<scalar_t>(out, x, seed, keep, accumulate); });
}

}  // namespace

void lora_fused::dropout_cpu(const MatrixView& x, const Dropped& mask, const MatrixView& out, bool accumulate,
                             bool scaled) {
  const auto seed = static_cast<uint64_t>(*static_cast<const int64_t*>(mask.seed.const_data_ptr()));
  const Keep keep(mask.p, scaled);
  LORA_FUSED_FLOATING(x.scalar_type(), "dropout",
                      [&] { drop_to(out, static_cast<const scalar_t*>(x.const_data_ptr()), seed, keep, accumulate); });
}
