// Marks functions that the CPU ops and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define LORA_FUSED_HD __host__ __device__ __forceinline__
#else
#define LORA_FUSED_HD inline
#endif
