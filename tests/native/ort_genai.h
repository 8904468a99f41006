// What the program of docs/deploy.md uses of GenAI's C++ interface, over the functions that GenAI's library exports.
// The real header is in its releases, not in its wheel. Objects of the library are pointers here; their types are not known.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

extern "C" {
struct OgaResult;
const char* OgaResultGetError(const OgaResult*);
void OgaDestroyResult(OgaResult*);
void OgaShutdown();
void OgaDestroyModel(void*);
void OgaDestroyTokenizer(void*);
void OgaDestroyTokenizerStream(void*);
void OgaDestroySequences(void*);
void OgaDestroyGeneratorParams(void*);
void OgaDestroyGenerator(void*);
OgaResult* OgaCreateModel(const char* folder, void** out);
OgaResult* OgaCreateTokenizer(const void* model, void** out);
OgaResult* OgaCreateTokenizerStream(const void* tokenizer, void** out);
OgaResult* OgaCreateSequences(void** out);
OgaResult* OgaCreateGeneratorParams(const void* model, void** out);
OgaResult* OgaCreateGenerator(const void* model, const void* params, void** out);
OgaResult* OgaTokenizerEncode(const void*, const char* text, void* sequences);
OgaResult* OgaTokenizerStreamDecode(void*, int32_t token, const char** out);
size_t OgaSequencesGetSequenceCount(const void*, size_t index);
OgaResult* OgaGeneratorParamsSetSearchNumber(void*, const char* name, double value);
OgaResult* OgaGeneratorParamsSetSearchBool(void*, const char* name, bool value);
OgaResult* OgaGenerator_AppendTokenSequences(void*, const void* sequences);
OgaResult* OgaGenerator_GenerateNextToken(void*);
OgaResult* OgaGenerator_GetNextTokens(const void*, const int32_t** out, size_t* count);
bool OgaGenerator_IsDone(void*);
}

namespace oga {

inline void check(OgaResult* result) {
  if (result == nullptr) return;
  const std::runtime_error error(OgaResultGetError(result));
  OgaDestroyResult(result);
  throw error;
}

template <void (*Destroy)(void*)>
struct Object {
  void* self = nullptr;
  Object() = default;
  Object(const Object&) = delete;
  ~Object() { Destroy(self); }
};

template <typename T, typename Create, typename... Given>
std::unique_ptr<T> made(Create create, Given... given) {
  auto object = std::make_unique<T>();
  check(create(given..., &object->self));
  return object;
}

}  // namespace oga

struct OgaHandle {
  ~OgaHandle() { OgaShutdown(); }
};

struct OgaModel : oga::Object<OgaDestroyModel> {
  static auto Create(const char* folder) { return oga::made<OgaModel>(OgaCreateModel, folder); }
};

struct OgaSequences : oga::Object<OgaDestroySequences> {
  static auto Create() { return oga::made<OgaSequences>(OgaCreateSequences); }
  size_t SequenceCount(size_t index) const { return OgaSequencesGetSequenceCount(self, index); }
};

struct OgaTokenizer : oga::Object<OgaDestroyTokenizer> {
  static auto Create(const OgaModel& model) { return oga::made<OgaTokenizer>(OgaCreateTokenizer, model.self); }
  void Encode(const char* text, OgaSequences& out) const { oga::check(OgaTokenizerEncode(self, text, out.self)); }
};

struct OgaTokenizerStream : oga::Object<OgaDestroyTokenizerStream> {
  static auto Create(const OgaTokenizer& from) {
    return oga::made<OgaTokenizerStream>(OgaCreateTokenizerStream, from.self);
  }
  const char* Decode(int32_t token) {
    const char* text = nullptr;
    oga::check(OgaTokenizerStreamDecode(self, token, &text));
    return text;
  }
};

struct OgaGeneratorParams : oga::Object<OgaDestroyGeneratorParams> {
  static auto Create(const OgaModel& model) {
    return oga::made<OgaGeneratorParams>(OgaCreateGeneratorParams, model.self);
  }
  void SetSearchOption(const char* name, double value) {
    oga::check(OgaGeneratorParamsSetSearchNumber(self, name, value));
  }
  void SetSearchOptionBool(const char* name, bool value) {
    oga::check(OgaGeneratorParamsSetSearchBool(self, name, value));
  }
};

struct OgaGenerator : oga::Object<OgaDestroyGenerator> {
  static auto Create(const OgaModel& model, const OgaGeneratorParams& params) {
    return oga::made<OgaGenerator>(OgaCreateGenerator, model.self, params.self);
  }
  void AppendTokenSequences(const OgaSequences& given) {
    oga::check(OgaGenerator_AppendTokenSequences(self, given.self));
  }
  bool IsDone() { return OgaGenerator_IsDone(self); }
  void GenerateNextToken() { oga::check(OgaGenerator_GenerateNextToken(self)); }
  std::vector<int32_t> GetNextTokens() {
    const int32_t* tokens = nullptr;
    size_t count = 0;
    oga::check(OgaGenerator_GetNextTokens(self, &tokens, &count));
    return {tokens, tokens + count};
  }
};
