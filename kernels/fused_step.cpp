// The training step and the evaluation of one MLP on one core: the twin of the Triton kernels. The definitions are `train_step_ref` and
// `evaluate_ref` of step.py; `cpu.py` compiles this file once per shape and element type, tries it against them, and calls it.
//
//     U = E W1[:d] + b1,  V = E W1[d:]                                        tables, (P, H) each
//     a tile of pairs:  x = U[a] + V[b],  h = gelu(x),  z = h W2 + b2,  dz    (TILE, H) and (TILE, ZC); they live in the L2 cache
//                       dW2' += dz' h,  dx = (dz W2') gelu'(x),  dU[a] += dx,  dV[b] += dx
//     dE = dU W1[:d]' + dV W1[d:]',  dW1 = [E' dU; E' dV],  then AdamW and the projection on the flat row
//
// Order of summation. A product adds over its inner index in ascending order, one fused multiply-add after the other, in a register. Over pairs:
// dU and dV take one after the other; dW2 and db2 are sums of the tiles, each from 0, in ascending order. A softmax's total is 32 sums joined by
// halves (`softmax_row`), a norm 32 sums added in ascending order. A column of logits left over as a dot product is four sums for each lane of a
// vector, the lanes joined by halves: its bits depend on the width of vectors. Nothing depends on addresses, on the thread or on how many steps a
// call takes. Vectors are the compiler's own extension, as wide as its target has them: AVX-512, AVX2, SSE2 and NEON from one source.
//
// Given at compile time: REAL (float or double), ROWS = p, D = d and HIDDEN = H (multiples of 16), CLASSES, P_PAD (stored logit columns).
#include "vectors.h"

