// The API key: asked for when the service wants one, tried, and kept in this browser.

import { apiKey, ask, keepApiKey } from "./api.js";
import { $, dialogHead, el, show } from "./dom.js";

/** Tells "given" when a key that works was given. */
export class KeyDialog extends EventTarget {
  #dialog = $("key");
  #input = el("input", {
    type: "password",
    id: "key-input",
    autocomplete: "off",
    spellcheck: "false",
    "aria-describedby": "key-error",
  });
  #error = el("p", { class: "error", id: "key-error", hidden: true });

  constructor() {
    super();
    const form = el(
      "form",
      { class: "dialog-body", novalidate: true },
      el("p", {}, "This service wants to know who asks. The key stays in this browser."),
      el("div", { class: "field" }, el("label", { for: "key-input" }, "Key"), this.#input, this.#error),
      el(
        "div",
        { class: "dialog-buttons" },
        el("button", { type: "button", class: "quiet", id: "key-forget", onclick: () => this.#forget() }, "Forget the key"),
        el("button", { type: "submit", class: "primary" }, "Use this key"),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#try(this.#input.value.trim());
    });
    this.#dialog.append(dialogHead(this.#dialog, "key-title", "API key"), form);
    $("key-button").addEventListener("click", () => this.open());
  }

  /** Ask for a key, and say why in words. */
  open(words = "") {
    show($("key-button"), true);
    show($("key-forget"), apiKey() !== null);
    if (this.#dialog.open) return;
    this.#input.value = "";
    this.#tell(words);
    this.#dialog.showModal();
    this.#input.focus();
  }

  async #try(key) {
    if (!key) return this.#tell("Enter the key, as it was given to you.");
    if (!/^[\x21-\x7e]+$/.test(key)) return this.#tell("A key has letters, digits and signs only, and no spaces.");
    try {
      await ask("v1/models", { key });
      keepApiKey(key);
    } catch (error) {
      return this.#tell(error.message);
    }
    this.#dialog.close();
    this.dispatchEvent(new Event("given"));
  }

  #forget() {
    keepApiKey(null);
    this.#dialog.close();
  }

  #tell(words) {
    const text = words.charAt(0).toUpperCase() + words.slice(1);
    this.#error.textContent = text;
    show(this.#error, text !== "");
    this.#input.setAttribute("aria-invalid", String(text !== ""));
  }
}
