// Which splats touch which tiles, nearest first.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
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

// The splats of the caller, in his order; invisible ones have no pairs and are not filled in. And
// the lists of all tiles behind one another, nearest first, that of tile t from starts[t] on.
struct Bins {
  int64_t num_pairs = 0;
  std::unique_ptr<Splat[]> splats;
  std::unique_ptr<int32_t[]> first_pairs;  // of each splat, and the number of all pairs
  std::unique_ptr<Pair[]> pairs;
  std::unique_ptr<int64_t[]> starts;
};

// Extents come out of a few roundings; this much more of them, and of a pixel, is on the safe side.
constexpr float kSlack = 1e-4f;

// The pixels first .. last whose centres lie in [low, high], within an image of `size` pixels.
// Rounding goes through integers, since without SSE 4.1 std::floor is a function call. NaN is 0:
// std::max returns its first argument then.
struct Span {
  int first, last;
  Span(float low, float high, int size) {
    low = std::min(std::max(0.0f, low - 0.5f), static_cast<float>(size));
    high = std::min(std::max(0.0f, high + 0.5f), static_cast<float>(size));
    first = static_cast<int>(low);
    first += first < low;
    last = static_cast<int>(high) - 1;
  }
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
  const float inverse_p = 1.0f / p;
  // d(dx)/d(dy) = 0 at dy = -+ s p extent_x / (p s^2 + r), with p s^2 + r = radius / variance_x.
  const float turning = s * p * extent_x / (p * s * s + r);
  for (int row = pixels.first / kTile; row <= pixels.last / kTile; ++row) {
    const float top = std::max(row * kTile, pixels.first) + 0.5f - y;
    const float bottom = std::min(row * kTile + kTile - 1, pixels.last) + 0.5f - y;
    const auto half_width = [&](float dy) {
      return std::sqrt(std::max(radius - r * dy * dy, 0.0f) * inverse_p) * (1.0f + kSlack) + kSlack;
    };
    const float right = std::clamp(-turning, top, bottom), left = std::clamp(turning, top, bottom);
    const Span reached(x - s * left - half_width(left), x - s * right + half_width(right),
                       image.width);
    if (!reached.empty()) visit(row, reached.first / kTile, reached.last / kTile);
  }
}

// Indices of the visible splats by depth; equal depths keep their order.
inline std::vector<uint32_t> DepthOrder(const Screen& screen) {
  struct Key {
    uint32_t depth, index;
  };
  constexpr int kDigits = 3, kBits = 11, kValues = 1 << kBits;
  std::vector<Key> keys;
  keys.reserve(screen.n);
  std::vector<uint32_t> counts(kDigits * kValues, 0);
  for (int64_t i = 0; i < screen.n; ++i) {
    if (!screen.visible[i]) continue;
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
  const int64_t n = screen.n, tiles = image.tiles();
  const int columns = image.columns();
  Bins bins;
  bins.splats = Uninitialized<Splat>(n);
  bins.first_pairs = Uninitialized<int32_t>(n + 1);

  // Parts of the splats find their tiles, while one task sorts all of them by depth.
  const int64_t part_size = std::max<int64_t>(2048, n / 16);
  const int64_t parts = (n + part_size - 1) / part_size;
  std::vector<std::vector<int32_t>> tiles_of(parts);
  std::vector<uint32_t> order;
  const auto find_tiles = [&](int64_t part) {
    std::vector<int32_t>& touched = tiles_of[part];
    touched.reserve(4 * part_size);
    for (int64_t i = part * part_size; i < std::min(n, (part + 1) * part_size); ++i) {
      bins.first_pairs[i] = touched.size();
      if (!screen.visible[i]) continue;
      Splat& splat = bins.splats[i];
      const float extent_x = screen.extents[2 * i], extent_y = screen.extents[2 * i + 1];
      splat.x = screen.means2d[2 * i];
      splat.y = screen.means2d[2 * i + 1];
      splat.p = screen.factors[3 * i];
      splat.s = screen.factors[3 * i + 1];
      splat.r = screen.factors[3 * i + 2];
      splat.opacity = screen.opacities[i];
      std::memcpy(splat.features, screen.features + kFeatures * i, sizeof splat.features);
      splat.cut = -kHalfLog2E * splat.r * extent_y * extent_y * (1.0f + kSlack) - kSlack;
      VisitTiles(image, splat, extent_x, extent_y, [&](int row, int first, int last) {
        for (int column = first; column <= last; ++column) {
          touched.push_back(row * columns + column);
        }
      });
    }
  };
  ParallelFor(pool, parts + 1, [&](int64_t task) {
    if (task == 0) {
      order = DepthOrder(screen);
    } else {
      find_tiles(task - 1);
    }
  });

  // A counting sort by tile, which keeps the order by depth. The parts' lists become one.
  std::vector<int64_t> places(tiles, 0);
  int64_t total = 0;
  for (const std::vector<int32_t>& touched : tiles_of) total += touched.size();
  if (total > std::numeric_limits<int32_t>::max()) {
    throw std::length_error("there are more than 2^31 pairs of splats and tiles");
  }
  const auto tile_of = Uninitialized<int32_t>(total);
  bins.num_pairs = total;
  total = 0;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = part * part_size; i < std::min(n, (part + 1) * part_size); ++i) {
      bins.first_pairs[i] += total;
    }
    for (int32_t tile : tiles_of[part]) {
      tile_of[total++] = tile;
      ++places[tile];
    }
  }
  bins.first_pairs[n] = total;
  bins.starts = Uninitialized<int64_t>(tiles + 1);
  bins.starts[0] = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    bins.starts[tile + 1] = bins.starts[tile] + places[tile];
    places[tile] = bins.starts[tile];
  }
  bins.pairs = Uninitialized<Pair>(total);
  for (uint32_t i : order) {
    for (int32_t pair = bins.first_pairs[i]; pair < bins.first_pairs[i + 1]; ++pair) {
      bins.pairs[places[tile_of[pair]]++] = {static_cast<int32_t>(i), pair};
    }
  }
  return bins;
}

}  // namespace splats
