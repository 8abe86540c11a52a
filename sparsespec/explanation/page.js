"use strict";
// Every stage of one image: reads the JSON in the page and fills the sections.
(() => {
  const {element, colour} = sparsespec;
  const data = JSON.parse(document.getElementById("explanation").textContent);
  const [rows, columns] = data.grid, tokens = rows * columns, [high, wide] = data.extent;
  const photograph = new Image();
  const waiting = []; // what is to be drawn again when the photograph is there

  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const signed = text => new Int8Array(bytes(text).buffer);
  const words = text => new Uint16Array(bytes(text).buffer);
  const signedWords = text => new Int16Array(bytes(text).buffer);
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const number = value => (value === 0 ? "0" : Math.abs(value) >= 0.0995 ? value.toFixed(2) : value.toPrecision(2));
  const view = stage => document.getElementById(`${stage}-view`);
  const layerValues = layer => {
    const [low, top] = layer.range;
    return Float64Array.from(bytes(layer.data), step => low + ((top - low) * step) / 255);
  };

  // Scales of colour, by a few stops.
  const SCALES = {
    heat: [[0, 0, 4], [59, 15, 112], [140, 41, 129], [222, 73, 104], [254, 159, 109], [252, 253, 191]],
    plain: [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]],
    both: [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]],
  };
  function tone(scale, share) {
    const stops = SCALES[scale], at = clamp(share, 0, 1) * (stops.length - 1), k = Math.min(Math.floor(at), stops.length - 2);
    return stops[k].map((from, c) => Math.round(from + (stops[k + 1][c] - from) * (at - k)));
  }

  // A canvas of the photograph in which token (row, column) is a square of `side` pixels.
  function canvasOf(most = 960) {
    const side = Math.max(2, Math.min(32, Math.round(most / Math.max(high, wide)))), canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(wide * side));
    canvas.height = Math.max(1, Math.round(high * side));
    return {canvas, context: canvas.getContext("2d"), side};
  }
  function paintPhotograph({canvas, context}, dim = 0) {
    context.globalAlpha = 1;
    context.fillStyle = "#15181c";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (photograph.naturalWidth) context.drawImage(photograph, 0, 0, canvas.width, canvas.height);
    if (dim) {
      context.fillStyle = `rgba(0,0,0,${dim})`;
      context.fillRect(0, 0, canvas.width, canvas.height);
    }
  }
  // Lays a map over it: `colourOf` gives red, green, blue and opacity of a token, or null.
  function paintTokens({canvas, context, side}, colourOf, smooth = false) {
    const small = document.createElement("canvas");
    small.width = columns;
    small.height = rows;
    const inner = small.getContext("2d"), pixels = inner.createImageData(columns, rows);
    for (let token = 0; token < tokens; token++) {
      const [r, g, b, a = 255] = colourOf(token) || [0, 0, 0, 0];
      pixels.data.set([r, g, b, a], 4 * token);
    }
    inner.putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = smooth;
    context.drawImage(small, 0, 0, columns * side, rows * side);
    context.imageSmoothingEnabled = true;
  }
  const whenThere = draw => { waiting.push(draw); draw(); };

  function choices(title, names, changed) {
    const name = `choice-${title.toLowerCase().replace(/[^a-z]+/g, "-")}`;
    const inputs = names.map((_, k) => element("input", {type: "radio", name, checked: k === 0, on: {change: () => changed(k)}}));
    return element("fieldset", {}, element("legend", {}, title),
      element("div", {class: "choices"}, ...names.map((text, k) => element("label", {}, inputs[k], text))));
  }
  function slider(title, low, top, step, value, changed) {
    const output = element("output", {}, number(value));
    const input = element("input", {type: "range", min: low, max: top, step, value, on: {input: () => {
      output.textContent = number(Number(input.value));
      changed(Number(input.value));
    }}});
    const label = element("label", {class: "slider"}, title, input, output);
    return {label, input, output};
  }
  function scaleBar(scale) {
    const canvas = element("canvas", {width: 128, height: 1, "aria-hidden": "true"}), context = canvas.getContext("2d");
    for (let x = 0; x < 128; x++) {
      context.fillStyle = `rgb(${tone(scale, x / 127)})`;
      context.fillRect(x, 0, 1, 1);
    }
    const low = element("span"), top = element("span");
    return {bar: element("div", {class: "scale"}, low, canvas, top),
      set(from, to) { low.textContent = from; top.textContent = to; }};
  }
  const svg = (tag, properties, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(properties)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  // 1: the result, in the viewer that the report has.
  function image() {
    sparsespec.viewer(view("image"), {...data.picture, photograph: [data.photograph]});
  }

  // 2: entropy and deviation of the channels.
  function channels() {
    const readout = element("p", {class: "note", role: "status"}, "Point at a dot, or press the arrow keys in a diagram, to see which channel it is.");
    const plots = data.channels.map(kind => scatter(kind, readout));
    const key = element("div", {class: "key"},
      ...["dropped by NCR: noise", "dropped by DCR: too even", "kept"].map((text, k) => element("span", {class: `k${k}`}, element("i"), text)));
    view("channels").append(element("div", {class: "three"}, ...plots), key, readout);
  }
  function scatter(kind, readout) {
    const w = 380, h = 270, left = 40, base = h - 34;
    const lowest = Math.min(...kind.entropy), highest = Math.max(...kind.entropy), top = Math.max(...kind.deviation) || 1;
    const x = value => left + 6 + ((w - left - 14) * (value - lowest)) / (highest - lowest || 1);
    const y = value => base - 4 - ((base - 14) * value) / top;
    const order = kind.entropy.map((_, k) => k).sort((a, b) => kind.entropy[a] - kind.entropy[b] || a - b);
    const drawn = svg("svg", {viewBox: `0 0 ${w} ${h}`, role: "application", tabindex: 0,
      "aria-label": `Channels of the ${kind.name}: ${kind.entropy.length} dots, entropy across and deviation up`});
    drawn.append(
      svg("line", {class: "axis", x1: left, x2: w, y1: base, y2: base}), svg("line", {class: "axis", x1: left, x2: left, y1: 4, y2: base}),
      svg("text", {x: w / 2 + 20, y: h - 4, "text-anchor": "middle"}, "entropy, bits × number of channels"),
      svg("text", {x: 11, y: base / 2, "text-anchor": "middle", transform: `rotate(-90 11 ${base / 2})`}, "deviation"),
      ...[lowest, highest].map((value, k) => svg("text", {x: x(value), y: base + 14, "text-anchor": k ? "end" : "start"},
        value === kind.empty ? "an empty bin" : number(value))),
      svg("text", {x: left - 4, y: y(top) + 4, "text-anchor": "end"}, number(top)));
    const at = k => `${x(kind.entropy[k]).toFixed(1)} ${y(kind.deviation[k]).toFixed(1)}`;
    for (const state of ["0", "1", "2"]) { // those kept on top; a dot is a line of no length with round ends
      const dots = order.filter(k => kind.state[k] === state).map(k => `M${at(k)}h0`);
      drawn.append(svg("path", {class: `dots kind${state}`, d: dots.join("")}));
    }
    const ring = svg("path", {class: "ring", d: ""});
    drawn.append(ring);
    let lit = -1;
    function light(k) {
      lit = k;
      ring.setAttribute("d", `M${at(k)}h0`);
      ring.setAttribute("class", `ring kind${kind.state[k]}`);
      const what = ["dropped by NCR", "dropped by DCR", "kept"][kind.state[k]];
      readout.textContent = `Channel ${k} of the ${kind.name}: ${kind.entropy[k] === kind.empty ? "an empty bin, which ranks noisiest" : `entropy ${kind.entropy[k].toFixed(2)}`}, deviation ${number(kind.deviation[k])}, ${what}.`;
    }
    drawn.addEventListener("pointermove", event => {
      const box = drawn.getBoundingClientRect(), px = ((event.clientX - box.left) * w) / box.width, py = ((event.clientY - box.top) * h) / box.height;
      let best = -1, nearest = 400;
      kind.entropy.forEach((value, k) => {
        const far = (x(value) - px) ** 2 + (y(kind.deviation[k]) - py) ** 2;
        if (far < nearest) { nearest = far; best = k; }
      });
      if (best >= 0) light(best);
    });
    drawn.addEventListener("keydown", event => {
      const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!by) return;
      event.preventDefault();
      light(order[clamp((lit < 0 ? (by > 0 ? -1 : order.length) : order.indexOf(lit)) + by, 0, order.length - 1)]);
    });
    return element("div", {}, element("h3", {}, kind.name), drawn);
  }

  // 3: similarity of one token to all, and the edges of the graph.
  const AROUND = [[-1, -1], [-1, 0], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 0], [1, 1]];
  function affinity() {
    const kinds = data.similarity.kinds.map(kind => ({...kind, steps: signedWords(kind.data)}));
    const edges = data.edges && {plain: words(data.edges.plain), cut: words(data.edges.cut),
      position: data.edges.position && signed(data.edges.position), weakest: data.edges.weakest};
    const rowOf = token => similarities(kinds, token, data.similarity.weights);
    sparsespec.similarityRow = (row, column) => Array.from(rowOf(row * columns + column));
    const names = ["Similarity to all tokens", ...(edges ? ["Edges by the features", "Edges that are cut"] : []),
      ...(edges && edges.position ? ["Position in the object"] : [])];
    const sheet = canvasOf(), bar = scaleBar("heat"), readout = element("p", {class: "note", role: "status"});
    const box = element("div", {class: "canvasbox choose", role: "application", tabIndex: 0, id: "tokens",
      "aria-label": "Tokens of the photograph. Click one, or go to it with the arrow keys."}, sheet.canvas);
    const cells = [];
    const compass = element("table", {class: "compass", "aria-label": "Weights of the edges to the eight neighbours"},
      element("tbody", {}, ...[0, 1, 2].map(r => element("tr", {}, ...[0, 1, 2].map(c => {
        const cell = element("td", r === 1 && c === 1 ? {class: "middle"} : {});
        cells.push(cell);
        return cell;
      })))));
    let [row, column] = data.chosen, shown = 0, opacity = 0.85;

    function draw() {
      const token = row * columns + column, similarity = rowOf(token);
      let low = Infinity, top = -Infinity;
      similarity.forEach((value, k) => { if (k !== token) { low = Math.min(low, value); top = Math.max(top, value); } });
      if (low > top) low = top = similarity[token]; // there is no other
      const span = top - low || 1;
      paintPhotograph(sheet, shown ? 0.6 : 0);
      if (shown === 0) paintTokens(sheet, t => [...tone("heat", (similarity[t] - low) / span), 255 * opacity]);
      else if (shown < 3) drawEdges(sheet, shown === 1 ? edges.plain : edges.cut, edges.weakest);
      else drawPositions(sheet, edges.position);
      mark(sheet, row, column);
      if (shown === 0) bar.set(number(low), number(top));
      else bar.set("strong", "weak");
      bar.bar.style.visibility = shown === 3 ? "hidden" : "visible";
      if (edges) {
        AROUND.forEach(([down, aside], k) => {
          const plain = edges.plain[token * 8 + k], cut = edges.cut[token * 8 + k], weight = step => Math.exp((-step / 65534) * edges.weakest);
          const text = plain === 65535 ? "–" : edges.position ? `${number(weight(plain))} → ${number(weight(cut))}` : number(weight(cut));
          cells[(down + 1) * 3 + aside + 1].textContent = text;
        });
        cells[4].textContent = "token";
      }
      const step = data.step;
      readout.textContent = `Token in row ${row * step}, column ${column * step} of the grid. Its similarity to the others is ${number(low)} to ${number(top)}.`;
    }
    function choose(r, c) {
      row = clamp(r, 0, Math.min(rows, Math.ceil(high)) - 1);
      column = clamp(c, 0, Math.min(columns, Math.ceil(wide)) - 1);
      draw();
    }
    box.addEventListener("pointerdown", event => {
      const frame = sheet.canvas.getBoundingClientRect();
      choose(Math.floor(((event.clientY - frame.top) / frame.height) * high), Math.floor(((event.clientX - frame.left) / frame.width) * wide));
    });
    box.addEventListener("keydown", event => {
      const by = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
      if (!by) return;
      event.preventDefault();
      choose(row + by[0], column + by[1]);
    });
    const opaque = slider("Opacity", 0, 1, 0.05, opacity, value => { opacity = value; draw(); });
    const side = [choices("Shown", names, k => { shown = k; opaque.label.style.visibility = k ? "hidden" : "visible"; draw(); }),
      opaque.label, bar.bar, readout];
    if (edges) side.push(element("div", {}, element("h3", {}, edges.position ? "Edges to its neighbours, before and after the position" : "Edges to its neighbours"), compass));
    const exact = `Computed in this page from features rounded to 16 bits; less than ${data.similarity.error.toExponential(1)} from the method's own numbers.`;
    const thinned = data.step > 1 ? ` Of the grid, every ${data.step}th token both ways is in this page.` : "";
    side.push(element("p", {class: "note"}, exact + thinned));
    view("affinity").append(element("div", {class: "two"}, box, element("div", {class: "stack"}, ...side)));
    whenThere(draw);
  }
  function similarities(kinds, token, weights) {
    const total = new Float64Array(tokens);
    for (const {steps, channels, scale, divisor} of kinds) {
      const own = token * channels;
      let ownLength = 0;
      for (let c = 0; c < channels; c++) ownLength += steps[own + c] ** 2;
      for (let other = 0; other < tokens; other++) {
        const at = other * channels;
        let apart = 0, together = 0, largest = 0, product = 0, length = 0;
        for (let c = 0; c < channels; c++) {
          const u = steps[own + c], v = steps[at + c], difference = Math.abs(u - v);
          apart += difference;
          together += Math.abs(u + v);
          if (difference > largest) largest = difference;
          product += u * v;
          length += v * v;
        }
        if (weights === "cosine") total[other] += ownLength && length ? product / Math.sqrt(ownLength * length) : 0;
        // The sum of a token and its opposite is zero: infinitely far apart. So, by convention, are two tokens of zeros.
        else total[other] += together ? (1 + largest * scale) / (1 + apart / together) / divisor : 0;
      }
    }
    return total.map(value => value / kinds.length);
  }
  function drawEdges({context, side}, steps, weakest) {
    context.lineWidth = Math.max(1, side / 6);
    const lines = [];
    for (let token = 0; token < tokens; token++) {
      const r = Math.floor(token / columns), c = token % columns;
      const right = steps[token * 8 + 4], below = steps[token * 8 + 6];
      if (c < columns - 1 && right !== 65535) lines.push([right, c + 1, r, c + 1, r + 1]);
      if (r < rows - 1 && below !== 65535) lines.push([below, c, r + 1, c + 1, r + 1]);
    }
    lines.sort((a, b) => a[0] - b[0]);
    for (const [step, x0, y0, x1, y1] of lines) {
      const weakness = (step / 65534) * weakest;
      context.strokeStyle = `rgb(${tone("heat", (weakness - 0.5) / 8.5)})`;
      context.beginPath();
      context.moveTo(x0 * side, y0 * side);
      context.lineTo(x1 * side, y1 * side);
      context.stroke();
    }
  }
  function drawPositions({context, side}, position) {
    const every = Math.ceil(Math.max(rows, columns) / 32);
    context.strokeStyle = context.fillStyle = "#ffe066";
    context.lineWidth = Math.max(1, (side * every) / 14);
    for (let r = 0; r < rows; r += every) {
      for (let c = 0; c < columns; c += every) {
        const token = r * columns + c, x = (c + 0.5) * side, y = (r + 0.5) * side, length = (side * every * 1.6) / 127;
        context.beginPath();
        context.arc(x, y, context.lineWidth * 1.2, 0, 7);
        context.fill();
        context.beginPath();
        context.moveTo(x, y);
        context.lineTo(x + position[2 * token] * length, y + position[2 * token + 1] * length);
        context.stroke();
      }
    }
  }
  function mark({context, side}, row, column) {
    for (const [style, width] of [["#000", 5], ["#7fffd4", 2.5]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.strokeRect(column * side, row * side, side, side);
    }
  }

  // 4: eigenvalues and eigenvectors.
  function spectrum() {
    const {values, gap, vectors} = data.spectrum, layers = vectors.map(layerValues);
    const sheet = canvasOf(), caption = element("p", {class: "note", role: "status"});
    let chosen = Math.min(1, values.length - 1), opacity = 0.8;
    const buttons = layers.map((layer, k) => {
      const small = canvasOf(160);
      paintTokens(small, t => tone("both", (layer[t] + 1) / 2));
      return element("button", {type: "button", "aria-pressed": String(k === chosen), on: {click: () => { chosen = k; draw(); }}},
        small.canvas, `${k + 1}: ${number(values[k])}`);
    });
    function draw() {
      buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(k === chosen)));
      paintPhotograph(sheet);
      paintTokens(sheet, t => [...tone("both", (layers[chosen][t] + 1) / 2), 255 * opacity]);
      caption.textContent = `Eigenvector ${chosen + 1}, eigenvalue ${number(values[chosen])}: blue is negative, red positive.`;
      dots.forEach((dot, k) => dot.classList.toggle("lit", k === chosen));
    }
    const w = 420, h = 250, left = 52, base = h - 30, top = Math.max(...values) * 1.1 || 1;
    const x = k => left + ((w - left - 10) * (k - 0.5)) / Math.max(values.length, 1), y = value => base - ((base - 12) * value) / top;
    const dots = [], plot = svg("svg", {viewBox: `0 0 ${w} ${h}`, role: "img",
      "aria-label": `The smallest eigenvalues: ${values.map(number).join(", ")}.${gap ? ` The largest gap lies after number ${gap}.` : ""}`});
    if (gap) {
      plot.append(svg("rect", {class: "gap", x: x(gap), width: x(gap + 1) - x(gap), y: 4, height: base - 4}),
        svg("text", {x: (x(gap) + x(gap + 1)) / 2, y: 14, "text-anchor": "middle"}, "largest gap"));
    }
    plot.append(svg("line", {class: "axis", x1: left, x2: w, y1: base, y2: base}), svg("line", {class: "axis", x1: left, x2: left, y1: 4, y2: base}),
      svg("text", {x: left - 6, y: y(top / 1.1) + 4, "text-anchor": "end"}, number(top / 1.1)),
      svg("text", {x: left - 6, y: base + 4, "text-anchor": "end"}, "0"));
    values.forEach((value, k) => {
      dots.push(svg("circle", {class: "dot", r: 5, cx: x(k + 1), cy: y(Math.max(value, 0))}));
      plot.append(svg("line", {class: "stem", x1: x(k + 1), x2: x(k + 1), y1: base, y2: y(Math.max(value, 0))}), dots[k],
        svg("text", {x: x(k + 1), y: base + 14, "text-anchor": "middle"}, String(k + 1)));
    });
    const opaque = slider("Opacity", 0, 1, 0.05, opacity, value => { opacity = value; draw(); });
    view("spectrum").append(element("div", {class: "two"},
      element("div", {class: "stack"}, element("div", {class: "canvasbox"}, sheet.canvas), caption, opaque.label),
      element("div", {class: "stack"}, element("div", {}, element("h3", {}, "Eigenvalues"), plot),
        element("div", {}, element("h3", {}, "Eigenvectors"), element("div", {class: "thumbs"}, ...buttons)))));
    whenThere(draw);
  }

  // 5: maps of objectness, their thresholds.
  function foreground() {
    const {maps, share} = data.foreground, shares = layerValues(share);
    const layers = maps.map(map => ({...map, values: {raw: layerValues(map.raw), smoothed: layerValues(map.smoothed)}}));
    const sheet = canvasOf(), readout = element("p", {class: "note", role: "status"}), bar = scaleBar("plain");
    let chosen = 0, form = "smoothed", cut = null;
    const threshold = slider("Threshold", 0, 1, 0.01, 0, value => { cut = value; draw(); });
    const through = element("div", {class: "choices"});
    function draw() {
      const map = layers[chosen];
      paintPhotograph(sheet);
      if (!map) {
        paintTokens(sheet, t => [0, 0, 0, 215 * (1 - shares[t])]);
        readout.textContent = "The brighter a token, the more thresholds it is above.";
        return;
      }
      const values = map.values[form], [low, top] = map[form].range;
      if (cut === null) {
        paintTokens(sheet, t => tone("plain", (values[t] - low) / (top - low || 1)));
        bar.set(number(low), number(top));
        readout.textContent = "Move the slider to see what is above a threshold.";
        return;
      }
      const above = values.reduce((count, value) => count + (value > cut), 0);
      paintTokens(sheet, t => (values[t] > cut ? null : [10, 12, 16, 205]));
      readout.textContent = `${above} of ${tokens} tokens are above ${number(cut)}.`;
    }
    function prepare() {
      const map = layers[chosen];
      for (const part of [threshold.label, through, bar.bar, formChoice]) part.hidden = !map;
      for (const part of [bar.bar, formChoice]) part.style.display = map ? "" : "none";
      threshold.label.style.display = map ? "" : "none";
      cut = null;
      if (map) {
        const [low, top] = map[form].range;
        Object.assign(threshold.input, {min: low, max: top, step: (top - low) / 200 || 1, value: (low + top) / 2});
        threshold.output.textContent = "";
        through.replaceChildren(...map.thresholds.map(value => element("button", {type: "button", class: "stop", on: {click: () => {
          threshold.input.value = value;
          threshold.output.textContent = number(value);
          cut = value;
          draw();
        }}}, number(value))));
      }
      draw();
    }
    const formChoice = choices("Values", ["smoothed", "as they are"], k => { form = k ? "raw" : "smoothed"; prepare(); });
    const names = [...layers.map(map => (map.votes > 1 ? `${map.name} (${map.votes} votes)` : map.name)), "share of thresholds"];
    view("foreground").append(element("div", {class: "two"}, element("div", {class: "canvasbox"}, sheet.canvas),
      element("div", {class: "stack"}, choices("Map", names, k => { chosen = k; prepare(); }), formChoice, bar.bar, threshold.label,
        element("div", {}, element("h3", {}, "Thresholds that the method takes"), through), readout)));
    whenThere(() => { if (cut === null) prepare(); else draw(); });
  }

  // 6: the regions, in the order in which they are taken.
  function candidates() {
    const regions = data.candidates, place = view("candidates");
    if (!regions || !regions.merit.length) return;
    const bits = regions.masks.map(bytes), inside = (k, t) => (bits[k][t >> 3] >> (7 - (t & 7))) & 1;
    const sheet = canvasOf(), readout = element("p", {class: "note", role: "status"}), count = element("p", {class: "note", role: "status"});
    const tall = 190, top = Math.max(1, ...regions.merit);
    let lit = 0, cut = regions.given === null ? regions.threshold : null;
    const bars = regions.merit.map((merit, k) => {
      const bar = element("i");
      bar.style.height = `${(merit / top) * tall}px`;
      const label = regions.labels[k];
      const button = element("button", {type: "button", "aria-label": `Region ${k + 1}, merit ${number(merit)}`, on: {
        pointerenter: () => light(k), focus: () => light(k), click: () => light(k)}}, number(merit), bar);
      return {button, bar, label};
    });
    const line = element("div", {class: "line"}), row = element("div", {class: "bars"}, ...bars.map(one => one.button), line);
    function isIn(k) {
      return cut === null ? k < regions.count : regions.merit[k] >= cut;
    }
    function light(k) {
      lit = k;
      draw();
    }
    function draw() {
      paintPhotograph(sheet, 0.55);
      bars.forEach(({button, bar, label}, k) => {
        const taken = isIn(k);
        button.classList.toggle("in", taken);
        button.classList.toggle("lit", k === lit);
        bar.style.background = taken ? (label ? colour(label) : "#9aa3ae") : "";
      });
      const shade = label => [1, 3, 5].map(at => parseInt(colour(label).slice(at, at + 2), 16));
      paintTokens(sheet, t => {
        if (inside(lit, t)) return [...(regions.labels[lit] ? shade(regions.labels[lit]) : [225, 230, 236]), 215];
        for (let k = 0; k < bars.length; k++) if (isIn(k) && inside(k, t)) return [...(regions.labels[k] ? shade(regions.labels[k]) : [154, 163, 174]), 70];
        return null;
      });
      const wholeness = regions.residuals === null ? "" : `, times wholeness ${number(regions.votes[lit] ? regions.merit[lit] / regions.votes[lit] : 1)} for a residual of ${number(regions.residuals[lit])}`;
      const fate = regions.dropped.includes(lit) ? " It lost too much to better ones, and was dropped."
        : regions.labels[lit] ? ` It is instance ${regions.labels[lit]}.` : "";
      readout.textContent = `Region ${lit + 1}: ${regions.sizes[lit]} tokens, votes ${number(regions.votes[lit])}${wholeness}, merit ${number(regions.merit[lit])}.${fate}`;
      if (cut !== null) {
        const many = regions.merit.filter(merit => merit >= cut).length;
        count.textContent = `At a threshold of ${number(cut)}: ${many} ${many === 1 ? "region" : "regions"}.`;
        line.style.width = `${row.scrollWidth}px`;
        line.style.bottom = `${2 + (cut / top) * tall}px`;
      } else {
        line.hidden = true;
        count.textContent = `${regions.given} were asked for: no threshold decides.`;
      }
    }
    const side = [readout];
    if (cut !== null) {
      const least = Math.min(regions.threshold, ...regions.merit);
      side.unshift(slider("Threshold", Math.floor(least * 100) / 100, 1, 0.01, cut, value => { cut = value; draw(); }).label, count);
    } else side.unshift(count);
    place.append(element("div", {class: "stack"}, row,
      element("div", {class: "two"}, element("div", {class: "canvasbox"}, sheet.canvas), element("div", {class: "stack"}, ...side))));
    whenThere(draw);
  }

  // 7: from tokens to pixels.
  function edges() {
    const pictures = data.edgeViews.map(({picture}) => {
      const made = new Image();
      made.onload = () => draw();
      made.src = picture;
      return made;
    });
    const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
    let chosen = pictures.length - 1, crops = data.crops.length > 0 && data.crops.length <= 6;
    function draw() {
      const [w, h] = data.size, scale = Math.min(1600 / Math.max(w, h), Math.max(1, 960 / Math.max(w, h)));
      canvas.width = Math.max(1, Math.round(w * scale));
      canvas.height = Math.max(1, Math.round(h * scale));
      paintPhotograph({canvas, context}, 0.25);
      if (pictures[chosen] && pictures[chosen].naturalWidth) context.drawImage(pictures[chosen], 0, 0, canvas.width, canvas.height);
      if (!crops) return;
      for (const {box: [top, left, bottom, right]} of data.crops) {
        for (const [style, width, dash] of [["rgba(0,0,0,.6)", 3, []], ["#fff", 1.5, [7, 5]]]) {
          context.strokeStyle = style;
          context.lineWidth = width;
          context.setLineDash(dash);
          context.strokeRect(left * scale + 1, top * scale + 1, (right - left) * scale - 2, (bottom - top) * scale - 2);
        }
        context.setLineDash([]);
      }
    }
    const names = data.edgeViews.map(one => one.name);
    const chooser = choices("Step", names, k => { chosen = k; draw(); });
    const radios = chooser.querySelectorAll("input");
    if (radios.length) radios[radios.length - 1].checked = true;
    const side = [chooser];
    if (data.crops.length) {
      const box = element("input", {type: "checkbox", checked: crops, on: {change: () => { crops = box.checked; draw(); }}});
      side.push(element("label", {class: "check"}, box, `${data.crops.length === 1 ? "The crop" : `The ${data.crops.length} crops`} of the closer look`));
    }
    view("edges").append(element("div", {class: "two"}, element("div", {class: "canvasbox"}, canvas), element("div", {class: "stack"}, ...side)));
    whenThere(draw);
  }

  for (const stage of [image, channels, affinity, spectrum, foreground, candidates, edges]) stage();
  photograph.onload = () => waiting.forEach(draw => draw());
  photograph.src = data.photograph;
})();
