
  // Table of all features

  const PAGE = 25;
  const state = { dictionary: 0, sort: "size", ascending: false, page: 0, rows: [], ...kept.get("table", {}) };
  const keepTable = () => kept.set("table", { dictionary: state.dictionary, sort: state.sort, ascending: state.ascending, page: state.page });
  const table = byId("table");

  function selectRows() {
    const from = dictionary(state.dictionary);
    const query = byId("search").value.trim().toLowerCase();
    const clearOnly = byId("clear-only").checked;
    const clear = from.columns.clear;
    const matches = (row) => {
      const feature = from.feature[row];
      if (clearOnly && !clear[row]) return false;
      if (!query) return true;
      if (/^\d+$/.test(query)) return String(feature).startsWith(query);
      const evidence = from.evidence[feature];
      const words = `${wordsOf(from, feature)} ${evidence ? evidence.promotes.concat(evidence.suppresses).join(" ") : ""}`;
      return `${labelOf(from, feature)} ${words}`.toLowerCase().includes(query);
    };
    const rows = [];
    for (let row = 0; row < from.count; row += 1) if (matches(row)) rows.push(row);
    state.rows = rows;
    if (state.sort === "size") return; // as they come
    const sign = state.ascending ? 1 : -1;
    if (state.sort === "words") {
      const said = (row) => labelOf(from, from.feature[row]) || wordsOf(from, from.feature[row]);
      const all = new Map(rows.map((row) => [row, said(row)]));
      rows.sort((a, b) => (!all.get(a) || !all.get(b) ? Number(!all.get(a)) - Number(!all.get(b)) : sign * all.get(a).localeCompare(all.get(b))) || a - b);
      return;
    }
    const values = state.sort === "feature" ? from.feature : from.columns[state.sort];
    rows.sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y) || a - b;
    });
  }

  function sortBy(name) {
    state.ascending = state.sort === name ? !state.ascending : name === "feature" || name === "words" || name.endsWith("q_value") || name === "lead_q";
    state.sort = name;
    state.page = 0;
    selectRows();
    showRows();
    table.querySelector(`button[data-sort="${name}"]`).focus();
  }

  function header(name, text, numeric, told = name) {
    const sorted = state.sort === name;
    const described = definitionOf(told) ? `tip-${told}` : null;
    return element("th", { scope: "col", class: numeric ? "number" : "", "data-tip": described ? told : null, "aria-sort": sorted ? (state.ascending ? "ascending" : "descending") : null },
      element("button", { type: "button", class: "sort", "data-sort": name, "aria-describedby": described, onclick: () => sortBy(name) }, text));
  }

  function showRows() {
    const from = dictionary(state.dictionary);
    const lead = from.shown.find((column) => column.name === "lead");
    table.tHead.replaceChildren(element("tr", {}, header("feature", "feature", false), header("words", "words", false),
      ...from.shown.map(({ name, heading }) => header(name, heading, true, name === "lead" ? from.lead : name))));
    const shown = state.rows.slice(state.page * PAGE, (state.page + 1) * PAGE);
    table.tBodies[0].replaceChildren(...shown.map((row) => {
      const feature = from.feature[row];
      const [label, words] = [labelOf(from, feature), wordsOf(from, feature)];
      return element("tr", {},
        element("th", { scope: "row" }, featureLink(state.dictionary, feature)),
        element("td", { class: "said" }, label ? element("b", {}, label) : null, label && words ? " " : null, words ? element("bdi", {}, words) : null),
        ...from.shown.map((column) => element("td", { class: "number" }, written(from, column, row))));
    }));
    const pages = Math.max(1, Math.ceil(state.rows.length / PAGE));
    byId("page").textContent = `${state.page + 1} of ${pages.toLocaleString("en")}`;
    byId("earlier").disabled = state.page === 0;
    byId("later").disabled = state.page + 1 >= pages;
    keepTable();
    const all = from.count < from.size ? `the ${from.count.toLocaleString("en")} largest of ${from.size.toLocaleString("en")}` : from.size.toLocaleString("en");
    byId("found").textContent = `${state.rows.length.toLocaleString("en")} of ${all} features` +
      (state.sort === "size" ? `, the largest ${lead.heading} in either direction first` : "");
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
  document.querySelector('#toc a[href="#all"]').hidden = false;
  const pageBefore = state.page;
  refresh();
  if (pageBefore > 0 && pageBefore * PAGE < state.rows.length) { state.page = pageBefore; showRows(); }

