// Products with an adapter's rank, see skinny.h.
#include "skinny.h"

#include "../dispatch/table.h"
#include "products.h"

namespace lora_fused {

namespace {

#if defined(CUDA_KERNEL)
dispatch::SkinnyKernel kernel_of(const Shrink& product, bool) { return dispatch::skinny_kernel(product); }
dispatch::SkinnyKernel kernel_of(const AdapterGrad& product, bool beside) {
  return dispatch::skinny_kernel(product, beside);
}

void run_sm80(const std::vector<Shrink>& products) { shrink_cuda(products); }
void run_sm80(const std::vector<AdapterGrad>& products) { adapter_grad_cuda(products); }

void run_sm90(const std::vector<Shrink>& products, SideStream*) { skinny_sm90(products); }
void run_sm90(const std::vector<AdapterGrad>& products, SideStream* side) { skinny_sm90(products, side); }
#endif

}  // namespace

Adapters::Layout layout_of_b(const MatrixView& x) {
  return dispatch::wants_b_transposed(x) ? Adapters::kTransposed : Adapters::kAsStored;
}

bool is_skinny(std::initializer_list<const MatrixView*> operands) {
#if defined(CUDA_KERNEL)
  for (const MatrixView* operand : operands)
    if (!dispatch::skinny_fits_sm80(*operand)) return false;
  return true;
#else
  return false;
#endif
}

void multiply_shrink(const MatrixView& out, const MatrixView& x, const MatrixView& a, double scaling) {
#if defined(CUDA_KERNEL)
  const Shrink product{x, a, out, scaling, std::nullopt};
  if (dispatch::skinny_kernel(product, /*alone=*/true) == dispatch::SkinnyKernel::kSm90) return skinny_sm90({product});
#endif
  multiply(out, x, a.transposed(), scaling, /*add=*/false);
}

template <typename Product>
bool SkinnyBatch<Product>::add(const Product& product) {
#if defined(CUDA_KERNEL)
  const dispatch::SkinnyKernel kernel = kernel_of(product, beside_);
  if (kernel == dispatch::SkinnyKernel::kLibrary) return false;
  (kernel == dispatch::SkinnyKernel::kSm90 ? sm90_ : sm80_).push_back(product);
  return true;
#else
  return false;
#endif
}

template <typename Product>
void SkinnyBatch<Product>::run(SideStream* side) {
#if defined(CUDA_KERNEL)
  if (!sm90_.empty()) run_sm90(sm90_, side);
  if (!sm80_.empty()) run_sm80(sm80_);
  sm90_.clear();
  sm80_.clear();
#endif
}

template class SkinnyBatch<Shrink>;
template class SkinnyBatch<AdapterGrad>;

FusedDtDb::FusedDtDb(const std::vector<MaybeMatrixView>& dys) {
#if defined(CUDA_KERNEL)
  const MatrixView* any = nullptr;
  int64_t elements = 0;
  for (const MaybeMatrixView& dy : dys)
    if (dy) any = &*dy, elements += dy->numel();
  is_faster_ = any != nullptr && dispatch::dt_db_is_faster(*any, elements);
#endif
}

MaybeTensor FusedDtDb::add(const MatrixView& dy, const MatrixView& b, const MatrixView& t, const MatrixView& dt,
                           double scaling, ScalarType dtype, const std::optional<SplitLayout>& split,
                           double db_scaling) {
#if defined(CUDA_KERNEL)
  if (!is_faster_ || !skinny_sm90_supports(dy)) return std::nullopt;
  const Tensor db = empty(dy.base(), {b.size(0), dt.size(1)}, dtype);
  const DtDb products{dy, b, t, dt, db, scaling, split, db_scaling};
  if (!dt_db_sm90_supports(products)) return std::nullopt;
  products_.push_back(products);
  return db;
#else
  return std::nullopt;
#endif
}

void FusedDtDb::run() const {
#if defined(CUDA_KERNEL)
  if (!products_.empty()) dt_db_sm90(products_);
#endif
}

}  // namespace lora_fused
