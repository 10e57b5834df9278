// Marking a part of a picture: with a pointer, or with the arrow keys and the space bar.
//
// Strokes are kept as lines, so that each can be undone; the mask is transparent where the
// picture is to be drawn again, black elsewhere, and of the picture's own size.

import { button, dialogHead, el, fit, iconButton } from "./dom.js";
import { urlOf } from "./entries.js";

const STEP_SHARE = 0.02;
const FINE_SHARE = 0.005;
// Seen on any picture, and on none as a part of it.
const MARK = [255, 46, 136];

export class MaskEditor {
  #dialog;
  #canvas = el("canvas", {
    tabindex: "0",
    role: "application",
    "aria-label":
      "The picture. Arrow keys move the brush, with Shift in small steps. Space begins and ends a stroke. " +
      "Brackets change the brush.",
  });
  #picture = el("img", { alt: "", draggable: "false" });
  #cursor = el("div", { class: "brush-cursor", "aria-hidden": "true" });
  #stage = el("div", { class: "fitted" }, this.#picture, this.#canvas, this.#cursor);
  #size = el("input", { type: "range", id: "brush-size", min: "2", max: "40", value: "14" });
  #eraser;
  #state = el("p", { class: "sr", role: "status" });
  #base = null;
  #strokes = [];
  #stroke = null;
  #at = { x: 0, y: 0 };
  #isErasing = false;
  #resolve = null;

  constructor(dialog) {
    this.#dialog = dialog;
    this.#eraser = button("brush", "Erase", () => this.#setErasing(!this.#isErasing), { "aria-pressed": "false" });
    dialog.append(
      dialogHead(dialog, "mask-title", "Mark what is to be drawn again"),
      el("div", { class: "mask-stage" }, this.#stage),
      el(
        "div",
        { class: "mask-tools" },
        el("label", { for: "brush-size", class: "brush" }, "Brush", this.#size),
        this.#eraser,
        iconButton("undo", "Undo", () => this.#undo()),
        button("delete", "Clear", () => this.#clear()),
        el("span", { class: "spread" }),
        el("button", { type: "button", class: "primary", id: "mask-done", onclick: () => this.#done() }, "Done"),
      ),
      this.#state,
    );
    dialog.addEventListener("close", () => this.#answer(undefined));
    dialog.addEventListener("keydown", (event) => this.#key(event));
    this.#size.addEventListener("input", () => this.#showCursor());
    this.#listen();
  }

  /** Let a part of a picture be marked.
   *  @returns the mask, null for none, undefined where nothing is to change */
  async open(picture, mask) {
    this.#picture.src = urlOf(picture);
    await this.#picture.decode();
    this.#canvas.width = this.#picture.naturalWidth;
    this.#canvas.height = this.#picture.naturalHeight;
    fit(this.#stage, this.#canvas);
    this.#base = mask ? await createImageBitmap(mask) : null;
    this.#strokes = [];
    this.#at = { x: this.#canvas.width / 2, y: this.#canvas.height / 2 };
    this.#setErasing(false);
    this.#paint();
    this.#dialog.showModal();
    this.#canvas.focus();
    this.#showCursor();
    return new Promise((resolve) => {
      this.#resolve = resolve;
    });
  }

  #listen() {
    const canvas = this.#canvas;
    canvas.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      canvas.focus();
      canvas.setPointerCapture(event.pointerId);
      this.#moveTo(event);
      this.#begin();
    });
    canvas.addEventListener("pointermove", (event) => {
      // All that lies between two frames, so that quick strokes are round.
      for (const part of event.getCoalescedEvents?.() ?? [event]) this.#moveTo(part);
      this.#go();
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.#finish());
    window.addEventListener("resize", () => this.#dialog.open && this.#showCursor());
  }

  #key(event) {
    const undo = (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z";
    if (undo) this.#undo();
    else if (event.key === "[") this.#size.value = Number(this.#size.value) - 2;
    else if (event.key === "]") this.#size.value = Number(this.#size.value) + 2;
    else if (event.target !== this.#canvas) return;
    else if (event.key === " ") this.#stroke ? this.#finish() : this.#begin();
    else if (event.key.startsWith("Arrow")) this.#nudge(event);
    else return;
    event.preventDefault();
    this.#showCursor();
  }

  #nudge(event) {
    const { width, height } = this.#canvas;
    const by = Math.max(width, height) * (event.shiftKey ? FINE_SHARE : STEP_SHARE);
    const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    this.#at = {
      x: Math.min(Math.max(this.#at.x + x * by, 0), width),
      y: Math.min(Math.max(this.#at.y + y * by, 0), height),
    };
    this.#stroke?.points.push(this.#at);
    this.#go();
  }

  /** Of the brush, in the picture's pixels. */
  get #width() {
    return (Number(this.#size.value) / 100) * Math.min(this.#canvas.width, this.#canvas.height);
  }

  #moveTo(event) {
    const box = this.#canvas.getBoundingClientRect();
    const scale = this.#canvas.width / box.width;
    this.#at = { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
    this.#stroke?.points.push(this.#at);
  }

  #begin() {
    this.#stroke = { points: [this.#at], width: this.#width, isErasing: this.#isErasing };
    this.#strokes.push(this.#stroke);
    this.#state.textContent = "A stroke has begun";
    this.#go();
  }

  #finish() {
    if (!this.#stroke) return;
    this.#stroke = null;
    this.#state.textContent = "The stroke has ended";
  }

  #go() {
    this.#showCursor();
    if (this.#stroke) draw(this.#context, this.#stroke, this.#stroke.points.slice(-3));
  }

  get #context() {
    return this.#canvas.getContext("2d", { willReadFrequently: true });
  }

  #paint() {
    const context = this.#context;
    context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    if (this.#base) this.#paintBase(context);
    for (const stroke of this.#strokes) draw(context, stroke, stroke.points);
  }

  /** The mask of last time: its transparent parts are marked. */
  #paintBase(context) {
    const { width, height } = this.#canvas;
    context.drawImage(this.#base, 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const isMarked = pixels.data[i + 3] < 128;
      pixels.data.set([...MARK, isMarked ? 255 : 0], i);
    }
    context.putImageData(pixels, 0, 0);
  }

  #undo() {
    this.#stroke = null;
    if (!this.#strokes.pop()) this.#base = null;
    this.#paint();
    this.#state.textContent = "Undone";
  }

  #clear() {
    this.#strokes = [];
    this.#stroke = null;
    this.#base = null;
    this.#paint();
    this.#state.textContent = "Nothing is marked";
  }

  #setErasing(isErasing) {
    this.#isErasing = isErasing;
    this.#eraser.setAttribute("aria-pressed", String(isErasing));
  }

  #showCursor() {
    const box = this.#canvas.getBoundingClientRect();
    const scale = box.width / this.#canvas.width;
    const width = this.#width * scale;
    Object.assign(this.#cursor.style, {
      width: `${width}px`,
      height: `${width}px`,
      left: `${this.#at.x * scale - width / 2}px`,
      top: `${this.#at.y * scale - width / 2}px`,
    });
  }

  async #done() {
    this.#answer(await this.#mask());
    this.#dialog.close();
  }

  /** See the module; null where nothing is marked. */
  async #mask() {
    const { width, height } = this.#canvas;
    const marked = this.#context.getImageData(0, 0, width, height);
    let isAny = false;
    for (let i = 0; i < marked.data.length; i += 4) {
      const isMarked = marked.data[i + 3] > 127;
      isAny ||= isMarked;
      marked.data.fill(0, i, i + 3);
      marked.data[i + 3] = isMarked ? 0 : 255;
    }
    if (!isAny) return null;
    const page = el("canvas", { width, height });
    page.getContext("2d").putImageData(marked, 0, 0);
    return new Promise((resolve) => {
      page.toBlob(resolve, "image/png");
    });
  }

  #answer(mask) {
    this.#resolve?.(mask);
    this.#resolve = null;
  }
}

function draw(context, { width, isErasing }, points) {
  context.globalCompositeOperation = isErasing ? "destination-out" : "source-over";
  context.strokeStyle = `rgb(${MARK.join(" ")})`;
  context.lineWidth = width;
  context.lineCap = "round";
  context.lineJoin = "round";
  context.beginPath();
  context.moveTo(points[0].x, points[0].y);
  // A line of no length, so that a single point is a dot.
  for (const { x, y } of points) context.lineTo(x, y);
  context.stroke();
  context.globalCompositeOperation = "source-over";
}
