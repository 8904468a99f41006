// The entry points of the library: what onnxruntime looks for, and a description for `rankbook doctor`.

#include <cstdlib>
#include <cstring>
#include <string>

#include "contract.h"
#include "ort/ops.h"

namespace {

using rankbook::Isa;

constexpr const char* kActivations = "rankbook.activations";

// RANKBOOK_NATIVE_ISA=portable|avx2|avxvnni|avx512 forbids better instruction sets, so that tests reach every kernel.
bool read_limit(Isa& limit) {
  const char* wanted = std::getenv("RANKBOOK_NATIVE_ISA");
  limit = Isa::kAvx512;
  if (wanted == nullptr) return true;
  const char* const names[] = {"portable", "avx2", "avxvnni", "avx512"};
  for (int i = 0; i < 4; ++i) {
    limit = static_cast<Isa>(i);
    if (std::strcmp(wanted, names[i]) == 0) return true;
  }
  return false;
}

// The session's wish: fp32 activations unless its configuration entry says int8.
OrtStatus* read_activations(const OrtSessionOptions* options, const OrtApi& api, bool& integer) {
  int present = 0;
  integer = false;
  if (OrtStatus* status = api.HasSessionConfigEntry(options, kActivations, &present)) return status;
  if (present == 0) return nullptr;
  char value[16] = {};
  size_t size = sizeof value;
  OrtStatus* status = api.GetSessionConfigEntry(options, kActivations, value, &size);
  integer = status == nullptr && std::strcmp(value, "int8") == 0;
  if (status == nullptr && (integer || std::strcmp(value, "fp32") == 0)) return nullptr;
  if (status != nullptr) api.ReleaseStatus(status);
  return api.CreateStatus(ORT_INVALID_ARGUMENT, "the session configuration entry rankbook.activations must be fp32 or int8");
}

OrtStatus* register_operators(OrtSessionOptions* options, const OrtApi& api) {
  Isa limit = Isa::kPortable;
  if (!read_limit(limit)) {
    return api.CreateStatus(ORT_INVALID_ARGUMENT, "RANKBOOK_NATIVE_ISA must be portable, avx2, avxvnni or avx512");
  }
  bool integer = false;
  if (OrtStatus* status = read_activations(options, api, integer)) return status;
  try {
    // Never destroyed: sessions may outlive static destruction.
    const auto make = [&](bool with_integers) {
      auto* made = new Ort::CustomOpDomain(rankbook::contract::kDomain);
      const auto* integers = with_integers ? &rankbook::select_integer_kernels(limit) : nullptr;
      rankbook::ort::add_operators(*made, {rankbook::select_kernels(limit), integers});
      return made;
    };
    static Ort::CustomOpDomain* const domains[] = {make(false), make(true)};
    return api.AddCustomOpDomain(options, *domains[integer ? 1 : 0]);
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  }
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    static const std::string message = "rankbook's library needs ONNX Runtime 1." + std::to_string(ORT_API_VERSION) +
                                       " or newer; this is " + base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
  }
  Ort::InitApi(api);
  return register_operators(options, *api);
}

// Which kernels this processor gets and the ONNX Runtime API version asked for, as JSON.
__attribute__((visibility("default"))) const char* rankbook_native_info() {
  static const std::string text = [] {
    Isa limit = Isa::kPortable;
    read_limit(limit);
    return std::string("{\"isa\": \"") + rankbook::select_kernels(limit).name + "\", \"isa_int8\": \"" +
           rankbook::select_integer_kernels(limit).name + "\", \"ort_api\": " + std::to_string(ORT_API_VERSION) + "}";
  }();
  return text.c_str();
}

}  // extern "C"
