// dropout on the CPU: out[m, k] = mask(seed, m, k) · x[m, k] / (1 - p), in out's dtype, or += that; without the scale
// where not `scaled`.
//
// Fused: the mask (Philox, see common/dropout.h), the scale, the sum and the conversion. The product is
// taken in float32 (float64 for float64) and rounded once.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "../../torch-ext/torch_binding.h"
#include "../common/dropout.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename In, typename Out>
void drop_rows(Out* out, const In* x, int64_t begin, int64_t end, int64_t cols, uint64_t seed,
               const lora_fused::Keep& keep, bool accumulate) {
  using Wide = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const Wide scale = static_cast<Wide>(keep.scale);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t col = 0; col < cols; col += lora_fused::kMaskColumns) {
      const auto words =
          lora_fused::philox(seed, row, static_cast<uint32_t>(col / lora_fused::kMaskColumns));
      const int lanes = static_cast<int>(std::min<int64_t>(lora_fused::kMaskColumns, cols - col));
      for (int i = 0; i < lanes; ++i) {
        const int64_t at = row * cols + col + i;
        const bool kept = words.number(i) >= keep.threshold;
        const Wide value = kept ? static_cast<Wide>(x[at]) * scale : Wide(0);
        out[at] = static_cast<Out>(accumulate ? static_cast<Wide>(out[at]) + value : value);
      }
    }
}

template <typename In, typename Out>
void drop(Tensor& out, const Tensor& x, uint64_t seed, const lora_fused::Keep& keep,
          bool accumulate) {
  const In* from = static_cast<const In*>(x.const_data_ptr());
  Out* to = static_cast<Out*>(out.mutable_data_ptr());
  const int64_t cols = x.size(1);
  const int64_t grain = std::max<int64_t>(1, 16384 / (cols + 1));
  torch::stable::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    drop_rows<In, Out>(to, from, begin, end, cols, seed, keep, accumulate);
  });
}

template <typename In>
void drop_to(Tensor& out, const Tensor& x, uint64_t seed, const lora_fused::Keep& keep,
          bool accumulate) {
  switch (out.scalar_type()) {
    case ScalarType::Float: return drop<In, float>(out, x, seed, keep, accumulate);
    case ScalarType::Double: return drop<In, double>(out, x, seed, keep, accumulate);
    case ScalarType::BFloat16: return drop<In, torch::headeronly::BFloat16>(out, x, seed, keep, accumulate);
    default: return drop<In, torch::headeronly::Half>(out, x, seed, keep, accumulate);
  }
}

}  // namespace

void dropout_cpu(const Tensor& x, const Tensor& seed, double p, Tensor out,
                  bool accumulate, bool scaled) {
  lora_fused::check_dropout(x, seed, p, out, /*cuda=*/false);
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const lora_fused::Keep keep(p, scaled);
  switch (x.scalar_type()) {
    case ScalarType::Float: return drop_to<float>(out, x, key, keep, accumulate);
    case ScalarType::Double: return drop_to<double>(out, x, key, keep, accumulate);
    case ScalarType::BFloat16: return drop_to<torch::headeronly::BFloat16>(out, x, key, keep, accumulate);
    default: return drop_to<torch::headeronly::Half>(out, x, key, keep, accumulate);
  }
}
