// Value and slope of the activations of a gated MLP, for the CPU and the CUDA op: formulas as in
// torch-ext/lora_fused/backends/reference.
#pragma once

#include <cmath>
#include <type_traits>

#include "host_device.h"
#include "names.h"

namespace lora_fused {

using std::erf;  // of a float as well: <cmath> need not give ::exp of another type than double
using std::exp;

template <typename T>
LORA_FUSED_HD T sigmoid(T x) {
#if defined(__CUDA_ARCH__)
  // Within two last places, and without the branch of a division's rare cases: the divisor is at least 1.
  if constexpr (std::is_same_v<T, float>) return __fdividef(1.0f, 1.0f + exp(-x));
#endif
  return T(1) / (T(1) + exp(-x));
}

template <typename T>
LORA_FUSED_HD void value_and_slope(T g, int64_t activation, T& value, T& slope) {
  if (activation == kSilu) {
    const T s = sigmoid(g);
    value = g * s;
    slope = s * (T(1) + g * (T(1) - s));
  } else if (activation == kGelu) {
    const T cdf = T(0.5) * (T(1) + erf(g * T(0.70710678118654752440)));
    value = g * cdf;
    slope = cdf + g * T(0.39894228040143267794) * exp(T(-0.5) * g * g);
  } else if (activation == kGeluTanh) {
    // (1 + tanh z)/2 = σ(2z); beyond ±30 it is 0 or 1, and g³ stays finite.
    const T near = g < T(-30) ? T(-30) : g > T(30) ? T(30) : g, square = near * near;
    const T twice = T(1.59576912160573071176);
    const T exponent = near * (T(1) + T(0.044715) * square) * twice;
    const T s = sigmoid(exponent);
    value = g * s;
    slope = s * (T(1) + g * sigmoid(-exponent) * twice * (T(1) + T(0.134145) * square));
  } else {
    static_assert(kActivations == 5, "value_and_slope: a formula for each activation");
    const T positive = g <= T(0) ? T(0) : g;  // NaN stays
    value = activation == kRelu ? positive : positive * positive;
    slope = activation == kRelu ? (g <= T(0) ? T(0) : T(1)) : T(2) * positive;
  }
}

}  // namespace lora_fused
