// From the packed numbers of the page to splats of one instant in Spark's layout.

const element = (id) => document.getElementById(id);

async function inflate(id) {
  const bytes = Uint8Array.from(atob(element(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate-raw'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The inverse of gaussians.viewer.track.encode, but for the last step: numbers stay whole until
// they are blended, as [frame][splat][component].
function unpack(header, content) {
  const track = {};
  let start = 0;
  for (const {name, shape, low, step} of header.attributes) {
    const [frames, splats] = shape;
    const components = low.length;
    const size = components * frames * splats;
    const numbers = new Uint16Array(size);
    let source = start;
    for (let c = 0; c < components; c++) {
      for (let f = 0; f < frames; f++) {
        for (let i = 0; i < splats; i++, source++) {
          const zigzag = content[source] | (content[source + size] << 8);
          const target = (f * splats + i) * components + c;
          const before = f ? numbers[target - splats * components] : 0;
          numbers[target] = before + ((zigzag >> 1) ^ -(zigzag & 1));
        }
      }
    }
    start += 2 * size;
    track[name] = {numbers, low, step, frames, components, values: new Float32Array(size / frames)};
  }
  return track;
}

// Writes all splats of one attribute, linear between two samples, into its `values`. Where one of
// the samples is below `least`, the nearer one counts.
function blend(attribute, frame, weight, least = -Infinity) {
  const {numbers, low, step, frames, components, values} = attribute;
  const nearer = weight < 0.5 ? 0 : 1;
  const size = values.length;
  const before = frames > 1 ? frame * size : 0;
  const after = frames > 1 && weight > 0 ? before + size : before;
  for (let k = 0, c = 0; k < size; k++) {
    const [a, b] = [numbers[before + k], numbers[after + k]];
    const sudden = low[c] + step[c] * Math.min(a, b) < least;
    values[k] = low[c] + step[c] * (a + (sudden ? nearer : weight) * (b - a));
    if (++c === components) c = 0;
  }
}

// One coefficient of the harmonics in Spark's layout: three bytes times a common power of two, and
// the signs. (Spark's own encodeExtRgb takes the next lower power and cuts off what lies above it.)
function packHarmonic(r, g, b) {
  const largest = Math.max(Math.abs(r), Math.abs(g), Math.abs(b), 2 ** -15);
  const exponent = Math.min(16, Math.ceil(Math.log2(largest)));
  const byte = (value) => Math.min(255, Math.round((Math.abs(value) * 255) / 2 ** exponent));
  const signs = (r < 0 ? 1 : 0) | (g < 0 ? 2 : 0) | (b < 0 ? 4 : 0);
  const scale = (exponent + 15) << 3;
  return (byte(r) | (byte(g) << 8) | (byte(b) << 16) | ((scale | signs) << 24)) >>> 0;
}

// The splats of one instant as Spark keeps them.
class Splats {
  constructor(header, content) {
    this.timestamps = header.timestamps;
    this.track = unpack(header, content);
    this.count = header.attributes[0].shape[1];
    this.moves = header.attributes.some(({shape}) => shape[0] > 1);
    const size = Vendor.utils.getTextureSize(this.count).maxSplats * 4;
    const buffer = () => new Uint32Array(size);
    const extra = {};
    const coefficients = (this.track.harmonics?.components ?? 0) / 3;
    if (coefficients >= 3) extra.sh1 = buffer();
    if (coefficients >= 8) extra.sh2 = buffer();
    if (coefficients >= 15) Object.assign(extra, {sh3a: buffer(), sh3b: buffer()});
    this.coefficients = coefficients;
    this.store = new Vendor.ExtSplats({
      extArrays: [buffer(), buffer()],
      numSplats: this.count,
      extra,
    });
    this.#write(0, 0, true);
    this.mesh = new Vendor.SplatMesh({extSplats: this.store, editable: false, raycastable: false});
    this.time = this.timestamps[0];
  }

  moveTo(time) {
    if (!this.moves || time === this.time) return;
    this.time = time;
    const last = this.timestamps.length - 1;
    let frame = 0;
    while (frame < last - 1 && this.timestamps[frame + 1] <= time) frame++;
    const [start, stop] = [this.timestamps[frame], this.timestamps[frame + 1]];
    this.#write(frame, Math.min(1, Math.max(0, (time - start) / (stop - start))), false);
    for (const texture of this.store.textures) texture.needsUpdate = true;
    this.mesh.updateVersion();
  }

  #write(frame, weight, first) {
    const track = this.track;
    for (const [name, attribute] of Object.entries(track)) {
      // A splat that appears or vanishes does so at once: two bodies never show half-way.
      const least = name === 'opacities' ? ALPHA_MIN : -Infinity;
      if (first || attribute.frames > 1) blend(attribute, frame, weight, least);
    }
    const [means, quaternions, scales, opacities, colours] =
      ['means', 'quaternions', 'log_scales', 'opacities', 'colours'].map((n) => track[n].values);
    const {extArrays} = this.store;
    for (let i = 0; i < this.count; i++) {
      const [k, q] = [3 * i, 4 * i];
      const norm = Math.hypot(quaternions[q], quaternions[q + 1], quaternions[q + 2], quaternions[q + 3]);
      Vendor.utils.encodeExtSplat(
        extArrays, i, means[k], means[k + 1], means[k + 2],
        Math.exp(scales[k]), Math.exp(scales[k + 1]), Math.exp(scales[k + 2]),
        quaternions[q + 1] / norm, quaternions[q + 2] / norm, quaternions[q + 3] / norm,
        quaternions[q] / norm,
        opacities[i], colours[k], colours[k + 1], colours[k + 2],
      );
    }
    if (track.harmonics && (first || track.harmonics.frames > 1)) this.#writeHarmonics();
  }

  #writeHarmonics() {
    const {values} = this.track.harmonics;
    const {extra} = this.store;
    // Where Spark keeps them: its array, its texture, the first coefficient and the one after.
    const places = [
      ['sh1', 'sh1Texture', 0, 4], ['sh2', 'sh2Texture', 4, 8],
      ['sh3a', 'sh3TextureA', 8, 12], ['sh3b', 'sh3TextureB', 12, 15],
    ];
    for (const [array, texture, begin, end] of places) {
      if (!extra[array]) continue;
      for (let i = 0; i < this.count; i++) {
        for (let j = begin; j < Math.min(end, this.coefficients); j++) {
          const k = 3 * (i * this.coefficients + j);
          extra[array][4 * i + j - begin] = packHarmonic(values[k], values[k + 1], values[k + 2]);
        }
      }
      if (extra[texture]) extra[texture].value.needsUpdate = true; // made when first drawn
    }
  }
}
