#pragma once

#include "kernels/cpu/dispatch.h"

// Runs the kernels on rows on buffers of exactly their size and compares them with plain loops in double. Returns how many
// sizes differ, having said which.
int check_rows(const rankbook::RowKernels& kernels);
