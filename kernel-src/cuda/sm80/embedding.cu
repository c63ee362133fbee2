// An adapted embedding on CUDA, one op a direction: embedding_common.cuh says what they compute.
//
// Fused: the gather of W and A, the rank-r product, scale and mag_norm_scale forward; all of dA, dB and dm
// backward, with nothing between the launches but this file. Operands are contiguous, H a multiple
// of 8 and rows 16-byte aligned; W in bfloat16 or float16, A and B in float32 too, mag_norm_scale and norm in
// float32. An id out of range stops the kernel with a device-side assertion, as torch's own does.
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../../../torch-ext/torch_binding.h"
#include "../../common/tensors.h"
#include "../../dispatch/table.h"
#include "../common/shared_memory.h"
#include "embedding_backward.cuh"
#include "embedding_forward.cuh"
#include "../common/stream.h"

namespace {

using namespace lora_fused::embedding;
using lora_fused::empty;
using lora_fused::stream_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kMostRanks = ManyTokens::kMost * kRanks;  // cuda_embedding.py asks for no more

void check(const Tensor& t, const char* name, const Tensor& weight) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == weight.get_device_index(), name,
                  ": expected on weight's GPU");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected contiguous");
}

const float* floats(const Optional& t, const char* name, const Tensor& weight) {
  if (!t) return nullptr;
  check(*t, name, weight);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == weight.size(1), name,
                  ": expected [H] in float32");
  return static_cast<const float*>(t->const_data_ptr());
}

Args arguments(const Tensor& ids, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
               const Optional& scale, double scaling, double number) {
  check(ids, "ids", weight);
  check(weight, "weight", weight);
  check(lora_a, "lora_a", weight);
  check(lora_b, "lora_b", weight);
  STD_TORCH_CHECK(
      ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
      "ids: expected int64 or int32");
  STD_TORCH_CHECK(weight.dim() == 2 && lora_a.dim() == 2 && lora_b.dim() == 2 &&
                      lora_a.size(1) == weight.size(0) && lora_b.size(0) == weight.size(1) &&
                      lora_a.size(0) == lora_b.size(1) && lora_a.size(0) > 0,
                  "embedding: expected weight [V, H], lora_a [R, V], lora_b [H, R]");
  STD_TORCH_CHECK(lora_a.size(0) <= kMostRanks, "lora_a: expected a rank of at most ", kMostRanks);
  STD_TORCH_CHECK(weight.size(0) <= INT32_MAX && weight.size(1) <= INT32_MAX / 64,
                  "weight: expected fewer rows and columns");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::BFloat16 ||
                      weight.scalar_type() == ScalarType::Half,
                  "weight: expected bfloat16 or float16");
  STD_TORCH_CHECK(weight.size(1) % 8 == 0 &&
                      reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0,
                  "weight: expected rows of a multiple of 8 elements, 16-byte aligned");
  Args p{};
  p.ids = ids.const_data_ptr(), p.wide = ids.scalar_type() == ScalarType::Long;
  p.w = weight.const_data_ptr();
  p.a = array_of(lora_a, "lora_a"), p.b = array_of(lora_b, "lora_b");
  if (scale) {
    check(*scale, "scale", weight);
    p.scale = array_of(*scale, "scale");
  }
  p.scaling = static_cast<float>(scaling), p.number = static_cast<float>(number);
  p.m = ids.numel(), p.v = weight.size(0);
  p.h = static_cast<int>(weight.size(1)), p.r = static_cast<int>(lora_a.size(0));
  return p;
}

unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

