"use strict";
(() => {
  // Everything from the data is set as text; there is no markup in here.
  const get = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(get(id).textContent);
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };

  const theme = get("theme");
  const isDark = () => document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  nameTheme();

  const table = get("ranking");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const tasks = read("tasks");
  const axes = { "f-model": "model", "f-dtype": "dtype", "f-query": "query", "f-first_token": "firstToken", "f-budget": "budget" };
  let sorted = "";
  let resort = () => {};

  const showTask = (task) => {
    table.classList.toggle("by-task", task !== "");
    rows.forEach((row, i) => {
      const cell = row.querySelector(".score");
      const [all, one] = cell.children;
      const found = tasks[i][task];
      all.hidden = task !== "";
      one.hidden = task === "";
      cell.dataset.all ??= cell.dataset.v;
      if (!task) { cell.dataset.v = cell.dataset.all; return; }
      const [mean, n, expected] = found || [null, 0, 0];
      one.textContent = mean === null ? "-" : mean.toFixed(1) + (n < expected ? ` (${n} of ${expected})` : "");
      cell.dataset.v = mean === null ? "" : mean;
    });
  };

  const filter = () => {
    const task = get("f-task").value;
    const part = get("f-method").value.trim().toLowerCase();
    const chosen = Object.entries(axes).filter(([id]) => get(id) && get(id).value !== "");
    showTask(task);
    resort();
    rows.forEach((row, i) => {
      row.hidden = chosen.some(([id, name]) => row.dataset[name] !== get(id).value)
        || !row.dataset.method.toLowerCase().includes(part) || (task !== "" && !(task in tasks[i]));
    });
    say();
  };
  const say = () => {
    const shown = rows.filter((row) => !row.hidden).length;
    const task = get("f-task").value;
    get("status").textContent = `${shown} of ${rows.length} rows${sorted}.`
      + (task ? " Means of one task; intervals, differences and marks are of the mean of all tasks, so they are hidden." : "");
  };

  const order = (column, down) => (a, b) => {
    const [x, y] = [a, b].map((row) => row.cells[column].dataset.v);
    if (x === "" || y === "") return (x === "") - (y === "");
    const [p, q] = [Number(x), Number(y)];
    const by = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y, "en", { numeric: true }) : p - q;
    return down ? -by : by;
  };
  [...table.tHead.rows[0].cells].forEach((head, column, heads) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const number = rows.some((row) => row.cells[column].classList.contains("num"));
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : number;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      resort = () => body.append(...[...body.rows].sort(order(column, down)));
      resort();
      sorted = `, by ${button.textContent}, ${down ? "descending" : "ascending"}`;
      say();
    });
  });
  get("filters").hidden = false;
  get("filters").addEventListener("input", filter);
  get("filters").addEventListener("submit", (event) => event.preventDefault());
  filter();

  const made = get("made");
  body.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-run]");
    if (!link) return;
    event.preventDefault();
    const row = link.closest("tr");
    get("made-title").textContent = `${row.dataset.method} at ${row.dataset.budget}`;
    const run = get(`run-${link.dataset.run}`);
    const inside = run.querySelector("div").cloneNode(true);
    inside.prepend(make("h3", run.querySelector("summary").textContent));
    made.querySelector("div").replaceChildren(inside);
    made.showModal();
  });
  get("close").addEventListener("click", () => made.close());
  made.addEventListener("click", (event) => { if (event.target === made) made.close(); });
  const openRun = () => {
    const run = /^#run-\d+$/.test(location.hash) && get(location.hash.slice(1));
    if (run) run.open = true;
  };
  addEventListener("hashchange", openRun);
  openRun();

  document.querySelectorAll(".charts").forEach((charts) => {
    charts.querySelectorAll(".key").forEach((key) => key.addEventListener("click", () => {
      key.setAttribute("aria-pressed", key.getAttribute("aria-pressed") === "true" ? "false" : "true");
      const picked = [...charts.querySelectorAll(".key[aria-pressed=true]")].map((other) => other.dataset.s);
      charts.querySelectorAll("svg.chart [data-s]").forEach((series) => {
        series.classList.toggle("faint", picked.length > 0 && !picked.includes(series.dataset.s));
      });
    }));
    charts.querySelectorAll("figure").forEach((figure) => figure.addEventListener("pointerover", (event) => {
      const point = event.target.closest(".point");
      if (point) figure.querySelector(".readout").textContent = point.querySelector("title").textContent;
    }));
  });

  const { tables, samples } = read("samples");
  const pick = get("sample");
  const budgets = get("answers");
  const option = (value, text) => { const found = make("option", text); found.value = value; return found; };
  const show = () => {
    const sample = samples[pick.value];
    const shown = get("shown");
    const about = make("dl");
    about.append(make("dt", "Task"), make("dd", sample.task), make("dt", "Sample"), make("dd", sample.id));
    if (tables.length > 1) about.append(make("dt", "Setting"), make("dd", tables[sample.table]));
    about.append(make("dt", "References"));
    sample.references.forEach((reference) => about.append(make("dd", reference, "text")));
    if (sample.more) about.append(make("dd", `and ${sample.more} more`));
    const cards = make("ul", undefined, "answers");
    sample.answers.filter((a) => a.budget === budgets.value || a.budget === "full").forEach((answer) => {
      const card = make("li");
      const facts = [answer.status === "ok" ? `score ${answer.score ?? "-"}` : answer.status];
      if (answer.needle !== null) facts.push(`needle ${answer.needle} % cached`);
      card.append(make("b", answer.method), make("small", `budget ${answer.budget} · ${facts.join(" · ")}`));
      card.append(make("p", answer.text || answer.error || "(empty answer)", "text"));
      cards.append(card);
    });
    shown.replaceChildren(about, cards);
  };
  const refill = () => {
    const found = new Set(samples[pick.value].answers.map((answer) => answer.budget));
    if (found.size > 1) found.delete("full");
    const before = budgets.value;
    budgets.replaceChildren(...[...found].map((budget) => option(budget, budget)));
    if (found.has(before)) budgets.value = before;
    show();
  };
  if (samples.length) {
    pick.append(...samples.map((sample, i) => option(i, `${sample.task} ${sample.id}`)));
    pick.addEventListener("change", refill);
    budgets.addEventListener("change", show);
    get("pick").addEventListener("submit", (event) => event.preventDefault());
    get("pick").hidden = false;
    refill();
  }
})();
