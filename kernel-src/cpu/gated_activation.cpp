// The gated activation on the CPU: h = f(gate)·up, and with dh its backward in the same pass, without what follows it.
//
// Fused: value, slope, both gradients and h again. float32 inside (float64 for float64), one rounding.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../common/activation.h"
#include "../common/dtypes.h"
#include "../common/kernels.h"

namespace {

using namespace lora_fused;

template <typename T>
T* row(const MaybeMatrixView& t, int64_t i) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) + i * t->stride(0) : nullptr;
}

// scale∘(u - b) + b at one column, as if it had been stored.
template <typename T>
Wide<T> scale_around_bias(T stored, const ScaleAroundBias& by, int64_t j) {
  const auto u = static_cast<Wide<T>>(stored);
  if (!by.scale) return u;
  const auto scale = static_cast<const Wide<T>*>(by.scale->const_data_ptr())[j];
  if (!by.bias) return static_cast<Wide<T>>(static_cast<T>(u * scale));
  const auto bias = static_cast<Wide<T>>(static_cast<const T*>(by.bias->const_data_ptr())[j]);
  return static_cast<Wide<T>>(static_cast<T>(scale * u + (1 - scale) * bias));
}

template <typename T>
void run(const GatedActivation& g) {
  const int64_t cols = g.h.size(1), grain = std::max<int64_t>(1, 8192 / (cols + 1));
  torch::stable::parallel_for(0, g.h.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T *gate = row<T>(g.gate, i), *up = row<T>(g.up, i), *dh = row<T>(g.dh, i);
      T *h = row<T>(g.h, i), *dgate = row<T>(g.dgate, i), *dup = row<T>(g.dup, i);
      for (int64_t j = 0; j < cols; ++j) {
        const Wide<T> u = scale_around_bias(up[j], g.up_scale, j);
        Wide<T> value, slope;
        value_and_slope<Wide<T>>(scale_around_bias(gate[j], g.gate_scale, j), g.activation, value, slope);
        h[j] = static_cast<T>(value * u);
        if (dh) {
          const auto d = static_cast<Wide<T>>(dh[j]);
          dgate[j] = static_cast<T>(slope * u * d);
          dup[j] = static_cast<T>(value * d);
        }
      }
    }
  });
}

}  // namespace

void lora_fused::gated_activation_cpu(const GatedActivation& work) {
  LORA_FUSED_FLOATING(work.h.scalar_type(), "gated_activation", [&] { run<scalar_t>(work); });
}
