// Dropout and dequantization, each an op of its own: for the layers that Triton computes, and for tests.
#include "../group/passes.h"

#include "../../torch-ext/torch_binding.h"

using namespace lora_fused;

void dropout(const Tensor& x, const Tensor& seed, double p, Tensor out, bool accumulate, bool scaled) {
  check_dropout(x, seed, p, out, /*cuda=*/x.is_cuda() || seed.is_cuda() || out.is_cuda());
  const OnDevice device(x);
  drop(x, {seed, p}, out, accumulate, scaled);
}

void dequantize_4bit(const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
                     std::optional<Tensor> nested_code, std::optional<Tensor> offset, int64_t blocksize,
                     int64_t nested_blocksize, bool fp4, int64_t first, Tensor out) {
  const OnDevice device(out);
  lora_fused::dequantize_4bit(
      four_bit_of(packed, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize, fp4, first, out),
      out);
}
