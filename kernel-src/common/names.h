// What the ops take as numbers, in one list a kind: the enum and the names that Python looks a number up by come from
// the same line, so that their order cannot differ.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>

namespace lora_fused {

// clang-format off
#define LORA_FUSED_ACTIVATIONS(X) X(kSilu, silu) X(kGelu, gelu) X(kGeluTanh, gelu_tanh) X(kRelu, relu) X(kRelu2, relu2)

// How a base weight is stored.
#define LORA_FUSED_FORMATS(X) X(kFloating, floating) X(kNf4, nf4) X(kFp4, fp4)

// The dtype of a quantized weight before it was quantized.
#define LORA_FUSED_DTYPES(X) X(kFromFloat32, float32) X(kFromBFloat16, bfloat16) X(kFromFloat16, float16)

// The numbers that describe one weight: `PackedWeight` in backends/native.py, says what they are.
#define LORA_FUSED_PACKED_WEIGHT(X)                                                                           \
  X(kFormat, format) X(kRows, rows) X(kCols, cols) X(kBlocksize, blocksize) X(kNestedBlocksize, nested_blocksize) \
  X(kFirstScale, first_scale) X(kDtype, dtype)

// clang-format on

#define LORA_FUSED_ENUMERATOR(enumerator, name) enumerator,
#define LORA_FUSED_NAME(enumerator, name) "," #name

enum Activation : int64_t { LORA_FUSED_ACTIVATIONS(LORA_FUSED_ENUMERATOR) kActivations };
enum Format : int64_t { LORA_FUSED_FORMATS(LORA_FUSED_ENUMERATOR) kFormats };
enum QuantizedDtype : int64_t { LORA_FUSED_DTYPES(LORA_FUSED_ENUMERATOR) kQuantizedDtypes };
struct PackedWeight {
  enum Field : int64_t { LORA_FUSED_PACKED_WEIGHT(LORA_FUSED_ENUMERATOR) kFields };
};

// The names of one kind, separated by commas.
inline std::string names_of(const std::string& kind) {
  const char* names = nullptr;
  if (kind == "activations") names = "" LORA_FUSED_ACTIVATIONS(LORA_FUSED_NAME);
  if (kind == "formats") names = "" LORA_FUSED_FORMATS(LORA_FUSED_NAME);
  if (kind == "dtypes") names = "" LORA_FUSED_DTYPES(LORA_FUSED_NAME);
  if (kind == "packed_weight") names = "" LORA_FUSED_PACKED_WEIGHT(LORA_FUSED_NAME);
  STD_TORCH_CHECK(names != nullptr, "names: nothing is called ", kind);
  return names + 1;  // past the first comma
}

inline void check_activation(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation: ", activation,
                  " is unknown, expected one of ", names_of("activations"));
}

}  // namespace lora_fused
