// Sends the reader's text to the service, colours every token that comes back by its experts, and lets experts be
// switched off. Text of the model enters the page as text alone, never as markup.
"use strict";
const $ = (id) => document.getElementById(id);
const make = (tag, text = "", className = "") =>
  Object.assign(document.createElement(tag), { textContent: text, className });

let model = null;
let layer = 0;
let opened = null;
let running = null;
// An answer: { request, tokens: [{ text, experts, given }], reason, parts }.
let now = null;
let former = null;
const off = new Map();

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const labelOf = (index) => model.layers[index].label;
const keyOf = (inLayer, expert) => `${inLayer}:${expert}`;
const offNames = (pairs) => pairs.map((one) => `expert ${one.expert} of ${labelOf(one.layer)}`).join(", ");

// Spaces stay, lines break where they break; what draws nothing or turns text round is written as its number.
const shown = (text) =>
  text.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Zl}\p{Zp}]/gu, (character) =>
    character === "\n" ? "⏎\n" : character === "\t" ? "⇥" : `\\u{${character.codePointAt(0).toString(16)}}`,
  );
const named = (text) =>
  text === "" ? "part of a character" : text.trim() === "" ? (text.includes("\n") ? "new line" : "space") : text.trim();

function choicesInWords(choices) {
  if (choices.length === 0) return "no expert";
  return choices
    .map(([expert, weight, kept]) => `expert ${expert} (weight ${weight.toFixed(2)}${kept === 0 ? ", full: left out" : ""})`)
    .join(", ");
}

