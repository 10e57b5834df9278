// Numbers and times as people say them.

const ORDINALS = new Intl.PluralRules("en", { type: "ordinal" });
const ENDINGS = { one: "st", two: "nd", few: "rd", other: "th" };

export const ordinal = (number) => `${number}${ENDINGS[ORDINALS.select(number)]}`;

export function seconds(value) {
  if (value < 1) return "less than a second";
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return `${Math.round(value / 3600)} h`;
}

export const counted = (number, one) => `${number} ${one}${number === 1 ? "" : "s"}`;

export function moment(ms) {
  return new Date(ms).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

/** How a job that has not ended stands, in one line. */
export function standing(entry) {
  const live = entry.live;
  const eta = live.eta && Math.max(live.eta - (Date.now() - live.at) / 1000, 0.5);
  if (entry.status === "sending") return live.waiting ?? "Sending…";
  if (live.waiting) return live.waiting;
  if (entry.status === "queued") {
    const place = live.position === 1 ? "Next in line" : live.position ? `${ordinal(live.position)} in line` : "In line";
    return eta ? `${place} · starts in about ${seconds(eta)}` : place;
  }
  if (!live.step) return "Starting…";
  const picture = entry.request.n > 1 ? `Picture ${live.image + 1} of ${entry.request.n} · ` : "";
  const left = eta ? ` · ${seconds(eta)} left` : "";
  return `${picture}Step ${live.step} of ${live.steps}${left}`;
}

/** What a picture was drawn with, as [name, value] in the order to be read. */
export function facts(entry, picture) {
  const params = entry.params ?? {};
  const found = [
    ["Size", `${picture.width} × ${picture.height}`],
    ["Seed", String(picture.seed)],
    ["Steps", params.steps],
    ["Schedule", params.schedule === "power" ? `power, exponent ${params.power_alpha}` : params.schedule],
    ["Guidance", params.guidance],
    ["Steered away from", params.negative_prompt],
    ["References", params.references || null],
    ["Strength", params.strength],
    ["Model", entry.model],
    ["Took", entry.timings?.total_ms ? seconds(entry.timings.total_ms / 1000) : null],
    ["Drawn", moment(entry.created)],
  ];
  return found.filter(([, value]) => value !== null && value !== undefined && value !== "");
}
