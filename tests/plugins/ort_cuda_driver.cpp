// For test_ort_cuda.py: the operators of cuda_ops.cpp over emulated kernels as a library of ONNX Runtime's, and the list of
// operators that another library registers, asked for through a runtime that is none.
#include <dlfcn.h>

#include <cstdint>
#include <string>

#include "contract.h"
#include "shims/ort_cuda/cuda_ops.h"
#include "emulation/simt.h"

#define RB_EXPORT extern "C" __attribute__((visibility("default")))

RB_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  Ort::InitApi(api);
  // The buffers are ONNX Runtime's: only alignment is checked.
  rankbook::emulation::Machine::get().buffers = {{0, UINTPTR_MAX, true}};
  static auto* domain = [] {
    auto* made = new Ort::CustomOpDomain(rankbook::contract::kDomain);
    rankbook::ort::add_cuda_operators(*made);
    return made;
  }();
  return api->AddCustomOpDomain(options, *domain);
}

namespace {

std::string found;

OrtStatus* no_entry(const OrtSessionOptions*, const char*, int* present) noexcept { return *present = 0, nullptr; }
OrtStatus* make_domain(const char*, OrtCustomOpDomain** out) noexcept {
  return *out = reinterpret_cast<OrtCustomOpDomain*>(&found), nullptr;
}
OrtStatus* add_operator(OrtCustomOpDomain*, const OrtCustomOp* op) noexcept {
  const char* provider = op->GetExecutionProviderType(op);
  found += std::string(op->GetName(op)) + " " + (provider == nullptr ? "CPU" : provider) + " " +
           std::to_string(op->GetOutputType(op, 0)) + "\n";
  return nullptr;
}
OrtStatus* add_domain(OrtSessionOptions*, OrtCustomOpDomain*) noexcept { return nullptr; }

const OrtApi* fake_api(uint32_t) noexcept {
  static const OrtApi api = [] {
    OrtApi out{};
    out.HasSessionConfigEntry = no_entry;
    out.CreateCustomOpDomain = make_domain;
    out.CustomOpDomain_Add = add_operator;
    out.AddCustomOpDomain = add_domain;
    return out;
  }();
  return &api;
}

const char* fake_version() noexcept { return "none"; }

}  // namespace

// "name provider type of the output" per line; null where the library cannot be loaded. Lists of four domains follow each
// other, since the library makes one per configuration.
RB_EXPORT const char* rb_operators(const char* path) {
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return nullptr;
  using Register = OrtStatus* (*)(OrtSessionOptions*, const OrtApiBase*);
  const auto call = reinterpret_cast<Register>(dlsym(handle, "RegisterCustomOps"));
  static const OrtApiBase base{fake_api, fake_version};
  found.clear();
  return call != nullptr && call(nullptr, &base) == nullptr ? found.c_str() : nullptr;
}
