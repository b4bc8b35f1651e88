// Blends depth-sorted Gaussian splats into an image, and its gradient, as two XLA FFI calls for
// CPU.
//
// What jax.vmap maps over is worked on side by side, as far as there are threads. Between two runs
// not a bit differs, however many there are: every pair of a splat and a tile has a gradient of its
// own, and a splat sums those of its pairs in a fixed order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "batch.h"
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

#define KERNELS "tile.inc"
#include "isa.inc"

// Tiles that a thread takes at a time.
constexpr int kTilesPerTask = 8;

template <class Body>
void ForEachTile(ffi::ThreadPool& pool, int tiles, const Body& body) {
  ParallelFor(pool, (tiles + kTilesPerTask - 1) / kTilesPerTask, [&](int64_t task) {
    const int end = std::min<int64_t>(tiles, (task + 1) * kTilesPerTask);
    for (int tile = task * kTilesPerTask; tile < end; ++tile) body(tile);
  });
}

// The features of an image lie in two arrays, so that callers who want the colours alone need not
// copy them: (height, width, 3) and (height, width). Its alpha is a third.
template <class Float>
struct Planes {
  Float *colours, *depth, *alpha;
};
constexpr int kColours = 3;

// Copies `width` pixels between one row of the image and [channel][pixel].
inline void CutRow(const Planes<const float>& from, int width, float* __restrict to) {
  for (int f = 0; f < kColours; ++f) {
    for (int x = 0; x < width; ++x) to[f * kPixels + x] = from.colours[x * kColours + f];
  }
  for (int x = 0; x < width; ++x) to[kColours * kPixels + x] = from.depth[x];
  for (int x = 0; x < width; ++x) to[kFeatures * kPixels + x] = from.alpha[x];
}

inline void PasteRow(const float* __restrict from, int width, const Planes<float>& to) {
  for (int x = 0; x < width; ++x) {
    for (int f = 0; f < kColours; ++f) to.colours[x * kColours + f] = from[f * kPixels + x];
  }
  for (int x = 0; x < width; ++x) to.depth[x] = from[kColours * kPixels + x];
  for (int x = 0; x < width; ++x) to.alpha[x] = from[kFeatures * kPixels + x];
}

// The row of a tile within an image.
template <class Float>
Planes<Float> RowOf(const Planes<Float>& image, int64_t image_width, const Tile& tile, int y) {
  const int64_t first = (tile.top + y) * image_width + tile.left;
  return {image.colours + first * kColours, image.depth + first, image.alpha + first};
}

// Copy a tile; what lies beyond the border of the image is left alone. Rows of full width have
// calls of their own, whose loops the compiler unrolls.
void Cut(const Image& image, const Tile& tile, const Planes<const float>& from, float* to) {
  for (int y = 0; y < tile.height; ++y) {
    const auto row = RowOf(from, image.width, tile, y);
    tile.width == kTile ? CutRow(row, kTile, to + y * kTile)
                        : CutRow(row, tile.width, to + y * kTile);
  }
}

void Paste(const Image& image, const Tile& tile, const float* from, const Planes<float>& to) {
  for (int y = 0; y < tile.height; ++y) {
    const auto row = RowOf(to, image.width, tile, y);
    tile.width == kTile ? PasteRow(from + y * kTile, kTile, row)
                        : PasteRow(from + y * kTile, tile.width, row);
  }
}

// The inputs of both calls.
struct Inputs {
  Floats means2d, factors, opacities, features, depths, extents;
  ffi::Buffer<ffi::PRED> visible;

  Screen screen(const LeadingAxes& axes, int64_t b) {
    return {depths.dimensions().back(), axes.At(means2d, b),  axes.At(factors, b),
            axes.At(opacities, b),      axes.At(features, b), axes.At(depths, b),
            axes.At(extents, b),        axes.At(visible, b)};
  }
};

Image ImageOf(ffi::Span<const int64_t> alpha_dimensions) {
  const int64_t* end = alpha_dimensions.end();
  return {static_cast<int>(end[-1]), static_cast<int>(end[-2])};
}

