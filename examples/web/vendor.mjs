// Copies the few files that the page loads out of node_modules into vendor/, with their licences.
import { cpSync, mkdirSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
// onnxruntime's CPU build alone, 14 MB: the bundles with WebGPU are twice that.
const files = {
  "onnxruntime-web/dist/ort.wasm.min.mjs": "ort.wasm.min.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
  "@huggingface/tokenizers/dist/tokenizers.min.mjs": "tokenizers.min.mjs",
  "@huggingface/tokenizers/LICENSE": "tokenizers.LICENSE",
  "@huggingface/jinja/dist/index.js": "jinja.mjs",
  "@huggingface/jinja/LICENSE": "jinja.LICENSE",
};

rmSync(join(here, "vendor"), { recursive: true, force: true });
mkdirSync(join(here, "vendor"));
for (const [from, to] of Object.entries(files)) {
  cpSync(join(here, "node_modules", from), join(here, "vendor", to));
}
console.log(`vendor/: ${Object.keys(files).length} files`);