namespace {

constexpr int TILE = 96;                                         // pairs in a tile, a multiple of a register block

// -- shapes

using Real = REAL;
constexpr int L = LANES<Real>;
constexpr int P = ROWS, d = D, H = HIDDEN, C = CLASSES;
constexpr int ZC = (C + 15) / 16 * 16;                           // columns of a row of logits, in memory
constexpr int LEFT_OVER = C % L <= 2 ? C % L : 0;                // columns of logits that are cheaper as dot products than as a padded vector
constexpr int ZV = (C - LEFT_OVER + L - 1) / L;                  // vectors of the others
constexpr int HS = H + L, DS = d + L;                            // row lengths in scratch: no power of two, which would crowd a few cache sets
constexpr int W1_AT = P * d, W2_AT = W1_AT + 2 * d * H, B1_AT = W2_AT + H * P_PAD, B2_AT = B1_AT + H, SIZE = B2_AT + P_PAD;
constexpr int GROUPS = 3, ENDS[] = {0, W1_AT, W2_AT, B1_AT};     // of the groups of weight matrices in the row
enum { TAU, DECAY, STEP_SIZE, BIAS2_SQRT, TARGETS, TAKE1 = TARGETS + 1 + GROUPS, KEEP2, TAKE2, SCALARS };
enum Loss { CROSS_ENTROPY, MSE, STABLEMAX };
static_assert(d % 16 == 0 && H % 16 == 0, "whole vectors of every width");

struct Scratch {
    Real tables[2][P * HS], dtables[2][P * HS];                  // U, V and their gradients
    Real h[TILE * HS], derivative[TILE * HS], z[TILE * ZC];      // of a tile; z becomes dz
    Real W2[H * ZC], W2_transposed[C * HS], dW2_transposed[C * HS], b2[ZC];   // b2 is -inf past the classes, so their exponentials are 0
    Real W1_transposed[H * DS];
    Real gradient[SIZE + 16];
};
alignas(64) thread_local Scratch scratch;

// Its address, hidden from the optimiser, which would look it up again in inner loops.
INLINE Scratch& own_scratch() {
    Scratch* s = &scratch;
    asm("" : "+r"(s));
    return *s;
}

#include "product.h"

// `to (columns, >= rows) = from'`, 16 x 16 at a time.
void transpose(const Real* from, int from_row, int rows, int columns, Real* to, int to_row) {
    for (int i = 0; i < rows; i += 16)
        for (int j = 0; j < columns; j += 16)
            for (int jj = j; jj < j + 16 && jj < columns; ++jj)
                for (int ii = i; ii < i + 16 && ii < rows; ++ii) to[jj * to_row + ii] = from[ii * from_row + jj];
}

// -- forward

void prepare(const Real* params, Scratch& s) {
    const Real *E = params, *W1 = params + W1_AT, *W2 = params + W2_AT;
    const Real no_bias[H] = {};
    for (int half = 0; half < 2; ++half)
        product<P % BLOCK_ROWS, H / L>(P, d, E, d, 1, W1 + half * d * H, H, from(half ? no_bias : params + B1_AT, 0),
                                       into<false>(s.tables[half], HS));
    for (int unit = 0; unit < H; ++unit) {
        std::memcpy(s.W2 + unit * ZC, W2 + unit * P_PAD, C * sizeof(Real));
        for (int c = C; c < ZC; ++c) s.W2[unit * ZC + c] = 0;
    }
    for (int c = 0; c < ZC; ++c) s.b2[c] = c < C ? params[B2_AT + c] : -INFINITY;
    transpose(W2, P_PAD, H, C, s.W2_transposed, HS);
}

// h and gelu' of `N` vectors of one pair from its rows of the tables.
template <bool DERIVATIVE, int N> INLINE void hidden_units(const Real* U, const Real* V, Real* h, Real* derivative) {
    Vec<Real> x[N], y[N], slope[N];
    for (int i = 0; i < N; ++i) x[i] = load(U + i * L) + load(V + i * L);
    gelu<Real, DERIVATIVE>(x, y, slope);
    for (int i = 0; i < N; ++i) store(h + i * L, y[i]);
    if (DERIVATIVE)
        for (int i = 0; i < N; ++i) store(derivative + i * L, slope[i]);
}

template <bool DERIVATIVE> __attribute__((noinline)) void hidden(const Real* U, const Real* V, Real* h, Real* derivative) {
    int unit = 0;
    for (; unit + 4 * L <= H; unit += 4 * L) hidden_units<DERIVATIVE, 4>(U + unit, V + unit, h + unit, derivative + unit);
    if constexpr (H / L % 4 > 0) hidden_units<DERIVATIVE, H / L % 4>(U + unit, V + unit, h + unit, derivative + unit);
}

// z of `rows` pairs of a tile whose h is there.
void logits(int rows, Scratch& s) {
    product<0, ZV>(padded(rows), H, s.h, HS, 1, s.W2, ZC, from(s.b2, 0), into<false>(s.z, ZC));
    for (int row = 0; row < rows; ++row) {
        for (int c = ZV * L; c < ZC; ++c) s.z[row * ZC + c] = -INFINITY;
        for (int c = C - LEFT_OVER; c < C; ++c) {
            Vec<Real> sums[4] = {};
#pragma GCC unroll 8
            for (int i = 0; i < H / L; ++i) sums[i % 4] += load(s.h + row * HS + i * L) * load(s.W2_transposed + c * HS + i * L);
            s.z[row * ZC + c] = sum<Real>((sums[0] + sums[1]) + (sums[2] + sums[3])) + s.b2[c];
        }
    }
}

// -- loss

template <class T> INLINE T largest_of(const T* row) {            // (ZC)
    Vec<T> most = load(row);
    for (int c = LANES<T>; c < ZC; c += LANES<T>) {
        Vec<T> x = load(row + c);
        most = x > most ? x : most;
    }
    return largest<T>(most);
}

// Exponentials of `scaled (ZC)`, shifted by its maximum, which comes back with their sum. The order of the sum is that of torch's CUDA softmax,
// which the papers ran: lane l of 32 adds columns l, l + 32, ..., then lanes are added by halves. In softmax collapse it decides what is lost
// beside 1.
template <class T> INLINE void softmax_row(const T* scaled, T* exponentials, T& top, T& total) {
    constexpr int VECTORS = 32 / LANES<T>;
    top = largest_of(scaled);
    Vec<T> sums[VECTORS] = {};
    for (int c = 0; c < ZC; c += LANES<T>) {
        Vec<T> e = exp_shifted<T>(load(scaled + c) - top);
        store(exponentials + c, e);
        sums[c / LANES<T> % VECTORS] += e;
    }
    for (int half = VECTORS / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    total = sum<T>(sums[0]);
}

// StableMax's scores of `scaled (ZC)` and their sum: x + 1 from 0 on, 1 / (1 - x) below.
template <class T> INLINE void stablemax_row(const T* scaled, T* scores, T& total) {
    Vec<T> sums = {};
    for (int c = 0; c < ZC; c += LANES<T>) {
        const Vec<T> x = load(scaled + c), g = x < T(0) ? T(1) / (T(1) - x) : x + T(1);
        store(scores + c, g);
        sums += g;
    }
    total = sum<T>(sums);
}

// z -> dz, the gradient of the mean loss over `n` pairs, for `rows` pairs of a tile; its column sums are added to db2 (C).
void loss_gradient(int rows, const int64_t* labels, Real tau, int64_t n, int loss, Scratch& s, Real* db2) {
    const Real inverse = 1 / tau, mean = 1 / (tau * Real(n));
    Real column_sums[ZC] = {};
    for (int row = 0; row < rows; ++row) {
        Real* z = s.z + row * ZC;
        Real top, total, factor = 2 * mean, slope[ZC];           // slope: of StableMax's logarithm, 1 / (1 + |x|)
        for (int c = 0; c < ZC; c += L) store(z + c, load(z + c) * inverse);
        if (loss == CROSS_ENTROPY) {
            softmax_row<Real>(z, z, top, total);
            for (int c = 0; c < ZC; c += L) store(z + c, load(z + c) / total);
            factor = mean;    // only now: in softmax collapse p - 1 is a few units in the last place of 1, and must be rounded there
        }
        if (loss == STABLEMAX) {
            for (int c = 0; c < ZC; ++c) slope[c] = 1 / (1 + std::fabs(z[c]));
            stablemax_row<Real>(z, z, total);
            for (int c = 0; c < ZC; c += L) store(z + c, load(z + c) / total);
            factor = mean;
        }
        z[labels[row]] -= 1;
        if (loss == STABLEMAX)
            for (int c = 0; c < ZC; c += L) store(z + c, load(z + c) * load(slope + c));
        for (int c = 0; c < ZC; c += L) store(z + c, load(z + c) * factor);
        for (int c = 0; c < ZC; c += L) store(column_sums + c, load(column_sums + c) + load(z + c));
    }
    for (int c = 0; c < C; ++c) db2[c] += column_sums[c];
}

// -- backward

void backward(const Real* params, Scratch& s) {
    const Real *E = params, *W1 = params + W1_AT;
    Real *dE = s.gradient, *dW1 = s.gradient + W1_AT, *db1 = s.gradient + B1_AT;
    for (int half = 0; half < 2; ++half) {
        transpose(W1 + half * d * H, H, d, H, s.W1_transposed, DS);
        product<d % BLOCK_ROWS, H / L>(d, P, E, 1, d, s.dtables[half], HS, from_zero(), into<false>(dW1 + half * d * H, H));
        product<P % BLOCK_ROWS, d / L>(P, H, s.dtables[half], HS, 1, s.W1_transposed, DS, from_zero(), into<true>(dE, d));
    }
    for (int row = 0; row < P; ++row)
        for (int unit = 0; unit < H; ++unit) db1[unit] += s.dtables[0][row * HS + unit];
    transpose(s.dW2_transposed, HS, C, H, s.gradient + W2_AT, P_PAD);
}

void gradient(const Real* params, const int64_t* a, const int64_t* b, const int64_t* labels, int64_t n, Real tau, int loss, Scratch& s) {
    prepare(params, s);
    std::memset(s.dtables, 0, sizeof s.dtables);
    std::memset(s.dW2_transposed, 0, sizeof s.dW2_transposed);
    std::memset(s.gradient, 0, sizeof s.gradient);
    for (int64_t first = 0; first < n; first += TILE) {
        const int rows = n - first < TILE ? n - first : TILE;
        int64_t left[TILE] = {}, right[TILE] = {}, label[TILE];
        for (int row = 0; row < rows; ++row) {
            left[row] = a[first + row], right[row] = b[first + row], label[row] = labels[left[row] * P + right[row]];
            hidden<true>(s.tables[0] + left[row] * HS, s.tables[1] + right[row] * HS, s.h + row * HS, s.derivative + row * HS);
        }
        logits(rows, s);
        loss_gradient(rows, label, tau, n, loss, s, s.gradient + B2_AT);
        for (int row = rows; row < padded(rows); ++row) {              // rows of no pair add 0 to the first rows of dU and dV
            std::memset(s.z + row * ZC, 0, ZC * sizeof(Real));
            std::memset(s.derivative + row * HS, 0, H * sizeof(Real));
        }
        product<C % BLOCK_ROWS, H / L>(C, rows, s.z, 1, ZC, s.h, HS, from_zero(), into<true>(s.dW2_transposed, HS));
        // a row of dx goes into its rows of dU and dV at once, pair after pair: where pairs are sorted by a, that of dU stays in the L1 cache
        product<0, H / L>(padded(rows), C, s.z, ZC, 1, s.W2_transposed, HS, from_zero(), [&](int row, int column, auto& line) {
            Real *dU = s.dtables[0] + left[row] * HS + column, *dV = s.dtables[1] + right[row] * HS + column;
            const Real* slope = s.derivative + row * HS + column;
            for (auto& x : line) {
                const Vec<Real> dx = x * load(slope);
                store(dU, load(dU) + dx);
                store(dV, load(dV) + dx);
                slope += L, dU += L, dV += L;
            }
        });
    }
    backward(params, s);
}

#include "adamw.h"

// -- evaluation

enum Metric { TRAIN_ACCURACY, TEST_ACCURACY, TRAIN_LOSS, TEST_LOSS, LOGIT_SCALE, SATURATED, NORM, NORM_GROUPS,
              COLLAPSE32 = NORM_GROUPS + GROUPS, COLLAPSE64, SUM_EXP_IS_ONE, ZERO_GRADIENT_ROWS, MAX_GRADIENT_DIFFERENCE };

// `softmax_audit_ref` of one training pair, added to `out`, from the scores `(ZC)` of its logits in both types and their sums.
INLINE void audit(int label, const float* exp32, float total32, const double* exp64, double total64, double* out) {
    float gradient32[ZC];
    double difference[ZC];
    const double inverse64 = 1 / total64;
    for (int c = 0; c < ZC; ++c) gradient32[c] = exp32[c] / total32;
    out[COLLAPSE32] += gradient32[label] >= 1;
    out[COLLAPSE64] += exp64[label] / total64 >= 1;
    out[SUM_EXP_IS_ONE] += total32 == largest_of(exp32);
    gradient32[label] -= 1;
    for (int c = 0; c < ZC; ++c) difference[c] = std::fabs(gradient32[c] - exp64[c] * inverse64);
    difference[label] = std::fabs(gradient32[label] - (exp64[label] - total64) * inverse64);
    for (int c = 0; c < ZC; ++c) gradient32[c] = std::fabs(gradient32[c]);
    out[ZERO_GRADIENT_ROWS] += largest_of(gradient32) == 0;
    const double most = largest_of(difference);
    if (most > out[MAX_GRADIENT_DIFFERENCE]) out[MAX_GRADIENT_DIFFERENCE] = most;
}
INLINE void audit(int label, const double* exp64, double total64, const float* exp32, float total32, double* out) {
    audit(label, exp32, total32, exp64, total64, out);
}

// The metrics of one pair, added to `out`; its logits are `z (ZC)`.
void measure(const Real* z, int label, bool train, Real tau, int loss, double* out) {
    Bits<Real> column;
    for (int i = 0; i < L; ++i) column[i] = i;
    Real scaled[ZC], exponentials[ZC], top, total;
    Vec<Real> rivals = all<Real>(-INFINITY), squares = {}, residuals = {};
    for (int c = 0; c < ZC; c += L, column += L) {
        const Vec<Real> x = load(z + c), s = x / tau, live = column < C ? s : Vec<Real>{}, rival = column == label ? all<Real>(-INFINITY) : x;
        const Vec<Real> residual = column == label ? live - Real(1) : live;
        store(scaled + c, s);
        rivals = rival > rivals ? rival : rivals;
        squares += live * live;
        residuals += residual * residual;
    }
    double of_pair;
    if (loss == STABLEMAX) {
        stablemax_row<Real>(scaled, exponentials, total);
        of_pair = std::log(double(total)) - std::log(double(exponentials[label]));
    } else {
        softmax_row<Real>(scaled, exponentials, top, total);
        of_pair = loss == MSE ? double(sum<Real>(residuals)) : std::log(double(total)) + (double(top) - double(scaled[label]));
    }
    out[train ? TRAIN_ACCURACY : TEST_ACCURACY] += z[label] > largest<Real>(rivals);
    out[train ? TRAIN_LOSS : TEST_LOSS] += of_pair;
    out[LOGIT_SCALE] += std::sqrt(sum<Real>(squares));
    out[SATURATED] += largest_of(exponentials) / total > Real(0.999);
    if (!train) return;
    using Other = std::conditional_t<std::is_same_v<Real, float>, double, float>;
    Other others[ZC], other_top, other_total;
    for (int c = 0; c < ZC; ++c) others[c] = Other(z[c]) / Other(tau);
    if (loss == STABLEMAX) stablemax_row<Other>(others, others, other_total);
    else softmax_row<Other>(others, others, other_top, other_total);
    audit(label, exponentials, total, others, other_total, out);
}

}  // namespace

// `k` steps in place on one run's rows. `a, b (n)`: its training pairs, fastest when those that share a lie together; `labels (P * P)`: of every
// pair; `scalars (k, SCALARS)` as `adamw.scalar_names` has them.
extern "C" void steps(Real* params, Real* moment1, Real* moment2, const int64_t* a, const int64_t* b, int64_t n, const int64_t* labels,
                      const Real* scalars, int64_t k, int loss, int decay_last, int perp_grad, double eps) {
    Scratch& s = own_scratch();
    for (; k > 0; --k, scalars += SCALARS) {
        gradient(params, a, b, labels, n, scalars[TAU], loss, s);
        if (perp_grad) make_perpendicular(s.gradient, params);
        update(params, moment1, moment2, s.gradient, scalars, eps, decay_last);
        project(params, scalars + TARGETS);
    }
}

// Everything that `metric_names` lists, at these parameters. `train (P * P)` is 1 on training pairs; a pair whose label is -1 is no data.
extern "C" void evaluate(const Real* params, const Real* train, const int64_t* labels, Real tau, int loss, double* out) {
    Scratch& s = own_scratch();
    double n_train = 0, n_test = 0;
    for (int i = 0; i <= MAX_GRADIENT_DIFFERENCE; ++i) out[i] = 0;
    prepare(params, s);
    for (int first = 0; first < P * P; first += TILE) {
        const int rows = P * P - first < TILE ? P * P - first : TILE;
        for (int row = 0; row < rows; ++row)
            hidden<false>(s.tables[0] + (first + row) / P * HS, s.tables[1] + (first + row) % P * HS, s.h + row * HS, nullptr);
        logits(rows, s);
        for (int row = 0; row < rows; ++row) {
            const int64_t label = labels[first + row];
            if (label < 0) continue;
            const bool on_train = train[first + row] > 0;
            (on_train ? n_train : n_test) += 1;
            measure(s.z + row * ZC, label, on_train, tau, loss, out);
        }
    }
    norms(params, out + NORM_GROUPS, out[NORM]);
    for (int i : {TRAIN_ACCURACY, TRAIN_LOSS, COLLAPSE32, COLLAPSE64, SUM_EXP_IS_ONE, ZERO_GRADIENT_ROWS}) out[i] /= n_train;
    for (int i : {TEST_ACCURACY, TEST_LOSS}) out[i] /= n_test;
    for (int i : {LOGIT_SCALE, SATURATED}) out[i] /= n_train + n_test;
}
