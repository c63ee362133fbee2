// LoRA projections of one input as a chain of library products, one op a direction.
//
//   t = s·dropout(x) Aᵀ     y = x Wᵀ + t Bᵀ + b
//   dt = s·dy B     dx += dy W + dropout(dt A)     dA = dtᵀ dropout(x)     dB = dyᵀ t
//
// for the members of a batch, whose A's stand below each other, so that x is read once for all t
// and once for all dA. What Python and the dispatcher would cost between products is saved; the
// arithmetic is that of reference.py. x [M, K], weight [N, K], A [R, K], B [N, R]; A and B of any
// dtype are converted to x's, all in one launch. y is given as [*lead, N],
// dy taken as [..., N]. Strided operands go to the library as they are.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../../torch-ext/torch_binding.h"
#include "dropout.h"
#include "lora_batch.h"

#if defined(CUDA_KERNEL)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

Tensor view(const Tensor& base, int64_t rows, int64_t cols, int64_t row_stride,
            int64_t col_stride, int64_t offset) {
  const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(base.get(), 2, sizes, strides, offset, &handle));
  return Tensor(handle);
}

Tensor transposed(const Tensor& m) {
  return view(m, m.size(1), m.size(0), m.stride(1), m.stride(0), 0);
}

Tensor rows_of(const Tensor& m, int64_t first, int64_t count) {
  return view(m, count, m.size(1), m.stride(0), m.stride(1), first * m.stride(0));
}

Tensor columns_of(const Tensor& m, int64_t first, int64_t count) {
  return view(m, m.size(0), count, m.stride(0), m.stride(1), first * m.stride(1));
}

// [..., N] as [M, N]; a copy only of what is not contiguous.
Tensor matrix(const Tensor& dy, int64_t rows) {
  const Tensor whole = dy.is_contiguous() ? dy : torch::stable::contiguous(dy);
  const int64_t cols = dy.size(dy.dim() - 1);
  return view(whole, rows, cols, cols, 1, 0);
}

// out = beta·add + alpha·a b; add may be out itself, and is not read at beta = 0.
void addmm(const Tensor& out, const Tensor& add, const Tensor& a, const Tensor& b, double beta,
           double alpha) {
#if defined(CUDA_KERNEL)
  if (out.is_cuda()) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_addmm_out(out.get(), add.get(), a.get(), b.get(), beta, alpha));
    return;
  }
#endif
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), add.get(), a.get(), b.get(), beta, alpha));
}

void mm(const Tensor& out, const Tensor& a, const Tensor& b) {
#if defined(CUDA_KERNEL)
  if (out.is_cuda()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
    return;
  }
#endif
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// Straight from the allocator, past the dispatcher.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                  sizes.data(), strides.data(), code,
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor empty(const Tensor& like, int64_t rows, int64_t cols, ScalarType dtype) {
  return empty(like, std::vector<int64_t>{rows, cols}, dtype);
}

// float64 has no kernel of ours: it is there to check results.
void cast_all(const std::vector<lora_fused::Cast>& casts) {
  std::vector<lora_fused::Cast> fused;
  for (const auto& cast : casts) {
    const bool exact = cast.from.scalar_type() == ScalarType::Double ||
                       cast.to.scalar_type() == ScalarType::Double;
    if (cast.to.is_cuda() && !exact)
      fused.push_back(cast);
    else
      TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(cast.to.get(), cast.from.get(), 0));
  }
#if defined(CUDA_KERNEL)
  if (!fused.empty()) lora_fused::cast_all_cuda(fused);
#endif
}

void drop(const Tensor& x, const Tensor& seed, double p, const Tensor& out, bool accumulate) {
#if defined(CUDA_KERNEL)
  if (x.is_cuda()) return dropout_cuda(x, seed, p, out, accumulate);
#endif
  dropout_cpu(x, seed, p, out, accumulate);
}

// The adapters of a batch in x's dtype: all A's as one matrix [Σ R, K], and every B.
struct Adapters {
  Tensors each_a, b;
  std::optional<Tensor> a;
  std::vector<int64_t> first;  // of each member's ranks, and their total at the end

  Adapters(const Tensor& x, const Tensors& lora_a, const Tensors& lora_b, bool need_a,
           bool need_b) {
    const ScalarType dtype = x.scalar_type();
    std::vector<lora_fused::Cast> casts;
    first.push_back(0);
    for (const auto& member : lora_a) first.push_back(first.back() + member.size(0));
    if (need_a) {
      if (lora_a.size() == 1 && lora_a[0].scalar_type() == dtype) {
        a = lora_a[0];
      } else {
        a = empty(x, first.back(), x.size(1), dtype);
        for (size_t i = 0; i < lora_a.size(); ++i)
          casts.push_back({torch::stable::contiguous(lora_a[i]),
                           rows_of(*a, first[i], lora_a[i].size(0))});
      }
    }
    for (const auto& member : lora_b) {
      if (!need_b || member.scalar_type() == dtype) {
        b.push_back(member);
      } else {
        b.push_back(empty(x, member.size(0), member.size(1), dtype));
        casts.push_back({torch::stable::contiguous(member), b.back()});
      }
    }
    if (!casts.empty()) cast_all(casts);
  }

  int64_t ranks() const { return first.back(); }
  int64_t rank(size_t i) const { return first[i + 1] - first[i]; }
};

bool all_equal(const std::vector<double>& values) {
  for (double value : values)
    if (value != values[0]) return false;
  return true;
}

