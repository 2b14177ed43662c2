#include "vision-graph.h"

#include <cmath>
#include <new>
#include <utility>

namespace omnivlm {
namespace {

// Dimensions in comments are in ggml order, fastest first: d = n_embd, p = n_patches, b = n_images.
class Builder {
  public:
    // With `kernels`, matrix products and attention are nodes of ours; without, ggml's own operations.
    Builder(ggml_context * ctx, const VisionModel & model, int64_t n_images, Attention attention, KernelNodes * kernels)
        : ctx_(ctx), model_(model), h_(model.hparams), n_images_(n_images), attention_(attention), kernels_(kernels) {}

    // pixels [W, H, 3, b] -> [n_embd_text, n_tokens, b]
    ggml_tensor * build(ggml_tensor * pixels) {
        ggml_tensor * x = patch_embedding(pixels);
        for (const VisionBlock & block : model_.blocks) {
            x = transformer_block(block, x);
        }
        x = layer_norm(model_.post_ln, x);
        return projector(token_merge(x));
    }

  private:
    // What a weight matrix is multiplied with: [n_in, n_rows], normalised first if there is a `norm`.
    Rows rows(ggml_tensor * x, const LayerNorm * norm, Part part) {
        if (kernels_ != nullptr) {
            return kernels_->rows(ctx_, x, norm, h_.eps, part);
        }
        return { norm != nullptr ? layer_norm(*norm, x) : x, {}, 0 };
    }

    // The one place where a weight matrix meets activations: [n_in, n_rows] -> [n_out, n_rows].
    ggml_tensor * linear(const Linear & layer, const Rows & x, Epilogue epilogue = Epilogue::NONE,
                         ggml_tensor * residual = nullptr) {
        if (kernels_ != nullptr) {
            return kernels_->linear(ctx_, layer, x, epilogue, residual);
        }
        ggml_tensor * y = ggml_add(ctx_, ggml_mul_mat(ctx_, layer.weight, x.tensor), layer.bias);
        switch (epilogue) {
        case Epilogue::GELU_TANH:
            return ggml_gelu(ctx_, y);
        case Epilogue::GELU_ERF:
            return ggml_gelu_erf(ctx_, y);
        case Epilogue::RESIDUAL:
            return ggml_add(ctx_, residual, y);
        default:
            return y;
        }
    }

    // Full (non-causal) attention of every head: q, k, v [d, p*b] -> [d, p*b].
    ggml_tensor * attention(ggml_tensor * q, ggml_tensor * k, ggml_tensor * v) {
        if (kernels_ != nullptr) {
            return kernels_->attention(ctx_, q, k, v, h_.n_patches(), h_.n_head);
        }
        const float scale = 1.0F / std::sqrt(static_cast<float>(h_.n_embd / h_.n_head));

        q = ggml_permute(ctx_, heads(q), 0, 2, 1, 3);  // [d_head, p, n_head, b]
        k = ggml_permute(ctx_, heads(k), 0, 2, 1, 3);
        if (attention_ == Attention::FLASH) {
            v = ggml_permute(ctx_, heads(v), 0, 2, 1, 3);
            // F32 files keep F32 keys and values; for the others F16 loses nothing that matters and
            // is what GPUs accept.
            if (model_.blocks.front().k.weight->type != GGML_TYPE_F32) {
                k = ggml_cast(ctx_, k, GGML_TYPE_F16);
                v = ggml_cast(ctx_, v, GGML_TYPE_F16);
            }
            ggml_tensor * out = ggml_flash_attn_ext(ctx_, q, k, v, nullptr, scale, 0.0F, 0.0F);
            ggml_prec_set_acc(out, GGML_PREC_F32);  // [d_head, n_head, p, b]
            return ggml_reshape_2d(ctx_, out, h_.n_embd, h_.n_patches() * n_images_);
        }

        v                     = ggml_cont(ctx_, ggml_permute(ctx_, heads(v), 1, 2, 0, 3));  // [p, d_head, n_head, b]
        ggml_tensor * weights = ggml_mul_mat(ctx_, k, q);                                   // [p, p, n_head, b]
        weights               = ggml_soft_max_ext(ctx_, weights, nullptr, scale, 0.0F);
        ggml_tensor * out     = ggml_mul_mat(ctx_, v, weights);  // [d_head, p, n_head, b]
        out                   = ggml_cont(ctx_, ggml_permute(ctx_, out, 0, 2, 1, 3));
        return ggml_reshape_2d(ctx_, out, h_.n_embd, h_.n_patches() * n_images_);
    }

    ggml_tensor * layer_norm(const LayerNorm & norm, ggml_tensor * x) {
        return ggml_add(ctx_, ggml_mul(ctx_, ggml_norm(ctx_, x, h_.eps), norm.weight), norm.bias);
    }

