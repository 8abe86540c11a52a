"use strict";
// The page of a run, from the index in the page, report/run.js and a script for each image.
(() => {
  const api = globalThis.sparsespec;
  const {element, percent, readableSeconds} = api;
  const CARDS = "report/images/";
  const PAGE = 48; // cards at a time: the document stays small however many images there are
  const KEPT = 160; // cards whose masks are kept in memory
  const TO_READ = /\.(jpe?g|jfif|png|webp|gif|avif|bmp)$/i; // what browsers show
  const whole = new Intl.NumberFormat("en");
  const byName = new Intl.Collator("en", {numeric: true}).compare;
  const LIMITS = {
    score: {title: "Best score", unit: "", scale: 1, step: 0.01, show: value => String(+value.toFixed(2))},
    count: {title: "Instances", unit: "", scale: 1, step: 1, show: String},
    area: {title: "Area", unit: "%", scale: 100, step: 1, show: value => `${+(100 * value).toFixed(1)} %`},
    time: {title: "Time", unit: "s", scale: 1, step: 0.1, show: value => `${+value.toFixed(3)} s`},
  };
  const SORTS = {order: "as in the run", name: "name", score: "best score", count: "instances", area: "area", time: "time"};
  const STATUSES = {done: "with a result", failed: "failed", skipped: "skipped"};

  let run = null;
  api.run = value => { run = value; };

  // -- cards of images, fetched as scripts since a page from a disk may not read files

  const cards = new Map(), waiting = new Map();
  api.card = (name, card) => {
    cards.set(name, card);
    if (cards.size > KEPT) cards.delete(cards.keys().next().value);
  };

  const quoted = path => path.split("/").map(encodeURIComponent).join("/");

  // The masks and layers of an image; null if they are not there.
  function fetchCard(name) {
    if (cards.has(name)) {
      const card = cards.get(name);
      cards.delete(name);
      cards.set(name, card); // the last to be forgotten
      return Promise.resolve(card);
    }
    if (!waiting.has(name)) {
      waiting.set(name, new Promise(resolve => {
        const script = element("script", {src: `${CARDS}${quoted(name)}.js`, async: true});
        script.onload = script.onerror = () => {
          script.remove();
          waiting.delete(name);
          resolve(cards.get(name) || null);
        };
        document.head.append(script);
      }));
    }
    return waiting.get(name);
  }

  // -- the index

  let index, rows;

  function readIndex() {
    index = JSON.parse(document.getElementById("index").textContent);
    const stages = run ? run.stages : [], seconds = (run && run.seconds) || [];
    rows = index.rows.map((values, number) => {
      const row = {number};
      index.columns.forEach((column, k) => { row[column] = values[k]; });
      row.title = row.page ? `${row.path} (page ${row.page})` : row.path;
      row.search = row.title.toLowerCase();
      row.key = row.name === null ? `:${row.title}` : row.name; // in the address; names have no colons
      row.times = seconds[number] || null;
      row.count = row.status === "done" ? row.instances : null;
      row.time = row.times ? row.times[row.times.length - 1] : null;
      return row;
    });
    index.stages = stages;
  }

  function photographsOf(row) {
    const urls = [];
    if (run && run.photographs && TO_READ.test(row.path) && (row.page || 1) === 1) {
      const other = run.others && run.others[row.number];
      urls.push(run.photographs + (other || quoted(row.path)));
    }
    urls.push(`${CARDS}${quoted(row.name)}.jpg`);
    return urls;
  }

  // -- what is asked for, as it stands in the address

  const nothing = () => ({q: "", sort: "order", down: false, page: 1, image: null, status: null,
    score: null, count: null, area: null, time: null});
  let state = nothing(), found = [];

  function stateOf(hash) {
    const read = nothing(), parameters = new URLSearchParams(hash.replace(/^#/, ""));
    read.q = parameters.get("q") || "";
    read.image = parameters.get("image");
    const page = Number(parameters.get("page"));
    if (Number.isInteger(page) && page > 0) read.page = page;
    const sort = parameters.get("sort") || "";
    if (Object.keys(SORTS).includes(sort.replace(/^-/, ""))) {
      read.sort = sort.replace(/^-/, "");
      read.down = sort.startsWith("-");
    }
    const status = (parameters.get("status") || "").split(",").filter(name => Object.keys(STATUSES).includes(name));
    if (status.length) read.status = status;
    for (const key of Object.keys(LIMITS)) {
      const match = /^(-?[\d.]+)?\.\.(-?[\d.]+)?$/.exec(parameters.get(key) || "");
      if (!match) continue;
      const [low, high] = [match[1], match[2]].map(text => (text === undefined || Number.isNaN(Number(text)) ? null : Number(text)));
      if (low !== null || high !== null) read[key] = [low, high];
    }
    return read;
  }

  function hashOf(from) {
    const parameters = new URLSearchParams();
    if (from.q) parameters.set("q", from.q);
    if (from.sort !== "order" || from.down) parameters.set("sort", (from.down ? "-" : "") + from.sort);
    if (from.status) parameters.set("status", from.status.join(","));
    for (const key of Object.keys(LIMITS)) {
      if (from[key]) parameters.set(key, from[key].map(value => (value === null ? "" : String(value))).join(".."));
    }
    if (from.page > 1) parameters.set("page", String(from.page));
    if (from.image !== null) parameters.set("image", from.image);
    return `#${parameters}`;
  }

  let late = 0, unwritten = null;

  function write(hash, push) {
    unwritten = null;
    clearTimeout(late);
    if (hash === (location.hash || "#")) return;
    const opened = state.image !== null && (push || Boolean(history.state && history.state.opened));
    history[push ? "pushState" : "replaceState"]({opened}, "", hash);
  }

  // Put the state into the address; browsers allow only so many changes in a while, hence "soon" for those of typing.
  function remember(how) {
    if (how === "soon") {
      unwritten = hashOf(state);
      clearTimeout(late);
      late = setTimeout(() => write(unwritten, false), 300);
      return;
    }
    if (how === "push" && unwritten !== null) history.replaceState(history.state, "", unwritten);
    write(hashOf(state), how === "push");
  }

  function within(value, limits) {
    if (!limits) return true;
    if (value === null) return false;
    return (limits[0] === null || value >= limits[0] - 1e-9) && (limits[1] === null || value <= limits[1] + 1e-9);
  }

  // Rows that satisfy all that is asked for, but for one of the limits.
  function matching(except = null) {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean), limits = Object.keys(LIMITS).filter(key => key !== except);
    return rows.filter(row => words.every(word => row.search.includes(word))
      && (!state.status || state.status.includes(row.status))
      && limits.every(key => within(row[key], state[key])));
  }

  function search() {
    found = matching();
    const sign = state.down ? -1 : 1, key = state.sort;
    if (key === "name") found.sort((a, b) => sign * byName(a.title, b.title) || a.number - b.number);
    else if (key === "order") { if (state.down) found.reverse(); }
    else {
      found.sort((a, b) => {
        if (a[key] === null || b[key] === null) return (a[key] === null) - (b[key] === null) || a.number - b.number;
        return sign * (a[key] - b[key]) || a.number - b.number;
      });
    }
  }

  // -- the page

  const parts = {};

  function build() {
    const root = document.getElementById("report");
    const totals = [...Object.entries(index.totals), ...medians()];
    const parameters = Object.entries(index.parameters);
    const notes = [];
    if (index.interrupted) notes.push("The run was interrupted: this is what it had done until then.");
    if (index.done && index.done[0] < index.done[1]) {
      notes.push(`${whole.format(index.done[0])} of ${whole.format(index.done[1])} images have a card here, chosen by their names. `
        + "The histograms and totals are those of all.");
    }
    if (index.without && index.without[0] < index.without[1]) {
      notes.push(`${whole.format(index.without[0])} of ${whole.format(index.without[1])} images without a result are listed; run.json has all.`);
    }
    const finished = run && run.finished ? new Date(run.finished) : null;
    const when = finished && !Number.isNaN(finished.getTime())
      ? finished.toLocaleString("en", {dateStyle: "medium", timeStyle: "short"}) : null;

    const header = element("header", {class: "top"},
      element("div", {class: "brand"}, element("h1", {}, "sparsespec report"),
        element("span", {class: "muted"}, [when, index.version ? `version ${index.version}` : null].filter(Boolean).join(" · "))),
      element("dl", {class: "tiles"}, ...totals.map(([caption, figure]) =>
        element("div", {}, element("dt", {}, caption), element("dd", {}, figure)))),
      ...notes.map(text => element("p", {class: "note"}, text)));
    if (parameters.length) {
      header.append(element("details", {class: "parameters"}, element("summary", {}, "Parameters"),
        element("dl", {}, ...parameters.map(([name, text]) =>
          element("div", {}, element("dt", {}, name), element("dd", {}, String(text)))))));
    }
    parts.charts = charts();
    parts.grid = element("ul", {class: "grid", "aria-label": "Images"});
    parts.empty = element("div", {class: "empty", hidden: true},
      element("p", {}, rows.length ? "No image is like that." : "There are no images in this run."),
      ...(rows.length ? [element("button", {type: "button", on: {click: clear}}, "Show all images")] : []));
    parts.pages = pager("Pages, above the images");
    parts.pagesBelow = pager("Pages, below the images");
    parts.status = element("p", {class: "status", role: "status", "aria-live": "polite"});
    root.replaceChildren(header,
      element("section", {class: "charts", "aria-label": "Histograms"}, ...parts.charts.map(chart => chart.root)),
      controls(),
      element("main", {}, element("div", {class: "between"}, parts.status, parts.pages.root), parts.grid, parts.empty,
        element("div", {class: "between last"}, keysNote(), parts.pagesBelow.root)),
      dialog());
    document.addEventListener("keydown", pressed);
  }

  // Figures that the totals don't have; medians only where all images are known.
  function medians() {
    const {counts} = index.histograms, made = [];
    const middle = key => {
      const values = rows.map(row => row[key]).filter(value => value !== null).sort((a, b) => a - b);
      return values.length ? values[Math.floor(values.length / 2)] : null;
    };
    if (counts.length) made.push(["Nothing found in", whole.format((counts.find(([count]) => count === 0) || [0, 0])[1])]);
    if (!index.done || index.done[0] === index.done[1]) {
      const score = middle("score"), time = middle("time");
      if (score !== null) made.push(["Best score, median", score.toFixed(2)]);
      if (time !== null) made.push(["Time, median", readableSeconds(time)]);
    }
    return made;
  }

  // -- search, sorting and limits

  const labelled = (text, input, more = "") => element("label", {class: `field ${more}`}, element("span", {}, text), input);

  function controls() {
    parts.search = element("input", {type: "search", placeholder: "part of a name", autocomplete: "off", spellcheck: false,
      on: {input: () => change({q: parts.search.value})}});
    parts.sort = element("select", {on: {change: () => {
      const sort = parts.sort.value;
      change({sort, down: sort !== "order" && sort !== "name"}); // figures are first read from the largest
    }}}, ...Object.entries(SORTS).filter(([key]) => key !== "time" || run)
      .map(([key, text]) => element("option", {value: key}, text)));
    parts.direction = element("button", {type: "button", class: "square", on: {click: () => change({down: !state.down})}});
    parts.masks = element("button", {type: "button", "aria-pressed": "true", on: {click: switchMasks}}, "Masks");
    parts.size = element("input", {type: "range", min: 110, max: 420, value: 190, on: {
      input: () => parts.grid.style.setProperty("--row", `${parts.size.value}px`),
      change: () => showCards(), // masks as sharp as the size asks for
    }});
    parts.limits = {};
    const statuses = Object.keys(STATUSES).filter(name => rows.some(row => row.status === name));
    parts.statuses = statuses.map(name => element("input", {type: "checkbox", value: name, on: {change: statusChanged}}));
    const fields = Object.entries(LIMITS).filter(([key]) => key !== "time" || run).map(([key, {title, unit, step}]) => {
      const inputs = ["at least", "at most"].map((bound, side) => element("input", {type: "number", min: 0, step, inputMode: "decimal",
        placeholder: side ? "to" : "from", "aria-label": `${title}${unit ? ` in ${unit}` : ""}, ${bound}`, on: {input: () => limitTyped(key)}}));
      parts.limits[key] = inputs;
      return element("fieldset", {class: "limit"}, element("legend", {}, `${title}${unit ? ` (${unit})` : ""}`), inputs[0], "–", inputs[1]);
    });
    if (statuses.length > 1) {
      fields.push(element("fieldset", {class: "limit"}, element("legend", {}, "Status"), ...parts.statuses.map((box, k) =>
        element("label", {}, box, `${statuses[k]} ${whole.format(rows.filter(row => row.status === statuses[k]).length)}`))));
    }
    parts.filters = element("div", {class: "filters", id: "filters", hidden: true}, ...fields);
    parts.more = element("button", {type: "button", "aria-expanded": "false", "aria-controls": "filters",
      on: {click: () => showFilters(parts.filters.hidden)}}, "Filters");
    parts.chips = element("div", {class: "chips"});
    return element("section", {class: "controls", "aria-label": "Search, sort and filter"},
      element("div", {class: "bar"}, labelled("Search", parts.search, "wide"), labelled("Sort by", parts.sort), parts.direction, parts.more,
        parts.masks, labelled("Size", parts.size, "size")),
      parts.filters, parts.chips);
  }

  function showFilters(on) {
    parts.filters.hidden = !on;
    parts.more.setAttribute("aria-expanded", String(on));
  }

  function statusChanged() {
    const chosen = parts.statuses.filter(box => box.checked).map(box => box.value);
    change({status: chosen.length ? chosen : null});
  }

  function limitTyped(key) {
    const {scale} = LIMITS[key];
    const limits = parts.limits[key].map(input => (input.value === "" || !Number.isFinite(input.valueAsNumber) ? null : input.valueAsNumber / scale));
    change({[key]: limits[0] === null && limits[1] === null ? null : limits}, true);
  }

  function switchMasks() {
    const on = parts.grid.classList.toggle("plain");
    parts.masks.setAttribute("aria-pressed", String(!on));
  }

  function clear() {
    change({...nothing(), sort: state.sort, down: state.down});
    parts.search.focus();
  }

  function change(what, typed = false) {
    Object.assign(state, {page: 1}, what);
    remember("soon");
    refresh(typed);
  }

  // Show what the state says in all fields; not in a limit that is being typed.
  function refresh(typed = false) {
    search();
    const last = Math.max(1, Math.ceil(found.length / PAGE));
    state.page = Math.min(state.page, last);
    if (document.activeElement !== parts.search) parts.search.value = state.q;
    parts.sort.value = state.sort;
    parts.direction.textContent = state.down ? "↓" : "↑";
    const text = state.down ? "Falling; turn round" : "Rising; turn round";
    parts.direction.title = text;
    parts.direction.setAttribute("aria-label", text);
    if (!typed) {
      for (const [key, inputs] of Object.entries(parts.limits)) {
        inputs.forEach((input, side) => {
          const value = state[key] ? state[key][side] : null;
          input.value = value === null ? "" : String(+(value * LIMITS[key].scale).toFixed(3));
        });
      }
    }
    parts.statuses.forEach(box => { box.checked = Boolean(state.status && state.status.includes(box.value)); });
    showChips();
    parts.status.textContent = found.length === rows.length
      ? `${whole.format(rows.length)} ${rows.length === 1 ? "image" : "images"}`
      : `${whole.format(found.length)} of ${whole.format(rows.length)} images`;
    parts.charts.forEach(chart => chart.update());
    [parts.pages, parts.pagesBelow].forEach(each => each.update(last));
    showCards();
    if (document.getElementById("opened").open) showPosition();
  }

  function showChips() {
    const chip = (text, without) => element("button", {type: "button", class: "chip", "aria-label": `Remove ${text}`,
      on: {click: () => { change(without); parts.search.focus(); }}}, text, element("span", {"aria-hidden": "true"}, "×"));
    const chips = [];
    if (state.q) chips.push(chip(`“${state.q}”`, {q: ""}));
    if (state.status) chips.push(chip(state.status.join(", "), {status: null}));
    let limits = 0;
    for (const [key, {title, show}] of Object.entries(LIMITS)) {
      if (!state[key]) continue;
      limits++;
      const [low, high] = state[key];
      const text = low === null ? `≤ ${show(high)}` : high === null ? `≥ ${show(low)}` : low === high ? show(low) : `${show(low)} – ${show(high)}`;
      chips.push(chip(`${title} ${text}`, {[key]: null}));
    }
    if (chips.length > 1) chips.push(element("button", {type: "button", class: "chip clear", on: {click: clear}}, "Clear all"));
    parts.chips.replaceChildren(...chips);
    const filters = limits + (state.status ? 1 : 0);
    parts.more.textContent = filters ? `Filters (${filters})` : "Filters";
  }

  // -- histograms

  function charts() {
    const {counts, scores} = index.histograms, made = [];
    const most = Math.max(0, ...counts.map(([count]) => count)), width = Math.ceil((most + 1) / 24);
    const ofCounts = Array.from({length: Math.ceil((most + 1) / width)}, (_, k) => ({low: k * width, high: (k + 1) * width - 1, all: 0}));
    counts.forEach(([count, images]) => { ofCounts[Math.floor(count / width)].all += images; });
    ofCounts.forEach(bin => {
      bin.label = bin.low === bin.high ? String(bin.low) : `${bin.low}–${bin.high}`;
      bin.about = bin.label === "1" ? "1 instance" : `${bin.label} instances`;
    });
    if (counts.length) made.push(chart("Instances per image", "count", ofCounts));
    const ofScores = scores.map((all, k) => {
      const low = k / scores.length, high = (k + 1) / scores.length;
      // A score on the border belongs to the bin above.
      return {low: +low.toFixed(4), high: k + 1 === scores.length ? 1 : +(high - 0.00005).toFixed(5), all,
        label: k % 4 === 0 ? low.toFixed(1) : "", about: `${low.toFixed(2)} to ${high.toFixed(2)}`};
    });
    if (scores.some(Boolean)) made.push(chart("Best score of an image", "score", ofScores));
    const times = rows.map(row => row.time).filter(time => time !== null).sort((a, b) => a - b);
    if (times.length > 2) {
      // The slowest few would leave no room for the others: the last bin takes them.
      const end = niceStep(times[Math.floor(0.98 * (times.length - 1))] / 20), bins = 20;
      const ofTimes = Array.from({length: bins}, (_, k) => ({low: +(k * end).toFixed(6), high: +((k + 1) * end - 1e-6).toFixed(6), all: 0,
        label: k % 5 ? "" : k ? readableSeconds(k * end) : "0", about: `${readableSeconds(k * end)} to ${readableSeconds((k + 1) * end)}`}));
      ofTimes[bins - 1].high = null;
      ofTimes[bins - 1].about = `more than ${readableSeconds((bins - 1) * end)}`;
      times.forEach(time => { ofTimes[Math.min(bins - 1, Math.floor(time / end))].all++; });
      made.push(chart("Time per image", "time", ofTimes));
    }
    return made;
  }

  const niceStep = step => {
    const power = 10 ** Math.floor(Math.log10(Math.max(step, 1e-6)));
    return [1, 2, 2.5, 5, 10].find(factor => factor * power >= step) * power;
  };

  function svg(tag, attributes, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // Bars that choose a range: click one, drag over several, arrows and Enter; the same again lets go.
  function chart(title, key, bins) {
    const most = Math.max(...bins.map(bin => bin.all), 1), height = 84, n = bins.length, caption = element("span", {class: "muted"});
    const bars = bins.map((bin, k) => {
      const x = `${(100 * (k + 0.08)) / n}%`, width = `${84 / n}%`;
      const all = svg("rect", {x, width, class: "all", y: height - barHeight(bin.all), height: barHeight(bin.all), rx: 2});
      const part = svg("rect", {x, width, class: "part", y: height, height: 0, rx: 2});
      const hit = svg("rect", {x: `${(100 * k) / n}%`, width: `${100 / n}%`, y: 0, height, class: "hit"});
      return svg("g", {role: "button", tabindex: k ? -1 : 0, class: "bin", "aria-pressed": "false",
        "aria-label": `${bin.about}: ${bin.all === 1 ? "1 image" : `${whole.format(bin.all)} images`}`}, hit, all, part);
    });
    function barHeight(images) {
      return images ? Math.max(2, ((height - 4) * images) / most) : 0;
    }
    // As many labels as there is room for.
    const every = Math.ceil((Math.max(...bins.map(bin => bin.label.length)) + 1) * n / 42);
    const labels = bins.map((bin, k) => svg("text", {x: `${key === "count" ? (100 * (k + 0.5)) / n : (100 * k) / n}%`, y: height + 14,
      class: key === "count" ? "middle" : ""}, (key !== "count" || k % every === 0) ? bin.label : ""));
    const picture = svg("svg", {height: height + 18, role: "group", "aria-label": `${title}: choose a range`}, ...bars,
      svg("g", {"aria-hidden": "true"}, ...labels));
    const root = element("div", {class: "chart"}, element("div", {class: "charthead"}, element("h2", {}, title), caption), picture);

    const inRange = bin => state[key] !== null && within(bin.low, state[key]) && (bin.high === null ? state[key][1] === null : within(bin.high, state[key]));
    const tell = k => { caption.textContent = k < 0 ? "" : bars[k].getAttribute("aria-label"); };
    function choose(first, last) {
      const range = [bins[Math.min(first, last)].low, bins[Math.max(first, last)].high];
      const same = state[key] && state[key][0] === range[0] && state[key][1] === range[1];
      change({[key]: same ? null : range});
    }
    let from = -1, to = -1;
    const binAt = event => {
      const box = picture.getBoundingClientRect();
      return Math.min(n - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * n)));
    };
    const mark = () => bars.forEach((bar, k) => bar.classList.toggle("marked", from >= 0 && k >= Math.min(from, to) && k <= Math.max(from, to)));
    picture.addEventListener("pointerdown", event => {
      if (event.button !== 0) return;
      picture.setPointerCapture(event.pointerId);
      from = to = binAt(event);
      mark();
    });
    picture.addEventListener("pointermove", event => {
      tell(binAt(event));
      if (from >= 0) { to = binAt(event); mark(); }
    });
    picture.addEventListener("pointerleave", () => tell(-1));
    const done = event => {
      if (from >= 0 && event.type === "pointerup") choose(from, to);
      from = -1;
      mark();
    };
    picture.addEventListener("pointerup", done);
    picture.addEventListener("pointercancel", done);
    bars.forEach((bar, k) => {
      bar.addEventListener("focus", () => { tell(k); bars.forEach((other, j) => other.setAttribute("tabindex", j === k ? 0 : -1)); });
      bar.addEventListener("blur", () => tell(-1));
      bar.addEventListener("keydown", event => {
        const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
        if (way) bars[Math.min(n - 1, Math.max(0, k + way))].focus();
        else if (event.key === "Enter" || event.key === " ") choose(k, k);
        else return;
        event.preventDefault();
      });
    });

    return {root, update() {
      // All images of the run, and in front those that the other choices leave, where they are known.
      const left = new Array(n).fill(0), step = bins.length > 1 ? bins[1].low - bins[0].low : 1;
      for (const row of matching(key)) {
        if (row[key] === null) continue;
        left[Math.min(n - 1, Math.max(0, Math.floor((row[key] + 1e-9) / step)))]++;
      }
      bars.forEach((bar, k) => {
        const shown = barHeight(Math.min(left[k], bins[k].all)), [, , part] = bar.children;
        part.setAttribute("y", height - shown);
        part.setAttribute("height", shown);
        bar.setAttribute("aria-pressed", String(inRange(bins[k])));
        bar.classList.toggle("out", state[key] !== null && !inRange(bins[k]));
      });
    }};
  }

  // -- pages

  function pager(name) {
    const text = element("span", {class: "page"});
    const button = (label, sign, by) => element("button", {type: "button", class: "square", "aria-label": label, title: label,
      on: {click: () => turn(by)}}, sign);
    const before = button("Previous page", "‹", -1), after = button("Next page", "›", 1);
    const root = element("nav", {class: "pager", "aria-label": name}, before, text, after);
    return {root, update(last) {
      root.hidden = last < 2;
      text.textContent = `Page ${whole.format(state.page)} of ${whole.format(last)}`;
      before.disabled = state.page <= 1;
      after.disabled = state.page >= last;
    }};
  }

  function turn(by) {
    const last = Math.max(1, Math.ceil(found.length / PAGE)), page = Math.min(last, Math.max(1, state.page + by));
    if (page === state.page) return;
    state.page = page;
    remember("push");
    refresh();
    parts.status.scrollIntoView({block: "nearest"});
    live(`Page ${page} of ${last}`);
  }

  const live = text => parts.status.append(element("span", {class: "sv-unseen"}, `. ${text}`));

  // -- cards

  let drawing = [], watcher = null;

  function showCards() {
    const first = (state.page - 1) * PAGE, shown = found.slice(first, first + PAGE);
    drawing = [];
    if (watcher) watcher.disconnect();
    watcher = new IntersectionObserver(entries => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        watcher.unobserve(entry.target);
        wantMasks(entry.target);
      }
    }, {rootMargin: "200px"});
    parts.grid.replaceChildren(...shown.map(cardOf));
    parts.empty.hidden = found.length > 0;
    parts.grid.hidden = found.length === 0;
    for (const canvas of parts.grid.querySelectorAll("canvas")) watcher.observe(canvas);
  }

  function cardOf(row) {
    const ratio = row.width && row.height ? Math.min(2.4, Math.max(0.62, row.width / row.height)) : 4 / 3;
    const link = element("a", {href: hashOf({...state, image: row.key}), on: {click: event => {
      if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
      event.preventDefault();
      open(row, "push");
    }}});
    const card = element("li", {class: `card ${row.status}`}, link);
    card.style.setProperty("--ratio", ratio.toFixed(3));
    const picture = element("div", {class: "thumb"});
    if (row.name !== null) {
      const image = element("img", {src: `${CARDS}${quoted(row.name)}.jpg`, alt: "", decoding: "async", loading: "lazy"});
      image.addEventListener("error", () => image.remove());
      const canvas = element("canvas", {"aria-hidden": "true", width: 1, height: 1});
      canvas.row = row;
      picture.append(image, canvas);
    } else {
      picture.append(element("span", {class: "why"}, row.error || row.status));
    }
    const facts = row.status === "done"
      ? [row.count === 1 ? "1 instance" : `${row.count} instances`, row.score === null ? null : row.score.toFixed(2),
        row.time === null ? null : readableSeconds(row.time)].filter(Boolean)
      : [row.status];
    const cut = row.title.lastIndexOf("/", row.path.length) + 1;
    const name = element("span", {class: "name", title: row.title}, element("span", {}, row.title.slice(cut)));
    if (cut) name.prepend(element("span", {class: "folder"}, row.title.slice(0, cut)));
    link.append(picture, name,
      element("span", {class: "facts"}, ...facts.map((text, k) => element("span", {}, ...(k === 1 && row.score !== null
        ? [element("span", {class: "sv-unseen"}, "best score "), text] : [text])))));
    return card;
  }

  function wantMasks(canvas) {
    fetchCard(canvas.row.name).then(card => {
      if (!card || !canvas.isConnected) return;
      drawing.push([canvas, card]);
      if (drawing.length === 1) requestAnimationFrame(drawSome);
    });
  }

  // A few in each frame: the page stays smooth while masks are decoded.
  function drawSome() {
    const end = performance.now() + 10;
    while (drawing.length && performance.now() < end) {
      const [canvas, card] = drawing.shift();
      if (canvas.isConnected) drawCard(canvas, card);
    }
    if (drawing.length) requestAnimationFrame(drawSome);
  }

  // Paper shows all cards of the page, also those that nobody has scrolled to.
  addEventListener("beforeprint", () => {
    if (!watcher) return;
    watcher.disconnect();
    for (const image of parts.grid.querySelectorAll("img")) image.loading = "eager";
    for (const canvas of parts.grid.querySelectorAll("canvas")) {
      const card = cards.get(canvas.row.name);
      if (card) drawCard(canvas, card);
      else wantMasks(canvas);
    }
  });

  function drawCard(canvas, card) {
    const [rows, columns] = card.maskSize, box = canvas.getBoundingClientRect(), ratio = Math.min(2, globalThis.devicePixelRatio || 1);
    const scale = Math.max(0.05, (Math.min(box.width / columns, box.height / rows) || 0.4) * ratio);
    canvas.width = Math.max(1, Math.round(columns * scale));
    canvas.height = Math.max(1, Math.round(rows * scale));
    const context = canvas.getContext("2d");
    context.scale(canvas.width / columns, canvas.height / rows);
    api.drawMasks(context, card, api.masksOf(card, false).paths, scale, {line: 1.5 * ratio});
  }

  // -- one image, large

  let view = null, viewing = null, opening = 0;

  function dialog() {
    const button = (label, sign, action) => element("button", {type: "button", class: "square", "aria-label": label, title: label,
      on: {click: action}}, sign);
    parts.title = element("h2", {id: "opened-title"});
    parts.position = element("span", {class: "muted"});
    parts.before = button("Previous image (←)", "‹", () => go(-1));
    parts.after = button("Next image (→)", "›", () => go(1));
    parts.body = element("div", {class: "body"});
    parts.dialog = element("dialog", {id: "opened", "aria-labelledby": "opened-title", on: {
      cancel: event => { event.preventDefault(); close(); },
      close, // a browser may do it unasked
      keydown: event => {
        if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=checkbox])")) return;
        const way = {ArrowLeft: -1, ArrowRight: 1, j: 1, k: -1}[event.key];
        if (way) go(way);
        else if (event.key === "Escape") close();
        else return;
        event.preventDefault();
      },
    }}, element("div", {class: "bar"}, parts.before, parts.after, parts.title, parts.position, button("Close (Esc)", "×", close)), parts.body);
    return parts.dialog;
  }

  function open(row, how) {
    state.image = row.key;
    viewing = row;
    remember(how);
    if (!parts.dialog.open) {
      parts.dialog.showModal();
      document.documentElement.classList.add("opened");
    }
    showPosition();
    showImage(row);
  }

  function showPosition() {
    const position = found.indexOf(viewing);
    parts.title.textContent = viewing.title;
    parts.position.textContent = position < 0 ? "not among those found"
      : `${whole.format(position + 1)} of ${whole.format(found.length)}`;
    parts.before.disabled = position <= 0;
    parts.after.disabled = position < 0 || position + 1 >= found.length;
  }

  function showImage(row) {
    const number = ++opening;
    if (row.name === null) {
      leave();
      parts.body.replaceChildren(element("div", {class: "failure", tabIndex: -1},
        element("strong", {}, row.status === "failed" ? "This image has no result" : "This image was not reached"),
        element("p", {}, row.error || row.status)));
      parts.body.firstChild.focus();
      return;
    }
    fetchCard(row.name).then(card => {
      if (number !== opening || !parts.dialog.open) return;
      const size = card ? card.size : [row.width || 4, row.height || 3];
      const picture = {
        name: row.title, size, maskSize: card ? card.maskSize : [size[1], size[0]], instances: card ? card.instances : [],
        layers: card ? card.layers : [], photograph: photographsOf(row),
        note: card ? null : `Its masks are missing: there is no file ${CARDS}${row.name}.js beside this page.`,
        seconds: row.times ? Object.fromEntries([...index.stages.map((stage, k) => [stage, row.times[k]]), ["total", row.time]]) : null,
        links: [["mask", row.mask], ["overlay", row.overlay]].filter(([, path]) => path).map(([text, path]) => ({text, href: quoted(path)})),
      };
      if (view) {
        const inside = parts.dialog.contains(document.activeElement) && !document.activeElement.closest(".sv-side");
        view.show(picture);
        if (!inside || document.activeElement === document.body) view.focus();
      } else {
        const holder = element("div");
        parts.body.replaceChildren(holder);
        view = api.viewer(holder, picture);
        view.focus();
      }
      const position = found.indexOf(row);
      for (const next of [found[position + 1], found[position - 1]]) {
        if (position >= 0 && next && next.name !== null) fetchCard(next.name);
      }
    });
  }

  function leave() {
    if (view) view.destroy();
    view = null;
    parts.body.replaceChildren();
  }

  function go(by) {
    const position = found.indexOf(viewing), next = found[position + by];
    if (position < 0 || !next) return;
    const page = Math.floor((position + by) / PAGE) + 1;
    if (page !== state.page) {
      state.page = page;
      state.image = next.key;
      refresh();
    }
    open(next, "soon");
    for (const button of [parts.before, parts.after]) {
      if (button.disabled && document.activeElement === button && view) view.focus();
    }
  }

  let returning = null;

  function close() {
    if (viewing === null) return;
    if (unwritten !== null) write(unwritten, false);
    const row = viewing, back = history.state && history.state.opened;
    shut();
    state.image = null;
    // Back to where it was opened from, if that was in this page.
    if (back) {
      returning = {page: state.page, row};
      history.back();
    } else {
      remember("now");
      focusCard(row);
    }
  }

  function shut() {
    opening++;
    viewing = null;
    leave();
    if (parts.dialog.open) parts.dialog.close();
    document.documentElement.classList.remove("opened");
  }

  function focusCard(row) {
    const place = found.slice((state.page - 1) * PAGE, state.page * PAGE).indexOf(row);
    if (place >= 0) parts.grid.children[place].querySelector("a").focus();
  }

  // The address has changed: by "back", by a link, or by hand.
  function follow() {
    if (returning) {
      const {page, row} = returning;
      returning = null;
      state.page = page;
      remember("now");
      focusCard(row);
      return;
    }
    const next = stateOf(location.hash);
    if (hashOf(next) === hashOf(state)) return;
    clearTimeout(late);
    unwritten = null;
    const image = next.image === null ? null : rows.find(row => row.key === next.image) || null, before = viewing;
    state = {...next, image: image ? next.image : null};
    refresh();
    if (image) open(image, "now");
    else if (parts.dialog.open) {
      shut();
      focusCard(before);
    }
  }

  // -- keyboard

  function keysNote() {
    const keys = [["/", "search"], ["arrows", "from card to card"], ["Enter", "open"], ["[ ]", "pages"], ["M", "masks"], ["← →", "in an open image, the next ones"], ["?", "there, its keys"]];
    return element("details", {class: "keys"}, element("summary", {}, "Keys"),
      element("dl", {}, ...keys.map(([key, text]) => element("div", {}, element("dt", {}, element("kbd", {}, key)), element("dd", {}, text)))));
  }

  function pressed(event) {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || parts.dialog.open) return;
    if (event.target.matches("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const card = event.target.closest && event.target.closest(".card");
    if (event.key === "/") parts.search.focus();
    else if (event.key === "[") turn(-1);
    else if (event.key === "]") turn(1);
    else if (event.key === "m") switchMasks();
    else if (card && event.key.startsWith("Arrow")) {
      const next = neighbour(card, event.key);
      if (next) next.querySelector("a").focus();
    } else return;
    event.preventDefault();
  }

  function neighbour(card, key) {
    if (key === "ArrowLeft") return card.previousElementSibling;
    if (key === "ArrowRight") return card.nextElementSibling;
    const box = card.getBoundingClientRect(), middle = box.left + box.width / 2, down = key === "ArrowDown";
    let best = null, least = Infinity;
    for (const other of parts.grid.children) {
      const place = other.getBoundingClientRect();
      const below = down ? place.top - box.top : box.top - place.top;
      if (below < 4) continue;
      const far = below * 4 + Math.abs(place.left + place.width / 2 - middle);
      if (far < least) { least = far; best = other; }
    }
    return best;
  }

  function start() {
    readIndex();
    build();
    const asked = stateOf(location.hash), image = asked.image === null ? null : rows.find(row => row.key === asked.image);
    state = {...asked, image: null};
    if (["score", "area", "time"].some(key => state[key]) || state.status) showFilters(true);
    refresh();
    if (image) {
      const position = found.indexOf(image);
      if (position >= 0) { state.page = Math.floor(position / PAGE) + 1; refresh(); }
      open(image, "now");
    }
    addEventListener("popstate", follow);
    addEventListener("hashchange", follow);
  }

  // The times come with a script further down.
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
