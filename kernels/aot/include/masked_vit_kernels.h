/* masked_vit_kernels: fused operations for masked vision transformers, as a C library.
 *
 * The kernels are compiled ahead of time and embedded; nothing is compiled and no Python runs when
 * they are used. The CUDA driver is loaded at the first launch (libcuda.so.1): the library builds,
 * links and loads on machines without one, and a launch there returns MVK_ERROR_NO_DRIVER.
 *
 * Conventions
 *   - Every function takes one struct of arguments. Zero it, then set its fields; a field that says
 *     "or NULL" may stay zero.
 *   - Pointers are device addresses of the current CUDA context unless a comment says "host". They
 *     must be 16-byte aligned unless a comment says otherwise.
 *   - Tensors are row-major, their last dimension contiguous. Strides count elements.
 *   - Work is queued on `stream` (a CUstream or cudaStream_t, NULL for the default stream) and the
 *     function returns at once. Launches can be captured in a CUDA graph once each function has run
 *     with the same sizes outside a capture: the first call loads its kernels.
 *   - Functions are thread-safe. Outputs need not be cleared; rows of padding receive zeros.
 *   - T tokens, S sequences, H heads, D width or head dim, B images, N patches, M target blocks,
 *     R rows of an index.
 *
 * Kernels exist for the sizes of the usual models: head dims 24, 32, 64, 80, 88; widths 192, 384,
 * 768, 1024, 1280, 1408. Another size returns MVK_ERROR_NOT_COMPILED and the message lists what
 * there is. Devices: compute capability 8.x, 9.0 and 10.0, as far as they were built.
 */
#ifndef MASKED_VIT_KERNELS_H
#define MASKED_VIT_KERNELS_H

#include <stdint.h>

#if defined(__GNUC__)
#define MVK_API __attribute__((visibility("default")))
#else
#define MVK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MVK_VERSION "0.1.0"

/* ---------------------------------------------------------------- errors and queries */

typedef enum mvk_status {
    MVK_SUCCESS = 0,
    MVK_ERROR_INVALID_ARGUMENT = 1,   /* a pointer, size or stride the function cannot take */
    MVK_ERROR_NOT_COMPILED = 2,       /* sizes or dtypes that no embedded kernel serves */
    MVK_ERROR_NO_DRIVER = 3,          /* libcuda.so.1 is missing or too old */
    MVK_ERROR_NO_CONTEXT = 4,         /* no CUDA context is current on this thread */
    MVK_ERROR_UNSUPPORTED_DEVICE = 5, /* the device's compute capability has no kernels here */
    MVK_ERROR_CUDA = 6,               /* the driver refused a call; the message holds its words */
    MVK_ERROR_INTERNAL = 7            /* a defect of this library */
} mvk_status;

/* What a status means, in a few words. Never NULL. */
MVK_API const char *mvk_error_string(mvk_status status);

/* What was wrong with the last failed call of this thread: the value, what was expected, what to
 * try. "" before any failure. Valid until the next failure on the same thread. */
MVK_API const char *mvk_last_error_message(void);

/* MVK_VERSION of the library that was loaded. */
MVK_API const char *mvk_version(void);

/* Host: MVK_SUCCESS if the current context's device can run the library's kernels. */
MVK_API mvk_status mvk_check_device(void);

/* Number of embedded kernels, of all architectures. */
MVK_API int mvk_kernel_count(void);

/* ---------------------------------------------------------------- types */

typedef void *mvk_stream; /* CUstream or cudaStream_t */

typedef enum mvk_dtype {
    MVK_DTYPE_FLOAT32 = 0,
    MVK_DTYPE_FLOAT16 = 1,
    MVK_DTYPE_BFLOAT16 = 2,
    MVK_DTYPE_UINT8 = 3,
    MVK_DTYPE_INT32 = 4,
    MVK_DTYPE_INT64 = 5
} mvk_dtype;

/* Which image and token each of R rows stands for, in one of three layouts:
 *   every token  indices NULL:       row r is token r % N of image r / N
 *   dense        sequence_ids NULL:  row r is token indices[r] of image r / rows_per_image
 *   packed       both:               row r is token indices[r] of image
 *                                    sequence_ids[r] / sequences_per_image
 * A row whose index (or sequence id) is negative or not below N stands for nothing. */
