// Launches of skinny.cuh, which says what they compute: the products of a whole group in one each.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../../common/kernels.h"
#include "../../dispatch/table.h"
#include "../common/shared_memory.h"
#include "skinny.cuh"
#include "../common/stream.h"

namespace {

using namespace lora_fused;
using namespace lora_fused::skinny;
using torch::headeronly::ScalarType;

template <typename T>
const T* read(const MatrixView& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
Entry<T> entry_of(const Shrink& d) {
  Entry<T> e{};
  e.x = read<T>(d.x), e.a = read<T>(d.a), e.out = d.t.mutable_data_ptr();
  e.x_stride = d.x.stride(0), e.a_stride = d.a.stride(0), e.t_stride = d.t.stride(0);
  e.cols = d.x.size(1);
  e.ranks = static_cast<int>(d.a.size(0));
  e.scaling = static_cast<float>(d.scaling * scale_of(d.mask));
  e.mask = mask_of(d.mask);
  return e;
}

template <typename T>
Entry<T> entry_of(const AdapterGrad& d) {
  Entry<T> e{};
  e.x = read<T>(d.x), e.t = read<T>(d.t), e.out = d.out.mutable_data_ptr();
  e.x_stride = d.x.stride(0), e.t_stride = d.t.stride(0);
  e.cols = d.x.size(1);
  e.ranks = static_cast<int>(d.t.size(1));
  e.out_is_float = d.out.scalar_type() == ScalarType::Float;
  e.transposed = d.transposed;
  e.scaling = static_cast<float>(d.scaling * scale_of(d.mask));
  e.mask = mask_of(d.mask);
  return e;
}

template <typename T>
Entry<T> entry_of(const DroppedExpand& d) {
  Entry<T> e{};
  e.a = read<T>(d.a), e.t = read<T>(d.dt);
  e.a_stride = d.a.stride(0), e.t_stride = d.dt.stride(0);
  e.cols = d.a.size(1);
  e.ranks = static_cast<int>(d.a.size(0));
  e.scaling = static_cast<float>(scale_of(d.mask));
  e.mask = mask_of(d.mask);
  return e;
}

unsigned blocks(int64_t work, int64_t block) { return static_cast<unsigned>((work + block - 1) / block); }

// The most that an entry has of each.
struct Extent {
  int64_t cols = 0;
  int ranks = 1;
};

template <typename T, int kTiles>
void launch_shrink(const Arguments<T>& args, dim3 grid, cudaStream_t stream) {
  if (dispatch::shrink_takes_many_warps(static_cast<int64_t>(grid.x) * grid.y * grid.z))
    shrink_fwd_kernel<T, kTiles, 16><<<grid, 32 * 16, 0, stream>>>(args);
  else
    shrink_fwd_kernel<T, kTiles, 8><<<grid, 32 * 8, 0, stream>>>(args);
}

template <typename T>
void launch(const Arguments<T>& args, const Shrink*, Extent most, const MatrixView& like) {
  const cudaStream_t stream = stream_of(like);
  const int tile = most.ranks <= 16 ? 16 : most.ranks <= 32 ? 32 : 64;
  const dim3 grid(blocks(args.rows, 16), args.entries, blocks(most.ranks, tile));
  if (tile == 16)
    launch_shrink<T, 2>(args, grid, stream);
  else if (tile == 32)
    launch_shrink<T, 4>(args, grid, stream);
  else
    shrink_fwd_kernel<T, 8, 8><<<grid, 32 * 8, 0, stream>>>(args);
}

template <typename T>
void launch(const Arguments<T>& args, const AdapterGrad*, Extent most, const MatrixView& like) {
  const cudaStream_t stream = stream_of(like);
  const dim3 grid(blocks(most.cols, kGradCols), args.entries, blocks(most.ranks, kGradRanks));
  adapter_grad_bwd_kernel<T><<<grid, kThreads, 0, stream>>>(args);
}

template <typename T>
void launch(const Arguments<T>& args, const DroppedExpand*, Extent most, const MatrixView& like) {
  const cudaStream_t stream = stream_of(like);
  int ranks = 0;
  for (int i = 0; i < args.entries; ++i) ranks += padded_ranks(args.entry[i].ranks);
  dim3 grid(blocks(most.cols, kExpandCols), blocks(args.rows, kExpandRows * kExpandTiles));
  if (dispatch::expand_takes_one_tile(grid.x * grid.y)) grid.y = blocks(args.rows, kExpandRows);
  static SharedMemory shared_memory;
  shared_memory.allow(dropped_expand_add_bwd_kernel<T>, kExpandRanks * kExpandPitch * sizeof(T),
                      like.get_device_index());
  dropped_expand_add_bwd_kernel<T><<<grid, kThreads, ranks * kExpandPitch * sizeof(T), stream>>>(args);
}

template <typename T, typename Work>
void run(const std::vector<Work>& works, const MatrixView& like, void* dx) {
  const int64_t rows = like.size(0);
  for (size_t first = 0; rows > 0 && first < works.size(); first += kEntries) {
    Arguments<T> args{};
    args.dx = static_cast<T*>(dx);
    args.rows = rows;
    Extent most;
    for (size_t i = first; i < std::min(works.size(), first + kEntries); ++i) {
      const Entry<T>& entry = args.entry[args.entries++] = entry_of<T>(works[i]);
      most.cols = std::max(most.cols, entry.cols);
      most.ranks = std::max(most.ranks, entry.ranks);
    }
    launch(args, works.data(), most, like);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// `like` has the tokens and the dtype that all entries share.
template <typename Work>
void run_as(const std::vector<Work>& works, const MatrixView& like, void* dx) {
  if (like.scalar_type() == ScalarType::BFloat16) return run<__nv_bfloat16>(works, like, dx);
  run<__half>(works, like, dx);
}

}  // namespace

bool lora_fused::skinny_supports(const MatrixView& matrix) {
  const auto dtype = matrix.scalar_type();
  return (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) && matrix.stride(1) == 1 &&
         matrix.size(1) % kColumns == 0 && matrix.stride(0) % kColumns == 0 && matrix.size(0) > 0 &&
         reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0;
}

void lora_fused::shrink_cuda(const std::vector<Shrink>& entries) { run_as(entries, entries[0].x, nullptr); }

void lora_fused::adapter_grad_cuda(const std::vector<AdapterGrad>& entries) { run_as(entries, entries[0].x, nullptr); }

void lora_fused::dropped_expand_add_cuda(const MatrixView& dx, const std::vector<DroppedExpand>& terms) {
  // What a launch has shared memory for; ranks beyond that are a term of their own.
  std::vector<DroppedExpand> together;
  int ranks = 0;
  const auto launch_together = [&] {
    run_as(together, dx, dx.mutable_data_ptr());
    together.clear(), ranks = 0;
  };
  for (const DroppedExpand& term : terms)
    for (int64_t first = 0; first < term.a.size(0); first += kExpandRanks) {
      const int64_t count = std::min<int64_t>(kExpandRanks, term.a.size(0) - first);
      const int padded = padded_ranks(static_cast<int>(count));
      if (ranks + padded > kExpandRanks) launch_together();
      together.push_back({term.dt.columns(first, count), term.a.rows(first, count), term.mask});
      ranks += padded;
    }
  launch_together();
}
