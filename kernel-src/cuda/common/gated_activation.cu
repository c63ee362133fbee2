// The launch of gated_activation.cuh: a kernel for each activation where whole accesses serve.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../../common/kernels.h"
#include "gated_activation.cuh"
#include "stream.h"

namespace {

using namespace lora_fused;
using namespace lora_fused::gated_activation;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <int kActivation, bool kAligned, typename T>
void launch(const Arguments<T>& a, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(std::min((a.total + kThreads - 1) / kThreads, kMaxBlocks));
  const auto kernel = a.dh.data != nullptr ? gated_activation_kernel<T, kActivation, true, kAligned>
                                           : gated_activation_kernel<T, kActivation, false, kAligned>;
  kernel<<<grid, kThreads, 0, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run(const lora_fused::GatedActivation& g, cudaStream_t stream) {
  bool aligned = true;
  Arguments<T> a{matrix<T>(g.gate, aligned), matrix<T>(g.up, aligned),    matrix<T>(g.h, aligned),
                 matrix<T>(g.dh, aligned),   matrix<T>(g.dgate, aligned), matrix<T>(g.dup, aligned)};
  a.gate_scale = vector<Wide<T>>(g.gate_scale.scale);
  a.up_scale = vector<Wide<T>>(g.up_scale.scale);
  const auto on_boundary = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  a.cols = g.h.size(1);
  aligned = aligned && on_boundary(a.gate_scale) && on_boundary(a.up_scale) && a.cols % kColumns == 0;
  a.gate_bias = vector<T>(g.gate_scale.bias);
  a.up_bias = vector<T>(g.up_scale.bias);
  a.blocks = (a.cols + kColumns - 1) / kColumns;
  a.total = g.h.size(0) * a.blocks;
  a.activation = g.activation;
  if (a.total == 0) return;
  if (!aligned) return launch<kAny, false>(a, stream);
  static_assert(kActivations == 5, "gated: a kernel for each activation");
  switch (g.activation) {
    case lora_fused::kSilu: return launch<lora_fused::kSilu, true>(a, stream);
    case lora_fused::kGelu: return launch<lora_fused::kGelu, true>(a, stream);
    case lora_fused::kGeluTanh: return launch<lora_fused::kGeluTanh, true>(a, stream);
    case lora_fused::kRelu: return launch<lora_fused::kRelu, true>(a, stream);
    default: return launch<lora_fused::kRelu2, true>(a, stream);
  }
}

}  // namespace

void lora_fused::gated_activation_cuda(const GatedActivation& g) {
  const cudaStream_t stream = stream_of(g.h);
  LORA_FUSED_FLOATING(g.h.scalar_type(), "gated_activation", [&] { run<CudaType<scalar_t>>(g, stream); });
}
