// PyTorch's CUDA operators, computed by its CPU operators on the same memory, at once or, during a capture,
// at each launch.
//
// Every operator with a CUDA kernel gets one that shows its tensors to the CPU's kernel. What it returns is
// put into memory of PyTorch's own CUDA allocator, so that what is allocated, when, and in which pool, is
// what a GPU would see. During a capture the CPU's kernel runs as well, and what it overwrote is put back
// when the capture ends.

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include <unordered_set>

#include "runtime.h"

namespace {

using at::Tensor;
using c10::IValue;
using Stack = torch::jit::Stack;

c10::intrusive_ptr<c10::TensorImpl> shown(const Tensor& tensor) {
  const auto& storage = tensor.storage();
  c10::DataPtr memory(const_cast<void*>(storage.data()), c10::kCPU);
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory),
                   c10::GetAllocator(c10::kCPU),
                   /*resizable=*/true),  // an output that an operator resizes leaves its memory
      c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return impl;
}

Tensor on_cpu(const Tensor& tensor) {
  return tensor.defined() && tensor.is_cuda() ? Tensor(shown(tensor)) : tensor;
}

// Calls `change` on every tensor in a value; devices and generators of the GPU become the CPU's.
template <class Change>
IValue changed(const IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(c10::kCPU);
  if (value.isGenerator() && value.toGenerator().defined() && value.toGenerator().device().is_cuda())
    return IValue();
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
    return list;
  }
  if (value.isList() && value.toList().elementType()->isSubtypeOf(*c10::OptionalType::ofTensor())) {
    c10::List<std::optional<Tensor>> list;
    for (const IValue& item : value.toListRef())
      list.push_back(item.isTensor() ? std::optional<Tensor>(change(item.toTensor())) : std::nullopt);
    return list;
  }
  return value;
}

template <class See>
void each_tensor(const IValue& value, const See& see) {
  changed(value, [&](const Tensor& tensor) {
    see(tensor);
    return tensor;
  });
}

// A result of the CPU's as a tensor of the GPU's, without its numbers. One that shares an argument's memory
// is a view.
Tensor on_gpu(const Tensor& result, const std::vector<Tensor>& arguments, c10::Device device, bool& view) {
  view = false;
  if (!result.defined()) return result;
  if (result.storage().nbytes())
    for (const Tensor& argument : arguments)
      if (argument.storage().data() == result.storage().data() && argument.dtype() == result.dtype()) {
        view = true;
        return argument.as_strided(result.sizes(), result.strides(), result.storage_offset());
      }
  return at::empty_strided(result.sizes(), result.strides(), result.options().device(device));
}

void copy_numbers(const Tensor& to, const Tensor& from) {
  if (from.defined() && from.numel()) to.copy_(from);
}

cudaStream_t stream_of(c10::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

// From the tensor's first number to its last one: of a slab, not the rows that others have.
void keep(cudaStream_t stream, const Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return;
  size_t last = 0;
  for (int64_t at = 0; at < tensor.dim(); at++) last += (tensor.size(at) - 1) * tensor.stride(at);
  emulated::keep(stream, tensor.data_ptr(), (last + 1) * tensor.element_size());
}

void forbid_wait(cudaStream_t stream, const char* name) {
  if (emulated::wait(stream) == cudaSuccess) return;
  (void)cudaGetLastError();
  TORCH_CHECK(false, "CUDA error: operation not permitted when stream is capturing (", name, ")");
}

bool waits(const c10::FunctionSchema& schema, const c10::OperatorHandle& op) {
  if (op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape)) return true;
  for (const auto& returned : schema.returns())
    if (!returned.type()->isSubtypeOf(*c10::TensorType::get()) &&
        !returned.type()->isSubtypeOf(*c10::ListType::ofTensors()))
      return true;
  return false;
}

// What an operator writes to, by the names of its schema.
bool written(const c10::Argument& argument) {
  return argument.alias_info() && argument.alias_info()->isWrite();
}

