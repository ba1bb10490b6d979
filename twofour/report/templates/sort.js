
// A head of a table sorts by it: numbers by data-value, texts as they are; what is not known last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, k) => row.cells[k].dataset.value;
  const sort = k => {
    const sign = heads[k].getAttribute("aria-sort") === "descending" ? 1 : -1;
    heads.forEach(each => each.removeAttribute("aria-sort"));
    heads[k].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows];
    if (rows.some(row => value(row, k) !== undefined)) {
      const known = rows.filter(row => value(row, k) !== undefined);
      const rest = rows.filter(row => value(row, k) === undefined);
      known.sort((a, b) => sign * (Number(value(a, k)) - Number(value(b, k))));
      table.tBodies[0].append(...known, ...rest);
      return;
    }
    rows.sort((a, b) => sign * a.cells[k].textContent.trim().localeCompare(
      b.cells[k].textContent.trim(), undefined, {numeric: true}));
    table.tBodies[0].append(...rows);
  };
  heads.forEach((head, k) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(k));
    head.addEventListener("keydown", event => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      sort(k);
    });
  });
}
