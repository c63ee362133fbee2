// LoRA projections of one input, and gated MLPs of them, as chains of library products: one op a
// direction.
//
//   t = s·dropout(x) Aᵀ     y = x Wᵀ + t Bᵀ + b
//   dt = s·dy B     dx += dy W + dropout(dt A)     dA = dtᵀ dropout(x)     dB = dyᵀ t
//   h = f(gate)·up  between the two groups of a gated MLP
//
// Without dropout the members' A's stand below each other, so that x is read once for all t and
// once for all dA. What Python and the dispatcher would cost between products is saved; the
// arithmetic is that of reference.py. x [..., K], weight [N, K], A [R, K], B [N, R]; A and B of any
// dtype are converted to x's, all in one launch. Strided operands go to the library as they are.
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
#include "lora_group.h"

#if defined(CUDA_KERNEL)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optionals = std::vector<std::optional<Tensor>>;

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

// [*of's leading dimensions, cols].
Tensor empty_as(const Tensor& of, int64_t cols) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < of.dim(); ++d) sizes.push_back(of.size(d));
  sizes.push_back(cols);
  return empty(of, sizes, of.scalar_type());
}

int64_t rows_in(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
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

void run_gated(const lora_fused::Gated& gated) {
#if defined(CUDA_KERNEL)
  if (gated.h.is_cuda()) return lora_fused::gated_cuda(gated);
#endif
  lora_fused::gated_cpu(gated);
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

// The projections of one op's arguments: [first, first + count) of its lists.
struct Members {
  const Tensors& weights;
  const Optionals &lora_a, &lora_b;
  const std::vector<double>& scalings;
  const std::optional<Tensor>& seeds;
  const std::vector<double>& dropouts;
  size_t first, count;

  const Tensor& weight(size_t i) const { return weights[first + i]; }
  const std::optional<Tensor>& a(size_t i) const { return lora_a[first + i]; }
  const std::optional<Tensor>& b(size_t i) const { return lora_b[first + i]; }
  double scaling(size_t i) const { return scalings[first + i]; }
  double dropout(size_t i) const { return dropouts[first + i]; }
  int64_t rank(size_t i) const { return a(i) ? a(i)->size(0) : 0; }

  Tensor seed(size_t i) const {
    const int64_t one = 1;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
        seeds->get(), 1, &one, &one, static_cast<int64_t>(first + i), &handle));
    return Tensor(handle);
  }

  // dropout(x) of a member; x itself where it has none.
  Tensor dropped(const Tensor& x, size_t i) const {
    if (dropout(i) == 0.0) return x;
    Tensor d = empty(x, x.size(0), x.size(1), x.scalar_type());
    drop(x, seed(i), dropout(i), d, /*accumulate=*/false);
    return d;
  }

  // One product serves all t, one all dA.
  bool share_x() const {
    for (size_t i = 0; i < count; ++i)
      if (dropout(i) != 0.0) return false;
    return true;
  }
  bool share_scaling() const {
    std::optional<double> known;
    for (size_t i = 0; i < count; ++i) {
      if (!a(i)) continue;
      if (known && *known != scaling(i)) return false;
      known = scaling(i);
    }
    return true;
  }
  double any_scaling() const {
    for (size_t i = 0; i < count; ++i)
      if (a(i)) return scaling(i);
    return 1.0;
  }
};

// The members' adapters in x's dtype: all A's as one matrix [Σ R, K], and every B.
struct Adapters {
  std::optional<Tensor> a;
  Optionals b;
  std::vector<int64_t> first;  // of each member's ranks, and their total at the end

  Adapters(const Tensor& x, const Members& members, bool need_a, bool need_b) {
    const ScalarType dtype = x.scalar_type();
    std::vector<lora_fused::Cast> casts;
    first.push_back(0);
    for (size_t i = 0; i < members.count; ++i) first.push_back(first.back() + members.rank(i));
    if (need_a && ranks() > 0) {
      for (size_t i = 0; i < members.count; ++i)
        if (members.rank(i) == ranks() && members.a(i)->scalar_type() == dtype) a = *members.a(i);
      if (!a) {
        a = empty(x, ranks(), x.size(1), dtype);
        for (size_t i = 0; i < members.count; ++i)
          if (members.a(i))
            casts.push_back({torch::stable::contiguous(*members.a(i)), a_of(i)});
      }
    }
    for (size_t i = 0; i < members.count; ++i) {
      b.push_back(members.b(i));
      if (!need_b || !b[i] || b[i]->scalar_type() == dtype) continue;
      b[i] = empty(x, b[i]->size(0), b[i]->size(1), dtype);
      casts.push_back({torch::stable::contiguous(*members.b(i)), *b[i]});
    }
    if (!casts.empty()) cast_all(casts);
  }