// --- the service ----------------------------------------------------------------------------------------------------

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  if (answer.status === 401) $("key-label").hidden = false;
  let message = `The service answered with status ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // The status is all that there is.
  }
  throw new Error(message);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const block of whole) {
      const [kind, data] = block.split("\n");
      yield [kind.replace("event: ", ""), JSON.parse(data.replace("data: ", ""))];
    }
  }
}

// --- tokens ---------------------------------------------------------------------------------------------------------

function colour(span, token) {
  const choices = token.experts[layer];
  const kinds = [token.given && "given", token.parts && "parts", choices.length && `e${choices[0][0]}`];
  span.className = kinds.filter(Boolean).join(" ");
  span.dataset.e = choices.length ? choices[0][0] : "";
  span.setAttribute("aria-label", `${named(token.text)}: ${choicesInWords(choices)}`);
  span.title = `${labelOf(layer)}: ${choicesInWords(choices)}`;
}

function append(box, token) {
  const span = make("span", token.text === "" ? "·" : shown(token.text));
  span.setAttribute("role", "option");
  span.setAttribute("aria-selected", "false");
  span.tabIndex = box.children.length ? -1 : 0;
  span.token = token;
  colour(span, token);
  box.append(span);
}

function draw(box, answer) {
  box.replaceChildren();
  for (const token of answer.tokens) append(box, token);
}

function describe(span) {
  $("reading").textContent = `“${shown(span.token.text).trim() || named(span.token.text)}” · ${span.title}`;
}

function walk(box) {
  const select = (span) => {
    for (const other of box.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    for (const other of box.querySelectorAll('[aria-selected="true"]')) other.setAttribute("aria-selected", "false");
    span.tabIndex = 0;
    span.setAttribute("aria-selected", "true");
    describe(span);
  };
  box.addEventListener("focusin", ({ target }) => target.token && select(target));
  box.addEventListener("click", ({ target }) => target.token && target.focus());
  box.addEventListener("pointerover", ({ target }) => target.token && describe(target));
  box.addEventListener("keydown", (event) => {
    const { target, key } = event;
    const next = {
      ArrowRight: target.nextElementSibling,
      ArrowLeft: target.previousElementSibling,
      Home: box.firstElementChild,
      End: box.lastElementChild,
    }[key];
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
}

function recolour() {
  for (const box of [$("now-text"), $("former-text")]) for (const span of box.children) colour(span, span.token);
  legend();
  if (opened && opened.layer !== layer) close();
}

// --- the answer -----------------------------------------------------------------------------------------------------

function note(answer) {
  const without = answer.request.switched_off.length ? `Without ${offNames(answer.request.switched_off)}. ` : "";
  const written = answer.tokens.filter((token) => !token.given).length;
  const ends = { stop: "the model ended it", length: "its limit", stopped: "stopped by you" };
  const how = answer.reason ? `${written} tokens, ${ends[answer.reason] ?? answer.reason}.` : "Writing …";
  return `${without}${how}${answer.compared ? ` ${answer.compared}` : ""}`;
}

// Where two answers to the same request stop being the same.
function compare() {
  if (!former) return;
  const [mine, theirs] = [now, former].map((answer) => answer.tokens.filter((token) => !token.given));
  const same = mine.findIndex((token, place) => token.id !== theirs[place]?.id);
  const first = same >= 0 ? same : mine.length;
  if (same < 0 && mine.length === theirs.length) {
    now.compared = "It is the same as the answer before.";
    return;
  }
  now.compared = `The first ${first} tokens are those of the answer before; there it parts.`;
  for (const [tokens, box] of [[mine, $("now-text")], [theirs, $("former-text")]]) {
    if (!tokens[first]) continue;
    tokens[first].parts = true;
    for (const span of box.children) if (span.token === tokens[first]) colour(span, span.token);
  }
}

function said(text, unsaid) {
  // Whole sentences: a screen reader that is told every token never comes to an end.
  const end = unsaid.search(/[.!?\n][^.!?\n]*$/);
  if (end < 0) return unsaid;
  $("said").textContent = unsaid.slice(0, end + 1);
  return unsaid.slice(end + 1);
}

function busy(is) {
  $("write").disabled = is;
  $("stop").disabled = !is;
}

function begin(request) {
  const comparable = (one) => JSON.stringify({ ...one, switched_off: [] });
  former = now && now.tokens.length && comparable(now.request) === comparable(request) ? now : null;
  if (former) for (const token of former.tokens) token.parts = false;
  now = { request, tokens: [], reason: "", compared: "" };
  $("former").hidden = !former;
  if (former) {
    draw($("former-text"), former);
    former.compared = "";
    $("former-note").textContent = note(former);
  }
  $("now-text").replaceChildren();
  $("now-note").textContent = note(now);
  $("fault").textContent = "";
}

async function write(request) {
  running?.abort();
  const control = new AbortController();
  running = control;
  begin(request);
  busy(true);
  const mine = now;
  let unsaid = "";
  try {
    const options = {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request),
      signal: control.signal,
    };
    for await (const [kind, data] of events(await ask("/api/generate", options))) {
      if (now !== mine) return;
      const tokens = kind === "prompt" ? data.tokens.map((token) => ({ ...token, given: true })) : kind === "token" ? [data] : [];
      for (const token of tokens) {
        mine.tokens.push(token);
        append($("now-text"), token);
      }
      if (kind === "token") unsaid = said(data.text, unsaid + data.text);
      if (kind === "text") $("now-text").lastElementChild?.append(shown(data.text));
      if (kind === "done") mine.reason = data.reason;
      if (kind === "error") throw new Error(data.error.message);
      legend();
    }
    if (!mine.reason) throw new Error("The connection broke off before the answer was complete.");
  } catch (error) {
    if (now !== mine) return;
    mine.reason = "stopped";
    if (error.name !== "AbortError") {
      mine.reason = "broken off";
      $("fault").textContent = error.message;
    }
  }
  if (now !== mine) return;
  running = null;
  busy(false);
  compare();
  $("now-note").textContent = note(mine);
  $("said").textContent = `${unsaid} Answer ready: ${note(mine)}`;
  legend();
  if (opened) about(opened.expert);
}

const switchedOff = () => [...off.values()];

function request() {
  return {
    prompt: $("prompt").value,
    chat: $("chat").checked,
    max_tokens: $("max-tokens").valueAsNumber,
    temperature: $("temperature").valueAsNumber,
    seed: $("seed").valueAsNumber,
    switched_off: switchedOff(),
  };
}

// --- experts --------------------------------------------------------------------------------------------------------

function legend() {
  const count = model.layers[layer].num_experts;
  const taken = new Array(count).fill(0);
  let total = 0;
  for (const token of now?.tokens ?? [])
    for (const [expert] of token.experts[layer]) {
      taken[expert] += 1;
      total += 1;
    }
  const box = $("experts");
  if (box.dataset.layer !== String(layer)) {
    box.dataset.layer = layer;
    box.replaceChildren();
    for (let expert = 0; expert < count; expert += 1) {
      const button = make("button", "", `e${expert}`);
      button.type = "button";
      button.setAttribute("aria-controls", "about");
      button.append(make("b", `Expert ${expert}`), make("small"));
      button.addEventListener("click", () => (opened?.expert === expert ? close() : about(expert)));
      box.append(button);
    }
  }
  [...box.children].forEach((button, expert) => {
    const isOff = off.has(keyOf(layer, expert));
    button.className = isOff ? `e${expert} off` : `e${expert}`;
    button.lastChild.textContent = isOff ? "switched off" : total ? `${percent(taken[expert] / total)} of choices` : "";
    button.setAttribute("aria-expanded", String(opened?.layer === layer && opened.expert === expert));
  });
  $("experts-note").textContent =
    `${labelOf(layer)[0].toUpperCase()}${labelOf(layer).slice(1)} has ${count}. ` +
    (total ? `Shares are of its ${total} choices in this text; an even share is ${percent(1 / count)}. ` : "") +
    "Open one to see which tokens it likes, and to switch it off.";
  $("off-note").textContent = off.size ? `Switched off: ${offNames(switchedOff())}.` : "";
}

function close() {
  opened = null;
  $("about").hidden = true;
  legend();
}

async function about(expert) {
  const mine = { layer, expert };
  opened = mine;
  legend();
  let facts;
  try {
    facts = await (await ask(`/api/experts/${layer}/${expert}`)).json();
  } catch (error) {
    $("fault").textContent = error.message;
    return;
  }
  if (opened !== mine) return;
  const isOff = off.has(keyOf(layer, expert));
  $("about-title").textContent = `Expert ${expert} of ${labelOf(layer)}`;
  $("about-load").textContent = facts.choices
    ? `It got ${percent(facts.share)} of this layer's choices since the service began; an even share is ${percent(facts.even_share)}.`
    : "It got no choice since the service began.";
  $("favourites").replaceChildren(
    ...facts.favourites.map((one) => {
      const chip = make("span", "", "token");
      chip.append(make("code", one.text), make("small", `× ${one.lift.toFixed(1)} · n ${one.count}`));
      return chip;
    }),
  );
  $("about-note").textContent =
    (facts.favourites.length
      ? "Its favourite tokens: how many times more often than its share of all tokens would give it, and n choices of the token in all. "
      : "No token is its favourite beyond chance yet. ") +
    `Told of ${facts.told_of.toLocaleString("en")} choices in this layer` +
    (facts.tokens_from_trace ? ", a recorded trace among them." : ", all of them seen while serving.");
  $("switch").textContent = isOff ? "Switch on again, and write again" : "Switch off, and write again";
  $("about").hidden = false;
}