typedef struct mvk_row_index {
    const int64_t *indices;       /* (R,) or NULL */
    const int32_t *sequence_ids;  /* (R,) or NULL */
    int64_t num_rows;             /* R */
    int64_t num_tokens;           /* N, tokens an image */
    int64_t rows_per_image;       /* dense: rows an image; every token: N */
    int64_t sequences_per_image;  /* packed: sequences an image, 1 or M */
} mvk_row_index;

/* ---------------------------------------------------------------- packing (host) */

#define MVK_TILE_ROWS 64       /* rows an entry of a tile map covers */
#define MVK_WIDE_TILE_ROWS 128 /* the same for a wide tile map */

/* Describe S sequences laid end to end in `capacity` rows. All pointers are host memory, and each
 * but `lengths` may be NULL. Copy the results to the device; attention takes them as they are. */
typedef struct mvk_pack_lengths_args {
    const int64_t *lengths;  /* (S,) >= 0 */
    int64_t num_sequences;   /* S */
    int64_t capacity;        /* rows of the packed tensors, at least the sum of the lengths */
    int32_t *cu_seqlens;     /* out (S + 1,): first row of each sequence, then the total */
    int32_t *sequence_ids;   /* out (capacity,): the sequence of each row, -1 on padding */
    int32_t *sequence_order; /* out (S,): sequences from longest to shortest */
    int32_t *tile_map;       /* out (mvk_num_tiles(capacity, S, MVK_TILE_ROWS), 2) */
    int32_t *wide_tile_map;  /* out (mvk_num_tiles(capacity, S, MVK_WIDE_TILE_ROWS), 2) */
} mvk_pack_lengths_args;

/* Entries of a tile map of `tile_rows` rows a tile: capacity / tile_rows + S. */
MVK_API int64_t mvk_num_tiles(int64_t capacity, int64_t num_sequences, int64_t tile_rows);

/* Fill the outputs. MVK_ERROR_INVALID_ARGUMENT: a negative length, a sum over `capacity`. */
MVK_API mvk_status mvk_pack_lengths(const mvk_pack_lengths_args *args);

/* ---------------------------------------------------------------- attention */

/* softmax(q k^T * scale) v of every sequence, and the log-sum-exp of its scores.
 *
 * q, k, v, out: dtype (float16 or bfloat16), (T, H, D) views whose heads lie side by side: element
 * (t, h, d) is at t * stride + h * D + d. So q = qkv, k = qkv + H * D, v = qkv + 2 * H * D with
 * strides 3 * H * D read a (T, 3, H, D) projection in place. Strides are multiples of 8.
 * Give tile_map_q and wide_tile_map_q of mvk_pack_lengths, which keep long and short sequences
 * balanced, or neither: the grid then covers max_seqlen_q in every sequence. */
typedef struct mvk_attention_forward_args {
    mvk_dtype dtype;
    int64_t head_dim;      /* D: 24, 32, 64, 80, 88 */
    int64_t num_heads;     /* H */
    int64_t num_sequences; /* S */
    int64_t rows_q;        /* Tq, padding included */
    int64_t max_seqlen_q;  /* upper bound of the query lengths */
    int64_t max_seqlen_k;  /* upper bound of the key lengths */
    double softmax_scale;  /* > 0, usually 1 / sqrt(D) */
    const void *q;         /* (Tq, H, D) */
    const void *k;         /* (Tk, H, D) */
    const void *v;         /* (Tk, H, D) */
    void *out;             /* (Tq, H, D); zeros on padding and where a sequence has no keys */
    float *lse;            /* (H, Tq), natural logarithm; -inf there */
    int64_t stride_q, stride_k, stride_v, stride_out; /* elements from token to token */
    const int32_t *cu_seqlens_q;    /* (S + 1,) */
    const int32_t *cu_seqlens_k;    /* (S + 1,) */
    const int32_t *tile_map_q;      /* (num_tiles_q, 2) or NULL */
    const int32_t *wide_tile_map_q; /* (num_wide_tiles_q, 2) or NULL */
    int64_t num_tiles_q, num_wide_tiles_q;
} mvk_attention_forward_args;

MVK_API mvk_status mvk_attention_forward(const mvk_attention_forward_args *args, mvk_stream stream);

/* Gradients of mvk_attention_forward; deterministic. `out` and `lse` are its results, `delta` is
 * scratch. Give all four maps or none. */