  int64_t ranks() const { return first.back(); }
  Tensor a_of(size_t i) const { return rows_of(*a, first[i], first[i + 1] - first[i]); }
  Tensor part(const Tensor& t, size_t i) const {
    return columns_of(t, first[i], first[i + 1] - first[i]);
  }
};

// Outputs of all members for x [M, K], shaped as `like` is but for the last dimension; t [M, Σ R].
Tensor forward(Tensors& outputs, const Tensor& x, const Tensor& like, const Members& members,
               const Optionals& biases) {
  const int64_t m = x.size(0);
  Tensors ys;
  for (size_t i = 0; i < members.count; ++i) {
    const int64_t n = members.weight(i).size(0);
    outputs.push_back(empty_as(like, n));
    ys.push_back(view(outputs.back(), m, n, n, 1, 0));
    const auto& bias = biases[members.first + i];
    if (bias)
      addmm(ys[i], *bias, x, transposed(members.weight(i)), 1.0, 1.0);
    else
      mm(ys[i], x, transposed(members.weight(i)));
  }
  const Adapters adapters(x, members, true, true);
  Tensor t = empty(x, m, adapters.ranks(), x.scalar_type());
  if (adapters.ranks() == 0) return t;
  if (members.share_x() && members.share_scaling()) {
    addmm(t, t, x, transposed(*adapters.a), 0.0, members.any_scaling());
  } else {
    for (size_t i = 0; i < members.count; ++i) {
      if (!members.a(i)) continue;
      const Tensor part = adapters.part(t, i);
      addmm(part, part, members.dropped(x, i), transposed(adapters.a_of(i)), 0.0,
            members.scaling(i));
    }
  }
  for (size_t i = 0; i < members.count; ++i)
    if (members.b(i))
      addmm(ys[i], ys[i], adapters.part(t, i), transposed(*adapters.b[i]), 1.0, 1.0);
  return t;
}

// The backward of `forward`, in the two steps that a gated MLP needs apart.
struct Backward {
  const Members& members;
  Optionals dys;  // [M, N], none where an output was not used
  Tensor x;       // for its dtype and shape alone until parameters() is called
  std::vector<bool> needs_a, needs_b;
  bool need_dx;
  Adapters adapters;
  std::optional<Tensor> dt;

  static bool any(const std::vector<bool>& flags, const Members& members) {
    for (size_t i = 0; i < members.count; ++i)
      if (flags[members.first + i]) return true;
    return false;
  }

  Backward(const Members& m, const Optionals& dys_, const Tensor& x_, bool need_dx_,
           const std::vector<bool>& needs_a_, const std::vector<bool>& needs_b_)
      : members(m),
        x(x_),
        needs_a(needs_a_.begin() + m.first, needs_a_.begin() + m.first + m.count),
        needs_b(needs_b_.begin() + m.first, needs_b_.begin() + m.first + m.count),
        need_dx(need_dx_),
        adapters(x_, m, need_dx_, need_dx_ || any(needs_a_, m)) {
    for (size_t i = 0; i < m.count; ++i)
      dys.push_back(dys_[i] ? std::optional<Tensor>(matrix(*dys_[i], x.size(0))) : std::nullopt);
    if (adapters.ranks() == 0 || !(need_dx || any(needs_a_, m))) return;
    dt = empty(x, x.size(0), adapters.ranks(), x.scalar_type());
    for (size_t i = 0; i < m.count; ++i) {
      if (!m.a(i)) continue;
      const Tensor part = adapters.part(*dt, i);
      if (dys[i])
        addmm(part, part, *dys[i], *adapters.b[i], 0.0, m.scaling(i));
      else
        torch::stable::zero_(const_cast<Tensor&>(part));
    }
  }

