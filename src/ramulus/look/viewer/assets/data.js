// Where all data comes from: the page's own embedded answers first, else the server.

const embeddedElement = document.getElementById("embedded");
export const embedded = embeddedElement ? JSON.parse(embeddedElement.textContent) : null;

const KEPT_ANSWERS = 120;
const answersKept = new Map();

// The URL of a question; its parameters stay in the order given, which is also the key of embedded data.
function address(path, parameters = {}) {
  const pairs = Object.entries(parameters).map(([name, value]) => name + "=" + encodeURIComponent(value));
  return pairs.length ? path + "?" + pairs.join("&") : path;
}

// The JSON answer; rejects with the server's own sentence. `fresh` asks again although an answer is kept.
export async function get(path, parameters = {}, fresh = false) {
  const url = address(path, parameters);
  if (embedded) return fromPage(url);
  if (!fresh && answersKept.has(url)) return answersKept.get(url);
  const answer = fetchJson(url);
  answersKept.set(url, answer);
  answer.catch(() => answersKept.delete(url));
  if (answersKept.size > KEPT_ANSWERS) answersKept.delete(answersKept.keys().next().value);
  return answer;
}

async function fetchJson(url) {
  let response;
  try {
    response = await fetch(url, {headers: {accept: "application/json"}});
  } catch {
    const silence = new Error("The server does not answer. Start `ramulus view` again, then reload this page.");
    silence.silent = true;
    throw silence;
  }
  const body = await response.json().catch(() => ({error: "The answer of the server is no JSON."}));
  if (!response.ok) throw new Error(body.error || response.status + " " + response.statusText);
  return body;
}

function fromPage(url) {
  const plain = url.replace(/&name=[^&]*$/, "");
  if (url in embedded) return embedded[url];
  if (plain in embedded) return embedded[plain];
  const metrics = url.match(/^(\/api\/metrics\?run=[^&]*)&after=/);
  const key = metrics && Object.keys(embedded).find((name) => name.startsWith(metrics[1]));
  if (key) return embedded[key];
  if (url.startsWith("/api/search?")) return searchPage(new URLSearchParams(url.split("?")[1]));
  throw new Error("This file holds only chosen steps, and this is not among them. `ramulus view RUN` shows all.");
}

// A one-file page has no server to ask, so the texts of its trees are searched here.
function searchPage(parameters) {
  const wanted = parameters.get("q").toLowerCase();
  const found = [];
  for (const [url, tree] of Object.entries(embedded)) {
    if (!url.startsWith("/api/tree?")) continue;
    const where = new URLSearchParams(url.split("?")[1]);
    if (where.get("run") !== parameters.get("run")) continue;
    for (const node of tree.nodes) {
      const at = node.text.toLowerCase().indexOf(wanted);
      if (at < 0) continue;
      const from = Math.max(0, at - 60);
      found.push({
        step: Number(where.get("step")),
        index: Number(where.get("index")),
        node: node.id,
        excerpt: node.text.slice(from, at + wanted.length + 60),
        at: at - from,
        length: wanted.length,
      });
      if (found.length >= Number(parameters.get("limit") || 100)) return found;
    }
  }
  return found;
}
