// The host side of TMA (Hopper's copy engine): tensor maps, made for every call, what they ask of a matrix, and
// launches of clusters.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include "../../common/matrix_view.h"
#include "../../common/side_stream.h"
#include "../common/shared_memory.h"

namespace lora_fused::sm90 {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// From the driver that is loaded, so that the library needs no link to it.
inline Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    STD_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "the driver has no tensor maps");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

inline bool is_bfloat16(const MatrixView& m) { return m.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

// The encoder belongs to the driver, which asks for a context: a new thread, as autograd's, has none before its first
// call of the runtime.
inline void bind_context() {
  static thread_local const bool bound = [] {
    int device = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaSetDevice(device));
    return true;
  }();
  static_cast<void>(bound);
}

// Boxes of `rows` rows and 64 columns of a half-precision matrix with contiguous rows, 128-byte swizzled.
inline void encode_tensor_map(CUtensorMap& map, const MatrixView& m, int rows) {
  bind_context();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.size(1)), static_cast<cuuint64_t>(m.size(0))};
  const cuuint64_t stride = static_cast<cuuint64_t>(m.stride(0)) * 2;
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(rows)}, steps[] = {1, 1};
  const CUresult result =
      encoder()(&map, is_bfloat16(m) ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                const_cast<void*>(m.const_data_ptr()), sizes, &stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with ", static_cast<int>(result));
}

// TMA can copy it: contiguous rows at multiples of 16 bytes.
inline bool supports_tma(const MatrixView& m) {
  constexpr int64_t kLimit = int64_t(1) << 22;
  const auto dtype = m.scalar_type();
  const bool half = dtype == torch::headeronly::ScalarType::BFloat16 || dtype == torch::headeronly::ScalarType::Half;
  return m.is_cuda() && half && m.size(0) >= 1 && m.size(1) >= 1 && m.size(0) <= kLimit && m.size(1) <= kLimit &&
         m.stride(1) == 1 && m.stride(0) >= m.size(1) && m.stride(0) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(m.const_data_ptr()) % 16 == 0;
}

inline int tiles(int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); }

// Of a launch with clusters of `cluster` blocks along x; `dimension` must live until then.
inline cudaLaunchConfig_t clusters_of(cudaLaunchAttribute& dimension, unsigned blocks, unsigned cluster,
                                      unsigned threads, size_t bytes) {
  dimension.id = cudaLaunchAttributeClusterDimension;
  dimension.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.attrs = &dimension;
  config.numAttrs = 1;
  return config;
}

template <typename Kernel, typename Arguments>
void launch_clusters(Kernel kernel, unsigned blocks, unsigned cluster, unsigned threads, size_t bytes,
                     cudaStream_t stream, const Arguments& args, SideStream* side = nullptr) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = clusters_of(attributes[0], blocks, cluster, threads, bytes);
  config.stream = stream;
  if (side != nullptr) {
    attributes[1].id = cudaLaunchAttributeLaunchCompletionEvent;
    attributes[1].val.launchCompletionEvent = {side->begun(), 0};
    config.numAttrs = 2;
  }
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
  if (side != nullptr) side->started();
}

// Clusters that the current device runs at once.
template <typename Kernel>
int most_clusters(Kernel kernel, unsigned cluster, unsigned threads, size_t bytes) {
  cudaLaunchAttribute dimension;
  const cudaLaunchConfig_t config = clusters_of(dimension, cluster, cluster, threads, bytes);
  int most = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&most, reinterpret_cast<const void*>(kernel), &config));
  return most;
}

}  // namespace lora_fused::sm90
