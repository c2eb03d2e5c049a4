// Passages of answers, marked as good or bad with a remark. They go out as JSON in one field.
"use strict";

const passages = [...document.querySelectorAll(".marks")];
const spoken = document.getElementById("spoken");

for (const marks of passages) {
  const text = marks.querySelector(".passage");
  const list = marks.querySelector(".marked");
  marks.hidden = false;

  // What was selected in the answer as it is shown is selected in its plain text too, if it is there once.
  let before = "";
  const summary = marks.querySelector("summary");
  summary.addEventListener("pointerdown", () => { before = String(getSelection()); });
  // not "toggle", which comes late and would take the focus from what was opened since
  summary.addEventListener("click", () => setTimeout(() => { if (marks.open) take(text, before); before = ""; }));
  // Nobody changes the text, but `readonly` would take the cursor away from the keyboard.
  text.addEventListener("beforeinput", (event) => event.preventDefault());
  text.addEventListener("input", () => { text.value = text.defaultValue; });
  text.addEventListener("keydown", (event) => {
    const label = { g: "good", x: "bad" }[event.key.toLowerCase()];
    if (!label || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    add(marks, label);
  });
  for (const button of marks.querySelectorAll("[data-mark]")) {
    // the selection of a text that loses the focus stays on most devices; on all it must
    button.addEventListener("pointerdown", (event) => event.preventDefault());
    button.addEventListener("click", () => add(marks, button.dataset.mark));
  }
  list.addEventListener("keydown", (event) => {
    // Enter in a remark would send the whole form
    if (event.key === "Enter" && event.target.matches("input")) { event.preventDefault(); text.focus(); }
  });
}

function take(text, selected) {
  const words = selected.trim();
  const start = words ? text.value.indexOf(words) : -1;
  text.focus();
  if (start >= 0 && text.value.indexOf(words, start + 1) < 0) text.setSelectionRange(start, start + words.length);
  else if (text.selectionStart === text.value.length) text.setSelectionRange(0, 0);
}

// Characters as the server counts them: code points.
const points = (value, end) => Array.from(value.slice(0, end)).length;

function add(marks, label) {
  const text = marks.querySelector(".passage");
  let [start, end] = [text.selectionStart, text.selectionEnd];
  while (start < end && /\s/.test(text.value[start])) start += 1;
  while (end > start && /\s/.test(text.value[end - 1])) end -= 1;
  if (start === end) { say("Select a passage first."); text.focus(); return; }
  const words = text.value.slice(start, end);
  const item = document.createElement("li");
  Object.assign(item.dataset, { label, start: points(text.value, start), end: points(text.value, end), text: words });
  const flag = Object.assign(document.createElement("span"), { className: `flag ${label}`, textContent: label });
  const quote = Object.assign(document.createElement("q"), { textContent: words, dir: "auto" });
  const remark = Object.assign(document.createElement("input"), { type: "text", maxLength: 500, placeholder: "Remark (optional)" });
  remark.setAttribute("aria-label", "Remark on this passage");
  const remove = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: "Remove" });
  remove.setAttribute("aria-label", `Remove the mark on ${words.slice(0, 40)}`);
  remove.addEventListener("click", () => { item.remove(); say("Mark removed."); text.focus(); });
  item.append(flag, quote, remark, remove);
  marks.querySelector(".marked").append(item);
  say(`Marked as ${label}.`);
  remark.focus();
}

function say(words) { spoken.textContent = words; }

form.addEventListener("submit", () => {
  const found = [];
  for (const item of form.querySelectorAll(".marked > li")) {
    const { label, start, end, text } = item.dataset;
    const answer = Number(item.closest(".marks").dataset.answer);
    found.push({ answer, start: Number(start), end: Number(end), text, label, remark: item.querySelector("input").value });
  }
  if (found.length) form.elements.marks.value = JSON.stringify(found);
});

document.addEventListener("keydown", (event) => {
  if (event.key.toLowerCase() !== "m" || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (!keysOn() || !passages.length || (typing(event.target) && !event.target.matches(".passage"))) return;
  event.preventDefault();
  // again: the next answer's
  const at = passages.indexOf(event.target.closest(".marks"));
  const next = passages[(at + 1) % passages.length];
  const selected = String(getSelection());
  next.open = true;
  take(next.querySelector(".passage"), selected);
});