template <typename T, typename P, typename Block>
void launch_forward(const Tensor& y, float* rows, int64_t steps, const Args& p, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Block::Shared);
  static lora_fused::SharedMemory shared_memory;
  shared_memory.allow(gather_add_fwd_kernel<T, P, Block>, kBytes, y.get_device_index());
  const dim3 grid(ceil_div(p.h, Block::kThreads), ceil_div(p.m, steps * kForwardTokens));
  gather_add_fwd_kernel<T, P, Block><<<grid, Block::kThreads, kBytes, stream>>>(
      static_cast<T*>(y.mutable_data_ptr()), rows, static_cast<int>(steps), p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, typename P>
void run_forward(const Tensor& y, float* rows, const Args& p, cudaStream_t stream) {
  const int64_t steps = ceil_div(p.m, kForwardTokens), all = lora_fused::multiprocessors(y.get_device_index());
  if (p.r <= kRanks && steps * ceil_div(p.h, FewTokens::kThreads) <= lora_fused::dispatch::kEmbeddingSmallBlocks * all)
    return launch_forward<T, P, FewTokens>(y, rows, 1, p, stream);
  // As many blocks as there are multiprocessors, or a multiple of that.
  const int64_t at_once = std::max<int64_t>(all / ceil_div(p.h, ManyTokens::kThreads), 1);
  const int64_t most = ManyTokens::kMost / ceil_div(p.r, kRanks), rounds = ceil_div(steps, at_once * most);
  launch_forward<T, P, ManyTokens>(y, rows, ceil_div(steps, at_once * rounds), p, stream);
}

template <typename T>
void run_forward_adapter(const Tensor& y, float* rows, const Args& p, cudaStream_t stream) {
  (p.b.dtype == kFloat      ? run_forward<T, float>
   : p.b.dtype == kBFloat16 ? run_forward<T, __nv_bfloat16>
                            : run_forward<T, __half>)(y, rows, p, stream);
}

struct Wanted {
  void *da, *db, *dm;  // null where they are not
  int dm_dtype;
};

// Splits of H and of the tokens so that few tokens or columns fill the GPU too.
template <typename T>
void run_backward(const Wanted& wanted, const Tensor& dy, const float* kept, int64_t padding,
                  const Args& p, cudaStream_t stream) {
  const int ranks = static_cast<int>(ceil_div(p.r, kRanks));
  RowsArgs rows{};
  ColumnsArgs columns{};
  Tensor drows, partial;
  int rows_blocks = 0, columns_blocks = 0, zero_blocks = 0;
  int64_t bytes = 0;
  if (wanted.da != nullptr) {
    const int64_t pieces = ceil_div(p.h, kWarpCols);
    rows.blocks = static_cast<int>(ceil_div(p.m, kRowsTokens));
    const int splits = lora_fused::dispatch::embedding_splits(rows.blocks, pieces, 8);
    rows.cols = static_cast<int>(ceil_div(pieces, splits)) * kWarpCols;
    rows.splits = static_cast<int>(ceil_div(p.h, rows.cols));
    drows = empty(dy, {rows.splits, p.m, int64_t{p.r}}, ScalarType::Float);
    rows.drows = static_cast<float*>(drows.mutable_data_ptr());
    rows_blocks = rows.blocks * rows.splits * ranks;
    bytes = p.r * p.v * (p.a.dtype == kFloat ? 4 : 2);
    zero_blocks = static_cast<int>(std::clamp<int64_t>(bytes / (16 * kBackwardThreads), 1, 256));
  }
  if (wanted.db != nullptr || wanted.dm != nullptr) {
    const int64_t pieces = std::max<int64_t>(ceil_div(p.m, kColumnsTokens), 1);
    columns.blocks = static_cast<int>(ceil_div(p.h, kColumns));
    const int splits = lora_fused::dispatch::embedding_splits(columns.blocks * ranks, pieces, 16);
    columns.tokens = static_cast<int>(ceil_div(pieces, splits)) * kColumnsTokens;
    columns.splits = static_cast<int>(ceil_div(pieces * kColumnsTokens, columns.tokens));
    partial = empty(dy, {columns.splits, int64_t{p.h} * (p.r + 1)}, ScalarType::Float);
    columns.sums = static_cast<float*>(partial.mutable_data_ptr());
    columns.bases =
        wanted.dm != nullptr ? columns.sums + int64_t{columns.splits} * p.h * p.r : nullptr;
    columns.rows = kept;
    columns_blocks = columns.blocks * columns.splits * ranks;
  }
  products_bwd_kernel<T>
      <<<rows_blocks + columns_blocks + zero_blocks, kBackwardThreads, 0, stream>>>(
          static_cast<const T*>(dy.const_data_ptr()), rows, rows_blocks, columns, columns_blocks,
          static_cast<char*>(wanted.da), bytes, p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const int64_t warps = (wanted.da != nullptr ? p.m : 0) + (columns.sums != nullptr ? p.h : 0);
  if (warps == 0) return;
  const FinishArgs finish{wanted.db, wanted.dm, wanted.dm_dtype,
                          std::is_same_v<T, __half> ? kHalf : kBFloat16};
  finish_bwd_kernel<<<ceil_div(warps * 32, kBackwardThreads), kBackwardThreads, 0, stream>>>(
      wanted.da, rows, padding, finish, columns, p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

std::tuple<Tensor, Tensor> embedding_forward_cuda(const Tensor& ids, const Tensor& weight,
                                                  const Tensor& lora_a, const Tensor& lora_b,
                                                  Optional mag_norm_scale, Optional scale, double scaling,
                                                  double number, bool keep) {
  Args p = arguments(ids, weight, lora_a, lora_b, scale, scaling, number);
  p.mag_norm_scale = floats(mag_norm_scale, "gain", weight);
  const int dtype = dtype_of(weight, "weight");
  const lora_fused::OnDevice device(weight);
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < ids.dim(); ++d) sizes.push_back(ids.size(d));
  sizes.push_back(p.h);
  const Tensor y = empty(weight, sizes, weight.scalar_type());
  const Tensor rows = empty(weight, {keep ? p.m : 0, int64_t{p.r}}, ScalarType::Float);
  if (y.numel() == 0) return {y, rows};
  float* kept = keep ? static_cast<float*>(rows.mutable_data_ptr()) : nullptr;
  (dtype == kBFloat16 ? run_forward_adapter<__nv_bfloat16> : run_forward_adapter<__half>)(
      y, kept, p, stream_of(weight));
  return {y, rows};
}

lora_fused::Tensors embedding_backward_cuda(const Tensor& dy_any, const Tensor& ids, Optional rows,
                                            const Tensor& weight, const Tensor& lora_a,
                                            const Tensor& lora_b, Optional magnitude, Optional mag_norm_scale,
                                            Optional norm, Optional scale, double scaling,
                                            double number, int64_t padding, bool need_a,
                                            bool need_b, bool need_m) {
  Args p = arguments(ids, weight, lora_a, lora_b, scale, scaling, number);
  p.mag_norm_scale = floats(mag_norm_scale, "gain", weight);
  p.norm = floats(norm, "norm", weight);
  const int dtype = dtype_of(weight, "weight");
  const Tensor dy = lora_fused::in_rows(dy_any);
  check(dy, "dy", weight);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(dy.const_data_ptr()) % 16 == 0,
                  "dy: expected 16-byte aligned");
  STD_TORCH_CHECK(dy.scalar_type() == weight.scalar_type() && dy.numel() == p.m * p.h,
                  "dy: expected [*ids.shape, H] in weight's dtype");
  const float* kept = nullptr;
  if (need_b || need_m) {
    STD_TORCH_CHECK(rows.has_value(), "rows: expected where dB or dm are wanted");
    check(*rows, "rows", weight);
    STD_TORCH_CHECK(rows->scalar_type() == ScalarType::Float && rows->numel() == p.m * p.r,
                    "rows: expected [M, R] in float32");
    kept = static_cast<const float*>(rows->const_data_ptr());
  }
  STD_TORCH_CHECK(!need_m || (magnitude && p.norm != nullptr), "dm: expected magnitude and norm");
  const lora_fused::OnDevice device(weight);
  lora_fused::Tensors gradients;
  Wanted wanted{};
  const auto add = [&](const std::vector<int64_t>& sizes, ScalarType as) {
    gradients.push_back(empty(weight, sizes, as));
    return gradients.back().mutable_data_ptr();
  };
  if (need_a) wanted.da = add({int64_t{p.r}, p.v}, lora_a.scalar_type());
  if (need_b) wanted.db = add({int64_t{p.h}, int64_t{p.r}}, lora_b.scalar_type());
  if (need_m) {
    wanted.dm_dtype = dtype_of(*magnitude, "magnitude");
    wanted.dm = add({int64_t{p.h}}, magnitude->scalar_type());
  }
  if (!gradients.empty())
    (dtype == kBFloat16 ? run_backward<__nv_bfloat16> : run_backward<__half>)(
        wanted, dy, kept, padding, p, stream_of(weight));
  return gradients;
}
