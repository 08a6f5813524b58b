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
  const axes = { "f-model": "model", "f-dtype": "dtype", "f-processor": "processor", "f-query": "query", "f-first_token": "firstToken", "f-memory": "memory" };
  const within = { ...axes, "f-budget": "budget" };
  const groups = rows.map((row) => rows.findIndex((r) => r.dataset.table === row.dataset.table && r.dataset.budget === row.dataset.budget));
  let sorted = "";
  let byHeader = null, moved = false;

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

  // Without a chosen header: as written, and the best of a task first within each budget.
  const resort = () => {
    moved = true;
    const value = (i) => Number(rows[i].querySelector(".score").dataset.v || -1);
    const places = rows.map((_, i) => i);
    if (get("f-task").value) places.sort((a, b) => groups[a] - groups[b] || value(b) - value(a));
    body.append(...places.map((i) => rows[i]).sort(byHeader || (() => 0)));
  };
  const chosenOf = (ids) => Object.entries(ids).filter(([id]) => get(id) && get(id).value !== "");
  const fits = (row, chosen) => chosen.every(([id, name]) => row.dataset[name] === get(id).value);
  const showColumns = () => [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.classList.contains("more")) return;
    [head, ...rows.map((row) => row.cells[column])].forEach((cell) => { cell.hidden = !get("f-more").checked; });
  });

  const filter = () => {
    const task = get("f-task").value;
    const part = get("f-method").value.trim().toLowerCase();
    const chosen = chosenOf(within);
    if (task || moved) { showTask(task); resort(); }
    showColumns();
    rows.forEach((row, i) => {
      row.hidden = !fits(row, chosen) || !row.dataset.method.toLowerCase().includes(part) || (task !== "" && !(task in tasks[i]));
    });
    const axesOnly = chosenOf(axes);
    const left = new Set(rows.filter((row) => fits(row, axesOnly)).map((row) => row.dataset.table));
    document.querySelectorAll(".of").forEach((part) => { part.hidden = !left.has(part.dataset.table); });
    const budget = get("f-budget").value;
    document.querySelectorAll(".verdicts li").forEach((item) => {
      item.hidden = budget !== "" && budget !== "full" && item.dataset.budget !== budget;
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
      byHeader = order(column, down);
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
  });

  const tip = get("tip");
  const hide = () => { tip.hidden = true; };
  const tell = (lines, box) => {
    tip.textContent = lines;
    tip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = tip;
    const room = document.documentElement.clientWidth - width - 8;
    tip.style.left = `${Math.max(8, Math.min(room, box.x + box.width / 2 - width / 2))}px`;
    tip.style.top = `${box.y > height + 16 ? box.y - height - 8 : box.bottom + 8}px`;
  };
  addEventListener("scroll", hide, { passive: true, capture: true });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // The point next to the pointer, or, with the keyboard, one after the other from left to right.
  const REACH = 24, SAME = 4, MOST = 8; // pixels, pixels, lines
  const makeReadable = (figure) => {
    const svg = figure.querySelector("svg.chart");
    const points = [...svg.querySelectorAll(".point")];
    if (!points.length) return;
    points.forEach((point) => {
      const title = point.querySelector("title");
      point.dataset.say = title.textContent;
      title.remove();
    });
    const name = svg.querySelector("title");
    svg.setAttribute("aria-label", name.textContent);
    svg.removeAttribute("aria-labelledby");
    name.remove(); // a browser would show it over every point
    svg.setAttribute("tabindex", "0");
    let on = [];
    const places = () => points.filter((point) => !point.closest(".faint")).map((point) => {
      const box = point.getBoundingClientRect();
      return { point, box, x: box.x + box.width / 2, y: box.y + box.height / 2 };
    });
    const leave = () => {
      on.forEach((point) => point.classList.remove("on"));
      on = [];
      hide();
    };
    const visit = (place, all) => {
      const same = all.filter((other) => Math.hypot(other.x - place.x, other.y - place.y) <= SAME);
      on.forEach((point) => point.classList.remove("on"));
      on = [place.point, ...same.map(({ point }) => point).filter((point) => point !== place.point)];
      on.forEach((point) => point.classList.add("on"));
      const more = on.length > MOST ? [`and ${on.length - MOST} more here`] : [];
      const lines = [...on.slice(0, MOST).map((point) => point.dataset.say), ...more].join("\n");
      figure.querySelector(".readout").textContent = lines;
      tell(lines, place.box);
    };
    const point = (event) => {
      const all = places();
      const far = ({ x, y }) => Math.hypot(x - event.clientX, y - event.clientY);
      const next = all.reduce((best, place) => (!best || far(place) < far(best) ? place : best), null);
      if (next && far(next) <= REACH) visit(next, all); else leave();
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("focus", () => { if (svg.matches(":focus-visible") && !on.length) step(0); });
    const step = (by) => {
      const all = places().sort((a, b) => a.x - b.x || a.y - b.y);
      const at = all.findIndex(({ point: other }) => other === on[0]);
      const next = all[Math.max(0, Math.min(all.length - 1, at < 0 ? 0 : at + by))];
      if (next) visit(next, all);
    };
    const keys = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
    svg.addEventListener("keydown", (event) => {
      if (!(event.key in keys) || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      step(keys[event.key]);
    });
  };
  document.querySelectorAll(".charts figure").forEach(makeReadable);

  // A small map of where the needle is still cached: a square per layer (across) and KV head (down).
  const SVG = "http://www.w3.org/2000/svg";
  const keptMap = (kept) => {
    const layers = kept.split(".");
    const heads = Math.max(...layers.map((layer) => layer.length));
    const all = layers.join("");
    const count = (mark) => [...all].filter((found) => found === mark).length;
    const map = document.createElementNS(SVG, "svg");
    const own = { viewBox: `0 0 ${4 * layers.length} ${4 * heads}`, class: "kept", role: "img" };
    own["aria-label"] = `Needle by layer and KV head: all of it in ${count("a")} of ${all.length}, nothing in ${count("0")}`;
    Object.entries(own).forEach(([name, value]) => map.setAttribute(name, value));
    layers.forEach((layer, x) => [...layer].forEach((mark, y) => {
      const box = document.createElementNS(SVG, "rect");
      const level = parseInt(mark, 11);
      const place = { x: 4 * x, y: 4 * y, width: 3.6, height: 3.6, class: `h${level}` };
      Object.entries(place).forEach(([name, value]) => box.setAttribute(name, value));
      box.dataset.say = `layer ${x}, KV head ${y}: ${["none", ...Array(9).fill(`about ${10 * level} %`), "all"][level]} of the needle`;
      map.append(box);
    }));
    return map;
  };
  get("shown").addEventListener("pointerover", (event) => {
    const box = event.target.closest("rect[data-say]");
    if (box) tell(box.dataset.say, box.getBoundingClientRect()); else hide();
  });
  get("shown").addEventListener("pointerleave", hide);

  const pick = get("sample");
  const budgets = get("answers");
  const option = (value, text) => { const found = make("option", text); found.value = value; return found; };
  const browse = () => {
    const { tables, samples } = read("samples");
    const show = () => {
      const sample = samples[pick.value];
      const shown = get("shown");
      const about = make("dl");
      about.append(make("dt", "Task"), make("dd", sample.task), make("dt", "Sample"), make("dd", sample.id));
      if (tables.length > 1) about.append(make("dt", "Setting"), make("dd", tables[sample.table]));
      if (sample.tail) about.append(make("dt", "End of the prompt"), make("dd", sample.tail, "text"));
      about.append(make("dt", "References"));
      sample.references.forEach((reference) => about.append(make("dd", reference, "text")));
      if (sample.more) about.append(make("dd", `and ${sample.more} more`));
      const cards = make("ul", undefined, "answers");
      sample.answers.filter((a) => a.budget === budgets.value || a.budget === "full").forEach((answer) => {
        const card = make("li");
        const facts = [answer.status === "ok" ? `score ${answer.score ?? "-"}` : answer.status];
        if (answer.needle !== null) facts.push(`needle ${answer.needle} % cached`);
        card.append(make("b", answer.method), make("small", `budget ${answer.budget} · ${facts.join(" · ")}`));
        if (answer.kept) card.append(keptMap(answer.kept));
        card.append(make("p", answer.text.trim() ? answer.text : answer.error || "(empty, or white space only)", "text"));
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
    if (!samples.length) return;
    pick.append(...samples.map((sample, i) => option(i, `${sample.task} ${sample.id}`)));
    pick.addEventListener("change", refill);
    budgets.addEventListener("change", show);
    get("pick").addEventListener("submit", (event) => event.preventDefault());
    get("pick").hidden = false;
    refill();
  };
  // Not before a reader comes near: it is most of the page's data.
  new IntersectionObserver(([seen], observer) => {
    if (seen.isIntersecting) { observer.disconnect(); browse(); }
  }, { rootMargin: "100%" }).observe(get("browser"));
})();