typedef struct mvk_attention_backward_args {
    mvk_dtype dtype;
    int64_t head_dim, num_heads, num_sequences;
    int64_t rows_q, rows_k; /* Tq, Tk, padding included */
    int64_t max_seqlen_q, max_seqlen_k;
    double softmax_scale;
    const void *q, *k, *v, *out; /* as in the forward */
    const void *dout;            /* (Tq, H, D) */
    const float *lse;            /* (H, Tq) */
    float *delta;                /* (H, Tq) scratch */
    void *dq, *dk, *dv;          /* (Tq, H, D), (Tk, H, D), (Tk, H, D); zeros on padding */
    int64_t stride_q, stride_k, stride_v, stride_out, stride_dout, stride_dq, stride_dk, stride_dv;
    const int32_t *cu_seqlens_q, *cu_seqlens_k; /* (S + 1,) */
    const int32_t *sequence_order;              /* (S,) or NULL */
    const int32_t *tile_map_q;                  /* (num_tiles_q, 2) or NULL */
    const int32_t *tile_map_k;                  /* (num_tiles_k, 2) or NULL */
    const int32_t *wide_tile_map_k;             /* (num_wide_tiles_k, 2) or NULL */
    int64_t num_tiles_q, num_tiles_k, num_wide_tiles_k;
} mvk_attention_backward_args;

MVK_API mvk_status mvk_attention_backward(const mvk_attention_backward_args *args,
                                          mvk_stream stream);

/* ---------------------------------------------------------------- tokens */

/* out[r] = x[image(r), token(r)], zero where row r stands for nothing. float32, float16, bfloat16.
 * Layouts dense and packed. Strides are multiples of 16. */
typedef struct mvk_gather_rows_args {
    mvk_dtype dtype;
    int64_t width;        /* D */
    const void *x;        /* (B, N, D) */
    int64_t stride_image; /* elements from image to image */
    int64_t stride_token; /* elements from token to token */
    mvk_row_index index;
    void *out;            /* (R, D) */
} mvk_gather_rows_args;

MVK_API mvk_status mvk_gather_rows(const mvk_gather_rows_args *args, mvk_stream stream);

/* out[b, n] = x[r] where row r stands for token n of image b, else fill[b, n], or zero without
 * fill. Rows of one image must not share a token. Two launches. */
typedef struct mvk_scatter_rows_args {
    mvk_dtype dtype;
    int64_t width;              /* D */
    int64_t num_images;         /* B */
    const void *x;              /* (R, D) */
    int64_t stride_row;         /* elements from row to row, a multiple of 16 */
    const void *fill;           /* (B, N, D) or NULL; strides of 0 repeat it */
    int64_t stride_fill_image;  /* multiples of 16 */
    int64_t stride_fill_token;
    mvk_row_index index;        /* dense or packed */
    int32_t *place_to_row;      /* (B * N,) scratch */
    void *out;                  /* (B, N, D) */
} mvk_scatter_rows_args;

MVK_API mvk_status mvk_scatter_rows(const mvk_scatter_rows_args *args, mvk_stream stream);

/* Gradient of the fill: grad (B, N, D), summed over the places that hold no row. Seen as
 * (outer, inner, D), B * N = outer * inner, each of `chunks` parts of outer is summed on its own:
 *   fill (B, N, D)  inner = B * N, chunks = 1, partial is the gradient
 *   fill (N, D)     inner = N, chunks up to 8; the caller adds the chunks
 *   fill (D,)       inner = 16, chunks up to 256; the caller adds chunks and inner */
typedef struct mvk_scatter_fill_gradient_args {
    mvk_dtype dtype;
    int64_t width;         /* D */
    int64_t num_images;    /* B */
    const void *grad;      /* (B, N, D) */
    mvk_row_index index;   /* dense or packed */
    int32_t *place_to_row; /* (B * N,) scratch */
    int64_t chunks, inner;
    float *partial;        /* (chunks, inner, D) */
} mvk_scatter_fill_gradient_args;

MVK_API mvk_status mvk_scatter_fill_gradient(const mvk_scatter_fill_gradient_args *args,
                                             mvk_stream stream);

/* out[p] = sum of values[order[i]] for starts[p] <= i < starts[p + 1], in that order, in float32:
 * the gradient of taking a row more than once. `order` and `starts` come from a stable sort of the
 * rows by place. */
typedef struct mvk_sum_rows_by_place_args {
    mvk_dtype dtype;
    int64_t width;         /* D */
    int64_t num_rows;      /* R */
    int64_t num_places;    /* P */
    const void *values;    /* (R, D) */
    int64_t stride_row;    /* a multiple of 16 */
    const int64_t *order;  /* (R,) */
    const int64_t *starts; /* (P + 1,) */
    void *out;             /* (P, D) */
} mvk_sum_rows_by_place_args;

