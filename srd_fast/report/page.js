"use strict";
// All rows of a run: sorted, filtered, turned over, and shown under the pointer on the difficulty map.
// What comes from the data reaches the page through textContent alone.
(() => {
  const SIZES = [10, 50, 200];

  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const labelled = (text, control) => {
    const label = make("label", "control", text);
    label.append(control);
    return label;
  };
  const choice = (texts) => {
    const select = make("select");
    texts.forEach((text, value) => {
      const option = make("option", "", text);
      option.value = String(value);
      select.append(option);
    });
    return select;
  };
  const button = (text, act) => {
    const element = make("button", "", text);
    element.type = "button";
    element.addEventListener("click", act);
    return element;
  };

  const number = (table, column, row) => {
    const value = table.columns[column].values[row];
    if (value === null) return null;
    return column === table.clamped ? Math.min(100, Math.max(0, value)) : value;
  };
  const shown = (table, column, row) => {
    const value = number(table, column, row);
    if (value === null) return "–";
    const unit = table.columns[column].unit;
    return unit === "points" ? value.toFixed(1) : unit === "characters" ? value.toLocaleString("en") : value.toFixed(3);
  };
  const place = (table, row) => (table.places ? table.places[table.place[row]] : "");
  const excerpt = (texts, row, length) => {
    const text = texts ? texts.values[row] : null;
    if (!text) return "";
    // The lines that a template gives every prompt say nothing about a row.
    const own = text.split("\n").filter((line) => !texts.common.includes(line.trim())).join(" ");
    const words = (own.trim() || text).replace(/\s+/g, " ").trim();
    return words.length > length ? words.slice(0, length) + "…" : words;
  };
  const textsOf = (table, row) => {
    const grid = make("div", "texts");
    for (const { label, values, whole } of table.texts) {
      if (values[row] === null) continue;
      const block = make("div", whole ? "whole" : "");
      block.append(make("p", "label", label), make("div", values[row] ? "text" : "text empty", values[row] || "empty"));
      block.lastChild.dir = "auto";
      block.lastChild.tabIndex = 0;
      grid.append(block);
    }
    if (!grid.firstChild) grid.append(make("p", "note", "The texts of this row are not in the page."));
    return grid;
  };

  const browser = (root, table) => {
    const count = table.ids.length;
    const state = { words: "", place: -1, sort: -1, down: false, page: 0, size: SIZES[0] };
    let order = [];

    const search = make("input");
    search.type = "search";
    const groups = choice(["all rows", ...(table.places || [])]);
    const sizes = choice(SIZES.map((size) => `${size} rows a page`));
    sizes.setAttribute("aria-label", "rows a page");
    const said = make("span", "said");
    said.setAttribute("role", "status");
    const back = button("‹ back", () => turn(state.page - 1));
    const on = button("next ›", () => turn(state.page + 1));
    const head = make("tr");
    const body = make("tbody");

    const matches = (row) => {
      if (state.place >= 0 && table.place[row] !== state.place) return false;
      if (!state.words) return true;
      if (table.ids[row].toLowerCase().includes(state.words)) return true;
      return table.texts.some(({ values }) => values[row] !== null && values[row].toLowerCase().includes(state.words));
    };
    const select = () => {
      order = [];
      for (let row = 0; row < count; row++) if (matches(row)) order.push(row);
      if (state.sort >= 0) {
        const sign = state.down ? -1 : 1;
        order.sort((a, b) => {
          const [x, y] = [number(table, state.sort, a), number(table, state.sort, b)];
          // Rows without a value come last, whatever the direction.
          if (x === null || y === null) return (x === null) - (y === null) || a - b;
          return sign * (x - y) || a - b;
        });
      }
      turn(0);
    };
    const opened = (line, row) => {
      const next = line.nextSibling;
      if (next && next.className === "opened") next.remove();
      else {
        const cell = make("td");
        cell.colSpan = head.children.length;
        cell.append(textsOf(table, row));
        const wide = make("tr", "opened");
        wide.append(cell);
        line.after(wide);
      }
      line.querySelector("button").setAttribute("aria-expanded", String(line.nextSibling?.className === "opened"));
    };
    const lineOf = (row) => {
      const line = make("tr", "row");
      const name = make("td", "name");
      const words = excerpt(table.texts[0], row, 140);
      const open = button(words || table.ids[row], () => {});
      open.className = "open";
      open.dir = "auto";
      open.setAttribute("aria-expanded", "false");
      name.append(open);
      if (words) name.append(make("span", "unit id", table.ids[row]));
      line.append(name);
      if (table.places) line.append(make("td", "wide", place(table, row)));
      table.columns.forEach((column, i) => {
        line.append(make("td", column.minor ? "number wide" : "number", shown(table, i, row)));
      });
      line.addEventListener("click", () => opened(line, row));
      return line;
    };
    const turn = (page) => {
      const pages = Math.max(1, Math.ceil(order.length / state.size));
      state.page = Math.min(Math.max(page, 0), pages - 1);
      const first = state.page * state.size;
      const some = order.slice(first, first + state.size);
      body.replaceChildren(...some.map(lineOf));
      const of = order.length === count ? `${count.toLocaleString("en")} rows` :
        `${order.length.toLocaleString("en")} found among ${count.toLocaleString("en")} rows`;
      said.textContent = some.length ? `${(first + 1).toLocaleString("en")}–${(first + some.length).toLocaleString("en")} of ${of}` : `no row of ${count.toLocaleString("en")}`;
      back.disabled = state.page === 0;
      on.disabled = state.page === pages - 1;
    };
    const sortBy = (column) => {
      // Up, down, and back to the order of the table.
      if (state.sort !== column) [state.sort, state.down] = [column, false];
      else if (!state.down) state.down = true;
      else [state.sort, state.down] = [-1, false];
      [...head.children].forEach((cell) => {
        const own = cell.dataset.column === String(state.sort);
        cell.setAttribute("aria-sort", own ? (state.down ? "descending" : "ascending") : "none");
      });
      select();
    };

    let waiting = 0;
    search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        state.words = search.value.trim().toLowerCase();
        select();
      }, 150);
    });
    groups.addEventListener("change", () => {
      state.place = Number(groups.value) - 1;
      select();
    });
    sizes.addEventListener("change", () => {
      state.size = SIZES[Number(sizes.value)];
      turn(0);
    });

    head.append(make("th", "", "Row"));
    if (table.places) head.append(make("th", "wide", "Place"));
    table.columns.forEach((column, i) => {
      const cell = make("th", column.minor ? "number wide" : "number");
      cell.dataset.column = String(i);
      cell.append(button(column.title, () => sortBy(i)), make("span", "unit", column.unit));
      head.append(cell);
    });
    const controls = make("div", "controls");
    controls.append(labelled("search ", search));
    if (table.places) controls.append(labelled("show ", groups));
    controls.append(sizes);
    const pager = make("div", "controls");
    pager.append(back, on, said);
    const sheet = make("table", "rows");
    const top = make("thead");
    top.append(head);
    sheet.append(top, body);
    const scroll = make("div", "scroll");
    scroll.append(sheet);
    root.append(controls, scroll, pager);
    root.hidden = false;
    select();
    return {
      show(row) {
        search.value = table.ids[row];
        groups.value = "0";
        Object.assign(state, { words: search.value.toLowerCase(), place: -1 });
        select();
        if (body.firstChild) opened(body.firstChild, order[0]);
        root.scrollIntoView({ block: "start" });
      },
    };
  };

  // The picture says where a point lies; the frame of its axes says which row that is.
  const hover = (figure, table, rows) => {
    const { x, y, edge } = table.map;
    const [across, up] = [table.columns[x].values, table.columns[y].values];
    const image = figure.querySelector("img");
    const narrow = matchMedia("(max-width: 760px)");
    const mark = make("span", "mark");
    const tip = make("div", "tip");
    mark.hidden = tip.hidden = true;
    figure.append(mark, tip);
    let pinned = false;

    const spot = (row, frame, box) => {
      const value = Math.min(across[row], edge);
      const share = (value - frame.x0) / (frame.x1 - frame.x0);
      const rise = (up[row] - frame.y0) / (frame.y1 - frame.y0);
      return [
        box.width * (frame.left + share * (frame.right - frame.left)),
        box.height * (frame.bottom - rise * (frame.bottom - frame.top)),
      ];
    };
    const nearest = (event) => {
      const frame = narrow.matches ? table.map.narrow : table.map.wide;
      const box = image.getBoundingClientRect();
      let [best, least, at] = [-1, 14 ** 2, null];
      for (let row = 0; row < across.length; row++) {
        if (across[row] === null || up[row] === null) continue;
        const [left, top] = spot(row, frame, box);
        const distance = (left - event.clientX + box.left) ** 2 + (top - event.clientY + box.top) ** 2;
        if (distance < least) [best, least, at] = [row, distance, [left, top]];
      }
      return [best, at, box];
    };
    const hide = () => {
      mark.hidden = tip.hidden = true;
      pinned = false;
    };
    const show = (event, pin) => {
      const [row, at, box] = nearest(event);
      if (row < 0) return hide();
      pinned = pin;
      const outer = figure.getBoundingClientRect();
      const [left, top] = [at[0] + box.left - outer.left, at[1] + box.top - outer.top];
      mark.style.left = `${left}px`;
      mark.style.top = `${top}px`;
      const scores = table.columns
        .map((column, i) => (column.minor ? "" : `${column.title} ${shown(table, i, row)}`))
        .filter(Boolean)
        .join(" · ");
      tip.replaceChildren(make("p", "label", `${table.ids[row]} · ${place(table, row)}`), make("p", "label", scores));
      for (const texts of table.texts) {
        const own = excerpt(texts, row, 220);
        if (own) tip.append(make("p", "label", texts.label), make("p", "own", own));
      }
      if (pin) tip.append(button("show it in the table", () => rows.show(row)));
      mark.hidden = tip.hidden = false;
      const width = Math.min(360, outer.width - 16);
      tip.style.width = `${width}px`;
      tip.style.left = `${Math.max(8, Math.min(left + 14, outer.width - width - 8))}px`;
      tip.style.top = `${top + 14}px`;
    };
    image.addEventListener("pointermove", (event) => {
      if (!pinned && event.pointerType === "mouse") show(event, false);
    });
    image.addEventListener("pointerleave", () => pinned || hide());
    image.addEventListener("click", (event) => show(event, true));
    addEventListener("resize", hide);
    document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  };

  const read = (id) => {
    const block = document.getElementById(id);
    if (!block) return null;
    const table = JSON.parse(block.textContent);
    for (const texts of table.texts) {
      // Of a large table, some rows alone have texts.
      const values = Array(table.ids.length).fill(null);
      table.with_texts.forEach((row, i) => (values[row] = texts.values[i]));
      texts.values = values;
    }
    return table;
  };
  for (const name of ["training-rows", "validation-rows"]) {
    const table = read(name);
    if (!table) continue;
    const rows = browser(document.getElementById(`${name}-table`), table);
    const figure = document.querySelector("#difficulty ~ figure .card");
    if (table.map && figure) hover(figure, table, rows);
  }

  // Paper cannot be clicked: what is folded is printed open.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const details of folded) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of folded) details.open = false;
  });
})();
