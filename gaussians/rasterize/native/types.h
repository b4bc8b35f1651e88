// What the parts of the kernel hand to each other. Conventions: gaussians/rasterize/screen.py.
#pragma once

#include <cstdint>
#include <memory>

namespace splats {

constexpr int kTile = 8;  // side of a tile in pixels
constexpr int kPixels = kTile * kTile;
constexpr int kFeatures = 4;
constexpr int kChannels = kFeatures + 1;  // alpha is one more feature that is 1 for every splat
constexpr float kHalfLog2E = 0.72134752f;
constexpr float kAlphaMin = 1.0f / 255.0f;
constexpr float kTransmittanceMin = 1e-4f;

// One splat on the screen, a cache line. `p`, `s`, `r` are the factors of its inverse covariance.
struct alignas(64) Splat {
  float x, y;
  float p, s, r;
  float opacity;
  float features[kFeatures];
  float cut;  // log2(alpha / opacity) at the edge of the support, and a little less
};

// A splat in the list of a tile. Pairs are numbered splat by splat, so that the gradients of one
// splat lie side by side whatever the order in which the tiles are worked on.
struct Pair {
  int32_t splat;
  int32_t pair;
};

// What a splat receives from one tile.
struct Gradient {
  float x, y;
  float p, s, r;
  float opacity;
  float features[kFeatures];
  float absolute_x, absolute_y;
};
constexpr int kGradientFloats = sizeof(Gradient) / sizeof(float);

// One tile of an image; `width` and `height` are smaller than kTile at the right and lower border.
struct Tile {
  int left, top, width, height;
};

// An array that is not set to zero first.
template <class T>
std::unique_ptr<T[]> Uninitialized(int64_t size) {
  return std::unique_ptr<T[]>(new T[size > 0 ? size : 1]);
}

}  // namespace splats
