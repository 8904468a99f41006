#pragma once

#include <exception>

#include "shims/ort/api.h"

namespace rankbook::ort {

// Runs `work`, turning what it throws into a status: an exception must not cross the C API.
template <class Work>
OrtStatusPtr guarded(Work&& work) noexcept {
  try {
    work();
    return nullptr;
  // Its code (INVALID_ARGUMENT) is kept; everything else is a runtime exception, std::bad_alloc for one.
  } catch (const Ort::Exception& error) {
    return Ort::Status(error).release();
  } catch (const std::exception& error) {
    return Ort::Status(error.what(), ORT_RUNTIME_EXCEPTION).release();
  }
}

}  // namespace rankbook::ort