function toggle() {
  const key = keyOf(opened.layer, opened.expert);
  if (!off.delete(key)) off.set(key, { ...opened });
  legend();
  about(opened.expert);
  if (now) write({ ...now.request, switched_off: switchedOff() });
}

// --- the beginning --------------------------------------------------------------------------------------------------

function layers() {
  $("layers").querySelectorAll("label").forEach((label) => label.remove());
  model.layers.forEach((one, index) => {
    const label = make("label");
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "layer", checked: index === layer });
    radio.addEventListener("change", () => {
      layer = index;
      recolour();
    });
    label.title = one.name;
    label.append(radio, make("span", one.label));
    $("layers").append(label);
  });
}

async function start() {
  try {
    model = await (await ask("/api/model")).json();
  } catch (error) {
    $("fault").textContent = error.message;
    return false;
  }
  $("fault").textContent = "";
  const counts = [...new Set(model.layers.map((one) => one.num_experts))].sort((a, b) => a - b);
  const experts = counts.length === 1 ? counts[0] : `${counts[0]} to ${counts.at(-1)}`;
  const plural = model.layers.length === 1 ? "" : "s";
  $("kicker").textContent = `${model.name} · ${model.recipe} · ${model.layers.length} MoE layer${plural} of ${experts} experts`;
  $("max-tokens").max = model.max_tokens;
  if ($("max-tokens").valueAsNumber > model.max_tokens) $("max-tokens").value = model.max_tokens;
  $("chat-label").hidden = !model.has_chat_template;
  layer = model.layers.length - 1;
  layers();
  legend();
  return true;
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (model || (await start())) write(request());
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("switch").addEventListener("click", toggle);
$("numbers").addEventListener("change", ({ target }) => {
  for (const box of [$("now-text"), $("former-text")]) box.classList.toggle("numbered", target.checked);
});
walk($("now-text"));
walk($("former-text"));
start();
