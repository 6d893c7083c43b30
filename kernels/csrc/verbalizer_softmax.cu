// verbalizer_softmax: the candidates' rows are streamed, their scores never reach memory.
// Why it is cut up like this, and what puts the results together: streaming.py, whose sizes stand here again.
#include "common.cuh"

namespace megaptune {
namespace {

constexpr int BLOCK_B = 16, BLOCK_C = 64, SPLIT_C = 512, PRODUCT_C = 1024;
constexpr int DEPTH = 32;             // of D, or of the candidates in a product, in shared memory at a time
constexpr int THREADS = 128;
constexpr int LANES = 16;             // threads of one row of a tile; a thread has 2 rows and 4 columns of it
constexpr int ROWS = 2, COLUMNS = 4;
static_assert(THREADS / LANES * ROWS == BLOCK_B && LANES * COLUMNS == BLOCK_C);

struct Tile {
    float left[BLOCK_B][DEPTH + 1];   // one more, so that neighbouring rows lie in different banks
    float right[BLOCK_C][DEPTH + 1];
};

struct Place {
    int row, column;                  // of this thread: rows row, row + 1; columns column, column + LANES, ...
    __device__ Place() : row(threadIdx.x / LANES * ROWS), column(threadIdx.x % LANES) {}
};

__device__ void multiply(const Tile& tile, Place at, float (&sum)[ROWS][COLUMNS]) {
    for (int k = 0; k < DEPTH; ++k) {
        float right[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) right[j] = tile.right[at.column + j * LANES][k];
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < COLUMNS; ++j) sum[i][j] = fmaf(tile.left[at.row + i][k], right[j], sum[i][j]);
    }
}

// score[i][j] = features[b0 + row i] . rows[candidate[column j]] + bias; a candidate < 0 scores 0. Every score of every
// tile is summed in the same order, so equal rows have equal scores and ties are seen as ties.
template <typename T>
__device__ void score(Tile& tile, const float* features, int64_t b0, int64_t B, const T* rows, const Matrix& shape,
                      const float* bias, const int64_t* candidate, Place at, float (&sum)[ROWS][COLUMNS]) {
    const int64_t D = shape.columns;
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLUMNS; ++j) sum[i][j] = 0;
    for (int64_t d0 = 0; d0 < D; d0 += DEPTH) {
        for (int e = threadIdx.x; e < BLOCK_B * DEPTH; e += THREADS) {
            const int64_t b = b0 + e / DEPTH, d = d0 + e % DEPTH;
            tile.left[e / DEPTH][e % DEPTH] = b < B && d < D ? features[b * D + d] : 0;
        }
        for (int e = threadIdx.x; e < BLOCK_C * DEPTH; e += THREADS) {
            const int64_t c = candidate[e / DEPTH], d = d0 + e % DEPTH;
            tile.right[e / DEPTH][e % DEPTH] =
                c >= 0 && d < D ? widen(rows[c * shape.row_stride + d * shape.column_stride]) : 0;
        }
        __syncthreads();
        multiply(tile, at, sum);
        __syncthreads();
    }
    for (int j = 0; j < COLUMNS; ++j) {
        const int64_t c = candidate[at.column + j * LANES];
        for (int i = 0; i < ROWS; ++i)
            if (bias != nullptr && c >= 0) sum[i][j] += bias[c];
    }
}

// The examples of a block: where their candidates and labels are.
struct Examples {
    int64_t start[BLOCK_B], stop[BLOCK_B], label[BLOCK_B];

    __device__ void load(const Answers& answers, int64_t b0, int64_t B, int64_t C) {
        if (threadIdx.x < BLOCK_B) {
            const int64_t b = b0 + threadIdx.x;
            const bool inside = b < B;
            start[threadIdx.x] = inside && answers.ranges != nullptr ? answers.ranges[2 * b] : 0;
            stop[threadIdx.x] = !inside ? 0 : answers.ranges != nullptr ? answers.ranges[2 * b + 1] : C;
            label[threadIdx.x] = inside && answers.labels != nullptr ? answers.labels[b] : -1;
        }
        __syncthreads();
    }

