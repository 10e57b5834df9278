// What the browser keeps: jobs with their pictures, in IndexedDB; else in memory.

const NAME = "fluxd";
const ENTRIES = "entries";

export class Store {
  #database = null;
  #memory = new Map();

  /** Opens it. `isKept` then says whether pictures outlive the page. */
  async open() {
    try {
      this.#database = await opened();
    } catch {
      // Switched off, as in some private windows.
    }
    return this;
  }

  get isKept() {
    return this.#database !== null;
  }

  /** All entries, the newest first. */
  async all() {
    const found = this.isKept ? await this.#run("readonly", (all) => all.getAll()) : [...this.#memory.values()];
    return found.sort((a, b) => b.created - a.created);
  }

  /** @throws {DOMException} QuotaExceededError when the browser takes no more. */
  async put(entry) {
    // How it stands at the moment is nobody's memory.
    const { live: _, ...kept } = entry;
    if (this.isKept) await this.#run("readwrite", (all) => all.put(kept));
    else this.#memory.set(entry.id, kept);
  }

  async remove(id) {
    if (this.isKept) await this.#run("readwrite", (all) => all.delete(id));
    else this.#memory.delete(id);
  }

  #run(mode, change) {
    return new Promise((resolve, reject) => {
      const transaction = this.#database.transaction(ENTRIES, mode);
      const request = change(transaction.objectStore(ENTRIES));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error ?? request.error);
    });
  }
}

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(ENTRIES, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another version of the page holds it"));
  });
}

/** Ask the browser not to clear it when the disk fills up. It may say no. */
export function askToKeep() {
  // Only where the connection is trusted, as on this machine.
  navigator.storage?.persist?.().catch(() => {});
}
