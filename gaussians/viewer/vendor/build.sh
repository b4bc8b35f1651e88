#!/usr/bin/env bash
# Makes vendor.js and LICENCES.txt anew from the packages that package-lock.json names.
# Needs npm and a registry, and only to change versions: the results are kept in the repository.
# Then change package.json and run `npm install --package-lock-only` here first.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp "$here"/{package.json,package-lock.json,entry.js} "$scratch"
cd "$scratch"
npm ci --silent --no-audit --no-fund
npx esbuild entry.js --bundle --minify --format=iife --global-name=Vendor --target=es2022 \
  --legal-comments=none --log-level=warning --outfile="$here/vendor.js"
{
  echo "This page contains the following libraries, bundled."
  for name in three @sparkjsdev/spark fflate; do
    version=$(node -p "require('./node_modules/$name/package.json').version")
    printf '\n---- %s %s\n\n' "$name" "$version"
    cat "node_modules/$name/LICENSE"
    echo
  done
  printf '\n%s\n%s\n%s\n' \
    "The WebAssembly inside Spark is built from Rust crates, each under the MIT licence or a choice" \
    "that includes it (zlib-rs: the Zlib licence): anyhow, fdeflate, hashbrown, image, image-webp," \
    "indexmap, memchr, miniz_oxide, png, serde, smallvec, wasm-bindgen, zip, zlib-rs and others."
} > "$here/LICENCES.txt"
