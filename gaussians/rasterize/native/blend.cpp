// Blends depth-sorted Gaussian splats into an image, and its gradient, as two XLA FFI calls for CPU.
//
// All arrays have the same leading axes: those of jax.vmap, worked on one after the other. Between
// two runs not a bit differs, however many threads there are: every pair of a splat and a tile has a
// gradient of its own, and a splat sums those of its pairs in a fixed order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "binning.h"
#include "parallel.h"
#include "types.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace splats {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

struct TileKernels {
  void (*blend)(const Splat*, const Pair*, int64_t, const Tile&, float, float*);
  void (*unblend)(const Splat*, const Pair*, int64_t, const Tile&, float, const float*,
                  const float*, Gradient*);
  void (*unblend_absolute)(const Splat*, const Pair*, int64_t, const Tile&, float, const float*,
                           const float*, Gradient*);
};


namespace portable {
#define LANES 8
static inline bool AnyReaches(const float* a, const float* b) {
  bool any = false;
  for (int i = 0; i < LANES; ++i) any |= a[i] >= b[i];
  return any;
}
#define ANY_REACHES(a, b) AnyReaches((const float*)&(a), (const float*)&(b))
#include "tile.inc"
#undef ANY_REACHES
#undef LANES
}  // namespace portable

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define LANES 8
#define ANY_REACHES(a, b) \
  (_mm256_movemask_ps(_mm256_cmp_ps((__m256)(a), (__m256)(b), _CMP_GE_OQ)) != 0)
#include "tile.inc"
#undef ANY_REACHES
#undef LANES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
namespace avx512 {
#define LANES 16
#define ANY_REACHES(a, b) \
  (_mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_GE_OQ) != 0)
#include "tile.inc"
#undef ANY_REACHES
#undef LANES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__

// The widest kernel that this processor runs.
const TileKernels& Kernels() {
  static const TileKernels& kernels = [&]() -> const TileKernels& {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return avx512::kKernels;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kKernels;
#endif
    return portable::kKernels;
  }();
  return kernels;
}

// Tiles that a thread takes at a time.
constexpr int kTilesPerTask = 8;

template <class Body>
void ForEachTile(ffi::ThreadPool& pool, int tiles, const Body& body) {
  ParallelFor(pool, (tiles + kTilesPerTask - 1) / kTilesPerTask, [&](int64_t task) {
    const int end = std::min<int64_t>(tiles, (task + 1) * kTilesPerTask);
    for (int tile = task * kTilesPerTask; tile < end; ++tile) body(tile);
  });
}

// Copies a tile of the image's features and alpha to [channel][pixel], or back; what lies beyond the
// border of the image is left alone.
void Cut(const Image& image, const Tile& tile, const float* features, const float* alpha,
         float* __restrict channels) {
  for (int y = 0; y < tile.height; ++y) {
    const int64_t first = static_cast<int64_t>(tile.top + y) * image.width + tile.left;
    const float* from = features + first * kFeatures;
    float* to = channels + y * kTile;
    if (tile.width == kTile) {  // the same loop, of a length that the compiler knows
      for (int f = 0; f < kFeatures; ++f) {
        for (int x = 0; x < kTile; ++x) to[f * kPixels + x] = from[x * kFeatures + f];
      }
    } else {
      for (int f = 0; f < kFeatures; ++f) {
        for (int x = 0; x < tile.width; ++x) to[f * kPixels + x] = from[x * kFeatures + f];
      }
    }
    std::copy_n(alpha + first, tile.width, to + kFeatures * kPixels);
  }
}

void Paste(const Image& image, const Tile& tile, const float* channels,
           float* __restrict features, float* alpha) {
  for (int y = 0; y < tile.height; ++y) {
    const int64_t first = static_cast<int64_t>(tile.top + y) * image.width + tile.left;
    const float* from = channels + y * kTile;
    float* to = features + first * kFeatures;
    for (int x = 0; x < tile.width; ++x) {
      for (int f = 0; f < kFeatures; ++f) to[x * kFeatures + f] = from[f * kPixels + x];
    }
    std::copy_n(from + kFeatures * kPixels, tile.width, alpha + first);
  }
}

// The inputs of both calls, and their leading axes flattened.
struct Batch {
  int64_t size, n;
  Image image;
  const float *means2d, *factors, *opacities, *features, *depths, *extents;
  const bool* visible;

  Batch(Floats& means2d, Floats& factors, Floats& opacities, Floats& features, Floats& depths,
        Floats& extents, ffi::Buffer<ffi::PRED>& visible, ffi::Span<const int64_t> image_shape)
      : n(depths.dimensions().back()),
        image{static_cast<int>(image_shape[image_shape.size() - 1]),
              static_cast<int>(image_shape[image_shape.size() - 2])},
        means2d(means2d.typed_data()),
        factors(factors.typed_data()),
        opacities(opacities.typed_data()),
        features(features.typed_data()),
        depths(depths.typed_data()),
        extents(extents.typed_data()),
        visible(visible.typed_data()) {
    size = n ? depths.element_count() / n : 0;
  }

