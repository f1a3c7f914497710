"use strict";
// Draws what the page's data says. Strings of the run reach the page as text nodes only, never as HTML.
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const PALETTE = ["#1f77b4", "#e8710a", "#2a9d57", "#c2357a", "#7b5bd6", "#8c6d31", "#17a2b8", "#6b7280"];
  const MARKS = { bad: "#d33a2c", plain: "#8250df" };
  const SMOOTH_FROM = 60; // points: fewer are drawn as they are
  const MAX_ROWS = 400; // of the sample table, at a time
  const bands = report.bands ?? []; // stages of UDASA

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Plotly reads a little HTML in its labels.
  const asLabel = (text) => text.replace(/[<>&]/g, (sign) => ({ "<": "‹", ">": "›", "&": "＆" })[sign]);

  // --- charts -------------------------------------------------------------------------------------------------------
  function movingMean(values, reach) {
    return values.map((_, at) => {
      const near = values.slice(Math.max(0, at - reach), at + reach + 1).filter((value) => value !== null);
      return near.length && values[at] !== null ? near.reduce((sum, value) => sum + value, 0) / near.length : null;
    });
  }

  function transparent(hex, alpha) {
    return `rgba(${[1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)).join(",")},${alpha})`;
  }

  function tracesOf(series, index, isNoisy, isHidden) {
    const hex = PALETTE[index % PALETTE.length];
    const name = asLabel(series.name);
    const shared = { x: series.x, legendgroup: name, connectgaps: false, visible: isHidden ? "legendonly" : true };
    const isSmoothed = isNoisy && series.x.length >= SMOOTH_FROM;
    const dash = index < PALETTE.length ? "solid" : "dot";
    const quiet = { ...shared, mode: "lines", showlegend: false, hoverinfo: "skip" };
    const traces = [];
    if (series.low) {
      traces.push({ ...quiet, y: series.high, line: { width: 0 } });
      traces.push({ ...quiet, y: series.low, line: { width: 0 }, fill: "tonexty", fillcolor: transparent(hex, 0.15) });
    }
    traces.push({
      ...shared, y: series.y, name, showlegend: !isSmoothed, mode: series.x.length > SMOOTH_FROM ? "lines" : "lines+markers",
      marker: { size: 4 }, line: { color: isSmoothed ? transparent(hex, 0.32) : hex, width: isSmoothed ? 1 : 1.8, dash },
      hovertemplate: `%{y:.4g}<extra>${name}</extra>`,
    });
    if (isSmoothed) {
      const reach = Math.max(1, Math.round(series.x.length / 80));
      traces.push({ ...quiet, y: movingMean(series.y, reach), name, showlegend: true, line: { color: hex, width: 2, dash } });
    }
    return traces;
  }

  function markTrace() {
    return {
      x: report.marks.map((mark) => mark.step), y: report.marks.map(() => 1), yaxis: "y2", mode: "markers",
      marker: { symbol: "triangle-down", size: 9, color: report.marks.map((mark) => MARKS[mark.kind] || MARKS.plain) },
      text: report.marks.map((mark) => asLabel(mark.text)), hovertemplate: "%{text}<extra></extra>",
      showlegend: false, cliponaxis: false,
    };
  }

  function shapesOfMarks() {
    const line = (step, stroke, dash) => ({
      type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1, layer: "below",
      line: { color: stroke, width: 1, dash },
    });
    const shapes = report.marks.map((mark) => line(mark.step, MARKS[mark.kind] || MARKS.plain, "dot"));
    const warmup = report.warmup;
    if (warmup) {
      shapes.push({
        type: "rect", x0: warmup.from, x1: warmup.to ?? warmup.last, yref: "paper", y0: 0, y1: 1, layer: "below",
        fillcolor: colour("--shade"), line: { width: 0 },
      });
      if (warmup.to !== null) shapes.push(line(warmup.to, "#b7791f", "solid"));
    }
    const bandsOf = bands.map((band, at) => ({
      type: "rect", x0: band.from, x1: band.to, yref: "paper", y0: 0, y1: 1, layer: "below", line: { width: 0 },
      fillcolor: at % 2 ? "rgba(0,0,0,0)" : colour("--band"),
    }));
    return [...bandsOf, ...shapes];
  }

  function bandLabels() {
    return bands.map((band) => ({
      x: (band.from + band.to) / 2, yref: "paper", y: 1, yanchor: "top", text: band.text, showarrow: false,
      font: { size: 11, color: colour("--soft") },
    }));
  }

  function warmupLabel() {
    const warmup = report.warmup;
    if (!warmup) return [];
    const isLate = warmup.to === null || warmup.to > report.last_step / 2;
    const end = warmup.to === null ? "warm-up, not over yet" : `β > 0 from step ${warmup.to.toLocaleString("en")}`;
    const text = isLate ? `warm-up: ${end} ` : ` ← warm-up; ${end}`;
    return [{
      x: warmup.to ?? warmup.last, xanchor: isLate ? "right" : "left", yref: "paper", y: 0.02, yanchor: "bottom", text,
      showarrow: false, font: { size: 11, color: "#b7791f" },
    }];
  }

  // On a short log axis 1, 2, 5, 10, …; of itself Plotly would crowd it.
  function ticksOf(chart) {
    const values = chart.series.flatMap((series) => series.y).filter((value) => value > 0);
    const [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, 0]);
    return high < 200 * low ? { dtick: "D2" } : {};
  }

  function axisOf() {
    return { gridcolor: colour("--grid"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
  }

  function frame() {
    return {
      margin: { l: 52, r: 14, t: 8, b: 36 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: colour("--text") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") },
    };
  }

  function layoutOf(chart) {
    const padding = Math.max(1, report.last_step * 0.01);
    return {
      ...frame(), hovermode: "x unified", legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
      xaxis: { ...axisOf(), title: { text: "step", standoff: 4 }, range: [-padding, report.last_step + padding], hoverformat: ",d" },
      yaxis: {
        ...axisOf(), exponentformat: "SI", ...(chart.log ? { type: "log", nticks: 7, tickformat: "~g", ...ticksOf(chart) } : {}),
        ...(chart.from_zero ? { rangemode: "tozero" } : {}), ...(chart.range ? { range: chart.range } : {}),
      },
      yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
      shapes: shapesOfMarks(), annotations: chart.title === "Trust τ" ? warmupLabel() : bandLabels(),
    };
  }

  const CONFIG = { responsive: true, displaylogo: false, doubleClick: "reset", showTips: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], showSendToCloud: false, plotlyServerURL: "" };
  const drawn = new Map(); // place -> what it shows

  async function draw(place, chart, hidden = []) {
    const traces = chart.series.flatMap((series, index) => tracesOf(series, index, chart.is_noisy, hidden.includes(series.name)));
    if (report.marks.length) traces.push(markTrace());
    await Plotly.react(place, traces, layoutOf(chart), CONFIG);
    if (!drawn.has(place)) place.on("plotly_relayout", (change) => follow(place, change));
    drawn.set(place, [chart, hidden]);
  }

  let isFollowing = false;
  async function follow(source, change) {
    if (isFollowing || !Object.keys(change).some((key) => key.startsWith("xaxis."))) return;
    isFollowing = true;
    const range = source.layout.xaxis.range;
    const others = [...drawn.keys()].filter((place) => place !== source);
    await Promise.all(others.map((place) => Plotly.relayout(place, { "xaxis.range": range.slice() })));
    isFollowing = false;
  }

  // A chart's place, under its heading and above its note.
  function framed(grid, chart) {
    const place = element("div", { className: "chart" });
    const heading = element("h4", {}, chart.title, " ", element("small", { textContent: chart.unit }));
    grid.append(element("figure", {}, heading, place, element("figcaption", { textContent: chart.note })));
    return place;
  }

  async function drawChapters() {
    const places = []; // all of them stand before the first is drawn: each then has its final size
    for (const chapter of report.chapters) {
      const grid = element("div", { className: "grid" });
      document.getElementById("charts").append(element("h3", { textContent: chapter.title }), grid);
      places.push(...chapter.charts.map((chart) => [framed(grid, chart), chart]));
    }
    for (const [place, chart] of places) await draw(place, chart);
  }

  // --- histograms ---------------------------------------------------------------------------------------------------
  const histograms = report.histograms ?? []; // of UDASA's pairs
  const histogramsDrawn = new Map(); // place -> what it shows

  function histogramLayout(histogram) {
    const line = (x) => ({
      type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: MARKS.plain, width: 1.5, dash: "dash" },
    });
    const label = (x, at) => ({
      x, xanchor: "left", yref: "paper", y: 1, yanchor: "bottom", showarrow: false,
      text: `τ${at + 1} = ${Number(x.toPrecision(3))}`, font: { size: 11, color: MARKS.plain },
    });
    return {
      ...frame(), margin: { l: 52, r: 14, t: 24, b: 36 }, bargap: 0.04, showlegend: false,
      xaxis: { ...axisOf(), title: { text: histogram.unit, standoff: 4 } },
      yaxis: { ...axisOf(), title: { text: "pairs", standoff: 4 }, rangemode: "tozero" },
      shapes: histogram.thresholds.map(line), annotations: histogram.thresholds.map(label),
    };
  }

  async function drawHistogram(place, histogram, index) {
    const { edges, counts } = histogram;
    const bars = {
      type: "bar", x: counts.map((_, at) => (edges[at] + edges[at + 1]) / 2), y: counts,
      width: counts.map((_, at) => edges[at + 1] - edges[at]), marker: { color: transparent(PALETTE[index], 0.75) },
      text: counts.map((count, at) => `${edges[at].toPrecision(3)} to ${edges[at + 1].toPrecision(3)}: ${count} pairs`),
      textposition: "none", hovertemplate: "%{text}<extra></extra>",
    };
    await Plotly.react(place, [bars], histogramLayout(histogram), CONFIG);
    histogramsDrawn.set(place, [histogram, index]);
  }

  async function drawHistograms() {
    if (!histograms.length) return;
    const grid = document.getElementById("histograms");
    const places = histograms.map((histogram) => framed(grid, histogram));
    for (const [index, place] of places.entries()) await drawHistogram(place, histograms[index], index);
  }

  // --- where the time goes ------------------------------------------------------------------------------------------
  async function drawStepTime() {
    const times = report.step_time; // of runs that have measured it
    if (!times) return;
    const bars = times.series.map((series, index) => ({
      type: "bar", name: series.name, x: times.x, y: series.y, width: times.x.map(() => times.per_bar),
      marker: { color: PALETTE[index % PALETTE.length], line: { width: 0 } },
      hovertemplate: `%{y:.3g} s<extra>${series.name}</extra>`,
    }));
    await Plotly.react(document.getElementById("step-time-chart"), bars, {
      ...frame(), barmode: "stack", bargap: 0, hovermode: "x unified",
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
      xaxis: { ...axisOf(), title: { text: "step", standoff: 4 }, hoverformat: ",d" },
      yaxis: { ...axisOf(), title: { text: "seconds per step", standoff: 4 }, exponentformat: "SI", rangemode: "tozero" },
    }, CONFIG);
  }

  // --- samples ------------------------------------------------------------------------------------------------------
  const samples = report.samples ?? { terms: [], groups: [], trends: [] }; // of ASA
  const rows = samples.groups.flatMap((group, place) => group.responses.map((response, sibling) => ({
    place, sibling, step: group.step, prompt: response.prompt ?? group.prompt, text: response.text,
    finished: response.finished, version: response.version, tau: group.tau, values: response.values,
  })));
  const COLUMNS = [
    { name: "step", of: (row) => row.step, isNumber: true },
    { name: "prompt", of: (row) => row.prompt, kind: "text prompt" },
    { name: "response", of: (row) => row.text, kind: "text" },
    { name: "ended", of: (row) => (row.finished ? "yes" : "cut off") },
    ...samples.terms.map((term, index) => ({ name: term, of: (row) => row.values[index], isNumber: true, isTerm: true })),
    { name: "version", of: (row) => row.version, isNumber: true },
    { name: "τ", of: (row) => row.tau, isNumber: true },
  ];
  const order = { column: null, isDown: true };

  function bounds(column) {
    const values = rows.map(column.of).filter((value) => value !== null);
    return [values.reduce((a, b) => Math.min(a, b), Infinity), values.reduce((a, b) => Math.max(a, b), -Infinity)];
  }

  function shownRows() {
    const step = document.getElementById("samples-step").value;
    const text = document.getElementById("samples-text").value.toLowerCase();
    const found = rows.filter((row) => (step === "all" || row.step === Number(step))
      && `${row.prompt}\n${row.text}`.toLowerCase().includes(text));
    if (!order.column) return found;
    const key = order.column.of, sign = order.isDown ? -1 : 1;
    return found.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what is missing stands last
      return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
    });
  }

  function cell(column, row) {
    const value = column.of(row);
    if (!column.isNumber) {
      const made = element("td", { className: column.kind ?? "" });
      made.append(value === "" ? element("span", { className: "missing", textContent: "(empty)" }) : value);
      return made;
    }
    const text = value === null || value === undefined ? "–" : column.isTerm || column.name === "τ"
      ? (Math.round(value * 1000) / 1000 || 0).toFixed(3) : value.toLocaleString("en"); // "|| 0": no -0.000
    const made = element("td", { className: "number", textContent: text });
    if (column.isTerm && value !== null) {
      const [low, high] = column.bounds;
      const share = high > low ? (value - low) / (high - low) : 0;
      made.style.background = `rgba(${colour("--heat")}, ${(0.45 * share).toFixed(3)})`;
    }
    return made;
  }

  function fillTable() {
    const found = shownRows();
    const body = document.querySelector("#samples-table tbody");
    body.replaceChildren(...found.slice(0, MAX_ROWS).map((row, at) => {
      const line = element("tr", {}, ...COLUMNS.map((column) => cell(column, row)));
      if (at && !order.column && found[at - 1].place !== row.place) line.className = "next-group";
      return line;
    }));
    document.getElementById("samples-count").textContent = found.length > MAX_ROWS
      ? `first ${MAX_ROWS} of ${found.length.toLocaleString("en")} responses` : `${found.length} responses`;
    document.querySelectorAll("#samples-table th").forEach((head, index) => {
      const isIt = COLUMNS[index] === order.column;
      head.setAttribute("aria-sort", isIt ? (order.isDown ? "descending" : "ascending") : "none");
    });
  }

  function sortBy(column) {
    if (order.column !== column) Object.assign(order, { column, isDown: Boolean(column.isNumber) });
    else if (order.isDown === Boolean(column.isNumber)) order.isDown = !order.isDown;
    else order.column = null; // the third click: as sampled
    fillTable();
  }

  function setUpSamples() {
    if (!rows.length) return;
    document.getElementById("samples-view").hidden = false;
    const steps = [...new Set(rows.map((row) => row.step))];
    document.getElementById("samples-note").textContent =
      `${samples.num_groups.toLocaleString("en")} groups were sampled; `
      + (samples.groups.length < samples.num_groups ? `${samples.groups.length} of them, spread evenly, are` : "all are")
      + " here. Click a column to sort; darker cells are larger within their column.";
    const choice = document.getElementById("samples-step");
    choice.append(element("option", { value: "all", textContent: "all" }),
      ...steps.map((step) => element("option", { value: step, textContent: step.toLocaleString("en") })));
    choice.value = steps[steps.length - 1];
    COLUMNS.filter((column) => column.isTerm).forEach((column) => { column.bounds = bounds(column); });
    document.querySelector("#samples-table thead").append(element("tr", {}, ...COLUMNS.map((column) => {
      const button = element("button", { type: "button", textContent: column.name });
      button.addEventListener("click", () => sortBy(column));
      return element("th", { scope: "col", className: column.isNumber ? "number" : "" }, button);
    })));
    choice.addEventListener("change", fillTable);
    document.getElementById("samples-text").addEventListener("input", fillTable);
    fillTable();
  }

  const MAIN_TERMS = ["self", "intrinsic", "logic", "fact", "behav", "self_consistency", "coherence", "quality"];
  async function setUpTrends() {
    if (!rows.length) return;
    const choice = document.getElementById("trends-prompt");
    const place = document.getElementById("trends-chart");
    samples.trends.forEach((trend, index) => {
      const name = trend.prompt.length > 80 ? `${trend.prompt.slice(0, 80)}…` : trend.prompt;
      choice.append(element("option", { value: index, textContent: `${name} (${trend.times} groups)` }));
    });
    const show = () => {
      const series = samples.trends[choice.value].series;
      const main = series.filter((one) => MAIN_TERMS.includes(one.name));
      const others = series.filter((one) => !main.includes(one));
      return draw(place, { series: [...main, ...others] }, main.length ? others.map((one) => one.name) : []);
    };
    choice.value = samples.trends.length > 1 ? 1 : 0; // the same prompt over time, if one recurs
    choice.addEventListener("change", show);
    await show();
  }

  async function main() {
    setUpSamples();
    await drawStepTime();
    await drawChapters();
    await drawHistograms();
    await setUpTrends();
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      if (rows.length) fillTable();
      drawStepTime();
      drawn.forEach(([chart, hidden], place) => draw(place, chart, hidden));
      histogramsDrawn.forEach(([histogram, index], place) => drawHistogram(place, histogram, index));
    });
    document.body.dataset.drawn = drawn.size + histogramsDrawn.size;
  }
  main();
})();
