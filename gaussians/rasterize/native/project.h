// Elliptical weighted averaging: the arithmetic of gaussians/projection.py, splat by splat.
#pragma once

#include <algorithm>
#include <cmath>

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

// The gradient of a View, summed over splats.
struct ViewGradient {
  double pose[3][4] = {}, focal[2] = {}, centre[2] = {}, blur = 0;

  void operator+=(const ViewGradient& other) {
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 4; ++j) pose[i][j] += other.pose[i][j];
    }
    for (int i = 0; i < 2; ++i) focal[i] += other.focal[i], centre[i] += other.centre[i];
    blur += other.blur;
  }
};

// The fields of gaussians.projection.Projection, or their cotangents.
struct Projected {
  float mean[2] = {0, 0}, factors[3] = {1, 1, 1}, variances[2] = {0, 0};
  float depth = 1, compensation = 1;
};

constexpr float kFovMargin = 0.3f;
constexpr float kMaxLogScale = 10.0f;
constexpr float kMaxDistance = 1e9f;
constexpr float kMinNormSquared = 1e-20f;
constexpr float kMinCompensation = 0.005f;

// One splat on its way to the screen, with the intermediate values that its gradient needs.
class Projector {
 public:
  // False when the splat cannot be drawn; nothing else may be asked then.
  bool Project(const View& view, const float* mean, const float* log_scales,
               const float* quaternion) {
    for (int i = 0; i < 3; ++i) {
      const float* row = view.pose[i];
      point_[i] = row[0] * mean[0] + row[1] * mean[1] + row[2] * mean[2] + row[3];
      if (!(std::abs(point_[i]) < kMaxDistance) || !(log_scales[i] < kMaxLogScale)) return false;
      scales_[i] = std::exp(log_scales[i]);
    }
    if (!(point_[2] > std::max(view.near, 0.0f) && point_[2] < view.far)) return false;
    for (int i = 0; i < 4; ++i) {
      if (!std::isfinite(quaternion[i])) return false;
    }
    Rotate(quaternion);
    for (int i = 0; i < 2; ++i) {
      slopes_[i] = point_[i] / point_[2];
      const float margin = kFovMargin * 0.5f * view.size[i] / view.focal[i];
      const float low = -view.centre[i] / view.focal[i] - margin;
      const float high = (view.size[i] - view.centre[i]) / view.focal[i] + margin;
      clamped_[i] = std::min(std::max(slopes_[i], low), high);
      const float zoom = view.focal[i] / point_[2];
      for (int j = 0; j < 3; ++j) {
        jacobian_[i][j] = zoom * (view.pose[i][j] - clamped_[i] * view.pose[2][j]);
      }
      for (int k = 0; k < 3; ++k) {
        axes_[i][k] = (jacobian_[i][0] * rotation_[0][k] + jacobian_[i][1] * rotation_[1][k] +
                       jacobian_[i][2] * rotation_[2][k]) *
                      scales_[k];
      }
    }
    xx_ = Dot(axes_[0], axes_[0]) + view.blur;
    yy_ = Dot(axes_[1], axes_[1]) + view.blur;
    xy_ = Dot(axes_[0], axes_[1]);
    Cross(axes_[0], axes_[1], cross_);
    unblurred_ = Dot(cross_, cross_);
    determinant_ = unblurred_ + view.blur * (xx_ + yy_ - view.blur);
    return determinant_ > 0.0f && std::isfinite(determinant_) && xx_ > 0.0f && yy_ > 0.0f &&
           std::isfinite(slopes_[0] * view.focal[0] + view.centre[0]) &&
           std::isfinite(slopes_[1] * view.focal[1] + view.centre[1]);
  }

  Projected Result(const View& view) const {
    Projected result;
    for (int i = 0; i < 2; ++i) result.mean[i] = view.focal[i] * slopes_[i] + view.centre[i];
    result.factors[0] = yy_ / determinant_;
    result.factors[1] = -xy_ / yy_;
    result.factors[2] = 1.0f / yy_;
    result.variances[0] = xx_;
    result.variances[1] = yy_;
    result.depth = point_[2];
    result.compensation =
        std::sqrt(std::max(unblurred_ / determinant_, kMinCompensation * kMinCompensation));
    return result;
  }

