// What the projection works on; its arithmetic is in project.inc.
#pragma once

#include <algorithm>
#include <cstdint>

namespace splats {

// What all splats of an image share.
struct View {
  float pose[3][4];
  float focal[2], centre[2], size[2];
  float blur, near, far;

  View(const float* world_to_camera, const float* intrinsics, float width, float height, float blur,
       float near, float far)
      : focal{intrinsics[0], intrinsics[4]},
        centre{intrinsics[2], intrinsics[5]},
        size{width, height},
        blur(blur),
        near(near),
        far(far) {
    std::copy_n(world_to_camera, 12, &pose[0][0]);
  }
};

// The gradient of a View, or a part of its sum over splats.
template <class Number>
struct ViewGradient {
  Number pose[3][4] = {}, focal[2] = {}, centre[2] = {}, blur = {};

  // Adds `sum` of every number of another one.
  template <class Other, class Sum>
  void Add(const ViewGradient<Other>& other, const Sum& sum) {
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 4; ++j) pose[i][j] += sum(other.pose[i][j]);
    }
    for (int i = 0; i < 2; ++i) {
      focal[i] += sum(other.focal[i]);
      centre[i] += sum(other.centre[i]);
    }
    blur += sum(other.blur);
  }
};

// Rows of (n, 3), (n, 3) and (n, 4): parameters or their gradients.
template <class Float>
struct Shapes {
  Float *means, *log_scales, *quaternions;
};

// Rows of the fields of gaussians.projection.Projection, or their cotangents.
template <class Float>
struct Projected {
  Float *means2d, *factors, *variances, *depths, *compensations;
};

// The splats first .. end - 1; those that cannot be drawn have stand-ins and no gradient.
struct ProjectionKernels {
  void (*project)(const View& view, int64_t first, int64_t end, const bool* active,
                  const Shapes<const float>& shapes, const Projected<float>& projected,
                  bool* visible);
  ViewGradient<double> (*unproject)(const View& view, int64_t first, int64_t end,
                                    const bool* active, const Shapes<const float>& shapes,
                                    const Projected<const float>& cotangents,
                                    const Shapes<float>& gradients);
};

}  // namespace splats
