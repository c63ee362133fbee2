// Matrix product for Hopper with the LoRA terms inside, see common/gemm.h.
//
// Fused: every segment's product runs as further K steps of one accumulator, so a rank-R term costs
// R/K of the base product and out is written once; bias or gain, z and y in the epilogue.
//
// A block makes tiles of 128 x kBlockN of out until none is left. One warp of it loads 64 columns of
// a and of b a step into a ring of shared memory stages; two warpgroups multiply them, 64 rows each,
// and know nothing of segments. Two blocks with neighbouring rows form a cluster, and each loads
// half of the b that both need. The stores of a tile overlap the products of the next. Everything is
// 128-byte swizzled; ragged edges and ranks are what the copy engine fills with zeros or leaves out.
#include "gemm_sm90.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>

#include "../../torch-ext/torch_binding.h"
#include "../common/gemm.h"

namespace {

using namespace lora_fused::sm90;
using lora_fused::Gemm;
using lora_fused::GemmSegment;
using lora_fused::kGemmSegments;
using lora_fused::View;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;


constexpr int kBlockM = 128, kBlockK = 64;  // 64 elements of 2 bytes: one row of a swizzle
constexpr int kPart = 16;                   // K of one wgmma
constexpr int kCluster = 2;                 // blocks of neighbouring rows that share b
constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
constexpr int kConsumerWarps = 4 * kConsumers;
constexpr int kSlabs = 2, kSlabBytes = 16 * 128;  // a warp's staging: 16 rows x 64 columns each

template <int kBlockN>
struct Layout {
  static constexpr int a_bytes = kBlockM * kBlockK * 2, b_bytes = kBlockN * kBlockK * 2;
  static constexpr int stage_bytes = a_bytes + b_bytes;
  static constexpr int stages = 192 * 1024 / stage_bytes;
  static constexpr int staging = stages * stage_bytes;
  static constexpr int barriers = staging + kConsumerWarps * kSlabs * kSlabBytes;
  static constexpr int bytes = barriers + 2 * stages * 8 + 1024;  // to align the base
};
static_assert(Layout<256>::bytes <= 227 * 1024 && Layout<128>::bytes <= 227 * 1024);

struct Arguments {
  CUtensorMap a[kGemmSegments], b[kGemmSegments], out, z;
  int steps_of[kGemmSegments];  // K steps of each segment
  int segments, steps;          // the sum of theirs
  int tiles_m, tiles_n;         // in clusters along M
  int n;
  bool accumulate;
  const void* bias;
  const float* gain;  // with z
};

// First row and column of a block's tile. Neighbours in time share a and b in L2: bands of rows.
template <int kBlockN>
__device__ __forceinline__ int2 place_of(const Arguments& args, int tile, int rank) {
  constexpr int kBand = 8;
  const int band = tile / (kBand * args.tiles_n), within = tile - band * kBand * args.tiles_n;
  const int high = min(args.tiles_m - band * kBand, kBand);
  const int cluster_m = band * kBand + within % high;
  return make_int2((cluster_m * kCluster + rank) * kBlockM, within / high * kBlockN);
}

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// One thread: all loads of the block's tiles.
template <int kBlockN, bool kRowsAreN>
__device__ __forceinline__ void produce(const Arguments& args, uint32_t base, int rank) {
  using L = Layout<kBlockN>;
  constexpr int kShare = kBlockN / kCluster;  // columns of b that this block loads
  constexpr uint16_t kAll = (1 << kCluster) - 1;
  Ring<L::stages> ring;
  for (int tile = blockIdx.x / kCluster; tile < args.tiles_m * args.tiles_n;
       tile += gridDim.x / kCluster) {
    const int2 place = place_of<kBlockN>(args, tile, rank);
    for (int s = 0; s < args.segments; ++s) {
      for (int step = 0; step < args.steps_of[s]; ++step, ring.advance()) {
        const uint32_t full = base + L::barriers + 8 * ring.stage, empty = full + 8 * L::stages;
        const uint32_t a = base + ring.stage * L::stage_bytes;
        const uint32_t b = a + L::a_bytes + rank * (L::b_bytes / kCluster);
        const int k = step * kBlockK, n = place.y + rank * kShare;
        barrier_wait(empty, ring.phase ^ 1);
        barrier_arrive_expect(full, L::stage_bytes);
        tensor_load(a, &args.a[s], k, place.x, full);
        if constexpr (kRowsAreN) {
          tensor_load_multicast(b, &args.b[s], k, n, full, kAll);
        } else {
#pragma unroll
          for (int i = 0; i < kShare / 64; ++i)
            tensor_load_multicast(b + i * 64 * kBlockK * 2, &args.b[s], n + 64 * i, k, full, kAll);
        }
      }
    }
  }
}

// 64 columns of a tile as pairs of T, from how wgmma holds them.
template <typename T>
__device__ __forceinline__ void pack_slab(uint32_t* pairs, const float* acc) {
#pragma unroll
  for (int i = 0; i < 16; ++i) pairs[i] = pack<T>(acc[2 * i], acc[2 * i + 1]);
}

// A warp's staging and what it stores from there.
struct Staging {
  uint32_t slabs;
  int turn = 0;

