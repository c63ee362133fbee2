// The launch of dropout.cuh, which says what it computes.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <type_traits>

#include "../../../torch-ext/torch_binding.h"
#include "../../common/dropout.h"
#include "dropout.cuh"

namespace {

using namespace lora_fused;
using namespace lora_fused::dropout;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename In, typename Out>
void drop(Tensor& out, const Tensor& x, const Tensor& seed, const Keep& keep, bool accumulate,
          cudaStream_t stream) {
  bool aligned = true;
  Arguments<In, Out> a{matrix<In>(x, aligned), matrix<Out>(out, aligned),
                       static_cast<const int64_t*>(seed.const_data_ptr()), x.size(1),
                       (x.size(1) + kColumns - 1) / kColumns, 0, keep, accumulate};
  a.total = x.size(0) * a.blocks;
  if (a.total == 0) return;
  const int64_t grid = std::min((a.total + kThreads - 1) / kThreads, kMaxBlocks);
  const auto kernel = aligned && a.cols % kColumns == 0 ? dropout_fwd_kernel<In, Out, true> : dropout_fwd_kernel<In, Out, false>;
  kernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename In>
void drop_to(Tensor& out, const Tensor& x, const Tensor& seed, const Keep& keep, bool accumulate,
          cudaStream_t stream) {
  switch (out.scalar_type()) {
    case ScalarType::Float: return drop<In, float>(out, x, seed, keep, accumulate, stream);
    case ScalarType::Double: return drop<In, double>(out, x, seed, keep, accumulate, stream);
    case ScalarType::BFloat16: return drop<In, __nv_bfloat16>(out, x, seed, keep, accumulate, stream);
    default: return drop<In, __half>(out, x, seed, keep, accumulate, stream);
  }
}

}  // namespace

void dropout_cuda(const Tensor& x, const Tensor& seed, double p, Tensor out,
                  bool accumulate, bool scaled) {
  lora_fused::check_dropout(x, seed, p, out, /*cuda=*/true);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream_ptr = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_ptr));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_ptr);
  const Keep keep(p, scaled);
  switch (x.scalar_type()) {
    case ScalarType::Float: return drop_to<float>(out, x, seed, keep, accumulate, stream);
    case ScalarType::Double: return drop_to<double>(out, x, seed, keep, accumulate, stream);
    case ScalarType::BFloat16: return drop_to<__nv_bfloat16>(out, x, seed, keep, accumulate, stream);
    default: return drop_to<__half>(out, x, seed, keep, accumulate, stream);
  }
}
