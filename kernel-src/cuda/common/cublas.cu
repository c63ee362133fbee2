// cuBLAS without what torch's own matrix product puts around it: a third less host time a product.
//
// The function is taken from the cuBLAS that torch has loaded, whose handle carries torch's current
// stream, workspace and precision settings.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <library_types.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <limits>

#include "../../common/kernels.h"

namespace {

using lora_fused::MatrixView;
using torch::headeronly::ScalarType;

// As in cublas_api.h, whose headers a build need not have.
constexpr int kOpN = 0, kOpT = 1, kCompute32F = 68, kDefaultAlgorithm = -1;
using GemmEx = int (*)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                       cudaDataType a_type, int lda, const void* b, cudaDataType b_type, int ldb, const void* beta,
                       void* c, cudaDataType c_type, int ldc, int compute, int algorithm);

GemmEx find_gemm() {
  if (void* function = dlsym(RTLD_DEFAULT, "cublasGemmEx")) return reinterpret_cast<GemmEx>(function);
  for (const char* name : {"libcublas.so.13", "libcublas.so.12"})
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD))
      if (void* function = dlsym(library, "cublasGemmEx")) return reinterpret_cast<GemmEx>(function);
  return nullptr;
}

cudaDataType type_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? CUDA_R_16BF : dtype == ScalarType::Half ? CUDA_R_16F : CUDA_R_32F;
}

// A row-major matrix is its transpose to cuBLAS.
struct Operand {
  int op;
  int64_t stride;
  bool valid;

  explicit Operand(const MatrixView& m) {
    const bool by_rows = m.stride(1) == 1 || m.size(1) == 1;
    op = by_rows ? kOpN : kOpT;
    stride = by_rows ? m.stride(0) : m.stride(1);
    const int64_t least = by_rows ? m.size(1) : m.size(0);
    valid = (by_rows || m.stride(0) == 1) && stride >= least && stride <= std::numeric_limits<int>::max();
  }
};

}  // namespace

bool lora_fused::cublas_gemm(const MatrixView& out, const MatrixView& a, const MatrixView& b, float alpha, float beta) {
  static const GemmEx gemm = find_gemm();
  const auto dtype = a.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  const int64_t m = out.size(0), n = out.size(1), k = a.size(1), most = std::numeric_limits<int>::max();
  if (gemm == nullptr || !half || b.scalar_type() != dtype || m > most || n > most || k > most) return false;
  if (out.scalar_type() != dtype && out.scalar_type() != ScalarType::Float) return false;
  if (m == 0 || n == 0) return true;
  const Operand left(a), right(b), to(out);
  if (k == 0 || !left.valid || !right.valid || !to.valid || to.op != kOpN) return false;
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  const int status =
      gemm(handle, right.op, left.op, static_cast<int>(n), static_cast<int>(m), static_cast<int>(k), &alpha,
           b.const_data_ptr(), type_of(dtype), static_cast<int>(right.stride), a.const_data_ptr(), type_of(dtype),
           static_cast<int>(left.stride), &beta, out.mutable_data_ptr(), type_of(out.scalar_type()),
           static_cast<int>(to.stride), kCompute32F, kDefaultAlgorithm);
  STD_TORCH_CHECK(status == 0, "cublasGemmEx: status ", status);
  return true;
}
