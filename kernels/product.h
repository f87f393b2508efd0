// Products of matrices in blocks of registers, each element a sum over the inner index in ascending order: what both steps are made of.
//
// Included within a step's namespace, behind its `Real` and `L`.

// A block of registers, `R` rows and `V` vectors: sums = A B over `inner`, A read element by element, B row by row; `finish` takes it away.
template <int R, int V, class Start, class Finish>
INLINE void block(int row, int column, int inner, const Real* A, int a_row, int a_inner, const Real* B, int b_row, Start start, Finish finish) {
    Vec<Real> sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = start(row + r, column + v * L);
    A += row * a_row, B += column;
    for (int k = 0; k < inner; ++k, A += a_inner, B += b_row) {
        Vec<Real> right[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) right[v] = load(B + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[r][v] += A[r * a_row] * right[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        Vec<Real> line[V];                                       // a copy, so that the sums themselves have no address and stay in registers
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) line[v] = sums[r][v];
        finish(row + r, column, line);
    }
}

// Rows of a panel: `columns` of B that stay in the L1 cache for all rows. `LAST` is what `rows` leaves of blocks of six.
template <int LAST, int V, class Start, class Finish>
INLINE void panel(int rows, int column, int inner, const Real* A, int a_row, int a_inner, const Real* B, int b_row, Start start, Finish finish) {
    int row = 0;
    for (; row + BLOCK_ROWS <= rows; row += BLOCK_ROWS) block<BLOCK_ROWS, V>(row, column, inner, A, a_row, a_inner, B, b_row, start, finish);
    if constexpr (LAST > 0) block<LAST, V>(row, column, inner, A, a_row, a_inner, B, b_row, start, finish);
}

// `rows` x `VECTORS` vectors, in panels of nearly equal width, the narrower ones first.
template <int LAST, int VECTORS, class Start, class Finish>
INLINE void product(int rows, int inner, const Real* A, int a_row, int a_inner, const Real* B, int b_row, Start start, Finish finish) {
    constexpr int PANELS = VECTORS > 0 ? (VECTORS + MOST_COLUMNS - 1) / MOST_COLUMNS : 1, V = VECTORS / PANELS, WIDER = VECTORS % PANELS;
    int column = 0;
    if constexpr (V > 0)
        for (; column < (PANELS - WIDER) * V * L; column += V * L) panel<LAST, V>(rows, column, inner, A, a_row, a_inner, B, b_row, start, finish);
    if constexpr (WIDER > 0)
        for (; column < VECTORS * L; column += (V + 1) * L) panel<LAST, V + 1>(rows, column, inner, A, a_row, a_inner, B, b_row, start, finish);
}

// What a product starts from and where it goes.
INLINE auto from_zero() { return [](int, int) { return Vec<Real>{}; }; }
INLINE auto from(const Real* at, int at_row) { return [=](int row, int column) { return load(at + row * at_row + column); }; }
template <bool ADDED> INLINE auto into(Real* to, int to_row) {
    return [=](int row, int column, auto& line) {
        Real* at = to + row * to_row + column;
        for (auto& x : line) store(at, ADDED ? load(at) + x : x), at += L;
    };
}
int padded(int rows) { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS; }   // of a tile, so that its products need no remainder
