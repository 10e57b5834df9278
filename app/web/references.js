// Reference pictures: chosen, dropped, pasted or taken from the gallery; the first one's mask.

import { urlOf } from "./entries.js";
import { $, el, iconButton, show } from "./dom.js";

const TYPES = new Set(["image/png", "image/jpeg", "image/webp"]);
/** What a picture of the gallery is called while it is dragged. */
export const DRAGGED = "application/x-fluxd-picture";

/** Tells "change", "error" with words, "mark" when the first one's part is to be marked. */
export class References extends EventTarget {
  #items = [];
  #mask = null;

  /** @param findDragged gives the blob of a gallery's picture that was dropped here; none for
   *  one of another window */
  constructor(findDragged) {
    super();
    const file = $("reference-file");
    $("add-reference").addEventListener("click", () => file.click());
    file.addEventListener("change", async () => {
      await this.add([...file.files]);
      file.value = "";
    });
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (!files.length || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      this.add(files);
    });
    this.#acceptDrops(findDragged);
  }

  get blobs() {
    return this.#items.map((item) => item.blob);
  }

  get mask() {
    return this.#mask;
  }

  /** Of the first one, upright, in pixels; null where there is none. */
  get size() {
    const first = this.#items[0];
    return first ? { width: first.width, height: first.height } : null;
  }

  /** Add pictures; what is none is said in words. */
  async add(blobs) {
    for (const blob of blobs) {
      const name = blob.name ? `${blob.name} ` : "What was given ";
      if (!TYPES.has(blob.type)) {
        this.#tell("error", `${name}is not a PNG, JPEG or WebP picture`);
        return;
      }
      try {
        const bitmap = await createImageBitmap(blob);
        this.#items.push({ blob, width: bitmap.width, height: bitmap.height });
        bitmap.close();
      } catch {
        this.#tell("error", `${name}cannot be read; it may be damaged`);
        return;
      }
    }
    if (blobs.length) this.#changed();
  }

  /** Replace all by others, as they were asked before. */
  async set(blobs, mask) {
    this.#items = [];
    this.#mask = null;
    await this.add(blobs);
    this.#mask = mask;
    this.#changed();
  }

  setMask(mask) {
    this.#mask = mask;
    this.#changed();
  }

  #remove(index) {
    this.#items.splice(index, 1);
    if (index === 0) this.#mask = null;
    this.#changed();
    const buttons = $("references").querySelectorAll("button.icon");
    (buttons[index] ?? $("add-reference")).focus();
  }

  #changed() {
    $("references").replaceChildren(...this.#items.map((item, index) => this.#thumb(item, index)));
    show($("references"), this.#items.length > 0);
    show($("strength-field"), this.#mask !== null);
    this.#tell("change");
  }

  #thumb({ blob, width, height }, index) {
    const isMarked = index === 0 && this.#mask !== null;
    const number = index + 1;
    const picture = el("img", { src: urlOf(blob), alt: `Reference ${number}, ${width} by ${height} pixels`, draggable: "false" });
    const marks = isMarked ? el("img", { class: "marks", src: urlOf(this.#mask), alt: "a part of it is marked" }) : null;
    const mark =
      index === 0
        ? iconButton("brush", isMarked ? "Change the marked part" : "Mark a part to draw again", () => this.#tell("mark"), {
            class: isMarked ? "icon on" : "icon",
            id: "mark-part",
          })
        : null;
    const remove = iconButton("close", `Remove reference ${number}`, () => this.#remove(index));
    return el("li", { class: "reference" }, picture, marks, el("div", { class: "reference-tools" }, mark, remove));
  }

  #acceptDrops(findDragged) {
    const cover = $("drop-cover");
    let depth = 0;
    const isPicture = (event) => event.dataTransfer.types.some((type) => type === "Files" || type === DRAGGED);
    const over = (by) => (event) => {
      if (!isPicture(event)) return;
      event.preventDefault();
      depth += by;
      show(cover, depth > 0);
    };
    document.addEventListener("dragenter", over(1));
    document.addEventListener("dragleave", over(-1));
    document.addEventListener("dragover", (event) => isPicture(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      depth = 0;
      show(cover, false);
      if (!isPicture(event) || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      const own = findDragged(event.dataTransfer.getData(DRAGGED));
      this.add(own ? [own] : [...event.dataTransfer.files]);
    });
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
