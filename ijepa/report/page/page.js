"use strict";
// Curves of several runs: drag across one to look closer, double-click to see all again. All charts
// share the range of steps. What comes from runs is set as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const WIDTH = 400, HEIGHT = 190, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 22;
  const SMOOTHING = 40; // windows over the visible range
  const hidden = new Set();
  const charts = [];
  let whole = [Infinity, -Infinity];
  for (const chart of data.charts)
    for (const line of chart.lines) {
      whole[0] = Math.min(whole[0], line.x[0]);
      whole[1] = Math.max(whole[1], line.x[line.x.length - 1]);
    }
  if (!(whole[0] < whole[1])) whole = [whole[0] - 1 || 0, whole[0] + 1 || 1];
  let range = whole.slice();

  function make(name, attributes, parent) {
    const node = document.createElementNS(SVG, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    parent.appendChild(node);
    return node;
  }

  function spoken(value) {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e5 || size < 1e-3) return value.toExponential(1);
    return String(+value.toPrecision(size >= 1000 ? 5 : 3));
  }

  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const power = Math.pow(10, Math.floor(Math.log10(rough)));
    const step = [1, 2, 5, 10].map((s) => s * power).find((s) => s >= rough);
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step)
      found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
    return found;
  }

  function visible(line) {
    let first = line.x.findIndex((x) => x >= range[0]);
    if (first < 0) first = line.x.length - 1;
    let last = line.x.length - 1;
    while (last > 0 && line.x[last] > range[1]) last--;
    return [Math.max(first - 1, 0), Math.min(last + 1, line.x.length - 1)];
  }

  function smooth(values, first, last) {
    const window = Math.max(Math.floor((last - first) / SMOOTHING), 1);
    const result = [];
    let sum = 0, count = 0;
    for (let at = first; at <= last; at++) {
      sum += values[at]; count++;
      if (count > window) { sum -= values[at - window]; count--; }
      result.push(sum / count);
    }
    return result;
  }

  function bounds(chart) {
    const seen = [];
    for (const line of chart.spec.lines) {
      if (hidden.has(line.run)) continue;
      const [first, last] = visible(line);
      // The first steps would flatten everything after them.
      const skip = line.many && range[0] === whole[0] ? Math.floor((last - first) / 20) : 0;
      for (let at = first + skip; at <= last; at++) seen.push(line.y[at]);
    }
    if (!seen.length) return [0, 1];
    seen.sort((a, b) => a - b);
    const zoomed = range[0] !== whole[0] || range[1] !== whole[1];
    let low = seen[Math.floor(seen.length * 0.002)];
    let high = seen[Math.ceil((seen.length - 1) * 0.998)];
    for (const mark of [chart.spec.low, chart.spec.high, chart.spec.collapsed])
      if (mark !== null && !zoomed) { low = Math.min(low, mark); high = Math.max(high, mark); }
    if (!zoomed && low > 0) low = 0;
    if (high <= low) high = low + (Math.abs(low) || 1);
    const room = (high - low) * 0.06;
    return [low === 0 ? 0 : low - room, high + room];
  }

  function draw(chart) {
    const svg = chart.svg;
    svg.replaceChildren();
    const [low, high] = bounds(chart);
    const x = (step) => LEFT + ((step - range[0]) / (range[1] - range[0])) * (WIDTH - LEFT - RIGHT);
    const y = (v) => HEIGHT - BOTTOM - ((v - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    chart.x = x;
    const spec = chart.spec;
    if (spec.low !== null || spec.high !== null) {
      const top = spec.high === null ? TOP : Math.max(y(spec.high), TOP);
      const bottom = spec.low === null ? HEIGHT - BOTTOM : Math.min(y(spec.low), HEIGHT - BOTTOM);
      const size = { x: LEFT, width: WIDTH - LEFT - RIGHT, y: top, height: Math.max(bottom - top, 0) };
      make("rect", { ...size, class: "band" }, svg);
    }
    for (const value of ticks(low, high, 4)) {
      make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: "grid" }, svg);
      const words = { x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" };
      make("text", words, svg).textContent = spoken(value);
    }
    for (const value of ticks(range[0], range[1], 4))
      make("text", { x: x(value), y: HEIGHT - 6, "text-anchor": "middle" }, svg).textContent =
        spoken(value);
    const inside = make("svg", { x: LEFT, y: TOP - 3, width: WIDTH - LEFT - RIGHT,
      height: HEIGHT - TOP - BOTTOM + 6,
      viewBox: `${LEFT} ${TOP - 3} ${WIDTH - LEFT - RIGHT} ${HEIGHT - TOP - BOTTOM + 6}` }, svg);
    for (const [mark, kind] of [[spec.low, "limit"], [spec.high, "limit"],
                                [spec.collapsed, "collapsed"]])
      if (mark !== null)
        make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(mark), y2: y(mark), class: kind }, inside);
    for (const line of spec.lines) {
      if (hidden.has(line.run)) continue;
      const [first, last] = visible(line);
      const path = (values) => values
        .map((v, at) => `${at ? "L" : "M"}${x(line.x[first + at]).toFixed(1)} ${y(v).toFixed(1)}`)
        .join("");
      const colour = `stroke:var(--c${line.run % 8})`;
      const values = line.y.slice(first, last + 1);
      if (line.many) make("path", { d: path(values), class: "raw", style: colour }, inside);
      const shown = line.many ? smooth(line.y, first, last) : values;
      make("path", { d: path(shown), class: "curve", style: colour }, inside);
      if (!line.many)
        values.forEach((v, at) => make("circle", { cx: x(line.x[first + at]), cy: y(v), r: 2.6,
          style: `fill:var(--c${line.run % 8})` }, inside));
    }
    chart.cursor = make("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor",
      visibility: "hidden" }, svg);
    chart.choice = make("rect", { y: TOP, height: HEIGHT - TOP - BOTTOM, class: "choice",
      visibility: "hidden" }, svg);
  }

  function drawAll() {
    charts.forEach(draw);
    point(null);
    const words = range[0] === whole[0] && range[1] === whole[1] ? "all steps"
      : `steps ${spoken(Math.round(range[0]))} to ${spoken(Math.round(range[1]))}`;
    document.getElementById("range").textContent = words;
  }

  function nearest(line, step) {
    let low = 0, high = line.x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (line.x[middle] < step) low = middle; else high = middle;
    }
    return Math.abs(line.x[low] - step) <= Math.abs(line.x[high] - step) ? low : high;
  }

  function point(step) {
    for (const chart of charts) {
      chart.readout.replaceChildren();
      chart.cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
      if (step !== null)
        for (const side of ["x1", "x2"]) chart.cursor.setAttribute(side, chart.x(step));
      for (const line of chart.spec.lines) {
        if (hidden.has(line.run)) continue;
        const at = step === null ? line.x.length - 1 : nearest(line, step);
        const dot = document.createElement("span");
        dot.className = "dot";
        dot.style.background = `var(--c${line.run % 8})`;
        const words = document.createElement("span");
        words.textContent = `${spoken(line.y[at])} at ${spoken(line.x[at])} `;
        chart.readout.append(dot, words);
      }
    }
  }

  function look(first, last) {
    const least = (whole[1] - whole[0]) / 1e4;
    first = Math.max(Math.min(first, whole[1] - least), whole[0]);
    last = Math.min(Math.max(last, first + least), whole[1]);
    range = [first, last];
    drawAll();
  }

  function listen(chart) {
    let from = null;
    const stepAt = (event) => {
      const box = chart.svg.getBoundingClientRect();
      // The drawing keeps its proportions inside the element.
      const scale = Math.min(box.width / WIDTH, box.height / HEIGHT);
      const at = (event.clientX - box.left - (box.width - WIDTH * scale) / 2) / scale;
      const share = (at - LEFT) / (WIDTH - LEFT - RIGHT);
      return range[0] + Math.max(0, Math.min(1, share)) * (range[1] - range[0]);
    };
    chart.svg.addEventListener("pointerdown", (event) => {
      from = stepAt(event);
      chart.svg.setPointerCapture(event.pointerId);
    });
    chart.svg.addEventListener("pointermove", (event) => {
      const step = stepAt(event);
      point(step);
      if (from === null) return;
      const ends = [chart.x(from), chart.x(step)].sort((a, b) => a - b);
      chart.choice.setAttribute("x", ends[0]);
      chart.choice.setAttribute("width", ends[1] - ends[0]);
      chart.choice.setAttribute("visibility", "visible");
    });
    chart.svg.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const ends = [from, stepAt(event)].sort((a, b) => a - b);
      from = null;
      if (ends[1] - ends[0] > (range[1] - range[0]) / 50) look(ends[0], ends[1]);
      else chart.choice.setAttribute("visibility", "hidden");
    });
    chart.svg.addEventListener("pointercancel", () => {
      from = null;
      chart.choice.setAttribute("visibility", "hidden");
    });
    chart.svg.addEventListener("pointerleave", () => { if (from === null) point(null); });
    chart.svg.addEventListener("dblclick", () => look(whole[0], whole[1]));
  }

  data.charts.forEach((spec, number) => {
    const card = document.getElementById(`chart-${number}`);
    const chart = { spec, readout: card.querySelector(".readout") };
    chart.svg = card.querySelector("svg");
    charts.push(chart);
    listen(chart);
  });
  document.querySelectorAll("[data-run]").forEach((box) =>
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(+box.dataset.run); else hidden.add(+box.dataset.run);
      drawAll();
    }));
  document.querySelectorAll("[data-zoom]").forEach((button) =>
    button.addEventListener("click", () => {
      const middle = (range[0] + range[1]) / 2, half = (range[1] - range[0]) / 2;
      const moves = {
        in: () => look(middle - half / 2, middle + half / 2),
        out: () => look(middle - 2 * half, middle + 2 * half),
        left: () => look(Math.max(range[0] - half, whole[0]),
                         Math.max(range[0] - half, whole[0]) + 2 * half),
        right: () => look(Math.min(range[1] + half, whole[1]) - 2 * half,
                          Math.min(range[1] + half, whole[1])),
        all: () => look(whole[0], whole[1]),
      };
      moves[button.dataset.zoom]();
    }));
  if (charts.length) drawAll();
})();
