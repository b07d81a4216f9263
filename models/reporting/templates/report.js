"use strict";
// Tables are complete without this script. It adds sorting, and it opens folded tables for print.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return typeof a === "number" ? -1 : 1;
  };
  for (const [column, header] of [...table.tHead.rows[0].cells].entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "sort by this column";
    button.append(header.firstChild);
    header.prepend(button);
    button.addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const empty = (row) => row.cells[column].dataset.empty !== undefined;
      const rows = [...body.rows].sort((a, b) => {
        if (empty(a) || empty(b)) return empty(a) - empty(b); // cells without a value stay at the end
        return (down ? -1 : 1) * compare(key(a, column), key(b, column));
      });
      body.append(...rows);
    });
  }
}
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