    // From `low` to before `high` lie the candidates of all of them.
    __device__ void span(int64_t& low, int64_t& high) const {
        low = INT64_MAX, high = 0;
        for (int i = 0; i < BLOCK_B; ++i)
            if (start[i] < stop[i]) {
                if (start[i] < low) low = start[i];
                if (stop[i] > high) high = stop[i];
            }
    }

    __device__ bool has(int row, int64_t c) const { return start[row] <= c && c < stop[row]; }

    // All that the label does not beat beats it, a NaN included; a tie goes to what stands first.
    __device__ bool beats(int row, int64_t c, float score, float at_label) const {
        const int64_t behind = label[row] >= 0 ? label[row] + 1 : -1 - label[row];
        return c != label[row] && !(score < at_label || (score == at_label && c >= behind));
    }
};

// What one thread has seen of one example: the highest score and its row, the sum of exp(score - best), how many beat
// the label.
struct Found {
    float best, total;
    int64_t place, better;

    __device__ void see(float score, int64_t c) {
        if (score > best) {
            total = total * expf(best - score) + 1;
            best = score;
            place = c;
        } else if (best > -INFINITY) {
            total += expf(score - best);
        } else if (score != score) {
            total = score;
        }
    }

    __device__ void join(const Found& other) {
        better += other.better;
        if (other.best > best || (other.best == best && other.best > -INFINITY && other.place < place)) {
            place = other.place;
        }
        const float top = other.best > best ? other.best : best;
        const float shift = top == -INFINITY ? 0 : top;
        total = total * expf(best - shift) + other.total * expf(other.best - shift);
        best = top;
    }
};

// One block of threads per (BLOCK_B examples, SPLIT_C candidates).
template <typename T>
__global__ void softmax_forward_kernel(const float* features, int64_t B, const T* rows, Matrix shape, const float* bias,
                                       Answers answers, float* at_label, float* best, float* total, int64_t* place,
                                       int64_t* better) {
    __shared__ Tile tile;
    __shared__ Examples examples;
    __shared__ int64_t candidate[BLOCK_C];
    __shared__ float label_score[BLOCK_B];
    __shared__ Found found[BLOCK_B][LANES];
    const int64_t C = shape.rows, b0 = int64_t(blockIdx.x) * BLOCK_B, split = blockIdx.y, S = gridDim.y;
    const Place at;
    examples.load(answers, b0, B, C);
    int64_t low, high;
    examples.span(low, high);

    // 1. Which tiles of the split hold candidates of these examples: with ranges often none.
    const int64_t first = split * SPLIT_C;
    const int64_t begin = low <= first ? first : first + (low - first) / BLOCK_C * BLOCK_C;
    const int64_t end = high < first + SPLIT_C ? high : first + SPLIT_C;
    const bool some = begin < end;

    // 2. The label's score: the diagonal of a tile whose column j is the label of example j.
    float sum[ROWS][COLUMNS];
    if (some || split == 0) {
        if (threadIdx.x < BLOCK_C) candidate[threadIdx.x] = threadIdx.x < BLOCK_B ? examples.label[threadIdx.x] : -1;
        __syncthreads();
        score(tile, features, b0, B, rows, shape, bias, candidate, at, sum);
        for (int i = 0; i < ROWS; ++i)
            if (at.column == at.row + i)  // column j < BLOCK_B = LANES is a thread's first
                label_score[at.row + i] = examples.label[at.row + i] >= 0 ? sum[i][0] : NAN;
        __syncthreads();
    }

    // 3. Stream the split; every thread keeps what it sees of its two examples.
    Found mine[ROWS];
    for (int i = 0; i < ROWS; ++i) mine[i] = {-INFINITY, 0, examples.start[at.row + i], 0};
    for (int64_t c0 = begin; c0 < end; c0 += BLOCK_C) {
        if (threadIdx.x < BLOCK_C) candidate[threadIdx.x] = c0 + threadIdx.x < C ? c0 + threadIdx.x : -1;
        __syncthreads();
        score(tile, features, b0, B, rows, shape, bias, candidate, at, sum);
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < COLUMNS; ++j) {
                const int64_t c = c0 + at.column + j * LANES;
                if (!examples.has(at.row + i, c)) continue;
                mine[i].see(sum[i][j], c);
                mine[i].better += examples.beats(at.row + i, c, sum[i][j], label_score[at.row + i]);
            }
        __syncthreads();
    }

    // 4. Put together, in order, and leave what was found.
    for (int i = 0; i < ROWS; ++i) found[at.row + i][at.column] = mine[i];
    __syncthreads();
    const int64_t b = b0 + threadIdx.x;
    if (threadIdx.x < BLOCK_B && b < B) {
        Found all = found[threadIdx.x][0];
        for (int lane = 1; lane < LANES; ++lane) all.join(found[threadIdx.x][lane]);
        best[b * S + split] = all.best;
        total[b * S + split] = all.total;
        place[b * S + split] = all.place;
        better[b * S + split] = all.better;
        if (split == 0) at_label[b] = label_score[threadIdx.x];
    }
}

