// The gated activation on the CPU: h = f(gate)·up, and with dh its backward in the same pass.
//
// Fused: value, slope, both gradients and h again. float32 inside (float64 for float64), one rounding.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "../common/activation.h"
#include "../common/kernels.h"

namespace {

using torch::headeronly::ScalarType;

template <typename T>
T* row(const lora_fused::MaybeMatrixView& t, int64_t i) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) + i * t->stride(0) : nullptr;
}

// scale∘(u - b) + b at one column, as if it had been stored.
template <typename T, typename Wide>
Wide scale_around_bias(Wide u, const lora_fused::ScaleAroundBias& by, int64_t j) {
  if (!by.scale) return u;
  const Wide scale = static_cast<const Wide*>(by.scale->const_data_ptr())[j];
  if (!by.bias) return static_cast<Wide>(static_cast<T>(u * scale));
  const Wide bias = static_cast<Wide>(static_cast<const T*>(by.bias->const_data_ptr())[j]);
  return static_cast<Wide>(static_cast<T>(u + (u - bias) * (scale - 1)));
}

template <typename T>
void run(const lora_fused::GatedActivation& g) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t cols = g.h.size(1), grain = std::max<int64_t>(1, 8192 / (cols + 1));
  torch::stable::parallel_for(0, g.h.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T *gate = row<T>(g.gate, i), *up = row<T>(g.up, i), *dh = row<T>(g.dh, i);
      T *h = row<T>(g.h, i), *dgate = row<T>(g.dgate, i), *dup = row<T>(g.dup, i);
      for (int64_t j = 0; j < cols; ++j) {
        const Wide u = scale_around_bias<T, Wide>(static_cast<Wide>(up[j]), g.up_scale, j);
        Wide value, slope;
        lora_fused::value_and_slope<Wide>(scale_around_bias<T, Wide>(static_cast<Wide>(gate[j]), g.gate_scale, j),
                                          g.activation, value, slope);
        h[j] = static_cast<T>(value * u);
        if (dh) {
          const Wide d = static_cast<Wide>(dh[j]);
          dgate[j] = static_cast<T>(slope * u * d);
          dup[j] = static_cast<T>(value * d);
        }
      }
    }
  });
}

}  // namespace

void lora_fused::gated_activation_cpu(const GatedActivation& g) {
  switch (g.h.scalar_type()) {
    case ScalarType::Float: return run<float>(g);
    case ScalarType::Double: return run<double>(g);
    case ScalarType::BFloat16: return run<torch::headeronly::BFloat16>(g);
    default: return run<torch::headeronly::Half>(g);
  }
}
