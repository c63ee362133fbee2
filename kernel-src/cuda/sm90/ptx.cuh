// Hopper's instructions that a matrix product needs, one function each: mbarriers, bulk tensor copies (TMA), warpgroup
// products (wgmma), matrix stores, clusters. Shared memory addresses are 32-bit, of the shared window. PTX ISA 8.0,
// sections "mbarrier", "cp.async.bulk.tensor", "wgmma".
//
// How the kernels of this folder use them:
//
// Ring of stages. One thread, the producer, asks TMA for tiles; consumer warpgroups multiply them. Each stage has two
// mbarriers: `full` completes when the tile's bytes have arrived (one arrival, by the producer, which announces the
// bytes), `empty` when every consumer warp has read the stage. A barrier's phases alternate between parity 0 and 1, and
// `barrier_wait` returns at once for the parity before the current phase: so the producer begins by waiting for parity
// 1, which a new barrier has behind it, and both sides flip their parity each time around the ring.
//
// Swizzle. A row of 64 half-precision elements is 128 bytes, eight chunks of 16. TMA stores chunk c of row r at c ^ (r
// % 8), and wgmma undoes it, so that neither meets bank conflicts. Eight rows, 1024 bytes, are one period: bases are
// aligned to it. Code that touches a tile itself (masks, stores) applies the same exclusive or.
//
// wgmma. Four warps multiply asynchronously from shared memory into registers: `wgmma_fence` orders earlier writes of
// the accumulator before it, `wgmma_commit` closes a group, `wgmma_wait<n>` waits until at most n groups run. A stage
// is released only after the wait that covers its products. The compiler does not know that registers change meanwhile:
// `keep_below` pins their uses below the wait.
//
// Proxies. TMA and wgmma see shared memory through the asynchronous proxy: what threads write there must be followed by
// `async_proxy_fence` before either reads it.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace lora_fused::sm90 {

// ---- mbarriers

// A barrier whose phases complete after so many arrivals, and after the bytes that were announced in them.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the cluster and to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// An arrival that announces bytes: the phase completes when TMA has written as many.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// An arrival at a barrier of this block. Orders this thread's reads before it: the stage may be written again.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// `barrier` of any block of the cluster, from cluster_address. Orders no ordinary writes for other
// blocks: a release at cluster scope would cost a fence of global memory.
__device__ __forceinline__ void barrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Until the phase of this parity has completed.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- clusters

// This block's place in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}

// The address in the shared memory of block `rank` that `address` has here.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// A number at an address of cluster_address.
__device__ __forceinline__ int cluster_load_int(uint32_t address) {
  int x;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

// Four floats at an address of cluster_address.
__device__ __forceinline__ float4 cluster_load(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// All threads of all blocks of the cluster, with their writes to shared memory. No block may end while others still
// read its memory or arrive at its barriers.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- bulk tensor copies; coordinates innermost first, out of bounds reads 0 and writes nothing

// The map is a kernel parameter of 128 bytes, read by the first copy that uses it.
__device__ __forceinline__ void tensor_map_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// One box of the map to shared memory; its bytes, outside of the matrix too, complete on `barrier`.
__device__ __forceinline__ void tensor_load(uint32_t to, const CUtensorMap* map, int inner, int outer,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(inner), "r"(outer), "r"(barrier)
      : "memory");
}

// To the same place in every block of `blocks`, completing on each one's own barrier.
__device__ __forceinline__ void tensor_load_multicast(uint32_t to, const CUtensorMap* map, int inner, int outer,
                                                      uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(inner), "r"(outer), "r"(barrier), "h"(blocks)
      : "memory");
}

// One box from shared memory, in this thread's open group of stores.
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, uint32_t from, int inner, int outer) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(inner),
               "r"(outer), "r"(from)
               : "memory");
}

// The same, added to what is there: in the matrix's dtype, one rounding an element.
__device__ __forceinline__ void tensor_add(const CUtensorMap* map, uint32_t from, int inner, int outer) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(inner), "r"(outer), "r"(from)
               : "memory");
}

// Closes the group.
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's groups of stores still read shared memory.
template <int kPending>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until all stores of this thread are done: before the block ends.
__device__ __forceinline__ void store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// What this thread wrote to shared memory is seen by the copy engine.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- global memory between the blocks of a grid

// Takes a number of its own from a counter; orders nothing.
__device__ __forceinline__ int counter_take(int* counter) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Counts one. What this thread knows is written (also of other threads, by a barrier) is seen by who counts later or waits
// for the count, and the other way round.
__device__ __forceinline__ void counter_add(int* counter) {
  [[maybe_unused]] int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
}

// Until so many have counted: what they had written before is seen.
__device__ __forceinline__ void counter_wait(const int* counter, int wanted) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < wanted);
}

// Between accesses by ordinary loads and stores and those by the copy engine, of global memory too, on the way from the
// one to the other.
__device__ __forceinline__ void any_proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }

// ---- registers, matrix stores, caches

__device__ __forceinline__ void prefetch_l1(const void* line) { asm volatile("prefetch.global.L1 [%0];" ::"l"(line)); }