  Screen screen(int64_t b) const {
    return {n,
            means2d + 2 * n * b,
            factors + 3 * n * b,
            opacities + n * b,
            features + kFeatures * n * b,
            depths + n * b,
            extents + 2 * n * b,
            visible + n * b};
  }
};

ffi::Error Blend(ffi::ThreadPool pool, Floats means2d, Floats factors, Floats opacities,
                 Floats features, Floats depths, Floats extents, ffi::Buffer<ffi::PRED> visible,
                 float alpha_max, ffi::Result<Floats> blended, ffi::Result<Floats> alpha) {
  const Batch batch(means2d, factors, opacities, features, depths, extents, visible,
                    alpha->dimensions());
  const Image image = batch.image;
  const int64_t pixels = static_cast<int64_t>(image.width) * image.height;
  for (int64_t b = 0; b < batch.size; ++b) {
    const Bins bins = MakeBins(pool, batch.screen(b), image);
    ForEachTile(pool, image.tiles(), [&](int t) {
      const Tile tile = image.tile(t);
      const int64_t start = bins.starts[t], count = bins.starts[t + 1] - start;
      alignas(64) float channels[kChannels * kPixels];
      Kernels().blend(bins.splats.get(), bins.pairs.get() + start, count, tile, alpha_max,
                      channels);
      Paste(image, tile, channels, blended->typed_data() + b * pixels * kFeatures,
            alpha->typed_data() + b * pixels);
    });
  }
  return ffi::Error::Success();
}

ffi::Error Unblend(ffi::ThreadPool pool, Floats means2d, Floats factors, Floats opacities,
                   Floats features, Floats depths, Floats extents, ffi::Buffer<ffi::PRED> visible,
                   Floats blended, Floats alpha, Floats blended_cotangent, Floats alpha_cotangent,
                   float alpha_max, ffi::Result<Floats> to_means2d, ffi::Result<Floats> to_factors,
                   ffi::Result<Floats> to_opacities, ffi::Result<Floats> to_features,
                   ffi::Result<Floats> to_absolute) {
  const Batch batch(means2d, factors, opacities, features, depths, extents, visible,
                    alpha.dimensions());
  const Image image = batch.image;
  const int64_t n = batch.n, pixels = static_cast<int64_t>(image.width) * image.height;
  const bool absolute = to_absolute->element_count() > 0;
  const auto unblend = absolute ? Kernels().unblend_absolute : Kernels().unblend;
  for (int64_t b = 0; b < batch.size; ++b) {
    const Bins bins = MakeBins(pool, batch.screen(b), image);
    const auto gradients = Uninitialized<Gradient>(bins.num_pairs);
    ForEachTile(pool, image.tiles(), [&](int t) {
      const Tile tile = image.tile(t);
      const int64_t start = bins.starts[t], count = bins.starts[t + 1] - start;
      alignas(64) float output[kChannels * kPixels] = {}, cotangent[kChannels * kPixels] = {};
      const int64_t first = b * pixels;
      Cut(image, tile, blended.typed_data() + first * kFeatures, alpha.typed_data() + first,
          output);
      Cut(image, tile, blended_cotangent.typed_data() + first * kFeatures,
          alpha_cotangent.typed_data() + first, cotangent);
      unblend(bins.splats.get(), bins.pairs.get() + start, count, tile, alpha_max, output,
              cotangent, gradients.get());
    });
    constexpr int64_t kSplatsPerTask = 1024;
    ParallelFor(pool, (n + kSplatsPerTask - 1) / kSplatsPerTask, [&](int64_t task) {
      for (int64_t i = task * kSplatsPerTask; i < std::min(n, (task + 1) * kSplatsPerTask); ++i) {
        float sum[kGradientFloats] = {};
        for (int32_t pair = bins.first_pairs[i]; pair < bins.first_pairs[i + 1]; ++pair) {
          float terms[kGradientFloats];
          std::memcpy(terms, &gradients[pair], sizeof terms);
          for (int j = 0; j < kGradientFloats; ++j) sum[j] += terms[j];
        }
        const int64_t row = b * n + i;
        std::copy_n(sum, 2, to_means2d->typed_data() + 2 * row);
        std::copy_n(sum + 2, 3, to_factors->typed_data() + 3 * row);
        to_opacities->typed_data()[row] = sum[5];
        std::copy_n(sum + 6, kFeatures, to_features->typed_data() + kFeatures * row);
        if (absolute) std::copy_n(sum + 6 + kFeatures, 2, to_absolute->typed_data() + 2 * row);
      }
    });
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace splats

XLA_FFI_DEFINE_HANDLER_SYMBOL(SplatsBlend, splats::Blend,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::PRED>>()
                                  .Attr<float>("alpha_max")
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SplatsUnblend, splats::Unblend,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::PRED>>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Attr<float>("alpha_max")
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>());
