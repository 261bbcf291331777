// Element types as plain integers: what the CUDA launchers take. No torch header.
#pragma once

namespace fastbandit {

enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kUInt8 = 4, kInt64 = 5 };

}  // namespace fastbandit
