// Brings the page to life: coloured passages, tables that sort and filter, the film of training.
// Without it the page shows one layer, whole tables, each token's experts as its title, and no film.
const { reading, film } = JSON.parse(document.getElementById("page-data").textContent);
const make = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);
const press = (buttons, chosen) =>
  [...buttons].forEach((button) => button.setAttribute("aria-pressed", button === chosen));

// --- passages: a layer to colour by, an expert to single out, words for the token that is pointed at or stepped to ---

function readAlong({ layers, shown, passages }) {
  const texts = [...document.querySelectorAll(".passage")];
  const spans = texts.map((text) => [...text.children]);
  const told = document.querySelector(".reading");
  const picker = document.querySelector(".picker");
  const legend = document.querySelector(".legend");
  let layer = shown;
  let single = null;

  const words = (choices) =>
    `${layers[layer]}: ` +
    (choices.map(([expert, weight]) => `expert ${expert} (weight ${weight.toFixed(2)})`).join(", ") || "no expert");

  function colour() {
    document.querySelector(".layer").textContent = layers[layer];
    passages.forEach((byLayer, number) =>
      byLayer[layer].forEach((choices, place) => {
        const span = spans[number][place];
        const mine = single === null ? choices[0] : choices.find(([expert]) => expert === single);
        span.className = mine ? `e${mine[0]}` : "";
        span.title = words(choices);
        span.dataset.e = mine ? mine[0] : "";
      }),
    );
    press(picker.querySelectorAll("button"), picker.querySelectorAll("button")[layer]);
  }

  layers.forEach((label, number) => {
    const button = make("button", { type: "button", textContent: label });
    button.addEventListener("click", () => {
      layer = number;
      colour();
    });
    picker.append(button);
  });
  const numbered = make("input", { type: "checkbox" });
  numbered.addEventListener("change", () =>
    document.querySelector(".passages").classList.toggle("numbered", numbered.checked),
  );
  const label = make("label");
  label.append(numbered, " write the experts’ numbers");
  picker.append(label);

  [...(legend?.children ?? [])].forEach((entry, expert) => {
    const button = make("button", { type: "button" });
    button.append(...entry.childNodes);
    entry.replaceWith(button);
    button.addEventListener("click", () => {
      single = single === expert ? null : expert;
      press(legend.children, single === null ? null : button);
      colour();
    });
  });

  const tell = (span) => {
    told.textContent = `“${span.textContent}” · ${span.title}`;
  };
  texts.forEach((text, number) => {
    // One stop of the Tab key for each passage; arrows step from token to token inside.
    const seen = spans[number].filter((span) => span.textContent);
    seen.forEach((span, place) => {
      span.tabIndex = place === 0 ? 0 : -1;
    });
    const step = (from, to) => {
      if (!to) return;
      from.tabIndex = -1;
      to.tabIndex = 0;
      to.focus();
    };
    text.addEventListener("keydown", (event) => {
      const place = seen.indexOf(event.target);
      const targets = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: seen.length - 1 };
      if (place < 0 || !(event.key in targets)) return;
      event.preventDefault();
      step(event.target, seen[targets[event.key]]);
    });
    for (const kind of ["pointerover", "click", "focusin"]) {
      text.addEventListener(kind, ({ target }) => {
        if (target !== text) tell(target);
      });
    }
  });
  told.textContent = "Point at a token, touch one, or step through them with Tab and the arrow keys.";
  colour();
}

// --- tables: click a heading to sort, type to filter, pick a value ---