#if defined(CUDA_KERNEL)
using Guard = std::optional<torch::stable::accelerator::DeviceGuard>;
void enter(Guard& guard, const Tensor& x) {
  if (x.is_cuda()) guard.emplace(x.get_device_index());
}
#else
struct Guard {};
void enter(Guard&, const Tensor&) {}
#endif

Tensor dropped(const Tensor& x, const std::optional<Tensor>& seed, double p) {
  if (!seed) return x;
  Tensor d = empty(x, x.size(0), x.size(1), x.scalar_type());
  drop(x, *seed, p, d, /*accumulate=*/false);
  return d;
}

}  // namespace

std::tuple<Tensors, Tensors> lora_forward(const Tensor& x, Tensors weights,
                                          std::vector<std::optional<Tensor>> biases,
                                          Tensors lora_a, Tensors lora_b,
                                          std::vector<double> scalings,
                                          std::optional<Tensor> seed, double p,
                                          std::vector<int64_t> lead) {
  Guard guard;
  enter(guard, x);
  const int64_t m = x.size(0);
  Tensors results, ys, ts;
  lead.push_back(0);
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t n = weights[i].size(0);
    lead.back() = n;
    results.push_back(empty(x, lead, x.scalar_type()));
    const Tensor y = view(results.back(), m, n, n, 1, 0);
    if (biases[i])
      addmm(y, *biases[i], x, transposed(weights[i]), 1.0, 1.0);
    else
      mm(y, x, transposed(weights[i]));
    ys.push_back(y);
  }
  if (lora_a.empty()) return {results, ts};

  const Adapters adapters(x, lora_a, lora_b, true, true);
  const Tensor d = dropped(x, seed, p);
  Tensor t = empty(x, m, adapters.ranks(), x.scalar_type());
  if (all_equal(scalings)) {
    addmm(t, t, d, transposed(*adapters.a), 0.0, scalings[0]);
  } else {
    for (size_t i = 0; i < lora_a.size(); ++i) {
      const Tensor part = columns_of(t, adapters.first[i], adapters.rank(i));
      const Tensor a = rows_of(*adapters.a, adapters.first[i], adapters.rank(i));
      addmm(part, part, d, transposed(a), 0.0, scalings[i]);
    }
  }
  for (size_t i = 0; i < lora_b.size(); ++i)
    addmm(ys[i], ys[i], columns_of(t, adapters.first[i], adapters.rank(i)),
          transposed(adapters.b[i]), 1.0, 1.0);
  ts.push_back(t);
  return {results, ts};
}

std::tuple<Tensors, Tensors, Tensors> lora_backward(
    Tensors dys, const Tensor& x, std::optional<Tensor> t, Tensors weights, Tensors lora_a,
    Tensors lora_b, std::vector<double> scalings, std::optional<Tensor> seed, double p,
    std::optional<Tensor> dx, bool need_dx, std::vector<bool> needs_a,
    std::vector<bool> needs_b) {
  Guard guard;
  enter(guard, x);
  const int64_t m = x.size(0), k = x.size(1);
  const ScalarType dtype = x.scalar_type();
  for (Tensor& dy : dys) dy = matrix(dy, m);
  Tensors new_dx, das, dbs;
  bool need_da = false;
  for (bool need : needs_a) need_da = need_da || need;
  const bool adapted = !lora_a.empty(), need_dt = adapted && (need_dx || need_da);
  const Adapters adapters(x, lora_a, lora_b, adapted && need_dx, need_dt);

  std::optional<Tensor> dt;
  if (need_dt) {
    dt = empty(x, m, adapters.ranks(), dtype);
    for (size_t i = 0; i < dys.size(); ++i) {
      const Tensor part = columns_of(*dt, adapters.first[i], adapters.rank(i));
      addmm(part, part, dys[i], adapters.b[i], 0.0, scalings[i]);
    }
  }
  if (need_dx) {
    for (size_t i = 0; i < dys.size(); ++i) {
      if (dx) {
        addmm(*dx, *dx, dys[i], weights[i], 1.0, 1.0);
      } else {
        dx = empty(x, m, k, dtype);
        new_dx.push_back(*dx);
        mm(*dx, dys[i], weights[i]);
      }
    }
    if (adapted && !seed) addmm(*dx, *dx, *dt, *adapters.a, 1.0, 1.0);
    if (adapted && seed) {
      const Tensor delta = empty(x, m, k, dtype);
      mm(delta, *dt, *adapters.a);
      drop(delta, *seed, p, *dx, /*accumulate=*/true);
    }
  }

  std::vector<lora_fused::Cast> casts;
  const auto give = [&](const Tensor& grad, ScalarType wanted, Tensors& list) {
    if (grad.scalar_type() == wanted) return list.push_back(grad);
    list.push_back(empty(x, grad.size(0), grad.size(1), wanted));
    casts.push_back({grad, list.back()});
  };
  if (need_da) {
    const Tensor da = empty(x, adapters.ranks(), k, dtype);
    mm(da, transposed(*dt), dropped(x, seed, p));
    for (size_t i = 0; i < lora_a.size(); ++i)
      if (needs_a[i])
        give(rows_of(da, adapters.first[i], adapters.rank(i)), lora_a[i].scalar_type(), das);
  }
  for (size_t i = 0; i < lora_b.size(); ++i) {
    if (!needs_b[i]) continue;
    const Tensor db = empty(x, lora_b[i].size(0), lora_b[i].size(1), dtype);
    mm(db, transposed(dys[i]), columns_of(*t, adapters.first[i], adapters.rank(i)));
    give(db, lora_b[i].scalar_type(), dbs);
  }
  if (!casts.empty()) cast_all(casts);
  return {new_dx, das, dbs};
}
