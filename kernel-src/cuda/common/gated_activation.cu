// The launch of gated_activation.cuh: a kernel for each activation where whole accesses serve.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "../../common/kernels.h"
#include "gated_activation.cuh"

namespace {

using namespace lora_fused;
using namespace lora_fused::gated_activation;
using torch::stable::Tensor;

template <typename T, int kActivation, Form kForm, bool kAligned>
void launch(const Arguments<T>& a, cudaStream_t stream) {
  gated_activation_kernel<T, kActivation, kForm, kAligned><<<blocks_of(a.cut), kColumnThreads, 0, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, int kActivation, bool kAligned>
void launch(const Arguments<T>& a, Form form, cudaStream_t stream) {
  switch (form) {
    case kForward: return launch<T, kActivation, kForward, kAligned>(a, stream);
    case kScaledForward: return launch<T, kActivation, kScaledForward, kAligned>(a, stream);
    case kBackward: return launch<T, kActivation, kBackward, kAligned>(a, stream);
    case kScaledBackward: return launch<T, kAny, kScaledBackward, kAligned>(a, stream);
    default: return launch<T, kActivation, kSummedBackward, kAligned>(a, stream);
  }
}

template <typename T>
void launch(const Arguments<T>& a, Form form, bool aligned, cudaStream_t stream) {
  static_assert(kActivations == 5, "gated: a kernel for each activation");
  if constexpr (std::is_same_v<T, double>) {  // there to check results
    launch<T, kAny, false>(a, form, stream);
  } else {
    if (!aligned) return launch<T, kAny, false>(a, form, stream);
    switch (a.activation) {
      case lora_fused::kSilu: return launch<T, lora_fused::kSilu, true>(a, form, stream);
      case lora_fused::kGelu: return launch<T, lora_fused::kGelu, true>(a, form, stream);
      case lora_fused::kGeluTanh: return launch<T, lora_fused::kGeluTanh, true>(a, form, stream);
      case lora_fused::kRelu: return launch<T, lora_fused::kRelu, true>(a, form, stream);
      default: return launch<T, lora_fused::kRelu2, true>(a, form, stream);
    }
  }
}

Form form_of(const GatedActivation& g, bool summed) {
  const bool scaled = g.gate_scale.scale || g.up_scale.scale;
  if (!g.dh) return scaled ? kScaledForward : kForward;
  return summed ? kSummedBackward : scaled ? kScaledBackward : kBackward;
}

// Every row at once, but where a thread keeps something of its columns.
int64_t shares_of(const GatedActivation& g, Form form) {
  const int64_t rows = g.h.size(0), cols = g.h.size(1);
  if (form == kScaledForward) return shares_to_fill(g.h, cols, dispatch::kGatedScaleBlocks);
  return form == kSummedBackward ? shares_to_fill(g.h, cols, dispatch::kGatedScaleBackwardBlocks) : rows;
}

template <typename T>
void run(const GatedActivation& g, bool summed, cudaStream_t stream) {
  const Form form = form_of(g, summed);
  bool aligned = g.h.size(1) % kColumns == 0;
  Arguments<T> a{matrix<T>(g.gate, aligned), matrix<T>(g.up, aligned),    matrix<T>(g.h, aligned),
                 matrix<T>(g.dh, aligned),   matrix<T>(g.dgate, aligned), matrix<T>(g.dup, aligned)};
  a.gate_scale = vector<Wide<T>>(g.gate_scale.scale, aligned), a.up_scale = vector<Wide<T>>(g.up_scale.scale, aligned);
  a.gate_bias = vector<T>(g.gate_scale.bias, aligned), a.up_bias = vector<T>(g.up_scale.bias, aligned);
  a.cut = row_shares(g.h.size(0), g.h.size(1), shares_of(g, form));
  a.activation = g.activation;
  if (a.cut.threads() == 0) return;
  if (!summed) return launch(a, form, aligned, stream);
  a.sums.of[0] = column_sum(*g.dgate, g.gate_pass, a.sums), a.sums.of[1] = column_sum(*g.dup, g.up_pass, a.sums);
  const Tensor memory = share_memory(a.sums, 2, a.cut.shares, g.h.base());
  launch(a, form, aligned, stream);
  add_shares(a.sums, 2, stream);
}

}  // namespace

void lora_fused::gated_activation_cuda(const GatedActivation& g) {
  const cudaStream_t stream = stream_of(g.h);
  // Registers suffice for a magnitude's sums and not for a bias' as well.
  const bool any = g.gate_pass || g.up_pass;
  const bool apart = (g.gate_pass && g.gate_pass->dbias) || (g.up_pass && g.up_pass->dbias);
  LORA_FUSED_FLOATING(g.h.scalar_type(), "gated_activation",
                      [&] { run<CudaType<scalar_t>>(g, any && !apart, stream); });
  if (apart) scale_output_backward_cuda(passes_of(g));
}
