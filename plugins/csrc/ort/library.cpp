// The entry points of the library: what onnxruntime looks for, and a description for `rankbook doctor`.

#include <cstdlib>
#include <cstring>
#include <string>

#include "contract.h"
#include "ort/ops.h"

namespace {

using rankbook::Isa;

// RANKBOOK_NATIVE_ISA=portable|avx2|avx512 forbids better instruction sets, so that tests reach every kernel.
bool read_limit(Isa& limit) {
  const char* wanted = std::getenv("RANKBOOK_NATIVE_ISA");
  limit = Isa::kAvx512;
  if (wanted == nullptr || std::strcmp(wanted, "avx512") == 0) return true;
  if (std::strcmp(wanted, "avx2") == 0) {
    limit = Isa::kAvx2;
    return true;
  }
  limit = Isa::kPortable;
  return std::strcmp(wanted, "portable") == 0;
}

OrtStatus* register_operators(OrtSessionOptions* options, const OrtApi& api) {
  Isa limit = Isa::kPortable;
  if (!read_limit(limit)) {
    return api.CreateStatus(ORT_INVALID_ARGUMENT, "RANKBOOK_NATIVE_ISA must be portable, avx2 or avx512");
  }
  try {
    static Ort::CustomOpDomain* domain = [&] {
      // Never destroyed: sessions may outlive static destruction.
      auto* made = new Ort::CustomOpDomain(rankbook::contract::kDomain);
      rankbook::ort::add_operators(*made, rankbook::select_kernels(limit));
      return made;
    }();
    return api.AddCustomOpDomain(options, *domain);
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
    return std::string("{\"isa\": \"") + rankbook::select_kernels(limit).name + "\", \"ort_api\": " +
           std::to_string(ORT_API_VERSION) + "}";
  }();
  return text.c_str();
}

}  // extern "C"
