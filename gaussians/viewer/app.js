// Screen, controls and the hook `d4d` of viewer.html, documented in gaussians/viewer/__init__.py.

const NEAR = 0.2; // gaussians.projection.NEAR
const ALPHA_MIN = 1 / 255; // the support of a splat in gaussians.rasterize
const BLUR = 0.3; // gaussians.projection.BLUR, px^2
const DEFAULT_FOV = 39.6; // d4d_jax.cameras.FOV in degrees
const BACKGROUNDS = {white: '#ffffff', black: '#000000', grey: '#808080', checker: 'checker'};
const DEGREE = Math.PI / 180;

// Draws on the canvas, and for snapshots with any pinhole camera.
class Screen {
  constructor(canvas, splats) {
    this.canvas = canvas;
    this.splats = splats;
    this.renderer = new Vendor.WebGLRenderer({canvas, alpha: true, antialias: false});
    this.renderer.setClearAlpha(0);
    this.scene = new Vendor.Scene();
    this.spark = new Vendor.SparkRenderer({
      renderer: this.renderer,
      onDirty: () => { this.stale = true; },
      accumExtSplats: true, // colours above 1, positions in full precision
      enableLod: false,
      sortRadial: false,
      preBlurAmount: BLUR,
      blurAmount: 0,
      minAlpha: ALPHA_MIN,
      maxStdDev: Math.sqrt(-2 * Math.log(ALPHA_MIN)),
      maxPixelRadius: 4096,
    });
    this.scene.add(this.spark, splats.mesh);
    this.camera = new Vendor.PerspectiveCamera();
    this.camera.up.set(0, 0, 1);
    this.stale = true;
    this.held = false;
  }

  draw() {
    this.stale = false;
    this.renderer.render(this.scene, this.camera);
  }

  // Sorting runs beside the drawing; this waits until the order fits the camera and the instant.
  async settle(camera) {
    const sorted = async () => {
      while (this.spark.sorting || this.spark.sortDirty) await new Promise((go) => setTimeout(go, 2));
    };
    camera.updateMatrixWorld();
    await sorted();
    await this.spark.update({scene: this.scene, camera});
    await sorted();
  }

  // The picture of a pinhole camera (OpenCV axes, intrinsics in pixels) as a PNG in a data URL.
  async snapshot({world_to_camera, intrinsics, width, height}, background) {
    const camera = new Vendor.PerspectiveCamera();
    const pose = camera.matrix.set(...world_to_camera.flat()).invert();
    pose.multiply(pose.clone().makeScale(1, -1, -1)); // OpenCV's axes to OpenGL's
    pose.decompose(camera.position, camera.quaternion, camera.scale);
    const [[fx, , cx], [, fy, cy]] = intrinsics;
    const far = 1e4;
    camera.projectionMatrix.set(
      (2 * fx) / width, 0, 1 - (2 * cx) / width, 0,
      0, (2 * fy) / height, (2 * cy) / height - 1, 0,
      0, 0, (far + NEAR) / (NEAR - far), (2 * far * NEAR) / (NEAR - far),
      0, 0, -1, 0,
    );
    camera.projectionMatrixInverse.copy(camera.projectionMatrix).invert();
    Object.assign(camera, {near: NEAR, far});
    const picture = Object.assign(document.createElement('canvas'), {width, height});
    this.held = true;
    try {
      this.renderer.setPixelRatio(1);
      this.renderer.setSize(width, height, false);
      await this.settle(camera);
      this.renderer.render(this.scene, camera);
      const context = picture.getContext('2d');
      context.fillStyle = background;
      context.fillRect(0, 0, width, height);
      context.drawImage(this.canvas, 0, 0);
    } finally {
      this.held = false;
      this.fit();
    }
    return picture.toDataURL();
  }

  // The field of view is across the shorter side, so that what fits a square fits any window.
  fit() {
    const {clientWidth: width, clientHeight: height} = this.canvas;
    if (this.held || !width || !height) return;
    this.renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
    this.renderer.setSize(width, height, false);
    const half = Math.tan((this.fov * Math.PI) / 360) * Math.max(1, height / width);
    this.camera.fov = (Math.atan(half) * 360) / Math.PI;
    this.camera.aspect = width / height;
    this.camera.updateProjectionMatrix();
    this.stale = true;
  }
}

class Viewer {
  #time = NaN;
  #playing = false;
  #background;
  #queue = Promise.resolve();