// One block of threads per (BLOCK_B examples, BLOCK_C candidates from `first` on).
//
// loss = lse - score[label],  d lse / d score[c] = exp(score[c] - lse),  d score[c] / d features = rows[c],  therefore
// d loss / d features = sum over c of weight[c] * rows[c]  with  weight[c] = exp(score[c] - lse) - (c == label).
template <typename T>
__global__ void softmax_weights_kernel(const float* features, int64_t B, const T* rows, Matrix shape, const float* bias,
                                       Answers answers, const float* lse, const float* at_label, int64_t first,
                                       float* weights, int64_t W, int64_t* better) {
    __shared__ Tile tile;
    __shared__ Examples examples;
    __shared__ int64_t candidate[BLOCK_C];
    __shared__ int counted[BLOCK_B][LANES];
    const int64_t C = shape.rows, b0 = int64_t(blockIdx.x) * BLOCK_B, w0 = int64_t(blockIdx.y) * BLOCK_C;
    const int64_t c0 = first + w0;
    const Place at;
    examples.load(answers, b0, B, C);
    int64_t low, high;
    examples.span(low, high);

    // Scores again: reading the rows twice is cheaper than keeping [B, C]. Tiles without candidates read nothing.
    float sum[ROWS][COLUMNS] = {};
    if (c0 < high && c0 + BLOCK_C > low) {
        if (threadIdx.x < BLOCK_C) candidate[threadIdx.x] = c0 + threadIdx.x < C ? c0 + threadIdx.x : -1;
        __syncthreads();
        score(tile, features, b0, B, rows, shape, bias, candidate, at, sum);
    }
    for (int i = 0; i < ROWS; ++i) {
        const int row = at.row + i;
        const int64_t b = b0 + row;
        counted[row][at.column] = 0;
        if (b >= B) continue;
        for (int j = 0; j < COLUMNS; ++j) {
            const int64_t w = w0 + at.column + j * LANES, c = first + w;
            const bool has = examples.has(row, c);
            if (weights != nullptr && w < W && c < C)
                weights[b * W + w] = has ? expf(sum[i][j] - lse[b]) - float(c == examples.label[row]) : 0;
            if (better != nullptr) counted[row][at.column] += has && examples.beats(row, c, sum[i][j], at_label[b]);
        }
    }
    __syncthreads();
    if (better != nullptr && threadIdx.x < BLOCK_B && b0 + threadIdx.x < B) {
        int64_t all = 0;
        for (int lane = 0; lane < LANES; ++lane) all += counted[threadIdx.x][lane];
        better[(b0 + threadIdx.x) * gridDim.y + blockIdx.y] = all;
    }
}