  // dx [M, K] += all members' parts; written first by the first of them where `fresh`.
  void input(const Tensor& dx, bool fresh) const {
    for (size_t i = 0; i < members.count; ++i) {
      if (!dys[i]) continue;
      if (fresh)
        mm(dx, *dys[i], members.weight(i));
      else
        addmm(dx, dx, *dys[i], members.weight(i), 1.0, 1.0);
      fresh = false;
    }
    if (!dt) return;
    if (members.share_x()) return addmm(dx, dx, *dt, *adapters.a, 1.0, 1.0);
    for (size_t i = 0; i < members.count; ++i) {
      if (!members.a(i) || !dys[i]) continue;
      const Tensor part = adapters.part(*dt, i), a = adapters.a_of(i);
      if (members.dropout(i) == 0.0) {
        addmm(dx, dx, part, a, 1.0, 1.0);
        continue;
      }
      const Tensor delta = empty(x, x.size(0), x.size(1), x.scalar_type());
      mm(delta, part, a);
      drop(delta, members.seed(i), members.dropout(i), dx, /*accumulate=*/true);
    }
  }

  // dA and dB of the members that need them and whose output was used, for x [M, K] and t.
  void parameters(const Tensor& input, const Tensor& t, Tensors& das, Tensors& dbs) const {
    std::vector<lora_fused::Cast> casts;
    const auto give = [&](const Tensor& grad, ScalarType wanted, Tensors& list) {
      if (grad.scalar_type() == wanted) return list.push_back(grad);
      list.push_back(empty(x, grad.size(0), grad.size(1), wanted));
      casts.push_back({grad, list.back()});
    };
    std::optional<Tensor> da;
    for (size_t i = 0; i < members.count; ++i) {
      if (!needs_a[i] || !dys[i]) continue;
      const ScalarType wanted = members.a(i)->scalar_type();
      if (!members.share_x()) {
        const Tensor own = empty(x, members.rank(i), x.size(1), x.scalar_type());
        mm(own, transposed(adapters.part(*dt, i)), members.dropped(input, i));
        give(own, wanted, das);
        continue;
      }
      if (!da) {
        da = empty(x, adapters.ranks(), x.size(1), x.scalar_type());
        mm(*da, transposed(*dt), input);
      }
      give(rows_of(*da, adapters.first[i], members.rank(i)), wanted, das);
    }
    for (size_t i = 0; i < members.count; ++i) {
      if (!needs_b[i] || !dys[i]) continue;
      const Tensor db = empty(x, members.b(i)->size(0), members.rank(i), x.scalar_type());
      mm(db, transposed(*dys[i]), adapters.part(t, i));
      give(db, members.b(i)->scalar_type(), dbs);
    }
    if (!casts.empty()) cast_all(casts);
  }
};

Tensor half_of(const Tensor& both, int64_t half) {
  const int64_t width = both.size(1) / 2;
  return columns_of(both, half * width, width);
}

}  // namespace

std::tuple<Tensors, Tensor> lora_forward(const Tensor& x, Tensors weights, Optionals biases,
                                         Optionals lora_a, Optionals lora_b,
                                         std::vector<double> scalings, std::optional<Tensor> seeds,
                                         std::vector<double> dropouts) {
  Guard guard;
  enter(guard, x);
  const Members members{weights, lora_a, lora_b, scalings, seeds, dropouts, 0, weights.size()};
  Tensors ys;
  Tensor t = forward(ys, matrix(x, rows_in(x)), x, members, biases);
  return {ys, t};
}

std::tuple<Tensors, Tensors, Tensors> lora_backward(
    Optionals dys, const Tensor& x, const Tensor& t, Tensors weights, Optionals lora_a,
    Optionals lora_b, std::vector<double> scalings, std::optional<Tensor> seeds,
    std::vector<double> dropouts, std::optional<Tensor> dx, bool need_dx,
    std::vector<bool> needs_a, std::vector<bool> needs_b) {
  Guard guard;
  enter(guard, x);
  const int64_t m = rows_in(x), k = x.size(x.dim() - 1);
  const Members members{weights, lora_a, lora_b, scalings, seeds, dropouts, 0, weights.size()};
  const Tensor rows = matrix(x, m);
  const Backward backward(members, dys, rows, need_dx, needs_a, needs_b);
  Tensors new_dx, das, dbs;
  if (need_dx) {
    const bool fresh = !dx.has_value();
    if (fresh) new_dx.push_back(empty_as(x, k));
    const Tensor& target = fresh ? new_dx[0] : *dx;
    backward.input(view(target, m, k, k, 1, 0), fresh);
  }
  backward.parameters(rows, t, das, dbs);
  return {new_dx, das, dbs};
}

