// The operations of a layer as the stack calls them; the C entry points in linear.cpp and layer_ops.cpp are the same.
#pragma once
#include "abi.h"

G4_API int32_t g4_linear(const void* x, int64_t x_stride, int32_t dtype, int64_t tokens, const G4Output* outputs,
                         int32_t count);
G4_API void g4_rms_norm(const void* x, int32_t dtype, int64_t rows, int64_t size, const float* weight, float eps,
                        void* out);
G4_API void g4_silu_mul(const void* gate_up, int32_t dtype, int64_t rows, int64_t size, void* out);
G4_API void g4_rope(void* x, int32_t dtype, int64_t tokens, int64_t heads, int64_t head_dim, const float* cosine,
                    const float* sine, int64_t half);
G4_API void g4_cache_append(const G4Cache* cache, const void* key, const void* value, int64_t token_stride,
                            int64_t head_stride, int32_t dtype, int64_t tokens, int64_t kv_heads, int64_t head_dim,
                            int64_t position);
G4_API int64_t g4_attention_floats(int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                   int64_t positions);
G4_API void g4_attention(const void* query, int64_t query_token, int64_t query_head, int32_t dtype,
                         const G4Cache* cache, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                         int64_t positions, float* work, void* out);
