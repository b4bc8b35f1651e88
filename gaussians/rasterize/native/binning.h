// Which splats touch which tiles, nearest first.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "types.h"

namespace splats {

// Pointers to the rows of one image's splats; the names are those of ScreenSplats.
struct Screen {
  int64_t n;
  const float *means2d, *factors, *opacities, *features, *depths, *extents;
  const bool* visible;
};

struct Image {
  int width, height;
  int columns() const { return (width + kTile - 1) / kTile; }
  int rows() const { return (height + kTile - 1) / kTile; }
  int tiles() const { return columns() * rows(); }
  Tile tile(int index) const {
    const int left = index % columns() * kTile, top = index / columns() * kTile;
    return {left, top, std::min(kTile, width - left), std::min(kTile, height - top)};
  }
};

// Splats by depth; and the lists of all tiles behind one another, that of tile t from starts[t] on.
struct Bins {
  int64_t num_splats = 0, num_pairs = 0;
  std::unique_ptr<Splat[]> splats;
  std::unique_ptr<Pair[]> pairs;
  std::unique_ptr<int64_t[]> starts;
};

// Extents come out of a few roundings; this much more of them, and of a pixel, is on the safe side.
constexpr float kSlack = 1e-4f;

// The pixels first .. last whose centres lie in [low, high], within an image of `size` pixels.
struct Span {
  int first, last;
  Span(float low, float high, int size)
      : first(static_cast<int>(std::ceil(std::clamp(low - 0.5f, 0.0f, float(size))))),
        last(static_cast<int>(std::floor(std::clamp(high - 0.5f, -1.0f, float(size - 1))))) {}
  bool empty() const { return last < first; }
};

// Calls visit(row, first column, last column) for the tiles that the support of a splat touches.
// Within a row of tiles the support's widest point is where dy is nearest to that of its very
// leftmost or rightmost point, since its outline is convex.
template <class Visit>
void VisitTiles(const Image& image, const Splat& splat, float extent_x, float extent_y,
                const Visit& visit) {
  const float x = splat.x, y = splat.y, p = splat.p, s = splat.s, r = splat.r;
  extent_x += kSlack * (extent_x + 1.0f);
  extent_y += kSlack * (extent_y + 1.0f);
  const Span pixels(y - extent_y, y + extent_y, image.height);
  if (pixels.empty()) return;
  // The ellipse is p (dx + s dy)^2 <= radius - r dy^2, and r extent_y^2 = radius.
  const float radius = r * extent_y * extent_y;
  // d(dx)/d(dy) = 0 at dy = -+ s p extent_x / (p s^2 + r), with p s^2 + r = radius / variance_x.
  const float turning = s * p * extent_x / (p * s * s + r);
  for (int row = pixels.first / kTile; row <= pixels.last / kTile; ++row) {
    const float top = std::max(row * kTile, pixels.first) + 0.5f - y;
    const float bottom = std::min(row * kTile + kTile - 1, pixels.last) + 0.5f - y;
    const auto half_width = [&](float dy) {
      return std::sqrt(std::max(radius - r * dy * dy, 0.0f) / p) * (1.0f + kSlack) + kSlack;
    };
    const float right = std::clamp(-turning, top, bottom), left = std::clamp(turning, top, bottom);
    const Span reached(x - s * left - half_width(left), x - s * right + half_width(right),
                       image.width);
    if (!reached.empty()) visit(row, reached.first / kTile, reached.last / kTile);
  }
}

// Indices of the splats that may touch the image, by depth; equal depths keep their order.
inline std::vector<uint32_t> DepthOrder(const Screen& screen, const Image& image) {
  struct Key {
    uint32_t depth, index;
  };
  constexpr int kDigits = 3, kBits = 11, kValues = 1 << kBits;
  std::vector<Key> keys;
  keys.reserve(screen.n);
  std::vector<uint32_t> counts(kDigits * kValues, 0);
  for (int64_t i = 0; i < screen.n; ++i) {
    const float x = screen.means2d[2 * i], y = screen.means2d[2 * i + 1];
    const float reach_x = screen.extents[2 * i] * (1.0f + kSlack) + kSlack;
    const float reach_y = screen.extents[2 * i + 1] * (1.0f + kSlack) + kSlack;
    if (!screen.visible[i] || !(x + reach_x >= 0 && x - reach_x <= image.width) ||
        !(y + reach_y >= 0 && y - reach_y <= image.height)) {
      continue;
    }
    uint32_t depth;  // the bits of non-negative floats order as integers
    std::memcpy(&depth, screen.depths + i, sizeof depth);
    keys.push_back({depth, static_cast<uint32_t>(i)});
    for (int d = 0; d < kDigits; ++d) ++counts[d * kValues + (depth >> d * kBits) % kValues];
  }
  std::vector<Key> sorted(keys.size());
  for (int d = 0; d < kDigits; ++d) {
    uint32_t* count = counts.data() + d * kValues;
    for (uint32_t value = 0, start = 0; value < kValues; ++value) {
      start += count[value];
      count[value] = start - count[value];
    }
    for (const Key& key : keys) sorted[count[(key.depth >> d * kBits) % kValues]++] = key;
    keys.swap(sorted);
  }
  std::vector<uint32_t> order(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) order[i] = keys[i].index;
  return order;
}

inline Bins MakeBins(xla::ffi::ThreadPool& pool, const Screen& screen, const Image& image) {
  const std::vector<uint32_t> order = DepthOrder(screen, image);
  const int64_t n = order.size(), tiles = image.tiles();
  const int columns = image.columns();
  Bins bins;
  bins.num_splats = n;
  bins.splats = Uninitialized<Splat>(n);
  bins.starts = Uninitialized<int64_t>(tiles + 1);

  // A counting sort: parts of the splats list the tiles of their pairs and count them per tile, then
  // place them behind those of the parts before. The parts do not depend on the number of threads.
  const int64_t parts = std::clamp<int64_t>(n / 2048, 1, 16);
  std::vector<int64_t> places(parts * tiles, 0);
  std::vector<std::vector<int32_t>> tiles_of(parts);
  const auto first_of = [&](int64_t part) { return n * part / parts; };
  ParallelFor(pool, parts, [&](int64_t part) {
    int64_t* counts = places.data() + part * tiles;
    std::vector<int32_t>& touched = tiles_of[part];
    touched.reserve(4 * (first_of(part + 1) - first_of(part)));
    for (int64_t k = first_of(part); k < first_of(part + 1); ++k) {
      const int64_t i = order[k];
      const float extent_x = screen.extents[2 * i], extent_y = screen.extents[2 * i + 1];
      Splat& splat = bins.splats[k];
      splat.x = screen.means2d[2 * i];
      splat.y = screen.means2d[2 * i + 1];
      splat.p = screen.factors[3 * i];
      splat.s = screen.factors[3 * i + 1];
      splat.r = screen.factors[3 * i + 2];
      splat.opacity = screen.opacities[i];
      std::memcpy(splat.features, screen.features + kFeatures * i, sizeof splat.features);
      splat.cut = -kHalfLog2E * splat.r * extent_y * extent_y * (1.0f + kSlack) - kSlack;
      splat.index = static_cast<int32_t>(i);
      splat.first_pair = touched.size();
      VisitTiles(image, splat, extent_x, extent_y, [&](int row, int first, int last) {
        for (int tile = row * columns + first; tile <= row * columns + last; ++tile) {
          touched.push_back(tile);
          ++counts[tile];
        }
      });
      splat.num_pairs = touched.size() - splat.first_pair;
    }
  });
  int64_t total = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    bins.starts[tile] = total;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t count = places[part * tiles + tile];
      places[part * tiles + tile] = total;
      total += count;
    }
  }
  bins.starts[tiles] = bins.num_pairs = total;
  bins.pairs = Uninitialized<Pair>(total);
  ParallelFor(pool, parts, [&](int64_t part) {
    int64_t* place = places.data() + part * tiles;
    int64_t before = 0;
    for (int64_t other = 0; other < part; ++other) before += tiles_of[other].size();
    const int32_t* tile = tiles_of[part].data();
    for (int64_t k = first_of(part); k < first_of(part + 1); ++k) {
      Splat& splat = bins.splats[k];
      splat.first_pair += before;
      for (int64_t i = 0; i < splat.num_pairs; ++i) {
        bins.pairs[place[*tile++]++] = {static_cast<int32_t>(k),
                                        static_cast<int32_t>(splat.first_pair + i)};
      }
    }
  });
  return bins;
}

}  // namespace splats
