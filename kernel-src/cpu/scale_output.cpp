// DoRA's scale of an output on the CPU, and its backward with the sums over tokens: y = scale∘u + (1 - scale)∘b,
// y = (scale - 1)∘u or y += (scale - 1)∘u, and scale∘dy, Σ dy∘(u - b) / norm, Σ dy in one pass over dy and u. float32
// inside (float64 for float64). Threads own columns, so every sum has a fixed order.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../common/dtypes.h"
#include "../common/kernels.h"

namespace {

using namespace lora_fused;

constexpr int64_t kBlock = 256;  // columns of a thread's turn: rows of a block are short runs

template <typename T, typename Maybe>
T* data(const std::optional<Maybe>& t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

template <typename T>
T* data(const MatrixView& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
void run(const ScaleOutput& s) {
  const int64_t cols = s.y.size(1), grain = std::max<int64_t>(1, 8192 / (cols + 1));
  const auto* scale = data<Wide<T>>(s.scale.scale);
  const T* bias = data<T>(s.scale.bias);
  const T* us = data<T>(s.unscaled);
  T* ys = data<T>(s.y);
  torch::stable::parallel_for(0, s.y.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        const auto u = static_cast<Wide<T>>(us[i * cols + j]);
        T& y = ys[i * cols + j];
        if (s.form != ScaleOutput::kScale)
          y = static_cast<T>((s.form == ScaleOutput::kAddExcess ? static_cast<Wide<T>>(y) : 0) + u * (scale[j] - 1));
        else
          y = static_cast<T>(bias ? scale[j] * u + (1 - scale[j]) * static_cast<Wide<T>>(bias[j]) : scale[j] * u);
      }
  });
}

template <typename T>
void run(const ScaleOutputBackward& s) {
  const int64_t rows = s.dy.size(0), cols = s.dy.size(1);
  const T *dys = data<T>(s.dy), *us = data<T>(s.unscaled), *biases = data<T>(s.scale.bias);
  const auto *scales = data<Wide<T>>(s.scale.scale), *norms = data<Wide<T>>(s.norm);
  T* dunscaled = data<T>(s.dunscaled);
  auto *dmagnitude = data<Wide<T>>(s.dmagnitude), *dbias = data<Wide<T>>(s.dbias);
  torch::stable::parallel_for(0, (cols + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, last = std::min(cols, end * kBlock);
    std::vector<Wide<T>> dot(last - first), sum(last - first);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = first; j < last; ++j) {
        const auto dy = static_cast<Wide<T>>(dys[i * s.dy.stride(0) + j]);
        sum[j - first] += dy;
        if (us) {
          const auto u = static_cast<Wide<T>>(us[i * s.unscaled->stride(0) + j]);
          dot[j - first] += dy * (biases ? u - static_cast<Wide<T>>(biases[j]) : u);
        }
        if (dunscaled) dunscaled[i * s.dunscaled->stride(0) + j] = static_cast<T>(dy * scales[j]);
      }
    for (int64_t j = first; j < last; ++j) {
      if (dmagnitude) dmagnitude[j] = dot[j - first] / norms[j];
      if (dbias) dbias[j] = sum[j - first];
    }
  });
}

}  // namespace

void lora_fused::scale_output_cpu(const ScaleOutput& work) {
  LORA_FUSED_FLOATING(work.y.scalar_type(), "scale_output", [&] { run<scalar_t>(work); });
}

void lora_fused::scale_output_backward_cpu(const ScaleOutputBackward& work) {
  LORA_FUSED_FLOATING(work.dy.scalar_type(), "scale_output_backward", [&] { run<scalar_t>(work); });
}