MVK_API mvk_status mvk_sum_rows_by_place(const mvk_sum_rows_by_place_args *args, mvk_stream stream);

/* ---------------------------------------------------------------- patch embedding */

/* Images are square, 3 channels, contiguous (B, 3, size, size), of 224 pixels in patches of 14 or
 * 16 or of 448 in patches of 16. uint8 pixels become (x / 255 - mean) / std; float images (of the
 * output's dtype) are taken as normalised and have no mean and std. */

/* out[r] = pixels of the patch that row r stands for, channel by channel, zero where it stands for
 * none and in the columns past 3 * patch_size^2. */
typedef struct mvk_patch_rows_args {
    mvk_dtype image_dtype; /* uint8, float16, bfloat16 */
    mvk_dtype dtype;       /* of out: float16, bfloat16 */
    int64_t image_size, patch_size;
    const void *images;    /* (B, 3, size, size) */
    const float *mean;     /* (3,) for uint8, else NULL */
    const float *std;      /* (3,) for uint8, else NULL */
    mvk_row_index index;   /* any layout */
    void *out;             /* (R, mvk_patch_row_width(patch_size)) */
} mvk_patch_rows_args;

MVK_API mvk_status mvk_patch_rows(const mvk_patch_rows_args *args, mvk_stream stream);

/* Columns of a patch row: 3 * patch_size^2 rounded up to a multiple of 16. */
MVK_API int64_t mvk_patch_row_width(int64_t patch_size);

/* out[r] = x[r] + bias + position[token(r)], zero where row r stands for nothing. */
typedef struct mvk_add_position_args {
    mvk_dtype dtype;      /* of x and out: float32, float16, bfloat16 */
    mvk_dtype bias_dtype; /* dtype or float32 */
    int64_t width;        /* D */
    const void *x;        /* (R, D) */
    int64_t stride_row;   /* a multiple of 16 */
    const void *bias;     /* (D,) */
    const float *position; /* (N, D) */
    mvk_row_index index;  /* any layout */
    void *out;            /* (R, D) */
} mvk_add_position_args;

MVK_API mvk_status mvk_add_position(const mvk_add_position_args *args, mvk_stream stream);

/* grad_x = grad with zeros where a row stands for nothing; partial[c] = its sum over part c of the
 * rows, which the caller adds up to the gradient of the bias. */
typedef struct mvk_add_position_backward_args {
    mvk_dtype dtype;
    int64_t width;       /* D */
    const void *grad;    /* (R, D) */
    int64_t stride_row;  /* a multiple of 16 */
    mvk_row_index index; /* any layout */
    void *grad_x;        /* (R, D) */
    int64_t chunks;      /* parts, for instance min(256, R / 64) and at least 1 */
    float *partial;      /* (chunks, D) */
} mvk_add_position_backward_args;

MVK_API mvk_status mvk_add_position_backward(const mvk_add_position_backward_args *args,
                                             mvk_stream stream);

/* Patch rows, their product with the weight, bias and position in one kernel: uint8 images, layouts
 * "every token" and packed. */
typedef struct mvk_embed_visible_patches_args {
    mvk_dtype dtype;       /* of weight, bias and out: float16, bfloat16 */
    int64_t width;         /* D */
    int64_t image_size, patch_size;
    const uint8_t *images; /* (B, 3, size, size) */
    const float *mean;     /* (3,) */
    const float *std;      /* (3,) */
    const void *weight;    /* (D, mvk_patch_row_width(patch_size)), zeros past 3 * patch_size^2 */
    const void *bias;      /* (D,) */
    const float *position; /* (N, D) */
    mvk_row_index index;
    void *out;             /* (R, D) */
} mvk_embed_visible_patches_args;

MVK_API mvk_status mvk_embed_visible_patches(const mvk_embed_visible_patches_args *args,
                                             mvk_stream stream);

/* ---------------------------------------------------------------- predictor tokens */

/* The predictor's input: row r copies context row s = source_rows[r] plus its position where
 * 0 <= s < Tc, is the mask token plus the position of target s - Tc where Tc <= s < Tc + Tt, and
 * zero otherwise. */
