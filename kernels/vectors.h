// Vectors of the compiler's own extension, as wide as its target has them, and exp and GELU on them: what the steps in C++ share.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, MOST_COLUMNS = 4;      // of a vector; vectors in a row of a product's register block: 24 sums in 32 registers
#elif defined(__AVX__)
constexpr int BYTES = 32, MOST_COLUMNS = 2;      // 12 sums in 16 registers
#elif defined(__aarch64__)
constexpr int BYTES = 16, MOST_COLUMNS = 4;
#else
constexpr int BYTES = 16, MOST_COLUMNS = 2;
#endif
constexpr int BLOCK_ROWS = 6;                    // of a register block

// -- vectors of float or double: `Vec<T>`, and the integers as wide, `Bits<T>`

template <class T> struct Lanes;
template <> struct Lanes<float> {
    typedef float Vec __attribute__((vector_size(BYTES)));
    typedef int32_t Bits __attribute__((vector_size(BYTES)));
    typedef float Loose __attribute__((vector_size(BYTES), aligned(4), may_alias));
};
template <> struct Lanes<double> {
    typedef double Vec __attribute__((vector_size(BYTES)));
    typedef int64_t Bits __attribute__((vector_size(BYTES)));
    typedef double Loose __attribute__((vector_size(BYTES), aligned(8), may_alias));
};
template <class T> using Vec = typename Lanes<T>::Vec;
template <class T> using Bits = typename Lanes<T>::Bits;
template <class T> constexpr int LANES = BYTES / sizeof(T);
#define INLINE inline __attribute__((always_inline))

template <class T> INLINE Vec<T> load(const T* from) { return *reinterpret_cast<const typename Lanes<T>::Loose*>(from); }
template <class T> INLINE void store(T* to, Vec<T> x) { *reinterpret_cast<typename Lanes<T>::Loose*>(to) = x; }
template <class T> INLINE Vec<T> all(T x) { return x - Vec<T>{}; }

