// DoRA's norms and scales, see dora_norms.h.
#include "dora_norms.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../common/mag_norm_scale.h"
#include "../common/row_norm_check.h"
#include "../dispatch/table.h"

namespace lora_fused {

namespace {

// `count` elements of a contiguous vector or rows of a matrix, from `first` on.
Tensor slice(Tensor t, int64_t first, int64_t count) { return torch::stable::narrow(t, 0, first, count); }

}  // namespace

#if defined(CUDA_KERNEL)
void row_norms_cuda(const std::vector<RowNorm>& norms) {
  std::vector<RowNorm> sm90, sm80;
  int64_t elements = 0;
  for (const RowNorm& of : norms) {
    check_row_norm(of.weight, of.a, of.b, /*cuda=*/true);
    dispatch::check_row_norm_fits(of);
    if (of.magnitude) check_mag_norm_scale(*of.magnitude, of.norm, /*cuda=*/true);
    const bool fits = dispatch::row_norm_fits_sm90(of);
    if (fits) elements += of.weight.numel();
    (fits ? sm90 : sm80).push_back(of);
  }
  if (!dispatch::row_norm_sm90_is_faster(elements)) return row_norms_sm80(norms);
  row_norms_sm90(sm90);
  row_norms_sm80(sm80);
}
#endif

namespace {

void row_norms(const std::vector<RowNorm>& norms) {
#if defined(CUDA_KERNEL)
  if (!norms.empty() && norms[0].norm.is_cuda()) return row_norms_cuda(norms);
#endif
  for (const RowNorm& of : norms) {
    if (of.fill) of.fill();
    row_norm_cpu(of.weight, of.a, of.b, of.scaling, of.norm);
    mag_norm_scale_cpu(*of.magnitude, of.norm, *of.mag_norm_scale);
  }
}

// The norm of a weight in four bits as those of some of its rows after another, which have `made` in turn.
void append_pieces(const FourBitWeight& weight, const RowNorm& whole, MaybeTensor& made, std::vector<RowNorm>& pieces) {
  const int64_t n = weight.rows(), k = weight.cols(),
                blocks = dispatch::kNormPieceElements / std::max<int64_t>(k, 1) / dispatch::kNormPieceRows;
  const int64_t rows = std::min(n, std::max<int64_t>(blocks, 1) * dispatch::kNormPieceRows);
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

Norms::Norms(GroupArgs& args, std::optional<ScalarType> product) {
  const Members members(args, 0, args.count());
  std::vector<RowNorm> now;
  MaybeTensor made;
  for (size_t i = 0; i < members.count(); ++i) {
    const std::optional<Tensor>& magnitude = args.operand(i, kMagnitudeOrNorm);
    if (!magnitude) continue;
    STD_TORCH_CHECK(members.a(i) && members.b(i), "magnitudes: given without lora_a and lora_b");
    for (Tensors* vectors : {&norms_, &mag_norm_scales_})
      vectors->push_back(empty(args.weight(i), {members.outputs(i)}, ScalarType::Float));
    args.operands[kOperands * i + kMagNormScale] = mag_norm_scales_.back();
    const RowNorm of{args.weight(i),     *members.a(i), *members.b(i),          norms_.back(),
                     members.scaling(i), magnitude,     mag_norm_scales_.back()};
    waiting_.resize(members.count());
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
