// What app.js uses of the libraries. build.sh turns this into vendor.js, the global `Vendor`.
export {ExtSplats, SparkRenderer, SplatMesh, utils} from '@sparkjsdev/spark';
export {PerspectiveCamera, Scene, Vector3, WebGLRenderer} from 'three';
export {OrbitControls} from 'three/addons/controls/OrbitControls.js';
