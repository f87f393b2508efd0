// The floating-point peak of one core: twelve independent chains of fused multiply-adds on the widest vectors there are, all in registers.
#include <cstdint>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int CHAINS = 12;
typedef float Vec __attribute__((vector_size(4 * LANES)));

extern "C" int64_t operations() { return 2 * CHAINS * LANES; }   // of a round

// `rounds` of x = x factor + term in every lane of every chain; their sum, so that none may be left out.
extern "C" float chains(int64_t rounds, float factor, float term) {
    Vec x[CHAINS], all = {};
    for (int i = 0; i < CHAINS; ++i) x[i] = float(i) + Vec{};              // no two alike, or one would do for both
    for (; rounds > 0; --rounds)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; ++i) x[i] = x[i] * factor + (term + Vec{});
    for (const Vec& chain : x) all += chain;
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += all[i];
    return total;
}
