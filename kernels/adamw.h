// The update, the norms in float64 and the projection of one run's row: `adamw_project_ref` of adamw.py.
//
// Included within a step's namespace, behind its shapes: Real, SIZE, B1_AT (where the weight matrices end), GROUPS, ENDS, and SCALARS by name.

// Inner product in float64.
double inner(const Real* x, const Real* y, int size) {
    double sums[32] = {};                                           // sizes are multiples of 16
    for (int i = 0; i < size; i += 32)
        for (int j = 0; j < (size - i < 32 ? 16 : 32); ++j) sums[j] += double(x[i + j]) * double(y[i + j]);
    double total = 0;
    for (double part : sums) total += part;
    return total;
}

// Takes from the gradient of the weight matrices what lies along them.
void make_perpendicular(Real* gradient, const Real* params) {
    const double square = inner(params, params, B1_AT);
    const Real share = inner(gradient, params, B1_AT) / (square > 0 ? square : 2.2250738585072014e-308);
    for (int i = 0; i < B1_AT; ++i) gradient[i] -= share * params[i];
}

void update(Real* __restrict params, Real* __restrict moment1, Real* __restrict moment2, const Real* __restrict gradient, const Real* scalars,
            Real eps, bool decay_last) {
    const Real step_size = scalars[STEP_SIZE], bias2 = 1 / scalars[BIAS2_SQRT], decay = scalars[DECAY];
    const Real take1 = scalars[TAKE1], keep2 = scalars[KEEP2], take2 = scalars[TAKE2];
    const Real before[] = {decay_last ? Real(1) : decay, 1}, after[] = {decay_last ? decay : Real(1), 1};
    for (int part = 0; part < 2; ++part) {                          // weight matrices, biases
        const Real first = before[part], last = after[part];
        for (int i = part ? B1_AT : 0; i < (part ? SIZE : B1_AT); ++i) {
            const Real g = gradient[i], m = moment1[i] + take1 * (g - moment1[i]), v = moment2[i] * keep2 + take2 * g * g;
            moment1[i] = m;
            moment2[i] = v;
            params[i] = (params[i] * first - step_size * m / (std::sqrt(v) * bias2 + eps)) * last;
        }
    }
}

void norms(const Real* params, double* groups, double& total) {
    double squares = 0;
    for (int g = 0; g < GROUPS; ++g) {
        const double square = inner(params + ENDS[g], params + ENDS[g], ENDS[g + 1] - ENDS[g]);
        groups[g] = std::sqrt(square);
        squares += groups[g] * groups[g];
    }
    total = std::sqrt(squares);
}

void project(Real* params, const Real* targets) {
    bool held = false;
    for (int i = 0; i <= GROUPS; ++i) held |= targets[i] != 0;
    if (!held) return;
    double groups[GROUPS], total;
    norms(params, groups, total);
    const auto ratio = [](Real target, double norm) {              // a target below 0 is a cap
        const double wanted = std::fabs(double(target)) / (norm > 0 ? norm : 2.2250738585072014e-308);
        return target == 0 || (target < 0 && wanted > 1) ? Real(1) : Real(wanted);
    };
    for (int g = 0; g < GROUPS; ++g) {
        const Real factor = ratio(targets[0], total) * ratio(targets[1 + g], groups[g]);
        for (int i = ENDS[g]; i < ENDS[g + 1]; ++i) params[i] *= factor;
    }
}
