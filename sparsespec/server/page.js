"use strict";
// A photograph goes to the server this page is from; what comes back is shown with the viewer.
(() => {
  const LAYERS = 4;
  const SIDES = [336, 448, 672, 896, 1344];
  const at = id => document.getElementById(id);
  const here = document.baseURI.replace(/[?#].*$/, "").replace(/[^/]*$/, "");
  let view = null, file = null, url = null, found = null, asking = null;

  // -- asking

  function address(more = {}) {
    const query = new URLSearchParams();
    if (at("model").value && !at("model-choice").hidden) query.set("model", at("model").value);
    if (at("count").value) query.set("n_instances", at("count").value);
    if (at("side").value) query.set("long_side", at("side").value);
    for (const [name, value] of Object.entries(more)) query.set(name, value);
    const text = query.toString();
    return "segment" + (text ? "?" + text : "");
  }

  function post(accept, more, signal) {
    // Browsers do not know the types of all images; the server looks at the bytes.
    const headers = {Accept: accept, "Content-Type": "application/octet-stream"};
    return fetch(address(more), {method: "POST", body: file, headers, signal});
  }

  async function ask() {
    if (!file) return;
    if (!at("count").checkValidity()) return at("count").reportValidity();
    if (asking) asking.abort();
    const mine = (asking = new AbortController());
    busy(`Looking at ${file.name || "the photograph"} …`);
    try {
      const began = performance.now();
      const answer = await post("application/json", {layers: LAYERS}, mine.signal);
      if (!answer.ok) throw await problemOf(answer);
      const document_ = await answer.json();
      if (mine !== asking) return;
      show(document_, secondsOf(answer), (performance.now() - began) / 1000);
    } catch (error) {
      if (mine === asking && error.name !== "AbortError") complain(error);
    } finally {
      if (mine === asking) {
        asking = null;
        document.body.classList.remove("busy");
      }
    }
  }

  // The stages' seconds are in a header: "read;dur=1.5, features;dur=180".
  function secondsOf(answer) {
    const seconds = {};
    for (const part of (answer.headers.get("Server-Timing") || "").split(",")) {
      const [, name, ms] = /^\s*([\w-]+);dur=([\d.]+)/.exec(part) || [];
      if (name && name !== "upload" && name !== "wait") seconds[name] = ms / 1000;
    }
    return Object.keys(seconds).length ? seconds : null;
  }

  async function problemOf(answer) {
    let said = {};
    try {
      said = await answer.json();
    } catch { /* a proxy in between has answered */ }
    const wait = answer.headers.get("Retry-After");
    const error = new Error(said.detail || `The server answered ${answer.status}.`);
    error.title = said.title || "Not done";
    error.advice = wait ? `Try again in ${wait} s.` : said.advice || "";
    return error;
  }

  // -- showing

  function show(coco, seconds, whole) {
    const image = coco.images[0];
    found = coco;
    const picture = {
      name: file.name || "photograph",
      size: [image.width, image.height],
      photograph: [url],
      maskSize: [image.height, image.width],
      instances: coco.annotations.map(({label, score, bbox, area, segmentation}) =>
        ({label, score, box: bbox, area, rle: segmentation.counts})),
      layers: coco.layers || [],
      seconds,
    };
    at("problem").hidden = true;
    at("result").hidden = false;
    if (view) view.show(picture);
    else view = sparsespec.viewer(at("view"), picture);
    const n = picture.instances.length;
    say(`${n === 0 ? "No object" : n === 1 ? "1 object" : n + " objects"} in ${whole.toFixed(1)} s.`);
  }

  function say(text) {
    at("status").textContent = text;
  }

  function busy(text) {
    document.body.classList.add("busy");
    at("problem").hidden = true;
    say(text);
  }

  function complain(error) {
    const network = error instanceof TypeError;
    const lines = network
      ? ["No answer from the server.", "It may have been stopped, or the photograph is too large for it."]
      : [`${error.title}: ${error.message}`, error.advice];
    at("problem").replaceChildren(...lines.filter(Boolean).map(text => {
      const line = document.createElement("p");
      line.textContent = text;
      return line;
    }));
    at("problem").hidden = false;
    at("result").hidden = true;
    found = null;
    say("");
  }

  // -- choosing

  function take(chosen) {
    if (!chosen) return;
    file = chosen;
    if (url) URL.revokeObjectURL(url);
    url = URL.createObjectURL(file);
    ask();
  }

  at("file").addEventListener("change", event => {
    take(event.target.files[0]);
    event.target.value = ""; // the same file again is a choice, too
  });
  for (const id of ["model", "count", "side"]) at(id).addEventListener("change", ask);
  at("form").addEventListener("submit", event => {
    event.preventDefault();
    ask();
  });
  document.addEventListener("dragover", event => {
    event.preventDefault();
    document.body.classList.add("over");
  });
  document.addEventListener("dragleave", event => {
    if (!event.relatedTarget) document.body.classList.remove("over");
  });
  document.addEventListener("drop", event => {
    event.preventDefault();
    document.body.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", event => {
    take([...event.clipboardData.files].find(({type}) => type.startsWith("image/")));
  });

  // -- saving

  function download(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  for (const button of at("save").querySelectorAll("button")) {
    button.addEventListener("click", async () => {
      const name = (file.name || "photograph").replace(/\.[^.]*$/, "") + button.dataset.ending;
      if (button.dataset.accept === "application/json") {
        const {layers: _, ...coco} = found;
        coco.images = [{...coco.images[0], file_name: file.name || ""}];
        return download(new Blob([JSON.stringify(coco)], {type: "application/json"}), name);
      }
      button.disabled = true;
      try {
        const answer = await post(button.dataset.accept);
        if (!answer.ok) throw await problemOf(answer);
        download(await answer.blob(), name);
      } catch (error) {
        complain(error);
      } finally {
        button.disabled = false;
      }
    });
  }

  // -- what this server has

  at("examples").textContent = [
    `curl --data-binary @photo.jpg ${here}segment`,
    `curl --data-binary @photo.jpg -H 'Accept: image/png' ${here}segment -o labels.png`,
    `curl -F image=@photo.jpg -H 'Accept: image/jpeg' ${here}segment -o overlay.jpg`,
    `curl --data-binary @photo.jpg '${here}segment?n_instances=3&polygons=true'`,
  ].join("\n");

  async function learn() {
    const answer = await fetch("openapi.json");
    const parameters = (await answer.json()).paths["/segment"].post.parameters;
    const schema = name => parameters.find(parameter => parameter.name === name).schema;
    const models = schema("model").enum;
    at("model").replaceChildren(...models.map(name => new Option(name, name)));
    at("model-choice").hidden = models.length < 2;
    at("count").max = schema("n_instances").oneOf[0].maximum;
    const most = schema("long_side").maximum;
    at("side").append(...SIDES.filter(side => side <= most).map(side => new Option(`${side} pixels`, side)));
  }

  learn().catch(() => {});
})();
