// From a dtype to a C++ type, by torch's own dispatch: LORA_FUSED_FLOATING(dtype, "name", [&] { ... scalar_t ... }).
//
// An error that begins with the name where the dtype is not listed. Commas of the body stand in parentheses.
#pragma once

#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#define LORA_FUSED_HALF_TYPES torch::headeronly::ScalarType::BFloat16, torch::headeronly::ScalarType::Half
// float32, float64, bfloat16, float16.
#define LORA_FUSED_FLOATING(dtype, name, ...) \
  THO_DISPATCH_V2(dtype, name, AT_WRAP(__VA_ARGS__), AT_EXPAND(AT_FLOATING_TYPES), LORA_FUSED_HALF_TYPES)
// float32, bfloat16, float16.
#define LORA_FUSED_UP_TO_FLOAT32(dtype, name, ...) \
  THO_DISPATCH_V2(dtype, name, AT_WRAP(__VA_ARGS__), torch::headeronly::ScalarType::Float, LORA_FUSED_HALF_TYPES)
// float32, float64.
#define LORA_FUSED_WIDE(dtype, name, ...) \
  THO_DISPATCH_V2(dtype, name, AT_WRAP(__VA_ARGS__), AT_EXPAND(AT_FLOATING_TYPES))

namespace lora_fused {

// What a value of T is computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace lora_fused
