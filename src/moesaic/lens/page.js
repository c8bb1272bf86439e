// Colours the passages for the layer that the reader picks, and says in words what the pointed-at token did.
// Without it the page shows one layer, and each token's experts as its title.
const { layers, shown, passages } = JSON.parse(document.getElementById("passage-data").textContent);
const spans = [...document.querySelectorAll(".passage")].map((passage) => [...passage.children]);
const reading = document.querySelector(".reading");
const picker = document.querySelector(".picker");

const describe = (label, choices) =>
  choices.length === 0
    ? `${label}: no expert`
    : `${label}: ` +
      choices.map(([expert, weight]) => `expert ${expert} (weight ${weight.toFixed(2)})`).join(", ");

function colour(layer) {
  passages.forEach((byLayer, number) =>
    byLayer[layer].forEach((choices, place) => {
      const span = spans[number][place];
      span.className = choices.length ? `e${choices[0][0]}` : "";
      span.title = describe(layers[layer], choices);
    }),
  );
  [...picker.children].forEach((button, place) => button.setAttribute("aria-pressed", place === layer));
}

layers.forEach((label, layer) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label;
  button.addEventListener("click", () => colour(layer));
  picker.append(button);
});
for (const kind of ["pointerover", "click"]) {
  document.querySelector(".passages").addEventListener(kind, ({ target }) => {
    if (target.matches(".passage span")) reading.textContent = `“${target.textContent}” · ${target.title}`;
  });
}
reading.textContent = "Point at a token, or touch one, to see its experts.";
colour(shown);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
