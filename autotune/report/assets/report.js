"use strict";
(() => {
  const root = document.documentElement;
  const figures = new Proxy({}, {
    get: (known, key) => {
      const text = key in known ? null : document.getElementById(`json-${key}`);
      if (text) known[key] = JSON.parse(text.textContent);
      return known[key];
    },
  });
  const axes = {};   // figure -> "examples", where the reader chose it
  const cursor = {}; // figure -> index of the decision last shown

  // ---- theme -------------------------------------------------------------------------------------------
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const kept = (() => { try { return localStorage.getItem("autotune-theme"); } catch { return null; } })();
  const setTheme = (theme) => { root.dataset.theme = theme; };
  setTheme(kept || (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => { setTheme(dark.matches ? "dark" : "light"); redraw(); });

  function resolved(value, style) {
    if (typeof value === "string") {
      return value.startsWith("var(") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) {
      return typeof value[0] === "object" && value[0] !== null ? value.map((item) => resolved(item, style)) : value;
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, style)]));
    }
    return value;
  }

  // ---- drawing -----------------------------------------------------------------------------------------
  function examplesAt(knots, step) {
    let low = 0, high = knots.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (knots[middle][0] <= step) low = middle; else high = middle;
    }
    const [s0, e0] = knots[low], [s1, e1] = knots[high];
    return s1 === s0 ? e1 : e0 + (e1 - e0) * (step - s0) / (s1 - s0);
  }

  function draw(box) {
    const key = box.dataset.figure;
    const figure = figures[key];
    if (!figure) return;
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const narrow = box.clientWidth < 560;
    let data = resolved(figure.data, style);
    const byExamples = axes[key] === "examples" && figure.examples;
    if (byExamples) data = data.map((t) => ({ ...t, x: t.x.map((x) => examplesAt(figure.examples, x)) }));
    const layout = resolved(structuredClone(figure.layout), style);
    for (const name of Object.keys(layout).concat(["xaxis", "yaxis"])) {
      if (/^[xy]axis\d*$/.test(name)) {
        const axis = { gridcolor: colour("--grid"), linecolor: colour("--rule"), zeroline: false, automargin: true };
        layout[name] = { ...axis, ...layout[name] };
      }
    }
    if (byExamples) layout.xaxis.title = { text: "examples" };
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, uirevision: axes[key] || "updates",
      font: { color: colour("--text"), family: "system-ui, sans-serif", size: narrow ? 11 : 12 },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--rule"), font: { color: colour("--text") }, align: "left" },
      hovermode: "closest", dragmode: narrow ? false : "zoom",
      margin: { l: narrow ? 8 : 16, r: 8, t: 28, b: 8 },
      legend: { orientation: "h", y: 0, yref: "container", yanchor: "bottom", x: 0 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--quiet"), activecolor: colour("--text") },
    });
    const options = { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
      modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };
    const first = !box.classList.contains("js-plotly-plot");
    Plotly.react(box, data, layout, options);
    if (first) box.on("plotly_click", (event) => { if (event.points[0]) toRow(box, event.points[0].customdata); });
    box.dataset.theme = root.dataset.theme;
  }

  const visible = (box) => { const closed = box.closest("details:not([open])"); return !closed; };
  const boxes = () => [...document.querySelectorAll(".figure")].filter(visible);
  function redraw() { boxes().forEach(draw); }

  // ---- figure and table belong together -----------------------------------------------------------------
  function markers(box) {
    const found = [];
    (box.data || []).forEach((trace, curveNumber) => {
      if (!trace.customdata) return;
      trace.customdata.forEach((index, pointNumber) => found.push({ index, curveNumber, pointNumber }));
    });
    return found.sort((a, b) => a.index - b.index);
  }
  function show(box, index) {
    const marker = markers(box).find((item) => item.index === index);
    if (!marker) return;
    cursor[box.dataset.figure] = index;
    Plotly.Fx.hover(box, [{ curveNumber: marker.curveNumber, pointNumber: marker.pointNumber }], "xy");
    const row = document.getElementById(rowOf(box, index));
    document.querySelectorAll("tr.chosen").forEach((other) => other.classList.remove("chosen"));
    if (row) row.classList.add("chosen");
  }
  const rowOf = (box, index) => `${box.dataset.figure.split("-")[0]}-d${index}`;
  function toRow(box, index) {
    if (index === undefined) return;
    const row = document.getElementById(rowOf(box, index));
    if (!row) return;
    show(box, index);
    row.hidden = false;
    row.focus();
    row.scrollIntoView({ block: "nearest" });
  }

  document.addEventListener("keydown", (event) => {
    const box = event.target;
    if (!(box instanceof HTMLElement) || !box.classList.contains("figure")) return;
    const all = markers(box);
    if (!all.length) return;
    const at = all.findIndex((item) => item.index === cursor[box.dataset.figure]);
    const steps = { ArrowRight: at + 1, ArrowLeft: at < 0 ? all.length - 1 : at - 1, Home: 0, End: all.length - 1 };
    if (event.key in steps) {
      show(box, all[Math.min(Math.max(steps[event.key], 0), all.length - 1)].index);
      event.preventDefault();
    } else if (event.key === "Enter" && at >= 0) {
      toRow(box, all[at].index);
      event.preventDefault();
    }
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.id === "theme") {
      setTheme(root.dataset.theme === "dark" ? "light" : "dark");
      try { localStorage.setItem("autotune-theme", root.dataset.theme); } catch { /* a file may have no storage */ }
      redraw();
    } else if (button.dataset.show) {
      const box = document.querySelector(`[data-figure="${button.dataset.show}"]`);
      if (box) { box.scrollIntoView({ block: "nearest" }); show(box, Number(button.dataset.index)); }
    }
  });

  function filter(key) {
    const table = document.getElementById(`${key}-table`);
    if (!table) return;
    const on = new Set([...document.querySelectorAll(`input[data-table="${key}"]:checked`)].map((box) => box.dataset.kind));
    const find = document.querySelector(`input[data-find="${key}"]`);
    const text = find ? find.value.toLowerCase() : "";
    for (const row of table.tBodies[0].rows) {
      row.hidden = !on.has(row.dataset.kind) || (text !== "" && !row.textContent.toLowerCase().includes(text));
    }
  }
  document.addEventListener("input", (event) => {
    const { table, find, axis } = event.target.dataset;
    if (table || find) filter(table || find);
    if (axis) { axes[axis] = event.target.value; draw(document.querySelector(`[data-figure="${axis}"]`)); }
  });
  document.addEventListener("toggle", (event) => {
    if (event.target.open) event.target.querySelectorAll(".figure").forEach((box) => { if (visible(box)) draw(box); });
  }, true);

  redraw();
  root.dataset.ready = String(Math.round(performance.now())); // milliseconds until the first view was drawn

  // ---- watching a run ----------------------------------------------------------------------------------
  if (!("live" in root.dataset)) return;
  const status = () => document.getElementById("live");
  const say = (text) => { const line = status(); if (line) { line.hidden = false; if (line.textContent !== text) line.textContent = text; } };
  let version = "";
  function put(news) {
    const open = [...document.querySelectorAll("details[open][id]")].map((item) => item.id);
    const drawn = new Map([...document.querySelectorAll(".figure.js-plotly-plot")].map((box) => [box.dataset.figure, box]));
    const inputs = [...document.querySelectorAll("input")].map((box) => [selector(box), box.checked, box.value]);
    const focused = document.activeElement && document.activeElement.id;
    const fresh = new DOMParser().parseFromString(news.body, "text/html").body;
    fresh.querySelectorAll(".figure").forEach((box) => {
      const old = drawn.get(box.dataset.figure);
      if (old) box.replaceWith(document.adoptNode(old)); // keeps the reader's zoom
    });
    const scroll = [...document.querySelectorAll(".tall")].map((box) => box.scrollTop);
    document.getElementById("content").replaceChildren(...fresh.childNodes);
    document.querySelectorAll(".tall").forEach((box, i) => { box.scrollTop = scroll[i] || 0; });
    Object.assign(figures, news.figures);
    open.forEach((id) => { const item = document.getElementById(id); if (item) item.open = true; });
    for (const [where, checked, value] of inputs) {
      const box = document.querySelector(where);
      if (!box) continue;
      if (box.type === "search") box.value = value; else box.checked = checked;
    }
    document.querySelectorAll("input[data-find]").forEach((box) => filter(box.dataset.find));
    if (focused) { const item = document.getElementById(focused); if (item) item.focus(); }
    redraw();
  }
  const selector = (box) => "input" + ["name", "value", "data-kind", "data-table", "data-find"]
    .filter((name) => box.hasAttribute(name)).map((name) => `[${name}=${JSON.stringify(box.getAttribute(name))}]`).join("");
  async function poll() {
    try {
      const answer = await fetch(`news?have=${encodeURIComponent(version)}`);
      if (answer.status === 200) {
        const news = await answer.json();
        version = news.version;
        put(news);
      }
      if (answer.ok || answer.status === 304) say(`Following the run; ${new Date().toLocaleTimeString()}`);
    } catch {
      say("The server that this page follows has stopped; what is shown is the last it said.");
    }
    setTimeout(poll, 2000);
  }
  poll();
})();