ffi::Error Blend(ffi::ThreadPool pool, Floats means2d, Floats factors, Floats opacities,
                 Floats features, Floats depths, Floats extents, ffi::Buffer<ffi::PRED> visible,
                 float alpha_max, ffi::Result<Floats> colours, ffi::Result<Floats> depth,
                 ffi::Result<Floats> alpha) {
  return Guarded([&] {
    Inputs inputs{means2d, factors, opacities, features, depths, extents, visible};
    const LeadingAxes axes(*alpha, 2);
    const Image image = ImageOf(alpha->dimensions());
    ParallelFor(pool, axes.size(), [&](int64_t b) {
      const Bins bins = MakeBins(pool, inputs.screen(axes, b), image);
      const Planes<float> planes{axes.At(*colours, b), axes.At(*depth, b), axes.At(*alpha, b)};
      ForEachTile(pool, image.tiles(), [&](int t) {
        const Tile tile = image.tile(t);
        const int64_t start = bins.starts[t], count = bins.starts[t + 1] - start;
        alignas(64) float channels[kChannels * kPixels];
        Kernels().blend(bins.splats.get(), bins.pairs.get() + start, count, tile, alpha_max,
                        channels);
        Paste(image, tile, channels, planes);
      });
    });
  });
}

ffi::Error Unblend(ffi::ThreadPool pool, Floats means2d, Floats factors, Floats opacities,
                   Floats features, Floats depths, Floats extents, ffi::Buffer<ffi::PRED> visible,
                   Floats colours, Floats depth, Floats alpha, Floats colours_cotangent,
                   Floats depth_cotangent, Floats alpha_cotangent, float alpha_max,
                   ffi::Result<Floats> to_means2d, ffi::Result<Floats> to_factors,
                   ffi::Result<Floats> to_opacities, ffi::Result<Floats> to_features,
                   ffi::Result<Floats> to_absolute) {
  return Guarded([&] {
    Inputs inputs{means2d, factors, opacities, features, depths, extents, visible};
    const LeadingAxes axes(*to_opacities, 1);
    const Image image = ImageOf(alpha.dimensions());
    const int64_t n = depths.dimensions().back();
    const bool absolute = to_absolute->element_count() > 0;
    const auto unblend = absolute ? Kernels().unblend_absolute : Kernels().unblend;
    ParallelFor(pool, axes.size(), [&](int64_t b) {
      const Bins bins = MakeBins(pool, inputs.screen(axes, b), image);
      const Planes<const float> outputs{axes.At(colours, b), axes.At(depth, b), axes.At(alpha, b)};
      const Planes<const float> cotangents{
          axes.At(colours_cotangent, b), axes.At(depth_cotangent, b), axes.At(alpha_cotangent, b)};
      const auto gradients = Uninitialized<Gradient>(bins.num_pairs);
      ForEachTile(pool, image.tiles(), [&](int t) {
        const Tile tile = image.tile(t);
        const int64_t start = bins.starts[t], count = bins.starts[t + 1] - start;
        alignas(64) float output[kChannels * kPixels] = {}, cotangent[kChannels * kPixels] = {};
        Cut(image, tile, outputs, output);
        Cut(image, tile, cotangents, cotangent);
        unblend(bins.splats.get(), bins.pairs.get() + start, count, tile, alpha_max, output,
                cotangent, gradients.get());
      });
      float* means2d_row = axes.At(*to_means2d, b);
      float* factors_row = axes.At(*to_factors, b);
      float* opacities_row = axes.At(*to_opacities, b);
      float* features_row = axes.At(*to_features, b);
      float* absolute_row = axes.At(*to_absolute, b);
      constexpr int64_t kSplatsPerTask = 1024;
      ParallelFor(pool, (n + kSplatsPerTask - 1) / kSplatsPerTask, [&](int64_t task) {
        for (int64_t i = task * kSplatsPerTask; i < std::min(n, (task + 1) * kSplatsPerTask); ++i) {
          float sum[kGradientFloats] = {};
          for (int32_t pair = bins.first_pairs[i]; pair < bins.first_pairs[i + 1]; ++pair) {
            float terms[kGradientFloats];
            std::memcpy(terms, &gradients[pair], sizeof terms);
            for (int j = 0; j < kGradientFloats; ++j) sum[j] += terms[j];
          }
          std::copy_n(sum, 2, means2d_row + 2 * i);
          std::copy_n(sum + 2, 3, factors_row + 3 * i);
          opacities_row[i] = sum[5];
          std::copy_n(sum + 6, kFeatures, features_row + kFeatures * i);
          if (absolute) std::copy_n(sum + 6 + kFeatures, 2, absolute_row + 2 * i);
        }
      });
    });
  });
}

}  // namespace
}  // namespace splats

// Counts the signatures and meanings of the calls of this library: cpu.py asks for its own number.
extern "C" int SplatsInterface() { return 1; }

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
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Attr<float>("alpha_max")
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>());
