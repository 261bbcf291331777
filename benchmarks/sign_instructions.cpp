// What the instructions of the dense 1-bit kernels reach in registers, on an x86 CPU with AVX-512
// VPOPCNTDQ: cycles for 512 products (docs/kernels.md, docs/decisions.md).
//
//     g++ -O2 -mavx512f -mavx512vpopcntdq benchmarks/sign_instructions.cpp -o /tmp/signs && /tmp/signs
#include <chrono>
#include <cstdint>
#include <cstdio>

namespace {

constexpr int kRounds = 5'000'000;

// The least of seven times of `kRounds` rounds, in ns a round.
template <class Body>
double least(const Body& body) {
  double best = 1e9;
  for (int i = 0; i < 7; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    for (int round = 0; round < kRounds; ++round) body();
    const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - begin;
    if (time.count() / kRounds < best) best = time.count() / kRounds;
  }
  return best;
}

#define CLOBBERED                                                                                  \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
      "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17"

void told(const char* what, double ns, double cycle, int products) {
  const double cycles = ns / cycle * 512 / products;
  std::printf("%-44s %5.2f cycles for 512 products, %4.0f products a ns\n", what, cycles,
              products / ns);
}

}  // namespace

int main() {
  uint64_t chain = 0;
  const double cycle = least([&] {  // additions that wait for each other
    asm volatile("add $1, %0; add $1, %0; add $1, %0; add $1, %0" : "+r"(chain));
  }) / 4;
  std::printf("a cycle takes %.4f ns\n", cycle);

  // Registers 16 and 17 stand for a word of a pixel and one of eight filters, 0 to 7 for sums.
#define WORD(to, sum)                                                              \
  "vpxord %%zmm16, %%zmm17, %%zmm" to "; vpopcntd %%zmm" to ", %%zmm" to "; "      \
  "vpaddd %%zmm" to ", %%zmm" sum ", %%zmm" sum "; "
  told("XOR, count, add", least([] {
         asm volatile(WORD("8", "0") WORD("9", "1") WORD("10", "2") WORD("11", "3") WORD("12", "4")
                          WORD("13", "5") WORD("14", "6") WORD("15", "7")::: CLOBBERED);
       }),
       cycle, 8 * 512);

  // Two words: XOR, sum and carry of a full adder, count of the carry. `one` is the sum so far.
#define PAIR(one, to, carry, sum)                                                   \
  "vpxord %%zmm16, %%zmm17, %%zmm" to "; vmovdqa64 %%zmm" one ", %%zmm" carry "; "  \
  "vpternlogq $0x96, %%zmm16, %%zmm17, %%zmm" one "; "                              \
  "vpternlogq $0xd4, %%zmm" one ", %%zmm" to ", %%zmm" carry "; "                   \
  "vpopcntd %%zmm" carry ", %%zmm" carry "; vpaddd %%zmm" carry ", %%zmm" sum ", %%zmm" sum "; "
  told("carries of pairs", least([] {
         asm volatile(PAIR("0", "8", "12", "4") PAIR("1", "9", "13", "5") PAIR("2", "10", "14", "6")
                          PAIR("3", "11", "15", "7")::: CLOBBERED);
       }),
       cycle, 8 * 512);

  // AVX2: a row of the table by the nibbles of 32 filters, and its addition.
#define STEP(to, sum)                                                             \
  "vpshufb %%ymm13, %%ymm14, %%ymm" to "; vpaddb %%ymm" to ", %%ymm" sum ", %%ymm" sum "; "
  told("table, AVX2: shuffle, add", least([] {
         asm volatile(STEP("8", "0") STEP("9", "1") STEP("10", "2") STEP("11", "3") STEP("12", "4")
                          STEP("8", "5") STEP("9", "6") STEP("10", "7")::: CLOBBERED);
       }),
       cycle, 8 * 128);
  return 0;
}
