// DoRA's norms and scales, see dora_norms.h, and the op that makes nothing else.
#include "dora_norms.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../../torch-ext/torch_binding.h"

namespace lora_fused {

namespace {

// Elements of a weight in four bits that its norm has in floating point at a time: 32 MB of bfloat16, which stay
// in the cache of a large GPU between the two kernels.
constexpr int64_t kNormElements = int64_t(1) << 24, kNormRows = 128;

// `count` elements of a contiguous vector or rows of a matrix, from `first` on.
Tensor slice(Tensor t, int64_t first, int64_t count) { return torch::stable::narrow(t, 0, first, count); }

void row_norms(const std::vector<RowNorm>& norms) {
#if defined(CUDA_KERNEL)
  if (!norms.empty() && norms[0].norm.is_cuda()) return row_norms_cuda(norms);
#endif
  for (const RowNorm& of : norms) {
    if (of.fill) of.fill();
    Tensor norm = of.norm, scale = *of.mag_norm_scale;
    torch::stable::copy_(norm, row_norm_cpu(of.weight, of.a, of.b, of.scaling));
    torch::stable::copy_(scale, mag_norm_scale_cpu(*of.magnitude, norm));
  }
}

// The norm of a weight in four bits as those of some of its rows after another, which have `made` in turn.
void append_pieces(const FourBitWeight& weight, const RowNorm& whole, MaybeTensor& made, std::vector<RowNorm>& pieces) {
  const int64_t n = weight.rows(), k = weight.cols(), blocks = kNormElements / std::max<int64_t>(k, 1) / kNormRows;
  const int64_t rows = std::min(n, std::max<int64_t>(blocks, 1) * kNormRows);
  if (!made || made->numel() < rows * k || made->scalar_type() != weight.dtype())
    made = empty(whole.weight, {rows * k}, weight.dtype());
  const Tensor a = in_rows(whole.a), b = in_rows(whole.b);
  for (int64_t first = 0; first < n; first += rows) {
    const int64_t count = std::min(rows, n - first);
    const Tensor chunk = MatrixView(*made, count, k, k, 1).tensor();
    pieces.push_back({chunk, a, slice(b, first, count), slice(whole.norm, first, count), whole.scaling,
                      slice(*whole.magnitude, first, count), slice(*whole.mag_norm_scale, first, count),
                      [=] { weight.dequantize(first * k, chunk); }});
  }
}

}  // namespace

Norms::Norms(const GroupArgs& args, const Optionals& magnitudes, Optionals& mag_norm_scales, std::optional<ScalarType> product) {
  if (magnitudes.empty()) return;
  const Members members(args, 0, args.weights.size());
  mag_norm_scales.resize(members.count());
  waiting_.resize(members.count());
  std::vector<RowNorm> now;
  MaybeTensor made;
  for (size_t i = 0; i < members.count(); ++i) {
    if (!magnitudes[i]) continue;
    STD_TORCH_CHECK(members.a(i) && members.b(i), "magnitudes: given without lora_a and lora_b");
    for (Tensors* vectors : {&norms_, &mag_norm_scales_})
      vectors->push_back(empty(args.weights[i], {members.outputs(i)}, ScalarType::Float));
    mag_norm_scales[i] = mag_norm_scales_.back();
    const RowNorm of{args.weights[i],    *members.a(i), *members.b(i), norms_.back(),
                     members.scaling(i), magnitudes[i], mag_norm_scales_.back()};
    const std::optional<FourBitWeight> packed = members.packed(i);
    if (!packed)
      now.push_back(of);
    else if (product == packed->dtype())
      waiting_[i] = of;
    else
      append_pieces(*packed, of, made, now);
  }
  row_norms(now);
}

void Norms::from_weight(size_t index, const Tensor& weight) const {
  if (waiting_.empty() || !waiting_[index]) return;
  RowNorm of = *waiting_[index];
  of.weight = weight;
  row_norms({of});
}

}  // namespace lora_fused
