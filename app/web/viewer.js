// One picture, large, with what it was drawn with and what can be done with it.

import { $, button, closeOnBackdrop, dialogHead, el, iconButton } from "./dom.js";
import { urlOf } from "./entries.js";
import { download } from "./gallery.js";
import { facts } from "./words.js";

export class Viewer {
  #dialog = $("viewer");
  #gallery;
  #actions;
  #key = null;

  /** @param actions what its buttons do with a picture: reuse, reference, mark, compare, remove */
  constructor(gallery, actions) {
    this.#gallery = gallery;
    this.#actions = actions;
    closeOnBackdrop(this.#dialog);
    this.#dialog.addEventListener("keydown", (event) => {
      if (event.target.matches("input, textarea")) return;
      if (event.key === "ArrowLeft") this.#step(-1);
      else if (event.key === "ArrowRight") this.#step(1);
      else if (event.key === "Delete") this.#remove(this.#gallery.find(this.#key));
      else return;
      event.preventDefault();
    });
    this.#dialog.addEventListener("close", () => this.#back());
  }

  open(shown) {
    this.#fill(shown);
    if (!this.#dialog.open) this.#dialog.showModal();
    this.#dialog.querySelector(".viewer-picture").focus();
  }

  #fill(shown) {
    const { entry, picture, key } = shown;
    this.#key = key;
    const { prompt } = entry.request;
    const all = this.#gallery.pictures;
    const at = all.findIndex((other) => other.key === key);
    const leave = (action) => () => {
      this.#dialog.close();
      action(shown);
    };
    const image = el("img", { src: urlOf(picture.blob), alt: prompt, width: picture.width, height: picture.height });
    this.#dialog.replaceChildren(
      el(
        "div",
        { class: "viewer-picture", tabindex: "-1" },
        image,
        iconButton("previous", "Newer picture", () => this.#step(-1), { class: "icon side previous", disabled: at <= 0 }),
        iconButton("next", "Older picture", () => this.#step(1), { class: "icon side next", disabled: at >= all.length - 1 }),
      ),
      el(
        "div",
        { class: "viewer-side" },
        dialogHead(this.#dialog, "viewer-title", `Picture ${at + 1} of ${all.length}`),
        el("p", { class: "viewer-prompt" }, prompt),
        references(entry),
        el("dl", { class: "facts" }, ...facts(entry, picture).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))])),
        ...entry.warnings.map((words) => el("p", { class: "note" }, words)),
        el(
          "div",
          { class: "viewer-buttons" },
          button("reuse", "Use settings", leave(this.#actions.reuse)),
          button("reference", "As reference", leave(this.#actions.reference)),
          button("brush", "Change a part", leave(this.#actions.mark)),
          button("compare", "Compare", leave(this.#actions.compare)),
          button("download", "Download", () => download(shown)),
          button("delete", "Delete", () => this.#remove(shown)),
        ),
      ),
    );
  }

  #step(by) {
    const all = this.#gallery.pictures;
    const next = all[all.findIndex(({ key }) => key === this.#key) + by];
    if (next) this.open(next);
  }

  #remove(shown) {
    const all = this.#gallery.pictures;
    const at = all.findIndex(({ key }) => key === shown.key);
    this.#actions.remove(shown);
    const next = all[at + 1] ?? all[at - 1];
    if (next) this.open(next);
    else this.#dialog.close();
  }

  /** The focus goes to the picture that was looked at last. */
  #back() {
    document.querySelector(`[data-key="${this.#key}"] .open`)?.focus();
  }
}

function references(entry) {
  if (!entry.references.length) return null;
  const items = entry.references.map((blob, index) => el("li", {}, el("img", { src: urlOf(blob), alt: `Reference ${index + 1}` })));
  return el("ul", { class: "viewer-references", "aria-label": "References" }, ...items);
}
