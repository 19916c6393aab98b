// The model in a thread of its own, so that the page stays usable while it computes.
// In: load, ask, stop. Out: progress, ready, text, done, error.
import { LoopModel } from "./loop-model.js";
import { Text } from "./text.js";

let model, text;
let stopped = false;

onmessage = async ({ data }) => {
  try {
    if (data.type === "load") await load(new URL(data.folder));
    if (data.type === "ask") await answer(data);
    if (data.type === "stop") stopped = true;
  } catch (error) {
    postMessage({ type: "error", message: error?.message ?? String(error) });
  }
};

async function load(folder) {
  model = await LoopModel.load(folder, (bytes, all) => postMessage({ type: "progress", bytes, all }));
  text = await Text.load(folder, model.manifest.files);
  postMessage({ type: "ready", manifest: model.manifest, stateBytes: model.stateBytes });
}

/** Greedy: always the likeliest token, as `melt-edge run --temp 0`. */
async function answer({ question, loops, maxTokens }) {
  stopped = false;
  model.reset(loops);
  const { eos_token_id: end, shapes } = model.manifest;
  const prompt = text.question(question);
  const tokens = [];
  const start = performance.now();
  let logits = await model.append(prompt);
  const afterPrompt = performance.now();
  let finish = "length";
  const room = Math.min(maxTokens, shapes.n_ctx - prompt.length);
  while (tokens.length < room) {
    const token = argmax(logits);
    if (token === end) {
      finish = "stop";
      break;
    }
    tokens.push(token);
    postMessage({ type: "text", text: shown(tokens), cached: model.length });
    await pause();
    if (stopped) {
      finish = "stopped";
      break;
    }
    if (tokens.length < room) logits = await model.append([token]);
  }
  const decodeSeconds = (performance.now() - afterPrompt) / 1000;
  postMessage({
    type: "done",
    text: text.decode(tokens),
    tokens,
    finish,
    cached: model.length,
    stateBytes: model.stateBytes,
    promptTokens: prompt.length,
    promptSeconds: (afterPrompt - start) / 1000,
    decodeSeconds,
  });
}

/** The text so far, without a character that is not whole yet. */
function shown(tokens) {
  return text.decode(tokens).replace(/\uFFFD+$/, "");
}

function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

/** Lets a waiting "stop" in. A message is quicker than a timer, which browsers hold back for 4 ms. */
function pause() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
