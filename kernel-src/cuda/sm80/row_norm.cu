// row_norm on CUDA: out[n] = sqrt(sum_k (W[n,k] + s * sum_r B[n,r] A[r,k])^2), fp32 [N].
//
// W [N,K], A [R,K], B [N,R], each fp32, bf16 or fp16. The product runs on tensor cores, exact
// products with fp32 sums: A and B of one half type and aligned as they are, anything else
// split into hi and lo of fp16 first (22 bits; a power of two per column of A and row of B keeps
// them in range) and multiplied in three terms. The tiles are dealt out evenly to as many
// blocks as the GPU holds; a last kernel adds each row's partial sums in a fixed order, so
// results are deterministic on a given GPU.
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>

#include "../../common/mag_norm_scale.h"
#include "../../common/kernels.h"
#include "../../common/tensors.h"
#include "../common/shared_memory.h"
#include "row_norm.cuh"
#include "row_norm_split.cuh"
#include "../common/stream.h"

namespace {

using namespace lora_fused;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Matrix matrix(const Tensor& t) {
  return {t.const_data_ptr(), dtype_code(t.scalar_type(), "row_norm"), t.size(0), t.size(1)};
}

bool aligned(const Matrix& m) {
  const int64_t bytes = m.dtype == kFloat ? 4 : 2;
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.cols * bytes % 16 == 0;
}

// Fills in the buffers that fit `limit` bytes of shared memory, the deepest first, B read once
// before B read again for every tile. Returns the bytes, 0 where nothing fits.
int64_t plan(RowNormArgs& p, int64_t limit) {
  const int64_t w_bytes = kRows * kCols * (p.w_dtype == kFloat ? 4 : 2);
  const int64_t b_all = std::min(p.steps, 2 * p.period);
  for (const bool resident : {true, false})
    for (const int w_buffers : {2, 1})
      for (const int stages : {4, 3, 2}) {
        const int64_t bytes = w_buffers * w_bytes + stages * kRanks * kCols * 2 + (resident ? b_all : stages) * kBStep;
        if (bytes > limit || w_buffers * p.steps < stages) continue;
        p.b_resident = resident;
        p.w_buffers = w_buffers;
        p.stages = stages;
        p.w_lead = std::min(stages - 1, (w_buffers - 1) * p.steps);
        return bytes;
      }
  return 0;
}

// One norm and what it needs until it is launched.
struct Work {
  Tensor w, a, b, norm;
  MaybeTensor magnitude, mag_norm_scale;
  double scaling;
  std::function<void()> fill;
  RowNormArgs args{};
  Matrix a_matrix, b_matrix;
  int64_t bytes, ranks, lda, floats;  // of shared memory; of the split A and B; of the scratch buffer
  bool direct;                        // A and B as they are
};

Work work_of(const RowNorm& of) {
  Work work{in_rows(of.weight), in_rows(of.a),     in_rows(of.b), of.norm,
            of.magnitude,       of.mag_norm_scale, of.scaling,    of.fill};
  const Device& device = device_of(of.weight.get_device_index());
  const Matrix w = matrix(work.w), a = matrix(work.a), b = matrix(work.b);
  work.a_matrix = a, work.b_matrix = b;
  const int64_t n = w.rows, k = w.cols;
  work.direct = a.dtype == b.dtype && a.dtype != kFloat && aligned(a) && aligned(b);
  const int period = static_cast<int>(std::max<int64_t>(1, ceil_div(a.rows, kRanks)));
  RowNormArgs& p = work.args;
  p.w = w.data, p.w_dtype = w.dtype, p.w_vector = aligned(w);
  p.n = n, p.k = k;
  p.period = period;
  // Two steps a tile at least where one W tile is all that small GPUs can hold.
  p.steps = work.direct ? std::max(period, w.dtype == kFloat ? 2 : 1) : 3 * period;
  p.scaling = static_cast<float>(of.scaling);

  const int64_t block_limit = device.shared_memory_of_block, all = device.shared_memory;
  constexpr int64_t kFixed = 2 * kRows * 4;  // the kernel's row sums
  int per_sm = 2;
  work.bytes = plan(p, std::min(block_limit, all / per_sm - 1024) - kFixed);
  if (work.bytes == 0) per_sm = 1, work.bytes = plan(p, block_limit - kFixed);
  STD_TORCH_CHECK(work.bytes > 0, "row_norm: needs 98 KiB of shared memory a block");
  p.row_blocks = ceil_div(n, kRows);
  p.col_tiles = ceil_div(k, kCols);
  p.blocks = std::min(p.row_blocks * p.col_tiles, int64_t{per_sm} * device.multiprocessors);
  // Partial sums, scales, split operands; every piece a multiple of 16 bytes.
  work.ranks = int64_t{period} * kRanks, work.lda = p.col_tiles * kCols;
  work.floats = (p.blocks + p.row_blocks) * kRows;
  if (!work.direct) work.floats += p.row_blocks * kRows + work.lda + (work.lda + n) * work.ranks;
  return work;
}

// Gives the work its place in the scratch buffer.
void place(Work& work, float* scratch) {
  RowNormArgs& p = work.args;
  p.partial = scratch;
  if (work.direct) {
    p.a = static_cast<const uint16_t*>(work.a_matrix.data), p.b = static_cast<const uint16_t*>(work.b_matrix.data);
    p.a_rows = work.a_matrix.rows, p.lda = p.k, p.ldb = work.a_matrix.rows;
    return;
  }
  float* const row_scale = scratch + (p.blocks + p.row_blocks) * kRows;
  float* const col_scale = row_scale + p.row_blocks * kRows;
  p.row_scale = row_scale, p.col_scale = col_scale;
  p.a = reinterpret_cast<const uint16_t*>(col_scale + work.lda);
  p.b = p.a + 2 * work.ranks * work.lda;
  p.a_rows = p.ldb = 2 * work.ranks, p.lda = work.lda;
}

Split split_of(const Work& work) {
  const RowNormArgs& p = work.args;
  const auto halves = [](const uint16_t* of) { return reinterpret_cast<__half*>(const_cast<uint16_t*>(of)); };
  return {halves(p.a),
          halves(p.b),
          const_cast<float*>(p.col_scale),
          const_cast<float*>(p.row_scale),
          work.a_matrix,
          work.b_matrix,
          work.ranks,
          work.lda};
}

Finish finish_of(const Work& work) {
  const auto floats = [](const MaybeTensor& t) { return t ? static_cast<float*>(t->mutable_data_ptr()) : nullptr; };
  const RowNormArgs& p = work.args;
  constexpr float kUnit = static_cast<float>(kScaleUnits) * std::numeric_limits<float>::epsilon();
  return {floats(work.norm),
          floats(work.mag_norm_scale),
          floats(work.magnitude),
          p.partial,
          p.n,
          p.row_blocks,
          p.col_tiles,
          p.blocks,
          kUnit};
}

// One launch a norm: with several in one, their arguments read by an index, it took 8 % longer.
void launch_norm(const Work& work, cudaStream_t stream) {
  if (work.args.blocks == 0) return;
  static SharedMemory of_bfloat16, of_half;
  const bool is_bfloat16 = work.direct && work.a_matrix.dtype == kBFloat16;  // split operands are half
  const auto kernel = is_bfloat16 ? row_norm_fwd_kernel<__nv_bfloat16> : row_norm_fwd_kernel<__half>;
  (is_bfloat16 ? of_bfloat16 : of_half).allow(kernel, static_cast<int>(work.bytes), work.w.get_device_index());
  kernel<<<static_cast<unsigned>(work.args.blocks), kThreads, work.bytes, stream>>>(work.args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_splits(const std::vector<Work>& works, cudaStream_t stream) {
  SplitBatch batch{};
  unsigned splits = 0;
  int64_t blocks = 0;
  for (const Work& work : works) {
    if (work.direct) continue;
    batch.of[splits++] = split_of(work);
    blocks = std::max(blocks, work.lda / 32 + ceil_div(work.args.n, 8));
  }
  if (splits == 0) return;
  row_norm_split_kernel<<<dim3(static_cast<unsigned>(blocks), splits), 256, 0, stream>>>(batch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_finish(const std::vector<Work>& works, cudaStream_t stream) {
  constexpr int kFinishThreads = 256;
  FinishBatch batch{};
  int64_t most = 1;
  for (size_t i = 0; i < works.size(); ++i) {
    batch.of[i] = finish_of(works[i]);
    most = std::max(most, works[i].args.n);
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(most, kFinishThreads)), static_cast<unsigned>(works.size()));
  row_norm_finish_kernel<<<grid, kFinishThreads, 0, stream>>>(batch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void lora_fused::row_norms_sm80(const std::vector<RowNorm>& norms) {
  for (size_t first = 0; first < norms.size(); first += kNorms) {
    std::vector<Work> works;
    int64_t floats = 0;
    for (size_t i = first; i < std::min(norms.size(), first + kNorms); ++i) {
      works.push_back(work_of(norms[i]));
      floats += works.back().floats;
    }
    const Tensor scratch = empty(works[0].w, {floats}, ScalarType::Float);
    float* next = static_cast<float*>(scratch.mutable_data_ptr());
    for (Work& work : works) place(work, next), next += work.floats;
    const cudaStream_t stream = stream_of(works[0].w);
    launch_splits(works, stream);
    for (const Work& work : works) {
      if (work.fill) work.fill();
      launch_norm(work, stream);
    }
    launch_finish(works, stream);
  }
}
