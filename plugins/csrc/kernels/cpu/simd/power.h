#pragma once

// Powers of two, lane by lane, for softmax and sigmoid.

#include <initializer_list>

#include "kernels/cpu/simd/float.h"

namespace rankbook {
namespace {

using F = Simd::F;

inline constexpr int kLanes = Simd::kLanes;
inline constexpr float kSmallest = -126.0F;   // 2^x below is 0
inline constexpr float kWhole = 12582912.0F;  // 1.5 * 2^23: adding it rounds to whole numbers

// 2^x for x <= 0; within 2.2e-7 of it, and 0 below 2^-126.
inline F power(F x) {
  const F kept = Lanes::max(Simd::set(kSmallest), x);  // in this order: what is not a number stays so
  const F shifted = Simd::add(kept, Simd::set(kWhole));
  const F rest = Lanes::subtract(kept, Lanes::subtract(shifted, Simd::set(kWhole)));  // in [-1/2, 1/2], exact
  F sum = Simd::set(0x1.5c08e6p-10F);  // the polynomial whose largest relative error, 7.5e-8, is smallest
  for (const float term : {0x1.3d0c52p-7F, 0x1.c6b6e4p-5F, 0x1.ebf918p-3F, 0x1.62e428p-1F, 0x1.000002p+0F}) {
    sum = Simd::fma(sum, rest, Simd::set(term));
  }
  return Lanes::choose(x, Simd::set(kSmallest), Simd::zero(), Lanes::scale(sum, shifted));
}

}  // namespace
}  // namespace rankbook
