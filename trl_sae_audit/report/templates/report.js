"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);

  // Elements are made and filled with text, never with markup: what stands in the data is data.
  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") made.className = value;
      else if (name === "style") made.style.cssText = value;
      else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  // Numbers

  function bytes(text) {
    const binary = atob(text);
    const made = new Uint8Array(binary.length);
    for (let place = 0; place < binary.length; place += 1) made[place] = binary.charCodeAt(place);
    return made.buffer;
  }
  const floats = (text) => new Float32Array(bytes(text));
  const minus = (text) => text.replace("-", "−");
  function digits(value, count) {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(count - 1);
    return String(Number(value.toPrecision(count)));
  }
  const plain = (value, count = 3) => (Number.isFinite(value) ? minus(digits(value, count)) : "–");
  const signed = (value, count = 3) => (Number.isFinite(value) ? (value > 0 ? "+" : "") + plain(value, count) : "–");
  const probability = (value) => (!Number.isFinite(value) ? "–" : value < 0.001 ? "<0.001" : plain(value, 2));
  const percent = (value) => (Number.isFinite(value) ? plain(100 * value, 2) + "%" : "–");

  // Theme

  const themeButton = byId("theme");
  const isDark = () => getComputedStyle(root).colorScheme === "dark";
  const nameTheme = () => { themeButton.textContent = isDark() ? "Light" : "Dark"; };
  themeButton.hidden = false;
  themeButton.setAttribute("aria-label", "Switch between light and dark");
  themeButton.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
  nameTheme();

  // The dictionaries, their columns unpacked when first looked at

  const unpacked = new Map();
  function dictionary(index) {
    if (!unpacked.has(index)) {
      const stored = data.dictionaries[index];
      const columns = {};
      for (const [name, text] of Object.entries(stored.columns)) columns[name] = floats(text);
      const feature = new Uint32Array(bytes(stored.feature));
      const place = new Map();
      feature.forEach((number, row) => place.set(number, row));
      unpacked.set(index, { ...stored, feature, columns, place });
    }
    return unpacked.get(index);
  }
  const labelOf = (from, feature) => from.labels[feature] || (from.evidence[feature] || {}).label || "";

  // Table of all features

  const scaled = (from) => (value) => signed(value * from.factor);
  const COLUMNS = [
    ["attribution", "attribution", (from) => scaled(from)],
    ["margin", "±", (from) => (value) => plain(value * from.factor, 2)],
    ["q_value", "q", () => probability],
    ["share", "share", () => percent],
    ["lift", "lift", () => (value) => plain(value, 2)],
    ["chosen", data.sides ? data.sides[0] : "chosen", (from) => scaled(from)],
    ["rejected", data.sides ? data.sides[1] : "rejected", (from) => scaled(from)],
    ["trend_tau", "trend", () => (value) => signed(value, 2)],
    ["trend_q_value", "trend q", () => probability],
    ["length_correlation", "length corr.", () => (value) => signed(value, 2)],
    ["disparity", "disparity", () => (value) => signed(value, 2)],
    ["predicted_change", "predicted", () => (value) => signed(value, 2)],
    ["active_examples", "active in", () => (value) => plain(value)],
  ];
  const PAGE = 25;
  const state = { dictionary: 0, sort: "size", ascending: false, page: 0, rows: [] };
  const table = byId("table");

  function columnsOf(from) {
    return COLUMNS.filter(([name]) => name in from.columns && (data.sides || (name !== "chosen" && name !== "rejected")));
  }

  function selectRows() {
    const from = dictionary(state.dictionary);
    const query = byId("search").value.trim().toLowerCase();
    const clearOnly = byId("clear-only").checked;
    const q = from.columns.q_value;
    const matches = (row) => {
      const feature = from.feature[row];
      if (clearOnly && !(q[row] < 0.05)) return false;
      if (!query) return true;
      if (/^\d+$/.test(query)) return String(feature).startsWith(query);
      const evidence = from.evidence[feature];
      const words = evidence ? evidence.promotes.concat(evidence.suppresses).join(" ") : "";
      return `${labelOf(from, feature)} ${words}`.toLowerCase().includes(query);
    };
    const rows = [];
    for (let row = 0; row < from.count; row += 1) if (matches(row)) rows.push(row);
    state.rows = rows;
    if (state.sort === "size") return; // as they come
    const values = state.sort === "feature" ? from.feature : from.columns[state.sort];
    const sign = state.ascending ? 1 : -1;
    rows.sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y) || a - b;
    });
  }

  function sortBy(name) {
    state.ascending = state.sort === name ? !state.ascending : name === "feature" || name.endsWith("q_value");
    state.sort = name;
    state.page = 0;
    selectRows();
    showRows();
    table.querySelector(`button[data-sort="${name}"]`).focus();
  }

  function header(name, text, numeric) {
    const sorted = state.sort === name;
    return element("th", { scope: "col", class: numeric ? "number" : "", "aria-sort": sorted ? (state.ascending ? "ascending" : "descending") : null },
      element("button", { type: "button", "data-sort": name, onclick: () => sortBy(name) }, text));
  }

  function opener(feature) {
    return element("button", { type: "button", class: "open", "data-feature": feature }, String(feature));
  }

  function showRows() {
    const from = dictionary(state.dictionary);
    const columns = columnsOf(from);
    table.tHead.replaceChildren(element("tr", {}, header("feature", "feature", false),
      ...columns.map(([name, text]) => header(name, name === "attribution" ? text + from.unit : text, true))));
    const shown = state.rows.slice(state.page * PAGE, (state.page + 1) * PAGE);
    table.tBodies[0].replaceChildren(...shown.map((row) => {
      const feature = from.feature[row];
      const label = labelOf(from, feature);
      return element("tr", {},
        element("th", { scope: "row" }, opener(feature), label ? " " : "", label ? element("bdi", {}, label) : null),
        ...columns.map(([name, , format]) => element("td", { class: "number" }, format(from)(from.columns[name][row]))));
    }));
    const pages = Math.max(1, Math.ceil(state.rows.length / PAGE));
    byId("page").textContent = `${state.page + 1} of ${pages.toLocaleString("en")}`;
    byId("earlier").disabled = state.page === 0;
    byId("later").disabled = state.page + 1 >= pages;
    const all = from.count < from.size ? `the ${from.count.toLocaleString("en")} largest of ${from.size.toLocaleString("en")}` : from.size.toLocaleString("en");
    byId("found").textContent = `${state.rows.length.toLocaleString("en")} of ${all} features` +
      (state.sort === "size" ? ", the largest attribution in either direction first" : "");
  }

  function refresh() {
    state.page = 0;
    selectRows();
    showRows();
  }

  let waiting = 0;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(refresh, 120); });
  byId("clear-only").addEventListener("change", refresh);
  byId("earlier").addEventListener("click", () => { state.page -= 1; showRows(); });
  byId("later").addEventListener("click", () => { state.page += 1; showRows(); });
  if (byId("dictionary")) byId("dictionary").addEventListener("change", (event) => { state.dictionary = Number(event.target.value); refresh(); });
  byId("all").hidden = false;
  refresh();

  // Cards

  const card = byId("card");
  byId("close").addEventListener("click", () => card.close());
  card.addEventListener("click", (event) => { if (event.target === card) card.close(); });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.open");
    if (!button) return;
    const panel = button.closest("[data-dictionary]");
    const index = panel ? Number(panel.dataset.dictionary) : button.closest("#all") ? state.dictionary : 0;
    openCard(index, Number(button.dataset.feature));
  });

  function openCard(index, feature) {
    const from = dictionary(index);
    const label = labelOf(from, feature);
    byId("card-h").textContent = label ? `Feature ${feature}: ${label}` : `Feature ${feature}`;
    const evidence = from.evidence[feature];
    byId("card-body").replaceChildren(figures(from, feature), timeline(from, feature) || "", ...evidenceParts(from, feature, evidence), flagForm(from, feature, label));
    if (!card.open) card.showModal();
    card.scrollTop = 0;
  }

  function figures(from, feature) {
    const row = from.place.get(feature);
    if (row === undefined) return element("p", { class: "dim" }, "Its figures are not on this page, which holds the largest features only.");
    const pairs = columnsOf(from).map(([name, text, format]) => [name === "attribution" ? text + from.unit : text, format(from)(from.columns[name][row])]);
    return element("dl", { class: "figures" }, ...pairs.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  }

  function mapRow(from, feature) {
    const row = from.map ? from.map.features.indexOf(feature) : -1;
    if (row < 0) return null;
    from.map.decoded = from.map.decoded || floats(from.map.values);
    const width = from.map.bins.length;
    return from.map.decoded.subarray(row * width, (row + 1) * width);
  }

  function timeline(from, feature) {
    const values = mapRow(from, feature);
    if (!values) return null;
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    const [first, last] = [from.map.bins[0][0], from.map.bins[from.map.bins.length - 1][1]];
    const set = (node, attributes) => { for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value); svg.append(node); };
    svg.setAttribute("viewBox", `0 0 ${values.length} 2`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("class", "spark");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `Attribution a step over steps ${first} to ${last}: ${Array.from(values, (value) => signed(value, 2)).join(", ")}`);
    const largest = Math.max(...Array.from(values, (value) => Math.abs(value) || 0)) || 1;
    values.forEach((value, bin) => {
      if (!Number.isFinite(value)) return;
      const height = Math.abs(value) / largest;
      set(document.createElementNS(space, "rect"), { x: bin + 0.08, width: 0.84, y: value > 0 ? 1 - height : 1, height, class: value > 0 ? "up" : "down" });
    });
    set(document.createElementNS(space, "line"), { x1: 0, x2: values.length, y1: 1, y2: 1, "vector-effect": "non-scaling-stroke" });
    return element("figure", { class: "chart" }, element("figcaption", {}, "Over the run ", element("span", { class: "dim" }, `attribution a step, steps ${first} to ${last}; the tallest is ${plain(largest)}`)), svg);
  }

  function evidenceParts(from, feature, evidence) {
    const link = evidence && evidence.link ? evidence.link : from.neuronpedia ? `https://www.neuronpedia.org/${from.neuronpedia}/${feature}` : null;
    const parts = [];
    if (link) parts.push(element("p", {}, element("a", { href: link, target: "_blank", rel: "noopener noreferrer" }, "On Neuronpedia ↗")));
    if (!evidence) return parts.concat(element("p", { class: "dim" }, "No examples were gathered for this feature."));
    for (const [title, words] of [["Raises the logits of", evidence.promotes], ["Lowers those of", evidence.suppresses]]) {
      parts.push(element("h3", {}, title), element("ul", { class: "chips" }, ...words.map((word) => element("li", {}, element("bdi", {}, word.trim() || JSON.stringify(word))))));
    }
    if (!evidence.examples.length) return parts;
    const box = element("div", {});
    const shade = (kind) => box.replaceChildren(...evidence.examples.map((example) => exampleOf(example, kind)));
    const choice = (kind, text) => element("label", {}, element("input", { type: "radio", name: "shade", value: kind, ...(kind === "attribution_of" ? { checked: "" } : {}), onchange: () => shade(kind) }), ` ${text}`);
    parts.push(element("h3", {}, "Examples that drive it"),
      element("fieldset", { class: "scales" }, element("legend", { class: "hide" }, "Shade tokens by"), choice("attribution_of", "shaded by attribution: where the loss pushes"), choice("activation", "by activation: where the feature is on")), box);
    shade("attribution_of");
    return parts;
  }

  function exampleOf(example, kind) {
    return element("article", { class: "example" },
      element("p", {}, element("b", {}, `Row ${example.row}`), ` pushes it ${example.attribution > 0 ? "up" : "down"}: ${signed(example.attribution)} of the whole data's mean loss`),
      example.prompt ? element("p", { class: "prompt" }, element("bdi", {}, example.prompt)) : null,
      ...example.answers.flatMap((answer) => [element("div", { class: "side" }, answer.side), tokensOf(answer, kind)]));
  }

  function tokensOf(answer, kind) {
    const values = answer[kind];
    const largest = Math.max(...values.map(Math.abs), 0) || 1;
    const spans = answer.tokens.map((token, place) => {
      const part = values[place] / largest;
      const colour = kind === "activation" ? "var(--r2)" : part > 0 ? "var(--up)" : "var(--down)";
      const strength = Math.round(44 * Math.abs(part));
      return element("span", { style: strength ? `background:color-mix(in srgb, ${colour} ${strength}%, transparent)` : "",
        title: `activation ${plain(answer.activation[place])}, attribution ${signed(answer.attribution_of[place])}` }, spaced(answer.tokens, place));
    });
    const edge = (count) => (count ? element("span", { class: "dim" }, ` … ${count} more `) : null);
    const strongest = values.indexOf(values.reduce((best, value) => (Math.abs(value) > Math.abs(best) ? value : best), 0));
    return element("p", { class: "tokens" }, element("bdi", {}, edge(answer.before), ...spans, edge(answer.after)), answer.text || "",
      strongest >= 0 && answer.tokens.length ? element("span", { class: "hide" }, ` Strongest on: ${answer.tokens[strongest]}`) : null);
  }

  // Word-level tokenizers give words without spaces; then a space stands between them.
  function spaced(tokens, place) {
    const separate = tokens.length > 2 && !tokens.some((token) => /\s/.test(token));
    return separate && place < tokens.length - 1 ? tokens[place] + " " : tokens[place];
  }

  function flagForm(from, feature, label) {
    const row = from.place.get(feature);
    const up = row === undefined || from.columns.attribution[row] >= 0;
    const labelField = element("input", { type: "text", value: label, "data-field": "label" });
    const reasonField = element("input", { type: "text", "data-field": "reason", placeholder: "why it should not be taught" });
    const direction = element("select", { "data-field": "direction" }, ...[["up", "should not be strengthened"], ["down", "should not be weakened"], ["both", "should not move"]]
      .map(([value, text]) => element("option", { value, ...((up ? "up" : "down") === value ? { selected: "" } : {}) }, text)));
    const preview = element("pre", { tabindex: "0", "aria-label": "Entry for flags.yaml" });
    const status = element("span", { role: "status", "aria-live": "polite", class: "dim" });
    // a JSON string is a YAML string
    const entry = () => [
      `- dictionary: ${JSON.stringify(from.name)}`, `  feature: ${feature}`, `  label: ${JSON.stringify(labelField.value)}`,
      `  reason: ${JSON.stringify(reasonField.value)}`, "  weight: 1.0", `  direction: ${direction.value}`, `  identity: ${JSON.stringify(from.identity)}`, "",
    ].join("\n");
    const update = () => { preview.textContent = entry(); status.textContent = ""; };
    for (const field of [labelField, reasonField, direction]) field.addEventListener("input", update);
    const copy = element("button", { type: "button", id: "copy", onclick: () => copyText(entry(), status) }, "Copy for flags.yaml");
    update();
    return element("div", { class: "flag" }, element("h3", {}, "Flag it"),
      element("p", { class: "dim" }, "Paste the entry under “flags:” in flags.yaml; filter and shaping read it. The content hash keeps it from being read in another dictionary."),
      element("div", { class: "fields" }, element("label", {}, "Label", labelField), element("label", {}, "Reason", reasonField), element("label", {}, "In training it", direction)),
      preview, element("p", {}, copy, " ", status));
  }

  async function copyText(text, status) {
    if (navigator.clipboard && window.isSecureContext) {
      try {
        await navigator.clipboard.writeText(text);
        status.textContent = "Copied.";
        return;
      } catch { /* not allowed here: the older way below */ }
    }
    const area = element("textarea", { style: "position:fixed;opacity:0" });
    area.value = text;
    card.append(area);
    area.select();
    status.textContent = document.execCommand("copy") ? "Copied." : "Select the entry above and copy it.";
    area.remove();
  }

  // Curriculum maps

  for (const box of document.querySelectorAll("[data-map]")) {
    const index = Number(box.dataset.map);
    const { map } = data.dictionaries[index];
    const picture = box.querySelector(".map-picture");
    const cursor = box.querySelector(".cursor");
    const readout = box.querySelector(".readout");
    const columns = map.bins.length;
    const at = { row: 0, column: 0 };

    const groupOf = (row) => {
      let first = 0;
      for (let group = 0; group < map.rows.length; group += 1) {
        if (row < first + map.rows[group]) return { group, within: row - first };
        first += map.rows[group];
      }
      return null;
    };
    const rowAt = (line) => {
      let first = 0;
      for (let group = 0; group < map.rows.length; group += 1) {
        if (line < map.starts[group] + map.rows[group]) return first + Math.max(0, line - map.starts[group]);
        first += map.rows[group];
      }
      return first - 1;
    };

    function point(row, column) {
      at.row = Math.min(map.features.length - 1, Math.max(0, row));
      at.column = Math.min(columns - 1, Math.max(0, column));
      const { group, within } = groupOf(at.row);
      const from = dictionary(index);
      const feature = map.features[at.row];
      const label = labelOf(from, feature);
      const [first, last] = map.bins[at.column];
      const line = map.starts[group] + within;
      cursor.hidden = false;
      cursor.style.cssText = `left:${(100 * at.column) / columns}%;width:${100 / columns}%;top:${(100 * line) / map.height}%;height:${100 / map.height}%`;
      readout.textContent = `Group ${map.names[group]}, feature ${feature}${label ? ` (${label})` : ""}, ` +
        `${first === last ? `step ${first}` : `steps ${first} to ${last}`}: ${signed(mapRow(from, feature)[at.column])} a step`;
    }
    function pointAt(event) {
      const area = picture.getBoundingClientRect();
      point(rowAt(Math.floor(((event.clientY - area.top) / area.height) * map.height)), Math.floor(((event.clientX - area.left) / area.width) * columns));
    }
    picture.addEventListener("pointermove", pointAt);
    picture.addEventListener("click", (event) => { pointAt(event); openCard(index, map.features[at.row]); });
    picture.addEventListener("focus", () => point(at.row, at.column));
    picture.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-10, 0], PageDown: [10, 0] };
      if (event.key in steps) point(at.row + steps[event.key][0], at.column + steps[event.key][1]);
      else if (event.key === "Enter") openCard(index, map.features[at.row]);
      else return;
      event.preventDefault();
    });
  }

  if (data.reload) setTimeout(() => { if (!card.open) location.reload(); }, 1000 * data.reload);
})();