// One block of threads per (BLOCK_B examples, BLOCK_C columns of D, PRODUCT_C candidates): its part of weights @ rows.
template <typename T>
__global__ void weighted_rows_kernel(const float* weights, int64_t W, int64_t B, const T* rows, Matrix shape,
                                     const int64_t* ranges, int64_t first, int64_t width, float* parts) {
    __shared__ Tile tile;
    __shared__ Examples examples;
    const int64_t D = shape.columns, b0 = int64_t(blockIdx.x) * BLOCK_B, d0 = int64_t(blockIdx.y) * BLOCK_C;
    const int64_t part = blockIdx.z, begin = part * PRODUCT_C;
    const Place at;
    examples.load(Answers{nullptr, ranges}, b0, B, shape.rows);
    int64_t low, high;
    examples.span(low, high);
    int64_t end = begin + PRODUCT_C < width ? begin + PRODUCT_C : width;
    if (first + begin >= high || first + end <= low) end = begin;  // no candidates, no work

    float sum[ROWS][COLUMNS] = {};
    for (int64_t w0 = begin; w0 < end; w0 += DEPTH) {
        for (int e = threadIdx.x; e < BLOCK_B * DEPTH; e += THREADS) {
            const int64_t b = b0 + e / DEPTH, w = w0 + e % DEPTH;
            tile.left[e / DEPTH][e % DEPTH] = b < B && w < end ? weights[b * W + w] : 0;
        }
        for (int e = threadIdx.x; e < BLOCK_C * DEPTH; e += THREADS) {
            const int64_t d = d0 + e % BLOCK_C, w = w0 + e / BLOCK_C;
            tile.right[e % BLOCK_C][e / BLOCK_C] =
                d < D && w < end ? widen(rows[(first + w) * shape.row_stride + d * shape.column_stride]) : 0;
        }
        __syncthreads();
        multiply(tile, at, sum);
        __syncthreads();
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLUMNS; ++j) {
            const int64_t b = b0 + at.row + i, d = d0 + at.column + j * LANES;
            if (b < B && d < D) parts[(part * B + b) * D + d] = sum[i][j];
        }
}

}  // namespace

void softmax_forward(const float* features, int64_t B, Matrix rows, const float* bias, Answers answers, float* at_label,
                     float* best, float* total, int64_t* place, int64_t* better, void* stream) {
    with_type(rows.kind, [&](auto zero) {
        using T = decltype(zero);
        launch(softmax_forward_kernel<T>, dim3(blocks_of(B, BLOCK_B), blocks_of(rows.rows, SPLIT_C)), THREADS, stream,
               features, B, static_cast<const T*>(rows.data), rows, bias, answers, at_label, best, total, place, better);
    });
}

void softmax_weights(const float* features, int64_t B, Matrix rows, const float* bias, Answers answers, const float* lse,
                     const float* at_label, int64_t first, int64_t blocks, float* weights, int64_t W, int64_t* better,
                     void* stream) {
    with_type(rows.kind, [&](auto zero) {
        using T = decltype(zero);
        launch(softmax_weights_kernel<T>, dim3(blocks_of(B, BLOCK_B), unsigned(blocks)), THREADS, stream, features, B,
               static_cast<const T*>(rows.data), rows, bias, answers, lse, at_label, first, weights, W, better);
    });
}

void weighted_rows(const float* weights, int64_t W, int64_t B, Matrix rows, const int64_t* ranges, int64_t first,
                   int64_t width, float* parts, void* stream) {
    with_type(rows.kind, [&](auto zero) {
        using T = decltype(zero);
        launch(weighted_rows_kernel<T>,
               dim3(blocks_of(B, BLOCK_B), blocks_of(rows.columns, BLOCK_C), blocks_of(width, PRODUCT_C)), THREADS,
               stream, weights, W, B, static_cast<const T*>(rows.data), rows, ranges, first, width, parts);
    });
}

}  // namespace megaptune
