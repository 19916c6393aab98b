// Fetching a folder's files, each checked against the size and the sha256 of the manifest.

export async function fetchJson(url) {
  return (await fetched(url)).json();
}

export async function fetchText(url) {
  return (await fetched(url)).text();
}

/** The bytes of a file. file: {size, sha256}; onProgress(bytes so far). */
export async function fetchFile(url, file, onProgress) {
  const response = await fetched(url);
  const bytes = new Uint8Array(file.size);
  let filled = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (filled + value.length > file.size) throw new Error(`${name(url)} is larger than the manifest says`);
    bytes.set(value, filled);
    filled += value.length;
    onProgress(filled);
  }
  if (filled !== file.size) {
    throw new Error(`${name(url)} has ${filled} bytes, the manifest says ${file.size}: load the page again`);
  }
  // Browsers have crypto.subtle on localhost and over https alone.
  if (globalThis.crypto?.subtle && (await sha256(bytes)) !== file.sha256) {
    throw new Error(`${name(url)} is not the file that the manifest describes (sha256): export the folder again`);
  }
  return bytes;
}

async function fetched(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${name(url)} cannot be loaded (${response.status} ${response.statusText})`);
  return response;
}

function name(url) {
  return new URL(url).pathname.split("/").at(-1);
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
