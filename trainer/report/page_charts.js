"use strict";
// Charts in SVG: hover, zoom, runs on and off. Texts become text nodes, never HTML.

const SVG = "http://www.w3.org/2000/svg";

/** What all charts share. */
const view = { off: new Set(), zoom: new Map(), smoothing: 0.1, changed: () => {} };

function put(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "colour") node.style.setProperty("--c", `var(--${value})`);
    else if (key === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  for (const child of children) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const h = (name, attributes = {}, ...children) =>
  put(document.createElement(name), attributes, children);
const s = (name, attributes = {}, ...children) =>
  put(document.createElementNS(SVG, name), attributes, children);
const swatch = (colour) => h("i", { style: { background: `var(--${colour})` } });

/** A number for people: five digits at most, no noise. */
function figure(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  if (size >= 1e9) return (value / 1e9).toPrecision(4) + "G";
  if (size >= 1e6) return (value / 1e6).toPrecision(4) + "M";
  if (size >= 1e-3 && size < 1e6) return String(Number(value.toPrecision(4)));
  return size === 0 ? "0" : value.toExponential(2);
}

/** About `count` round numbers from low to high. */
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((x) => x * power).find((x) => x >= raw * 0.999);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out;
}

/** Centred moving mean over a share of the curve, shorter at the ends. */
function smoothed(values, share) {
  const half = Math.floor((values.length * share) / 2);
  if (half === 0) return values;
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, i) => {
    const from = Math.max(0, i - half), to = Math.min(values.length, i + half + 1);
    return (sums[to] - sums[from]) / (to - from);
  });
}

const extent = (values) => values.reduce(
  ([low, high], v) => (v === null ? [low, high] : [Math.min(low, v), Math.max(high, v)]), [Infinity, -Infinity]);

