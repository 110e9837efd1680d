// Folded parts are printed, too; columns are sorted by a click on their header.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
for (const table of document.querySelectorAll("table.sorted")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = (row) => row.cells[column].textContent.trim();
      const number = (row) => parseFloat(text(row).replace("\u2212", "-").replaceAll(",", ""));
      const order = (a, b) => (number(a) - number(b)) || text(a).localeCompare(text(b), "en");
      const rows = [...body.rows], filled = rows.filter(text).sort(order);
      body.append(...(down ? filled.reverse() : filled), ...rows.filter((row) => !text(row)));
    });
  });
}
