
  // Cards

  const card = byId("card");
  const withoutCard = () => history.replaceState(null, "", location.pathname + location.search);
  byId("close").addEventListener("click", () => card.close());
  card.addEventListener("click", (event) => { if (event.target === card) card.close(); });
  card.addEventListener("close", () => { if (location.hash.startsWith("#feature-")) withoutCard(); });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a.open");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    openAt(link.getAttribute("href"));
  });
  addEventListener("hashchange", () => openAt(location.hash));

  // A card has an address, so that a link to it can be kept and sent
  function openAt(address) {
    const found = /^#feature-(\d+)-(\d+)$/.exec(address);
    if (!found || Number(found[1]) >= data.dictionaries.length) return;
    history.replaceState(null, "", address);
    openCard(Number(found[1]), Number(found[2]));
  }

  function openCard(index, feature) {
    const from = dictionary(index);
    const label = labelOf(from, feature);
    const evidence = from.evidence[feature];
    byId("card-h").replaceChildren(label ? element("b", {}, label) : `Feature ${feature}`, label ? element("span", { class: "id" }, ` feature ${feature}`) : "");
    byId("card-body").replaceChildren(headline(from, feature), ...contextParts(from, feature, evidence), ...timelines(from, feature),
      ...evidenceParts(from, feature, evidence), figures(from, feature), flagForm(from, feature, label));
    if (!card.open) card.showModal();
    card.scrollTop = 0;
  }

  function headline(from, feature) {
    const row = from.place.get(feature);
    if (row === undefined) return element("p", { class: "dim" }, "Its figures are not on this page, which holds the largest features only.");
    const [lead, margin] = ["lead", "lead_margin"].map((name) => from.shown.find((column) => column.name === name));
    const beyond = from.columns.clear[row] ? "beyond chance" : "not beyond chance";
    return element("p", { class: "headline" }, element("b", { class: from.columns.lead[row] > 0 ? "up" : "down" }, `${from.heading} ${written(from, lead, row)}${from.unit}`),
      element("span", { class: "dim" }, ` ± ${written(from, margin, row)}, ${beyond}`));
  }

  function figures(from, feature) {
    const row = from.place.get(feature);
    if (row === undefined) return "";
    return element("details", {}, element("summary", {}, "All its figures"),
      element("dl", { class: "figures" }, ...from.shown.map((column) => element("div", {},
        element("dt", { "data-tip": column.name === "lead" ? from.lead : column.name }, column.heading), element("dd", {}, written(from, column, row))))));
  }

  function mapRow(map, feature) {
    const row = map.features.indexOf(feature);
    if (row < 0) return null;
    map.decoded = map.decoded || floats(map.values);
    const width = map.bins.length;
    return map.decoded.subarray(row * width, (row + 1) * width);
  }

  const timelines = (from, feature) => Object.values(from.maps).map((map) => timeline(map, feature)).filter(Boolean);

  function timeline(map, feature) {
    const values = mapRow(map, feature);
    if (!values) return null;
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    const [first, last] = [map.bins[0][0], map.bins[map.bins.length - 1][1]];
    const set = (node, attributes) => { for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value); svg.append(node); };
    svg.setAttribute("viewBox", `0 0 ${values.length} 2`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("class", "spark");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${map.heading}, steps ${first} to ${last}: ${Array.from(values, (value) => signed(value, 2)).join(", ")}`);
    const largest = Math.max(...Array.from(values, (value) => Math.abs(value) || 0)) || 1;
    values.forEach((value, bin) => {
      if (!Number.isFinite(value)) return;
      const height = Math.abs(value) / largest;
      set(document.createElementNS(space, "rect"), { x: bin + 0.08, width: 0.84, y: value > 0 ? 1 - height : 1, height, class: value > 0 ? "up" : "down" });
    });
    set(document.createElementNS(space, "line"), { x1: 0, x2: values.length, y1: 1, y2: 1, "vector-effect": "non-scaling-stroke" });
    return element("figure", { class: "chart" }, element("figcaption", {}, `Over the run: ${map.heading} `, element("span", { class: "dim" }, `${map.unit}, steps ${first} to ${last}; the tallest is ${plain(largest)}`)), svg);
  }

  function evidenceParts(from, feature, evidence) {
    const link = evidence && evidence.link ? evidence.link : from.neuronpedia ? `https://www.neuronpedia.org/${from.neuronpedia}/${feature}` : null;
    const parts = [];
    if (link) parts.push(element("p", {}, element("a", { href: link, target: "_blank", rel: "noopener noreferrer" }, "On Neuronpedia ↗")));
    if (!evidence) return parts;
    for (const [title, words] of [["Raises the logits of", evidence.promotes], ["Lowers those of", evidence.suppresses]]) {
      if (words.length) parts.push(element("h3", {}, title), element("ul", { class: "chips" }, ...words.map((word) => element("li", {}, element("bdi", {}, word.trim() || JSON.stringify(word))))));
    }
    return parts;
  }

  // What the feature is active on: words, contexts, density, histogram

  function contextParts(from, feature, evidence) {
    const words = wordsOf(from, feature);
    const parts = words ? [element("p", { class: "words" }, element("bdi", {}, words))] : [];
    if (!evidence || !evidence.contexts.length) return parts.concat(element("p", { class: "dim" }, "No contexts were kept for this feature."));
    const of = (kind) => evidence.contexts.filter((context) => context.kind === kind);
    const [strong, drawn] = [of("strongest"), of("drawn")];
    if (strong.length) parts.push(element("h3", {}, "Most active at"), contextList(strong.slice(0, 4)));
    const rest = strong.slice(4);
    if (rest.length || drawn.length) {
      parts.push(element("details", {}, element("summary", {}, `More contexts (${rest.length + drawn.length})`),
        rest.length ? contextList(rest) : null, drawn.length ? element("h3", {}, "Drawn at random where it is active") : null, drawn.length ? contextList(drawn) : null));
    }
    if (evidence.density !== null) parts.push(element("p", { class: "dim" }, `Active on ${plain(100 * evidence.density, 2)}% of the answers' tokens.`));
    if (evidence.histogram) parts.push(histogramOf(evidence.histogram));
    return parts;
  }

  const contextList = (contexts) => element("ul", { class: "contexts" }, ...contexts.map(contextOf));

  function contextOf(context) {
    const where = context.row < 0 ? context.source : `${context.source}, row ${context.row}`;
    return element("li", {},
      element("span", { class: "side" }, `${where} · ${plain(context.activation)}`),
      element("bdi", {}, context.prompt.trim() ? element("span", { class: "dim" }, `${context.prompt.trim()} ▸ `) : null, context.before + context.at.slice(0, context.at.length - context.at.trimStart().length), element("mark", {}, context.at.trimStart() || context.at), context.after));
  }

  function histogramOf(histogram) {
    const sides = Object.entries(histogram.sides);
    const tallest = Math.max(...sides.flatMap(([, counts]) => counts), 1);
    const bars = (counts) => element("span", { class: "bars", "aria-hidden": "true" }, ...counts.map((count) => element("span", { style: `height:${Math.ceil((100 * count) / tallest)}%` })));
    const told = (counts) => counts.map((count, bin) => (count ? `up to ${histogram.upper[bin]}: ${count}` : "")).filter(Boolean).join(", ");
    return element("figure", { class: "histogram" }, element("figcaption", {}, "Its largest activation in an answer ", element("span", { class: "dim" }, `number of answers, from 0 to ${histogram.upper[histogram.upper.length - 1]}`)),
      ...sides.map(([side, counts]) => element("div", { role: "img", "aria-label": `${side}: ${told(counts) || "none"}` }, element("span", { class: "side" }, side), bars(counts))));
  }

  function flagForm(from, feature, label) {
    if (!from.columns.clear.some((value) => value > 0)) {
      return element("p", { class: "dim" }, "Nothing is beyond chance here, so no feature is offered to flag: too few pairs to tell; audit more.");
    }
    const row = from.place.get(feature);
    const up = row === undefined || from.columns.lead[row] >= 0;
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