function liven(box) {
  const table = box.querySelector("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const title = table.caption.textContent;
  const value = (row, column) => {
    const { dataset, textContent } = row.cells[column];
    return dataset.v === undefined ? textContent : Number(dataset.v);
  };
  const compare = (one, other) => {
    if (typeof one === typeof other) return typeof one === "number" ? one - other : one.localeCompare(other);
    return typeof one === "number" ? -1 : 1;
  };

  heads.forEach((head, column) => {
    const button = make("button", { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("n");
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : numeric;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sorted = [...rows].sort((one, other) => {
        const order = compare(value(one, column), value(other, column));
        return down ? -order : order;
      });
      body.append(...sorted);
    });
  });

  const tools = make("div", { className: "tools" });
  const search = make("input", { type: "search", placeholder: "filter" });
  search.setAttribute("aria-label", `Filter: ${title}`);
  const count = make("output");
  const picks = heads.flatMap((head, column) => {
    if (!("picks" in head.dataset)) return [];
    const select = make("select");
    select.setAttribute("aria-label", `${head.textContent}: ${title}`);
    const values = [...new Set(rows.map((row) => row.cells[column].textContent))];
    select.append(make("option", { value: "", textContent: `every ${head.textContent}` }));
    select.append(...values.map((text, number) => make("option", { value: number, textContent: text })));
    return [{ column, select, values }];
  });
  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    let left = 0;
    rows.forEach((row) => {
      const fits =
        picks.every(
          ({ column, select, values }) =>
            select.value === "" || row.cells[column].textContent === values[Number(select.value)],
        ) &&
        (wanted === "" || [...row.cells].some((cell) => cell.textContent.toLowerCase().includes(wanted)));
      row.hidden = !fits;
      left += fits;
    });
    count.textContent = `${left} of ${rows.length}`;
  };
  search.addEventListener("input", filter);
  picks.forEach(({ select }) => select.addEventListener("change", filter));
  tools.append(search, ...picks.map(({ select }) => select), count);
  if (rows.length > 6) box.querySelector(".scroll").before(tools);
  filter();
}

// --- the film: a bar for every expert, from step to step ---

function showFilm(runs, box) {
  const [play, slider, which, now, stages] = [".play", ".when", ".which", ".now", ".stages"].map((name) =>
    box.querySelector(name),
  );
  let run = runs[0];
  let bars = [];
  let timer = null;

  const show = (frame) => {
    const loss = run.loss[frame];
    now.textContent = `step ${run.steps[frame].toLocaleString("en")}` + (loss === null ? "" : ` · loss ${loss}`);
    slider.setAttribute("aria-valuetext", now.textContent);
    bars.forEach(({ stage, title, name, columns, top }, layer) => {
      const share = run.share[frame][layer];
      columns.forEach((bar, expert) => (bar.style.height = `${Math.min(100, (100 * share[expert]) / top)}%`));
      const most = share.indexOf(Math.max(...share));
      title.textContent = `${name} · busiest: expert ${most}, ${(share[most] / 100).toFixed(0)} %`;
      stage.setAttribute("aria-label", title.textContent);
    });
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  const load = (number) => {
    stop();
    run = runs[number];
    slider.max = run.steps.length - 1;
    bars = run.layers.map((name, layer) => {
      const experts = run.share[0][layer].length;
      const most = Math.max(...run.share.flatMap((frame) => frame[layer]));
      const top = Math.max(most, 2 * (10000 / experts));
      const stage = make("div", { className: "stage" });
      stage.setAttribute("role", "img");
      const even = make("hr");
      even.style.bottom = `${(100 * 10000) / experts / top}%`;
      const columns = run.share[0][layer].map((_, expert) => {
        const bar = make("i");
        bar.style.background = `var(--e${expert}, var(--sparse))`;
        return bar;
      });
      stage.append(...columns, even);
      return { stage, title: make("p"), name, columns, top };
    });
    stages.replaceChildren(
      ...bars.map(({ stage, title }) => {
        const part = make("div");
        part.append(title, stage);
        return part;
      }),
    );
    slider.value = run.steps.length - 1;
    show(run.steps.length - 1);
  };

  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (Number(slider.value) === run.steps.length - 1) slider.value = 0;
    play.textContent = "Pause";
    timer = setInterval(() => {
      const frame = Number(slider.value);
      show(frame);
      if (frame >= run.steps.length - 1) stop();
      else slider.value = frame + 1;
    }, Math.max(40, 8000 / run.steps.length));
  });
  slider.addEventListener("input", () => show(Number(slider.value)));
  which.hidden = runs.length < 2;
  const select = which.querySelector("select");
  select.append(...runs.map(({ label }, number) => make("option", { value: number, textContent: label })));
  select.addEventListener("change", () => load(Number(select.value)));
  load(0);
  box.hidden = false;
}

if (reading) readAlong(reading);
document.querySelectorAll(".table").forEach(liven);
if (film.length) showFilm(film, document.querySelector(".film"));
addEventListener("beforeprint", () => document.querySelectorAll(".layers details").forEach((part) => (part.open = true)));
