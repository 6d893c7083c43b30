// The kernels as functions of tensors. Needs no CUDA headers: the stream comes from Python as a number.
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "kernels.h"

namespace {

using at::Tensor;
using megaptune::Answers;
using megaptune::Kind;
using megaptune::Matrix;
using Maybe = std::optional<Tensor>;

Matrix matrix(const Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.dim() == 2, "a matrix was expected, not a tensor of ", tensor.dim(), " dimensions");
    Kind kind = Kind::fp32;
    switch (tensor.scalar_type()) {
        case at::kFloat: break;
        case at::kBFloat16: kind = Kind::bf16; break;
        case at::kHalf: kind = Kind::fp16; break;
        default: TORCH_CHECK_VALUE(false, "fp32, bf16 or fp16 was expected, not ", tensor.scalar_type());
    }
    return {tensor.const_data_ptr(), kind, tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

// A contiguous tensor's memory; the check on its dtype is data_ptr's own.
template <typename T>
T* memory(const Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.is_contiguous(), "a contiguous tensor was expected");
    return tensor.data_ptr<T>();
}

template <typename T>
T* memory(const Maybe& tensor) {
    return tensor.has_value() ? memory<T>(*tensor) : nullptr;
}

void* stream_of(int64_t stream) { return reinterpret_cast<void*>(stream); }

void splice_forward(const Tensor& slots, const Tensor& vocab, const Tensor& table, double scale, const Tensor& out,
                    int64_t stream) {
    TORCH_CHECK_VALUE(out.scalar_type() == vocab.scalar_type() && out.is_contiguous(), "out does not fit the vocabulary");
    TORCH_CHECK_VALUE(table.scalar_type() == at::kFloat, "the table must be fp32");
    megaptune::splice_forward(memory<int64_t>(slots), slots.numel(), matrix(vocab), matrix(table), float(scale),
                              out.data_ptr(), stream_of(stream));
}

void splice_backward(const Tensor& slots, const Tensor& grad, double scale, const Tensor& out, int64_t stream) {
    TORCH_CHECK_VALUE(grad.is_contiguous(), "a contiguous tensor was expected");
    const Tensor flat = grad.view({-1, grad.size(-1)});
    megaptune::splice_backward(memory<int64_t>(slots), slots.numel(), matrix(flat), float(scale), memory<float>(out),
                               out.size(0), stream_of(stream));
}

void softmax_forward(const Tensor& features, const Tensor& rows, const Maybe& bias, const Tensor& labels,
                     const Maybe& ranges, const Tensor& at_label, const Tensor& best, const Tensor& total,
                     const Tensor& place, const Tensor& better, int64_t stream) {
    megaptune::softmax_forward(memory<float>(features), features.size(0), matrix(rows), memory<float>(bias),
                               Answers{memory<int64_t>(labels), memory<int64_t>(ranges)}, memory<float>(at_label),
                               memory<float>(best), memory<float>(total), memory<int64_t>(place), memory<int64_t>(better),
                               stream_of(stream));
}

void softmax_weights(const Tensor& features, const Tensor& rows, const Maybe& bias, const Tensor& labels,
                     const Maybe& ranges, const Tensor& lse, const Maybe& at_label, int64_t first, int64_t blocks,
                     const Maybe& weights, const Maybe& better, int64_t stream) {
    megaptune::softmax_weights(memory<float>(features), features.size(0), matrix(rows), memory<float>(bias),
                               Answers{memory<int64_t>(labels), memory<int64_t>(ranges)}, memory<float>(lse),
                               memory<float>(at_label), first, blocks, memory<float>(weights),
                               weights.has_value() ? weights->size(1) : 0, memory<int64_t>(better), stream_of(stream));
}

void weighted_rows(const Tensor& weights, const Tensor& rows, const Maybe& ranges, int64_t first, int64_t width,
                   const Tensor& parts, int64_t stream) {
    megaptune::weighted_rows(memory<float>(weights), weights.size(1), weights.size(0), matrix(rows),
                             memory<int64_t>(ranges), first, width, memory<float>(parts), stream_of(stream));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("splice_forward", &splice_forward);
    module.def("splice_backward", &splice_backward);
    module.def("softmax_forward", &softmax_forward);
    module.def("softmax_weights", &softmax_weights);
    module.def("weighted_rows", &weighted_rows);
}
