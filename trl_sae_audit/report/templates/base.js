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

  // Places that survive a reload: what is open, where the page stands, how tables are sorted

  const kept = (() => {
    const name = `trl-sae-audit ${location.pathname}`;
    let stored = {};
    try { stored = JSON.parse(sessionStorage.getItem(name)) || {}; } catch { /* no storage here: nothing is kept */ }
    return {
      get: (key, otherwise) => (key in stored ? stored[key] : otherwise),
      set: (key, value) => {
        stored[key] = value;
        try { sessionStorage.setItem(name, JSON.stringify(stored)); } catch { /* as above */ }
      },
    };
  })();

  // Theme

  const themeButton = byId("theme");
  const isDark = () => getComputedStyle(root).colorScheme === "dark";
  const nameTheme = () => { themeButton.textContent = isDark() ? "Light" : "Dark"; };
  if (kept.get("theme")) root.dataset.theme = kept.get("theme");
  themeButton.hidden = false;
  themeButton.setAttribute("aria-label", "Switch between light and dark");
  themeButton.addEventListener("click", () => { kept.set("theme", root.dataset.theme = isDark() ? "light" : "dark"); nameTheme(); });
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
  const wordsOf = (from, feature) => from.words[feature] || (from.evidence[feature] || {}).words || "";

  // How a number of a column is written
  const FORMS = {
    lead: (from) => (value) => signed(value * from.factor),
    lead_margin: (from) => (value) => plain(value * from.factor, 2),
    scaled: (from) => (value) => signed(value * from.loss_factor),
    scaled_margin: (from) => (value) => plain(value * from.loss_factor, 2),
    signed: () => (value) => signed(value, 2),
    plain: () => (value) => plain(value, 2),
    percent: () => percent,
    probability: () => probability,
  };
  const written = (from, column, row) => FORMS[column.form](from)(from.columns[column.name][row]);

  const addressOf = (index, feature) => `#feature-${index}-${feature}`;
  function featureLink(index, feature, name = String(feature)) {
    return element("a", { class: "open", href: addressOf(index, feature) }, name);
  }
