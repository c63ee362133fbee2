// Single products of a group as ops of their own, on CUDA alone: for tests, benchmarks and tuning. Layers run them
// through lora_group.cpp and gated_mlp.cpp.
#include <torch/csrc/stable/accelerator.h>

#include "../../torch-ext/torch_binding.h"
#include "../common/gemm.h"
#include "../common/kernels.h"
#include "../common/tensors.h"
#include "../dispatch/table.h"

using namespace lora_fused;

bool gemm_is_faster_cuda(const Tensor& like, int64_t rows, int64_t cols) {
  const ScalarType dtype = like.scalar_type();
  if ((dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) || rows <= 0 || cols <= 0 || cols % 8 != 0)
    return false;
  return dispatch::gemm_is_faster(like, rows, cols);
}

void gemm_cuda(Tensors a, Tensors b, bool b_rows_are_n, Tensor out, std::optional<Tensor> bias,
               std::optional<Tensor> mag_norm_scale, std::optional<Tensor> unscaled, bool accumulate,
               std::optional<Tensor> seed, double p, int64_t leading, double leading_scale) {
  STD_TORCH_CHECK(a.size() == b.size(), "gemm: ", a.size(), " matrices a for ", b.size(), " b");
  for (const auto* matrices : {&a, &b})
    for (const Tensor& m : *matrices) STD_TORCH_CHECK(m.dim() == 2, "gemm: a and b must be matrices");
  STD_TORCH_CHECK(out.dim() == 2 && (!unscaled || unscaled->dim() == 2), "gemm: out and unscaled must be matrices");
  Gemm gemm{
      {}, b_rows_are_n, out, accumulate, bias, mag_norm_scale, unscaled ? MaybeMatrixView(*unscaled) : std::nullopt};
  for (size_t i = 0; i < a.size(); ++i) gemm.segments.push_back({a[i], b[i]});
  if (seed) gemm.mask = {*seed, p};
  gemm.leading = static_cast<size_t>(leading), gemm.leading_scale = leading_scale;
  STD_TORCH_CHECK(dispatch::is_sm90(out) && gemm_sm90_supports(gemm),
                  "gemm: not for this device, these dtypes, shapes or strides");
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  gemm_sm90(gemm);
}

void gemm_group_cuda(Tensors x, Tensors other, Tensors t, std::vector<double> scalings, Tensors a, Tensors b,
                     std::vector<int64_t> segments, std::vector<int64_t> made, bool b_rows_are_n, Tensors out,
                     Optionals bias, std::optional<Tensor> zeros) {
  STD_TORCH_CHECK(!out.empty() && segments.size() == out.size() && made.size() == out.size() &&
                      bias.size() == out.size() && other.size() == x.size() && t.size() == x.size() &&
                      scalings.size() == x.size() && a.size() == b.size(),
                  "gemm_group: lists of different lengths");
  for (const Tensors* matrices : {&x, &other, &t, &a, &b, &out})
    for (const Tensor& m : *matrices) STD_TORCH_CHECK(m.dim() == 2, "gemm_group: expected matrices");
  GemmGroup group;
  for (size_t i = 0; i < x.size(); ++i) {
    const MatrixView of_x = b_rows_are_n ? MatrixView(other[i]) : MatrixView(other[i]).transposed();
    group.shrinks.push_back({x[i], of_x, t[i], scalings[i], std::nullopt});
  }
  size_t next = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    STD_TORCH_CHECK(segments[i] >= 1 && made[i] >= 0 && next + segments[i] <= a.size(),
                    "gemm_group: segments or made of output ", i);
    Gemm sum{{}, b_rows_are_n, out[i]};
    for (int64_t s = 0; s < segments[i]; ++s, ++next) sum.segments.push_back({a[next], b[next]});
    sum.bias = bias[i], sum.made = static_cast<size_t>(made[i]);
    group.sums.push_back(sum);
  }
  if (zeros) {
    STD_TORCH_CHECK(zeros->scalar_type() == ScalarType::Int && zeros->is_contiguous() && zeros->is_cuda() &&
                        zeros->numel() >= group.counters(),
                    "gemm_group: expected zeros in int32, at least ", group.counters());
    group.zeros = MatrixView(*zeros);
  }
  STD_TORCH_CHECK(dispatch::is_sm90(out[0]) && gemm_group_sm90_supports(group),
                  "gemm_group: not for this device, these dtypes, shapes or strides");
  const torch::stable::accelerator::DeviceGuard guard(out[0].get_device_index());
  gemm_group_sm90(group);
}

