// The leading axes of arrays: jax.vmap gives all arrays as many, of size 1 where it has none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace splats {

class LeadingAxes {
 public:
  // Those of an array that has all of them in front of its own axes.
  template <class Buffer>
  LeadingAxes(const Buffer& buffer, size_t own_axes)
      : sizes_(buffer.dimensions().begin(), buffer.dimensions().end() - own_axes) {}

  // How many elements they hold.
  int64_t size() const {
    int64_t size = 1;
    for (int64_t axis : sizes_) size *= axis;
    return size;
  }

  // Element b of an array, whose leading axes may have size 1 instead.
  template <class Buffer>
  auto* At(Buffer& buffer, int64_t b) const {
    const auto dimensions = buffer.dimensions();
    int64_t stride = 1, offset = 0;
    for (size_t i = sizes_.size(); i < dimensions.size(); ++i) stride *= dimensions[i];
    for (size_t i = sizes_.size(); i-- > 0; b /= sizes_[i]) {
      if (dimensions[i] > 1) offset += b % sizes_[i] * stride;
      stride *= dimensions[i];
    }
    return buffer.typed_data() + offset;
  }

 private:
  std::vector<int64_t> sizes_;
};

}  // namespace splats