  // 16 rows of 64 columns to the matrix behind `map`.
  __device__ __forceinline__ void store(const CUtensorMap* map, bool add, const uint32_t* pairs,
                                        int row, int col) {
    const int lane = threadIdx.x % 32;
    const uint32_t slab = slabs + turn * kSlabBytes;
    if (lane == 0) store_wait_read<kSlabs - 1>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t chunk = (2 * i + lane / 16) ^ (lane % 8);
      matrix_store(slab + lane % 16 * 128 + chunk * 16, pairs[4 * i], pairs[4 * i + 1],
                   pairs[4 * i + 2], pairs[4 * i + 3]);
    }
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) {
      add ? tensor_add(map, slab, col, row) : tensor_store(map, slab, col, row);
      store_commit();
    }
    turn = turn + 1 == kSlabs ? 0 : turn + 1;
  }
};

// acc = gain∘acc + bias in 64 columns; all loads before the first use. Past the last column,
// which is not stored, the last one's values serve.
template <typename T>
__device__ __forceinline__ void scale_and_shift(const Arguments& args, float* acc, int col) {
  const T* bias = static_cast<const T*>(args.bias);
  const auto column = [&](int j) { return min(col + 8 * j + 2 * int(threadIdx.x % 4), args.n - 2); };
  if (args.gain) {
    float2 g[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) g[j] = *reinterpret_cast<const float2*>(args.gain + column(j));
#pragma unroll
    for (int i = 0; i < 32; ++i) acc[i] *= i % 2 ? g[i / 4].y : g[i / 4].x;
  }
  if (bias) {
    uint32_t b[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) b[j] = *reinterpret_cast<const uint32_t*>(bias + column(j));
#pragma unroll
    for (int i = 0; i < 32; ++i) acc[i] += i % 2 ? unpack<T>(b[i / 4]).y : unpack<T>(b[i / 4]).x;
  }
}

// Lines of bias and gain that the end of a tile will read.
template <typename T, int kBlockN>
__device__ __forceinline__ void prefetch_vectors(const Arguments& args, int col) {
  const int line = threadIdx.x % 128, n = col + line * (128 / sizeof(float));
  if (args.gain && line < kBlockN / 32 && n < args.n) prefetch_l1(args.gain + n);
  if (args.bias && line < kBlockN / 32 && n < args.n)
    prefetch_l1(static_cast<const T*>(args.bias) + n);  // each line of it twice
}

// One warpgroup: the products and the stores of its rows of the block's tiles.
template <typename T, int kBlockN, bool kRowsAreN>
__device__ __forceinline__ void consume(const Arguments& args, uint32_t base, int rank) {
  using L = Layout<kBlockN>;
  const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const uint32_t full = base + L::barriers;
  // One lane of every warp tells one block of the cluster that a stage has been read.
  const uint32_t empty = cluster_address(full + 8 * L::stages, lane % kCluster);
  const auto release = [&](int stage) {
    if (lane < kCluster) barrier_arrive_cluster(empty + 8 * stage);
  };
  Ring<L::stages> ring;
  float acc[kBlockN / 2];
  // The tile before, rounded: its stores go out behind the first products of this one.
  constexpr int kParts = kBlockN / 64;
  uint32_t held[kBlockN / 4];
  int held_row = -1, held_col = 0;
  Staging staging{base + L::staging + warp * kSlabs * kSlabBytes};
  const auto store_held = [&](int part) {
    staging.store(&args.out, args.accumulate, held + 16 * part, held_row, held_col + 64 * part);
  };

  for (int tile = blockIdx.x / kCluster; tile < args.tiles_m * args.tiles_n;
       tile += gridDim.x / kCluster) {
    const int2 place = place_of<kBlockN>(args, tile, rank);
    prefetch_vectors<T, kBlockN>(args, place.y);
    int before = 0;  // the stage of the step before, whose product may still run
    for (int step = 0; step < args.steps; ++step) {
      barrier_wait(full + 8 * ring.stage, ring.phase);
      const uint32_t stage = base + ring.stage * L::stage_bytes;
      const uint64_t a = matrix_descriptor(stage + group * 64 * 128, 0, 1024);
      const uint64_t b = matrix_descriptor(stage + L::a_bytes, kBlockK * 128, 1024);
      constexpr uint64_t kNextA = kPart * 2 >> 4;
      constexpr uint64_t kNextB = (kRowsAreN ? kPart * 2 : kPart * 128) >> 4;
      wgmma_fence();
#pragma unroll
      for (int part = 0; part < kBlockK / kPart; ++part)
        wgmma<T, !kRowsAreN>(acc, a + part * kNextA, b + part * kNextB, step + part > 0);
      wgmma_commit();
      if (step < kParts && held_row >= 0) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          if (part == step) store_held(part);
      }
      wgmma_wait<1>();
      if (step > 0) release(before);
      before = ring.stage;
      ring.advance();
    }
    wgmma_wait<0>();
    release(before);
    keep_below(acc);

#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part >= args.steps && held_row >= 0) store_held(part);
      const int row = place.x + warp * 16, col = place.y + 64 * part;
      if (args.gain) {
        uint32_t pairs[16];
        pack_slab<T>(pairs, acc + 32 * part);
        staging.store(&args.z, false, pairs, row, col);
      }
      if (args.gain || args.bias) scale_and_shift<T>(args, acc + 32 * part, col);
      pack_slab<T>(held + 16 * part, acc + 32 * part);
    }
    held_row = place.x + warp * 16;
    held_col = place.y;
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) store_held(part);
  if (lane == 0) store_wait_all();
}

