// An adapted embedding as one op a direction, and the norm that DoRA's needs, on CUDA alone: the CPU computes them with
// the library's products. common/embedding.h says what they compute.
//
//   drows = s·e·(c∘dy) B    dB = s·e·(c∘dy)ᵀ rows    dm = Σ dy∘(e·W[i] + s·e·rows Bᵀ) / norm
//   dA[:, v] = Σ drows over the tokens of v
#include "../common/embedding.h"

#include <tuple>

#include "../../torch-ext/torch_binding.h"
#include "../common/tensors.h"
#include "../dispatch/architecture.h"

using namespace lora_fused;

namespace {

using Optional = std::optional<Tensor>;

void check(const Tensor& t, const char* name, const Tensor& weight) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == weight.get_device_index(), name, ": expected on weight's GPU");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected contiguous");
}

void check_floats(const Optional& t, const char* name, const Tensor& weight) {
  if (!t) return;
  check(*t, name, weight);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == weight.size(1), name,
                  ": expected [H] in float32");
}

void check_table(const Tensor& weight) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::BFloat16 || weight.scalar_type() == ScalarType::Half,
                  "weight: expected bfloat16 or float16");
  STD_TORCH_CHECK(weight.size(1) % 8 == 0 && reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0,
                  "weight: expected rows of a multiple of 8 elements, 16-byte aligned");
}

void check_embedding(const Embedding& e) {
  dispatch::check_has_sm80(e.weight, "embedding");
  check(e.ids, "ids", e.weight);
  check(e.weight, "weight", e.weight);
  check(e.lora_a, "lora_a", e.weight);
  check(e.lora_b, "lora_b", e.weight);
  STD_TORCH_CHECK(e.ids.scalar_type() == ScalarType::Long || e.ids.scalar_type() == ScalarType::Int,
                  "ids: expected int64 or int32");
  STD_TORCH_CHECK(e.weight.dim() == 2 && e.lora_a.dim() == 2 && e.lora_b.dim() == 2 &&
                      e.lora_a.size(1) == e.weight.size(0) && e.lora_b.size(0) == e.weight.size(1) &&
                      e.lora_a.size(0) == e.lora_b.size(1) && e.lora_a.size(0) > 0,
                  "embedding: expected weight [V, H], lora_a [R, V], lora_b [H, R]");
  STD_TORCH_CHECK(e.lora_a.size(0) <= kMostEmbeddingRanks, "lora_a: expected a rank of at most ", kMostEmbeddingRanks);
  STD_TORCH_CHECK(e.weight.size(0) <= INT32_MAX && e.weight.size(1) <= INT32_MAX / 64,
                  "weight: expected fewer rows and columns");
  check_table(e.weight);
  if (e.scale) check(*e.scale, "scale", e.weight);
  check_floats(e.mag_norm_scale, "mag_norm_scale", e.weight);
}

}  // namespace

std::tuple<Tensor, Tensor> embedding_forward_cuda(const Tensor& ids, const Tensor& weight, const Tensor& lora_a,
                                                  const Tensor& lora_b, Optional mag_norm_scale, Optional scale,
                                                  double scaling, double number, bool keep) {
  const Embedding e{ids, weight, lora_a, lora_b, scale, mag_norm_scale, scaling, number};
  check_embedding(e);
  const OnDevice device(weight);
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < ids.dim(); ++d) sizes.push_back(ids.size(d));
  sizes.push_back(weight.size(1));
  const Tensor y = empty(weight, sizes, weight.scalar_type());
  const Tensor rows = empty(weight, {keep ? ids.numel() : 0, lora_a.size(0)}, ScalarType::Float);
  if (y.numel() > 0) embedding_forward_sm80(e, y, keep ? Optional(rows) : std::nullopt);
  return {y, rows};
}

