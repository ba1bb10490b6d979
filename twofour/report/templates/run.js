
// The filter of the layer table, reasons that open, hashes that are copied.
(() => {
  const field = document.getElementById("filter");
  if (field) {
    const rows = [...document.getElementById("table").tBodies[0].rows];
    const texts = rows.map(row => row.textContent.toLowerCase());
    const shown = document.getElementById("shown");
    const filter = () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      rows.forEach((row, k) => {
        row.hidden = !words.every(word => texts[k].includes(word));
        count += !row.hidden;
      });
      shown.textContent = words.length ? `${count} of ${rows.length}` : "";
    };
    field.addEventListener("input", filter);
  }
  for (const cell of document.querySelectorAll(".reason div"))
    cell.addEventListener("click", () => cell.classList.toggle("open"));
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(button.dataset.copy);
        button.classList.add("copied");
        setTimeout(() => button.classList.remove("copied"), 1500);
      } catch {
        button.firstChild.textContent = button.dataset.copy; // no clipboard: the whole, to select
      }
    });
  }
})();