    // A convolution whose stride is its kernel's size is a linear layer over flattened patches.
    ggml_tensor * patch_embedding(ggml_tensor * pixels) {
        const int     stride = static_cast<int>(h_.patch_size);
        ggml_tensor * kernel = model_.patch_embd.weight;  // [patch, patch, 3, d]
        ggml_tensor * x      = ggml_im2col(ctx_, kernel, pixels, stride, stride, 0, 0, 1, 1, true, GGML_TYPE_F32);
        x                    = ggml_reshape_2d(ctx_, x, x->ne[0], h_.n_patches() * n_images_);  // [patch*patch*3, p*b]

        Linear flat = model_.patch_embd;
        if (kernels_ == nullptr) {
            flat.weight = ggml_reshape_2d(ctx_, kernel, x->ne[0], h_.n_embd);
        }
        x = linear(flat, rows(x, nullptr, Part::PATCHES));                   // [d, p*b]
        x = ggml_reshape_3d(ctx_, x, h_.n_embd, h_.n_patches(), n_images_);  // [d, p, b]

        ggml_tensor * position = model_.position_embd;  // [d, p]
        if (position->type != GGML_TYPE_F32) {
            position = ggml_cast(ctx_, position, GGML_TYPE_F32);
        }
        x = ggml_add(ctx_, x, position);
        return ggml_reshape_2d(ctx_, x, h_.n_embd, h_.n_patches() * n_images_);
    }

    // [d, p*b] -> [d, p*b]
    ggml_tensor * transformer_block(const VisionBlock & block, ggml_tensor * x) {
        const Rows    y      = rows(x, &block.ln1, Part::TOWER);
        ggml_tensor * values = attention(linear(block.q, y), linear(block.k, y), linear(block.v, y));
        x                    = linear(block.out, rows(values, nullptr, Part::TOWER), Epilogue::RESIDUAL, x);

        ggml_tensor * inner = linear(block.fc1, rows(x, &block.ln2, Part::TOWER), Epilogue::GELU_TANH);  // [n_ff, p*b]
        return linear(block.fc2, rows(inner, nullptr, Part::TOWER), Epilogue::RESIDUAL, x);
    }

    // [d, p*b] -> [d_head, n_head, p, b]
    ggml_tensor * heads(ggml_tensor * x) {
        return ggml_reshape_4d(ctx_, x, h_.n_embd / h_.n_head, h_.n_head, h_.n_patches(), n_images_);
    }

    // The 9x token reshape: n_merge consecutive patches in raster order stand behind each other in
    // memory already, so joining their channels moves nothing. [d, p*b] -> [d*n_merge, n_tokens*b]
    ggml_tensor * token_merge(ggml_tensor * x) {
        return ggml_reshape_2d(ctx_, x, h_.n_embd * h_.n_merge, h_.n_tokens() * n_images_);
    }

    // [d*n_merge, n_tokens*b] -> [n_embd_text, n_tokens, b]
    ggml_tensor * projector(ggml_tensor * x) {
        const Epilogue gelu = h_.projector_gelu_erf ? Epilogue::GELU_ERF : Epilogue::GELU_TANH;
        x                   = linear(model_.projector_in, rows(x, nullptr, Part::PROJECTOR), gelu);  // [n_proj, …]
        x                   = linear(model_.projector_out, rows(x, nullptr, Part::PROJECTOR));
        return ggml_reshape_3d(ctx_, x, h_.n_embd_text, h_.n_tokens(), n_images_);
    }

    ggml_context *        ctx_;
    const VisionModel &   model_;
    const VisionHparams & h_;
    int64_t               n_images_;
    Attention             attention_;
    KernelNodes *         kernels_;
};

}  // namespace

VisionGraph build_vision_graph(const VisionModel & model, int64_t n_images, Attention attention,
                               std::unique_ptr<KernelNodes> kernels) {
    const VisionHparams & h       = model.hparams;
    const size_t          n_nodes = 64 + 64 * static_cast<size_t>(h.n_layer);
    const size_t          size    = n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false);

    VisionGraph result;
    result.context.reset(ggml_init({ size, nullptr, /*.no_alloc =*/true }));
    if (!result.context) {
        throw std::bad_alloc();
    }
    ggml_context * ctx = result.context.get();

    result.pixels = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, h.image_size, h.image_size, 3, n_images);
    ggml_set_input(result.pixels);
    result.tokens = Builder(ctx, model, n_images, attention, kernels.get()).build(result.pixels);
    ggml_set_output(result.tokens);

    result.graph = ggml_new_graph_custom(ctx, n_nodes, false);
    ggml_build_forward_expand(result.graph, result.tokens);
    result.kernels = std::move(kernels);
    return result;
}

}  // namespace omnivlm