typedef struct mvk_assemble_predictor_tokens_args {
    mvk_dtype dtype;            /* of context and out: float32, float16, bfloat16 */
    mvk_dtype mask_dtype;       /* dtype or float32; any of the three where dtype is float32 */
    int64_t width;              /* P: 192, 384 */
    int64_t num_rows;           /* Tp, rows of out */
    int64_t num_context;        /* Tc */
    int64_t num_targets;        /* Tt */
    int64_t num_positions;      /* N */
    const void *context;        /* (Tc, P) */
    int64_t stride_context;     /* a multiple of 16 */
    const void *mask_token;     /* (P,) */
    const float *position;      /* (N, P) */
    const int64_t *context_ids; /* (Tc,) patch ids, -1 on padding */
    const int64_t *target_ids;  /* (Tt,) */
    const int64_t *source_rows; /* (Tp,) */
    void *out;                  /* (Tp, P) */
} mvk_assemble_predictor_tokens_args;

MVK_API mvk_status
mvk_assemble_predictor_tokens(const mvk_assemble_predictor_tokens_args *args, mvk_stream stream);

/* grad_context[c] = sum of grad over the rows that copy context row c; partial[i] = sum of grad
 * over part i of the mask tokens, which the caller adds up to the mask token's gradient. */
typedef struct mvk_assemble_predictor_tokens_backward_args {
    mvk_dtype dtype;               /* of grad and grad_context */
    int64_t width;                 /* P */
    int64_t num_context;           /* Tc */
    int64_t num_targets;           /* Tt */
    int64_t copies;                /* M: 1 or 4 */
    const void *grad;              /* (Tp, P) */
    int64_t stride_row;            /* a multiple of 16 */
    const int64_t *context_copies; /* (Tc, M) rows of grad, -1 for none */
    const int64_t *target_rows;    /* (Tt,) rows of grad, -1 on padding */
    void *grad_context;            /* (Tc, P) */
    int64_t chunks;                /* parts, for instance min(128, Tt / 64) and at least 1 */
    float *partial;                /* (chunks, P) */
} mvk_assemble_predictor_tokens_backward_args;

MVK_API mvk_status mvk_assemble_predictor_tokens_backward(
    const mvk_assemble_predictor_tokens_backward_args *args, mvk_stream stream);

/* ---------------------------------------------------------------- loss */

typedef enum mvk_loss_kind { MVK_LOSS_SMOOTH_L1 = 0, MVK_LOSS_L2 = 1 } mvk_loss_kind;

/* Distance between predictions and the LayerNorm (no affine, eps 1e-5) of the feature rows they
 * stand for, summed over valid rows and divided by the denominator. Two launches. */
typedef struct mvk_prediction_loss_args {
    mvk_dtype dtype;             /* of predictions: float32, float16, bfloat16 */
    mvk_dtype feature_dtype;     /* dtype or float32 */
    mvk_loss_kind kind;
    int64_t width;               /* D */
    int64_t num_rows;            /* Tt */
    int64_t num_features;        /* F */
    const void *predictions;     /* (Tt, D) */
    int64_t stride_prediction;   /* a multiple of 16 */
    const void *features;        /* (F, D) */
    int64_t stride_feature;      /* a multiple of 16 */
    const int64_t *target_rows;  /* (Tt,) row of features, -1 on padding */
    const void *denominator;     /* one element, or NULL: valid rows times D, at least 1 */
    mvk_dtype denominator_dtype; /* float32 or int64 */
    float *partial;              /* (2, mvk_loss_programs(Tt)) scratch */
    float *mean;                 /* (Tt,) out, for the backward */
    float *rstd;                 /* (Tt,) out, for the backward */
    float *out;                  /* (2,): the loss, 1 / denominator */
} mvk_prediction_loss_args;

MVK_API mvk_status mvk_prediction_loss(const mvk_prediction_loss_args *args, mvk_stream stream);

/* Columns of `partial` for `num_rows` predictions. */
MVK_API int64_t mvk_loss_programs(int64_t num_rows);

/* grad = d loss / d predictions * grad_loss, zero on padding. mean, rstd and out are those of the
 * forward. */
typedef struct mvk_prediction_loss_backward_args {
    mvk_dtype dtype, feature_dtype;
    mvk_loss_kind kind;
    int64_t width, num_rows, num_features;
    const float *grad_loss; /* one element */
    const float *out;       /* (2,) */
    const void *predictions;
    int64_t stride_prediction;
    const void *features;
    int64_t stride_feature;
    const int64_t *target_rows;
    const float *mean, *rstd;
    void *grad; /* (Tt, D) */
} mvk_prediction_loss_backward_args;

MVK_API mvk_status mvk_prediction_loss_backward(const mvk_prediction_loss_backward_args *args,
                                                mvk_stream stream);

/* ---------------------------------------------------------------- many tensors at once */

