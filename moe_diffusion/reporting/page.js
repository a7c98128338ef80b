"use strict";
// Draws the curves, and moves the pictures and maps to where the sliders stand.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const several = data.runs.length > 1;
  const DASHES = ["", "6 3", "2 3", "9 3 2 3", "1 2"];
  const tip = document.getElementById("tip");

  function make(name, attributes, parent, text) {
    const svg = ["svg", "path", "line", "text", "rect", "g", "circle"].includes(name);
    const made = svg
      ? document.createElementNS("http://www.w3.org/2000/svg", name)
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }

  function shown(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e7 || size < 1e-4) return Number(value.toPrecision(4)).toExponential().replace("e+", "e");
    return Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 6 });
  }

  // --- curves -----------------------------------------------------------------------------------

  // Round places between two values, about `count` of them.
  function ticks(low, high, count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough) || rough;
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n++) found.push(n * step + 0);
    return found;
  }

  function logTicks(low, high) {
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) {
      for (const m of [1, 2, 5]) {
        const value = m * 10 ** p;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    }
    if (high / low < 10) return ticks(low, high, 5);
    return found.length > 7 ? found.filter(v => /^1/.test(v.toExponential())) : found;
  }

  function drawChart(figure, chart) {
    const large = figure.classList.contains("large");
    const height = large ? 300 : 230, left = 66, right = 26, top = 10, bottom = 38;
    let width = 0;
    const positive = chart.series.every(s => s.y.every(y => y > 0));
    const caption = figure.querySelector("figcaption");
    let log = chart.log && positive;
    if (positive) {
      const label = make("label", {}, caption);
      const box = make("input", { type: "checkbox" }, label);
      box.checked = log;
      label.append(" logarithmic");
      box.addEventListener("change", () => { log = box.checked; draw(); });
    }
    const colour = s => `var(--c${(several ? s.run : s.kind) % 8})`;
    const dash = s => several ? DASHES[s.kind % DASHES.length] : "";
    if (chart.kinds.length > 1) {
      const names = make("div", { class: "names" }, figure);
      chart.kinds.forEach((kind, n) => {
        const item = make("span", {}, names);
        const key = make("svg", { viewBox: "0 0 24 8", "aria-hidden": "true" }, item);
        const stroke = several ? "var(--soft)" : `var(--c${n % 8})`;
        make("path", { d: "M0 4H24", style: `stroke:${stroke};stroke-width:2.5`,
          "stroke-dasharray": several ? DASHES[n % DASHES.length] : "" }, key);
        item.append(kind);
      });
    }
    const said = chart.series.map(s => {
      const who = [several ? data.runs[s.run] : "", chart.kinds.length > 1 ? s.name : ""];
      const end = s.x.length - 1;
      return `${who.filter(Boolean).join(" ") || s.name}: ${shown(s.y[0])} at step ${s.x[0]}, ` +
        `${shown(s.y[end])} at step ${s.x[end]}`;
    });
    const svg = make("svg", { class: "plot", tabindex: 0,
      role: "img", "aria-label": `${chart.title} over steps. ${said.join("; ")}` }, figure);
    if (chart.mean > 1) {
      make("p", { class: "hint" }, figure, `Each point is the mean of up to ${chart.mean} logged values.`);
    }
    const steps = [...new Set(chart.series.flatMap(s => s.x))].sort((a, b) => a - b);
    let low = Infinity, high = -Infinity;
    for (const s of chart.series) for (const y of s.y) { low = Math.min(low, y); high = Math.max(high, y); }
    const first = Math.min(0, steps[0]), last = Math.max(steps[steps.length - 1], 1);
    const placeX = x => left + (x - first) / (last - first) * (width - left - right);
    let placeY = null, cursor = null, at = -1;

    function draw() {
      svg.replaceChildren();
      // As wide as on the screen, so that letters have the same size in all charts.
      width = Math.max(260, figure.clientWidth - 24);
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      let a = low, b = high;
      if (log) {
        if (b / a < 1.05) { a *= 0.95; b *= 1.05; } else { a /= (b / a) ** 0.04; b *= (b / a) ** 0.04; }
      } else {
        const room = (b - a) * 0.06 || Math.abs(b) * 0.05 || 1;
        a = a >= 0 && a - room < 0 ? 0 : a - room;
        b += room;
      }
      const scale = log ? Math.log : (v => v);
      placeY = y => height - bottom - (scale(y) - scale(a)) / (scale(b) - scale(a)) * (height - top - bottom);
      for (const y of log ? logTicks(a, b) : ticks(a, b, 5)) {
        if (placeY(y) > height - bottom + 1 || placeY(y) < top - 1) continue;
        make("line", { class: "axis", x1: left, x2: width - right, y1: placeY(y), y2: placeY(y) }, svg);
        make("text", { x: left - 6, y: placeY(y) + 4, "text-anchor": "end" }, svg, shown(y));
      }
      for (const x of ticks(first, last, width / 110)) {
        if (x !== Math.round(x)) continue;
        make("text", { x: placeX(x), y: height - bottom + 16, "text-anchor": "middle" }, svg,
          x.toLocaleString("en"));
      }
      make("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, svg, "step");
      make("text", { transform: `translate(12 ${(top + height - bottom) / 2}) rotate(-90)`,
        "text-anchor": "middle" }, svg, chart.unit);
      for (const s of chart.series) {
        const line = s.x.map((x, n) => `${n ? "L" : "M"}${placeX(x).toFixed(1)} ${placeY(s.y[n]).toFixed(1)}`);
        make("path", { d: line.join(""), style: `stroke:${colour(s)}`, "stroke-dasharray": dash(s) }, svg);
        if (s.x.length < 25) {
          s.x.forEach((x, n) => make("circle", { cx: placeX(x), cy: placeY(s.y[n]), r: 2.6,
            style: `fill:${colour(s)}` }, svg));
        }
      }
      cursor = make("line", { class: "cursor", y1: top, y2: height - bottom, x1: 0, x2: 0,
        visibility: "hidden" }, svg);
    }

    // Values at a step, or at the nearest one before it.
    function tell(place) {
      at = Math.max(0, Math.min(steps.length - 1, place));
      const x = steps[at];
      cursor.setAttribute("x1", placeX(x));
      cursor.setAttribute("x2", placeX(x));
      cursor.setAttribute("visibility", "visible");
      const lines = [`step ${x.toLocaleString("en")}`];
      for (const s of chart.series) {
        let n = s.x.length - 1;
        while (n >= 0 && s.x[n] > x) n--;
        if (n < 0) continue;
        const who = [several ? data.runs[s.run] : "", chart.kinds.length > 1 || !several ? s.name : ""];
        lines.push(`${who.filter(Boolean).join(", ")}: ${shown(s.y[n])}`);
      }
      const box = svg.getBoundingClientRect();
      const x0 = box.left + placeX(x) / width * box.width;
      tip.textContent = lines.join("\n");
      tip.hidden = false;
      const over = x0 + tip.offsetWidth + 20 > document.documentElement.clientWidth;
      tip.style.left = `${over ? Math.max(4, x0 - tip.offsetWidth - 10) : x0 + 10}px`;
      tip.style.top = `${Math.max(4, box.top + 8)}px`;
    }
    function hide() {
      tip.hidden = true;
      cursor.setAttribute("visibility", "hidden");
    }
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect();
      const x = first + ((event.clientX - box.left) / box.width * width - left) / (width - left - right) * (last - first);
      let best = 0;
      steps.forEach((s, n) => { if (Math.abs(s - x) < Math.abs(steps[best] - x)) best = n; });
      tell(best);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", event => {
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      tell(to);
    });
    draw();
    return draw;
  }

  const drawn = [...document.querySelectorAll("[data-chart]")].map(figure =>
    drawChart(figure, data.charts[Number(figure.dataset.chart)]));
  window.addEventListener("resize", () => drawn.forEach(draw => draw()));

  // --- sliders ----------------------------------------------------------------------------------

  // Calls `show(place)`, which returns what the place is, now and whenever the slider moves.
  function follow(slider, show) {
    const output = document.querySelector(`output[for="${slider.id}"]`);
    const update = () => {
      const text = show(Number(slider.value));
      output.textContent = text;
      slider.setAttribute("aria-valuetext", text);
    };
    slider.addEventListener("input", update);
    update();
  }

  for (const button of document.querySelectorAll("[data-play]")) {
    const slider = document.getElementById(button.dataset.play);
    let timer = null;
    const stop = () => { clearInterval(timer); timer = null; button.textContent = "▶"; };
    const step = () => {
      slider.value = slider.value === slider.max ? 0 : Number(slider.value) + 1;
      slider.dispatchEvent(new Event("input"));
      if (slider.value === slider.max) stop();
    };
    button.addEventListener("click", () => {
      if (timer) return stop();
      button.textContent = "■";
      timer = setInterval(step, 500);
      step();
    });
  }

  // --- samples ----------------------------------------------------------------------------------

  const byStep = document.getElementById("samples-step");
  if (byStep) {
    const steps = [...new Set(data.grids.flatMap(g => g.steps))].sort((a, b) => a - b);
    follow(byStep, place => {
      for (const figure of document.querySelectorAll("[data-grid]")) {
        const number = Number(figure.dataset.grid), grid = data.grids[number];
        const img = figure.querySelector("img"), caption = figure.querySelector("figcaption");
        let n = grid.steps.length - 1;
        while (n > 0 && grid.steps[n] > steps[place]) n--;
        const text = `${data.runs[number]}, step ${grid.steps[n].toLocaleString("en")}`;
        if (img.src !== grid.pictures[n]) img.src = grid.pictures[n];
        img.alt = `Sample grid of ${text}`;
        caption.textContent = text;
      }
      return `${steps[place].toLocaleString("en")} (${place + 1} of ${steps.length})`;
    });
  }

  // --- expert maps ------------------------------------------------------------------------------

  const TEN = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f",
    "#bcbd22", "#17becf"];

  function experts(count) {
    if (count <= 10) return TEN;
    // The golden angle keeps neighbours apart, three lightnesses more so.
    return Array.from({ length: count }, (_, n) => `hsl(${(n * 137.508) % 360} 65% ${[42, 58, 72][n % 3]}%)`);
  }

  function ramp(count) {
    return Array.from({ length: count + 1 }, (_, n) => `hsl(${250 - 200 * n / Math.max(1, count)} 70% ${25 + 45 * n / Math.max(1, count)}%)`);
  }

  for (const place of document.querySelectorAll("[data-maps]")) {
    const number = Number(place.dataset.maps), maps = data.maps[number];
    const decode = text => text && Uint8Array.from(atob(text), c => c.charCodeAt(0));
    const values = { strongest: decode(maps.strongest), used: decode(maps.used) };
    const layers = maps.layers.length, times = maps.times.length, size = maps.rows * maps.columns;
    const palette = experts(maps.experts), amounts = ramp(maps.most_used);
    let layer = layers - 1, time = times - 1, kind = "strongest";
    const canvases = maps.pictures.map((uri, image) => {
      const figure = make("figure", {}, place.querySelector(".maps"));
      make("img", { src: uri, alt: `Drawn image of ${maps.captions[image]}` }, figure);
      const canvas = make("canvas", { width: maps.columns, height: maps.rows, role: "img" }, figure);
      make("figcaption", {}, figure, maps.captions[image]);
      canvas.addEventListener("pointermove", event => {
        const box = canvas.getBoundingClientRect();
        const column = Math.min(maps.columns - 1, Math.floor((event.clientX - box.left) / box.width * maps.columns));
        const row = Math.min(maps.rows - 1, Math.floor((event.clientY - box.top) / box.height * maps.rows));
        const value = values[kind][start(image) + row * maps.columns + column];
        const name = kind === "used" ? `${value} experts` : value ? `expert ${value - 1}` : "no expert";
        tip.textContent = `row ${row + 1}, column ${column + 1}: ${name}`;
        tip.hidden = false;
        tip.style.left = `${event.clientX + 12}px`;
        tip.style.top = `${event.clientY + 12}px`;
      });
      canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
      return canvas;
    });
    const start = image => ((image * layers + layer) * times + time) * size;

    function draw() {
      canvases.forEach((canvas, image) => {
        const context = canvas.getContext("2d"), from = start(image);
        const seen = new Map();
        for (let n = 0; n < size; n++) {
          const value = values[kind][from + n];
          seen.set(value, (seen.get(value) || 0) + 1);
          context.fillStyle = kind === "used" ? amounts[value] : value ? palette[(value - 1) % palette.length] : "#fff";
          context.fillRect(n % maps.columns, Math.floor(n / maps.columns), 1, 1);
        }
        const most = [...seen].sort((a, b) => b[1] - a[1]).slice(0, 3).map(([value, count]) =>
          `${kind === "used" ? `${value} experts` : value ? `expert ${value - 1}` : "none"} ${Math.round(100 * count / size)}%`);
        canvas.setAttribute("aria-label", `Experts of the tokens of ${maps.captions[image]}: ${most.join(", ")}`);
      });
      drawLoads(maps.load[layer][time]);
    }

    // Bars of the experts' load at this layer and time, in the colours of the map.
    function drawLoads(load) {
      const holder = place.querySelector(".loads"), width = 720, height = 150, bottom = 22, top = 28;
      holder.replaceChildren();
      const most = Math.max(2, ...maps.load.flat(2)), each = (width - 40) / load.length;
      const busiest = load.indexOf(Math.max(...load)), dead = load.filter(v => v === 0).length;
      const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label":
        `Load of ${load.length} experts: expert ${busiest} has ${shown(load[busiest])} times the average, ${dead} have none` }, holder);
      make("text", { x: 0, y: 12, class: "soft" }, svg,
        `load of the experts in this layer at this time (1 = average); ${dead} without a token`);
      const y = value => height - bottom - value / most * (height - bottom - top);
      make("line", { class: "axis", x1: 36, x2: width - 4, y1: y(1), y2: y(1) }, svg);
      load.forEach((value, n) => {
        const bar = make("rect", { x: 36 + n * each + each * 0.1, width: each * 0.8, y: y(value),
          height: Math.max(0, height - bottom - y(value)), style: `fill:${palette[n % palette.length]}` }, svg);
        make("title", {}, bar, `expert ${n}: ${shown(value)}`);
        if (load.length <= 32) {
          make("text", { x: 36 + (n + 0.5) * each, y: height - 8, "text-anchor": "middle" }, svg, n);
          if (load.length <= 16) make("text", { x: 36 + (n + 0.5) * each, y: y(value) - 3, "text-anchor": "middle", class: "soft" }, svg, value.toFixed(2));
        }
      });
      make("text", { x: 28, y: y(1) + 4, "text-anchor": "end", class: "soft" }, svg, "1");
    }

    follow(document.getElementById(`layer-${number}`), n => {
      layer = n;
      draw();
      return `block ${maps.layers[n]} (${n + 1} of ${layers})`;
    });
    follow(document.getElementById(`time-${number}`), n => {
      time = n;
      draw();
      const ends = maps.backwards ? "999 = noise" : "0 = noise, 1 = image";
      return `${maps.times[n]} (${ends})`;
    });
    const choice = document.getElementById(`show-${number}`);
    if (choice) choice.addEventListener("change", () => { kind = choice.value; draw(); });
  }

  // --- config -----------------------------------------------------------------------------------

  const which = document.getElementById("config-rows"), find = document.getElementById("config-find");
  function filter() {
    const rows = [...document.querySelectorAll("#config tbody tr")];
    const text = find.value.trim().toLowerCase();
    let count = 0;
    for (const row of rows) {
      const wanted = text ? row.textContent.toLowerCase().includes(text)
        : which.value === "all" || row.classList.contains(which.value);
      row.hidden = !wanted;
      count += wanted;
    }
    document.getElementById("config-count").textContent = `${count} of ${rows.length} keys`;
  }
  which.addEventListener("change", filter);
  find.addEventListener("input", filter);
  filter();
  document.documentElement.dataset.ready = "yes";
})();