void skinny_cuda(Tensors x, Tensors other, Tensors out, double scaling, bool by_columns, bool sm90, MaybeTensor seed,
                 double p, int64_t bf16x3) {
  STD_TORCH_CHECK(!x.empty() && x.size() == other.size() && x.size() == out.size(), "skinny: ", x.size(), " x, ",
                  other.size(), " other, ", out.size(), " out");
  const torch::stable::accelerator::DeviceGuard guard(x[0].get_device_index());
  STD_TORCH_CHECK(!seed || (seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->is_cuda() &&
                            p >= 0.0 && p <= 1.0),
                  "skinny: expected a seed in int64 with one element, and p from 0 to 1");
  STD_TORCH_CHECK(bf16x3 >= 0 && (sm90 || bf16x3 == 0), "skinny: bf16x3 on sm90 alone");
  dispatch::check_has_sm80(x[0], "skinny");
  const int64_t operands = bf16x3 > 0 ? 2 : 1, splits = bf16x3 > 0 && !by_columns ? 3 : 1;
  const std::optional<Dropped> mask = seed ? std::optional<Dropped>({*seed, p}) : std::nullopt;
  const bool has_sm90 = dispatch::is_sm90(x[0]);
  std::vector<Shrink> shrinks;
  std::vector<AdapterGrad> grads;
  for (size_t i = 0; i < x.size(); ++i) {
    STD_TORCH_CHECK(x[i].dim() == 2 && other[i].dim() == 2 && out[i].dim() == 2, "skinny: expected matrices");
    const int64_t rows = x[i].size(0), cols = x[i].size(1), ranks = out[i].size(1) / splits;
    STD_TORCH_CHECK(out[i].size(0) == (by_columns ? cols : rows) && out[i].size(1) == splits * ranks &&
                        other[i].size(0) == (by_columns ? rows : operands * ranks) &&
                        other[i].size(1) == (by_columns ? operands * ranks : cols) &&
                        x[i].scalar_type() == x[0].scalar_type() && (sm90 || rows == x[0].size(0)),
                    "skinny: shapes or dtypes of entry ", i);
    const MatrixView both =
        by_columns ? MatrixView(other[i]).transposed() : MatrixView(other[i]);  // [R, ..], hi above lo
    const auto half = [&](int64_t which) {
      const MatrixView rows_of = both.rows(which * ranks, ranks);
      return by_columns ? rows_of.transposed() : rows_of;
    };
    const MaybeMatrixView lo = bf16x3 > 0 ? MaybeMatrixView(half(1)) : std::nullopt;
    bool supports;
    if (by_columns) {
      const bool turned = out[i].stride(1) == 1;
      grads.push_back(
          {half(0), x[i], turned ? MatrixView(out[i]) : MatrixView(out[i]).transposed(), turned, mask, lo, scaling});
      const bool contiguous = turned ? out[i].stride(0) == ranks : out[i].stride(0) == 1 && out[i].stride(1) == cols;
      supports = sm90 ? has_sm90 && skinny_sm90_supports(grads.back())
                      : skinny_supports(x[i]) && skinny_supports(other[i]) && contiguous;
    } else {
      const auto split = bf16x3 > 0 ? std::optional<SplitLayout>({bf16x3, bf16x3}) : std::nullopt;
      shrinks.push_back({x[i], half(0), MatrixView(out[i]).columns(0, ranks), scaling, mask, lo, split});
      supports =
          sm90 ? has_sm90 && skinny_sm90_supports(shrinks.back()) : skinny_supports(x[i]) && skinny_supports(other[i]);
    }
    STD_TORCH_CHECK(supports, "skinny: not for this device, these dtypes, shapes or strides");
  }
  if (by_columns)
    sm90 ? skinny_sm90(grads) : adapter_grad_cuda(grads);
  else
    sm90 ? skinny_sm90(shrinks) : shrink_cuda(shrinks);
}

void dt_db_cuda(Tensors dy, Tensors b, Tensors t, Tensors dt, Tensors db, double scaling, bool bf16x3,
                double db_scaling) {
  STD_TORCH_CHECK(
      !dy.empty() && b.size() == dy.size() && t.size() == dy.size() && dt.size() == dy.size() && db.size() == dy.size(),
      "dt_db: lists of ", dy.size(), ", ", b.size(), ", ", t.size(), ", ", dt.size(), " and ", db.size());
  const torch::stable::accelerator::DeviceGuard guard(dy[0].get_device_index());
  std::vector<DtDb> products;
  for (size_t i = 0; i < dy.size(); ++i) {
    for (const Tensor* tensor : {&dy[i], &b[i], &t[i], &dt[i], &db[i]})
      STD_TORCH_CHECK(tensor->dim() == 2 && tensor->stride(1) == 1, "dt_db: expected matrices with contiguous rows");
    const int64_t rows = dy[i].size(0), cols = dy[i].size(1), given = t[i].size(1), ranks = bf16x3 ? given / 2 : given;
    const auto is = [](const Tensor& m, int64_t r, int64_t c) { return m.size(0) == r && m.size(1) == c; };
    STD_TORCH_CHECK(rows == dy[0].size(0) && dy[i].scalar_type() == dy[0].scalar_type() && is(b[i], cols, given) &&
                        is(t[i], rows, bf16x3 ? 2 * ranks : ranks) && is(dt[i], rows, bf16x3 ? 3 * ranks : ranks) &&
                        is(db[i], cols, ranks),
                    "dt_db: shapes or dtypes of entry ", i);
    const auto split = bf16x3 ? std::optional<SplitLayout>({ranks, ranks}) : std::nullopt;
    products.push_back({dy[i], b[i], t[i], MatrixView(dt[i]).columns(0, ranks), db[i], scaling, split, db_scaling});
    STD_TORCH_CHECK(dispatch::is_sm90(dy[i]) && dt_db_sm90_supports(products.back()),
                    "dt_db: not for this device, these dtypes, ranks or strides");
  }
  dt_db_sm90(products);
}