template <typename T, int kBlockN, bool kRowsAreN>
__global__ __launch_bounds__(kThreads, 1) void gemm_kernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kBlockN>;
  extern __shared__ uint8_t shared[];
  const uint32_t base =
      (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + 1023) / 1024 * 1024;
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < L::stages; ++stage) {
      barrier_init(base + L::barriers + 8 * stage, 1);
      barrier_init(base + L::barriers + 8 * (L::stages + stage), kConsumerWarps * kCluster);
    }
    barrier_init_fence();
  } else if (threadIdx.x >= 32 && threadIdx.x < 32 + args.segments) {
    tensor_map_prefetch(&args.a[threadIdx.x - 32]);
    tensor_map_prefetch(&args.b[threadIdx.x - 32]);
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    registers_lower<40>();
    if (threadIdx.x == 0) produce<kBlockN, kRowsAreN>(args, base, rank);
  } else {
    registers_raise<232>();
    consume<T, kBlockN, kRowsAreN>(args, base, rank);
  }
  cluster_sync();  // the other block of the cluster still arrives at this one's barriers
#endif
}

// ---- host

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// From the driver that is loaded, so that the library needs no link to it.
Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "gemm: the driver has no tensor maps");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

bool is_brain(const View& m) { return m.scalar_type() == ScalarType::BFloat16; }

// Boxes of `rows` rows and 64 columns of a matrix with contiguous rows.
void encode(CUtensorMap& map, const View& m, int rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.size(1)),
                              static_cast<cuuint64_t>(m.size(0))};
  const cuuint64_t stride = static_cast<cuuint64_t>(m.stride(0)) * 2;
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(rows)}, steps[] = {1, 1};
  const CUresult result = encoder()(
      &map, is_brain(m) ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(m.const_data_ptr()), sizes, &stride, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "gemm: cuTensorMapEncodeTiled failed with ",
                  static_cast<int>(result));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

int tiles(int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); }

template <typename T, int kBlockN, bool kRowsAreN>
void launch(const Gemm& gemm, int multiprocessors) {
  Arguments args;
  args.segments = static_cast<int>(gemm.segments.size());
  args.steps = 0;
  for (int s = 0; s < args.segments; ++s) {
    const GemmSegment& segment = gemm.segments[s];
    encode(args.a[s], segment.a, kBlockM);
    encode(args.b[s], segment.b, kRowsAreN ? kBlockN / kCluster : kBlockK);
    args.steps_of[s] = tiles(segment.a.size(1), kBlockK);
    args.steps += args.steps_of[s];
  }
  encode(args.out, gemm.out, 16);
  if (gemm.z) encode(args.z, *gemm.z, 16);
  args.tiles_m = tiles(gemm.out.size(0), kBlockM * kCluster);
  args.tiles_n = tiles(gemm.out.size(1), kBlockN);
  args.n = static_cast<int>(gemm.out.size(1));
  args.accumulate = gemm.accumulate;
  args.bias = gemm.bias ? gemm.bias->const_data_ptr() : nullptr;
  args.gain = gemm.gain ? static_cast<const float*>(gemm.gain->const_data_ptr()) : nullptr;

  const int device = gemm.out.get_device_index();
  const auto kernel = gemm_kernel<T, kBlockN, kRowsAreN>;
  constexpr int kBytes = Layout<kBlockN>::bytes;
  static std::atomic<uint64_t> prepared{0};  // a bit for each device
  if (!(prepared >> device & 1)) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    prepared |= uint64_t(1) << device;
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(
      kCluster * std::min(args.tiles_m * args.tiles_n, multiprocessors / kCluster));
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
}