std::tuple<Tensor, Tensors, Tensors> gated_forward(const Tensor& x, Tensors weights,
                                                   Optionals biases, Optionals lora_a,
                                                   Optionals lora_b, std::vector<double> scalings,
                                                   std::optional<Tensor> seeds,
                                                   std::vector<double> dropouts,
                                                   int64_t activation, int64_t gate_half) {
  Guard guard;
  enter(guard, x);
  const size_t inputs = weights.size() - 1;
  const Members in{weights, lora_a, lora_b, scalings, seeds, dropouts, 0, inputs};
  const Members out{weights, lora_a, lora_b, scalings, seeds, dropouts, inputs, 1};
  const Tensor rows = matrix(x, rows_in(x));
  Tensors outputs, ys, ts;
  ts.push_back(forward(outputs, rows, rows, in, biases));
  const bool halves = inputs == 1;
  const Tensor gate = halves ? half_of(outputs[0], gate_half) : outputs[0];
  const Tensor up = halves ? half_of(outputs[0], 1 - gate_half) : outputs[1];
  const Tensor h = empty(x, gate.size(0), gate.size(1), x.scalar_type());
  run_gated({gate, up, h, std::nullopt, std::nullopt, std::nullopt, activation});
  ts.push_back(forward(ys, h, x, out, biases));
  return {ys[0], outputs, ts};
}

std::tuple<Tensors, Tensors, Tensors> gated_backward(
    const Tensor& dy, const Tensor& x, Tensors outputs, Tensors ts, Tensors weights,
    Optionals lora_a, Optionals lora_b, std::vector<double> scalings, std::optional<Tensor> seeds,
    std::vector<double> dropouts, int64_t activation, int64_t gate_half, bool need_dx,
    std::vector<bool> needs_a, std::vector<bool> needs_b) {
  Guard guard;
  enter(guard, x);
  const int64_t m = rows_in(x), k = x.size(x.dim() - 1);
  const size_t inputs = weights.size() - 1;
  const Members in{weights, lora_a, lora_b, scalings, seeds, dropouts, 0, inputs};
  const Members out{weights, lora_a, lora_b, scalings, seeds, dropouts, inputs, 1};
  const bool halves = inputs == 1;
  const Tensor gate = halves ? half_of(outputs[0], gate_half) : outputs[0];
  const Tensor up = halves ? half_of(outputs[0], 1 - gate_half) : outputs[1];

  const Tensor h = empty(x, gate.size(0), gate.size(1), x.scalar_type());
  const Tensor dh = empty(x, gate.size(0), gate.size(1), x.scalar_type());
  const Backward last(out, {dy}, h, true, needs_a, needs_b);
  last.input(dh, /*fresh=*/true);
  Tensors d_outputs;
  for (const Tensor& output : outputs)
    d_outputs.push_back(empty(x, output.size(0), output.size(1), x.scalar_type()));
  const Tensor dgate = halves ? half_of(d_outputs[0], gate_half) : d_outputs[0];
  const Tensor dup = halves ? half_of(d_outputs[0], 1 - gate_half) : d_outputs[1];
  run_gated({gate, up, h, dh, dgate, dup, activation});
  Tensors last_das, last_dbs, new_dx, das, dbs;
  last.parameters(h, ts[1], last_das, last_dbs);

  const Tensor rows = matrix(x, m);
  const Backward first(in, Optionals(d_outputs.begin(), d_outputs.end()), rows, need_dx, needs_a,
                       needs_b);
  if (need_dx) {
    new_dx.push_back(empty_as(x, k));
    first.input(view(new_dx[0], m, k, k, 1, 0), /*fresh=*/true);
  }
  first.parameters(rows, ts[0], das, dbs);
  das.insert(das.end(), last_das.begin(), last_das.end());
  dbs.insert(dbs.end(), last_dbs.begin(), last_dbs.end());
  return {new_dx, das, dbs};
}
