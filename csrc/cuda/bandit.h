#pragma once

#include "math/bandit.h"

// Runs a BanditTask whose pointers are on the device. is_double: dtype of mean; whole_counts:
// count is int64, otherwise the dtype of mean.
extern "C" const char* launch_bandit(const fastbandit::BanditTask* task, int is_double,
                                     int whole_counts, void* stream);
