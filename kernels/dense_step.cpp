// The training step of a dense MLP with two classes, and its logits, on one core. The definitions are `gradient_ref` of dense.py and
// `adamw_project_ref`; `cpu.py` compiles this file once per shape and element type, tries it against them, and calls it.
//
//     a tile of examples:  h = gelu(x W1 + b1),  z = h W2 + b2,  dz            (TILE, H); they live in the L2 cache
//                          dW2' += dz' h,  dx = (dz W2') gelu',  db1 += dx,  dW1 += x' dx
//
// Order of summation: a product adds over its inner index in ascending order, in registers; sums over examples are those of the tiles, in
// ascending order; a logit is a sum for each lane of a vector, joined by halves. Nothing depends on addresses, on the thread or on how many steps
// a call takes.
//
// Given at compile time: REAL (float or double), INPUTS = n, HIDDEN = H (a multiple of 16).
#include "vectors.h"

namespace {

using Real = REAL;
constexpr int L = LANES<Real>, N = INPUTS, H = HIDDEN, C = 2, TILE = 48;   // TILE: examples in a tile, a multiple of a register block and of a vector
constexpr int W2_AT = N * H, B1_AT = W2_AT + H * C, B2_AT = B1_AT + H, SIZE = B2_AT + C;
constexpr int GROUPS = 2, ENDS[] = {0, W2_AT, B1_AT};                      // of the groups of weight matrices in the row
constexpr int HS = H + L;                                                  // row length in scratch: no power of two
enum { TAU, DECAY, STEP_SIZE, BIAS2_SQRT, TARGETS, TAKE1 = TARGETS + 1 + GROUPS, KEEP2, TAKE2, SCALARS };
enum Loss { CROSS_ENTROPY, MSE, STABLEMAX };
static_assert(H % 16 == 0, "whole vectors of every width");

#include "adamw.h"
#include "product.h"

struct Scratch {
    Real x[TILE * N], h[TILE * HS], dx[TILE * HS];                          // of a tile; gelu' becomes dx
    Real z[C][TILE];                                                       // becomes dz
    Real W2_transposed[C][H], dW2_transposed[C][H];
    Real gradient[SIZE + 16];
};
alignas(64) thread_local Scratch scratch;

// h, gelu' if it is wanted, and z of a tile: of `rows` examples at `x (rows, N)`.
template <bool DERIVATIVE> void forward(const Real* params, const Real* x, int rows, Scratch& s) {
    std::memcpy(s.x, x, rows * N * sizeof(Real));
    std::memset(s.x + rows * N, 0, (TILE - rows) * N * sizeof(Real));
    product<0, H / L>(padded(rows), N, s.x, N, 1, params, H, from(params + B1_AT, 0), [&](int row, int column, auto& line) {
        std::remove_reference_t<decltype(line)> h, slope;
        gelu<Real, DERIVATIVE>(line, h, slope);
        into<false>(s.h, HS)(row, column, h);
        if (DERIVATIVE) into<false>(s.dx, HS)(row, column, slope);
    });
    for (int row = 0; row < rows; ++row)
        for (int c = 0; c < C; ++c) {
            Vec<Real> sums = {};
            for (int unit = 0; unit < H; unit += L) sums += load(s.h + row * HS + unit) * load(s.W2_transposed[c] + unit);
            s.z[c][row] = sum<Real>(sums) + params[B2_AT + c];
        }
}

void prepare(const Real* params, Scratch& s) {
    for (int c = 0; c < C; ++c)
        for (int unit = 0; unit < H; ++unit) s.W2_transposed[c][unit] = params[W2_AT + unit * C + c];
}

// z -> dz, the gradient of the mean loss over `m` examples; 0 past the `rows` of a tile. Its column sums are added to db2.
void loss_gradient(const int64_t* labels, int rows, Real tau, int64_t m, int loss, Scratch& s, Real* db2) {
    const Real inverse = 1 / tau, mean = 1 / (tau * Real(m));
    Real live[TILE] = {}, second[TILE] = {};
    for (int row = 0; row < rows; ++row) live[row] = 1, second[row] = labels[row] == 1;
    for (int row = rows; row < TILE; ++row) s.z[0][row] = s.z[1][row] = 0;
    Vec<Real> sums[C] = {};
    for (int row = 0; row < TILE; row += L) {
        Vec<Real> p0 = load(s.z[0] + row) * inverse, p1 = load(s.z[1] + row) * inverse;
        const Vec<Real> on = load(live + row), one = load(second + row);
        if (loss == CROSS_ENTROPY) {
            const Vec<Real> top = p0 > p1 ? p0 : p1;
            p0 = exp_shifted<Real>(p0 - top), p1 = exp_shifted<Real>(p1 - top);
            const Vec<Real> total = p0 + p1;
            p0 /= total, p1 /= total;
        }
        Vec<Real> slope0 = all<Real>(1), slope1 = slope0;                    // of StableMax's logarithm
        if (loss == STABLEMAX) {
            const Vec<Real> g0 = p0 < Real(0) ? Real(1) / (Real(1) - p0) : p0 + Real(1), g1 = p1 < Real(0) ? Real(1) / (Real(1) - p1) : p1 + Real(1);
            slope0 = p0 < Real(0) ? g0 : Real(1) / g0, slope1 = p1 < Real(0) ? g1 : Real(1) / g1;
            p0 = g0 / (g0 + g1), p1 = g1 / (g0 + g1);
        }
        const Vec<Real> factor = on * (loss == MSE ? 2 * mean : mean);
        p0 = (p0 - (Real(1) - one)) * slope0 * factor, p1 = (p1 - one) * slope1 * factor;    // only now: p - 1 is a few units in the last place of 1
        store(s.z[0] + row, p0), store(s.z[1] + row, p1);
        sums[0] += p0, sums[1] += p1;
    }
    for (int c = 0; c < C; ++c) db2[c] += sum<Real>(sums[c]);
}

void gradient(const Real* params, const Real* x, const int64_t* labels, int64_t m, Real tau, int loss, Scratch& s) {
    prepare(params, s);
    std::memset(s.gradient, 0, sizeof s.gradient);
    std::memset(s.dW2_transposed, 0, sizeof s.dW2_transposed);
    Real* db1 = s.gradient + B1_AT;
    for (int64_t first = 0; first < m; first += TILE) {
        const int rows = m - first < TILE ? m - first : TILE;
        forward<true>(params, x + first * N, rows, s);
        loss_gradient(labels + first, rows, tau, m, loss, s, s.gradient + B2_AT);
        for (int unit = 0; unit < H; unit += L) {
            const Vec<Real> w0 = load(s.W2_transposed[0] + unit), w1 = load(s.W2_transposed[1] + unit);
            Vec<Real> dw0 = {}, dw1 = {}, db = {};
            for (int row = 0; row < rows; ++row) {
                const Real dz0 = s.z[0][row], dz1 = s.z[1][row];
                const Vec<Real> h = load(s.h + row * HS + unit), dx = (dz0 * w0 + dz1 * w1) * load(s.dx + row * HS + unit);
                dw0 += dz0 * h, dw1 += dz1 * h, db += dx;
                store(s.dx + row * HS + unit, dx);
            }
            store(s.dW2_transposed[0] + unit, load(s.dW2_transposed[0] + unit) + dw0);
            store(s.dW2_transposed[1] + unit, load(s.dW2_transposed[1] + unit) + dw1);
            store(db1 + unit, load(db1 + unit) + db);
        }
        product<N % BLOCK_ROWS, H / L>(N, rows, s.x, 1, N, s.dx, HS, from_zero(), into<true>(s.gradient, H));
    }
    for (int unit = 0; unit < H; ++unit)
        for (int c = 0; c < C; ++c) s.gradient[W2_AT + unit * C + c] = s.dW2_transposed[c][unit];
}

}  // namespace

// `k` steps in place on one run's rows. `x (m, N)`, `labels (m)`: its training examples; `scalars (k, SCALARS)` as `adamw.scalar_names` has them.
extern "C" void steps(Real* params, Real* moment1, Real* moment2, const Real* x, const int64_t* labels, int64_t m, const Real* scalars, int64_t k,
                      int loss, int decay_last, int perp_grad, double eps) {
    for (; k > 0; --k, scalars += SCALARS) {
        gradient(params, x, labels, m, scalars[TAU], loss, scratch);
        if (perp_grad) make_perpendicular(scratch.gradient, params);
        update(params, moment1, moment2, scratch.gradient, scalars, eps, decay_last);
        project(params, scalars + TARGETS);
    }
}

// Logits `z (count, C)` of the examples `x (count, N)`.
extern "C" void logits(const Real* params, const Real* x, int64_t count, Real* z) {
    prepare(params, scratch);
    for (int64_t first = 0; first < count; first += TILE) {
        const int rows = count - first < TILE ? count - first : TILE;
        forward<false>(params, x + first * N, rows, scratch);
        for (int row = 0; row < rows; ++row)
            for (int c = 0; c < C; ++c) z[(first + row) * C + c] = scratch.z[c][row];
    }
}
