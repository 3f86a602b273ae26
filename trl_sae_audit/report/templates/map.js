
  // Maps over time

  for (const choice of document.querySelectorAll(".scores input")) {
    choice.addEventListener("change", () => {
      for (const box of choice.closest("section").querySelectorAll("[data-map]")) box.hidden = box.dataset.score !== choice.value;
    });
  }
  for (const box of document.querySelectorAll("[data-map]")) {
    const index = Number(box.dataset.map);
    const map = data.dictionaries[index].maps[box.dataset.score];
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
        `${first === last ? `step ${first}` : `steps ${first} to ${last}`}: ${signed(mapRow(map, feature)[at.column])} ${map.unit}`;
    }
    function pointAt(event) {
      const area = picture.getBoundingClientRect();
      point(rowAt(Math.floor(((event.clientY - area.top) / area.height) * map.height)), Math.floor(((event.clientX - area.left) / area.width) * columns));
    }
    picture.addEventListener("pointermove", pointAt);
    picture.addEventListener("click", (event) => { pointAt(event); openAt(addressOf(index, map.features[at.row])); });
    picture.addEventListener("focus", () => point(at.row, at.column));
    picture.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-10, 0], PageDown: [10, 0] };
      if (event.key in steps) point(at.row + steps[event.key][0], at.column + steps[event.key][1]);
      else if (event.key === "Enter") openAt(addressOf(index, map.features[at.row]));
      else return;
      event.preventDefault();
    });
  }