void compute(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  std::vector<IValue> given(stack->end() - count, stack->end());
  stack->erase(stack->end() - count, stack->end());

  std::vector<Tensor> of_gpu;
  for (const IValue& value : given)
    each_tensor(value, [&](const Tensor& tensor) {
      if (tensor.defined() && tensor.is_cuda()) of_gpu.push_back(tensor);
    });
  const c10::Device device =
      of_gpu.empty() ? c10::Device(c10::kCUDA, c10::cuda::current_device()) : of_gpu.front().device();
  const cudaStream_t stream = stream_of(device);
  const bool captured = emulated::is_captured(stream);
  if (waits(schema, op)) forbid_wait(stream, schema.name().c_str());
  C10_CUDA_CHECK(cudaGetLastError());  // what is left over, as a launch would

  Stack shown_arguments, trial;
  for (size_t i = 0; i < count; i++) {
    if (captured && written(schema.arguments()[i]))
      each_tensor(given[i], [&](const Tensor& tensor) { keep(stream, tensor); });
    shown_arguments.push_back(changed(given[i], on_cpu));
  }
  trial = shown_arguments;
  op.callBoxed(trial);

  std::vector<Tensor>
      fresh;  // to be filled at each launch, in the order of the returned tensors; undefined: not to be
  for (size_t i = 0; i < schema.returns().size(); i++) {
    const auto& returned = schema.returns()[i];
    const size_t first = fresh.size();
    if (returned.alias_info() && returned.alias_info()->isWrite()) {
      for (size_t a = 0; a < count; a++) {
        const auto* alias = schema.arguments()[a].alias_info();
        if (!alias || alias->beforeSets() != returned.alias_info()->beforeSets()) continue;
        const Tensor out = given[a].toTensor();
        const Tensor result = trial[i].toTensor();
        if (out.sizes() != result.sizes()) {  // an output that the operator resizes
          out.resize_(result.sizes());
          copy_numbers(Tensor(shown(out)), result);
          shown_arguments[a] = on_cpu(out);
        }
        stack->push_back(out);
        break;
      }
      fresh.emplace_back();
      continue;
    }
    bool view;
    stack->push_back(changed(trial[i], [&](const Tensor& result) {
      const Tensor made = on_gpu(result, of_gpu, device, view);
      fresh.push_back(view ? Tensor() : on_cpu(made));
      return made;
    }));
    size_t at = first;
    each_tensor(trial[i], [&](const Tensor& result) {
      if (fresh[at].defined()) copy_numbers(fresh[at], result);
      at++;
    });
    if (fresh.size() == first) fresh.emplace_back();
  }
  if (!captured) return;
  emulated::put(stream, [op, shown_arguments, fresh] {
    at::AutoDispatchBelowAutograd below;
    Stack again = shown_arguments;
    op.callBoxed(again);
    size_t at = 0;
    for (const IValue& value : again)
      each_tensor(value, [&](const Tensor& result) {
        if (at < fresh.size() && fresh[at].defined()) copy_numbers(fresh[at], result);
        at++;
      });
  });
}

// Copies between devices: one that the host waits for cannot be captured.
Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  const c10::Device device = self.is_cuda() ? self.device() : from.device();
  const Tensor to = on_cpu(self), source = on_cpu(from);
  const cudaStream_t stream = stream_of(device);
  if (!non_blocking && self.is_cuda() != from.is_cuda()) forbid_wait(stream, "copy_");
  if (emulated::is_captured(stream)) {
    keep(stream, self);
    to.copy_(source);
  }
  emulated::put(stream, [to, source] {
    at::AutoDispatchBelowAutograd below;
    to.copy_(source);
  });
  return self;
}

const std::unordered_set<std::string> OWN = {
    // What touches no numbers, or asks the runtime for what it does.
    "aten::as_strided",
    "aten::view",
    "aten::_reshape_alias",
    "aten::unfold",
    "aten::empty",
    "aten::empty_strided",
    "aten::set_",
    "aten::resize_",
    "aten::record_stream",
    "aten::is_pinned",
    "aten::_pin_memory",
    "aten::is_set_to",
    "aten::_local_scalar_dense",
    "aten::_fused_sdp_choice",
    "aten::copy_"};

std::vector<c10::RegistrationHandleRAII> registered;

// PyTorch warns of the first kernel that takes another's place.
struct Quiet : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

void take(const std::string& name_space) {
  Quiet quiet;
  c10::WarningUtils::WarningHandlerGuard quietly(&quiet);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind(name_space + "::", 0) != 0 || OWN.count(name.name)) continue;
    auto op = dispatcher.findSchema(name);
    if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    registered.push_back(dispatcher.registerImpl(name, c10::DispatchKey::CUDA,
                                                 c10::KernelFunction::makeFromBoxedFunction<&compute>(),
                                                 std::nullopt, nullptr, "emulated CUDA"));
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("take", &take, "Let the CPU compute the CUDA operators of a namespace.");
  module.def("take_copies", [] {
    static auto library =
        torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
    library.impl("copy_", TORCH_FN(copy_));
  });
  module.def(
      "shown", [](const Tensor& tensor) { return on_cpu(tensor); },
      "A CUDA tensor as a CPU tensor of the same memory.");
  module.def(
      "put",
      [](int device, py::function call) {
        auto held = std::shared_ptr<py::function>(new py::function(std::move(call)), [](py::function* kept) {
          py::gil_scoped_acquire gil;
          delete kept;
        });
        emulated::put(stream_of(c10::Device(c10::kCUDA, device)), [held] {
          py::gil_scoped_acquire gil;
          (*held)();
        });
      },
      "Call a function at once, or at each launch of the graph that the current stream is captured into.");
}
