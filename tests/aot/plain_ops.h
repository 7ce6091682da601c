/* Every op of the library in plain C on the host: float32 tensors, contiguous, sums in double.
 * Shapes and meanings are those of masked_vit_kernels.h. */
#ifndef MVK_TEST_PLAIN_OPS_H
#define MVK_TEST_PLAIN_OPS_H

#include <stdint.h>

/* q, out (Tq, H, D), k, v (Tk, H, D), lse (H, Tq). */
void plain_attention_forward(int sequences, int heads, int head_dim, int rows_q, double scale,
                             const int32_t *cu_q, const int32_t *cu_k, const float *q,
                             const float *k, const float *v, float *out, float *lse);
void plain_attention_backward(int sequences, int heads, int head_dim, int rows_q, int rows_k,
                              double scale, const int32_t *cu_q, const int32_t *cu_k,
                              const float *q, const float *k, const float *v, const float *dout,
                              float *dq, float *dk, float *dv);

/* mvk_row_index on the host. */
struct plain_index {
    const int64_t *indices;
    const int32_t *sequence_ids;
    int rows, tokens, rows_per_image, sequences_per_image;
};

void plain_gather(const struct plain_index *index, int width, const float *x, float *out);
/* fill (B, N, D) or NULL. */
void plain_scatter(const struct plain_index *index, int images, int width, const float *x,
                   const float *fill, float *out);
/* The sum over all places without a row: (D,). */
void plain_scatter_fill_gradient(const struct plain_index *index, int images, int width,
                                 const float *grad, float *fill_gradient);
void plain_sum_rows_by_place(int places, int width, const int64_t *order, const int64_t *starts,
                             const float *values, float *out);

/* images (B, 3, size, size) bytes -> (R, columns). */
void plain_patch_rows(const struct plain_index *index, int size, int patch, int columns,
                      const uint8_t *images, const float *mean, const float *std, float *out);
void plain_add_position(const struct plain_index *index, int width, const float *x,
                        const float *bias, const float *position, float *out);
/* grad_x (R, D) and its sum (D,). */
void plain_add_position_backward(const struct plain_index *index, int width, const float *grad,
                                 float *grad_x, float *sum);
/* patches (R, K), weight (D, K) -> (R, D). */
void plain_linear(int rows, int columns, int width, const float *patches, const float *weight,
                  float *out);

void plain_assemble(int rows, int num_context, int num_targets, int width, const float *context,
                    const float *mask_token, const float *position, const int64_t *context_ids,
                    const int64_t *target_ids, const int64_t *source_rows, float *out);
void plain_assemble_backward(int num_context, int num_targets, int copies, int width,
                             const float *grad, const int64_t *context_copies,
                             const int64_t *target_rows, float *grad_context, float *grad_mask);

/* The loss; `denominator` 0 stands for valid rows times D. grad (Tt, D) of grad_loss 1. */
double plain_loss(int l2, int rows, int width, const float *predictions, const float *features,
                  const int64_t *target_rows, double denominator, float *grad);

void plain_ema(int64_t count, double momentum, float *target, const float *source);

/* One AdamW step on one tensor and its average; the norm has been clipped by `clip`. */
struct plain_adamw {
    double lr, beta1, beta2, eps, weight_decay, momentum, clip;
    int step; /* the number of this step, from 1 */
};
void plain_adamw_ema(const struct plain_adamw *with, int64_t count, const float *gradient,
                     float *weights, float *exp_avg, float *exp_avg_sq, float *average);

#endif
