// Keys, and what plain forms cannot do. Without it everything works by mouse, touch and tab.
"use strict";

const form = document.getElementById("judge");
const undo = document.getElementById("undo");
const stored = "single-keys";
const keysOn = () => { try { return localStorage.getItem(stored) !== "off"; } catch { return true; } };

// A form goes out once, however often it is pressed; the server takes it once in any case.
for (const each of document.querySelectorAll("form[method=post]")) {
  each.addEventListener("submit", (event) => {
    if (each.dataset.sent) { event.preventDefault(); return; }
    each.dataset.sent = "yes";
    each.setAttribute("aria-busy", "true");
  });
}
window.addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

// Screen readers announce a status that changes, not one that was there.
const note = document.getElementById("note");
if (note && note.textContent) {
  const text = note.textContent;
  note.textContent = "";
  setTimeout(() => { note.textContent = text; }, 150);
  if ("brief" in note.dataset) setTimeout(() => { note.classList.add("gone"); }, 2500);
}
if (/[?&]note=/.test(location.search)) history.replaceState(null, "", location.pathname);

// The guide stays as it was left on this device; on a narrow screen it begins closed.
const guide = document.querySelector("#judge .guide");
if (guide) {
  let left = null;
  try { left = localStorage.getItem("guide"); } catch { /* private window */ }
  guide.open = left ? left === "open" : matchMedia("(min-width: 62rem)").matches;
  guide.addEventListener("toggle", () => { try { localStorage.setItem("guide", guide.open ? "open" : "closed"); } catch { /* private window */ } });
}

const toggle = document.getElementById("keys-on");
if (toggle) {
  toggle.checked = keysOn();
  toggle.addEventListener("change", () => { try { localStorage.setItem(stored, toggle.checked ? "on" : "off"); } catch { /* private window */ } });
}

function typing(target) {
  return target instanceof HTMLTextAreaElement || (target instanceof HTMLInputElement && target.type === "text");
}

function save() {
  if (form.reportValidity()) form.requestSubmit();
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && form) { save(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (typing(event.target)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const start = document.getElementById("start");
  if (event.key === "Enter" && start && !event.target.closest("a, button, input, summary")) { start.click(); return; }
  if (event.key === "Enter" && form && !event.target.closest("a, button, summary, select, .why")) { event.preventDefault(); save(); return; }
  // a digit in a list chooses its entry
  if (event.target.closest("select")) {
    if (event.key === "Escape") event.target.blur();
    if (/^[0-9]$/.test(event.key)) return;
  }
  if (!keysOn()) return;
  const key = event.key.toLowerCase();
  if (key === "u" && undo && !undo.disabled) { event.preventDefault(); undo.click(); return; }
  if (!form) return;
  if (key === "w") {
    event.preventDefault();
    form.querySelector(".why").open = true;
    document.getElementById("reason").focus();
    return;
  }
  const radio = form.querySelector(`input[data-key="${CSS.escape(key)}"]`);
  if (!radio) return;
  event.preventDefault();
  if (radio.checked) { save(); return; }
  if (radio.name === "strength" && !form.querySelector("#pick-1:checked, #pick-2:checked")) return;
  radio.checked = true;
  radio.focus({ preventScroll: true });
});

// A click on an answer chooses it, unless text was being selected or a link followed.
for (const answer of document.querySelectorAll("[data-picks]")) {
  answer.addEventListener("click", (event) => {
    if (event.target.closest("a, summary, button, .rubric, .marks") || String(getSelection())) return;
    document.getElementById(answer.dataset.picks).checked = true;
  });
}
