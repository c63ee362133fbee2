// The launch of dequantize_4bit.cuh.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../common/kernels.h"
#include "dequantize_4bit.cuh"
#include "dtype.cuh"
#include "stream.h"

namespace {

using lora_fused::FourBit;
using namespace lora_fused::dequantize_4bit;

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

void lora_fused::dequantize_4bit_cuda(const FourBit& weight, torch::headeronly::ScalarType dtype,
                                      const torch::stable::Tensor& like) {
  const cudaStream_t stream = stream_of(like);
  const auto aligned = [](const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; };
  // A group lies in one block, and there is one.
  const bool vector = weight.count >= 8 && weight.first % 8 == 0 && weight.shift >= 3 && aligned(weight.packed, 4) &&
                      aligned(weight.out, 16);
  LORA_FUSED_UP_TO_FLOAT32(dtype, "dequantize_4bit", [&] { run<CudaType<scalar_t>>(weight, vector, stream); });
}
