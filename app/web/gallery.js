// The pictures, the newest first, and before them what is being drawn.

import { $, el, icon, iconButton, show } from "./dom.js";
import { isUnfinished, urlOf } from "./entries.js";
import { DRAGGED } from "./references.js";
import { counted, standing } from "./words.js";

const PAGE = 60;
const TICK_MS = 1000;
const EXTENSIONS = { "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp" };

/** One picture of an entry; `key` names it. */
export const keyOf = (entry, picture) => `${entry.id}:${picture.seed}`;

/** Save a picture under a name that says what it is. */
export function download({ entry, picture }) {
  const words = entry.request.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu)?.slice(0, 6).join("-") ?? "picture";
  const name = `${words.slice(0, 60)}-${picture.seed}.${EXTENSIONS[picture.blob.type] ?? "png"}`;
  el("a", { href: urlOf(picture.blob), download: name }).click();
}

export class Gallery {
  #grid = $("grid");
  #actions;
  #entries = new Map();
  #cards = new Map();
  #most = PAGE;
  #chosen = null;

  /** @param actions what a card's buttons do: open, reuse, reference, compare, remove with a
   *  picture; cancel, retry, dismiss with an entry */
  constructor(actions) {
    this.#actions = actions;
    $("older").addEventListener("click", () => {
      this.#most += PAGE;
      this.render();
    });
    setInterval(() => {
      for (const entry of this.#entries.values()) if (isUnfinished(entry)) this.#cards.get(entry.id)?.update();
    }, TICK_MS);
  }

  /** All pictures in the order in which they are shown. */
  get pictures() {
    return [...this.#entries.values()]
      .sort((a, b) => b.created - a.created)
      .flatMap((entry) => entry.pictures.map((picture) => ({ entry, picture, key: keyOf(entry, picture) })));
  }

  find(key) {
    return this.pictures.find((shown) => shown.key === key) ?? null;
  }

  put(...entries) {
    for (const entry of entries) this.#entries.set(entry.id, entry);
    this.render();
  }

  drop(entry) {
    this.#entries.delete(entry.id);
    this.render();
  }

  /** The picture that waits for another to be compared with; null for none. */
  choose(key) {
    this.#chosen = key;
    for (const card of this.#cards.values()) card.mark?.(key);
  }

  render() {
    const shown = [...this.#entries.values()].sort((a, b) => b.created - a.created);
    const wanted = shown.flatMap((entry) =>
      entry.status === "completed"
        ? entry.pictures.map((picture) => [keyOf(entry, picture), () => this.#pictureCard(entry, picture)])
        : entry.status === "cancelled"
          ? []
          : [[`${entry.id}${entry.status === "failed" ? ":failed" : ""}`, () => this.#entryCard(entry)]],
    );
    const cards = wanted.slice(0, this.#most).map(([key, make]) => {
      if (!this.#cards.has(key)) this.#cards.set(key, make());
      const card = this.#cards.get(key);
      card.update?.();
      return [key, card];
    });
    this.#arrange(new Map(cards));
    const pictures = this.pictures.length;
    $("count").textContent = pictures ? counted(pictures, "picture") : "";
    show($("older"), wanted.length > this.#most);
    show(this.#grid, wanted.length > 0);
    show($("welcome"), wanted.length === 0);
  }

  /** Put the cards in order, without touching those that stand right. */
  #arrange(cards) {
    const isFocused = this.#grid.contains(document.activeElement);
    for (const [key, card] of this.#cards) {
      if (cards.has(key)) continue;
      card.element.remove();
      this.#cards.delete(key);
    }
    let next = this.#grid.firstElementChild;
    for (const { element } of cards.values()) {
      if (element === next) next = next.nextElementSibling;
      else this.#grid.insertBefore(element, next);
    }
    // The button that was used has gone with its card.
    if (isFocused && !this.#grid.contains(document.activeElement)) {
      (this.#grid.querySelector("button") ?? $("prompt")).focus();
    }
  }

  #pictureCard(entry, picture) {
    const shown = { entry, picture, key: keyOf(entry, picture) };
    const { prompt } = entry.request;
    const image = el("img", {
      src: urlOf(picture.blob),
      alt: prompt,
      width: picture.width,
      height: picture.height,
      loading: "lazy",
      draggable: "true",
    });
    image.addEventListener("dragstart", (event) => event.dataTransfer.setData(DRAGGED, shown.key));
    const compare = iconButton("compare", "Compare with another", () => this.#actions.compare(shown), { "aria-pressed": "false" });
    const element = el(
      "li",
      { class: "card", "data-key": shown.key },
      el("button", { type: "button", class: "open", onclick: () => this.#actions.open(shown) }, image),
      el(
        "div",
        { class: "card-tools" },
        iconButton("reuse", "Use its settings again", () => this.#actions.reuse(shown)),
        iconButton("reference", "Use as a reference", () => this.#actions.reference(shown)),
        compare,
        iconButton("download", "Download", () => download(shown)),
        iconButton("delete", "Delete", () => this.#actions.remove(shown)),
      ),
      el("p", { class: "caption", "aria-hidden": "true" }, prompt),
    );
    const mark = (key) => {
      compare.setAttribute("aria-pressed", String(key === shown.key));
      element.classList.toggle("chosen", key === shown.key);
    };
    mark(this.#chosen);
    return { element, mark };
  }

  /** Of what has no picture yet, or never will. */
  #entryCard(entry) {
    return entry.status === "failed" ? this.#failedCard(entry) : this.#waitingCard(entry);
  }

  #waitingCard(entry) {
    const preview = el("img", { alt: "What is coming", hidden: true });
    const words = el("p", { class: "standing" });
    const progress = el("progress", { max: 100, "aria-label": `Drawing: ${entry.request.prompt}` });
    const cancel = iconButton("close", "Cancel", () => this.#actions.cancel(entry));
    const frame = el("div", { class: "frame" }, preview, el("span", { class: "pulse", "aria-hidden": "true" }));
    const element = el(
      "li",
      { class: "card waiting" },
      frame,
      el("div", { class: "waiting-row" }, el("div", {}, words, progress), cancel),
      el("p", { class: "caption" }, entry.request.prompt),
    );
    const update = () => {
      words.textContent = standing(entry);
      element.dataset.status = entry.status;
      if (entry.live.percent === undefined) progress.removeAttribute("value");
      else progress.value = entry.live.percent;
      show(progress, entry.status === "running");
      const shown = entry.live.preview;
      show(preview, Boolean(shown));
      if (shown && preview.src !== urlOf(shown)) preview.src = urlOf(shown);
    };
    return { element, update };
  }

  #failedCard(entry) {
    const retry = el("button", { type: "button", class: "quiet", onclick: () => this.#actions.retry(entry) }, icon("reuse"), "Try again");
    const dismiss = el("button", { type: "button", class: "quiet", onclick: () => this.#actions.dismiss(entry) }, "Remove");
    const words = entry.error.charAt(0).toUpperCase() + entry.error.slice(1);
    const element = el(
      "li",
      { class: "card failed" },
      el("div", { class: "frame" }, el("p", { class: "error" }, words), el("div", { class: "buttons" }, retry, dismiss)),
      el("p", { class: "caption" }, entry.request.prompt),
    );
    return { element };
  }
}
