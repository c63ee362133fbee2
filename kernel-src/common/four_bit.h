// Four-bit weights as bitsandbytes stores them, for the CPU and the CUDA dequantize_4bit:
//
//   w[i] = code[q[i]] · absmax[i / blocksize]        i over the flat [N, K]
//   absmax[j] = nested_code[u[j]] · nested_absmax[j / nested_blocksize] + offset    where nested
//
// q[2j] is the high half of byte j, q[2j + 1] its low half. The code's 16 values are those of NF4
// (Dettmers et al. 2023, arXiv:2305.14314, appendix E) or of FP4 with two exponent bits and one of
// mantissa, divided by its largest, 12. Products and sum are float32, each rounded once (no fused
// multiply-add), then w is rounded to its dtype: bitsandbytes' values, bit for bit.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>

namespace lora_fused {

// clang-format off
#define LORA_FUSED_NF4_CODE                                                                  \
  {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,                 \
   -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,                \
   0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,   \
   0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}
// The zero with a sign is one in bitsandbytes' CUDA kernel.
#define LORA_FUSED_FP4_CODE                                                           \
  {0.0f,  0.0625f / 12,  8.0f / 12,  1.0f,  4.0f / 12,  0.5f,  2.0f / 12,  0.25f,     \
   -0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -0.5f, -2.0f / 12, -0.25f}
// clang-format on

// Elements [first, first + count) of the flat weight, to `out`.
struct FourBit {
  const uint8_t* packed;
  const float* absmax;          // of each block, or
  const uint8_t* absmax_codes;  // their codes, where nested
  const float *nested_code, *nested_absmax, *offset;
  int shift, nested_shift;  // log2 of the block sizes
  bool fp4;
  int64_t first, count;
  void* out;
};

inline int log2_of(const char* name, int64_t blocksize) {
  int shift = 0;
  while (shift < 31 && (int64_t{1} << shift) < blocksize) ++shift;
  STD_TORCH_CHECK(blocksize >= 2 && (int64_t{1} << shift) == blocksize, "dequantize_4bit: ", name, " is ",
                  std::to_string(blocksize), ", expected a power of two");
  return shift;
}

inline int64_t blocks_of(int64_t values, int shift) { return (values + (int64_t{1} << shift) - 1) >> shift; }

inline const float* checked_floats(const char* name, const torch::stable::Tensor& t, int64_t least,
                                   const torch::stable::Tensor& out) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float && t.is_contiguous() && t.numel() >= least,
                  "dequantize_4bit: ", name, " must be contiguous float32 of at least ", std::to_string(least),
                  " elements, got ", std::to_string(t.numel()));
  STD_TORCH_CHECK(t.is_cuda() == out.is_cuda() && t.get_device_index() == out.get_device_index(),
                  "dequantize_4bit: ", name, " and out must be on one device");
  return static_cast<const float*>(t.const_data_ptr());
}

inline FourBit four_bit_of(const torch::stable::Tensor& packed, const torch::stable::Tensor& absmax,
                           const std::optional<torch::stable::Tensor>& nested_absmax,
                           const std::optional<torch::stable::Tensor>& nested_code,
                           const std::optional<torch::stable::Tensor>& offset, int64_t blocksize,
                           int64_t nested_blocksize, bool fp4, int64_t first, const torch::stable::Tensor& out) {
  using torch::headeronly::ScalarType;
  FourBit p{};
  const auto dtype = out.scalar_type();
  STD_TORCH_CHECK(
      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) && out.is_contiguous(),
      "dequantize_4bit: out must be contiguous float32, bfloat16 or float16");
  p.first = first, p.count = out.numel(), p.fp4 = fp4;
  p.shift = log2_of("blocksize", blocksize);
  const int64_t last = first + p.count, bytes = packed.numel() * int64_t(packed.element_size());
  STD_TORCH_CHECK(first >= 0 && first % 2 == 0, "dequantize_4bit: first is ", std::to_string(first),
                  ", expected an even element");
  STD_TORCH_CHECK(packed.is_contiguous() && 2 * bytes >= last, "dequantize_4bit: packed has ", std::to_string(bytes),
                  " bytes, expected at least ", std::to_string((last + 1) / 2), ", contiguous");
  STD_TORCH_CHECK(packed.is_cuda() == out.is_cuda() && absmax.is_cuda() == out.is_cuda() &&
                      packed.get_device_index() == out.get_device_index() &&
                      absmax.get_device_index() == out.get_device_index(),
                  "dequantize_4bit: packed, absmax and out must be on one device");
  p.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  p.out = out.mutable_data_ptr();
  const int64_t blocks = blocks_of(last, p.shift);
  if (!nested_absmax) {
    p.absmax = checked_floats("absmax", absmax, blocks, out);
    return p;
  }
  STD_TORCH_CHECK(nested_code && offset, "dequantize_4bit: nested_code or offset is missing");
  STD_TORCH_CHECK(absmax.scalar_type() == ScalarType::Byte && absmax.is_contiguous() && absmax.numel() >= blocks,
                  "dequantize_4bit: absmax must be contiguous uint8 of at least ", std::to_string(blocks),
                  " elements, got ", std::to_string(absmax.numel()));
  p.nested_shift = log2_of("nested_blocksize", nested_blocksize);
  p.absmax_codes = static_cast<const uint8_t*>(absmax.const_data_ptr());
  p.nested_code = checked_floats("nested_code", *nested_code, 256, out);
  p.nested_absmax = checked_floats("nested_absmax", *nested_absmax, blocks_of(blocks, p.nested_shift), out);
  p.offset = checked_floats("offset", *offset, 1, out);
  return p;
}

}  // namespace lora_fused