  // Reverse-mode derivative of Project and Result, variable by variable; `to_x` is d loss / d x.
  void Gradient(const View& view, const float* mean, const Projected& received, float* to_mean,
                float* to_log_scales, float* to_quaternion, ViewGradient& to_view) const {
    const float p = yy_ / determinant_, ratio = unblurred_ / determinant_;
    const auto& [to_p, to_s, to_r] = received.factors;
    float to_xx = received.variances[0], to_yy = received.variances[1];
    float to_determinant = -to_p * p / determinant_, to_unblurred = 0;
    to_yy += to_p / determinant_ + (to_s * xy_ - to_r) / (yy_ * yy_);
    const float to_xy = -to_s / yy_;
    if (ratio > kMinCompensation * kMinCompensation) {
      const float to_ratio = received.compensation * 0.5f / std::sqrt(ratio);
      to_unblurred += to_ratio / determinant_;
      to_determinant -= to_ratio * ratio / determinant_;
    }
    to_unblurred += to_determinant;
    to_xx += to_determinant * view.blur;
    to_yy += to_determinant * view.blur;
    to_view.blur += to_determinant * (xx_ + yy_ - 2.0f * view.blur) + to_xx + to_yy;

    const float turned[3] = {2 * to_unblurred * cross_[0], 2 * to_unblurred * cross_[1],
                             2 * to_unblurred * cross_[2]};
    float to_axes[2][3];
    Cross(axes_[1], turned, to_axes[0]);
    Cross(turned, axes_[0], to_axes[1]);
    for (int k = 0; k < 3; ++k) {
      to_axes[0][k] += 2 * to_xx * axes_[0][k] + to_xy * axes_[1][k];
      to_axes[1][k] += 2 * to_yy * axes_[1][k] + to_xy * axes_[0][k];
      to_log_scales[k] = to_axes[0][k] * axes_[0][k] + to_axes[1][k] * axes_[1][k];
      to_axes[0][k] *= scales_[k];
      to_axes[1][k] *= scales_[k];
    }
    float to_rotation[3][3];
    for (int j = 0; j < 3; ++j) {
      for (int k = 0; k < 3; ++k) {
        to_rotation[j][k] = to_axes[0][k] * jacobian_[0][j] + to_axes[1][k] * jacobian_[1][j];
      }
    }
    Unrotate(to_rotation, to_quaternion);

    const float inverse_depth = 1.0f / point_[2];
    float to_point[3] = {0, 0, received.depth}, to_inverse_depth = 0;
    for (int i = 0; i < 2; ++i) {
      const float zoom = view.focal[i] * inverse_depth;
      float to_zoom = 0, to_clamped = 0;
      for (int j = 0; j < 3; ++j) {
        const float to_entry = Dot(to_axes[i], rotation_[j]);
        to_zoom += to_entry * (view.pose[i][j] - clamped_[i] * view.pose[2][j]);
        to_clamped -= zoom * to_entry * view.pose[2][j];
        to_view.pose[i][j] += zoom * to_entry;
        to_view.pose[2][j] -= zoom * clamped_[i] * to_entry;
      }
      to_inverse_depth += to_zoom * view.focal[i];
      float to_slope = received.mean[i] * view.focal[i];
      to_view.focal[i] += to_zoom * inverse_depth + received.mean[i] * slopes_[i];
      to_view.centre[i] += received.mean[i];
      if (clamped_[i] == slopes_[i]) {
        to_slope += to_clamped;
      } else {  // at a border of the view, which the intrinsics move
        to_view.centre[i] -= to_clamped / view.focal[i];
        to_view.focal[i] -= to_clamped * clamped_[i] / view.focal[i];
      }
      to_point[i] = to_slope * inverse_depth;
      to_inverse_depth += to_slope * point_[i];
    }
    to_point[2] -= to_inverse_depth * inverse_depth * inverse_depth;
    for (int j = 0; j < 3; ++j) {
      to_mean[j] = 0;
      for (int i = 0; i < 3; ++i) {
        to_mean[j] += to_point[i] * view.pose[i][j];
        to_view.pose[i][j] += to_point[i] * mean[j];
      }
      to_view.pose[j][3] += to_point[j];
    }
  }

 private:
  static float Dot(const float* a, const float* b) {
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
  }

  static void Cross(const float* a, const float* b, float* c) {
    c[0] = a[1] * b[2] - a[2] * b[1];
    c[1] = a[2] * b[0] - a[0] * b[2];
    c[2] = a[0] * b[1] - a[1] * b[0];
  }

  void Rotate(const float* quaternion) {
    const float squared = quaternion[0] * quaternion[0] + Dot(quaternion + 1, quaternion + 1);
    degenerate_ = squared < kMinNormSquared;
    inverse_norm_ = degenerate_ ? 0.0f : 1.0f / std::sqrt(squared);
    for (int i = 0; i < 4; ++i) unit_[i] = quaternion[i] * inverse_norm_;
    if (degenerate_) unit_[0] = 1.0f;
    const auto& [w, x, y, z] = unit_;
    const float rotation[3][3] = {
        {1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)},
        {2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)},
        {2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)}};
    std::copy_n(&rotation[0][0], 9, &rotation_[0][0]);
  }

  void Unrotate(const float g[3][3], float* to_quaternion) const {
    const auto& [w, x, y, z] = unit_;
    const float to_unit[4] = {
        2 * (x * (g[2][1] - g[1][2]) + y * (g[0][2] - g[2][0]) + z * (g[1][0] - g[0][1])),
        2 * (y * (g[0][1] + g[1][0]) + z * (g[0][2] + g[2][0]) + w * (g[2][1] - g[1][2]) -
             2 * x * (g[1][1] + g[2][2])),
        2 * (x * (g[0][1] + g[1][0]) + z * (g[1][2] + g[2][1]) + w * (g[0][2] - g[2][0]) -
             2 * y * (g[0][0] + g[2][2])),
        2 * (x * (g[0][2] + g[2][0]) + y * (g[1][2] + g[2][1]) + w * (g[1][0] - g[0][1]) -
             2 * z * (g[0][0] + g[1][1]))};
    const float along = unit_[0] * to_unit[0] + Dot(unit_ + 1, to_unit + 1);
    for (int i = 0; i < 4; ++i) {
      to_quaternion[i] = degenerate_ ? 0.0f : (to_unit[i] - unit_[i] * along) * inverse_norm_;
    }
  }

  float point_[3], scales_[3], unit_[4], rotation_[3][3];
  float slopes_[2], clamped_[2], jacobian_[2][3];
  float axes_[2][3];  // the splat's three axes on the screen, rows x and y
  float xx_, xy_, yy_, cross_[3], unblurred_, determinant_, inverse_norm_;
  bool degenerate_;
};

}  // namespace splats