// Registers move between warpgroups: all warps of one run this together. The producer gives its own to the consumers,
// whose accumulators need more than an even share.
template <int kRegisters>
__device__ __forceinline__ void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Two neighbouring elements of T, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t both;
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t both) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
  else
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void matrix_store(uint32_t row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m0), "r"(m1), "r"(m2),
               "r"(m3)
               : "memory");
}

// ---- warpgroup products

// Descriptor of a matrix in 128-byte swizzled shared memory, `stride` bytes between groups of 8
// rows. `leading`: bytes between blocks of 64 elements along M or N, for matrices that are
// contiguous along M or N; not read for those contiguous along K.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(1) << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No use of acc moves above this point.
template <int kCount>
__device__ __forceinline__ void keep_below(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

#define WGMMA_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_REGISTERS_16 \
  WGMMA_REGISTERS_8        \
  ", "                     \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_REGISTERS_32 \
  WGMMA_REGISTERS_16       \
  ", "                     \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGISTERS_48 \
  WGMMA_REGISTERS_32       \
  ", "                     \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_REGISTERS_64 \
  WGMMA_REGISTERS_48       \
  ", "                     \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_REGISTERS_128                                                                          \
  WGMMA_REGISTERS_64                                                                                 \
  ", "                                                                                               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "  \
  "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "      \
  "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, " \
  "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_OUT_8(d, i)                                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define WGMMA_OUT_16(d, i) WGMMA_OUT_8(d, i), WGMMA_OUT_8(d, i + 8)
#define WGMMA_OUT_32(d, i) WGMMA_OUT_16(d, i), WGMMA_OUT_16(d, i + 16)
#define WGMMA_OUT_48(d, i) WGMMA_OUT_32(d, i), WGMMA_OUT_16(d, i + 32)
#define WGMMA_OUT_64(d, i) WGMMA_OUT_32(d, i), WGMMA_OUT_32(d, i + 32)
#define WGMMA_OUT_128(d, i) WGMMA_OUT_64(d, i), WGMMA_OUT_64(d, i + 64)

// OPERANDS: "%a, %b, p, 1, 1, %s, %t;" with the numbers that follow those of the accumulator.
#define WGMMA_OF(COLUMNS, TYPE, COUNT, KEEP, OPERANDS)                                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " KEEP                                                          \
               ", 0;\n"                                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" WGMMA_REGISTERS_##COUNT \
               "}, " OPERANDS "\n}\n"                                                                            \
               : WGMMA_OUT_##COUNT(acc, 0)                                                                       \
               : "l"(a), "l"(b), "r"(keep), "n"(kTransposeA), "n"(kTransposeB))
#define WGMMA(COLUMNS, COUNT, KEEP, OPERANDS)         \
  if constexpr (std::is_same_v<T, __nv_bfloat16>)     \
    WGMMA_OF(COLUMNS, "bf16", COUNT, KEEP, OPERANDS); \
  else                                                \
    WGMMA_OF(COLUMNS, "f16", COUNT, KEEP, OPERANDS)

// acc [64, N] (+)= a [64, 16] b [16, N], N = 2 kCount; keep = 0 overwrites acc. kTransposeA: a is
// contiguous along M; kTransposeB: b along N. Thread l of warp w holds rows 16 w + l / 4 (+ 8 in
// elements 4 j + 2 and + 3) and columns 8 j + 2 (l % 4) (+ 1 in odd elements).
template <typename T, int kTransposeA, int kTransposeB, int kCount>
__device__ __forceinline__ void wgmma(float (&acc)[kCount], uint64_t a, uint64_t b, int keep) {
  static_assert(kCount == 8 || kCount == 16 || kCount == 32 || kCount == 48 || kCount == 64 || kCount == 128);
  if constexpr (kCount == 8) {
    WGMMA("16", 8, "%10", "%8, %9, p, 1, 1, %11, %12;");
  } else if constexpr (kCount == 16) {
    WGMMA("32", 16, "%18", "%16, %17, p, 1, 1, %19, %20;");
  } else if constexpr (kCount == 32) {
    WGMMA("64", 32, "%34", "%32, %33, p, 1, 1, %35, %36;");
  } else if constexpr (kCount == 48) {
    WGMMA("96", 48, "%50", "%48, %49, p, 1, 1, %51, %52;");
  } else if constexpr (kCount == 64) {
    WGMMA("128", 64, "%66", "%64, %65, p, 1, 1, %67, %68;");
  } else if constexpr (kCount == 128) {
    WGMMA("256", 128, "%130", "%128, %129, p, 1, 1, %131, %132;");
  }
}

#undef WGMMA
#undef WGMMA_OF
#undef WGMMA_OUT_8
#undef WGMMA_OUT_16
#undef WGMMA_OUT_32
#undef WGMMA_OUT_48
#undef WGMMA_OUT_64
#undef WGMMA_OUT_128
#undef WGMMA_REGISTERS_8
#undef WGMMA_REGISTERS_16
#undef WGMMA_REGISTERS_32
#undef WGMMA_REGISTERS_48
#undef WGMMA_REGISTERS_64
#undef WGMMA_REGISTERS_128

}  // namespace lora_fused::sm90