// Narrow tiles take half the time of wide ones and a fifth more, which pays where they fill
// multiprocessors that wide ones leave idle.
template <typename T, bool kRowsAreN>
void launch(const Gemm& gemm) {
  const int count = attribute(cudaDevAttrMultiProcessorCount, gemm.out.get_device_index());
  const auto rounds = [&](int width) {
    const int64_t rows = tiles(gemm.out.size(0), kBlockM * kCluster);
    return tiles(rows * tiles(gemm.out.size(1), width), count / kCluster);
  };
  const bool narrow = 12 * rounds(128) < 20 * rounds(256);
  if (narrow)
    launch<T, 128, kRowsAreN>(gemm, count);
  else
    launch<T, 256, kRowsAreN>(gemm, count);
}

// The copy engine takes it: contiguous rows at multiples of 16 bytes.
bool fits(const View& m, const View& like, int64_t rows, int64_t cols) {
  return m.size(0) == rows && m.size(1) == cols && m.is_cuda() &&
         m.scalar_type() == like.scalar_type() && m.stride(1) == 1 && m.stride(0) >= cols &&
         m.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(m.const_data_ptr()) % 16 == 0;
}

bool fits(const Tensor& v, ScalarType dtype, int64_t count) {
  return v.dim() == 1 && v.size(0) == count && v.is_cuda() && v.scalar_type() == dtype &&
         v.is_contiguous() && reinterpret_cast<uintptr_t>(v.const_data_ptr()) % 8 == 0;
}

}  // namespace

namespace lora_fused {

bool gemm_sm90_serves(const Gemm& gemm) {
  const View& out = gemm.out;
  if (!out.is_cuda() || gemm.segments.empty() ||
      gemm.segments.size() > kGemmSegments)
    return false;
  const ScalarType dtype = out.scalar_type();
  const int64_t m = out.size(0), n = out.size(1), limit = int64_t(1) << 22;
  if (!(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) || m < 1 || n < 1 ||
      m > limit || n > limit || n % 8 != 0 || !fits(out, out, m, n))
    return false;
  for (const GemmSegment& segment : gemm.segments) {
    const int64_t k = segment.a.size(1);
    if (k < 1 || k > limit || !fits(segment.a, out, m, k)) return false;
    if (!(gemm.b_rows_are_n ? fits(segment.b, out, n, k) : fits(segment.b, out, k, n)))
      return false;
  }
  if (gemm.bias && !fits(*gemm.bias, dtype, n)) return false;
  if (gemm.gain.has_value() != gemm.z.has_value()) return false;
  if (gemm.gain && !(fits(*gemm.gain, ScalarType::Float, n) && fits(*gemm.z, out, m, n)))
    return false;
  if (gemm.accumulate && (gemm.gain || gemm.bias)) return false;
  const int device = out.get_device_index();
  return attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
}

void gemm_sm90(const Gemm& gemm) {
  if (is_brain(gemm.out))
    gemm.b_rows_are_n ? launch<__nv_bfloat16, true>(gemm) : launch<__nv_bfloat16, false>(gemm);
  else
    gemm.b_rows_are_n ? launch<__half, true>(gemm) : launch<__half, false>(gemm);
}

}  // namespace lora_fused

void gemm_cuda(lora_fused::Tensors a, lora_fused::Tensors b, bool b_rows_are_n, Tensor out,
               std::optional<Tensor> bias, std::optional<Tensor> gain, std::optional<Tensor> z,
               bool accumulate) {
  STD_TORCH_CHECK(a.size() == b.size(), "gemm: ", a.size(), " matrices a for ", b.size(), " b");
  for (const auto* matrices : {&a, &b})
    for (const Tensor& m : *matrices) STD_TORCH_CHECK(m.dim() == 2, "gemm: a and b must be matrices");
  STD_TORCH_CHECK(out.dim() == 2 && (!z || z->dim() == 2), "gemm: out and z must be matrices");
  Gemm gemm{{}, b_rows_are_n, out, accumulate, bias, gain, z ? lora_fused::MaybeView(*z) : std::nullopt};
  for (size_t i = 0; i < a.size(); ++i) gemm.segments.push_back({a[i], b[i]});
  STD_TORCH_CHECK(lora_fused::gemm_sm90_serves(gemm),
                  "gemm: not for this device, these dtypes, shapes or strides");
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  lora_fused::gemm_sm90(gemm);
}
