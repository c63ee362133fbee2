// A gated MLP y = down(f(gate(x))·up(x)) as one op a direction: the groups of lora_group.cpp with the
// activation between them.
//
//   h = f(gate)·up     (dgate, dup) = dh·(up·f'(gate), f(gate))     dh = down's dx
//
// Gate and up may be the halves of one projection. The activation and h are computed again in
// backward. DoRA's gain on gate and up rides in the activation's pass where they have no dropout:
// their y is never written, `outputs` holds u. With dropout both are there, and the backward makes u of the first one
// again where its `us` come without. `up_to_h` leaves out down's product and gives h [M, I] for y: all that
// the backward needs, for LoRA, is there before it.
#include <tuple>

#include "../../torch-ext/torch_binding.h"
#include "../group/dora_norms.h"

using namespace lora_fused;

namespace {

void run_gated(const Gated& gated) {
#if defined(CUDA_KERNEL)
  if (gated.h.is_cuda()) return gated_cuda(gated);
#endif
  gated_cpu(gated);
}

View half_of(const View& both, int64_t half) {
  const int64_t width = both.size(1) / 2;
  return both.columns(half * width, width);
}

MaybeTensor half_of_vector(const MaybeTensor& vector, int64_t half) {
  if (!vector) return std::nullopt;
  const int64_t width = vector->numel() / 2, one = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(vector->get(), 1, &width, &one, half * width, &handle));
  return Tensor(handle);
}

// Gate and up among the outputs [M, I] or [M, 2I] of the first group.
struct Halves {
  bool together;
  int64_t gate_half;

  std::tuple<View, View> of(const Tensors& outputs) const {
    if (!together) return {outputs[0], outputs[1]};
    return {half_of(outputs[0], gate_half), half_of(outputs[0], 1 - gate_half)};
  }

  Gain gain(const Members& in, int64_t which) const {
    const size_t member = together ? 0 : static_cast<size_t>(which);
    if (!in.scaled(member)) return {};
    const Gain whole = in.gain_of(member);
    if (!together) return whole;
    const int64_t half = which == 0 ? gate_half : 1 - gate_half;
    return {half_of_vector(whole.gain, half), half_of_vector(whole.bias, half)};
  }
};

}  // namespace

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensors> gated_forward(
    const Tensor& x, Tensors weights, Optionals biases, Optionals lora_a, Optionals lora_b, Optionals gains,
    Optionals magnitudes, std::vector<double> scalings, std::optional<Tensor> seeds, std::vector<double> dropouts,
    Tensors scales, std::vector<int64_t> quantized, bool exact, int64_t activation, int64_t gate_half, bool up_to_h) {
  const OnDevice device(x);
  const Lists lists{weights, biases, lora_a, lora_b, gains, scalings, seeds, dropouts, scales, quantized, exact};
  lists.check();
  check_activation(activation);
  const size_t inputs = weights.size() - 1;
  const Norms norms(lists, magnitudes, gains, x.scalar_type());
  const Members in(lists, 0, inputs), out(lists, inputs, 1);
  STD_TORCH_CHECK(!up_to_h || !out.gain(0), "gated_forward: DoRA's backward needs the last product");
  const Halves halves{inputs == 1, gate_half};
  const View rows = matrix(x);
  Outputs first = project(rows, rows.tensor(), in, norms, /*scaled_too=*/false);
  const auto [gate, up] = halves.of(first.ys);
  const View h = fresh_like(gate);
  run_gated({gate, up, h, {}, {}, {}, activation, halves.gain(in, 0), halves.gain(in, 1)});
  Outputs last = up_to_h ? Outputs{{h.tensor()}, {}, project_down(h, out)} : project(h, x, out, norms, /*scaled_too=*/true);
  Tensors us;  // of members whose output is not their u, and of down
  size_t next_u = 0;
  for (size_t i = 0; i < inputs; ++i) {
    if (!in.gain(i)) continue;
    if (in.masked(i)) us.push_back(first.us[next_u]);
    ++next_u;
  }
  us.insert(us.end(), last.us.begin(), last.us.end());
  return {last.ys[0], first.ys, us, Tensors{first.t, last.t}, norms.norms(), norms.gains()};
}

std::tuple<Tensors, Tensors> gated_backward(const Tensor& dy, const Tensor& x, Tensors outputs, Tensors us,
                                            Tensors ts, Tensors weights, Optionals biases, Optionals lora_a,
                                            Optionals lora_b, Optionals gains, Optionals norms,
                                            std::vector<double> scalings, std::optional<Tensor> seeds,
                                            std::vector<double> dropouts, Tensors scales,
                                            std::vector<int64_t> quantized, bool exact, int64_t activation, int64_t gate_half,
                                            bool need_dx, std::vector<int64_t> needs) {
  const OnDevice device(x);
  const Lists lists{weights, biases, lora_a, lora_b, gains, scalings, seeds, dropouts, scales, quantized, exact};
  lists.check();
  check_activation(activation);
  const size_t inputs = weights.size() - 1;
  const Members in(lists, 0, inputs), out(lists, inputs, 1);
  const Halves halves{inputs == 1, gate_half};
  const auto [gate, up] = halves.of(outputs);
  Tensors dx, grads, last_grads, d_outputs;
  for (const Tensor& output : outputs) d_outputs.push_back(fresh_like(output));
  const auto [dgate, dup] = halves.of(d_outputs);
  {
    const View h = fresh_like(gate), dh = halves.together ? View(fresh_like(gate)) : dgate;
    const Tensors last_us = out.gain(0) ? Tensors{us.back()} : Tensors{};
    const Backward last(out, h, {Optionals{dy}, last_us, norms, needs, /*need_dx=*/true, ts[1]});
    last.input(dh);
    run_gated({gate, up, h, dh, dgate, dup, activation, halves.gain(in, 0), halves.gain(in, 1)});
    last.parameters(h, last_grads);
  }
  const View rows = matrix(x);
  // What is made again lives as long as the pass over dy that reads it.
  const auto first_us = [&] {
    Tensors found;
    auto kept = us.end() - (out.gain(0) ? 1 : 0);
    for (size_t i = inputs; i-- > 0;) {
      if (!in.gain(i)) continue;
      const auto u = [&] { return kept == us.begin() ? project_dropped(rows, in, i, ts[0]) : *--kept; };
      found.insert(found.begin(), in.masked(i) ? u() : outputs[i]);
    }
    return found;
  };
  const Optionals first_dys(d_outputs.begin(), d_outputs.end());
  const Backward first(in, rows, {first_dys, first_us(), norms, needs, need_dx, ts[0], /*own_dys=*/true});
  if (need_dx) {
    dx.push_back(empty_as(x, rows.size(1)));
    first.input(matrix(dx[0]));
  }
  first.parameters(rows, grads);
  grads.insert(grads.end(), last_grads.begin(), last_grads.end());
  return {dx, grads};
}
