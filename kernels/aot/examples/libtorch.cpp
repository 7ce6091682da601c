// The library on LibTorch tensors: attention on PyTorch's current stream, without Python.
//
// A CPU-only LibTorch builds it too; it then says what is missing.
#include <torch/torch.h>

#include <cstdio>
#include <stdexcept>

#include "masked_vit_kernels.h"
#if __has_include(<cuda_runtime_api.h>)
#include <c10/cuda/CUDAStream.h>
#define CURRENT_STREAM c10::cuda::getCurrentCUDAStream().stream()
#else
#define CURRENT_STREAM nullptr // the default stream, which PyTorch starts on
#endif

// qkv (T, 3, H, D) of sequences that start at cu_seqlens (S + 1,) -> (T, H, D).
torch::Tensor varlen_attention(const torch::Tensor &qkv, const torch::Tensor &cu_seqlens,
                               int64_t max_seqlen) {
    const int64_t rows = qkv.size(0), heads = qkv.size(2), head_dim = qkv.size(3);
    auto out = torch::empty({rows, heads, head_dim}, qkv.options());
    auto lse = torch::empty({heads, rows}, qkv.options().dtype(torch::kFloat));
    mvk_attention_forward_args args{};
    args.dtype = qkv.scalar_type() == torch::kHalf ? MVK_DTYPE_FLOAT16 : MVK_DTYPE_BFLOAT16;
    args.head_dim = head_dim;
    args.num_heads = heads;
    args.num_sequences = cu_seqlens.size(0) - 1;
    args.rows_q = rows;
    args.max_seqlen_q = args.max_seqlen_k = max_seqlen;
    args.softmax_scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
    args.q = qkv.select(1, 0).data_ptr();
    args.k = qkv.select(1, 1).data_ptr();
    args.v = qkv.select(1, 2).data_ptr();
    args.out = out.data_ptr();
    args.lse = lse.data_ptr<float>();
    args.stride_q = args.stride_k = args.stride_v = qkv.stride(0);
    args.stride_out = out.stride(0);
    args.cu_seqlens_q = args.cu_seqlens_k = cu_seqlens.data_ptr<int32_t>();
    if (mvk_attention_forward(&args, CURRENT_STREAM) != MVK_SUCCESS)
        throw std::runtime_error(mvk_last_error_message());
    return out;
}

int main() {
    const bool on_gpu = torch::cuda::is_available();
    const auto options = torch::TensorOptions(on_gpu ? torch::kCUDA : torch::kCPU);
    const auto qkv = torch::randn({137, 3, 4, 64}, options.dtype(torch::kBFloat16));
    const auto cu_seqlens = torch::tensor({0, 100, 137}, options.dtype(torch::kInt));
    try {
        std::printf("mean %g\n", varlen_attention(qkv, cu_seqlens, 100).mean().item<double>());
    } catch (const std::runtime_error &error) {
        std::printf("the library says: %s\n", error.what());
        return on_gpu ? 1 : 0;
    }
    return 0;
}
