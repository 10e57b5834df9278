// Elements made in code. Text is always text, never markup: the page's policy allows no other.

export const $ = (id) => document.getElementById(id);

/** An element; "on..." takes listeners, null and false leave an attribute out. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  svg.setAttribute("aria-hidden", "true");
  return svg;
}

/** A button that shows a sign only; its words are for screen readers and for the pointer. */
export function iconButton(name, words, onclick, attributes = {}) {
  return el(
    "button",
    { type: "button", class: "icon", "aria-label": words, title: words, onclick, ...attributes },
    icon(name),
  );
}

/** A button with a sign and words. */
export function button(name, words, onclick, attributes = {}) {
  return el("button", { type: "button", class: "quiet", onclick, ...attributes }, icon(name), words);
}

/** Make an element as large as its place allows, in the shape of a picture. */
export function fit(element, { width, height }) {
  element.style.aspectRatio = `${width} / ${height}`;
  element.style.width = `min(100%, 60dvh * ${width / height})`;
}

export function show(element, isShown) {
  element.hidden = !isShown;
}

/** Say something to screen readers. */
export function announce(text) {
  const place = $("announcer");
  place.textContent = "";
  // A change of an empty region is read even if the words are those of last time.
  requestAnimationFrame(() => {
    place.textContent = text;
  });
}

const TOAST_MS = 7000;

/** Words at the bottom that go by themselves, with one thing to do about them.
 *  `onGone` is called when they go unused. */
export function toast(text, action, onAction, onGone = () => {}) {
  const shown = el("div", { class: "toast", role: "status" }, el("span", {}, text));
  let timer;
  const go = (then) => {
    clearTimeout(timer);
    shown.remove();
    then();
  };
  const wait = () => {
    timer = setTimeout(() => go(onGone), TOAST_MS);
  };
  if (action) {
    shown.append(el("button", { type: "button", class: "quiet", onclick: () => go(onAction) }, action));
  }
  // Whoever is about to use it has all the time there is.
  shown.addEventListener("mouseenter", () => clearTimeout(timer));
  shown.addEventListener("mouseleave", wait);
  shown.addEventListener("focusin", () => clearTimeout(timer));
  shown.addEventListener("focusout", wait);
  $("toasts").append(shown);
  wait();
}

/** The head of a dialog: its title and the way out. */
export function dialogHead(dialog, id, title) {
  return el(
    "header",
    { class: "dialog-head" },
    el("h2", { id }, title),
    iconButton("close", "Close", () => dialog.close()),
  );
}

/** A click beside a dialog closes it, as everywhere. */
export function closeOnBackdrop(dialog) {
  dialog.addEventListener("pointerdown", (event) => {
    if (event.target === dialog) dialog.close();
  });
}

/** Something small to choose from that opens at a button and closes by itself. */
export function popover(opener, panel, fill) {
  const close = (isFocusBack) => {
    if (panel.hidden) return;
    panel.hidden = true;
    opener.setAttribute("aria-expanded", "false");
    if (isFocusBack) opener.focus();
  };
  opener.addEventListener("click", () => {
    if (!panel.hidden) return close(true);
    panel.replaceChildren(...fill(() => close(false)));
    panel.hidden = false;
    opener.setAttribute("aria-expanded", "true");
    panel.querySelector("button")?.focus();
  });
  panel.addEventListener("keydown", (event) => {
    const items = [...panel.querySelectorAll("button")];
    const at = items.indexOf(document.activeElement);
    if (event.key === "Escape") close(true);
    else if (event.key === "ArrowDown") items[(at + 1) % items.length]?.focus();
    else if (event.key === "ArrowUp") items.at(at - 1)?.focus();
    else return;
    event.preventDefault();
  });
  document.addEventListener("pointerdown", (event) => {
    if (!panel.contains(event.target) && !opener.contains(event.target)) close(false);
  });
  panel.addEventListener("focusout", (event) => {
    if (event.relatedTarget && !panel.contains(event.relatedTarget)) close(false);
  });
}
