// DoRA's passes over outputs and their gradients on the CPU, and sums over tokens: y = g∘(u - b) + b, y = (g - 1)∘u or
// y += (g - 1)∘u, and g∘dy, Σ dy∘(u - b) / norm, Σ dy in one pass over dy and u. float32
// inside (float64 for float64). Threads own columns, so every sum has a fixed order.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../common/kernels.h"

namespace {

using namespace lora_fused;
using torch::headeronly::ScalarType;

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int64_t kBlock = 256;  // columns of a thread's turn: rows of a block are short runs

template <typename T, typename Maybe>
T* data(const std::optional<Maybe>& t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

template <typename T>
T* data(const View& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
void run(const Scale& s) {
  const int64_t cols = s.y.size(1), grain = std::max<int64_t>(1, 8192 / (cols + 1));
  const auto* gain = data<Wide<T>>(s.gain.gain);
  const T* bias = data<T>(s.gain.bias);
  const T* us = data<T>(s.u);
  T* ys = data<T>(s.y);
  torch::stable::parallel_for(0, s.y.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        const auto u = static_cast<Wide<T>>(us[i * cols + j]);
        T& y = ys[i * cols + j];
        if (s.form != Scale::kGain)
          y = static_cast<T>((s.form == Scale::kAddExcess ? static_cast<Wide<T>>(y) : 0) + u * (gain[j] - 1));
        else
          y = static_cast<T>(bias ? u + (u - static_cast<Wide<T>>(bias[j])) * (gain[j] - 1) : u * gain[j]);
      }
  });
}

template <typename T>
void run(const TokenSums& s) {
  const int64_t rows = s.dy.size(0), cols = s.dy.size(1);
  const T *dys = data<T>(s.dy), *us = data<T>(s.u), *biases = data<T>(s.gain.bias);
  const auto *gains = data<Wide<T>>(s.gain.gain), *norms = data<Wide<T>>(s.norm);
  T* scaled = data<T>(s.scaled);
  auto *dots = data<Wide<T>>(s.dots), *sums = data<Wide<T>>(s.sums);
  torch::stable::parallel_for(0, (cols + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, last = std::min(cols, end * kBlock);
    std::vector<Wide<T>> dot(last - first), sum(last - first);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = first; j < last; ++j) {
        const int64_t at = i * cols + j;
        const auto dy = static_cast<Wide<T>>(dys[at]);
        sum[j - first] += dy;
        if (us) dot[j - first] += dy * (static_cast<Wide<T>>(us[at]) - (biases ? static_cast<Wide<T>>(biases[j]) : 0));
        if (scaled) scaled[at] = static_cast<T>(dy * gains[j]);
      }
    for (int64_t j = first; j < last; ++j) {
      if (dots) dots[j] = dot[j - first] / norms[j];
      if (sums) sums[j] = sum[j - first];
    }
  });
}

template <typename Work>
void run_as(const Work& work, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return run<float>(work);
    case ScalarType::Double: return run<double>(work);
    case ScalarType::BFloat16: return run<torch::headeronly::BFloat16>(work);
    default: return run<torch::headeronly::Half>(work);
  }
}

}  // namespace

void lora_fused::scale_cpu(const Scale& s) { run_as(s, s.y.scalar_type()); }
void lora_fused::token_sums_cpu(const TokenSums& s) { run_as(s, s.dy.scalar_type()); }
