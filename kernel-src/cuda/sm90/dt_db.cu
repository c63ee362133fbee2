// Both products of dy with an adapter's rank on Hopper, those of a whole group in one launch and their sums in a
// second: what it takes, how it is cut, and the launches of dy_products_sm90_kernel.h, which says what it computes.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../../../torch-ext/torch_binding.h"
#include "../../common/kernels.h"
#include "../../common/tensors.h"
#include "dt_db.cuh"
#include "tma_host.h"
#include "../common/stream.h"

namespace {

using namespace lora_fused;
using namespace lora_fused::sm90;
using namespace lora_fused::sm90::dy_products;

int width_of(int64_t ranks) { return ranks <= 16 ? 16 : ranks <= 32 ? 32 : 64; }

int64_t parts_of(const DyProducts& p, int64_t slabs, int64_t shares) {
  return (slabs * p.dy.size(0) + shares * p.dy.size(1)) * width_of(p.t.size(1));
}

Sum sum_of(const float* parts, int count, int width, const View& out, bool exact, double scaling) {
  Sum sum{};
  sum.parts = parts, sum.out = out.mutable_data_ptr(), sum.stride = out.stride(0), sum.count = count;
  sum.rows = static_cast<int>(out.size(0)), sum.ranks = static_cast<int>(out.size(1)), sum.width = width;
  sum.exact = exact, sum.out_is_float = out.scalar_type() == ScalarType::Float;
  sum.scaling = static_cast<float>(scaling);
  return sum;
}

template <typename T>
void launch(const std::vector<DyProducts>& products, size_t begin) {
  const size_t end = std::min(products.size(), begin + kEntries);
  const View& like = products[begin].dy;
  const int device = like.get_device_index();
  Arguments args{};
  args.rows = static_cast<int>(like.size(0)), args.steps = tiles(like.size(0), kRows);
  int slabs = 0;
  for (size_t i = begin; i < end; ++i) slabs += tiles(products[i].dy.size(1), kSlab);
  args.shares = std::clamp(multiprocessors(device) / slabs, 1, args.steps);
  int64_t floats = 0;
  for (size_t i = begin; i < end; ++i) floats += parts_of(products[i], tiles(products[i].dy.size(1), kSlab), args.shares);
  const Tensor buffer = empty(like.base(), {floats}, ScalarType::Float);
  float* next = static_cast<float*>(buffer.mutable_data_ptr());
  Sums sums;
  int64_t most_quads = 0;
  slabs = 0;
  for (size_t i = begin; i < end; ++i) {
    const DyProducts& p = products[i];
    Entry& e = args.entry[args.entries];
    encode_boxes(e.dy, p.dy, kRows);
    encode_boxes(e.b, p.b, kSlab / 2);
    encode_boxes(e.t, p.t, kRows);
    e.columns = static_cast<int>(p.dy.size(1)), e.width = width_of(p.t.size(1));
    e.slabs = tiles(p.dy.size(1), kSlab), e.first_slab = slabs;
    e.dt_parts = next, e.db_parts = next + int64_t{e.slabs} * args.rows * e.width;
    next += parts_of(p, e.slabs, args.shares);
    Sum& dt = sums.sum[2 * args.entries] = sum_of(e.dt_parts, e.slabs, e.width, p.dt, p.parts.has_value(), p.scaling);
    sums.sum[2 * args.entries + 1] = sum_of(e.db_parts, args.shares, e.width, p.db, p.parts.has_value(), p.db_scaling);
    if (p.parts) dt.part_ranks = static_cast<int>(p.parts->ranks), dt.parts_apart = static_cast<int>(p.parts->apart);
    most_quads = std::max<int64_t>(most_quads, int64_t{std::max(args.rows, e.columns)} * e.width / 4);
    slabs += e.slabs, ++args.entries;
  }
  static SharedMemory shared_memory;
  shared_memory.allow(dy_products_kernel<T>, kBytes, device);
  const cudaStream_t stream = stream_of(like);
  dy_products_kernel<T><<<dim3(slabs, args.shares), kThreads, kBytes, stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  finish_kernel<T><<<dim3(tiles(most_quads, kFinishThreads), 2 * args.entries), kFinishThreads, 0, stream>>>(sums);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

bool lora_fused::dy_products_sm90_serves(const DyProducts& p) {
  const auto dtype = p.dy.scalar_type();
  const auto given = [&](const View& m) { return m.scalar_type() == dtype && takes_boxes(m); };
  const auto found = [&](const View& m) { return m.scalar_type() == dtype || m.scalar_type() == ScalarType::Float; };
  const bool parted = !p.parts || (is_brain(p.dy) && is_brain(p.dt) && p.dt.size(1) % 4 == 0);
  return given(p.dy) && given(p.b) && given(p.t) && found(p.dt) && found(p.db) && p.t.size(1) <= kMostRanks && parted &&
         is_hopper(p.dy.get_device_index());
}

void lora_fused::dy_products_sm90(const std::vector<DyProducts>& products) {
  for (size_t first = 0; first < products.size(); first += kEntries)
    is_brain(products[0].dy) ? launch<__nv_bfloat16>(products, first) : launch<__half>(products, first);
}

void dy_products_cuda(Tensors dy, Tensors b, Tensors t, Tensors dt, Tensors db, double scaling, bool exact,
                      double db_scaling) {
  STD_TORCH_CHECK(!dy.empty() && b.size() == dy.size() && t.size() == dy.size() && dt.size() == dy.size() &&
                      db.size() == dy.size(),
                  "dy_products: lists of ", dy.size(), ", ", b.size(), ", ", t.size(), ", ", dt.size(), " and ", db.size());
  const torch::stable::accelerator::DeviceGuard guard(dy[0].get_device_index());
  std::vector<DyProducts> products;
  for (size_t i = 0; i < dy.size(); ++i) {
    for (const Tensor* tensor : {&dy[i], &b[i], &t[i], &dt[i], &db[i]})
      STD_TORCH_CHECK(tensor->dim() == 2 && tensor->stride(1) == 1, "dy_products: expected matrices with contiguous rows");
    const int64_t rows = dy[i].size(0), cols = dy[i].size(1), given = t[i].size(1), ranks = exact ? given / 2 : given;
    const auto is = [](const Tensor& m, int64_t r, int64_t c) { return m.size(0) == r && m.size(1) == c; };
    STD_TORCH_CHECK(rows == dy[0].size(0) && dy[i].scalar_type() == dy[0].scalar_type() && is(b[i], cols, given) &&
                        is(t[i], rows, exact ? 2 * ranks : ranks) && is(dt[i], rows, exact ? 3 * ranks : ranks) &&
                        is(db[i], cols, ranks),
                    "dy_products: shapes or dtypes of entry ", i);
    const auto parts = exact ? std::optional<Parts>({ranks, ranks}) : std::nullopt;
    products.push_back({dy[i], b[i], t[i], View(dt[i]).columns(0, ranks), db[i], scaling, parts, db_scaling});
    STD_TORCH_CHECK(dy_products_sm90_serves(products.back()),
                    "dy_products: not for this device, these dtypes, ranks or strides");
  }
  dy_products_sm90(products);
}
