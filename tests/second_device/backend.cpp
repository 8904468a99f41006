// A device of PyTorch that is not the CPU and computes on it, in PyTorch's slot for devices of others (PrivateUse1).
// Its memory is host memory, and every operator runs as the CPU's on views of it; but tensors of two devices in one
// operation are an error, as on CUDA. It has eight indexes and, if wanted, a limit on memory.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <optional>
#include <utility>
#include <vector>

namespace {

using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::PrivateUse1>;
constexpr auto kSecond = c10::DeviceType::PrivateUse1;

std::atomic<std::size_t> used{0}, limit{SIZE_MAX};

struct Block {
  void* data;
  std::size_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  used -= block->bytes;
  std::free(block->data);
  delete block;
}

struct HostAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device device(kSecond, Guard::getDeviceIndex());
    TORCH_CHECK_WITH(OutOfMemoryError, used + bytes <= limit, device, " has no room for ", bytes, " bytes");
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 64, bytes + 64) == 0, "out of host memory");
    used += bytes;
    return {data, new Block{data, bytes}, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};

HostAllocator allocator;
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

// The CPU's view of the same memory.
at::Tensor on_cpu(const at::Tensor& tensor) {
  if (tensor.device().is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(c10::kCPU));
}

c10::ScalarType type_or_default(std::optional<c10::ScalarType> type) {
  return type.value_or(c10::typeMetaToScalarType(c10::get_default_dtype()));
}

// The index is that of `device`, or the present one where it has none.
struct At {
  explicit At(std::optional<c10::Device> device) : before(Guard::getDeviceIndex()) {
    if (device.has_value() && device->has_index()) Guard::setDeviceIndex(device->index());
  }
  ~At() { Guard::setDeviceIndex(before); }
  c10::DeviceIndex before;
};

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> type, std::optional<c10::Layout>,
                 std::optional<c10::Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const At at(device);
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   type_or_default(type), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> type,
                         std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  const At at(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           type_or_default(type));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

c10::Scalar scalar_of(const at::Tensor& tensor) { return at::_local_scalar_dense(on_cpu(tensor)); }

// What CUDA refuses: tensors of two devices (a CPU tensor without dimensions passes as a number), and random numbers of
// another device's generator.
void check_devices(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  std::optional<c10::Device> found;
  bool generator = false;
  const auto see = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || (tensor.device().is_cpu() && tensor.dim() == 0)) return;
    TORCH_CHECK(!found.has_value() || *found == tensor.device(), "Expected all tensors to be on the same device, but ",
                op.schema().name(), " was given some on ", *found, " and on ", tensor.device());
    found = tensor.device();
  };
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) see(value.toTensor());
    if (value.isGenerator() && value.toGenerator().defined()) generator = true;
    if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) see(tensor);
    }
    if (value.isList()) {
      for (const auto& each : value.toListRef()) {
        if (each.isTensor()) see(each.toTensor());
      }
    }
  }
  TORCH_CHECK(!generator, op.schema().name(), " expected a generator of this device, but found one of the CPU");
}

// The tensors of one call and the CPU's views of their memory, so that nothing is copied and strides stay what they are:
// sums run in the order in which the CPU's own would.
struct Call {
  std::vector<std::pair<at::Tensor, at::Tensor>> views;
  std::optional<c10::Device> device;

  at::Tensor view(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kSecond) return tensor;
    TORCH_CHECK(!tensor.is_conj() && !tensor.is_neg(), "lazily conjugated or negated tensors are not served");
    device = tensor.device();
    // An empty one may be an output that the operator is to resize, which a view of others' memory cannot be.
    views.emplace_back(tensor, tensor.numel() ? on_cpu(tensor) : at::empty(tensor.sizes(), on_cpu(tensor).options()));
    return views.back().second;
  }

  at::Tensor result(const at::Tensor& tensor) const {
    if (!tensor.defined() || !device.has_value()) return tensor;
    const At at(device);  // memory that grows is allocated there
    for (const auto& [own, view] : views) {
      if (!tensor.is_same(view)) continue;
      if (own.sizes() != view.sizes()) on_cpu(own.resize_(view.sizes())).copy_(view);
      return own;
    }
    const auto dense = tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
    const at::Tensor made =
        empty_strided(dense.sizes(), dense.strides(), dense.scalar_type(), std::nullopt, device, std::nullopt);
    on_cpu(made).copy_(dense);
    return made;
  }

  c10::IValue replaced(const c10::IValue& value) {
    if (value.isTensor()) return view(value.toTensor());
    if (value.isTensorList()) return each(value.toTensorList(), [&](const at::Tensor& one) { return view(one); });
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& one : value.toOptionalTensorList()) {
        list.push_back(one.has_value() ? std::optional(view(*one)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == kSecond) {
      device = value.toDevice();
      return c10::Device(c10::kCPU);
    }
    return value;
  }

  c10::IValue returned(const c10::IValue& value) const {
    if (value.isTensor()) return result(value.toTensor());
    if (value.isTensorList()) return each(value.toTensorList(), [&](const at::Tensor& one) { return result(one); });
    return value;
  }

  template <typename Function>
  static c10::List<at::Tensor> each(const c10::List<at::Tensor>& from, Function function) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& one : from) list.push_back(function(one));
    return list;
  }
};

// Which kernel of attention runs is asked past the operators: that of the CPU.
int64_t attention_kernel(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const std::optional<at::Tensor>& mask, double dropout, bool causal,
                         std::optional<double> scale, bool grouped) {
  const auto seen = mask.has_value() ? std::optional(on_cpu(*mask)) : std::nullopt;
  return at::_fused_sdp_choice(on_cpu(query), on_cpu(key), on_cpu(value), seen, dropout, causal, scale, grouped);
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_devices(op, *stack);
  Call call;
  const auto inputs = op.schema().arguments().size(), outputs = op.schema().returns().size();
  for (auto i = stack->size() - inputs; i < stack->size(); ++i) (*stack)[i] = call.replaced((*stack)[i]);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto i = stack->size() - outputs; i < stack->size(); ++i) (*stack)[i] = call.returned((*stack)[i]);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &scalar_of);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &at::native::resize_);
  // Elsewhere these are made of other operators, with other roundings.
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("_fused_sdp_choice", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_kernel)
}  // namespace at::native

#define SECOND_EXPORT extern "C" __attribute__((visibility("default")))

// To be called once, before the device is used.
SECOND_EXPORT void second_register() {
  c10::SetAllocator(kSecond, &allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
}

// Allocations that would bring all that are alive beyond `bytes` fail from now on.
SECOND_EXPORT void second_limit(std::size_t bytes) { limit = bytes; }

SECOND_EXPORT std::size_t second_used() { return used; }