// Sum or maximum of the lanes, by halves: lane i with lane i + LANES / 2 and so on.
template <class T, class Join> INLINE T join(Vec<T> x, Join both) {
    T lanes[LANES<T>];
    store(lanes, x);
    for (int half = LANES<T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = both(lanes[i], lanes[i + half]);
    return lanes[0];
}
template <class T> INLINE T sum(Vec<T> x) { return join<T>(x, [](T a, T b) { return a + b; }); }
template <class T> INLINE T largest(Vec<T> x) { return join<T>(x, [](T a, T b) { return a > b ? a : b; }); }

// -- exp and GELU. Polynomials are Chebyshev interpolants in powers of their argument; errors are relative.

template <class T> struct Constants;
template <> struct Constants<float> {
    static constexpr int bias = 127, mantissa = 23;
    static constexpr float to_integer = 12582912.f;                                // 1.5 * 2^23: adding it rounds to a whole number
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float least = -104.f, farthest = 13.2f;                       // exp(least) is 0; phi(farthest) is a normal number
    static constexpr int32_t upper_half = ~0xfff, all_but_sign = 0x7fffffff;       // of the mantissa
    static constexpr float exp[] = {0.50000000135f, 0.16666576643f, 0.041666464167f, 0.0083632353846f, 0.0013933733216f};      // 1e-8
    static constexpr float mills_scale = 0.35f;
    static constexpr float mills[] = {                                             // 2e-8
        0.2532442734f, 0.1714957313f, 0.07109915074f, 0.01023571196f, -0.005111105261f, -0.001766486688f, 0.0007014078179f, 0.000242802231f,
        -0.0001387672256f, -2.265856925e-5f, 1.994157915e-5f};
};
template <> struct Constants<double> {
    static constexpr int bias = 1023, mantissa = 52;
    static constexpr double to_integer = 6755399441055744.;                        // 1.5 * 2^52
    static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
    static constexpr double least = -746., farthest = 37.6;
    static constexpr int64_t upper_half = ~0x7ffffff, all_but_sign = 0x7fffffffffffffff;
    static constexpr double exp[] = {0.50000000000000010315, 0.1666666666666667103, 0.041666666666623815998, 0.0083333333333260825535,
                                     0.0013888888917368964054, 0.00019841269875003973789, 0.000024801521055364205099,
                                     2.7557255168123061037e-6, 2.7620202631315898907e-7, 2.5105313423078522597e-8};             // 2e-17
    static constexpr double mills_scale = 0.3;
    static constexpr double mills[] = {                                                                                        // 8e-17
        0.22197061383443278743, 0.16457948408616270002, 0.086549637418464573839, 0.027760365473730608072, 0.0018171357953587255434,
        -0.0024238965482285275631, -0.00057564251345547476879, 0.00028363691869613581075, 0.00009013989137386104091,
        -0.000049746361118421146265, -0.000011125397151193670206, 0.000010731295192826161073, 2.4386782672174273264e-7,
        -2.2496644088389880744e-6, 5.2025236347179425436e-7, 3.5327890555866315775e-7, -2.3438119317186575649e-7,
        -8.0237651630070503315e-9, 6.3136908143924128626e-8, -1.7674817502658975e-8, -1.0739370146391651488e-8,
        5.9086302834945217516e-9, 8.9465659872186472275e-10, -7.4919480818226516718e-10};
};

template <class T, int N> INLINE Vec<T> polynomial(const T (&c)[N], Vec<T> x) {
    Vec<T> y = all(c[N - 1]);
#pragma GCC unroll 32
    for (int i = N - 2; i >= 0; --i) y = y * x + c[i];
    return y;
}

// exp(x) = 2^n e^r with n returned and e^r, |r| <= ln(2) / 2, in `power`; `low` is added to x where that has lost digits.
template <class T> INLINE Bits<T> reduced_exp(Vec<T> x, Vec<T> low, Vec<T>& power) {
    using C = Constants<T>;
    Vec<T> shifted = x * T(1.44269504088896340736) + C::to_integer;
    Vec<T> n = shifted - C::to_integer;
    Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low + low;
    power = T(1) + (r + r * r * polynomial<T>(C::exp, r));
    return (Bits<T>)shifted - (Bits<T>)all(C::to_integer);
}
template <class T> INLINE Vec<T> two_to_the(Bits<T> n) { return (Vec<T>)((n + Constants<T>::bias) << Constants<T>::mantissa); }

// exp(x) for x <= 0, down to the smallest denormal number.
template <class T> INLINE Vec<T> exp_shifted(Vec<T> x) {
    x = x < Constants<T>::least ? all(Constants<T>::least) : x;
    Vec<T> power;
    Bits<T> n = reduced_exp<T>(x, Vec<T>{}, power), half = n >> 1;
    return power * two_to_the<T>(half) * two_to_the<T>(n - half);
}

// h = x Phi(x) and gelu'(x) = Phi(x) + x phi(x) of `N` vectors at once, four in the main loop. With y = |x|, t = 1 / (1 + c y) and u = 2 t - 1
//     1 - Phi(y) = e^(-y y / 2) t mills(u),
// so both come from one exponential and nothing cancels. y y is split into an exact part and a rest, as far as a float's digits go.
template <class T, bool DERIVATIVE, int N> INLINE void gelu(const Vec<T> (&x)[N], Vec<T> (&h)[N], Vec<T> (&derivative)[N]) {
    using C = Constants<T>;
    Vec<T> square[N], rest[N], t[N], gauss[N], power[N], upper[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
        Vec<T> y = (Vec<T>)((Bits<T>)x[i] & C::all_but_sign);
        y = y > C::farthest ? all(C::farthest) : y;
        t[i] = T(1) / (T(1) + C::mills_scale * y);
        Vec<T> high = (Vec<T>)((Bits<T>)y & C::upper_half);
        square[i] = T(-0.5) * high * high;
        rest[i] = T(-0.5) * (y - high) * (y + high);
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
        Bits<T> n = reduced_exp<T>(square[i], rest[i], power[i]);
        gauss[i] = power[i] * two_to_the<T>(n);
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) upper[i] = gauss[i] * (t[i] * polynomial<T>(C::mills, t[i] + t[i] - T(1)));
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
        Vec<T> Phi = x[i] < T(0) ? upper[i] : T(1) - upper[i];
        h[i] = x[i] * Phi;
        if (DERIVATIVE) derivative[i] = Phi + x[i] * (gauss[i] * T(0.398942280401432677940));
    }
}

}  // namespace
