// The work of an adapted embedding, for its kernels: on CUDA alone, the CPU computes it with the library's products.
//
//   y[m] = c∘(e·W[i] + s·e·rows[m] Bᵀ)        rows[m] = A[:, i], i = ids[m]
//
// W [V, H], A [R, V], B [H, R], ids [M]; e is the embedding's own scale, c DoRA's mag_norm_scale or 1, s the scaling.
// Whoever makes one of these has checked it (ops/embedding.cpp): all contiguous and on one GPU, H a multiple of 8 and
// rows of W 16-byte aligned, W in bfloat16 or float16, A and B in float32 too, rank at most kMostEmbeddingRanks.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace lora_fused {

constexpr int64_t kMostEmbeddingRanks = 512, kMostColumnNormRanks = 64;

struct Embedding {
  const torch::stable::Tensor &ids, &weight, &lora_a, &lora_b;
  const std::optional<torch::stable::Tensor>&scale,
      &mag_norm_scale;  // e, one element, or none and `number`; [H] in float32
  double scaling, number;
};

struct EmbeddingBackward {
  const torch::stable::Tensor& dy;                         // [*ids.shape, H]
  const std::optional<torch::stable::Tensor>&rows, &norm;  // [M, R] in float32 for dB and dm; [H] in float32 for dm
  int64_t padding;                                         // an id whose row of A gets no gradient
  std::optional<torch::stable::Tensor> da, db, dm;         // where they go, none of those that are not wanted
};

// W [V, H], A [R, V], B [H, R] with A and B of one dtype: norm [H] in float32 and, where there is a magnitude [H],
// mag_norm_scale [H] in float32.
struct ColumnNorm {
  const torch::stable::Tensor &weight, &lora_a, &lora_b;
  double scaling;
  torch::stable::Tensor norm;
  std::optional<torch::stable::Tensor> magnitude, mag_norm_scale;
};

void embedding_forward_sm80(const Embedding& e, const torch::stable::Tensor& y,
                            const std::optional<torch::stable::Tensor>& rows);
void embedding_backward_sm80(const Embedding& e, const EmbeddingBackward& work);
void column_norm_sm80(const ColumnNorm& work);

}  // namespace lora_fused
