// The page: from its data to what is seen, again whenever new data come.

const at = (id) => document.getElementById(id);
const samples = new Samples(at("samples"));
const charts = new Map();
let data = JSON.parse(at("data").textContent);

function render() {
  document.title = data.title;
  document.querySelector("h1").textContent = data.title;
  runs();
  tiles();
  table();
  differences();
  sections();
  samples.update(data.samples, data.runs);
  written();
  links();
  state();
}

/** A button for each run, which switches it on and off everywhere. */
function runs() {
  for (const name of view.off) if (!data.runs.some((run) => run.name === name)) view.off.delete(name);
  at("runs").replaceChildren(...data.runs.map((run) => h("button", {
    type: "button", class: "chip", title: run.folder, "aria-pressed": String(!view.off.has(run.name)),
    onclick: (event) => {
      if (view.off.has(run.name)) view.off.delete(run.name); else view.off.add(run.name);
      event.currentTarget.setAttribute("aria-pressed", String(!view.off.has(run.name)));
      view.changed();
      samples.show();
    },
  }, swatch(run.colour), run.name)));
}

function tiles() {
  at("tiles").className = "tiles";
  at("tiles").replaceChildren(...data.tiles.map((tile) => h("div", { class: "tile" }, h("h3", {}, tile.label),
    ...tile.rows.map((row) => h("div", {}, swatch(row.colour), row.name, h("b", {}, row.value.toFixed(3)))))));
}

function table() {
  const said = data.table, wide = said ? said.columns.length : 0;
  if (!said) { at("last").replaceChildren(); return; }
  const edge = (i) => (i % wide === 0 ? { class: "block" } : {});
  const body = said.rows.map((row) => h("tr", {}, h("th", {}, row.name), ...row.cells.map((cell, i) => {
    const block = Math.floor(i / wide), of = row.cells.slice(block * wide, (block + 1) * wide).filter((v) => v !== null);
    const best = said.blocks[block] === "gold" && cell !== null && cell === Math.max(...of);
    const text = cell === null ? "–" : cell.toFixed(3);
    return h("td", edge(i), best ? h("b", {}, text) : text);
  })));
  at("last").replaceChildren(h("h2", {}, "Last evaluation"), h("div", { class: "scroll" }, h("table", { class: "figures" },
    h("thead", {}, h("tr", {}, h("th"), ...said.blocks.map((label) => h("th", { class: "block", colspan: wide }, label))),
      h("tr", {}, h("th"), ...said.blocks.flatMap(() => said.columns.map((name, i) => h("th", edge(i), name))))),
    h("tbody", {}, ...body))),
  h("p", {}, "One seed: differences of a few hundredths are noise. Over the run: the mean of all evaluations after the first "
    + "third, which is steadier than the last one."));
}

function differences() {
  at("differences").replaceChildren(...(data.differences.length ? [h("h2", {}, "What differs between the runs"),
    h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, h("th"), ...data.runs.map((run) => h("th", {}, run.name)))),
      h("tbody", {}, ...data.differences.map(([key, ...values]) => h("tr", {}, h("th", {}, key), ...values.map((v) => h("td", {}, v)))))))] : []));
}

/** Sections and charts stay where they are; those that are there get their new data. */
function sections() {
  const place = at("sections"), there = new Map([...place.children].map((node) => [node.dataset.title, node]));
  const wanted = data.sections.map((section, i) => {
    const folded = data.rest && i === data.sections.length - 1;
    let node = there.get(section.title);
    if (!node) {
      const inside = [h("h2", {}, section.title), h("p", {}, section.text), h("div", { class: "charts" })];
      node = folded ? h("section", {}, inside[0], h("details", {}, h("summary", {}, section.text), inside[2])) : h("section", {}, ...inside);
      node.dataset.title = section.title;
    }
    const grid = node.querySelector(".charts");
    const nodes = section.charts.map((spec) => {
      const chart = charts.get(spec.name);
      if (chart) chart.update(spec); else charts.set(spec.name, new Chart(spec));
      return charts.get(spec.name).node;
    });
    if (nodes.length !== grid.children.length || nodes.some((each, k) => grid.children[k] !== each)) grid.replaceChildren(...nodes);
    return node;
  });
  if (wanted.length !== place.children.length || wanted.some((node, i) => place.children[i] !== node)) place.replaceChildren(...wanted);
}

function written() {
  const open = new Set([...at("settings").querySelectorAll("details[open]")].map((node) => node.dataset.run));
  const some = data.runs.filter((run) => run.settings);
  at("settings").className = "settings";
  const thin = data.thinned && h("p", { class: "note" }, `Curves of up to ${data.thinned.toLocaleString("en")} steps are shown with fewer points: `
    + "each is the mean of several steps, in a band from the lowest to the highest of them. metrics.jsonl has every step.");
  at("settings").replaceChildren(...(some.length ? [h("h2", {}, "Settings")] : []), ...some.map((run) =>
    h("details", { "data-run": run.name, open: open.has(run.name) }, h("summary", {}, run.name), h("pre", {}, run.settings))),
  ...(thin ? [thin] : []));
}

/** The way to each section. */
function links() {
  const all = [...document.querySelectorAll("main section")].filter((node) => !node.hidden && node.querySelector("h2"));
  all.forEach((node, i) => { if (!node.id) node.id = `section-${i}-${node.dataset.title ? node.dataset.title.length : 0}`; });
  document.querySelector("nav").replaceChildren(...all.map((node) => h("a", { href: `#${node.id}` }, node.querySelector("h2").textContent)));
}

/** What the run is doing; only where somebody serves the page. */
function state() {
  const live = data.live;
  if (!live) return;
  const parts = [live.running ? null : "not running on this machine"];
  if (live.stage) {
    parts.push(`${live.stage} ${live.step}${live.steps ? ` of ${live.steps}` : ""}`);
    if (live.seconds) parts.push(`${figure(live.seconds)} s a step`);
    if (live.tokens_per_second) parts.push(`${Math.round(live.tokens_per_second).toLocaleString("en")} tokens/s`);
    if (live.running && live.steps && live.seconds) parts.push(`${span((live.steps - live.step) * live.seconds)} of this stage left`);
    parts.push(`${span(Date.now() / 1000 - live.changed)} ago`);
  } else if (live.running) parts.push("has begun");
  at("state").className = live.running ? "live" : "";
  at("state").textContent = parts.filter(Boolean).join(" · ");
}

function span(seconds) {
  const s = Math.max(0, seconds);
  return s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} days`;
}

view.changed = () => {
  at("whole").hidden = !view.zoom.size;
  for (const chart of charts.values()) chart.draw();
};

at("smoothing").addEventListener("input", (event) => { view.smoothing = event.target.value / 100; view.changed(); });
at("whole").addEventListener("click", () => { view.zoom.clear(); view.changed(); });
at("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

/** New data when there are some. Waits longer where that takes long, so that watching costs little. */
async function follow() {
  let wait = 1000;
  try {
    const began = performance.now();
    const answer = await fetch(`data?seen=${encodeURIComponent(data.live.version)}`, { cache: "no-store" });
    if (answer.status === 200) { data = await answer.json(); render(); }
    else if (answer.status === 204) state();
    else throw new Error(answer.status);
    wait = Math.max(wait, 5 * (performance.now() - began));
  } catch {
    at("state").className = "";
    at("state").textContent = "gi watch no longer answers; this is what it said last";
    wait = 5000;
  }
  setTimeout(follow, wait);
}

render();
if (data.live) follow();
