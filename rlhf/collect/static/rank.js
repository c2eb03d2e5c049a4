// Order answers by keys, by touch and by dragging. Each answer's list of places is the form itself, and works alone.
"use strict";

const strip = document.getElementById("order");
const rest = document.getElementById("unplaced");
const places = [...form.querySelectorAll("select[name^=place-]")];
const everyAnswer = places.map((_, index) => index + 1);
// numbers of answers, equally good ones together, the best first
let tiers = [];

document.getElementById("ordering").hidden = false;
for (const steps of form.querySelectorAll(".steps")) steps.hidden = false;
for (const select of places) select.addEventListener("change", () => { read(); draw(); });

function read() {
  const groups = new Map();
  places.forEach((select, index) => {
    const place = Number(select.value);
    if (place) groups.set(place, [...(groups.get(place) || []), index + 1]);
  });
  tiers = [...groups.keys()].sort((a, b) => a - b).map((place) => groups.get(place));
}

const tierOf = (answer) => tiers.findIndex((tier) => tier.includes(answer));

function without(answer) {
  tiers = tiers.map((tier) => tier.filter((other) => other !== answer)).filter((tier) => tier.length);
}

// Keep an order: write places into the lists, draw it, and say where the answer is now.
function settle(answer) {
  const focused = document.activeElement?.dataset?.chip;
  places.forEach((select, index) => { select.value = String(tierOf(index + 1) + 1 || ""); });
  draw();
  if (focused) form.querySelector(`[data-chip="${focused}"]`)?.focus();
  const at = tierOf(answer);
  const equals = at < 0 ? [] : tiers[at].filter((other) => other !== answer);
  const tied = equals.length ? `, as good as ${equals.join(" and ")}` : "";
  say(at < 0 ? `Answer ${answer} has no place` : `Answer ${answer}: place ${at + 1} of ${tiers.length}${tied}`);
}

function append(answer) {
  without(answer);
  tiers.push([answer]);
  settle(answer);
}

// One step better (-1) or worse (1): out of a tie, or into one with the neighbours.
function step(answer, by) {
  const at = tierOf(answer);
  if (at < 0) { append(answer); return; }
  const isTied = tiers[at].length > 1;
  if (!isTied && !tiers[at + by]) return;
  if (isTied) {
    tiers[at] = tiers[at].filter((other) => other !== answer);
    tiers.splice(by < 0 ? at : at + 1, 0, [answer]);
  } else {
    tiers[at + by].push(answer);
    tiers[at + by].sort();
    tiers.splice(at, 1);
  }
  settle(answer);
}

function chip(answer) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "chip", textContent: answer });
  const at = tierOf(answer);
  button.dataset.chip = answer;
  button.setAttribute("aria-label", at < 0 ? `Answer ${answer}: give it the next place` : `Answer ${answer}, place ${at + 1}. Arrow keys move it`);
  button.addEventListener("click", () => { if (tierOf(answer) < 0) append(answer); });
  button.addEventListener("keydown", (event) => {
    // the key that saves everywhere else; Space presses the button
    if (event.key === "Enter") { event.preventDefault(); event.stopPropagation(); save(); return; }
    const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    step(answer, by);
  });
  button.addEventListener("pointerdown", (event) => drag(event, button, answer));
  return button;
}

function item(name, children, at) {
  const element = Object.assign(document.createElement("li"), { className: name });
  element.dataset[name] = at;
  element.append(...children);
  return element;
}

function draw() {
  const items = [];
  tiers.forEach((tier, at) => {
    items.push(item("gap", [], at), item("tier", tier.map(chip), at));
  });
  strip.replaceChildren(...items, item("gap", [], tiers.length));
  rest.replaceChildren(...everyAnswer.filter((answer) => tierOf(answer) < 0).map(chip));
  rest.hidden = !rest.childElementCount;
  for (const card of form.querySelectorAll(".answer")) card.classList.toggle("placed", tierOf(Number(card.dataset.number)) >= 0);
}

// A chip follows the finger or the mouse; where it is let go is its place.
function drag(event, button, answer) {
  if (event.button) return;
  const from = { x: event.clientX, y: event.clientY };
  let moved = false;
  button.setPointerCapture(event.pointerId);
  button.addEventListener("pointermove", move);
  button.addEventListener("pointerup", drop, { once: true });
  button.addEventListener("pointercancel", end, { once: true });

  function move(now) {
    const [x, y] = [now.clientX - from.x, now.clientY - from.y];
    if (!moved && Math.hypot(x, y) < 8) return;
    moved = true;
    form.classList.add("dragging");
    button.style.transform = `translate(${x}px, ${y}px)`;
    over(now)?.classList.add("over");
  }
  function over(now) {
    for (const marked of form.querySelectorAll(".over")) marked.classList.remove("over");
    button.style.pointerEvents = "none";
    const found = document.elementFromPoint(now.clientX, now.clientY)?.closest(".gap, .tier, #unplaced");
    button.style.pointerEvents = "";
    return found;
  }
  function end() {
    button.removeEventListener("pointermove", move);
    form.classList.remove("dragging");
    button.style.transform = "";
  }
  function drop(now) {
    const target = moved ? over(now) : null;
    end();
    if (!moved) return;
    // a click may follow, which is none
    button.addEventListener("click", (click) => click.stopImmediatePropagation(), { once: true, capture: true });
    // a finger whose chip is drawn again under it would make no more clicks
    setTimeout(() => { if (target) put(answer, target); else draw(); });
  }
}

function put(answer, target) {
  const own = tierOf(answer);
  if (target === rest) {
    without(answer);
  } else if ("tier" in target.dataset) {
    const tier = tiers[Number(target.dataset.tier)];
    if (tier.includes(answer)) return;
    tier.push(answer);
    tier.sort();
    const equals = [...tier];
    if (own >= 0) tiers[own] = tiers[own].filter((other) => other !== answer);
    tiers = tiers.filter((each) => each.length);
    tiers[tiers.findIndex((each) => each.includes(equals[0]))] = equals;
  } else {
    // found again by what stands behind it, since taking the answer out moves the rest
    const behind = tiers.slice(Number(target.dataset.gap)).find((tier) => tier.some((other) => other !== answer));
    const mark = behind?.find((other) => other !== answer);
    without(answer);
    const at = mark === undefined ? tiers.length : tierOf(mark);
    tiers.splice(at, 0, [answer]);
  }
  settle(answer);
}

for (const button of form.querySelectorAll("[data-step]")) {
  button.addEventListener("click", () => step(Number(button.closest(".answer").dataset.number), Number(button.dataset.step)));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !keysOn()) return;
  if (typing(event.target) || event.target.closest("select")) return;
  const answer = Number(event.key);
  const key = event.key.toLowerCase();
  if (everyAnswer.includes(answer)) {
    event.preventDefault();
    if (tierOf(answer) < 0) append(answer);
    form.querySelector(`[data-chip="${answer}"]`).focus({ preventScroll: true });
  } else if (key === "t" || key === "=") {
    event.preventDefault();
    // the one at hand, else the last: as good as the one before it, and back
    const last = tiers.at(-1)?.at(-1);
    const chosen = Number(document.activeElement?.dataset?.chip) || last;
    const at = tierOf(chosen);
    if (at >= 0) step(chosen, tiers[at].length > 1 ? 1 : -1);
  } else if (key === "backspace") {
    event.preventDefault();
    const last = tiers.at(-1)?.at(-1);
    if (last) { without(last); settle(last); }
  } else if (key === "s") {
    event.preventDefault();
    document.getElementById("skip").click();
  }
});

read();
draw();