Tensors embedding_backward_cuda(const Tensor& dy_any, const Tensor& ids, Optional rows, const Tensor& weight,
                                const Tensor& lora_a, const Tensor& lora_b, Optional magnitude, Optional mag_norm_scale,
                                Optional norm, Optional scale, double scaling, double number, int64_t padding,
                                bool need_a, bool need_b, bool need_m) {
  const Embedding e{ids, weight, lora_a, lora_b, scale, mag_norm_scale, scaling, number};
  check_embedding(e);
  check_floats(norm, "norm", weight);
  const Tensor dy = in_rows(dy_any);
  check(dy, "dy", weight);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(dy.const_data_ptr()) % 16 == 0, "dy: expected 16-byte aligned");
  STD_TORCH_CHECK(dy.scalar_type() == weight.scalar_type() && dy.numel() == ids.numel() * weight.size(1),
                  "dy: expected [*ids.shape, H] in weight's dtype");
  if (need_b || need_m) {
    STD_TORCH_CHECK(rows.has_value(), "rows: expected where dB or dm are wanted");
    check(*rows, "rows", weight);
    STD_TORCH_CHECK(rows->scalar_type() == ScalarType::Float && rows->numel() == ids.numel() * lora_a.size(0),
                    "rows: expected [M, R] in float32");
  } else {
    rows.reset();
  }
  STD_TORCH_CHECK(!need_m || (magnitude && norm), "dm: expected magnitude and norm");
  const OnDevice device(weight);
  EmbeddingBackward work{dy, rows, norm, padding, std::nullopt, std::nullopt, std::nullopt};
  Tensors gradients;
  const auto add = [&](const std::vector<int64_t>& sizes, const Tensor& like) {
    gradients.push_back(empty(weight, sizes, like.scalar_type()));
    return gradients.back();
  };
  if (need_a) work.da = add({lora_a.size(0), weight.size(0)}, lora_a);
  if (need_b) work.db = add({weight.size(1), lora_a.size(0)}, lora_b);
  if (need_m) work.dm = add({weight.size(1)}, *magnitude);
  if (!gradients.empty()) embedding_backward_sm80(e, work);
  return gradients;
}

Tensors column_norm_cuda(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling,
                         Optional magnitude) {
  STD_TORCH_CHECK(weight.dim() == 2 && lora_a.dim() == 2 && lora_b.dim() == 2 && lora_a.size(1) == weight.size(0) &&
                      lora_b.size(0) == weight.size(1) && lora_a.size(0) == lora_b.size(1),
                  "column_norm: expected weight [V, H], lora_a [R, V], lora_b [H, R]");
  STD_TORCH_CHECK(lora_a.size(0) >= 1 && lora_a.size(0) <= kMostColumnNormRanks, "lora_a: expected a rank of 1 to ",
                  kMostColumnNormRanks, ", got ", lora_a.size(0));
  const auto dtype = lora_a.scalar_type();
  dispatch::check_has_sm80(weight, "column_norm");
  check_table(weight);
  STD_TORCH_CHECK((dtype == weight.scalar_type() || dtype == ScalarType::Float) && lora_b.scalar_type() == dtype,
                  "lora_a, lora_b: expected one dtype, float32 or that of weight");
  for (const Tensor* t : {&weight, &lora_a, &lora_b})
    STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == weight.get_device_index() && t->is_contiguous(),
                    "column_norm: expected contiguous tensors on one GPU");
  if (magnitude)
    STD_TORCH_CHECK(magnitude->is_cuda() && magnitude->get_device_index() == weight.get_device_index() &&
                        magnitude->is_contiguous() && magnitude->dim() == 1 && magnitude->numel() == weight.size(1),
                    "magnitude: expected contiguous [H] on weight's GPU");
  const OnDevice device(weight);
  Tensors out;
  for (int i = 0; i < (magnitude ? 2 : 1); ++i) out.push_back(empty(weight, {weight.size(1)}, ScalarType::Float));
  if (weight.size(1) > 0)
    column_norm_sm80({weight, lora_a, lora_b, scaling, out[0], magnitude, magnitude ? Optional(out[1]) : std::nullopt});
  return out;
}
