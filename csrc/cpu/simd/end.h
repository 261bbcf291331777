// Ends what cpu/simd/simd.h began; included last in each source of cpu/kernels, and so without a guard.
//
// clang refuses a file that pushes attributes and does not pop them. gcc's pragma ends with the file.
#if defined(__clang__) && (defined(FB_ISA_AVX512) || defined(FB_ISA_AVX2))
#pragma clang attribute pop
#endif
