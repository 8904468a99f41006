#pragma once

#include "kernels/cpu/dispatch.h"

// Runs the kernels on weights in groups on buffers of exactly their size and compares them with the portable ones, bit for
// bit, and rounding with a search of every level. Returns how many sizes differ, having said which.
int check_groups(const rankbook::GroupKernels& kernels);
