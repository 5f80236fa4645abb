// The part of the address after `#`: everything on screen can be linked to.

// {page: runs|run|step|tree|evals, run, step, index, node, options}
export function readRoute(hash = location.hash) {
  const [path, query = ""] = hash.replace(/^#/, "").split("?");
  const parts = path.split("/").filter(Boolean).map(decoded);
  const options = Object.fromEntries(new URLSearchParams(query));
  const named = {};
  for (let at = 0; at + 1 < parts.length; at += 2) named[parts[at]] = parts[at + 1];
  const route = {page: "runs", run: named.run ?? null, options};
  if (named.run !== undefined) route.page = "run";
  if (parts[2] === "evals") Object.assign(route, {page: "evals", step: numberOrNull(named.evals)});
  if (named.step !== undefined) Object.assign(route, {page: "step", step: numberOrNull(named.step)});
  if (named.tree !== undefined) Object.assign(route, {page: "tree", index: numberOrNull(named.tree)});
  if (route.page === "tree") route.node = numberOrNull(named.node);
  return route;
}

// A part of an address that is no good encoding stands for itself.
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function numberOrNull(text) {
  return text === undefined || text === "" || Number.isNaN(Number(text)) ? null : Number(text);
}

export function hashOf(route) {
  let path = "#/";
  if (route.run != null) path += "run/" + encodeURIComponent(route.run);
  if (route.page === "evals") path += "/evals" + (route.step == null ? "" : "/" + route.step);
  if (route.page === "step" || route.page === "tree") path += "/step/" + route.step;
  if (route.page === "tree") path += "/tree/" + route.index + (route.node == null ? "" : "/node/" + route.node);
  const options = Object.entries(route.options ?? {}).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return path + (options.length ? "?" + new URLSearchParams(options) : "");
}

// A new place: an entry in the browser's history.
export function go(route) {
  location.hash = hashOf(route);
}

// The same place with another detail: no entry in the history, no reload of the page.
export function amend(route) {
  history.replaceState(null, "", hashOf(route));
}

// The run that an id in a link means: itself, or the same folder seen from elsewhere, or the only one of that name.
export function named(runs, id) {
  const mark = (text) => text.match(/-[0-9a-f]{6}$/)?.[0];
  const alike = (same) => {
    const found = runs.filter(same);
    return found.length === 1 ? found[0] : undefined;
  };
  const slug = id.replace(/-[0-9a-f]{6}$/, "");
  return (
    runs.find((run) => run.id === id) ??
    alike((run) => mark(id) && mark(run.id) === mark(id)) ??
    alike((run) => run.id.slice(0, -7) === slug || run.id.slice(0, -7) === id)
  );
}
