// The entry points of the library: what onnxruntime looks for, and a description for `rankbook doctor`.

#include <cstring>
#include <iterator>
#include <string>

#include "contract.h"
#include "shims/ort/attention_op.h"
#include "shims/ort/experts_op.h"
#include "shims/ort_cuda/cuda_ops.h"
#include "shims/ort/ops.h"
#include "shims/ort/row_ops.h"

namespace {

using rankbook::Isa;

// Entries of a session's configuration and no global state: two sessions of one process may differ.
constexpr const char* kActivations = "rankbook.activations";
constexpr const char* kMemory = "rankbook.memory";

// Which of two values a configuration entry of the session has; the first one where it has none.
// 16 characters are enough for every allowed value; a longer one does not fit, which is an error with the same
// sentence.
OrtStatus* read_entry(const OrtSessionOptions* options, const OrtApi& api, const char* key, const char* first,
                      const char* second, bool& is_second) {
  int present = 0;
  is_second = false;
  if (OrtStatus* status = api.HasSessionConfigEntry(options, key, &present)) return status;
  if (present == 0) return nullptr;
  char value[16] = {};
  size_t size = sizeof value;
  OrtStatus* status = api.GetSessionConfigEntry(options, key, value, &size);
  is_second = status == nullptr && std::strcmp(value, second) == 0;
  if (status == nullptr && (is_second || std::strcmp(value, first) == 0)) return nullptr;
  if (status != nullptr) api.ReleaseStatus(status);
  const std::string message = std::string("the session configuration entry ") + key + " must be " + first + " or " + second;
  return api.CreateStatus(ORT_INVALID_ARGUMENT, message.c_str());
}

// A status and never an exception: the caller is C. Domains are made once for all sessions, one for each of the four
// settings.
OrtStatus* register_operators(OrtSessionOptions* options, const OrtApi& api) {
  Isa limit = Isa::kPortable;
  if (!rankbook::read_limit(limit)) {
    std::string message = "RANKBOOK_NATIVE_ISA must be one of";
    for (const char* name : rankbook::kIsaNames) message += std::string(" ") + name;
    return api.CreateStatus(ORT_INVALID_ARGUMENT, message.c_str());
  }
  const rankbook::KernelSet kernels = rankbook::select_kernels(limit);
  bool rounds = false;
  bool mapped = false;
  // The first value of each is the default.
  if (OrtStatus* status = read_entry(options, api, kActivations, "fp32", "int8", rounds)) return status;
  if (OrtStatus* status = read_entry(options, api, kMemory, "huge", "mapped", mapped)) return status;
  try {
    // Never destroyed: sessions may outlive static destruction.
    const auto make = [&](bool rounding, bool copy) {
      auto* made = new Ort::CustomOpDomain(rankbook::contract::kDomain);
      const rankbook::ort::Kernels products{*kernels.packed, *kernels.int8, rounding, copy};
      rankbook::ort::add_operators(*made, products);
      rankbook::ort::add_experts(*made, products);
      rankbook::ort::add_cuda_operators(*made);
      if (!rankbook::ort::serves_gpu()) {  // where it does, the bodies run on the GPU
        rankbook::ort::add_attention(*made, *kernels.attention);
        rankbook::ort::add_row_operators(*made, *kernels.rows);
      }
      return made;
    };
    static Ort::CustomOpDomain* const domains[] = {make(false, false), make(true, false), make(false, true), make(true, true)};
    return api.AddCustomOpDomain(options, *domains[(rounds ? 1 : 0) + (mapped ? 0 : 2)]);
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  }
}

}  // namespace

extern "C" {

// ONNX Runtime looks for this name. GetApi answers null where it is older than the headers that this was built against.
__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    // Through the oldest API that there is, which every version answers.
    static const std::string message = "rankbook's library needs ONNX Runtime 1." + std::to_string(ORT_API_VERSION) +
                                       " or newer; this is " + base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
  }
  Ort::InitApi(api);
  return register_operators(options, *api);
}

// Which kernels this processor gets, the ONNX Runtime API version asked for, the bytes that sessions hold as copies at the
// moment, and what CUDA says, as JSON; valid until the same thread asks again.
__attribute__((visibility("default"))) const char* rankbook_native_info() {
  // Its own for each thread, so that a pointer stays valid while others ask.
  thread_local std::string text;
  Isa limit = Isa::kPortable;
  rankbook::read_limit(limit);
  const rankbook::KernelSet kernels = rankbook::select_kernels(limit);
  text = std::string("{\"isa\": \"") + kernels.packed->name + "\", \"isa_int8\": \"" +
         kernels.int8->name + "\", \"ort_api\": " + std::to_string(ORT_API_VERSION) +
         ", \"copied_bytes\": " + std::to_string(rankbook::ort::huge_bytes()) + ", \"cuda\": \"" +
         rankbook::ort::cuda_state() + "\"}";
  return text.c_str();
}

}  // extern "C"
