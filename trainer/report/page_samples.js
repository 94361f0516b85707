// Sample answers: filtered, sorted, a few at a time, those of several runs side by side.

const RUN = 0, STEP = 1, PROMPT = 2, DOMAIN = 3, GROUP = 4, SCORE = 5, GOLD = 6, KL = 7, VERDICT = 8, TEXT = 9;
const PAGE = 20;

class Samples {
  constructor(section) {
    this.section = section;
    this.many = PAGE;
    this.made = false;
  }

  update(data, runs) {
    this.data = data;
    this.runs = runs;
    this.section.hidden = !data.rows.length;
    if (!data.rows.length) return;
    if (!this.made) this.make();
    this.choices(this.domain, data.domains.map((name, i) => [i, name]), "all domains");
    const groups = [...new Set(data.rows.map((row) => row[GROUP]))].filter((g) => g !== null).sort((a, b) => a - b);
    this.choices(this.group, groups.map((g) => [g, `group ${g}`]), "all groups");
    const steps = [...new Set(data.rows.map((row) => row[STEP]))].sort((a, b) => b - a);
    this.choices(this.step, [["all", "every evaluation"], ...steps.map((n) => [n, `step ${n}`])], "last evaluation");
    this.note.textContent = data.rows.length < data.all
      ? `This page has ${data.rows.length.toLocaleString("en")} of ${data.all.toLocaleString("en")} samples: the last evaluation, `
        + "and of those before it the answers to as many prompts as fit; samples.jsonl and gi samples have all."
      : "";
    this.show();
  }

  make() {
    this.made = true;
    const again = () => { this.many = PAGE; this.show(); };
    const select = (id, label) => h("select", { id, "aria-label": label, onchange: again });
    const number = (id, label) => h("input", { id, type: "number", step: "any", placeholder: label, "aria-label": label, oninput: again });
    this.domain = select("domain", "domain");
    this.group = select("group", "group");
    this.step = select("step", "evaluation");
    this.low = number("low", "lowest");
    this.high = number("high", "highest");
    this.by = select("by", "which score");
    this.by.append(...[[SCORE, "proxy"], [GOLD, "gold"], [KL, "KL"]].map(([value, name]) => h("option", { value }, name)));
    this.order = select("order", "order");
    this.order.append(...[["", "as they came"], ["up", "lowest first"], ["down", "highest first"], ["apart", "runs most apart"]]
      .map(([value, name]) => h("option", { value }, name)));
    this.words = h("input", { id: "words", type: "search", placeholder: "words in prompt or answer", "aria-label": "words", oninput: again });
    this.count = h("p", { id: "count", role: "status" });
    this.note = h("p", { class: "note" });
    this.list = h("div");
    this.more = h("button", { type: "button", onclick: () => { this.many += 2 * PAGE; this.show(); } });
    this.section.append(h("h2", {}, "Sample answers"), this.note,
      h("div", { class: "filters", role: "search" }, this.domain, this.group, this.step,
        h("label", {}, this.by, "from", this.low, "to", this.high), this.order, this.words),
      this.count, this.list, this.more);
  }

  /** Options of a menu; what was chosen stays chosen. */
  choices(menu, options, all) {
    const chosen = menu.value;
    menu.replaceChildren(h("option", { value: "" }, all), ...options.map(([value, name]) => h("option", { value }, name)));
    menu.value = [...menu.options].some((each) => each.value === chosen) ? chosen : "";
    menu.hidden = !options.length;
  }

  /** Rows that the filters let through, by prompt. */
  chosen() {
    const { rows, prompts } = this.data;
    const last = this.runs.map((_, i) => rows.reduce((most, row) => (row[RUN] === i ? Math.max(most, row[STEP]) : most), -1));
    const words = this.words.value.trim().toLowerCase(), by = Number(this.by.value);
    const low = this.low.value === "" ? -Infinity : Number(this.low.value);
    const high = this.high.value === "" ? Infinity : Number(this.high.value);
    const bounded = low > -Infinity || high < Infinity;
    const found = new Map();
    for (const row of rows) {
      if (view.off.has(this.runs[row[RUN]].name)) continue;
      if (this.step.value === "" ? row[STEP] !== last[row[RUN]] : this.step.value !== "all" && row[STEP] !== Number(this.step.value)) continue;
      if (this.domain.value !== "" && row[DOMAIN] !== Number(this.domain.value)) continue;
      if (this.group.value !== "" && row[GROUP] !== Number(this.group.value)) continue;
      if (bounded && (row[by] === null || row[by] < low || row[by] > high)) continue;
      if (words && !row[TEXT].toLowerCase().includes(words) && !prompts[row[PROMPT]].toLowerCase().includes(words)) continue;
      if (!found.has(row[PROMPT])) found.set(row[PROMPT], []);
      found.get(row[PROMPT]).push(row);
    }
    const values = (of) => of.map((row) => row[by]).filter((v) => v !== null);
    const key = {
      up: (of) => Math.min(...values(of)), down: (of) => -Math.max(...values(of)),
      apart: (of) => Math.min(...values(of)) - Math.max(...values(of)),
    }[this.order.value];
    const list = [...found].map(([prompt, of]) => [prompt, of.sort((a, b) => a[RUN] - b[RUN] || a[STEP] - b[STEP])]);
    if (key) list.sort((a, b) => key(a[1]) - key(b[1]));
    return list;
  }

  show() {
    if (!this.made) return;
    const list = this.chosen(), by = Number(this.by.value);
    const rows = list.flatMap(([, of]) => of), values = rows.map((row) => row[by]).filter((v) => v !== null);
    const mean = values.length ? `; mean ${this.by.selectedOptions[0].text} ${figure(values.reduce((a, b) => a + b, 0) / values.length)}` : "";
    this.count.textContent = `${rows.length.toLocaleString("en")} answers to ${list.length.toLocaleString("en")} prompts${mean}`;
    this.list.replaceChildren(...list.slice(0, this.many).map(([prompt, of]) => this.card(prompt, of)));
    this.more.hidden = list.length <= this.many;
    this.more.textContent = `${list.length - this.many} more prompts`;
  }

  card(prompt, rows) {
    const domain = rows[0][DOMAIN];
    return h("article", { class: "sample" },
      domain === null ? null : h("small", {}, this.data.domains[domain]),
      h("pre", { class: "prompt", tabindex: 0, "aria-label": "prompt" }, this.data.prompts[prompt]),
      h("div", { class: "answers" }, ...this.runs.map((_, i) => rows.filter((row) => row[RUN] === i)).filter((of) => of.length)
        .map((of) => h("div", { class: "column" }, ...of.map((row) => this.answer(row))))));
  }

  answer(row) {
    const run = this.runs[row[RUN]];
    const figures = [[GOLD, "gold"], [SCORE, "proxy"], [KL, "KL"], [GROUP, "group"]]
      .filter(([column]) => row[column] !== null).map(([column, name]) => `${name} ${figure(row[column])}`);
    return h("div", { class: "answer", style: { "border-color": `var(--${run.colour})` } },
      h("small", {}, [run.name, `step ${row[STEP]}`, ...figures].join(" · "), row[VERDICT] ? " · " : null,
        row[VERDICT] ? h("span", { class: row[VERDICT] === "right" ? "good" : "bad" }, row[VERDICT]) : null),
      h("pre", {}, row[TEXT] || " "));
  }
}
