"use strict";
// A photograph with its masks: sparsespec.viewer(element, picture) fills the element.
(() => {
  const api = (globalThis.sparsespec = globalThis.sparsespec || {});
  const COLOURS = "COLOURS"; // one for each label, as in the overlays
  const CASING = "rgba(16,16,20,.85)";
  const MOST_ZOOM = 24;
  const whole = new Intl.NumberFormat("en");
  let made = 0; // viewers on this page, for identifiers

  const colour = label => COLOURS[(((label - 1) % COLOURS.length) + COLOURS.length) % COLOURS.length];
  const clamp = (value, least, most) => Math.min(Math.max(value, least), most);
  const percent = share => (share >= 0.0995 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)) + " %";
  const seconds = value => (value < 0.0995 ? (1000 * value).toFixed(value < 0.00995 ? 1 : 0) + " ms" : value.toFixed(2) + " s");

  // An element with its properties ("on" holds listeners, names with "-" are attributes) and children.
  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(properties)) {
      if (key === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
      else if (key === "class") made.className = value;
      else if (key === "role" || key === "for" || key.includes("-")) made.setAttribute(key, value);
      else made[key] = value;
    }
    made.append(...children);
    return made;
  }

  // Lengths of the runs of COCO's compressed encoding, beginning with background, column by column.
  function runLengths(text) {
    const counts = [];
    for (let at = 0; at < text.length; ) {
      let value = 0, factor = 1, group;
      do {
        group = text.charCodeAt(at++) - 48;
        value += (group & 31) * factor;
        factor *= 32;
      } while (group & 32);
      if (group & 16) value -= factor;
      if (counts.length > 2) value += counts[counts.length - 2];
      counts.push(value);
    }
    return counts;
  }

  // The pixels of a mask within its own bounds, with a rim of background one pixel wide.
  function pixelsOf(text, height) {
    const counts = runLengths(text);
    let left = Infinity, right = -1, top = height, bottom = -1;
    for (let k = 0, at = 0; k < counts.length; at += counts[k++]) {
      if (k % 2 === 0 || counts[k] <= 0) continue;
      const last = at + counts[k] - 1, first = Math.floor(at / height), end = Math.floor(last / height);
      left = Math.min(left, first);
      right = Math.max(right, end);
      top = first === end ? Math.min(top, at % height) : 0;
      bottom = first === end ? Math.max(bottom, last % height) : height - 1;
    }
    if (right < 0) return {left: 0, top: 0, width: 2, height: 2, bits: new Uint8Array(4)};
    const width = right - left + 3, rows = bottom - top + 3, bits = new Uint8Array(width * rows);
    for (let k = 0, at = 0; k < counts.length; at += counts[k++]) {
      if (k % 2 === 0) continue;
      for (let i = at; i < at + counts[k]; i++) {
        bits[((i % height) - top + 1) * width + Math.floor(i / height) - left + 1] = 1;
      }
    }
    return {left: left - 1, top: top - 1, width, height: rows, bits};
  }

  // The outlines of a mask, rounded off, as a path in its pixels.
  function outline(mask, [height, width]) {
    const {bits} = mask, w = mask.width, path = new Path2D();
    const out = new Uint8Array(w * mask.height); // for each corner of pixels, a bit for each direction that leaves it
    for (let y = 1; y < mask.height - 1; y++) {
      for (let x = 1, i = y * w + 1; x < w - 1; x++, i++) {
        if (!bits[i]) continue;
        if (!bits[i - w]) out[i] |= 1; // right along the upper side, and so on with the mask on the right hand
        if (!bits[i + 1]) out[i + 1] |= 2;
        if (!bits[i + w]) out[i + w + 1] |= 4;
        if (!bits[i - 1]) out[i + w] |= 8;
      }
    }
    const steps = [1, w, -1, -w], dx = [0.5, 0, -0.5, 0], dy = [0, 0.5, 0, -0.5];
    for (let start = 0; start < out.length; start++) {
      while (out[start]) {
        const xs = [], ys = [];
        let at = start, direction = Math.log2(out[start] & -out[start]);
        do {
          out[at] &= ~(1 << direction);
          xs.push(mask.left + (at % w) + dx[direction]);
          ys.push(mask.top + Math.floor(at / w) + dy[direction]);
          at += steps[direction];
          // Where two pixels meet at a corner only, turn right: they are two parts.
          const next = [(direction + 1) % 4, direction, (direction + 3) % 4].find(d => out[at] & (1 << d));
          if (next === undefined) break;
          direction = next;
        } while (at !== start || out[start] & (1 << direction));
        addLoop(path, xs, ys, width, height);
      }
    }
    return path;
  }

  function addLoop(path, xs, ys, width, height) {
    const n = xs.length;
    for (let k = 0; k < n; k++) {
      let x = xs[k], y = ys[k];
      if (n > 8) {
        const before = (k + n - 1) % n, after = (k + 1) % n;
        // The edges of the photograph are no outline to be rounded.
        if (x > 0 && x < width) x = (xs[before] + 2 * x + xs[after]) / 4;
        if (y > 0 && y < height) y = (ys[before] + 2 * y + ys[after]) / 4;
      }
      if (k === 0) path.moveTo(x, y);
      else path.lineTo(x, y);
    }
    path.closePath();
  }

  // What is drawn of the masks of a card or picture: paths, and which instance a pixel belongs to.
  function masksOf(picture, toPointAt = true) {
    const [height, width] = picture.maskSize, owners = toPointAt ? new Uint16Array(height * width) : null;
    const order = picture.instances.map((_, k) => k).sort((a, b) => picture.instances[b].area - picture.instances[a].area);
    const paths = new Array(order.length), middles = new Array(order.length);
    for (const k of order) { // large ones first: of two that overlap, the smaller is the one to be pointed at
      const mask = pixelsOf(picture.instances[k].rle, height);
      paths[k] = outline(mask, picture.maskSize);
      if (!owners) continue;
      let sumX = 0, sumY = 0, count = 0;
      for (let y = 1; y < mask.height - 1; y++) {
        for (let x = 1; x < mask.width - 1; x++) {
          if (!mask.bits[y * mask.width + x]) continue;
          owners[(mask.top + y) * width + mask.left + x] = k + 1;
          sumX += mask.left + x + 0.5; sumY += mask.top + y + 0.5; count++;
        }
      }
      middles[k] = count ? [sumX / count / width, sumY / count / height] : [0.5, 0.5];
    }
    return {paths, owners, middles};
  }

  // Draw masks in a context whose unit is a pixel of the masks; `scale` is how many pixels of the canvas that is.
  function drawMasks(context, picture, paths, scale, {fill = 0.4, line = 2, shown = null, lit = -1} = {}) {
    const some = lit >= 0;
    context.lineJoin = "round";
    for (let k = 0; k < paths.length; k++) {
      if (shown && !shown[k] && k !== lit) continue;
      const tone = colour(picture.instances[k].label), hidden = shown && !shown[k];
      context.fillStyle = tone;
      context.globalAlpha = k === lit ? (hidden ? 0.12 : Math.min(1, 1.55 * fill)) : some ? fill * 0.45 : fill;
      context.fill(paths[k], "evenodd");
    }
    for (let k = 0; k < paths.length; k++) {
      if (k === lit || (shown && !shown[k])) continue;
      stroke(context, paths[k], colour(picture.instances[k].label), line / scale, some ? 0.55 : 1);
    }
    if (some) {
      context.setLineDash(shown && !shown[lit] ? [6 / scale, 5 / scale] : []);
      stroke(context, paths[lit], colour(picture.instances[lit].label), (line * 1.6) / scale, 1);
      context.setLineDash([]);
    }
    context.globalAlpha = 1;
  }

  function stroke(context, path, tone, width, alpha) {
    context.globalAlpha = alpha;
    context.strokeStyle = CASING;
    context.lineWidth = width * 2.1;
    context.stroke(path);
    context.strokeStyle = tone;
    context.lineWidth = width;
    context.stroke(path);
  }

  // Values with a sign are shown around 0, others from dark to bright.
  const DIVERGING = [[23, 78, 209], [96, 165, 250], [240, 240, 238], [250, 146, 92], [200, 24, 42]];
  const SEQUENTIAL = [[18, 10, 54], [66, 32, 128], [164, 44, 122], [240, 104, 72], [254, 196, 80], [252, 250, 196]];

  function shade(stops, position) {
    const place = clamp(position, 0, 1) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
    return stops[low].map((value, k) => Math.round(value + (stops[low + 1][k] - value) * (place - low)));
  }

  const signed = ([low, high]) => low < 0 && high > 0;

  function layerScale({range}) {
    const most = Math.max(Math.abs(range[0]), Math.abs(range[1]));
    return signed(range)
      ? {stops: DIVERGING, low: -most, high: most}
      : {stops: SEQUENTIAL, low: range[0], high: range[1]};
  }

  function layerValues(layer) {
    const text = atob(layer.data), values = new Float32Array(text.length), [low, high] = layer.range;
    for (let k = 0; k < text.length; k++) values[k] = low + (text.charCodeAt(k) / 255) * (high - low);
    return values;
  }

  function layerCanvas(layer) {
    const [rows, columns] = layer.grid, values = layerValues(layer), {stops, low, high} = layerScale(layer);
    const canvas = element("canvas", {width: columns, height: rows}), context = canvas.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    for (let k = 0; k < rows * columns; k++) {
      pixels.data.set([...shade(stops, high > low ? (values[k] - low) / (high - low) : 0.5), 255], 4 * k);
    }
    context.putImageData(pixels, 0, 0);
    return {canvas, values};
  }

  // The part of the canvas that the photograph covers, over the whole of the given width and height.
  function paintLayer(context, {grid, extent}, canvas, width, height, smooth) {
    context.imageSmoothingEnabled = smooth;
    context.imageSmoothingQuality = "high";
    const columns = Math.min(extent[1], grid[1]), rows = Math.min(extent[0], grid[0]);
    context.drawImage(canvas, 0, 0, columns, rows, 0, 0, width, height);
  }

  // Calls `loaded` with the first photograph of the list that there is, and before with one that is there sooner.
  function loadPhotograph(urls, [width, height], loaded) {
    let best = Infinity, stopped = false;
    const attempt = (place, next) => {
      const image = new Image();
      image.decoding = "async";
      image.onload = () => {
        if (stopped || place >= best) return;
        const {naturalWidth: w, naturalHeight: h} = image;
        // Another shape: a browser that ignores the orientation in the file, or a file that has been replaced.
        if (Math.abs(w * height - h * width) > 0.02 * w * height + Math.max(width, height, w, h)) return next();
        best = place;
        loaded(image);
      };
      image.onerror = () => !stopped && next();
      image.src = urls[place];
    };
    const from = place => {
      if (place < urls.length) attempt(place, () => from(place + 1));
      else if (best === Infinity) loaded(null);
    };
    if (urls.length > 1) attempt(urls.length - 1, () => {});
    from(0);
    return () => { stopped = true; };
  }

  const KEYS = [
    ["M", "all masks on or off"],
    ["1 … 9", "one mask on or off"],
    ["N, P", "next, previous instance"],
    ["Enter", "switch the instance on or off"],
    ["O", "only this instance, or all again"],
    ["F", "areas, or outlines alone"],
    ["L", "next layer"],
    ["+ −", "closer, farther"],
    ["0", "the whole photograph"],
    ["arrows", "move about when close"],
    ["Esc", "let go"],
    ["?", "these keys"],
  ];

  api.viewer = (root, first) => {
    const id = `sparsespec-${++made}`;
    // Kept from one picture to the next:
    const choice = {fill: 0.4, outlineOnly: false, layer: null, layerOpacity: 0.7, smooth: true};
    let picture, masks, shown, layers, stopLoading = () => {}, photograph = null, lit = -1, frame = 0, inputs = [];
    const camera = {x: 0, y: 0, zoom: 1}; // picture's corner in the surface, magnification beyond "all of it"
    const pointers = new Map();
    let moved = 0, pinch = 0, lastTouched = -1;

    const canvas = element("canvas", {"aria-hidden": "true"});
    const holder = element("div", {class: "sv-photo"});
    const tip = element("div", {class: "sv-tip", hidden: true, "aria-hidden": "true"});
    const live = element("div", {class: "sv-unseen", role: "status", "aria-live": "polite"});
    const surface = element("div", {class: "sv-surface", tabIndex: 0, role: "application"}, holder, canvas, tip);
    const button = (text, label, action, more = {}) =>
      element("button", {type: "button", "aria-label": label, title: label, on: {click: action}, ...more}, text);
    const masksButton = button("◐", "All masks (M)", () => toggleAll(), {"aria-pressed": "true"});
    const zoomText = button("fit", "The whole photograph (0)", () => fit(), {class: "sv-wide"});
    const helpButton = button("?", "Keys (?)", () => toggleHelp(), {"aria-expanded": "false", "aria-controls": `${id}-help`});
    const bar = element("div", {class: "sv-bar", role: "group", "aria-label": "View"}, masksButton,
      button("−", "Farther (-)", () => zoomBy(1 / 1.5)), zoomText, button("+", "Closer (+)", () => zoomBy(1.5)), helpButton);
    const help = element("div", {class: "sv-help", id: `${id}-help`, hidden: true, role: "group", "aria-label": "Keys"},
      element("dl", {}, ...KEYS.map(([key, text]) =>
        element("div", {}, element("dt", {}, element("kbd", {}, key)), element("dd", {}, text)))));
    const stage = element("div", {class: "sv-stage"}, surface, bar, help);
    const side = element("div", {class: "sv-side"});
    root.replaceChildren(stage, side, live);
    root.classList.add("sparsespec-viewer");

    // -- the picture

    function show(next) {
      stopLoading();
      picture = {instances: [], layers: [], links: [], photograph: [], seconds: null, ...next};
      picture.maskSize = picture.maskSize || [picture.size[1], picture.size[0]];
      masks = masksOf(picture);
      shown = picture.instances.map(() => true);
      layers = new Map(picture.layers.map(layer => [layer.name, layer]));
      layers.forEach((layer, name) => layers.set(name, {...layer, ...layerCanvas(layer)}));
      if (!layers.has(choice.layer)) choice.layer = null;
      lit = -1;
      holder.replaceChildren();
      holder.classList.remove("sv-missing");
      photograph = null;
      surface.setAttribute("aria-label", `${picture.name}, ${countText()}. N and P go from one to the next.`);
      stopLoading = loadPhotograph(picture.photograph, picture.size, image => {
        photograph = image;
        if (image) {
          image.alt = picture.name;
          image.draggable = false;
          holder.replaceChildren(image);
        }
        holder.classList.toggle("sv-missing", !image);
        const plain = side.querySelector(".sv-layers canvas");
        if (plain && image) plain.getContext("2d").drawImage(image, ...within(plain));
        place();
      });
      side.replaceChildren(...sections());
      showLegend();
      masksButton.setAttribute("aria-pressed", "true");
      fit();
    }

    const countText = () => {
      const n = picture.instances.length;
      return n === 1 ? "1 instance" : `${n || "no"} instances`;
    };

    function sections() {
      const made = [element("div", {class: "sv-name"},
        element("strong", {}, picture.name),
        element("span", {}, `${picture.size[0]} × ${picture.size[1]} · ${countText()}`))];
      made.push(instancesSection());
      if (layers.size) made.push(layersSection());
      if (picture.seconds) made.push(secondsSection());
      if (picture.links.length) {
        made.push(element("p", {class: "sv-links"},
          ...picture.links.map(link => element("a", {href: link.href}, link.text))));
      }
      return made;
    }

    const section = (title, ...children) => {
      const heading = `${id}-${title}`;
      return element("section", {"aria-labelledby": heading}, element("h3", {id: heading}, title), ...children);
    };

    function slider(text, value, change) {
      const input = element("input", {type: "range", min: 0, max: 100, value: Math.round(100 * value),
        on: {input: () => change(input.value / 100)}});
      return element("label", {class: "sv-slider"}, element("span", {}, text), input);
    }

    // -- instances

    function instancesSection() {
      if (!picture.instances.length) {
        inputs = [];
        return section("Instances", element("p", {class: "sv-muted"}, picture.note || "Nothing was found in this photograph."));
      }
      inputs = picture.instances.map((_, k) => element("input", {type: "checkbox", checked: true,
        "aria-describedby": `${id}-about-${k}`,
        on: {
          change: event => toggle(k, event.target.checked),
          focus: () => light(k), blur: () => light(-1),
          keydown: event => { if (event.key === "Enter") { event.preventDefault(); event.stopPropagation(); toggle(k); } },
        }}));
      const rows = picture.instances.map((instance, k) => {
        inputs[k].style.setProperty("--tone", colour(instance.label));
        const meter = element("span", {class: "sv-meter", "aria-hidden": "true"}, element("i"));
        meter.firstChild.style.width = `${100 * clamp(instance.score, 0, 1)}%`;
        return element("li", {on: {pointerenter: event => { if (event.pointerType === "mouse") light(k); },
                                   pointerleave: event => { if (event.pointerType === "mouse") light(-1); }}},
          element("label", {}, inputs[k], element("span", {class: "sv-number"}, String(instance.label)),
            element("span", {class: "sv-unseen"}, "score"), meter, element("span", {class: "sv-score"}, instance.score.toFixed(2)),
            element("span", {class: "sv-area"}, percent(share(instance)))),
          element("span", {class: "sv-unseen", id: `${id}-about-${k}`}, about(k).map(([name, text]) => `${name} ${text}`).join(", ")));
      });
      return section("Instances",
        element("div", {class: "sv-head", "aria-hidden": "true"}, element("span", {}, "score"), element("span", {}, "area")),
        element("ul", {class: "sv-instances"}, ...rows),
        element("div", {class: "sv-row"},
          element("button", {type: "button", class: "sv-all", on: {click: () => toggleAll()}}, "Hide all"),
          slider("Opacity", choice.fill, value => { choice.fill = value; choice.outlineOnly = false; redraw(); })));
    }

    const share = instance => instance.area / (picture.size[0] * picture.size[1]);

    // What is to be said about an instance, for the eye and for the ear.
    function about(k) {
      const instance = picture.instances[k], [x, y, w, h] = instance.box.map(value => whole.format(Math.round(value)));
      return [["score", instance.score.toFixed(3)], ["box", `x ${x}, y ${y}, ${w} × ${h}`],
        ["area", `${whole.format(instance.area)} pixels, ${percent(share(instance))}`],
        ...Object.entries(instance.facts || {}).map(([name, value]) => [name, String(value)])];
    }

    function toggle(k, on = !shown[k]) {
      shown[k] = on;
      shownChanged();
    }

    function toggleAll() {
      const on = !shown.some(Boolean);
      shown.fill(on);
      shownChanged();
    }

    function only(k) {
      const alone = shown.every((on, other) => on === (other === k));
      shown = shown.map((_, other) => alone || other === k);
      shownChanged();
    }

    function shownChanged() {
      inputs.forEach((input, k) => { input.checked = shown[k]; });
      const any = shown.some(Boolean), all = side.querySelector(".sv-all");
      if (all) all.textContent = any ? "Hide all" : "Show all";
      masksButton.setAttribute("aria-pressed", String(any));
      if (!tip.hidden && lit >= 0) fillTip(lit);
      redraw();
    }

    // Highlight an instance, -1 for none; `at` is where the pointer is, the middle of the mask otherwise.
    function light(k, at = null) {
      if (k !== lit) {
        side.querySelectorAll(".sv-instances li").forEach((row, other) => row.classList.toggle("sv-lit", other === k));
        lit = k;
        redraw();
      }
      const layer = layers.get(choice.layer);
      if (k < 0 && !(at && layer)) {
        tip.hidden = true;
        return;
      }
      fillTip(k, at && layer ? layer : null, at);
      const scale = currentScale(), [mx, my] = at || [
        camera.x + masks.middles[k][0] * picture.size[0] * scale, camera.y + masks.middles[k][1] * picture.size[1] * scale];
      tip.hidden = false;
      const {offsetWidth: w, offsetHeight: h} = tip, {clientWidth, clientHeight} = surface;
      const left = mx + 16 + w < clientWidth ? mx + 16 : mx - 16 - w, top = my + 16 + h < clientHeight ? my + 16 : my - 16 - h;
      tip.style.transform = `translate(${clamp(left, 4, Math.max(4, clientWidth - w - 4))}px, ${
        clamp(top, 4, Math.max(4, clientHeight - h - 4))}px)`;
    }

    function fillTip(k, layer = null, at = null) {
      const lines = [];
      if (k >= 0) {
        const title = element("strong", {}, `Instance ${picture.instances[k].label}${shown[k] ? "" : " (hidden)"}`);
        tip.style.setProperty("--tone", colour(picture.instances[k].label));
        lines.push(title, ...about(k).map(([name, text]) => element("span", {}, element("i", {}, name), text)));
      }
      tip.classList.toggle("sv-toned", k >= 0);
      if (layer && at) {
        const [x, y] = toPicture(at), [eh, ew] = layer.extent, [rows, columns] = layer.grid;
        const row = clamp(Math.floor((y / picture.size[1]) * eh), 0, rows - 1);
        const column = clamp(Math.floor((x / picture.size[0]) * ew), 0, columns - 1);
        lines.push(element("span", {}, element("i", {}, layer.name), layer.values[row * columns + column].toFixed(3)));
      }
      tip.replaceChildren(...lines);
    }

    function step(by) {
      const n = picture.instances.length;
      if (!n) return;
      light(lit < 0 ? (by > 0 ? 0 : n - 1) : (lit + by + n) % n);
      live.textContent = `Instance ${picture.instances[lit].label}, ${about(lit).map(pair => pair.join(" ")).join(", ")}${
        shown[lit] ? "" : ", hidden"}`;
    }

    // -- layers

    // Where the picture lies in a small canvas: as it is, but never as thin as a line.
    function within(canvas) {
      const scale = Math.min(canvas.width / picture.size[0], canvas.height / picture.size[1]);
      const [width, height] = picture.size.map(side => Math.max(16, Math.round(side * scale)));
      return [(canvas.width - width) / 2, (canvas.height - height) / 2, width, height];
    }

    function layersSection() {
      const options = [null, ...layers.keys()].map(name => {
        const input = element("input", {type: "radio", name: `${id}-layer`, value: name || "", checked: name === choice.layer,
          on: {change: () => setLayer(name)}});
        const small = element("canvas", {width: 112, height: 84, "aria-hidden": "true"}), context = small.getContext("2d");
        const [left, top, width, height] = within(small);
        context.translate(left, top);
        if (name) paintLayer(context, layers.get(name), layers.get(name).canvas, width, height, true);
        context.resetTransform();
        return element("label", {}, input, small, element("span", {}, name || "none"));
      });
      const box = element("input", {type: "checkbox", checked: choice.smooth,
        on: {change: () => { choice.smooth = box.checked; redraw(); }}});
      return section("Layers",
        element("div", {class: "sv-layers", role: "radiogroup", "aria-label": "Layer over the photograph"}, ...options),
        element("div", {class: "sv-legend", hidden: true}, element("span"), element("i"), element("span")),
        element("div", {class: "sv-row"}, element("label", {class: "sv-check"}, box, element("span", {}, "smooth")),
          slider("Opacity", choice.layerOpacity, value => { choice.layerOpacity = value; redraw(); })));
    }

    function setLayer(name) {
      choice.layer = name;
      for (const input of side.querySelectorAll(".sv-layers input")) input.checked = input.value === (name || "");
      redraw();
      showLegend();
    }

    function showLegend() {
      const legend = side.querySelector(".sv-legend"), layer = layers.get(choice.layer);
      if (!legend) return;
      legend.hidden = !layer;
      if (!layer) return;
      const {stops, low, high} = layerScale(layer);
      legend.children[0].textContent = low.toFixed(2);
      legend.children[2].textContent = high.toFixed(2);
      legend.children[1].style.background = `linear-gradient(90deg, ${stops.map(stop => `rgb(${stop})`).join()})`;
    }

    function nextLayer(by) {
      const names = [null, ...layers.keys()];
      setLayer(names[(names.indexOf(choice.layer) + by + names.length) % names.length]);
      live.textContent = `Layer: ${choice.layer || "none"}`;
    }

    // -- times

    function secondsSection() {
      const {total, ...stages} = picture.seconds, entries = Object.entries(stages);
      const sum = total === undefined ? entries.reduce((so, [, value]) => so + value, 0) : total;
      const most = Math.max(...entries.map(([, value]) => value), 1e-9);
      const rows = entries.map(([name, value]) => {
        const meter = element("span", {class: "sv-meter", "aria-hidden": "true"}, element("i"));
        meter.firstChild.style.width = `${(100 * value) / most}%`;
        return element("div", {}, element("dt", {}, name), element("dd", {}, meter, element("span", {}, seconds(value))));
      });
      return section("Time", element("dl", {class: "sv-seconds"}, ...rows,
        element("div", {class: "sv-total"}, element("dt", {}, "total"), element("dd", {}, element("span", {}, seconds(sum))))));
    }

    // -- drawing

    const fitScale = () => {
      const {clientWidth: w, clientHeight: h} = surface;
      return Math.max(1e-6, Math.min((w - 16) / picture.size[0], (h - 16) / picture.size[1]));
    };
    const currentScale = () => fitScale() * camera.zoom;
    const toPicture = ([x, y]) => [(x - camera.x) / currentScale(), (y - camera.y) / currentScale()];

    function fit() {
      camera.zoom = 1;
      place();
    }

    // The photograph stays in sight: in the middle where it is smaller than the stage, else without a gap.
    function place() {
      if (!picture) return;
      const scale = currentScale(), {clientWidth: w, clientHeight: h} = surface;
      const width = picture.size[0] * scale, height = picture.size[1] * scale;
      camera.x = width <= w ? (w - width) / 2 : clamp(camera.x, w - width, 0);
      camera.y = height <= h ? (h - height) / 2 : clamp(camera.y, h - height, 0);
      holder.style.width = `${picture.size[0]}px`;
      holder.style.height = `${picture.size[1]}px`;
      holder.style.transform = `translate(${camera.x}px, ${camera.y}px) scale(${scale})`;
      holder.classList.toggle("sv-pixels", scale > 6);
      surface.classList.toggle("sv-close", camera.zoom > 1);
      zoomText.textContent = camera.zoom === 1 ? "fit" : `${Math.round(100 * scale)} %`;
      redraw();
    }

    function zoomBy(factor, at = [surface.clientWidth / 2, surface.clientHeight / 2]) {
      const [x, y] = toPicture(at);
      let zoom = clamp(camera.zoom * factor, 1, Math.max(MOST_ZOOM, 8 / fitScale()));
      if (zoom < 1.02) zoom = 1;
      camera.zoom = zoom;
      camera.x = at[0] - x * currentScale();
      camera.y = at[1] - y * currentScale();
      place();
    }

    function redraw() {
      if (!frame) frame = requestAnimationFrame(draw);
    }

    function draw() {
      frame = 0;
      const ratio = globalThis.devicePixelRatio || 1, {clientWidth: w, clientHeight: h} = surface;
      const width = Math.round(w * ratio), height = Math.round(h * ratio);
      if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
      const context = canvas.getContext("2d"), scale = currentScale() * ratio;
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, width, height);
      context.setTransform(scale, 0, 0, scale, camera.x * ratio, camera.y * ratio);
      const layer = layers.get(choice.layer);
      if (layer) {
        context.globalAlpha = choice.layerOpacity;
        paintLayer(context, layer, layer.canvas, picture.size[0], picture.size[1], choice.smooth);
        context.globalAlpha = 1;
      }
      const [rows, columns] = picture.maskSize;
      context.scale(picture.size[0] / columns, picture.size[1] / rows);
      drawMasks(context, picture, masks.paths, (scale * picture.size[0]) / columns,
        // A layer is to be seen through the masks.
        {fill: choice.outlineOnly ? 0 : choice.fill * (layer ? 0.3 : 1), line: 2 * ratio, shown, lit});
    }

    // -- pointer

    const positionOf = event => {
      const bounds = surface.getBoundingClientRect();
      return [event.clientX - bounds.left, event.clientY - bounds.top];
    };

    function under(at) {
      const [x, y] = toPicture(at), [rows, columns] = picture.maskSize;
      const column = Math.floor((x / picture.size[0]) * columns), row = Math.floor((y / picture.size[1]) * rows);
      if (row < 0 || column < 0 || row >= rows || column >= columns) return null;
      return masks.owners[row * columns + column] - 1;
    }

    function pointTo(at) {
      const k = under(at);
      if (k === null) light(-1);
      else light(k, at);
      surface.classList.toggle("sv-over", k !== null && k >= 0);
      return k;
    }

    surface.addEventListener("pointerdown", event => {
      if (event.button !== 0) return;
      pointers.set(event.pointerId, positionOf(event));
      surface.setPointerCapture(event.pointerId);
      if (pointers.size === 1) moved = 0;
      else { moved = Infinity; pinch = spread(); }
    });
    surface.addEventListener("pointermove", event => {
      const at = positionOf(event), before = pointers.get(event.pointerId);
      if (!before) {
        if (event.pointerType !== "touch") pointTo(at);
        return;
      }
      pointers.set(event.pointerId, at);
      if (pointers.size === 1) {
        moved += Math.hypot(at[0] - before[0], at[1] - before[1]);
        if (moved > 5 && camera.zoom > 1) {
          light(-1);
          surface.classList.add("sv-moving");
          camera.x += at[0] - before[0];
          camera.y += at[1] - before[1];
          place();
        }
      } else if (pointers.size === 2) {
        const now = spread(), [a, b] = [...pointers.values()];
        if (pinch > 0 && now > 0) zoomBy(now / pinch, [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2]);
        pinch = now;
      }
    });
    const spread = () => {
      const [a, b] = [...pointers.values()];
      return Math.hypot(a[0] - b[0], a[1] - b[1]);
    };
    const release = event => {
      const held = pointers.delete(event.pointerId);
      surface.classList.remove("sv-moving");
      if (!held || event.type !== "pointerup" || moved > 5) return;
      const at = positionOf(event), k = pointTo(at);
      if (k === null) return;
      const [x, y] = toPicture(at);
      root.dispatchEvent(new CustomEvent("sparsespec:pick", {bubbles: true,
        detail: {x, y, label: k < 0 ? null : picture.instances[k].label}}));
      // A finger can't hover: its first touch tells about the instance, the second switches it.
      if (k >= 0 && (event.pointerType !== "touch" || lastTouched === k)) {
        if (event.shiftKey) only(k);
        else toggle(k);
      }
      lastTouched = k;
    };
    surface.addEventListener("pointerup", release);
    surface.addEventListener("pointercancel", release);
    surface.addEventListener("pointerleave", event => {
      if (event.pointerType !== "touch") { light(-1); surface.classList.remove("sv-over"); }
    });
    surface.addEventListener("wheel", event => {
      // The page scrolls over a viewer that nobody has touched.
      if (!event.ctrlKey && !root.contains(document.activeElement)) return;
      event.preventDefault();
      zoomBy(Math.exp(-clamp(event.deltaY * (event.deltaMode ? 20 : 1), -160, 160) / (event.ctrlKey ? 120 : 300)), positionOf(event));
    }, {passive: false});
    surface.addEventListener("dblclick", event => (camera.zoom > 1 ? fit() : zoomBy(2.5, positionOf(event))));

    // -- keyboard

    function toggleHelp(on = help.hidden) {
      help.hidden = !on;
      helpButton.setAttribute("aria-expanded", String(on));
    }

    function pan(x, y) {
      if (camera.zoom === 1) return false;
      camera.x += x;
      camera.y += y;
      place();
      return true;
    }

    function pressed(event) {
      if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
      const {target, key} = event, form = target.matches("input[type=range], input[type=text], select, textarea");
      const onStage = target === surface;
      if (form && (key.startsWith("Arrow") || key.length > 1)) return;
      const actions = {
        m: toggleAll, n: () => step(1), p: () => step(-1), l: () => layers.size && nextLayer(event.shiftKey ? -1 : 1),
        o: () => (lit >= 0 ? only(lit) : false),
        f: () => { choice.outlineOnly = !choice.outlineOnly; redraw(); },
        "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), 0: fit, "?": () => toggleHelp(),
        Escape: () => {
          if (!help.hidden) toggleHelp(false);
          else if (lit >= 0) light(-1);
          else if (camera.zoom > 1) fit();
          else return false;
        },
        Enter: () => (onStage && lit >= 0 ? toggle(lit) : false),
        " ": () => (onStage && lit >= 0 ? toggle(lit) : false),
        ArrowLeft: () => onStage && pan(60, 0), ArrowRight: () => onStage && pan(-60, 0),
        ArrowUp: () => onStage && pan(0, 60), ArrowDown: () => onStage && pan(0, -60),
      };
      for (let k = 1; k <= 9; k++) {
        actions[k] = () => {
          const found = picture.instances.findIndex(instance => instance.label === k);
          return found >= 0 ? toggle(found) : false;
        };
      }
      const action = actions[key.length === 1 ? key.toLowerCase() : key];
      if (action && action() !== false) {
        event.preventDefault();
        event.stopPropagation();
      }
    }
    root.addEventListener("keydown", pressed);
    surface.addEventListener("blur", () => light(-1));

    const watch = new ResizeObserver(place);
    watch.observe(surface);
    show(first);
    return {
      show,
      highlight: label => light(label === null ? -1 : picture.instances.findIndex(instance => instance.label === label)),
      focus: () => surface.focus({preventScroll: true}),
      destroy() {
        stopLoading();
        watch.disconnect();
        cancelAnimationFrame(frame);
        root.removeEventListener("keydown", pressed);
        root.classList.remove("sparsespec-viewer");
        root.replaceChildren();
      },
    };
  };

  // For pages that show many pictures.
  Object.assign(api, {element, colour, masksOf, drawMasks, percent, readableSeconds: seconds});
})();