/* EMA and the optimiser update any number of tensors in one launch, one program a tile of
 * MVK_TENSOR_TILE elements. `tiles` names each program's tensor (row of the table) and its tile
 * within it; the table holds addresses. Both lie on the device and are built once. */
#define MVK_TENSOR_TILE 8192

/* Host: fill tiles (count, 2) for tensors of these sizes and return count; with tiles NULL only
 * count. */
MVK_API int64_t mvk_tensor_tiles(const int64_t *sizes, int64_t num_tensors, int32_t *tiles);

/* target <- momentum * target + (1 - momentum) * source for every tensor of the table. */
typedef struct mvk_ema_update_args {
    mvk_dtype source_dtype;   /* float32, float16, bfloat16; targets are float32 */
    const int32_t *tiles;     /* (num_tiles, 2) */
    int64_t num_tiles;
    const int64_t *table;     /* (tensors, 4): address of target, of source, elements, 0 */
    const float *momentum_ptr; /* one element on the device, or NULL: */
    double momentum;          /* in [0, 1], the host's value */
} mvk_ema_update_args;

MVK_API mvk_status mvk_ema_update(const mvk_ema_update_args *args, mvk_stream stream);

/* AdamW with a moving average of the weights, in three launches: norm, decide, update.
 *
 * A slot is one parameter. Its row of the table holds the addresses of
 *   [0] float32 weights  [1] their copy in dtype, 0 if dtype is float32  [2] exp_avg
 *   [3] exp_avg_sq  [4] float32 average, 0 without one  [5] its copy in dtype, or 0
 *   [6] the number of elements  [7] 0
 * where all tensors but the copies are float32. Slots of different dtypes take launches of their
 * own, with their own range of tiles [first_tile, first_tile + num_tiles). */
#define MVK_ADAMW_TABLE_COLUMNS 8
#define MVK_ADAMW_COEFFICIENTS 8
#define MVK_ADAMW_GROUP_VALUES 5

/* partials[t] = sum of squares of the gradient in tile t. */
typedef struct mvk_adamw_ema_gradient_norm_args {
    mvk_dtype gradient_dtype;
    const int32_t *tiles;     /* (tiles of all slots, 2) */
    int64_t first_tile, num_tiles;
    const int64_t *table;     /* (P, MVK_ADAMW_TABLE_COLUMNS) */
    const int64_t *gradients; /* (P,) addresses, 0 for none */
    float *partials;          /* (tiles of all slots,) */
} mvk_adamw_ema_gradient_norm_args;

MVK_API mvk_status mvk_adamw_ema_gradient_norm(const mvk_adamw_ema_gradient_norm_args *args,
                                               mvk_stream stream);

/* Norm, clipping, whether to skip (a norm or loss that is not finite), step counts and the
 * coefficients of the update. */
typedef struct mvk_adamw_ema_decide_args {
    const float *partials;    /* (num_partials,) */
    int64_t num_partials;
    const float *loss;        /* one element or NULL; any alignment */
    const double *hyper;      /* momentum, max_grad_norm (infinity: no clipping), then for each
                                 group lr, beta1, beta2, eps, weight_decay */
    const int32_t *groups;    /* (P,) group of each slot, -1: averaged, not trained */
    const int64_t *gradients; /* (P,) */
    float *steps;             /* (P,) step counts, advanced unless skipped */
    int64_t num_slots;        /* P */
    float *coefficients;      /* (P, MVK_ADAMW_COEFFICIENTS) out */
    float *scalars;           /* (4,) out */
    float *grad_norm;         /* one element, out: the norm before clipping */
    uint8_t *skipped;         /* one element, out */
    int64_t *skip_count;      /* one element, counted up */
} mvk_adamw_ema_decide_args;

MVK_API mvk_status mvk_adamw_ema_decide(const mvk_adamw_ema_decide_args *args, mvk_stream stream);

/* Moments, weights, averages and rounded copies of every slot in the range of tiles. */
typedef struct mvk_adamw_ema_update_args {
    mvk_dtype dtype;          /* of the weights' copies and the averages' */
    mvk_dtype gradient_dtype; /* dtype or float32 */
    const int32_t *tiles;
    int64_t first_tile, num_tiles;
    const int64_t *table;
    const int64_t *gradients;
    const float *coefficients; /* of decide */
    const float *scalars;      /* of decide */
} mvk_adamw_ema_update_args;

MVK_API mvk_status mvk_adamw_ema_update(const mvk_adamw_ema_update_args *args, mvk_stream stream);

#ifdef __cplusplus
}
#endif

#endif
