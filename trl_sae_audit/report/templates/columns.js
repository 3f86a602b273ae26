
  // Heads of columns: a tooltip that says what stands below, and sorting

  const tip = byId("tip");
  const definitionOf = (name) => byId(`tip-${name}`);
  function showTip(head) {
    const definition = definitionOf(head.dataset.tip);
    if (!definition) return;
    tip.textContent = definition.textContent;
    tip.hidden = false;
    const [at, own] = [head.getBoundingClientRect(), tip.getBoundingClientRect()];
    tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - own.width - 8))}px`;
    tip.style.top = `${at.top > own.height + 12 ? at.top - own.height - 6 : at.bottom + 6}px`;
  }
  const hideTip = () => { tip.hidden = true; };
  for (const [begin, end] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
    document.addEventListener(begin, (event) => {
      const head = event.target.closest && event.target.closest("[data-tip]");
      if (head) showTip(head);
    });
    document.addEventListener(end, (event) => { if (event.target.closest && event.target.closest("[data-tip]")) hideTip(); });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !tip.hidden) { hideTip(); event.stopPropagation(); } }, true);
  addEventListener("scroll", hideTip, { passive: true, capture: true });

  const numberIn = (text) => Number.parseFloat(text.replace("−", "-").replace(/^[<↗↘→ ]+/, "").replaceAll(",", ""));
  function valueOf(row, column) {
    const cell = row.cells[column];
    if (!cell) return Number.NaN;
    const text = cell.dataset.value ?? cell.textContent.trim();
    const value = cell.dataset.value !== undefined ? Number(text) : numberIn(text);
    return cell.dataset.value === undefined && Number.isNaN(value) ? text : value;
  }
  function compare(x, y) {
    const missing = (value) => typeof value === "number" && Number.isNaN(value);
    if (missing(x) || missing(y)) return Number(missing(x)) - Number(missing(y));
    return typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
  }
  function sortTable(sorted, head) {
    const ascending = head.getAttribute("aria-sort") === "descending";
    const column = head.cellIndex;
    const missing = (value) => typeof value === "number" && Number.isNaN(value);
    const blocks = sorted.tBodies.length > 1 ? Array.from(sorted.tBodies) : Array.from(sorted.tBodies[0].rows);
    const keyed = blocks.map((block) => [valueOf(block.rows ? block.rows[0] : block, column), block]);
    keyed.sort(([x], [y]) => (missing(x) || missing(y) ? compare(x, y) : (ascending ? 1 : -1) * compare(x, y)));
    (sorted.tBodies.length > 1 ? sorted : sorted.tBodies[0]).append(...keyed.map(([, block]) => block));
    for (const other of sorted.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  }
  for (const sorted of document.querySelectorAll("table.sortable")) {
    for (const head of sorted.tHead.rows[0].cells) {
      const fixed = "fixed" in head.dataset;
      if (fixed && !head.dataset.tip) continue;
      const described = head.dataset.tip && definitionOf(head.dataset.tip) ? `tip-${head.dataset.tip}` : null;
      if (fixed) {
        head.tabIndex = 0;
        if (described) head.setAttribute("aria-describedby", described);
        continue;
      }
      const button = element("button", { type: "button", class: "sort", "aria-describedby": described, onclick: () => sortTable(sorted, head) });
      button.append(...head.childNodes);
      head.append(button);
    }
  }