class Chart {
  constructor(spec) {
    this.log = false;
    this.svg = s("svg", { tabindex: 0, role: "img" });
    this.tip = h("div", { class: "tip", hidden: true });
    this.title = h("h4");
    this.legend = h("div", { class: "legend" });
    this.caption = h("figcaption");
    this.logButton = h("button", { type: "button", title: "logarithmic", "aria-pressed": "false",
      onclick: () => { this.log = !this.log; this.logButton.setAttribute("aria-pressed", this.log); this.draw(); } }, "log");
    const wide = h("button", { type: "button", title: "wide", "aria-label": "wide",
      onclick: () => { this.node.classList.toggle("wide"); this.draw(); } }, "⤢");
    this.node = h("figure", { class: "chart" }, this.title, h("div", { class: "corner" }, this.logButton, wide),
      this.svg, this.legend, this.caption, this.tip);
    this.svg.addEventListener("pointermove", (event) => this.moved(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("pointerdown", (event) => this.pressed(event));
    this.svg.addEventListener("pointerup", (event) => this.released(event));
    this.svg.addEventListener("dblclick", () => this.zoom(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.seen = false;
    Chart.watcher.observe(this.node);
    Chart.sizes.observe(this.svg);
    this.node.chart = this;
    this.update(spec);
  }

  update(spec) {
    this.spec = spec;
    this.title.textContent = spec.title;
    this.svg.setAttribute("aria-label", `${spec.title}. Arrow keys read it, + and - zoom.`);
    this.caption.textContent = spec.caption || "";
    this.logButton.hidden = spec.kind !== "line";
    this.draw();
  }

  shown() { return this.spec.series.filter((each) => !each.run || !view.off.has(each.run)); }

  draw() {
    if (!this.seen) return;
    this.width = Math.max(200, this.svg.clientWidth || 360);
    this.tip.hidden = true;
    this.svg.replaceChildren();
    const series = this.shown();
    const height = { bars: 44 + (this.spec.rows || []).length * (8 + 11 * series.length),
      heat: 40 + 26 * (this.spec.rows || []).length }[this.spec.kind] || (this.node.classList.contains("wide") ? 340 : 214);
    this.height = height;
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${height}`);
    this.svg.style.height = `${height}px`;
    this.legend.replaceChildren(...(series.length > 1 && this.spec.kind !== "heat"
      ? series.map((each) => h("span", {}, swatch(each.colour), each.label)) : []));
    if (!series.length) { this.svg.append(s("text", { x: 12, y: 30 }, "no run is switched on")); return; }
    this[this.spec.kind](series);
  }

  // --- axes -------------------------------------------------------------------------------------

  axes(xs, ys) {
    const box = { left: 12, right: this.width - 10, top: 8, bottom: this.height - 36 };
    const log = this.log && ys[0] > 0;
    let [low, high] = ys;
    if (low === high) { const pad = Math.abs(low) * 0.05 || 0.5; low -= log ? low / 2 : pad; high += pad; }
    const map = log ? Math.log10 : (v) => v;
    const span = map(high) - map(low);
    const y = (v) => box.bottom - ((map(log ? Math.max(v, low) : v) - map(low) + span * 0.04) / (span * 1.08)) * (box.bottom - box.top);
    const marks = log ? ticks(map(low), map(high), 4).map((t) => 10 ** t) : ticks(low, high, 5);
    box.left += 7 * Math.max(...marks.map((t) => figure(t).length));
    const wide = xs[1] - xs[0] || 1;
    const x = (v) => box.left + ((v - xs[0]) / wide) * (box.right - box.left);
    const back = (pixel) => xs[0] + ((pixel - box.left) / (box.right - box.left)) * wide;
    for (const t of marks) {
      this.svg.append(s("line", { class: "axis", x1: box.left, x2: box.right, y1: y(t), y2: y(t) }),
        s("text", { x: box.left - 6, y: y(t) + 4, "text-anchor": "end" }, figure(t)));
    }
    for (const t of ticks(xs[0], xs[1] === xs[0] ? xs[0] + 1 : xs[1], Math.max(2, this.width / 90)))
      this.svg.append(s("text", { x: x(t), y: box.bottom + 16, "text-anchor": "middle" }, figure(t)));
    const label = this.spec.y ? `${this.spec.x}, across; ${this.spec.y}, up` : this.spec.x || "";
    this.svg.append(s("text", { x: box.right, y: box.bottom + 31, "text-anchor": "end" }, label));
    const clip = `clip-${Chart.count++}`;
    this.svg.append(s("clipPath", { id: clip }, s("rect", { x: box.left - 5, y: 0, width: box.right - box.left + 10, height: box.bottom + 5 })));
    this.plot = s("g", { "clip-path": `url(#${clip})` });
    this.over = s("g");
    this.svg.append(this.plot, this.over);
    this.scale = { x, y, back, box, xs };
    return this.scale;
  }

  stroke(points, attributes) {
    const { x, y } = this.scale;
    const d = points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
    this.plot.append(s("path", { d, fill: "none", "stroke-linejoin": "round", ...attributes }));
  }

  dot(a, b, colour, r, hollow = false) {
    const { x, y } = this.scale;
    this.plot.append(s("circle", { cx: x(a), cy: y(b), r, stroke: `var(--${colour})`, "stroke-width": 1.5,
      fill: hollow ? "var(--card)" : `var(--${colour})` }));
  }

  // --- kinds ------------------------------------------------------------------------------------

  line(series) {
    const curves = series.filter((each) => each.style !== "level");
    const whole = extent(this.spec.series.flatMap((each) => each.x || []));
    const range = view.zoom.get(this.spec.x) || (whole[0] > whole[1] ? [0, 1] : whole);
    const inside = (x) => x >= range[0] && x <= range[1];
    this.lines = curves.map((each) => {
      const smooth = each.style === "smooth" ? smoothed(each.y, view.smoothing) : each.y;
      return { ...each, smooth };
    });
    const ys = extent([
      ...series.filter((each) => each.style === "level").map((each) => each.y[0]),
      ...this.lines.flatMap((each) => each.x.flatMap((x, i) => (inside(x)
        ? [each.y[i], ...(each.low ? [each.low[i], each.high[i]] : [])] : []))),
    ]);
    if (ys[0] > ys[1]) { this.svg.append(s("text", { x: 12, y: 30 }, "nothing in this range")); this.scale = null; return; }
    const { y, x, box } = this.axes(range, ys);
    for (const each of series.filter((one) => one.style === "level")) {
      this.plot.append(s("line", { x1: box.left, x2: box.right, y1: y(each.y[0]), y2: y(each.y[0]),
        stroke: `var(--${each.colour})`, "stroke-dasharray": "5 4" }));
    }
    for (const each of this.lines) {
      const stroke = `var(--${each.colour})`, raw = each.x.map((a, i) => [a, each.y[i]]);
      if (each.low) {
        const up = each.x.map((a, i) => [a, each.high[i]]), down = each.x.map((a, i) => [a, each.low[i]]).reverse();
        this.stroke([...up, ...down], { fill: stroke, "fill-opacity": 0.16 });
      } else if (each.style === "smooth") this.stroke(raw, { stroke, "stroke-opacity": 0.28, "stroke-width": 1 });
      this.stroke(each.x.map((a, i) => [a, each.smooth[i]]), { stroke, "stroke-width": 1.9, class: "curve" });
      if (each.style !== "smooth" && raw.length < 80) for (const [a, b] of raw) this.dot(a, b, each.colour, 2.2);
    }
  }

  path(series) {
    this.axes(extent(series.flatMap((each) => each.x)), extent(series.flatMap((each) => each.y)));
    for (const each of series) {
      const points = each.x.map((a, i) => [a, each.y[i]]);
      this.stroke(points, { stroke: `var(--${each.colour})`, "stroke-width": 1.4, "stroke-opacity": 0.85 });
      points.forEach(([a, b], i) => {
        const last = i === points.length - 1;
        if (i === 0 || last || points.length < 60) this.dot(a, b, i ? each.colour : "sft", last ? 5 : i ? 2 : 4.5, i === 0);
      });
    }
  }

  bars(series) {
    const rows = this.spec.rows, share = this.spec.x.startsWith("share");
    const most = share ? 1 : extent(series.flatMap((each) => each.y))[1] || 1;
    const left = Math.min(this.width * 0.4, 12 + 6.4 * Math.max(...rows.map((row) => row.length)));
    const x = (v) => left + (v / most) * (this.width - left - 54);
    const tall = 8 + 11 * series.length;
    this.scale = null;
    rows.forEach((row, i) => {
      const top = 8 + i * tall, cut = Math.floor(left / 6.4);
      this.svg.append(s("text", { x: left - 8, y: top + tall / 2, "text-anchor": "end" },
        s("title", {}, row), row.length > cut ? row.slice(0, cut - 1) + "…" : row));
      series.forEach((each, k) => {
        const value = each.y[i], at = top + k * 11;
        if (value === null || value === undefined) return;
        const said = each.low && each.low[i] !== null
          ? `${figure(value)} (${figure(each.low[i])} to ${figure(each.high[i])})` : figure(value);
        this.svg.append(s("rect", { x: left, y: at, width: Math.max(1, x(value) - left), height: 9, rx: 2,
          fill: `var(--${each.colour})` }, s("title", {}, `${each.label}: ${said}`)));
        let end = x(value);
        if (each.low && each.low[i] !== null) {
          this.svg.append(s("line", { x1: x(each.low[i]), x2: x(each.high[i]), y1: at + 4.5, y2: at + 4.5, stroke: "var(--ink)" }));
          end = x(each.high[i]);
        }
        this.svg.append(s("text", { x: end + 5, y: at + 8.5 }, figure(value)));
      });
    });
    this.svg.append(s("text", { x: this.width - 10, y: this.height - 6, "text-anchor": "end" }, this.spec.x));
  }

  histogram(series) {
    const edges = series[0].x;
    const { box } = this.axes([edges[0], edges[edges.length - 1]], [0, extent(series.flatMap((each) => each.y))[1]]);
    for (const each of series) {
      const top = each.y.flatMap((v, i) => [[edges[i], v], [edges[i + 1], v]]);
      const closed = [[edges[0], 0], ...top, [edges[edges.length - 1], 0]];
      this.stroke(closed, { stroke: `var(--${each.colour})`, "stroke-width": 1.5, fill: `var(--${each.colour})`, "fill-opacity": 0.12 });
    }
  }

  heat(columns) {
    const rows = this.spec.rows, left = Math.min(this.width * 0.35, 14 + 6.4 * Math.max(...rows.map((row) => row.length)));
    const wide = (this.width - left - 8) / columns.length, cut = Math.floor(left / 6.4), most = Math.floor(wide / 6);
    this.scale = null;
    rows.forEach((row, i) => {
      this.svg.append(s("text", { x: left - 8, y: 8 + i * 26 + 17, "text-anchor": "end" },
        s("title", {}, row), row.length > cut ? row.slice(0, cut - 1) + "…" : row));
      columns.forEach((each, k) => {
        const value = each.y[i];
        this.svg.append(
          s("rect", { x: left + k * wide, y: 8 + i * 26, width: wide - 2, height: 24, rx: 3, fill: "var(--grid)" }),
          s("rect", { x: left + k * wide, y: 8 + i * 26, width: wide - 2, height: 24, rx: 3, fill: "var(--heat)", "fill-opacity": value }),
          s("text", { x: left + (k + 0.5) * wide - 1, y: 8 + i * 26 + 16, "text-anchor": "middle",
            style: { fill: value > 0.55 ? "#fff" : "var(--ink)" } }, `${Math.round(value * 100)}%`));
      });
    });
    columns.forEach((each, k) => this.svg.append(s("text", { x: left + (k + 0.5) * wide, y: this.height - 12, "text-anchor": "middle" },
      s("title", {}, each.label), each.label.length > most ? each.label.slice(0, most - 1) + "…" : each.label)));
  }

  // --- hover and zoom ---------------------------------------------------------------------------

  place(event) {
    const rect = this.svg.getBoundingClientRect();
    return [((event.clientX - rect.left) / rect.width) * this.width, ((event.clientY - rect.top) / rect.height) * this.height];
  }

  moved(event) {
    if (!this.scale) return;
    const [px, py] = this.place(event);
    if (this.start !== undefined) return this.brush(px);
    this.point(px, py);
  }

  /** Nearest values to a place, in a box beside it. */
  point(px, py) {
    const { x, y, back, box } = this.scale;
    this.over.replaceChildren();
    const lines = [];
    let head = "";
    if (this.spec.kind === "line") {
      const at = back(Math.min(box.right, Math.max(box.left, px)));
      const near = this.lines.map((each) => nearest(each.x, at));
      const steps = near.map((i, k) => this.lines[k].x[i]).filter((v) => v !== undefined);
      if (!steps.length) return;
      const step = steps.reduce((a, b) => (Math.abs(b - at) < Math.abs(a - at) ? b : a));
      this.cursor = step;
      this.over.append(s("line", { class: "cursor", x1: x(step), x2: x(step), y1: box.top, y2: box.bottom }));
      head = `${this.spec.x} ${figure(step)}`;
      this.lines.forEach((each, k) => {
        const i = near[k];
        if (each.x[i] === undefined) return;
        const value = each.smooth[i];
        this.over.append(s("circle", { cx: x(each.x[i]), cy: y(value), r: 4, fill: `var(--${each.colour})`, stroke: "var(--card)", "stroke-width": 1.5 }));
        const raw = each.style === "smooth" && value !== each.y[i] ? ` (${figure(each.y[i])})` : "";
        const span = each.low ? ` [${figure(each.low[i])}, ${figure(each.high[i])}]` : raw;
        lines.push([value, each.colour, each.label, figure(value) + span]);
      });
      lines.sort((a, b) => b[0] - a[0]);
    } else if (this.spec.kind === "histogram") {
      const edges = this.shown()[0].x, at = back(px);
      const i = edges.findIndex((edge, k) => at >= edge && at <= edges[k + 1]);
      if (i < 0) return this.leave();
      head = `${this.spec.x} ${figure(edges[i])} to ${figure(edges[i + 1])}`;
      for (const each of this.shown()) lines.push([0, each.colour, each.label, `${(each.y[i] * 100).toFixed(1)}%`]);
    } else {
      let best = [Infinity];
      for (const each of this.shown()) each.x.forEach((a, i) => {
        const away = Math.hypot(x(a) - px, y(each.y[i]) - py);
        if (away < best[0]) best = [away, each, i];
      });
      if (!best[1]) return;
      const [, each, i] = best;
      this.over.append(s("circle", { cx: x(each.x[i]), cy: y(each.y[i]), r: 6, fill: "none", stroke: "var(--ink)" }));
      head = `${each.label}, evaluation ${i} of ${each.x.length - 1}`;
      lines.push([0, each.colour, this.spec.x, figure(each.x[i])], [0, each.colour, this.spec.y, figure(each.y[i])]);
    }
    this.tip.replaceChildren(h("div", { class: "soft" }, head),
      ...lines.slice(0, 12).map(([, colour, label, value]) => h("div", {}, swatch(colour), label, h("b", {}, value))));
    this.tip.hidden = false;
    const right = px > this.width / 2;
    const shift = this.svg.offsetLeft || 12;
    this.tip.style.left = right ? "" : `${px + shift + 14}px`;
    this.tip.style.right = right ? `${this.width - px + shift + 14}px` : "";
    this.tip.style.top = "34px";
  }

  leave() { this.tip.hidden = true; if (this.over) this.over.replaceChildren(); this.start = undefined; }

  pressed(event) {
    if (this.spec.kind !== "line" || !this.scale || event.pointerType === "touch") return;
    this.start = this.place(event)[0];
    this.svg.setPointerCapture(event.pointerId);
  }

  brush(px) {
    const { box } = this.scale;
    this.tip.hidden = true;
    const [a, b] = [Math.max(box.left, Math.min(px, this.start)), Math.min(box.right, Math.max(px, this.start))];
    this.over.replaceChildren(s("rect", { class: "brush", x: a, y: box.top, width: Math.max(0, b - a), height: box.bottom - box.top }));
  }

  released(event) {
    if (this.start === undefined) return;
    const px = this.place(event)[0], from = this.start;
    this.start = undefined;
    if (Math.abs(px - from) > 5) this.zoom([this.scale.back(Math.min(px, from)), this.scale.back(Math.max(px, from))]);
  }

  /** All charts over the same steps go with it. */
  zoom(range) {
    if (this.spec.kind !== "line") return;
    if (range) view.zoom.set(this.spec.x, range); else view.zoom.delete(this.spec.x);
    view.changed();
  }

  key(event) {
    if (this.spec.kind !== "line" || !this.scale) return;
    const { xs, x } = this.scale, all = this.lines[0] ? this.lines[0].x : [];
    const at = nearest(all, this.cursor === undefined ? xs[1] : this.cursor);
    const moves = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.key in moves && all.length) {
      const next = all[Math.min(all.length - 1, Math.max(0, at + moves[event.key]))];
      this.point(x(next), 0);
    } else if (event.key === "+" || event.key === "-") {
      const middle = this.cursor === undefined ? (xs[0] + xs[1]) / 2 : this.cursor;
      const half = ((xs[1] - xs[0]) / 2) * (event.key === "+" ? 0.5 : 2);
      this.zoom([middle - half, middle + half]);
    } else if (event.key === "Escape") this.zoom(null);
    else return;
    event.preventDefault();
  }
}

/** Place of the value nearest to `wanted` in ascending values. */
function nearest(values, wanted) {
  let low = 0, high = values.length - 1;
  while (low < high) { const mid = (low + high) >> 1; if (values[mid] < wanted) low = mid + 1; else high = mid; }
  return low > 0 && wanted - values[low - 1] < values[low] - wanted ? low - 1 : low;
}

Chart.count = 0;
Chart.watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = entry.target.chart;
    if (chart && entry.isIntersecting && !chart.seen) { chart.seen = true; chart.draw(); }
  }
}, { rootMargin: "400px" });
Chart.sizes = new ResizeObserver((entries) => {
  for (const entry of entries) {
    const chart = entry.target.parentNode && entry.target.parentNode.chart;
    if (chart && chart.seen && Math.abs(chart.width - entry.contentRect.width) > 1) chart.draw();
  }
});
