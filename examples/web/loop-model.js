// A looped language model on onnxruntime-web: the exported folder's three graphs, and the loop around them.
// The path of a token is the one of melt_edge/modeling.py. Knows neither the page nor the tokenizer.
import * as ort from "./vendor/ort.wasm.min.mjs";
import { fetchFile, fetchJson } from "./files.js";

const FORMAT = 1;
const EXTERNAL_DATA = ["weights.bin"];

ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;
// More threads need SharedArrayBuffer, and so two headers that a plain file server does not send.
ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

export class LoopModel {
  /** Fetches and checks a folder, and opens its graphs. folder: URL ending in a slash; onProgress(bytes, allBytes). */
  static async load(folder, onProgress) {
    const manifest = await fetchJson(new URL("melt_edge.json", folder));
    if (manifest.format_version !== FORMAT) {
      throw new Error(`the folder has format ${manifest.format_version}, this page reads ${FORMAT}: export it again`);
    }
    const names = Object.values(manifest.graphs).map((graph) => graph.file);
    const wanted = [...names, ...EXTERNAL_DATA];
    const all = wanted.reduce((sum, name) => sum + manifest.files[name].size, 0);
    const contents = {};
    let before = 0;
    for (const name of wanted) {
      const file = manifest.files[name];
      contents[name] = await fetchFile(new URL(name, folder), file, (bytes) => onProgress(before + bytes, all));
      before += file.size;
    }
    const externalData = EXTERNAL_DATA.map((path) => ({ path, data: contents[path] }));
    const sessions = {};
    for (const [name, graph] of Object.entries(manifest.graphs)) {
      sessions[name] = await ort.InferenceSession.create(contents[graph.file], { externalData });
    }
    return new LoopModel(manifest, sessions);
  }

  constructor(manifest, sessions) {
    this.manifest = manifest;
    this.sessions = sessions;
    this.reset(manifest.num_loops);
  }

  /** An empty cache for this number of loops. */
  reset(numLoops) {
    this.numLoops = numLoops;
    this.length = 0; // tokens in the cache (L)
    this.slots = Array.from({ length: this.slotCount(numLoops) }, () => ({ key: this.rows(), value: this.rows() }));
  }

  /** MELT keeps one row per layer, whatever the loops; Ouro one per (loop, layer). */
  get sharesCache() {
    return this.manifest.architecture === "melt";
  }

  slotCount(numLoops) {
    return this.manifest.shapes.num_hidden_layers * (this.sharesCache ? 1 : numLoops);
  }

  slot(loopIdx, layerIdx) {
    return this.sharesCache ? layerIdx : loopIdx * this.manifest.shapes.num_hidden_layers + layerIdx;
  }

  /** An empty state tensor, of fixed size: [1, Hkv, n_ctx, Dh]. */
  rows() {
    const { num_key_value_heads: heads, n_ctx: rows, head_dim: width } = this.manifest.shapes;
    return zeros(this.manifest.dtypes.kv, [1, heads, rows, width]);
  }

  /** Bytes of the state tensors held now. */
  get stateBytes() {
    return this.slots.reduce((sum, { key, value }) => sum + key.data.byteLength + value.data.byteLength, 0);
  }

  /** Appends tokens to the cache, cut into chunks; returns the logits after the last one, Float32Array [V]. */
  async append(tokens) {
    const { shapes } = this.manifest;
    const chunkSize = this.manifest.chunk_size ?? tokens.length; // null for Ouro, which chunks do not change
    if (this.length + tokens.length > shapes.n_ctx) {
      throw new Error(`the text needs ${this.length + tokens.length} tokens, the cache has room for ${shapes.n_ctx}`);
    }
    let x;
    for (let start = 0; start < tokens.length; start += chunkSize) {
      x = await this.runChunk(tokens.slice(start, start + chunkSize));
    }
    const last = new ort.Tensor(x.type, x.data.slice(-shapes.hidden_size), [1, 1, shapes.hidden_size]);
    const { logits } = await this.sessions.head.run({ x: last });
    return logits.data;
  }

  /** All loops over one chunk; its rows stay in the cache. Returns the last loop's states [1, C, D]. */
  async runChunk(tokens) {
    const { manifest } = this;
    const ids = new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]);
    let { x } = await this.sessions.embed.run({ input_ids: ids }); // [1, C, D]
    const total = this.length + tokens.length;
    const feeds = {
      seqlens_k: new ort.Tensor("int32", [total - 1], [1]),
      total_sequence_length: new ort.Tensor("int32", [total], []),
    };
    const layers = Array.from({ length: manifest.shapes.num_hidden_layers }, (_, layerIdx) => layerIdx);
    const gated = manifest.kv_gate === "elementwise";
    if (gated) {
      for (const layerIdx of layers) feeds[`h.${layerIdx}`] = zeros(x.type, x.dims);
    }
    for (let loopIdx = 0; loopIdx < this.numLoops; loopIdx++) {
      feeds.x = x;
      if (manifest.kv_gate_init === "input" && gated) feeds.first_loop = new ort.Tensor("bool", [loopIdx === 0], []);
      for (const layerIdx of layers) {
        const { key, value } = this.slots[this.slot(loopIdx, layerIdx)];
        feeds[`past.${layerIdx}.key`] = key;
        feeds[`past.${layerIdx}.value`] = value;
      }
      const out = await this.sessions.loop.run(feeds);
      x = out.x_out;
      for (const layerIdx of layers) {
        // onnxruntime-web copies tensors in and out of its memory: the rows come back in new arrays.
        const kept = { key: out[`present.${layerIdx}.key`], value: out[`present.${layerIdx}.value`] };
        this.slots[this.slot(loopIdx, layerIdx)] = kept;
        if (gated) feeds[`h.${layerIdx}`] = out[`h_out.${layerIdx}`];
      }
    }
    this.length = total;
    return x;
  }
}

function zeros(type, dims) {
  const size = dims.reduce((product, dim) => product * dim, 1);
  const Half = globalThis.Float16Array ?? Uint16Array;
  return new ort.Tensor(type, type === "float16" ? new Half(size) : new Float32Array(size), dims);
}