  constructor(header, content) {
    this.header = header;
    this.splats = new Splats(header, content);
    this.screen = new Screen(element('canvas'), this.splats);
    this.controls = new Vendor.OrbitControls(this.screen.camera, this.screen.canvas);
    this.controls.enableDamping = true;
    this.controls.addEventListener('change', () => { this.screen.stale = true; });
    const {background: own} = header;
    const named = Object.values(BACKGROUNDS).includes(own);
    this.backgrounds = named ? BACKGROUNDS : {own, ...BACKGROUNDS};
    this.background = Object.keys(this.backgrounds).find((name) => this.backgrounds[name] === own);
    this.first = this.#fitted();
    this.#bind();
    const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
    this.time = this.start;
    this.playing = this.splats.moves && !calm;
  }

  get start() { return this.splats.timestamps[0]; }
  get stop() { return this.splats.timestamps.at(-1); }

  get time() { return this.#time; }
  set time(value) {
    const time = Math.min(this.stop, Math.max(this.start, Number(value)));
    if (Number.isNaN(time) || time === this.#time) return;
    this.#time = time;
    this.splats.moveTo(time);
    element('time').value = time;
    const frames = this.splats.timestamps.length;
    element('clock').textContent = `${this.frame + 1} / ${frames} \u00b7 t ${time.toFixed(3)}`;
    this.screen.stale = true;
  }

  // The sample nearest to the time.
  get frame() {
    const distances = this.splats.timestamps.map((t) => Math.abs(t - this.#time));
    return distances.indexOf(Math.min(...distances));
  }

  step(frames) {
    const count = this.splats.timestamps.length;
    this.playing = false;
    this.time = this.splats.timestamps[(this.frame + frames + count) % count];
  }

  get playing() { return this.#playing; }
  set playing(value) {
    this.#playing = Boolean(value) && this.splats.moves;
    element('play').classList.toggle('playing', this.#playing);
    element('play').setAttribute('aria-label', this.#playing ? 'Pause' : 'Play');
  }

  get background() { return this.#background; }
  set background(name) {
    const colour = this.backgrounds[name];
    if (!colour) return;
    this.#background = name;
    const parts = colour.match(/\w\w/g)?.map((part) => parseInt(part, 16)) ?? [];
    const dark = colour.startsWith('#') && parts.reduce((sum, part) => sum + part) < 384;
    document.body.style.background = colour === 'checker' ? '' : colour;
    document.body.classList.toggle('checker', colour === 'checker');
    document.body.classList.toggle('dark', dark);
  }

  nextBackground() {
    const names = Object.keys(this.backgrounds);
    this.background = names[(names.indexOf(this.#background) + 1) % names.length];
  }

  // The front of the object, as large as the window allows.
  #fitted() {
    const {centre: target, radius} = this.header;
    const distance = (1.25 * Math.max(radius, 1e-3)) / Math.sin((DEFAULT_FOV / 2) * DEGREE);
    return {azimuth: 0, elevation: 0, distance, fov: DEFAULT_FOV, target};
  }

  get orbit() {
    const [x, y, z] = this.screen.camera.position.clone().sub(this.controls.target).toArray();
    const distance = Math.hypot(x, y, z);
    return {
      azimuth: Math.atan2(x, -y) / DEGREE,
      elevation: Math.asin(z / distance) / DEGREE,
      distance,
      fov: this.screen.fov,
      target: this.controls.target.toArray(),
    };
  }

  set orbit({azimuth, elevation, distance, fov, target}) {
    const up = Math.min(89.99, Math.max(-89.99, elevation)) * DEGREE;
    const [sin, cos] = [Math.sin(azimuth * DEGREE), Math.cos(azimuth * DEGREE)];
    const {camera} = this.screen;
    this.controls.target.set(...target);
    camera.position.set(Math.cos(up) * sin, -Math.cos(up) * cos, Math.sin(up));
    camera.position.multiplyScalar(distance).add(this.controls.target);
    camera.near = Math.min(NEAR, distance / 20);
    camera.far = 1e4 * distance;
    this.screen.fov = fov;
    this.screen.fit();
    this.controls.update();
  }

  // Views and snapshots are taken one after the other: they share the canvas.
  #next(act) {
    this.#queue = this.#queue.then(act, act);
    return this.#queue;
  }

  // Sets any of the keys of the address; resolves when the picture is drawn.
  view(wanted) {
    return this.#next(() => this.#view(wanted));
  }

  async #view(wanted) {
    const number = (name) => [name, Number(wanted[name])];
    const numbers = ['azimuth', 'elevation', 'distance', 'fov'].map(number);
    const orbit = Object.fromEntries(numbers.filter(([, value]) => Number.isFinite(value)));
    if (!(orbit.distance > 0)) delete orbit.distance;
    if (!(orbit.fov > 0 && orbit.fov < 180)) delete orbit.fov;
    const target = String(wanted.target ?? '').split(',').map(Number);
    if (wanted.target && target.length === 3 && target.every(Number.isFinite)) orbit.target = target;
    if (Object.keys(orbit).length) this.orbit = {...this.orbit, ...orbit};
    const off = (value) => ['0', 'false'].includes(String(value));
    if ('ui' in wanted) document.body.classList.toggle('bare', off(wanted.ui));
    if ('background' in wanted) this.background = wanted.background;
    if ('t' in wanted) this.time = wanted.t;
    if ('play' in wanted) this.playing = !off(wanted.play);
    if (!this.playing) await this.screen.settle(this.screen.camera);
    this.screen.draw();
  }

  snapshot(camera) {
    return this.#next(() => {
      this.playing = false;
      this.time = camera.t ?? this.time;
      const colour = this.backgrounds[camera.background ?? this.background] ?? camera.background;
      return this.screen.snapshot(camera, colour === 'checker' ? '#ffffff' : colour);
    });
  }

  #bind() {
    const time = element('time');
    Object.assign(time, {min: this.start, max: this.stop});
    time.addEventListener('input', () => { this.playing = false; this.time = time.value; });
    const actions = {
      play: () => { this.playing = !this.playing; },
      background: () => this.nextBackground(),
      reset: () => { this.orbit = this.first; },
    };
    for (const [id, act] of Object.entries(actions)) element(id).addEventListener('click', act);
    const keys = {
      ' ': actions.play, b: actions.background, r: actions.reset,
      ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1),
      Home: () => { this.time = this.start; }, End: () => { this.time = this.stop; },
    };
    addEventListener('keydown', (event) => {
      const act = keys[event.key];
      const pressed = event.key === ' ' && event.target instanceof HTMLButtonElement;
      if (!act || pressed || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      act();
    });
    addEventListener('hashchange', () => this.view(fromAddress()));
    new ResizeObserver(() => this.screen.fit()).observe(this.screen.canvas);
    this.screen.canvas.addEventListener('webglcontextlost', () => {
      say('The browser took the graphics context away; reload the page.');
    });
  }

  async run() {
    this.orbit = this.first;
    await this.view(fromAddress());
    document.body.classList.toggle('still', !this.splats.moves);
    const splats = this.splats.count.toLocaleString('en');
    element('facts').textContent = `${splats} splats`;
    element('controls').hidden = false;
    let last = performance.now();
    const tick = (now) => {
      const {start, stop, screen} = this;
      if (this.playing && !screen.held) {
        const next = this.time + (now - last) / (1000 * this.header.seconds);
        this.time = next > stop ? start : next;
      }
      last = now;
      this.controls.update();
      if (screen.stale && !screen.held) screen.draw();
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }
}

function say(sentence) {
  element('message').textContent = sentence;
}

function fromAddress() {
  return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}

async function load() {
  if (!document.createElement('canvas').getContext('webgl2')) {
    throw new Error('it needs WebGL 2, which this browser lacks or has switched off');
  }
  if (typeof DecompressionStream === 'undefined' || typeof WebAssembly === 'undefined') {
    throw new Error('this browser is too old: it lacks DecompressionStream or WebAssembly');
  }
  const program = document.createElement('script');
  program.textContent = new TextDecoder().decode(await inflate('vendor'));
  document.head.append(program);
  const viewer = new Viewer(JSON.parse(element('header').textContent), await inflate('payload'));
  await viewer.run();
  say('');
  return viewer;
}

// The hook: before `ready` it has no viewer behind it, and never where the page cannot run.
window.d4d = {
  ready: load().then(
    (viewer) => {
      Object.defineProperties(window.d4d, {
        time: {get: () => viewer.time, set: (t) => { viewer.time = t; }},
        playing: {get: () => viewer.playing},
      });
      Object.assign(window.d4d, {
        play: () => { viewer.playing = true; },
        pause: () => { viewer.playing = false; },
        view: (wanted) => viewer.view(wanted),
        snapshot: (camera) => viewer.snapshot(camera),
      });
      return true;
    },
    (error) => {
      say(`This page cannot show its object: ${error.message}.`);
      return false;
    },
  ),
};
