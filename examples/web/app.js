// The page: what is typed goes to the model's thread, what comes back is shown.
// ?model=FOLDER/ loads another exported folder than model/.
const MAX_TOKENS = 128;
const EXAMPLES = [
  "24+18=",
  "What is 33 - 14?",
  "Which is larger, 45 or 47?",
  "Max has 7 boxes with 9 stamps each. How many stamps does Max have?",
];

const at = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
const folder = new URL(new URLSearchParams(location.search).get("model") ?? "model/", document.baseURI);
let manifest, stateBytes, measuredLoops;
let busy = true;

worker.onmessage = ({ data }) => handlers[data.type](data);
worker.onerror = (event) => handlers.error({ message: event.message ?? "the model's thread did not start" });
const handlers = {
  progress({ bytes, all }) {
    at("progress").value = bytes / all;
    say(`Loading the model: ${size(bytes)} of ${size(all)}`);
  },
  ready(data) {
    manifest = data.manifest;
    at("progress").hidden = true;
    at("loops").value = measuredLoops = manifest.num_loops;
    stateBytes = data.stateBytes;
    const { num_hidden_layers: layers } = manifest.shapes;
    say(`Ready: ${manifest.source.name}, ${layers} layers run ${manifest.num_loops} times, ${manifest.precision}`);
    setBusy(false);
    at("question").focus();
    showLoops();
  },
  text({ text }) {
    at("answer").textContent = text;
  },
  done(data) {
    at("answer").textContent = data.text;
    at("answer").dataset.tokens = JSON.stringify(data.tokens);
    const rate = data.decodeSeconds > 0 ? Math.round(data.tokens.length / data.decodeSeconds) : 0;
    const ends = { stop: "", length: ", cut off here", stopped: ", stopped" }[data.finish];
    at("speed").textContent =
      `${data.tokens.length} tokens, ${rate} a second${ends}; ` +
      `${data.promptTokens} tokens of question in ${Math.round(data.promptSeconds * 1000)} ms; ` +
      `${data.cached} of ${manifest.shapes.n_ctx} rows in use`;
    stateBytes = data.stateBytes;
    measuredLoops = loops();
    setBusy(false);
    showCache();
  },
  error({ message }) {
    say(message, true);
    at("progress").hidden = true;
    setBusy(manifest === undefined);
  },
};
worker.postMessage({ type: "load", folder: folder.href });

at("form").onsubmit = (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (busy || !question) return;
  setBusy(true);
  at("answer").textContent = "";
  delete at("answer").dataset.tokens;
  at("speed").textContent = "";
  worker.postMessage({ type: "ask", question, loops: loops(), maxTokens: MAX_TOKENS });
};
at("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("form").requestSubmit();
};
document.onkeydown = (event) => {
  if (event.key === "Escape") stop();
};
at("stop").onclick = stop;
at("loops").oninput = showLoops;
for (const text of EXAMPLES) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.onclick = () => {
    at("question").value = text;
    at("form").requestSubmit();
  };
  at("examples").append(button);
}
for (let value = 1; value <= Number(at("loops").max); value++) {
  at("loop-marks").append(Object.assign(document.createElement("option"), { value, label: value }));
}

function stop() {
  worker.postMessage({ type: "stop" });
}

function setBusy(now) {
  busy = now;
  at("ask").disabled = now || manifest === undefined;
  at("stop").disabled = !now || manifest === undefined;
  at("loops").disabled = now || manifest === undefined;
  at("answer").setAttribute("aria-busy", now);
}

function loops() {
  return Number(at("loops").value);
}

function showLoops() {
  const trained = manifest.num_loops;
  at("loops-shown").textContent = loops();
  at("loops-note").textContent =
    loops() === trained ? "as the model was trained" : `trained with ${trained}: expect worse answers`;
  showCache();
}

/** Both layouts' bytes: the one that runs as its tensors measure it, the other computed from the shapes. */
function showCache() {
  const { num_hidden_layers: layers, num_key_value_heads: heads, head_dim: width, n_ctx: room } = manifest.shapes;
  const perRow = layers * 2 * heads * width * (manifest.dtypes.kv === "float16" ? 2 : 4);
  const isShared = manifest.architecture === "melt";
  const bytes = { shared: perRow, "per-loop": perRow * loops() };
  for (const [id, perToken] of Object.entries(bytes)) {
    const measured = isShared === (id === "shared") && (isShared || measuredLoops === loops());
    const whole = measured ? stateBytes : perToken * room;
    cell(id, "token").textContent = size(perToken);
    const bar = Object.assign(document.createElement("span"), { className: "bar" });
    bar.style.width = `${(100 * whole) / (perRow * at("loops").max * room)}%`; // of what the most loops would take
    const kind = Object.assign(document.createElement("small"), {
      textContent: measured ? "measured: the tensors held now" : "computed",
    });
    cell(id, "room").replaceChildren(`${size(whole)} `, kind, bar);
    cell(id, "room").dataset.bytes = whole;
    cell(id, "room").dataset.kind = measured ? "measured" : "computed";
  }
  at("room-title").textContent = `room for ${room} tokens`;
  at("cache-note").textContent = isShared
    ? "Every loop overwrites the rows of the tokens it computes, so more loops need no more cache."
    : "This folder is an Ouro: it keeps a row for every loop. Export it with --share-kv for one row.";
}

function cell(id, name) {
  return document.querySelector(`#${id} .${name}`);
}

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").className = isError ? "error" : "";
}

function size(bytes) {
  if (bytes < 2 ** 10) return `${bytes} B`;
  if (bytes < 2 ** 20) return `${round(bytes / 2 ** 10)} KiB`;
  return bytes < 2 ** 30 ? `${round(bytes / 2 ** 20)} MiB` : `${round(bytes / 2 ** 30)} GiB`;
}

function round(value) {
  return value < 10 ? Math.round(value * 10) / 10 : Math.round(value);
}
