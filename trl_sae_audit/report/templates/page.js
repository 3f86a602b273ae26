
  // Contents: open beside a wide page, folded over a narrow one; the section in view is marked

  const contents = byId("toc").querySelector("details");
  const wide = matchMedia("(min-width: 72rem)");
  const fold = () => { contents.open = wide.matches; };
  wide.addEventListener("change", fold);
  fold();
  const linkTo = new Map(Array.from(contents.querySelectorAll("a"), (link) => [link.hash.slice(1), link]));
  for (const link of linkTo.values()) link.addEventListener("click", () => { if (!wide.matches) contents.open = false; });
  const inView = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) entry.isIntersecting ? inView.add(entry.target.id) : inView.delete(entry.target.id);
    const first = Array.from(linkTo.keys()).find((id) => inView.has(id));
    for (const [id, link] of linkTo) id === first ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }, { rootMargin: "-8% 0px -60% 0px" });
  for (const id of linkTo.keys()) if (byId(id)) watcher.observe(byId(id));

  // In print what explains is open, the rest of a long list only if it was opened; colours are the light ones

  let shownTheme;
  addEventListener("beforeprint", () => {
    for (const each of document.querySelectorAll("main details:not([open]):not(.more)")) { each.open = true; each.dataset.printed = ""; }
    shownTheme = root.dataset.theme;
    root.dataset.theme = "light";
  });
  addEventListener("afterprint", () => {
    for (const each of document.querySelectorAll("[data-printed]")) { each.open = false; delete each.dataset.printed; }
    shownTheme ? (root.dataset.theme = shownTheme) : delete root.dataset.theme;
  });

  // The place after a reload

  const folded = Array.from(document.querySelectorAll("main details"));
  const chosen = Array.from(document.querySelectorAll('main input[type="radio"], #clear-only'));
  if (data.reload) {
    for (const place of kept.get("open", [])) if (folded[place]) folded[place].open = true;
    for (const place of kept.get("chosen", [])) {
      const choice = chosen[place];
      if (choice && !choice.checked) { choice.checked = true; choice.dispatchEvent(new Event("change")); }
    }
    if (kept.get("search")) { byId("search").value = kept.get("search"); refresh(); }
    history.scrollRestoration = "manual";
    scrollTo(0, kept.get("scroll", 0));
  }
  function keepPlace() {
    const places = (all, wanted) => all.flatMap((each, place) => (wanted(each) ? [place] : []));
    kept.set("open", places(folded, (each) => each.open));
    kept.set("chosen", places(chosen, (each) => each.checked));
    kept.set("search", byId("search").value);
    kept.set("scroll", scrollY);
  }
  openAt(location.hash);

  // A run that is going on: reload when there is something new, but not while a card is open

  const live = byId("live");
  async function follow() {
    if (data.version !== null && location.protocol !== "file:") {
      try {
        const answer = await fetch("version", { cache: "no-store" });
        const version = await answer.text();
        if (version === String(data.version)) return;
      } catch {
        if (live) live.textContent = "Nothing new comes in: the command that served this page has ended.";
        return;
      }
    }
    if (card.open) return;
    keepPlace();
    location.reload();
  }
  if (data.reload) setInterval(follow, 1000 * data.reload);
})();
