// What starts the kernels. Pointers are to device memory, strides count elements, stream is a cudaStream_t.
// B examples, N positions, R table rows, D backbone width, V vocabulary, C candidates, S splits, W weights held.
#pragma once
#include <cstdint>

namespace megaptune {

enum class Kind { fp32, bf16, fp16 };

// A matrix of any of the three kinds and any strides.
struct Matrix {
    const void* data;
    Kind kind;
    int64_t rows, columns, row_stride, column_stride;
};

// Which candidates an example has and where its label is among the rows. ranges [B, 2], or null: all C rows.
// labels [B]: a row, or -1 - the row that it would stand before.
struct Answers {
    const int64_t* labels;
    const int64_t* ranges;
};

void splice_forward(const int64_t* slots, int64_t N, Matrix vocab, Matrix table, float scale, void* out, void* stream);

// grad [N, D] and out [R, D] are contiguous.
void splice_backward(const int64_t* slots, int64_t N, Matrix grad, float scale, float* out, int64_t R, void* stream);

// features [B, D] contiguous; bias [C] or null. at_label [B]; best, total, place, better [B, S].
void softmax_forward(const float* features, int64_t B, Matrix rows, const float* bias, Answers answers, float* at_label,
                     float* best, float* total, int64_t* place, int64_t* better, void* stream);

// Of the candidates from `first` on: weights [B, W] or null; better [B, blocks] or null, with at_label [B].
void softmax_weights(const float* features, int64_t B, Matrix rows, const float* bias, Answers answers, const float* lse,
                     const float* at_label, int64_t first, int64_t blocks, float* weights, int64_t W, int64_t* better,
                     void* stream);

// parts [width / PRODUCT_C, B, D]: weights[:, :width] @ rows[first : first + width].
void weighted_rows(const float* weights, int64_t W, int64_t B, Matrix rows, const int64_t* ranges, int64_t first,
                   int64_t width, float* parts, void* stream);

}  // namespace megaptune
