// The launch of dequantize_4bit.cuh.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../../torch-ext/torch_binding.h"
#include "dequantize_4bit.cuh"

namespace {

using lora_fused::FourBit;
using namespace lora_fused::dequantize_4bit;
using torch::headeronly::ScalarType;

template <typename T, bool kNested>
void launch(const FourBit& p, bool vector, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>((p.count + kPerBlock - 1) / kPerBlock);
  if (vector)
    dequantize_4bit_fwd_kernel<T, kNested, true><<<grid, kThreads, 0, stream>>>(p);
  else
    dequantize_4bit_fwd_kernel<T, kNested, false><<<grid, kThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run(const FourBit& p, bool vector, cudaStream_t stream) {
  p.nested_absmax ? launch<T, true>(p, vector, stream) : launch<T, false>(p, vector, stream);
}

}  // namespace

void dequantize_4bit_cuda(const torch::stable::Tensor& packed,
                          const torch::stable::Tensor& absmax,
                          std::optional<torch::stable::Tensor> nested_absmax,
                          std::optional<torch::stable::Tensor> nested_code,
                          std::optional<torch::stable::Tensor> offset, int64_t blocksize,
                          int64_t nested_blocksize, bool fp4, int64_t first,
                          torch::stable::Tensor out) {
  STD_TORCH_CHECK(out.is_cuda(), "dequantize_4bit: out must be on a GPU like the other tensors");
  const FourBit p = lora_fused::four_bit_of(packed, absmax, nested_absmax, nested_code, offset,
                                            blocksize, nested_blocksize, fp4, first, out);
  if (p.count == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  void* stream_ptr = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(out.get_device_index(), &stream_ptr));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_ptr);
  const auto aligned = [](const void* data, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0;
  };
  // A group lies in one block, and there is one.
  const bool vector = p.count >= 8 && p.first % 8 == 0 && blocksize % 8 == 0 &&
                      aligned(p.packed, 4) && aligned(p.out, 16);
  if (out.scalar_type() == ScalarType::Float)
    run<float>(p, vector, stream);
  else if (out.scalar_type() == ScalarType::BFloat16)
    run<__nv_bfloat16>(p, vector, stream);
  else
    run<__half>(p, vector, stream);
}
