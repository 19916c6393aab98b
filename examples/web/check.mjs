// Asks the page questions in a headless Chromium and prints what it showed as JSON; serves the folder itself.
//
//   node check.mjs --model FOLDER --ask '[{"question": "24+18=", "loops": 4}]' [--tokenize '["text"]'] [--screenshots DIR]
//
// CHROMIUM names the browser, else chromium, google-chrome or chrome is looked for on the PATH.
import { createServer } from "node:http";
import { accessSync, constants, createReadStream, statSync } from "node:fs";
import { delimiter, dirname, extname, join, normalize, resolve, sep } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";

const here = dirname(fileURLToPath(import.meta.url));
const types = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".wasm": "application/wasm" };
const { values: options } = parseArgs({
  options: {
    model: { type: "string", default: join(here, "model") },
    ask: { type: "string", default: "[]" },
    tokenize: { type: "string", default: "[]" },
    screenshots: { type: "string" },
  },
});

const server = createServer((request, response) => {
  const path = normalize(decodeURIComponent(new URL(request.url, "http://page").pathname));
  const [root, rest] = path.startsWith("/given-model/")
    ? [resolve(options.model), path.slice("/given-model/".length)]
    : [here, path === "/" ? "index.html" : path.slice(1)];
  const file = join(root, rest);
  if (!file.startsWith(root + sep) || !isFile(file)) {
    response.writeHead(404).end();
    return;
  }
  response.writeHead(200, { "content-type": types[extname(file)] ?? "application/octet-stream" });
  createReadStream(file).pipe(response);
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));

const browser = await chromium.launch({ executablePath: findBrowser(), args: ["--no-sandbox"] });
try {
  const page = await browser.newPage({ viewport: { width: 900, height: 1000 } });
  const problems = [];
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  page.on("request", (request) => {
    if (new URL(request.url()).hostname !== "127.0.0.1" && !request.url().startsWith("data:")) problems.push(`asked for ${request.url()}`);
  });
  await page.goto(`http://127.0.0.1:${server.address().port}/?model=given-model/`);
  await page.waitForFunction(() => /^Ready|^[^L]/.test(document.getElementById("status").textContent), undefined, { timeout: 120_000 });
  const status = await page.textContent("#status");
  const answers = [];
  for (const { question, loops } of JSON.parse(options.ask)) answers.push(await ask(page, question, loops));
  const tokens = [];
  for (const text of JSON.parse(options.tokenize)) tokens.push(await tokenize(page, text));
  if (options.screenshots) await screenshots(page, options.screenshots);
  console.log(JSON.stringify({ status, problems, answers, tokens }));
} finally {
  await browser.close();
  server.close();
}

/** By keyboard alone, as somebody without a mouse does. */
async function ask(page, question, loops) {
  if (await page.isDisabled("#ask")) throw new Error(await page.textContent("#status"));
  await page.focus("#loops");
  await page.keyboard.press("Home");
  for (let n = 1; n < loops; n++) await page.keyboard.press("ArrowRight");
  await page.fill("#question", question);
  await page.focus("#question");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.getElementById("answer").dataset.tokens !== undefined, undefined, { timeout: 120_000 });
  return page.evaluate(() => {
    const text = (selector) => document.querySelector(selector).textContent;
    const room = (id) => ({ ...document.querySelector(`#${id} .room`).dataset });
    return {
      text: text("#answer"),
      tokens: JSON.parse(document.getElementById("answer").dataset.tokens),
      loops: Number(text("#loops-shown")),
      speed: text("#speed"),
      shared: room("shared"),
      perLoop: room("per-loop"),
    };
  });
}

async function tokenize(page, text) {
  return page.evaluate(async (text) => {
    const { Text } = await import("./text.js");
    const folder = new URL("given-model/", document.baseURI);
    const { files } = await (await fetch(new URL("melt_edge.json", folder))).json();
    const tokenizer = await Text.load(folder, files);
    const ids = tokenizer.encode(text, true);
    return { ids, text: tokenizer.tokenizer.decode(ids) };
  }, text);
}

async function screenshots(page, folder) {
  for (const [name, scheme, width] of [["light", "light", 900], ["dark", "dark", 900], ["narrow", "light", 360]]) {
    await page.emulateMedia({ colorScheme: scheme });
    await page.setViewportSize({ width, height: 1000 });
    await page.screenshot({ path: join(folder, `${name}.png`), fullPage: true });
  }
}

function isFile(path) {
  try {
    return statSync(path).isFile();
  } catch {
    return false;
  }
}

function findBrowser() {
  if (process.env.CHROMIUM) return process.env.CHROMIUM;
  for (const folder of (process.env.PATH ?? "").split(delimiter)) {
    for (const name of ["chromium", "chromium-browser", "google-chrome", "chrome"]) {
      try {
        accessSync(join(folder, name), constants.X_OK);
        return join(folder, name);
      } catch {
        continue;
      }
    }
  }
  throw new Error("no Chromium on the PATH; set CHROMIUM to its program");
}
