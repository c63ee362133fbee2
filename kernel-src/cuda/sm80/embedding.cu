// An adapted embedding on CUDA, one op a direction: embedding_common.cuh says what they compute.
//
// Fused: the gather of W and A, the rank-r product, scale and mag_norm_scale forward; all of dA, dB and dm
// backward, in two launches without a torch operation between them. Operands are contiguous, H a multiple
// of 8 and rows 16-byte aligned; W in bfloat16 or float16, A and B in float32 too, mag_norm_scale and norm in
// float32. An id out of range stops the kernel with a device-side assertion, as torch's own does.
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../../common/embedding.h"
#include "../../common/tensors.h"
#include "../../dispatch/table.h"
#include "../common/shared_memory.h"
#include "embedding_backward.cuh"
#include "embedding_forward.cuh"
#include "../common/stream.h"

namespace {

using namespace lora_fused;
using namespace lora_fused::embedding;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

static_assert(kMostEmbeddingRanks == ManyTokens::kMost * kRanks);

const float* float_data(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

Args arguments(const Embedding& e) {
  Args p{};
  p.ids = e.ids.const_data_ptr(), p.wide = e.ids.scalar_type() == ScalarType::Long;
  p.w = e.weight.const_data_ptr();
  p.a = array_of(e.lora_a, "lora_a"), p.b = array_of(e.lora_b, "lora_b");
  if (e.scale) p.scale = array_of(*e.scale, "scale");
  p.mag_norm_scale = float_data(e.mag_norm_scale);
  p.scaling = static_cast<float>(e.scaling), p.number = static_cast<float>(e.number);
  p.m = e.ids.numel(), p.v = e.weight.size(0);
  p.h = static_cast<int>(e.weight.size(1)), p.r = static_cast<int>(e.lora_a.size(0));
  return p;
}

unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

template <typename T, typename P, typename Block>
void launch_forward(const Tensor& y, float* rows, int64_t steps, const Args& p, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Block::Shared);
  static SharedMemory shared_memory;
  shared_memory.allow(gather_add_fwd_kernel<T, P, Block>, kBytes, y.get_device_index());
  const dim3 grid(ceil_div(p.h, Block::kThreads), ceil_div(p.m, steps * kForwardTokens));
  gather_add_fwd_kernel<T, P, Block><<<grid, Block::kThreads, kBytes, stream>>>(static_cast<T*>(y.mutable_data_ptr()),
                                                                                rows, static_cast<int>(steps), p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, typename P>
void run_forward(const Tensor& y, float* rows, const Args& p, cudaStream_t stream) {
  const int64_t steps = ceil_div(p.m, kForwardTokens), all = multiprocessors(y.get_device_index());
  if (p.r <= kRanks && steps * ceil_div(p.h, FewTokens::kThreads) <= dispatch::kEmbeddingSmallBlocks * all)
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
void run_backward(const Wanted& wanted, const Tensor& dy, const float* kept, int64_t padding, const Args& p,
                  cudaStream_t stream) {
  const int ranks = static_cast<int>(ceil_div(p.r, kRanks));
  RowsArgs rows{};
  ColumnsArgs columns{};
  Tensor drows, partial;
  int rows_blocks = 0, columns_blocks = 0, zero_blocks = 0;
  int64_t bytes = 0;
  if (wanted.da != nullptr) {
    const int64_t pieces = ceil_div(p.h, kWarpCols);
    rows.blocks = static_cast<int>(ceil_div(p.m, kRowsTokens));
    const int splits = dispatch::embedding_splits(rows.blocks, pieces, 8);
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
    const int splits = dispatch::embedding_splits(columns.blocks * ranks, pieces, 16);
    columns.tokens = static_cast<int>(ceil_div(pieces, splits)) * kColumnsTokens;
    columns.splits = static_cast<int>(ceil_div(pieces * kColumnsTokens, columns.tokens));
    partial = empty(dy, {columns.splits, int64_t{p.h} * (p.r + 1)}, ScalarType::Float);
    columns.sums = static_cast<float*>(partial.mutable_data_ptr());
    columns.bases = wanted.dm != nullptr ? columns.sums + int64_t{columns.splits} * p.h * p.r : nullptr;
    columns.rows = kept;
    columns_blocks = columns.blocks * columns.splits * ranks;
  }
  products_bwd_kernel<T><<<rows_blocks + columns_blocks + zero_blocks, kBackwardThreads, 0, stream>>>(
      static_cast<const T*>(dy.const_data_ptr()), rows, rows_blocks, columns, columns_blocks,
      static_cast<char*>(wanted.da), bytes, p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const int64_t warps = (wanted.da != nullptr ? p.m : 0) + (columns.sums != nullptr ? p.h : 0);
  if (warps == 0) return;
  const FinishArgs finish{wanted.db, wanted.dm, wanted.dm_dtype, std::is_same_v<T, __half> ? kHalf : kBFloat16};
  finish_bwd_kernel<<<ceil_div(warps * 32, kBackwardThreads), kBackwardThreads, 0, stream>>>(wanted.da, rows, padding,
                                                                                             finish, columns, p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void lora_fused::embedding_forward_sm80(const Embedding& e, const Tensor& y, const std::optional<Tensor>& rows) {
  float* const kept = rows ? static_cast<float*>(rows->mutable_data_ptr()) : nullptr;
  const bool is_bfloat16 = e.weight.scalar_type() == ScalarType::BFloat16;
  (is_bfloat16 ? run_forward_adapter<__nv_bfloat16> : run_forward_adapter<__half>)(y, kept, arguments(e),
                                                                                   stream_of(e.weight));
}

void lora_fused::embedding_backward_sm80(const Embedding& e, const EmbeddingBackward& work) {
  Args p = arguments(e);
  p.norm = float_data(work.norm);
  const auto data = [](const std::optional<Tensor>& t) { return t ? t->mutable_data_ptr() : nullptr; };
  Wanted wanted{data(work.da), data(work.db), data(work.dm)};
  if (work.dm) wanted.dm_dtype = dtype_code(work.dm->scalar_type(), "magnitude");
  const bool is_bfloat16 = e.weight.scalar_type() == ScalarType::BFloat16;
  (is_bfloat16 ? run_backward<__nv_bfloat16> : run_backward<__half>)(wanted, work.dy, float_data(work.rows),
                                                                     work.padding, p, stream_of(e.weight));
}
